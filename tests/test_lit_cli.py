"""`wspace fit|validate|test|predict` on small zoos: what is written, said and refused."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_lit import SMALL, Toys, architecture_of
from torch import nn

import wspace
from wspace.cli import main
from wspace.cli.train import is_lightning
from wspace.lit import Nowcasting, ZooDataModule, build_metanet, load_task, predict_zoo
from wspace.lit.predict import TASKS
from wspace.zoo import build

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def config(folder: Path, zoo: str, task: str = "Classification", **trainer: Any) -> list[str]:
    """Options of a run on a zoo of the folder."""
    content = {
        "model": {"class_path": task, "init_args": {"metanet": "GraphMetanet"}},
        "data": {"path": str(folder / zoo), "batch_size": 16},
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": str(folder / "runs"),
            **trainer,
        },
    }
    content["model"]["init_args"]["options"] = SMALL["GraphMetanet"]
    file = folder / f"{task}.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return ["--config", str(file)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Zoos, and a classification of two architectures trained for two epochs."""
    root = tmp_path_factory.mktemp("train")
    build(Toys(96, (4, 5), seed=1), root / "two")
    build(Toys(24, (6,), seed=2, kind="siren"), root / "image")
    assert main(["fit", *config(root, "two")]) == 0
    return root


def run_of(folder: Path, name: str = "Classification", version: int = 0) -> Path:
    return folder / "runs" / name / f"version_{version}"


def last(folder: Path, *place: Any) -> Path:
    return run_of(folder, *place) / "checkpoints" / "last.safetensors"


def test_run_is_written(folder: Path) -> None:
    run = run_of(folder)
    rows = list(csv.DictReader((run / "metrics.csv").read_text("utf-8").splitlines()))
    assert {"train/loss", "val/loss", "val/accuracy", "epoch", "step"} == {*rows[0]}
    resolved = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert resolved["model"]["init_args"]["optimization"]["lr"] == 1e-3
    assert resolved["seed_everything"] == 0
    task = load_task(last(folder))
    assert task.options == SMALL["GraphMetanet"] and task.out == 3


def test_resumed_run_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--trainer.max_epochs", "3", "--model.optimization.warmup", "0"]
    options = [*config(folder, "two"), *more, "--trainer.default_root_dir", str(folder / "other")]
    assert main(["fit", *options, "--ckpt_path", str(last(folder))]) == 0
    said = capsys.readouterr().out
    assert "epoch 2" in said and "epoch 0" not in said and "val/accuracy" in said
    assert str(folder / "other" / "Classification" / "version_0") in said


def test_saved_configuration_is_one(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = run_of(folder) / "config.yaml"
    options = ["--config", str(file), "--ckpt_path", str(last(folder))]
    root = ["--trainer.default_root_dir", str(folder / "again")]
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["test", *options, *root]) == 0
    assert "test/accuracy_low" in capsys.readouterr().out
    assert main(["validate", *options, *root]) == 0
    assert main(["predict", *options, *root]) == 0
    assert [item.name for item in (folder / "again").iterdir()] == ["Classification"]
    (written,) = (folder / "again").rglob("predictions.csv")
    rows = list(csv.DictReader(written.read_text("utf-8").splitlines()))
    expected = predict_zoo(load_task(last(folder)), wspace.zoo.open(folder / "two"))
    assert [int(row["label"]) for row in rows] == expected["label"].tolist()
    assert [int(row["row"]) for row in rows] == list(range(96))
    some = ["--data.where", "{family: w5}", "--data.split_name", "w5"]
    assert main(["predict", *options, *some, "--trainer.default_root_dir", str(folder / "w5")]) == 0
    (written,) = (folder / "w5").rglob("predictions.csv")
    rows = list(csv.DictReader(written.read_text("utf-8").splitlines()))
    assert [int(row["row"]) for row in rows] == [*range(24, 48), *range(72, 96)]  # of the zoo
    assert [int(row["label"]) for row in rows] == [
        int(expected["label"][int(row["row"])]) for row in rows
    ]


