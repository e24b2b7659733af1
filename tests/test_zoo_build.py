"""Building zoos: killed at any point and resumed, in parallel, grown, on a full disk."""

import errno
import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from zoo_recipes import Dying, Given, Toy

from wspace import zoo
from wspace.cli import main
from wspace.errors import MissingExtra, ZooError
from wspace.zoo import Cohort, Counted, cluster
from wspace.zoo.engine import make_cohort
from wspace.zoo.recipe import described, grown, recipe_from

TESTS = Path(__file__).parent
RECIPE = Toy(count=10, mixed=True)


def tree(path: Path) -> dict[str, bytes]:
    """Every file with its content, but for the date in zoo.json."""
    files = {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}
    header = json.loads(files["zoo.json"])
    assert header.pop("created")
    return {**files, "zoo.json": json.dumps(header).encode()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("whole")
    zoo.build(RECIPE, path)
    return tree(path)


# --- kills ----------------------------------------------------------------------------------------

# Kills itself (-9) at the k-th flush of a file or folder: after every write and every rename.
KILLED = """
import os, signal, sys, torch
from zoo_recipes import Toy, mlp, NORMED
from wspace import zoo

recipe = Toy(count=10, mixed=True)
mlp().space(("zoo_recipes",)), NORMED.space(("zoo_recipes",))
flush, folder = os.fsync, sys.argv[1]
for k in range(1000):
    child = os.fork()
    if child == 0:
        left = k
        def dying(descriptor):
            global left
            flush(descriptor)
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        os.fsync = dying
        zoo.build(recipe, f"{folder}/{k:02d}")
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def python(code: str, *words: str, **options: Any) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, *words], env=env, **options)


def test_killed_at_every_step_and_resumed(tmp_path: Path, whole: dict[str, bytes]) -> None:
    assert python(KILLED, str(tmp_path)).wait() == 0
    folders = sorted(tmp_path.iterdir())
    assert len(folders) > 25  # kills, and one build that came to its end
    assert tree(folders.pop()) == whole
    seen: set[bool] = set()
    for folder in folders:
        files = {f.name for f in folder.glob("shards/[0-9]*")}
        markers = {name for name in files if name.endswith(".json")}
        seen |= {"000001.safetensors" in files and "000001.json" not in files}
        if (folder / "zoo.json").exists():
            readable = zoo.open(folder, checksums=True)  # what is committed is whole
            assert readable.cohorts == len(markers)
        zoo.build(RECIPE, folder)
        assert tree(folder) == whole, folder.name
    assert seen == {True, False}  # one kill at least fell between tensors and marker


@pytest.mark.slow
def test_killed_from_outside_with_workers(tmp_path: Path) -> None:
    """The builder is killed; its workers end too, and leave nothing that matters."""
    code = "import sys; from zoo_recipes import Toy; from wspace import zoo\n"
    code += "if __name__ == '__main__': zoo.build(Toy(count=400), sys.argv[1], workers=2)"
    recipe = Toy(count=400)
    zoo.build(recipe, tmp_path / "whole")
    process = python(code, str(tmp_path / "killed"), start_new_session=True)
    shards = tmp_path / "killed" / "shards"
    while not shards.exists() or len(list(shards.glob("*.json"))) < 10:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while workers_of(process.pid):
        assert time.monotonic() < deadline, "orphaned workers"
        time.sleep(0.05)
    before = len(zoo.open(tmp_path / "killed"))
    assert 0 < before < 400
    assert len(zoo.build(recipe, tmp_path / "killed")) == 400
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def workers_of(session: int) -> list[int]:
    """Processes of a session that still run."""
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, its = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        found += [int(folder.name)] if int(its) == session and state != "Z" else []
    return found


# --- workers --------------------------------------------------------------------------------------


def test_workers_that_die_are_replaced_and_bits_stay(tmp_path: Path) -> None:
    recipe = Dying(count=10, mixed=True, token=str(tmp_path / "token"))
    calls: list[tuple[int, int]] = []
    zoo.build(recipe, tmp_path / "two", workers=2, progress=lambda *now: calls.append(now))
    assert (tmp_path / "token").exists()  # it did die
    assert [done for done, _ in calls] == [1, 2, 3]
    zoo.build(recipe, tmp_path / "one")
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


@pytest.mark.slow
def test_a_cohort_that_always_kills_is_given_up(tmp_path: Path) -> None:
    recipe = Dying(count=10, token=str(tmp_path / "always"))
    with pytest.raises(ZooError, match=r"(?s)cohort 1 cannot be made.*died 3 times"):
        zoo.build(recipe, tmp_path / "zoo", workers=2)
    assert len(zoo.open(tmp_path / "zoo").where(image=[0, 1])) == 4  # cohort 0, beside it


def test_bits_do_not_depend_on_threads_or_global_state(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        zoo.build(RECIPE, tmp_path)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), before)
    assert tree(tmp_path) == whole
    zoo.build(replace(RECIPE, seed=1), tmp_path / "b")
    assert tree(tmp_path / "b").keys() == whole.keys()
    assert tree(tmp_path / "b") != whole


def test_errors_of_a_recipe_say_which_cohort(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    with pytest.raises(IndexError) as caught:
        Given.made[:] = [make_cohort(Toy(), 0)]
        zoo.build(Given(cohorts=2), tmp_path)
    assert caught.value.__notes__ == ["while cohort 1 of a zoo was made"]
    assert torch.get_num_threads() == threads
    assert len(zoo.open(tmp_path)) == 4


# --- growing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [1, 4, 6, 8])
def test_growing_equals_building_at_once(
    tmp_path: Path, whole: dict[str, bytes], first: int
) -> None:
    small = zoo.build(replace(RECIPE, count=first), tmp_path)
    ids, truth = small.ids.tolist(), [small[i][1] for i in range(first)]
    large = zoo.build(RECIPE, tmp_path)
    assert tree(tmp_path) == whole
    assert large.ids.tolist()[:first] == ids
    for i in range(first):
        assert all(torch.equal(x, truth[i][name]) for name, x in large[i][1].items())


def test_growing_that_fails_loses_nothing(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.build(replace(RECIPE, count=6), tmp_path)
    with monkeypatch.context() as patch, pytest.raises(ZooError, match="1.safetensors cannot be"):
        full_disk(patch, writes=2)  # zoo.json and its folder, and no more
        zoo.build(RECIPE, tmp_path)
    opened = zoo.open(tmp_path, checksums=True)
    assert len(opened) == 6
    assert not opened.whole
    zoo.build(RECIPE, tmp_path)
    assert tree(tmp_path) == whole


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    zoo.build(RECIPE, tmp_path)
    for other, match in [
        (replace(RECIPE, seed=1), "seed = 0 in the zoo, 1 now"),
        (replace(RECIPE, count=9), "count = 10 in the zoo, 9 now"),
        (replace(RECIPE, count=12, size=3), "size = 4 in the zoo, 3 now"),
        (Dying(count=10, mixed=True), "class zoo_recipes:Toy"),
    ]:
        with pytest.raises(ZooError, match=rf"(?s)another recipe.*{match}"):
            zoo.build(other, tmp_path)
    old, new = described(RECIPE), described(replace(RECIPE, count=11))
    assert grown(old, new, ("count",))
    assert not grown(old, old, ("count",))
    with pytest.raises(ZooError, match="only nothing may be larger"):
        grown(old, new, ())


def test_cohorts_of_a_count() -> None:
    @dataclass(frozen=True)
    class Some(Counted):
        count: int
        size: int = 4
        seed: int = 0

    for count, rows in ((1, [1]), (4, [4]), (9, [4, 4, 1])):
        recipe = Some(count)
        assert [recipe.rows(k) for k in range(recipe.cohorts)] == rows
    assert Some.grows == ("count",) and described(Some(3))["fields"] == {  # type: ignore[arg-type]
        "count": 3, "size": 4, "seed": 0
    }  # fmt: skip


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("\\title")
    with pytest.raises(ZooError, match=r"(?s)is in use.*thesis.tex"):
        zoo.build(RECIPE, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ZooError, match="cannot be made"):
        zoo.build(RECIPE, tmp_path / "thesis.tex" / "zoo")
    zoo.build(RECIPE, tmp_path / "zoo")
    (tmp_path / "zoo" / "zoo.json").unlink()
    with pytest.raises(ZooError, match="zoo.json is missing beside its shards"):
        zoo.build(RECIPE, tmp_path / "zoo")


def test_one_build_at_a_time(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    zoo.build(RECIPE, tmp_path)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(ZooError, match="is being built"):
            zoo.build(RECIPE, tmp_path)
    finally:
        os.close(descriptor)
    zoo.build(RECIPE, tmp_path)


def test_building_again_does_nothing_and_repairs(tmp_path: Path, whole: dict[str, bytes]) -> None:
    zoo.build(RECIPE, tmp_path)
    times = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file()}
    (tmp_path / "shards" / ".000001.csv.0a1b2c3d.tmp").write_text("left behind")
    zoo.build(RECIPE, tmp_path)
    assert times == {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file()}
    (tmp_path / "shards" / "000000.safetensors").unlink()
    (tmp_path / "shards" / "000001.json").write_text("{")
    (tmp_path / "shards" / "000002.csv").write_text("row")
    calls: list[int] = []
    zoo.build(RECIPE, tmp_path, progress=lambda done, total: calls.append(done))
    assert calls == [1, 2, 3]
    assert tree(tmp_path) == whole
    lost, damaged = sorted((tmp_path / "architectures").iterdir())
    lost.unlink()
    damaged.write_text("{")
    zoo.build(RECIPE, tmp_path)
    assert tree(tmp_path) == whole


def test_a_build_that_failed_at_once_binds_nobody(tmp_path: Path, whole: dict[str, bytes]) -> None:
    Given.made[:] = []
    with pytest.raises(IndexError):
        zoo.build(Given(), tmp_path)
    assert (tmp_path / "zoo.json").exists()
    zoo.build(RECIPE, tmp_path)
    assert tree(tmp_path) == whole


# --- full disks -----------------------------------------------------------------------------------


def full_disk(patch: pytest.MonkeyPatch, *, writes: int) -> None:
    """After so many flushes, no more fits on the disk."""
    left = iter(range(writes))

    def fsync(descriptor: int, flush: Any = os.fsync) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    patch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("writes", range(0, 24, 3))
def test_full_disk(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    with (
        monkeypatch.context() as patch,
        pytest.raises(ZooError, match=r"(?s)(json|csv|safetensors) cannot be.*No space left"),
    ):
        full_disk(patch, writes=writes)
        zoo.build(RECIPE, tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    if (tmp_path / "zoo.json").exists():
        zoo.open(tmp_path, checksums=True)
    zoo.build(RECIPE, tmp_path)
    assert tree(tmp_path) == whole


@pytest.fixture
def small_files() -> Iterator[None]:
    """The system refuses files larger than 1.5 kB: a write that really fails half-way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_half_way(
    tmp_path: Path, whole: dict[str, bytes], request: pytest.FixtureRequest
) -> None:
    zoo.build(replace(RECIPE, count=4), tmp_path)
    request.getfixturevalue("small_files")
    with pytest.raises(ZooError, match=r"(?s)\.json cannot be written.*File too large"):
        zoo.build(RECIPE, tmp_path)
    assert len(zoo.open(tmp_path, checksums=True)) == 4
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    zoo.build(RECIPE, tmp_path)
    assert tree(tmp_path) == whole


# --- ray ------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
def test_ray_is_an_extra(tmp_path: Path) -> None:
    with pytest.raises(MissingExtra, match=r"(?s)needs ray.*wspace\[ray\]"):
        zoo.build(RECIPE, tmp_path, engine="ray")
    assert zoo.open(tmp_path).cohorts == 0


class StandIn:
    """As much of ray as the driver uses; tasks run when they are waited for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # as the tasks see it
        self.calls: list[tuple[Any, ...]] = []
        self.under_way = 0

    def is_initialized(self) -> bool:
        return True

    def remote(self, **options: int) -> Any:
        assert options == {"num_cpus": 1, "max_retries": 3}
        return lambda task: SimpleNamespace(remote=lambda *words: self.submit(task, words))

    def submit(self, task: Any, words: tuple[Any, ...]) -> int:
        recipe, number, _, *rest = words
        self.calls.append((task, recipe, number, str(self.folder), *rest))
        return len(self.calls) - 1

    def put(self, thing: object) -> object:
        return thing

    def wait(self, running: list[int], num_returns: int) -> tuple[list[int], list[int]]:
        self.under_way = max(self.under_way, len(running))
        return running[-1:], running[:-1]

    def get(self, reference: int) -> Cohort | None:
        task, *words = self.calls[reference]
        return task(*words)


@pytest.mark.parametrize("shared", [True, False])
def test_driver_of_ray(tmp_path: Path, whole: dict[str, bytes], shared: bool) -> None:
    """Where tasks see the folder they write; else the driver does."""
    zoo.build(replace(RECIPE, count=1), tmp_path)
    stand_in = StandIn(tmp_path if shared else tmp_path / "elsewhere")
    todo = [0, 1, 2]
    ready = list(cluster._run(stand_in, RECIPE, tmp_path, todo, (2, None)))
    assert sorted(ready) == todo
    assert stand_in.under_way == 2
    results = [stand_in.get(k) is None for k in range(3)]
    assert results == [shared] * 3
    shards = {name: x for name, x in tree(tmp_path).items() if "shards" in name}
    assert shards == {name: x for name, x in whole.items() if "shards" in name}


@pytest.mark.slow
def test_ray_builds_the_same_bits(tmp_path: Path, whole: dict[str, bytes]) -> None:
    pytest.importorskip("ray")
    recipe = Dying(count=10, mixed=True, token=str(tmp_path / "token"))
    zoo.build(recipe, tmp_path / "ray", engine="ray", workers=2)
    assert (tmp_path / "token").exists()
    zoo.build(recipe, tmp_path / "one")
    assert tree(tmp_path / "ray") == tree(tmp_path / "one")


# --- recipes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Every type that a field may have."""

    whole: int
    part: float = 0.5
    on: bool = False
    word: str = "a"
    kind: Literal["x", "y", 3] = "x"
    sizes: tuple[int, ...] = ()
    pair: tuple[int, str] = (0, "")
    maybe: float | None = None
    seed: int = 0

    cohorts = 0

    def cohort(self, index: int) -> Cohort:
        raise AssertionError(index)


NAME = f"{__name__}:Options"


def test_options_are_read_by_their_types() -> None:
    given: dict[str, Any] = {
        **{"whole": "3", "part": "2", "on": "true", "word": "12", "kind": "y", "sizes": "[1, 2]"},
        **{"pair": [1, "b"], "maybe": "null"},
    }
    recipe = recipe_from(NAME, given)
    assert recipe == Options(3, 2.0, True, "12", "y", (1, 2), (1, "b"), None)
    assert isinstance(recipe, Options)
    assert type(recipe.part) is float
    assert recipe_from(NAME, {"whole": 1, "maybe": 2}) == Options(1, maybe=2.0)
    assert recipe_from(NAME, {"whole": 1, "kind": "3"}) == Options(1, kind=3)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"whole": 1.5}, "whole does not fit"),
        ({"whole": True}, "whole does not fit"),
        ({"whole": "x"}, r"(?s)expected int.*got 'x'"),
        ({"whole": 1, "word": 3}, "word does not fit"),
        ({"whole": 1, "kind": "z"}, "kind does not fit"),
        ({"whole": 1, "pair": [1]}, "pair does not fit"),
        ({"whole": 1, "sizes": [1, "x"]}, "sizes does not fit"),
        ({"whole": 1, "maybe": "x"}, "maybe does not fit"),
        ({"whole": 1, "part": "true"}, "part does not fit"),
        ({"hole": 1}, r"(?s)no option 'hole'.*did you mean 'whole'"),
        ({}, r"(?s)lacks options.*whole"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ZooError, match=match):
        recipe_from(NAME, options)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("nothing_of_the_kind", "no recipe 'nothing_of_the_kind'"),
        ("zoo_recipes:Toi", "Toi"),
        ("zoo_recipes:mlp", "is no recipe"),
        ("nowhere.at.all:Toy", "nowhere"),
        (":Toy", "no recipe"),
    ],
)
def test_recipes_that_are_not_there(name: str, match: str) -> None:
    with pytest.raises(ZooError, match=match):
        recipe_from(name)


