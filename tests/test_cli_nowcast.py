"""`wspace nowcast`: which checkpoints it takes, what it refuses, and what it writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_nowcast_predictors import published_mlp
from torch import Tensor, nn

from wspace import load_checkpoint, trace
from wspace.cli import main
from wspace.cli.series import NOTE, find_series, read_series, step_of
from wspace.nowcast import NiNoGraph, NiNoMLP, save

NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4)
    )
    return net, (torch.randn(2, 1, 5, 5),)
"""


class Run(NamedTuple):
    code: int
    out: str
    err: str


Runner = Callable[..., Run]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runner:
    """Runs `wspace nowcast` in an empty folder with `net.py`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    Path("net.py").write_text(NET)

    def go(*words: str) -> Run:
        code = main(["nowcast", *words])
        shown = capsys.readouterr()
        return Run(code, shown.out, shown.err)

    return go


def states(count: int = 5, **change: Tensor) -> list[dict[str, Tensor]]:
    """States on a line, of a convolution with batch normalisation and a linear layer."""
    names: dict[str, Any] = {}
    exec(NET, names)
    net: nn.Module = names["build"]()[0]
    first = {n: x.detach().clone() for n, x in net.state_dict().items()}
    drift = {n: torch.randn_like(x) if x.is_floating_point() else x + 1 for n, x in first.items()}
    rows = [{n: x + 0.01 * i * drift[n] for n, x in first.items() if x.is_floating_point()}
            | {n: x + i for n, x in first.items() if not x.is_floating_point()}
            for i in range(count)]  # fmt: skip
    return [row | {n: x.clone() for n, x in change.items()} for row in rows]


def written(
    some: list[dict[str, Tensor]], name: str = "step_{}.safetensors", every: int = 100
) -> list[str]:
    """Files of states, at steps 100, 200 and so on."""
    files = [name.format(every * (i + 1)) for i in range(len(some))]
    for file, state in zip(files, some, strict=True):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        save_file(state, file, {"format": "pt", "author": "someone"})
    return files


def ahead(some: list[dict[str, Tensor]], horizon: int) -> dict[str, Tensor]:
    """The line through the states, extended; buffers of the last."""
    c = len(some)
    return {
        n: x
        if "running" in n or not x.is_floating_point()
        else x + horizon * (x - some[0][n]) / (c - 1)
        for n, x in some[-1].items()
    }


def assert_close(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert found.keys() == want.keys()
    for name, x in want.items():
        assert found[name].dtype == x.dtype, name
        torch.testing.assert_close(found[name], x, rtol=1e-5, atol=1e-6, msg=name)


# --- what it writes ---------------------------------------------------------


@pytest.mark.parametrize("model", [(), ("--model", "py:net.py:build")])
def test_the_line_goes_on(run: Runner, model: tuple[str, ...]) -> None:
    """Also without the code: buffers of batch normalisation are known by their names."""
    some = states()
    files = written(some)
    code, out, err = run(*files, "--horizon", "3", "--out", "ahead.safetensors", *model)
    assert code == 0, err
    found = load_checkpoint("ahead.safetensors")
    assert_close(dict(found), ahead(some, 3))
    assert torch.equal(found["1.running_mean"], some[-1]["1.running_mean"])
    assert torch.equal(found["1.num_batches_tracked"], some[-1]["1.num_batches_tracked"])
    assert not torch.equal(found["0.weight"], some[-1]["0.weight"])
    assert "5 checkpoints, steps 100 to 500" in out
    assert "3 spacings of 100 steps, to step 800" in out
    assert "moved" in out and "6 of 9 tensors" in out and "wrote ahead.safetensors" in out
    assert "1.running_mean, 1.running_var (a buffer)" in out


def test_metadata_is_kept_and_says_how_it_was_made(run: Runner) -> None:
    files = written(states())
    run(*files, "--horizon", "2", "--out", "ahead.safetensors")
    with safe_open("ahead.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and metadata["author"] == "someone"
    note = json.loads(metadata[NOTE])
    assert note["predictor"] == "LinearFit" and note["step"] == 700 and note["horizon"] == 2
    assert note["checkpoints"] == files


def test_horizon_zero_is_the_last_checkpoint(run: Runner) -> None:
    some = states()
    code, out, _ = run(*written(some), "--horizon", "0", "--out", "ahead.safetensors")
    found = load_checkpoint("ahead.safetensors")
    assert code == 0 and "0 of 9 tensors" in out
    assert all(torch.equal(found[n], x) for n, x in some[-1].items())


def test_average_is_the_mean(run: Runner) -> None:
    some = states(3)
    code, out, err = run(*written(some), "--predictor", "average", "--out", "mean.safetensors")
    assert code == 0 and "of the average" in out, err
    found = load_checkpoint("mean.safetensors")
    torch.testing.assert_close(found["4.weight"], some[1]["4.weight"], rtol=1e-5, atol=1e-6)
    assert torch.equal(found["1.running_var"], some[-1]["1.running_var"])


def test_ties_and_small_types_are_kept(run: Runner) -> None:
    """A torch file: tied tensors are written once, bf16 stays bf16, and what is still stays."""
    for i in range(5):
        tied = torch.arange(6.0).reshape(2, 3) + i
        half = torch.tensor([1.0, 2.0 + 0.25 * i], dtype=torch.bfloat16)
        state = {"a.weight": tied, "b.weight": tied, "c": half, "d": torch.tensor(3), "e": tied[0]}
        torch.save({"model": state, "step": i}, f"ckpt_{i}.pt")
    code, _, err = run("ckpt_*.pt", "--horizon", "2", "--out", "ahead.safetensors")
    assert code == 0, err
    found = load_checkpoint("ahead.safetensors")
    assert found.keys() == {"a.weight", "b.weight", "c", "d", "e"}
    assert found["a.weight"].data_ptr() == found["b.weight"].data_ptr()
    assert torch.equal(found["a.weight"], torch.arange(6.0).reshape(2, 3) + 6)
    assert found["c"].dtype == torch.bfloat16 and found["c"].tolist() == [1.0, 3.5]
    assert found["d"].item() == 3 and found["d"].dtype == torch.int64
    with safe_open("ahead.safetensors", "pt") as file:
        assert "b.weight" not in file.keys()  # noqa: SIM118


def test_wrapped_names_stay_as_they_are(run: Runner) -> None:
    some = [{f"module.{n}": x for n, x in s.items()} for s in states()]
    code, _, err = run(
        *written(some), "--horizon", "1", "--out", "a.safetensors", "--model", "py:net.py:build"
    )
    assert code == 0, err
    with safe_open("a.safetensors", "pt") as file:
        assert set(file.keys()) == some[-1].keys()


def test_json(run: Runner) -> None:
    files = written(states())
    code, out, _ = run(*files, "--horizon", "4", "--out", "a.safetensors", "--json", "-")
    data = json.loads(out)
    assert code == 0 and data["step"] == 900 and data["horizon"] == 4
    assert [item["step"] for item in data["checkpoints"]] == [100, 200, 300, 400, 500]
    assert data["relative"] == pytest.approx(4 * data["last_spacing"], rel=1e-5)
    (row,) = (row for row in data["tensors"] if row["name"] == "4.weight")
    assert row["elements"] == 216 and 0 < row["largest"] <= data["largest"]
    assert data["left_alone"] == {
        "1.running_mean": "a buffer",
        "1.running_var": "a buffer",
        "1.num_batches_tracked": "of dtype torch.int64",
    }
    run(*files, "--horizon", "4", "--out", "b.safetensors", "--json", "found.json")
    assert json.loads(Path("found.json").read_text())["out"] == "b.safetensors"


def test_the_table_fits_the_width(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = run(*written(states()), "--horizon", "4", "--out", "a.safetensors").out
    assert max(map(len, out.splitlines())) <= 80 and "moved by" in out


# --- predictors -------------------------------------------------------------


def test_a_trained_predictor(run: Runner) -> None:
    some = states()
    predictor = NiNoMLP(8)
    for p in predictor.parameters():
        nn.init.normal_(p, std=0.3)
    save(predictor, "mine.safetensors")
    words = (*written(some), "--predictor", "mine.safetensors", "--horizon", "7")
    code, out, err = run(*words, "--out", "a.safetensors", "--model", "py:net.py:build")
    assert code == 0 and "NiNoMLP (mine)" in out and "traced from py:net.py:build" in out, err
    names: dict[str, Any] = {}
    exec(NET, names)
    net, inputs = names["build"]()
    want = predictor.predict(net, some, horizon=7, space=trace(net, inputs))
    found = load_checkpoint("a.safetensors")
    assert all(torch.equal(found[n], x) for n, x in want.items())
    assert not torch.equal(found["0.weight"], some[-1]["0.weight"])
    assert run(*words, "--out", "b.safetensors").code == 0  # kinds by names and shapes


def test_a_graph_predictor_needs_the_wiring(run: Runner) -> None:
    save(NiNoGraph(8), "graph.safetensors")
    how = ("--predictor", "graph.safetensors", "--horizon", "7", "--out", "a.safetensors")
    strange = [{"w": torch.randn(2, 3, 5), "v": torch.randn(3, 7, 2)} for _ in range(5)]
    code, _, err = run(*written(strange, "strange_{}.safetensors"), *how)
    assert code == 2 and "wiring of a network, which is not known" in err and "--model" in err
    assert not Path("a.safetensors").exists()
    files = written(states())
    code, out, err = run(*files, *how)
    assert code == 0 and "read off the names and shapes" in out, err
    code, out, err = run(*files, *how, "--force", "--model", "py:net.py:build")
    assert code == 0 and "traced from py:net.py:build" in out, err


def test_published_predictor_goes_by_its_wiring(run: Runner) -> None:
    files = written(states())
    torch.save(published_mlp(6, 0), "nino_some.pt")
    words = (*files, "--predictor", "nino_some.pt", "--horizon", "5", "--topology", "published")
    code, out, err = run(*words, "--out", "a.safetensors", "--model", "py:net.py:build")
    assert code == 0 and "NiNoMLP" in out and "as published code has it" in out, err


def test_a_prediction_is_no_observation(run: Runner) -> None:
    files = written(states())
    assert run(*files, "--horizon", "1", "--out", "step_600.safetensors").code == 0
    for words in ([*files[1:], "step_600.safetensors"], ["step_*.safetensors"]):
        code, _, err = run(*words, "--horizon", "1", "--out", "a.safetensors")
        assert code == 2 and "a prediction is no state of the run" in err
        assert "step_600.safetensors" in err and "step_500" not in err
    assert not Path("a.safetensors").exists()


def test_unknown_predictor_and_horizon(run: Runner) -> None:
    files = written(states())
    code, _, err = run(*files, "--predictor", "nothing", "--horizon", "1", "--out", "a.safetensors")
    assert code == 2 and "no predictor 'nothing'" in err and "linear, average" in err
    code, _, err = run(*files, "--out", "a.safetensors")
    assert code == 2 and "how far?" in err and "got none" in err
    assert "only --predictor average does without" in err
    code, _, err = run("nowhere_*.safetensors", "--out", "a.safetensors")
    assert code == 2 and "too few checkpoints" in err  # before what is missing beside them
    code, _, err = run(*files, "--predictor", "nino.pt", "--horizon", "1", "--out", "a.safetensors")
    assert code == 2 and "no predictor 'nino.pt'" in err and "fetched by you" in err
    save(NiNoMLP(8), "mine.safetensors")
    words = ("--predictor", "mine.safetensors", "--out", "a.safetensors")
    code, _, err = run(*files, *words, "--horizon", "41")
    assert code == 2 and "at most 40" in err and "got 41" in err
    code, _, err = run(*files, *words, "--horizon", "4", "--context", "3")
    assert code == 2 and "--context is for built-in predictors" in err
    code, _, err = run(*files[:3], *words, "--horizon", "4")
    assert code == 2 and "expected 5, oldest first\n  got 3" in err
    assert run(*files, "--horizon", "400", "--out", "a.safetensors").code == 0  # a line has no end


def test_help_says_which_predictors_need_a_horizon(capsys: pytest.CaptureFixture[str]) -> None:
    main(["nowcast", "--help"])
    assert "all predictors but average need it" in " ".join(capsys.readouterr().out.split())


def test_files_that_are_no_predictors(run: Runner) -> None:
    """A run's checkpoint points at the predictor that the run has left."""
    files = written(states())
    words = (*files, "--horizon", "1", "--out", "a.safetensors", "--predictor")
    code, _, err = run(*words, files[0])
    assert code == 2 and "weights of another network: 0.bias" in err
    assert "training leaves predictor.safetensors" in err
    Path("version_0/checkpoints").mkdir(parents=True)
    last = "version_0/checkpoints/last.safetensors"
    save_file({"metanet.w": torch.zeros(1)}, last, {"format": "wspace-task-1"})
    code, _, err = run(*words, last)
    assert code == 2 and "a checkpoint to resume training from" in err
    assert "training leaves predictor.safetensors" in err
    save(NiNoMLP(8), "version_0/predictor.safetensors")
    code, _, err = run(*words, last)
    assert code == 2 and "of that run is version_0/predictor.safetensors" in err
    save_file({"w": torch.zeros(1)}, "later.safetensors", {"format": "wspace-predictor-1"})
    code, _, err = run(*words, "later.safetensors")
    assert code == 2 and "a later version wrote it" in err


