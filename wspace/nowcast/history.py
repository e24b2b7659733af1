"""Past states of a training run: one buffer for each snapshot of a window, used again and again."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from wspace.errors import NowcastError, message
from wspace.nowcast.ranks import own_part


class History:
    """The snapshots of the current window, oldest first.

    The state at the jump itself is the model's own, so a window of c states has c - 1 snapshots.
    A tensor that misses one of them (it was frozen, or came later), or that another has replaced
    since the first, is not `complete` in this window, and is again in the next. So is one of
    another shape or dtype than before.

    Args:
        size: Snapshots in a full window.
        device: Where they are kept; beside each tensor if None.
        dtype: As what; as each tensor's own if None.
    """

    def __init__(
        self,
        size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.size, self.dtype = size, dtype
        self.device = None if device is None else torch.empty(0, device=device).device
        self.filled = 0
        self._slots: list[dict[str, Tensor]] = [{} for _ in range(size)]
        self._counts: dict[str, int] = {}
        self._owners: dict[str, tuple[Tensor, torch.dtype]] = {}

    def lossy(self, x: Tensor) -> bool:
        """True if a snapshot of this tensor is rounded."""
        return self.dtype is not None and torch.promote_types(self.dtype, x.dtype) != self.dtype

    def record(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies tensors, or this process's parts of them, into the next free buffer.

        Args:
            tensors: Dense tensors by name.
        """
        if self.filled == self.size:
            return
        slot = self._slots[self.filled]
        parts = {name: own_part(x) for name, x in tensors.items()}
        for name, x in parts.items():
            if not self.filled:
                self._owners[name] = tensors[name], x.dtype
            elif self._counts.get(name) == self.filled and not self._same(name, tensors[name], x):
                self._counts[name] = -self.size  # replaced by another: not whole in this window
            if not self._fits(slot.get(name), x):
                slot[name] = self.room(x)
        copy_all([slot[n] for n in parts], list(parts.values()))
        for name in parts:
            self._counts[name] = self._counts.get(name, 0) + 1
        self.filled += 1

    def _fits(self, room: Tensor | None, x: Tensor) -> bool:
        """True if a buffer is what `room` would give for a tensor."""
        if room is None or room.shape != x.shape or room.device != self._home(x):
            return False
        return room.dtype == (self.dtype or x.dtype)

    def _same(self, name: str, owner: Tensor, x: Tensor) -> bool:
        """True if this very tensor was recorded, of this dtype and shape, in what is filled."""
        first, dtype = self._owners[name]
        shapes = {slot[name].shape for slot in self._slots[: self.filled]}
        return first is owner and dtype == x.dtype and shapes == {x.shape}

    def room(self, x: Tensor) -> Tensor:
        """An empty buffer for one snapshot of a tensor."""
        return torch.empty_like(x, device=self._home(x), dtype=self.dtype, requires_grad=False)

    def complete(self, name: str, x: Tensor) -> bool:
        """True if the window is full and this tensor, as it was given, is in all of it."""
        whole = self.filled == self.size and self._counts.get(name, 0) == self.size
        return whole and (not self.size or self._same(name, x, own_part(x)))

    def window(self, name: str) -> list[Tensor]:
        """The snapshots of a tensor, oldest first: the buffers themselves."""
        return [slot[name] for slot in self._slots]

    def clear(self) -> None:
        """Begins a new window; buffers of what is no longer recorded are given back."""
        for slot in self._slots:
            for name in [n for n in slot if n not in self._counts]:
                del slot[name]
        self._counts.clear()
        self._owners.clear()
        self.filled = 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumption needs; the tensors are the buffers themselves, as torch has it."""
        whole = [n for n, count in self._counts.items() if count == self.filled]
        kept = {n: [slot[n] for slot in self._slots[: self.filled]] for n in whole}
        return {"filled": self.filled, "tensors": kept}

    def check(self, state: Mapping[str, Any], like: Mapping[str, Tensor]) -> None:
        """Raises unless `load_state_dict` can take a state.

        Args:
            state: What was saved.
            like: The tensors of which there are snapshots.

        Raises:
            NowcastError: If a snapshot is of a tensor that is missing or has another shape.
        """
        filled, tensors = int(state["filled"]), state["tensors"]
        wrong = [
            f"{name!r} of shape {tuple(x.shape)}"
            for name, past in tensors.items()
            for x in past[:1]
            if name not in like or own_part(like[name]).shape != own_part(x).shape
        ]
        wrong += [
            f"{name!r}, {len(past)} times" for name, past in tensors.items() if len(past) != filled
        ]
        if wrong or not 0 <= filled <= self.size:
            raise NowcastError(
                message(
                    "Nowcaster: the saved history does not fit",
                    expected=f"at most {self.size} snapshots of the module's parameters",
                    got=wrong or f"{filled} snapshots",
                    help="resume with the same module, period and context",
                )
            )

    def load_state_dict(self, state: Mapping[str, Any], like: Mapping[str, Tensor]) -> None:
        """Takes back what `state_dict` gave.

        Args:
            state: What was saved.
            like: The tensors of which there are snapshots.
        """
        self.check(state, like)
        filled, tensors = int(state["filled"]), state["tensors"]
        saved = [
            {n: own_part(past[i]).clone() for n, past in tensors.items()} for i in range(filled)
        ]
        self.clear()
        for slot, past in zip(self._slots, saved, strict=False):
            for name, x in past.items():
                part = own_part(like[name])
                slot[name] = self.room(part).copy_(x)
                self._counts[name], self._owners[name] = filled, (like[name], part.dtype)
        self.filled = filled

    def _home(self, x: Tensor) -> torch.device:
        return x.device if self.device is None else self.device


@torch.no_grad()
def copy_all(into: list[Tensor], values: list[Tensor]) -> None:
    """Copies tensors into others, which stay where they are in memory.

    Args:
        into: The tensors.
        values: Their new values, of the same shapes.
    """
    if into:
        torch._foreach_copy_(into, values)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
