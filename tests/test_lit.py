"""Training on zoos: batches, tasks, metrics, checkpoints, and what a trained task says."""

import errno
import json
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from safetensors.torch import save
from torch import nn
from torchmetrics.functional import kendall_rank_corrcoef, r2_score
from zoo_recipes import Views

import wspace
from wspace.errors import CheckpointError, SpaceMismatch, WSpaceError, ZooError
from wspace.lit import (
    Checkpoints,
    Classification,
    Contrastive,
    Drop,
    Editing,
    Noise,
    Optimization,
    Prediction,
    SafeCheckpoints,
    SpaceBatches,
    Symmetry,
    ZooDataModule,
    build_metanet,
    load_task,
    predict,
    predict_zoo,
)
from wspace.lit.checkpoint import resume_file
from wspace.lit.contrastive import nt_xent, ridge
from wspace.lit.metrics import (
    Paired,
    accuracy,
    interval,
    kendall,
    r_squared,
    rank_loss,
    rmse,
)
from wspace.lit.models import NAMES, Fitted, Seen
from wspace.lit.modules import classes_of
from wspace.lit.predict import in_order, space_for
from wspace.zoo import Architecture, Cohort, InputSpec, build
from wspace.zoo.images import decoded, dilated, grid
from wspace.zoo.split import leaks

SMALL: dict[str, dict[str, Any]] = {
    "GraphMetanet": {"channels": 8, "layers": 2},
    "NeuralGraphGNN": {"channels": 8, "layers": 2},
    "NeuralGraphTransformer": {"channels": 8, "layers": 2, "heads": 2},
    "ScaleGMN": {"channels": 8, "layers": 2},
    "DWSNet": {"hidden": 4, "layers": 2, "dropout": 0.2},
    "NFN": {"hidden": 4, "layers": 2},
    "UNF": {"hidden": 4, "layers": 2},
    "FlatMLP": {"hidden": [16]},
    "StatNN": {"hidden": [16]},
    "ParameterDeepSets": {"channels": 8},
    "ProbeOnly": {"count": 4, "hidden": [16]},
}


