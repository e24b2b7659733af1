"""The demonstration generates: the penalty keeps earlier tasks, and the picture shows it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wspace.demo import digits
from wspace.demo.generating import TASKS, _learn, generate
from wspace.errors import MeasureError
from wspace.report import Report, plot_tasks


@pytest.fixture(scope="module")
def stage() -> Any:
    images, labels, test, truth = digits()
    said: list[str] = []
    return SimpleNamespace(
        found={"images": images, "labels": labels, "test": test, "truth": truth},
        fast=True,
        page=Report("A page"),
        say=said.append,
        said=said,
    )


def test_both_arms_are_told(stage: Any) -> None:
    generate(stage)
    assert [text.partition(":")[0] for text in stage.said] == ["with the penalty", "without"]
    assert all("of the digits right after the last task" in text for text in stage.said)


def test_the_penalty_keeps_the_first_task(stage: Any) -> None:
    _, kept = _learn(stage, 10.0, 120)
    _, lost = _learn(stage, 0.0, 120)
    assert kept[0, 0] > 0.9 and kept[-1, 0] > kept[0, 0] - 0.05
    assert kept[-1].mean() > lost[-1].mean()
    assert int(kept.isnan().sum()) == TASKS * (TASKS - 1) // 2


def test_plot_tasks_draws_every_measured_cell(tmp_path: Path) -> None:
    matrix = torch.tensor([[0.9, torch.nan], [0.5, 0.83]])
    figure = plot_tasks({"a": matrix, "b": matrix}, tmp_path / "m.svg", names=["x", "y"])
    cells = [t.get_text() for ax in figure.axes for t in ax.texts]
    assert cells == ["90", "50", "83"] * 2
    assert (tmp_path / "m.svg").stat().st_size > 1000
    with pytest.raises(MeasureError, match="matrices of accuracies"):
        plot_tasks({"a": matrix, "b": torch.zeros(3, 3)})
    with pytest.raises(MeasureError, match="matrices of accuracies"):
        plot_tasks({})
