"""Hugging Face models made anew from a smaller config, so that they save and load as any other.

Which field of a config sizes what is found in `fields`, and solved for the sizes that are
left in `solve`. Here the class is built from the new config and the weights that stay are
loaded. What a constructor computes from sizes besides (the scale of attention) is undone in the
weights, where the outputs show that it is needed.
"""

# pyright: reportPrivateUsage=false
# Buffers of modules have no public names.

import copy
from collections.abc import Callable, Iterator, Mapping
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from wspace.action import State
from wspace.errors import PruneError, message
from wspace.prune.agreement import POWERS, gap, outputs
from wspace.prune.compact import scaled
from wspace.prune.huggingface.build import has_config
from wspace.prune.huggingface.limits import config_fields, config_pinned, config_ties
from wspace.prune.huggingface.solve import smaller_config
from wspace.prune.restriction import Restriction
from wspace.restore import drawn_again
from wspace.space import WeightSpace
from wspace.trace.sandbox import (
    double_precision,
)
from wspace.trace.sizes import Sizes, find_sizes

__all__ = [
    "config_fields",
    "config_pinned",
    "config_ties",
    "from_config",
    "has_config",
    "smaller_config",
]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Largest relative difference from what the rebuilt module should compute, by dtype."""
LOW = 5e-2
SURE = 1e-12
"""A difference in float64 at which no other factors are tried."""
REMEDIES = 256
"""Combinations of factors that are tried."""


def from_config(
    module: nn.Module,
    restriction: Restriction,
    reference: nn.Module | None = None,
    sizes: Sizes | None = None,
) -> nn.Module:
    """The small model, built by its class from a smaller config, with the weights that stay.

    ``save_pretrained`` and ``from_pretrained`` treat it as any other. It computes what the copy
    with corrected attributes does: where the constructor derives a factor from a size, such as the
    scale of attention from the width of a head, the weights of one side of it are multiplied.
    Hooks and adapters of the module are not taken over.

    Args:
        module: A Hugging Face model of the large space, not modified; on meta, nothing is compared.
        restriction: What is kept.
        reference: What the result has to compute, on the inputs that the space was traced with; the
            copy that `prune` makes with ``rebuild="copy"`` when None.
        sizes: See `config_fields`.

    Returns:
        A new model, of the dtypes, device, modes and ``requires_grad`` of the given one.

    Raises:
        PruneError: If the config cannot say the sizes, or the built model does not compute what it
            should. The message names the field or the tensor.

    Example:
        >>> import torch, wspace
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=12, n_layer=1, n_head=3, n_positions=8, vocab_size=9)
        >>> gpt2 = GPT2LMHeadModel(config).eval()
        >>> space = wspace.trace(gpt2, torch.arange(4)[None], {"use_cache": False})
        >>> neurons = next(space["transformer.h.0.mlp.c_fc.weight"].axes[1].groups())
        >>> few = Restriction(space, {neurons.name: torch.arange(48) < 20})
        >>> from_config(gpt2, few).config.n_inner
        20
    """
    space = restriction.large
    if sizes is None and space.example is not None:
        sizes = find_sizes(space, module, *space.example)
    config = smaller_config(module, restriction, sizes)
    small = _built(module, restriction, config)
    state = restriction.state({n: x.detach() for n, x in module.state_dict().items()})
    _load(small, state)
    if any(x.is_meta for x in module.parameters()):
        return small
    if space.example is None:
        raise PruneError(
            message(
                f"prune: the small {type(module).__name__} cannot be compared",
                expected="example inputs: a space that was read from a file has none",
                help="trace the module",
            )
        )
    if reference is None:
        reference = _reference(module, restriction)
    remedies = list(_remedies(module, small, restriction, sizes))
    gaps = _tried(small, state, restriction, reference, remedies)
    best = min(range(len(gaps)), key=gaps.__getitem__)
    dtype = next((x.dtype for x in module.parameters()), torch.float32)
    limit = TOLERANCE[torch.float64] if len(remedies) > 1 else TOLERANCE.get(dtype, LOW)
    if gaps[best] > limit:
        raise PruneError(
            message(
                f"prune: the small {type(module).__name__} built from its config is not the "
                "masked one",
                expected="the same outputs, as they are or with the weights on one side of a "
                "factor that depends on sizes multiplied",
                got=f"a relative difference of {gaps[0]:.1e}, and {gaps[best]:.1e} with factors",
                help="the class computes something from a size that its weights cannot undo: "
                f"prune {', '.join(restriction.keep)} one at a time to find which, or pass "
                'rebuild="copy"',
            )
        )
    if remedies[best]:
        _load(small, scaled(dict(state), restriction, remedies[best]))
    return small


# ------------------------------------------------------------------------ the built model


def _built(module: nn.Module, few: Restriction, config: Any) -> nn.Module:
    """A model of a config, of the module's dtypes, device, modes and gradients; weights random."""
    kind: Callable[[Any], nn.Module] = type(module)
    large = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers()),
    }
    device = next((x.device for x in large.values()), torch.device("cpu"))
    with drawn_again(module), torch.device(device):
        small = kind(copy.deepcopy(config))
    origin = {new: old for old, new in few.names.items()}
    for name, x in small.named_parameters(remove_duplicate=False):
        like = large[origin.get(name, name)]
        x.data = x.data.to(like.dtype)
        x.requires_grad_(like.requires_grad)
    modules = dict(module.named_modules(remove_duplicate=False))
    for path, m in small.named_modules(remove_duplicate=False):
        m.training = modules[path].training if path in modules else module.training
        for name, b in m._buffers.items():
            like = large.get(f"{path}.{name}".removeprefix("."))
            if b is not None and like is not None:
                m._buffers[name] = b.to(like.dtype)
    if hasattr(module, "generation_config"):
        small.generation_config = copy.deepcopy(module.generation_config)
    return small


