"""Pruning while Lightning trains: a penalty that prepares it, and stages that carry it out.

Within a fit units are switched off by masks, and the module keeps its shapes. Only afterwards, by
`IterativePruning.compact`, is it made small: optimizers, schedulers, DDP, checkpoints and other
callbacks all hold on to the tensors that a fit began with, and a run that is resumed must find a
module of the checkpoint's shapes.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from wspace.errors import PruneError, message
from wspace.prune.carry import carry
from wspace.prune.cost import latency
from wspace.prune.curve import Point
from wspace.prune.importance.sparse import GroupSparsity
from wspace.prune.importance.weights import Importance, importance_of
from wspace.prune.masks import Mask
from wspace.prune.pruner import Pruner, Rebuild
from wspace.prune.restriction import Restriction
from wspace.prune.select import Selection
from wspace.space import WeightSpace

Schedule = Callable[[float], float]
"""Share of the stages that are done, in (0, 1] → share of the amount that is gone by then."""


def linear(t: float) -> float:
    """The same amount at every stage."""
    return t


def cubic(t: float) -> float:
    """Much at first and little at the end: :math:`1 - (1 - t)^3`.

    Args:
        t: Share of the stages that are done.

    Returns:
        Share of the amount.

    References:
        Zhu, Gupta (2017), To Prune, or Not to Prune, equation 1. arXiv:1710.01878
    """
    return 1 - (1 - t) ** 3


class GroupSparsityCallback(Callback):
    """Adds the gradient of `GroupSparsity` before every step of an optimizer.

    Once for each step, after gradients have accumulated and lost their AMP scale, and before they
    are clipped.

    Args:
        space: Weight space of the part that `module` names.
        module: Which part of the LightningModule.
        start: First epoch with the penalty.
        end: First epoch without it again; None for never.
        optimizer: Index of the optimizer, if there are several.
        **options: ``strength``, ``alpha`` and ``shifts``, see `GroupSparsity`.

    Raises:
        PruneError: If the options make no sense.
    """

    def __init__(
        self,
        space: WeightSpace,
        *,
        module: str = "model",
        start: int = 0,
        end: int | None = None,
        optimizer: int = 0,
        **options: Any,
    ) -> None:
        if start < 0 or (end is not None and end < start):
            raise PruneError(
                message(
                    "GroupSparsityCallback: epochs that make no sense",
                    expected="0 ≤ start ≤ end",
                    got=f"start={start}, end={end}",
                )
            )
        self.sparsity = GroupSparsity(space, **options)
        self.module, self.start, self.end, self.optimizer = module, start, end, optimizer

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Adds to the gradients.

        Args:
            trainer: The trainer.
            pl_module: The module.
            optimizer: Whose step it is.
        """
        on = self.start <= trainer.current_epoch and (
            self.end is None or trainer.current_epoch < self.end
        )
        if on and _plain(optimizer) is _plain(trainer.optimizers[self.optimizer]):
            self.sparsity.add_to_gradients(pl_module.get_submodule(self.module))


