"""First states of nodes and edges: values, what kind of thing carries them, and where it stands.

Words describe kinds (operator, activation, slot, stride), so that no vocabulary has to be fixed in
advance: every word has a row in a hashed table, and a kind is the sum of its words. Two networks of
equal shapes that differ in wiring, activation or slot get different codes.
"""

import re
import zlib
from functools import lru_cache
from math import log, prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wspace.graph import ParameterGraph
from wspace.graph.structure import Structure
from wspace.nn.layout import EdgeForm, FeatureForm, Forms, forms_of
from wspace.wiring import Block, NodeSet

_WORD = re.compile(r"[A-Za-z_]+(?:=\[[\d,]*\])?|[0-9][0-9.e+-]*|[#|;@]")
_SHAPES = re.compile(r"\(\[[\d,]*\],?")


def words(text: str) -> tuple[str, ...]:
    """The words of an operator tag; sizes that it repeats from the tensors are left out."""
    return tuple(_WORD.findall(_SHAPES.sub("(", text)))


def _bucket(word: str, buckets: int) -> int:
    return zlib.crc32(word.encode()) % buckets


def block_words(block: Block) -> list[str]:
    """What a block is, apart from its values and sizes."""
    out = [f"op:{block.op}", *(f"tag:{w}" for w in words(block.tag))]
    out += [f"loops:{'.'.join(sorted(set(block.roles)))}"]
    return out + (["again"] if block.again else []) + (["structural"] if block.structural else [])


def node_words(nodes: NodeSet) -> list[str]:
    """What a node set is, apart from its values and size."""
    acts = [f"act:{i}:{w}" for i, a in enumerate(nodes.acts) for w in words(a)]
    return [f"kind:{nodes.kind}", f"op:{nodes.op}", *acts]


def waves(x: Tensor, count: int) -> Tensor:
    """Sines and cosines of a position at geometric frequencies, ``(…, 2 * count)``."""
    rates = torch.exp(torch.arange(count, device=x.device, dtype=x.dtype) * (-log(1e4) / count))
    phase = x[..., None] * rates
    return torch.cat([phase.sin(), phase.cos()], -1)


WAVES = 16


@lru_cache(maxsize=64)
def _measures(forms: Forms) -> tuple[Tensor, Tensor]:
    """Depth and log sizes of every node set and of every block, ``(·, 3)``."""
    s = forms.structure
    deepest = max(n.depth for n in s.nodes) or 1
    nodes = [(n.depth, n.depth / deepest, log(n.size)) for n in s.nodes]
    blocks = []
    for b in s.blocks:
        depth = s.nodes[b.target.nodes].depth
        blocks.append((depth, depth / deepest, log(max(1, prod(b.sizes)))))
    return torch.tensor(nodes), torch.tensor(blocks).reshape(-1, 3)


