"""Zoos on disk: what is written is read, what is damaged is named, nothing that is read is run."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import zoo_recipes
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from zoo_recipes import NORMED, Given, Toy, Views, mlp, random_state

import wspace
from wspace import zoo
from wspace.errors import ZooError
from wspace.zoo import Architecture, Cohort, InputSpec
from wspace.zoo.split import Split, leaks
from wspace.zoo.table import column, from_csv, kind_of, to_csv

TRUST = ("zoo_recipes",)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo of two architectures, 22 networks in 6 cohorts. Tests copy what they damage."""
    path = tmp_path_factory.mktemp("zoo") / "mixed"
    zoo.build(Toy(count=22, mixed=True), path)
    return path


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "copy")


def given(path: Path, *cohorts: Cohort, dtype: str | None = None) -> zoo.Zoo:
    """A zoo of just these cohorts."""
    Given.made[:] = cohorts
    return zoo.build(Given(cohorts=len(cohorts)), path, dtype=dtype)


def states(path: Path, count: int) -> list[dict[str, Tensor]]:
    """What the recipe made, network by network."""
    recipe = zoo.recipe_from("zoo_recipes:Toy", {"count": count, "mixed": True})
    cohorts = [recipe.cohort(k) for k in range(recipe.cohorts)]
    return [
        {name: x[i] for name, x in c.state.items()}
        for c in cohorts
        for i in range(len(c.table["image"]))
    ]


