"""What happens within the steps of hypernetworks' tasks, where only a look inside can tell."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.nn import functional as F

from datasets_zoo.experiments import Clients, GenotypeImages, Pixels, SplitTasks
from wspace.lit.hyper import Continual, Federated, NeuralField, ParameterPrediction
from wspace.lit.hyper.loading import generate
from wspace.testing import assert_close

CNN = {"channels": 1, "widths": [6, 6], "norm": True}


@pytest.fixture(autouse=True)
def quietly() -> Iterator[None]:
    seed_everything(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lightning's advice
        yield


def fit(model: Any, data: Any, epochs: int, *callbacks: Callback) -> None:
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
        callbacks=list(callbacks),
    )
    trainer.fit(model, datamodule=data)


class Beginnings(Callback):
    """Notes, after the first step of each epoch, how many steps Adam and BatchNorm know of."""

    def __init__(self) -> None:
        self.adam: list[float] = []
        self.norm: list[int] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            state = pl_module.optimizers().optimizer.state
            self.adam.append(max(float(s["step"]) for s in state.values()))
            named = dict(pl_module.network.named_buffers())
            counts = [int(x) for n, x in named.items() if n.endswith("num_batches_tracked")]
            self.norm.append(max(counts))


def continual() -> Continual:
    return Continual(
        "datasets_zoo.architectures:cnn", CNN, head_options={"chunk": 200, "hidden": [8]}
    )


def test_optimiser_and_statistics_begin_anew_with_each_task() -> None:
    seen = Beginnings()
    fit(continual(), SplitTasks("digits", batch_size=16, steps=3), 3, seen)
    assert seen.adam == [1.0, 1.0, 1.0]
    assert seen.norm == [1, 1, 1]


def test_generated_networks_have_the_statistics_of_their_task() -> None:
    model = continual()
    fit(model, SplitTasks("digits", batch_size=16, steps=3), 3)
    name = "1.running_mean"
    first, second = (generate(model, task)[name] for task in (0, 1))
    kept = [model.statistics.kept[task] for task in (0, 1)]
    assert any(x.equal(first) for x in kept[0]) and any(x.equal(second) for x in kept[1])
    assert not first.equal(second)


class Norms(Callback):
    """Norm of all gradients after each step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        grads = [p.grad for p in pl_module.method.parameters() if p.grad is not None]
        self.found.append(float(torch.stack([g.norm() for g in grads]).norm()))


def test_gradients_of_the_server_are_clipped() -> None:
    norms: dict[float, list[float]] = {}
    for clip in (1e-3, 1e6):
        seed_everything(2)
        seen = Norms()
        model = Federated("pefll", clients=4, kernels=2, taps=3, head=(8,), examples=8, clip=clip)
        data = Clients("digits", seen=4, unseen=2, per_round=2, rounds=2, examples=20)
        fit(model, data, 1, seen)
        norms[clip] = seen.found
    assert all(x == pytest.approx(1e-3, rel=1e-4) for x in norms[1e-3])
    assert all(x > 2e-3 for x in norms[1e6])


def test_penalty_and_smoothing_of_predicted_parameters() -> None:
    data = GenotypeImages("digits", steps=1, meta_batch=2, batch_size=16, genotypes=4)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    network = {"width": 16, "layers": 1, "heads": 2, "channels": 8, "hidden": 16}

    def loss(**options: Any) -> torch.Tensor:
        seed_everything(2)
        return ParameterPrediction(network, **options).training_step(batch, 0).detach()

    seed_everything(2)
    model = ParameterPrediction(network)
    spaces = [model(batch.genotypes, batch.images)]
    answers = spaces[0]
    plain = torch.stack([F.cross_entropy(y, batch.labels) for y in answers]).mean()
    smooth = torch.stack(
        [F.cross_entropy(y, batch.labels, label_smoothing=0.3) for y in answers]
    ).mean()
    assert_close(loss(), plain.detach())
    assert_close(loss(smoothing=0.3), smooth.detach())
    one, two = loss(penalty=0.01) - loss(), loss(penalty=0.02) - loss()
    assert one > 1e-3
    assert_close(two, 2 * one)


def test_inner_steps_of_an_initial_field_see_the_context_alone() -> None:
    data = Pixels("digits", batch_size=4, batches=1)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    model = NeuralField(method="initial")
    assert model.initial is not None and model.initial.rule != "reptile"
    caught: list[Any] = []

    def catch(inner: Any, outer: Any, count: int) -> torch.Tensor:
        caught.extend((inner, outer, count))
        return torch.zeros((), requires_grad=True)

    object.__setattr__(model.initial, "loss", catch)
    model.training_step(batch, 0)
    inner, outer, count = caught
    states = {n: x.expand(count, *x.shape) for n, x in dict(model.field.named_parameters()).items()}
    few = model._errors(batch.context, batch.readings)
    many = model._errors(batch.target, batch.target_readings)
    assert_close(inner(states).detach(), few(states).detach())
    assert_close(outer(states).detach(), many(states).detach())
    assert not torch.allclose(inner(states), outer(states))