def test_tied_tensors_count_once(run: Runner) -> None:
    """As they do among those that moved."""
    for i in range(5):
        tied = torch.full((2, 3), float(i))
        names = {"b": "a"}  # as safetensors' `save_model` notes them
        save_file({"a": tied, "n": torch.tensor(3)}, f"step_{i}.safetensors", names)
    code, out, err = run("step_*.safetensors", "--horizon", "1", "--out", "ahead.safetensors")
    assert code == 0 and "1 of 2 tensors" in out, err
    assert load_checkpoint("ahead.safetensors").keys() == {"a", "b", "n"}


# --- which checkpoints ------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "step"),
    [
        ("step_100.safetensors", (0, 100)),
        ("runs/step=0007.pt", (0, 7)),
        ("epoch=3-step=400.ckpt", (0, 400)),
        ("epoch=3-step=400-v1.ckpt", (0, 400)),
        ("global_step25/model.safetensors", (0, 25)),
        ("checkpoint-200", (1, 200)),
        ("checkpoint-200/model.safetensors", (1, 200)),
        ("checkpoint-200/model.safetensors.index.json", (1, 200)),
        ("epoch=12.ckpt", (1, 12)),
        ("model_0100.pth", (2, 100)),
        ("last.ckpt", None),
        ("runs7/last.ckpt", None),
        ("resnet18-best.pt", None),
    ],
)
def test_steps_in_names(path: str, step: tuple[int, int] | None) -> None:
    assert step_of(Path("/home/someone") / path) == step


