"""Jumps for the Hugging Face Trainer, beside its optimizer; and their state as safe files.

``Trainer(..., callbacks=[trainer_callback(predictor)])`` follows the trainer's own optimizer.
``Trainer(..., optimizers=(Nowcaster(...), scheduler))`` works too, and then nothing else is needed.
"""

import json
import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from wspace.errors import MissingExtra, NowcastError, message
from wspace.nowcast.drift import Drift
from wspace.nowcast.drifting import Drifting
from wspace.nowcast.drifting import follower as follow
from wspace.nowcast.follow import Follower, Handles
from wspace.nowcast.guard import Guard
from wspace.nowcast.predictor import Predictor
from wspace.nowcast.ranks import in_parts, own_part
from wspace.nowcast.settings import Settings
from wspace.space import WeightSpace

NAME = "nowcast"


def trainer_callback(
    predictor: Predictor | Drift,
    space: WeightSpace | None = None,
    *,
    held: Mapping[str, Any] | None = None,
    evaluations: int = 1,
    **options: Any,
) -> Any:
    """A callback for the Hugging Face Trainer that jumps ahead.

    Every checkpoint gets ``nowcast.safetensors`` and ``nowcast.json``; a resumed run goes on as if
    nothing had been between. Horizons decay over the trainer's steps unless `total_steps` is given.
    The jumps are in the trainer's ``log_history``, and in the callback's ``jumps``.

    With a `Drift` evaluations during training are of the running averages, and training ends with
    them in the model, unless the trainer has loaded the best checkpoint; checkpoints hold what is
    trained. Only jumps that were judged, or failed, are in the ``log_history``. The trainer says
    nothing of an evaluation that raises: the callback's ``put_back()`` gives the model what is
    trained.

    Args:
        predictor: Says where parameters are heading; or a `Drift`.
        space: Weight space of the model, for predictors that know the wiring.
        held: A batch with labels; a jump is kept only if the model's loss on it does not rise.
        evaluations: Data sets that each evaluation goes through, if ``eval_dataset`` is a dict.
        **options: See `Settings`. With `held`, a `guard` is a dict of `Guard`'s other options.

    Returns:
        A `transformers.TrainerCallback`.

    Raises:
        MissingExtra: If transformers is not installed.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise MissingExtra(
            message(
                "trainer_callback: transformers is not installed",
                help="pip install 'wspace[hf]'",
            )
        ) from error
    follower = _Follower(predictor, space, held, options)

    class NowcastTrainerCallback(TrainerCallback):
        """Hands the trainer's events on."""

        @property
        def core(self) -> Follower | None:
            return follower.core

        @property
        def jumps(self) -> list[Any]:
            return [] if follower.core is None else follower.core.log

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            follower.begin(args, state, given["model"], given["optimizer"])

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            follower.tell(state)
            follower.show(evaluations if control.should_evaluate else 0)

        def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            follower.show(evaluations if control.should_evaluate else 0)

        def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            follower.shown()

        def put_back(self) -> None:
            follower.show(0)

        def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            follower.save(_folder(args, state), first=state.is_world_process_zero)

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            best = args.load_best_model_at_end and state.best_model_checkpoint is not None
            follower.finish(averages=not best)

    return NowcastTrainerCallback()