@dataclass(frozen=True)
class Toys:
    """Random perceptrons whose scale is their label; cohorts take turns at the widths."""

    count: int = 72
    widths: tuple[int, ...] = (4,)
    size: int = 24
    seed: int = 0
    kind: str = "perceptron"

    grows: ClassVar[tuple[str, ...]] = ("count",)

    @property
    def cohorts(self) -> int:
        return -(-self.count // self.size)

    def cohort(self, index: int) -> Cohort:
        g = torch.Generator().manual_seed(1000 * self.seed + index)
        n = min(self.size, self.count - index * self.size)
        architecture = architecture_of(self.kind, self.widths[index % len(self.widths)])
        label = torch.randint(3, (n,), generator=g)
        scale = torch.full((n,), 0.2) if self.kind == "siren" else 1 + label.float()
        state = {
            p.name: torch.randn(n, *p.shape, generator=g) * scale.reshape(-1, *[1] * len(p.shape))
            for p in architecture.space().params
        }
        table = {
            "label": label,
            "test_accuracy": label / 3 + 0.1 + 0.05 * torch.rand(n, generator=g),
            "width": torch.full((n,), self.widths[index % len(self.widths)]),
            "family": [f"w{self.widths[index % len(self.widths)]}"] * n,
        }
        return Cohort(architecture, state, table)


def architecture_of(kind: str, width: int) -> Architecture:
    if kind == "siren":
        sizes = {"sizes": [2, width, 1], "omega": 30.0}
        return Architecture("datasets_zoo.inr:siren", sizes, (InputSpec((1, 2)),))
    return Architecture("wspace.zoo:example_network", {"width": width}, (InputSpec((2, 3)),))


@pytest.fixture(scope="session")
def zoos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("zoos")
    recipes = {
        "one": Toys(),
        "two": Toys(96, (4, 5), seed=1),
        "image": Toys(48, (6,), seed=2, kind="siren"),
    }
    for name, recipe in recipes.items():
        build(recipe, root / name)
    return {name: root / name for name in recipes}


@pytest.fixture(autouse=True)
def quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def trainer(epochs: int = 1, folder: Path | None = None, **options: Any) -> Trainer:
    """A trainer that writes nothing, or checkpoints into a folder."""
    callbacks = [] if folder is None else [checkpoints(folder)]
    return Trainer(
        **{"callbacks": callbacks, "enable_checkpointing": folder is not None, **options},
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[SafeCheckpoints()],
    )


def checkpoints(folder: Path, **options: Any) -> Checkpoints:
    return Checkpoints(dirpath=folder, filename="{step}", save_top_k=-1, save_last=True, **options)


def equal(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and all(torch.equal(x[k], y[k]) for k in x)


# --- batches ----------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("mixed", [False, True])
def test_processes_share_the_rows(world: int, mixed: bool) -> None:
    kind = torch.randint(3, (101,)).numpy()
    seen: list[list[list[int]]] = []
    for rank in range(world):
        batches = SpaceBatches(kind, 8, mixed=mixed, shuffle=True, share=(rank, world))
        batches.set_epoch(2)
        rows = list(batches)
        assert len(rows) == len(batches)
        seen.append(rows)
    assert len({len(rows) for rows in seen}) == 1
    assert sorted(i for rows in seen for b in rows for i in b) == list(range(101))
    sizes = [len(b) for rows in seen for b in rows]
    assert max(sizes) <= 8 and min(sizes) >= 4
    if not mixed:
        assert all(len(set(kind[b])) == 1 for rows in seen for b in rows)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        torch.rand(3)
        batches = SpaceBatches([0] * 20, 4, shuffle=True, seed=seed)
        batches.set_epoch(epoch)
        return list(batches)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2) and order(0, 1) != order(1, 1)
    assert list(SpaceBatches([0, 1, 0, 1, 0], 2)) == [[0, 2], [4], [1, 3]]


def test_fewer_rows_than_processes() -> None:
    with pytest.raises(ZooError, match="2 networks for 3 processes"):
        SpaceBatches([0, 1], 8, share=(0, 3))


def test_parts(zoos: dict[str, Path]) -> None:
    data = ZooDataModule(zoos["two"], batch_size=8, held_out={"family": ["w5"]}, limit=20)
    data.setup("fit")
    assert {*data.parts["test"].table["family"].tolist()} == {"w5"}
    assert len(data.parts["test"]) == 48 and len(data.parts["train"]) == 20
    assert {*data.parts["train"].table["family"].tolist()} == {"w4"}
    smaller = ZooDataModule(zoos["two"], held_out={"family": ["w5"]}, limit=10)
    smaller.setup("fit")
    assert {*smaller.parts["train"].ids.tolist()} < {*data.parts["train"].ids.tolist()}
    batch = next(iter(data.val_dataloader())).batch
    assert len(batch.graphs) == 1 and len(batch) == batch.graphs[0].batch[0]


def test_loader_processes_give_the_same_batches(zoos: dict[str, Path]) -> None:
    def batches(workers: int) -> list[Any]:
        data = ZooDataModule(zoos["two"], batch_size=16, mixed=True, workers=workers)
        data.setup("fit")
        return [carried.batch for carried in data.train_dataloader()]

    for a, b in zip(batches(0), batches(1), strict=True):
        assert torch.equal(a.index, b.index)
        for g, h in zip(a.graphs, b.graphs, strict=True):
            assert g.space == h.space
            assert all(torch.equal(x, h.values[k]) for k, x in g.values.items())


def test_parts_by_what_the_recipe_says(tmp_path: Path) -> None:
    build(Views(count=120, views=3), tmp_path)

    def leaking(**options: Any) -> list[str]:
        data = ZooDataModule(tmp_path, **options)
        data.setup("fit")
        return leaks({name: part.table["image"] for name, part in data.parts.items()})

    assert leaking() == []
    assert leaking(by="", split_name="rows")  # negative control


def test_wrong_parts(zoos: dict[str, Path]) -> None:
    with pytest.raises(ZooError, match="no networks for val"):
        ZooDataModule(zoos["one"], fractions=(0.9, 0.0, 0.1), split_name="no").setup("fit")
    with pytest.raises(ZooError, match="no column 'famly'"):
        ZooDataModule(zoos["one"], held_out={"famly": ["w4"]}).setup("fit")
    for options in ({"batch_size": 0}, {"limit": 0}, {"limit": -1}):
        with pytest.raises(ZooError, match=f"{next(iter(options))} is at least 1"):
            ZooDataModule(zoos["one"], **options)


def test_fewer_rows_of_a_space_than_processes_need() -> None:
    with pytest.raises(ZooError, match="3 networks of 3 architectures for 2 processes"):
        SpaceBatches([0, 1, 2], 8, share=(0, 2))
    assert [list(SpaceBatches([0, 1, 2], 8, mixed=True, share=(k, 2))) for k in (0, 1)] == [
        [[0, 1]],
        [[2]],
    ]


def test_held_out_values_are_there(zoos: dict[str, Path]) -> None:
    with pytest.raises(ZooError, match=r"(?s)no network whose 'family' is 'w55'.*'w4', 'w5'"):
        ZooDataModule(zoos["two"], held_out={"family": ["w5", "w55"]}).setup("fit")
    with pytest.raises(ZooError, match=r"(?s)no network whose 'width' is 6.*one of 4, 5"):
        ZooDataModule(zoos["two"], where={"width": 6}).setup("fit")


# --- augmentations ----------------------------------------------------------------


@pytest.mark.parametrize("change", [Symmetry(), Noise(0.1), Drop(0.5)])
def test_augmentations(change: Any, zoos: dict[str, Path], generator: torch.Generator) -> None:
    graph = wspace.zoo.open(zoos["one"]).batch(range(9)).graphs[0]
    before = {name: x.clone() for name, x in graph.values.items()}
    made = change(graph, generator)
    again = change(graph, torch.Generator().set_state(generator.get_state()))
    assert all(torch.equal(graph.values[k], x) for k, x in before.items())
    assert any(not torch.equal(made.values[k], x) for k, x in before.items())
    assert made.batch == graph.batch and made.space is graph.space and again.batch == graph.batch


def test_symmetry_keeps_the_function(zoos: dict[str, Path], generator: torch.Generator) -> None:
    zoo = wspace.zoo.open(zoos["image"])
    graph = zoo.batch(range(7), dtype=torch.float64).graphs[0]
    made = Symmetry(("permutation", "scale", "sign", "phase"))(graph, generator)
    module, x = zoo.architectures[0].module(), grid(5, 3).double()
    args = (module, graph.space)
    torch.testing.assert_close(
        decoded(*args, made.values, x), decoded(*args, graph.values, x), rtol=1e-9, atol=1e-9
    )
    with pytest.raises(WSpaceError, match="unknown kinds"):
        Symmetry(("permutations",))


# --- metanets ---------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_metanet_reads_lists(name: str, zoos: dict[str, Path]) -> None:
    zoo = wspace.zoo.open(zoos["one"])
    graphs = [*zoo.batch([3, 1]).graphs, *zoo.batch([5]).graphs]
    metanet = build_metanet(name, SMALL[name], zoo, out=7).eval()
    assert isinstance(metanet, Fitted)
    metanet.fit_statistics(graphs)
    together = metanet(graphs)
    assert together.shape == (3, 7)
    torch.testing.assert_close(metanet(graphs[1:]), together[2:])
    torch.testing.assert_close(metanet(graphs[0]), together[:2])


@pytest.mark.parametrize("name", ["GraphMetanet", "ScaleGMN", "DWSNet", "NFN", "UNF"])
def test_metanets_of_parameters(name: str, zoos: dict[str, Path]) -> None:
    zoo = wspace.zoo.open(zoos["one"])
    graphs = [*zoo.batch([3, 1]).graphs, *zoo.batch([5]).graphs]
    made = build_metanet(name, SMALL[name], zoo, out=None).eval()(graphs)
    for graph, state in zip(graphs, made, strict=True):
        assert {k: x.shape for k, x in state.items()} == {
            k: x.shape for k, x in graph.values.items()
        }


@pytest.mark.parametrize("name", ["DWSNet", "FlatMLP", "ProbeOnly", "GraphMetanet"])
def test_one_architecture(name: str, zoos: dict[str, Path]) -> None:
    options = {**SMALL[name], **({"probes": 3} if name == "GraphMetanet" else {})}
    with pytest.raises(SpaceMismatch, match="reads one architecture"):
        build_metanet(name, options, wspace.zoo.open(zoos["two"]))
    one = wspace.zoo.open(zoos["one"])
    other = wspace.zoo.open(zoos["two"])
    graphs = other.batch(np.flatnonzero(other.table["width"] == 5)[:2]).graphs
    with pytest.raises(SpaceMismatch, match="another weight space"):
        build_metanet(name, options, one)(graphs)


@pytest.mark.parametrize(
    ("name", "options"), [("ProbeOnly", {"count": 4}), ("GraphMetanet", {"probes": 4})]
)
def test_probes_begin_with_given_inputs(
    name: str, options: dict[str, Any], zoos: dict[str, Path], tmp_path: Path
) -> None:
    zoo = wspace.zoo.open(zoos["one"])
    example = zoo.architectures[0].example(torch.Generator().manual_seed(0))[0]
    inputs = torch.randn(6, *example.shape[1:])
    path = tmp_path / "inputs.safetensors"
    wspace.save_checkpoint({"inputs": inputs}, path)
    given = {**SMALL[name], **options, "probe_inputs": str(path)}
    net: Any = build_metanet(name, given, zoo)
    probes = {k: x for k, x in net.named_parameters() if "probes.input" in k}
    assert [torch.equal(x, inputs[:4]) for x in probes.values()] == [True]
    wspace.save_checkpoint({"inputs": inputs[:3]}, path)
    with pytest.raises(WSpaceError, match="'inputs' of at least 4 inputs\n.*shape \\(3, "):
        build_metanet(name, given, zoo)
    wspace.save_checkpoint({"x": inputs}, path)
    with pytest.raises(WSpaceError, match="no such tensor"):
        build_metanet(name, given, zoo)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"(?s)probe_inputs.*inputs\.safetensors"):
        build_metanet(name, given, zoo)


