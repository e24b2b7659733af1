"""`Continual` and `SplitTasks`: tasks change at epochs, old ones stay, and do not without help."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer, seed_everything

from datasets_zoo.experiments.split import SplitTasks, TaskBatches
from datasets_zoo.images import standardised
from wspace.errors import HyperError, ZooError
from wspace.lit.hyper.continual import METHODS, Continual
from wspace.testing import assert_close, assert_same

CONFIGS = Path(__file__).parent.parent / "configs" / "hyper"
HEADS = {
    "chunked": {"chunk": 300, "hidden": [12], "embedding": 8},
    "recurrent": {"chunk": 800, "hidden": 12, "embedding": 8},
}
SMALL: dict[str, Any] = {
    "target_options": {"inputs": 64, "hidden": [32]},
    "head_options": HEADS["chunked"],
    "width": 8,
    "lr": 1e-2,
    "beta": 10.0,
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def trainer(**options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 5,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**{**settings, **options})


def digits(**options: Any) -> SplitTasks:
    data = SplitTasks("digits", **options)
    data.setup("fit")
    return data


# --- data -----------------------------------------------------------------------------------------


def test_split_shares_out_all_images() -> None:
    data = digits()
    whole = standardised("digits")
    assert sum(len(y) for _, y in data.parts["train"]) == len(whole.train_y)
    for part, classes in zip(data.parts["train"], data.classes, strict=True):
        assert set(part[1].tolist()) == set(classes)
    for (x, _), (v, _) in zip(data.parts["test"], data.parts["val"], strict=True):
        assert_same(x, v)  # without validation the test images are looked at


def test_order_of_classes() -> None:
    """Labels are those of outputs: task 0 has outputs 0 and 1, here the digits 7 and 3."""
    data = digits(order=[7, 3, 0, 1, 2, 4, 5, 6, 8, 9])
    whole = standardised("digits")
    x, y = data.parts["test"][0]
    assert set(y.tolist()) == {0, 1}
    assert int((y == 0).sum()) == int((whole.test_y == 7).sum())
    assert_same(x[y == 1], whole.test_x[whole.test_y == 3])


def test_validation_is_put_aside() -> None:
    data = digits(validation=0.25)
    for (x, _), (v, _) in zip(data.parts["train"], data.parts["val"], strict=True):
        known = {tuple(i.flatten().tolist()) for i in x}
        assert len(v) == round(0.25 * (len(x) + len(v)))
        assert sum(tuple(i.flatten().tolist()) in known for i in v) == 0


def test_permuted_pixels() -> None:
    data = digits(kind="permuted", tasks=3, steps=2)
    assert data.classes == [range(10)] * 3
    loaders = data.test_dataloader()
    batches = [next(iter(loader)) for loader in loaders]
    assert [int(b[2]) for b in batches] == [0, 1, 2]
    plain = batches[0][0].flatten(1)
    for x, y, task in batches[1:]:
        order = data.pixels[int(task)]
        assert order is not None and sorted(order.tolist()) == list(range(64))
        assert_same(x.flatten(1), plain[:, order])
        assert_same(y, batches[0][1])
        assert not torch.equal(x.flatten(1), plain)
    assert data.pixels[0] is None


def test_batches_go_through_a_task_before_they_begin_again() -> None:
    sampler = TaskBatches([7, 12], 3, steps=6, epochs=2)
    seen: list[tuple[int, list[list[int]]]] = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        places = list(sampler)
        seen.append((places[0][0], [sorted(rows) for _, rows in places]))
        assert {task for task, _ in places} == {epoch // 2}
    assert len(set(sum(seen[0][1][:2], []))) == 6
    assert sorted(sum(seen[2][1][:4], [])) == list(range(12))
    assert seen[0][1] != seen[1][1]  # another epoch, another order
    sampler.set_epoch(0)
    assert [sorted(rows) for _, rows in sampler] == seen[0][1]


def test_joint_batches_take_turns() -> None:
    data = digits(joint=True, steps=10)
    assert [int(task) for _, _, task in data.train_dataloader()] == [0, 1, 2, 3, 4] * 2


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "rotated"}, "split or permuted"),
        ({"steps": 0}, "from 1"),
        ({"tasks": 3}, "divides"),
        ({"order": [0, 0, 1]}, "each of"),
    ],
)
def test_tasks_that_cannot_be(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ZooError, match=match):
        digits(**options)


# --- the step -------------------------------------------------------------------------------------


def module(method: str = "chunked", **options: Any) -> Continual:
    head = HEADS.get(method, HEADS["chunked"])
    return Continual(method=method, **{**SMALL, "head_options": head, **options})


def trained(method: str, steps: int = 60, **options: Any) -> tuple[Continual, Trainer]:
    seed_everything(1, verbose=False)
    task = module(method, **options)
    run = trainer()
    run.fit(task, datamodule=SplitTasks("digits", steps=steps, joint=method == "joint"))
    return task, run


class Watching(Continual):
    """Notes what was made for earlier tasks, and the first task's embedding, after every epoch."""

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        assert self.hyper is not None
        self.seen = [*getattr(self, "seen", []), self.hyper.embed(torch.arange(5)).detach().clone()]


