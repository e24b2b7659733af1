"""Training a predictor of effects on networks whose effects were measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import cos, pi

import torch
from torch import Tensor
from torch.nn import functional as F

from wspace.action import State
from wspace.errors import PruneError, message
from wspace.graph import encode
from wspace.prune.learned.predictor import UnitPredictor
from wspace.space import WeightSpace

FLOOR = 0.02
"""Effects below this share of the network's mean effect count as this: they are noise."""


@dataclass(frozen=True, eq=False)
class Measured:
    """Networks of one space, with the effects of their units.

    Attributes:
        space: Their weight space.
        states: Stacked states, ``(n, *shape)`` by name.
        effects: Group name → ``(n, *sizes of over, size)``, from `removal_effects`.
    """

    space: WeightSpace
    states: State
    effects: Mapping[str, Tensor]

    @property
    def count(self) -> int:
        """Number of networks."""
        return len(next(iter(self.effects.values())))


@dataclass(frozen=True)
class Learning:
    """How a predictor is trained.

    Attributes:
        steps: Steps of AdamW.
        learning_rate: At the peak; it rises over a twentieth and falls as a cosine.
        weight_decay: Of AdamW.
        spaces: Spaces in one step, all their networks each.
        networks: At most so many networks of a space in a step.
        ranking: Weight of the pairwise term.
        caution: Weight of the mean square of corrections to the mean-field estimate, which holds
            where nothing like a network was trained on.
    """

    steps: int = 600
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    spaces: int = 3
    networks: int = 8
    ranking: float = 1.0
    caution: float = 1.0


def targets(effects: Mapping[str, Tensor]) -> Tensor:
    r"""What is predicted: :math:`\log(\max(e, 0) / \bar e + \epsilon)`, all groups in a row.

    Args:
        effects: Group name → ``(n, *sizes of over, size)``.

    Returns:
        ``(n, units)``; the mean effect :math:`\bar e` is over the network's units, negative ones
        counted as 0.
    """
    e = torch.cat([x.flatten(1) for x in effects.values()], 1).clamp(min=0)
    return (e / e.mean(1, keepdim=True).clamp(min=1e-12) + FLOOR).log()


def effect_loss(predicted: Tensor, target: Tensor, ranking: float = 1.0) -> Tensor:
    """Regression and pairwise ranking inside every network.

    Args:
        predicted: Predicted logarithms, ``(n, units)``.
        target: As `targets` gives them.
        ranking: Weight of the ranking: a logistic loss over all pairs of a network, each weighted
            by how far the two are apart.

    Returns:
        The mean over networks.
    """
    near = F.huber_loss(predicted, target)
    apart = target[:, :, None] - target[:, None]
    margin = predicted[:, :, None] - predicted[:, None]
    weight = apart.abs()
    loss = (F.softplus(-margin * apart.sign()) * weight).sum((1, 2)) / (weight.sum((1, 2)) + 1e-9)
    return near + ranking * loss.mean()


def learn(
    predictor: UnitPredictor,
    networks: Sequence[Measured],
    learning: Learning | None = None,
    *,
    generator: torch.Generator | None = None,
) -> list[float]:
    """Trains a predictor in place.

    Args:
        predictor: The predictor.
        networks: Training networks by space.
        learning: How.
        generator: Decides which spaces and networks a step sees.

    Returns:
        The loss of every step.

    Raises:
        PruneError: If there are no networks.
    """
    how = learning or Learning()
    if not networks:
        raise PruneError(message("learn: no networks", expected="at least one measured space"))
    wanted = [targets(m.effects).to(next(predictor.parameters()).dtype) for m in networks]
    optimizer = torch.optim.AdamW(
        predictor.train().parameters(), how.learning_rate, weight_decay=how.weight_decay
    )
    history: list[float] = []
    for step in range(how.steps):
        rate = min(1.0, 20 * (step + 1) / how.steps) * (0.5 + 0.5 * cos(pi * step / how.steps))
        optimizer.param_groups[0]["lr"] = how.learning_rate * rate
        optimizer.zero_grad()
        total = 0.0
        for i in torch.randint(len(networks), (how.spaces,), generator=generator).tolist():
            m = networks[i]
            rows = torch.randperm(m.count, generator=generator)[: how.networks]
            loss = _loss(predictor, m, rows, wanted[i][rows], how) / how.spaces
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(predictor.parameters(), 1.0)
        optimizer.step()
        history.append(total)
    predictor.eval()
    return history


def _loss(
    predictor: UnitPredictor, m: Measured, rows: Tensor, target: Tensor, how: Learning
) -> Tensor:
    made = predictor.parts(encode(m.space, {k: x[rows] for k, x in m.states.items()}))
    known = torch.cat(
        [torch.full(x[0].shape, name in made).flatten() for name, x in m.effects.items()]
    )
    both = [made[name] for name in m.effects if name in made]
    estimate, correction = (torch.cat([x[i].flatten(1) for x in both], 1) for i in (0, 1))
    loss = effect_loss(estimate + correction, target[:, known], how.ranking)
    return loss + how.caution * correction.square().mean()
