"""`call`: a module run with weights from outside, one set or one for every network of a batch.

The module is never changed: `torch.func.functional_call` puts its own tensors back, also when the
module raises. Several networks run in one vectorised pass (`torch.func.vmap`), or, where that is
not possible, one after another, with the same answer. How an answer of several networks is put
together is in `answer`.
"""

import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.utils._pytree import tree_flatten, tree_unflatten

from wspace.errors import HyperError, message
from wspace.hyper.answer import (
    LARGE,
    Answer,
    attributes_of,
    escaped,
    put_attributes,
    put_values,
    values_of,
)

Inputs = Literal["paired", "shared", "samples"]
Method = Literal["auto", "vmap", "loop"]
INPUTS: tuple[str, ...] = ("paired", "shared", "samples")
METHODS: tuple[str, ...] = ("auto", "vmap", "loop")

_Axes = dict[str, int | None]


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
        state: Tensors by name, ``shape`` or ``(B, *shape)``; they are not changed. Names that are
            not there are the module's own. Tied names that are not there follow the one that is.
        args: Positional inputs.
        kwargs: Inputs by name.
        inputs: For a batch of B networks: ``"paired"`` gives network i entry i of every tensor,
            ``"shared"`` gives all of them the same, ``"samples"`` is ``"paired"`` for single
            examples: network i sees a batch of the one example i.
        method: ``"vmap"`` runs all networks at once, ``"loop"`` one after another; ``"auto"``
            falls back to the loop for fused recurrent layers, for BatchNorm that updates
            statistics, where vmap raises, and where the module keeps tensors of its run. Dropout
            differs between networks in both. Forward hooks that keep tensors need ``"loop"``, and
            what a module counts is counted once by vmap.

    Returns:
        The module's answer; for a batch, every tensor of it with B in front (with ``"samples"``
        in place of the module's own batch axis).

    Raises:
        HyperError: If a name is unknown, a shape does not fit, inputs do not pair up, or an answer
            of several networks holds something else than tensors that differs between them.
    """
    return run_networks(module, _unwritten(module, state), args, kwargs, inputs, method)


def run_networks(
    module: nn.Module,
    state: Mapping[str, Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    inputs: Inputs,
    method: Method,
) -> Any:
    """As `call`, for states that a module may write into, as BatchNorm does into its statistics."""
    if inputs not in INPUTS or method not in METHODS:
        raise HyperError(
            message("call: unknown option", expected=f"inputs in {INPUTS}, method in {METHODS}",
                    got=f"inputs={inputs!r}, method={method!r}")
        )  # fmt: skip
    _check_checkpointing(module)
    given: tuple[Any, ...] = tuple(args), dict(kwargs or {})
    with _placed(module, state), _own_weights(module):
        full, axes, size = _checked(module, _renormalised(module, state))
        if size is None:
            return functional_call(module, full, *given, tie_weights=False)
        leaves, spec = tree_flatten(given)
        places = [k for k, x in enumerate(leaves) if _is_paired(x, inputs)]
        _check_pairs([leaves[k] for k in places], size, inputs)
        run = _Run(module, leaves, spec, places, single=inputs == "samples")
        if method == "loop" or (method == "auto" and _needs_loop(module)):
            return run.loop(full, axes, size)
        return run.together(full, axes, size if method == "auto" else None)


class _Run:
    """A module and its inputs, to be run with several states."""

    def __init__(
        self, module: nn.Module, leaves: list[Any], spec: Any, places: list[int], *, single: bool
    ) -> None:
        self.module, self.leaves, self.spec = module, leaves, spec
        self.places, self.single = places, single
        self.answer = Answer(type(module).__name__, single=single)
        self.padded = _padded(module)

    def one(self, state: Mapping[str, Tensor], paired: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of the answer of one network."""
        leaves = list(self.leaves)
        for k, x in zip(self.places, paired, strict=True):
            leaves[k] = x[None] if self.single else x
        args, kwargs = tree_unflatten(leaves, self.spec)
        own = dict(state)
        for name, row in self.padded.items():
            if name in own:
                own[name] = _still(own[name], row)
        return self.answer.tensors(
            functional_call(self.module, own, args, kwargs, tie_weights=False)
        )

    def together(self, state: dict[str, Tensor], axes: _Axes, loop: int | None) -> Any:
        """All networks at once; where that fails, one after another if `loop` says how many."""
        # what a failed attempt left in the module is taken back
        attempt = _Attempt(self.module)
        paired = [self.leaves[k] for k in self.places]
        dims = (axes, [0] * len(paired))
        try:
            with _batchable():
                found = vmap(self.one, in_dims=dims, randomness="different")(state, paired)
            if not (kept := escaped(self.module)):
                return self.answer.of(found)
        except (RuntimeError, NotImplementedError, ValueError):
            attempt.undo()
            if loop is None:
                raise
            return self.loop(state, axes, loop)
        except BaseException:
            attempt.undo()
            raise
        attempt.undo()
        if loop is None:
            raise HyperError(
                message(f"call: {type(self.module).__name__} keeps tensors of its run", got=kept,
                        help='method="loop" runs one network after another')
            )  # fmt: skip
        return self.loop(state, axes, loop)

    def loop(self, state: dict[str, Tensor], axes: _Axes, size: int) -> Any:
        """One network after another."""
        self.answer = Answer(type(self.module).__name__, single=self.single)
        if not size:
            raise HyperError(message("call: no network to run", got="a batch of 0"))
        with _slow_path():
            rows = [
                self.one(
                    {n: x if axes[n] is None else x[i] for n, x in state.items()},
                    [self.leaves[k][i] for k in self.places],
                )
                for i in range(size)
            ]
        return self.answer.stacked(rows)


