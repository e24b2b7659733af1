"""A metanet that predicts each unit's effect from weights, and its files.

`UnitPredictor` reads the parameter graph of any traced network; `wspace.prune.learned.predicted`
makes an importance of it, `wspace.prune.learned.learning` trains it on networks whose effects were
measured.
"""

import zlib
from collections.abc import Mapping
from functools import lru_cache
from math import log, prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from wspace.action import shape_of
from wspace.graph import ParameterGraph
from wspace.graph.structure import Structure
from wspace.io.shipped import Shipped
from wspace.nn.embed import Embedding, block_words, node_words
from wspace.nn.gmn import GraphMetanet
from wspace.prune.learned.features import FEATURES, LOGS, SMALL, estimated, unit_features
from wspace.prune.learned.nodes import unit_nodes
from wspace.prune.restriction import prunable

_TRAINED = Path(__file__).parent / "trained"
SHIPPED = tuple(sorted(file.stem for file in _TRAINED.glob("*.safetensors")))
"""Names of the predictors that come with the package."""

BUCKETS = 512
"""Rows of the hashed table of words."""


class QuietKinds(nn.Module):
    """Codes of node sets and blocks, in which a word that training never met says nothing.

    As `wspace.nn.embed.Kinds`, but the table starts at zero, and depth is a share of the network's
    own, so that networks deeper than all of training are nothing new.

    Args:
        channels: Length of a code.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(BUCKETS, channels, mode="sum")
        nn.init.zeros_(self.table.weight)
        self.place = nn.Linear(2, channels)

    def forward(self, structure: Structure, *, nodes: bool) -> Tensor:
        """Codes of all node sets, or of all blocks, ``(·, channels)``."""
        weight = self.table.weight
        rows, starts, shares, places = (x.to(weight.device) for x in _words(structure, nodes=nodes))
        if not len(starts):
            return weight.new_zeros(0, weight.shape[1])
        kind = self.table(rows, starts, per_sample_weights=shares.to(weight.dtype))
        return kind + self.place(places.to(weight.dtype))


@lru_cache(maxsize=64)
def _words(structure: Structure, *, nodes: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of the table, starts and weights of bags; depths and sizes, ``(·, 2)``."""
    deepest = max(n.depth for n in structure.nodes) or 1
    depths = [n.depth for n in structure.nodes]
    kinds = [(node_words(n), n.depth, n.size) for n in structure.nodes]
    if not nodes:
        kinds = [(block_words(b), depths[b.target.nodes], prod(b.sizes)) for b in structure.blocks]
    rows, starts, shares, places = [], [], [], []
    for some, depth, size in kinds:
        starts.append(len(rows))
        rows += [zlib.crc32(w.encode()) % BUCKETS for w in some]
        shares += [len(some) ** -0.5] * len(some)
        places.append((depth / deepest, log(max(1, size)) / 4 - 1))
    return (
        torch.tensor(rows),
        torch.tensor(starts),
        torch.tensor(shares),
        torch.tensor(places).reshape(-1, 2),
    )


class _Reader(GraphMetanet):
    """A graph metanet whose nodes start with `unit_features`."""

    def make_embedding(self, channels: int, probes: int) -> Embedding:
        """First states from features, and quiet codes."""
        made = Embedding(channels, FEATURES)
        made.kinds = cast(Any, QuietKinds(channels))
        return made

    def probed(self, graph: ParameterGraph) -> dict[int, Tensor]:
        """Features of every node set."""
        made = _scaled(unit_features(graph))
        return dict(enumerate(made.split([n.size for n in graph.structure.nodes], 1)))


SUMS = 4
"""Numbers of a unit that are no averages over its nodes: see `UnitPredictor._answers`."""


def _scaled(features: Tensor) -> Tensor:
    """Features of the size of one: logarithms of second moments vary by several."""
    many = 2 * len(LOGS)
    return torch.cat([0.5 * features[..., :many], features[..., many:]], -1)


