"""Pruning in stages while Lightning trains: amounts, zeros, the curve, resumption, compaction."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import wspace
from wspace.demo import digits
from wspace.errors import PruneError
from wspace.lit import GroupSparsityCallback, IterativePruning, NowcastCallback
from wspace.lit.pruning import cubic
from wspace.nowcast import LinearFit
from wspace.prune import Cost, GroupSparsity, Magnitude, Restriction, Selection, carry, prune
from wspace.report import plot_pruning

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*litlogger"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
EXAMPLE = torch.zeros(1, 1, 8, 8)


def network(*, norm: bool = False) -> nn.Sequential:
    """With a LayerNorm, gradients of units that are off are not zero."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 20),
        nn.LayerNorm(20) if norm else nn.Identity(), nn.ReLU(), nn.Linear(20, 10),
    )  # fmt: skip


SPACE = wspace.trace(network().eval(), EXAMPLE)
NORMED = wspace.trace(network(norm=True).eval(), EXAMPLE)


class Digits(LightningModule):
    def __init__(self, *, manual: bool = False, norm: bool = False) -> None:
        super().__init__()
        self.model = network(norm=norm)
        self.automatic_optimization = not manual

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        right = (self.model(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("accuracy", right)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.model.parameters(), lr=5e-3, weight_decay=0.1)


class Watch(Callback):
    """What is there after every step: zeros, moments, weights."""

    def __init__(self, prune: IterativePruning) -> None:
        self.prune = prune
        self.kept: list[dict[str, int]] = []
        self.worst = self.zeros = 0.0
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        few = self.prune.restriction
        self.states.append({n: x.clone() for n, x in pl_module.model.state_dict().items()})
        if few is None:
            return
        self.kept.append(few.counts())
        known = dict(pl_module.model.named_parameters())
        for p in few.touched:
            off = few.zeroed(p)
            self.zeros = max(self.zeros, float(known[p.name].detach()[off].abs().max()))
            moments = trainer.optimizers[0].state[known[p.name]]
            for x in (known[p.name].detach(), moments["exp_avg"], moments["exp_avg_sq"]):
                self.worst = max(self.worst, float(x[off].abs().max()))


def data(count: int = 320) -> tuple[Any, Any]:
    images, labels, test, truth = digits()
    train = DataLoader(TensorDataset(images[:count], labels[:count]), batch_size=64)
    return train, DataLoader(TensorDataset(test, truth), batch_size=360)


def fit(
    module: LightningModule, callbacks: list[Any], *, epochs: int, ckpt: Any = None, **options: Any
) -> Trainer:
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=callbacks, logger=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    trainer.fit(module, *data(), ckpt_path=ckpt)
    return trainer


def made(space: wspace.WeightSpace = SPACE, **options: Any) -> IterativePruning:
    chosen = {"steps": 3, "start": 1, "repeats": 0, "monitor": "accuracy"} | options
    selection = chosen.pop("selection", Selection(amount=0.6))
    importance = chosen.pop("importance", "magnitude")
    return IterativePruning(space, importance, selection, **chosen)


@pytest.fixture(autouse=True)
def seeded() -> None:
    seed_everything(1, verbose=False)


# ------------------------------------------------------------------------------ stages


@pytest.mark.parametrize("importance", ["magnitude", "random"])
def test_stages_reach_their_amounts_and_nothing_comes_back(importance: str) -> None:
    callback = made(NORMED, importance=importance)
    watch = Watch(callback)
    fit(Digits(norm=True), [callback, watch], epochs=5)
    assert watch.worst == 0.0  # weights and moments of what is off, after each of the steps
    total = sum(callback.curve[0].kept.values())
    shares = [1 - p.units / total for p in callback.curve]
    assert [round(s, 1) for s in shares] == [0.0, 0.2, 0.4, 0.6]
    assert [p.step for p in callback.curve] == [0, 5, 10, 15]
    for a, b in zip(watch.kept, watch.kept[1:], strict=False):
        assert all(b[g] <= a[g] for g in a)


def test_units_that_are_off_stay_off() -> None:
    class Changing:  # another order at every stage, worst first
        calls = 0

        def __call__(self, module: nn.Module, space: Any) -> dict[str, Tensor]:
            self.calls += 1
            g = torch.Generator().manual_seed(self.calls)
            return {n: torch.randn(x.size, generator=g) - 5 for n, x in space.groups.items()}

    callback, seen = made(importance=Changing()), list[Restriction]()

    class Seen(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if callback.restriction is not None:
                seen.append(callback.restriction)

    fit(Digits(), [callback, Seen()], epochs=4)
    assert len(seen) == 3
    for a, b in zip(seen, seen[1:], strict=False):
        assert all(not bool((b.keep[g] & ~a.keep[g]).any()) for g in a.keep)
        assert sum(b.counts().values()) < sum(a.counts().values())


def test_the_curve_is_what_a_recount_gives() -> None:
    callback = made(repeats=2, selection=Selection(amount=0.5, of="flops"), schedule=cubic)
    module = Digits()
    trainer = fit(module, [callback], epochs=5)
    cost = Cost.measured(network(), SPACE, EXAMPLE)
    for point, share in zip(callback.curve, [0, *callback.amounts], strict=True):
        assert point.parameters == cost.parameters(point.kept)
        assert point.macs == cost.macs(point.kept) <= (1 - 0.5 * share) * cost.macs()
        assert point.latency is not None and point.latency[0] > 0
    assert callback.curve[-1].metric == pytest.approx(float(trainer.callback_metrics["accuracy"]))
    small = callback.compact(module)
    assert sum(x.numel() for x in small.parameters()) == callback.curve[-1].parameters


def test_steps_of_the_optimizer_and_manual_optimization() -> None:
    callback = made(unit="step", start=3, every=4)
    watch = Watch(callback)
    fit(Digits(manual=True), [callback, watch], epochs=3)
    assert [p.step for p in callback.curve] == [0, 3, 7, 11] and watch.worst == 0.0


def test_before_the_first_stage_training_is_what_it_was() -> None:
    callback = made(start=1)
    watch, plain = Watch(callback), Watch(made(start=9))
    fit(Digits(), [callback, watch], epochs=2)
    seed_everything(1, verbose=False)
    fit(Digits(), [plain], epochs=2)
    for a, b in zip(watch.states[:5], plain.states[:5], strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)
    assert any(not torch.equal(watch.states[5][n], plain.states[5][n]) for n in plain.states[5])


@pytest.mark.parametrize("first", [True, False])
def test_jumps_and_pruning_go_together(first: bool) -> None:
    callback = made(NORMED, every=1, steps=2)
    jumps = NowcastCallback(LinearFit(context=3), module="model", period=3, horizon=5)
    watch, order = Watch(callback), [callback, jumps] if first else [jumps, callback]
    fit(Digits(norm=True), [*order, watch], epochs=4)
    assert len(jumps.jumps) >= 5 and any(j.horizon > 0 for j in jumps.jumps)
    assert watch.zeros == 0.0 and len(watch.kept) == 15


def test_what_others_move_is_off_again_before_anyone_looks() -> None:
    callback = made(steps=1)
    watch = Watch(callback)

    class Mover(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 2:  # its hook runs after that of the mask
                trainer.optimizers[0].register_step_post_hook(lambda *_: self.move(pl_module))

        @torch.no_grad()
        def move(self, pl_module: LightningModule) -> None:
            for p in pl_module.parameters():
                p.add_(0.01)

    fit(Digits(), [Mover(), callback, watch], epochs=3)
    assert watch.zeros == 0.0 and len(watch.kept) == 10


def test_clipping_sees_no_gradient_of_what_is_off() -> None:
    callback = made(NORMED, steps=1)
    seen: list[float] = []

    class Norms(Callback):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            few, known = callback.restriction, dict(pl_module.model.named_parameters())
            for p in () if few is None else few.touched:
                if (grad := known[p.name].grad) is not None:
                    seen.append(float(grad[few.zeroed(p)].abs().max()))

    fit(Digits(norm=True), [callback, Norms()], epochs=3, gradient_clip_val=0.1)
    assert seen and max(seen) == 0.0


# ---------------------------------------------------------------------------- resumption


def test_a_run_that_is_resumed_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole, module = made(NORMED, every=2), Digits(norm=True)
    first = {n: x.clone() for n, x in module.state_dict().items()}
    fit(module, [whole], epochs=6)
    wanted = {n: x.clone() for n, x in module.state_dict().items()}

    part = made(NORMED, every=2)
    module.load_state_dict(first)
    saved = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    fit(module, [part, saved], epochs=2)  # between the first stage and the second
    again, other = made(NORMED, every=2), Digits(norm=True)
    watch = Watch(again)
    fit(other, [again, watch], epochs=6, ckpt=tmp_path / "epoch=1.ckpt")
    assert watch.worst == 0.0
    assert [p.plain() for p in again.curve] == [p.plain() for p in whole.curve]
    assert all(torch.equal(x, wanted[n]) for n, x in other.state_dict().items())
    with pytest.raises(PruneError, match="another run"):
        made(NORMED, steps=1).load_state_dict(again.state_dict())


# ---------------------------------------------------------------------------- compaction


def test_the_small_module_computes_the_same_and_trains_on() -> None:
    callback, module = made(), Digits()
    trainer = fit(module, [callback], epochs=4)
    x = digits()[2][:50]
    module.eval()
    before, large = module.model(x), module.model
    optimizer = trainer.optimizers[0]
    moments = optimizer.state[large[0].weight]["exp_avg"].clone()
    few = callback.restriction
    assert few is not None
    small = callback.compact(module, optimizer)
    assert module.model is small and sum(p.numel() for p in small.parameters()) < 0.5 * sum(
        p.numel() for p in large.parameters()
    )
    torch.testing.assert_close(module.model(x), before, rtol=1e-4, atol=1e-5)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in small.parameters()]
    assert set(optimizer.state) == set(held)
    cut = few.cut(SPACE["0.weight"], moments)
    assert torch.equal(optimizer.state[small[0].weight]["exp_avg"], cut)
    F.cross_entropy(small(x), digits()[3][:50]).backward()
    optimizer.step()
    accuracy = fit(module.train(), [callback], epochs=2).callback_metrics["accuracy"]
    assert module.model is small and accuracy > 0.3  # it can be fitted again, with its callback
    assert len(callback.curve) == 4


def test_an_optimizer_goes_on_as_if_the_network_had_been_small() -> None:
    """Steps after `carry` are those of the masked network, whose gradients are the same."""
    net = network().double().eval()
    space = wspace.trace(net, EXAMPLE.double())
    few = Restriction(space, {"h1": torch.arange(8) % 2 == 0, "h3": torch.arange(20) > 4})
    optimizer = torch.optim.Adam(
        [{"params": net[:3].parameters(), "lr": 1e-2}, {"params": net[3:].parameters()}]
    )
    images, labels, *_ = digits()
    x, y = images[:40].double(), labels[:40]
    mask = wspace.prune.masks.Mask(net, space, few).hold(optimizer)

    def step(module: nn.Module) -> None:
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        mask.again()
        optimizer.step()

    step(net)
    small = prune(net, space, few)
    other = torch.optim.Adam(
        [{"params": net[:3].parameters(), "lr": 1e-2}, {"params": net[3:].parameters()}]
    )
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    carry(other, net, few, small)
    step(net)
    other.zero_grad()
    F.cross_entropy(small(x), y).backward()
    other.step()
    wanted = few.state(dict(net.state_dict()))
    for name, value in small.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-9, atol=1e-12)
    with pytest.raises(PruneError, match="not of the module"):
        carry(torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1), net, few, small)


