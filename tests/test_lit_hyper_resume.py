"""A run that is stopped and resumed is the run that was not stopped, for every system."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, Trainer, seed_everything

from datasets_zoo.experiments import (
    Clients,
    Episodes,
    GenotypeImages,
    ImageData,
    Pixels,
    SplitTasks,
    TextData,
)
from wspace.errors import HyperError
from wspace.lit.checkpoint import SafeCheckpoints
from wspace.lit.hyper import (
    CharacterModel,
    Continual,
    Federated,
    FewShot,
    HyperClassifier,
    HyperTask,
    NeuralField,
    ParameterPrediction,
)
from wspace.testing import assert_same

Parts = tuple[HyperTask, LightningDataModule]
MLP = {"inputs": 64, "hidden": [12]}


def static() -> Parts:
    model = HyperClassifier(
        "datasets_zoo.architectures:mlp", MLP, head="ChunkedHead", head_options={"chunk": 200}
    )
    return model, ImageData("digits", batch_size=64, validation=97, limit=192, pad=1, flip=True)


def continual(method: str = "chunked", **options: Any) -> Parts:
    head = {"chunk": 200, "hidden": [8]} if method == "chunked" else None
    model = Continual(target_options=MLP, method=method, head_options=head, **options)
    return model, SplitTasks("digits", batch_size=16, steps=3, epochs=2)


def fewshot() -> Parts:
    model = FewShot("srwm", image=[1, 8, 8], width=16, layers=1, heads=2)
    return model, Episodes("digits", batch_size=4, batches=3)


def federated() -> Parts:
    model = Federated("pefll", clients=4, kernels=2, taps=3, head=(8,), examples=8)
    return model, Clients("digits", seen=4, unseen=2, per_round=2, rounds=3, examples=20)


def text() -> Parts:
    data = TextData("zen", batch_size=4, length=16)
    data.setup("fit")
    return CharacterModel(data.vocabulary, "hyper_lstm", hidden_size=8, hyper_size=4), data


def graph() -> Parts:
    network = {"width": 16, "layers": 1, "heads": 2, "channels": 8, "hidden": 16}
    model = ParameterPrediction(network)
    return model, GenotypeImages("digits", steps=3, meta_batch=2, batch_size=16, genotypes=8)


def fields() -> Parts:
    return NeuralField(), Pixels("digits", batch_size=4, batches=3)


SYSTEMS: dict[str, Callable[[], Parts]] = {
    "static": static,
    "continual": continual,
    "continual-subset": lambda: continual(subset=1),
    "continual-ewc": lambda: continual("ewc", fisher=40),
    "fewshot": fewshot,
    "federated": federated,
    "text": text,
    "graph": graph,
    "fields": fields,
}


@pytest.fixture(autouse=True)
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lightning's advice
        yield


def fit(parts: Parts, folder: Path, epochs: int, ckpt: Path | None = None) -> HyperTask:
    seed_everything(3)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1,
        log_every_n_steps=1,
        plugins=[SafeCheckpoints()],
        default_root_dir=folder,
    )
    trainer.fit(parts[0], datamodule=parts[1], ckpt_path=ckpt)
    trainer.save_checkpoint(folder / f"{epochs}.safetensors")
    return parts[0]


@pytest.mark.parametrize("name", SYSTEMS)
def test_resumed_is_not_stopped(name: str, tmp_path: Path) -> None:
    def made() -> Parts:
        seed_everything(1)
        model, data = SYSTEMS[name]()
        model.optimization = type(model.optimization)(warmup=0.0, last=1.0, lr=1e-3, weight_decay=0)
        return model, data

    whole = fit(made(), tmp_path / "whole", 3)
    fit(made(), tmp_path / "parts", 1)
    torch.randn(100)  # what others draw in between does not matter
    again = fit(made(), tmp_path / "parts", 3, tmp_path / "parts" / "1.safetensors")
    assert_same(dict(again.state_dict()), dict(whole.state_dict()))
    other = fit(made(), tmp_path / "other", 2)  # control: another length is another run
    assert any(
        not torch.equal(x, whole.state_dict()[n])
        for n, x in other.state_dict().items()
        if n in whole.state_dict()
    )


# ------------------------------------------------------------------- what training may see


def rows_in(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many rows of `a` are rows of `b`, bit by bit."""
    known = {x.numpy().tobytes() for x in b}
    return sum(x.numpy().tobytes() in known for x in a)


def test_training_sees_no_image_that_was_put_aside() -> None:
    genotypes = GenotypeImages("digits", steps=2, meta_batch=1, genotypes=4, judged=200)
    genotypes.setup()
    (x, _), (aside, _) = genotypes._parts()
    assert len(aside) == 200
    episodes = Episodes("digits", batch_size=4, batches=3)
    episodes.setup()
    pools = {part: pool.images for part, pool in episodes.pools.items()}
    pairs = {
        "genotypes": (aside, x),
        "genotypes, test": (genotypes.images.test_x, x),
        "episodes": (pools["val"], pools["train"]),
        "episodes, test": (pools["test"], pools["train"]),
        "episodes, held out": (pools["held_out"], pools["train"]),
    }
    for name, (judged, trained) in pairs.items():
        assert len(judged) and len(trained), name
        assert rows_in(judged, trained) == 0, name
    assert rows_in(x[:5], x) == 5  # the count finds what is there


def test_configured_choices_are_not_made_on_test_images() -> None:
    root = Path(__file__).parent.parent / "configs" / "hyper"
    for file in sorted(root.glob("continual_*.yaml")):
        options = yaml.safe_load(file.read_text())["data"]["init_args"]
        data = SplitTasks(**{**options, "name": "digits"})
        data.setup("fit")
        for val, test in zip(data.parts["val"], data.parts["test"], strict=True):
            assert rows_in(val[0], test[0]) == 0


def test_federated_options_are_checked() -> None:
    with pytest.raises(HyperError, match=r"descriptor 'imagez'(.|\n)*clip -1"):
        Federated("pefll", clients=4, kernels=2, taps=3, descriptor="imagez", clip=-1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", ["srwm", "fake_sr", "delta_net"])
def test_fast_weights_leave_autocast(layer: str) -> None:
    model = FewShot(layer, image=[1, 8, 8], width=16, layers=1, heads=2)
    data = Episodes("digits", batch_size=4, batches=1)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.training_step(batch, 0)
    loss.backward()
    assert loss.isfinite()
