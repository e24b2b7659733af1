"""Lightning's checkpoints as safetensors: nothing in them is run when they are read.

``NAME.safetensors`` holds the weights; its header, as text, the task with its options, the
architectures that it was trained on, epoch and step. ``NAME.resume.pt`` beside it holds what only a
resumption needs (optimiser, loops, generators) and is read by torch's restricted unpickler. Both
name the step they are of; files of two steps are refused. Each is written whole or not at all.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from wspace.errors import CheckpointError, message

FORMAT = "wspace-task-1"
RESUME = ".resume.pt"
SUFFIX = ".safetensors"
PLAIN = ("wspace", "epoch", "global_step", "pytorch-lightning_version", "hyper_parameters")
"""Entries of Lightning's checkpoint that go into the header."""


class Checkpoints(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, with file names that say what the files are."""

    FILE_EXTENSION = SUFFIX

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state back; a run in another folder leaves the files of the first alone.

        Args:
            state_dict: What was saved.
        """
        if self.dirpath == state_dict.get("dirpath", self.dirpath):
            super().load_state_dict(state_dict)
        else:
            self.best_model_path = state_dict["best_model_path"]


class SafeCheckpoints(CheckpointIO):
    """Writes and reads Lightning's checkpoints as described above; a plugin of the trainer."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Writes both files.

        Args:
            checkpoint: What Lightning gives.
            path: File of the weights.
            storage_options: Must be None.

        Raises:
            CheckpointError: If a part is no tensor, and nothing that JSON or torch's restricted
                unpickler could give back.
        """
        from safetensors.torch import save

        del storage_options
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        state = checkpoint["state_dict"]
        tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
        header = {"format": FORMAT}
        for key in PLAIN:
            if key in checkpoint:
                header[key] = _text(checkpoint[key], key)
        left = {k: v for k, v in checkpoint.items() if k != "state_dict" and k not in PLAIN}
        left["global_step"] = checkpoint.get("global_step")
        left["other_state"] = {k: v for k, v in state.items() if k not in tensors}
        flat = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        files = [resume_file(path), path] if "optimizer_states" in left else [path]
        try:  # neither is replaced before both are written: the disk may be full
            if len(files) > 1:
                torch.save(left, _fresh(files[0]))
            _fresh(path).write_bytes(save(flat, header))
            for file in files:
                _flush(_fresh(file))
            for file in files:
                _fresh(file).replace(file)
        finally:
            for file in files:
                _fresh(file).unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads what `save_checkpoint` wrote.

        Args:
            path: File of the weights.
            map_location: Device of the tensors; the CPU if None.
            weights_only: Not used: nothing else is ever read.

        Returns:
            The checkpoint; without the optimiser if the file beside it is missing.

        Raises:
            CheckpointError: If a file is missing or damaged, or the two are of different steps.
        """
        del weights_only
        path = Path(path)
        header, tensors = read(path)
        checkpoint: dict[str, Any] = {"state_dict": tensors, **header}
        beside = resume_file(path)
        if beside.exists():
            try:
                left = torch.load(beside, map_location=map_location or "cpu", weights_only=True)
            except Exception as error:
                raise CheckpointError(
                    message(
                        f"checkpoint: {beside} cannot be read",
                        got=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
                        help="remove it to go on with the weights alone",
                    )
                ) from error
            if left.pop("global_step", None) != header.get("global_step"):
                raise CheckpointError(
                    message(
                        f"checkpoint: {path.name} and {beside.name} are of different steps",
                        help="resume from another; for predictions, remove the second",
                    )
                )
            tensors.update(left.pop("other_state", {}))
            checkpoint |= left
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes both files.

        Args:
            path: File of the weights.
        """
        for file in (Path(path), resume_file(Path(path))):
            file.unlink(missing_ok=True)


def resume_file(path: Path) -> Path:
    """The file beside a checkpoint that holds what a resumption needs."""
    return path.with_name(path.name.removesuffix(SUFFIX) + RESUME)


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and weights of a checkpoint of a task.

    Args:
        path: The file.

    Returns:
        The header's entries, and tensors by name, on the CPU.

    Raises:
        CheckpointError: If the file is missing, damaged, or something else.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with safe_open(path, "pt") as file:
            found: Mapping[str, str] = file.metadata() or {}
            if found.get("format") != FORMAT:
                raise CheckpointError(_bad(path, f"format {found.get('format')!r}"))
            header = {key: json.loads(found[key]) for key in PLAIN if key in found}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(_bad(path, f"{type(error).__name__}: {error}")) from error
    return header, tensors


def _text(value: Any, key: str) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            message(
                f"checkpoint: {key!r} is not plain",
                expected="numbers, text, lists and dicts",
                got=str(error),
                help="pass options of these kinds to the task",
            )
        ) from error


def _fresh(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _flush(path: Path) -> None:
    """Waits until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _bad(path: Path, got: str) -> str:
    return message(
        f"checkpoint: {path} is no trained metanet",
        expected="a .safetensors file that `wspace fit` wrote",
        got=got,
    )