def test_release_puts_everything_back() -> None:
    class Frozen(Digits):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.model.parameters(), lr=0.0)

    callback, module = made(), Frozen()
    before = {n: x.clone() for n, x in module.model.named_parameters()}
    fit(module, [callback], epochs=4)
    assert any(not torch.equal(x, before[n]) for n, x in module.model.named_parameters())
    callback.release()
    assert all(torch.equal(x, before[n]) for n, x in module.model.named_parameters())


def test_compact_refuses(tmp_path: Path) -> None:
    callback, module = made(), Digits()
    with pytest.raises(PruneError, match="nothing was trained"):
        callback.compact(module)

    class Early(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            with pytest.raises(PruneError, match="fit still runs"):
                callback.compact(pl_module)

    fit(module, [callback, Early()], epochs=2)
    callback.compact(module)
    with pytest.raises(PruneError, match="small already"):
        callback.compact(module)


# ------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "options",
    [{"steps": 0}, {"every": 0}, {"start": -1}, {"unit": "day"}, {"module": ""}, {"repeats": -1},
     {"schedule": lambda t: 0.5 * t}],
)  # fmt: skip
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(PruneError, match="IterativePruning: options that make no sense"):
        made(**options)


def test_what_cannot_be_is_said_when_training_starts() -> None:
    callback = made(selection=Selection(amount=0.9, at_most=0.5, of="parameters"), start=50)
    with pytest.raises(PruneError, match="cannot be"):
        fit(Digits(), [callback], epochs=1)
    with pytest.raises(PruneError, match="nothing is logged as 'loss'"):
        fit(Digits(), [made(monitor="loss")], epochs=1)
    with pytest.raises(wspace.errors.SpaceMismatch):
        fit(Digits(), [made(module="model.0", selection=Selection(amount=0.5))], epochs=2)


