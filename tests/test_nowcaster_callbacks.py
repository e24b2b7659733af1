"""The nowcaster in Lightning and in the Hugging Face Trainer: same jumps, and resumption."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import MeanMetric

from tests.test_nowcaster import Shift, assert_equal, net, snapshot
from wspace.errors import NowcastError
from wspace.lit import NowcastCallback
from wspace.lit.nowcast import _first
from wspace.nowcast import (
    Decay,
    Drift,
    Guard,
    Jump,
    LinearFit,
    NoChange,
    Nowcaster,
    trainer_callback,
)
from wspace.nowcast.huggingface import load, save

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*litlogger"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled"),
]


def points(count: int, seed: int) -> TensorDataset:
    g = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 3, generator=g), torch.randn(count, 2, generator=g))


class Toy(LightningModule):
    """A net with dropout and batch normalisation, trained automatically or by hand."""

    def __init__(
        self, *, manual: bool = False, returns: str = "loss", wrap: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.model = net()
        self.automatic_optimization = not manual
        self.returns, self.wrap = returns, wrap
        self.mean = MeanMetric()
        self.path: list[dict[str, Tensor]] = []
        self.seen: list[float] = []

    def _loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.model(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        if not self.automatic_optimization:
            self.manual_backward(loss / 2)
            if batch_idx % 2:
                optimizer: Any = self.optimizers()
                optimizer.step()
                optimizer.zero_grad()
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.path.append(snapshot(self.model))

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self._loss(batch)
        assert not self.model.training
        self.mean.update(loss)
        self.log("val/loss", loss)
        self.log_dict({"val/mean": loss * 2})
        return {"loss": loss, "dict": {"loss": loss}, "none": None}[self.returns]

    def on_validation_epoch_end(self) -> None:
        self.seen.append(float(self.mean.compute()))
        self.mean.reset()

    def configure_optimizers(self) -> Any:
        base: Any = torch.optim.Adam(self.model.parameters(), lr=0.02)
        if self.wrap is not None:
            base = Nowcaster(base, self.model, **self.wrap)
        schedule = torch.optim.lr_scheduler.StepLR(base, 4, gamma=0.8)
        return {"optimizer": base, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(
    module: Toy,
    folder: Path,
    callbacks: list[Any],
    *,
    steps: int,
    ckpt_path: Any = None,
    batch: int = 8,
    **options: Any,
) -> Trainer:
    seed_everything(0, verbose=False)
    options = {"accumulate_grad_batches": 1} | options
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, logger=False, callbacks=callbacks,
        default_root_dir=folder, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
    train = DataLoader(points(64, 1), batch_size=batch)
    valid = DataLoader(points(30, 2), batch_size=10, shuffle=True)
    trainer.fit(module, train, valid, ckpt_path=ckpt_path, weights_only=True)
    return trainer


JUMPS: dict[str, Any] = {"period": 5, "horizon": 3}


@pytest.mark.parametrize(("manual", "accumulate"), [(False, 1), (False, 2), (False, 4), (True, 1)])
def test_lightning_jumps_after_real_steps(tmp_path: Path, manual: bool, accumulate: int) -> None:
    """The same path as that of a nowcaster made by the module itself."""
    paths: list[Toy] = []
    for wrap in (None, {"predictor": LinearFit(), **JUMPS}):
        module = Toy(manual=manual, wrap=wrap)
        callback = NowcastCallback(LinearFit(), module="model", **JUMPS)
        callbacks = [] if wrap else [callback]
        fit(module, tmp_path, callbacks, steps=12, accumulate_grad_batches=accumulate)
        paths.append(module)
        if not wrap:
            assert [(j.step, j.horizon) for j in callback.jumps] == [(5, 3), (10, 3)]
    assert len(paths[0].path) == 12 * (2 if manual else accumulate)
    for a, b in zip(paths[0].path, paths[1].path, strict=True):
        assert_equal(a, b)
    plain = Toy(manual=manual)
    fit(plain, tmp_path, [], steps=12, accumulate_grad_batches=accumulate)
    same = [
        all(torch.equal(a[n], b[n]) for n in a)
        for a, b in zip(plain.path, paths[0].path, strict=True)
    ]
    micro = 2 if manual else accumulate
    assert same == [True] * (5 * micro - 1) + [False] * (7 * micro + 1)


def test_lightning_logs_jumps_and_decays_over_the_trainers_steps(tmp_path: Path) -> None:
    logged: list[tuple[int, float]] = []

    class Watch(Toy):
        def log_dict(self, dictionary: Any, *args: Any, **options: Any) -> None:
            if "nowcast/horizon" in dictionary:
                logged.append((self.global_step, dictionary["nowcast/horizon"]))
            super().log_dict(dictionary, *args, **options)

    callback = NowcastCallback(LinearFit(), module="model", period=5)
    trainer = fit(Watch(), tmp_path, [callback], steps=20)
    assert logged == list(zip([5, 10, 15, 20], Decay().table(20, 5), strict=True))
    assert trainer.logged_metrics["nowcast/horizon"] == 1
    assert not trainer.optimizers[0]._optimizer_step_post_hooks  # nothing is left behind


@pytest.mark.parametrize("returns", ["loss", "dict", "none", "function"])
def test_lightning_judges_by_the_validation_loss(tmp_path: Path, returns: str) -> None:
    """Mean of the first batches, and no trace in metrics, modes or generators."""
    module, other = Toy(returns=returns), Toy(returns=returns)
    if returns == "function":
        module, other = Toy(), Toy()

    def judge(m: Any) -> Tensor:
        assert not torch.is_grad_enabled()
        return m._loss(points(10, 5)[:])

    callback = NowcastCallback(
        Shift(5.0), module="model", held=judge if returns == "function" else 2,
        monitor="val/loss" if returns == "none" else None, guard={"attempts": 2}, **JUMPS,
    )  # fmt: skip
    fit(module, tmp_path, [callback], steps=16, val_check_interval=4)
    fit(other, tmp_path, [], steps=16, val_check_interval=4)
    assert [(j.tried, j.horizon) for j in callback.jumps] == [((3, 1), 0)] * 3
    assert module.seen == other.seen
    assert len(module.seen) >= 4
    for a, b in zip(module.path, other.path, strict=True):
        assert_equal(a, b)
    assert all(j.before is not None and j.after is not None for j in callback.jumps)
    assert callback.jumps[0].after > callback.jumps[0].before


class Headed(Toy):
    """What moves is a part; the loss runs more, which batch normalisation and dropout are in."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5))

    def _loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.head(self.model(batch[0])), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        assert not self.training and not self.head.training
        return super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("how", ["batches", "function", "guard"])
