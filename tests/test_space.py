"""The description as a value: algebra of axes, text, JSON, validation, numbers by hand."""

import json
import pickle

import pytest
import torch
from torch import nn

import wspace
from wspace.errors import SpaceMismatch
from wspace.space import Axis, Concat, Group, Opaque, Param, Role, WeightSpace, describe

H = Group("h", 3, ("permutation",))
D = Group("d", 5, ("permutation",), ("h",))
X = Group("7", 7)


def space_of(*params: Param, **more: object) -> WeightSpace:
    return WeightSpace(params, **more)


def small() -> WeightSpace:
    return space_of(
        Param("w", (H * D, Axis((X,))), Role.MATRIX),
        Param("b", (H * D,), Role.SHIFT, ties=("c",)),
        Param("mean", (Axis((H,)),), Role.STATISTIC, buffer=True),
        Param("out", (Axis((X,)),), Role.SHIFT),
    )


# ------------------------------------------------------------------------------------ axes


def test_products_and_sums() -> None:
    assert (H * D).size == 15
    assert (H * D * X).factors == (H, D, X)
    assert (H * (D * X)) == (H * D) * X
    assert (H + D).size == 8
    assert ((H + D) + X) == (H + (D + X))  # sums are flat
    assert ((H + D) * X).size == 56
    assert ((H + D) * X).pieces() == ((H + D) * X,)
    assert (H + D * X).pieces() == (Axis((H,)), D * X)
    assert Axis().size == 1


@pytest.mark.parametrize(
    ("axis", "text"),
    [
        (Axis(), "1"),
        (Axis((X,)), "7!"),
        (H * D, "h*d"),
        (H * X, "h*7!"),
        (H + D * X, "(h + d*7!)"),
        (X * (H + D), "7!*(h + d)"),
        (H + (D + X) * H, "(h + (d + 7!)*h)"),
    ],
)
def test_text_of_an_axis(axis: Axis, text: str) -> None:
    assert str(axis) == text


def test_groups_of_an_axis_are_listed_in_order_with_repetition() -> None:
    assert list((H * (D + H + X)).groups()) == [H, D, H, X]


def test_fixed() -> None:
    assert X.fixed
    assert not H.fixed
    assert Group("s", 3, ("scale",)).fixed  # its units may be rescaled, but not permuted
    assert Axis().fixed
    assert (X * X).fixed
    assert not (X * H).fixed
    assert Param("p", (Axis((X,)),)).fixed
    assert not Param("p", (Axis((X,)), H + X)).fixed


def test_param() -> None:
    p = Param("w", (H * D, Axis(), Axis((X,))))
    assert p.shape == (15, 1, 7)
    assert p.numel == 105
    assert str(p) == "w(h*d, 1, 7!)"
    assert Param("scalar", ()).numel == 1


def test_values_are_hashable_and_frozen() -> None:
    assert len({H, Group("h", 3, ("permutation",)), D}) == 2
    assert hash(H * D) == hash(Axis((H, D)))
    assert (H * D) != (D * H)
    assert (H + D) != (H * D)
    with pytest.raises(AttributeError):
        H.size = 4  # type: ignore[misc]
    with pytest.raises(AttributeError):
        small().params = ()  # type: ignore[misc]


# ----------------------------------------------------------------------------------- space


def test_equality_and_hash() -> None:
    assert small() == small()
    assert hash(small()) == hash(small())
    assert small() in {small(): 1}
    other = space_of(*small().params, opaque=(Opaque("aten.foo"),))
    assert other != small()
    assert space_of(*small().params, capture="concrete") != small()
    assert pickle.loads(pickle.dumps(small())) == small()


def test_groups_and_lookup() -> None:
    space = small()
    assert list(space.groups) == ["h", "d"]
    assert list(space.all_groups) == ["h", "d", "7"]
    assert space["c"] is space["b"] is space.by_name["c"]
    with pytest.raises(SpaceMismatch, match="no parameter 'nothing'"):
        space["nothing"]


def test_coverage_by_hand() -> None:
    """Buffers do not count: of 15·7 + 15 + 7 elements the last 7 are fixed."""
    assert small().coverage == pytest.approx(120 / 127)
    assert space_of(Param("out", (Axis((X,)),))).coverage == 0.0
    assert space_of(Param("b", (Axis((H,)),), buffer=True)).coverage == 0.0
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    assert wspace.trace(net, torch.zeros(1, 3)).coverage == pytest.approx((15 + 5 + 10) / 32)


