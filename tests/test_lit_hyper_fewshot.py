"""`FewShot`: what an answer depends on, that it learns, and its configuration."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from datasets_zoo.experiments.episodes import Episode, Episodes
from wspace.cli import main
from wspace.errors import HyperError
from wspace.lit.hyper.fewshot import LAYERS, FewShot
from wspace.lit.hyper.loading import load_hyper
from wspace.testing import assert_close

CONFIG = Path(__file__).parent.parent / "configs" / "hyper" / "srwm_fewshot.yaml"
SMALL: dict[str, Any] = {"width": 16, "heads": 2, "layers": 2, "features": 12}


@pytest.fixture(autouse=True)
def quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def episodes(**options: Any) -> Episodes:
    data = Episodes(**{"ways": 3, "shots": 2, "batch_size": 6, **options})
    data.setup()
    return data


def trainer(**options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def renamed(e: Episode) -> Episode:
    """The same images, shown with other labels; the query's dummy stays."""
    labels = (e.labels + 1) % 3
    labels[:, -1] = 0
    return e._replace(labels=labels)


@pytest.mark.parametrize("layer", LAYERS)
def test_only_fake_answers_without_looking_at_labels(layer: str) -> None:
    """Why it is at chance where labels are drawn anew, and the others need not be."""
    model, e = FewShot(layer, **SMALL).double().eval(), episodes().batch("train", 0, 0)
    images = e.images.double()
    with torch.no_grad():
        one = model(images, e.labels)[:, -1]
        two = model(images, renamed(e).labels)[:, -1]
    if layer == "fake_sr":
        assert_close(one, two)
        shuffled = images.flip(1)
        shuffled[:, -1] = images[:, -1]
        assert_close(one, model(shuffled, e.labels)[:, -1].detach())  # nor at any other image
    else:
        assert float((one - two).abs().max()) > 1e-6 * float(one.abs().max())


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("extractor", ["conv", "linear"])
def test_every_used_weight_gets_a_gradient(layer: str, extractor: str) -> None:
    model = FewShot(layer, extractor=extractor, **SMALL)
    e = episodes().batch("train", 0, 0)
    model._values(e)["loss"].backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []
    if layer == "fake_sr":
        unused = [p.grad for name, p in model.named_parameters() if name.endswith("cell.weight")]
        assert all(not bool(g[:, 8:].any()) and bool(g[:, :8].any()) for g in unused)


def test_loss_is_that_of_the_query() -> None:
    model, e = FewShot(**SMALL).eval(), episodes().batch("val", 0, 0)
    values = model._values(e)
    logits = model(e.images, e.labels)
    assert logits.shape == (6, 7, 3)
    right = [int(row.argmax()) == int(t) for row, t in zip(logits[:, -1], e.target, strict=True)]
    assert_close(torch.tensor(sum(right) / 6), values["accuracy"])
    picked = logits[:, -1].log_softmax(-1).gather(1, e.target[:, None])
    assert_close(-picked.mean().detach(), values["loss"].detach())


def test_wrong_options_are_refused() -> None:
    with pytest.raises(HyperError, match="no such layer"):
        FewShot("gru")
    with pytest.raises(HyperError, match="no such extractor"):
        FewShot(extractor="vit")
    with pytest.raises(HyperError, match="an LSTM has no options"):
        FewShot("lstm", options={"beta_init": 0.0})
    with pytest.raises(HyperError, match="options of delta_net"):
        FewShot("delta_net", options={"beta_init": 0.0})


def fitted(layer: str, *, permute: bool, epochs: int) -> dict[str, float]:
    """Test accuracies after a training."""
    seed_everything(3, verbose=False)
    data = Episodes(
        ways=3, shots=3, permute=permute, held_out=(7, 8, 9), batches=100, eval_batches=10
    )
    model = FewShot(layer, extractor="linear", width=32, heads=2, layers=2, features=32)
    model.optimization = model.optimization.__class__(lr=5e-3, weight_decay=0.0)
    t = trainer(max_epochs=epochs, limit_val_batches=0, gradient_clip_val=1.0)
    t.fit(model, data)
    found = t.test(model, data, verbose=False)[0]
    assert set(found) == {
        f"test/{m}_{k}" for m in ("loss", "accuracy") for k in ("held_out", "seen")
    }
    return found


def test_a_tiny_fit_runs_and_logs() -> None:
    found = fitted("srwm", permute=True, epochs=0)
    assert torch.isfinite(torch.tensor(list(found.values()))).all()


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["srwm", "delta_net"])
def test_labels_are_learned_from_the_episode(layer: str) -> None:
    found = fitted(layer, permute=True, epochs=12)
    assert found["test/accuracy_seen"] > 0.7


@pytest.mark.slow
def test_fake_is_at_chance_unless_labels_stay() -> None:
    """320 episodes of three labels: four standard deviations around a third."""
    found = fitted("fake_sr", permute=True, epochs=4)
    assert abs(found["test/accuracy_seen"] - 1 / 3) < 0.106
    assert fitted("fake_sr", permute=False, epochs=4)["test/accuracy_seen"] > 0.5


def test_configuration_runs_and_its_checkpoint_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fast = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2")
    fast += ("--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1")
    fast += ("--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1")
    config = ("--config", str(CONFIG), *fast)
    assert main(["fit", *config]) == 0, capsys.readouterr().err
    file = Path("runs/srwm_fewshot/version_0/checkpoints/last.safetensors")
    model = load_hyper(file)
    assert isinstance(model, FewShot) and model.optimization.lr == 3e-3
    e = episodes().batch("val", 0, 0)
    assert model(e.images, e.labels).shape == (6, 7, 3)
    assert main(["test", *config, "--ckpt_path", str(file)]) == 0
    assert "test/accuracy_held_out" in capsys.readouterr().out
