"""Trajectories of several tasks, windows of them, and training predictors on those."""

import csv
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from torch import Tensor, nn

from datasets_zoo.trajectories import Mixed, Trajectories
from wspace.cli import main
from wspace.errors import WSpaceError, ZooError
from wspace.graph import encode
from wspace.lit import Nowcasting, Optimization, Windows, ZooDataModule
from wspace.lit.cli import _remove_unbegun
from wspace.lit.nowcasting import FILE, _sums
from wspace.lit.windows import Cut, Scaled, cut, deviation, line, reach, scaled, trained_names
from wspace.nowcast import SHIPPED, LinearFit, NiNoGraph, NiNoMLP, card_of, load
from wspace.nowcast.predictor import Predictor
from wspace.zoo import Architecture, Cohort, InputSpec, build
from wspace.zoo.recipe import generator_of

STATES = 30
OPTIONS: dict[str, dict[str, Any]] = {
    "NiNoMLP": {"channels": 16, "longest": 8},
    "NiNoGraph": {"channels": 16, "longest": 8},
}


@dataclass(frozen=True)
class Straight:
    """Trajectories on which every parameter moves along a line, two architectures in turn.

    Attributes:
        seed: Decides everything that is drawn.
        count: Number of cohorts.
        speed: Factor of the slopes.
    """

    seed: int = 0
    count: int = 8
    speed: float = 1.0

    grows: ClassVar[tuple[str, ...]] = ("count",)

    @property
    def cohorts(self) -> int:
        """Number of cohorts."""
        return self.count

    def cohort(self, index: int) -> Cohort:
        """Four networks.

        Args:
            index: Which.

        Returns:
            Their states.
        """
        width = 3 + index % 2
        options = {"width": width}
        architecture = Architecture(
            "wspace.zoo.architecture:example_network", options, (InputSpec((1, 3)),)
        )
        generator = generator_of(self.seed, index)
        time = torch.arange(STATES) / STATES
        state: dict[str, Tensor] = {}
        for name, p in architecture.module().named_parameters():
            start, slope = torch.randn(2, 4, 1, *p.shape, generator=generator)
            state[name] = start + self.speed * slope * time.view(1, -1, *[1] * p.dim())
        return Cohort(architecture, state, {"number": [index] * 4}, torch.arange(STATES) * 10)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo") / "straight"
    build(Straight(), folder)
    return folder


def data(zoo: Path, **options: Any) -> ZooDataModule:
    options = {"batch_size": 4, "time": None, "fractions": (0.7, 0.3, 0.0), **options}
    return ZooDataModule(zoo, **options)


def task(name: str, **options: Any) -> Nowcasting:
    how = Optimization(lr=1e-2, weight_decay=0.0)
    windows = Windows((1, 2), each=4, entries=8)
    return Nowcasting(name, OPTIONS[name], **{"windows": windows, "optimization": how, **options})


def trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        gradient_clip_val=1.0,
        **{"max_epochs": 30, "logger": False, **options},
    )


# --- trajectories of several tasks ----------------------------------------------------------------

MIXED = Mixed(
    ("network=mlp data=digits width=3", "network=mlp data=digits width=4 learning_rate=[0.1,0.2]"),
    count=2,
    steps=4,
    every=2,
    size=2,
)


def test_mixed_cohorts_are_those_of_their_tasks() -> None:
    assert MIXED.cohorts == 2
    for index, width in enumerate((3, 4)):
        made = MIXED.cohort(index)
        alone = MIXED.recipe(index)
        assert (alone.width, alone.steps, alone.count) == (width, 4, 2)
        expected = alone.cohort(0)
        assert all(torch.equal(x, expected.state[name]) for name, x in made.state.items())
        assert made.table["task"] == [MIXED.tasks[index]] * 2
    assert MIXED.recipe(1).learning_rate == (0.1, 0.2)
    assert MIXED.recipe(0).seed != MIXED.recipe(1).seed
    assert replace(MIXED, seed=1).recipe(0).seed != MIXED.recipe(0).seed


def test_mixed_turns_give_new_networks() -> None:
    more = replace(MIXED, count=3)
    assert more.cohorts == 4
    first, second = more.cohort(0).state, more.cohort(2).state
    assert not torch.equal(next(iter(first.values()))[0], next(iter(second.values()))[0])


@pytest.mark.parametrize(
    ("words", "said"),
    [("network=mlp widht=3", "no option 'widht'"), ("steps=3", "'steps' is the same")],
)
def test_mixed_refuses(words: str, said: str) -> None:
    with pytest.raises(ZooError, match=said):
        Mixed((words,))
    with pytest.raises(ZooError, match="no tasks"):
        Mixed(())


