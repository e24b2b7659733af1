"""The small module: a copy with tensors cut and with the numbers in its attributes corrected.

The copy is made around tensors that are cut already, so that the weights are never held twice. What
its code computes with, the trace has found (`trace.sizes`); what the layers of `torch.nn` keep
besides (``in_features``, ``num_channels`` …) is read off their new tensors.
"""

# pyright: reportPrivateUsage=false

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wspace.action import along_axis, shape_of
from wspace.errors import PruneError, message
from wspace.prune.restriction import Restriction
from wspace.space import Param, WeightSpace
from wspace.trace.numbers import Attribute
from wspace.trace.sandbox import persistent_float_buffers

Slot = tuple[int, str, int, int]
"""Where a scaling enters a tensor: dimension, group, occurrence, exponent."""


def compact(
    module: nn.Module,
    restriction: Restriction,
    attributes: Mapping[Attribute, int],
    factors: Mapping[str, float] | None = None,
) -> nn.Module:
    """A copy of a module that has only the units that are kept.

    Args:
        module: A module of the large space; not modified.
        restriction: What is kept.
        attributes: New values of whole numbers that the module keeps.
        factors: Group → factor of the side of its scaling with positive exponents, see
            `scaled_side`.

    Returns:
        The copy: its own tensors, without gradients, in the mode and with the hooks of the module.

    Raises:
        PruneError: If a branch of a family cannot be taken out, or a tensor does not come out as
            the small space says.
    """
    tensors = dict(_tensors(module))
    state = restriction.state({n: x.detach() for n, x in tensors.items()})
    state = scaled(state, restriction, factors or {})
    memo: dict[int, Any] = {}
    wanted: dict[str, Tensor] = {}
    for name, x in tensors.items():
        new = restriction.names.get(name)
        if id(x) not in memo:
            memo[id(x)] = _like(x, x.detach()[:0] if new is None else state[new])
        if new is not None:
            wanted[new] = memo[id(x)]
    small = _copied(module, memo)
    for group in restriction.keep:
        _drop_branches(small, restriction, group)
    for attribute, value in attributes.items():
        attribute.write(small, value)
    for m in small.modules():
        _refresh(m)
    _check(small, restriction, wanted)
    return small


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy around tensors that are copied already."""
    for m in module.modules():
        for x in m.__dict__.values():
            if isinstance(x, Tensor) and not x.is_leaf:  # computed in a forward pass, and kept
                memo.setdefault(id(x), x.detach().clone())
    try:
        return copy.deepcopy(module, dict(memo))
    except Exception as error:
        raise PruneError(
            message(
                f"prune: {type(module).__name__} cannot be copied",
                expected="a module that `copy.deepcopy` copies",
                got=f"{type(error).__name__}: {error}, from {_uncopied(module, memo)}",
                help="take the attribute off the module, or give its class a `__deepcopy__`",
            )
        ) from error


def _uncopied(module: nn.Module, memo: Mapping[int, Any]) -> str:
    """The attribute that cannot be copied."""
    for path, m in module.named_modules():
        for name, x in m.__dict__.items():
            if name in ("_modules", "_parameters", "_buffers"):
                continue
            try:
                copy.deepcopy(x, dict(memo))
            except Exception:  # whatever it is, this is the one
                return f"{path}.{name}".lstrip(".")
    return "an unknown attribute"


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from persistent_float_buffers(module)


def _like(x: Tensor, cut: Tensor) -> Tensor:
    """A tensor of the small module in the place of `x`."""
    fresh = (
        cut.clone(memory_format=torch.contiguous_format) if cut.data_ptr() == x.data_ptr() else cut
    )
    if isinstance(x, nn.Parameter):
        return nn.Parameter(fresh, requires_grad=x.requires_grad)
    return fresh


# ----------------------------------------------------------------------------- factors


def scaled_side(restriction: Restriction, group: str) -> dict[str, list[Slot]]:
    """Where one side of the scaling of a group enters the tensors of the small space.

    A scaling multiplies what goes into the units by a factor and divides what comes out of them.
    One side alone multiplies what is computed from the units.

    Args:
        restriction: What is kept.
        group: Name of the group.

    Returns:
        Parameter → dimension, group, occurrence and exponent. The scaling may be of a group around
        it (one factor per attention head). Where none is known, the first tensor of the group and
        its bias: whether that is a side is for the caller to try.
    """
    small = restriction.small
    known = small.all_groups
    scales = [g for g in small.gauges if g.kind == "scale" and g.slots and g.group in known]
    own = [g for g in scales if g.group == group]
    around = [g for g in scales if all(_holds(small[slot[0]], group) for slot in g.slots)]
    sides: dict[str, list[Slot]] = {}
    for gauge in (own or around)[:1]:
        for name, d, occurrence, exponent in gauge.slots:
            if exponent > 0:
                sides.setdefault(name, []).append((d, gauge.group, occurrence, exponent))
    return sides or _first_side(small, group)


def _first_side(small: WeightSpace, group: str) -> dict[str, list[Slot]]:
    """The first tensor of a group and those beside it: one side, if no scaling is known."""
    holders = [p for p in small.params if not p.buffer and _holds(p, group)]
    home = holders[0].name.rpartition(".")[0] if holders else ""
    return {
        p.name: [(d, group, 0, 1)]
        for p in holders
        if p.name.rpartition(".")[0] == home
        for d, axis in enumerate(p.axes)
        if group in (g.name for g in axis.groups())
    }


def _holds(p: Param, group: str) -> bool:
    return any(g.name == group for axis in p.axes for g in axis.groups())


def scaled(
    state: dict[str, Tensor], restriction: Restriction, factors: Mapping[str, float]
) -> dict[str, Tensor]:
    """A small state with one side of some scalings multiplied.

    Args:
        state: Tensors of the small space by name; changed in place.
        restriction: What is kept.
        factors: Group → factor, see `scaled_side`.

    Returns:
        The state.
    """
    small = restriction.small
    for group, factor in factors.items():
        for name, slots in scaled_side(restriction, group).items():
            p = small[name]
            x = state[name]
            for d, around, occurrence, exponent in slots:
                shape = shape_of(small.all_groups[around], small)
                values = torch.full(shape, factor**exponent, dtype=torch.float64)
                along = along_axis(p, d, around, occurrence, values, 1.0)
                x = x * along.reshape([-1 if i == d else 1 for i in range(x.dim())]).to(x)
            for tie in (p.name, *p.ties):
                state[tie] = x
    return state


# ------------------------------------------------------------------------------ families


def _drop_branches(module: nn.Module, restriction: Restriction, group: str) -> None:
    """Takes the branches that go out of the list that holds them."""
    members = [p for p in restriction.large.params if p.at and p.at[0] == group]
    holders: dict[str, dict[str, int]] = {}
    for p in members:
        for name in (p.name, *p.ties):
            holder, key = _held_in(module, name, restriction, p.family)
            holders.setdefault(holder, {})[key] = p.at[1] if p.at else 0
    keep = restriction.keep[group]
    for path, places in holders.items():
        held: Any = module.get_submodule(path)
        every = [str(k) for k in range(len(held))]
        stay = [key for key in every if key not in places or bool(keep[places[key]])]
        if isinstance(held, nn.ParameterList):
            kept = [held[int(k)] for k in stay]
            for k in range(len(held)):
                delattr(held, str(k))
            held._size = 0
            held.extend(kept)
        else:
            kept = [held._modules[k] for k in stay]
            held._modules.clear()
            held._modules.update({str(i): m for i, m in enumerate(kept)})


def _held_in(
    module: nn.Module, name: str, restriction: Restriction, family: str
) -> tuple[str, str]:
    """Path of the list that a branch is in, and its key there."""
    siblings = [p.name for p in restriction.large.params if p.family == family]
    words = [s.split(".") for s in siblings]
    own = name.split(".")
    same = [w for w in words if len(w) == len(own)]
    for i, word in enumerate(own):
        varies = len({w[i] for w in same}) == len(same) > 1
        path = ".".join(own[:i])
        if varies and word.isdigit():
            held = module.get_submodule(path)
            if isinstance(held, nn.ModuleList | nn.Sequential | nn.ParameterList):
                return path, word
    raise PruneError(
        message(
            f"prune: the branch of {name!r} cannot be taken out",
            expected="branches that are items of an nn.ModuleList, nn.Sequential or "
            "nn.ParameterList",
            got=f"the branches {siblings[:3]}",
            help="hold them in a list, or keep all of them",
        )
    )


# ------------------------------------------------------------------------ layers of torch.nn


def _refresh(m: nn.Module) -> None:
    """Sets what a layer of `torch.nn` keeps of its sizes, from its tensors."""
    for kind, rule in _LAYERS:
        if isinstance(m, kind):
            for name, value in rule(m).items():
                if hasattr(m, name):
                    setattr(m, name, value)
    if isinstance(m, nn.RNNBase):
        m.flatten_parameters()


def _shape(m: Any, name: str = "weight") -> tuple[int, ...]:
    """Shape of a parameter, before parametrizations; empty if there is none."""
    found = getattr(m, "parametrizations", None)
    if found is not None and name in found:
        held = found[name]
        return tuple(held.original1.shape if hasattr(held, "original1") else held.original.shape)
    x = m._parameters.get(name, m._buffers.get(name))
    return () if x is None else tuple(x.shape)


def _linear(m: Any) -> dict[str, Any]:
    s = _shape(m)
    return {"in_features": s[1], "out_features": s[0]} if s else {}


def _bilinear(m: Any) -> dict[str, Any]:
    s = _shape(m)
    return {"out_features": s[0], "in1_features": s[1], "in2_features": s[2]} if s else {}


def _conv(m: Any) -> dict[str, Any]:
    s = _shape(m)
    first, second = ("in", "out") if m.transposed else ("out", "in")
    return {f"{first}_channels": s[0], f"{second}_channels": s[1] * m.groups} if s else {}


def _embedding(m: Any) -> dict[str, Any]:
    s = _shape(m)
    return {"num_embeddings": s[0], "embedding_dim": s[1]} if s else {}


def _channels(m: Any) -> dict[str, Any]:
    s = _shape(m) or _shape(m, "running_mean")
    return {"num_features": s[0], "num_channels": s[0]} if s else {}


def _normalized(m: Any) -> dict[str, Any]:
    s = _shape(m)
    return {"normalized_shape": s} if s else {}


def _recurrent(m: Any) -> dict[str, Any]:
    projected = _shape(m, "weight_hr_l0")
    gates = {"LSTM": 4, "GRU": 3}.get(getattr(m, "mode", ""), 1)
    out = {"input_size": _shape(m, "weight_ih_l0")[1]}
    out["hidden_size"] = _shape(m, "weight_ih_l0")[0] // gates
    return out | ({"proj_size": projected[0]} if projected else {})


def _cell(m: Any) -> dict[str, Any]:
    return {"input_size": _shape(m, "weight_ih")[1], "hidden_size": _shape(m, "weight_hh")[1]}


_LAYERS: tuple[tuple[Any, Any], ...] = (
    (nn.Linear, _linear),
    (nn.Bilinear, _bilinear),
    (nn.modules.conv._ConvNd, _conv),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    ((nn.modules.batchnorm._NormBase, nn.GroupNorm), _channels),
    ((nn.LayerNorm, nn.RMSNorm), _normalized),
    (nn.PReLU, lambda m: {"num_parameters": _shape(m)[0]}),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, _cell),
)


# -------------------------------------------------------------------------------- check


def _check(small: nn.Module, restriction: Restriction, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor is in its place: not only one of its shape."""
    found = dict(_tensors(small))
    shapes = {n: p.shape for p in restriction.small.params for n in (p.name, *p.ties)}
    wrong = [
        f"{n}: {tuple(found[n].shape) if n in found else 'missing'}, "
        f"expected {shapes.get(n, 'no such tensor')}"
        for n in dict.fromkeys((*shapes, *found))
        if n not in found or n not in shapes or tuple(found[n].shape) != shapes[n]
    ]
    wrong += [
        f"{n}, which holds another tensor" for n, x in tensors.items() if found.get(n, x) is not x
    ]
    if wrong:
        raise PruneError(
            message(
                f"prune: {type(small).__name__} does not come out as its space says",
                expected="every tensor of the small space, and no other",
                got=wrong,
                help="keep the groups on these tensors as they are, and report this",
            )
        )