def test_lightning_guards_a_part_with_the_whole(tmp_path: Path, how: str) -> None:
    module, other = Headed(), Headed()
    given: dict[str, Any] = {
        "batches": {"held": 2},
        "function": {"held": lambda m: m._loss(points(10, 5)[:])},
        "guard": {"guard": Guard(lambda: module._loss(points(10, 5)[:]))},
    }[how]
    callback = NowcastCallback(NoChange(), module="model", on_error="raise", **given, **JUMPS)
    fit(module, tmp_path, [callback], steps=11)
    fit(other, tmp_path, [], steps=11)
    assert [(j.horizon, j.before == j.after) for j in callback.jumps] == [(3, True)] * 2
    assert_equal(other.state_dict(), module.state_dict())


def test_lightning_says_what_it_misses(tmp_path: Path) -> None:
    with pytest.raises(NowcastError, match="guard and held"):
        NowcastCallback(LinearFit(), held=2, guard=Guard(lambda: 0.0))
    with pytest.raises(NowcastError, match="guard and held"):
        NowcastCallback(LinearFit(), guard={"attempts": 2})
    with pytest.raises(TypeError, match="perio"):
        NowcastCallback(LinearFit(), perio=2)
    callback = NowcastCallback(LinearFit(), module="model", held=2, on_error="raise", **JUMPS)
    with pytest.raises(NowcastError, match=r"gives no loss[\s\S]*'val/loss', 'val/mean'"):
        fit(Toy(returns="none"), tmp_path, [callback], steps=6)


