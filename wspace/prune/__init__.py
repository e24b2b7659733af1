"""Pruning: keep a subset of the units of every group.

A weight space says which units are interchangeable, and in which tensors each of them stands. To
prune is to keep some of them: `prune` returns the smaller module, `Mask` tries it on the module as
it is, `Restriction` is the small weight space with the way to it and back. Which units matter is
said by an importance, how many go by a `Selection`, and what that saves by a `Cost`.
"""

from wspace.prune.carry import carry as carry
from wspace.prune.cost import Cost as Cost
from wspace.prune.cost import Latency as Latency
from wspace.prune.cost import latency as latency
from wspace.prune.curve import Point as Point
from wspace.prune.importance.measured import ActivationNorm as ActivationNorm
from wspace.prune.importance.measured import HessianDiagonal as HessianDiagonal
from wspace.prune.importance.measured import Taylor as Taylor
from wspace.prune.importance.sparse import GroupSparsity as GroupSparsity
from wspace.prune.importance.weights import FPGM as FPGM
from wspace.prune.importance.weights import LAMP as LAMP
from wspace.prune.importance.weights import BatchNormScale as BatchNormScale
from wspace.prune.importance.weights import Importance as Importance
from wspace.prune.importance.weights import Magnitude as Magnitude
from wspace.prune.importance.weights import Random as Random
from wspace.prune.importance.weights import importance_of as importance_of
from wspace.prune.learned.edited import MetaPruner as MetaPruner
from wspace.prune.learned.edited import edit as edit
from wspace.prune.learned.effects import removal_effects as removal_effects
from wspace.prune.learned.effects import stacked_effects as stacked_effects
from wspace.prune.learned.predicted import MeanField as MeanField
from wspace.prune.learned.predicted import Predicted as Predicted
from wspace.prune.loading import counts_of as counts_of
from wspace.prune.loading import load as load
from wspace.prune.loading import save as save
from wspace.prune.masks import Mask as Mask
from wspace.prune.prune import prune as prune
from wspace.prune.pruner import Pruner as Pruner
from wspace.prune.restriction import Restriction as Restriction
from wspace.prune.restriction import prunable as prunable
from wspace.prune.select import Selection as Selection
from wspace.prune.select import select as select
