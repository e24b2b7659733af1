"""Every command on real, small things: what it says, writes and returns."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wspace.cli import main
from wspace.cli.headers import is_graph
from wspace.cli.screen import count, fold, size
from wspace.graph import load_graph

NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4)
    )
    return net, (torch.randn(2, 1, 5, 5),)

def spoilt():
    net, inputs = build()
    with torch.no_grad():
        net[0].weight[0, 0, 0, 0] = float("nan")
        net[0].weight[1, 0, 0, 0] = float("inf")
    return net, inputs

class Sorted(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.last(torch.cumsum(self.first(x), -1))

def ordered():
    return Sorted(), (torch.randn(2, 3),)

def deep():
    return nn.Sequential(*(nn.Linear(3, 3) for _ in range(40))), (torch.randn(2, 3),)

def bare():
    return Sorted()

def useless():
    class Ignores(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)
        def forward(self, x):
            return self.b(self.a(x)) * 0
    return Ignores(), (torch.randn(2, 3),)
"""
GPT2 = {
    **{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 20},
    **{"n_embd": 12, "n_layer": 1, "n_head": 3, "n_positions": 16},
    **{"bos_token_id": 1, "eos_token_id": 2},
}


class Run(NamedTuple):
    code: int
    out: str
    err: str


Runner = Callable[..., Run]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runner:
    """Runs a command in a folder with `net.py` and `config.json`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    Path("net.py").write_text(NET)
    Path("config.json").write_text(json.dumps(GPT2))

    def go(*words: str) -> Run:
        code = main(words)
        shown = capsys.readouterr()
        return Run(code, shown.out, shown.err)

    return go


def mlp_state() -> dict[str, Tensor]:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    return {name: tensor.detach() for name, tensor in net.state_dict().items()}


def cells(text: str, first: str) -> list[str]:
    """Words of the line of a table that begins with this word."""
    (line,) = (line for line in text.splitlines() if line.split()[:1] == [first])
    return line.split()


# --- inspect ----------------------------------------------------------------


def test_inspect_shows_groups_and_params(run: Runner) -> None:
    code, out, err = run("inspect", "py:net.py:build")
    assert code == 0 and err == ""
    assert cells(out, "h1")[:3] == ["h1", "6", "permutation,"]
    assert cells(out, "0.weight")[:5] == ["0.weight", "(h1,", "1,", "3!,", "3!)"]
    assert "(4!, h1*9!)" in out and "statistic" in out
    assert "292 in 6 tensors, float32" in out and "98.63%" in out
    assert "non-finite" not in out


@pytest.mark.parametrize("width", [80, 200])
def test_inspect_fits_the_width(run: Runner, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    out = run("inspect", "hf:config.json").out
    assert max(map(len, out.splitlines())) <= width
    assert "\x1b" not in out
    assert "transformer.h.0.attn.c_attn.weight" in out and "= lm_head.weight" in out
    assert "h1*" in out or "h2*" in out
    assert ("elements   kind" in out or "elements" in out) and "each h" in out


def test_inspect_colours_a_terminal_unless_told_not_to(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[" in run("inspect", "py:net.py:build").out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in run("inspect", "py:net.py:build").out


def test_inspect_reports_what_is_not_finite(run: Runner) -> None:
    out = run("inspect", "py:net.py:spoilt").out
    assert "2 elements NaN or infinite: 0.weight (2)" in out


def test_inspect_groups_lists_what_each_indexes(run: Runner) -> None:
    out = run("inspect", "py:net.py:build", "--groups").out
    assert "indexes" in out and "4.weight(4!, h1*9!)" in out and "4.bias" not in out


def test_long_tables_lose_their_middle(run: Runner) -> None:
    out = run("inspect", "py:net.py:deep").out
    assert "more (--all)" in out and "20.weight" not in out
    assert "20.weight" in run("inspect", "py:net.py:deep", "--all").out


def test_inspect_names_what_froze(run: Runner) -> None:
    """An operator that fixes the axis it runs along leaves no group; the space is still shown."""
    out = run("inspect", "py:net.py:ordered").out
    assert "0; they move 0 of 4 tensors" in out and "first.weight" in out


def test_inspect_meta_allocates_nothing(run: Runner) -> None:
    Path("large.json").write_text(json.dumps({**GPT2, "n_embd": 12_000, "vocab_size": 50_000}))
    out = run("inspect", "hf:large.json", "--meta").out
    assert "2.3 G in" in out and "coverage" in out


def test_inspect_writes_json(run: Runner) -> None:
    from wspace import WeightSpace

    assert run("inspect", "py:net.py:spoilt", "--json", "space.json").code == 0
    data = json.loads(Path("space.json").read_text())
    assert data["nonfinite"] == {"0.weight": 2} and data["elements"] == 292
    (group,) = data["groups"]
    assert (group["name"], group["size"], group["tensors"]) == ("h1", 6, 5)
    space = WeightSpace.from_json(json.dumps(data["space"]))
    assert str(space["4.weight"]) == "4.weight(4!, h1*9!)"


def test_inspect_json_to_stdout_is_only_json(run: Runner) -> None:
    code, out, err = run("inspect", "py:net.py:build", "--json", "-", "--plot", "net.png")
    assert code == 0 and json.loads(out)["coverage"] > 0.9
    assert "wrote net.png" in err


@pytest.mark.parametrize("suffix", ["png", "svg", "html"])
def test_inspect_draws(run: Runner, suffix: str) -> None:
    assert f"wrote net.{suffix}" in run("inspect", "py:net.py:build", "--plot", f"net.{suffix}").out
    assert Path(f"net.{suffix}").stat().st_size > 2000


def test_inspect_inputs(run: Runner) -> None:
    assert run("inspect", "py:net.py:ordered", "--inputs", "7x3").code == 0
    for bad in ("7y3", "0x3", "bool:3"):
        code, _, err = run("inspect", "py:net.py:ordered", "--inputs", bad)
        assert code == 2 and repr(bad) in err
    code, _, err = run("inspect", "py:net.py:ordered", "--inputs", "7x4")
    assert code == 2 and "trace" in err


def test_inputs_for_a_factory_without_any(run: Runner) -> None:
    assert run("inspect", "py:net.py:bare", "--inputs", "7x3").code == 0
    code, _, err = run("inspect", "py:net.py:bare")
    assert code == 2 and "without example inputs" in err and "--inputs" in err
    state = {"first.weight": torch.randn(5, 3), "first.bias": torch.randn(5)}
    state |= {"last.weight": torch.randn(2, 5), "last.bias": torch.randn(2)}
    torch.save(state, "sorted.pt")
    words = ("inspect", "sorted.pt", "--model", "py:net.py:bare")
    assert run(*words, "--inputs", "7x3").code == 0 and run(*words).code == 2


# --- inspect: checkpoints ---------------------------------------------------


def test_inspect_reads_a_plain_checkpoint(run: Runner) -> None:
    save_file(mlp_state(), "mlp.safetensors", {"format": "pt", "by": "me"})
    out = run("inspect", "mlp.safetensors").out
    assert cells(out, "h1")[:2] == ["h1", "6"] and "by: me" in out
    assert "read off the names and shapes" in out


def test_inspect_lists_tensors_where_no_code_is_known(run: Runner) -> None:
    x = torch.randn(3, 4)
    x[0, 0] = torch.nan
    state = {"alpha": x, "beta": torch.arange(5), "gamma": torch.zeros(2, dtype=torch.bfloat16)}
    torch.save({"state": {**state, "again": x}, "step": 3}, "odd.pt")
    code, out, _ = run("inspect", "odd.pt")
    assert code == 0
    for text in ("3 × 4", "bfloat16", "int64", "= again", "1 non-finite", "--model", "state"):
        assert text in out
    data = json.loads(run("inspect", "odd.pt", "--json", "-").out)
    assert data["space"] is None and {t["name"] for t in data["tensors"]} == {*state, "again"}
    code, _, err = run("inspect", "odd.pt", "--plot", "odd.png")
    assert code == 2 and "without code" in err and not Path("odd.png").exists()


def test_inspect_fits_a_checkpoint_to_its_code(run: Runner) -> None:
    run("convert", "py:net.py:build", "net.g.safetensors")
    state = dict(load_file("net.g.safetensors"))
    state["0.weight"][0, 0, 0, 0] = torch.nan
    save_file(state, "weights.safetensors")
    out = run("inspect", "weights.safetensors", "--model", "py:net.py:build").out
    assert "weights.safetensors as py:net.py:build" in out and "1 element NaN" in out
    save_file({"0.weight": state["0.weight"]}, "few.safetensors")
    code, _, err = run("inspect", "few.safetensors", "--model", "py:net.py:build")
    assert code == 2 and "missing 4.bias" in err and "missing 0.bias" in err


def test_several_states_need_a_key(run: Runner) -> None:
    torch.save({"net": mlp_state(), "average": mlp_state()}, "two.pt")
    code, _, err = run("inspect", "two.pt")
    assert code == 2 and "'average'" in err
    assert run("inspect", "two.pt", "--key", "net").code == 0


# --- verify -----------------------------------------------------------------


@pytest.mark.parametrize("ref", ["py:net.py:build", "hf:config.json", "mlp.safetensors"])
def test_verify_proves(run: Runner, ref: str) -> None:
    save_file(mlp_state(), "mlp.safetensors")
    code, out, err = run("verify", ref, "--json", "proof.json", "--seed", "3")
    assert code == 0 and err == ""
    assert f"PROVED  {ref}" in out and "all at once" in out
    data = json.loads(Path("proof.json").read_text())
    assert data["ok"] and data["max_error"] < 1e-10 < data["control_error"]
    assert set(data["moved"]) <= set(data["errors"]) and data["seed"] == 3


def test_verify_without_groups_says_so(run: Runner) -> None:
    code, out, _ = run("verify", "py:net.py:ordered")
    assert code == 0 and "nothing may be moved" in out


def test_verify_says_when_nothing_is_proved(run: Runner) -> None:
    code, out, err = run("verify", "py:net.py:useless", "--json", "proof.json")
    assert code == 1 and "NOT PROVED" in out and "negative controls" in out
    assert "Traceback" not in out + err
    assert json.loads(Path("proof.json").read_text())["ok"] is False


def test_verify_refuses_nan_and_missing_code(run: Runner) -> None:
    code, _, err = run("verify", "py:net.py:spoilt")
    assert code == 2 and "2 in 0.weight" in err
    torch.save({"x": torch.ones(3)}, "x.pt")
    code, _, err = run("verify", "x.pt")
    assert code == 2 and "--model" in err


# --- convert ----------------------------------------------------------------


def test_convert_there_and_back_is_the_same_file(run: Runner) -> None:
    save_file(mlp_state(), "mlp.safetensors", {"format": "pt", "note": "zürich"})
    code, out, _ = run("convert", "mlp.safetensors", "mlp.g.safetensors")
    assert code == 0 and "bit for bit" in out and "ParameterGraph(" in out
    assert is_graph(Path("mlp.g.safetensors")) and not is_graph(Path("mlp.safetensors"))
    assert len(load_graph("mlp.g.safetensors").space.groups) == 1
    assert run("convert", "mlp.g.safetensors", "back.safetensors").code == 0
    assert contents("back.safetensors") == contents("mlp.safetensors")


def contents(path: str) -> tuple[dict[str, object], bytes]:
    """Header and tensor bytes of a safetensors file, whose metadata stands in no fixed order."""
    data = Path(path).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def test_convert_keeps_what_lies_beside_the_weights(run: Runner) -> None:
    state = mlp_state()
    odd = {"model": state, "epoch": 3, "names": ["a"], "pair": (1, 2), "adam": {"x": torch.ones(2)}}
    torch.save(odd, "run.pt")
    out = run("convert", "run.pt", "run.g.safetensors", "--key", "model").out
    assert "not kept: pair" in out
    run("convert", "run.g.safetensors", "back.pt")
    back = torch.load("back.pt", weights_only=True)
    assert back["epoch"] == 3 and back["names"] == ["a"] and "adam" not in back
    assert all(torch.equal(back["model"][name], state[name]) for name in state)
    run("convert", "run.g.safetensors", "other.safetensors")
    assert set(load_file("other.safetensors")) == set(state)


def test_convert_restores_a_sharded_folder(run: Runner, tmp_path: Path) -> None:
    from transformers import AutoConfig, GPT2LMHeadModel

    config = AutoConfig.from_pretrained("config.json")
    GPT2LMHeadModel(config).save_pretrained("folder", max_shard_size="6KB")
    assert len(list(Path("folder").glob("*.safetensors"))) > 1
    assert run("convert", "folder", "gpt.g.safetensors").code == 0
    code, out, err = run("convert", "gpt.g.safetensors", "back")
    assert code == 0, err
    names = {item.name for item in Path("folder").iterdir()}
    assert names == {item.name for item in Path("back").iterdir()} and "config.json" in names
    for name in names:
        assert Path("back", name).read_bytes() == Path("folder", name).read_bytes(), name


def test_convert_to_pyg(run: Runner) -> None:
    from torch_geometric.data import Data

    code, out, _ = run("convert", "py:net.py:build", "net.pt", "--format", "pyg")
    assert code == 0 and "Data.from_dict" in out
    data = Data.from_dict(torch.load("net.pt", weights_only=True))
    data.validate()
    assert data.num_edges and data.num_nodes == 12
    run("convert", "py:net.py:build", "net.g.safetensors")
    run("convert", "net.g.safetensors", "again.pt", "--format", "pyg")
    again = Data.from_dict(torch.load("again.pt", weights_only=True))
    assert torch.equal(again.edge_index, data.edge_index)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("nothing.safetensors", "x.safetensors"), "there is no nothing.safetensors"),
        (("mlp.safetensors", "far/x.safetensors"), "no folder far"),
        (("mlp.safetensors", "mlp.safetensors"), "is the source"),
        (("mlp.safetensors", "x.pt"), "does not end in .safetensors"),
        (("mlp.safetensors", "x.bin", "--format", "pyg"), "does not end in .pt"),
        (("odd.pt", "x.safetensors"), "--model"),
        (("cut.safetensors", "x.safetensors"), "cut.safetensors"),
        (("cut.g.safetensors", "x.safetensors"), "cut.g.safetensors"),
        (("mlp.g.safetensors", "x.txt"), "x.txt"),
    ],
)
def test_failed_conversions_leave_nothing(run: Runner, words: tuple[str, ...], text: str) -> None:
    save_file(mlp_state(), "mlp.safetensors")
    torch.save({"x": torch.ones(3)}, "odd.pt")
    assert run("convert", "mlp.safetensors", "mlp.g.safetensors").code == 0
    for name in ("mlp", "mlp.g"):
        data = Path(f"{name}.safetensors").read_bytes()
        Path(f"{name.replace('mlp', 'cut')}.safetensors").write_bytes(data[:-20])
    before = {item.name: item.read_bytes() for item in Path().iterdir() if item.is_file()}
    code, _, err = run("convert", *words)
    assert code == 2 and text in err
    after = {item.name: item.read_bytes() for item in Path().iterdir() if item.is_file()}
    assert before == after


def test_a_damaged_layout_is_refused(run: Runner) -> None:
    from wspace.cli.convert import NOTE
    from wspace.cli.headers import add_notes

    save_file(mlp_state(), "mlp.safetensors")
    run("convert", "mlp.safetensors", "mlp.g.safetensors")
    for note in ("{", '{"layout": {}}', '{"layout": {"file": "../x"}, "files": {"../y": ""}}'):
        add_notes(Path("mlp.g.safetensors"), {NOTE: note})
        code, _, err = run("convert", "mlp.g.safetensors", "x.safetensors")
        assert code == 2 and "layout is damaged" in err and not Path("x.safetensors").exists()


# --- the rest ---------------------------------------------------------------


def test_trace_lists_operators(run: Runner) -> None:
    out = run("trace", "--ops").out
    assert {"addmm", "convolution", "native_layer_norm", "view"} <= set(out.split())


def test_whole_demo_after_the_small_one(tmp_path: Path) -> None:
    from wspace.demo.zoo import zoo_folder

    stages: list[Any] = [SimpleNamespace(folder=tmp_path, fast=fast) for fast in (True, False)]
    assert zoo_folder(stages[0]) != zoo_folder(stages[1])  # their recipes differ


def test_demo_writes_a_page(run: Runner) -> None:
    code, out, _ = run("demo", "--fast", "--out", "pages/demo")
    assert code == 0 and "wrote pages/demo/report.html" in out and "PROVED" not in out
    assert "control: 3.weight alone permuted" in out
    page = Path("pages/demo/report.html").read_text(encoding="utf-8")
    for text in ("test accuracy", "WeightSpace", "GPT-2", "data:image/svg+xml"):
        assert text in page
    assert is_graph(Path("pages/demo/digits.graph.safetensors"))


def test_version_and_help(run: Runner) -> None:
    code, out, _ = run("--version")
    assert code == 0 and out.startswith("wspace ")
    code, out, _ = run("--help")
    assert code == 0 and "inspect" in out and "hf:" in out
    assert run().code == 2


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("inspcet", "x"), "did you mean 'inspect'?"),
        (("inspect", "x", "--plto", "y"), "did you mean --plot?"),
        (("inspect",), "REF"),
        (("convert", "a", "b", "--format", "gml"), "graph"),
        (("inspect", "net.py:build"), "did you mean py:net.py:build?"),
        (("inspect", "confg.json"), "did you mean hf:confg.json?"),
        (("inspect", "hf:confg.json"), "did you mean 'config.json'?"),
        (("inspect", "py:net.py:biuld"), "build"),
        (("inspect", "py:net.py:build", "--model", "py:net.py:build"), "leave --model out"),
        (("inspect", "py:net.py:build", "--plot", "net.gif"), ".png"),
        (("inspect", "py:net.py:build", "--json", "far/net.json"), "far"),
    ],
)
def test_mistakes_are_explained(run: Runner, words: tuple[str, ...], text: str) -> None:
    code, _, err = run(*words)
    assert code == 2 and text in err and "Traceback" not in err


def test_debug_shows_where_it_failed(run: Runner) -> None:
    from wspace.errors import CheckpointError

    with pytest.raises(CheckpointError, match=r"nothing\.pt"):
        run("inspect", "nothing.pt", "--debug")


def test_a_closed_pipe_is_no_error(run: Runner) -> None:
    command = f"{sys.executable} -m wspace.cli trace --ops | head -n 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(Path(__file__).parent.parent), "PATH": "/usr/bin:/bin"},
    )
    assert "Traceback" not in done.stderr and "Error" not in done.stderr


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (99_999, "99,999"), (1_234_567, "1.2 M"), (70 * 10**9, "70.0 G")],
)
def test_count(number: int, text: str) -> None:
    assert count(number) == text


def test_size_and_fold() -> None:
    assert (size(12), size(1500), size(2_500_000)) == ("12 bytes", "1.5 kB", "2.5 MB")
    assert fold("a.bb.ccc", 5) == "a.bb.\n  ccc" and fold("abcdef", 3) == "abcdef"
