"""Parameter graphs as PyTorch Geometric and networkx graphs: one edge per entry.

For small networks and for other people's code; `wspace.nn` works on the blocks themselves. Parallel
edges (kernel taps, tied uses) stay parallel edges.
"""

from typing import Any

import torch
from torch import Tensor

from wspace.errors import MissingExtra, SpaceMismatch, message
from wspace.graph.parameter import ParameterGraph
from wspace.wiring import Block

FEATURES = 4
"""Loop indices that an edge or node feature may carry (kernel taps, positions)."""


def to_pyg(graph: ParameterGraph, *, hetero: bool = False) -> Any:
    """The graph as `torch_geometric` data, one edge for every entry of every block.

    Args:
        graph: A graph without batch axes.
        hetero: One node type per node set and one edge type per block, instead of one of each.

    Returns:
        ``Data``: nodes with ``node_set``, ``position`` (index in a set whose units are fixed, else
        -1), ``depth``; edges with ``edge_index``, ``edge_value``, ``edge_block``, ``edge_feature``
        (taps, positions; -1 where none), ``edge_structural``, ``edge_again``; and node features as
        entries ``x_node``, ``x_value``, ``x_block``, ``x_feature``; ``x`` and ``edge_attr`` hold
        values and these codes as floats. Or ``HeteroData`` with the same for each type.

    Raises:
        SpaceMismatch: If the graph has batch axes.
        MissingExtra: If torch_geometric is not installed.
    """
    _unbatched(graph, "to_pyg")
    try:
        from torch_geometric.data import Data, HeteroData
    except ImportError as error:
        raise MissingExtra("to_pyg: install torch_geometric") from error
    if hetero:
        return _hetero(graph, HeteroData())
    s = graph.structure
    nodes = [torch.full((n.size,), i) for i, n in enumerate(s.nodes)]
    edges = [_entries(graph, i) for i, b in enumerate(s.blocks) if b.source is not None]
    features = [_entries(graph, i) for i, b in enumerate(s.blocks) if b.source is None]
    sets = torch.cat(nodes)
    data = Data(
        num_nodes=s.total,
        node_set=sets,
        position=torch.cat([_positions(n.size, fixed=n.fixed) for n in s.nodes]),
        depth=torch.tensor([n.depth for n in s.nodes])[sets],
        edge_index=_join([e["index"] for e in edges], (2, 0), torch.int64, 1),
        **{f"edge_{k}": _column(edges, k) for k in _COLUMNS},
        x_node=_join([e["index"][1] for e in features], (0,), torch.int64),
        **{f"x_{k}": _column(features, k) for k in _COLUMNS},
    )
    data.edge_attr = _codes(data, "edge")
    data.x = _node_features(graph, data)
    return data


_COLUMNS = ("value", "block", "feature", "structural", "again")
_TYPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "value": ((0,), torch.float32),
    "block": ((0,), torch.int64),
    "feature": ((0, FEATURES), torch.int64),
    "structural": ((0,), torch.bool),
    "again": ((0,), torch.bool),
}


def _join(parts: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype, dim: int = 0) -> Tensor:
    return torch.cat(parts, dim) if parts else torch.empty(shape, dtype=dtype)


def _column(entries: list[dict[str, Tensor]], key: str) -> Tensor:
    parts = [e[key] for e in entries]
    if key == "value" and parts:
        widest = parts[0].dtype
        for p in parts:
            widest = torch.promote_types(widest, p.dtype)
        parts = [p.to(widest) for p in parts]
    return _join(parts, *_TYPES[key])


def _codes(data: Any, prefix: str) -> Tensor:
    value = data[f"{prefix}_value"]
    value = value if value.is_floating_point() else value.float()
    block, feature = data[f"{prefix}_block"], data[f"{prefix}_feature"]
    flags = data[f"{prefix}_structural"]
    return torch.cat(
        [value[:, None], block[:, None].to(value), feature.to(value), flags[:, None].to(value)], 1
    )


def _node_features(graph: ParameterGraph, data: Any) -> Tensor:
    """Values of node features, ``(nodes, 2 * slots)``: the value and whether there is one."""
    s = graph.structure
    slots = max((len(f) for f in s.features[1:]), default=0)
    values = data.x_value
    x = torch.zeros(s.total, 2 * slots, dtype=values.dtype if len(values) else torch.float32)
    slot = torch.full((len(s.blocks),), -1)
    for blocks in s.features[1:]:
        for i, b in enumerate(blocks):
            slot[b] = i
    where = slot[data.x_block]
    plain = (where >= 0) & (data.x_feature[:, 0] < 0)
    x[data.x_node[plain], 2 * where[plain]] = values[plain]
    x[data.x_node[plain], 2 * where[plain] + 1] = 1
    return x


def _positions(size: int, *, fixed: bool) -> Tensor:
    return torch.arange(size) if fixed else torch.full((size,), -1)


def _entries(graph: ParameterGraph, index: int, *, local: bool = False) -> dict[str, Tensor]:
    """One row per entry of a block: units at both ends, value, loop indices that are features."""
    s = graph.structure
    block = s.blocks[index]
    target = s.target(index).expand(block.sizes).reshape(-1)
    source = s.source(index)
    count = target.numel()
    value = torch.ones(count) if block.structural else graph.block(index).reshape(-1)
    start = 0 if local else s.offsets[block.target.nodes]
    ends = [target + start]
    if source is not None and block.source is not None:
        start = 0 if local else s.offsets[block.source.nodes]
        ends.insert(0, source.expand(block.sizes).reshape(-1) + start)
    else:
        ends.insert(0, ends[0])
    return {
        "index": torch.stack(ends),
        "value": value,
        "block": torch.full((count,), index),
        "feature": loop_features(block),
        "structural": torch.full((count,), block.structural),
        "again": torch.full((count,), block.again),
    }