def test_old_embeddings_are_the_same_to_the_bit() -> None:
    seed_everything(1, verbose=False)
    task = Watching(method="chunked", **SMALL)
    trainer().fit(task, datamodule=SplitTasks("digits", steps=8))
    assert len(task.seen) == 5
    for done in range(5):
        for later in range(done, 5):
            assert_same(task.seen[later][done], task.seen[done][done])
        if done:
            assert not torch.equal(task.seen[done][done], task.seen[done - 1][done])
    for epoch in range(4):  # and those of later tasks wait
        assert_same(task.seen[epoch][epoch + 1 :], task.seen[0][epoch + 1 :])


def test_no_penalty_is_beta_zero() -> None:
    """β = 0 takes the very steps of no penalty at all."""
    one, _ = trained("finetune", 3)
    two, _ = trained("chunked", 3, beta=0.0)
    three, _ = trained("chunked", 3, beta=1.0)
    params = [dict(m.network.named_parameters()) for m in (one, two, three)]
    assert_same(params[0], params[1])
    assert not torch.equal(params[0]["head.last.weight"], params[2]["head.last.weight"])


def test_stored_targets_and_snapshot_take_the_same_steps() -> None:
    one, _ = trained("chunked", 4)
    two, _ = trained("chunked", 4, targets="stored")
    assert_close(one.matrix, two.matrix)
    for (name, p), (_, q) in zip(
        one.network.named_parameters(), two.network.named_parameters(), strict=True
    ):
        assert (p - q).abs().max() < 1e-3 * q.abs().max(), name


# --- what is remembered ---------------------------------------------------------------------------


def test_with_the_penalty_tasks_stay_and_without_they_do_not() -> None:
    kept, run = trained("chunked")
    lost, _ = trained("finetune")
    assert kept.matrix.diagonal()[:4].min() > 0.8  # all were learned
    assert lost.matrix.diagonal().min() > 0.8
    assert kept.forgetting() < 0.03
    assert lost.forgetting() > kept.forgetting() + 0.05
    assert kept.drift() < 0.1
    assert lost.drift() > 0.3
    shown = run.callback_metrics
    assert_close(shown["val/mean"].double(), kept.matrix[-1].mean().double())
    assert_close(shown["val/accuracy_2"].double(), kept.matrix[-1, 2].double())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("recurrent", {}),
        ("recurrent", {"penalty": "states"}),
        ("recurrent", {"penalty": "ewc", "ewc": 100.0, "fisher": 64}),
        ("chunked", {"penalty": "ewc", "ewc": 100.0, "fisher": 64, "online": True}),
        ("chunked", {"ahead": True, "mask": True, "subset": 2}),
        ("ewc", {"ewc": 1000.0}),
        ("joint", {}),
    ],
)
def test_every_method_runs(method: str, options: dict[str, Any]) -> None:
    task, run = trained(method, 6, **options)
    data = SplitTasks("digits", steps=1, joint=method == "joint")
    found = run.test(task, datamodule=data, verbose=False)[0]
    assert_close(torch.tensor(found["test/mean"]), task.matrix[-1].mean())
    assert 0 <= found["test/mean_by_entropy"] <= found["test/task_found"] + 1e-6
    rows = task.matrix.isfinite().all(1).tolist()
    assert rows == ([False] * 4 + [True] if method == "joint" else [True] * 5)
    if task.uses_elastic:
        assert len(task.elastic.anchors) == (1 if options.get("online") else 4)


class Growing(Continual):
    """Notes the head after the first task."""

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        if not self.done and self.hyper is not None:
            self.old = {n: p.detach().clone() for n, p in self.hyper.head.named_parameters()}


