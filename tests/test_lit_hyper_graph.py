"""Graph hypernetworks in training: random architectures, batches of images, a tiny fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from datasets_zoo.experiments.genotypes import (
    FAMILIES,
    LIMIT,
    REGIMES,
    GenotypeImages,
    genotype,
    pooled,
)
from datasets_zoo.images import standardised
from wspace.errors import HyperError, ZooError
from wspace.lit.hyper.graph import ParameterPrediction
from wspace.lit.task import Optimization
from wspace.testing import assert_close, assert_same

TINY = {"width": 16, "layers": 1, "heads": 2, "channels": 12, "hidden": 24}


def data(**options: Any) -> GenotypeImages:
    some = {"families": ["mlp", "cnn"], "genotypes": 5, "held_out": 2, "meta_batch": 2}
    some |= {"steps": 6, "judged": 60, "batch_size": 48, "tested": 1}
    return GenotypeImages("digits", **{**some, **options})


def trainer(epochs: int, **options: Any) -> Trainer:
    return Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip


def sizes(regime: str, **options: Any) -> list[int]:
    some = [genotype(i, regime, **options).architecture.module() for i in range(30)]
    return [sum(p.numel() for p in m.parameters()) for m in some]


def test_genotypes_are_their_seeds() -> None:
    assert genotype(3) == genotype(3) and genotype(3) != genotype(4)
    drawn = {r: [genotype(i, r) for i in range(60)] for r in REGIMES}
    assert {g.family for g in drawn["train"]} == set(FAMILIES)
    assert {g.family for g in drawn["family"]} == {"resnet"}
    known = {g.architecture for g in drawn["train"]} | {
        genotype(i).architecture for i in range(400)
    }
    for regime in REGIMES[1:]:
        assert not known & {g.architecture for g in drawn[regime]}
    assert all("norm" not in str(g.architecture) for g in drawn["train"] if g.family == "mlp")
    bare = [g.architecture.options["norm"] for g in drawn["bare"]]
    normed = [o["norm"] for g in drawn["train"] if "norm" in (o := g.architecture.options)]
    assert not any(bare) and all(normed)
    assert max(n for r in REGIMES for n in sizes(r)) <= LIMIT
    assert sum(sizes("wide")) > 2 * sum(sizes("train"))


def test_genotypes_run_on_their_images() -> None:
    for regime in REGIMES:
        g = genotype(1, regime, channels=3, side=16)
        module = g.architecture.module(device="cpu")
        assert module(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_unknown_regimes_are_refused() -> None:
    with pytest.raises(ZooError, match="expected train, between, wide"):
        genotype(0, "huge")


def test_pooled_images() -> None:
    images = standardised("digits")
    assert pooled(images, 1) is images
    half = pooled(images, 2)
    assert half.train_x.shape[1:] == (1, 4, 4)
    assert abs(float(half.train_x.mean())) < 1e-5
    assert float(half.train_x.std()) == pytest.approx(1, rel=1e-5)


def test_batches_are_drawn_by_step() -> None:
    loader: Any = data().train_dataloader()
    first = list(loader)
    loader.sampler.set_epoch(1)
    second, again = list(loader), list(loader)
    assert len(first) == len(second) == len(loader) == 6
    for a, b, c in zip(first, second, again, strict=True):
        assert_same(b.images, c.images)
        assert b.genotypes == c.genotypes and not torch.equal(a.images, b.images)
    put_aside = data().val_dataloader().dataset[0].images
    assert all(not (x == put_aside).flatten(1).all(1).any() for x in first[0].images)


def test_a_tiny_fit_learns_and_judges_every_regime(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = ParameterPrediction(TINY, penalty=1e-4, optimization=Optimization(lr=5e-3))
    made = data(steps=60, tested=1)
    run = trainer(1)
    before = float(trainer(1).validate(task, made, verbose=False)[0]["val/loss"])
    run.fit(task, made)
    after = {k: float(v) for k, v in run.callback_metrics.items()}
    assert after["val/loss"] < 0.95 * before and after["val/accuracy"] > 0.15
    found = run.test(task, made, verbose=False)[0]
    assert {f"test/accuracy_{r}" for r in made.regimes} < set(found)
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    again = ParameterPrediction(TINY)
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)
    again.load_state_dict(kept["state_dict"])
    batch = next(iter(made.val_dataloader()))
    for a, b in zip(
        task(batch.genotypes, batch.images), again(batch.genotypes, batch.images), strict=True
    ):
        assert_close(a.detach(), b.detach())


def test_several_architectures_at_once_are_each_alone() -> None:
    torch.manual_seed(0)
    task = ParameterPrediction(TINY).double()
    some = [genotype(i, side=8) for i in range(4)]
    x = torch.randn(9, 1, 8, 8, dtype=torch.float64)
    for together, g in zip(task(some, x), some, strict=True):
        assert_close(together.detach(), task([g], x)[0].detach())


def test_unknown_options_are_refused() -> None:
    with pytest.raises(HyperError, match="no such network"):
        ParameterPrediction({"depth": 3})
