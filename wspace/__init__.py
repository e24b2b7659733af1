"""wspace: verified weight-space symmetry and parameter graphs of any PyTorch module.

Trace a module once, learn which of its units may be permuted, rescaled or sign-flipped without
changing its function, and run every weight-space method on that one description.
"""

from wspace import align as align
from wspace import augment as augment
from wspace import errors as errors
from wspace import hyper as hyper
from wspace import nn as nn
from wspace import nowcast as nowcast
from wspace import prune as prune
from wspace import testing as testing
from wspace import zoo as zoo
from wspace.action import State as State
from wspace.action import Transform as Transform
from wspace.action import act as act
from wspace.action import compose as compose
from wspace.action import identity as identity
from wspace.action import inverse as inverse
from wspace.action import sample as sample
from wspace.graph import ParameterGraph as ParameterGraph
from wspace.graph import decode as decode
from wspace.graph import encode as encode
from wspace.graph import from_pyg as from_pyg
from wspace.graph import load_graph as load_graph
from wspace.graph import save_graph as save_graph
from wspace.graph import to_networkx as to_networkx
from wspace.graph import to_pyg as to_pyg
from wspace.io import Checkpoint as Checkpoint
from wspace.io import load_checkpoint as load_checkpoint
from wspace.io import save_checkpoint as save_checkpoint
from wspace.reference import resolve as resolve
from wspace.space import Axis as Axis
from wspace.space import Gauge as Gauge
from wspace.space import Group as Group
from wspace.space import Param as Param
from wspace.space import Role as Role
from wspace.space import WeightSpace as WeightSpace
from wspace.trace import trace as trace
from wspace.trace.verify import VerifyReport as VerifyReport
from wspace.trace.verify import verify as verify

__version__ = "0.1.0"
