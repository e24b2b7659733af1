"""Recipes for untrained networks, language models and training trajectories, on tiny counts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from datasets_zoo.language import LanguageModels, gpt, judge, text_batches, tokens_of, windows
from datasets_zoo.trajectories import Trajectories, plain_cnn
from datasets_zoo.untrained import ACTIVATIONS, Untrained, complexity, lempel_ziv, perceptron
from wspace.errors import ZooError
from wspace.graph import decode
from wspace.trace.verify import verify
from wspace.zoo.build import build
from wspace.zoo.recipe import Cohort, Recipe, described, grouping

LANGUAGE = LanguageModels(
    text="zen",
    count=3,
    widths=(8,),
    blocks=(1,),
    context=8,
    batch=4,
    steps=(4, 9),
    judged=5,
    size=2,
)
RECIPES: dict[str, Any] = {
    "untrained": Untrained(count=5, grid=8, size=3),
    "language": LANGUAGE,
    "mlp": Trajectories(count=3, size=2, width=6, steps=6, every=3, batch=5, judged=20),
    "cnn": Trajectories("cnn", count=3, size=2, width=3, steps=4, every=4, batch=5, judged=20),
    "text": Trajectories(
        "language", "python_docs", count=3, size=2, width=4, steps=2, every=1, batch=2, judged=3
    ),
}


def same(a: Cohort, b: Cohort, rows: int | None = None) -> None:
    """Equal bit for bit, or the first `rows` of `b` are `a`."""
    assert a.architecture == b.architecture and a.state.keys() == b.state.keys()
    assert all(torch.equal(x, b.state[name][:rows]) for name, x in a.state.items())
    assert a.table.keys() == b.table.keys()
    for name, values in a.table.items():
        np.testing.assert_array_equal(np.asarray(values), np.asarray(b.table[name][:rows]))


@pytest.fixture(autouse=True)
def digits(request: pytest.FixtureRequest) -> None:
    if "mlp" in request.node.name or "cnn" in request.node.name:
        pytest.importorskip("sklearn")


@pytest.mark.parametrize("name", RECIPES)
def test_cohorts(name: str) -> None:
    recipe: Recipe = RECIPES[name]
    assert recipe.cohorts == 2
    state = torch.get_rng_state()
    first, last = recipe.cohort(0), recipe.cohort(1)
    assert torch.equal(torch.get_rng_state(), state)
    same(first, recipe.cohort(0))
    grown: Recipe = replace(RECIPES[name], count=RECIPES[name].count + 1)
    same(first, grown.cohort(0))
    whole = grown.cohort(1)
    n = len(next(iter(last.state.values())))
    assert n < len(next(iter(whole.state.values())))
    same(last, whole, n)
    other = replace(RECIPES[name], seed=1).cohort(0)
    pairs = zip(first.state.values(), other.state.values(), strict=True)
    assert any(x.shape != y.shape or not torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("name", RECIPES)
def test_states_fit_the_space_and_obey_it(name: str) -> None:
    cohort = RECIPES[name].cohort(0)
    space = cohort.architecture.space()
    rows = {len(values) for values in cohort.table.values()}
    assert rows == {len(x) for x in cohort.state.values()}
    shapes = {param.name: tuple(axis.size for axis in param.axes) for param in space.params}
    leading = 1 if cohort.steps is None else 2
    assert {n: tuple(x.shape[leading:]) for n, x in cohort.state.items()} == shapes
    module = cohort.architecture.module(device="cpu")
    last = {n: x[0] if leading == 1 else x[0, -1] for n, x in cohort.state.items()}
    module.load_state_dict(last, strict=False)
    assert verify(space, module, cohort.architecture.example()).ok


# --- untrained ------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_obeys_its_space(activation: str) -> None:
    recipe = Untrained(1, activations=(activation,), widths=(5,), depths=(2,), grid=4, size=1)
    cohort = recipe.cohort(0)
    module = perceptron(width=5, depth=2, activation=activation)
    module.load_state_dict({name: x[0] for name, x in cohort.state.items()})
    assert verify(cohort.architecture.space(), module, torch.randn(3, 2)).ok


def test_complexity_grows_with_frequency() -> None:
    n = 16
    x = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    waves = torch.stack([torch.cos(torch.pi * k * x).expand(n, n) for k in (1, 2, 5)])
    column = complexity(waves)
    for name in ("fourier", "energy"):
        assert torch.allclose(column[name], torch.tensor([0.5, 1.0, 2.5]))
    assert torch.allclose(column["deviation"], waves.flatten(1).std(1).float())
    assert float(complexity(torch.zeros(1, n, n))["fourier"]) == 0
    tilted = torch.cos(torch.pi * 3 * x)[:, None] * torch.cos(torch.pi * 4 * x)
    assert torch.allclose(complexity(tilted[None])["energy"], torch.tensor([2.5]))


def test_lempel_ziv() -> None:
    assert lempel_ziv([False] * 4) == 2 * 2 / 4  # 0, 000
    coins = torch.rand(1024, generator=torch.Generator().manual_seed(0)) < 0.5
    assert 0.95 < lempel_ziv(coins.tolist()) < 1.15
    assert lempel_ziv([False, True] * 512) == 3 * 10 / 1024


def test_signs_are_read_like_a_plough() -> None:
    row = [0.0, 0, 1, 1, 2, 3, 4, 5]  # the median is 1
    word = [False, False, False, False, True, True, True, True]
    turned = [bit for i in range(8) for bit in (word[::-1] if i % 2 else word)]
    assert lempel_ziv(turned) != lempel_ziv(word * 8)
    measured = complexity(torch.tensor(row).double().expand(1, 8, 8))["lempel_ziv"]
    assert float(measured) == lempel_ziv(turned)


def test_magnitude_makes_tanh_complex() -> None:
    recipe = Untrained(300, activations=("tanh",), widths=(16,), depths=(2,), grid=16, size=300)
    table = recipe.cohort(0).table
    ranks = [torch.as_tensor(table[name]).argsort().argsort() for name in ("magnitude", "fourier")]
    assert float(torch.corrcoef(torch.stack(ranks).float())[0, 1]) > 0.6


# --- language -------------------------------------------------------------------------------------


def test_gpt_is_causal() -> None:
    net = gpt(11, 7, width=8, blocks=2, heads=2).eval()
    x = torch.randint(11, (2, 7))
    y = x.clone()
    y[:, 4] = (y[:, 4] + 1) % 11
    assert torch.allclose(net(x)[:, :4], net(y)[:, :4])
    assert not torch.allclose(net(x)[:, 4:], net(y)[:, 4:])


@pytest.mark.parametrize("tied", [True, False])
def test_heads_are_tied_or_not(tied: bool) -> None:
    cohort = replace(LANGUAGE, tied=tied, count=1).cohort(0)
    assert ("head.weight" in cohort.state) is not tied
    assert len(cohort.state["token.weight"]) == LANGUAGE.checkpoints


def test_losses_are_those_of_the_states() -> None:
    cohort = LANGUAGE.cohort(0)
    train, test, vocabulary = tokens_of("zen", "")
    assert vocabulary == cohort.architecture.options["vocabulary"]
    module = cohort.architecture.module()
    for part, tokens in (("train", train), ("test", test)):
        starts = torch.linspace(0, len(tokens) - 9, 5).long().tolist()
        for row in range(len(cohort.table["network"])):
            state = {name: x[row] for name, x in cohort.state.items()}
            losses = [
                nn.functional.cross_entropy(
                    functional_call(module, state, (tokens[None, i : i + 8],))[0],
                    tokens[i + 1 : i + 9],
                )
                for i in starts
            ]
            expected = float(torch.stack(losses).mean())
            assert float(cohort.table[f"{part}_loss"][row]) == pytest.approx(expected, rel=1e-4)


def test_language_models_learn() -> None:
    recipe = replace(LANGUAGE, count=2, steps=(150, 160), context=16, batch=16, widths=(16,))
    table = recipe.cohort(0).table
    loss = torch.as_tensor(table["train_loss"]).reshape(2, 3)
    assert bool((loss[:, 2] < loss[:, 0]).all()) and float(loss.min()) < 3.3  # chance: 3.8
    assert torch.as_tensor(table["checkpoint"]).tolist() == [0, 1, 2] * 2
    assert torch.as_tensor(table["network"]).tolist() == [0] * 3 + [1] * 3
    assert grouping(recipe) == "network"


def test_batches_of_text() -> None:
    tokens = torch.arange(100)
    fraction, noise = torch.tensor([0.2, 1.0, 1.0]), torch.tensor([0.0, 0.0, 1.0])
    batch = text_batches(tokens, (3, 500, 4), torch.Generator().manual_seed(0), fraction, noise)
    x, y = batch(0, torch.arange(3))
    assert x.shape == y.shape == (3, 500, 4)
    assert torch.equal(x[:2, :, 1:], y[:2, :, :-1]) and torch.equal(y[:2], x[:2] + 1)
    assert int(y[0].max()) < 25 and int(y[1].max()) == 99
    assert not torch.equal(y[2], x[2] + 1)
    part = text_batches(tokens, (3, 500, 4), torch.Generator().manual_seed(0), fraction, noise)
    assert torch.equal(part(0, torch.tensor([1]))[0], x[1:2])  # whoever else is in training
    assert windows(tokens, torch.tensor([7]), 2).tolist() == [[7, 8, 9]]


def test_text_that_is_too_short() -> None:
    with pytest.raises(ZooError, match=r"(?s)zen is too short.*102 characters"):
        replace(LANGUAGE, context=100).cohort(0)


# --- trajectories ---------------------------------------------------------------------------------


def test_plain_cnn_has_the_published_size() -> None:
    sizes = [sum(p.numel() for p in plain_cnn(channels).parameters()) for channels in (1, 3)]
    assert sizes == [14_378, 14_666]
    assert plain_cnn(1)[:6](torch.zeros(1, 1, 28, 28)).shape == (1, 32, 14, 14)


def adam(recipe: Trajectories, cohort: Cohort, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Torch's Adam from the first state on the same batches arrives at the others."""
    module = cohort.architecture.module(device="cpu")
    for row in range(len(cohort.table["learning_rate"])):
        module.load_state_dict({name: x[row, 0] for name, x in cohort.state.items()})
        rate = float(cohort.table["learning_rate"][row])
        optimizer = torch.optim.Adam(module.parameters(), lr=rate)
        for step, (x, y) in enumerate(batches):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x[row]), y[row]).backward()
            optimizer.step()
            if (step + 1) % recipe.every == 0:
                slot = (step + 1) // recipe.every
                for name, p in module.named_parameters():
                    assert torch.allclose(p, cohort.state[name][row, slot], atol=2e-5)


