"""Checkpoints on disk: read safely, written back as they were, and fitted to a module.

A checkpoint is a State (parameters and buffers by qualified name) and a `Layout`, which is what the
files know beyond the tensors: shards, metadata, nesting, ties. Nothing here runs code that comes
with the weights: pickles are read by torch's restricted unpickler, and paths named inside a file
have to stay in its folder. Tensors are memory-mapped where the format allows, and a state that is
computed while it is written (`LazyState`) is never whole in memory.
"""

from wspace.io.fit import fit_checkpoint, load_into
from wspace.io.layout import Checkpoint, Layout
from wspace.io.plain import module_from_checkpoint
from wspace.io.read import load_checkpoint, weights_file
from wspace.io.stream import LazyState
from wspace.io.write import save_checkpoint

__all__ = [
    "Checkpoint",
    "Layout",
    "LazyState",
    "fit_checkpoint",
    "load_checkpoint",
    "load_into",
    "module_from_checkpoint",
    "save_checkpoint",
    "weights_file",
]
