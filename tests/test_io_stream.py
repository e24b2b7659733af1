"""States that are computed while they are written: the same bytes, in memory for one tensor."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from test_io import DTYPES, assert_same, assert_tied, mlp, write_index
from torch import Tensor

from wspace.errors import CheckpointError
from wspace.io import LazyState, load_checkpoint, save_checkpoint

State = dict[str, Tensor]


def odd() -> State:
    """Tensors of every data type, shape and stride that a file may hold, under odd names."""
    state = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES}
    return state | {
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "again empty": torch.empty(3, 0, dtype=torch.int8),
        "transposed": torch.randn(5, 3).t(),
        "slice": torch.randn(1000)[7:11],
        "expanded": torch.randn(3, 1).expand(3, 4),
        "one number": torch.randn(1).expand(5),
        "every other": torch.randn(9)[::2],
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
        'größe "1"\n\\\t\x01': torch.ones(2),
        "z" * 1000: torch.ones(1),
    }


# --- bytes ----------------------------------------------------------------------------------------


def test_bytes_are_those_of_safetensors_own_writer(tmp_path: Path) -> None:
    state = odd()
    dense = {name: x.resolve_conj().resolve_neg().contiguous().clone() for name, x in state.items()}
    save_checkpoint(state, tmp_path / "ours.safetensors")
    safetensors.torch.save_file(dense, tmp_path / "theirs.safetensors", {"format": "pt"})
    ours, theirs = (tmp_path / f"{x}.safetensors" for x in ("ours", "theirs"))
    assert ours.read_bytes() == theirs.read_bytes()
    with safe_open(ours, framework="pt") as file:
        assert_same({name: file.get_tensor(name) for name in file.keys()}, dense)  # noqa: SIM118


def test_halved_bytes_have_the_shape_of_their_numbers(tmp_path: Path) -> None:
    """Two numbers of four bits in each element: the header counts numbers."""
    dtype = getattr(torch, "float4_e2m1fn_x2", None)
    if dtype is None:
        return
    state = {"x": torch.arange(12, dtype=torch.uint8).reshape(3, 4).view(dtype), "y": torch.ones(2)}
    save_checkpoint(state, tmp_path / "x.safetensors")
    expected = safetensors.torch.save(state, {"format": "pt"})
    assert (tmp_path / "x.safetensors").read_bytes() == expected


def test_an_empty_state_has_the_bytes_too(tmp_path: Path) -> None:
    save_checkpoint({}, tmp_path / "x.safetensors")
    expected = safetensors.torch.save({}, {"format": "pt"})
    assert (tmp_path / "x.safetensors").read_bytes() == expected


def test_a_lazy_state_has_the_bytes_of_the_whole_one(tmp_path: Path) -> None:
    state = odd()
    outline = {name: torch.empty_like(x, device="meta") for name, x in state.items()}
    save_checkpoint(LazyState(outline, state.__getitem__), tmp_path / "lazy.safetensors")
    save_checkpoint(state, tmp_path / "whole.safetensors")
    lazy, whole = (tmp_path / f"{x}.safetensors" for x in ("lazy", "whole"))
    assert lazy.read_bytes() == whole.read_bytes()


def test_what_the_format_cannot_hold_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match=r"cannot hold the state[\s\S]*'z' of torch.complex1"):
        save_checkpoint({"z": torch.ones(2, dtype=torch.complex128), "y": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="'__metadata__' for itself"):
        save_checkpoint({"__metadata__": torch.ones(2)}, path)
    assert list(tmp_path.iterdir()) == []


# --- lazy states ----------------------------------------------------------------------------------


class Counted:
    """Computes tensors, and knows how often each was asked for and how many are alive."""

    def __init__(self, state: State) -> None:
        self.state, self.asked, self.most = state, [], 0
        self.alive: list[weakref.ref[Tensor]] = []
        self.asked: list[str] = []

    def __call__(self, name: str) -> Tensor:
        self.asked.append(name)
        found = self.state[name].clone()
        self.alive.append(weakref.ref(found))
        self.most = max(self.most, sum(ref() is not None for ref in self.alive))
        return found


def test_each_tensor_is_computed_once_and_let_go(tmp_path: Path) -> None:
    state = mlp()
    counted = Counted(state)
    lazy = LazyState(state, counted)
    assert counted.asked == []
    save_checkpoint(lazy, tmp_path / "x.safetensors")
    assert sorted(counted.asked) == sorted(state) and counted.most == 1
    assert_same(load_checkpoint(tmp_path / "x.safetensors"), state)
    assert len(lazy) == 4 and list(lazy) == list(state)
    assert set(lazy) == set(state) and "5.weight" not in lazy
    with pytest.raises(KeyError, match="5.weight"):
        lazy["5.weight"]


def test_a_torch_file_takes_a_lazy_state_whole(tmp_path: Path) -> None:
    state = mlp()
    counted = Counted(state)
    save_checkpoint(LazyState(state, counted), tmp_path / "x.pt")
    assert sorted(counted.asked) == sorted(state) and counted.most > 1
    assert_same(load_checkpoint(tmp_path / "x.pt"), state)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_ties_are_computed_once(tmp_path: Path, suffix: str) -> None:
    table, rest = torch.randn(7, 3), torch.randn(2)
    state = {"a": table, "rest": rest, "b": table}
    counted = Counted({"a": table, "rest": rest})  # "b" cannot be asked for
    save_checkpoint(LazyState(state, counted), tmp_path / f"x{suffix}")
    assert sorted(counted.asked) == ["a", "rest"]
    loaded = load_checkpoint(tmp_path / f"x{suffix}")
    assert_tied(loaded, "a", "b")
    assert_same(loaded, state)
    lazy = LazyState(state, counted)
    save_checkpoint(lazy, tmp_path / f"y{suffix}", like=loaded)  # whose layout has the tie too
    assert sorted(counted.asked) == ["a", "a", "rest", "rest"]
    assert torch.equal(lazy["b"], table)


def test_ties_may_be_said(tmp_path: Path) -> None:
    outline = {name: torch.empty(2, device="meta") for name in "abc"}
    counted = Counted({"a": torch.ones(2), "b": torch.zeros(2)})
    save_checkpoint(LazyState(outline, counted, ties=[("b", "c")]), tmp_path / "x.safetensors")
    loaded = load_checkpoint(tmp_path / "x.safetensors")
    assert_tied(loaded, "b", "c")
    assert loaded["a"].tolist() == [1, 1] and loaded["c"].tolist() == [0, 0]


@pytest.mark.parametrize("equal", [True, False])
def test_ties_of_the_layout_hold_if_the_values_are_equal(tmp_path: Path, equal: bool) -> None:
    """The outline has lost them: then, and only then, both are computed and compared."""
    table = torch.randn(7, 3)
    save_checkpoint({"a": table, "b": table, "c": torch.ones(1)}, tmp_path / "x.safetensors")
    like = load_checkpoint(tmp_path / "x.safetensors")
    outline = {name: torch.empty_like(x, device="meta") for name, x in like.items()}
    values = {"a": table, "b": table if equal else table + 1, "c": torch.ones(1)}
    lazy = LazyState(outline, lambda name: values[name].clone())
    save_checkpoint(lazy, tmp_path / "y.safetensors", like=like)
    loaded = load_checkpoint(tmp_path / "y.safetensors")
    assert_same(loaded, values)
    assert (loaded["a"].data_ptr() == loaded["b"].data_ptr()) == equal


def test_shards_and_index_are_those_of_the_layout(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    state = mlp()
    first, second = list(state)[:2], list(state)[2:]
    safetensors.torch.save_file({n: state[n] for n in first}, folder / "a.safetensors")
    safetensors.torch.save_file({n: state[n] for n in second}, folder / "b.safetensors", {"x": "y"})
    write_index(
        folder, dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
    )
    (folder / "config.json").write_text("{}")
    like = load_checkpoint(folder)
    half = LazyState(like, lambda name: like[name].double() / 2)
    with pytest.raises(CheckpointError, match="announced"):
        save_checkpoint(half, tmp_path / "new", like=like)
    assert [item.name for item in tmp_path.iterdir()] == ["old"]
    outline = {name: x.double().to("meta") for name, x in like.items()}
    half = LazyState(outline, lambda name: like[name].double() / 2)
    save_checkpoint(half, tmp_path / "new", like=like)
    again = load_checkpoint(tmp_path / "new")
    assert_same(again, {name: x.double() / 2 for name, x in state.items()})
    assert again.layout.shards == like.layout.shards
    assert again.layout.metadata == like.layout.metadata
    assert {item.name for item in (tmp_path / "new").iterdir()} == {
        p.name for p in folder.iterdir()
    }
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 8 * sum(x.numel() for x in state.values())


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (torch.ones(3), r"shape \(3,\) of torch.float32"),
        (torch.ones(2).double(), "of torch.float64"),
        (torch.ones(2, device="meta"), "on meta"),
    ],
)
def test_what_was_not_announced_is_refused(tmp_path: Path, wrong: Tensor, got: str) -> None:
    values = {"a": torch.ones(2), "b": wrong}
    outline = {"a": torch.ones(2), "b": torch.ones(2)}
    path = tmp_path / "x.safetensors"
    save_checkpoint({"old": torch.ones(1)}, path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=rf"'b' was computed[\s\S]*{got}"):
        save_checkpoint(LazyState(outline, values.__getitem__), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_failed_computation_leaves_the_old_file(tmp_path: Path) -> None:
    def fails(name: str) -> Tensor:
        if name == "0.weight":
            raise ZeroDivisionError("in the middle")
        return mlp()[name]

    path = tmp_path / "x.safetensors"
    save_checkpoint({"old": torch.ones(1)}, path)
    with pytest.raises(ZeroDivisionError, match="in the middle"):
        save_checkpoint(LazyState(mlp(), fails), path)
    assert list(tmp_path.iterdir()) == [path] and list(load_checkpoint(path)) == ["old"]


def test_a_file_may_be_rewritten_from_itself(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    state = mlp()
    save_checkpoint(state, path)
    old = load_checkpoint(path)
    save_checkpoint(LazyState(old, lambda name: -old[name]), path, like=old)
    assert_same(load_checkpoint(path), {name: -x for name, x in state.items()})
    assert_same(old, state)  # what was mapped is still there


# --- memory ---------------------------------------------------------------------------------------

MEASURE = """
import sys, threading, time
from pathlib import Path
from wspace.io import LazyState, load_checkpoint, save_checkpoint