@pytest.mark.parametrize("where", ["run", "run/*.safetensors"])
def test_a_folder_stands_for_its_last_checkpoints(run: Runner, where: str) -> None:
    """By number, not by letter; what has no step in its name is not looked at."""
    some = states(8)
    written(some, "run/step_{}.safetensors", every=200)  # 200 … 1600
    Path("run/last.safetensors").write_bytes(b"")
    Path("run/version_3").mkdir()
    code, out, err = run(where, "--horizon", "1", "--out", "a.safetensors")
    assert code == 0 and "steps 800 to 1,600" in out, err
    assert_close(dict(load_checkpoint("a.safetensors")), ahead(some[3:], 1))
    out = run(where, "--horizon", "1", "--out", "b.safetensors", "--context", "3").out
    assert "steps 1,200 to 1,600" in out


def test_folders_of_the_trainer(run: Runner) -> None:
    """Hugging Face folders, beside the final model; the code is in them."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=12, n_layer=1, n_head=3, n_positions=16, vocab_size=20,
                        bos_token_id=1, eos_token_id=2)  # fmt: skip
    model = GPT2LMHeadModel(config)
    for i in range(1, 6):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01)
        model.save_pretrained(f"out/checkpoint-{i * 500}")
        torch.save({"state": {}, "param_groups": []}, f"out/checkpoint-{i * 500}/optimizer.pt")
    model.save_pretrained("out")
    save(NiNoGraph(8), "graph.safetensors")
    code, out, err = run("out", "--horizon", "1", "--out", "a.safetensors")
    assert code == 0 and "steps 500 to 2,500" in out, err
    words = ("out", "--horizon", "3", "--predictor", "graph.safetensors", "--out", "b.safetensors")
    code, out, err = run(*words)
    assert code == 0 and "traced from" in out and "checkpoint-2500" in out, err
    for file in ("a.safetensors", "b.safetensors"):
        with safe_open(file, "pt") as opened:
            assert "lm_head.weight" not in opened.keys()  # noqa: SIM118
    moved = load_checkpoint("a.safetensors", module=model)
    torch.testing.assert_close(moved["lm_head.weight"], model.lm_head.weight + 0.01)


def test_checkpoints_of_lightning(run: Runner) -> None:
    some = states()
    for i, state in enumerate(some):
        held = {f"net.{n}": x for n, x in state.items()}
        data = {"state_dict": held, "epoch": i, "optimizer_states": [{"state": {}}]}
        torch.save(data, f"epoch={i}-step={40 * i}.ckpt")
    torch.save(data, "last.ckpt")
    code, out, err = run(".", "--horizon", "2", "--out", "a.safetensors")
    assert code == 0 and "steps 0 to 160" in out, err
    want = {f"net.{n}": x for n, x in ahead(some, 2).items()}
    assert_close(dict(load_checkpoint("a.safetensors")), want)


def test_names_without_steps_are_taken_as_given(run: Runner) -> None:
    some = states(3)
    for name, state in zip(("old", "middle", "new"), some, strict=True):
        save_file(state, f"{name}.safetensors")
    words = ("old.safetensors", "middle.safetensors", "new.safetensors", "--horizon", "1")
    code, out, err = run(*words, "--out", "a.safetensors")
    assert code == 0 and "their names have no steps" in out and "1 spacing " in out, err
    assert_close(dict(load_checkpoint("a.safetensors")), ahead(some, 1))


def lightning(state: dict[str, Tensor], step: int | None) -> dict[str, Any]:
    """A checkpoint such as Lightning writes; of no step if None."""
    more = {} if step is None else {"global_step": step}
    return {"state_dict": state, "epoch": 1, "optimizer_states": [{"state": {}}], **more}


def test_a_name_without_a_step_is_put_in_order_by_its_file(run: Runner) -> None:
    """`last.ckpt` among names with steps: Lightning and wspace note the step inside."""
    some = states(3)
    torch.save(lightning(some[0], 100), "step=100.ckpt")
    torch.save(lightning(some[1], 200), "step=200.ckpt")
    torch.save(lightning(some[2], 300), "last.ckpt")
    names = ["step=100.ckpt", "step=200.ckpt", "last.ckpt"]
    code, out, err = run(*names, "--horizon", "1", "--out", "a.safetensors")
    assert code == 0 and "steps 100 to 300" in out and "to step 400" in out, err
    for wrong in ([names[2], *names[:2]], [names[0], names[2], names[1]]):
        code, _, err = run(*wrong, "--horizon", "1", "--out", "b.safetensors")
        assert code == 2 and "oldest first" in err and "step 300 of last.ckpt" in err
    save_file(some[2], "last.safetensors", {"global_step": "300"})
    words = (*names[:2], "last.safetensors", "--horizon", "1", "--out", "c.safetensors")
    code, out, err = run(*words)
    assert code == 0 and "steps 100 to 300" in out, err
    assert not Path("b.safetensors").exists()


def test_files_of_one_number_are_put_in_order_by_what_they_hold(run: Runner) -> None:
    """Best and last of two runs of a network whose name ends in a number, say."""
    for name, step, state in zip(("old18", "new18"), (10, 20), states(2), strict=True):
        torch.save(lightning(state, step), f"{name}.ckpt")
    words = ("--horizon", "1", "--out", "a.safetensors")
    code, _, err = run("new18.ckpt", "old18.ckpt", *words)
    assert code == 2 and "oldest first" in err
    code, out, err = run("old18.ckpt", "new18.ckpt", *words)
    assert code == 0 and "steps 10 to 20" in out, err


@pytest.mark.parametrize("last", ["last.ckpt", "checkpoint-300.ckpt"])
def test_what_cannot_be_put_in_order_is_refused(run: Runner, last: str) -> None:
    """A step that only some have orders nothing; nor do numbers of two kinds."""
    some = states(3)
    torch.save(lightning(some[0], None), "step=100.ckpt")
    torch.save(lightning(some[1], None), "step=200.ckpt")
    torch.save(lightning(some[2], None), last)
    names = ("step=100.ckpt", "step=200.ckpt", last)
    code, _, err = run(*names, "--horizon", "1", "--out", "a.safetensors", "--allow-uneven")
    assert code == 2 and "nothing says in which order" in err
    assert f"no step of {last}" in err and "step 200 of step=200.ckpt" in err
    assert not Path("a.safetensors").exists()


def test_nothing_in_a_checkpoint_is_run_for_its_step(run: Runner) -> None:
    class Strange:
        def __reduce__(self) -> Any:
            return Path("ran").touch, ()

    for i, state in enumerate(states(2)):
        torch.save({**lightning(state, i), "more": Strange()}, f"{'ab'[i]}.ckpt")
    code, _, err = run("a.ckpt", "b.ckpt", "--horizon", "1", "--out", "a.safetensors")
    assert code == 2 and "asks to run code" in err and not Path("ran").exists()


@pytest.mark.parametrize("where", ["run", "run/*"])
def test_several_kinds_of_files_in_a_folder(run: Runner, where: str) -> None:
    some = states()
    written(some, "run/step_{}.safetensors")
    for i, state in enumerate(some):
        torch.save(lightning(state, 100 * i + 150), f"run/step_{100 * i + 150}.ckpt")
    code, _, err = run(where, "--horizon", "1", "--out", "a.safetensors")
    assert code == 2 and "several kinds" in err and "5 .ckpt" in err and "5 .safetensors" in err
    assert "'run/*.ckpt'" in err or "'run/*.safetensors'" in err
    code, out, err = run("run/*.ckpt", "--horizon", "1", "--out", "a.safetensors")
    assert code == 0 and "steps 150 to 550" in out, err


@pytest.mark.parametrize("where", ["run", "run/*"])
def test_the_half_that_training_resumes_from_is_no_checkpoint(run: Runner, where: str) -> None:
    """`wspace fit` writes it beside every checkpoint."""
    written(states(), "run/epoch=0-step={}.safetensors")
    for i in range(1, 6):
        torch.save({"optimizer_states": []}, f"run/epoch=0-step={100 * i}.resume.pt")
    code, out, err = run(where, "--horizon", "1", "--out", "a.safetensors")
    assert code == 0 and "steps 100 to 500" in out, err


# --- what it refuses --------------------------------------------------------


def test_steps_have_to_follow_each_other(run: Runner) -> None:
    some = states(6)
    files = written(some)
    out = ("--horizon", "1", "--out", "a.safetensors")
    code, _, err = run(*files[:4], files[5], *out)
    assert code == 2 and "equally far apart" in err and "step 600 of step_600" in err
    code, shown, _ = run(*files[:4], files[5], *out, "--allow-uneven")
    assert code == 0 and "steps 100, 200, 300, 400, 600, taken to be" in shown
    for wrong in ([*files[1:5], files[0]], [files[0], *files[:4]]):
        code, _, err = run(*wrong, *out, "--force", "--allow-uneven")
        assert code == 2 and "oldest first" in err
    code, _, err = run("step_1*.safetensors", *out, "--force")
    assert code == 2 and "too few checkpoints" in err and "step_100.safetensors" in err


def test_two_checkpoints_of_one_step(run: Runner) -> None:
    written(states(), "run/step_{}.safetensors")
    save_file(states()[-1], "run/epoch=1-step=500.safetensors")
    code, _, err = run("run", "--horizon", "1", "--out", "a.safetensors")
    assert code == 2 and "each of another step" in err


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"4.bias": torch.zeros(5)}, "'4.bias' of shape (5,)"),
        ({"4.bias": torch.zeros(4, dtype=torch.float16)}, "'4.bias' of torch.float16"),
        ({"more": torch.zeros(1)}, "'more' in step_200.safetensors only"),
    ],
)
def test_checkpoints_have_to_be_of_one_network(
    run: Runner, change: dict[str, Tensor], text: str
) -> None:
    some = states()
    some[1] = some[1] | change
    code, _, err = run(*written(some), "--horizon", "1", "--out", "a.safetensors")
    assert code == 2 and "not of one network" in err and text in err
    assert not Path("a.safetensors").exists()


def test_what_is_not_finite_is_named(run: Runner) -> None:
    some = states()
    some[2]["0.weight"][0, 0, 0, 0] = float("nan")
    code, _, err = run(*written(some), "--horizon", "1", "--out", "a.safetensors")
    assert code == 2 and "NaN or infinite: 1 of '0.weight' in step_300.safetensors" in err
    assert not Path("a.safetensors").exists()


def test_a_prediction_that_overflows_is_not_written(run: Runner) -> None:
    some = [{"a.weight": torch.tensor([[1e4 * (i + 1)]]).half()} for i in range(5)]
    code, _, err = run(*written(some), "--horizon", "40", "--out", "a.safetensors")
    assert code == 2 and "'a.weight' is not finite" in err
    assert list(Path().glob("*a.safetensors*")) == []


def test_nothing_is_replaced_unless_it_is_said(run: Runner) -> None:
    files = written(states())
    Path("there.safetensors").write_bytes(b"precious")
    words = (*files, "--horizon", "1", "--out")
    code, _, err = run(*words, "there.safetensors")
    assert code == 2 and "--force" in err
    assert Path("there.safetensors").read_bytes() == b"precious"
    assert run(*words, "there.safetensors", "--force").code == 0
    before = Path(files[0]).read_bytes()
    code, _, err = run(*words, files[0], "--force")
    assert code == 2 and "one of the checkpoints" in err
    assert Path(files[0]).read_bytes() == before
    for target, text in (("a.pt", "end in .safetensors"), ("no/a.safetensors", "not there")):
        code, _, err = run(*words, target)
        assert code == 2 and text in err


def test_paths_that_are_not_there(run: Runner) -> None:
    files = written(states())
    code, _, err = run(*files[:4], "step_9.safetensors", "--horizon", "1", "--out", "a.safetensors")
    assert code == 2 and "step_9.safetensors" in err
    save_file({"n": torch.tensor([1, 2])}, "ints_1.safetensors")
    save_file({"n": torch.tensor([1, 2])}, "ints_2.safetensors")
    words = ("ints_1.safetensors", "ints_2.safetensors")
    code, _, err = run(*words, "--horizon", "1", "--out", "a.safetensors")
    assert code == 2 and "nothing to predict" in err


def file_of(x: torch.Tensor) -> str:
    """The file in whose pages a tensor lies; empty if it lies in memory of its own."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux says what is mapped where")
    for line in maps.read_text().splitlines():
        where, *rest = line.split(maxsplit=5)
        start, stop = (int(end, 16) for end in where.split("-"))
        if start <= x.data_ptr() < stop:
            return Path(rest[4]).name if len(rest) > 4 else ""
    return ""


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_reads_by_memory_map(run: Runner, suffix: str) -> None:
    files = [f"step_{i}.{suffix}" for i in range(5)]
    for file in files:
        state = {"w": torch.zeros(4 << 20)}
        save_file(state, file) if suffix == "safetensors" else torch.save(state, file)
    series = read_series(find_series(files, 5))
    assert [file_of(state["w"]) for state in series.states] == files
    assert file_of(series.states[0]["w"] + 1) not in files
    assert series.spacing == 1 and series.steps == (0, 1, 2, 3, 4)
