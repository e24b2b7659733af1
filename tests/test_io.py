"""Checkpoints: bit for bit there and back, fitted by names and shapes, refused when unsafe."""

import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from wspace.errors import CheckpointError
from wspace.io import (
    Checkpoint,
    fit_checkpoint,
    load_checkpoint,
    load_into,
    module_from_checkpoint,
    save_checkpoint,
    weights_file,
)

State = dict[str, Tensor]
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EIGHT = [torch.float8_e4m3fn, torch.float8_e5m2]
WHOLE = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
DTYPES = [*FLOATS, *EIGHT, *WHOLE, torch.complex64]


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """The same names and, bit for bit, the same tensors."""
    assert set(a) == set(b)
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert bits(a[name]) == bits(b[name]), name


def assert_tied(state: Mapping[str, Tensor], *names: str) -> None:
    assert len({state[name].data_ptr() for name in names}) == 1


def mlp() -> State:
    return {
        "0.weight": torch.randn(5, 3),
        "0.bias": torch.randn(5),
        "2.weight": torch.randn(2, 5),
        "2.bias": torch.randn(2),
    }


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(4.0), persistent=False)


def write_index(folder: Path, where: dict[str, str], name: str = "model") -> Path:
    index = folder / f"{name}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return index


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder with two shards and their index."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    state = mlp()
    first = {name: state[name] for name in ("0.weight", "0.bias")}
    second = {name: state[name] for name in ("2.weight", "2.bias")}
    save_file(first, folder / "a.safetensors", metadata={"format": "pt"})
    save_file(second, folder / "b.safetensors", metadata={"note": "x"})
    where = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
    index = {"metadata": {"total_size": 128}, "weight_map": where}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text("{}")
    return folder


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin", ".ckpt"])
def test_round_trip_is_bitwise(tmp_path: Path, suffix: str) -> None:
    state = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES}
    state |= {
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "scalar": torch.tensor(2.5),
        "step": torch.tensor(3),
        "empty": torch.empty(0, 3),
        "other": torch.empty(0, 3),
        "transposed": torch.randn(5, 3).t(),
        "slice": torch.randn(1000)[7:11],
    }
    path = tmp_path / f"x{suffix}"
    save_checkpoint(state, path)
    loaded = load_checkpoint(path)
    assert_same(loaded, state)
    assert list(tmp_path.iterdir()) == [path]
    again = tmp_path / f"y{suffix}"
    save_checkpoint(loaded, again, like=loaded)
    assert_same(load_checkpoint(again), state)
    assert path.stat().st_size < 10_000  # the slice did not drag its storage along