def test_a_checkpoint_does_not_read_the_probes_file(zoos: dict[str, Path], tmp_path: Path) -> None:
    zoo = wspace.zoo.open(zoos["one"])
    example = zoo.architectures[0].example(torch.Generator().manual_seed(0))[0]
    path = tmp_path / "inputs.safetensors"
    wspace.save_checkpoint({"inputs": torch.randn(4, *example.shape[1:])}, path)
    options = {**SMALL["ProbeOnly"], "probe_inputs": str(path)}
    task = Classification("ProbeOnly", options)
    run = trainer(1, tmp_path / "a", callbacks=[checkpoints(tmp_path / "a")])
    run.fit(task, datamodule=ZooDataModule(zoos["one"]))
    path.unlink()
    last = tmp_path / "a" / "last.safetensors"
    assert equal(load_task(last), task)
    more = Classification("ProbeOnly", SMALL["ProbeOnly"], pretrained=last)
    trainer(1, tmp_path / "b").fit(more, datamodule=ZooDataModule(zoos["one"]))
    assert more.started is not None


def test_a_resumption_reads_no_first_values(zoos: dict[str, Path], tmp_path: Path) -> None:
    """The checkpoint holds what `probe_inputs` and `pretrained` gave; the files may be gone."""
    zoo = wspace.zoo.open(zoos["one"])
    example = zoo.architectures[0].example(torch.Generator().manual_seed(0))[0]
    inputs, last = tmp_path / "inputs.safetensors", tmp_path / "a" / "last.safetensors"
    wspace.save_checkpoint({"inputs": torch.randn(4, *example.shape[1:])}, inputs)
    options = {**SMALL["ProbeOnly"], "probe_inputs": str(inputs)}
    data = ZooDataModule(zoos["one"])
    first = Classification("ProbeOnly", options)
    trainer(1, tmp_path / "a", callbacks=[checkpoints(tmp_path / "a")]).fit(first, datamodule=data)
    made = Classification("ProbeOnly", options, pretrained=last)
    run = trainer(1, tmp_path / "b", callbacks=[checkpoints(tmp_path / "b")])
    run.fit(made, datamodule=data)
    inputs.unlink()
    last.unlink()
    again = Classification("ProbeOnly", options, pretrained=last)
    path = str(tmp_path / "b" / "last.safetensors")
    trainer(1, tmp_path / "c").validate(again, datamodule=data, ckpt_path=path, verbose=False)
    assert equal(again, made)
    again = Classification("ProbeOnly", options, pretrained=last)
    again.resumes = True
    run = trainer(2, tmp_path / "d")
    run.fit(again, datamodule=data, ckpt_path=path)
    assert run.current_epoch == 2 and again.options == options and again.started is None


