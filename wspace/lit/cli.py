"""`wspace fit|validate|test|predict`: LightningCLI on zoos and tasks.

The tasks are `wspace.lit.modules`, the data is always a `ZooDataModule`. The configuration that a
run resolved to is saved with its logs, checkpoints are those of `wspace.lit.checkpoint`. A run's
folder is ``runs/NAME/version_K``, NAME being the configuration file's.
"""

import csv
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import Tensor

from wspace.lit.checkpoint import Checkpoints, SafeCheckpoints
from wspace.lit.data import ZooDataModule
from wspace.lit.modules import TASKS
from wspace.lit.predict import in_order
from wspace.lit.task import Task

COMMANDS = ("fit", "validate", "test", "predict")

DEFAULTS: dict[str, Any] = {
    "max_epochs": 20,
    "gradient_clip_val": 1.0,
    "enable_model_summary": False,
}
"""What differs from Lightning's own defaults."""


class TrainingCLI(LightningCLI):
    """LightningCLI whose trainer writes safetensors, and CSV logs (TensorBoard's where installed).

    Args:
        words: Command and options.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        super().__init__(
            Task,
            ZooDataModule,
            subclass_mode_model=True,
            save_config_callback=SaveConfigCallback,
            trainer_defaults=dict(DEFAULTS),
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"prog": "wspace", "description": "Train metanetworks on model zoos."},
            args=self.words,
        )

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parses the words (Lightning warns where the process has words of its own)."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Leaves the configuration as it is: a checkpoint brings its own when it is loaded."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with loggers, checkpoints and their format where none are configured."""
        given: Any = self._get(self.config_init, "trainer")
        if given.get("logger") in {None, True}:
            kwargs["logger"] = self._loggers(Path(given.get("default_root_dir") or "runs"))
        callbacks: list[Callback] = list(given.get("callbacks") or [])
        if given.get("enable_checkpointing") is not False and not any(
            isinstance(c, Checkpoints) for c in callbacks
        ):
            monitor, mode = self.model.monitor
            callbacks.append(Checkpoints(monitor=monitor, mode=mode, save_last=True))
        if given.get("enable_progress_bar") is not False and not sys.stderr.isatty():
            kwargs["enable_progress_bar"] = False
        elif given.get("enable_progress_bar") is not False:
            callbacks.append(TQDMProgressBar())
        plugins = given.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(p, SafeCheckpoints) for p in plugins):
            plugins = [*plugins, SafeCheckpoints()]
        return super().instantiate_trainer(callbacks=callbacks, plugins=plugins, **kwargs)

    def _loggers(self, root: Path) -> list[Logger]:
        files = [w for flag, w in zip(self.words, self.words[1:], strict=False)
                 if flag in {"-c", "--config"}]  # fmt: skip
        files += [w.partition("=")[2] for w in self.words if w.startswith("--config=")]
        stem = Path(files[0]).stem if files else "wspace"
        name = type(self.model).__name__.lower() if stem in {"wspace", "config"} else stem
        loggers: list[Logger] = [CSVLogger(root, name)]
        if find_spec("tensorboard") or find_spec("tensorboardX"):
            version = getattr(loggers[0], "version", None)
            loggers.append(TensorBoardLogger(root, name, version))
        return loggers

    def predict(self, **kwargs: Any) -> None:
        """Predictions for all networks of the zoo, as ``predictions.csv`` in the run's folder."""
        outputs: Any = self.trainer.predict(**kwargs)
        world = self.trainer.world_size
        if world > 1:
            shared: list[Any] = [None] * world
            torch.distributed.all_gather_object(shared, outputs)
            outputs = [o for part in shared for o in part]
        if self.trainer.is_global_zero:
            folder = Path(self.trainer.log_dir or ".")
            folder.mkdir(parents=True, exist_ok=True)
            write_csv(folder / "predictions.csv", in_order(outputs))
            sys.stdout.write(f"wrote {folder / 'predictions.csv'}\n")


def write_csv(path: Path, columns: dict[str, Tensor]) -> None:
    """Writes columns, one row for each network; vectors get a column for each entry.

    Args:
        path: File to write.
        columns: Columns by name, ``(rows,)`` or ``(rows, n)``.
    """
    flat: dict[str, list[float]] = {}
    for name, x in columns.items():
        if x.dim() == 1:
            flat[name] = x.tolist()
        else:
            flat |= {f"{name}_{i}": part.tolist() for i, part in enumerate(x.flatten(1).T)}
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["row", *flat])
        out.writerows([i, *values] for i, values in enumerate(zip(*flat.values(), strict=True)))


def run(words: Sequence[str]) -> int:
    """Runs a command.

    Args:
        words: ``fit``, ``validate``, ``test`` or ``predict``, and options of LightningCLI.

    Returns:
        0; wrong options leave by `SystemExit` with 2.
    """
    TrainingCLI([*words])
    return 0


__all__ = ["COMMANDS", "DEFAULTS", "TASKS", "TrainingCLI", "run", "write_csv"]
