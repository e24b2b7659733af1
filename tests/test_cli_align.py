"""`wspace align`, `merge` and `interpolate`: what they refuse, write and say."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_io import assert_same, assert_tied
from torch import Tensor, nn

import wspace
from wspace import act, load_checkpoint, sample, save_checkpoint, trace
from wspace.cli import main
from wspace.cli import networks as networks_module
from wspace.testing import TOLERANCE
from wspace.trace.verify import difference

NET = """
import torch
from torch import nn
from torch.nn import functional as F

def build():
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 7, 2), nn.Tanh(),
        nn.Flatten(), nn.Linear(28, 4)
    )
    return net, (torch.randn(3, 1, 5, 5),)

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mlp, self.back = nn.Embedding(11, 5), nn.Linear(5, 7), nn.Linear(7, 5)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("position_ids", torch.arange(3), persistent=True)

    def forward(self, ids):
        x = self.embed(ids + 0 * self.position_ids)
        return self.head(x + self.back(torch.relu(self.mlp(x))))

def tied():
    return Tied(), (torch.randint(11, (2, 3)),)

class Choosy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        if self.a.weight.sum() > 1e9:  # cannot be known without values
            return x
        return self.b(torch.relu(self.a(x)))

def choosy():
    return Choosy(), (torch.randn(2, 3),)

X = torch.randn(50, 1, 5, 5, generator=torch.Generator().manual_seed(0))

def loss(net):
    return net(X).square().mean()

def metrics(net):
    return {"loss": net(X).square().mean(), "accuracy": (net(X).argmax(1) == 0).double().mean()}

def batches():
    return [X[:25], X[25:]]

def wrong(net):
    return net(X)
"""
align_command = importlib.import_module("wspace.cli.align")  # the package has a function so named
AB = ("a.safetensors", "b.safetensors")
BUILD = ("--model", "py:net.py:build")


class Run(NamedTuple):
    code: int
    out: str
    err: str


Runner = Callable[..., Run]
State = dict[str, Tensor]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runner:
    """Runs a command in a folder with `net.py`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    Path("net.py").write_text(NET)

    def go(*words: str) -> Run:
        code = main(words)
        shown = capsys.readouterr()
        return Run(code, shown.out, shown.err)

    return go


