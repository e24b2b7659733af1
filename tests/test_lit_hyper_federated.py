"""`Clients` and `Federated`: who owns what, that methods learn, checkpoints, the configuration."""

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI

from datasets_zoo.experiments.clients import Clients, Rounds
from datasets_zoo.images import standardised
from wspace.errors import HyperError, ZooError
from wspace.hyper.federated import LocalTraining, PeFLL, descriptors
from wspace.lit import Checkpoints, SafeCheckpoints
from wspace.lit.checkpoint import read
from wspace.lit.hyper.federated import METHODS, Federated
from wspace.lit.task import Optimization
from wspace.testing import assert_close, assert_same

CONFIG = Path(__file__).parent.parent / "configs" / "hyper" / "pefll.yaml"
FAST = LocalTraining(steps=5, lr=0.05, batch_size=8)


@pytest.fixture(autouse=True)
def quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def clients(**options: Any) -> Clients:
    data = Clients(**{"seen": 6, "unseen": 2, "per_round": 3, "rounds": 10, **options})
    data.setup()
    return data


def federated(method: str, **options: Any) -> Federated:
    given: dict[str, Any] = {
        "clients": 6,
        "kernels": 2,
        "local": FAST,
        "taps": 3,
        "tune": 5,
        "new_rounds": 3,
    }
    given |= {"optimization": Optimization(lr=3e-3, weight_decay=0.0), "width": 8, "head": [24]}
    return Federated(method, **{**given, **options})


def trainer(epochs: int = 1, folder: Path | None = None) -> Trainer:
    callbacks = [Checkpoints(dirpath=folder, filename="last")] if folder else []
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[SafeCheckpoints()],
    )


# --- clients ----------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"classes_per_client": 3}, {"alpha": 0.5}])
def test_no_image_has_two_owners(options: dict[str, Any]) -> None:
    data = clients(**options)
    whole = standardised("digits")
    for parts, x in ((("train", "val"), whole.train_x), (("test",), whole.test_x)):
        owned = torch.cat([getattr(c, p).x for c in data.clients for p in parts])
        assert len(owned) == len(x)
        assert_same(owned.flatten(1).sort(0).values, x.flatten(1).sort(0).values)


def test_clients_know_their_classes() -> None:
    data = clients(seen=15, unseen=5, per_round=5)
    shares = torch.stack([c.shares(10) for c in data.clients])
    assert ((shares > 0).sum(1) == 2).all()
    assert ((shares > 0).sum(0) == 4).all()  # 20 clients, 2 of 10 classes: 4 each
    for c in data.clients:
        known = set(c.train.y.tolist())
        assert set(c.val.y.tolist()) | set(c.test.y.tolist()) <= known


def test_a_small_alpha_makes_clients_differ() -> None:
    def largest(alpha: float) -> float:
        shares = [c.shares(10).max() for c in clients(alpha=alpha).clients]
        return float(torch.stack(shares).mean())

    assert largest(0.1) > largest(1.0) > largest(100.0)


def test_seed_decides() -> None:
    one, same, other = clients(seed=1), clients(seed=1), clients(seed=2)
    for a, b in zip(one.clients, same.clients, strict=True):
        assert torch.equal(a.train.x, b.train.x) and torch.equal(a.test.y, b.test.y)
    assert [len(c.train.y) for c in one.clients] != [len(c.train.y) for c in other.clients]
    assert all(len(c.train.y) + len(c.val.y) <= 20 for c in clients(examples=20).clients)


def test_images_are_averaged() -> None:
    whole, small = clients().clients[3], clients(pool=2).clients[3]
    assert_close(whole.test.x.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)), small.test.x)


def test_rounds() -> None:
    rounds = Rounds(6, 3, 10, seed=4)
    first = list(rounds)
    assert len(first) == len(rounds) == 10
    assert all(len(set(r)) == 3 and max(r) < 6 for r in first)
    rounds.set_epoch(1)
    assert list(rounds) != first
    rounds.set_epoch(0)
    assert list(rounds) == first


def test_wrong_clients() -> None:
    with pytest.raises(ZooError, match="too few images"):
        clients(seen=700, unseen=0)
    with pytest.raises(ZooError, match="classes_per_client"):
        clients(classes_per_client=11)
    with pytest.raises(ZooError, match="a round needs clients"):
        clients(per_round=7)


# --- training ---------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_methods_learn(method: str) -> None:
    """Every method ends far above the chance of one in ten, and reports both kinds of clients."""
    task, data, t = federated(method), clients(), trainer(3)
    t.fit(task, datamodule=data)
    found = {k: v for part in t.test(task, datamodule=data, verbose=False) for k, v in part.items()}
    kinds = ("accuracy", "tuned", "accuracy_masked", "tuned_masked")
    assert set(found) == {f"test/{who}_{k}" for who in ("seen", "unseen") for k in kinds}
    assert found["test/seen_tuned"] > 0.6
    assert all(found[f"test/{w}_accuracy_masked"] >= found[f"test/{w}_accuracy"]
               for w in ("seen", "unseen"))  # fmt: skip
    assert (task.traffic == (0, 0)) == (method == "local")


def test_runs_are_equal_and_seeds_are_not() -> None:
    def trained(seed: int) -> dict[str, torch.Tensor]:
        task = federated("pefll", seed=seed)
        trainer().fit(task, datamodule=clients(rounds=2))
        return task.state_dict()

    once = trained(0)
    assert_same(once, trained(0))
    with pytest.raises(AssertionError):
        assert_same(once, trained(1))


def test_checkpoint_keeps_scale_and_options(tmp_path: Path) -> None:
    task, data = federated("pefll"), clients()
    trainer(1, tmp_path).fit(task, datamodule=data)
    header, tensors = read(tmp_path / "last.safetensors")
    again = Federated(**header["hyper_parameters"])
    assert again.local == task.local and again.optimization.lr == task.optimization.lr
    again.load_state_dict(tensors)
    method = again.method
    assert isinstance(method, PeFLL)
    with torch.no_grad():
        v = descriptors(method.describe, data.clients)
        one, two = method.server.weights(v), task.method.personal(data.clients, None, FAST)
    assert_same(one, two)
    assert float(method.server.hyper.state_dict()["condition.deviation"]) != 1


def test_wrong_options() -> None:
    with pytest.raises(HyperError, match="got method 'fedprox'"):
        federated("fedprox")
    with pytest.raises(HyperError, match="clients of 5") as caught:
        trainer().fit(federated("pefll"), datamodule=clients(seen=5))
    assert "6 clients" in str(caught.value)
    task = federated("pefll", local=LocalTraining(steps=50, lr=1e6, clip=None, momentum=0.99))
    with pytest.raises(HyperError, match="not finite"):
        trainer().fit(task, datamodule=clients())
    with pytest.raises(HyperError, match="no clients"):
        trainer().test(federated("pefll"), dataloaders=[torch.tensor([0])], verbose=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # lightning 2.6 with jsonargparse 4.53
def test_configuration_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fit"])  # Lightning warns of words of the process
    content = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    content["trainer"] |= {
        "max_epochs": 1,
        "limit_train_batches": 2,
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
    assert isinstance(cli.model, Federated) and cli.trainer.global_step == 2
    assert cli.model.local == LocalTraining(steps=15, lr=0.03, batch_size=16)
    assert "val/accuracy" in cli.trainer.callback_metrics
