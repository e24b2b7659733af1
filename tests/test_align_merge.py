"""Interpolating and merging: ends, oracles, symmetry, integers, ties, types, and streams."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cases_hf as hf
import pytest
import torch
from cases import CASES, build
from oracles import gap, outputs, state_of
from torch import Tensor, nn

import wspace
from wspace.align.combine import Method, interpolated, merged
from wspace.align.merge import interpolate, interpolating, merge, merging
from wspace.errors import MergeError, SpaceMismatch
from wspace.io import load_checkpoint, save_checkpoint
from wspace.testing import TOLERANCE, assert_close, assert_same

State = dict[str, Tensor]
EXACT = TOLERANCE[torch.float64]
LARGE = set(hf.BUILDERS)
OPTIONS: dict[str, dict[str, Any]] = {
    "average": {},
    "weighted": {"weights": [0.5, 3.0, 1.25]},
    "task": {"method": "task", "scale": 0.3},
    "task_weighted": {"method": "task", "weights": [0.5, -1.0, 2.0], "scale": 0.7},
    "ties": {"method": "ties", "density": 0.4, "scale": 0.9},
    "ties_weighted": {"method": "ties", "density": 0.4, "weights": [0.2, 1.0, 0.5]},
}


def random_like(state: State, generator: torch.Generator) -> State:
    """Other values of the same types, whose ties are kept and whose integers are equal."""
    out: dict[int, Tensor] = {}
    for x in state.values():
        if x.is_floating_point() or x.is_complex():
            out.setdefault(id(x), torch.randn(x.shape, generator=generator, dtype=x.dtype))
        else:
            out.setdefault(id(x), x.clone())
    return {n: out[id(x)] for n, x in state.items()}


def few(
    generator: torch.Generator, count: int = 3, dtype: torch.dtype = torch.float64
) -> list[State]:
    """States of several shapes: a matrix, a vector, a number, and nothing."""
    shapes = {"w": (5, 7), "b": (11,), "s": (), "none": (0, 3)}
    return [
        {n: torch.randn(s, generator=generator, dtype=dtype) for n, s in shapes.items()}
        for _ in range(count)
    ]


def with_base(options: dict[str, Any], base: State) -> dict[str, Any]:
    return options | ({"base": base} if options.get("method") in {"task", "ties"} else {})


# --- oracles: one entry at a time -----------------------------------------------------


def entries(x: Tensor) -> list[float]:
    return x.reshape(-1).tolist()


def task_oracle(
    xs: Sequence[Tensor], base: Tensor, weights: Sequence[float], scale: float
) -> Tensor:
    out = []
    for i, origin in enumerate(entries(base)):
        out.append(origin + scale * sum(w * (entries(x)[i] - origin) for w, x in zip(weights, xs)))  # noqa: B905
    return torch.tensor(out, dtype=base.dtype).reshape(base.shape)


def ties_oracle(
    xs: Sequence[Tensor], base: Tensor, weights: Sequence[float], scale: float, density: float
) -> Tensor:
    """The three steps of the paper, for one tensor."""
    moves = []
    for x in xs:
        move = [p - q for p, q in zip(entries(x), entries(base), strict=True)]
        keep = sorted(range(len(move)), key=lambda i: -abs(move[i]))[
            : math.ceil(density * len(move))
        ]
        moves.append([v if i in keep else 0.0 for i, v in enumerate(move)])
    out = entries(base)
    for i in range(len(out)):
        votes = sum(w * m[i] for w, m in zip(weights, moves, strict=True))
        agree = [(w, m[i]) for w, m in zip(weights, moves, strict=True) if m[i] * votes > 0]
        if agree:
            out[i] += scale * sum(w * m for w, m in agree) / sum(w for w, _ in agree)
    return torch.tensor(out, dtype=base.dtype).reshape(base.shape)


def arc_oracle(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The point of the plane of two vectors at that part of their angle, by rotation."""
    u, v = torch.tensor(entries(a)), torch.tensor(entries(b))
    cosine = float(u @ v) / float(u.norm() * v.norm())
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    x = math.sin((1 - t) * angle) * u + math.sin(t * angle) * v
    return (x / math.sin(angle)).reshape(a.shape)


