"""The nowcaster in two processes, against one: DDP keeps them equal, FSDP2 changes nothing.

The processes run once for the whole file, on the CPU with gloo; see `ranks_nowcaster`.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import ranks_nowcaster as ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(ranks.work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [n for n in a if not torch.equal(a[n], b[n])] == []


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Up to the order of sums over processes."""
    assert a.keys() == b.keys()
    for n, x in a.items():
        torch.testing.assert_close(x, b[n], rtol=1e-6, atol=1e-6, msg=n)


@pytest.mark.parametrize("when", ["first process predicts", "after two jumps", "guarded"])
def test_replicas_stay_bit_identical(results: list[dict[str, Any]], when: str) -> None:
    """Though each would predict something else, and holds out other data."""
    first, second = (r["ddp"][when] for r in results)
    parameters = [n for n in first if "running" not in n and "tracked" not in n]
    assert len(parameters) == 6
    assert_equal({n: first[n] for n in parameters}, {n: second[n] for n in parameters})


def test_only_the_first_replica_keeps_a_history(results: list[dict[str, Any]]) -> None:
    assert [r["ddp"]["held"] for r in results] == [12, 0]


def test_the_guard_averages_over_replicas(results: list[dict[str, Any]]) -> None:
    first, second = (r["ddp"] for r in results)
    assert first["guarded log"] == second["guarded log"]
    assert len(first["guarded log"]) == 5
    assert any(horizon for _, _, horizon, _, _ in first["guarded log"])
    assert first["own loss"] != second["own loss"]
    mean = (first["own loss"] + second["own loss"]) / 2
    assert first["mean loss"] == second["mean loss"] == pytest.approx(mean, rel=1e-6)


def test_replicas_resume_from_what_the_first_saved(results: list[dict[str, Any]]) -> None:
    for r in results:
        assert_equal(r["ddp"]["guarded"], r["ddp"]["resumed"])
        assert r["ddp"]["guarded log"] == r["ddp"]["resumed log"]


@pytest.mark.parametrize("where", ["guard", "refresh", "predict", "nan"])
def test_what_fails_in_one_process_happens_in_none(
    results: list[dict[str, Any]], where: str
) -> None:
    other = {"predict": 1}.get(where, 0)
    reasons = [r["ddp"][f"{where}: log"] for r in results]
    if where == "nan":
        assert reasons == [["the held loss is not finite before the jump"]] * 2
    else:
        assert reasons[other] == ["NowcastError"]
        assert reasons[1 - other] == ["ValueError"]
    assert [r["ddp"][f"{where}: as before"] for r in results] == [True, True]


@pytest.mark.parametrize("kind", ["line", "spread", "whole"])
@pytest.mark.parametrize("how", ["", " guarded", " rounded"])
def test_parts_give_what_one_process_gives(
    results: list[dict[str, Any]], kind: str, how: str
) -> None:
    options: dict[str, Any] = {
        "": {},
        " guarded": {"guarded": True},
        " rounded": {"history_dtype": torch.bfloat16},
    }[how]
    model, optimizer = ranks.sharded_run(0, kind, shard=False, **options)
    ranks.train(model, optimizer, range(20), 0)
    for r in results:
        assert_close(ranks.values(model), r["fsdp"][f"{kind}{how}"])
        found = [(step, tried, at) for step, tried, at, _, _ in r["fsdp"][f"{kind}{how} log"]]
        assert found == [(j.step, j.tried, j.horizon) for j in optimizer.jumps]
    assert any(j.horizon for j in optimizer.jumps)
    plain, other = ranks.sharded_run(0, kind, shard=False, horizon=0)
    ranks.train(plain, other, range(20), 0)
    with pytest.raises(AssertionError):  # the jumps are large against the tolerance
        assert_close(ranks.values(model), ranks.values(plain))


