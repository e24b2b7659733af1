r"""Meta-pruning: a metanet edits weights so that they prune better.

.. math::
    \theta' = g_\phi(\theta) \odot (\theta + \Delta_\phi(\theta)), \qquad
    \min_\phi\; L(\theta') + \lambda\, R(\theta') / R(\theta),

with the network's own loss L, taken through `torch.func.functional_call`, and a penalty R that is
lower the fewer units carry the norm. A gate g multiplies all that belongs to a unit; the change of
single entries makes up for what gates take away. Both come from metanets on the parameter graph, so
this works on any traced network; metanets that were fitted to some networks may edit others, of
other architectures, without seeing their data. Afterwards one prunes by magnitude.

"Meta Pruning via Graph Metanetworks" (arXiv 2506.12041) does this with graphs written by hand for
each network, ten networks to learn from, and fine-tuning around it that takes GPU hours. Here there
are minutes: no fine-tuning, any number of networks, the penalty in closed form. Measured on small
classifiers it is not worth it: training the weights themselves with `concentration` as a penalty,
for the same time, prunes far better (docs/benchmarks.md).
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # pyright: ignore[reportPrivateUsage]

from wspace.action import State, shape_of
from wspace.batchnorm import reestimate
from wspace.errors import PruneError, message
from wspace.graph import ParameterGraph, encode
from wspace.nn.gmn import GraphMetanet
from wspace.nn.metanet import Metanet
from wspace.prune.learned.effects import Loss, strips
from wspace.prune.learned.predictor import UnitPredictor, load_predictor
from wspace.prune.restriction import prunable
from wspace.restore import modes_of, put_modes
from wspace.space import WeightSpace

Penalty = Callable[[State, WeightSpace], Tensor]
"""(state, its space) → what is to be small, a scalar."""


@dataclass(frozen=True, eq=False)
class Editable:
    """A network with what it takes to measure it.

    Attributes:
        module: The network; never modified.
        space: Its weight space.
        batches: To measure the loss on, each in turn.
        loss: (module, batch) → scalar.
    """

    module: nn.Module
    space: WeightSpace
    batches: Sequence[Any]
    loss: Loss


def unit_norms(state: State, space: WeightSpace) -> dict[str, Tensor]:
    """Euclidean norm of everything that belongs to a unit, for every prunable group.

    Args:
        state: Tensors by name, ``(*shape)``.
        space: Their weight space.

    Returns:
        Group name → ``(*sizes of over, size)``; differentiable.
    """
    out: dict[str, Tensor] = {}
    for name, group in prunable(space).items():
        shape = shape_of(group, space)
        like = next(iter(state.values()))
        total = torch.zeros(prod(shape), dtype=like.dtype, device=like.device)
        for parameter, which, entries in _entries(space, name):
            x = state[parameter].square().flatten()
            x = x if entries is None else x[entries.to(x.device)]
            total = total.index_add(0, which.to(x.device), x)
        out[name] = (total.reshape(shape) + 1e-12).sqrt()
    return out


@lru_cache(maxsize=512)
def _entries(space: WeightSpace, name: str) -> list[tuple[str, Tensor, Tensor | None]]:
    """Parameters of a group: whose unit each entry is; which entries, unless it is all of them."""
    out: list[tuple[str, Tensor, Tensor | None]] = []
    for parameter, places in strips(space, space.all_groups[name]).items():
        for numbers in places:
            which = numbers.expand(space[parameter].shape).flatten()
            known = which >= 0
            every = bool(known.all())
            out.append((parameter, which[known], None if every else known.nonzero()[:, 0]))
    return out


def concentration(state: State, space: WeightSpace) -> Tensor:
    r"""How evenly norms are spread over the units of a group: the mean over groups.

    :math:`\|n\|_1 / (\sqrt{k}\,\|n\|_2)` of the norms of k units: 1 if all are equal,
    :math:`1/\sqrt k` if one has it all (Hoyer 2004). Scaling a whole group changes nothing, so
    making weights small is no way out, as it is for a sum of norms in networks with BatchNorm.

    Args:
        state: Tensors by name, ``(*shape)``.
        space: Their weight space.

    Returns:
        A scalar.
    """
    norms = [x.reshape(-1, x.shape[-1]) for x in unit_norms(state, space).values()]
    each = [(x.sum(-1) / (x.shape[-1] ** 0.5 * x.norm(dim=-1))).mean() for x in norms]
    return torch.stack(each).mean()


class Editor(nn.Module):
    """Metanets that change a state: entries by a parameter head, units by gates.

    Args:
        metanet: With the head ``"parameter"``; a small `GraphMetanet` whose first changes are a
            hundredth of the weights if None.
        gates: Predicts the logarithm of each unit's effect, of which logits are `SHARP` times that
            plus `OPEN`; a copy of the shipped `UnitPredictor` if None. False for no gates.

    Raises:
        PruneError: If the metanet has another head.
    """

    def __init__(
        self, metanet: Metanet | None = None, gates: UnitPredictor | bool | None = None
    ) -> None:
        super().__init__()
        if metanet is None:
            metanet = GraphMetanet(channels=16, layers=2, head="parameter")
            with torch.no_grad():
                cast(Any, metanet.head).scale.fill_(0.01)
        if metanet.kind != "parameter":
            raise PruneError(
                message("MetaPruner: a metanet that edits nothing", expected="head='parameter'",
                        got=f"head={metanet.kind!r}")
            )  # fmt: skip
        self.metanet = metanet
        self.gates = None
        if gates is not False:
            made = gates if isinstance(gates, UnitPredictor) else load_predictor("small")
            self.gates = made.requires_grad_(True)

    def forward(self, graph: ParameterGraph) -> dict[str, Tensor]:
        """The edited state of a graph without batch axes."""
        state: dict[str, Tensor] = self.metanet(graph)
        if self.gates is None:
            return state
        for name, logits in self.gates(graph).items():
            gate = torch.sigmoid(SHARP * logits + OPEN).flatten()
            for parameter, places in strips(graph.space, graph.space.all_groups[name]).items():
                x = state[parameter]
                for numbers in places:
                    at = numbers.to(x.device)
                    x = x * torch.where(at >= 0, gate[at.clamp(min=0)], 1.0).to(x.dtype)
                state |= {k: x for k in (parameter, *graph.space[parameter].ties) if k in state}
        return state


OPEN, SHARP = 6.0, 5.0
"""Logit of a gate whose unit has the network's mean effect, and how much it falls for one that has
less by a factor of e: at a third of the mean effect a gate is half open, at a tenth it is shut."""


class MetaPruner:
    """Metanets that edit networks so that they prune better.

    Args:
        metanet: An `Editor`, or its metanet for entries, with gates beside it.
        strength: Weight λ of the penalty, which is divided by what it is for the network as it was.
        penalty: `concentration` if None. Another one, such as a sum of group norms:
            ``lambda state, space: GroupSparsity(space).penalty(state)``.
        learning_rate: Of Adam.

    Attributes:
        editor: The metanets.

    Raises:
        PruneError: If the metanet has another head.

    Example:
        >>> import torch, wspace
        >>> mlp = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(64, 3)
        >>> y = mlp(x).detach()
        >>> net = Editable(mlp, wspace.trace(mlp, x), [x], lambda m, x: (m(x) - y).square().mean())
        >>> pruner = MetaPruner()
        >>> history = pruner.fit([net], steps=3)
        >>> sorted(pruner.edit(net.module, net.space)) == sorted(mlp.state_dict())
        True
    """

    def __init__(
        self,
        metanet: Editor | Metanet | None = None,
        *,
        strength: float = 1.0,
        penalty: Penalty | None = None,
        learning_rate: float = 1e-3,
    ) -> None:
        self.editor = metanet if isinstance(metanet, Editor) else Editor(metanet)
        self.strength = strength
        self.penalty = penalty or concentration
        self.learning_rate = learning_rate

    def fit(
        self,
        networks: Sequence[Editable],
        *,
        steps: int = 200,
        generator: torch.Generator | None = None,
    ) -> list[tuple[float, float]]:
        """Trains the metanet: one network and one of its batches in a step.

        Layers of batch normalisation take the statistics of the batch; all else is in evaluation
        mode.

        Args:
            networks: What to learn from, in turn.
            steps: Steps of Adam.
            generator: Decides with which batch a network begins.

        Returns:
            Loss and relative penalty of every step.

        Raises:
            PruneError: If there are no networks, or one has no batches or no prunable group.
        """
        wrong = [str(i) for i, n in enumerate(networks) if not (n.batches and prunable(n.space))]
        if wrong or not networks:
            raise PruneError(
                message("MetaPruner: nothing to learn from", got=wrong or "no networks",
                        expected="networks with at least one batch and one prunable group")
            )  # fmt: skip
        optimizer = torch.optim.Adam(self.editor.parameters(), self.learning_rate)
        firsts = [int(torch.randint(len(n.batches), (1,), generator=generator)) for n in networks]
        before = [float(self.penalty(_trained(n.module), n.space)) for n in networks]
        history: list[tuple[float, float]] = []
        for step, k in zip(range(steps), cycle(range(len(networks))), strict=False):
            net, turn = networks[k], firsts[k] + step // len(networks)
            with batch_statistics(net.module):
                state = self._edited(net.module, net.space)
                loss = asked(net, state, net.batches[turn % len(net.batches)])
            penalty = self.penalty(state, net.space) / before[k]
            optimizer.zero_grad()
            (loss + self.strength * penalty).backward()
            nn.utils.clip_grad_norm_(self.editor.parameters(), 1.0)
            optimizer.step()
            history.append((float(loss.detach()), float(penalty.detach())))
        return history

    @torch.no_grad()
    def edit(
        self, module: nn.Module, space: WeightSpace, batches: Sequence[Any] | None = None
    ) -> dict[str, Tensor]:
        """The edited state of a network, which may be one that was not fitted to.

        Args:
            module: The network; never modified.
            space: Its weight space.
            batches: To estimate the statistics of BatchNorm anew; without them they stay, and fit
                the edited weights badly.

        Returns:
            A new state by the names of ``module.state_dict()``.

        Raises:
            SpaceMismatch: If the space is not the module's.
        """  # noqa: DOC502 (encode raises)
        state = {k: x.detach().clone() for k, x in module.state_dict().items()}
        state |= self._edited(module, space)
        return refreshed(module, state, batches)

    def _edited(self, module: nn.Module, space: WeightSpace) -> dict[str, Tensor]:
        """Edited parameters, buffers left out."""
        names = {n for p in space.params for n in (p.name, *p.ties)}
        given = {k: x.detach() for k, x in module.state_dict().items() if k in names}
        made: dict[str, Tensor] = self.editor(encode(space, given))
        trained = _trained(module)
        return {k: x for k, x in made.items() if k in trained}


def edit(
    module: nn.Module,
    space: WeightSpace,
    batches: Sequence[Any],
    loss: Loss,
    *,
    steps: int = 200,
    generator: torch.Generator | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """A state of a network that prunes better, from a metanet that is fitted to it alone.

    Args:
        module: The network; never modified.
        space: Its weight space.
        batches: To measure the loss on; those of training will do.
        loss: (module, batch) → scalar.
        steps: Steps of the metanet.
        generator: Decides with which batch it begins.
        options: Of `MetaPruner`.

    Returns:
        A new state by the names of ``module.state_dict()``, statistics of BatchNorm estimated anew.

    Raises:
        PruneError: If there are no batches, or no unit can be pruned.
    """  # noqa: DOC502 (fit raises)
    pruner = MetaPruner(**options)
    pruner.fit([Editable(module, space, batches, loss)], steps=steps, generator=generator)
    return pruner.edit(module, space, batches)


# --------------------------------------------------------------------------- helpers


def _trained(module: nn.Module) -> dict[str, Tensor]:
    """Parameters by all of their names."""
    return {k: x.detach() for k, x in module.named_parameters(remove_duplicate=False)}


class _Asked(nn.Module):
    def __init__(self, net: Editable) -> None:
        super().__init__()
        self.module, self.loss = net.module, net.loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.module, batch)


def asked(net: Editable, state: State, batch: Any) -> Tensor:
    """The loss of a network with other parameters, differentiable in them.

    Args:
        net: The network.
        state: Parameters by name; buffers are copies of the network's own.
        batch: The batch.

    Returns:
        A scalar.
    """
    copies = {f"module.{k}": x.detach().clone() for k, x in net.module.named_buffers()}
    named = {f"module.{k}": x for k, x in state.items()}
    return functional_call(_Asked(net), copies | named, (batch,))


def refreshed(module: nn.Module, state: State, batches: Sequence[Any] | None) -> dict[str, Tensor]:
    """A state with the statistics of BatchNorm estimated anew.

    Args:
        module: Of the architecture; never modified.
        state: By the names of ``module.state_dict()``.
        batches: As `wspace.batchnorm.reestimate` takes them; None to leave everything as it is.

    Returns:
        A new state.
    """
    copy = deepcopy(module)
    copy.load_state_dict(dict(state))
    if batches is not None and any(isinstance(m, BatchNorm) for m in copy.modules()):
        copy.train()
        reestimate(copy, batches)
    return {k: x.detach().clone() for k, x in copy.state_dict().items()}


@contextmanager
def batch_statistics(module: nn.Module) -> Generator[None]:
    """A module in evaluation mode but for its layers of batch normalisation."""
    modes = modes_of(module)
    try:
        module.eval()
        for m in module.modules():
            if isinstance(m, BatchNorm):
                m.train()
        yield
    finally:
        put_modes(modes)
