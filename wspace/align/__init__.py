"""Matching, merging and comparing networks up to their symmetries."""

from wspace.align.activations import ActivationMatching as ActivationMatching
from wspace.align.activations import match_activations as match_activations
from wspace.align.barrier import Barrier as Barrier
from wspace.align.barrier import LossPath as LossPath
from wspace.align.barrier import barrier as barrier
from wspace.align.barrier import loss_path as loss_path
from wspace.align.dimension import FunctionalDimension as FunctionalDimension
from wspace.align.dimension import dimension_bound as dimension_bound
from wspace.align.dimension import functional_dimension as functional_dimension
from wspace.align.distances import Embedding as Embedding
from wspace.align.distances import embed as embed
from wspace.align.distances import function_distances as function_distances
from wspace.align.distances import weight_distances as weight_distances
from wspace.align.match import Matching as Matching
from wspace.align.match import match as match
from wspace.align.match import match_many as match_many
from wspace.align.match import objective as objective
from wspace.align.merge import interpolate as interpolate
from wspace.align.merge import interpolating as interpolating
from wspace.align.merge import merge as merge
from wspace.align.merge import merging as merging
from wspace.align.units import GroupUnits as GroupUnits
from wspace.align.units import UnitReport as UnitReport
from wspace.align.units import compare_units as compare_units
