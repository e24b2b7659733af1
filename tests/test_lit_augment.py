"""Augmentations in training: the data module, what tasks make of mixed targets, and YAML."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from test_lit import SMALL, Toys, checkpoints, equal, trainer
from torch.nn import functional as F

import wspace
from wspace.augment import (
    AlignedMixUp,
    Augment,
    Compose,
    MixUp,
    Noise,
    PermutedMixUp,
    Rotate,
    SelfMixUp,
    Symmetry,
    Translate,
)
from wspace.cli import main
from wspace.errors import SpaceMismatch, WSpaceError
from wspace.lit import (
    Classification,
    Contrastive,
    Editing,
    Optimization,
    Prediction,
    Task,
    ZooDataModule,
)
from wspace.lit.cli import TrainingCLI
from wspace.lit.metrics import rank_loss
from wspace.lit.nowcasting import Nowcasting
from wspace.zoo import build


@pytest.fixture(scope="module")
def zoos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("augmented")
    recipes = {
        "one": Toys(),
        "two": Toys(widths=(4, 5), count=96),
        "image": Toys(kind="siren", widths=(5,), count=48),
    }
    for name, recipe in recipes.items():
        build(recipe, root / name)
    return {name: root / name for name in recipes}


class Seen(Classification):
    """Keeps the batches that it is trained on."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.batches = [*getattr(self, "batches", []), batch]
        return super().training_step(batch, batch_idx)


def batches(path: Path, augment: list[Augment], **options: Any) -> list[Any]:
    seed_everything(0, verbose=False)
    task = Seen("StatNN", SMALL["StatNN"])
    data = ZooDataModule(path, batch_size=16, augment=augment, **options)
    trainer(1).fit(task, datamodule=data)
    return task.batches


# ---------------------------------------------------------------------------------- data


@pytest.mark.parametrize("mixed", [False, True])
def test_batches_carry_what_was_mixed(zoos: dict[str, Path], mixed: bool) -> None:
    plain = batches(zoos["two"], [], mixed=mixed)
    found = batches(zoos["two"], [MixUp()], mixed=mixed)
    assert len(plain[0].graphs) == (2 if mixed else 1)
    for before, after in zip(plain, found, strict=True):
        assert before.mixture is None and after.mixture is not None
        assert torch.equal(before.index, after.index)
        assert all(torch.equal(x, after.table[n]) for n, x in before.table.items())
        width = before.table["width"]
        assert torch.equal(width[after.mixture.rows], width[:, None].expand_as(after.mixture.rows))
        start = 0
        for a, b in zip(before.graphs, after.graphs, strict=True):
            rows = slice(start, start := start + a.batch[0])
            for name, x in a.values.items():
                pairs = x[after.mixture.rows[rows] - rows.start]
                w = after.mixture.shares[rows].to(x).reshape(*pairs.shape[:2], *[1] * (x.dim() - 1))
                torch.testing.assert_close(b.values[name], (w * pairs).sum(1))


def test_validation_is_not_augmented(zoos: dict[str, Path]) -> None:
    data = ZooDataModule(zoos["one"], batch_size=16, augment=[MixUp()])
    task = Seen("StatNN", SMALL["StatNN"])
    run = trainer(1)
    run.fit(task, datamodule=data)
    batch: Any = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    assert batch.mixture is None


def test_batches_move_with_their_mixture(zoos: dict[str, Path]) -> None:
    batch = batches(zoos["one"], [MixUp()])[0]
    for moved in (batch.to("cpu"), batch.to(torch.float64), batch.to(torch.device("cpu"))):
        assert torch.equal(moved.mixture.rows, batch.mixture.rows)
        assert moved.mixture.shares.dtype == torch.float64
    assert batch.to("meta").mixture.rows.is_meta


# --------------------------------------------------------------------------------- tasks