def test_complex128_needs_a_torch_file(tmp_path: Path) -> None:
    state = {"z": torch.randn(3, dtype=torch.complex128)}
    save_checkpoint(state, tmp_path / "x.pt")
    assert_same(load_checkpoint(tmp_path / "x.pt"), state)
    with pytest.raises(CheckpointError, match=r"cannot hold[\s\S]*'z' of torch.complex128"):
        save_checkpoint(state, tmp_path / "x.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_ties_stay_ties(tmp_path: Path, suffix: str) -> None:
    module = Tied()
    path = tmp_path / f"x{suffix}"
    save_checkpoint(module.state_dict(), path)
    loaded = load_checkpoint(path)
    assert_same(loaded, module.state_dict())
    assert_tied(loaded, "embed.weight", "head.weight")
    assert loaded.layout.ties == (("embed.weight", "head.weight"),)
    # A state that was computed has lost the identity of its tensors, not their equality.
    moved = {name: tensor + 1 for name, tensor in loaded.items()}
    save_checkpoint(moved, tmp_path / f"y{suffix}", like=loaded)
    assert_tied(load_checkpoint(tmp_path / f"y{suffix}"), "embed.weight", "head.weight")
    moved["head.weight"] += 1
    save_checkpoint(moved, tmp_path / f"z{suffix}", like=loaded)
    assert_same(load_checkpoint(tmp_path / f"z{suffix}"), moved)


def test_ties_of_save_model_are_read_and_kept(tmp_path: Path) -> None:
    save_model(Tied(), str(tmp_path / "x.safetensors"))
    loaded = load_checkpoint(tmp_path / "x.safetensors")
    assert_tied(loaded, "embed.weight", "head.weight")
    save_checkpoint(loaded, tmp_path / "y.safetensors", like=loaded)
    same = [(tmp_path / f"{name}.safetensors").read_bytes() for name in "xy"]
    assert same[0] == same[1]


def test_equal_copies_that_are_not_tied_stay_two(tmp_path: Path) -> None:
    tensor = torch.randn(3)
    save_file({"a": tensor, "b": tensor.clone()}, tmp_path / "x.safetensors")
    loaded = load_checkpoint(tmp_path / "x.safetensors")
    assert loaded.layout.ties == ()
    save_checkpoint(loaded, tmp_path / "y.safetensors", like=loaded)
    raw = (tmp_path / "x.safetensors").read_bytes()
    assert (tmp_path / "y.safetensors").read_bytes() == raw


def test_shards_are_written_as_they_were(shards: Path, tmp_path: Path) -> None:
    for source, target in [
        (shards, tmp_path / "new"),
        (shards / "model.safetensors.index.json",) * 2,
    ]:
        loaded = load_checkpoint(source)
        assert loaded.path == source
        save_checkpoint(loaded, target, like=loaded)
        folder = target if target.is_dir() else target.parent
        assert {item.name for item in folder.iterdir()} == {item.name for item in shards.iterdir()}
        for item in shards.iterdir():
            assert (folder / item.name).read_bytes() == item.read_bytes(), item.name


def test_new_and_lost_tensors_move_within_the_shards(shards: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(shards)
    state = {name: loaded[name] for name in ("2.weight", "2.bias")} | {"4.weight": torch.ones(11)}
    save_checkpoint(state, tmp_path / "new", like=loaded.layout)
    assert_same(load_checkpoint(tmp_path / "new"), state)
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys(sorted(state), "b.safetensors")
    assert index["metadata"]["total_size"] == 4 * (10 + 2 + 11)
    assert not (tmp_path / "new" / "a.safetensors").exists()


def test_training_checkpoint_is_written_as_it_was(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    weights = OrderedDict((f"module._orig_mod.{n}", t) for n, t in module.state_dict().items())
    weights._metadata = module.state_dict()._metadata  # pyright: ignore
    content = {
        "epoch": 3,
        "hyper_parameters": {"lr": 0.1},
        "state_dict": weights,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}],
        "callbacks": {"best": {"scores": {"a.ckpt": torch.tensor(0.5)}}},
    }
    torch.save(content, tmp_path / "x.ckpt")
    loaded = load_checkpoint(tmp_path / "x.ckpt")
    assert_same(loaded, module.state_dict())
    assert loaded.layout.nesting == ("state_dict",)
    assert loaded.layout.prefix == "module._orig_mod."
    assert loaded.layout.left_out == ("optimizer_states", "callbacks")
    save_checkpoint({**loaded, "2.weight": torch.ones(2)}, tmp_path / "y.ckpt", like=loaded)
    again = torch.load(tmp_path / "y.ckpt", weights_only=True)
    assert list(again) == ["epoch", "hyper_parameters", "state_dict"]
    assert again["hyper_parameters"] == {"lr": 0.1}
    assert list(again["state_dict"]) == [*weights, "module._orig_mod.2.weight"]
    assert again["state_dict"]._metadata == weights._metadata  # pyright: ignore


@pytest.mark.parametrize("names", [["module.a", "b"], ["module.a", "_orig_mod.module.a"]])
def test_prefixes_that_are_not_wrappers_stay(tmp_path: Path, names: list[str]) -> None:
    torch.save({name: torch.ones(2) for name in names}, tmp_path / "x.pt")
    assert list(load_checkpoint(tmp_path / "x.pt")) == names


def test_files_before_torch_1_6_are_read(tmp_path: Path) -> None:
    state = mlp()
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert_same(load_checkpoint(tmp_path / "x.pt"), state)


def test_loaded_tensors_are_detached(tmp_path: Path) -> None:
    torch.save({"w": nn.Parameter(torch.ones(3))}, tmp_path / "x.pt")
    tensor = load_checkpoint(tmp_path / "x.pt")["w"]
    assert type(tensor) is Tensor
    assert not tensor.requires_grad


def test_saving_over_the_file_that_is_mapped(tmp_path: Path) -> None:
    for suffix in (".pt", ".safetensors"):
        path = tmp_path / f"x{suffix}"
        save_checkpoint({"w": torch.ones(5)}, path)
        old = load_checkpoint(path)
        save_checkpoint({"w": torch.zeros(7)}, path, like=old)
        assert old["w"].sum() == 5
        assert load_checkpoint(path)["w"].shape == (7,)


def test_failed_save_leaves_everything_as_it_was(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError("disk full")

    def full_at_b(tensor: Tensor) -> bytes:
        if tensor.shape == (2, 5):  # of b.safetensors
            raise OSError("disk full")
        return b"x"

    torch.save({"w": torch.ones(2)}, shards / "x.pt")
    before = {item.name: item.read_bytes() for item in shards.iterdir()}
    loaded = load_checkpoint(shards / "model.safetensors.index.json")
    monkeypatch.setattr("wspace.io.stream._bytes", full_at_b)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"b.safetensors cannot be written[\s\S]*disk full"):
        save_checkpoint(loaded, shards / "model.safetensors.index.json", like=loaded)
    with pytest.raises(CheckpointError, match="x.pt cannot be written"):
        save_checkpoint({"w": torch.zeros(2)}, shards / "x.pt")
    with pytest.raises(CheckpointError, match="disk full"):
        save_checkpoint(loaded, shards.parent / "new", like=load_checkpoint(shards))
    assert {item.name: item.read_bytes() for item in shards.iterdir()} == before
    assert list(shards.parent.iterdir()) == [shards]


def test_unsaved_states_are_named(tmp_path: Path) -> None:
    state: Any = {"a": torch.ones(2), "b": 3, "c": torch.ones(2, device="meta")}
    with pytest.raises(CheckpointError, match=r"'b': is int[\s\S]*'c': is on the meta device"):
        save_checkpoint(state, tmp_path / "x.pt")
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(CheckpointError, match="dense tensors only[\\s\\S]*'s'"):
        save_checkpoint({"s": sparse}, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_targets_that_do_not_fit(shards: Path, tmp_path: Path) -> None:
    state = mlp()
    folder = load_checkpoint(shards)
    index = load_checkpoint(shards / "model.safetensors.index.json")
    single = load_checkpoint(shards / "a.safetensors")
    cases = [
        ("names no format", tmp_path / "x.npz", None),
        ("there is no folder", tmp_path / "no" / "x.pt", None),
        ("is a folder", shards, single),
        ("names a file", tmp_path / "x.safetensors", folder),
        ("is in use", shards, folder),
        ("ends in .index.json", tmp_path / "x.safetensors", index),
        ("ends in .safetensors", tmp_path / "x.pt", single),
        ("would overwrite shards", shards / "other.index.json", index),
    ]
    for text, path, like in cases:
        with pytest.raises(CheckpointError, match=text):
            save_checkpoint(state, path, like=like)


# --- what is refused ------------------------------------------------------------------------------


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for zipped in (True, False):
        file = tmp_path / "x.pt"
        content = {"0.weight": torch.ones(2, 2), "evil": Evil(trace)}
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=r"asks to run code[\s\S]*system"):
            load_checkpoint(file)
        assert not trace.exists()
    os.system(f"touch {trace}")  # the code would have left this
    assert trace.exists()


def header(text: str, data: bytes = b"", length: int | None = None) -> bytes:
    raw = text.encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


ENTRY = '"%s":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty"),
        (b"abc", "truncated, or not a safetensors file"),
        (header("{}", length=10**9), r"a header of 1000000000 bytes[\s\S]*got 2 bytes"),
        (header("{no json"), "corrupt header"),
        (header("[]"), "a JSON object"),
        (header("[" * 200_000), "corrupt header"),
        (header('{"a":3}'), "corrupt header"),
        (
            header('{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', b"1234"),
            "corrupt header",
        ),
        (
            header('{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}', b"1234"),
            "corrupt header",
        ),
        (header("{" + ENTRY % "a" + "}", b"12"), r"4 bytes of data[\s\S]*got 2 bytes"),
        (header("{" + ENTRY % "a" + "," + ENTRY % "a" + "}", b"1234"), r"twice[\s\S]*got a"),
    ],
)
def test_damaged_safetensors(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=text):
        load_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize("cut", [0, 3, 20, 150, -4])