def test_pooled_images_are_means() -> None:
    coarse = Trajectories("mlp", "digits", count=1, size=1, steps=1, every=1, pool=2).cohort(0)
    fine = Trajectories("mlp", "digits", count=1, size=1, steps=1, every=1).cohort(0)
    assert coarse.architecture.inputs[0].shape == (1, 1, 4, 4)
    assert fine.architecture.inputs[0].shape == (1, 1, 8, 8)


# --- windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strides", [(1, 1), (2, 5), (1, 40)])
def test_windows_lie_within(strides: tuple[int, int]) -> None:
    how = Windows(strides, each=50)
    where = cut(3, 41, how, (5, 40), torch.Generator().manual_seed(0))
    assert where.row.tolist() == [r for r in range(3) for _ in range(50)]
    gaps = where.past.diff(dim=1)
    assert bool((gaps == gaps[:, :1]).all())
    assert int(gaps.min()) >= strides[0] and int(gaps.max()) <= min(strides[1], 8)
    assert int(where.past.min()) >= 0 and bool(where.known[:, 0].all())
    true = where.past[:, -1:] + gaps[:, :1] * torch.arange(1, 41)
    assert torch.equal(where.known, true < 41)
    assert torch.equal(where.ahead, true.clamp(max=40))
    if strides != (1, 1):
        assert len(set(gaps[:, 0].tolist())) > 1
    assert bool((~where.known).any())  # else nothing of the mask was tested


def test_every_start_is_drawn() -> None:
    where = cut(1, 8, Windows((1, 1), each=200), (5, 4), torch.Generator().manual_seed(0))
    assert {*where.past[:, 0].tolist()} == {0, 1, 2}


def test_too_short_trajectories() -> None:
    generator = torch.Generator()
    cut(1, 11, Windows((2, 2)), (5, 4), generator)
    with pytest.raises(ZooError, match=r"(?s)10 states are too short.*at least 11"):
        cut(1, 10, Windows((2, 2)), (5, 4), generator)


def test_deviation_is_that_of_prediction() -> None:
    """Over entries and states jointly, unbiased; of one number it is 0."""
    x = torch.randn(4, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3
    mean, spread = deviation(x)
    assert torch.allclose(spread, (x - x.mean((1, 2), True)).square().sum((1, 2)).div(34).sqrt())
    assert torch.allclose(mean, x.mean((1, 2)))
    assert not torch.allclose(spread, x.std(2).mean(1))
    assert deviation(torch.full((1, 1, 1), 2.0))[1].tolist() == [0.0]


def test_scaled_windows_are_those_of_the_trajectory() -> None:
    generator = torch.Generator().manual_seed(0)
    values = {"a": torch.randn(2, STATES, 3, 4, generator=generator), "b": torch.randn(2, STATES)}
    where = cut(2, STATES, Windows((1, 3)), (5, 8), generator)
    for part in scaled(values, ["a", "b"], where):
        flat = values[part.name].flatten(2) if part.name == "a" else values["b"][..., None]
        for i in (0, 5):
            row, past = where.row[i], where.past[i]
            x = flat[row, past]
            expected = (x - x.mean()) / (x.std() + 1e-6)
            assert torch.allclose(part.past[i], expected, atol=1e-5)
            later = flat[row, where.ahead[i]]
            assert torch.allclose(part.ahead[i], (later - x.mean()) / (x.std() + 1e-6), atol=1e-5)


def test_smooth_targets_are_means_around_them() -> None:
    generator = torch.Generator().manual_seed(0)
    values = {"a": torch.randn(2, STATES, 3, generator=generator) + 100}
    where = cut(2, STATES, Windows((1, 3), smooth=6), (5, 8), generator)
    (part,) = scaled(values, ["a"], where)
    for i in range(len(where.row)):
        x = values["a"][where.row[i]]
        window = x[where.past[i]]
        stride = int(where.past[i, 1] - where.past[i, 0])
        for k in where.known[i].nonzero()[:, 0].tolist():
            place = int(where.past[i, -1]) + stride * (k + 1)
            half = min(6 * stride, STATES - 1 - place, place)
            target = x[place - half : place + half + 1].mean(0)
            expected = (target - window.mean()) / (window.std() + 1e-6)
            torch.testing.assert_close(part.ahead[i, k], expected, rtol=1e-5, atol=3e-5)
    assert int((where.ahead - where.around).min()) >= 0 < int(where.around.max())


def test_chosen_entries_keep_the_scale_of_the_tensor() -> None:
    generator = torch.Generator().manual_seed(0)
    values = {"a": torch.randn(1, STATES, 50, generator=generator)}
    where = cut(1, STATES, Windows(), (5, 8), generator)
    (whole,) = scaled(values, ["a"], where)
    (some,) = scaled(values, ["a"], where, entries=7, generator=generator)
    assert some.chosen is not None and len({*some.chosen.tolist()}) == 7
    assert torch.equal(some.past, whole.past[..., some.chosen])
    assert torch.equal(some.ahead, whole.ahead[..., some.chosen])


def test_line_is_that_of_linear_fit() -> None:
    module = nn.Linear(2, 2, bias=False)
    past = torch.randn(5, 2, 2, generator=torch.Generator().manual_seed(0))
    weights = line(5, 40)
    for horizon in (1, 40):
        states = [{"weight": x} for x in past]
        expected = LinearFit().predict(module, states, horizon=horizon)["weight"]
        made = torch.einsum("c,cij->ij", weights[horizon - 1], past)
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=3e-5)


