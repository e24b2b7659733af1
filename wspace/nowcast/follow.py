"""What follows an optimizer's steps: counts them, knows which parameters may move, keeps a log."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from wspace.errors import NowcastError, message
from wspace.nowcast.forecast import predictable
from wspace.nowcast.ranks import Ranks, innermost, like_part, reshard
from wspace.nowcast.settings import Jump, Settings

VERSION = 1
LOGGED = 1000
"""Jumps that a log holds; older ones are dropped."""


class Handles:
    """Hooks that are removed together.

    Args:
        *handles: Their handles.
    """

    def __init__(self, *handles: RemovableHandle) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()


class Follower(ABC):
    """Follows an optimizer's steps, and moves the module's parameters ahead now and then.

    What may move: parameters of the optimizer that are the module's, require gradients, are dense
    and of a common floating-point type. All others stay as they are (`left_alone` says why).
    Subclasses say when and how (`_due`).

    Args:
        optimizer: Whose steps count.
        module: The module that is trained; also wrapped by DDP or `torch.compile`.
        settings: When and how to jump, checked.
        spacing: Steps after which something may be due.

    Attributes:
        log: The last jumps, at most `LOGGED`.
        made: Number of jumps so far, also those that are no longer in the log.

    Raises:
        NowcastError: If none of the optimizer's parameters is the module's.
    """

    kind = ""
    """What a saved state belongs to."""

    def __init__(
        self, optimizer: Optimizer, module: nn.Module, settings: Settings, spacing: int
    ) -> None:
        self.settings, self.spacing = settings, spacing
        self.optimizer, self.module = optimizer, innermost(module)
        self._step, self.log, self.made = 0, list[Jump](), 0
        self._warned = False
        self._away = False  # while the module holds other values for a time
        self._unsure: list[Tensor] = []  # of steps not counted yet: 0, or else it was skipped
        self.ranks = Ranks(settings.process_group, alone=settings.alone)
        if not self._owned():
            raise NowcastError(
                message(
                    "Nowcaster: none of the optimizer's parameters belongs to the module",
                    expected=f"parameters of this {type(self.module).__name__}",
                    help="pass the very module that the optimizer was made for, not a copy",
                )
            )

    @abstractmethod
    def _due(self) -> None:
        """Does what is due at this step, a multiple of the spacing."""

    @abstractmethod
    def _past(self) -> dict[str, Any]:
        """Entries of the state dict that are this kind's own."""

    @abstractmethod
    def _take_past(self, state: Mapping[str, Any] | None) -> None:
        """Takes back what `_past` gave; None begins afresh."""

    @abstractmethod
    def _check_past(self, state: Mapping[str, Any]) -> None:
        """Raises unless `_take_past` can take a state."""

    @contextmanager
    def averaged(self) -> Generator[None]:
        """Within it, the module has running averages of its parameters; see `Drifting`."""
        raise self._none()
        yield

    def finish(self) -> None:
        """Gives the module running averages of its parameters for good; see `Drifting`."""
        raise self._none()

    def _none(self) -> NowcastError:
        return NowcastError(
            message(
                "Nowcaster: no running averages are kept",
                expected="predictor=wspace.nowcast.Drift()",
                got=f"{type(self).__name__}, which jumps by snapshots",
            )
        )

    def before_step(self) -> None:
        """Raises if the optimizer must not step now."""
        self._present()

    def _present(self) -> None:
        """Raises while the module holds other values for a time."""
        if self._away:
            raise NowcastError(
                message(
                    "Nowcaster: the module holds its averages now, not what is trained",
                    help="step, copy, and take averages outside of `with optimizer.averaged():`",
                )
            )

    # ------------------------------------------------------------ steps

    def attach(self) -> "Handles":
        """Follows the optimizer from now on.

        Steps that a gradient scaler makes it skip do not count.

        Returns:
            A handle; its ``remove()`` ends it.
        """
        before = self.optimizer.register_step_pre_hook(lambda opt, args, kwargs: self._present())
        after = self.optimizer.register_step_post_hook(lambda opt, args, kwargs: self._hook(opt))
        return Handles(before, after)

    def _hook(self, optimizer: Optimizer) -> None:
        skipped = getattr(optimizer, "found_inf", None)  # fused optimizers skip by themselves
        if skipped is None:
            self.after_step()
            return
        self._unsure.append(skipped.detach().clone())
        if (self._step + len(self._unsure)) % self.spacing:
            return  # nothing can be due, so there is no need to wait for the device
        last = self._unsure.pop()
        self._count()
        if not float(last):
            self.after_step()

    def _count(self) -> None:
        """Counts the steps of which it was not known yet whether they were made."""
        if self._unsure:
            skipped = torch.stack([x.reshape(()) for x in self._unsure]).tolist()
            self._unsure.clear()
            self._step += sum(not x for x in skipped)

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        self._count()
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        self._unsure.clear()
        self._step = value

    def after_step(self) -> None:
        """Counts a step of the optimizer, and does what is due after it."""
        self.step += 1
        if self.step % self.spacing == 0:
            reshard(self.module)
            self._due()

    # ------------------------------------------------------------ which parameters

    def _owned(self) -> dict[str, Tensor]:
        ours = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return {n: p for n, p in self.module.named_parameters() if id(p) in ours}

    def movable(self) -> dict[str, Tensor]:
        """Parameters that may move now, by name; shared ones once."""
        return {n: p for n, p in self._owned().items() if p.requires_grad and not predictable(p)}

    @property
    def left_alone(self) -> dict[str, str]:
        """Parameters of the module or the optimizer that do not move, and why."""
        owned = self._owned()
        found: dict[str, str] = {}
        for name, p in self.module.named_parameters():
            if name not in owned:
                found[name] = "not in the optimizer"
            elif why := "frozen" if not p.requires_grad else predictable(p):
                found[name] = why
        groups = self.optimizer.param_groups
        ours = {id(p) for p in owned.values()}
        for i, group in enumerate(groups):
            for j, p in enumerate(group["params"]):
                if id(p) not in ours:
                    found[f"param_groups[{i}][{j}]"] = "not in the module"
        return found

    # ------------------------------------------------------------ the log

    def _note(self, entry: Jump) -> None:
        self.log.append(entry)
        self.made += 1
        del self.log[:-LOGGED]

    def news(self, told: int) -> list[Jump]:
        """Jumps since so many had been made, as far as the log goes back.

        Args:
            told: A former value of `made`.

        Returns:
            The jumps, oldest first.
        """
        count = self.made - told
        return self.log[-count:] if count > 0 else []

    def _failed(self, error: Exception, entry: Jump) -> None:
        """Notes an error in the log, then raises it or warns the first time."""
        head = str(error).partition("\n")[0]
        reason = f"{entry.reason}: " if entry.reason else ""
        self._note(replace(entry, reason=f"{reason}{type(error).__name__}: {head}"))
        if self.settings.on_error == "raise":
            raise error
        if not self._warned:
            self._warned = True
            warnings.warn(
                message(
                    f"Nowcaster: the jump at step {self.step} failed, training goes on",
                    got=f"{type(error).__name__}: {error}",
                    help="later ones are noted in the log only; on_error='raise' stops there",
                ),
                RuntimeWarning,
                stacklevel=2,
            )

    # ------------------------------------------------------------ resumption

    def state_dict(self) -> dict[str, Any]:
        """All that a resumption needs, for `torch.load(..., weights_only=True)`.

        Tensors are those kept here, not copies. With DDP the first process alone holds the windows
        of snapshots; of parameters in parts a tensor is a `DTensor` laid out as they are.

        Returns:
            Plain values and tensors.
        """
        reshard(self.module)
        return {
            "version": VERSION,
            "kind": self.kind,
            "step": self.step,
            "made": self.made,
            "warned": self._warned,
            "log": [{**asdict(jump), "tried": list(jump.tried)} for jump in self.log],
            **self._past(),
        }

    def _laid_out(self, tensors: Mapping[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        """Tensors of parameters, laid out over processes as these are."""
        live = dict(self.module.named_parameters())
        return {n: [like_part(live[n], x) for x in xs] for n, xs in tensors.items() if n in live}

    def restart(self) -> None:
        """Counts from zero, without a past."""
        self._take_past(None)
        self.step, self.log, self.made, self._warned = 0, [], 0, False

    def check(self, state: Mapping[str, Any]) -> None:
        """Raises unless `load_state_dict` can take a state; changes nothing.

        Args:
            state: What was saved.

        Raises:
            NowcastError: If it is of another version, or its past does not fit the module.
        """
        if state.get("version") != VERSION:
            raise NowcastError(
                message(
                    "Nowcaster: this saved state cannot be read",
                    expected=f"version {VERSION}",
                    got=f"version {state.get('version')!r}",
                )
            )
        lost = {"step", "period", "context", "warned", "history", "log"} - state.keys()
        if lost:
            raise NowcastError(
                message("Nowcaster: this saved state is not whole", got=f"no {sorted(lost)}")
            )
        _entries(state)
        reshard(self.module)
        if self._same_kind(state):
            self._check_past(state)

    def _same_kind(self, state: Mapping[str, Any]) -> bool:
        return state.get("kind", "windows") == self.kind

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        With another period, context or way to jump than before, steps go on and the past starts
        afresh.

        Args:
            state: What was saved.
        """
        self.check(state)
        self._take_past(state if self._same_kind(state) else None)
        self.log = _entries(state)
        self.made = int(state.get("made", len(self.log)))
        self.step, self._warned = int(state["step"]), bool(state["warned"])


def _entries(state: Mapping[str, Any]) -> list[Jump]:
    entries: list[dict[str, Any]] = state["log"]
    return [replace(Jump(**entry), tried=tuple(entry["tried"])) for entry in entries]
