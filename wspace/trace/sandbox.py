"""Running a module without leaving a trace: contexts that put everything back.

Also the two adjustments that a run may need: dense kernels for mixtures of experts, and float64
throughout for a proof.
"""

# pyright: reportPrivateUsage=false
# PyTorch's dispatch and module internals have no public names; they are used here only.

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def evaluation_mode(module: nn.Module):
    """Context in which every submodule is in eval mode; each gets its own mode back."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for m, mode in modes:
            m.training = mode


@contextmanager
def attributes_restored(module: nn.Module):
    """Context after which every submodule has the attributes it had before.

    Covers buffers, hooks and caches: attributes that were set, and dicts, lists and sets that were
    changed in place.
    """
    saved = []
    for m in module.modules():
        held = {k: type(v)(v) for k, v in m.__dict__.items() if type(v) in _CONTAINERS}
        saved.append((m, dict(m.__dict__), held))
    try:
        yield
    finally:
        for m, attributes, held in saved:
            m.__dict__.clear()
            m.__dict__.update(attributes)
            for k, before in held.items():
                now = m.__dict__[k]
                if len(now) != len(before) or not _same_items(now, before):
                    now.clear()
                    now.extend(before) if isinstance(now, list) else now.update(before)


_CONTAINERS = (dict, OrderedDict, list, set)


def _same_items(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return all(k is j and v is w for (k, v), (j, w) in zip(a.items(), b.items(), strict=True))
    return isinstance(a, set) or all(x is y for x, y in zip(a, b, strict=True))


@contextmanager
def without_onednn():
    """Context in which fused oneDNN recurrent kernels are off, so that they are decomposed."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


@contextmanager
def dense_experts(module: nn.Module):
    """Context in which transformers' expert layers use their tensor-only implementation.

    The library offers several kernels for one function; this one has no control flow that depends
    on data, and works in every precision.
    """
    configs = {id(c): c for m in module.modules() if (c := getattr(m, "config", None)) is not None}
    saved = [
        (c, c._experts_implementation_internal)
        for c in configs.values()
        if hasattr(c, "_experts_implementation_internal")
    ]
    try:
        for c, _ in saved:
            c._experts_implementation_internal = "batched_mm"
        yield
    finally:
        for c, implementation in saved:
            c._experts_implementation_internal = implementation


class double_precision(TorchDispatchMode):  # noqa: N801  (used as a context manager)
    """Mode in which explicit casts to a lower floating precision keep float64.

    Language models cast to float32 inside norms and attention whatever their own dtype; a proof in
    float64 needs every step in float64.
    """

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        dtype = kwargs.get("dtype")
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


@contextmanager
def state_restored(module: nn.Module, *, values: bool):
    """Context after which parameters and buffers hold what they held before.

    Storage and dtype are always put back (some modules convert themselves in their forward);
    values only of constants, or of everything if `values`.
    """
    everything = [*module.parameters(), *module.buffers()]
    kept = everything if values else [b for b in module.buffers() if b.numel() < _SMALL]
    kept = [t for t in kept if not (t.is_meta or t.is_inference())]
    saved = [(t, t._version, t.detach().clone()) for t in kept]
    data = [(t, t.data) for t in everything if type(t) in (nn.Parameter, Tensor)]
    try:
        yield
    finally:
        with torch.no_grad():
            for t, before in data:
                if t.dtype != before.dtype or t.data_ptr() != before.data_ptr():
                    t.data = before
            for t, version, old in saved:
                if t._version != version:
                    t.copy_(old)


_SMALL = 1 << 20  # entries of a buffer that a module might count or cache in


def persistent_float_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that a checkpoint holds and that a group element may therefore move.

    Non-persistent buffers (rotary frequencies, masks) are rebuilt on loading: they are constants.

    Args:
        module: The module.

    Returns:
        Qualified names and buffers.
    """
    found = []
    for prefix, m in module.named_modules(remove_duplicate=False):
        for name, b in m._buffers.items():
            if b is None or name in m._non_persistent_buffers_set:
                continue
            if b.is_floating_point() or b.is_complex():
                found.append((f"{prefix}.{name}" if prefix else name, b))
    return found


def tensors_in(result: Any) -> list[Tensor]:
    """Tensors that a module returns: in pytrees, mappings and dataclasses, in order.

    Objects of other kinds, such as key-value caches, are carried state and not output; they count
    only if nothing else is returned.

    Args:
        result: What the module returned.

    Returns:
        The tensors.
    """
    found = _visit(result, set(), deep=False)
    return found or _visit(result, set(), deep=True)


def _visit(x: Any, seen: set[int], *, deep: bool) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    if id(x) in seen or isinstance(x, str | bytes | int | float | type(None)):
        return []
    seen.add(id(x))
    if isinstance(x, Mapping):
        items = list(x.values())
    elif isinstance(x, list | tuple | set):
        items = list(x)
    elif is_dataclass(x) or (deep and hasattr(x, "__dict__")):
        items = list(vars(x).values())
    else:
        return []
    return [t for item in items for t in _visit(item, seen, deep=deep)]
