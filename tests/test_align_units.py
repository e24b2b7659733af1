"""Units of two models compared: against slow definitions, and on networks trained on digits."""

import json
from itertools import combinations
from pathlib import Path

import matplotlib.image
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import wspace
from wspace.align import compare_units
from wspace.align.activations.units import UnitReport, unexplained
from wspace.errors import MeasureError, SpaceMismatch
from wspace.report import plot_units


def digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 8 - 1, dtype=torch.float32), torch.tensor(y)


def trained(seed: int, x: Tensor, y: Tensor) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(nn.Linear(64, 30), nn.Tanh(), nn.Linear(30, 22), nn.Tanh(),
                           nn.Linear(22, 10))  # fmt: skip
    for p in module.parameters():
        size = p.shape[-1] if p.dim() > 1 else 100
        p.data = torch.randn(p.shape, generator=generator) / size**0.5
    optimizer = torch.optim.Adam(module.parameters(), 5e-3)
    for _ in range(12):
        for rows in torch.randperm(len(x), generator=generator).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x[rows]), y[rows]).backward()
            optimizer.step()
    return module


@pytest.fixture(scope="module")
def compared() -> tuple[UnitReport, nn.Sequential, nn.Sequential, Tensor]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x, y = digits()
    a, b = trained(0, x, y), trained(1, x, y)
    report = compare_units(wspace.trace(a, x[:2]), a, b, x.split(300), terms=4)
    torch.set_num_threads(threads)
    return report, a, b, x


def test_trained_networks_have_units_in_common(
    compared: tuple[UnitReport, nn.Sequential, nn.Sequential, Tensor],
) -> None:
    report, a, b, x = compared
    assert list(report.groups) == ["h1", "h2"]
    for group in report.groups.values():
        assert bool(group.alive.all())
        assert float(group.matched.mean()) > 0.4
        assert float(group.matched.mean()) > 4 * float(group.chance.mean())
        assert bool((group.best >= group.matched).all())
        assert float(group.best.mean()) > float(group.matched.mean()) + 0.02
        assert 1 < group.shared < len(group.pairs)
        assert sorted(group.pairs.tolist()) == list(range(len(group.pairs)))
        assert bool((group.errors.diff(dim=0) <= 1e-12).all())
        assert bool((group.errors[0] - 1).abs().max() < 1e-12)
        assert bool((group.errors[1] <= 1 - group.best.clamp_min(0) ** 2 + 0.05).all())
    with torch.no_grad():
        one = {"pre": a[0](x), "post": a[:2](x)}
        two = {"pre": b[0](x), "post": b[:2](x)}
    joint = [torch.corrcoef(torch.cat([one[k], two[k]], 1).T.double())[:30, 30:] for k in one]
    assert float((torch.stack(joint).mean(0) - report.groups["h1"].correlation).abs().max()) < 1e-4
    t = report.matching
    swapped = wspace.act(t, b.state_dict(), t.space)
    mean = {k: (v + swapped[k]) / 2 for k, v in a.state_dict().items()}
    plain = {k: (v + b.state_dict()[k]) / 2 for k, v in a.state_dict().items()}
    y = digits()[1]

    def accuracy(state: dict[str, Tensor]) -> float:
        return float((torch.func.functional_call(a, state, x).argmax(1) == y).double().mean())

    assert accuracy(mean) > accuracy(plain) + 0.03


def test_a_model_beside_itself(generator: torch.Generator) -> None:
    module = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 2)).double()
    x = torch.randn(99, 3, generator=generator, dtype=torch.float64)
    space, state = wspace.trace(module, x), module.state_dict()
    t = wspace.sample(space, generator=generator)
    report = compare_units(space, state, wspace.act(t, state, space), [x], module=module)
    (group,) = report.groups.values()
    assert torch.equal(group.pairs, wspace.inverse(t).permutations["h1"])
    assert float(group.matched.min()) > 1 - 1e-9
    assert float(group.errors[1].max()) < 1e-9
    assert float(group.chance.max()) < 0.7


def slow(variance: Tensor, cross: Tensor, gram: Tensor, terms: int) -> Tensor:
    """Forward selection by solving for the weights of every choice."""
    rows = []
    for v, c in zip(variance, cross, strict=True):
        chosen: list[int] = []
        errors = [float(v)]
        for _ in range(terms):
            left = {}
            for j in set(range(len(gram))) - {*chosen}:
                s = [*chosen, j]
                left[j] = float(v - c[s] @ torch.linalg.solve(gram[s][:, s], c[s]))
            chosen.append(min(left, key=lambda j: left[j]))
            errors.append(left[chosen[-1]])
        rows.append(torch.tensor(errors, dtype=torch.float64))
    return torch.stack(rows, 1)


def test_unexplained(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(60, 9, generator=generator, dtype=torch.float64)
    y = x[:, :4] @ torch.randn(4, 5, generator=generator, dtype=torch.float64) + x[:, 4:] ** 2
    x, y = x - x.mean(0), y - y.mean(0)
    tables = (y * y).sum(0), y.T @ x, x.T @ x
    found = unexplained(*tables, terms=6)
    assert found.shape == (7, 5)
    assert float((found - slow(*tables, terms=6)).abs().max()) < 1e-8
    best = min(
        float(
            tables[0][0] - tables[1][0, s] @ torch.linalg.solve(tables[2][s][:, s], tables[1][0, s])
        )
        for s in map(list, combinations(range(9), 6))
    )
    assert float(found[6, 0]) >= best - 1e-9
    monkeypatch.setattr("wspace.align.activations.units.CHUNK", 100)
    assert torch.equal(unexplained(*tables, terms=6), found)
    twice = unexplained(tables[0], tables[1][:, [0, 0]], tables[2][[0, 0]][:, [0, 0]], terms=5)
    assert twice.shape == (3, 5)
    assert torch.equal(twice[1], twice[2])  # the same unit again explains nothing more


def test_text_and_data(
    compared: tuple[UnitReport, nn.Sequential, nn.Sequential, Tensor],
) -> None:
    report = compared[0]
    lines = str(report).splitlines()
    assert lines[0].split()[:3] == ["group", "units", "dead"]
    assert lines[1].startswith("h1     30     0")
    assert max(map(len, lines)) < 100
    data = json.loads(json.dumps(report.to_data()))
    assert data["groups"]["h2"]["size"] == 22
    assert data["groups"]["h2"]["pairs"] == report.groups["h2"].pairs.tolist()
    assert len(data["groups"]["h1"]["errors"]) == 5
    assert data["unobserved"] == {}


def test_picture(
    compared: tuple[UnitReport, nn.Sequential, nn.Sequential, Tensor], tmp_path: Path
) -> None:
    figure = plot_units(compared[0], tmp_path / "units.png", title="Units")
    assert len(figure.axes) == 8
    assert matplotlib.image.imread(tmp_path / "units.png").std() > 0.05
    _, matched, pairs, _ = figure.axes[:4]
    image = matched.images[0].get_array()
    assert image.diagonal().mean() > 3 * abs(image.mean())
    assert [t.get_text() for t in pairs.get_legend().get_texts()][0] == "one to many"
    assert len(plot_units(compared[0], groups=["h2"]).axes) == 4
    with pytest.raises(MeasureError, match="got h7"):
        plot_units(compared[0], groups=["h7"])


def test_errors() -> None:
    module, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(4, 3)
    space = wspace.trace(module, x)
    with pytest.raises(MeasureError, match="no batches"):
        compare_units(space, module, module, [])
    with pytest.raises(SpaceMismatch, match="group 'h9'"):
        compare_units(space, module, module, [x], groups=["h9"])
