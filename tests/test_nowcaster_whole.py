"""A jump leaves what it should not touch: what is around a part, frozen layers, loaders."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.test_nowcaster import Shift, assert_equal, data, loss_of, net, snapshot, train
from wspace.errors import NowcastError
from wspace.nowcast import Guard, NoChange, Nowcaster, kept


class Around(nn.Module):
    """A part that moves, and around it what the guard's loss runs as well."""

    def __init__(self) -> None:
        super().__init__()
        self.part = net()
        self.head = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(x))


@pytest.mark.parametrize("how", ["around", "beside", "within"])
def test_a_guard_may_run_more_than_the_part_that_moves(how: str) -> None:
    """The larger model is evaluated, and is as before; the loss is the same each time."""
    torch.manual_seed(0)
    whole = Around()
    whole.head[2].eval()
    modes: list[bool] = []
    losses: list[float] = []

    def loss() -> Tensor:
        modes.append(whole.head.training or whole.part.training)
        found = nn.functional.mse_loss(whole(data(99)[0]), data(99)[1])
        losses.append(float(found))
        return found

    module = {"around": whole, "beside": whole.head, "within": whole.part}[how]
    base = torch.optim.SGD(whole.part.parameters(), lr=0.0)
    guard = Guard(loss, module=module)
    optimizer = Nowcaster(base, whole.part, None, NoChange(), period=5, horizon=1, guard=guard)
    train(whole, optimizer, range(4))
    loss_of(whole, 4).backward()
    before, drawn = snapshot(whole), torch.get_rng_state()
    optimizer.step()
    assert [j.reason for j in optimizer.jumps] == ["accepted"]
    if how == "within":  # nothing more than the part: the rest is as it was trained
        assert modes == [True, True]
        return
    assert modes == [False, False]
    assert losses[0] == losses[1]
    assert_equal(before, whole.state_dict())
    assert torch.equal(drawn, torch.get_rng_state())
    assert whole.head.training and whole.part.training and not whole.head[2].training
    assert [type(m) for m in whole.children()] == [nn.Sequential, nn.Sequential]


def test_a_guards_module_is_a_module() -> None:
    wrong: Any = "model"
    with pytest.raises(NowcastError, match=r"nn\.Module"):
        Guard(lambda: 0.0, module=wrong)
    assert "module" not in repr(Guard(float, module=nn.Linear(1, 1)))


def test_refresh_leaves_frozen_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2), nn.BatchNorm1d(2))
    model[1].eval()
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = Nowcaster(
        base, model, None, NoChange(), period=5, horizon=1, refresh=[data(0), data(1)]
    )
    train(model, optimizer, range(5))
    assert optimizer.jumps[0].reason == "accepted"
    assert not model[1].training and model[3].training
    assert not model[1].running_mean.any() and int(model[1].num_batches_tracked) == 0
    assert int(model[3].num_batches_tracked) == 2


class Masked(nn.Module):
    """With buffers of which entries share memory; one of them changes in every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net(dropout=0.0)
        self.register_buffer("mask", torch.ones(1, 2).expand(11, 2))
        self.count = torch.zeros(1)
        self.register_buffer("counts", self.count.expand(3))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return self.inner(x) * self.mask[: len(x)] + 0 * self.counts.sum()


@pytest.mark.parametrize("choose", ["first", "best"])
@pytest.mark.parametrize("rises", [False, True])
def test_buffers_may_be_expanded_views(choose: Any, rises: bool) -> None:
    torch.manual_seed(0)
    model = Masked()
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = iter(range(9) if rises else range(9, 0, -1))

    def loss() -> int:
        model(data(3)[0])
        return next(losses)

    guard = Guard(loss, choose=choose)
    optimizer = Nowcaster(
        base, model, None, Shift(0.1), period=5, horizon=4, guard=guard, on_error="raise"
    )
    train(model, optimizer, range(5))
    assert bool(optimizer.jumps[0].horizon) != rises
    assert model.mask.stride() == (0, 1)
    assert model.counts.tolist() == [5.0] * 3 and float(model.count) == 5


@pytest.mark.parametrize("own_sampler", [False, True])
def test_a_rejected_jump_draws_nothing_from_the_loader_of_refresh(own_sampler: bool) -> None:
    def run(*, wrap: bool) -> tuple[nn.Module, list[list[float]]]:
        model = net(dropout=0.0)
        generator = torch.Generator().manual_seed(5)
        rows = TensorDataset(*data(0))
        sampler = torch.utils.data.RandomSampler(rows, generator=generator)
        how: dict[str, Any] = (
            {"sampler": sampler} if own_sampler else {"shuffle": True, "generator": generator}
        )
        loader = DataLoader(rows, 4, **how)
        base: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        optimizer, losses, means = base, iter(range(99)), list[list[float]]()

        def loss() -> int:
            means.append(model[1].running_mean.tolist())
            return next(losses)

        if wrap:
            optimizer = Nowcaster(
                base, model, None, NoChange(), period=5, horizon=4, guard=Guard(loss),
                refresh=loader,
            )  # fmt: skip
        for _ in range(5):
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.mse_loss(model(x), y).backward()
                optimizer.step()
        return model, means

    plain, _ = run(wrap=False)
    model, means = run(wrap=True)
    assert_equal(plain.state_dict(), model.state_dict())
    assert len(means) == 3 * 4
    assert means[0] != means[1] == means[2] == means[3]  # each horizon with the same batches


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("entries", [1, kept.ENTRIES])
def test_an_interruption_while_writing_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch, kind: type[BaseException], entries: int
) -> None:
    """Neither guard nor refresh, so that nothing else holds a copy."""
    model = net()
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer = Nowcaster(base, model, None, Shift(1.0), period=5, horizon=3, on_error="raise")
    train(model, optimizer, range(4))
    twin, other = copy.deepcopy((model, base))
    for m in (model, twin):
        torch.manual_seed(1)
        m.zero_grad()
        loss_of(m, 4).backward()
    other.step()
    monkeypatch.setattr(kept, "ENTRIES", entries)
    calls: list[int] = []
    real = kept.copy_all

    def failing(into: list[Tensor], values: list[Tensor]) -> None:
        calls.append(len(into))
        if len(calls) == (2 if entries == 1 else 1):  # the second tensor is not written
            real(into[:1], values[:1])
            raise kind("in the middle")
        real(into, values)

    monkeypatch.setattr(kept, "copy_all", failing)
    with pytest.raises(kind, match="in the middle"):
        optimizer.step()
    assert calls == ([1, 1, 2, 0] if entries == 1 else [6, 6, 0])
    assert_equal(twin.state_dict(), model.state_dict())
    monkeypatch.undo()
    train(model, optimizer, range(5, 10))
    assert optimizer.jumps[-1].horizon == 3


@pytest.mark.parametrize("fails", [False, True])
def test_values_are_written_in_all_processes_or_in_none(fails: bool) -> None:
    def together(work: Callable[[], None]) -> None:
        work()
        if fails:
            raise NowcastError("the jump failed in another process")

    live = {str(i): torch.full((3,), float(i)) for i in range(4)}
    values = {n: x + 1 for n, x in live.items()}
    with pytest.raises(NowcastError) if fails else nullcontext():
        kept.write_whole(live, values, together)
    assert not values  # let go as they were used up
    assert [float(x[0]) for x in live.values()] == [i + (not fails) for i in range(4)]
