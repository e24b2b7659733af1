"""Pictures of losses between models and of many models show what was measured, and all of it."""

import math
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from torch import Tensor

from wspace.align.barrier import Barrier, LossPath
from wspace.align.distances import Embedding, embed
from wspace.errors import MeasureError
from wspace.report import plot_losses, plot_models
from wspace.report.losses import _spread  # pyright: ignore[reportPrivateUsage]


def path(*values: float, **more: list[float]) -> LossPath:
    at = torch.linspace(0, 1, len(values), dtype=torch.float64)
    rest = {name: torch.tensor(x, dtype=torch.float64) for name, x in more.items()}
    return LossPath(at, {"loss": torch.tensor(values, dtype=torch.float64), **rest})


def words(figure: object) -> list[str]:
    return [x.get_text() for ax in figure.axes for x in ax.texts]  # type: ignore[attr-defined]


def overlaps(figure: object) -> list[str]:
    """Texts that stand on another, or beyond the page."""
    figure.canvas.draw()  # type: ignore[attr-defined]
    page, wrong = figure.bbox, []  # type: ignore[attr-defined]
    for ax in figure.axes:  # type: ignore[attr-defined]
        ticks = [*ax.get_xticklabels(), *ax.get_yticklabels(), ax.title]
        found = [t for t in (*ax.texts, *ticks) if t.get_text() and t.get_visible()]
        boxes = [(t.get_text(), t.get_window_extent()) for t in found]
        for i, (text, a) in enumerate(boxes):
            if a.x0 < page.x0 or a.x1 > page.x1 or a.y0 < page.y0 or a.y1 > page.y1:
                wrong.append(f"{text} beyond the page")
            for other, b in boxes[:i]:
                across, up = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
                if min(across, up) > 2:
                    wrong.append(f"{text} on {other}")
    return wrong


def test_a_barrier_is_drawn_with_its_heights(tmp_path: Path) -> None:
    straight = path(1.0, 3.5, 2.0, right=[0.9, 0.4, 0.8])
    aligned = path(1.0, 1.5, 2.0, right=[0.9, 0.85, 0.8])
    found = Barrier(straight, aligned)
    figure = plot_losses(found, tmp_path / "b.png", title="A barrier")
    assert words(figure)[:2] == ["aligned +0", "straight +2"]
    assert sorted(words(figure)[2:]) == ["aligned +0", "straight \u22120.45"]
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["loss", "right"]
    curves = [line.get_ydata().tolist() for line in figure.axes[0].lines]
    assert curves[0] == straight.losses.tolist() and curves[2] == aligned.losses.tolist()
    assert curves[1] == [1.0, 2.0]  # the line between the ends
    assert overlaps(figure) == []
    wide, tall = figure.get_size_inches() * 160
    picture = imread(tmp_path / "b.png")
    assert abs(picture.shape[1] - wide) <= 1 and abs(picture.shape[0] - tall) <= 1
    assert len(plot_losses(found, metrics=["right"]).axes) == 1


def test_many_curves_have_labels_of_their_own() -> None:
    paths = {f"a rather long name {i}": path(1.0, 0.5 + i / 50, 0.1 + i / 500) for i in range(9)}
    figure = plot_losses(paths, ends=("start", "end"))
    assert len(words(figure)) == 9
    assert overlaps(figure) == []


def test_points_beyond_the_ends_and_values_that_are_not_finite(tmp_path: Path) -> None:
    at = torch.tensor([-0.5, 0.0, 1.0, 1.5], dtype=torch.float64)
    wild = LossPath(at, {"loss": torch.tensor([1.0, math.nan, math.inf, 2.0])})
    figure = plot_losses({"wild": wild, "tame": path(1.0, 2.0)}, tmp_path / "w.svg")
    assert "wild" in words(figure)
    inner = LossPath(at[1:2] + 0.5, {"loss": torch.tensor([1.0])})  # no ends, so no height
    assert words(plot_losses(inner)) == [""]


def test_labels_keep_their_order_and_their_distance() -> None:
    labels = [(0.1, "a", ""), (0.9, "b", ""), (0.12, "c", ""), (0.11, "d", ""), (0.89, "e", "")]
    found = _spread(labels, 0.1, (0.0, 1.0))
    assert [text for _, text, _ in found] == ["a", "d", "c", "e", "b"]
    places = [y for y, *_ in found]
    assert all(b - a >= 0.1 - 1e-9 for a, b in zip(places, places[1:], strict=False))
    assert min(places) >= 0 and max(places) <= 1
    assert _spread([], 0.1, (0.0, 1.0)) == []


def test_metrics_that_were_not_measured() -> None:
    both = {"a": path(1.0, 2.0, right=[0.0, 1.0]), "b": path(1.0, 2.0)}
    with pytest.raises(MeasureError, match="'b' without 'right'"):
        plot_losses(both)
    with pytest.raises(MeasureError, match="were not measured"):
        plot_losses({})
    assert plot_losses(both, metrics=["loss"])


# --- many models ----------------------------------------------------------------------


def points(count: int, spread: tuple[float, float] = (3.0, 1.0)) -> Embedding:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(count, 2, generator=g, dtype=torch.float64) * torch.tensor(spread)
    return embed(torch.cdist(x, x))


@pytest.mark.parametrize("colour", ["values", "labels", "none"])
@pytest.mark.parametrize("count", [1, 2, 7, 200])
def test_models_are_drawn_where_they_are(count: int, colour: str, tmp_path: Path) -> None:
    found = points(count)
    values: list[float] | Tensor | None = torch.arange(count) if colour == "values" else None
    labels = [f"run {i % 3}" for i in range(count)] if colour == "labels" else None
    figure = plot_models(found, tmp_path / "m.png", values=values, labels=labels, title="Models")
    ax = figure.axes[0]
    drawn = torch.cat([torch.as_tensor(c.get_offsets().data) for c in ax.collections])
    assert sorted(map(tuple, drawn.tolist())) == sorted(map(tuple, found.points.tolist()))
    across, up = (b - a for a, b in (ax.get_xlim(), ax.get_ylim()))
    box = ax.get_window_extent()
    assert across / up == pytest.approx(box.width / box.height)  # equal units
    assert all(ax.get_xlim()[0] < x < ax.get_xlim()[1] for x in found.points[:, 0].tolist())
    assert all(ax.get_ylim()[0] < y < ax.get_ylim()[1] for y in found.points[:, 1].tolist())
    assert imread(tmp_path / "m.png").shape[0] > 200


def test_names_and_spread_are_written() -> None:
    figure = plot_models(points(3), names=["first", "", "third"])
    assert {"first", "third", "100% of the spread is in this plane"} <= set(words(figure))


def test_wrong_arguments_of_a_map() -> None:
    with pytest.raises(MeasureError, match="not points of a plane"):
        plot_models(embed(torch.zeros(4, 4), 3))
    with pytest.raises(MeasureError, match="3 labels"):
        plot_models(points(4), labels=["a"] * 3)
    with pytest.raises(MeasureError, match="only one can be the colour"):
        plot_models(points(2), labels=["a", "b"], values=[1.0, 2.0])