def test_recipes_are_json() -> None:
    assert described(Options(1, sizes=(1, 2)))["fields"]["sizes"] == [1, 2]  # pyright: ignore
    with pytest.raises(ZooError, match="no JSON"):
        described(Options({1}))  # pyright: ignore
    with pytest.raises(ZooError, match="is no recipe"):
        described("digits")  # pyright: ignore


def test_generators_of_cohorts_differ() -> None:
    draws = {
        float(torch.rand((), generator=zoo.generator_of(seed, k)))
        for seed in (-1, 0, 1, 2**40)
        for k in range(50)
    }
    assert len(draws) == 200
    assert float(torch.rand((), generator=zoo.generator_of(0, 0))) in draws


# --- the command ----------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(["zoo", *words])
    shown = capsys.readouterr()
    return code, shown.out + shown.err


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "zoo")
    build = ["build", "zoo_recipes:Toy", path, "--set", "count=12", "mixed=true"]
    code, shown = run(capsys, *build, "--dtype", "float16")
    assert (code, "12 networks" in shown, "float16" in shown) == (0, True, True)
    assert "8 × perceptron(width=5): 32 parameters" in shown
    code, again = run(capsys, "info", path)
    assert (code, again) == (0, shown)
    code, shown = run(capsys, "verify", path, "--checksums", "--trust", "zoo_recipes")
    assert (code, "checksums of all files" in shown, "4 networks" in shown) == (0, True, True)
    code, shown = run(capsys, "split", path, "--by", "image", "--test", "0.1")
    assert (code, "train" in shown) == (0, True)
    code, shown = run(capsys, "recipes")
    assert code == 0
    file = tmp_path / "zoo" / "shards" / "000001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    code, shown = run(capsys, "verify", path, "--trust", "zoo_recipes")
    assert (code, "000001.safetensors is damaged" in shown, "1 cohort" in shown) == (1, True, True)
    code, shown = run(capsys, "info", path)
    assert (code, "NOT WHOLE" in shown, "damaged" in shown) == (0, True, True)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["build", "zoo_recipes:Toy", "X", "--set", "cuont=1"], "did you mean 'count'"),
        (["build", "zoo_recipes:Toy", "X", "--set", "count"], "takes key=value"),
        (["build", "zoo_recipes:Toy", "X", "--engine", "slurm"], "slurm"),
        (["info", "X"], "zoo.json is missing"),
        (["verify"], "required: PATH"),
        (["biuld"], "did you mean 'build'"),
        ([], "required: command"),
        (["info", "X", "--wrong"], "unrecognized arguments: --wrong"),
    ],
    ids=str,
)
def test_command_used_wrongly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], match: str
) -> None:
    words = [word.replace("X", str(tmp_path / "X")) if word == "X" else word for word in words]
    code, shown = run(capsys, *words)
    assert code == 2
    assert match in shown


def test_the_command_trusts_nobody_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo.build(Toy(count=2), tmp_path)
    code, shown = run(capsys, "verify", str(tmp_path))
    assert code == 2
    assert "say --trust zoo_recipes" in shown


def test_a_zoo_can_be_moved(tmp_path: Path, whole: dict[str, bytes]) -> None:
    zoo.build(RECIPE, tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert len(zoo.build(RECIPE, tmp_path / "b")) == 10
    assert tree(tmp_path / "b") == whole
    assert load_file(tmp_path / "b" / "shards" / "000000.safetensors")
