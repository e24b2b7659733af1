"""`wspace prune`: what it refuses, writes and says, and that what it wrote is read again."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

import wspace
from wspace.cli import main
from wspace.prune import load, prunable, prune
from wspace.reference import resolve

NET = """
import torch
from torch import nn

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
        self.norm, self.head = nn.LayerNorm(5), nn.Linear(5, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.norm(x + self.back(torch.relu(self.mlp(x)))))

def tied():
    return Tied(), (torch.randint(11, (2, 3)),)

def first(module, space):
    return {g.name: torch.arange(float(g.size)) for g in space.groups.values()}
"""
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 12,
    "n_layer": 1,
    "n_head": 3,
    "n_positions": 16,
    "vocab_size": 20,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
prune_command = importlib.import_module("wspace.cli.prune")


class Ran(NamedTuple):
    """An exit code with what was printed."""

    code: int
    out: str
    err: str


Runner = Callable[..., Ran]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runner:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET, encoding="utf-8")
    Path("config.json").write_text(json.dumps(GPT2), encoding="utf-8")

    def runner(*words: str) -> Ran:
        code = main(["prune", *words])
        return Ran(code, *capsys.readouterr())

    return runner


def data_of(run: Runner, *words: str) -> dict[str, Any]:
    code, out, err = run(*words, "--json", "-")
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize("ref", ["py:net.py:build", "py:net.py:tied", "hf:config.json"])
def test_a_file_is_what_prune_gives_and_is_loaded_again(run: Runner, ref: str) -> None:
    found = data_of(run, ref, "small.safetensors", "--amount", "0.4")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # as the command builds it
        net = resolve(ref)
    space = wspace.trace(net.module, net.args, net.kwargs)
    small = prune(net.module, space, amount=0.4, rebuild="copy")
    again = load(net.module, space, "small.safetensors")
    assert again.state_dict().keys() == small.state_dict().keys()
    assert all(torch.equal(x, small.state_dict()[n]) for n, x in again.state_dict().items())
    assert found["parameters"]["after"] == sum(x.numel() for x in small.parameters())
    assert found["parameters"]["before"] == sum(x.numel() for x in net.module.parameters())
    counts = wspace.trace(small, net.args, net.kwargs).groups
    if ref == "py:net.py:build":
        assert [r["after"] for r in found["groups"]] == [g.size for g in counts.values()]
    total = sum(g.size for g in prunable(space).values())
    assert sum(r["after"] for r in found["groups"]) < total
    torch.testing.assert_close(
        _tensor(again(*net.args, **net.kwargs)), _tensor(small(*net.args, **net.kwargs))
    )


def _tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def test_a_checkpoint_with_its_code_keeps_its_weights(run: Runner) -> None:
    net, _ = resolve("py:net.py:build").module, None
    save_file(net.state_dict(), "big.safetensors")
    code, out, err = run("big.safetensors", "small.safetensors", "--model", "py:net.py:build")
    assert code == 0, err
    assert "wrote small.safetensors" in out and "363" in out
    small = wspace.load_checkpoint("small.safetensors")
    rows = [
        r for r in net.state_dict()["0.weight"] if any(torch.equal(r, q) for q in small["0.weight"])
    ]
    assert len(rows) == len(small["0.weight"]) == 3
    before = wspace.load_checkpoint("big.safetensors")
    assert all(torch.equal(x, net.state_dict()[n]) for n, x in before.items())


def test_a_folder_needs_no_wspace(run: Runner) -> None:
    import transformers

    code, out, err = run("hf:config.json", "small", "--importance", "random", "--amount", "0.25")
    assert code == 0, err
    assert "from a smaller config" in out and "n_embd sizes" in out and "pinned" in out
    small = transformers.AutoModelForCausalLM.from_pretrained("small")
    assert small.config.n_inner == 36 and small.config.n_embd == 12
    assert small.transformer.h[0].mlp.c_fc.weight.shape == (12, 36)
    assert {p.name for p in Path().iterdir()} == {"net.py", "config.json", "small"}


def test_a_folder_takes_its_tokenizer_along(run: Runner) -> None:
    assert run("hf:config.json", "small").code == 0
    Path("small/tokenizer.json").write_text("{}", encoding="utf-8")
    assert run("hf:small", "smaller").code == 0
    assert Path("smaller/tokenizer.json").read_text(encoding="utf-8") == "{}"
    assert json.loads(Path("smaller/config.json").read_text(encoding="utf-8"))["n_inner"] == 12


def test_a_dry_run_writes_nothing_and_says_the_same(run: Runner) -> None:
    dry = data_of(run, "py:net.py:build", "--dry-run", "--of", "flops", "--amount", "0.3")
    assert not list(Path().glob("*.safetensors")) and dry["out"] is None
    wet = data_of(run, "py:net.py:build", "a.safetensors", "--of", "flops", "--amount", "0.3")
    same = ("groups", "parameters", "macs")
    assert [dry[k] for k in same] == [wet[k] for k in same]
    assert wet["macs"]["after"] <= 0.7 * wet["macs"]["before"]


def test_counted_groups_are_said(run: Runner) -> None:
    code, out, _ = run("py:net.py:tied", "a.safetensors")
    assert code == 0 and "counted by" in out and "layer_norm" in out
    code, out, _ = run("py:net.py:build", "b.safetensors")
    assert code == 0 and "no operator counts them" in out and "counted by" not in out


def test_options_reach_the_selection(run: Runner) -> None:
    rows = data_of(run, "py:net.py:build", "a.safetensors", "--ratio", "h1=0.5")["groups"]
    assert [(r["before"], r["after"]) for r in rows] == [(6, 3), (7, 7)]
    rows = data_of(
        run, "py:net.py:build", "b.safetensors", "--ignore", "0.weight", "--amount", "0.6"
    )["groups"]
    assert [r["after"] for r in rows] == [6, 3]
    rows = data_of(run, "py:net.py:build", "c.safetensors", "--round-to", "2", "--scope", "group")[
        "groups"
    ]
    assert all(r["after"] % 2 == 0 for r in rows)
    own = ("--importance", "py:net.py:first", "--ratio", "h1=0.5")
    assert run("py:net.py:build", "d.safetensors", *own).code == 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        big = resolve("py:net.py:build").module.state_dict()["0.weight"]
    assert torch.equal(wspace.load_checkpoint("d.safetensors")["0.weight"], big[3:])


def test_nothing_to_do_is_said(run: Runner) -> None:
    code, out, _ = run("py:net.py:build", "a.safetensors", "--amount", "0.01")
    assert code == 0 and "nothing goes" in out and Path("a.safetensors").exists()


WRONG = {
    "nowhere": (["py:net.py:build"], "where to"),
    "no config": (["py:net.py:build", "folder"], "no config"),
    "suffix": (["py:net.py:build", "a.pt"], "does not end in .safetensors"),
    "amount": (["py:net.py:build", "a.safetensors", "--amount", "1.5"], "amount=1.5"),
    "ratio": (["py:net.py:build", "a.safetensors", "--ratio", "h1"], "'h1' is no ratio"),
    "glob": (["py:net.py:build", "a.safetensors", "--ignore", "zz"], "'zz' in `ignore`"),
    "importance": (["py:net.py:build", "a.safetensors", "--importance", "x"], "no such importance"),
    "budget": (
        ["py:net.py:build", "a.safetensors", "--amount", "0.99", "--of", "parameters"],
        "cannot be",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_and_nothing_written(run: Runner, name: str) -> None:
    words, said = WRONG[name]
    before = {p.name for p in Path().iterdir()}
    code, _, err = run(*words)
    assert code == 2 and said in err, err
    assert {p.name for p in Path().iterdir()} == before


def test_files_are_kept_and_inputs_never_touched(run: Runner) -> None:
    Path("a.safetensors").write_text("mine", encoding="utf-8")
    assert "is there already" in run("py:net.py:build", "a.safetensors").err
    assert Path("a.safetensors").read_text(encoding="utf-8") == "mine"
    assert run("py:net.py:build", "a.safetensors", "--force").code == 0
    code, _, err = run("a.safetensors", "a.safetensors", "--model", "py:net.py:build", "--force")
    assert code == 2 and "one of the checkpoints" in err


def test_nothing_half_written(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def fails(self: Any, path: Path) -> None:
        Path(path).mkdir()
        (Path(path) / "config.json").write_text("{", encoding="utf-8")
        raise OSError("disk full")

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "save_pretrained", fails)
    code, _, err = run("hf:config.json", "small")
    assert code == 2 and "disk full" in err
    assert {p.name for p in Path().iterdir()} == {"net.py", "config.json"}