class UnitPredictor(nn.Module):
    """Predicts the logarithm of each unit's effect, relative to the network's mean effect.

    The mean-field estimate of `wspace.prune.learned.features`, in a linear map, and a correction.
    For that a `GraphMetanet` gives every node a vector; those of a unit are averaged with its
    features, and a perceptron reads them beside the average of the unit's group. Widths, depths and
    architectures may differ from those of training. Permuting a network's units permutes the
    predictions.

    Args:
        channels: Width of the metanet.
        layers: Its rounds of messages.

    Attributes:
        options: The arguments.
    """

    def __init__(self, *, channels: int = 32, layers: int = 1) -> None:
        super().__init__()
        self.options = {"channels": channels, "layers": layers}
        self.metanet = _Reader(channels, channels=channels, layers=layers, head="neuron")
        wide = channels + FEATURES + SUMS
        self.read = nn.Sequential(
            nn.Linear(2 * wide, 2 * channels),
            nn.SiLU(),
            nn.Linear(2 * channels, channels),
            nn.SiLU(),
            nn.Linear(channels, 1),
        )
        nn.init.zeros_(cast("nn.Linear", self.read[-1]).weight)
        self.known = nn.Parameter(torch.tensor([0.5, 0.0, 0.0]))

    def forward(self, graph: ParameterGraph) -> dict[str, Tensor]:
        """Predictions for the prunable groups that the graph has nodes for.

        Args:
            graph: Of any traced network, or of several of one space along leading batch axes.

        Returns:
            Group name → predicted logarithms, ``(*batch, *sizes of over, size)``.

        Raises:
            SpaceMismatch: If the graph has no edges.
        """  # noqa: DOC502 (the metanet raises)
        return {name: a + b for name, (a, b) in self.parts(graph).items()}

    def parts(self, graph: ParameterGraph) -> dict[str, tuple[Tensor, Tensor]]:
        """The two summands of a prediction: from the mean-field estimate, and what corrects it.

        Args:
            graph: As for a call.

        Returns:
            Group name → two tensors ``(*batch, *sizes of over, size)``.
        """
        rows = prod(graph.batch)
        states = self.metanet(graph)
        nodes = torch.cat([x.reshape(rows, *x.shape[-2:]) for x in states.values()], 1)
        features = unit_features(graph)
        nodes = torch.cat([nodes, _scaled(features).to(nodes.dtype)], -1)
        effects = estimated(features).to(nodes.dtype)
        units: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        for name, (where, which) in unit_nodes(graph.space).items():
            count = prod(shape_of(prunable(graph.space)[name], graph.space))
            known = torch.zeros(count).index_add(0, which, torch.ones(len(which))).to(nodes)
            if not bool(known.all()):
                continue
            some = nodes[:, where] / known[which, None]
            mean = nodes.new_zeros(rows, count, nodes.shape[-1]).index_add(1, which, some)
            units[name] = torch.cat([mean, known.log()[None, :, None].expand(rows, -1, 1)], -1)
            total = effects.new_zeros(rows, count).index_add(1, which, effects[:, where].exp())
            sums[name] = (total + SMALL).log()
        return self._answers(graph, units, sums)

    def _answers(
        self, graph: ParameterGraph, units: Mapping[str, Tensor], sums: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        out: dict[str, tuple[Tensor, Tensor]] = {}
        every = torch.cat([*sums.values()], 1).mean(1, keepdim=True)
        for name, x in units.items():
            total = sums[name] - every
            share = total - total.logsumexp(1, keepdim=True)
            size = torch.full_like(total, log(total.shape[1]))
            more = torch.stack([total, share, size], -1) / 2
            x = torch.cat([x, more], -1)  # noqa: PLW2901
            around = x.mean(1, keepdim=True).expand_as(x)
            y = self.read(torch.cat([x, around], -1))[..., 0]
            shape = (*graph.batch, *shape_of(prunable(graph.space)[name], graph.space))
            out[name] = (more @ self.known).reshape(shape), y.reshape(shape)
        return out


# ----------------------------------------------------------------------------- files


_FILES = Shipped(
    folder=_TRAINED,
    names=SHIPPED,
    format="wspace-unit-predictor-1",
    reader="Predicted",
    kind="a predictor of effects",
    writer="save_predictor",
)


def save_predictor(
    predictor: UnitPredictor, path: str | Path, *, card: Mapping[str, Any] | None = None
) -> None:
    """Writes a predictor, with its options.

    Args:
        predictor: The predictor.
        path: File to write, safetensors.
        card: What a reader should know: data, seeds, results; anything that JSON can hold.
    """
    _FILES.save(predictor, predictor.options, path, card=card)


def load_predictor(name: str | Path) -> UnitPredictor:
    """The predictor of a name or in a file.

    Args:
        name: One of `SHIPPED`, or a file written by `save_predictor`.

    Returns:
        The predictor, in evaluation mode, without gradients.

    Raises:
        CheckpointError: If there is no such predictor, or the file holds something else.
    """
    return _FILES.load(name, UnitPredictor)


def predictor_card(name: str | Path) -> dict[str, Any]:
    """The card of a predictor.

    Args:
        name: As for `load_predictor`.

    Returns:
        What `save_predictor` was given.
    """
    return _FILES.card(name)
