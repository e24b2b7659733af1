"""Nowcasting: a training run that jumps ahead, to where its parameters are heading.

Predictors say what a state will be some time from now, given the last few.
"""

from wspace.nowcast.drift import Drift as Drift
from wspace.nowcast.drifting import Drifting as Drifting
from wspace.nowcast.drifting import follower as follower
from wspace.nowcast.follow import Follower as Follower
from wspace.nowcast.graph import NiNoGraph as NiNoGraph
from wspace.nowcast.guard import Guard as Guard
from wspace.nowcast.huggingface import trainer_callback as trainer_callback
from wspace.nowcast.jumps import Jumps as Jumps
from wspace.nowcast.mlp import WNN as WNN
from wspace.nowcast.mlp import NiNoMLP as NiNoMLP
from wspace.nowcast.optimizer import Nowcaster as Nowcaster
from wspace.nowcast.predictor import Predictor as Predictor
from wspace.nowcast.published import load_published as load_published
from wspace.nowcast.schedule import Decay as Decay
from wspace.nowcast.settings import Jump as Jump
from wspace.nowcast.settings import Settings as Settings
from wspace.nowcast.store import SHIPPED as SHIPPED
from wspace.nowcast.store import card_of as card_of
from wspace.nowcast.store import load as load
from wspace.nowcast.store import save as save
from wspace.nowcast.weighted import Average as Average
from wspace.nowcast.weighted import LinearFit as LinearFit
from wspace.nowcast.weighted import NoChange as NoChange