def test_wrong_metanets(zoos: dict[str, Path]) -> None:
    with pytest.raises(WSpaceError, match="did you mean 'GraphMetanet'"):
        Classification("GraphMetnet")
    with pytest.raises(WSpaceError, match="no option 'chanels'.*"):
        Classification("ScaleGMN", {"chanels": 3})
    with pytest.raises(WSpaceError, match="StatNN answers with vectors"):
        build_metanet("StatNN", {}, wspace.zoo.open(zoos["one"]), out=None)


# --- metrics ----------------------------------------------------------------------


def test_metrics_agree_with_torchmetrics(generator: torch.Generator) -> None:
    x = torch.rand(40, generator=generator)
    y = (x + torch.rand(40, generator=generator)).mul(5).round()  # with ties
    torch.testing.assert_close(kendall(x, y).float(), kendall_rank_corrcoef(x, y))
    torch.testing.assert_close(r_squared(x, y).float(), r2_score(x, y))
    torch.testing.assert_close(rmse(x, y).float(), (x - y).square().mean().sqrt())


def test_kendall_is_the_sum_over_pairs(generator: torch.Generator) -> None:
    def by_pairs(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        dx, dy, w = (x[:, None] - x).sign().double(), (y[:, None] - y).sign().double(), w.double()
        over, ties_x, ties_y = (
            torch.einsum("di,ij,dj->d", w, p, w) for p in (dx * dy, dx.square(), dy.square())
        )
        return over / (ties_x * ties_y).sqrt()

    for n, levels in ((2, 9), (7, 3), (50, 2), (120, 40), (301, 10**6)):
        x, y = torch.randint(levels, (2, n), generator=generator).float()
        rows = torch.randint(n, (30, n), generator=generator)
        counts = torch.zeros(30, n).scatter_add_(1, rows, torch.ones(30, n))
        expected = by_pairs(x, y, counts)
        torch.testing.assert_close(kendall(x, y, counts), expected, rtol=0, atol=1e-12,
                                   equal_nan=True)  # fmt: skip
        one = by_pairs(x, y, torch.ones(1, n))[0]
        torch.testing.assert_close(kendall(x, y), one, rtol=0, atol=1e-12, equal_nan=True)
    assert kendall(torch.ones(5), torch.arange(5)).isnan()  # constant
    assert kendall(torch.tensor([0.0, torch.nan, 1]), torch.arange(3)).isnan()
    assert kendall(torch.ones(1), torch.ones(1), torch.ones(2, 1)).isnan().tolist() == [True] * 2
    assert float(kendall(torch.arange(9), torch.arange(9))) == pytest.approx(1, abs=1e-12)


def test_kendall_of_many_rows_compares_no_pairs() -> None:
    n = 200_000  # all pairs would be 40 billion numbers
    x = torch.arange(n).double()
    assert float(kendall(x, x.flip(0))) == pytest.approx(-1, abs=1e-12)


def test_resamples_are_data_sets(generator: torch.Generator) -> None:
    x, y = torch.rand(2, 15, generator=generator)
    rows = torch.randint(15, (4, 15), generator=generator)
    counts = torch.zeros(4, 15).scatter_add_(1, rows, torch.ones(4, 15))
    for metric in (kendall, r_squared, rmse, accuracy):
        each = torch.stack([metric(x[r], y[r]) for r in rows])
        torch.testing.assert_close(metric(x, y, counts), each, rtol=1e-6, atol=1e-6)


def test_interval_covers(generator: torch.Generator) -> None:
    x = torch.ones(400)
    y = (torch.rand(400, generator=generator) < 0.8).float()
    low, high = interval(accuracy, x, y)
    assert low < float(accuracy(x, y)) < high
    assert abs((high - low) - 2 * 1.96 * (0.8 * 0.2 / 400) ** 0.5) < 0.01
    assert interval(accuracy, x, y) == (low, high)


def test_rank_loss() -> None:
    scores, targets = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.5, 0.5, 0.1])
    expected = torch.log1p(torch.exp(torch.tensor([3.0, 2.0]))).mean()
    torch.testing.assert_close(rank_loss(scores, targets), expected)
    assert float(rank_loss(scores, torch.ones(3))) == 0


def test_nt_xent_and_ridge(generator: torch.Generator) -> None:
    a = torch.eye(5)
    assert float(nt_xent(a, a, 0.01)) < 1e-6 < float(nt_xent(a, a.roll(1, 0), 0.01))
    x = torch.randn(60, 4, generator=generator)
    labels = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    scores = torch.cat([x, torch.ones(60, 1)], 1) @ ridge(x, labels)
    assert float((scores.argmax(1) == labels).float().mean()) > 0.7


def test_dilation() -> None:
    image = torch.zeros(1, 1, 5, 5)
    image[0, 0, 2, 1] = 1
    assert torch.equal(dilated(image)[0, 0, 1:4, :3], torch.ones(3, 3))
    assert float(dilated(image).sum()) == 9
    assert grid(3, 2).tolist() == [[-1, -1], [-1, 1], [0, -1], [0, 1], [1, -1], [1, 1]]