class _Attempt:
    """What a module is like before a vectorised run, and the state of the random generators."""

    def __init__(self, module: nn.Module) -> None:
        self.values, self.attributes = values_of(module), attributes_of(module)
        devices = {x.device for x in module.parameters() if x.device.type == "cuda"}
        self.random = torch.get_rng_state(), {d: torch.cuda.get_rng_state(d) for d in devices}

    def undo(self) -> None:
        """Takes back what the run did."""
        put_attributes(self.attributes)
        put_values(self.values)
        torch.set_rng_state(self.random[0])
        for device, state in self.random[1].items():
            torch.cuda.set_rng_state(state, device)


def _still(table: Tensor, row: int) -> Tensor:
    """A table whose padding row has no gradient: the batching rule of `embedding` forgets it."""
    mask = torch.zeros(table.shape[0], 1, dtype=torch.bool, device=table.device)
    mask[row] = True
    return torch.where(mask, table.detach(), table)


def _padded(module: nn.Module) -> dict[str, int]:
    """Tables of embeddings with a padding row, by name."""
    return {
        f"{path}.weight".removeprefix("."): m.padding_idx
        for path, m in module.named_modules(remove_duplicate=False)
        if isinstance(m, nn.Embedding) and m.padding_idx is not None
    }


def _unwritten(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with copies of buffers that the module may write into: all but large ones."""
    own = dict(module.named_buffers(remove_duplicate=False))
    copied = {n for n, x in own.items() if x.numel() <= LARGE}
    return {n: x.clone() if n in copied else x for n, x in state.items()}


def _renormalised(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with copies of tables that embeddings with a `max_norm` write into."""
    tables = {
        f"{path}.weight".removeprefix(".")
        for path, m in module.named_modules(remove_duplicate=False)
        if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.max_norm is not None
    }
    return {n: x.clone() if n in tables else x for n, x in state.items()}


def _check_checkpointing(module: nn.Module) -> None:
    """Refuses modules that compute activations anew on the way back, when weights are gone."""
    wrong = [
        path or type(module).__name__
        for path, m in module.named_modules()
        if m.training and getattr(m, "gradient_checkpointing", False) is True
    ]
    if wrong and torch.is_grad_enabled():
        raise HyperError(
            message("call: activation checkpointing inside of a module with weights from outside",
                    got=wrong[:4], help="turn it off in the module, and checkpoint around the call")
        )  # fmt: skip


def _checked(
    module: nn.Module, state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], _Axes, int | None]:
    """The state with all tied names, the batch axis of every tensor, and the batch size."""
    own = _tensors_of(module)
    wrong: list[str] = []
    sizes: dict[int, str] = {}
    full: dict[str, Tensor] = {}
    axes: _Axes = {}
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
    if not wrong:
        _add_ties(own, full, axes)
        wrong = _one_name_each(module, full)
    if wrong:
        raise HyperError(
            message("call: the state does not fit the module", got=wrong,
                    help="one batch axis may lead, of one length for all tensors")
        )  # fmt: skip
    return full, {n: axes[n] for n in full}, next(iter(sizes), None)


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    own: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    return own | dict(module.named_buffers(remove_duplicate=False))


