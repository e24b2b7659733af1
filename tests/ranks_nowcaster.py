"""What each of two processes does for `test_nowcaster_ranks`; results go to files."""

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import wspace
from wspace.nowcast import Decay, Drift, Guard, LinearFit, Nowcaster, Predictor
from wspace.nowcast.predictor import Past

SPACING, CONTEXT = 2, 3
PERIOD = SPACING * CONTEXT


class Spread(Predictor):
    """Moves by the standard deviation of the whole window, along the last movement."""

    def _ahead(self, past: Past, horizon: int) -> Iterator[tuple[str, Tensor]]:
        for name in past.names:
            first, last = past.windows[name][0], past.windows[name][-1]
            mean, std = past.moments[name]
            yield name, last + (last - first) * horizon * std * 3 + 0.01 * mean


class Whole(Predictor):
    """Moves every tensor by a number that depends on all of them; needs the whole model."""

    graphical: ClassVar[bool] = True

    def _ahead(self, past: Past, horizon: int) -> Iterator[tuple[str, Tensor]]:
        assert past.space is not None
        names = {p.name for p in past.space.params}
        assert set(past.windows) == {n for n in names if "running" not in n}
        size = sum(float(x[-1].square().sum()) for x in past.windows.values())
        for name in past.names:
            first, last = past.windows[name][0], past.windows[name][-1]
            yield name, last + (last - first) * horizon * size * 0.1


class Biased(Predictor):
    """Predicts something else in every process."""

    def _ahead(self, past: Past, horizon: int) -> Iterator[tuple[str, Tensor]]:
        for name in past.names:
            yield name, past.windows[name][-1] + 0.01 * horizon * (1 + dist.get_rank())