def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024

folder, whole = Path(sys.argv[1]), sys.argv[2] == "whole"
a, b = (load_checkpoint(folder / f"{x}.safetensors") for x in "ab")
save_checkpoint(LazyState({}, a.get), folder / "warm.safetensors")
base = most = anonymous()

def mean(name):
    global most
    out = (a[name] + b[name]) / 2
    most = max(most, anonymous())
    return out

done = False
def watch():
    global most
    while not done:
        most = max(most, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
lazy = LazyState(a, mean)
save_checkpoint({n: lazy[n] for n in lazy} if whole else lazy, folder / "out.safetensors", like=a)
done = True
thread.join()
print(most - base)
"""


def anonymous_memory(folder: Path, *, tensors: int, numbers: int, whole: bool = False) -> int:
    """Bytes that a process needs, beyond mapped files, to average two checkpoints."""
    folder.mkdir()
    for name in "ab":
        state: dict[str, Any] = {str(i): torch.full((numbers,), 0.5) for i in range(tensors)}
        save_checkpoint(state, folder / f"{name}.safetensors")
    words = [sys.executable, "-c", MEASURE, str(folder), "whole" if whole else "lazy"]
    # glibc keeps what is freed below a threshold that it raises by itself: hold it where it is
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20), "OMP_NUM_THREADS": "1"}
    shown = subprocess.run(words, check=True, capture_output=True, text=True, env=env)
    assert load_checkpoint(folder / "out.safetensors")["0"][0] == 0.5
    return int(shown.stdout)


def test_memory_is_that_of_the_largest_tensor(tmp_path: Path) -> None:
    largest = 2**21  # numbers, 8 MiB
    few = anonymous_memory(tmp_path / "few", tensors=4, numbers=largest)
    many = anonymous_memory(tmp_path / "many", tensors=16, numbers=largest)
    large = anonymous_memory(tmp_path / "large", tensors=4, numbers=4 * largest)
    whole = anonymous_memory(tmp_path / "whole", tensors=16, numbers=largest, whole=True)
    size = 4 * largest  # bytes
    assert few < 3 * size
    assert many < 3 * size  # four times the tensors
    assert large < 3 * 4 * size  # four times as large ones
    assert whole > 16 * size  # the measure sees a state that is whole in memory