@pytest.mark.parametrize("label", OPTIONS)
def test_methods_do_what_they_say(label: str, generator: torch.Generator) -> None:
    for _ in range(20):
        base, *states = few(generator, 4)
        options = with_base(OPTIONS[label], base)
        found = merge(states, **options)
        weights = options.get("weights", [1.0] * 3)
        for n, x in found.items():
            xs = [s[n] for s in states]
            if options.get("method") == "task":
                want = task_oracle(xs, base[n], weights, options["scale"])
            elif options.get("method") == "ties":
                scale = options.get("scale", 1.0)
                want = ties_oracle(xs, base[n], weights, scale, options["density"])
            else:
                want = sum(w * y for w, y in zip(weights, xs, strict=True)) / sum(weights)
            assert_close(want, x)
        wrong = few(generator, 1)[0]
        with pytest.raises(AssertionError, match="not close"):
            assert_close(found, merge([wrong, *states[1:]], **options))


def test_arcs_are_rotations(generator: torch.Generator, float64: None) -> None:
    for _ in range(20):
        a, b = few(generator, 2)
        for t in (-0.25, 0.2, 0.5, 0.9, 1.3):
            found = interpolate(a, b, t, kind="spherical")
            for n in ("w", "b"):
                assert_close(arc_oracle(a[n], b[n], t), found[n])
            assert_close((1 - t) * a["s"] + t * b["s"], found["s"])  # parallel, or opposite
        same = merge([a, b], method="slerp", weights=[1.0, 3.0])
        assert_same(interpolate(a, b, 0.75, kind="spherical"), same)
        a = {n: x / x.norm() for n, x in a.items() if x.dim() and x.numel()}
        b = {n: b[n] / b[n].norm() for n in a}
        for x in interpolate(a, b, 0.3, kind="spherical").values():
            assert abs(float(x.norm()) - 1) < EXACT  # on the sphere
        for x in interpolate(a, b, 0.3).values():
            assert float(x.norm()) < 0.99


@pytest.mark.parametrize("gap_", [0.0, 1e-12, 1e-7, 1e-5, 1e-3])
def test_arcs_of_near_parallel_tensors_are_lines(
    gap_: float, generator: torch.Generator, float64: None
) -> None:
    """Without a jump where the formula is changed: the two differ by the angle's square."""
    a = torch.randn(9, generator=generator, dtype=torch.float64)
    b = 1.5 * a + gap_ * torch.randn(9, generator=generator, dtype=torch.float64)
    found, line = interpolated(a, b, 0.3, kind="spherical"), 0.7 * a + 0.3 * b
    assert float((found - line).abs().max()) <= max(10 * gap_**2, EXACT)
    if gap_ == 1e-3:
        assert_close(arc_oracle(a, b, 0.3), found)
        assert float((found - line).abs().max()) > 1e3 * EXACT
    for other in (-a, torch.zeros(9, dtype=torch.float64)):
        assert_close(0.7 * a + 0.3 * other, interpolated(a, other, 0.3, kind="spherical"))


# --- ends and equal states ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "spherical"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex128])
def test_ends_are_the_states_bit_for_bit(
    kind: Any, dtype: torch.dtype, generator: torch.Generator
) -> None:
    a, b = few(generator, 2, dtype)
    b["w"][0, 0] = math.nan
    a["w"][1, 1], b["w"][2, 2] = -0.0, -0.0
    found = interpolate(a, b, [0, 0.5, 1], kind=kind)
    for n in a:
        for at, x in ((0, a[n]), (2, b[n])):
            whole = found[n][at].contiguous().reshape(-1).view(torch.uint8)
            assert torch.equal(x.contiguous().reshape(-1).view(torch.uint8), whole)
        assert found[n].dtype == dtype
    assert not torch.equal(found["b"][1], a["b"])
    for t, x in ((0.0, a), (1, b)):
        assert_same(x, interpolate(a, b, t, kind=kind))
    for n in a:
        assert interpolate(a, b, 0, kind=kind)[n] is not a[n]  # new memory
        assert interpolate(a, b, 0, kind=kind)[n].data_ptr() != a[n].data_ptr() or not a[n].numel()