def test_text() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.BatchNorm1d(5), nn.Linear(5, 2, bias=False))
    space = wspace.trace(net, torch.zeros(2, 3))
    lines = str(space).splitlines()
    assert lines[0] == "WeightSpace  h1[5]  (coverage 1.000)"
    assert lines[1:] == [
        "  h1[5]: permutation, scale, sign",
        "  0.weight(h1, 3!)",
        "  0.bias(h1)",
        "  2.weight(h1)",
        "  2.bias(h1)",
        "  3.weight(2!, h1)",
        "  2.running_mean(h1) [buffer]",
        "  2.running_var(h1) [buffer]",
    ]


def test_text_of_what_is_special() -> None:
    text = str(
        space_of(*small().params, opaque=(Opaque("aten.x", "a.py:3 in f"),), capture="concrete")
    )
    assert "d[5]: permutation; its own for each h" in text
    assert "b(h*d) = c" in text
    assert "mean(h) [buffer]" in text
    assert "frozen by aten.x at a.py:3 in f" in text
    assert "1 opaque" in text
    assert "concrete capture" in text
    assert "no free group" in str(space_of(Param("out", (Axis((X,)),))))
    assert describe(X) == "7[7]: fixed"
    assert describe(Group("s", 3, ("permutation", "scale"))) == "s[3]: permutation, scale"


# ------------------------------------------------------------------------------------ JSON


def test_json_round_trip() -> None:
    deep = H + (D + X) * H
    space = space_of(
        Param("w", (deep, Axis()), Role.TABLE, "bfloat16", ("v",), at=("h", 2), family="w"),
        *small().params,
        opaque=(Opaque("aten.x", "a.py:3 in f"),),
        capture="concrete",
        extra=(Group("unused", 11, ("permutation",)),),
    )
    again = WeightSpace.from_json(space.to_json())
    assert again == space
    assert again.groups == space.groups
    assert isinstance(again.params[0].axes[0].factors[0], Concat)
    assert json.loads(space.to_json())["format"] == 1


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", "3", '"text"', "{}", '{"format": 1}', '{"format": 999}',
        '{"format": 1, "groups": [], "params": [["w"]]}',
    ],
)  # fmt: skip
def test_json_that_is_no_space(text: str) -> None:
    with pytest.raises(SpaceMismatch, match="space: "):
        WeightSpace.from_json(text)


def test_json_of_another_format_says_which() -> None:
    data = json.loads(small().to_json()) | {"format": 999}
    with pytest.raises(SpaceMismatch, match="format 999"):
        WeightSpace.from_json(json.dumps(data))


@pytest.mark.parametrize("key", ["groups", "params", "gauges", "opaque", "capture", "extra"])
def test_json_with_something_missing(key: str) -> None:
    data = json.loads(small().to_json())
    del data[key]
    with pytest.raises(SpaceMismatch, match=f"KeyError.*{key}"):
        WeightSpace.from_json(json.dumps(data))


def test_json_that_points_nowhere() -> None:
    data = json.loads(small().to_json())
    data["params"][0][1][0] = [99]
    with pytest.raises(SpaceMismatch, match="not a weight space"):
        WeightSpace.from_json(json.dumps(data))
    data["params"][0][1][0] = [-1]  # was a bug in from_json: a negative index is taken from the end
    with pytest.raises(SpaceMismatch, match="not a weight space"):
        WeightSpace.from_json(json.dumps(data))


# ------------------------------------------------------------------------------ validation


def state(*batch: int) -> dict[str, torch.Tensor]:
    return {p.name: torch.zeros(*batch, *p.shape) for p in small().params}


@pytest.mark.parametrize("batch", [(), (2,), (2, 4)])
def test_validate_accepts(batch: tuple[int, ...]) -> None:
    assert small().validate(state(*batch)) is None
    assert small().validate(state(*batch) | {"not of the space": torch.zeros(3)}) is None


def test_validate_lists_every_offender() -> None:
    wrong = state()
    del wrong["w"]
    wrong["b"], wrong["mean"] = torch.zeros(4), torch.zeros(())
    with pytest.raises(SpaceMismatch) as caught:
        small().validate(wrong)
    text = str(caught.value)
    assert "no tensor 'w'" in text
    assert "'b' of shape (4,), expected trailing (15,) from axes (h*d)" in text
    assert "'mean' of shape ()" in text
    assert "'out'" not in text


def test_validate_wants_one_batch_shape() -> None:
    with pytest.raises(SpaceMismatch, match=r"'out' with batch axes \(3,\), others have \(2,\)"):
        small().validate(state(2) | {"out": torch.zeros(3, 7)})
