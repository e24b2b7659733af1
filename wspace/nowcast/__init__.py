"""Nowcasting: a training run that jumps ahead, to where its parameters are heading.

Predictors say what a state will be some time from now, given the last few.
"""

from wspace.nowcast.predictor import Average as Average
from wspace.nowcast.predictor import LinearFit as LinearFit
from wspace.nowcast.predictor import NoChange as NoChange
from wspace.nowcast.predictor import Predictor as Predictor