def test_several_places_are_each_of_them(generator: torch.Generator) -> None:
    a, b = few(generator, 2)
    a["count"] = b["count"] = torch.tensor([3, 4])
    places = torch.linspace(-0.5, 1.5, 5)
    for kind in ("linear", "spherical"):
        found = interpolate(a, b, places, kind=kind)
        for i, t in enumerate(places.tolist()):
            assert_same(interpolate(a, b, t, kind=kind), {n: x[i] for n, x in found.items()})


@pytest.mark.parametrize("label", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_equal_states_are_their_own_merge(
    label: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    base, state = few(generator, 2, dtype)
    options = with_base(OPTIONS[label], base)
    if "method" not in options:
        assert_same(state, merge([state] * 3, **options))
    else:
        assert_same(base, merge([base] * 3, **options))
        assert_same(base, merge([state] * 3, **options | {"scale": 0.0}))
    if options.get("method") == "ties":
        assert_close(state, merge([state] * 3, **options | {"density": 1.0, "scale": 1.0}))


def test_a_weight_of_all_is_that_model(generator: torch.Generator) -> None:
    states = few(generator, 3)
    states[0]["w"][0, 0] = math.inf
    for i in range(3):
        weights = [float(i == j) for j in range(3)]
        assert_same(states[i], merge(states, weights=weights))


# --- what is not averaged -------------------------------------------------------------


def test_integers_are_never_averaged(generator: torch.Generator) -> None:
    a, b, c = few(generator, 3)
    for i, s in enumerate((a, b, c)):
        s["steps"], s["index"] = torch.tensor(3 + i), torch.tensor([1, 2, 3])
        s["mask"] = torch.tensor([True, False])
    del c["index"]  # an older version wrote none
    b["position_ids"] = torch.arange(4)
    for found in (merge([a, b, c]), interpolate(a, b, 1.0), interpolate(a, c, 0.5)):
        assert set(found) == set(a)
        assert all(found[n] is a[n] for n in ("steps", "index", "mask"))
    b["index"] = torch.tensor([1, 2, 4])
    with pytest.raises(MergeError, match="'index' of torch.int64, other values in state 2"):
        merge([a, b])


def test_names_that_do_not_agree_are_listed(generator: torch.Generator) -> None:
    a, b = few(generator, 2)
    del b["w"]
    b["extra"], b["b"] = torch.zeros(2), torch.zeros(3)
    b["s"] = torch.tensor(1)
    for call in (lambda: interpolate(a, b, 0.5), lambda: merge([a, b])):
        with pytest.raises(MergeError, match="do not agree") as caught:
            call()
        for text in (
            "'w' in state 1, not in state 2",
            "'extra' in state 2, not in state 1",
            "'b' of (11,) in state 1, (3,) in state 2",
            "'s' of torch.float64 in state 1, torch.int64 in state 2",
        ):
            assert text in str(caught.value)
    base = few(generator, 1)[0]
    del base["b"]
    with pytest.raises(MergeError, match="'b' in state 1, not in state 3"):
        merge([a, a], method="task", base=base)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "mean"}, "method 'mean', expected one of average"),
        ({"weights": [1.0]}, "1 weights for 2 models"),
        ({"weights": [1.0, -1.0]}, "none below zero"),
        ({"weights": [0.0, 0.0]}, "one above"),
        ({"weights": [1.0, math.nan]}, "expected finite"),
        ({"method": "task"}, "no base for 'task'"),
        ({"base": {}}, "a base for 'average'"),
        ({"method": "ties", "density": 0.0}, "density 0.0"),
        ({"method": "ties", "density": 1.5}, "density 1.5"),
        ({"method": "task", "scale": math.inf}, "scale inf"),
        ({"align": "all"}, "align='all' is unknown"),
        ({"align": "many", "base": {}}, "align='many' with a base"),
    ],
)
def test_impossible_options(options: dict[str, Any], match: str) -> None:
    state = {"w": torch.zeros(2)}
    if "base" in options:
        options["base"] = state
    with pytest.raises(MergeError, match=match):
        merge([state, state], **options)