def test_lightning_goes_on_where_the_trainer_fits_again(tmp_path: Path) -> None:
    def loaders() -> list[Any]:
        return [DataLoader(points(64, 1), batch_size=8), DataLoader(points(30, 2), batch_size=10)]

    module, callback = Toy(), NowcastCallback(LinearFit(), module="model", **JUMPS)
    trainer = fit(module, tmp_path, [callback], steps=7)
    assert [j.step for j in callback.jumps] == [5]
    trainer.fit_loop.epoch_loop.max_steps = 12
    trainer.fit(module, *loaders())
    assert trainer.global_step == 12
    assert [(j.step, j.horizon) for j in callback.jumps] == [(5, 3), (10, 3)]
    fit(module, tmp_path, [callback], steps=6)  # another trainer is another run
    assert [(j.step, j.horizon) for j in callback.jumps] == [(5, 3)]


class Restless(Dataset[tuple[Tensor, Tensor]]):
    """Draws from every generator there is."""

    def __len__(self) -> int:
        return 30

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        noise = random.random() + np.random.rand()  # noqa: NPY002
        return torch.randn(3) + noise, torch.full((2,), float(i))


def test_lightning_reads_held_batches_without_a_trace_in_generators(tmp_path: Path) -> None:
    found: list[Any] = []
    for seed in (0, 1):
        seed_everything(seed, verbose=False)
        trainer = Trainer(
            accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False,
            default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False,
            num_sanity_val_steps=0, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(Toy(), DataLoader(points(64, 1), 8), DataLoader(Restless(), 10, shuffle=True))
        trainer.limit_val_batches = 1.0
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
        found.append(_first(trainer, 2))
        after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
        assert before[:2] == after[:2]
        assert torch.equal(before[2], after[2])
    for (x, i), (y, j) in zip(*found, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(i, j)


@pytest.mark.parametrize("stop", [3, 5, 8, 9])
@pytest.mark.parametrize("how", ["callback", "optimizer"])
def test_lightning_resumes_bit_identically(tmp_path: Path, stop: int, how: str) -> None:
    def run(steps: int, ckpt_path: Any = None) -> tuple[Toy, Trainer, list[Jump]]:
        options = {**JUMPS, "horizon": Decay(9), "total_steps": 16}
        module = Toy(wrap={"predictor": LinearFit(), **options} if how == "optimizer" else None)
        module.model[3].p = 0.0  # generators are the trainer's business
        callback = NowcastCallback(
            LinearFit(), module="model", held=2, guard={"tolerance": 0.5}, **options
        )
        callbacks = [callback] if how == "callback" else []
        trainer = fit(module, tmp_path, callbacks, steps=steps, ckpt_path=ckpt_path, batch=64)
        jumps = callback.jumps if callbacks else trainer.optimizers[0].jumps
        return module, trainer, jumps

    whole, _, jumps = run(16)
    _, trainer, _ = run(stop)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    resumed, _, again = run(16, tmp_path / "saved.ckpt")
    for a, b in zip(whole.path[stop:], resumed.path, strict=True):
        assert_equal(a, b)
    assert [j.step for j in jumps] == [5, 10, 15]
    assert any(j.horizon for j in jumps)
    without = [[(j.step, j.tried, j.horizon, j.before, j.after) for j in x] for x in (jumps, again)]
    assert without[0] == without[1]


SOON: dict[str, Any] = {"predictor": Drift(begin=4, every=2, short=0.5, long=0.9), "period": 4}


def test_lightning_validates_and_ends_at_the_averages(tmp_path: Path) -> None:
    """The path is that of a nowcaster that the module makes; what is validated is not."""
    inner = Toy(wrap=SOON)
    trainer = fit(inner, tmp_path, [], steps=24)
    optimizer: Any = trainer.optimizers[0]
    found: dict[bool, tuple[Toy, NowcastCallback]] = {}
    for averaged in (True, False):
        module = Toy()
        callback = NowcastCallback(module="model", averaged=averaged, **SOON)
        fit(module, tmp_path, [callback], steps=24)
        for a, b in zip(inner.path, module.path, strict=True):
            assert_equal(a, b)
        found[averaged] = module, callback
    assert [j.step for j in found[True][1].jumps] == [4, 8, 12, 16, 20, 24]
    assert found[True][0].seen[0] == found[False][0].seen[0]  # the sanity check, before training
    assert all(
        a != b for a, b in zip(found[True][0].seen[1:], found[False][0].seen[1:], strict=True)
    )
    assert found[False][0].seen == inner.seen
    assert_equal(snapshot(found[False][0].model), inner.path[-1])
    shown, at = [], inner.path[-1]
    with optimizer.averaged():
        shown.append(snapshot(inner.model))
    assert_equal(shown[0], snapshot(found[True][0].model))
    assert not all(torch.equal(shown[0][n], at[n]) for n in at)
    assert not found[True][1].core.averages._clocks
    assert not trainer.optimizers[0].core._away


def test_lightning_gives_back_what_is_trained_where_validation_fails(tmp_path: Path) -> None:
    class Fails(Toy):
        def on_validation_epoch_end(self) -> None:
            if len(self.path) > 6:
                raise ValueError("validation")

    module = Fails()
    with pytest.raises(ValueError, match="validation"):
        fit(module, tmp_path, [NowcastCallback(module="model", **SOON)], steps=24)
    assert_equal(module.path[-1], snapshot(module.model))


@pytest.mark.parametrize("stop", [3, 4, 8, 9])
def test_lightning_resumes_a_drift_bit_identically(tmp_path: Path, stop: int) -> None:
    def run(steps: int, ckpt_path: Any = None) -> tuple[Toy, list[Jump]]:
        module = Toy()
        module.model[3].p = 0.0
        callback = NowcastCallback(module="model", **SOON)

        class Saves(Callback):
            def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
                if trainer.global_step == stop and steps == stop:
                    trainer.save_checkpoint(tmp_path / "saved.ckpt")

        fit(module, tmp_path, [callback, Saves()], steps=steps, ckpt_path=ckpt_path, batch=64)
        return module, callback.jumps

    whole, jumps = run(16)
    run(stop)
    resumed, again = run(16, tmp_path / "saved.ckpt")
    for a, b in zip(whole.path[stop:], resumed.path, strict=True):
        assert_equal(a, b)
    assert_equal(snapshot(whole.model), snapshot(resumed.model))
    assert [(j.step, j.horizon) for j in jumps] == [(j.step, j.horizon) for j in again]
    assert [j.step for j in jumps] == [4, 8, 12, 16]


# --- Hugging Face -------------------------------------------------------------


class Pairs(Dataset[dict[str, Tensor]]):
    def __init__(self, count: int, seed: int) -> None:
        self.x, self.y = points(count, seed).tensors

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": self.x[i], "labels": self.y[i]}


class Regression(nn.Module):
    """What the trainer takes: a module that gives its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.model = net(dropout=0.0)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.model(x)
        return {"loss": nn.functional.mse_loss(y, labels), "logits": y}


def hf(
    folder: Path, *, steps: int, resume: Any = None, how: str = "callback", accumulate: int = 1,
    **options: Any,
) -> tuple[Regression, Any, list[Jump]]:  # fmt: skip
    from transformers import Trainer as HFTrainer
    from transformers import TrainingArguments

    torch.manual_seed(0)
    model = Regression()
    options = {**JUMPS, **options}
    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, save_steps=1,
        learning_rate=0.02, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=100,
        gradient_accumulation_steps=accumulate, lr_scheduler_type="constant", save_strategy="steps",
        dataloader_pin_memory=False,
    )  # fmt: skip
    given: dict[str, Any] = {}
    nowcaster: Any = None
    if how == "callback":
        nowcaster = trainer_callback(LinearFit(), **options)
        given["callbacks"] = [nowcaster]
    elif how == "optimizers":
        base = torch.optim.AdamW(model.parameters(), lr=0.02)
        nowcaster = Nowcaster(base, model, None, LinearFit(), **options)
        schedule = torch.optim.lr_scheduler.LambdaLR(nowcaster, lambda s: 1 / (1 + 0.1 * s))
        given["optimizers"] = (nowcaster, schedule)
    trainer = HFTrainer(model=model, args=args, train_dataset=Pairs(32, 1), **given)
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer, [] if nowcaster is None else nowcaster.jumps


def brief(jumps: list[Jump]) -> list[Any]:
    return [(j.step, j.tried, j.horizon, j.before, j.after) for j in jumps]


@pytest.mark.parametrize("how", ["callback", "optimizers"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_hf_jumps_after_real_steps_and_resumes(tmp_path: Path, how: str, accumulate: int) -> None:
    options: dict[str, Any] = {"how": how, "accumulate": accumulate, "steps": 13}
    if how == "callback":
        options |= {"held": Pairs(9, 5)[:], "guard": {"tolerance": 0.3}}
    whole, trainer, jumps = hf(tmp_path, **options)
    assert [j.step for j in jumps] == [5, 10]
    assert any(j.horizon for j in jumps)
    plain, *_ = hf(tmp_path / "plain", how="none", accumulate=accumulate, steps=13)
    assert any(
        not torch.equal(p, q) for p, q in zip(whole.parameters(), plain.parameters(), strict=True)
    )
    for stop in (4, 5, 8):
        folder = tmp_path / f"checkpoint-{stop}"
        resumed, other, again = hf(tmp_path, resume=str(folder), **options)
        assert_equal(whole.state_dict(), resumed.state_dict())
        assert brief(again) == brief(jumps)
        if how == "callback":  # each jump once
            for state in (trainer.state, other.state):
                logged = [x for x in state.log_history if "nowcast/horizon" in x]
                found = [(x["step"], x["nowcast/horizon"]) for x in logged]
                assert found == [(j.step, j.horizon) for j in jumps]
    if how == "callback":
        assert (tmp_path / "checkpoint-8" / "nowcast.safetensors").exists()
        assert json.loads((tmp_path / "checkpoint-8" / "nowcast.json").read_text())["step"] == 8
        hook = trainer.optimizer.optimizer._optimizer_step_post_hooks
        assert not hook


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_hf_evaluates_and_ends_at_the_averages(tmp_path: Path, strategy: str) -> None:
    from transformers import Trainer as HFTrainer
    from transformers import TrainerCallback, TrainingArguments

    torch.manual_seed(0)
    model = Regression()
    nowcaster = trainer_callback(**SOON)
    paths: dict[str, list[Any]] = {"trained": [], "seen": [], "averages": [], "saved": []}

    class Watch(TrainerCallback):
        """Before the nowcaster's: sees what is trained, and what it keeps."""

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            paths["trained"].append(snapshot(model))

        def on_prediction_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            core = nowcaster.core
            paths["seen"].append({n: p.detach().clone() for n, p in model.named_parameters()})
            paths["averages"].append({n: x.clone() for n, x in core.averages._short.items()})

        def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            paths["saved"].append(snapshot(model))

    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=16, per_device_train_batch_size=4, save_steps=8,
        learning_rate=0.02, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=100,
        lr_scheduler_type="constant", save_strategy="steps", dataloader_pin_memory=False,
        eval_strategy=strategy, eval_steps=8, per_device_eval_batch_size=16,
    )  # fmt: skip
    trainer = HFTrainer(
        model=model, args=args, train_dataset=Pairs(32, 1), eval_dataset=Pairs(16, 2),
        callbacks=[Watch(), nowcaster],
    )  # fmt: skip
    trainer.train()
    assert len(paths["seen"]) == 2
    assert len(nowcaster.jumps) == 4
    assert not [x for x in trainer.state.log_history if "nowcast/horizon" in x]
    for seen, average in zip(paths["seen"], paths["averages"], strict=True):
        assert_equal(seen, average)
    for saved, step in zip(paths["saved"], (8, 16), strict=True):
        assert_equal(saved, paths["trained"][step - 1])
        assert not torch.equal(
            saved["model.0.weight"], paths["seen"][step // 8 - 1]["model.0.weight"]
        )
    assert_equal(paths["averages"][-1], {n: p.detach() for n, p in model.named_parameters()})


@pytest.mark.parametrize("told", [True, False])
def test_hf_evaluates_on_several_sets_and_keeps_the_best(tmp_path: Path, told: bool) -> None:
    """Each set at the averages if their number is told; the best checkpoint stays in the model."""
    from transformers import Trainer as HFTrainer
    from transformers import TrainerCallback, TrainingArguments

    torch.manual_seed(0)
    model = Regression()
    nowcaster = trainer_callback(**SOON, evaluations=2 if told else 1)
    averaged: list[bool] = []

    class Watch(TrainerCallback):
        def on_prediction_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            short = nowcaster.core.averages._short["model.0.weight"]
            averaged.append(torch.equal(model.model[0].weight, short))

    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=16, per_device_train_batch_size=4, save_steps=8,
        learning_rate=0.02, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=100,
        lr_scheduler_type="constant", save_strategy="steps", dataloader_pin_memory=False,
        eval_strategy="steps", eval_steps=8, per_device_eval_batch_size=16,
        load_best_model_at_end=True, metric_for_best_model="a_loss",
    )  # fmt: skip
    trainer = HFTrainer(
        model=model, args=args, train_dataset=Pairs(32, 1),
        eval_dataset={"a": Pairs(16, 2), "b": Pairs(16, 3)}, callbacks=[Watch(), nowcaster],
    )  # fmt: skip
    if told:
        trainer.train()
    else:
        with pytest.warns(UserWarning, match="evaluations=N"):
            trainer.train()
    assert averaged == [True, told] * 2
    best = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    assert_equal(best, snapshot(model))


def test_hf_gets_back_what_is_trained_after_an_evaluation_that_fails(tmp_path: Path) -> None:
    from transformers import Trainer as HFTrainer
    from transformers import TrainerCallback, TrainingArguments

    torch.manual_seed(0)
    model = Regression()
    nowcaster = trainer_callback(**SOON)
    trained: list[dict[str, Tensor]] = []

    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            trained.append(snapshot(model))

        def on_prediction_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            raise MemoryError("evaluation")

    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=16, per_device_train_batch_size=4, report_to=[],
        learning_rate=0.02, use_cpu=True, disable_tqdm=True, save_strategy="no",
        dataloader_pin_memory=False, eval_strategy="steps", eval_steps=12,
    )  # fmt: skip
    trainer = HFTrainer(
        model=model, args=args, train_dataset=Pairs(64, 1), eval_dataset=Pairs(16, 2),
        callbacks=[Fails(), nowcaster],
    )  # fmt: skip
    with pytest.raises(MemoryError, match="evaluation"):
        trainer.train()
    shown = snapshot(model)
    nowcaster.put_back()
    assert_equal(trained[-1], snapshot(model))
    assert not torch.equal(shown["model.0.weight"], trained[-1]["model.0.weight"])