def test_paired_forgets() -> None:
    metric = Paired({"accuracy": accuracy}, resamples=10)
    metric.update(torch.tensor([1, 2]), torch.tensor([1, 1]))
    assert metric.compute()["accuracy"] == 0.5
    metric.reset()
    metric.update(torch.tensor([1]), torch.tensor([1]))
    assert metric.compute() == {"accuracy": 1, "accuracy_low": 1, "accuracy_high": 1}


# --- tasks ------------------------------------------------------------------------


def test_classification_learns(zoos: dict[str, Path]) -> None:
    seed_everything(0, verbose=False)
    task = Classification("StatNN", optimization=Optimization(lr=1e-2))
    run, data = trainer(12), ZooDataModule(zoos["one"], batch_size=16, augment=[Symmetry()])
    run.fit(task, datamodule=data)
    (found,) = run.test(task, datamodule=data, verbose=False)
    assert found["test/accuracy_low"] <= found["test/accuracy"] <= found["test/accuracy_high"]
    assert run.callback_metrics["test/accuracy"] > 0.7


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_prediction_of_mixed_architectures(zoos: dict[str, Path], precision: Any) -> None:
    task = Prediction("GraphMetanet", SMALL["GraphMetanet"], rank_weight=0.5)
    data = ZooDataModule(zoos["two"], batch_size=16, mixed=True)
    run = trainer(1, precision=precision)
    run.fit(task, datamodule=data)
    assert len(next(iter(data.train_dataloader())).batch.graphs) == 2
    (found,) = run.test(task, datamodule=data, verbose=False)
    assert {f"test/{k}{e}" for k in ("kendall", "r2", "rmse") for e in ("", "_low", "_high")} < {
        *found
    }
    outputs: Any = run.predict(task, datamodule=data)
    rows = in_order(outputs)["test_accuracy"]
    assert len(outputs) == 6 and rows.shape == (96,)
    zoo = wspace.zoo.open(zoos["two"])
    if precision == "32":
        torch.testing.assert_close(rows, predict_zoo(task, zoo, batch_size=7)["test_accuracy"])
        one = predict(task, zoo.batch([50]).graphs)["test_accuracy"]
        torch.testing.assert_close(rows[50:51], one)


def test_prediction_of_any_number(zoos: dict[str, Path], tmp_path: Path) -> None:
    task = Prediction(
        "StatNN", target="width", link="identity", loss="mse", optimization=Optimization(lr=1e-2)
    )
    run, data = trainer(6, tmp_path), ZooDataModule(zoos["two"], batch_size=16)
    run.fit(task, datamodule=data)
    assert task.first["center"] == data.parts["train"].table["width"].mean()  # no others'
    again = load_task(tmp_path / "last.safetensors")
    zoo = wspace.zoo.open(zoos["two"])
    rows = predict_zoo(again, zoo)["width"]
    torch.testing.assert_close(rows, predict_zoo(task, zoo)["width"])
    assert float(rmse(rows, torch.tensor(zoo.table["width"]))) < 0.6


@pytest.mark.parametrize("name", ["GraphMetanet", "NFN"])
def test_editing(name: str, zoos: dict[str, Path]) -> None:
    seed_everything(0, verbose=False)
    task = Editing(name, SMALL[name], side=8, optimization=Optimization(lr=5e-3, warmup=0))
    run, data = trainer(4), ZooDataModule(zoos["image"], batch_size=16)
    run.fit(task, datamodule=data)
    (found,) = run.test(task, datamodule=data, verbose=False)
    assert found["test/mse"] < found["test/unedited_mse"]
    zoo = wspace.zoo.open(zoos["image"])
    state = {name: x[None] for name, x in zoo[0][1].items()}
    shown = task.images(state, zoo.spaces[0])
    module = zoo.architectures[0].module(device="cpu")
    module.load_state_dict(zoo[0][1])
    torch.testing.assert_close(shown, module(grid(8, 8)).reshape(1, 1, 8, 8))
    with pytest.raises(ZooError, match="shows no image"):
        trainer().fit(Editing("GraphMetanet"), datamodule=ZooDataModule(zoos["one"]))


def test_contrastive(zoos: dict[str, Path]) -> None:
    task = Contrastive("StatNN", dimension=6, target="label")
    run, data = trainer(1), ZooDataModule(zoos["two"], batch_size=16)
    run.fit(task, datamodule=data)
    (found,) = run.test(task, datamodule=data, verbose=False)
    assert found["test/probe_accuracy"] > 0.5
    assert predict_zoo(task, wspace.zoo.open(zoos["two"]))["representation"].shape == (96, 6)


def test_own_module(zoos: dict[str, Path], tmp_path: Path) -> None:
    def own() -> nn.Module:
        return wspace.nn.StatNN(3, hidden=(8,))

    run, data = trainer(1, tmp_path), ZooDataModule(zoos["two"], batch_size=16)
    task = Classification(own())
    run.fit(task, datamodule=data)
    with pytest.raises(CheckpointError, match="module of your own"):
        load_task(tmp_path / "last.safetensors")
    assert equal(load_task(tmp_path / "last.safetensors", metanet=own()), task)