def network(factory: str = "build", seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network of `NET`, with random statistics too."""
    names: dict[str, Any] = {}
    exec(NET, names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module, inputs = names[factory]()
        for name, buffer in module.named_buffers():
            if name.endswith("mean"):
                buffer.normal_()
            elif name.endswith("var"):
                buffer.uniform_(0.5, 2)
    return module.eval(), inputs


def state_of(module: nn.Module) -> State:
    return {n: x.detach().clone() for n, x in module.state_dict().items()}


@pytest.fixture
def pair(run: Runner) -> tuple[State, State]:
    """Two networks in files: the second is the first, moved, with a little noise."""
    module, inputs = network()
    a = state_of(module)
    space = trace(module, inputs)
    b = act(sample(space, generator=torch.Generator().manual_seed(5)), a, space)
    b = {n: x + 1e-3 * torch.randn_like(x) if x.is_floating_point() else x for n, x in b.items()}
    save_file(a, "a.safetensors", {"format": "pt"})
    save_file(b, "b.safetensors", {"format": "pt", "author": "someone"})
    return a, b


def metadata(path: str, entry: str) -> Any:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[entry])


def output(module: nn.Module, state: State, x: Tensor) -> Tensor:
    with torch.no_grad():
        double = {n: v.double() if v.is_floating_point() else v for n, v in state.items()}
        return torch.func.functional_call(module.double(), double, (x.double(),))


def distance(a: State, b: State) -> float:
    squares = [(a[n] - b[n]).double().square().sum() for n in a if a[n].is_floating_point()]
    return float(torch.stack(squares).sum().sqrt())


# --- align ----------------------------------------------------------------------------------------


def test_align_undoes_a_permutation(run: Runner, pair: tuple[State, State]) -> None:
    a, b = pair
    code, out, err = run("align", *AB, *BUILD, "--out", "c.safetensors")
    assert (code, err) == (0, "")
    c = load_checkpoint("c.safetensors")
    assert distance(a, c) < 0.05 and distance(a, b) > 1
    module, inputs = network()
    before, after = (output(module, x, inputs[0]) for x in (b, dict(c)))
    assert float((before - after).abs().max()) <= TOLERANCE[torch.float64] * float(
        before.abs().max()
    )
    assert "unchanged: largest relative change" in out and "wrote c.safetensors" in out
    assert c.layout.metadata["c.safetensors"]["author"] == "someone"  # it is B, moved
    assert metadata("c.safetensors", "wspace-align")["a"] == "a.safetensors"
    assert_same(load_checkpoint("b.safetensors"), b)


def test_align_says_the_same_in_json(run: Runner, pair: tuple[State, State]) -> None:
    a, b = pair
    code, out, _ = run("align", *AB, *BUILD, "--json", "-")
    data = json.loads(out)
    assert code == 0 and data["out"] is None and data["network"] == "py:net.py:build"
    assert data["check"]["ok"] is True and data["check"]["change"] < 1e-10
    names = [p.name for p in trace(*network()).params if not p.buffer]
    params = [{n: x[n] for n in names} for x in pair]
    assert data["before"]["distance"] == pytest.approx(distance(*params), rel=1e-6)
    assert data["after"]["distance"] < 0.05
    inner = sum(float((params[0][n].double() * params[1][n].double()).sum()) for n in names)
    assert data["before"]["objective"] == pytest.approx(inner, rel=1e-6)
    assert data["start_objective"] == pytest.approx(inner, rel=1e-6)
    assert data["objective"] == pytest.approx(data["after"]["objective"], rel=1e-6)
    assert [g["size"] for g in data["groups"]] == [6, 7]
    assert all(0 < g["moved"] <= 1 and g["tensors"] >= 3 for g in data["groups"])
    assert len(list(Path().glob("*.safetensors"))) == 2


@pytest.mark.parametrize("kinds", [["permutation", "sign"], ["permutation", "scale", "sign"]])
def test_align_moves_by_the_kinds_asked_for(run: Runner, kinds: list[str]) -> None:
    module, inputs = network()
    a, space = state_of(module), trace(module, inputs)
    b = act(sample(space, generator=torch.Generator().manual_seed(5), kinds=kinds), a, space)
    save_file(a, "a.safetensors")
    save_file(b, "b.safetensors")
    words = ("align", *AB, *BUILD, "--kinds", *kinds)
    code, out, _ = run(*words, "--out", "c.safetensors", "--restarts", "2", "--seed", "3")
    assert code == 0, out
    assert distance(load_checkpoint("c.safetensors"), a) < distance(a, b)
    assert "flipped" in out
    assert ("×" in out) == ("scale" in kinds)
    before, after = (output(module, x, inputs[0]) for x in (b, load_checkpoint("c.safetensors")))
    assert difference([before], [after]) <= TOLERANCE[torch.float32]


def test_a_changed_function_is_found_and_nothing_is_written(
    run: Runner, pair: tuple[State, State], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check can fail: one tensor is left where it was."""

    def wrong(t: Any, name: str, state: Any, space: Any) -> Tensor:
        return state[name] if name == "3.bias" else wspace.action.moved(t, name, state, space)

    monkeypatch.setattr(align_command, "moved", wrong)
    words = ("align", *AB, *BUILD, "--out", "c.safetensors")
    code, out, _ = run(*words)
    assert code == 1 and "CHANGED" in out and "nothing was written" in out
    assert not Path("c.safetensors").exists()
    data = json.loads(run(*words, "--json", "-").out)
    assert data["check"]["ok"] is False and data["check"]["change"] > 1e-3
    assert run(*words, "--no-check").code == 0 and Path("c.safetensors").exists()


def test_the_check_is_left_out_where_it_would_be_large(
    run: Runner, pair: tuple[State, State], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(align_command, "LARGE", 100)
    words = ("align", *AB, *BUILD)
    built: list[bool] = []
    real = networks_module.resolve
    monkeypatch.setattr(
        networks_module, "resolve", lambda *a, **k: built.append(k["meta"]) or real(*a, **k)
    )
    code, out, _ = run(*words)
    assert code == 0 and "not run (1.5 kB of weights); --check does" in out
    assert built == [True]  # nowhere was memory for weights
    assert "unchanged" in run(*words, "--check").out
    assert built == [True, True, False]
    assert "not run (--no-check)" in run(*words, "--no-check").out


def test_ties_and_buffers_come_along(run: Runner) -> None:
    """The bane of others: KeyErrors for buffers such as position_ids."""
    module, inputs = network("tied")
    a = state_of(module)
    space = trace(module, inputs)
    b = act(sample(space, generator=torch.Generator().manual_seed(1)), a, space)
    for name, state in (("a", a), ("b", b)):
        save_checkpoint(state | {"head.weight": state["embed.weight"]}, f"{name}.safetensors")
    words = ("--model", "py:net.py:tied", "--restarts", "5")
    code, out, err = run("align", *AB, *words, "--out", "c.safetensors")
    assert code == 0, err
    c = load_checkpoint("c.safetensors")
    assert_tied(c, "embed.weight", "head.weight")
    assert c["position_ids"].tolist() == [0, 1, 2]
    assert distance(dict(c), a) < 1e-3 < distance(a, b)
    merge = ("merge", *AB, *words, "--out", "m.safetensors")
    assert run(*merge).code == 0
    assert_tied(load_checkpoint("m.safetensors"), "embed.weight", "head.weight")
    assert load_checkpoint("m.safetensors")["position_ids"].dtype == torch.int64


def test_code_is_read_off_plain_checkpoints(run: Runner) -> None:
    net = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3))
    a = state_of(net)
    space = trace(net, torch.randn(1, 4))
    save_file(a, "a.safetensors")
    save_file(
        act(sample(space, generator=torch.Generator().manual_seed(0)), a, space), "b.safetensors"
    )
    code, out, _ = run("align", *AB, "--out", "c.safetensors")
    assert code == 0 and "read off the names and shapes" in out
    assert_same(load_checkpoint("c.safetensors"), a)  # one group: recovered bit for bit
    for words in (("align",), ("merge", "--out", "m.safetensors")):
        code, _, err = run(*words, *AB, "--kinds", "permutation", "scale")
        assert code == 2 and "scale depend on the activations" in err and "--model" in err
    save_file({"p": torch.randn(3, 2, 2, 2, 2, 2, 2)}, "d.safetensors")
    code, _, err = run("align", "d.safetensors", "d.safetensors")
    assert code == 2 and "comes without code" in err and "--model" in err