def loss_of(task: Task, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return task.loss(batch, "train")


def test_classification_mixes_cross_entropies(zoos: dict[str, Path]) -> None:
    seed_everything(0, verbose=False)
    task = Seen("StatNN", SMALL["StatNN"], smoothing=0.1)
    data = ZooDataModule(zoos["one"], batch_size=16, augment=[MixUp()])
    trainer(1).fit(task, datamodule=data)
    task.eval()
    batch = task.batches[0]
    with torch.no_grad():
        logits, labels = task(batch.graphs), batch.table["label"]
    partner, weight = batch.mixture.rows[:, 1], batch.mixture.shares[:, 0].float()
    assert bool((labels != labels[partner]).any())
    first, second = (
        F.cross_entropy(logits, y, reduction="none", label_smoothing=0.1)
        for y in (labels, labels[partner])
    )
    expected = (weight * first + (1 - weight) * second).mean()
    torch.testing.assert_close(loss_of(task, batch), expected)
    assert abs(float(first.mean() - expected)) > 1e-3


@pytest.mark.parametrize(("link", "loss"), [("sigmoid", "bce"), ("identity", "mse")])
def test_prediction_mixes_targets(zoos: dict[str, Path], link: str, loss: str) -> None:
    batch = batches(zoos["one"], [MixUp()])[0]
    task = Prediction("StatNN", SMALL["StatNN"], link=link, loss=loss, rank_weight=0.3)
    trainer(1).fit(task, datamodule=ZooDataModule(zoos["one"], batch_size=16, augment=[MixUp()]))
    task.eval()
    target = batch.table["test_accuracy"].float()
    shares = batch.mixture.shares.float()
    target = (shares * target[batch.mixture.rows]).sum(1)
    with torch.no_grad():
        scores = task(batch.graphs)[:, 0]
    spread = task.first["spread"]
    expected = (
        F.binary_cross_entropy_with_logits(scores, target)
        if loss == "bce"
        else F.mse_loss(task.predicted(scores) / spread, target / spread)
    ) + 0.3 * rank_loss(scores, target)
    torch.testing.assert_close(loss_of(task, batch), expected)


class Own(Classification):
    """A task that says nothing about mixed targets."""

    mixed_targets = False


def test_tasks_without_mixed_targets_refuse(zoos: dict[str, Path]) -> None:
    data = ZooDataModule(zoos["one"], batch_size=16, augment=[Compose([MixUp()])])
    for task in (Own("StatNN", SMALL["StatNN"]), Contrastive("StatNN", SMALL["StatNN"])):
        with pytest.raises(WSpaceError, match=r"(?s)no targets for mixed networks.*SelfMixUp"):
            trainer(1).fit(task, datamodule=data)
    with pytest.raises(WSpaceError, match="a mix of networks is a view of none"):
        Contrastive("StatNN", SMALL["StatNN"], augment=[Noise(), MixUp()])
    assert not Task.mixed_targets and not Nowcasting.mixed_targets
    data = ZooDataModule(zoos["one"], batch_size=16, augment=[SelfMixUp()])
    trainer(1).fit(Own("StatNN", SMALL["StatNN"]), datamodule=data)
    views: list[Augment] = [SelfMixUp(), Noise()]
    trainer(1).fit(Contrastive("StatNN", SMALL["StatNN"], augment=views), datamodule=data)


def test_editing_needs_no_targets(zoos: dict[str, Path]) -> None:
    task = Editing("NFN", SMALL["NFN"], side=6)
    data = ZooDataModule(zoos["image"], batch_size=16, augment=[Rotate(20), AlignedMixUp()])
    trainer(1).fit(task, datamodule=data)


def test_input_maps_refuse_other_networks(zoos: dict[str, Path]) -> None:
    small = wspace.trace(torch.nn.Conv2d(1, 2, 3), torch.zeros(1, 1, 5, 5))
    state = {p.name: torch.randn(4, *p.shape) for p in small.params}
    with pytest.raises(SpaceMismatch, match="no change of weights maps input 0"):
        Translate()(wspace.encode(small, state), torch.Generator())


def test_aligned_mixup_learns(zoos: dict[str, Path]) -> None:
    seed_everything(0, verbose=False)
    task = Classification("StatNN", optimization=Optimization(lr=1e-2))
    run = trainer(15)
    data = ZooDataModule(zoos["one"], batch_size=16, augment=[AlignedMixUp(bounds=(0.5, 1.0))])
    run.fit(task, datamodule=data)
    run.test(task, datamodule=data, verbose=False)
    assert run.callback_metrics["test/accuracy"] > 0.6


# --------------------------------------------------------------------- resuming, and YAML


def fitted(path: Path, folder: Path, resume: Path | None = None, **options: Any) -> Task:
    seed_everything(0, verbose=False)
    task = Classification("StatNN", SMALL["StatNN"], optimization=Optimization(lr=1e-2))
    augment: list[Augment] = [
        Compose([Symmetry(), Noise(0.1), PermutedMixUp(beta=0.4), AlignedMixUp()], [1, 0.5, 0.5, 1])
    ]
    data = ZooDataModule(path, batch_size=16, augment=augment)
    run = trainer(2, folder, callbacks=[checkpoints(folder, **options)])
    run.fit(task, datamodule=data, ckpt_path=None if resume is None else str(resume))
    return task


def test_resuming_equals_not_stopping(zoos: dict[str, Path], tmp_path: Path) -> None:
    whole = fitted(zoos["one"], tmp_path / "a", every_n_train_steps=3)
    (file, *_) = sorted((tmp_path / "a").glob("step*.safetensors"))
    assert equal(whole, fitted(zoos["one"], tmp_path / "b", file, every_n_train_steps=3))


class Parsed(TrainingCLI):
    """The command line, read and not run."""

    def _run_subcommand(self, subcommand: str) -> None:
        del subcommand


CONFIG = """
model:
  class_path: Classification
  init_args: {metanet: StatNN, options: {hidden: [8]}}
data:
  path: %s
  batch_size: 16
  augment:
    - class_path: wspace.augment.Compose
      init_args:
        augment:
          - class_path: wspace.augment.Rotate
            init_args: {degrees: 15, center: 0.1}
          - class_path: wspace.augment.Symmetry
            init_args: {kinds: [sign, permutation]}
        probabilities: [0.5, 1.0]
    - class_path: wspace.augment.AlignedMixUp
      init_args: {bounds: [0.5, 1.0], targets: nearest}
trainer:
  max_epochs: 1
  accelerator: cpu
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # lightning 2.6 with jsonargparse 4.53
def test_yaml(zoos: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text(CONFIG % zoos["image"], encoding="utf-8")
    words = ["fit", "--config", str(file), "--trainer.default_root_dir", str(tmp_path / "runs")]
    made: Any = Parsed(words).datamodule
    rotate, symmetry = Rotate(15, center=0.1), Symmetry(("sign", "permutation"))
    assert list(made.augment[0].augment) == [rotate, symmetry]
    assert made.augment[0].probabilities == [0.5, 1.0]
    assert made.augment[1] == AlignedMixUp((0.5, 1.0), targets="nearest")
    assert main(words) == 0
    (saved,) = (tmp_path / "runs").rglob("config.yaml")
    again: Any = Parsed(["fit", "--config", str(saved)]).datamodule
    assert again.augment == made.augment


def test_yaml_refuses_options_that_make_no_sense(
    zoos: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for old, new, match in (
        ("targets: nearest", "targets: best", "Literal"),
        ("degrees: 15", "angle: 15", "angle"),
        ("wspace.augment.Rotate", "wspace.augment.Turn", "Turn"),
    ):
        file = tmp_path / "some.yaml"
        file.write_text((CONFIG % zoos["image"]).replace(old, new), encoding="utf-8")
        assert main(["fit", "--config", str(file)]) == 2
        assert match in capsys.readouterr().err


def test_input_maps_in_training(zoos: dict[str, Path]) -> None:
    """The training networks of a batch show the mapped image."""
    plain, found = (
        batches(zoos["image"], augment)[0].graphs[0] for augment in ([], [Translate(0.3)])
    )
    changed = {n for n, x in plain.values.items() if not torch.equal(x, found.values[n])}
    assert changed == {"layers.0.bias"}
