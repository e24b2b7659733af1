"""`wspace fit|validate|test|predict`: LightningCLI on zoos and tasks, and on hypernetworks.

The tasks are those of `wspace.lit.modules` on a `ZooDataModule`; or, where the configuration names
the class of its data, those of `wspace.lit.hyper` on any Lightning data module. The configuration
that a run resolved to is saved with its logs, checkpoints are those of `wspace.lit.checkpoint`. A
run's folder is ``runs/NAME/version_K``, NAME being the configuration file's, or where that is the
one of an earlier run, that run's.
"""

import csv
import re
import shutil
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import Tensor

from wspace.errors import WSpaceError, message
from wspace.lit.checkpoint import Checkpoints, SafeCheckpoints
from wspace.lit.data import ZooDataModule
from wspace.lit.hyper.task import HyperTask
from wspace.lit.predict import TASKS, in_order
from wspace.lit.task import Task

COMMANDS = ("fit", "validate", "test", "predict")

DEFAULTS: dict[str, Any] = {
    "max_epochs": 20,
    "gradient_clip_val": 1.0,
    "enable_model_summary": False,
}
"""What differs from Lightning's own defaults."""

CLIP = "gradient_clip_val"
"""A default for metanets alone: hypernetworks that step by themselves refuse it."""

BEGUN = {"config.yaml", "hparams.yaml"}
"""Files that a run writes before its first step."""


class Parser(LightningArgumentParser):
    """Parser that says what was probably meant, not everything that can be said."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Writes the mistake on stderr, and exits with 2.

        Args:
            message: What jsonargparse says.
            ex: Why.
        """
        parser: Any = getattr(ex, "subcommand_parser", None) or self
        known = {o.lstrip("-") for action in parser._actions for o in action.option_strings}
        known |= {name for task in TASKS.values() for name in signature(task).parameters}
        wrong = re.search(r"arguments: --([\w.]+)|[Oo]ption '([\w.]+)'|[Kk]ey '([\w.]+)'", message)
        name = next((part for part in wrong.groups() if part), "") if wrong else ""
        near = get_close_matches(name, known, n=1)
        sys.stderr.write(f"wspace: {message}\n")
        help = f"did you mean {near[0]}?" if near else f"{parser.prog} --help lists all options"
        if "subclass of" in message and ".hyper." in message:
            help = "for a hypernetwork, name the class of its data: --data or data.class_path"
        sys.stderr.write(f"  help: {help.replace(' [options]', '')}\n")
        sys.exit(2)