def test_truncated_files(tmp_path: Path, cut: int) -> None:
    for suffix in (".safetensors", ".pt"):
        path = tmp_path / f"x{suffix}"
        save_checkpoint(mlp(), path)
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(CheckpointError, match="is empty|is truncated|is damaged"):
            load_checkpoint(path)


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no .*x.pt"):
        load_checkpoint(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_checkpoint(tmp_path)
    (tmp_path / "x.npz").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"no known format[\s\S]*\.safetensors"):
        load_checkpoint(tmp_path / "x.npz")
    for name in ("a.pt", "b.pt"):
        torch.save(mlp(), tmp_path / name)
    with pytest.raises(CheckpointError, match=r"several weight files[\s\S]*a.pt[\s\S]*b.pt"):
        load_checkpoint(tmp_path)


def test_weights_file_follows_transformers(tmp_path: Path) -> None:
    assert weights_file(tmp_path) is None
    for name in ("training.bin", "pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).touch()
        found = weights_file(tmp_path)
        assert found is not None
        assert found.name == name


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "ABSOLUTE", "link.safetensors", "ABSOLUTE_INSIDE"]
)
def test_index_that_leads_out_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "out.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "out.safetensors")
    save_file({"w": torch.ones(2)}, folder / "own.safetensors")
    places = {
        "ABSOLUTE": tmp_path / "out.safetensors",
        "ABSOLUTE_INSIDE": folder / "own.safetensors",
    }
    name = str(places.get(name, name))
    with pytest.raises(CheckpointError, match="points outside of itself"):
        load_checkpoint(write_index(folder, {"w": name}))


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    folder.mkdir(parents=True)
    save_file({"w": torch.ones(2)}, blobs / "123")
    (folder / "model.safetensors").symlink_to("../../blobs/123")
    assert load_checkpoint(folder)["w"].sum() == 2


