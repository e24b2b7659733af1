"""The public assertions hold where they should, and fail on each kind of wrong input."""

import copy

import pytest
import torch
from torch import Tensor, nn

import wspace
from wspace import testing
from wspace.space import Group, Param, WeightSpace
from wspace.testing import (
    assert_close,
    assert_equivariant,
    assert_function_preserved,
    assert_group_action,
    assert_invariant,
    assert_same,
)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2))


@pytest.fixture
def module(float64: None) -> nn.Module:
    return mlp()


@pytest.fixture
def space(module: nn.Module) -> WeightSpace:
    return wspace.trace(module, torch.zeros(1, 3))


def features(space: WeightSpace, *batch: int, channels: int | None = None) -> dict[str, Tensor]:
    tail = () if channels is None else (channels,)
    return {p.name: torch.randn(*batch, *p.shape, *tail) for p in space.params}


# ------------------------------------------------------------------------------- same, close


def test_same_holds() -> None:
    nan = torch.tensor([1.0, torch.nan, torch.inf])
    assert_same({"a": [nan, torch.arange(3)]}, {"a": [nan.clone(), torch.arange(3)]})
    assert_same(torch.empty(0, 3), torch.empty(0, 3))


@pytest.mark.parametrize(
    ("a", "b", "match"),
    [
        (torch.zeros(2), torch.tensor([0.0, 1e-30]), r"at \[1\]"),
        (torch.zeros(2), torch.zeros(3), r"shape \(3,\)"),
        (torch.zeros(2), torch.zeros(2).double(), "float64"),
        (torch.tensor([1.0]), torch.tensor([torch.nan]), "got nan"),
        (torch.tensor([torch.inf]), torch.tensor([-torch.inf]), "got -inf"),
        (torch.tensor([True]), torch.tensor([False]), "got False"),
        (torch.arange(3), torch.tensor([0, 1, 3]), "got 3"),
        ({"a": torch.zeros(1)}, {"b": torch.zeros(1)}, "only one side has a"),
        ([torch.zeros(1)], [torch.zeros(1)] * 2, "output 1"),
    ],
)
def test_same_fails(a: object, b: object, match: str) -> None:
    with pytest.raises(AssertionError, match=match):
        assert_same(a, b)


def test_the_worst_element_is_named_with_its_axes(space: WeightSpace) -> None:
    a = features(space)
    b = {name: t.clone() for name, t in a.items()}
    b["2.weight"][3, 6] += 100
    b["2.weight"][1, 2] += 1
    b["0.bias"][4] += 1
    with pytest.raises(AssertionError, match=r"2\.weight\n.* at \[3, 6\] of 2\.weight\(h2, h1\)"):
        assert_same(a, b, space=space)


@pytest.mark.parametrize(
    ("dtype", "holds", "fails"), [(torch.float64, 1e-11, 1e-9), (torch.float32, 1e-5, 1e-3)]
)
def test_close_knows_the_precision(dtype: torch.dtype, holds: float, fails: float) -> None:
    a = torch.tensor([1.0, -40.0], dtype=dtype)
    assert_close(a, a * (1 + holds))
    with pytest.raises(AssertionError, match="not close"):
        assert_close(a, a * (1 + fails))


def test_close_measures_every_tensor_by_itself() -> None:
    a = {"large": torch.full((2,), 1e6), "small": torch.ones(2)}
    with pytest.raises(AssertionError, match="small"):
        assert_close(a, {"large": a["large"], "small": a["small"] + 2})


def test_only_tensors_are_compared() -> None:
    with pytest.raises(TypeError, match="str is not a tensor"):
        assert_same("a", "a")


# --------------------------------------------------------------------------- function preserved


def test_function_preserved_holds_and_leaves_the_module(
    module: nn.Module, space: WeightSpace
) -> None:
    module.train()
    before = copy.deepcopy(module.state_dict())
    x, rng = torch.randn(4, 3), torch.get_rng_state()
    assert assert_function_preserved(space, module, x) is None
    assert_same(dict(before), dict(module.state_dict()))
    assert module.training
    assert torch.equal(rng, torch.get_rng_state())


def test_function_preserved_in_single_precision() -> None:
    module, x = mlp(), torch.randn(4, 3)
    assert_function_preserved(wspace.trace(module, x), module, x)


def test_a_swapped_bias_is_no_symmetry(module: nn.Module, space: WeightSpace) -> None:
    """The bias moves with the units of the wrong layer, though a group of its size exists."""
    first = Group("h1", 7, ("permutation",))
    lost = Group("other", 7, ("permutation",))
    params = tuple(
        Param("0.bias", (wspace.Axis((lost,)),), dtype="float64") if p.name == "0.bias" else p
        for p in space.params
    )
    wrong = WeightSpace(params)
    assert first.size == space.groups["h1"].size
    with pytest.raises(AssertionError, match=r"changed the output: output 0\n  expected .* at \["):
        assert_function_preserved(wrong, module, torch.randn(4, 3))


