"""`wspace hyper`, and `wspace fit` on the configurations of hypernetworks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

import wspace
from wspace.cli import main
from wspace.errors import CheckpointError, HyperError
from wspace.hyper import HyperNetwork
from wspace.lit.cli import names_data
from wspace.lit.hyper.loading import generate, hypernetwork_of, load_hyper, tasks
from wspace.testing import assert_close, assert_same

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs" / "hyper").glob("*.yaml"))
NET = """
import torch
from torch import nn

def build():
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(54, 4))
    return net, (torch.randn(2, 1, 5, 5),)
"""


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ran]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)

    def ran(*words: str) -> Ran:
        code = main(words)
        out, err = capfd.readouterr()
        return Ran(code, out, err)

    return ran


def test_show_lists_every_tensor(run: Callable[..., Ran]) -> None:
    code, out, _ = run("hyper", "show", "py:net.py:build", "--select", "*.weight", "--share", "3.*")
    assert code == 0
    assert "generated  3 tensors, 276 entries" in out
    lines = {line.split()[0]: line.split()[-1] for line in out.splitlines() if "." in line[:3]}
    assert lines["0.weight"] == lines["1.weight"] == lines["3.weight"] == "generated"
    assert lines["3.bias"] == "shared"
    assert lines["0.bias"] == lines["1.bias"] == lines["1.running_mean"] == "untouched"


def test_show_as_json_and_what_it_refuses(run: Callable[..., Ran]) -> None:
    code, out, _ = run("hyper", "show", "py:net.py:build", "--select", "type:Conv2d", "--json", "-")
    found = json.loads(out)
    assert code == 0 and found["generated"] == {"0.weight": 54, "0.bias": 6}
    code, _, err = run("hyper", "show", "py:net.py:build", "--select", "type:LSTM")
    assert code == 2 and "select='type:LSTM' chooses no parameter" in err


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_configurations_are_whole(file: Path, run: Callable[..., Ran]) -> None:
    code, out, err = run("fit", "--config", str(file), "--print_config")
    assert code == 0, err
    found = yaml.safe_load(out)
    kind = found["model"]["class_path"].rpartition(".")[2]
    assert kind in tasks()
    assert names_data(["fit", "--config", str(file)])


def test_unknown_options_are_refused(run: Callable[..., Ran]) -> None:
    file = str(ROOT / "configs" / "hyper" / "static_digits.yaml")
    code, _, err = run("fit", "--config", file, "--model.methud", "plain")
    assert code == 2 and "methud" in err


FAST = (
    *("--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1"),
    *("--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1"),
    *("--trainer.enable_progress_bar", "false"),
)


def trained(run: Callable[..., Ran], name: str, *words: str) -> Path:
    code, _, err = run("fit", "--config", str(ROOT / f"configs/hyper/{name}.yaml"), *FAST, *words)
    assert code == 0, err
    return Path(f"runs/{name}/version_0/checkpoints/last.safetensors")


def test_static_weights_are_written_and_fit_the_target(run: Callable[..., Ran]) -> None:
    ckpt = trained(run, "static_digits")
    code, out, err = run("hyper", "generate", str(ckpt), "--out", "net.safetensors")
    assert code == 0 and "wrote net.safetensors" in out, err
    task = load_hyper(ckpt)
    hyper = hypernetwork_of(task)
    state = wspace.load_checkpoint("net.safetensors")
    assert_same(dict(state), hyper.cache())
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert_close(torch.func.functional_call(hyper.target, dict(state), (x,)), task(x))
    code, _, err = run("hyper", "generate", str(ckpt), "--cond", "1", "--out", "other.safetensors")
    assert code == 2 and "there is no condition" in err and not Path("other.safetensors").exists()
    code, _, err = run("hyper", "generate", str(ckpt), "--out", str(ckpt))
    assert code == 2 and "would be written over" in err
    code, _, err = run("predict", "--config", str(ROOT / "configs/hyper/static_digits.yaml"))
    assert code == 2 and "says nothing of networks" in err


def test_weights_of_a_task(run: Callable[..., Ran]) -> None:
    ckpt = trained(run, "continual_digits")
    for cond in ("0", "4"):
        code, _, err = run(
            "hyper", "generate", str(ckpt), "--cond", cond, "--out", f"{cond}.safetensors"
        )
        assert code == 0, err
    first, last = (dict(wspace.load_checkpoint(f"{c}.safetensors")) for c in ("0", "4"))
    assert first.keys() == last.keys()
    assert any(not torch.equal(first[n], last[n]) for n in first)
    code, _, err = run("hyper", "generate", str(ckpt), "--cond", "5", "--out", "5.safetensors")
    assert code == 2 and "a number from 0 to 4" in err
    code, _, err = run("hyper", "generate", str(ckpt), "--out", "5.safetensors")
    assert code == 2 and "--cond N chooses" in err


def test_files_that_are_no_hypernetworks(run: Callable[..., Ran], tmp_path: Path) -> None:
    wspace.save_checkpoint({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors is no trained metanet"):
        load_hyper(tmp_path / "x.safetensors")


def test_tasks_without_a_target_say_so() -> None:
    task = tasks()["FewShot"](layer="srwm")
    assert not any(isinstance(m, HyperNetwork) for m in task.modules())
    with pytest.raises(HyperError, match="FewShot has 0 hypernetworks"):
        generate(task)


def test_own_targets_are_trusted_by_the_reader_alone(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "ownnets.py").write_text(
        "from torch import nn\n"
        "def build() -> nn.Module:\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = "--model.init_args."
    options = {
        "target": "ownnets:build", "target_options": "{}", "trust": "[ownnets]",
        "head": "ChunkedHead", "head_options": "{chunk: 64}", "select": "['*.weight']",
    }  # fmt: skip
    words = [word for key, value in options.items() for word in (own + key, value)]
    ckpt = trained(run, "static_digits", *words)
    code, _, err = run("hyper", "generate", str(ckpt), "--out", "n.safetensors")
    assert code == 2 and "'ownnets:build' is not imported" in err
    assert not Path("n.safetensors").exists()
    code, _, err = run(
        "hyper", "generate", str(ckpt), "--trust", "ownnets", "--out", "n.safetensors"
    )
    assert code == 0, err
    assert "1.weight" in wspace.load_checkpoint("n.safetensors")


def test_a_model_without_data_is_told_what_is_missing(run: Callable[..., Ran]) -> None:
    code, _, err = run("fit", "--model", "wspace.lit.hyper.classify.HyperClassifier")
    assert code == 2 and "name the class of its data" in err


def test_predict_writes_all_parameters(run: Callable[..., Ran]) -> None:
    from wspace.hyper.graph import GraphHyperNetwork, save_ghn

    save_ghn(GraphHyperNetwork(16, 1, 2, channels=8, hidden=16), "g.safetensors")
    words = (
        "hyper",
        "predict",
        "py:net.py:build",
        "--ghn",
        "g.safetensors",
        "--out",
        "p.safetensors",
    )
    code, _, err = run(*words)
    assert code == 2 and "running statistics of BatchNorm are not predicted" in err
    code, out, err = run(*words, "--batchnorm", "reset")
    assert code == 0 and "292 of 292 entries predicted" in out, err
    state = wspace.load_checkpoint("p.safetensors")
    assert state["0.weight"].shape == (6, 1, 3, 3) and state["1.running_mean"].abs().max() == 0
    code, _, err = run(
        "hyper", "predict", "py:net.py:build", "--ghn", "none", "--out", "q.safetensors"
    )
    assert code == 2 and "'none' is not a graph hypernetwork" in err