def test_code_that_needs_values_gets_them(run: Runner) -> None:
    a = state_of(network("choosy")[0])
    save_file(a, "a.safetensors")
    order = torch.randperm(5)
    b = {"a.weight": a["a.weight"][order], "a.bias": a["a.bias"][order]}
    b |= {"b.weight": a["b.weight"][:, order].contiguous(), "b.bias": a["b.bias"]}
    save_file(b, "b.safetensors")
    words = ("--model", "py:net.py:choosy", "--out", "c.safetensors")
    code, _, err = run("align", *AB, *words)
    assert code == 0, err
    assert_same(load_checkpoint("c.safetensors"), a)


def test_torch_files_and_wrappers_are_read(run: Runner, pair: tuple[State, State]) -> None:
    a, b = pair
    torch.save({"state_dict": {f"module.{n}": x for n, x in b.items()}, "epoch": 3}, "b.pt")
    code, _, err = run("align", "a.safetensors", "b.pt", *BUILD, "--out", "c.safetensors")
    assert code == 0, err
    c = load_checkpoint("c.safetensors")
    assert set(c) == set(a) and distance(dict(c), a) < 0.05
    with safe_open("c.safetensors", framework="pt") as file:
        assert all(name.startswith("module.") for name in file.keys())  # noqa: SIM118


