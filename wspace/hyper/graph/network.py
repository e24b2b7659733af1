"""`GraphHyperNetwork`: parameters of any traced architecture from its graph."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wspace.errors import HyperError, message
from wspace.hyper.graph.architecture import ArchitectureGraph, architecture_of
from wspace.hyper.graph.body import Alone, Body, Gated, Graphormer, NodeEmbedding, batched
from wspace.hyper.graph.decoder import TileDecoder, Wanted
from wspace.space import WeightSpace

State = dict[str, Tensor]


@dataclass(frozen=True)
class Prediction:
    """Which tensors of a space are predicted, and which are kept.

    Attributes:
        predicted: Names, ties once.
        kept: Names of what is not predicted, and why.
        numel: Entries that are predicted.
        total: Entries of all parameters (buffers aside).
    """

    predicted: tuple[str, ...]
    kept: Mapping[str, str]
    numel: int
    total: int

    def __str__(self) -> str:
        lines = [f"{self.numel} of {self.total} entries predicted, {len(self.predicted)} tensors"]
        return "\n".join([*lines, *(f"  kept {name}: {why}" for name, why in self.kept.items())])


def coverage_of(space: WeightSpace) -> Prediction:
    """What a graph hypernetwork predicts of a space.

    Args:
        space: Weight space that came from `trace`.

    Returns:
        Predicted and kept tensors.
    """
    forms = architecture_of(space).forms
    known = {f.name for f in forms}
    kept = {
        p.name: "a buffer: statistics of the data" if p.buffer else f"entries of type {p.dtype}"
        for p in space.params
        if p.name not in known
    }
    total = sum(p.numel for p in space.params if not p.buffer)
    return Prediction(tuple(known), kept, sum(space[n].numel for n in known), total)


class GraphHyperNetwork(nn.Module):
    """Predicts the parameters of architectures, also of ones that it was not trained on.

    Pure: it reads the traced `WeightSpace` and returns tensors; no module is touched.

    Args:
        width: Width of the states of nodes.
        layers: Layers of the body.
        heads: Attention heads.
        body: ``"graphormer"``, ``"gated"`` or ``"none"``.
        channels: Units of a tile; wider tensors repeat it.
        side: Side of a tile's kernel.
        hidden: Width inside the decoder.
        codes: Whether repeated units have codes of their own; without, they are identical.
        generator: Draws the codes.
    """

    def __init__(
        self,
        width: int = 64,
        layers: int = 3,
        heads: int = 4,
        *,
        body: Body = "graphormer",
        channels: int = 32,
        side: int = 5,
        hidden: int = 128,
        codes: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.options = {
            "width": width, "layers": layers, "heads": heads, "body": body,
            "channels": channels, "side": side, "hidden": hidden, "codes": codes,
        }  # fmt: skip
        self.embedding = NodeEmbedding(width)
        if body == "graphormer":
            self.body: nn.Module = Graphormer(width, layers, heads)
        elif body == "gated":
            self.body = Gated(width, layers)
        elif body == "none":
            self.body = Alone(width, layers)
        else:
            raise HyperError(
                message(f"GraphHyperNetwork: no body {body!r}",
                        expected="'graphormer', 'gated' or 'none'")
            )  # fmt: skip
        self.decoder = TileDecoder(
            width, channels, side, hidden=hidden, codes=codes, generator=generator
        )

    def forward(self, spaces: WeightSpace | Sequence[WeightSpace]) -> State | list[State]:
        """Predicts all parameters of one architecture, or of several.

        Args:
            spaces: Weight spaces from `trace`.

        Returns:
            For every space a state: tensors by name; tied names share one tensor. Buffers are left
            out; `coverage_of` says what is.
        """
        if isinstance(spaces, WeightSpace):
            return self.predict([architecture_of(spaces)])[0]
        return self.predict([architecture_of(s) for s in spaces])

    def predict(self, graphs: Sequence[ArchitectureGraph]) -> list[State]:
        """Predicts all parameters of architectures from their graphs.

        Args:
            graphs: Graphs of architectures.

        Returns:
            A state for each of them.
        """
        device = self.embedding.degrees.weight.device
        with torch.autocast(device.type, enabled=False):  # weights are wanted exactly
            return self._predicted(graphs, device)

    def _predicted(self, graphs: Sequence[ArchitectureGraph], device: torch.device) -> list[State]:
        batch = batched(graphs, device)
        x = self.body(self.embedding(batch), batch)
        n = x.shape[1]
        wanted = [
            Wanted(form, i * n + row)
            for i, g in enumerate(graphs)
            for form, row in zip(g.forms, g.holders.tolist(), strict=True)
        ]
        made = iter(self.decoder(x.flatten(0, 1), wanted))
        return [
            {name: x for form in g.forms for x in [next(made)] for name in form.names}
            for g in graphs
        ]


def weight_norms(state: Mapping[str, Tensor]) -> Tensor:
    """Sum of the Frobenius norms of tensors: a penalty on predicted parameters.

    Knyazev et al. (2023), "Can We Scale Transformers to Predict Parameters of Diverse ImageNet
    Models?" (arXiv 2303.04143), section 3.3, with weight 3e-5.

    Args:
        state: Tensors by name; tied names count once.

    Returns:
        A scalar.
    """
    once = {id(x): x for x in state.values()}
    return torch.stack([x.norm() for x in once.values()]).sum()
