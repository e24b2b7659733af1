"""`HyperNetwork`: weights of any module, from a condition."""

from collections.abc import Mapping
from math import isfinite
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from wspace.action import State
from wspace.errors import HyperError, message
from wspace.hyper.call import Inputs, Method, run_networks
from wspace.hyper.condition import Noise
from wspace.hyper.heads.head import Head
from wspace.hyper.initialize import Scheme, centre, check_scheme, initialize
from wspace.hyper.target import (
    Coverage,
    Select,
    Weight,
    parameters_of,
    selected,
    skeleton,
    weights_of,
)
from wspace.space import WeightSpace

Base = Literal["frozen", "trained"] | Mapping[str, Tensor] | None


class HyperNetwork(nn.Module):
    """A pure map from a condition to the state of a target: any module, whole or in part.

    The target is copied, and never changed. In the copy, generated parameters are placeholders;
    shared ones are ordinary parameters that are trained with the hypernetwork; what is neither is
    frozen. Tied parameters are generated once, parametrised ones (weight norm) in the parameters
    that they are computed from.

    Args:
        target: The module whose weights are generated.
        condition: Module from what is conditioned on to a vector, with an attribute ``width``; None
            for a head that needs none.
        head: Module from that vector to weights; it is bound to the target here.
        base: Values that what is made is added to: ``"frozen"`` and ``"trained"`` are the target's
            own, a state by name is frozen; None for none.
        select: Parameters that are generated (`wspace.hyper.target.Select`).
        share: Of the rest, parameters that are trained; None for none.
        init: Variances to begin with (`wspace.hyper.initialize`); None for ``"residual"`` on a base
            and ``"hyperfan_in"`` without one.
        scale: Factor of what is made; 0 gives the base exactly. An option, as those of the head:
            it is not in the ``state_dict``.
        space: Weight space of the target, for the roles of its parameters; without it they follow
            from the modules that own them.
        generator: Source of randomness.

    Attributes:
        target: The copy.
        weights: What is generated.
        coverage: Which tensors are generated, shared, untouched; print it.

    Raises:
        HyperError: If a pattern chooses nothing, the head cannot make the weights, or base and head
            do not go together.

    Example:
        >>> from wspace.hyper import FullHead, HyperNetwork, TaskEmbedding
        >>> net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> hyper = HyperNetwork(net, TaskEmbedding(4, 8), FullHead([16]), select="*.weight")
        >>> state = hyper(torch.tensor([0, 2]))
        >>> {name: tuple(x.shape) for name, x in state.items()}
        {'0.weight': (2, 5, 3), '0.bias': (2, 5), '2.weight': (2, 2, 5), '2.bias': (2, 2)}
        >>> hyper.run(torch.tensor([0, 2]), torch.randn(2, 7, 3)).shape
        torch.Size([2, 7, 2])
    """

    def __init__(
        self,
        target: nn.Module,
        condition: nn.Module | None,
        head: Head,
        base: Base = None,
        *,
        select: Select = "*",
        share: Select | None = "*",
        init: Scheme | None = None,
        scale: float = 1.0,
        space: WeightSpace | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        width = _width(head, condition, scale)
        chosen, shared = _chosen(target, select, share)
        self.weights = weights_of(target, chosen, space)
        values = _values(target, self.weights, base)
        init = init or ("hyperfan_in" if values is None else "residual")
        check_scheme(init)
        _check(head, init, values)
        self.coverage = _coverage(target, self.weights, shared)
        self.scale = scale
        self.target = skeleton(target, self.weights, shared)
        own = {n for n, _ in target.named_parameters(remove_duplicate=False)}
        own |= {n for n, _ in target.named_buffers(remove_duplicate=False)}
        self._order = [n for n in target.state_dict() if n in own]
        self.condition = condition
        head.bind(self.weights, width, generator)
        self.head = head
        self.base = None if values is None else _Base(values, trained=base == "trained")
        initialize(head, init, generator=generator)
        like = target.get_parameter(self.weights[0].name)
        head.to(like.device, torch.promote_types(like.dtype, torch.float32))
        if condition is not None:
            condition.to(like.device)
        self._types = _Types({w.dtype for w in self.weights})

    # ----------------------------------------------------------------- generating

    def embed(self, cond: Any = None) -> Tensor:
        """Vector of a condition.

        Args:
            cond: What the condition takes; None if there is no condition, or to call it without.

        Returns:
            Vectors, ``(*batch, width)``.

        Raises:
            HyperError: If something is conditioned on, and there is no condition.
        """
        if self.condition is None:
            if cond is not None:
                raise HyperError(
                    message("hypernetwork: there is no condition", got=f"{type(cond).__name__}")
                )
            return self.head.gains[:0]
        if cond is None and not isinstance(self.condition, Noise):
            raise HyperError(
                message(f"hypernetwork: {type(self.condition).__name__} needs a condition")
            )
        return self.condition() if cond is None else self.condition(cond)

    def generate(self, cond: Any = None) -> dict[str, Tensor]:
        """The generated tensors alone.

        Args:
            cond: What is conditioned on.

        Returns:
            By first name, ``(*batch, *shape)``.
        """
        return self.generate_from(self.embed(cond))

    def generate_from(self, e: Tensor) -> dict[str, Tensor]:
        """The tensors for the vector of a condition.

        Args:
            e: Vectors, ``(*batch, width)``.

        Returns:
            By first name, ``(*batch, *shape)``.
        """
        base = None
        if self.base is not None:
            base = dict(zip((w.name for w in self.weights), self.base.values(), strict=True))
        made = self.head(e.to(self.head.gains.dtype), base, self.scale)
        for w in self.weights:
            x = made[w.name]
            x = x + centre(w) if base is None and centre(w) else x
            made[w.name] = x.to(self._types.now(w.dtype))
        return made

    def forward(self, cond: Any = None) -> State:
        """The whole state of the target for a condition.

        Args:
            cond: What is conditioned on; with batch axes it gives states with the same.

        Returns:
            All tensors of the target's ``state_dict``: generated ones, shared ones, buffers, under
            all their names. Those that do not depend on the condition are the live ones, expanded
            to the batch axes: they change as training goes on. `cache` copies.
        """
        return self.completed(self.generate(cond))

    def completed(self, made: Mapping[str, Tensor]) -> State:
        """The whole state around generated tensors.

        Args:
            made: What `generate` returns.

        Returns:
            As `forward`.
        """
        first = self.weights[0]
        batch = made[first.name].shape[: made[first.name].dim() - len(first.shape)]
        named = {n: made[w.name] for w in self.weights for n in w.names}
        own: dict[str, Tensor] = dict(self.target.named_parameters(remove_duplicate=False))
        own |= dict(self.target.named_buffers(remove_duplicate=False))
        return {n: named[n] if n in named else own[n].expand((*batch, *own[n].shape))
                for n in self._order}  # fmt: skip

    def run(
        self,
        cond: Any,
        *args: Any,
        inputs: Inputs = "paired",
        method: Method = "auto",
        **kwargs: Any,
    ) -> Any:
        """The target's answer with generated weights.

        Args:
            cond: What is conditioned on; with a batch axis, several networks run at once.
            args: Inputs of the target.
            inputs: How inputs go with several networks (`wspace.hyper.call`).
            method: How they are run.
            kwargs: Inputs of the target by name.

        Returns:
            What the target returns; with a batch of conditions, B comes first.
        """
        return self.run_with(self.generate(cond), *args, inputs=inputs, method=method, **kwargs)

    def run_with(
        self,
        made: Mapping[str, Tensor],
        *args: Any,
        inputs: Inputs = "paired",
        method: Method = "auto",
        **kwargs: Any,
    ) -> Any:
        """The target's answer with given tensors in place of the generated ones.

        Args:
            made: Generated tensors by first name, at most one batch axis.
            args: Inputs of the target.
            inputs: As in `run`.
            method: As in `run`.
            kwargs: Inputs of the target by name.

        Returns:
            As `run`.
        """
        state = {n: made[w.name] for w in self.weights for n in w.names}
        return run_networks(self.target, state, args, kwargs, inputs, method)

    # ------------------------------------------------------------------- deploying

    @torch.no_grad()
    def cache(self, cond: Any = None) -> State:
        """The state for a condition, once: copies without gradients.

        Args:
            cond: What is conditioned on.

        Returns:
            As `forward`; tied names share one tensor.
        """
        state, seen = self.forward(cond), dict[object, Tensor]()
        places = {n: (x.data_ptr(), x.shape) if x.numel() else n for n, x in state.items()}
        return {n: seen.setdefault(places[n], x.detach().clone()) for n, x in state.items()}

    @torch.no_grad()
    def write_to(self, module: nn.Module, cond: Any = None) -> None:
        """Copies the state for a condition into a module: all tensors, or none.

        Args:
            module: A module built as the target was.
            cond: What is conditioned on, without batch axes.

        Raises:
            HyperError: If names or shapes differ, values are not finite in the module's type, or
                the module ties tensors that differ here, or has no memory.
        """
        state = self.forward(cond)
        own = {n: x for n, x in module.state_dict(keep_vars=True).items() if isinstance(x, Tensor)}
        wrong = [f"{n!r}, which only one of them has" for n in state.keys() ^ own.keys()]
        seen: dict[int, str] = {}
        for n in [n for n in state if n in own]:
            x = state[n].to(own[n].dtype)
            if x.shape != own[n].shape:
                wrong.append(f"{n!r} of shape {tuple(x.shape)} for {tuple(own[n].shape)}")
            elif own[n].is_meta:
                wrong.append(f"{n!r} on the meta device")
            elif not x.isfinite().all():
                wrong.append(f"{n!r} with values that are not finite")
            elif (other := seen.setdefault(id(own[n]), n)) != n and not x.equal(state[other]):
                wrong.append(f"{other!r} and {n!r}, which it ties, with two values")
        if wrong:
            raise HyperError(
                message("write_to: the module is left as it was", got=sorted(wrong),
                        help="build it as the target was built, and condition on one thing")
            )  # fmt: skip
        for n, x in state.items():
            own[n].copy_(x)

    # ------------------------------------------------------------------------ rest

    @property
    def generated(self) -> int:
        """Entries that are generated for one condition."""
        return self.head.numel

    def extra_repr(self) -> str:
        """How much is generated, and by how much."""
        own = sum(p.numel() for p in self.parameters() if p.requires_grad)
        shared = sum(self.coverage.shared.values())
        return f"generates {self.generated:,} entries from {own - shared:,} (+ {shared:,} shared)"


class _Types(nn.Module):
    """Types of generated tensors, which change as the module is moved to another type."""

    def __init__(self, dtypes: set[torch.dtype]) -> None:
        super().__init__()
        for dtype in sorted(dtypes, key=str):
            self.register_buffer(_word(dtype), torch.empty(0, dtype=dtype), persistent=False)

    def now(self, dtype: torch.dtype) -> torch.dtype:
        """What a type has become."""
        return self.get_buffer(_word(dtype)).dtype


def _word(dtype: torch.dtype) -> str:
    return "from_" + str(dtype).removeprefix("torch.")


class _Base(nn.Module):
    """Values that what is made is added to: parameters if they are trained, else buffers."""

    def __init__(self, values: list[Tensor], *, trained: bool) -> None:
        super().__init__()
        for k, x in enumerate(values):
            if trained:
                self.register_parameter(str(k), nn.Parameter(x))
            else:
                self.register_buffer(str(k), x)

    def values(self) -> list[Tensor]:
        """The values, in the order of the weights."""
        return [*self.parameters(), *self.buffers()]


def _width(head: object, condition: object, scale: object) -> int:
    """Length of the condition's vector; 0 without a condition. Refuses what is no such thing."""
    width = 0 if condition is None else getattr(condition, "width", None)
    wrong = [] if isinstance(head, Head) else [f"head={head!r}, expected a head of wspace.hyper"]
    if not isinstance(condition, nn.Module | None) or not isinstance(width, int):
        kind = type(condition).__name__
        wrong.append(f"condition={kind}, expected a module with an attribute `width`")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not isfinite(scale):
        wrong.append(f"scale={scale!r}, expected a finite number")
    if wrong:
        raise HyperError(
            message("hypernetwork: parts that do not go together", got=wrong,
                    help="HyperNetwork(target, TaskEmbedding(5, 16), FullHead())")
        )  # fmt: skip
    return int(width or 0)


def _values(target: nn.Module, weights: tuple[Weight, ...], base: Base) -> list[Tensor] | None:
    """Copies of the values of the base, one for each weight."""
    if base is None:
        return None
    if isinstance(base, str):
        if base not in {"frozen", "trained"}:
            raise HyperError(
                message(f"hypernetwork: unknown base {base!r}",
                        expected="'frozen', 'trained', a state, or None")
            )  # fmt: skip
        return [target.get_parameter(w.name).detach().clone() for w in weights]
    if not isinstance(cast(object, base), Mapping):
        raise HyperError(
            message("hypernetwork: the base is no state", got=type(base).__name__,
                    help="pass module.state_dict()")
        )  # fmt: skip
    wrong = [f"no tensor {w.name!r}" for w in weights if w.name not in base]
    wrong += [
        f"{w.name!r} of shape {tuple(base[w.name].shape)}, expected {w.shape}"
        for w in weights
        if w.name in base and tuple(base[w.name].shape) != w.shape
    ]
    if wrong:
        raise HyperError(message("hypernetwork: the base does not fit the target", got=wrong))
    return [base[w.name].detach().clone() for w in weights]


def _check(head: Head, init: str, values: list[Tensor] | None) -> None:
    if values is not None:
        return
    if head.needs_base or init in {"residual", "bias"}:
        what = type(head).__name__ if head.needs_base else f"init={init!r}"
        raise HyperError(
            message(f"hypernetwork: {what} changes values that are there", expected="a base",
                    got="base=None", help='base="frozen" or base="trained"')
        )  # fmt: skip


def coverage_of(target: nn.Module, select: Select = "*", share: Select | None = "*") -> Coverage:
    """What a hypernetwork would generate, share and leave alone; nothing is made.

    Args:
        target: The module; it may be on the meta device.
        select: Parameters that are generated.
        share: Of the rest, parameters that are trained; None for none.

    Returns:
        The tensors by name.

    Raises:
        HyperError: If a pattern chooses nothing.
    """
    chosen, shared = _chosen(target, select, share)
    return _coverage(target, weights_of(target, chosen), shared)


def _chosen(target: nn.Module, select: Select, share: Select | None) -> tuple[set[str], set[str]]:
    """First names of generated and of shared parameters."""
    chosen = selected(target, select, "select")
    if select == "*":  # all that can be; others are shared
        chosen &= {f.names[0] for f in parameters_of(target) if f.value.is_floating_point()}
    if not chosen:
        raise HyperError(
            message("hypernetwork: no parameter to generate", help="choose some with select=")
        )
    return chosen, set[str]() if share is None else selected(target, share, "share") - chosen


def _coverage(target: nn.Module, weights: tuple[Weight, ...], shared: set[str]) -> Coverage:
    made = {n for w in weights for n in w.names}
    found = parameters_of(target)
    rest = {f.names[0]: f.value.numel() for f in found if f.names[0] not in made}
    return Coverage(
        generated={w.name: w.numel for w in weights},
        shared={n: k for n, k in rest.items() if n in shared},
        untouched={n: k for n, k in rest.items() if n not in shared}
        | {n: x.numel() for n, x in target.named_buffers()},
    )
