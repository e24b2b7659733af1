"""The parts of matching: pieces, assignments, signs, quadratic assignments, soft starts."""

from collections.abc import Sequence
from itertools import permutations, product

import pytest
import torch
from cases import build
from oracles import state_of
from oracles_align import random_state
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import wspace
from wspace.align.matching.assign import Ask, Assigner, inner_product
from wspace.align.matching.quadratic import EVERY, quadratic, value
from wspace.align.matching.signs import Shift, Similarity
from wspace.align.matching.sinkhorn import normalised
from wspace.nn.basis import cells
from wspace.nn.pieces import pieces
from wspace.testing import TOLERANCE, assert_close, assert_same

TIGHT = TOLERANCE[torch.float64]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# -------------------------------------------------------------------------- pieces


@pytest.mark.parametrize(
    "name", ["densenet", "lstm", "grouped_se", "moe_dense", "gpt2", "llama", "fno", "shufflenet_v1"]
)
def test_pieces_are_the_cells_of_the_layers(name: str) -> None:
    """Cut by other code, for other ends: the same slots, and every number once."""
    module, args, kwargs = build(name)
    space = wspace.trace(module, args, kwargs)
    state = state_of(module)
    found = pieces(space, buffers=True)
    assert len(found) == len(cells(space))
    for piece, cell in zip(found, cells(space), strict=True):
        assert [s.group for s in piece.slots if s.group in space.groups and s.size > 1] == [
            s.group for s in cell if not s.fixed
        ]
        read = piece.read(state, 0)
        assert read.shape[:-1] == (1, *(s.size for s in piece.slots))
    total = sum(p.read(state, 0).double().sum() for p in found)
    every = [
        torch.view_as_real(x) if x.is_complex() else x
        for x in (state[p.name] for p in space.params)
    ]
    assert_close(sum(x.double().sum() for x in every), total)
    assert len(pieces(space)) <= len(found)


def test_a_piece_is_read_by_row(generator: torch.Generator) -> None:
    module, args, kwargs = build("attention_chunk")
    space = wspace.trace(module, args, kwargs)
    state = random_state(space, generator, 2, 3)
    for piece in pieces(space):
        both = piece.read(state, 2)
        assert len(both) == 6
        one = piece.read({n: x[1, 2] for n, x in state.items()}, 0)
        assert_same(one[0], both[5])
        assert one.numel() < 2 or not torch.equal(one[0], both[4])


# --------------------------------------------------------------------- assignments


@pytest.mark.parametrize("threads", [1, 2])
def test_assignments_of_many_sizes(threads: int, generator: torch.Generator) -> None:
    costs = [normal(generator, 2, 5, 5), normal(generator, 3, 120, 120), normal(generator, 1, 1, 1)]
    with Assigner(threads) as assigner:
        found = assigner.solve(costs)
    for cost, p in zip(costs, found, strict=True):
        for row, q in zip(cost, p, strict=True):
            assert q.tolist() == linear_sum_assignment(row.numpy(), maximize=True)[1].tolist()
    best = max(float(costs[0][0][range(5), p].sum()) for p in permutations(range(5)))
    assert float(costs[0][0][range(5), found[0][0]].sum()) == pytest.approx(best)


def test_computations_run_side_by_side(generator: torch.Generator) -> None:
    """What they ask for at one time is solved together, and each gets its own answer."""
    log: list[int] = []

    class Watched(Assigner):
        def solve(self, costs: Sequence[Tensor]) -> list[Tensor]:
            log.append(len(costs))
            return super().solve(costs)

    def asks(n: int, times: int) -> Ask:
        found = []
        for _ in range(times):
            cost = torch.zeros(1, n, n, dtype=torch.float64)
            shift = (torch.arange(n) + 1) % n
            cost[0, torch.arange(n), shift] = 1
            found.append((yield cost))
        return n, found

    results = Watched(1).run([asks(3, 2), asks(4, 0), asks(5, 1)])
    assert log == [2, 1]
    assert [n for n, _ in results] == [3, 4, 5]
    assert [len(found) for _, found in results] == [2, 0, 1]
    assert results[2][1][0].tolist() == [[1, 2, 3, 4, 0]]


def test_inner_products_are_of_float64(generator: torch.Generator) -> None:
    x, y = (normal(generator, 2, 3, 1 << 18).float() for _ in range(2))
    want = (x.double() * y.double()).sum((1, 2))
    assert_close(want, inner_product(x, y))
    rough = (x * y).sum((1, 2)).double()
    assert float(((rough - want) / want).abs().max()) > TIGHT


# --------------------------------------------------------------------------- signs

KEYS = [(), (0,), (1,), (2,), (0, 1), (0, 2), (0, 3), (1, 3), (4,), (0, 1, 4), (0, 1, 2, 3)]