def loop_features(block: Block) -> Tensor:
    """Indices of the loops that are neither end of a block, ``(entries, FEATURES)``, -1 for none.

    Args:
        block: A block.

    Returns:
        Kernel taps, positions in a flatten, and the like; beyond `FEATURES` loops the last column
        counts the rest together.
    """
    loops = [i for i, r in enumerate(block.roles) if r == "feature"]
    grids: list[Tensor] = []
    for i in loops:
        shape = [-1 if j == i else 1 for j in range(len(block.sizes))]
        grids.append(torch.arange(block.sizes[i]).reshape(shape).expand(block.sizes).reshape(-1))
    while len(grids) > FEATURES:
        last = grids.pop()
        grids[-1] = grids[-1] * block.sizes[loops[len(grids)]] + last
    count = int(torch.tensor(block.sizes).prod()) if block.sizes else 1
    missing = [torch.full((count,), -1)] * (FEATURES - len(grids))
    return torch.stack([*grids, *missing], 1)


def _hetero(graph: ParameterGraph, data: Any) -> Any:
    s = graph.structure
    for i, n in enumerate(s.nodes):
        data[f"n{i}"].num_nodes = n.size
        data[f"n{i}"].position = _positions(n.size, fixed=n.fixed)
    for i, b in enumerate(s.blocks):
        source = b.target.nodes if b.source is None else b.source.nodes
        entries = _entries(graph, i, local=True)
        store = data[f"n{source}", f"b{i}", f"n{b.target.nodes}"]
        store.edge_index = entries["index"]
        for key in _COLUMNS:
            store[key] = entries[key]
    return data


def from_pyg(data: Any, graph: ParameterGraph) -> ParameterGraph:
    """The graph whose entries are the values in `torch_geometric` data.

    Args:
        data: What `to_pyg` returned for a graph of this space, with any values.
        graph: A graph of the space, for what the data does not hold.

    Returns:
        A graph with the data's values, in the dtype of the graph's parameters.

    Raises:
        SpaceMismatch: If the data has other blocks than the graph.
    """
    s = graph.structure
    values: dict[int, Tensor] = {}
    for holders in s.holders.values():
        for i in holders:
            b = s.blocks[i]
            new = _values_of(data, b, i)
            count = s.target(i).expand(b.sizes).numel()
            if new.numel() != count:
                raise SpaceMismatch(
                    message(
                        f"from_pyg: block {i} ({b.param!r}) does not fit",
                        expected=f"{count} entries",
                        got=f"{new.numel()}",
                        help="the data must come from `to_pyg` on a graph of this space",
                    )
                )
            values[i] = new.reshape(b.sizes).to(graph.values[b.param].dtype)
    return graph.replace_blocks(values)


def _values_of(data: Any, block: Block, index: int) -> Tensor:
    if hasattr(data, "edge_types"):
        source = block.target.nodes if block.source is None else block.source.nodes
        return data[f"n{source}", f"b{index}", f"n{block.target.nodes}"].value
    prefix = "x" if block.source is None else "edge"
    return data[f"{prefix}_value"][data[f"{prefix}_block"] == index]


def to_networkx(graph: ParameterGraph) -> Any:
    """The graph as a `networkx.MultiDiGraph`, for small networks.

    Args:
        graph: A graph without batch axes.

    Returns:
        Nodes ``(set, unit)`` with the attributes of their set and ``features``, a list of
        ``(slot, parameter, loop indices, value)``; edges with ``param``, ``op``, ``tag``, ``taps``
        and ``value`` (None if structural).

    Raises:
        SpaceMismatch: If the graph has batch axes.
        MissingExtra: If networkx is not installed.
    """
    _unbatched(graph, "to_networkx")
    try:
        import networkx
    except ImportError as error:
        raise MissingExtra("to_networkx: install networkx") from error
    out = networkx.MultiDiGraph()
    s = graph.structure
    for i, n in enumerate(s.nodes):
        for u in range(n.size):
            out.add_node(
                (i, u), kind=n.kind, op=n.op, depth=n.depth, acts=n.acts,
                position=u if n.fixed else None, features=[],
            )  # fmt: skip
    for i, b in enumerate(s.blocks):
        rows = _entries(graph, i, local=True)
        sources, targets = rows["index"].tolist()
        taps = [tuple(k for k in row if k >= 0) for row in rows["feature"].tolist()]
        values = rows["value"].tolist()
        for u, v, tap, value in zip(sources, targets, taps, values, strict=True):
            if b.source is None:
                features = out.nodes[b.target.nodes, v]["features"]
                features.append((f"{b.op}:{b.tag}", b.param, tap, value))
                continue
            out.add_edge(
                (b.source.nodes, u), (b.target.nodes, v), param=b.param, op=b.op, tag=b.tag,
                taps=tap, value=None if b.structural else value, again=b.again,
            )  # fmt: skip
    return out


def _unbatched(graph: ParameterGraph, verb: str) -> None:
    if graph.batch:
        raise SpaceMismatch(
            message(
                f"{verb}: the graph has batch axes {graph.batch}",
                expected="one model",
                help="convert one at a time: encode(space, {k: x[i] for k, x in state.items()})",
            )
        )