def _load(small: nn.Module, state: State) -> None:
    try:
        small.load_state_dict(dict(state))
    except RuntimeError as error:
        raise PruneError(
            message(
                f"prune: the weights do not fit the small {type(small).__name__}",
                expected="every tensor of the state, and no other",
                got=str(error),
                help='pass rebuild="copy"',
            )
        ) from error


def _reference(module: nn.Module, few: Restriction) -> nn.Module:
    """What the small model has to compute: the copy, or the masked module if there is no copy."""
    from wspace.prune.pruner import Pruner

    try:
        return Pruner(module, few.large, rebuild="copy").prune(few)
    except PruneError:
        masked = copy.deepcopy(module)
        own = dict(masked.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for p in few.touched:
                own[p.name].masked_fill_(few.zeroed(p).to(own[p.name].device), 0)
        return masked


def _tried(
    small: nn.Module,
    state: State,
    few: Restriction,
    reference: nn.Module,
    remedies: list[dict[str, float]],
) -> list[float]:
    """How far the small model is from the reference with each set of factors.

    Where there is something to choose, float64 decides: rounding could hide the difference.

    Returns:
        Relative differences, in the order of `remedies`, up to the first that is surely right.
    """
    example = few.large.example or ((), {})
    if len(remedies) == 1:
        return [gap(outputs(reference, example), _run(small, example))]
    small, reference = copy.deepcopy(small).double(), copy.deepcopy(reference).double()
    example = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, example)
    state = {n: x.double() if x.is_floating_point() else x for n, x in state.items()}
    gaps: list[float] = []
    with double_precision():
        wanted = outputs(reference, example)
        for factors in remedies:
            _load(small, scaled(dict(state), few, factors))
            gaps.append(gap(wanted, _run(small, example)))
            if gaps[-1] <= SURE:
                break
    return gaps


def _remedies(
    module: nn.Module, small: nn.Module, few: Restriction, sizes: Sizes | None
) -> Iterator[dict[str, float]]:
    """Factors by group to try: none, then one side of every place that scales by a size."""
    yield {}
    choices: list[list[dict[str, float]]] = []
    for ties in _scaled_places(few, sizes).values():
        found: list[dict[str, float]] = [{}]
        for rank, power in product(range(max(map(len, ties))), POWERS):
            factors = {t[rank]: _share(few, t[rank]) ** power for t in ties if rank < len(t)}
            found.append({g: f for g, f in factors.items() if f != 1})
        choices.append(found)
    for changes in _constants(module, small, few).values():
        found = [{}]
        for rank, power in product(range(max(len(groups) for groups, _ in changes)), (1, -1)):
            found.append({groups[rank]: r**power for groups, r in changes if rank < len(groups)})
        choices.append(found)
    for picked in islice(product(*choices), 1, REMEDIES):
        factors: dict[str, float] = {}
        for chosen in picked:
            for g, f in chosen.items():
                factors[g] = factors.get(g, 1.0) * f
        yield factors


def _scaled_places(few: Restriction, sizes: Sizes | None) -> dict[str, list[list[str]]]:
    """Places in the forward pass that make a factor of a size → groups, by tie."""
    scaled = sizes.scaled if sizes else {}
    ties = sizes.ties() if sizes else []
    alone = [[g] for g in few.keep if not any(g in t for t in ties)]
    places: dict[str, list[list[str]]] = {}
    for tie in (*ties, *alone):
        kept = [g for g in tie if g in few.keep and g in scaled]
        for source in dict.fromkeys(scaled[g] for g in kept):
            places.setdefault(source, []).append([g for g in kept if scaled[g] == source])
    return places


def _constants(
    module: nn.Module, small: nn.Module, few: Restriction
) -> dict[tuple[type[nn.Module], str], list[tuple[list[str], float]]]:
    """Numbers that the constructor made otherwise: class and name → groups there, and the ratio."""
    found: dict[tuple[type[nn.Module], str], list[tuple[list[str], float]]] = {}
    modules = dict(module.named_modules())
    for path, m in small.named_modules():
        large = modules.get(path)
        for name, new in vars(m).items():
            old = getattr(large, name, None)
            if isinstance(new, float) and isinstance(old, float) and new != old and new and old:
                groups = _groups_under(few.small, path)
                found.setdefault((type(m), name), []).append((groups, old / new))
    return found


def _groups_under(space: WeightSpace, path: str) -> list[str]:
    """Free groups of the tensors of a submodule, or of the smallest one around it that has some."""
    while path:
        inside = [p for p in space.params if p.name.startswith(path + ".")]
        if inside:
            break
        path = path.rpartition(".")[0]
    else:
        inside = list(space.params)
    groups = (g for p in inside for axis in p.axes for g in axis.groups() if not g.fixed)
    return list(dict.fromkeys(g.name for g in groups))


def _share(few: Restriction, group: str) -> float:
    return few.counts()[group] / few.large.groups[group].size


def _run(small: nn.Module, example: tuple[Any, Mapping[str, Any]]) -> list[Tensor]:
    """Outputs of the small model; its code may refuse the sizes in any way it likes."""
    try:
        return outputs(small, example)
    except Exception as error:
        raise PruneError(
            message(
                f"prune: the small {type(small).__name__} does not run",
                expected="a model that runs on the example inputs",
                got=f"{type(error).__name__}: {error}",
                help="its code allows other sizes only: leave the groups involved as they are",
            )
        ) from error
