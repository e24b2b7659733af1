"""`HyperClassifier` and `ImageData`: what a step trains, and what the data is."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from torch.nn import functional as F

from datasets_zoo.experiments.images import ImageData, moved_about
from datasets_zoo.images import standardised
from wspace.errors import HyperError, ZooError
from wspace.hyper import HyperNetwork
from wspace.lit.hyper.classify import HyperClassifier
from wspace.lit.hyper.named import head_named
from wspace.testing import assert_close, assert_same

CONFIGS = Path(__file__).parent.parent / "configs" / "hyper"
SMALL: dict[str, Any] = {
    "target": "datasets_zoo.architectures:cnn",
    "target_options": {"channels": 1, "widths": [4, 6]},
    "head_options": {"embedding": 3, "basic": [4, 6]},
    "select": ["2.weight"],
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


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


# --- data -----------------------------------------------------------------------------------------


def digits(**options: Any) -> ImageData:
    data = ImageData("digits", **{"batch_size": 50, "validation": 97, **options})
    data.setup("fit")
    return data


def test_parts_are_disjoint_and_all() -> None:
    data = digits()
    train, val = data.parts["train"][0], data.parts["val"][0]
    assert (len(train), len(val), len(data.parts["test"][0])) == (1200, 97, 500)
    both = torch.cat([train, val]).flatten(1)
    given = standardised("digits").train_x.flatten(1)
    assert_same(both[both.sum(1).argsort()].sum(1), given[given.sum(1).argsort()].sum(1))


def test_a_share_and_a_limit() -> None:
    data = digits(validation=0.25, limit=100)
    assert [len(data.parts[p][1]) for p in ("train", "val")] == [100, 324]


@pytest.mark.parametrize("options", [{"validation": 1297}, {"validation": -1}, {"limit": 5000}])
def test_more_than_there_are(options: dict[str, Any]) -> None:
    with pytest.raises(ZooError, match="validation|limit"):
        digits(**options)


def test_seed_says_the_batches() -> None:
    def labels(seed: int) -> list[list[int]]:
        return [y.tolist() for _, y in digits(seed=seed).train_dataloader()]

    assert labels(3) == labels(3)
    assert labels(3) != labels(4)
    assert sorted(sum(labels(3), [])) == sorted(digits(seed=3).parts["train"][1].tolist())


def test_crops_are_shifts(generator: torch.Generator) -> None:
    """Every crop is one of the (2 pad + 1)² shifts into zeros, or its mirror image."""
    x = torch.randn(40, 2, 4, 5, generator=generator)
    made = moved_about(x, 1, flip=True, generator=generator)
    framed = F.pad(torch.cat([x, x.flip(3)]), (1,) * 4)
    places = {0: 0, 1: 0}
    for i in range(40):
        found = [
            (k, r, c)
            for k in (0, 1)
            for r in range(3)
            for c in range(3)
            if torch.equal(made[i], framed[i + 40 * k, :, r : r + 4, c : c + 5])
        ]
        assert found, i
        places[found[0][0]] += 1
    assert min(places.values()) > 8  # about half are mirrored


class Seeing(HyperClassifier):
    """Notes the images of every step."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.trained = batch[0]
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated = batch[0]
        super().validation_step(batch, batch_idx)


def test_only_training_batches_are_moved() -> None:
    data, model = digits(pad=1), Seeing(**SMALL)
    trainer(max_epochs=1, limit_train_batches=1).fit(model, datamodule=data)
    known = {tuple(x.flatten().tolist()) for x in data.parts["train"][0]}
    assert len([x for x in model.trained if tuple(x.flatten().tolist()) not in known]) > 25
    assert_same(model.validated, data.parts["val"][0])


# --- module ---------------------------------------------------------------------------------------


