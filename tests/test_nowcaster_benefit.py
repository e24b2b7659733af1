"""What a jump is good for, where the answer is known in closed form."""

import copy

import pytest
import torch
from torch import nn

from tests.test_nowcaster import net, train
from wspace.nowcast import Average, LinearFit, NoChange, Nowcaster, Predictor


@pytest.mark.parametrize("context", [2, 3, 5])
@pytest.mark.parametrize("horizon", [1, 7, 40])
def test_a_linear_trajectory_is_continued_exactly(
    context: int, horizon: int, float64: None, generator: torch.Generator
) -> None:
    """A constant gradient: the jump lands where the plain optimizer comes later."""
    for spacing in (1, 4):
        model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
        far = copy.deepcopy(model)
        slopes = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
        base = torch.optim.SGD(model.parameters(), lr=0.01)
        period = spacing * context
        optimizer = Nowcaster(
            base, model, None, LinearFit(context=context), period=period, horizon=horizon
        )
        later = torch.optim.SGD(far.parameters(), lr=0.01)
        for m, opt, steps in (
            (model, optimizer, period),
            (far, later, period + horizon * spacing),
        ):
            for p, slope in zip(m.parameters(), slopes, strict=True):
                p.grad = slope.clone()
            for _ in range(steps):
                opt.step()
        for p, q in zip(model.parameters(), far.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


def test_a_quadratic_with_gradient_descent_in_closed_form(float64: None) -> None:
    """Each mode shrinks as ``r^t``; the fitted line, worked out by hand, is where it lands."""
    curvature = torch.tensor([0.1, 1.0, 4.0, 9.0])
    for horizon, context, spacing in [(1, 5, 2), (6, 5, 3), (20, 3, 1)]:
        model = nn.Linear(4, 1, bias=False)
        nn.init.ones_(model.weight)
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        period = context * spacing
        optimizer = Nowcaster(
            base, model, None, LinearFit(context=context), period=period, horizon=horizon
        )
        for _ in range(period):
            optimizer.zero_grad()
            (0.5 * curvature * model.weight[0].square()).sum().backward()
            optimizer.step()
        t = torch.arange(1.0, context + 1)
        y = (1 - 0.1 * curvature)[None] ** (t * spacing)[:, None]  # (context, 4)
        slope = ((t - t.mean())[:, None] * y).sum(0) / (t - t.mean()).square().sum()
        wanted = y.mean(0) + slope * (context + horizon - t.mean())
        torch.testing.assert_close(model.weight[0].detach(), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("predictor", [NoChange(), Average(), Average(0.5), LinearFit()])
def test_a_constant_history_gives_no_movement(predictor: Predictor) -> None:
    model = net()
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = Nowcaster(base, model, None, predictor, period=5, horizon=40)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, range(10))
    assert [j.horizon for j in optimizer.jumps] == [40, 40]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