class IterativePruning(Callback):
    """Prunes in stages within one fit, and trains what is left between them.

    At each stage the importance is asked again, more units are switched off, and the optimizer's
    moments of their weights are cleared; until the next stage no step moves them. Units that are
    off stay off. After the fit `compact` makes the module small. The callback's state is in
    checkpoints, and a run that is resumed goes on where it was; what stood in the place of units
    that were off by then is not in the file, so `release` gives zeros for them.

    Where operators count the units of a group (LayerNorm over the residual stream), a masked
    network is not the small one: `compact` changes what it computes, so train on afterwards.

    Args:
        space: Weight space of the part that `module` names.
        importance: Says which units to keep: a name or an object, see `wspace.prune`.
        selection: What is gone at the end; before, the schedule's share of it.
        steps: Number of stages.
        every: From one stage to the next, in epochs or optimizer steps; see `unit`.
        start: When the first stage is.
        unit: ``"epoch"`` or ``"step"``.
        module: Which part of the LightningModule is pruned.
        optimizer: Index of the optimizer that trains it, if there are several.
        monitor: Name of the logged value that says how good the network is, for `curve`; None to
            leave it out.
        repeats: How often the compacted copy is timed at each stage, for `curve`; 0 for never.
        schedule: Share of the stages → share of the amount: `linear`, `cubic`, or another.
        inputs: Example inputs (arguments of the part), where the space has none.
        rebuild: How the small part is made, see `wspace.prune.prune`; groups that a config cannot
            size stay whole unless it is ``"copy"``.

    Attributes:
        curve: A point for each stage, and one before the first. Its metric is that of the last
            validation before the next stage.
        restriction: What is kept now; None as long as everything is.
        stage: Stages that are done.

    Raises:
        PruneError: If the options make no sense.
    """

    def __init__(
        self,
        space: WeightSpace,
        importance: Importance | str,
        selection: Selection,
        *,
        steps: int = 5,
        every: int = 1,
        start: int = 0,
        unit: str = "epoch",
        module: str = "model",
        optimizer: int = 0,
        monitor: str | None = None,
        repeats: int = 10,
        schedule: Schedule = linear,
        inputs: tuple[Any, ...] | None = None,
        rebuild: Rebuild = "auto",
    ) -> None:
        wrong = [f"steps={steps}"] if steps < 1 else []
        wrong += [f"every={every}"] if every < 1 else []
        wrong += [f"start={start}"] if start < 0 else []
        wrong += [f"unit={unit!r}"] if unit not in ("epoch", "step") else []
        wrong += [f"repeats={repeats}"] if repeats < 0 else []
        wrong += ["module='', no part that can be replaced"] if not module else []
        amounts = [schedule((k + 1) / steps) for k in range(max(steps, 0))]
        if wrong or amounts != sorted(amounts) or not 0 <= amounts[0] <= amounts[-1] == 1:
            raise PruneError(
                message(
                    "IterativePruning: options that make no sense",
                    expected="steps and every of at least 1, start and repeats of at least 0, unit "
                    "'epoch' or 'step', the name of a part, a schedule that rises to 1",
                    got=wrong or [f"a schedule of {', '.join(f'{a:g}' for a in amounts)}"],
                )
            )
        self.space, self.selection = space, selection
        self.importance = importance_of(importance)
        self.steps, self.every, self.start, self.unit = steps, every, start, unit
        self.module, self.optimizer, self.monitor = module, optimizer, monitor
        self.repeats, self.inputs, self.amounts = repeats, inputs, amounts
        self.rebuild: Rebuild = rebuild
        self.curve: list[Point] = []
        self.restriction: Restriction | None = None
        self.stage, self.compacted = 0, False
        self.mask: Mask | None = None
        self._pruner: Pruner | None = None
        self._running = False

    @property
    def state_key(self) -> str:
        """One for each part that is pruned."""
        return self._generate_state_key(module=self.module)

    # ------------------------------------------------------------ Lightning's events

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds out what can be pruned, and switches off what was off in a run that is resumed.

        Args:
            trainer: The trainer.
            pl_module: The module.

        Raises:
            PruneError: If the selection cannot be reached.
            SpaceMismatch: If the part is not of the space.
        """  # noqa: DOC502 (helpers raise)
        if self.compacted:
            return
        self._running = True
        part = pl_module.get_submodule(self.module)
        if self._pruner is None or self._pruner.module is not part:
            self._pruner, self.mask = self._made(part), None
        if self.mask is None and self.restriction is not None:
            self._off(trainer, part, self.restriction)
        elif self.mask is not None:  # another fit, another optimizer
            self.mask.hold(_plain(trainer.optimizers[self.optimizer]))
        if self.stage < self.steps:
            self._restricted(self._pruner, 1.0)  # fails now rather than at the last stage
        if not self.curve:
            self._note(trainer, Restriction(self.space, {}))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Carries out the stages that are due.

        Args:
            trainer: The trainer.
            pl_module: The module.
            batch: Not used.
            batch_idx: Not used.
        """
        del batch, batch_idx
        now = trainer.current_epoch if self.unit == "epoch" else trainer.global_step
        due = 0 if now < self.start else min((now - self.start) // self.every + 1, self.steps)
        if due <= self.stage or self.compacted or self._pruner is None:
            return
        few = self._restricted(self._pruner, self.amounts[due - 1])
        self.stage = due
        self._off(trainer, pl_module.get_submodule(self.module), few)
        self._note(trainer, few)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Clears gradients of what is off, so that they count neither for clipping nor for moments.

        Args:
            trainer: The trainer.
            pl_module: The module.
            optimizer: Whose step it is.
        """
        del pl_module
        if self.mask is not None and _plain(optimizer) is _plain(
            trainer.optimizers[self.optimizer]
        ):
            self.mask.again()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes the zeros again, in case another callback has moved what is off.

        Args:
            trainer: Not used.
            pl_module: Not used.
            outputs: Not used.
            batch: Not used.
            batch_idx: Not used.
        """
        del trainer, pl_module, outputs, batch, batch_idx
        if self.mask is not None:
            self.mask.again()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes how good the network is.

        Args:
            trainer: The trainer.
            pl_module: The module.

        Raises:
            PruneError: If nothing of the name `monitor` was logged.
        """
        del pl_module
        if self.monitor is None or trainer.sanity_checking or self.compacted or not self.curve:
            return
        found = trainer.callback_metrics
        if self.monitor not in found:
            raise PruneError(
                message(
                    f"IterativePruning: nothing is logged as {self.monitor!r}",
                    expected="the name of a value that validation logs",
                    got=", ".join(sorted(found)) or "nothing that is logged",
                )
            )
        self.curve[-1] = replace(self.curve[-1], metric=float(found[self.monitor]))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on the part may be compacted."""
        self._running = False

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """From now on the part may be compacted."""
        self._running = False

    def state_dict(self) -> dict[str, Any]:
        """Stages done, what is kept, and the curve, for the checkpoint."""
        few = self.restriction
        keep = {} if few is None else {g: x.clone() for g, x in few.keep.items()}
        curve = [point.plain() for point in self.curve]
        return {"stage": self.stage, "keep": keep, "curve": curve, "compacted": self.compacted}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a checkpoint.

        Args:
            state_dict: What `state_dict` gave.

        Raises:
            PruneError: If the checkpoint is of a run with more stages, or of another space.
        """
        if state_dict["stage"] > self.steps:
            raise PruneError(
                message(
                    "IterativePruning: the checkpoint is of another run",
                    expected=f"at most {self.steps} stages",
                    got=f"{state_dict['stage']}",
                )
            )
        self.stage, self.compacted = state_dict["stage"], state_dict["compacted"]
        self.curve = [Point.of(plain) for plain in state_dict["curve"]]
        keep = {g: x.cpu() for g, x in state_dict["keep"].items()}
        self.restriction = Restriction(self.space, keep) if keep else None
        self.mask = None

    # ------------------------------------------------------------ after the fit

    def compact(
        self, pl_module: LightningModule, optimizer: torch.optim.Optimizer | None = None
    ) -> nn.Module:
        """Replaces the part of the module by one that has only what is kept.

        A new fit makes new optimizers of the small parameters, as every fit does. For a loop of
        your own, `optimizer` is changed in place (see `carry`).

        Args:
            pl_module: The module that was trained.
            optimizer: An optimizer of the part, to go on with; such as ``trainer.optimizers[0]``.

        Returns:
            The small part.

        Raises:
            PruneError: If there was no fit, the part is small already, or the fit still runs.
        """
        wrong = "" if self._pruner else "nothing was trained with this callback"
        if self.compacted:
            wrong = "it is small already"
        if self._running:
            wrong = "the fit still runs, and optimizer and trainer hold on to its tensors"
        if wrong or self._pruner is None:
            raise PruneError(
                message(f"IterativePruning: {self.module!r} cannot be compacted", got=wrong)
            )
        part = pl_module.get_submodule(self.module)
        few = self.restriction or Restriction(self.space, {})
        pruner = self._pruner if self._pruner.module is part else self._made(part)
        _to_device(pruner, part)
        small = pruner.prune(few)
        if optimizer is not None:
            carry(optimizer, part, few, small)
        holder, _, name = self.module.rpartition(".")
        setattr(pl_module.get_submodule(holder), name, small)
        if self.mask is not None:
            self.mask.remove()  # with its hooks; the large part is of no more use here
        self._pruner, self.mask, self.compacted = None, None, True
        return small

    def release(self) -> None:
        """Puts the units that are off back to what they were when they were switched off."""
        if self.mask is not None:
            self.mask.remove()
        self.mask, self.restriction, self.stage = None, None, 0

    # ------------------------------------------------------------ a stage

    def _made(self, part: nn.Module) -> Pruner:
        pruner = Pruner(part, self.space, self.inputs, rebuild=self.rebuild)
        _to_device(pruner, part)
        return pruner

    def _restricted(self, pruner: Pruner, share: float) -> Restriction:
        """What is kept once this share of the selection is gone; what is off stays off."""
        wanted = self.selection
        amount = None if wanted.amount is None else wanted.amount * share
        ratios = {g: r * share for g, r in wanted.ratios.items()}
        scores = dict(self.importance(pruner.module, self.space))
        off = {} if self.restriction is None else self.restriction.keep
        scores = {g: _normalized(x, off.get(g), wanted.normalize) for g, x in scores.items()}
        lowest = min((float(x.min()) for x in scores.values() if x.numel()), default=0.0) - 1
        for g, keep in off.items():  # contexts that are off as a whole (heads) say nothing
            scores[g] = scores[g].masked_fill(~keep & keep.any(-1, keepdim=True), lowest)
        now = replace(wanted, amount=amount, ratios=ratios, normalize="none")
        return pruner.restrict(scores, now)

    @torch.no_grad()
    def _off(self, trainer: Trainer, part: nn.Module, few: Restriction) -> None:
        """Switches units off, for the optimizer too."""
        if self.mask is not None:
            self.mask.remove()
        optimizer = _plain(trainer.optimizers[self.optimizer])
        self.mask = Mask(part, self.space, few).hold(optimizer)
        self.restriction = few
        known = dict(part.named_parameters(remove_duplicate=False))
        for p in few.touched:
            x = known[p.name]
            for value in optimizer.state.get(x, {}).values():
                if isinstance(value, Tensor) and value.shape == x.shape:
                    value.masked_fill_(few.zeroed(p).to(value.device), 0)

    def _note(self, trainer: Trainer, few: Restriction) -> None:
        """A point of the curve."""
        assert self._pruner is not None  # made when training starts
        pruner, took = self._pruner, None
        if self.repeats:
            small = pruner.prune(few, check=False)
            took = latency(small, pruner.args, pruner.kwargs, repeats=self.repeats, warmup=2)
        counts = few.counts()
        self.curve.append(
            Point(
                step=trainer.global_step,
                kept=counts,
                parameters=pruner.cost.parameters(counts),
                macs=pruner.cost.macs(counts),
                latency=took,
            )
        )


def _normalized(x: Tensor, keep: Tensor | None, normalize: str) -> Tensor:
    """Scores as `select` divides them, by those of units that are on."""
    x = x.detach().to("cpu", torch.float64)
    some = (x if keep is None else x[keep]).abs()
    by = {"mean": some.mean, "max": some.max, "sum": some.sum}.get(normalize)
    return x / (float(by()) or 1.0) if by else x


def _to_device(pruner: Pruner, part: nn.Module) -> None:
    """Brings the example inputs to where the module is."""
    device = next(part.parameters()).device
    pruner.args, pruner.kwargs = tree_map_only(
        Tensor, lambda x: x.to(device), (pruner.args, pruner.kwargs)
    )


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer within Lightning's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
