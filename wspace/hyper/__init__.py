"""Hypernetworks: modules that generate the weights of any module.

A `HyperNetwork` is a target, a condition (from what is conditioned on to a vector) and a head (from
the vector to tensors). What it returns is a state of the target, as every other part of wspace
takes it. Systems built of it have modules of their own.
"""

from wspace.hyper.call import call as call
from wspace.hyper.cells.fast_weights import FastWeightModel as FastWeightModel
from wspace.hyper.cells.hyper_lstm import HyperLSTM as HyperLSTM
from wspace.hyper.cells.hyper_lstm import HyperLSTMCell as HyperLSTMCell
from wspace.hyper.cells.hyper_recurrence import HyperState as HyperState
from wspace.hyper.cells.layer_norm_lstm import LayerNormLSTM as LayerNormLSTM
from wspace.hyper.cells.layer_norm_lstm import LayerNormLSTMCell as LayerNormLSTMCell
from wspace.hyper.cells.self_reference import SRWM as SRWM
from wspace.hyper.cells.self_reference import DeltaNet as DeltaNet
from wspace.hyper.cells.self_reference import FakeSR as FakeSR
from wspace.hyper.condition import GraphCondition as GraphCondition
from wspace.hyper.condition import Hyperparameters as Hyperparameters
from wspace.hyper.condition import Noise as Noise
from wspace.hyper.condition import TaskEmbedding as TaskEmbedding
from wspace.hyper.condition import Vector as Vector
from wspace.hyper.continual import OutputRegularizer as OutputRegularizer
from wspace.hyper.continual import TaskStatistics as TaskStatistics
from wspace.hyper.continual import by_entropy as by_entropy
from wspace.hyper.continual import lookahead as lookahead
from wspace.hyper.continual import used_outputs as used_outputs
from wspace.hyper.ewc import EWC as EWC
from wspace.hyper.ewc import fisher as fisher
from wspace.hyper.federated import Client as Client
from wspace.hyper.federated import FedAvg as FedAvg
from wspace.hyper.federated import FederatedMethod as FederatedMethod
from wspace.hyper.federated import LocalOnly as LocalOnly
from wspace.hyper.federated import LocalTraining as LocalTraining
from wspace.hyper.federated import PeFLL as PeFLL
from wspace.hyper.federated import PFedHN as PFedHN
from wspace.hyper.fields import InitialField as InitialField
from wspace.hyper.fields import SensorEncoder as SensorEncoder
from wspace.hyper.fields import SineField as SineField
from wspace.hyper.graph.diversity import channel_diversity as channel_diversity
from wspace.hyper.graph.files import load_ghn as load_ghn
from wspace.hyper.graph.files import save_ghn as save_ghn
from wspace.hyper.graph.into import predict_into as predict_into
from wspace.hyper.graph.network import GraphHyperNetwork as GraphHyperNetwork
from wspace.hyper.heads.chunked import ChunkedHead as ChunkedHead
from wspace.hyper.heads.component import ComponentHead as ComponentHead
from wspace.hyper.heads.full import FullHead as FullHead
from wspace.hyper.heads.head import Head as Head
from wspace.hyper.heads.low_rank import LowRankHead as LowRankHead
from wspace.hyper.heads.modulation import FiLMHead as FiLMHead
from wspace.hyper.heads.modulation import MaskHead as MaskHead
from wspace.hyper.heads.per_tensor import PerTensorHead as PerTensorHead
from wspace.hyper.heads.recurrent import RecurrentHead as RecurrentHead
from wspace.hyper.heads.tiled import TiledHead as TiledHead
from wspace.hyper.hypernetwork import HyperNetwork as HyperNetwork
from wspace.hyper.hypernetwork import coverage_of as coverage_of
from wspace.hyper.initialize import activation_variance as activation_variance
from wspace.hyper.initialize import initialize as initialize
from wspace.hyper.losses import functional_loss as functional_loss
from wspace.hyper.losses import orbit_loss as orbit_loss
from wspace.hyper.pull import pull_back as pull_back
from wspace.hyper.sets import SetEncoder as SetEncoder
from wspace.hyper.target import Coverage as Coverage
from wspace.hyper.target import Weight as Weight