class _Follower:
    """What the callback does, without transformers."""

    def __init__(
        self,
        predictor: Predictor | Drift,
        space: WeightSpace | None,
        held: Mapping[str, Any] | None,
        options: Mapping[str, Any],
    ) -> None:
        self.predictor, self.space, self.held = predictor, space, held
        self.options = dict(options)
        judge = self.options.pop("guard", None)
        wrong: type = Mapping if held is None else Guard
        if isinstance(judge, wrong):
            raise NowcastError(
                message(
                    "trainer_callback: guard and held do not fit together",
                    expected="a Guard, or held=batch and perhaps a dict of a guard's options",
                )
            )
        self.judge: Guard | Mapping[str, Any] | None = judge
        Settings(**self.options)
        self.core: Follower | None = None
        self._handle: Handles | None = None
        self._told = 0
        self._away = ExitStack()
        self._left = 0  # evaluations to come before the model gets back what is trained

    def begin(self, args: Any, state: Any, model: nn.Module, optimizer: Any) -> None:
        while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
            optimizer = inner  # accelerate's wrapper does not step when gradients accumulate
        options: dict[str, Any] = {
            "total_steps": state.max_steps,
            **self.options,
            "guard": self._guard(model),
        }
        self.end()
        self.core = follow(optimizer, model, self.space, self.predictor, Settings(**options))
        if state.global_step:
            folder = _folder(args, state)
            if not folder.is_dir() and isinstance(args.resume_from_checkpoint, str):
                folder = Path(args.resume_from_checkpoint)
            found = load(folder, _part(self.core))
            if found is None:
                warnings.warn(
                    f"trainer_callback: {folder} has no {NAME}.json; steps are counted from zero",
                    UserWarning,
                    stacklevel=2,
                )
            else:
                self.core.load_state_dict(found)
        self._told = self.core.made
        self._handle = self.core.attach()

    def _guard(self, model: nn.Module) -> Guard | None:
        held = self.held
        if held is None or isinstance(self.judge, Guard):
            return self.judge if isinstance(self.judge, Guard) else None

        def loss() -> Tensor:
            device = next(model.parameters()).device
            moved = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in held.items()}
            return model(**moved)["loss"]

        return Guard(loss, **(self.judge or {}))

    def tell(self, state: Any) -> None:
        if self.core is None:
            return
        drifts = isinstance(self.core, Drifting)  # its jumps are many and much alike
        for jump in self.core.news(self._told):
            if drifts and jump.after is None and jump.reason == "accepted":
                continue
            found = {
                "nowcast/horizon": jump.horizon,
                "nowcast/before": jump.before,
                "nowcast/after": jump.after,
                "nowcast/seconds": jump.seconds,
                "nowcast/reason": jump.reason,
                "step": jump.step,
            }
            state.log_history.append({k: x for k, x in found.items() if x is not None})
        self._told = self.core.made

    def show(self, evaluations: int) -> None:
        """Has the averages of a drift in the model for so many evaluations."""
        self._away.close()
        self._left = 0
        if evaluations and isinstance(self.core, Drifting) and self._handle is not None:
            self._away.enter_context(self.core.averaged())
            self._left = evaluations

    def shown(self) -> None:
        """Counts an evaluation."""
        if self._left == 0 and isinstance(self.core, Drifting) and self._handle is not None:
            warnings.warn(
                "trainer_callback: an evaluation was not of the averages; give evaluations=N if "
                "the trainer evaluates on N data sets in turn",
                UserWarning,
                stacklevel=2,
            )
        self._left = max(0, self._left - 1)
        if not self._left:
            self._away.close()

    def finish(self, *, averages: bool) -> None:
        self._away.close()
        if averages and isinstance(self.core, Drifting) and self._handle is not None:
            self.core.finish()
        self.end()

    def save(self, folder: Path, *, first: bool) -> None:
        if self.core is not None and (first or _part(self.core)):
            save(self.core.state_dict(), folder, _part(self.core))

    def end(self) -> None:
        self._away.close()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _part(core: Follower) -> str:
    """Suffix of this process's files, if each has its own."""
    if not any(in_parts(p) for p in core.module.parameters()):
        return ""
    return f"-{torch.distributed.get_rank():05d}"


# ------------------------------------------------------------------------ files


def save(state: Mapping[str, Any], folder: Path, part: str = "") -> None:
    """Writes the state of jumps as tensors and text; each file whole or not at all.

    Args:
        state: What `Follower.state_dict` gave.
        folder: Where to.
        part: Suffix of the files' names.
    """
    history = state["history"]
    tensors = {
        f"{i}/{name}": own_part(x).cpu().contiguous()
        for name, past in history["tensors"].items()
        for i, x in enumerate(past)
    }
    plain = {**state, "history": {**history, "tensors": sorted(history["tensors"])}}
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f".{NAME}{part}.part"
    save_file(tensors, fresh)
    fresh.replace(folder / f"{NAME}{part}.safetensors")
    fresh.write_text(json.dumps(plain, indent=1))
    fresh.replace(folder / f"{NAME}{part}.json")


def load(folder: str | os.PathLike[str], part: str = "") -> dict[str, Any] | None:
    """Reads what `save` wrote.

    Args:
        folder: Where from.
        part: Suffix of the files' names.

    Returns:
        The state, or None if there is none.

    Raises:
        NowcastError: If it cannot be read.
    """
    text = Path(folder) / f"{NAME}{part}.json"
    if not text.exists():
        return None
    try:
        state: dict[str, Any] = json.loads(text.read_text())
        found = load_file(text.with_suffix(".safetensors"))
        count = int(state["history"]["filled"])
        state["history"]["tensors"] = {
            name: [found[f"{i}/{name}"] for i in range(count)]
            for name in state["history"]["tensors"]
        }
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise NowcastError(
            message(
                f"trainer_callback: {text} cannot be read",
                got=f"{type(error).__name__}: {error}",
                help=f"remove it and {text.with_suffix('.safetensors').name} to begin anew",
            )
        ) from error
    return state