@pytest.fixture
def folders(run: Runner) -> tuple[State, State]:
    """Two Hugging Face folders, sharded, in half precision."""
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=12,
        n_layer=1,
        n_head=3,
        n_positions=16,
        vocab_size=20,
        bos_token_id=1,
        eos_token_id=2,
    )
    states: list[State] = []
    for seed, name in enumerate("ab"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = transformers.GPT2LMHeadModel(config)
        model.to(torch.bfloat16).save_pretrained(name, max_shard_size="4KB")
        states.append(state_of(model))
    return states[0], states[1]


def test_folders_go_in_and_come_out(run: Runner, folders: tuple[State, State]) -> None:
    assert len(list(Path("a").glob("*.safetensors"))) > 1
    code, out, err = run("align", "a", "b", "--out", "c")
    assert code == 0 and "hf:a" in out, err
    assert {f.name for f in Path("c").iterdir()} == {f.name for f in Path("b").iterdir()}
    c = load_checkpoint("c")
    assert all(c[n].dtype == torch.bfloat16 for n in c)
    assert metadata(str(next(Path("c").glob("*.safetensors"))), "wspace-align")["b"] == "b"
    assert run("align", "hf:a", "hf:c", "--out", "d.safetensors").code == 0
    assert run("merge", "a", "b", "--out", "m").code == 0
    merged = load_checkpoint("m")
    assert merged.layout.shards == load_checkpoint("a").layout.shards
    assert_tied(
        merged, "transformer.wte.weight", "lm_head.weight"
    ) if "lm_head.weight" in merged else None
    code, _, err = run("merge", "a", "b", "--out", "m")
    assert code == 2 and "m is in use" in err
    code, _, err = run("merge", "a", "b", "--out", "missing/m")
    assert code == 2 and "a folder that is not there" in err


# --- what is refused ------------------------------------------------------------------------------


def test_everything_that_does_not_fit_is_listed(run: Runner, pair: tuple[State, State]) -> None:
    a, b = pair
    save_file({n: x for n, x in a.items() if n != "3.bias"}, "less.safetensors")
    save_file(b | {"6.weight": torch.ones(4, 3), "extra": torch.ones(2)}, "more.safetensors")
    for command in ("merge", "align"):
        files = ("less.safetensors", "more.safetensors")
        code, _, err = run(command, *files, *BUILD, "--out", "c.safetensors")
        assert code == 2 and not Path("c.safetensors").exists()
        for text in ("less.safetensors", "missing 3.bias", "more.safetensors", "unexpected extra"):
            assert text in err
        assert "6.weight of shape (4, 3), the module's is (4, 28)" in err
    code, _, err = run("align", "a.safetensors", "less.safetensors", *BUILD)
    assert code == 2 and err.startswith("align: less.safetensors: the checkpoint does not fit")


@pytest.mark.parametrize("command", ["align", "merge", "interpolate"])
def test_targets_are_checked_first(run: Runner, pair: tuple[State, State], command: str) -> None:
    more = ("--t", "0.5") if command == "interpolate" else ()

    def refused(target: str, *words: str) -> str:
        files = ("a.safetensors", "b.safetensors")
        code, _, err = run(command, *files, *BUILD, "--out", target, *more, *words)
        assert code == 2
        return err

    Path("there.safetensors").write_bytes(b"x")
    Path("folder").mkdir()
    assert "does not end in .safetensors" in refused("c.pt")
    assert "--force replaces it" in refused("there.safetensors")
    assert "is in a folder that is not there" in refused("nowhere/c.safetensors")
    assert f"{command}: a.safetensors is one of the checkpoints" in refused(
        "a.safetensors", "--force"
    )
    Path("link.safetensors").symlink_to("b.safetensors")
    assert "is one of the checkpoints" in refused("link.safetensors", "--force")
    assert Path("there.safetensors").read_bytes() == b"x"
    words = (command, "a.safetensors", "b.safetensors", *BUILD, *more)
    assert run(*words, "--out", "there.safetensors", "--force").code == 0
    assert len(load_checkpoint("there.safetensors")) == len(pair[0])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("align", "a.safetensors", "no.safetensors"), "no.safetensors, which is not there"),
        (("align", "py:net.py:build", "torchvision:x"), "py:net.py:build, which names code"),
        (("align", *AB, "--restarts", "-1"), "--restarts -1"),
        (("align", *AB, "--sweeps", "0"), "--sweeps 0"),
        (
            ("merge", *AB, "--sweeps", "0", "--out", "c.safetensors"),
            "--sweeps 0",
        ),
        (("align", *AB, "--kinds", "rotation"), "rotation"),
        (("align", *AB, *BUILD, "--kinds", "sign", "phase"), "moves by phase"),
        (
            ("align", *AB, "--model", "py:net.py:buidl"),
            "did you mean 'build'",
        ),
    ],
)
def test_wrong_use_is_named(
    run: Runner, pair: tuple[State, State], words: tuple[str, ...], text: str
) -> None:
    code, _, err = run(*words)
    assert code == 2 and text in err


def test_nan_is_refused_with_its_place(run: Runner, pair: tuple[State, State]) -> None:
    bad = pair[0]["0.weight"].clone()
    bad[0, 0, 0, 0] = float("nan")
    save_file(pair[0] | {"0.weight": bad}, "nan.safetensors")
    for command in (("align",), ("merge", "--out", "c.safetensors")):
        code, _, err = run(*command, "a.safetensors", "nan.safetensors", *BUILD)
        assert code == 2 and "1 in 0.weight of nan.safetensors" in err