def test_learning_rate() -> None:
    how = Optimization(warmup=0.1, last=0.1)
    rates = [how.factor(i, 100) for i in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(rates) == 1 and rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


# --- what is refused --------------------------------------------------------------


def test_wrong_targets(zoos: dict[str, Path]) -> None:
    def fit(task: Any, path: str = "one") -> None:
        trainer().fit(task, datamodule=ZooDataModule(zoos[path], batch_size=16))

    with pytest.raises(ZooError, match="no column 'lable'.*\n.*label"):
        fit(Classification(target="lable"))
    with pytest.raises(ZooError, match="column 'family' holds text"):
        fit(Classification(target="family"))
    with pytest.raises(ZooError, match="labels of 'label' are no classes"):
        fit(Classification(classes=2))
    with pytest.raises(ZooError, match="labels of 'test_accuracy' are no classes"):
        fit(Classification(target="test_accuracy"))
    with pytest.raises(ZooError, match="'label' is no share"):
        fit(Prediction(target="label"))
    with pytest.raises(ZooError, match="link 'identity' with loss 'bce'"):
        Prediction(link="identity")
    with pytest.raises(SpaceMismatch, match="DWSNet reads one architecture"):
        fit(Classification("DWSNet"), "two")


def test_loss_that_is_not_finite(zoos: dict[str, Path]) -> None:
    class Spoiled(ZooDataModule):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            found = super().on_after_batch_transfer(batch, dataloader_idx)
            if not self.trainer.training or self.trainer.global_step < 1:
                return found
            values = {k: x.clone() for k, x in found.graphs[0].values.items()}
            values["0.bias"][2] = torch.nan
            graph = replace(found.graphs[0], values=MappingProxyType(values))
            return replace(found, graphs=[graph])

    task = Classification("ParameterDeepSets", {"channels": 4})
    match = r"not finite\n  got nan in batch 1 of epoch 0, networks .*\n.*NaN or .* in (\d+/\d+)\n"
    spoiled = Spoiled(zoos["one"], batch_size=16)
    with pytest.raises(WSpaceError, match=match) as found:
        trainer().fit(task, datamodule=spoiled)
    (named,) = re.findall(match, str(found.value))
    rows = list(spoiled.sampler("train"))[1]  # of epoch 0
    assert named == spoiled.parts["train"].ids[rows[2]]


def test_classes(zoos: dict[str, Path]) -> None:
    assert classes_of(wspace.zoo.open(zoos["one"]), "label", None, "test") == 3


# --- checkpoints ------------------------------------------------------------------


def fitted(
    path: Path, folder: Path, epochs: int, *, resume: Path | None = None, **options: Any
) -> Classification:
    """A classification trained with everything that is random."""
    seed_everything(0, verbose=False)
    task = Classification("DWSNet", SMALL["DWSNet"], optimization=Optimization(lr=1e-2))
    data = ZooDataModule(path, batch_size=16, augment=[Symmetry(), Noise(0.1), Drop(0.1)])
    run = trainer(epochs, folder, callbacks=[checkpoints(folder, **options)])
    run.fit(task, datamodule=data, ckpt_path=None if resume is None else str(resume))
    return task


def test_resuming_equals_not_stopping(zoos: dict[str, Path], tmp_path: Path) -> None:
    whole = fitted(zoos["one"], tmp_path / "a", 2, every_n_train_steps=3)
    assert equal(whole, fitted(zoos["one"], tmp_path / "b", 2))
    files = sorted((tmp_path / "a").glob("step*.safetensors"))
    assert len(files) == 2  # both in the middle of an epoch
    ends = sorted((tmp_path / "b").glob("step*.safetensors"))
    for i, file in enumerate([*files, ends[0]]):
        options = {"every_n_train_steps": 3} if file in files else {}
        other = fitted(zoos["one"], tmp_path / f"c{i}", 2, resume=file, **options)
        assert equal(whole, other), file
    read = load_task(tmp_path / "a" / "last.safetensors")
    assert read.seen == whole.seen and not read.training
    assert not equal(whole, load_task(files[0]))


def test_checkpoint_is_safetensors(zoos: dict[str, Path], tmp_path: Path) -> None:
    fitted(zoos["one"], tmp_path / "a", 1)
    last = tmp_path / "a" / "last.safetensors"
    state = wspace.load_checkpoint(last)
    assert "metanet.model.net.standardize.mean" in state
    torch.load(resume_file(last), weights_only=True)
    assert not list(last.parent.glob(".*"))
    for name in ("one", "two"):
        task = Classification("DWSNet", SMALL["DWSNet"])
        run = trainer(1, tmp_path / "a", callbacks=[checkpoints(tmp_path / "b")])
        data = ZooDataModule(zoos[name], where={"width": 4}, split_name="w")
        outputs: Any = run.predict(task, datamodule=data, ckpt_path=str(last))
        zoo = wspace.zoo.open(zoos[name])
        expected = predict_zoo(load_task(last), zoo[zoo.table["width"] == 4])
        torch.testing.assert_close(in_order(outputs)["probability"], expected["probability"])


def test_damaged_checkpoints(zoos: dict[str, Path], tmp_path: Path) -> None:
    fitted(zoos["one"], tmp_path / "a", 2)
    last = tmp_path / "a" / "last.safetensors"
    first = min((tmp_path / "a").glob("step*.resume.pt"))
    io = SafeCheckpoints()
    resume_file(last).write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="of different steps"):
        io.load_checkpoint(last)
    resume_file(last).write_bytes(first.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"last\.resume\.pt cannot be read"):
        io.load_checkpoint(last)
    resume_file(last).unlink()
    assert "optimizer_states" not in io.load_checkpoint(last)
    last.write_bytes(last.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"last\.safetensors is no trained metanet"):
        load_task(last)
    wspace.save_checkpoint({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="other.safetensors is no trained metanet"):
        load_task(tmp_path / "other.safetensors")


def test_full_disk_keeps_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def checkpoint(step: int) -> dict[str, Any]:
        return {"state_dict": {"a": torch.zeros(2) + step}, "global_step": step,
                "optimizer_states": [step]}  # fmt: skip

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    io, path = SafeCheckpoints(), tmp_path / "last.safetensors"
    io.save_checkpoint(checkpoint(1), path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="no space"):
            io.save_checkpoint(checkpoint(2), path)
    found = io.load_checkpoint(path)
    assert found["optimizer_states"] == [1] and found["state_dict"]["a"].tolist() == [1, 1]
    assert {item.name for item in tmp_path.iterdir()} == {path.name, resume_file(path).name}


def test_hostile_header(zoos: dict[str, Path], tmp_path: Path) -> None:
    fitted(zoos["one"], tmp_path / "a", 1)
    last = tmp_path / "a" / "last.safetensors"
    io, found = SafeCheckpoints(), SafeCheckpoints().load_checkpoint(last)
    text = json.dumps(found["wspace"])

    def changed(old: str, new: str) -> Path:
        path = tmp_path / "changed.safetensors"
        assert old in text
        io.save_checkpoint({**found, "wspace": json.loads(text.replace(old, new))}, path)
        return path

    with pytest.raises(CheckpointError, match="unknown task"):
        load_task(changed('"Classification"', '"os.system"'))
    with pytest.raises(CheckpointError, match="header of .* is damaged"):
        load_task(changed('"smoothing"', '"smoother"'))
    with pytest.raises(CheckpointError, match="header of .* is damaged"):
        load_task(changed('"hidden": 4', '"hidden": "4"'))
    with pytest.raises(CheckpointError, match="header of .* is damaged"):
        load_task(changed('"lr": 0.01, ', '"lr": 0.01, "more": 0, '))
    for wrong in ("3", "[]", "[" * 100_000):
        bad = save({}, {"format": "wspace-task-1", "wspace": wrong})
        (tmp_path / "bad.safetensors").write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"bad\.safetensors is"):
            load_task(tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match="do not fit its options"):
        load_task(changed('"layers": 2', '"layers": 3'))
    with pytest.raises(CheckpointError, match="'wspace' is not plain"):
        io.save_checkpoint({**found, "wspace": {"a": object()}}, tmp_path / "b.safetensors")


