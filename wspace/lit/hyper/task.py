"""`HyperTask`: what the Lightning modules of hypernetworks share: optimiser, monitored metric."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, is_dataclass
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from wspace.lit.task import Optimization


class HyperTask(LightningModule):
    """A hypernetwork, or a cell, and what it is trained for.

    A subclass makes its parts from plain options in ``__init__`` (so that a configuration says all
    of it), and has ``training_step``, ``validation_step`` and ``test_step``.

    Args:
        optimization: Optimiser and learning rate.

    Attributes:
        monitor: Quantity by which the best checkpoint is chosen, and ``"min"`` or ``"max"``.
        resumes: Set by `wspace fit` if training goes on from a checkpoint.
    """

    monitor: ClassVar[tuple[str, str]] = ("val/loss", "min")

    def __init__(self, optimization: Optimization | None = None) -> None:
        super().__init__()
        self.resumes = False
        self._random: Tensor | None = None  # state of torch's generator, to begin with
        self.optimization = optimization or Optimization(weight_decay=0.0)

    def configure_optimizers(self) -> Any:
        """AdamW over all parameters that are trained, its rate as `Optimization` says.

        Returns:
            The optimiser and its schedule.
        """
        how = self.optimization
        trained = [p for p in self.parameters() if p.requires_grad]
        decayed = [p for p in trained if p.dim() > 1]
        plain = [p for p in trained if p.dim() <= 1]
        groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": how.weight_decay}]
        groups += [{"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], how.lr, how.betas)
        total = float(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: how.factor(k, total))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def with_state_of(self, cond: int | None) -> AbstractContextManager[None]:
        """A context in which buffers are those that belong to a condition; here they are anyway.

        Args:
            cond: Number of a task or client; None if there is no condition.

        Returns:
            The context.
        """
        del cond
        return nullcontext()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what is needed to make the task again: its class and its options.

        Args:
            checkpoint: What Lightning writes.
        """
        options = {k: plain(v) for k, v in dict(self.hparams).items()}
        checkpoint["wspace"] = {"task": type(self).__name__, "config": options}
        checkpoint["hyper_parameters"] = options
        checkpoint["random"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the state of torch's generator, which dropout draws from.

        Args:
            checkpoint: What Lightning read.
        """
        self._random = checkpoint.get("random")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Before the first step after a resumption, sets the generator as it was."""
        del batch, batch_idx
        if self._random is not None:
            torch.set_rng_state(self._random.cpu())
            self._random = None

    def log_all(self, values: Mapping[str, Any], stage: str, size: int) -> None:
        """Logs quantities as ``stage/name``: each step's in training, else the mean of an epoch.

        Args:
            values: Numbers by name.
            stage: ``"train"``, ``"val"`` or ``"test"``.
            size: Examples that they are means over.
        """
        named = {f"{stage}/{name}": value for name, value in values.items()}
        judged = stage != "train"
        self.log_dict(named, batch_size=size, on_step=not judged, on_epoch=judged, sync_dist=judged)


def plain(value: Any) -> Any:
    """An option as JSON knows it: dataclasses and mappings as dicts, sequences as lists.

    Args:
        value: The option.

    Returns:
        Plain values.
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value
