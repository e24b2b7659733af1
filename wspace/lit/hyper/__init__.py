"""Lightning modules of hypernetworks: one for each system of `docs/hypernetworks`."""

from wspace.lit.hyper.classify import HyperClassifier as HyperClassifier
from wspace.lit.hyper.continual import Continual as Continual
from wspace.lit.hyper.federated import Federated as Federated
from wspace.lit.hyper.fewshot import FewShot as FewShot
from wspace.lit.hyper.fields import NeuralField as NeuralField
from wspace.lit.hyper.graph import ParameterPrediction as ParameterPrediction
from wspace.lit.hyper.language import CharacterModel as CharacterModel
from wspace.lit.hyper.task import HyperTask as HyperTask
