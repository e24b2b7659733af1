"""`NeuralField`: fields from partial observations, by a hypernetwork or from initial weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from wspace.action import State
from wspace.errors import HyperError, message
from wspace.hyper import HyperNetwork
from wspace.hyper.fields import (
    InitialField,
    PixelSensors,
    SensorEncoder,
    Sensors,
    SineField,
    gaussian_nll,
    psnr,
    read,
    refine,
)
from wspace.lit.data import stream
from wspace.lit.hyper.named import head_named
from wspace.lit.hyper.task import HyperTask
from wspace.lit.task import Optimization

METHODS = ("weights", "modulation", "initial")


class NeuralField(HyperTask):
    """Images from few readings; batches as of `datasets_zoo.experiments.pixels.Observed`.

    Args:
        method: ``"weights"``: a hypernetwork makes all weights of the field; ``"modulation"``: it
            scales and shifts the units of a field that is trained with it; ``"initial"``: initial
            weights are learned, and steps on the context adapt them.
        channels: Of the images.
        hidden: Widths of the field's hidden layers.
        omega: Frequency of its sines.
        places: Numbers that tell sensors apart: 2 for pixels, 3 for lines.
        width: Length of the vector of a set of readings.
        encoder: Widths of the layers of the encoder.
        head: Head of ``"weights"``, by name.
        head_options: Its options; of `FiLMHead` for ``"modulation"``.
        init: As for `HyperNetwork`, around the base's initial weights, which are trained too.
        scale: As for `HyperNetwork`.
        rule: ``"reptile"`` or ``"maml"``, for ``"initial"``.
        inner_steps: Steps of ``"initial"`` in training.
        steps: Numbers of steps at test time after which images are judged.
        step_lr: Rate of these steps, and of inner ones.
        steps_on: What they change: the field's ``"weights"``, or the ``"vector"`` of the readings.
        optimization: Optimiser and learning rate.
        seed: Decides initial weights.

    Raises:
        HyperError: If the method is unknown, or has no vector to change.

    Attributes:
        field: The field; its own weights are not used.
        hyper: The hypernetwork; None for ``"initial"``.
        initial: Initial weights; None for the others.
        log_sigma: Logarithm of the sensors' noise, learned.
    """

    monitor: ClassVar[tuple[str, str]] = ("val/psnr", "max")

    def __init__(
        self,
        method: str = "weights",
        *,
        channels: int = 1,
        hidden: Sequence[int] = (32, 32),
        omega: float = 30.0,
        places: int = 2,
        width: int = 64,
        encoder: Sequence[int] = (128, 128),
        head: str = "PerTensorHead",
        head_options: dict[str, Any] | None = None,
        init: str = "bias",
        scale: float = 1.0,
        rule: Literal["reptile", "maml"] = "maml",
        inner_steps: int = 5,
        steps: Sequence[int] = (0, 1, 3, 10, 30),
        step_lr: float = 1e-3,
        steps_on: Literal["weights", "vector"] = "weights",
        optimization: Optimization | dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        given = optimization if isinstance(optimization, dict) else None
        super().__init__(
            Optimization(**given) if given else cast("Optimization | None", optimization)
        )
        _check(method, steps_on)
        plain = {k: v for k, v in locals().items() if k not in {"self", "given", "__class__"}}
        plain |= {"optimization": asdict(self.optimization)}
        self.save_hyperparameters(
            {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}
        )
        self.method, self.steps, self.step_lr = method, tuple(steps), step_lr
        self.steps_on, self.inner_steps = steps_on, inner_steps
        self.field = SineField((2, *hidden, channels), omega)
        self.field.draw(stream(seed, 0))
        self.hyper: HyperNetwork | None = None
        self.initial: InitialField | None = None
        self.log_sigma = nn.Parameter(torch.tensor(-2.0))
        if method == "initial":
            self.initial = InitialField(self.field, inner_steps, step_lr, rule)
            self.log_sigma.requires_grad_(False)  # steps need no scale
        else:
            self.hyper = _hypernetwork(self.field, plain)
        self.field.requires_grad_(False)

    # ------------------------------------------------------------------------- fields

    def states(self, sensors: Sensors, readings: Tensor) -> State:
        """The weights of the fields of several images, before any step.

        Args:
            sensors: What read the images.
            readings: What they read, ``(B, m, channels)``.

        Returns:
            ``(B, *shape)`` by name: states of the field, for `wspace.encode` or a zoo.
        """
        if self.hyper is not None:
            return self.hyper((sensors.places, readings))
        assert self.initial is not None
        return self.initial.states(len(readings))

    def adapted(
        self, sensors: Sensors, readings: Tensor, steps: Sequence[int] = (0,)
    ) -> Mapping[int, State]:
        """The weights after steps on the readings.

        Args:
            sensors: What read the images.
            readings: What they read, ``(B, m, channels)``.
            steps: Numbers of steps of interest.

        Returns:
            States by number of steps.
        """
        with torch.inference_mode(False), torch.no_grad():
            # what a loader made in inference mode cannot be differentiated through
            sensors, readings = tree_map_only(Tensor, Tensor.clone, (sensors, readings))
            error = self._errors(sensors, readings)
            if self.steps_on == "weights":
                start = self.states(sensors, readings)
                return refine(error, start, max(steps), self.step_lr, steps)
            hyper = cast(HyperNetwork, self.hyper)
            start = {"vector": hyper.embed((sensors.places, readings))}
            found = refine(
                lambda now: error(hyper.generate_from(now["vector"])),
                start,
                max(steps),
                self.step_lr,
                steps,
            )
            return {k: hyper.generate_from(x["vector"]) for k, x in found.items()}

    def _errors(self, sensors: Sensors, readings: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
        """Mean squared error of each image's readings, as a function of its weights."""
        return lambda states: (
            (read(self.field, states, sensors) - readings).square().flatten(1).mean(1)
        )

    def shown(self, states: State, grid: Tensor) -> Tensor:
        """What fields show.

        Args:
            states: ``(B, *shape)`` by name.
            grid: Coordinates of pixels, ``(points, 2)``.

        Returns:
            ``(B, points, channels)``.
        """
        return read(self.field, states, PixelSensors(grid))

    # -------------------------------------------------------------------------- steps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Log-likelihood of target readings; for initial weights, their rule.

        Args:
            batch: An `Observed`.
            batch_idx: Not used.

        Returns:
            The loss.
        """
        del batch_idx
        if self.hyper is not None:
            made = self.hyper.generate((batch.context.places, batch.readings))
            mean = read(self.field, made, batch.target)
            loss = gaussian_nll(mean, batch.target_readings, self.log_sigma).mean()
            self.log_all({"loss": loss.detach()}, "train", len(batch.images))
            return loss
        assert self.initial is not None
        outer = self._errors(batch.target, batch.target_readings)
        few = self._errors(batch.context, batch.readings)
        inner = outer if self.initial.rule == "reptile" else few
        return self.initial.loss(inner, outer, len(batch.images))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """PSNR as made, or after inner steps.

        Args:
            batch: An `Observed`.
            batch_idx: Not used.
        """
        del batch_idx
        after = self.inner_steps if self.initial is not None else 0
        found = self.judged(batch, (after,))
        self.log_all({"psnr": found[after].mean()}, "val", len(batch.images))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """PSNR after 0, 1, … steps at test time.

        Args:
            batch: An `Observed`.
            batch_idx: Not used.
        """
        del batch_idx
        found = self.judged(batch, self.steps)
        named = {f"psnr_{k}": x.mean() for k, x in found.items()}
        self.log_all(named, "test", len(batch.images))

    def judged(self, batch: Any, steps: Sequence[int]) -> dict[int, Tensor]:
        """PSNR of whole images, ``(B,)``, by number of steps on the context.

        Args:
            batch: An `Observed`.
            steps: Numbers of steps.

        Returns:
            Decibels.
        """
        states = self.adapted(batch.context, batch.readings, steps)
        with torch.no_grad():
            return {k: psnr(self.shown(states[k], batch.grid), batch.images) for k in steps}


def _hypernetwork(field: SineField, o: dict[str, Any]) -> HyperNetwork:
    """The hypernetwork that options say, around the field's initial weights."""
    channels = field.layers[-1].get_parameter("weight").shape[0]
    drawn = (stream(o["seed"], 1), stream(o["seed"], 2))
    name = "FiLMHead" if o["method"] == "modulation" else o["head"]
    return HyperNetwork(
        field,
        SensorEncoder(o["places"], channels, o["width"], o["encoder"], generator=drawn[0]),
        head_named(name, o["head_options"]),
        "trained",
        init=o["init"],
        scale=o["scale"],
        generator=drawn[1],
    )


def _check(method: str, steps_on: str) -> None:
    if method not in METHODS or (method == "initial" and steps_on == "vector"):
        raise HyperError(
            message(
                "NeuralField: no such method",
                expected=f"{', '.join(METHODS)}; steps_on='vector' not with 'initial'",
                got=f"{method!r}, steps_on={steps_on!r}",
            )
        )