def equal(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- reading --------------------------------------------------------------------------------------


def test_states_are_read_bit_for_bit(made: Path) -> None:
    opened = zoo.open(made)
    truth = states(made, 22)
    assert len(opened) == 22
    assert opened.whole
    for i, (space, state) in enumerate(opened):
        assert equal(state, truth[i])
        assert space == opened.spaces[opened.kind[i]]
        space.validate(state)
    assert equal(opened[-1][1], truth[-1])
    assert equal(opened[torch.tensor(3)][1], truth[3])
    assert opened.spaces[0] == mlp().space(TRUST)
    assert opened.spaces[0].wiring == mlp().space(TRUST).wiring
    assert opened.architectures == (mlp(), NORMED)


@pytest.mark.parametrize("loaded", [False, True])
def test_batches_are_the_networks_in_order(made: Path, loaded: bool) -> None:
    opened = zoo.open(made)
    opened = opened.load() if loaded else opened
    places = [21, -1, 5, 0, 13, 5, 2, 8]
    batch = opened.batch(places)
    truth = states(made, 22)
    assert sorted(batch.index.tolist()) == sorted(i % 22 for i in places)
    at = iter(batch.index.tolist())
    for graph in batch.graphs:
        for row in range(graph.batch[0]):
            i = next(at)
            assert equal({name: x[row] for name, x in graph.values.items()}, truth[i])
    mine = [i % 22 for i in places]
    first = [i for i in mine if opened.kind[i] == 0]
    assert batch.index.tolist() == first + [i for i in mine if opened.kind[i] == 1]
    assert batch.table["image"].tolist() == [i // 2 for i in batch.index.tolist()]
    assert batch.table["loss"].dtype == torch.float32
    assert batch.table["good"].dtype == torch.bool
    assert "name" not in batch.table
    assert len(batch) == len(places)
    assert "8 networks of 2 spaces" in repr(batch)


def test_a_batch_owns_its_memory(made: Path) -> None:
    opened = zoo.open(made)
    before = opened[0][1]
    for graph in opened.batch([0]).graphs:
        for x in graph.values.values():
            x.zero_()
    for x in opened[0][1].values():
        x.zero_()
    assert equal(opened[0][1], before)


def test_a_batch_moves_and_converts(made: Path) -> None:
    batch = zoo.open(made).batch(slice(3), dtype=torch.float64)
    assert batch.table["loss"].dtype == torch.float64
    half = batch.to(torch.float16)
    assert half.graphs[0].values["0.weight"].dtype == torch.float16
    assert half.table["image"].dtype == torch.int64
    assert batch.to("meta").graphs[0].values["0.weight"].is_meta
    assert equal(batch.to("cpu").graphs[0].values, batch.graphs[0].values)


VIEWS: dict[str, tuple[Any, list[int]]] = {
    "slice": (slice(20, 2, -7), [20, 13, 6]),
    "list": ([3, -1], [3, 21]),
    "empty list": ([], []),
    "empty slice": (slice(0), []),
    "tuple": ((4, 4), [4, 4]),
    "array": (np.array([1, 0], dtype=np.int32), [1, 0]),
    "tensor": (torch.tensor([-22, 9]), [0, 9]),
    "mask": (np.arange(22) % 9 == 1, [1, 10, 19]),
    "torch mask": (torch.arange(22) == 5, [5]),
    "list of bools": ([False] * 21 + [True], [21]),
    "no one": ([False] * 22, []),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views(made: Path, name: str) -> None:
    index, places = VIEWS[name]
    opened = zoo.open(made)
    view = opened[index]
    assert view.table["image"].tolist() == [i // 2 for i in places]
    assert view.ids.tolist() == [opened.ids[i] for i in places]
    assert len(view) == len(places) == len(view.batch(slice(None)))
    for k, i in enumerate(places):
        assert equal(view[k][1], opened[i][1])
    assert len(view[:0].batch([])) == 0


@pytest.mark.parametrize(
    "index", [[22], [-23], torch.zeros(3, dtype=torch.bool), [0.5], [[1]], ["a"]], ids=str
)
def test_bad_indices(made: Path, index: Any) -> None:
    with pytest.raises(IndexError, match="22 networks|indexed by numbers"):
        zoo.open(made)[index]


def test_rows_of_a_view_are_those_of_the_zoo(made: Path) -> None:
    opened = zoo.open(made)
    assert opened.rows.tolist() == list(range(22))
    view = opened[[13, 4, 20, 7]][[2, 0, 3]]
    assert view.rows.tolist() == [20, 13, 7]
    batch = view.batch([0, 2])
    assert sorted(batch.index.tolist()) == [7, 20]  # by space, as the graphs are
    loss = torch.from_numpy(np.array(opened.table["loss"]))[batch.index].float()
    assert torch.equal(batch.table["loss"], loss)
    for row, name in zip(view.rows, view.ids, strict=True):
        assert opened.ids[row] == name


def test_columns_and_where(made: Path) -> None:
    opened = zoo.open(made)
    assert opened.where(image=[0, 3], good=True).ids.tolist() == ["0/0", "1/2"]
    assert len(opened.where(image={2})) == 2
    assert len(opened.where(name="net, 7\n")) == 1
    assert len(opened.where()) == 22 and len(opened.where(image=[])) == 0
    assert len(opened.where(image=torch.tensor([0, 3]))) == 4 == len(opened.where(image=(0, 3)))
    for wrong, match in [
        ({"image": 99}, r"(?s)no network whose 'image' is 99.*one of 0, 1, 2, 3, 4, 5, 6, 7 …"),
        ({"image": [0, np.int64(98)]}, "whose 'image' is 98"),
        ({"image": "3"}, r"(?s)whose 'image' is '3'.*did you mean the int 3"),
        ({"name": "net"}, "whose 'name' is 'net'"),
        ({"good": None}, r"(?s)whose 'good' is None.*one of False, True"),
    ]:
        with pytest.raises(ZooError, match=match):
            opened.where(**wrong)
    with pytest.raises(ZooError, match="there are no networks"):
        opened[[]].where(image=0)
    with pytest.raises(ZooError, match=r"(?s)no column 'imag'.*did you mean 'image'"):
        opened.where(imag=1)
    with pytest.raises(ValueError, match="read-only"):
        opened.table["image"][0] = 1


def test_another_process_gets_a_zoo(made: Path) -> None:
    opened = zoo.open(made)[3:9].load()
    again = pickle.loads(pickle.dumps(opened))
    assert equal(again[2][1], opened[2][1])
    assert again.table["name"].tolist() == opened.table["name"].tolist()


# --- time, halves, tables -------------------------------------------------------------------------


def test_time_axis(tmp_path: Path) -> None:
    opened = zoo.build(Toy(count=6, times=5), tmp_path)
    truth = Toy(count=6, times=5).cohort(1).state
    assert opened.steps is not None
    assert opened.steps.tolist() == [0, 10, 20, 30, 40]
    assert equal(opened[5][1], {name: x[1] for name, x in truth.items()})
    for loaded in (opened, zoo.open(tmp_path).load()):
        for time, lead in [(None, (2, 5)), (-1, (2,)), (slice(1, 4), (2, 3)), (2, (2,))]:
            (graph,) = loaded.batch([5, 4], time=time).graphs
            chosen = slice(None) if time is None else time
            assert graph.batch == lead
            assert equal(
                dict(graph.values), {name: x[[1, 0]][:, chosen] for name, x in truth.items()}
            )
    with pytest.raises(ZooError, match=r"no state 5 of each network\n  expected -5 … 4"):
        opened.batch([0], time=5)
    assert "5 states of each, steps 0 … 40" in opened.card()
    assert opened.verify(1, trust=TRUST)[0].ok


def test_without_a_time_axis_there_is_no_time(made: Path) -> None:
    with pytest.raises(ZooError, match="no time axis"):
        zoo.open(made).batch([0], time=1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves(tmp_path: Path, dtype: str) -> None:
    opened = zoo.build(Toy(count=4), tmp_path, dtype=dtype)
    truth = Toy(count=4).cohort(0).state
    rounded = {name: x.to(getattr(torch, dtype)).float() for name, x in truth.items()}
    assert equal(dict(opened.batch(slice(None)).graphs[0].values), rounded)
    stored = load_file(tmp_path / "shards" / "000000.safetensors")
    assert {x.dtype for x in stored.values()} == {getattr(torch, dtype)}
    with pytest.raises(ZooError, match="stores floats otherwise"):
        zoo.build(Toy(count=4), tmp_path)
    with pytest.raises(ZooError, match="dtype 'float8'"):
        zoo.build(Toy(count=4), tmp_path, dtype="float8")


TEXTS = ["", " ", "a,b", 'quo"te', "line\nline", "\r\n", "\r", "ünï\u2028", "'", "nan", "007", "#"]
FLOATS = [0.1, -0.0, 1e-320, float("inf"), -float("inf"), float("nan"), 2**53 + 2.0, 1 / 3]


def test_tables_are_exact() -> None:
    table = {
        "text": column(TEXTS, "text"),
        "float": column(FLOATS + [0.0] * 4, "float"),
        "int": column([-(2**63), 2**63 - 1, *range(10)], "int"),
        "bool": column([True, False] * 6, "bool"),
        "single": column(torch.rand(12), "single"),
        "bytes": column(np.arange(12, dtype=np.uint8), "bytes"),
        'na"me,\n': column(np.array(["ab"] * 12), "s"),
    }
    kinds = {name: kind_of(array) for name, array in table.items()}
    assert list(kinds.values()) == ["str", "float", "int", "bool", "float", "int", "str"]
    again = from_csv(to_csv(table, 12), kinds, 12)
    for name, array in table.items():
        assert again[name].dtype == array.dtype or array.dtype.kind == "U"
        assert again[name].tobytes() == array.tobytes(), name
    assert from_csv(to_csv({}, 3), {}, 3) == {}


@hypothesis.given(
    st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=1)
)
def test_any_text_is_exact(texts: list[str]) -> None:
    table = {"x": column(texts, "x")}
    assert from_csv(to_csv(table, len(texts)), {"x": "str"}, len(texts))["x"].tolist() == texts


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ([[1, 2]], "int64 with 2 axes"),
        ([1, "a"], "strings among other things"),
        ([None], "object"),
        ([2**64], "object|64 bits"),
        (["a\0"], "NUL"),
        ([1j], "complex"),
        ([[1], [1, 2]], "column 'x'"),
    ],
    ids=str,
)
def test_columns_that_cannot_be_stored(values: Any, match: str) -> None:
    with pytest.raises(ZooError, match=match):
        column(values, "x")


def cohort(
    n: int = 3, *, change: dict[str, Any] | None = None, table: Any = None, steps: Any = None
) -> Cohort:
    state = random_state(NORMED, (n,), torch.Generator().manual_seed(0))
    table = {"x": list(range(n))} if table is None else table
    state = {k: x for k, x in {**state, **(change or {})}.items() if x is not None}
    return Cohort(NORMED, state, table, steps)


BAD_COHORTS: dict[str, tuple[Callable[[], Cohort], str]] = {
    "missing": (lambda: cohort(change={"out.bias": None}), "no tensor 'out.bias'"),
    "shape": (lambda: cohort(change={"out.bias": torch.zeros(3, 3)}), r"'out.bias' of shape"),
    "count": (lambda: cohort(change={"out.bias": torch.zeros(4, 2)}), "batch axes"),
    "tie": (lambda: cohort(change={"second.weight": torch.zeros(3, 7, 3)}), "tied to 'first.we"),
    "extra": (lambda: cohort(change={"x": torch.zeros(3)}), "'x'"),
    "dtype": (lambda: cohort(change={"out.bias": torch.zeros(3, 2).double()}), "another type"),
    "nan": (lambda: cohort(change={"out.bias": torch.full((3, 2), torch.nan)}), "6 entries"),
    "none": (lambda: cohort(0), "at least one network"),
    "column": (lambda: cohort(table={"x": [1, 2]}), "2 values of 'x'"),
    "row": (lambda: cohort(table={"row": [1, 2, 3]}), "the name 'row'"),
    "surrogate": (lambda: cohort(table={"x": ["\ud800", "", ""]}), "not Unicode"),
    "time": (lambda: cohort(steps=torch.arange(2)), "other axes"),
}


@pytest.mark.parametrize("name", BAD_COHORTS)
def test_cohorts_that_do_not_fit_are_refused(tmp_path: Path, name: str) -> None:
    make, match = BAD_COHORTS[name]
    with pytest.raises(ZooError, match=rf"(?s)cohort 1 cannot be stored.*{match}"):
        given(tmp_path, cohort(), make())
    opened = zoo.open(tmp_path)
    assert len(opened) == 3
    assert not opened.whole
    assert "NOT WHOLE: 1 of 2 committed" in opened.card()


def test_too_large_for_halves(tmp_path: Path) -> None:
    large = cohort(change={"out.bias": torch.full((3, 2), 1e6)})
    with pytest.raises(ZooError, match="6 entries that are NaN, infinite or too large for float16"):
        given(tmp_path, large, dtype="float16")
    assert len(given(tmp_path / "b", large, dtype="bfloat16")) == 3


def test_statistics(made: Path) -> None:
    opened = zoo.open(made)
    for kind, found in enumerate(opened.statistics()):
        values = opened[opened.kind == kind].batch(slice(None)).graphs[0].values
        for name, four in found.items():
            x = values[name].double()
            truth = (x.mean(), x.std(correction=0), x.min(), x.max())
            assert four == pytest.approx([float(t) for t in truth], rel=1e-10)


# --- damage ---------------------------------------------------------------------------------------


def tensors(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Replaces the tensors of shard 2, and makes the marker agree, as a forger would."""
    file = path / "shards" / "000002.safetensors"
    changed = change({k: x.clone() for k, x in load_file(file).items()})
    save_file({k: x.contiguous() for k, x in changed.items()}, file)
    marker(path, 2, lambda m: m["files"]["safetensors"].__setitem__(0, file.stat().st_size))


def marker(path: Path, number: int, change: Callable[[dict[str, Any]], object]) -> None:
    file = path / "shards" / f"{number:06d}.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def shorten(file: Path, by: int = 7) -> None:
    file.write_bytes(file.read_bytes()[:-by])


def rows(path: Path, change: Callable[[bytes], bytes]) -> None:
    file = path / "shards" / "000002.csv"
    file.write_bytes(change(file.read_bytes()))
    marker(path, 2, lambda m: m["files"]["csv"].__setitem__(0, file.stat().st_size))


def swap(path: Path) -> None:
    for suffix in ("safetensors", "csv", "json"):
        a, b = (path / "shards" / f"{k:06d}.{suffix}" for k in (2, 4))
        a.rename(path / "x"), b.rename(a), (path / "x").rename(b)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda p: shorten(p / "shards/000002.safetensors"), "2.safetensors"),
    "truncated table": (lambda p: shorten(p / "shards/000002.csv"), "2.csv"),
    "truncated marker": (lambda p: shorten(p / "shards/000002.json"), "2.json"),
    "empty marker": (lambda p: (p / "shards/000002.json").write_text(""), "2.json"),
    "list as marker": (lambda p: (p / "shards/000002.json").write_text("[1]"), "2.json"),
    "missing": (lambda p: (p / "shards/000002.safetensors").unlink(), "2.safetensors"),
    "missing table": (lambda p: (p / "shards/000002.csv").unlink(), "2.csv"),
    "header cut": (
        lambda p: tensors(p, lambda s: s) or shorten(p / "shards/000002.safetensors", 1),
        "2.safetensors",
    ),
    "other names": (
        lambda p: tensors(p, lambda s: {f"x.{k}": x for k, x in s.items()}),
        "2.safetensors.*nothing",
    ),
    "other shapes": (lambda p: tensors(p, lambda s: {k: x[:, :1] for k, x in s.items()}), "2.safe"),
    "other dtype": (lambda p: tensors(p, lambda s: {k: x.half() for k, x in s.items()}), "2.safe"),
    "fewer rows": (lambda p: tensors(p, lambda s: {k: x[1:] for k, x in s.items()}), "2.safe"),
    "other space": (
        lambda p: marker(p, 2, lambda m: m.update(architecture="0" * 16)),
        "0000000000000000.json is missing",
    ),
    "rows": (lambda p: marker(p, 2, lambda m: m.update(rows=3)), "2.safetensors"),
    "long table": (lambda p: rows(p, lambda b: b + b'4,4,0.5,0.5,True,"x"\n'), "2.csv.*5 rows"),
    "doubled row": (lambda p: rows(p, lambda b: b.replace(b"\n2,", b"\n1,")), "2.csv"),
    "other columns": (lambda p: rows(p, lambda b: b.replace(b'"loss"', b'"less"')), "2.csv"),
    "no float": (lambda p: rows(p, lambda b: b.replace(b",0.", b",O.", 1)), "2.csv"),
    "no bool": (lambda p: rows(p, lambda b: b.replace(b"True", b"Tru")), "2.csv"),
    "ragged": (lambda p: rows(p, lambda b: b.replace(b",True", b"", 1)), "2.csv"),
    "no text": (lambda p: rows(p, lambda b: b.replace(b"net", b"n\xff", 1)), "2.csv"),
    "columns": (lambda p: marker(p, 2, lambda m: m["columns"].popitem()), "2.json.*columns"),
    "kind": (lambda p: marker(p, 2, lambda m: m["columns"].update(loss="x")), "2.json"),
    "path as digest": (
        lambda p: marker(p, 2, lambda m: m.update(architecture="../../etc/passwd")),
        "2.json.*no digest",
    ),
    "steps": (lambda p: marker(p, 2, lambda m: m.update(steps=[1, 2])), "2.json"),
    "half": (lambda p: marker(p, 2, lambda m: m.update(dtype="float16")), "2.json"),
    "format": (lambda p: marker(p, 2, lambda m: m.update(format=2)), "2.json.*format 2"),
    "statistics": (lambda p: marker(p, 2, lambda m: m["statistics"].popitem()), "2.json"),
    "swapped": (swap, "2.json.*marker of cohort 4"),
    "not finite": (
        lambda p: tensors(p, lambda s: {k: x * torch.inf for k, x in s.items()}),
        "2.safetensors.*NaN or infinite",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_the_rest_stays_readable(copy: Path, name: str) -> None:
    damage, match = DAMAGE[name]
    whole = zoo.open(copy)
    damage(copy)
    with pytest.raises(ZooError, match=rf"(?s){match}"):
        zoo.open(copy, check=22)
    rest = zoo.open(copy, damaged="skip", check=0)
    if name == "not finite":  # the file is sound, its values are not
        return
    assert not rest.whole
    assert rest.damaged
    for i, number in enumerate(rest.ids.tolist()):
        assert number[0] not in ({"2", "4"} if name == "swapped" else {"2"})
        (j,) = np.flatnonzero(whole.ids == number)
        assert equal(rest[i][1], whole_state(whole, int(j)))


def whole_state(opened: zoo.Zoo, i: int) -> dict[str, Tensor]:
    recipe = Toy(count=22, mixed=True)
    number, row = map(int, str(opened.ids[i]).split("/"))
    return {name: x[row] for name, x in recipe.cohort(number).state.items()}


def test_changed_bytes_are_found_by_checksums(copy: Path) -> None:
    zoo.open(copy, checksums=True)
    for suffix in ("safetensors", "csv"):
        file = copy / "shards" / f"000003.{suffix}"
        data = bytearray(file.read_bytes())
        data[-2] ^= 1
        file.write_bytes(data)
        with pytest.raises(ZooError, match=rf"(?s)3\.{suffix}.*SHA-256"):
            zoo.open(copy, checksums=True)
        data[-2] ^= 1
        file.write_bytes(data)
    a, b = (copy / "shards" / f"00000{k}.safetensors" for k in (0, 2))  # one shape, two cohorts
    content = {k: x.clone() for k, x in load_file(a).items()}
    other = load_file(b)
    for name, x in content.items():
        x[0] = other[name][0]  # a row of another shard
    save_file(content, a, {"format": "pt"})
    zoo.open(copy)
    with pytest.raises(ZooError, match=r"0\.safetensors"):
        zoo.open(copy, checksums=True)


def test_flipped_bytes_are_zoo_errors(copy: Path, generator: torch.Generator) -> None:
    """Whatever a file holds, opening says which one is wrong, or gives what was made."""
    whole = zoo.open(copy)
    truth = [whole[i][1] for i in range(22)]
    found = 0
    files = [f for f in sorted(copy.rglob("*")) if f.is_file()]
    for file in files:
        data = file.read_bytes()
        for at in torch.randint(len(data), (FLIPS,), generator=generator).tolist():
            bad = bytearray(data)
            bad[at] ^= 1 << at % 8
            file.write_bytes(bad)
            try:
                opened = zoo.open(copy, checksums=True)
                assert all(equal(opened[i][1], truth[i]) for i in (0, 9, 21))
            except ZooError:
                found += 1
        file.write_bytes(data)
    assert found > FLIPS * len(files) // 2


FLIPS = 6


def test_header_and_architectures(copy: Path) -> None:
    (file, *_) = (copy / "architectures").iterdir()
    text = file.read_text()
    file.write_text(text.replace('"MATRIX"', '"matrix"').replace("[2,3]", "[3,3]"))
    with pytest.raises(ZooError, match=rf"(?s){file.name}.*digest differs"):
        zoo.open(copy)
    file.write_text(text)
    marker(copy, 5, lambda m: m.update(number=9))
    (copy / "shards" / "000005.json").rename(copy / "shards" / "000009.json")
    with pytest.raises(ZooError, match="cohort 9 of a zoo of 6"):
        zoo.open(copy)
    (copy / "zoo.json").write_text("{")
    with pytest.raises(ZooError, match="zoo.json is damaged"):
        zoo.open(copy)
    (copy / "zoo.json").write_text('{"format": 1}')
    with pytest.raises(ZooError, match=r"(?s)zoo.json is damaged.*KeyError"):
        zoo.open(copy)
    with pytest.raises(ZooError, match="zoo.json is missing"):
        zoo.open(copy / "shards")


# --- proof ----------------------------------------------------------------------------------------


def test_networks_are_proved(made: Path) -> None:
    opened = zoo.open(made)
    reports = opened.verify(3, trust=TRUST)
    assert [report.ok for report in reports] == [True] * 3
    assert min(report.control_error for report in reports) > 1e-6
    assert {len(report.errors) for report in reports} == {3, 5}  # both architectures


def test_a_wrong_space_is_not_proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a zoo whose space claims the symmetry of other code."""
    wrong = Architecture("zoo_recipes:perceptron", {"width": 7}, [InputSpec((2, 3))])
    state = random_state(wrong, (2,), torch.Generator().manual_seed(0))
    opened = given(tmp_path, Cohort(wrong, state, {}))
    assert opened.verify(1, trust=TRUST)
    monkeypatch.setattr(zoo_recipes, "perceptron", unequal)
    with pytest.raises(ZooError, match=r"(?s)network \d of .*0\.safetensors.*changed the output"):
        opened.verify(1, trust=TRUST)
    monkeypatch.setattr(zoo_recipes, "perceptron", other)
    with pytest.raises(ZooError, match=r"(?s)0\.safetensors is not what its weight space says"):
        opened.verify(1, trust=TRUST)


class Unequal(torch.nn.Sequential):
    """Hidden units that are not interchangeable."""

    def forward(self, x: Tensor) -> Tensor:
        return self[2](torch.relu(self[0](x)) * torch.arange(1.0, 8.0).to(x))


def unequal(width: int) -> torch.nn.Module:
    return Unequal(*zoo.example_network(width))


def other(width: int) -> torch.nn.Module:
    return zoo.example_network(width + 1)


unequal.__module__ = other.__module__ = "zoo_recipes"


# --- nothing that is read is run ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "match"),
    [
        ("os:system", "not imported"),
        ("zoo_evil:build", "not imported"),
        ("wspace_evil:build", "not imported"),
        ("wspace.reference.python:from_py", "no factory"),  # would import what its options name
        ("wspace.lit.predict:load_task", "no factory"),  # would trust whom its options name
        ("wspace.lit:load_task", "no factory"),
        ("wspace.lit.models:build_metanet", "no factory"),
        ("wspace.cli:main", "no factory"),
        ("wspace.zoo.architecture:importlib", "no factory"),
        ("wspace.zoo.architecture:_space", "no factory"),
        ("wspace:act", "no factory"),
        ("wspace.nothing:build", "not there"),
        ("wspace.zoo:nothing", "not there"),
        ("../evil:build", "names no factory"),
        ("wspace.zoo", "names no factory"),
        ("wspace.zoo:Architecture.module", "names no factory"),
        ("", "names no factory"),
    ],
)
def test_factories_that_are_not_called(factory: str, match: str) -> None:
    architecture = Architecture(factory, {"command": "touch /tmp/evil"})
    for use in (architecture.module, architecture.space):
        with pytest.raises(ZooError, match=match):
            use()


def test_opening_imports_nothing(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "zoo_evil.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    evil = Architecture("zoo_evil:build", {})
    from wspace.zoo.format import read_architecture, write_architecture

    (digest, *_) = (file.stem for file in (copy / "architectures").iterdir())
    space = read_architecture(copy, digest)[1]
    mine = write_architecture(copy, evil, space)
    number = 0 if space == mlp().space(TRUST) else 1
    marker(copy, number, lambda m: m.update(architecture=mine))
    opened = zoo.open(copy, checksums=True)
    assert opened.batch(slice(None)).graphs
    assert "build()" in opened.card()
    with pytest.raises(ZooError, match="'zoo_evil:build' is not imported"):
        opened.verify(22, trust=TRUST)
    assert "zoo_evil" not in sys.modules


def test_trust_is_asked_for_each_time() -> None:
    assert mlp().space(TRUST).params
    with pytest.raises(ZooError, match="not imported"):
        mlp().space()
    with pytest.raises(ZooError, match="annotated"):
        Architecture("zoo_recipes:not_annotated").module(trust=TRUST)
    assert isinstance(Architecture("zoo_recipes:Normed").module(trust=TRUST), zoo_recipes.Normed)
    with pytest.raises(ZooError, match=r"(?s)perceptron failed.*TypeError"):
        Architecture("zoo_recipes:perceptron", {"x": 1}).module(trust=TRUST)


# --- architectures --------------------------------------------------------------------------------


def test_architectures_survive_json() -> None:
    one = Architecture(
        "a.b:c",
        {"b": 1, "a": [1, None, {"x": 0.1}]},
        [InputSpec((2, 3)), InputSpec((), "int64", 5)],
    )
    assert Architecture.from_json(one.to_json()) == one
    assert hash(Architecture.from_json(one.to_json())) == hash(one)
    assert one == Architecture("a.b:c", {"a": [1, None, {"x": 0.1}], "b": 1}, one.inputs)
    assert one != Architecture("a.b:c", {}, one.inputs)
    assert one.options == {"a": [1, None, {"x": 0.1}], "b": 1}
    assert one.package == "a"
    assert pickle.loads(pickle.dumps(one)) == one
    for text in ("{}", "[]", "1", "{", '{"factory": "a:b", "options": 3, "inputs": []}'):
        with pytest.raises(ZooError, match="not an architecture"):
            Architecture.from_json(text)
    with pytest.raises(ZooError, match="no JSON"):
        Architecture("a:b", {"x": {1}})
    with pytest.raises(ZooError, match="no JSON"):
        Architecture("a:b", {"x": float("nan")})


def test_inputs() -> None:
    one = Architecture(
        "a:b", {}, [InputSpec((2, 3)), InputSpec((9,), "int64", 3), InputSpec((4,), "bool")]
    )
    x, i, b = one.example()
    assert (x.shape, x.dtype, i.dtype, b.dtype) == ((2, 3), torch.float32, torch.int64, torch.bool)
    assert 0 <= int(i.min()) <= int(i.max()) < 3
    assert torch.equal(one.example()[0], x)
    for wrong in [((2,), "int64", 0), ((2,), "float32", 3), ((-1,), "float32", 0)]:
        with pytest.raises(ZooError, match="cannot be made"):
            InputSpec(*wrong)
    with pytest.raises(ZooError, match="no such type"):
        InputSpec((2,), "load")


def test_a_module_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    module = mlp().module(trust=TRUST, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(p.is_meta for p in module.parameters())
    assert all(p.is_meta for p in mlp().module(trust=TRUST).parameters())


# --- splits ---------------------------------------------------------------------------------------


def test_splits_do_not_part_an_image_and_stay_when_a_zoo_grows(tmp_path: Path) -> None:
    small = zoo.build(Toy(count=300, size=50, views=3), tmp_path)
    parts = small.split(by="image", train=0.5, val=0.3, test=0.2)
    assert sum(map(len, parts.values())) == 300
    assert leaks({name: part.table["image"] for name, part in parts.items()}) == []
    for part, share in zip(parts.values(), (0.5, 0.3, 0.2), strict=True):
        assert abs(len(part) / 300 - share) < 0.12
        assert len(part) % 3 == 0
    large = zoo.build(Toy(count=330, size=50, views=3), tmp_path)
    again = large.split()  # the rule is saved
    for name, part in parts.items():
        assert {*part.ids} <= {*again[name].ids}
        assert {*again[name].ids} & {*small.ids} == {*part.ids}
    view = large[::2].split()
    assert {*view["val"].ids} <= {*again["val"].ids}
    assert large.splits == {"default": Split((0.5, 0.3, 0.2), "image")}
    with pytest.raises(ZooError, match=r"(?s)'default' is taken.*seed=0.*seed=1"):
        large.split(seed=1)
    other = large.split(by="image", seed=1, name="other")
    assert {*other["test"].ids} != {*again["test"].ids}
    assert "default: (fractions=(0.5, 0.3, 0.2), by='image'" in large.card()


def test_a_recipe_says_what_no_split_parts(tmp_path: Path) -> None:
    made = zoo.build(Views(count=120, views=3), tmp_path)
    assert "grouped  by image: no split parts its values" in made.card()

    def images(parts: dict[str, zoo.Zoo]) -> dict[str, np.ndarray]:
        return {name: part.table["image"] for name, part in parts.items()}

    assert leaks(images(made.split())) == []
    assert made.splits["default"].by == "image"
    assert leaks(images(made.split(by="", name="rows")))  # negative control
    assert made.splits["rows"].by is None
    assert made.split(by="good", name="other") and made.splits["other"].by == "good"
    with pytest.raises(ZooError, match="'default' is taken"):
        made.split(by="")


def test_zoos_that_were_begun_before_recipes_said_it(tmp_path: Path) -> None:
    zoo.build(Views(count=60, views=3), tmp_path)
    header = json.loads((tmp_path / "zoo.json").read_text())
    assert header.pop("grouped_by") == "image"
    (tmp_path / "zoo.json").write_text(json.dumps(header))
    old = zoo.open(tmp_path)
    assert old.header.grouped_by is None and "grouped" not in old.card()
    old.split(name="rows")
    assert old.splits["rows"].by is None
    again = zoo.build(Views(count=60, views=3), tmp_path)  # now it says so
    assert again.header.grouped_by == "image" and zoo.open(tmp_path).split()
    assert again.splits["default"].by == "image"
    assert zoo.build(Toy(), tmp_path / "other").header.grouped_by is None
    assert "grouped_by" not in json.loads((tmp_path / "other" / "zoo.json").read_text())


def test_the_column_that_is_declared_has_to_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Views, "grouped_by", "imag")
    with pytest.raises(ZooError, match="Views makes no column 'imag', which it is grouped by"):
        zoo.build(Views(), tmp_path)


def test_a_split_column_that_names_no_part_is_none(tmp_path: Path) -> None:
    state = random_state(mlp(), (40,), torch.Generator().manual_seed(0))
    opened = given(tmp_path, Cohort(mlp(), state, {"split": [""] * 40}))
    assert sum(map(len, opened.split().values())) == 40 and len(opened.split()["train"]) > 20


def test_splits_of_single_networks_part_images() -> None:
    """Negative control: without `by`, the views of one image do fall apart, and that is found."""
    ids, image = np.array([f"0/{i}" for i in range(60)]), np.arange(60) // 3
    place = Split((0.5, 0.25, 0.25)).places(ids)
    assert leaks({str(k): image[place == k] for k in range(3)})
    assert leaks({"a": np.array([1, 2]), "b": np.array([2, 3])}) == ["2 in a and b"]


def test_shares_that_leave_some_out() -> None:
    place = Split((0.2, 0.0, 0.1)).places(np.arange(2000))
    shares = np.bincount(place, minlength=4) / 2000
    assert shares == pytest.approx([0.2, 0.0, 0.1, 0.7], abs=0.04)
    for wrong in [(0.8, 0.3, 0.1), (-0.1, 0.5, 0.5), (0.0, 0.0, 0.0)]:
        with pytest.raises(ZooError, match="no such fractions"):
            Split(wrong)


def test_the_hash_never_changes() -> None:
    """Golden: another result means a new `VERSION`, since saved splits must not move anyone."""
    assert Split(by="image").places(np.arange(24)).tolist() == GOLDEN["ints"]
    assert Split(seed=3).places(np.array([f"0/{i}" for i in range(24)])).tolist() == GOLDEN["ids"]


GOLDEN = {
    "ints": [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0],
    "ids": [2, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 2, 0],
}


def test_a_column_says_the_split(tmp_path: Path) -> None:
    n = 12
    state = random_state(mlp(), (n,), torch.Generator().manual_seed(0))
    names = ["train"] * 8 + ["test"] * 3 + ["odd"]
    table = {
        "split": names,
        "image": [i // 2 for i in range(n)],
        "other": [*[0] * 8, *[1] * 3, 2],
    }
    opened = given(tmp_path, Cohort(mlp(), state, table))
    parts = opened.split(by="other")
    sizes = {name: len(part) for name, part in parts.items()}
    assert sizes == {"train": 8, "val": 0, "test": 3, "odd": 1}
    with pytest.raises(ZooError, match="(?s)parts networks of one 'image'.*5 in test and odd"):
        opened.split(by="image", name="leaky")
    assert len(opened.split(train=0.9, val=0.1, test=0.0, name="own")["test"]) == 0


def test_split_files(copy: Path) -> None:
    opened = zoo.open(copy)
    opened.split(by="image")
    for name in ("../x", "", ".hidden", "a/b"):
        with pytest.raises(ZooError, match="is no name"):
            opened.split(name=name)
    with pytest.raises(ZooError, match="no column 'imag'"):
        opened.split(by="imag", name="b")
    file = copy / "splits" / "default.json"
    data = json.loads(file.read_text())
    for wrong in [{"fractions": [1]}, {"seed": "x"}, {"format": 7}]:
        file.write_text(json.dumps({**data, **wrong}))
        with pytest.raises(ZooError, match="default.json is damaged"):
            opened.split()
    file.write_text(json.dumps({**data, "version": 2}))
    with pytest.raises(ZooError, match="another version"):
        opened.split()


def test_public_names() -> None:
    assert wspace.zoo.open is zoo.open_zoo
    assert callable(wspace.zoo.build)