def test_indices_that_disagree_with_their_shards(shards: Path) -> None:
    where = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
    cases = [
        ("no file 'c.safetensors'", {**where, "x": "c.safetensors"}),
        ("no 'x' in a.safetensors", {**where, "x": "a.safetensors"}),
        ("no '2.bias' in a.safetensors", {**where, "2.bias": "a.safetensors"}),
        (
            "'2.bias' in b.safetensors, which the index does not name",
            {name: file for name, file in where.items() if name != "2.bias"},
        ),
    ]
    for text, table in cases:
        with pytest.raises(CheckpointError, match=text):
            load_checkpoint(write_index(shards, table))
    save_file({"0.bias": torch.ones(5), "2.weight": torch.ones(2, 5)}, shards / "b.safetensors")
    with pytest.raises(CheckpointError, match="'0.bias' in both a.safetensors and b.safetensors"):
        load_checkpoint(write_index(shards, where))
    for text in (
        "[]",
        "{}",
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "x", "a": "y"}}',
        "{",
    ):
        (shards / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match="is corrupt|not an index|twice|not JSON"):
            load_checkpoint(shards)


def test_states_are_found_by_structure(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    moments = {"state": {"w": {"exp_avg": torch.ones(3)}}, "param_groups": []}
    for content in (
        mlp(),
        {"net": mlp(), "n": 1},
        {"a": {"b": mlp()}, "best": torch.tensor(1.0)},
        {"net": mlp(), "optimizer": moments},
    ):
        torch.save(content, file)
        assert set(load_checkpoint(file)) == set(mlp())
    torch.save({"model": mlp(), "ema": {"shadow": mlp()}}, file)
    with pytest.raises(CheckpointError, match=r"2 states[\s\S]*'model'[\s\S]*'ema.shadow'"):
        load_checkpoint(file)
    assert load_checkpoint(file, key="ema.shadow").layout.nesting == ("ema", "shadow")
    with pytest.raises(CheckpointError, match="none at 'emma'"):
        load_checkpoint(file, key="emma")
    torch.save([1, 2], file)
    with pytest.raises(CheckpointError, match=r"no states[\s\S]*got list"):
        load_checkpoint(file)
    save_checkpoint(mlp(), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="holds one state"):
        load_checkpoint(tmp_path / "x.safetensors", key="model")


def test_values_that_are_not_tensors(tmp_path: Path) -> None:
    torch.save({**mlp(), "epoch": 3, "note": "x"}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"'epoch' is int[\s\S]*'note' is str"):
        load_checkpoint(tmp_path / "x.pt")


def test_nonfinite_weights_are_reported(tmp_path: Path) -> None:
    state = mlp() | {
        "n": torch.tensor([1, 2]),
        "f8": torch.tensor([float("nan"), 1.0]).to(EIGHT[0]),
    }
    state["0.bias"][:2] = torch.tensor([float("nan"), float("-inf")])
    state["z"] = torch.tensor([complex(0, float("nan")), 1 + 0j])
    save_checkpoint(state, tmp_path / "x.safetensors")
    assert load_checkpoint(tmp_path / "x.safetensors").nonfinite == {"0.bias": 2, "f8": 1, "z": 1}


# --- fitting --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strip", "add"), [("", ""), ("model.", ""), ("", "net."), ("a.b.", "net.")]
)
def test_fit_adds_and_strips_prefixes(strip: str, add: str) -> None:
    inner = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    module = nn.ModuleDict({"net": inner}) if add else inner
    state = {strip + name: tensor for name, tensor in inner.state_dict().items()}
    assert_same(fit_checkpoint(state, module), module.state_dict())


