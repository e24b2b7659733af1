"""Nowcasting: a training run that jumps ahead, to where its parameters are heading.

Predictors say what a state will be some time from now, given the last few.
"""

from wspace.nowcast.guard import Guard as Guard
from wspace.nowcast.huggingface import trainer_callback as trainer_callback
from wspace.nowcast.jumps import Jump as Jump
from wspace.nowcast.jumps import Jumps as Jumps
from wspace.nowcast.jumps import Settings as Settings
from wspace.nowcast.optimizer import Nowcaster as Nowcaster
from wspace.nowcast.predictor import Average as Average
from wspace.nowcast.predictor import LinearFit as LinearFit
from wspace.nowcast.predictor import NoChange as NoChange
from wspace.nowcast.predictor import Predictor as Predictor
from wspace.nowcast.schedule import Decay as Decay
