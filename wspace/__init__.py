"""wspace: verified weight-space symmetry and parameter graphs of any PyTorch module."""

from wspace.action import Transform as Transform
from wspace.action import act as act
from wspace.action import compose as compose
from wspace.action import identity as identity
from wspace.action import inverse as inverse
from wspace.action import sample as sample
from wspace.space import Axis as Axis
from wspace.space import Group as Group
from wspace.space import Param as Param
from wspace.space import Role as Role
from wspace.space import WeightSpace as WeightSpace
from wspace.trace import trace as trace
from wspace.trace.verify import VerifyReport as VerifyReport
from wspace.trace.verify import verify as verify