def test_buffers_are_not_trained_on() -> None:
    import wspace

    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    space = wspace.trace(module, (torch.zeros(2, 1, 5, 5),))
    assert {p.name for p in space.params} - {*trained_names(space)} >= {"1.running_mean"}
    assert {*trained_names(space)} == {n for n, _ in module.named_parameters()}


# --- errors ---------------------------------------------------------------------------------------


def test_errors_beyond_the_end_do_not_count() -> None:
    generator = torch.Generator().manual_seed(0)
    past, ahead = torch.randn(3, 5, 4, generator=generator), torch.randn(3, 6, 4)
    known = torch.arange(6)[None] < torch.tensor([[6], [2], [4]])
    part, changes = Scaled("a", past, ahead, None), torch.randn(3, 6, 4)
    found = _sums([part], [changes], known, False)
    assert found[-1].tolist() == [12, 12, 8, 8, 4, 4]
    beyond, within = ahead.clone(), ahead.clone()
    beyond[1, 2:] += 5
    within[1, 1] += 5
    assert torch.equal(found, _sums([part._replace(ahead=beyond)], [changes], known, False))
    assert not torch.equal(found, _sums([part._replace(ahead=within)], [changes], known, False))


def test_errors_of_perfect_answers_are_zero() -> None:
    time = torch.arange(20.0)
    x = torch.tensor([0.3, -2.0])[None, None] * time[None, :, None] + 1
    where = Cut(torch.zeros(1).long(), torch.arange(5)[None], torch.arange(5, 11)[None],
                torch.ones(1, 6, dtype=torch.bool), torch.zeros(1, 6).long())  # fmt: skip
    (part,) = scaled({"a": x}, ["a"], where)
    model, still, straight, _ = _sums([part], [part.ahead - part.past[:, -1:]], where.known, False)
    assert float(model.max()) == 0 and float(straight.max()) < 1e-4 < float(still.min())


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_training_learns_lines(name: str, zoo: Path, tmp_path: Path) -> None:
    made = task(name)
    run = trainer(tmp_path)
    run.validate(made, data(zoo), verbose=False)
    before = float(run.callback_metrics["val/relative"])
    run.fit(made, data(zoo))
    found = {k: float(v) for k, v in run.callback_metrics.items()}
    assert before > 0.9  # it moves nothing yet
    assert found["val/relative"] < 0.6
    assert found["val/relative_8"] < 0.6 if "val/relative_8" in found else True
    assert {"val/relative_1", "val/relative_5", "val/relative_of_0", "val/relative_of_1"} <= {
        *found
    }


def test_a_head_of_zeros_is_no_change(zoo: Path, tmp_path: Path) -> None:
    made = task("NiNoMLP")
    for p in made.parameters():
        p.data.zero_()
    run = trainer(tmp_path)
    run.validate(made, data(zoo), verbose=False)
    assert float(run.callback_metrics["val/relative"]) == pytest.approx(1)
    assert float(run.callback_metrics["val/relative_to_line"]) > 100  # lines are exact here


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_extreme_windows_give_finite_steps(name: str) -> None:
    """Constants, zeros, leaps of many magnitudes: no step needs to be skipped."""
    cohort = Straight().cohort(0)
    state = {n: x.clone() for n, x in cohort.state.items()}
    first, second, third, *_ = state
    state[first] *= 1e30
    state[second].zero_()
    state[second][:, -1] = 1e20  # after windows without any movement
    state[third][:, ::2] = 1e-30
    made = task(name)
    graph = encode(cohort.architecture.space(), state)
    where = cut(4, STATES, made.windows, (5, 8), torch.Generator().manual_seed(0))
    made.windows = replace(made.windows, each=12)
    where = cut(4, STATES, made.windows, (5, 8), torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    for _ in range(3):
        errors = made._errors(graph, where, torch.Generator().manual_seed(0), "train")
        loss = errors[0].sum() / errors[-1].sum()
        assert bool(loss.isfinite())
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        assert bool(norm.isfinite()) and float(norm) > 0
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in made.parameters())