def test_hf_resumes_elsewhere_and_without_a_state(tmp_path: Path) -> None:
    _, _, jumps = hf(tmp_path / "a", steps=11)
    with pytest.warns(UserWarning, match="counted from zero"):
        (tmp_path / "a" / "checkpoint-7" / "nowcast.json").unlink()
        _, _, again = hf(tmp_path / "a", steps=11, resume=str(tmp_path / "a" / "checkpoint-7"))
    assert again == []
    assert [j.step for j in jumps] == [5, 10]


def test_hf_decays_over_the_trainers_steps_and_refuses_contradictions(tmp_path: Path) -> None:
    _, _, jumps = hf(tmp_path, steps=20, horizon=Decay(9))
    assert tuple(j.horizon for j in jumps) == Decay(9).table(20, 5)
    with pytest.raises(NowcastError, match="guard and held"):
        trainer_callback(LinearFit(), guard={"attempts": 1})
    with pytest.raises(TypeError, match="perio"):
        trainer_callback(LinearFit(), perio=2)


def test_files_of_the_state_are_read_or_refused(tmp_path: Path) -> None:
    model = net()
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = Nowcaster(base, model, None, LinearFit(), **JUMPS)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for _ in range(8):
        optimizer.step()
    state = optimizer.core.state_dict()
    save(state, tmp_path)
    found = load(tmp_path)
    assert found is not None
    assert found["step"] == 8
    for name, past in state["history"]["tensors"].items():
        for x, y in zip(past, found["history"]["tensors"][name], strict=True):
            assert torch.equal(x, y)
    other = Nowcaster(base, model, None, LinearFit(), **JUMPS)
    other.core.load_state_dict(found)
    assert brief(other.jumps) == brief(optimizer.jumps)
    assert other.core.history.filled == 3
    assert load(tmp_path / "missing") is None
    (tmp_path / "nowcast.safetensors").write_bytes(b"12")
    with pytest.raises(NowcastError, match="cannot be read"):
        load(tmp_path)
