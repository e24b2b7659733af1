"""Graph hypernetworks: parameters of architectures that were never seen, from their graphs."""

from wspace.hyper.graph.architecture import ArchitectureGraph as ArchitectureGraph
from wspace.hyper.graph.architecture import architecture_of as architecture_of
from wspace.hyper.graph.diversity import channel_diversity as channel_diversity
from wspace.hyper.graph.diversity import with_noise as with_noise
from wspace.hyper.graph.files import ghn_card as ghn_card
from wspace.hyper.graph.files import load_ghn as load_ghn
from wspace.hyper.graph.files import save_ghn as save_ghn
from wspace.hyper.graph.fit import UnitCodes as UnitCodes
from wspace.hyper.graph.fit import fit_shape as fit_shape
from wspace.hyper.graph.form import TensorForm as TensorForm
from wspace.hyper.graph.into import predict_into as predict_into
from wspace.hyper.graph.network import GraphHyperNetwork as GraphHyperNetwork
from wspace.hyper.graph.network import Prediction as Prediction
from wspace.hyper.graph.network import coverage_of as coverage_of
from wspace.hyper.graph.network import weight_norms as weight_norms