@lru_cache(maxsize=64)
def _bags(structure: Structure, buckets: int, *, nodes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the table, starts and weights of the bags of all node sets or of all blocks."""
    kinds = structure.nodes if nodes else structure.blocks
    rows, starts, weights = [], [], []
    for kind in kinds:
        some = node_words(kind) if isinstance(kind, NodeSet) else block_words(kind)
        starts.append(len(rows))
        rows += [_bucket(w, buckets) for w in some]
        weights += [len(some) ** -0.5] * len(some)
    return torch.tensor(rows), torch.tensor(starts), torch.tensor(weights)


class Kinds(nn.Module):
    """Codes of node sets and blocks from their words, depths and sizes.

    Args:
        channels: Length of a code.
        buckets: Rows of the hashed table.
    """

    def __init__(self, channels: int, buckets: int = 1024) -> None:
        super().__init__()
        self.buckets = buckets
        self.table = nn.EmbeddingBag(buckets, channels, mode="sum")
        self.place = nn.Linear(2 * WAVES + 3, channels)

    def forward(self, structure: Structure, *, nodes: bool) -> Tensor:
        """Codes of all node sets, or of all blocks, ``(·, channels)``."""
        weight = self.place.weight
        rows, starts, shares = (
            t.to(weight.device) for t in _bags(structure, self.buckets, nodes=nodes)
        )
        measures = _measures(forms_of(structure))[0 if nodes else 1].to(weight)
        if not len(starts):
            return weight.new_zeros(0, weight.shape[0])
        kind = self.table(rows, starts, per_sample_weights=shares.to(self.table.weight.dtype))
        place = torch.cat([waves(measures[:, 0], WAVES), measures], -1)
        return kind + self.place(place)


@lru_cache(maxsize=1 << 12)
def _positions(form: EdgeForm | FeatureForm) -> Tensor:
    """Offset of every tap from the middle of each of its loops, ``(F, 4)``, later loops first."""
    b = form.block
    loops = [k for k in form.order if b.roles[k] == "feature"]
    out = torch.zeros(form.sizes[-1], 4)
    if loops:
        grid = [torch.arange(b.sizes[k]) - (b.sizes[k] - 1) / 2 for k in loops]
        mesh = torch.meshgrid(*grid, indexing="ij")
        for i, m in enumerate(reversed(mesh[-4:])):
            out[:, i] = m.reshape(-1)
    return out


class Taps(nn.Module):
    """Coefficients of the entries that share an edge or a node: kernel taps, flattened places.

    A small network maps what the block is and where the tap stands to one vector per tap; the
    entry times this vector is what it contributes. Kernels of all sizes share it.

    Args:
        channels: Length of the vectors, and of the block codes.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.where = nn.Linear(8 * WAVES, channels, bias=False)
        self.mix = nn.Linear(channels, channels)
        nn.init.normal_(self.mix.weight, std=channels**-0.5)
        nn.init.normal_(self.mix.bias)

    def forward(self, forms: list[EdgeForm] | list[FeatureForm], codes: Tensor) -> list[Tensor]:
        """Coefficients of every block, ``(F, channels)`` each.

        Args:
            forms: Blocks.
            codes: Their codes, ``(len(forms), channels)``.

        Returns:
            One tensor for each block, divided by the root of its number of taps.
        """
        if not forms:
            return []
        counts = [f.sizes[-1] for f in forms]
        where = torch.cat([_positions(f) for f in forms]).to(codes)
        each = codes.repeat_interleave(torch.tensor(counts, device=codes.device), 0)
        made = self.mix(F.silu(each + self.where(waves(where, WAVES).flatten(1))))
        return [m / n**0.5 for m, n in zip(made.split(counts), counts, strict=True)]


class Embedding(nn.Module):
    """First states of all nodes, and how the first states of edges are made.

    Args:
        channels: Width C.
        probes: Numbers for every node that come with the graph; 0 for none.
    """

    def __init__(self, channels: int, probes: int = 0) -> None:
        super().__init__()
        self.kinds = Kinds(channels)
        self.taps, self.feature_taps = Taps(channels), Taps(channels)
        self.code = nn.Linear(channels, channels)
        self.position = nn.Linear(2 * WAVES, channels, bias=False)
        self.probes = nn.Linear(probes, channels, bias=False) if probes else None

    def edges(self, structure: Structure) -> tuple[list[Tensor], Tensor]:
        """For every edge block ``(F, C)`` to multiply its taps with, and ``(blocks, C)`` to add.

        The coefficients contain the root of the fan-in, which brings weights of the usual
        initialisations to unit size.

        Args:
            structure: The graph's structure.

        Returns:
            Coefficients and constants.
        """
        forms = forms_of(structure)
        codes = self.kinds(structure, nodes=False)
        own = codes[[f.index for f in forms.edges]]
        made = self.taps(list(forms.edges), own)
        fans = [(f.sizes[2] * f.sizes[3]) ** 0.5 for f in forms.edges]
        return [m * fan for m, fan in zip(made, fans, strict=True)], self.code(own)

    def nodes(self, graph: ParameterGraph, batch: int, probed: dict[int, Tensor]) -> Tensor:
        """First states of all nodes, ``(batch, N, C)``.

        Args:
            graph: The graph.
            batch: Number of networks in it.
            probed: For some node sets ``(batch, size, probes)``.

        Returns:
            The states.
        """
        structure = graph.structure
        forms = forms_of(structure)
        kinds = self.kinds(structure, nodes=True)
        sizes = torch.tensor([n.size for n in structure.nodes], device=kinds.device)
        x = kinds.repeat_interleave(sizes, 0) + self._position(structure, kinds)
        x = x.expand(batch, *x.shape)
        rows, units = [], []
        codes = self.kinds(structure, nodes=False)[[f.index for f in forms.features]]
        for form, taps in zip(
            forms.features, self.feature_taps(list(forms.features), codes), strict=True
        ):
            rows.append(form.raw(graph, batch).to(taps.dtype) @ taps)
            units.append(form.target + structure.offsets[form.block.target.nodes])
        if self.probes is not None:
            for n, values in probed.items():
                rows.append(self.probes(values.to(x.dtype)))
                units.append(torch.arange(structure.nodes[n].size) + structure.offsets[n])
        if not rows:
            return x
        where = torch.cat(units).to(x.device)
        return x + torch.zeros_like(x).index_add(1, where, torch.cat(rows, 1).to(x.dtype))

    def _position(self, structure: Structure, like: Tensor) -> Tensor:
        """Codes of positions where a position means something, 0 elsewhere, ``(N, C)``."""
        return self.position(_position_waves(structure).to(like))


@lru_cache(maxsize=64)
def _position_waves(structure: Structure) -> Tensor:
    out = torch.zeros(structure.total, 2 * WAVES)
    for n, at in zip(structure.nodes, structure.offsets, strict=True):
        if n.fixed and n.size > 1:
            out[at : at + n.size] = waves(torch.arange(n.size, dtype=torch.float32), WAVES)
    return out
