"""The demonstration's nowcast run: a fair comparison, and a verdict that can go both ways."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wspace.demo import digits
from wspace.demo.nowcasting import HOW, MARKS, RATES, Run, _curves, _trained, nowcast, verdict
from wspace.nowcast import Drift, Jump, LinearFit, NoChange
from wspace.report import Report


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


def test_runs_differ_by_jumps_alone(stage: Any) -> None:
    """Same weights and batches: jumps that change nothing give the plain run, bit for bit."""
    plain, still, line = (_trained(stage, 100, 1e-3, p) for p in (None, NoChange(), LinearFit()))
    assert plain.losses == still.losses
    assert plain.losses[:9] == line.losses[:9]  # until the first jump
    assert plain.losses != line.losses
    assert plain.jumps == () and [j.step for j in line.jumps] == list(range(10, 101, 10))
    assert plain.losses[-1] < 0.9 * plain.losses[0]


def test_drift_is_measured_at_its_averages(stage: Any) -> None:
    """Without speed the parameters are the plain run's, and what is measured is not."""
    drifts = (Drift(speed=v, begin=10, short=0.3, long=0.6) for v in (0.0, 2.0))
    still, ahead = (_trained(stage, 100, 1e-3, drift) for drift in drifts)
    plain = _trained(stage, 100, 1e-3, None)
    assert plain.losses[-1] != still.losses[-1] != ahead.losses[-1]
    assert [j.step for j in ahead.jumps] == list(range(10, 101, 10))
    assert abs(plain.losses[-1] - still.losses[-1]) < 0.5 * plain.losses[-1]


def test_the_global_generator_is_left_alone(stage: Any) -> None:
    before = torch.get_rng_state()
    _trained(stage, 100, 1e-3, LinearFit())
    assert torch.equal(torch.get_rng_state(), before)


def run_of(*losses: float) -> Run:
    return Run(tuple(range(10, 10 * len(losses) + 1, 10)), losses, (), 0.0)


@pytest.mark.parametrize(
    ("jumping", "text"),
    [
        (run_of(3.0, 0.9, 0.8, 0.7), "reached with jumps after 20: 50% fewer"),
        (run_of(3.0, 2.5, 1.4, 1.1), "not reached with jumps (1.1000): no gain here"),
        (run_of(3.0, 2.5, 1.4, 1.0), "reached with jumps after 40: no gain here"),
    ],
)
def test_the_verdict_is_that_of_the_numbers(jumping: Run, text: str) -> None:
    assert text in verdict(run_of(3.0, 2.0, 1.5, 1.0), jumping)


def test_step_is_on_the_page(stage: Any) -> None:
    nowcast(stage)
    html = stage.page.html()
    assert [line.split(":")[0] for line in stage.said] == [f"Learning rate {r:g}" for r in RATES]
    assert all(line in re.sub("&#x27;", "'", html) for line in stage.said)
    assert "data:image/svg+xml" in html and "jumps kept" in html


def test_jumps_are_marked(stage: Any) -> None:
    """Each jump once, kept ones with one mark and rejected ones with another."""
    plain, jumping = run_of(2.0, 1.5, 1.0, 0.9), run_of(2.0, 1.2, 1.1, 0.8)
    jumps = (Jump(20, horizon=4), Jump(30), Jump(40, horizon=1))
    made = Run(jumping.steps, jumping.losses, jumps, 0.0)
    ax = _curves({0.1: (plain, plain, made, plain)}).axes[0]
    assert [line.get_label() for line in ax.lines[1:]] == list(HOW)
    marks = [c.get_offsets().tolist() for c in ax.collections]
    assert [label for *_, label in MARKS] == [c.get_label() for c in ax.collections]
    assert marks == [[[20.0, 1.2], [40.0, 0.8]], [[30.0, 1.1]]]