def test_trajectories_of_mlp_are_adams(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets_zoo import trajectories

    seen: list[tuple[Tensor, Tensor]] = []
    original = trajectories.vmapped

    def spy(module: nn.Module, batch: Any, loss: Any) -> Any:
        def noted(step: int, rows: Tensor) -> tuple[Tensor, Tensor]:
            seen.append(batch(step, rows))
            return seen[-1]

        return original(module, noted, loss)

    monkeypatch.setattr(trajectories, "vmapped", spy)
    recipe = replace(RECIPES["mlp"], count=2)
    cohort = recipe.cohort(0)
    assert cohort.steps is not None and cohort.steps.tolist() == [0, 3, 6]
    adam(recipe, cohort, seen)


def test_losses_along_mlp_trajectories() -> None:
    from datasets_zoo.images import standardised

    cohort = RECIPES["mlp"].cohort(0)
    x, y, *_ = standardised("digits")
    chosen = torch.linspace(0, len(y) - 1, 20).long()
    module = cohort.architecture.module()
    for slot, step in enumerate((0, 3, 6)):
        state = {name: value[1, slot] for name, value in cohort.state.items()}
        loss = nn.functional.cross_entropy(functional_call(module, state, (x[chosen],)), y[chosen])
        assert float(cohort.table[f"loss_{step:05d}"][1]) == pytest.approx(float(loss), rel=1e-4)
    assert torch.equal(cohort.table["train_loss"], cohort.table["loss_00006"])


def test_half_precision_of_mlp(tmp_path: Path) -> None:
    zoo = build(RECIPES["mlp"], tmp_path / "zoo", dtype="float16")
    assert zoo.steps is not None and zoo.steps.tolist() == [0, 3, 6]
    batch = zoo.batch([2, 0], time=2)
    exact = torch.stack([RECIPES["mlp"].cohort(i).state["1.weight"][0, 2] for i in (1, 0)])
    weight = decode(batch.graphs[0])["1.weight"]
    assert weight.dtype == torch.float32 and torch.equal(weight, exact.half().float())
    assert all(report.ok for report in zoo.verify(1))


@pytest.mark.parametrize("kind", [LanguageModels, Trajectories])
def test_where_data_lies_is_no_part_of_a_zoo(kind: Any) -> None:
    assert described(kind(root="/somewhere")) == described(kind())


def test_unknown_network() -> None:
    with pytest.raises(ZooError, match=r"(?s)no such network.*mlp, cnn, language"):
        Trajectories("rnn").cohort(0)


def test_judge_agrees_with_chance() -> None:
    tokens = torch.randint(7, (200,), generator=torch.Generator().manual_seed(0))
    net = gpt(7, 8, width=8, blocks=1, heads=2)
    state = {name: torch.zeros_like(p)[None] for name, p in net.named_parameters()}
    assert float(judge(net, state, tokens, 10, 8)) == pytest.approx(np.log(7), rel=1e-6)
