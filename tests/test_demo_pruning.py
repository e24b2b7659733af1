"""The demonstration prunes: what it says is what was asked, and the network is untouched."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wspace.demo import digits, network
from wspace.demo.pruning import _importances, prune_network
from wspace.report import Report


@pytest.fixture(scope="module")
def stage() -> Any:
    images, labels, test, truth = digits()
    said: list[str] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network().eval()
    return SimpleNamespace(
        found={"model": model, "images": images, "labels": labels, "test": test, "truth": truth},
        fast=True,
        page=Report("A page"),
        say=said.append,
        said=said,
    )


def test_every_importance_is_tried_and_the_network_left_alone(stage: Any) -> None:
    before = {n: x.clone() for n, x in stage.found["model"].state_dict().items()}
    prune_network(stage)
    after = stage.found["model"].state_dict()
    assert all(torch.equal(x, after[n]) for n, x in before.items())
    assert [text.partition(":")[0] for text in stage.said] == list(_importances(stage))
    for text in stage.said:
        found = re.fullmatch(
            r".*: (\d+)% of the work, ([\d.]+)% right, ([\d.]+)% once trained on", text
        )
        assert found is not None and int(found[1]) <= 50
        assert float(found[3]) > float(found[2])  # it was not trained at all before