class TrainingCLI(LightningCLI):
    """LightningCLI whose trainer writes safetensors, and CSV logs (TensorBoard's where installed).

    Args:
        words: Command and options.
        generates: True for hypernetworks, whose data is of a class that is named.
    """

    def __init__(self, words: Sequence[str], *, generates: bool = False) -> None:
        self.words = list(words)
        self._folder: Path | None = None  # of this run, if it has one of its own
        super().__init__(
            HyperTask if generates else Task,
            LightningDataModule if generates else ZooDataModule,
            subclass_mode_model=True,
            subclass_mode_data=generates,
            save_config_callback=SaveConfigCallback,
            trainer_defaults={k: v for k, v in DEFAULTS.items() if not (generates and k == CLIP)},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={
                "prog": "wspace",
                "description": "Train networks that read or make networks.",
            },
            parser_class=Parser,
            args=self.words,
        )

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parses the words (Lightning warns where the process has words of its own)."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Leaves the configuration as it is: a checkpoint brings its own when it is loaded."""

    def before_instantiate_classes(self) -> None:
        """Refuses words for checkpoints that a trainer of this process wrote: there are none yet.

        Raises:
            WSpaceError: If ``--ckpt_path`` is such a word.
        """
        path: Any = self._get(self.config, "ckpt_path")
        if path in {"best", "last", "hpc", "registry"}:
            raise WSpaceError(
                message(
                    f"fit: --ckpt_path {path!r} names no file",
                    help="runs/NAME/version_K/checkpoints/last.safetensors is one",
                )
            )

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
        if given.get("enable_progress_bar") is not False:
            seen = sys.stderr.isatty()
            kwargs["enable_progress_bar"] = seen
            callbacks.append(TQDMProgressBar() if seen else Lines())
        callbacks.append(Beginning())
        plugins = given.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(p, SafeCheckpoints) for p in plugins):
            plugins = [*plugins, SafeCheckpoints()]
        try:
            return super().instantiate_trainer(callbacks=callbacks, plugins=plugins, **kwargs)
        except ValueError as error:
            raise WSpaceError(message("fit: Lightning cannot run this", got=str(error))) from error

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs a command; of one that fails before anything was learned, no folder remains."""
        self.model.resumes = self._get(self.config, "ckpt_path") is not None
        try:
            super()._run_subcommand(subcommand)
        except BaseException:
            if self._folder is not None and self.trainer.is_global_zero:
                _remove_unbegun(self._folder)
            raise

    def _loggers(self, root: Path) -> list[Logger]:
        files = [w for flag, w in zip(self.words, self.words[1:], strict=False)
                 if flag in {"-c", "--config"}]  # fmt: skip
        files += [w.partition("=")[2] for w in self.words if w.startswith("--config=")]
        file = Path(files[0]).resolve() if files else Path("config")
        earlier = file.parent.name.startswith("version_")
        stem = file.parent.parent.name if earlier and file.stem == "config" else file.stem
        name = type(self.model).__name__.lower() if stem == "config" else stem
        loggers: list[Logger] = [CSVLogger(root, name)]
        self._folder = Path(loggers[0].log_dir or root / name)
        if find_spec("tensorboard") or find_spec("tensorboardX"):
            version = getattr(loggers[0], "version", None)
            loggers.append(TensorBoardLogger(root, name, version))
        return loggers

    def after_fit(self) -> None:
        """Says where everything is."""
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        folder = self.trainer.log_dir  # all processes have to ask
        if self.trainer.is_global_zero:
            sys.stdout.write(f"wrote {folder}\n" + (f"best {best}\n" if best else ""))

    def predict(self, **kwargs: Any) -> None:
        """Predictions for all networks of the zoo, as ``predictions.csv`` in the run's folder.

        Args:
            kwargs: What Lightning's ``predict`` takes.

        Raises:
            WSpaceError: If the task is a hypernetwork.
        """
        if not isinstance(self.model, Task):
            raise WSpaceError(
                message(
                    f"predict: {type(self.model).__name__} says nothing of networks",
                    help="`wspace hyper generate` writes the weights that it makes",
                )
            )
        outputs: Any = self.trainer.predict(**kwargs)
        world = self.trainer.world_size
        if world > 1:
            shared: list[Any] = [None] * world
            torch.distributed.all_gather_object(shared, outputs)
            outputs = [o for part in shared for o in part]
        folder = Path(self.trainer.log_dir or ".")  # all processes have to ask
        if self.trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            rows = torch.cat([o["index"] for o in outputs]).sort().values
            write_csv(folder / "predictions.csv", in_order(outputs), rows)
            sys.stdout.write(f"wrote {folder / 'predictions.csv'}\n")


def _remove_unbegun(folder: Path) -> None:
    """Removes the folder of a run that holds its configuration and nothing else."""
    if not folder.is_dir():
        return
    files = [item for item in folder.rglob("*") if not item.is_dir()]
    if all(item.name in BEGUN or "tfevents" in item.name for item in files):
        shutil.rmtree(folder)
        with suppress(OSError):  # others are there
            folder.parent.rmdir()


class Lines(Callback):
    """A line for every epoch, where no one watches a progress bar."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the metrics of an epoch.

        Args:
            trainer: The trainer.
            pl_module: The task.
        """
        del pl_module
        if trainer.is_global_zero and not trainer.sanity_checking:
            found = [f"{k} {float(v):.4f}" for k, v in sorted(trainer.callback_metrics.items())]
            sys.stdout.write(f"epoch {trainer.current_epoch}  {'  '.join(found)}\n")
            sys.stdout.flush()


class Beginning(Callback):
    """A line on the weights that training begins with, where a checkpoint gave them."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes it.

        Args:
            trainer: The trainer.
            pl_module: The task.
        """
        if trainer.is_global_zero and isinstance(pl_module, Task) and pl_module.started:
            sys.stdout.write(f"{pl_module.started}\n")


def write_csv(path: Path, columns: dict[str, Tensor], rows: Tensor) -> None:
    """Writes columns, one row for each network; vectors get a column for each entry.

    Args:
        path: File to write.
        columns: Columns by name, ``(rows,)`` or ``(rows, n)``.
        rows: Place of each network in the zoo, ``(rows,)``.
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
        out.writerows(zip(rows.tolist(), *flat.values(), strict=True))


def names_data(words: Sequence[str]) -> bool:
    """Whether the class of the data is named, on the command line or in a configuration.

    Args:
        words: Command and options.

    Returns:
        True for hypernetworks.
    """
    pairs = zip(words, [*words[1:], ""], strict=True)
    given = [w.split("=", 1) if "=" in w else [w, after] for w, after in pairs]
    if any(w in {"--data", "--data.class_path"} for w, _ in given):
        return True
    for flag, file in given:
        if flag in {"-c", "--config"} and Path(file).is_file():
            try:
                found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError, yaml.YAMLError):
                return False  # the parser will say what is wrong
            data: Any = found.get("data") if isinstance(found, dict) else None
            if isinstance(data, dict) and "class_path" in data:
                return True
    return False


def run(words: Sequence[str]) -> int:
    """Runs a command.

    Args:
        words: ``fit``, ``validate``, ``test`` or ``predict``, and options of LightningCLI.

    Returns:
        0; wrong options leave by `SystemExit` with 2.

    Raises:
        WSpaceError: What went wrong in wspace, and what Lightning finds wrong with the options.
    """
    with warnings.catch_warnings():
        # lightning 2.6 calls what torch 2.13 and jsonargparse 4.53 deprecate, and advises workers
        # that are not needed
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
        warnings.filterwarnings("ignore", "The .*_dataloader. does not have many workers")
        try:
            TrainingCLI([*words], generates=names_data(words))
        except Exception as error:
            own = _own(error)
            if own is None:
                raise
            raise own from error
    return 0


def _own(error: BaseException | None) -> WSpaceError | None:
    """The error of wspace that an error of jsonargparse or Lightning wraps."""
    while error is not None:
        if isinstance(error, WSpaceError):
            return error
        if isinstance(error, MisconfigurationException):
            return WSpaceError(message("fit: Lightning cannot run this", got=str(error)))
        error = error.__cause__ or error.__context__
    return None