@pytest.mark.parametrize("phase", [False, True])
def test_no_signs_are_better(phase: bool, generator: torch.Generator) -> None:
    flipped = 0
    for _ in range(60):
        chosen = torch.rand(len(KEYS), generator=generator) < 0.5
        keys = [k for k, here in zip(KEYS, chosen, strict=True) if here] or [()]
        similarity = Similarity({k: normal(generator, 2, 3) for k in keys})
        if phase:
            similarity.parts[5, 0] = normal(generator, 2, 3)
            for key, amount, count in (((0, 5), 0.7, 2), ((1,), 0.3, 1)):
                sums = 3 * normal(generator, 2, 2, 3)
                similarity.shifts.append(Shift(key, 5, amount, count, *sums))
        gauges = sorted({g for k in similarity.parts for g in k} | ({0, 1, 5} if phase else set()))
        options = [range(-40, 41) if g == 5 else (1, -1) for g in gauges]
        every = (
            torch.stack(
                [
                    similarity.value(
                        {g: torch.full((2, 3), float(f)) for g, f in zip(gauges, c, strict=True)}
                    )
                    for c in product(*options)
                ]
            ).amax(0)
            if not phase or len(gauges) < 4
            else None
        )
        best, factors = similarity.choice()
        assert_close(similarity.best(), best)
        full = {g: factors.get(g, torch.ones(2, 3, dtype=torch.float64)) for g in gauges}
        assert_close(similarity.value(full), best)
        if every is not None:
            assert_close(every, best)
        flipped += any(bool((f < 0).any()) for f in factors.values())
    assert flipped > 10


def test_many_norms_on_a_stream_cost_little(generator: torch.Generator) -> None:
    """One sign that meets 200 others, which do not meet: 2 ** 201 combinations."""
    parts = {(0, k): normal(generator, 4, 4) for k in range(1, 201)}
    parts |= {(k,): normal(generator, 4, 4) for k in range(201)}
    best = Similarity(parts).best()
    want = [
        s * parts[0,] + sum((s * parts[0, k] + parts[k,]).abs() for k in range(1, 201))
        for s in (1, -1)
    ]
    assert_close(torch.maximum(*want), best)


# ----------------------------------------------------------------------- quadratic


def solved(ask: Ask) -> tuple[Tensor, Tensor]:
    return Assigner(1).run([ask])[0]


def problem(generator: torch.Generator, n: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    pairs = [(normal(generator, 3, n, n, f), normal(generator, 3, n, n, f)) for f in (1, 2)]
    return normal(generator, 3, n, n), pairs


@pytest.mark.parametrize("n", range(1, EVERY + 2))
def test_quadratic_assignments(n: int, generator: torch.Generator) -> None:
    """All permutations for few units; for more, a good one that no exchange improves."""
    ratio = []
    for _ in range(5):
        linear, pairs = problem(generator, n)
        p, gain = solved(quadratic(linear, pairs))
        still = torch.arange(n).expand(3, n)
        start, got = value(linear, pairs, still), value(linear, pairs, p)
        assert_close(got - start, gain)
        every = torch.stack(
            [value(linear, pairs, torch.tensor(q).expand(3, n)) for q in permutations(range(n))]
        )
        assert bool((got <= every.amax(0) + 1e-9).all())
        ratio.append((got / every.amax(0)).mean())
        if n <= EVERY:
            assert_close(every.amax(0), got)
        for i in range(n):
            for k in range(i):
                swapped = p.clone()
                swapped[:, i], swapped[:, k] = p[:, k], p[:, i]
                assert bool((value(linear, pairs, swapped) <= got + 1e-9).all())
    assert torch.stack(ratio).mean() > 0.85


def test_quadratic_assignments_undo_permutations(generator: torch.Generator) -> None:
    """Frank-Wolfe finds the isomorphism of 12 units; not by the linear part."""
    n = 12
    found = 0
    for _ in range(10):
        a = normal(generator, 1, n, n, 1)
        p = torch.randperm(n, generator=generator)
        q, _ = solved(quadratic(torch.zeros(1, n, n, dtype=torch.float64), [(a, a[:, p][:, :, p])]))
        found += q[0].tolist() == p.argsort().tolist()
    assert found >= 8


# ---------------------------------------------------------------------------- soft


def test_soft_assignments_are_doubly_stochastic(generator: torch.Generator) -> None:
    soft = normalised(normal(generator, 2, 6, 6))
    assert float((soft.sum(1) - 1).abs().max()) < 1e-4
    assert float((soft.sum(2) - 1).abs().max()) < 1e-4
    sharp = normalised(100 * normal(generator, 2, 6, 6))
    assert float(sharp.amax(2).min()) > 0.4
    assert bool(sharp.isfinite().all())
