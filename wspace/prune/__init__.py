"""Pruning: keep a subset of the units of every group.

A weight space says which units are interchangeable, and in which tensors each of them stands. To
prune is to keep some of them: `prune` returns the smaller module, `Mask` tries it on the module as
it is, `Restriction` is the small weight space with the way to it and back. Which units matter is
said by an importance, how many go by a `Selection`, and what that saves by a `Cost`.
"""

from wspace.prune.cost import Cost as Cost
from wspace.prune.cost import latency as latency
from wspace.prune.loading import counts_of as counts_of
from wspace.prune.loading import load as load
from wspace.prune.loading import save as save
from wspace.prune.masks import Mask as Mask
from wspace.prune.prune import Pruner as Pruner
from wspace.prune.prune import prune as prune
from wspace.prune.restriction import Restriction as Restriction
from wspace.prune.restriction import prunable as prunable
from wspace.prune.select import Selection as Selection
from wspace.prune.select import select as select