# --- merge ----------------------------------------------------------------------------------------


def test_merge_averages_what_was_aligned(run: Runner, pair: tuple[State, State]) -> None:
    a, b = pair
    words = ("merge", *AB, *BUILD)
    code, out, err = run(*words, "--out", "m.safetensors")
    assert (code, err) == (0, "")
    assert distance(load_checkpoint("m.safetensors"), a) < 0.05
    assert "statistics" in out and "estimate them anew" in out
    assert run(*words, "--out", "n.safetensors", "--no-align").code == 0
    naive = load_checkpoint("n.safetensors")
    for name, x in a.items():
        if x.is_floating_point():
            torch.testing.assert_close(naive[name], (x + b[name]) / 2)
    assert metadata("m.safetensors", "wspace-merge")["aligned"] is True
    assert metadata("n.safetensors", "wspace-merge")["aligned"] is False


@pytest.mark.parametrize("method", ["average", "slerp", "task", "ties"])
def test_merge_is_that_of_the_library(run: Runner, pair: tuple[State, State], method: str) -> None:
    a, b = pair
    module, inputs = network()
    space, base = (
        trace(module, inputs),
        {n: 0.9 * x if x.is_floating_point() else x for n, x in a.items()},
    )
    save_file(base, "base.safetensors")
    needs = method in {"task", "ties"}
    options: dict[str, Any] = {"weights": [0.3, 0.9]} | (
        {"base": base, "scale": 0.7} if needs else {}
    )
    words = ["--weights", "0.3", "0.9"]
    words += ["--base", "base.safetensors", "--scale", "0.7"] if needs else []
    if method == "ties":
        options["density"], words = 0.4, [*words, "--density", "0.4"]
    expected = wspace.align.merge([a, b], space, method=method, **options)
    files = ("merge", *AB, *BUILD, "--method", method)
    code, _, err = run(*files, *words, "--out", "m.safetensors")
    assert code == 0, err
    assert_same(load_checkpoint("m.safetensors"), expected)


def test_merge_of_many(run: Runner, pair: tuple[State, State]) -> None:
    a, b = pair
    save_file({n: x + 1 if x.is_floating_point() else x for n, x in a.items()}, "c.safetensors")
    files = ("merge", *AB, "c.safetensors", *BUILD)
    code, out, err = run(*files, "--many", "--out", "m.safetensors", "--json", "m.json")
    assert code == 0, err
    data = json.loads(Path("m.json").read_text())
    assert [fit["name"] for fit in data["fits"]] == list(files[1:4])
    assert data["fits"][1]["after"]["distance"] < data["fits"][1]["before"]["distance"]
    merged = load_checkpoint("m.safetensors")
    module, inputs = network()
    space = trace(module, inputs)
    found = wspace.align.match_many([load_checkpoint(f) for f in files[1:4]], space,
                                    generator=torch.Generator().manual_seed(0))  # fmt: skip
    rows = [
        act(t, x, space)
        for t, x in zip(found, [load_checkpoint(f) for f in files[1:4]], strict=True)
    ]
    mean = {n: sum(row[n] for row in rows) / 3 for n in a if a[n].is_floating_point()}
    for name, x in mean.items():
        torch.testing.assert_close(merged[name], x)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--method", "ties"), "no --base"),
        (("--base", "a.safetensors"), "--base, which is for task and ties"),
        (("--density", "0.5"), "--density, which is for ties"),
        (("--scale", "2"), "--scale, which is for task and ties"),
        (("--weights", "1"), "1 weights for 2 models"),
        (("--many", "--no-align"), "--many with --no-align"),
        (("--many", "--method", "task", "--base", "a.safetensors"), "--many with --base"),
        (("--method", "ties", "--base", "a.safetensors", "--density", "1.5"), "density 1.5"),
    ],
)
def test_merge_refuses_options_that_do_not_fit(
    run: Runner, pair: tuple[State, State], words: tuple[str, ...], text: str
) -> None:
    files = ("merge", *AB, *BUILD, "--out", "m.safetensors")
    code, _, err = run(*files, *words)
    assert code == 2 and text in err and not Path("m.safetensors").exists()


