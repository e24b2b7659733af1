"""Networks that act on weights: equivariant layers for one space, graph metanets for any.

- `EquivariantLinear` and what goes around it work on *features* of one weight space: a dict of
  tensors by parameter name, ``(*batch, *shape, channels)``. `DWSNet`, `NFN` and `UNF` are built so.
- `GraphMetanet`, `NeuralGraphGNN`, `NeuralGraphTransformer` and `ScaleGMN` read parameter graphs of
  any architecture, several in one batch.
- `FlatMLP`, `StatNN`, `ParameterDeepSets` and `ProbeOnly` are what they are compared with.
"""

from wspace.nn.attention import WeightSpaceAttention as WeightSpaceAttention
from wspace.nn.basis import dim_bias as dim_bias
from wspace.nn.basis import dim_hom as dim_hom
from wspace.nn.basis import permutable as permutable
from wspace.nn.dws import DWSNet as DWSNet
from wspace.nn.gmn import GraphMetanet as GraphMetanet
from wspace.nn.heads import GraphHead as GraphHead
from wspace.nn.heads import NeuronHead as NeuronHead
from wspace.nn.heads import ParameterHead as ParameterHead
from wspace.nn.layers import Dropout as Dropout
from wspace.nn.layers import FeatureBatchNorm as FeatureBatchNorm
from wspace.nn.layers import FeatureNorm as FeatureNorm
from wspace.nn.layers import Pointwise as Pointwise
from wspace.nn.layers import Residual as Residual
from wspace.nn.layers import Scale as Scale
from wspace.nn.layers import Standardize as Standardize
from wspace.nn.layers import from_features as from_features
from wspace.nn.layers import to_features as to_features
from wspace.nn.linear import EquivariantLinear as EquivariantLinear
from wspace.nn.linear import InvariantPool as InvariantPool
from wspace.nn.linear import position_codes as position_codes
from wspace.nn.metanet import Metanet as Metanet
from wspace.nn.neural_graph import NeuralGraphGNN as NeuralGraphGNN
from wspace.nn.neural_graph import NeuralGraphTransformer as NeuralGraphTransformer
from wspace.nn.nfn import NFN as NFN
from wspace.nn.probes import ProbeFeatures as ProbeFeatures
from wspace.nn.probes import Probes as Probes
from wspace.nn.readout import InvariantReadout as InvariantReadout
from wspace.nn.readout import SpaceModel as SpaceModel
from wspace.nn.scale_gmn import ScaleGMN as ScaleGMN
from wspace.nn.statistics import Baseline as Baseline
from wspace.nn.statistics import FlatMLP as FlatMLP
from wspace.nn.statistics import ParameterDeepSets as ParameterDeepSets
from wspace.nn.statistics import ProbeOnly as ProbeOnly
from wspace.nn.statistics import StatNN as StatNN
from wspace.nn.unf import UNF as UNF