def test_impossible_numbers_of_models() -> None:
    state = {"w": torch.zeros(2)}
    with pytest.raises(MergeError, match="3 models, expected two"):
        merge([state] * 3, method="slerp")
    with pytest.raises(MergeError, match="no models"):
        merge([])
    with pytest.raises(MergeError, match="unknown kind"):
        interpolate(state, state, 0.5, kind="cubic")  # type: ignore[arg-type]
    with pytest.raises(MergeError, match="at most one"):
        interpolate(state, state, torch.zeros(2, 2))


# --- types, ties, inputs --------------------------------------------------------------


def test_low_precision_is_computed_in_float32(generator: torch.Generator) -> None:
    states = [{"w": torch.randn(500, generator=generator).bfloat16()} for _ in range(7)]
    wide = [{"w": s["w"].float()} for s in states]
    found = merge(states)["w"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, merge(wide)["w"].bfloat16())
    naive = sum(s["w"] / 7 for s in states)  # in bfloat16 throughout
    assert not torch.equal(found, naive)
    mixed = merge([states[0], {"w": states[1]["w"].double()}])["w"]
    assert mixed.dtype == torch.bfloat16


def test_complex_tensors(generator: torch.Generator) -> None:
    a, b, base = few(generator, 3, torch.complex128)
    assert_close({n: (x + b[n]) / 2 for n, x in a.items()}, merge([a, b]))
    split = [{n: torch.view_as_real(x) for n, x in s.items()} for s in (a, b, base)]
    for options in ({"method": "ties", "density": 0.3}, {"method": "task"}, {"method": "slerp"}):
        ours, real = (base, split[2]) if options["method"] != "slerp" else (None, None)
        whole = merge([a, b], base=ours, **options)
        parts = merge(split[:2], base=real, **options)
        assert_same(parts, {n: torch.view_as_real(x) for n, x in whole.items()})


def test_ties_stay_if_all_states_have_them(generator: torch.Generator) -> None:
    a, b, c = few(generator, 3)
    a["again"], b["again"], c["again"] = a["w"], b["w"], c["w"].clone()
    found = merge([a, b])
    assert found["again"] is found["w"]
    other = merge([a, c])
    assert other["again"] is not other["w"]
    assert_same(other["w"], other["again"])
    c["again"] = c["w"] + 1
    assert_close(merge([a, c])["again"], merge([a, c])["w"] + 0.5)


@pytest.mark.parametrize("name", ["language_model_tied", "t5"])
def test_ties_of_the_space_stay(name: str, generator: torch.Generator) -> None:
    module, args, kwargs = build(name)
    space = wspace.trace(module, args, kwargs)
    a = state_of(module)
    b = {n: x.clone() for n, x in random_like(a, generator).items()}  # a file may hold both
    (p,) = (p for p in space.params if p.ties)
    found = merge([a, b], space, align=False)
    assert all(found[tie] is found[p.name] for tie in p.ties)
    assert_close((a[p.name] + b[p.name]) / 2, found[p.name])
    found = merge([dict(reversed(a.items())), b], space, align=False)  # the tie comes first
    assert all(found[tie] is found[p.name] for tie in p.ties)
    without = merge([a, b])
    assert not any(without[tie] is without[p.name] for tie in p.ties)


@pytest.mark.parametrize("label", OPTIONS)
def test_inputs_are_left_alone(label: str, generator: torch.Generator) -> None:
    base, *states = few(generator, 4)
    kept = [{n: x.clone() for n, x in s.items()} for s in (base, *states)]
    found = merge(states, **with_base(OPTIONS[label], base))
    for x in found.values():
        x.add_(1)
    assert_same(kept, [base, *states])


# --- symmetry -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow) if c.slow or n in LARGE else n
        for n, c in CASES.items()
    ],
)
def test_merging_commutes_with_moving_all(name: str, generator: torch.Generator) -> None:
    """Without matching: one permutation of all models moves what they make, bit for bit or so."""
    module, args, kwargs = build(name)
    space = wspace.trace(module, args, kwargs)
    states = [random_like(state_of(module), generator) for _ in range(4)]
    t = wspace.sample(space, generator=generator)
    moved = [wspace.act(t, s, space) for s in states]
    for options in OPTIONS.values():
        if options.get("weights") is None:
            plain = merge(states[:3], space, align=False, **with_base(options, states[3]))
            other = merge(moved[:3], space, align=False, **with_base(options, moved[3]))
            assert_close(wspace.act(t, plain, space), other, space=space)
    for kind in ("linear", "spherical"):
        plain = interpolate(*states[:2], 0.3, kind=kind)
        other = interpolate(*moved[:2], 0.3, kind=kind)
        assert_close(wspace.act(t, plain, space), other, space=space)


