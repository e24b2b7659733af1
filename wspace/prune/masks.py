"""Units switched off in a live module, and back on."""

from collections.abc import Mapping
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from wspace.errors import PruneError, message
from wspace.prune.restriction import Keep, Restriction
from wspace.space import WeightSpace


class Mask:
    """Zeros in the place of the units that are not kept, until they are put back.

    Every parameter of a unit is set to zero in place; what stood there is remembered. So a network
    can be tried, trained and measured as if it were pruned, and be itself again afterwards. Buffers
    are not touched. Masks of one module come off in the reverse order.

    Args:
        module: A module of the space; changed in place, from now until `remove`.
        space: Its weight space.
        keep: Group → bool ``(*sizes of over, size)``, or a `Restriction` of the space.

    Raises:
        PruneError: If `keep` does not fit the space, or is of another one; the module is untouched
            then.
        SpaceMismatch: If the module is not of this space.

    Example:
        >>> import torch, wspace
        >>> mlp = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> space = wspace.trace(mlp, torch.zeros(1, 3))
        >>> with Mask(mlp, space, {"h1": torch.arange(5) < 3}):
        ...     int((mlp[0].bias == 0).sum())
        2
    """  # noqa: DOC502 (Restriction and validate raise)

    def __init__(self, module: nn.Module, space: WeightSpace, keep: Keep | Restriction) -> None:
        restriction = keep if isinstance(keep, Restriction) else Restriction(space, keep)
        if restriction.large != space:
            raise PruneError(
                message(
                    "mask: the restriction is of another weight space",
                    expected="one of the space that is given",
                    help="make it anew: `Restriction(space, masks)`",
                )
            )
        space.validate(dict(module.named_parameters(remove_duplicate=False)) | _buffers(module))
        self.module, self.restriction = module, restriction
        params = dict(module.named_parameters(remove_duplicate=False))
        self._gone: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._handles: list[RemovableHandle] = []
        for p in restriction.touched:
            x = params[p.name]
            gone = restriction.zeroed(p).to(x.device)
            self._gone[p.name] = (x, gone, x.detach()[gone].clone())
        self.again()

    @property
    def keep(self) -> Mapping[str, Tensor]:
        """The units that are on."""
        return self.restriction.keep

    @torch.no_grad()
    def again(self) -> None:
        """Sets to zero again what an optimizer has moved, and clears it in the gradients.

        Raises:
            PruneError: If the mask was removed, or a parameter is another object now.
        """
        self._check()
        for x, off, _ in self._gone.values():
            gone = off.to(x.device)
            x.masked_fill_(gone, 0)
            if x.grad is not None and x.grad.is_sparse:
                x.grad = x.grad.to_dense().masked_fill_(gone, 0).to_sparse(1)
            elif x.grad is not None:
                x.grad.masked_fill_(gone, 0)

    def hold(self, optimizer: torch.optim.Optimizer) -> Self:
        """Keeps the units off while an optimizer trains the module.

        Args:
            optimizer: After each of its steps the zeros are written again, until `remove`.

        Returns:
            The mask.

        Raises:
            PruneError: If the mask was removed.
        """  # noqa: DOC502 (again raises)
        self.again()
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self.again()))
        return self

    @torch.no_grad()
    def remove(self) -> None:
        """Puts back what stood in the place of the zeros; the rest stays as trained meanwhile.

        Raises:
            PruneError: If the mask was removed already, or a parameter is another object now.
        """
        self._check()
        for handle in self._handles:
            handle.remove()
        for x, gone, before in self._gone.values():
            x[gone.to(x.device)] = before.to(x.device, x.dtype)
        self._gone, self._handles = {}, []

    def _check(self) -> None:
        if not self._gone and self.restriction.touched:
            raise PruneError(
                message(
                    "mask: it was removed",
                    help="make a new one: `Mask(module, space, mask.keep)`",
                )
            )
        replaced = [n for n, (x, *_) in self._gone.items() if self.module.get_parameter(n) is not x]
        if replaced:
            raise PruneError(
                message(
                    "mask: parameters were replaced while it was on",
                    expected="the objects that zeros were written in",
                    got=[repr(n) for n in replaced],
                    help="change parameters in place (`load_state_dict` without assign=True)",
                )
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_buffers(remove_duplicate=False))
