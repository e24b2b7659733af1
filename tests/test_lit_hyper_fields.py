"""`Pixels` and `NeuralField`: what is read, that methods learn, the configuration, use as a zoo."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI

import wspace
from datasets_zoo.experiments.pixels import Pixels
from wspace.errors import HyperError, ZooError
from wspace.hyper.fields import radon
from wspace.lit import Checkpoints, SafeCheckpoints
from wspace.lit.checkpoint import read as read_checkpoint
from wspace.lit.hyper.fields import METHODS, NeuralField
from wspace.lit.task import Optimization
from wspace.testing import assert_close, assert_same
from wspace.zoo import Architecture, Cohort, InputSpec, build

CONFIG = Path(__file__).parent.parent / "configs" / "hyper" / "fields_mnist.yaml"
SMALL: dict[str, Any] = {
    "hidden": [12, 12],
    "omega": 8.0,
    "width": 16,
    "encoder": [32],
    "head_options": {"hidden": [32]},
    "steps": [0, 3],
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def pixels(**options: Any) -> Pixels:
    given: dict[str, Any] = {"share": 0.25, "validation": 40, "tests": 50, "batches": 60}
    data = Pixels(**{**given, "batch_size": 16, **options})
    data.setup()
    return data


def neural(method: str, **options: Any) -> NeuralField:
    optimization = Optimization(lr=3e-3, weight_decay=0.0)
    given = {**SMALL, "optimization": optimization, "inner_steps": 3, "step_lr": 3e-3}
    return NeuralField(method, **{**given, **options})


def trainer(folder: Path | None = None, **options: Any) -> Trainer:
    callbacks = [Checkpoints(dirpath=folder, filename="last")] if folder else []
    return Trainer(
        **{"max_epochs": 1, "gradient_clip_val": 1.0, **options},
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[SafeCheckpoints()],
    )


# --- what is read -----------------------------------------------------------------


def test_context_is_a_share_of_the_pixels() -> None:
    data = pixels(targets=30)
    batch = next(iter(data.train_dataloader()))
    assert batch.images.shape == (16, 64, 1) and 0 <= batch.images.min() <= batch.images.max() <= 1
    assert batch.readings.shape == (16, 16, 1) and batch.target_readings.shape == (16, 30, 1)
    for sensors, readings in (
        (batch.context, batch.readings),
        (batch.target, batch.target_readings),
    ):
        at = torch.cdist(sensors.coordinates, data.grid.expand(16, -1, -1)).argmin(-1)
        assert all(len(set(row.tolist())) == len(row) for row in at)
        assert_same(batch.images.gather(1, at[..., None]), readings)
    assert not torch.equal(batch.context.coordinates[0], batch.context.coordinates[1])


def test_training_differs_and_tests_do_not() -> None:
    data, again = pixels(), pixels()
    first = [batch.readings for batch in data.train_dataloader()]
    assert_same(first, [batch.readings for batch in again.train_dataloader()])
    assert not torch.equal(first[0], first[1])
    tests = [batch.readings for batch in data.test_dataloader()]
    assert_same(tests, [batch.readings for batch in data.test_dataloader()])
    assert sum(len(x) for x in tests) == 50
    assert len(data.parts["train"]) + len(data.parts["val"]) == 1297


def test_projections() -> None:
    data = pixels(sensors="radon", angles=4, target_angles=12)
    batch = next(iter(data.test_dataloader()))
    lines = radon(8, torch.arange(4) * (torch.pi / 4))
    assert_close(lines(batch.images), batch.readings)
    assert batch.target_readings.shape == (16, 12 * 8, 1)
    assert_close(lines.places, batch.context.places)


def test_wrong_data() -> None:
    with pytest.raises(ZooError, match="no multiple of 5"):
        Pixels(angles=5, target_angles=12)
    with pytest.raises(ZooError, match="share of 0"):
        Pixels(share=0.0)


# --- training ---------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_methods_beat_the_mean_image(method: str) -> None:
    data, task, t = pixels(batches=160), neural(method), trainer()
    t.fit(task, datamodule=data)
    found = t.test(task, datamodule=data, verbose=False)[0]
    mean = data.parts["train"].mean(0)
    error = (mean - data.parts["test"]).square().flatten(1).mean(1)
    assert set(found) == {"test/psnr_0", "test/psnr_3"}
    assert found["test/psnr_3"] > float(-10 * error.log10().mean())
    if method == "initial":
        assert found["test/psnr_3"] > found["test/psnr_0"] + 0.5


@pytest.mark.parametrize("options", [{"sensors": "radon"}, {}])
@pytest.mark.parametrize("method", ["weights", "modulation"])
def test_steps_lower_the_error_of_readings(method: str, options: dict[str, Any]) -> None:
    """Of weights and of vectors, seen through pixels and through lines."""
    data = pixels(**options)
    batch = next(iter(data.test_dataloader()))
    for on in ("weights", "vector"):
        places = 3 if options else 2
        task = neural(method, places=places, steps_on=on, init="residual", step_lr=1e-3)
        states = task.adapted(batch.context, batch.readings, (0, 5))
        errors = task._errors(batch.context, batch.readings)
        with torch.no_grad():
            before, after = (errors(dict(states[k])).mean() for k in (0, 5))
        assert after < before
        assert_close(dict(states[0]), dict(task.states(batch.context, batch.readings)))


def test_checkpoint_says_all(tmp_path: Path) -> None:
    data, task = pixels(batches=3), neural("weights")
    trainer(tmp_path, limit_val_batches=1).fit(task, datamodule=data)
    header, tensors = read_checkpoint(tmp_path / "last.safetensors")
    again = NeuralField(**header["hyper_parameters"])
    again.load_state_dict(tensors)
    batch = next(iter(data.test_dataloader()))
    assert_same(
        dict(task.states(batch.context, batch.readings)),
        dict(again.states(batch.context, batch.readings)),
    )


def test_wrong_options() -> None:
    with pytest.raises(HyperError, match="no such method"):
        neural("nerf")
    with pytest.raises(HyperError, match="steps_on='vector'"):
        neural("initial", steps_on="vector")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # lightning 2.6 with jsonargparse 4.53
def test_configuration_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fit"])  # Lightning warns of words of the process
    content = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    content["data"]["init_args"] |= {"dataset": "digits", "pool": 1, "targets": 32}
    content["trainer"] |= {
        "max_epochs": 1,
        "limit_train_batches": 2,
        "limit_val_batches": 1,
        "accelerator": "cpu",
        "devices": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    content["seed_everything"] = 0
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    cli = LightningCLI(
        save_config_callback=None,
        auto_configure_optimizers=False,
        args=["fit", "--config", str(file)],
    )
    assert isinstance(cli.model, NeuralField) and cli.trainer.global_step == 2
    assert cli.model.optimization.lr == 2e-3
    assert "val/psnr" in cli.trainer.callback_metrics


# --- a zoo ------------------------------------------------------------------------


@dataclass(frozen=True)
class Generated:
    """Fields that a hypernetwork makes of partly seen digits; the label is the digit's."""

    count: int = 24
    seed: int = 0
    cohorts: ClassVar[int] = 1

    def cohort(self, index: int) -> Cohort:
        data, task = pixels(), neural("weights", init="residual")
        rows = torch.arange(self.count)
        batch = data.observed("train", rows, torch.Generator().manual_seed(self.seed + index))
        with torch.no_grad():
            state = task.states(batch.context, batch.readings)
        options = {"sizes": [2, 12, 12, 1], "omega": 8.0}
        network = Architecture("wspace.hyper.fields:sine_field", options, (InputSpec((1, 2)),))
        return Cohort(network, dict(state), {"label": data.labels["train"][rows]})


def test_a_hypernetwork_makes_a_zoo(tmp_path: Path) -> None:
    recipe = Generated()
    zoo = build(recipe, tmp_path / "fields")
    made = recipe.cohort(0)
    space = made.architecture.space()
    graph = wspace.encode(space, made.state)
    assert tuple(graph.batch) == (24,) and len(zoo) == 24
    assert zoo.table["label"].tolist() == made.table["label"].tolist()
    module = made.architecture.module(device="cpu")
    module.load_state_dict({n: x[5] for n, x in made.state.items()})
    data, task = pixels(), neural("weights", init="residual")
    batch = data.observed("train", torch.arange(24), torch.Generator().manual_seed(0))
    with torch.no_grad():
        shown = task.shown(task.states(batch.context, batch.readings), data.grid)
        assert_close(shown[5], module(data.grid))