def test_rows_of_a_batch_are_merged_for_themselves(generator: torch.Generator) -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    space = wspace.trace(module, torch.zeros(1, 3, dtype=torch.float64))
    rows = [[random_like(state_of(module), generator) for _ in range(3)] for _ in range(4)]
    stacked = [{n: torch.stack([r[i][n] for r in rows]) for n in rows[0][0]} for i in range(3)]
    for options in ({"method": "slerp"}, {"method": "ties", "density": 0.3}, {"method": "task"}):
        base = options["method"] != "slerp"
        found = merge(stacked[:2], space, align=False, base=stacked[2] if base else None, **options)  # type: ignore[arg-type]
        for i, (a, b, c) in enumerate(rows):
            one = merge([a, b], space, align=False, base=c if base else None, **options)  # type: ignore[arg-type]
            assert_close(one, {n: x[i] for n, x in found.items()})


# --- streams --------------------------------------------------------------------------


@pytest.mark.parametrize("label", OPTIONS)
def test_streamed_is_whole(label: str, tmp_path: Path, generator: torch.Generator) -> None:
    base, *states = few(generator, 4)
    for s in (base, *states):
        s["tied"], s["steps"] = s["w"], torch.tensor(3)
    options = with_base(OPTIONS[label], base)
    want = merge(states, **options)
    save_checkpoint(merging(states, **options), tmp_path / "m.safetensors")
    assert_same(want, dict(load_checkpoint(tmp_path / "m.safetensors")))
    save_checkpoint(interpolating(*states[:2], 0.3, kind="spherical"), tmp_path / "i.safetensors")
    want = interpolate(*states[:2], 0.3, kind="spherical")
    assert_same(want, dict(load_checkpoint(tmp_path / "i.safetensors")))
    how = Method(options.get("method", "average"), 3, None, 0.5)
    origin = base["w"] if "method" in options else None
    several = [s["w"] for s in states]
    assert_same(
        merged(several, how, origin),
        merge(states, method=how.name, density=0.5, base=base if "method" in options else None)[
            "w"
        ],
    )


# --- in one frame ---------------------------------------------------------------------

ACTIVATIONS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "relu": (nn.ReLU, ("permutation",)),
    "relu_scale": (nn.ReLU, ("permutation", "scale")),
    "gelu": (nn.GELU, ("permutation",)),
    "tanh_sign": (nn.Tanh, ("permutation", "sign")),
}


def one_layer(label: str) -> tuple[nn.Module, wspace.WeightSpace, tuple[str, ...]]:
    act, kinds = ACTIVATIONS[label]
    module = nn.Sequential(nn.Linear(3, 11), act(), nn.Linear(11, 2)).double()
    return module, wspace.trace(module, torch.zeros(1, 3, dtype=torch.float64)), kinds


def differs(module: nn.Module, a: State, b: State, generator: torch.Generator) -> float:
    x = torch.randn(17, 3, generator=generator, dtype=torch.float64)
    return gap(outputs(module, a, (x,), {}), outputs(module, b, (x,), {}))


@pytest.mark.parametrize("label", ACTIVATIONS)
@pytest.mark.parametrize(
    "options", [{}, {"align": "many"}, {"method": "slerp"}, {"weights": [3, 1]}]
)
def test_a_model_merged_with_itself_moved_is_itself(
    label: str, options: dict[str, Any], generator: torch.Generator
) -> None:
    module, space, kinds = one_layer(label)
    for _ in range(6):
        a = random_like(state_of(module), generator)
        t = wspace.sample(space, generator=generator, kinds=kinds)
        b = wspace.act(t, a, space)
        found = merge([a, b], space, kinds=kinds, **options)
        assert differs(module, a, found, generator) < EXACT
        plain = merge([a, b], space, kinds=kinds, **options | {"align": False})
        assert differs(module, a, plain, generator) > 1e-3
        for kind in ("linear", "spherical"):
            found = interpolate(a, b, 0.3, kind=kind, space=space, kinds=kinds)
            assert differs(module, a, found, generator) < EXACT
            if "scale" not in kinds:
                assert_close(a, found)