# ---------------------------------------------------------------------------- sparsity


def test_sparsity_adds_its_gradient_once_a_step_and_in_its_epochs() -> None:
    found: list[bool] = []
    sparsity = GroupSparsity(SPACE, strength=0.1)

    class Check(Callback):
        def on_before_optimizer_step(
            self, trainer: Trainer, pl_module: Any, optimizer: Any
        ) -> None:
            grads = [p.grad.clone() for p in pl_module.model.parameters()]
            callback.on_before_optimizer_step(trainer, pl_module, optimizer)
            with_it = [p.grad.clone() for p in pl_module.model.parameters()]
            for p, g in zip(pl_module.model.parameters(), grads, strict=True):
                p.grad = g.clone()
            sparsity.add_to_gradients(pl_module.model)
            once = [p.grad for p in pl_module.model.parameters()]
            on = all(torch.equal(a, b) for a, b in zip(with_it, once, strict=True))
            off = all(torch.equal(a, b) for a, b in zip(with_it, grads, strict=True))
            assert on != off
            found.append(on)

    callback = GroupSparsityCallback(SPACE, strength=0.1, start=1, end=2)
    fit(Digits(), [Check()], epochs=3, accumulate_grad_batches=5)
    assert found == [False, True, False]
    with pytest.raises(PruneError, match="epochs that make no sense"):
        GroupSparsityCallback(SPACE, start=2, end=1)