# --- interpolate ----------------------------------------------------------------------------------


def test_interpolate_stops_where_it_is_told(run: Runner, pair: tuple[State, State]) -> None:
    a, b = pair
    words = ("interpolate", *AB, *BUILD)
    code, out, err = run(*words, "--t", "0.25", "--out", "q.safetensors")
    assert (code, err) == (0, "") and "wrote q.safetensors (t = 0.25)" in out
    module, inputs = network()
    space = trace(module, inputs)
    expected = wspace.align.interpolate(a, b, 0.25, space=space)
    assert_same(load_checkpoint("q.safetensors"), expected)
    assert run(*words, "--t", "1", "--no-align", "--out", "one.safetensors").code == 0
    assert_same(load_checkpoint("one.safetensors"), b)


def test_interpolate_writes_a_row_of_points(run: Runner, pair: tuple[State, State]) -> None:
    words = ("interpolate", *AB, *BUILD)
    code, _, err = run(*words, "--points", "5", "--out", "row", "--kind", "spherical")
    assert code == 0, err
    names = [f"t{t}.safetensors" for t in ("0.00", "0.25", "0.50", "0.75", "1.00")]
    assert sorted(f.name for f in Path("row").iterdir()) == names
    assert_same(load_checkpoint("row/t0.00.safetensors"), pair[0])
    assert metadata("row/t0.75.safetensors", "wspace-interpolate")["t"] == 0.75
    code, _, err = run(*words, "--points", "5", "--out", "row")
    assert code == 2 and "t0.00.safetensors is there already" in err
    assert run(*words, "--points", "5", "--out", "row", "--force").code == 0


def test_interpolate_measures_losses(run: Runner, pair: tuple[State, State]) -> None:
    a, b = pair
    words = ("interpolate", *AB, *BUILD, "--loss", "py:net.py:metrics")
    code, out, err = run(*words, "--plot", "b.svg", "--json", "b.json")
    assert (code, err) == (0, "") and "wrote b.svg" in out and "above" in out
    assert Path("b.svg").read_text().count("<svg") == 1
    data = json.loads(Path("b.json").read_text())
    assert len(data["points"]) == 11 and set(data["paths"]) == {"straight", "aligned"}
    straight, aligned = data["paths"]["straight"], data["paths"]["aligned"]
    assert set(straight["metrics"]) == {"loss", "accuracy"}
    module, _ = network()
    names: dict[str, Any] = {}
    exec(NET, names)
    for path, states in ((straight, (a, b)), (aligned, (a, None))):
        for at, state in zip((0, -1), states, strict=True):
            if state is not None:
                module.load_state_dict(state)
                with torch.no_grad():
                    expected = float(names["loss"](module))
                assert path["metrics"]["loss"][at] == pytest.approx(expected, rel=1e-5)
    ends = [straight["metrics"]["loss"][-1], aligned["metrics"]["loss"][-1]]
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)  # the same function
    code, out, _ = run(
        *words[:-1], "py:net.py:loss", "--points", "3", "--refresh", "py:net.py:batches"
    )
    assert code == 0 and "straight" in out and "aligned" in out
    code, _, err = run(*words[:-1], "py:net.py:wrong")
    assert code == 2 and "one number" in err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "nothing is asked for"),
        (("--t", "0.5"), "nothing is asked for"),
        (("--out", "x.safetensors"), "--t 0.5 for one point"),
        (("--out", "x.safetensors", "--t", "0.5", "--points", "3"), "--t 0.5 for one point"),
        (("--out", "x.safetensors", "--points", "3"), "is no folder"),
        (("--out", "x", "--points", "1"), "two points or more"),
        (("--out", "no/x", "--points", "3"), "no folder no"),
        (("--out", "x", "--points", "3", "--plot", "x.svg"), "no loss"),
        (("--loss", "py:net.py:loss", "--plot", "x.txt"), "names no format"),
        (("--loss", "net.py:loss"), "named by py:"),
        (("--loss", "py:net.py:los"), "did you mean 'loss'"),
    ],
)
def test_interpolate_says_what_it_needs(
    run: Runner, pair: tuple[State, State], words: tuple[str, ...], text: str
) -> None:
    code, _, err = run("interpolate", *AB, *BUILD, *words)
    assert code == 2 and text in err
    assert not Path("x").exists() and not Path("x.safetensors").exists()