def test_fit_completes_ties_and_leaves_the_layout(tmp_path: Path) -> None:
    module = Tied()
    state = {n: t.clone() for n, t in module.state_dict().items() if n != "head.weight"}
    save_checkpoint({**state, "table": torch.ones(4)}, tmp_path / "x.safetensors")
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    fitted = load_checkpoint(tmp_path / "x.safetensors", module=module)
    assert_tied(fitted, "embed.weight", "head.weight")
    assert "table" not in fitted  # not persistent
    assert_same(module.state_dict(), before)
    save_checkpoint(fitted, tmp_path / "y.safetensors", like=fitted)
    assert_same(load_checkpoint(tmp_path / "y.safetensors"), state)  # no alias where none was
    with torch.device("meta"):
        assert_same(fit_checkpoint(state, Tied()), fitted)
    # The same when the file holds the name that the module has last.
    state["head.weight"] = state.pop("embed.weight")
    save_checkpoint(state, tmp_path / "x.safetensors")
    fitted = load_checkpoint(tmp_path / "x.safetensors", module=module)
    save_checkpoint(fitted, tmp_path / "y.safetensors", like=fitted)
    assert_same(load_checkpoint(tmp_path / "y.safetensors"), state)


def test_fitted_names_are_stored_as_they_were(tmp_path: Path) -> None:
    inner = nn.Sequential(nn.Linear(3, 5))
    torch.save({f"model.{n}": t for n, t in inner.state_dict().items()}, tmp_path / "x.pt")
    fitted = load_checkpoint(tmp_path / "x.pt", module=nn.ModuleDict({"net": inner}))
    assert list(fitted) == ["net.0.weight", "net.0.bias"]
    save_checkpoint(fitted, tmp_path / "y.pt", like=fitted)
    assert list(torch.load(tmp_path / "y.pt", weights_only=True)) == [
        "model.0.weight",
        "model.0.bias",
    ]