def mlp(seed: int = 0) -> nn.Sequential:
    """Rows 7 and 1: parts of different sizes, and an empty one."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 1))


def normed(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(3, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Dropout(0.2), nn.Linear(7, 1)
    )


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(6, 3, generator=g), torch.randn(6, 1, generator=g)


def loss(model: nn.Module, step: int, rank: int) -> Tensor:
    x, y = batch(step, rank)
    return nn.functional.mse_loss(model(x), y)


def train(model: nn.Module, optimizer: Any, steps: range, rank: int) -> None:
    for step in steps:
        torch.manual_seed(step * 2 + rank)
        optimizer.zero_grad()
        loss(model, step, rank).backward()
        optimizer.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    """Whole tensors."""
    full = {n: getattr(p, "full_tensor", lambda p=p: p)() for n, p in model.state_dict().items()}
    return {n.removeprefix("module."): x.detach().clone() for n, x in full.items()}


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def log(optimizer: Nowcaster) -> list[Any]:
    return [(j.step, j.tried, j.horizon, j.before, j.after) for j in optimizer.jumps]


# --- DDP ----------------------------------------------------------------------


def replicated(rank: int, **options: Any) -> tuple[Any, Nowcaster]:
    inner = normed()
    model = DistributedDataParallel(inner)
    base = torch.optim.Adam(model.parameters(), lr=0.02)
    options = {"predictor": Biased(context=CONTEXT), "period": PERIOD, "horizon": 4} | options
    return model, Nowcaster(base, model, **options)


def ddp(rank: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    model, optimizer = replicated(rank)
    train(model, optimizer, range(PERIOD), rank)
    out["first process predicts"] = values(model)
    out["held"] = sum(len(s) for s in optimizer.core.history._slots)
    train(model, optimizer, range(PERIOD, 15), rank)
    out["after two jumps"] = values(model)

    def guarded() -> tuple[Any, Nowcaster]:
        model, optimizer = replicated(rank, predictor=LinearFit(context=CONTEXT))
        guard = Guard(lambda: loss(model, 99, rank), tolerance=0.2)
        how: dict[str, Any] = {"guard": guard, "refresh": [batch(98, rank)[0], batch(97, rank)[0]]}
        options: dict[str, Any] = {"period": PERIOD, "horizon": Decay(8), "total_steps": 30}
        fit = LinearFit(context=CONTEXT)
        return model, Nowcaster(optimizer.base, model, None, fit, **options, **how)

    model, optimizer = guarded()
    train(model, optimizer, range(30), rank)
    out["guarded"], out["guarded log"] = values(model), log(optimizer)
    # resumed in both from what the first has saved, in the middle of a window
    one, first = guarded()
    train(one, first, range(9), rank)
    saved = [{"m": one.state_dict(), "o": first.state_dict()}]
    dist.broadcast_object_list(saved, src=0)
    two, second = guarded()
    two.load_state_dict(saved[0]["m"])
    second.load_state_dict(through_a_file(saved[0]["o"]))
    train(two, second, range(9, 30), rank)
    out["resumed"], out["resumed log"] = values(two), log(second)
    out["own loss"] = float(nn.functional.mse_loss(*_answers(rank)))
    out["mean loss"] = _mean_loss(rank)
    return out | failures(rank)


def _answers(rank: int) -> tuple[Tensor, Tensor]:
    x, y = batch(99, rank)
    return normed().eval()(x).detach(), y


def _mean_loss(rank: int) -> float | None:
    """What the guard sees of a model that has not moved."""
    model = DistributedDataParallel(normed())
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    guard = Guard(lambda: loss(model, 99, rank))
    fit = LinearFit(context=CONTEXT)
    optimizer = Nowcaster(base, model, None, fit, period=PERIOD, horizon=1, guard=guard)
    for _ in range(PERIOD):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    return optimizer.jumps[0].before


def failures(rank: int) -> dict[str, Any]:
    """What fails in one process happens in none."""
    out: dict[str, Any] = {}
    for where in ("guard", "refresh", "predict", "nan"):

        def breaks(at: int) -> None:
            if rank == at:
                raise ValueError("only here")

        class Breaks(Biased):
            def _ahead(self, past: Past, horizon: int) -> Iterator[tuple[str, Tensor]]:
                breaks(0)
                return super()._ahead(past, horizon)

        options: dict[str, Any] = {}
        if where == "guard":
            options["guard"] = Guard(lambda: float(breaks(1) or 1.0))
        elif where == "refresh":
            options["refresh"] = lambda: [breaks(1) or batch(5, rank)[0]]
        elif where == "predict":
            options["predictor"] = Breaks(context=CONTEXT)
        else:
            options["guard"] = Guard(lambda: float("nan") if rank == 1 else 0.0)
        model, optimizer = replicated(rank, **options)
        plain = copy.deepcopy(model.module)
        twin = DistributedDataParallel(plain)
        other = torch.optim.Adam(twin.parameters(), lr=0.02)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(model, optimizer, range(PERIOD + 2), rank)
        train(twin, other, range(PERIOD + 2), rank)
        out[f"{where}: log"] = [j.reason.partition(":")[0] for j in optimizer.jumps]
        pairs = zip(values(model).values(), values(twin).values(), strict=True)
        out[f"{where}: as before"] = all(torch.equal(a, b) for a, b in pairs)
    return out


# --- FSDP2 --------------------------------------------------------------------


def predictors() -> dict[str, Callable[[], Predictor]]:
    return {
        "line": lambda: LinearFit(context=CONTEXT),
        "spread": lambda: Spread(context=CONTEXT),
        "whole": lambda: Whole(context=CONTEXT),
    }


def sharded_run(rank: int, kind: str, *, shard: bool, **options: Any) -> tuple[Any, Nowcaster]:
    from torch.distributed.fsdp import fully_shard

    model = mlp()
    space = wspace.trace(model, torch.zeros(2, 3))
    if shard:
        fully_shard(model[0])
        fully_shard(model)
    base = torch.optim.Adam(model.parameters(), lr=0.02)
    if options.pop("guarded", False):
        options["guard"] = Guard(lambda: loss(model, 99, 0), tolerance=0.05)
    options = {"period": PERIOD, "horizon": 5} | options
    return model, Nowcaster(base, model, space, predictors()[kind](), **options)


def fsdp(rank: int) -> dict[str, Any]:
    """All processes see the same data, so that one process alone gives the same result."""
    out: dict[str, Any] = {}
    for kind in predictors():
        for name, options in {
            "": {},
            " guarded": {"guarded": True},
            " rounded": {"history_dtype": torch.bfloat16},
        }.items():
            model, optimizer = sharded_run(rank, kind, shard=True, **options)
            train(model, optimizer, range(20), 0)
            out[f"{kind}{name}"] = values(model)
            out[f"{kind}{name} log"] = log(optimizer)
        model, optimizer = sharded_run(rank, kind, shard=True)
        train(model, optimizer, range(15), 0)
        saved = through_a_file(optimizer.state_dict())
        where = {n: p.to_local().data_ptr() for n, p in model.named_parameters()}
        weights = copy.deepcopy(model.state_dict())
        other, again = sharded_run(rank, kind, shard=True)
        other.load_state_dict(weights)
        again.load_state_dict(saved)
        for m, o in ((model, optimizer), (other, again)):
            train(m, o, range(15, 20), 0)
        out[f"{kind} resumed"] = values(other)
        now = {n: p.to_local().data_ptr() for n, p in model.named_parameters()}
        out[f"{kind} in place"] = now == where
        kept = saved["nowcast"]["history"]["tensors"]["0.weight"][0]
        out[f"{kind} kept"] = (type(kept).__name__, tuple(kept.shape), tuple(kept.to_local().shape))
    return out


# --- drift --------------------------------------------------------------------

AHEAD = Drift(begin=4, every=2, short=0.2, long=0.5, judged=2)


def drifting(rank: int, how: str, **options: Any) -> tuple[Any, Nowcaster]:
    """A run of one process (""), of replicas, or in parts; data are the same in all of them."""
    from torch.distributed.fsdp import fully_shard

    model: Any = mlp()
    if how == "parts":
        fully_shard(model[0])
        fully_shard(model)
    elif how == "replicas":
        model = DistributedDataParallel(model)
    base = torch.optim.Adam(model.parameters(), lr=0.02)
    guard = Guard(lambda: loss(model, 99, 0), shrink=0.5, tolerance=0.0)
    return model, Nowcaster(base, model, None, AHEAD, period=4, guard=guard, **options)


def drift(rank: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for how in ("replicas", "parts"):
        model, optimizer = drifting(rank, how)
        train(model, optimizer, range(20), 0)
        out[how], out[f"{how} log"] = values(model), log(optimizer)
        with optimizer.averaged():
            out[f"{how} averaged"] = values(model)
        model, optimizer = drifting(rank, how)
        train(model, optimizer, range(15), 0)
        saved = through_a_file(optimizer.state_dict())
        weights = copy.deepcopy(model.state_dict())
        other, again = drifting(rank, how)
        other.load_state_dict(weights)
        again.load_state_dict(saved)
        train(other, again, range(15, 20), 0)
        out[f"{how} resumed"], out[f"{how} resumed log"] = values(other), log(again)
        with torch.no_grad():
            other.eval()(batch(1, 0)[0])  # `fully_shard` leaves whole parameters behind
        with again.averaged(), torch.no_grad():
            out[f"{how} seen"] = other(batch(1, 0)[0]).detach().clone()
        with torch.no_grad():
            other(batch(1, 0)[0])
        out[f"{how} kept"] = sorted(again.state_dict()["nowcast"]["history"]["tensors"])
        again.finish()
        out[f"{how} finished"] = values(other)
    model, optimizer = drifting(rank, "replicas")
    train(model, optimizer, range(7), 0)
    before = values(model)
    if rank == 1:
        optimizer.core.averages._short["2.bias"].fill_(float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.core._jump()
    same = all(torch.equal(x, before[n]) for n, x in values(model).items())
    out["fails"] = optimizer.jumps[-1].reason.partition(":")[0], same
    for how in ("replicas", "parts"):  # what goes wrong in one process between jumps
        for what in ("nan", "update"):
            out[f"{how} {what}"] = broken(rank, how, what)
    return out


def broken(rank: int, how: str, what: str) -> Any:
    model, optimizer = drifting(rank, how)
    averages = optimizer.core.averages
    train(model, optimizer, range(13), 0)
    if rank == 1 and what == "nan":
        averages._short["0.bias"].fill_(float("nan"))
    if rank == 1 and what == "update":
        update = averages.update

        def fails(tensors: Any) -> None:
            averages.update = update
            raise MemoryError("only here")

        averages.update = fails
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, optimizer, range(13, 28), 0)
    ages = sorted({clock.age for clock in averages._clocks.values()})
    reasons = [(j.step, j.reason.partition(":")[0]) for j in optimizer.jumps]
    return values(model), ages, reasons


def apart(rank: int) -> dict[str, Any]:
    """Each process trains a model of its own."""
    out: dict[str, Any] = {}
    for alone in (False, True):
        model = mlp(seed=rank)
        base = torch.optim.SGD(model.parameters(), lr=0.01)
        predictor = Biased(context=CONTEXT)
        optimizer = Nowcaster(base, model, None, predictor, period=PERIOD, horizon=1, alone=alone)
        plain = copy.deepcopy(model)
        other = torch.optim.SGD(plain.parameters(), lr=0.01)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(model, optimizer, range(PERIOD), rank)
        train(plain, other, range(PERIOD), rank)
        moves = [p - q for p, q in zip(model.parameters(), plain.parameters(), strict=True)]
        out[f"alone={alone}"] = (
            optimizer.jumps[0].reason,
            [round(float(x.detach().mean()), 4) for x in moves],
        )
    return out


def untraced(rank: int) -> str:
    from torch.distributed.fsdp import fully_shard

    model = mlp()
    fully_shard(model)
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    whole = Whole(context=CONTEXT)
    optimizer = Nowcaster(base, model, None, whole, period=PERIOD, horizon=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, optimizer, range(PERIOD), 0)
    return optimizer.jumps[0].reason


def work(rank: int, folder: str) -> None:
    """One process."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    out = {"ddp": ddp(rank), "fsdp": fsdp(rank), "untraced": untraced(rank), "apart": apart(rank)}
    out["drift"] = drift(rank)
    torch.save(out, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