# --- predictions ------------------------------------------------------------------


def test_state_finds_its_space(zoos: dict[str, Path], tmp_path: Path) -> None:
    run, data = trainer(1, tmp_path), ZooDataModule(zoos["two"], batch_size=32)
    run.fit(Classification("StatNN"), datamodule=data)
    task = load_task(tmp_path / "last.safetensors")
    space, state = data.zoo[60]
    assert space_for(task, state) == space
    assert space_for(task, {**state, "more": torch.zeros(2)}) is None
    assert space_for(task, {k: x[:1] for k, x in state.items()}) is None
    assert task.seen is not None
    task.others = task.seen  # the same graph, whichever it is
    assert space_for(task, state) == space


def test_equal_shapes_ask_for_code(zoos: dict[str, Path]) -> None:
    kinds = [
        Architecture(
            "datasets_zoo.architectures:cnn",
            {"channels": 1, "widths": [3, 4], "activation": activation},
            (InputSpec((1, 1, 8, 8)),),
        )
        for activation in ("relu", "tanh")
    ]
    task = Classification("GraphMetanet", SMALL["GraphMetanet"])
    seen = Seen(tuple(kinds), tuple(k.space() for k in kinds))
    task.seen, task.others = Seen(seen.architectures[:1], seen.spaces[:1]), Seen()
    state = {p.name: torch.zeros(p.shape) for p in seen.spaces[0].params}
    assert space_for(task, state) == seen.spaces[0]
    task.others = Seen(seen.architectures[1:], seen.spaces[1:])
    match = r"(?s)fit several arch.*cnn\(.*'relu'.*cnn\(.*'tanh'.*--model py:file.py:function"
    with pytest.raises(SpaceMismatch, match=match):
        space_for(task, state)


def test_seen_is_what_was_trained_on(zoos: dict[str, Path], tmp_path: Path) -> None:
    run = trainer(1, tmp_path)
    data = ZooDataModule(zoos["two"], batch_size=16, held_out={"family": ["w5"]})
    task = Prediction("StatNN", SMALL["StatNN"])
    run.fit(task, datamodule=data)
    run.test(task, datamodule=data, verbose=False)  # on the others
    for found in (task, load_task(tmp_path / "last.safetensors")):
        assert found.seen is not None and found.known is not None
        assert [a.options["width"] for a in found.seen.architectures] == [4]
        assert [a.options["width"] for a in found.others.architectures] == [5]
        assert found.others.spaces == tuple(data.zoo[[30]].spaces[1:])
    whole = Prediction("StatNN", SMALL["StatNN"])
    trainer(1).fit(whole, datamodule=ZooDataModule(zoos["two"], batch_size=16))
    assert whole.seen is not None
    assert len(whole.seen.spaces) == 2 and not whole.others.spaces


def test_editing_of_what_was_held_out(tmp_path: Path) -> None:
    build(Toys(48, (4, 5), kind="siren"), tmp_path)
    data = ZooDataModule(tmp_path, batch_size=16, held_out={"family": ["w5"]})
    task, run = Editing("GraphMetanet", SMALL["GraphMetanet"], side=8), trainer(1)
    run.fit(task, datamodule=data)
    (found,) = run.test(task, datamodule=data, verbose=False)
    assert np.isfinite(found["test/mse"])


# --- weights of another task ------------------------------------------------------