def test_fit_reports_everything_at_once() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    state = mlp() | {"9.weight": torch.ones(4), "2.weight": torch.ones(5, 2)}
    state["0.weight"] = torch.ones(5, 3, dtype=torch.complex64)
    del state["0.bias"]
    with pytest.raises(CheckpointError, match="does not fit Sequential") as caught:
        fit_checkpoint(state, module)
    text = str(caught.value)
    assert "missing 0.bias (5,)" in text
    assert "unexpected 9.weight (4,)" in text
    assert "2.weight of shape (5, 2), the module's is (2, 5)" in text
    assert "0.weight of torch.complex64, the module's is torch.float32" in text


def test_fit_reports_ties_that_differ() -> None:
    state = {name: tensor.clone() for name, tensor in Tied().state_dict().items()}
    assert_tied(fit_checkpoint(state, Tied()), "embed.weight", "head.weight")
    state["head.weight"] += 1
    with pytest.raises(CheckpointError, match="embed.weight and head.weight that differ"):
        fit_checkpoint(state, Tied())


def test_load_into_is_all_or_nothing() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    state = mlp()
    load_into(module, {name: tensor.double() for name, tensor in state.items()})
    assert_same(module.state_dict(), state)
    with pytest.raises(CheckpointError, match="2.bias of shape"):
        load_into(module, {**mlp(), "2.bias": torch.ones(3)})
    meta = {**mlp(), "2.bias": torch.ones(2, device="meta")}
    with pytest.raises(CheckpointError, match="2.bias on the meta device"):
        load_into(module, meta)
    assert_same(module.state_dict(), state)
    with pytest.raises(CheckpointError, match="0.weight on the meta device"):
        load_into(module.to("meta"), state)


# --- plain checkpoints ----------------------------------------------------------------------------


def renamed(module: nn.Module, names: Mapping[str, str]) -> State:
    return {
        f"{names[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": tensor
        for name, tensor in module.state_dict().items()
    }


MLP = nn.Sequential(
    nn.Linear(3, 5), nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.Linear(7, 2)
)
CNN = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 7, 2), nn.Linear(7 * 6, 2))


@pytest.mark.parametrize(
    ("module", "names", "shape"),
    [
        (MLP, {n: n for n in "0123"}, (2, 3)),
        (MLP, {n: f"layers.{n}" for n in "0123"}, (2, 3)),
        (MLP, {n: f"seq.{n}.linear" for n in "0123"}, (2, 3)),
        (CNN, {"0": "conv1", "1": "bn1", "2": "conv2", "3": "fc"}, (2, 3, 3, 4)),
        (nn.Sequential(nn.Conv1d(3, 5, 3), nn.Linear(5, 2)), {"0": "a", "1": "b"}, (2, 3, 8)),
        (nn.Sequential(nn.Conv1d(3, 5, 2), nn.Linear(35, 2)), {"0": "a", "1": "b"}, (2, 3, 8)),
        (
            nn.Sequential(nn.Conv3d(2, 3, 3), nn.Linear(24, 2)),
            {"0": "a", "1": "b"},
            (2, 2, 2, 2, 2),
        ),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3)), {"0": "n", "1": "c"}, (2, 3, 8, 8)),
        (
            nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 3, groups=5)),
            {"0": "a", "1": "b"},
            None,
        ),
    ],
)
def test_plain_chains(module: nn.Module, names: dict[str, str], shape: tuple[int, ...]) -> None:
    state = renamed(module, names)
    built, (x,) = module_from_checkpoint(state)
    assert_same(built.state_dict(), state)
    assert not built.training
    assert shape is None or x.shape == shape
    assert built(x).shape[:2] == (
        2,
        list(state.values())[-2 if "fc.bias" in state else -1].shape[0],
    )


