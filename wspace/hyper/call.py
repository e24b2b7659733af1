"""`call`: a module run with weights from outside, one set or one for every network of a batch.

The module is never changed: `torch.func.functional_call` puts its own tensors back, also when the
module raises. Several networks run in one vectorised pass (`torch.func.vmap`), or, where an
operator has no batching rule, one after another, with the same answer.
"""

import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.utils._pytree import tree_flatten, tree_unflatten

from wspace.errors import HyperError, message
from wspace.restore import buffers_of, put_back

Inputs = Literal["paired", "shared", "samples"]
Method = Literal["auto", "vmap", "loop"]

_Leaves = list[Any]


def call(
    module: nn.Module,
    state: Mapping[str, Tensor],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    inputs: Inputs = "paired",
    method: Method = "auto",
) -> Any:
    """What a module returns with other weights.

    Args:
        module: The module; it keeps its own weights, also when it raises. Buffers that are not in
            `state` are its own: BatchNorm updates them in training mode as it always does.
        state: Tensors by name, ``shape`` or ``(B, *shape)``; names that are not there are the
            module's own. Tied names that are not there follow the one that is.
        args: Positional inputs.
        kwargs: Inputs by name.
        inputs: For a batch of B networks: ``"paired"`` gives network i entry i of every tensor,
            ``"shared"`` gives all of them the same, ``"samples"`` is ``"paired"`` for single
            examples: network i sees a batch of the one example i.
        method: ``"vmap"`` runs all networks at once, ``"loop"`` one after another; ``"auto"``
            falls back to the loop for fused recurrent layers, for BatchNorm that updates
            statistics, and where vmap raises. Dropout differs between networks in both.

    Returns:
        The module's answer; for a batch, every tensor of it with B in front (with ``"samples"``
        in place of the module's own batch axis).

    Raises:
        HyperError: If a name is unknown, a shape does not fit, or inputs do not pair up.
    """
    given = dict(kwargs or {})
    full, axes, size = _checked(module, state)
    with _own_weights(module):
        if size is None:
            return functional_call(module, full, tuple(args), given, tie_weights=False)
        return _several(module, (full, axes, size), (tuple(args), given), inputs, method)


def _several(
    module: nn.Module,
    states: tuple[dict[str, Tensor], dict[str, int | None], int],
    given: tuple[tuple[Any, ...], dict[str, Any]],
    inputs: Inputs,
    method: Method,
) -> Any:
    """What several networks return."""
    full, axes, size = states
    leaves, spec = tree_flatten(given)
    places = [k for k, x in enumerate(leaves) if _is_paired(x, inputs)]
    _check_pairs([leaves[k] for k in places], size, inputs)
    run = _Run(module, leaves, spec, places, single=inputs == "samples")
    if method == "loop" or (method == "auto" and _needs_loop(module)):
        return run.loop(full, axes, size)
    if method == "vmap":
        return run.together(full, axes)
    before = buffers_of(module)
    try:
        return run.together(full, axes)
    except (RuntimeError, NotImplementedError, ValueError):
        put_back(before)
        return run.loop(full, axes, size)


