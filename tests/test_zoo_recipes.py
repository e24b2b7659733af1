"""Recipes of INRs and of classifiers: what they make is what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import wspace
from datasets_zoo.classifiers import FAMILIES, ImageClassifiers
from datasets_zoo.images import images
from datasets_zoo.inr import ImageINRs, Siren, SirenGradient, siren_init
from wspace.errors import ZooError
from wspace.testing import assert_close, assert_same
from wspace.zoo.images import grid
from wspace.zoo.recipe import Cohort, grouping, recipe_from
from wspace.zoo.train import Training, train_many, vmapped

SIZES = (2, 7, 5, 3)


def square(out: Tensor, y: Tensor) -> Tensor:
    return (out - y).square().mean((1, 2))


@pytest.mark.parametrize("sizes", [SIZES, (2, 6, 1), (3, 2)])
def test_gradients_of_sirens_by_hand_are_those_of_autograd(
    sizes: tuple[int, ...], generator: torch.Generator
) -> None:
    x = torch.rand(11, sizes[0], generator=generator, dtype=torch.float64)
    y = torch.rand(4, 11, sizes[-1], generator=generator, dtype=torch.float64)
    state = {n: p.double() for n, p in siren_init(4, sizes, 30.0, generator).items()}
    hand = SirenGradient(x, y, len(sizes) - 1, 30.0)
    auto = vmapped(Siren(sizes).double(), lambda step, rows: (x, y[rows]), square, shared=True)
    for rows in (torch.arange(4), torch.tensor([3, 1])):  # in kept buffers, then in part of them
        some = {n: p[rows] for n, p in state.items()}
        losses, slopes = hand(some, 0, rows)
        expected, wanted = auto(some, 0, rows)
        assert_close(losses, expected)
        assert_close(dict(slopes), dict(wanted))
    moved = {n: p + 1e-3 for n, p in state.items()}
    assert (hand(moved, 0, torch.arange(4))[0] - auto(state, 0, torch.arange(4))[0]).abs().max() > 0


def test_training_by_hand_is_training_by_autograd(generator: torch.Generator) -> None:
    x = grid(5, 4).double()
    y = torch.rand(3, 20, 1, generator=generator, dtype=torch.float64)
    sizes = (2, 6, 5, 1)
    state = {n: p.double() for n, p in siren_init(3, sizes, 30.0, generator).items()}
    hand = SirenGradient(x, y, 3, 30.0)
    auto = vmapped(Siren(sizes).double(), lambda step, rows: (x, y[rows]), square, shared=True)
    done = [train_many(state, g, Training(20, 1e-3, schedule="cosine")) for g in (hand, auto)]
    assert_close(done[0].state, done[1].state)


@pytest.fixture(scope="module")
def fitted() -> Cohort:
    return ImageINRs("digits", count=12, views=2, size=8, steps=300, hidden=(16, 16)).cohort(0)


def test_inrs_show_their_images(fitted: Cohort) -> None:
    data = images("digits")
    pixels = torch.cat([data.train_x, data.test_x])
    labels = torch.cat([data.train_y, data.test_y])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    module, table = fitted.architecture.module(), fitted.table
    errors: list[float] = []
    for i in range(8):
        state = {name: x[i] for name, x in fitted.state.items()}
        drawn = functional_call(module, state, (grid(8, 8),)).reshape(8, 8)
        place = order[int(table["image"][i])]
        assert int(table["label"][i]) == int(labels[place])
        assert (table["split"][i] == "test") == (int(place) >= len(data.train_y))
        error = float((drawn - pixels[place] / 255).square().mean())
        assert abs(-10 * torch.tensor(error).log10() - table["psnr"][i]) < 1e-2
        errors.append(error)
    assert max(errors) < 1e-3  # 30 dB
    assert table["image"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert table["view"].tolist() == [0, 1] * 4
    first = fitted.state["layers.0.weight"]
    assert not torch.equal(first[0], first[1])  # views are networks of their own


def test_cohorts_depend_on_seed_and_number_only(fitted: Cohort) -> None:
    def make(**changes: Any) -> Cohort:
        options = {"count": 12, "views": 2, "size": 8, "steps": 300, "hidden": (16, 16)} | changes
        return ImageINRs("digits", **options).cohort(0)

    for again in (make(), make(count=99)):
        assert_same(dict(again.state), dict(fitted.state))
    short = make(count=5)  # the last cohort of a smaller zoo is the beginning of it
    assert_same(dict(short.state), {n: x[:5] for n, x in fitted.state.items()})
    other = make(seed=1)
    assert not torch.equal(other.state["layers.1.weight"], fitted.state["layers.1.weight"])


def test_inrs_have_the_symmetry_of_sines(fitted: Cohort) -> None:
    space = fitted.architecture.space()
    kinds = {kind for gauge in space.gauges for kind in [gauge.kind]}
    assert {"sign", "phase"} <= kinds
    module: nn.Module = fitted.architecture.module(device="cpu").double()
    state = {n: x[0].double() for n, x in fitted.state.items()}
    module.load_state_dict(state)
    assert wspace.verify(space, module, (grid(8, 8).double(),)).ok


@pytest.mark.parametrize("family", FAMILIES)
def test_classifiers_of_every_family(family: str) -> None:
    options: dict[str, Any] = {"count": 3, "size": 4, "steps": (4, 8), "checkpoints": 2}
    recipe = ImageClassifiers("digits", families=(family,), judged=50, seed=1, **options)
    before = torch.random.get_rng_state()
    made, again = recipe.cohort(0), recipe.cohort(0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert_same(dict(made.state), dict(again.state))
    table = made.table
    assert {len(column) for column in table.values()} == {6}
    assert table["network"].tolist() == [0, 0, 1, 1, 2, 2]
    assert grouping(recipe) == "network"
    assert (torch.as_tensor(table["step"])[1::2] == torch.as_tensor(table["steps"])[1::2]).all()
    space = made.architecture.space()
    space.validate({name: x[0] for name, x in made.state.items()})
    assert set(made.state) == {p.name for p in space.params}
    module = made.architecture.module(device="cpu").double()
    state = {n: x[1].double() for n, x in made.state.items()}
    module.load_state_dict(state, strict=False)
    x = made.architecture.example()[0].double().expand(2, -1, -1, -1)
    assert wspace.verify(space, module, (x,)).ok


def test_accuracies_are_those_of_the_states() -> None:
    recipe = ImageClassifiers(
        "digits", count=4, size=4, steps=(150, 200), checkpoints=2, judged=400
    )
    made = recipe.cohort(0)
    data = images("digits")
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))[:400]
    train = data.train_x.float()
    x = ((data.test_x[order].float() - train.mean()) / train.std())[:, None]
    module, right = made.architecture.module(), []
    for i in range(8):
        answer = functional_call(module, {n: s[i] for n, s in made.state.items()}, (x,))
        right.append(float((answer.argmax(1) == data.test_y[order]).float().mean()))
    assert_close(torch.tensor(right), torch.as_tensor(made.table["test_accuracy"]).float())
    assert max(right) > 0.3 and len(set(right)) > 4


def test_unknown_families_are_refused() -> None:
    with pytest.raises(ZooError, match="no such family"):
        ImageClassifiers("digits", families=("rnn",)).cohort(0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("image_inrs", {"size": 0}),
        ("image_classifiers", {"steps": (20, 10)}),
        ("language_models", {"count": 0}),
        ("trajectories", {"every": 0}),
        ("untrained", {"size": -1}),
    ],
)
def test_options_that_cannot_be_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ZooError, match=f"options that cannot be(.|\n)*{next(iter(options))}"):
        recipe_from(name, options)


def test_more_networks_than_images_are_refused() -> None:
    with pytest.raises(ZooError, match="too few images(.|\n)*3594"):
        ImageINRs("digits", count=4000, views=2, size=8).cohort(0)


def test_one_activation_for_all() -> None:
    options: dict[str, Any] = {"count": 8, "size": 2, "steps": (1, 2), "checkpoints": 1}
    for k in range(4):
        made = ImageClassifiers("digits", activation="gelu", judged=10, **options).cohort(k)
        assert made.architecture.options["activation"] == "gelu"
        assert list(made.table["activation"]) == ["gelu", "gelu"]
    with pytest.raises(ZooError, match="no such activation(.|\n)*softsign"):
        ImageClassifiers("digits", activation="softsign")