def test_a_loss_that_is_not_finite_stops_training(zoo: Path, tmp_path: Path) -> None:
    made = task("NiNoMLP")
    made.predictor.get_parameter("enter.bias").data[0] = float("nan")
    run = trainer(tmp_path, limit_val_batches=0, num_sanity_val_steps=0)
    with pytest.raises(WSpaceError, match=r"(?s)loss is not finite.*enter\.bias"):
        run.fit(made, data(zoo))


def test_same_seed_same_predictor(zoo: Path, tmp_path: Path) -> None:
    ends: list[Mapping[str, Tensor]] = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        made = task("NiNoMLP")
        trainer(tmp_path, max_epochs=2).fit(made, data(zoo, seed=seed))
        ends.append(made.state_dict())
    same = [all(torch.equal(ends[0][k], e[k]) for k in ends[0]) for e in ends[1:]]
    assert same == [True, False]


def test_horizons_beyond_the_trajectories_are_left_out(
    zoo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rather than a share of nothing, which is no number."""
    made = task("NiNoMLP", windows=Windows((3, 6), each=4, entries=8))
    run = trainer(tmp_path)
    with caplog.at_level(logging.WARNING):
        run.validate(made, data(zoo), verbose=False)
    found = {k: float(v) for k, v in run.callback_metrics.items()}
    assert "val/relative_1" in found and all(math.isfinite(x) for x in found.values())
    assert "val/relative_5" in found and "val/relative_10" not in found
    assert "of horizons 6 to 8" in caplog.text and "left out" not in caplog.text
    caplog.clear()
    made = Nowcasting("NiNoMLP", {"channels": 8, "longest": 20}, windows=Windows((2, 2)))
    with caplog.at_level(logging.WARNING):
        run.validate(made, data(zoo), verbose=False)
    assert (
        "30 states reach 10 spacings" in caplog.text and "relative_20 are left out" in caplog.text
    )
    found = {k: float(v) for k, v in run.callback_metrics.items()}
    assert "val/relative_20" not in found and all(math.isfinite(x) for x in found.values())


@pytest.mark.parametrize("strides", [(1, 1), (2, 3), (4, 9)])
def test_reach_is_the_longest_known_horizon(strides: tuple[int, int]) -> None:
    how = Windows(strides, each=400)
    for states in (21, 22, 23, 24):
        where = cut(4, states, how, (5, 40), torch.Generator().manual_seed(0))
        assert reach(states, how, 5) == int(where.known.sum(1).max())


def test_networks_that_stand_still(tmp_path: Path) -> None:
    build(Straight(speed=0.0, count=4), tmp_path / "still")
    with pytest.raises(ZooError, match="no network for val moves"):
        trainer(tmp_path).validate(task("NiNoMLP"), data(tmp_path / "still"), verbose=False)


# --- refusals -------------------------------------------------------------------------------------


def test_what_nowcasting_refuses(zoo: Path, tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"(?s)single states.*time: null"):
        trainer(tmp_path).fit(task("NiNoMLP"), data(zoo, time=-1))
    with pytest.raises(WSpaceError, match=r"(?s)NiNoMLP or NiNoGraph.*NiNoMPL"):
        Nowcasting("NiNoMPL")
    with pytest.raises(WSpaceError, match="chanels"):
        Nowcasting("NiNoMLP", {"chanels": 3})
    with pytest.raises(WSpaceError, match="no predictor that can be trained"):
        Nowcasting(LinearFit())
    with pytest.raises(ZooError, match="too short"):
        trainer(tmp_path).fit(task("NiNoMLP", windows=Windows((6, 9))), data(zoo))
    with pytest.raises(WSpaceError, match="last states of a run"):
        task("NiNoMLP")([])


# --- command line ---------------------------------------------------------------------------------


def config(
    name: str, zoo: Path, folder: Path, *, windows: Mapping[str, Any] | None = None
) -> list[str]:
    """Options of a run whose folder is ``folder / "nowcast" / "version_0"``."""
    options = {"metanet": name, "options": OPTIONS[name], "windows": {"strides": [1, 2]}}
    content = {
        "model": {
            "class_path": "Nowcasting",
            "init_args": {**options, **({} if windows is None else {"windows": dict(windows)})},
        },
        "data": {
            "path": str(zoo),
            "time": None,
            "batch_size": 4,
            "fractions": [0.6, 0.2, 0.2],
            "split_name": "three",
        },
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "default_root_dir": str(folder)},
    }
    file = folder / "nowcast.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return ["--config", str(file)]


def test_a_fit_that_fails_leaves_no_folder(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor takes it one with it that was there, or in which something was learned."""
    words = config("NiNoMLP", zoo, tmp_path, windows={"strides": [9, 9]})
    assert main(["fit", *words]) == 2 and "too short" in capsys.readouterr().err
    assert [item.name for item in tmp_path.iterdir()] == ["nowcast.yaml"]
    mine = tmp_path / "nowcast" / "version_7"
    mine.mkdir(parents=True)
    assert main(["fit", *words]) == 2 and [*mine.parent.iterdir()] == [mine]
    (mine / "config.yaml").touch()
    (mine / "metrics.csv").touch()
    _remove_unbegun(mine)
    assert mine.exists()  # it shows how a training went


def test_a_run_can_be_tested(zoo: Path, tmp_path: Path) -> None:
    words = config("NiNoMLP", zoo, tmp_path)
    assert main(["fit", *words]) == 0
    last = tmp_path / "nowcast" / "version_0" / "checkpoints" / "last.safetensors"
    assert main(["test", *words, "--ckpt_path", str(last)]) == 0
    file = tmp_path / "nowcast" / "version_1" / "metrics.csv"
    (row,) = csv.DictReader(file.read_text("utf-8").splitlines())
    assert 0 < float(row["test/relative"]) < 2


@pytest.mark.parametrize("name", ["nowcast_mlp", "nowcast_graph"])
def test_shipped_configurations_leave_networks_to_test(name: str) -> None:
    file = Path(__file__).parent.parent / "configs" / f"{name}.yaml"
    shares = yaml.safe_load(file.read_text("utf-8"))["data"]["fractions"]
    assert sum(shares) == pytest.approx(1) and min(shares) > 0


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_fit_leaves_a_predictor(name: str, zoo: Path, tmp_path: Path) -> None:
    assert main(["fit", *config(name, zoo, tmp_path)]) == 0
    run = tmp_path / "nowcast" / "version_0"
    rows = list(csv.DictReader((run / "metrics.csv").read_text("utf-8").splitlines()))
    assert any(r["val/relative"] for r in rows)
    made = load(run / FILE)
    assert isinstance(made, NiNoMLP if name == "NiNoMLP" else NiNoGraph) and made.longest == 8
    card = card_of(run / FILE)
    assert card["zoo"] == str(zoo) and card["windows"]["strides"] == [1, 2]
    architecture = Straight().cohort(1).architecture
    module = architecture.module(device="cpu")
    states = [{n: p + 0.01 * t for n, p in module.named_parameters()} for t in range(5)]
    found = made.predict(module, states, horizon=8, space=architecture.space())
    assert all(not torch.equal(x, states[-1][n]) for n, x in found.items())


# --- what the package ships -----------------------------------------------------------------------


def relative(predictor: Predictor, cohort: Cohort, *, backwards: bool = False) -> float:
    """Error at ten spacings over that of no change."""
    space, errors, stays = cohort.architecture.space(), 0.0, 0.0
    for row in range(len(next(iter(cohort.state.values())))):
        for start in (5, 10, 20):
            at = [start + i for i in range(5)]
            past = [{n: x[row, i] for n, x in cohort.state.items()} for i in at]
            past = [*past[-2::-1], past[-1]] if backwards else past
            made = predictor.predict(space, past, horizon=10)
            for n, x in cohort.state.items():
                target = x[row, at[-1] + 10]
                scale = torch.stack([s[n] for s in past]).std() + 1e-6
                errors += float((made[n] - target).abs().sum() / scale)
                stays += float((past[-1][n] - target).abs().sum() / scale)
    return errors / stays


def test_two_predictors_are_shipped() -> None:
    assert SHIPPED == ("nino-graph-small", "nino-mlp-small")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_predictors_foresee_a_new_network(name: str) -> None:
    """Of a width and learning rate of its own; and time runs forwards."""
    recipe = Trajectories("mlp", "digits", count=2, size=2, width=20, steps=400, every=10,
                          batch=32, learning_rate=(3e-3, 3e-3), seed=77)  # fmt: skip
    cohort = recipe.cohort(0)
    predictor = load(name)
    ahead = relative(predictor, cohort)
    assert ahead < 0.9 and ahead + 0.05 < relative(predictor, cohort, backwards=True)
    assert card_of(name)["seed"] == 0 and card_of(name)["validation"]["relative"] < 1