@pytest.mark.parametrize("kind", ["line", "spread", "whole"])
def test_parts_resume_and_stay_in_place(results: list[dict[str, Any]], kind: str) -> None:
    rows = [4, 3]
    for rank, r in enumerate(results):
        assert_equal(r["fsdp"][kind], r["fsdp"][f"{kind} resumed"])
        assert r["fsdp"][f"{kind} in place"]
        assert r["fsdp"][f"{kind} kept"] == ("DTensor", (7, 3), (rows[rank], 3))


def test_a_module_in_parts_needs_its_space(results: list[dict[str, Any]]) -> None:
    for r in results:
        assert "cannot be traced" in r["untraced"]


def test_processes_that_train_different_models_are_told_apart(
    results: list[dict[str, Any]],
) -> None:
    for rank, r in enumerate(results):
        reason, moves = r["apart"]["alone=False"]
        assert "train different models" in reason
        assert moves == [0.0] * 6
        assert r["apart"]["alone=True"] == ("accepted", [0.01 * (1 + rank)] * 6)


@pytest.mark.parametrize("how", ["replicas", "parts"])
def test_processes_drift_as_one_does(results: list[dict[str, Any]], how: str) -> None:
    model, optimizer = ranks.drifting(0, "")
    ranks.train(model, optimizer, range(20), 0)
    kept = [(j.step, j.horizon) for j in optimizer.jumps]
    assert [step for step, _ in kept] == [4, 8, 12, 16, 20]
    assert kept[0][1] < kept[-1][1]
    with optimizer.averaged():
        shown = ranks.values(model)
    for r in (r["drift"] for r in results):
        assert_close(ranks.values(model), r[how])
        assert_close(shown, r[f"{how} averaged"])
        assert_equal(r[how], r[f"{how} resumed"])
        assert_equal(r[f"{how} averaged"], r[f"{how} finished"])
        assert [(step, at) for step, _, at, _, _ in r[f"{how} log"]] == kept
        assert r[f"{how} log"] == r[f"{how} resumed log"]
    assert_equal(results[0]["drift"]["replicas"], results[1]["drift"]["replicas"])
    plain, other = ranks.drifting(0, "")
    other.core.share = 0.0
    ranks.train(plain, other, range(8), 0)
    with pytest.raises(AssertionError):  # the jumps are large against the tolerance
        half, third = ranks.drifting(0, "")
        ranks.train(half, third, range(8), 0)
        assert_close(ranks.values(plain), ranks.values(half))


@pytest.mark.parametrize("how", ["replicas", "parts"])
def test_averages_are_seen_after_a_forward_pass(results: list[dict[str, Any]], how: str) -> None:
    twin = ranks.mlp()
    for r in (r["drift"] for r in results):
        twin.load_state_dict(r[f"{how} averaged"])
        with torch.no_grad():
            torch.testing.assert_close(r[f"{how} seen"], twin(ranks.batch(1, 0)[0]))
            twin.load_state_dict(r[how])
            assert not torch.allclose(r[f"{how} seen"], twin(ranks.batch(1, 0)[0]))
        assert r[f"{how} kept"] == sorted(r[how])


@pytest.mark.parametrize("how", ["replicas", "parts"])
@pytest.mark.parametrize("what", ["nan", "update"])
def test_processes_stay_together_when_averages_fail_in_one(
    results: list[dict[str, Any]], how: str, what: str
) -> None:
    (one, ages, log), (two, again, other) = (r["drift"][f"{how} {what}"] for r in results)
    assert_equal(one, two)
    assert ages == again
    assert len(ages) == 1
    assert [step for step, _ in log] == [step for step, _ in other] == list(range(4, 29, 4))
    assert dict(log)[16] == "NowcastError"
    assert dict(other)[16] == {"nan": "NowcastError", "update": "MemoryError"}[what]
    assert dict(log)[28] == dict(other)[28] == "accepted"


def test_a_drift_that_fails_in_one_process_happens_in_none(results: list[dict[str, Any]]) -> None:
    assert [r["drift"]["fails"] for r in results] == [("NowcastError", True)] * 2