def test_sparsity_makes_weak_units_weaker() -> None:
    spread: list[float] = []
    for strength in (0.0, 0.05):
        seed_everything(1, verbose=False)
        module = Digits()
        fit(module, [GroupSparsityCallback(SPACE, strength=strength)], epochs=4)
        scores = Magnitude()(module.model, SPACE)["h3"]
        spread.append(float(scores.min() / scores.max()))
    assert spread[1] < 0.8 * spread[0]


# ------------------------------------------------------------------------------ picture


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    callback = made(repeats=1)
    fit(Digits(), [callback], epochs=4)
    figure = plot_pruning({"magnitude": callback.curve}, tmp_path / "curve.svg")
    assert (tmp_path / "curve.svg").stat().st_size > 1000
    assert [ax.get_xlabel() for ax in figure.axes] == [
        f"{what} left, %" for what in ("parameters", "MACs", "latency")
    ]
    xs, ys = figure.axes[0].lines[0].get_data()
    wanted = sorted((p.parameters, p.metric) for p in callback.curve)
    largest = callback.curve[0].parameters
    assert [float(x) for x in xs] == pytest.approx([100 * n / largest for n, _ in wanted])
    assert [float(y) for y in ys] == [y for _, y in wanted]
    bare = [dataclasses.replace(p, latency=None) for p in callback.curve]
    assert len(plot_pruning(bare).axes) == 2
    with pytest.raises(PruneError, match="nothing to draw"):
        plot_pruning(bare, against=["latency"])
    with pytest.raises(PruneError, match="no point with a metric"):
        plot_pruning([dataclasses.replace(p, metric=None) for p in bare])