def test_a_resumption_does_not_begin_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `pretrained` gave is in the checkpoint; the file may be gone."""
    first = tmp_path / "first.safetensors"
    first.write_bytes(last(folder).read_bytes())
    options = [*config(folder, "two", "Prediction"), "--model.pretrained", str(first)]
    options += ["--trainer.default_root_dir", str(tmp_path)]
    assert main(["fit", *options, "--trainer.max_epochs", "1"]) == 0
    assert "pretrained: " in capsys.readouterr().out
    first.unlink()
    path = tmp_path / "Prediction" / "version_0" / "checkpoints" / "last.safetensors"
    more = ["--trainer.max_epochs", "2", "--ckpt_path", str(path)]
    assert main(["fit", *options, *more]) == 0
    said = capsys.readouterr().out
    assert "epoch 1" in said and "pretrained" not in said
    assert main(["fit", *options]) == 2
    assert "pretrained: there is no file" in capsys.readouterr().err
    assert not (tmp_path / "Prediction" / "version_2").exists()  # it did not begin


def test_pretrained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*config(folder, "two", "Prediction"), "--model.pretrained", str(last(folder))]
    assert main(["fit", *options, "--trainer.max_epochs", "1"]) == 0
    said = capsys.readouterr().out
    assert f"of {last(folder)} (Classification); fresh: head." in said
    resolved = yaml.safe_load((run_of(folder, "Prediction") / "config.yaml").read_text("utf-8"))
    assert resolved["model"]["init_args"]["pretrained"] == str(last(folder))
    assert main(["fit", *config(folder, "two"), "--trainer.max_epochs", "0"]) == 0
    assert "pretrained" not in capsys.readouterr().out
    assert main(["fit", *options, "--model.options.channels", "9"]) == 2
    assert "has other options\n  expected channels = 9\n  got channels = 8" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data.batchsize", "3"], "did you mean data.batch_size"),
        (["--model.metanets", "StatNN"], "did you mean metanet?"),
        (["--model.options.chanels", "3"], "no option 'chanels'"),
        (["--model.target", "lable"], "no column 'lable'"),
        (["--data.path", "nowhere"], "nowhere"),
        (["--ckpt_path", "last"], "'last' names no file"),
        (["--trainer.max_epochs", "x"], "trainer.max_epochs"),
        (["--model", "Clasification"], "Clasification"),
        (["--trainer.accelerator", "abacus"], "abacus"),
    ],
)
def test_mistakes(
    words: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *config(folder, "two"), *words]) == 2
    assert said in capsys.readouterr().err


def test_unknown_key_of_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "bad.yaml"
    file.write_text("model: {class_path: Prediction}\ndata: {path: x, limits: 3}\n", "utf-8")
    assert main(["fit", "--config", str(file)]) == 2
    assert "did you mean data.limit?" in capsys.readouterr().err


# --- predictions on whatever there is ---------------------------------------------


def asked(folder: Path, *words: Any, place: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
    """Predictions as the JSON file holds them."""
    target = folder / "answer.json"
    given = ["predict", "--ckpt", last(folder, *place), *words, "--json", target]
    assert main([*map(str, given)]) == 0
    return json.loads(target.read_text(encoding="utf-8"))["predictions"]


def test_predict_networks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zoo = wspace.zoo.open(folder / "two")
    space, state = zoo[30]
    wspace.save_checkpoint(state, folder / "mine.safetensors")
    torch.save({"model": state}, folder / "mine.pt")
    wspace.save_graph(wspace.encode(space, state), folder / "mine.graph.safetensors")
    other = nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, 2))
    wspace.save_checkpoint(other.state_dict(), folder / "other.safetensors")
    (folder / "net.py").write_text(
        "import torch\nfrom torch import nn\n\ndef build():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), (torch.zeros(1, 1, 5, 5),)\n",
        encoding="utf-8",
    )
    names = ["mine.safetensors", "mine.pt", "mine.graph.safetensors", "other.safetensors"]
    rows = asked(folder, *(folder / n for n in names), f"py:{folder}/net.py:build")
    expected = predict_zoo(load_task(last(folder)), zoo)
    assert len(rows) == 5 and all(0 <= row["label"] < 3 for row in rows)
    for row in rows[:3]:
        assert row["label"] == int(expected["label"][30])
        assert row["probability"] == pytest.approx(float(expected["probability"][30]), abs=1e-6)
    shown = capsys.readouterr().out
    assert "probability" in shown and "mine.pt" in shown
    note = "read off the names and shapes of the tensors; --model names the real code"
    assert [row.get("note") for row in rows] == [None, None, None, note, None]
    assert f"other.safetensors: {note}" in shown and shown.count(note) == 1


def test_predict_zoo_beside_the_truth(folder: Path) -> None:
    rows = asked(folder, folder / "two")
    zoo = wspace.zoo.open(folder / "two")
    assert [row["label in zoo"] for row in rows] == zoo.table["label"].tolist()
    assert rows[0]["network"] == f"{folder / 'two'} {zoo.ids[0]}"


def test_predict_mistakes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: Any) -> str:
        capsys.readouterr()
        assert main([*map(str, words)]) == 2
        return capsys.readouterr().err

    ckpt = last(folder)
    mine, bad = folder / "odd.safetensors", folder / "nan.safetensors"
    wspace.save_checkpoint({"a": torch.zeros(2, 3, 4, 5, 6)}, mine)
    _, state = wspace.zoo.open(folder / "two")[0]
    wspace.save_checkpoint({**state, "0.bias": state["0.bias"] * torch.nan}, bad)
    assert "comes without code" in said("predict", "--ckpt", ckpt, mine)
    assert "NaN or infinite\n  got 4 in 0.bias" in said("predict", "--ckpt", ckpt, bad)
    assert "is no trained metanet" in said("predict", "--ckpt", mine, bad)
    assert "there is no" in said("predict", "--ckpt", ckpt, "nothing.pt")
    assert "--out is for editing" in said("predict", "--ckpt", ckpt, folder / "two" / ".." /
                                          "mine.safetensors", "--out", folder)  # fmt: skip
    assert "required: --ckpt" in said("predict", mine)


def test_edited_networks_are_written(folder: Path) -> None:
    options = [*config(folder, "image", "Editing"), "--model.side", "5"]
    assert main(["fit", *options]) == 0
    space, state = wspace.zoo.open(folder / "image")[3]
    wspace.save_checkpoint(state, folder / "digit.safetensors")
    (row,) = asked(folder, folder / "digit.safetensors", "--out", folder / "edited",
                   place=("Editing",))  # fmt: skip
    edited = wspace.load_checkpoint(row["written"])
    task = load_task(last(folder, "Editing"))
    with torch.no_grad():
        (expected,) = task(wspace.encode(space, {k: x[None] for k, x in state.items()}))
    module = architecture_of("siren", 6).module(device="cpu")
    module.load_state_dict(edited)
    assert {k: x.shape for k, x in edited.items()} == {k: x.shape for k, x in state.items()}
    for name, x in edited.items():
        torch.testing.assert_close(x, expected[name][0])
        assert not torch.equal(x, state[name])


def test_edited_networks_are_not_written_over(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not last(folder, "Editing").exists():
        assert main(["fit", *config(folder, "image", "Editing"), "--model.side", "5"]) == 0
    mine = folder / "mine" / "digit.safetensors"
    mine.parent.mkdir()
    wspace.save_checkpoint(wspace.zoo.open(folder / "image")[3][1], mine)
    before = mine.read_bytes()
    for words, match in [
        ([mine, "--out", mine.parent], "would be written over"),
        ([mine, folder / "x" / mine.name, "--out", folder / "y"], "would be written over"),
        ([folder / "image", "--out", folder / "y"], "--out takes networks"),
    ]:
        assert main(["predict", "--ckpt", str(last(folder, "Editing")), *map(str, words)]) == 2
        assert match in capsys.readouterr().err
    assert mine.read_bytes() == before and not (folder / "y").exists()


def test_words_for_lightning() -> None:
    assert is_lightning(["fit"]) and is_lightning(["predict", "--config=a.yaml"])
    assert is_lightning(["predict", "--data.path", "x"]) and not is_lightning(["inspect", "x"])
    assert not is_lightning(["predict", "--ckpt", "a", "b"])


# --- configurations ---------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # lightning 2.6 with jsonargparse 4.53
@pytest.mark.parametrize("file", CONFIGS, ids=[file.stem for file in CONFIGS])
def test_configurations(file: Path, zoo_of_images: Path) -> None:
    """Every file is accepted, and its metanet can be made."""
    from wspace.lit.cli import TrainingCLI

    class Parsed(TrainingCLI):
        def _run_subcommand(self, subcommand: str) -> None:
            del subcommand

    options = ["--data.path", str(zoo_of_images), "--trainer.accelerator", "cpu"]
    cli = Parsed(["fit", "--config", str(file), *options])
    if isinstance(cli.model, Nowcasting):  # its predictor is made with it
        assert isinstance(cli.datamodule, ZooDataModule) and cli.datamodule.time is None
        return
    assert isinstance(cli.datamodule, ZooDataModule) and type(cli.model) in TASKS.values()
    out = None if type(cli.model).__name__ == "Editing" else 3
    build_metanet(cli.model.name, cli.model.options, wspace.zoo.open(zoo_of_images), out=out)


@pytest.fixture(scope="module")
def zoo_of_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo") / "image"
    build(Toys(6, (6,), size=6, kind="siren"), folder)
    return folder


# --- two processes ----------------------------------------------------------------


@pytest.mark.slow
def test_two_processes(folder: Path) -> None:
    root = folder / "ddp"
    processes = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]

    def run(command: str, *words: str) -> str:
        call = [sys.executable, "-m", "wspace.cli", command, *config(folder, "two")]
        call += ["--trainer.default_root_dir", str(root), *words]
        return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    run("fit", *processes)
    ckpt = root / "Classification" / "version_0" / "checkpoints" / "last.safetensors"
    assert load_task(ckpt).out == 3
    odd = ["--data.fractions", "[0.5, 0.2, 0.28]", "--data.split_name", "odd"]
    parts = wspace.zoo.open(folder / "two").split(0.5, 0.2, 0.28, name="odd")
    assert len(parts["test"]) % 2  # so the processes have different numbers of networks
    alone, together = (
        {
            name: float(value)
            for name, value in re.findall(
                r"(test/\w+) +│ +([\d.]+)", run("test", "--ckpt_path", str(ckpt), *odd, *some)
            )
        }
        for some in ([], processes)
    )
    assert "test/loss" in alone and together == pytest.approx(alone)
    for some in ([], processes):
        run("predict", "--ckpt_path", str(ckpt), *some)
    first, second = (file.read_text("utf-8") for file in sorted(root.rglob("predictions.csv")))
    assert first == second and len(first.splitlines()) == 97
    assert "val/accuracy" in run("fit", *processes, "--data.mixed", "true")