def test_a_bare_layer() -> None:
    built, (x,) = module_from_checkpoint(nn.Linear(3, 5).state_dict())
    assert list(built.state_dict()) == ["weight", "bias"]
    assert built(x).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("relu", nn.ReLU()),
        ("tanh", nn.Tanh()),
        ("gelu", nn.GELU()),
        ("silu", nn.SiLU()),
        ("leaky_relu", nn.LeakyReLU()),
    ],
)
def test_activation_stands_between_the_layers(name: Any, module: nn.Module) -> None:
    state = mlp()
    built, (x,) = module_from_checkpoint(state, activation=name)
    model = nn.Sequential(nn.Linear(3, 5), module, nn.Linear(5, 2))
    load_into(model, state)
    torch.testing.assert_close(built(x), model(x))
    assert x.dtype is torch.float32


def test_sine_network_in_double() -> None:
    state = {name: tensor.double() for name, tensor in mlp().items()}
    built, (x,) = module_from_checkpoint(state, activation="sin")
    hidden = torch.sin(x @ state["0.weight"].T + state["0.bias"])
    torch.testing.assert_close(built(x), hidden @ state["2.weight"].T + state["2.bias"])


def test_activation_follows_the_norm() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)).eval()
    built, (x,) = module_from_checkpoint(module.state_dict())
    torch.testing.assert_close(built(x), module(x))


def test_random_state_is_not_touched() -> None:
    state = mlp()
    before = torch.get_rng_state()
    module_from_checkpoint(state)
    assert torch.equal(torch.get_rng_state(), before)


def test_batchnorm_of_old_files() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 2))
    state = {n: t for n, t in module.state_dict().items() if "tracked" not in n}
    built, (x,) = module_from_checkpoint(state)
    assert_same(built.state_dict(), state)
    assert built(x).shape == (2, 2)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({}, "an empty checkpoint"),
        (
            {"a.weight": (5, 3), "b.weight": (2, 4)},
            r"a \(Lin.*→ b \(Lin.*\n.*takes 5 features",
        ),
        ({"a.weight": (5, 3, 3, 3), "b.weight": (2, 12)}, r"a \(Conv2d.*→ b \(Linear"),
        ({"a.weight": (5, 3), "b.weight": (7, 5, 3, 3)}, r"→ b \(Conv2d"),
        ({"a.weight": (6, 3, 3, 3), "b.weight": (4, 3, 3, 3)}, "6 channels of a 2-d image"),
        ({"a.weight": (5, 3, 3, 3), "b.weight": (7, 5, 3)}, r"→ b \(Conv1d"),
        ({"a.weight": (5, 3), "n.weight": (5,), "n.bias": (5,)}, "n: is a norm or activation"),
        ({"a.weight": (5, 3), "a.lora_A": (2, 3)}, "a: holds lora_A"),
        ({"a.weight": (5, 3), "n.running_mean": (5,)}, "n: is not a whole BatchNorm"),
        ({"a.bias": (5,)}, "a: has no weight"),
        ({"a.weight": (5, 3), "a.b.weight": (5, 5)}, "a.b: lies inside of the layer 'a'"),
        ({"n.running_mean": (5,), "n.running_var": (5,)}, "no linear or convolution layer"),
        ({"a.weight": (5, 3), "a.bias": (4,)}, "a.bias of shape"),
        ({"forward.weight": (5, 3)}, "cannot be the name"),
        ({"a.weight": (5, 3, 1, 1, 1, 1)}, "6 axes"),
    ],
)
def test_states_that_are_no_chain(state: dict[str, tuple[int, ...]], text: str) -> None:
    with pytest.raises(CheckpointError, match=text) as caught:
        module_from_checkpoint({name: torch.ones(shape) for name, shape in state.items()})
    assert "py:" in str(caught.value) or "a.bias" in str(caught.value)