def test_a_recurrent_head_grows() -> None:
    """Old units are the same to the bit, new ones learn, and earlier tasks stay."""
    seed_everything(1, verbose=False)
    options = {**SMALL, "head_options": HEADS["recurrent"]}
    task: Any = Growing(method="recurrent", **options, grow=3)
    trainer().fit(task, datamodule=SplitTasks("digits", steps=40))
    head, old = task.hyper.head, task.old
    assert head.hidden == 12 + 4 * 3
    now = dict(head.named_parameters())
    for name, x in old.items():
        assert_same(now[name], x)
    assert now["units.4.leave.weight"].abs().max() > 0
    assert task.matrix.diagonal().min() > 0.8
    assert task.forgetting() < 0.03
    again = module("recurrent", grow=3)
    again.load_state_dict(task.state_dict())
    x = torch.randn(5, 1, 8, 8)
    assert_same(again(2, x), task(2, x))


def test_statistics_of_earlier_tasks_are_kept() -> None:
    """With BatchNorm, later tasks leave no trace in an earlier one's answers, nor embeddings."""
    seed_everything(1, verbose=False)
    task = Continual(
        "datasets_zoo.architectures:cnn",
        {"channels": 1, "widths": [4, 6], "norm": True},
        head_options={"chunk": 100, "hidden": [10], "embedding": 4},
        width=8,
        beta=1e4,
    )
    trainer(max_epochs=2).fit(task, datamodule=SplitTasks("digits", steps=10))
    assert task.done == [0]
    kept = task.statistics.kept[0]
    now = [x.clone() for x in task.statistics.buffers()]
    assert not torch.equal(kept[0], now[0])
    x = torch.randn(5, 1, 8, 8)
    task.eval()
    with torch.no_grad():
        right, wrong = task(0, x), task.logits(0, x)
    assert not torch.allclose(right, wrong)
    again = Continual(**dict(task.hparams))  # from its weights alone
    again.load_state_dict(task.state_dict())
    with torch.no_grad():
        assert_same(again.eval()(0, x), right)


@pytest.mark.parametrize(("method", "options"), [("chunked", {}), ("recurrent", {"grow": 2})])
def test_a_run_goes_on_as_it_was(tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    """Interrupted after the second task: what is remembered is in the file, without pickle."""
    whole, _ = trained(method, 5, **options)
    seed_everything(1, verbose=False)
    first = module(method, **options)
    run = trainer(max_epochs=2)
    run.fit(first, datamodule=SplitTasks("digits", steps=5))
    run.save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    rest = module(method, **options)
    trainer().fit(rest, datamodule=SplitTasks("digits", steps=5), ckpt_path=tmp_path / "half.ckpt")
    assert rest.done == whole.done == [0, 1, 2, 3]
    assert_same(dict(rest.network.named_parameters()), dict(whole.network.named_parameters()))
    assert_same(rest.matrix, whole.matrix)


# --- what does not go together --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "chunk"}, ", ".join(METHODS)),
        ({"penalty": "weights"}, "outputs"),
        ({"penalty": "states"}, "only 'recurrent'"),
        ({"tasks": 3}, "10 outputs"),
        ({"heads": "own"}, "own"),
        ({"grow": 2}, "only 'recurrent' with"),
        ({"head_options": {"size": 1}}, "ChunkedHead"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], match: str) -> None:
    with pytest.raises(HyperError, match=match):
        module(**options)


@pytest.mark.parametrize("options", [{"joint": True}, {"tasks": 2}])
def test_data_that_does_not_suit(options: dict[str, Any]) -> None:
    with pytest.raises(HyperError, match="does not suit"):
        trainer().fit(module(), datamodule=SplitTasks("digits", steps=1, **options))


def test_tasks_that_come_again() -> None:
    task = module()
    task.done = [0]
    with pytest.raises(HyperError, match="comes again"):
        task.change(0)


@pytest.mark.parametrize("name", ["continual_mnist", "continual_digits"])
def test_configs(name: str) -> None:
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    task = Continual(**config["model"]["init_args"])
    data = SplitTasks(**config["data"]["init_args"])
    assert config["trainer"]["max_epochs"] == data.tasks * data.epochs == task.tasks
    if name == "continual_mnist":
        assert sum(p.numel() for p in task.network.parameters()) == 89_304
