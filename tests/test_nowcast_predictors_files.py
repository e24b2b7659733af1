"""Predictors in files: ours, and the published checkpoints."""

import json
from inspect import signature
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_nowcast_predictors import ON_DISK, PUBLISHED, Net, predictors, published_mlp

from wspace.errors import CheckpointError, NowcastError
from wspace.nowcast import (
    WNN,
    Average,
    LinearFit,
    NiNoGraph,
    NiNoMLP,
    Predictor,
    card_of,
    load,
    load_published,
    save,
)


@pytest.mark.parametrize("_", ON_DISK)
def test_published_files_meet_the_golden_numbers(_: str) -> None:
    golden = json.loads((PUBLISHED / "golden.json").read_text())
    rows = torch.tensor([[-1, -0.5, 0, 0.5, 1], [1, 0.5, 0.25, 0.125, 0.0625], [0] * 5, [0.3] * 5])
    nets: dict[str, Predictor] = {}
    seen = 0
    for key, want in golden.items():
        if "|edge_type=" not in key:
            continue
        name, kind, k = key.split("|")
        if name not in nets:
            nets[name] = load_published(PUBLISHED / f"{name}.pt")
            assert nets[name].origin == f"{name}.pt"
        changes = nets[name](rows, int(kind.removeprefix("edge_type=")))
        made = rows[:, -1] + changes[:, int(k.removeprefix("k=")) - 1]
        assert (made - torch.tensor(want)).abs().max() <= 1e-5
        seen += 1
    assert seen == 30


@pytest.mark.parametrize("form", ["NiNoMLP", "NiNoGraph", "WNN"])
def test_save_and_load(form: str, tmp_path: Path) -> None:
    predictor = predictors()[form]
    assert isinstance(predictor, NiNoMLP | NiNoGraph | WNN)
    predictor.still = False
    predictor.chunk = 77
    if isinstance(predictor, NiNoGraph):
        predictor.laplacian = True
    if not isinstance(predictor, WNN):
        predictor.precision, predictor.drift = "bfloat16", True
    save(predictor, tmp_path / "mine.safetensors", card={"seed": 3})
    other = load(tmp_path / "mine.safetensors")
    assert type(other) is type(predictor)
    assert other.origin == "mine"
    assert not other.still
    assert card_of(tmp_path / "mine.safetensors") == {"seed": 3}
    assert other.options == predictor.options
    assert {"still", "chunk"} <= set(other.options)
    for name in signature(type(predictor)).parameters:
        assert name in other.options
    changed = load(tmp_path / "mine.safetensors", still=True, chunk=5)
    assert changed.options == {**predictor.options, "still": True, "chunk": 5}
    for unknown in ("unknown", "channels"):
        with pytest.raises(NowcastError, match=rf"chunk, still.*\n  got '{unknown}'"):
            load(tmp_path / "mine.safetensors", **{unknown: 8})
    found = other.state_dict()
    assert all(torch.equal(x, found[n]) for n, x in predictor.state_dict().items())
    with pytest.raises(CheckpointError, match="nowhere"):
        load("nowhere")


def test_options_of_a_file_that_are_not_known_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "later.safetensors"
    metadata = {"format": "wspace-predictor-1", "form": "NiNoMLP", "options": '{"later": 1}'}
    save_file({"kind.weight": torch.zeros(15, 128)}, file, metadata)
    with pytest.raises(CheckpointError, match="'later'"):
        load(file)
    torch.save(published_mlp(6, 0), tmp_path / "some.pt")
    with pytest.raises(
        NowcastError, match="NiNoMLP cannot .*\n.*chunk, still, drift\n  got 'laplacian'"
    ):
        load_published(tmp_path / "some.pt", laplacian=True)


def test_bad_checkpoints_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "bad.pt"
    with pytest.raises(CheckpointError, match=r"no file .*bad\.pt"):
        load_published(file)
    file.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"bad\.pt is not a published predictor"):
        load_published(file)
    held = published_mlp(6, 0)
    state = held["state_dict"]
    assert isinstance(state, dict)
    torch.save({**held, "state_dict": {**state, "more": torch.zeros(1)}}, file)
    with pytest.raises(CheckpointError, match=r"'more': \(1,\), not there"):
        load_published(file)
    torch.save({**held, "model_args": {"gnn": False, "hid": 7}}, file)
    with pytest.raises(CheckpointError, match=r"'enter\.weight': \(6, 5\), not \(7, 5\)"):
        load_published(file)
    torch.save({**held, "model_args": {"gnn": False, "hid": 6, "scale_method": "min-max"}}, file)
    with pytest.raises(CheckpointError, match="scale_method='min-max'"):
        load_published(file)
    torch.save({"state_dict": Net, "model_args": {}}, file)  # runs code when it is loaded
    with pytest.raises(CheckpointError, match="UnpicklingError"):
        load_published(file)


@pytest.mark.parametrize(
    "predictor",
    [
        NiNoMLP(3, context=4, longest=6, kinds=7, precision="bfloat16", chunk=9, still=False),
        NiNoGraph(3, context=4, longest=6, kinds=7, codes=2, tokens=5, laplacian=True, drift=True),
        WNN(3, context=4, longest=6, chunk=9),
        Average(0.5, context=3),
        LinearFit(context=3),
    ],
    ids=lambda p: type(p).__name__,
)
def test_options_make_the_same_form(predictor: Predictor) -> None:
    again = type(predictor)(**predictor.options)
    assert again.options == predictor.options != type(predictor)().options
    shapes = {k: x.shape for k, x in predictor.state_dict().items()}
    assert {k: x.shape for k, x in again.state_dict().items()} == shapes