def beside(state: State, distance: float, generator: torch.Generator) -> State:
    other = random_like(state, generator)
    return {n: x + distance * other[n] for n, x in state.items()}


def test_many_models_are_merged_in_one_frame(generator: torch.Generator) -> None:
    module, space, _ = one_layer("relu")
    a = random_like(state_of(module), generator)
    near = [beside(a, 0.01, generator) for _ in range(5)]
    moved = [wspace.act(wspace.sample(space, generator=generator), s, space) for s in near]
    for align in (True, "first", "many"):
        found = merge(moved, space, align=align)  # type: ignore[arg-type]
        assert differs(module, merge(near), found, generator) < EXACT
    assert differs(module, merge(near), merge(moved), generator) > 1e-3


@pytest.mark.parametrize("label", ["task", "task_weighted", "ties", "ties_weighted"])
def test_models_are_brought_to_their_base(label: str, generator: torch.Generator) -> None:
    """So that differences to it are those of training, whatever moved the models since."""
    module, space, _ = one_layer("relu")
    base = random_like(state_of(module), generator)
    tuned = [beside(base, 0.02, generator) for _ in range(3)]
    moved = [wspace.act(wspace.sample(space, generator=generator), s, space) for s in tuned]
    want = merge(tuned, base=base, **OPTIONS[label])
    assert_close(want, merge(moved, space, base=base, **OPTIONS[label]))
    without = merge(moved, base=base, **OPTIONS[label])
    with pytest.raises(AssertionError, match="not close"):
        assert_close(want, without)


def test_rows_are_matched_for_themselves(generator: torch.Generator) -> None:
    module, space, _ = one_layer("relu")
    rows = [random_like(state_of(module), generator) for _ in range(4)]
    moved = [wspace.act(wspace.sample(space, generator=generator), s, space) for s in rows]
    a, b = ({n: torch.stack([s[n] for s in x]) for n in rows[0]} for x in (rows, moved))
    assert_close(a, merge([a, b], space))
    for kind in ("linear", "spherical"):
        found = interpolate(a, b, [0, 0.4], kind=kind, space=space)
        assert_close(a, {n: x[0] for n, x in found.items()})
        assert_close(a, {n: x[1] for n, x in found.items()})


FRAMES = """mlp_batchnorm autoencoder_tied moe_dispatch lstm resnet18 unet shufflenet_v2
            attention_unbind language_model_tied swiglu""".split()


@pytest.mark.parametrize("name", FRAMES)
def test_the_second_end_has_the_second_model_s_function(
    name: str, tmp_path: Path, generator: torch.Generator
) -> None:
    """Buffers, ties and families move along, in a stream as in memory."""
    module, args, kwargs = build(name)
    space = wspace.trace(module, args, kwargs)
    a, b = (random_like(state_of(module), generator) for _ in range(2))
    for s in (a, b):
        s |= {n: x.abs() + 0.5 for n, x in s.items() if n.endswith("running_var")}
    found = interpolate(a, b, 1, space=space)
    assert gap(outputs(module, b, args, kwargs), outputs(module, found, args, kwargs)) < EXACT
    assert any(not torch.equal(found[n], b[n]) for n in b)  # it did move
    save_checkpoint(interpolating(a, b, 0.3, space=space), tmp_path / "s.safetensors")
    want = interpolate(a, b, 0.3, space=space)
    stored = load_checkpoint(tmp_path / "s.safetensors")
    assert_same({n: want[n] for n in stored}, dict(stored))


def test_a_state_that_does_not_fit_the_space(generator: torch.Generator) -> None:
    module, space, _ = one_layer("relu")
    a, b = (random_like(state_of(module), generator) for _ in range(2))
    del b["0.bias"]
    for call in (lambda: merge([a, b], space), lambda: interpolate(a, b, 0.5, space=space)):
        with pytest.raises(SpaceMismatch, match=r"0\.bias"):
            call()
