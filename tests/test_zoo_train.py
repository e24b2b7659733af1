"""Networks trained side by side are those that would have been trained alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from wspace.errors import ZooError
from wspace.testing import assert_close
from wspace.zoo.train import (
    Trained,
    Training,
    cross_entropy,
    evaluate_many,
    initial_states,
    train_many,
    vmapped,
)

pytestmark = pytest.mark.usefixtures("float64")

N, STEPS = 3, torch.tensor([5, 9, 7])
RATES, DECAYS = torch.tensor([0.01, 0.02, 0.03]).double(), torch.tensor([0.1, 0.2, 0.3]).double()


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def normed() -> nn.Module:
    first = nn.Linear(6, 5, bias=False)  # a bias there has no gradient but rounding
    return nn.Sequential(first, nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(6, 4)
    )


Optimizer = Callable[[nn.Module, int], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": lambda m, i: torch.optim.AdamW(
        m.parameters(), lr=float(RATES[i]), weight_decay=float(DECAYS[i])
    ),
    "adam": lambda m, i: torch.optim.Adam(
        m.parameters(), lr=float(RATES[i]), weight_decay=float(DECAYS[i])
    ),
    "sgd": lambda m, i: torch.optim.SGD(
        m.parameters(), lr=float(RATES[i]), weight_decay=float(DECAYS[i]), momentum=0.9
    ),
}


def data(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(N, 20, 6, generator=generator)
    return x, torch.randint(4, (N, 20), generator=generator)


def alone(
    module: nn.Module, data: tuple[Tensor, Tensor], steps: int, by: torch.optim.Optimizer, how: Any
) -> tuple[list[dict[str, Tensor]], float]:
    """States before and after every step, and the loss before the last one."""
    x, y = data
    schedule = CosineAnnealingLR(by, steps) if how.get("schedule") == "cosine" else None
    states, loss = [{k: v.clone() for k, v in module.state_dict().items()}], torch.tensor(0.0)
    for _ in range(steps):
        by.zero_grad()
        loss = F.cross_entropy(module(x), y)
        loss.backward()
        if how.get("clip"):
            nn.utils.clip_grad_norm_(module.parameters(), how["clip"])
        by.step()
        if schedule is not None:
            schedule.step()
        states.append({k: v.clone() for k, v in module.state_dict().items()})
    return states, float(loss.detach())


@pytest.mark.parametrize("make", [perceptron, normed, convolutional])
@pytest.mark.parametrize(
    "how",
    [
        {"optimizer": "adamw", "schedule": "cosine"},
        {"optimizer": "adam", "clip": 0.3},
        {"optimizer": "sgd"},
    ],
)
def test_every_network_gets_what_it_would_get_alone(
    make: Callable[[], nn.Module], how: dict[str, Any], generator: torch.Generator
) -> None:
    x, y = data(generator)
    start = initial_states(make, N, generator)
    kept = {name: v.clone() for name, v in start.items()}
    buffers = [name for name, _ in make().named_buffers() if name in start]
    gradient = vmapped(make().train(), lambda step, rows: (x[rows], y[rows]), cross_entropy)
    training = Training(STEPS, RATES, DECAYS, **how)
    at = torch.tensor([0, 4, 8])
    done = train_many(start, gradient, training, buffers=buffers, save_at=at)
    weight = "1.weight" if "0.weight" not in start else "0.weight"
    assert done.steps.tolist() == STEPS.tolist() and not done.diverged.any()
    assert_close(start, kept)
    for i, steps in enumerate(STEPS.tolist()):
        module = make().train()
        module.load_state_dict({k: v[i] for k, v in start.items()}, strict=False)
        optimizer = OPTIMIZERS[how["optimizer"]](module, i)
        states, loss = alone(module, (x[i], y[i]), steps, optimizer, how)
        for name in start:
            assert_close(done.state[name][i], states[-1][name])
            for slot, step in enumerate(at.tolist()):
                assert_close(done.saved[name][i, slot], states[min(step, steps)][name])
        assert abs(float(done.loss[i]) - loss) < 1e-12
        assert (done.state[weight][i] - states[-2][weight]).abs().max() > 1e-6  # a step too few


def toy(generator: torch.Generator, **options: Any) -> tuple[Trained, dict[str, Tensor]]:
    x, y = data(generator)
    start = initial_states(perceptron, N, generator)
    gradient = vmapped(perceptron(), lambda step, rows: (x[rows], y[rows]), cross_entropy)
    how = options.pop("how", Training(30, 0.05))
    return train_many(start, gradient, how, **options), start


def test_networks_that_are_done_stop_and_the_others_go_on(generator: torch.Generator) -> None:
    state = generator.get_state()
    full, _ = toy(generator)
    generator.set_state(state)
    calls: list[int] = []

    def stop(step: int, losses: Tensor, rows: Tensor) -> Tensor:
        calls.append(len(rows))
        return (rows == 1) & (torch.tensor(step) >= 4)

    some, _ = toy(generator, stop=stop)
    assert some.steps.tolist() == [30, 4, 30]
    assert calls[3:5] == [3, 2]
    for name in full.state:
        assert_close(some.state[name][[0, 2]], full.state[name][[0, 2]])
        assert (some.state[name][1] - full.state[name][1]).abs().max() > 1e-6


def test_a_network_that_diverges_is_left_as_it_was(generator: torch.Generator) -> None:
    rates = torch.tensor([0.05, 1e307, 0.05])
    done, _ = toy(generator, how=Training(30, rates, optimizer="sgd"))
    assert done.diverged.tolist() == [False, True, False]
    assert done.steps[1] < 30 and done.steps[0] == 30
    assert all(bool(x.isfinite().all()) for x in done.state.values())


def test_no_steps_change_nothing(generator: torch.Generator) -> None:
    done, start = toy(generator, how=Training(torch.tensor([0, 2, 0])))
    for name, x in start.items():
        assert torch.equal(done.state[name][[0, 2]], x[[0, 2]])
        assert not torch.equal(done.state[name][1], x[1])


def test_initial_states_are_those_of_the_constructor(generator: torch.Generator) -> None:
    before = torch.random.get_rng_state()
    made = initial_states(normed, 4, generator)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {"1.running_mean", "1.running_var"} < set(made)
    assert not any("num_batches" in name for name in made)
    assert len({tuple(row.flatten().tolist()) for row in made["0.weight"]}) == 4


def test_evaluation_does_not_depend_on_how_many_run_at_once(generator: torch.Generator) -> None:
    x, _ = data(generator)
    state = initial_states(perceptron, 5, generator)
    out = [
        evaluate_many(perceptron(), state, x[0], lambda y: y.mean(1), networks=n) for n in (1, 2, 5)
    ]
    assert out[0].shape == (5, 4)
    assert_close(out[0], out[1])
    assert_close(out[0], out[2])


@pytest.mark.parametrize(
    "state", [{}, {"a": torch.zeros(0, 3)}, {"a": torch.zeros(2), "b": torch.zeros(3)}]
)
def test_what_is_no_stack_is_refused(state: dict[str, Tensor]) -> None:
    with pytest.raises(ZooError, match="train_many: not a stack"):
        train_many(state, lambda s, i, r: (torch.zeros(1), s), Training(1))


def test_a_network_that_diverges_keeps_its_statistics(generator: torch.Generator) -> None:
    """BatchNorm has seen the bad step by the time it is known to be bad."""
    x, y = data(generator)
    start = initial_states(normed, N, generator)
    buffers = [name for name, _ in normed().named_buffers() if name in start]
    gradient = vmapped(normed().train(), lambda step, rows: (x[rows], y[rows]), cross_entropy)

    def poisoned(state: dict[str, Tensor], step: int, rows: Tensor) -> Any:
        losses, slopes = gradient(state, step, rows)
        bad = (rows == 1) & (torch.tensor(step) == 5)
        return torch.where(bad, torch.nan, losses), slopes

    done = train_many(start, poisoned, Training(20, 0.05), buffers=buffers)
    short = train_many(start, gradient, Training(5, 0.05), buffers=buffers)
    assert done.diverged.tolist() == [False, True, False]
    for name in start:
        assert_close(done.state[name][1], short.state[name][1])
