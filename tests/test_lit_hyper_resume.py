"""A run that is stopped and resumed is the run that was not stopped, for every system."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
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