def _add_ties(own: Mapping[str, Tensor], full: dict[str, Tensor], axes: _Axes) -> None:
    """Gives the other names of a tensor the value that one of them has."""
    by_id = {id(own[name]): name for name in full}
    for name, x in own.items():
        if name not in full and id(x) in by_id:
            full[name], axes[name] = full[by_id[id(x)]], axes[by_id[id(x)]]


def _one_name_each(module: nn.Module, full: dict[str, Tensor]) -> list[str]:
    """Leaves one name for each place of a tensor, as a part may have two; says what is wrong."""
    # functional_call would put back, under the second name, what it had put under the first
    parts = dict(module.named_modules(remove_duplicate=False))
    first: dict[tuple[int, str], str] = {}
    wrong: list[str] = []
    for name in list(full):
        path, _, last = name.rpartition(".")
        other = first.setdefault((id(parts[path]), last), name)
        if other == name:
            continue
        x, y = full.pop(name), full[other]
        if x is not y and not _alike(x, y):
            wrong.append(f"{other!r} and {name!r}, one tensor of one part, with two values")
    return wrong


def _alike(x: Tensor, y: Tensor) -> bool:
    try:
        return x.shape == y.shape and (x.data_ptr() == y.data_ptr() or torch.equal(x, y))
    except RuntimeError:  # values cannot be looked at inside of a transform
        return x.shape == y.shape


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
    """Whether vmap is known to refuse the module, or to answer otherwise: no need to try."""
    return any(
        isinstance(m, nn.RNNBase | nn.RNNCellBase)
        or (isinstance(m, BatchNorm) and m.training and m.track_running_stats)
        or (
            isinstance(m, nn.Embedding | nn.EmbeddingBag)
            and (m.scale_grad_by_freq or m.sparse or m.max_norm is not None)
        )
        for m in module.modules()
    )


@contextmanager
def _batchable() -> Generator[None]:
    """Attention as operators that have a batching rule."""
    with _slow_path(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        # some operators are looped over by torch itself, which is as right, and no news
        warnings.filterwarnings("ignore", "There is a performance drop because")
        yield


@contextmanager
def _slow_path() -> Generator[None]:
    """Without torch's fast path for transformers, whose answers at padded positions differ."""
    fast: bool = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _placed(module: nn.Module, names: Iterable[str]) -> Generator[None]:
    """Placeholders (`wspace.hyper.target.skeleton`) are parameters again while the module runs.

    Some modules look at their own parameters, or move them, in their forward pass.
    """
    parts = dict(module.named_modules(remove_duplicate=False))
    moved: list[tuple[dict[str, Any], str, Tensor]] = []
    for name in names:
        path, _, last = name.rpartition(".")
        own = parts[path].__dict__ if path in parts else {}
        if isinstance(own.get(last), Tensor):
            moved.append((own, last, own.pop(last)))
            own["_parameters"][last] = moved[-1][2]
    try:
        with warnings.catch_warnings():
            # from modules that move themselves: generated tensors are no leaves, as is meant
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            yield
    finally:
        for own, last, x in moved:
            own["_parameters"].pop(last, None)
            own[last] = x


@contextmanager
def _own_weights(module: nn.Module) -> Generator[None]:
    """Recurrent layers keep a list of their weights beside them: it is put back as well."""
    try:
        yield
    finally:
        for m in module.modules():
            if isinstance(m, nn.RNNBase):
                m._flat_weights = [getattr(m, n) for n in m._flat_weights_names]  # pyright: ignore[reportPrivateUsage]