def test_step_is_the_plain_step_with_made_kernels(float64: None) -> None:
    """The loss is that of the plain network with these kernels, and so are shared gradients."""
    model = HyperClassifier(**SMALL)
    model.log_all = lambda *_: None  # type: ignore
    x, y = torch.randn(7, 1, 8, 8), torch.randint(10, (7,))
    assert isinstance(model.network, HyperNetwork)
    plain = HyperClassifier(**SMALL, method="plain").network
    model.network.write_to(plain)
    loss = model.training_step((x, y), 0)
    expected = F.cross_entropy(plain(x), y)
    assert_close(loss, expected)
    loss.backward()
    expected.backward()
    shared = dict(model.network.target.named_parameters())
    assert set(shared) == {n for n, _ in plain.named_parameters()} - {"2.weight"}
    for name, p in plain.named_parameters():
        if name in shared:
            assert_close(shared[name].grad, p.grad)
    assert all(
        p.grad is not None and p.grad.abs().max() > 0 for p in model.network.head.parameters()
    )


def test_decay_is_of_what_is_made(float64: None) -> None:
    torch.manual_seed(1)
    one, other = HyperClassifier(**SMALL), HyperClassifier(**SMALL, decay_made=0.5)
    other.load_state_dict(one.state_dict())
    for model in (one, other):
        model.log_all = lambda *_: None  # type: ignore
    batch = (torch.randn(7, 1, 8, 8), torch.randint(10, (7,)))
    (made,) = one.network.generate().values()  # type: ignore
    difference = other.training_step(batch, 0) - one.training_step(batch, 0)
    assert_close(difference, 0.25 * made.square().sum())


def test_counts() -> None:
    assert HyperClassifier(**SMALL).parameters_used()["made"] == 4 * 6 * 9
    found = HyperClassifier(
        target_options={"side": 28}, head_options={"embedding": 4}, select=["3.weight"]
    ).parameters_used()
    assert (found["made"], found["generator"]) == (12_544, 4_244)
    plain = HyperClassifier(**SMALL, method="plain").parameters_used()
    assert (plain["made"], plain["generator"]) == (0, 0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "static"}, "hyper or plain"),
        ({"head": "TileHead"}, "TiledHead"),
        ({"head_options": {"size": 3}}, "size"),
        ({"select": ["nothing"]}, "nothing"),
        ({"head": "FullHead", "head_options": {}}, "condition"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], match: str) -> None:
    with pytest.raises(HyperError, match=match):
        HyperClassifier(**{**SMALL, **options})


def test_heads_by_name() -> None:
    assert type(head_named("ChunkedHead", {"chunk": 5})).__name__ == "ChunkedHead"
    with pytest.raises(HyperError, match="FullHead"):
        head_named("Head")


@pytest.mark.parametrize("method", ["hyper", "plain"])
def test_config_learns_digits(method: str) -> None:
    """The configuration as it is, three epochs: far above chance with and without."""
    torch.manual_seed(0)
    config = yaml.safe_load((CONFIGS / "static_digits.yaml").read_text(encoding="utf-8"))
    options = config["model"]["init_args"]
    options.pop("optimization")
    model = HyperClassifier(**{**options, "method": method})
    data = ImageData(**config["data"]["init_args"])
    run = trainer(max_epochs=2, num_sanity_val_steps=0)
    run.fit(model, datamodule=data)
    (found,) = run.test(model, datamodule=data, verbose=False)
    assert found["test/accuracy"] > 0.6


@pytest.mark.parametrize("name", ["static_mnist", "static_digits"])
def test_configs_make_what_they_say(name: str) -> None:
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    options = config["model"]["init_args"]
    options.pop("optimization")
    made = HyperClassifier(**options).parameters_used()
    assert made["made"] == (12_544 if name == "static_mnist" else 73_728)
    ImageData(**config["data"]["init_args"])


def test_hyperparameters_are_plain() -> None:
    """So that a checkpoint is read without pickle."""
    made = HyperClassifier(**SMALL)
    again = yaml.safe_load(yaml.safe_dump(dict(made.hparams)))
    again.pop("optimization")
    one, other = made.state_dict(), HyperClassifier(**again).state_dict()
    assert {n: x.shape for n, x in one.items()} == {n: x.shape for n, x in other.items()}
