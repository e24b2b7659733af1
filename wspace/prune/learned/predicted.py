"""`Predicted`: importance that a trained metanet predicts from weights alone; and `MeanField`."""

from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from wspace.action import shape_of
from wspace.graph import encode
from wspace.prune.learned.features import estimated, unit_features
from wspace.prune.learned.nodes import unit_nodes
from wspace.prune.learned.predictor import UnitPredictor, load_predictor
from wspace.prune.restriction import prunable
from wspace.space import WeightSpace


class Predicted:
    """Importance as a metanet predicts it: how far the loss rises if the unit is taken away.

    No data are needed, only weights. Scores are positive and relative to the network's mean effect,
    so units of different groups compare (global scope), and sums stand for units taken together.

    Args:
        predictor: A name of `wspace.prune.learned.predictor.SHIPPED`, a file, or a predictor.

    Raises:
        CheckpointError: If there is no such predictor.

    Example:
        >>> import wspace
        >>> mlp = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> scores = Predicted("small")(mlp, wspace.trace(mlp, torch.zeros(1, 3)))
        >>> scores["h1"].shape, bool((scores["h1"] > 0).all())
        (torch.Size([5]), True)
    """  # noqa: DOC502 (load_predictor raises)

    def __init__(self, predictor: str | Path | UnitPredictor = "small") -> None:
        made = predictor if isinstance(predictor, UnitPredictor) else load_predictor(predictor)
        self.predictor = made.eval()

    def __repr__(self) -> str:
        return f"Predicted({self.predictor.options})"

    def __call__(self, module: nn.Module, space: WeightSpace) -> dict[str, Tensor]:
        """Scores of a module's units.

        Args:
            module: Not modified.
            space: Its weight space, from `wspace.trace`.

        Returns:
            Group name → ``(*sizes of over, size)``, float64, for every prunable group. Units that
            the graph has no node for, which no predictor can judge, have the highest score.

        Raises:
            SpaceMismatch: If the space is not the module's, or was not traced.
        """  # noqa: DOC502 (encode raises)
        return self.of_state(module.state_dict(), space)

    @torch.no_grad()
    def of_state(self, state: Mapping[str, Tensor], space: WeightSpace) -> dict[str, Tensor]:
        """Scores of a state, or of several of one space.

        Args:
            state: Tensors by name, ``(*batch, *shape)``.
            space: Their weight space.

        Returns:
            As for a call, with the batch axes in front.
        """
        like = next(self.predictor.parameters())
        names = {n for p in space.params for n in (p.name, *p.ties)}
        moved = {k: x.detach().to(like) for k, x in state.items() if k in names}
        graph = encode(space, moved)
        logs = self.predictor(graph)
        most = torch.stack([x.amax() for x in logs.values()]).amax() if logs else like.new_zeros(())
        out: dict[str, Tensor] = {}
        for name, group in prunable(space).items():
            x = logs.get(name, most.expand(*graph.batch, *shape_of(group, space)))
            out[name] = x.double().exp().cpu()
        return out


class MeanField:
    """Importance by an estimate that nothing was learned for: mean-field theory on the graph.

    See `wspace.prune.learned.features`: the second moment of what a unit sends, times the share of
    it that arrives at the outputs, of inputs that are independent and of variance 1. Behind
    BatchNorm its own statistics hold instead. A unit's nodes are summed.

    Example:
        >>> import wspace
        >>> mlp = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> MeanField()(mlp, wspace.trace(mlp, torch.zeros(1, 3)))["h1"].shape
        torch.Size([5])
    """

    def __repr__(self) -> str:
        return "MeanField()"

    def __call__(self, module: nn.Module, space: WeightSpace) -> dict[str, Tensor]:
        """Scores of a module's units, as `Predicted` gives them.

        Args:
            module: Not modified.
            space: Its weight space, from `wspace.trace`.

        Returns:
            Group name → ``(*sizes of over, size)``, float64.

        Raises:
            SpaceMismatch: If the space is not the module's, or was not traced.
        """  # noqa: DOC502 (encode raises)
        return self.of_state(module.state_dict(), space)

    @torch.no_grad()
    def of_state(self, state: Mapping[str, Tensor], space: WeightSpace) -> dict[str, Tensor]:
        """Scores of a state, or of several of one space.

        Args:
            state: Tensors by name, ``(*batch, *shape)``.
            space: Their weight space.

        Returns:
            As for a call, with the batch axes in front.
        """
        names = {n for p in space.params for n in (p.name, *p.ties)}
        graph = encode(space, {k: x.detach().double() for k, x in state.items() if k in names})
        effects = estimated(unit_features(graph)).exp()
        out: dict[str, Tensor] = {}
        for name, (where, which) in unit_nodes(space).items():
            shape = shape_of(prunable(space)[name], space)
            total = effects.new_zeros(len(effects), prod(shape))
            total = total.index_add(1, which, effects[:, where])
            if len(which.unique()) < prod(shape):
                total = torch.full_like(total, float(effects.amax()))
            out[name] = total.reshape(*graph.batch, *shape).cpu()
        return out
