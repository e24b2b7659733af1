"""Pruning: from a module, its weight space and what to keep, to a smaller module that runs."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Unpack, cast

from torch import nn

from wspace.errors import PruneError, message
from wspace.prune.importance.weights import Importance
from wspace.prune.pruner import Inputs, Pruner, Rebuild
from wspace.prune.restriction import Keep, Restriction
from wspace.prune.select import Selection
from wspace.space import WeightSpace


class Options(Inputs, total=False):
    """Keyword options of `prune`: those of `Selection`, and how the module is run and rebuilt."""

    of: Literal["units", "parameters", "flops"]
    scope: Literal["global", "group"]
    ratios: Mapping[str, float]
    round_to: int | Mapping[str, int]
    at_most: float
    ignore: Sequence[str]
    groups: Sequence[str] | None
    normalize: str
    rebuild: Rebuild
    check: bool


def prune(
    module: nn.Module,
    space: WeightSpace,
    keep: Keep | Restriction | float | None = None,
    *,
    amount: float | None = None,
    importance: Importance | str = "magnitude",
    **options: Unpack[Options],
) -> nn.Module:
    """A smaller module: some units of every group are kept, the others are gone.

    Exactly one of `keep` and `amount` says what stays. Units are whatever the trace found to be
    interchangeable: channels, neurons, attention heads, dimensions of heads, experts, dimensions of
    the residual stream. The module is not changed.

    Args:
        module: Module of the space, with real weights.
        space: Its weight space.
        keep: Group → bool ``(*sizes of over, size)``, true for units that stay; absent groups keep
            all. A number is an `amount`.
        amount: Share to take away, in (0, 1): of the units, or of what `of` says.
        importance: Says which units to keep: a name (``"magnitude"``, ``"bn_scale"``, ``"lamp"``,
            ``"fpgm"``, ``"random"`` …) or an object, see `importance_of`.
        **options: ``of`` (``"units"``, ``"parameters"``, ``"flops"``), ``scope`` (``"global"`` or
            ``"group"``), ``ratios``, ``round_to``, ``at_most``, ``ignore``, ``groups``: see
            `Selection`. ``args``, ``kwargs``: example inputs, where the space was read from a file
            and has none. ``rebuild``: ``"config"`` for a Hugging Face model made anew from a
            smaller config, ``"copy"`` for a copy with its attributes corrected; ``"auto"`` takes
            the first for models that have a config which can say it. ``check``: whether the result
            is compared with the masked module on the example inputs (default true).

    Returns:
        A module that runs, trains and exports as any other; of the mode, dtype and device of the
        given one.

    Raises:
        PruneError: If the masks do not fit the space, nothing would be left of a group, the budget
            cannot be reached, or the module's code does not allow the sizes. The module is
            untouched.
        SpaceMismatch: If the module is not of this space.

    Example:
        >>> import torch, wspace
        >>> mlp = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> space = wspace.trace(mlp, torch.zeros(1, 3))
        >>> prune(mlp, space, {"h1": torch.arange(8) < 5})[0]
        Linear(in_features=3, out_features=5, bias=True)
        >>> prune(mlp, space, amount=0.5, importance="magnitude")[0].out_features
        4
    """
    if (keep is None) == (amount is None):
        raise PruneError(
            message(
                "prune: what to keep is not clear",
                expected="either `keep`, masks by group, or `amount`, a share",
                got="both" if amount is not None else "neither",
            )
        )
    if keep is not None and not isinstance(keep, Mapping | Restriction):
        keep, amount = None, float(keep)
    given = cast(dict[str, Any], options)
    if unknown := [name for name in given if name not in Options.__annotations__]:
        raise PruneError(
            message(
                f"prune: no option {', '.join(map(repr, unknown))}",
                expected=f"options among {', '.join(Options.__annotations__)}",
            )
        )
    pruner = Pruner(
        module,
        space,
        given.pop("args", None),
        given.pop("kwargs", None),
        rebuild=given.pop("rebuild", "auto"),
    )
    check = given.pop("check", True)
    if keep is None:
        keep = pruner.choose(importance, Selection(amount=amount, **given))
    return pruner.prune(keep, check=check)