def test_integer_weights_and_unknown_activations() -> None:
    with pytest.raises(CheckpointError, match="weights of torch.int8"):
        module_from_checkpoint({"a.weight": torch.ones(5, 3, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"'mish'[\s\S]*leaky_relu"):
        activation: Any = "mish"
        module_from_checkpoint(mlp(), activation=activation)


def through(state: State, path: Path) -> Checkpoint:
    save_file(state, path)
    return load_checkpoint(path)


def test_order_in_safetensors_is_that_of_the_numbers(tmp_path: Path) -> None:
    state = {f"fc{n}.weight": torch.randn(5, 5) for n in (1, 2, 10)}
    loaded = through(state, tmp_path / "x.safetensors")
    assert list(loaded) != list(state)
    built, (x,) = module_from_checkpoint(loaded)
    first = torch.relu(torch.relu(x @ state["fc1.weight"].T) @ state["fc2.weight"].T)
    torch.testing.assert_close(built(x), first @ state["fc10.weight"].T)


def test_order_in_safetensors_is_that_of_the_shapes(tmp_path: Path) -> None:
    loaded = through(
        renamed(CNN, dict(zip("0123", "dbca", strict=True))), tmp_path / "x.safetensors"
    )
    built, (x,) = module_from_checkpoint(loaded)
    assert built(x).shape == (2, 2)


def test_order_in_safetensors_is_never_guessed(tmp_path: Path) -> None:
    state = {name: torch.randn(5, 5) for name in ("decode.weight", "encode.weight")}
    loaded = through(state, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"decode, encode[\s\S]*encode, decode[\s\S]*order="):
        module_from_checkpoint(loaded)
    built, (x,) = module_from_checkpoint(loaded, order=["encode", "decode"])
    hidden = torch.relu(x @ state["encode.weight"].T)
    torch.testing.assert_close(built(x), hidden @ state["decode.weight"].T)
    with pytest.raises(CheckpointError, match="each of decode, encode once"):
        module_from_checkpoint(loaded, order=["encode"])
    broken = through(
        {"a1.weight": torch.ones(5, 3), "a2.weight": torch.ones(5, 4)}, tmp_path / "y.safetensors"
    )
    with pytest.raises(CheckpointError, match="link a1"):
        module_from_checkpoint(broken)


# --- Hugging Face ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["4KB", "1GB"])
def test_gpt2_folder(tmp_path: Path, size: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=31, n_positions=16, **tokens
    )
    module = transformers.GPT2LMHeadModel(config)
    module.save_pretrained(tmp_path / "a", max_shard_size=size)
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    loaded = load_checkpoint(tmp_path / "a")
    assert "lm_head.weight" not in loaded
    fitted = fit_checkpoint(loaded, module)
    assert_same(fitted, module.state_dict())
    assert_tied(fitted, "lm_head.weight", "transformer.wte.weight")
    save_checkpoint(fitted, tmp_path / "b", like=fitted)
    files = sorted(item.name for item in (tmp_path / "a").iterdir())
    assert sorted(item.name for item in (tmp_path / "b").iterdir()) == files
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "b", local_files_only=True)
    assert_same(again.state_dict(), module.state_dict())
    # The base model's file in the whole model, and an obsolete buffer.
    base = {name.removeprefix("transformer."): tensor for name, tensor in loaded.items()}
    assert_same(fit_checkpoint({**base, "h.0.attn.bias": torch.ones(1)}, module), fitted)