def test_constant_weights_hide_nothing(module: nn.Module) -> None:
    """A zero head gives a constant function; the second stage replaces it."""
    module[4] = nn.Linear(5, 11)
    space = wspace.trace(module, torch.zeros(1, 3))
    fixed = Group("11", 11, ("permutation",))
    params = tuple(
        Param(p.name, (wspace.Axis((fixed,)), *p.axes[1:]), p.role, p.dtype)
        if p.name.startswith("4.")
        else p
        for p in space.params
    )
    for t in module[4].parameters():
        nn.init.zeros_(t)
    with pytest.raises(AssertionError, match="verify"):
        assert_function_preserved(WeightSpace(params), module, torch.randn(4, 3))


# ------------------------------------------------------------------------ layers on states


def row_sums(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds to each bias the sums of its weight's rows: equivariant."""
    out = {name: 2 * t for name, t in x.items()}
    for i in (0, 2, 4):
        out[f"{i}.bias"] = x[f"{i}.bias"] + x[f"{i}.weight"].sum(-1)
    return out


def cumsums(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.cumsum(-1) for name, t in x.items()}


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_equivariant_holds(space: WeightSpace, batch: tuple[int, ...]) -> None:
    assert assert_equivariant(row_sums, space, features(space, *batch)) is None


def test_equivariant_with_channels(space: WeightSpace) -> None:
    mix = torch.randn(4, 6)
    assert_equivariant(
        lambda x: {name: t @ mix for name, t in x.items()},
        space,
        features(space, 2, channels=4),
        channels=True,
    )


def test_cumsum_is_not_equivariant(space: WeightSpace) -> None:
    with pytest.raises(AssertionError, match=r"not equivariant: moving .*\n  expected .* of .*h\d"):
        assert_equivariant(cumsums, space, features(space))


def test_cumsum_over_the_last_axis_is_equivariant_if_that_counts_channels(
    space: WeightSpace,
) -> None:
    assert_equivariant(cumsums, space, features(space, channels=4), channels=True)
    with pytest.raises(AssertionError, match="not equivariant"):
        assert_equivariant(
            lambda x: {name: t.cumsum(0) for name, t in x.items()},
            space,
            features(space, channels=4),
            channels=True,
        )


def test_a_layer_that_mixes_channels_by_unit_is_not_equivariant(space: WeightSpace) -> None:
    gain = features(space)
    with pytest.raises(AssertionError, match="not equivariant"):
        assert_equivariant(lambda x: {n: t * gain[n] for n, t in x.items()}, space, features(space))


def test_invariant_holds(space: WeightSpace) -> None:
    assert (
        assert_invariant(
            lambda x: {"a": [t.square().sum() for t in x.values()]}, space, features(space)
        )
        is None
    )


def test_first_entry_is_not_invariant(space: WeightSpace) -> None:
    with pytest.raises(AssertionError, match="not invariant: moving"):
        assert_invariant(lambda x: x["0.weight"][..., 0, 0], space, features(space))


def test_invariance_of_a_head_is_about_values_only(space: WeightSpace) -> None:
    """A fixed axis may be read entry by entry."""
    assert_invariant(lambda x: x["4.bias"], space, features(space))


# ------------------------------------------------------------------------------ group action


def test_group_action_holds(space: WeightSpace) -> None:
    assert assert_group_action(space, features(space)) is None
    assert_group_action(space, features(space, 2, 3))


def test_a_non_inverse_is_found(space: WeightSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing, "inverse", lambda t: t)
    with pytest.raises(AssertionError, match="inverse"):
        assert_group_action(space, features(space))


def test_composition_in_the_wrong_order_is_found(
    space: WeightSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(testing, "compose", lambda t, u: wspace.compose(u, t))
    with pytest.raises(AssertionError, match="compose"):
        assert_group_action(space, features(space))


def test_an_action_that_scatters_is_found(
    space: WeightSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other convention is an action of the opposite group."""
    monkeypatch.setattr(testing, "act", lambda t, s, p: wspace.act(wspace.inverse(t), s, p))
    with pytest.raises(AssertionError, match="compose"):
        assert_group_action(space, features(space))


def test_an_action_that_writes_to_its_input_is_found(
    space: WeightSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(t: object, s: dict[str, Tensor], p: WeightSpace) -> dict[str, Tensor]:
        out = wspace.act(t, s, p)
        for name, value in s.items():
            value.copy_(out[name])
        return out

    monkeypatch.setattr(testing, "act", act)
    with pytest.raises(AssertionError, match="no group action"):
        assert_group_action(space, features(space))