class _Run:
    """A module and its inputs, to be run with several states."""

    def __init__(
        self, module: nn.Module, leaves: _Leaves, spec: Any, places: list[int], *, single: bool
    ) -> None:
        self.module, self.leaves, self.spec = module, leaves, spec
        self.places, self.single = places, single
        self.out: Any = None  # structure of the answer, and what in it is no tensor

    def one(self, state: Mapping[str, Tensor], paired: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of the answer of one network."""
        leaves = list(self.leaves)
        for k, x in zip(self.places, paired, strict=True):
            leaves[k] = x[None] if self.single else x
        args, kwargs = tree_unflatten(leaves, self.spec)
        answer = functional_call(self.module, dict(state), args, kwargs, tie_weights=False)
        flat, spec = tree_flatten(answer)
        self.out = spec, [None if isinstance(x, Tensor) else x for x in flat]
        tensors = [x for x in flat if isinstance(x, Tensor)]
        return [x[0] if x.dim() and len(x) == 1 else x for x in tensors] if self.single else tensors

    def together(self, state: dict[str, Tensor], axes: dict[str, int | None]) -> Any:
        """All networks at once."""
        paired = [self.leaves[k] for k in self.places]
        dims = (axes, [0] * len(paired))
        with _batchable():
            return self.answer(vmap(self.one, in_dims=dims, randomness="different")(state, paired))

    def loop(self, state: dict[str, Tensor], axes: dict[str, int | None], size: int) -> Any:
        """One network after another."""
        rows = [
            self.one(
                {n: x if axes[n] is None else x[i] for n, x in state.items()},
                [self.leaves[k][i] for k in self.places],
            )
            for i in range(size)
        ]
        return self.answer([torch.stack(column) for column in zip(*rows, strict=True)])

    def answer(self, tensors: Sequence[Tensor]) -> Any:
        """The module's own structure around tensors."""
        spec, rest = self.out
        left = iter(tensors)
        return tree_unflatten([next(left) if x is None else x for x in rest], spec)


def _checked(
    module: nn.Module, state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, int | None], int | None]:
    """The state with all tied names, the batch axis of every tensor, and the batch size."""
    own = dict(module.named_parameters(remove_duplicate=False))
    own |= cast(dict[str, Any], dict(module.named_buffers(remove_duplicate=False)))
    wrong: list[str] = []
    sizes: dict[int, str] = {}
    full: dict[str, Tensor] = {}
    axes: dict[str, int | None] = {}
    for name, x in state.items():
        if name not in own:
            wrong.append(f"{name!r}, which the module does not have")
            continue
        shape = tuple(own[name].shape)
        lead = x.dim() - len(shape)
        if lead not in {0, 1} or tuple(x.shape[lead:]) != shape:
            wrong.append(f"{name!r} of shape {tuple(x.shape)}, expected {shape} or (B, *{shape})")
            continue
        if lead:
            sizes.setdefault(len(x), name)
        constant = lead == 1 and x.stride(0) == 0 and len(x) > 0
        full[name] = x[0] if constant else x
        axes[name] = 0 if lead and not constant else None
    if len(sizes) > 1:
        wrong += [f"{name!r} with {n} networks" for n, name in sizes.items()]
    if wrong:
        raise HyperError(
            message("call: the state does not fit the module", got=wrong,
                    help="one batch axis may lead, of one length for all tensors")
        )  # fmt: skip
    _add_ties(own, full, axes)
    return full, axes, next(iter(sizes), None)


def _add_ties(
    own: Mapping[str, Tensor], full: dict[str, Tensor], axes: dict[str, int | None]
) -> None:
    """Gives the other names of a tensor the value that one of them has."""
    by_id = {id(own[name]): name for name in full}
    for name, x in own.items():
        if name not in full and id(x) in by_id:
            full[name], axes[name] = full[by_id[id(x)]], axes[by_id[id(x)]]


def _is_paired(x: Any, inputs: Inputs) -> bool:
    return inputs != "shared" and isinstance(x, Tensor) and x.dim() > 0


def _check_pairs(tensors: Sequence[Tensor], size: int, inputs: Inputs) -> None:
    wrong = [f"shape {tuple(x.shape)}" for x in tensors if len(x) != size]
    if wrong:
        raise HyperError(
            message(
                f"call: inputs do not pair up with {size} networks",
                expected=f"tensors with {size} entries along their first axis ({inputs!r})",
                got=wrong,
                help='inputs="shared" gives all networks the same inputs',
            )
        )


def _needs_loop(module: nn.Module) -> bool:
    """Whether vmap is known to refuse the module: no need to try."""
    return any(
        isinstance(m, nn.RNNBase | nn.RNNCellBase)
        or (isinstance(m, BatchNorm) and m.training and m.track_running_stats)
        for m in module.modules()
    )


@contextmanager
def _batchable() -> Generator[None]:
    """Attention as operators that have a batching rule."""
    fast: bool = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            # some operators are looped over by torch itself, which is as right, and no news
            warnings.filterwarnings("ignore", "There is a performance drop because")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _own_weights(module: nn.Module) -> Generator[None]:
    """Recurrent layers keep a list of their weights beside them: it is put back as well."""
    try:
        yield
    finally:
        for m in module.modules():
            if isinstance(m, nn.RNNBase):
                m._flat_weights = [getattr(m, n) for n in m._flat_weights_names]  # pyright: ignore[reportPrivateUsage]
