"""The parameter graph: the units of a network, and its parameters as edges and features of them.

A graph holds no copy of the parameters. It is a state seen through the wiring of its space: node
sets, and blocks, each a dense view ``(*batch, *loops)`` of a window of one parameter with the units
at both ends of every entry. Structural blocks (residual additions, attention) carry no value.

`encode` and `decode` invert each other bit for bit. Where a graph goes next is in `interop`
(PyTorch Geometric, networkx) and `store` (files).
"""

from wspace.graph.interop import from_pyg as from_pyg
from wspace.graph.interop import to_networkx as to_networkx
from wspace.graph.interop import to_pyg as to_pyg
from wspace.graph.parameter import ParameterGraph as ParameterGraph
from wspace.graph.parameter import decode as decode
from wspace.graph.parameter import encode as encode
from wspace.graph.store import load_graph as load_graph
from wspace.graph.store import save_graph as save_graph
from wspace.graph.structure import Structure as Structure
from wspace.graph.structure import structure_of as structure_of
from wspace.graph.structure import units_of as units_of