@pytest.fixture(scope="module")
def contrastive(zoos: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of contrastive trainings, by name of the metanet."""
    folder = tmp_path_factory.mktemp("contrastive")
    for name in ("GraphMetanet", "DWSNet", "StatNN"):
        seed_everything(0, verbose=False)
        task = Contrastive(name, SMALL[name], dimension=6, optimization=Optimization(lr=1e-2))
        data = ZooDataModule(zoos["one"], batch_size=16)
        trainer(2, folder / name).fit(task, datamodule=data)
    return folder


def started(task: Any, path: Path) -> Any:
    """The task as it is before its first step."""
    data = ZooDataModule(path, batch_size=16, seed=1)
    trainer(1, limit_train_batches=0, limit_val_batches=0).fit(task, datamodule=data)
    return task


@pytest.mark.parametrize("name", ["GraphMetanet", "DWSNet", "StatNN"])
def test_pretrained_body(
    name: str, zoos: dict[str, Path], contrastive: Path, tmp_path: Path
) -> None:
    file = contrastive / name / "last.safetensors"
    options = {**SMALL[name], "dropout": 0.3}
    seed_everything(1, verbose=False)
    before = load_task(file).metanet.state_dict()
    task = started(Prediction(name, options, pretrained=file), zoos["one"])
    after = task.metanet.state_dict()
    assert task.started is not None and {*task.started.loaded} | {*task.started.fresh} == {*after}
    assert all(torch.equal(after[k], before[k]) for k in task.started.loaded)
    assert len(task.started.fresh) == 2  # weight and bias of the last layer
    assert all(after[k].shape != before[k].shape for k in task.started.fresh)
    assert str(file) in str(task.started) and task.started.fresh[0] in str(task.started)
    fresh = started(Prediction(name, options), zoos["one"]).metanet.state_dict()  # negative control
    assert any(not torch.equal(fresh[k], before[k]) for k in task.started.loaded)
    run = trainer(1, tmp_path)
    run.fit(task, datamodule=ZooDataModule(zoos["one"], batch_size=16))
    moved = contrastive / name / "moved.safetensors"
    file.rename(moved)  # it is not needed any more
    try:
        assert equal(load_task(tmp_path / "last.safetensors"), task)
    finally:
        moved.rename(file)


def test_pretrained_head_of_the_same_size(zoos: dict[str, Path], contrastive: Path) -> None:
    file = contrastive / "StatNN" / "last.safetensors"
    task = started(
        Classification("StatNN", SMALL["StatNN"], classes=6, pretrained=file), zoos["one"]
    )
    assert task.started is not None and task.started.fresh == ()
    assert equal(task.metanet, load_task(file).metanet)


def test_pretrained_for_parameters(zoos: dict[str, Path], contrastive: Path) -> None:
    file = contrastive / "GraphMetanet" / "last.safetensors"
    task = started(Editing("GraphMetanet", SMALL["GraphMetanet"], pretrained=file), zoos["image"])
    assert task.started is not None and len(task.started.loaded) > len(task.started.fresh) > 2
    before = load_task(file).metanet.state_dict()
    after = task.metanet.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in task.started.loaded)
    assert all(k.startswith(("head.", "last.", "layers.1.")) for k in task.started.fresh)


def test_pretrained_that_does_not_fit(zoos: dict[str, Path], contrastive: Path) -> None:
    def refused(match: str, name: str, path: str = "one", **options: Any) -> None:
        file = contrastive / options.pop("file", name) / "last.safetensors"
        task = Classification(name, {**SMALL[name], **options}, pretrained=file)
        with pytest.raises(WSpaceError, match=match):
            started(task, zoos[path])

    refused(r"(?s)another metanet.*StatNN.*got GraphMetanet", "StatNN", file="GraphMetanet")
    refused(r"(?s)other options.*expected channels = 9.*got channels = 8", "GraphMetanet",
            channels=9)  # fmt: skip
    refused(r"(?s)other options.*layers = 3.*layers = 2", "GraphMetanet", layers=3)
    refused("made for other networks", "DWSNet", "image")
    refused("made for other networks", "StatNN", "two")
    own = wspace.nn.StatNN(3)
    with pytest.raises(WSpaceError, match="the metanet is a module"):
        Classification(own, pretrained="x.safetensors")
    missing = Classification("StatNN", pretrained="nowhere.safetensors")
    with pytest.raises(CheckpointError, match=r"pretrained: there is no file nowhere\.safetensors"):
        started(missing, zoos["one"])


def test_learned_inputs_do_not_decay(zoos: dict[str, Path]) -> None:
    for name, options in (
        ("ProbeOnly", SMALL["ProbeOnly"]),
        ("GraphMetanet", {**SMALL["GraphMetanet"], "probes": 3}),
    ):
        task = started(Classification(name, options), zoos["one"])
        decay = {
            id(p): group["weight_decay"]
            for group in task.configure_optimizers()["optimizer"].param_groups
            for p in group["params"]
        }
        for key, p in task.named_parameters():
            assert decay[id(p)] == (0.01 if p.dim() > 1 and "probes.input" not in key else 0), key
        assert any("probes.input" in key and p.dim() > 1 for key, p in task.named_parameters())


def test_any_network(zoos: dict[str, Path]) -> None:
    """A network of an architecture that is in no zoo."""
    run, data = trainer(1), ZooDataModule(zoos["two"], batch_size=32)
    task = Prediction("GraphMetanet", SMALL["GraphMetanet"])
    run.fit(task, datamodule=data)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 4 * 4, 7))
    graph = wspace.encode(wspace.trace(net, torch.zeros(1, 3, 6, 6)), net.state_dict())
    found = predict(task, [graph, *data.zoo.batch([0, 1]).graphs])["test_accuracy"]
    assert found.shape == (3,) and bool(((found > 0) & (found < 1)).all())
    with pytest.raises(ZooError, match="no networks"):
        predict_zoo(task, data.zoo[[]])
