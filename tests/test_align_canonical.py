"""Canonical forms: one state for a whole orbit, and the same function."""

import functools
import math
import random
from collections.abc import Callable

import pytest
import torch
from cases import CASES, FEW, Double, build
from oracles import gap, outputs, state_of
from test_laws import generic
from torch import Tensor, nn

import wspace
from wspace.action import KINDS, State, Transform
from wspace.align.canonical.balance import balance
from wspace.align.canonical.form import canonical, canonicalize
from wspace.errors import SpaceMismatch
from wspace.space import Axis, Gauge, Group, Param, WeightSpace
from wspace.testing import TOLERANCE, assert_close, assert_same

EXACT = ("permutation", "sign")
FLAT = ("permutation", "sign", "phase")
LIMIT = TOLERANCE[torch.float64]
SCALED = """
    mlp mlp_batchnorm mlp_weight_norm nerf highway hypernet moe_dense moe_top2 squeezenet
    grouped_se group_norm attention_per_head swiglu language_model_tied siren arcee llama lora_mlp
""".split()


@functools.cache
def space_of(name: str) -> WeightSpace:
    module, args, kwargs = build(name)
    return wspace.trace(module, args, kwargs)


def states(space: WeightSpace, *lead: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, Tensor] = {}
    for p in space.params:
        dtype = torch.complex128 if "complex" in p.dtype else torch.float64
        x = torch.randn(*lead, *p.shape, generator=generator, dtype=dtype)
        out |= dict.fromkeys((p.name, *p.ties), x)
    return out


def assert_canonical(
    space: WeightSpace,
    state: State,
    generator: torch.Generator,
    *,
    kinds: tuple[str, ...],
    moved: tuple[str, ...] | None = None,
    batch: tuple[int, ...] = (),
) -> None:
    """Asserts that the form of `kinds` does not see what `moved` does, and is its own form."""
    exact = not {"scale", "phase"} & {g.kind for g in space.gauges} & {*kinds}
    same = assert_same if exact else assert_close
    t = wspace.sample(space, batch=batch, generator=generator, kinds=moved or kinds)
    form = canonicalize(state, space, kinds=kinds)
    same(form, canonicalize(wspace.act(t, state, space), space, kinds=kinds), space=space)
    same(form, canonicalize(form, space, kinds=kinds), space=space)


# ----------------------------------------------------------------------------- the laws


@pytest.mark.parametrize(
    "name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_one_form_for_an_orbit(name: str, generator: torch.Generator) -> None:
    """Bit for bit, but where phases move; each row of the batch by an element of its own."""
    space = space_of(name)
    assert_canonical(space, states(space, 2), generator, kinds=FLAT, batch=(2,))


@pytest.mark.parametrize("name", SCALED)
def test_one_form_for_an_orbit_with_scales(name: str, generator: torch.Generator) -> None:
    space = space_of(name)
    assert_canonical(space, states(space), generator, kinds=KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in CASES if n not in SCALED])
def test_one_form_for_an_orbit_with_scales_of_all(name: str, generator: torch.Generator) -> None:
    space = space_of(name)
    assert_canonical(space, states(space), generator, kinds=KINDS)


@pytest.mark.parametrize("kinds", [("permutation",), ("sign",), ("phase",), ("scale",), EXACT])
def test_one_form_for_an_orbit_of_some_kinds(
    kinds: tuple[str, ...], generator: torch.Generator
) -> None:
    for name in ("siren", "mlp", "mlp_batchnorm", "attention_per_head", "moe_dense"):
        space = space_of(name)
        assert_canonical(space, states(space), generator, kinds=kinds)


@pytest.mark.parametrize(
    "name", [n if n in SCALED else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_the_function_stays(name: str, generator: torch.Generator) -> None:
    module, args, kwargs = build(name)
    state = generic(state_of(module), generator)
    kinds = KINDS if name in SCALED else FLAT
    moved = canonicalize(state, space_of(name), kinds=kinds)
    before = outputs(module, state, args, kwargs, mode=Double())
    assert gap(before, outputs(module, moved, args, kwargs, mode=Double())) <= LIMIT


@pytest.mark.parametrize(
    ("name", "kinds", "moved"),
    [
        ("mlp", ("scale", "sign", "phase"), "permutation"),
        ("mlp", ("permutation", "sign", "phase"), "scale"),
        ("siren", ("permutation", "scale", "phase"), "sign"),
        ("siren", ("permutation", "scale", "sign"), "phase"),
    ],
)
def test_no_step_can_be_left_out(
    name: str, kinds: tuple[str, ...], moved: str, generator: torch.Generator
) -> None:
    space = space_of(name)
    with pytest.raises(AssertionError, match=r"not (the same|close)"):
        assert_canonical(space, states(space), generator, kinds=kinds, moved=(moved,))


def test_rows_have_forms_of_their_own() -> None:
    for name, kinds in (("siren", FLAT), ("moe_dense", KINDS), ("attention_per_head", KINDS)):
        space = space_of(name)
        state = states(space, 2, 2)
        form, t = canonicalize(state, space, kinds=kinds), canonical(state, space, kinds=kinds)
        assert t.batch == (2, 2)
        for i in range(2):
            for j in range(2):
                alone = canonicalize({n: x[i, j] for n, x in state.items()}, space, kinds=kinds)
                assert_close(alone, {n: x[i, j] for n, x in form.items()}, space=space)


def test_what_is_fixed_stays() -> None:
    space = space_of("mlp")
    state = states(space)
    form = canonicalize(state, space)
    assert_same(form["6.bias"], state["6.bias"])
    moved = canonicalize(state, space, kinds=EXACT)
    assert_same(moved["0.weight"].sort(0).values, state["0.weight"].sort(0).values)
    assert not torch.equal(moved["0.weight"], state["0.weight"])


def test_units_are_in_order_and_signs_positive() -> None:
    net = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 2))
    space = wspace.trace(net, torch.zeros(1, 3))
    form = canonicalize(states(space), space)
    sizes = form["0.weight"].abs().sum(1)
    assert bool((sizes.diff() > 0).all())
    assert bool((form["0.bias"] > 0).all())


def test_inputs_are_left_alone() -> None:
    space = space_of("siren")
    state = states(space)
    kept = {n: x.clone() for n, x in state.items()}
    canonicalize(state, space)
    assert_same(kept, state)


def test_other_entries_are_passed_on() -> None:
    space = space_of("language_model_tied")
    state = states(space) | {"steps": torch.tensor(3)}
    form = canonicalize(state, space, kinds=FLAT)
    assert form["steps"] is state["steps"]
    (p,) = (p for p in space.params if p.ties)
    assert form[p.name] is form[p.ties[0]]


def test_errors() -> None:
    space = space_of("mlp")
    with pytest.raises(SpaceMismatch, match="canonical: unknown 'rotation'"):
        canonical(states(space), space, kinds=("rotation",))
    with pytest.raises(SpaceMismatch, match=r"no tensor '0\.weight'"):
        canonical({}, space)
    with pytest.raises(SpaceMismatch, match=r"no tensor '0\.weight'"):
        balance({}, space)


def test_no_rows_and_no_groups() -> None:
    space = space_of("mlp")
    assert canonicalize(states(space, 0), space)["0.weight"].shape == (0, 12, 5)
    space = space_of("linear")
    state = states(space)
    assert canonicalize(state, space)["0.weight"] is state["0.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Exact kinds are exact in any precision."""
    space = space_of("mlp_layernorm_tanh")
    state = {n: x.to(dtype) for n, x in states(space).items()}
    assert_canonical(space, state, generator, kinds=EXACT)
    assert {x.dtype for x in canonicalize(state, space).values()} == {dtype}


def test_single_precision_with_scales(generator: torch.Generator) -> None:
    space = space_of("mlp")
    state = {n: x.float() for n, x in states(space).items()}
    assert_canonical(space, state, generator, kinds=KINDS)


# ----------------------------------------------------------------------------------- ties


def tanh_net(*widths: int) -> tuple[WeightSpace, dict[str, Tensor]]:
    layers = [
        m for a, b in zip(widths, widths[1:], strict=False) for m in (nn.Linear(a, b), nn.Tanh())
    ]
    space = wspace.trace(nn.Sequential(*layers[:-1]), torch.zeros(1, widths[0]))
    return space, states(space)


def test_dead_and_equal_units(generator: torch.Generator) -> None:
    space, state = tanh_net(3, 9, 11, 2)
    for i, j in ((1, 4), (1, 7)):  # three equal units
        for name, dim in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1)):
            state[name].select(dim, j).copy_(state[name].select(dim, i))
    for i in (2, 5):  # two dead ones
        for name, dim in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1)):
            state[name].select(dim, i).zero_()
    for _ in range(5):
        assert_canonical(space, state, generator, kinds=EXACT)


def test_many_dead_units(generator: torch.Generator) -> None:
    space, state = tanh_net(3, 300, 2)
    for x in (state["0.weight"], state["0.bias"]):
        x[5:] = 0
    state["2.weight"][:, 5:] = 0
    assert_canonical(space, state, generator, kinds=EXACT)


def test_units_that_differ_in_signs_only(generator: torch.Generator) -> None:
    """Equal moduli everywhere, so that only signed keys tell them apart."""
    space, state = tanh_net(3, 9, 2)
    for i, j in ((1, 4), (2, 7)):
        state["0.weight"][j], state["0.bias"][j] = state["0.weight"][i], state["0.bias"][i]
        state["2.weight"][:, j] = -state["2.weight"][:, i]
    for _ in range(5):
        assert_canonical(space, state, generator, kinds=EXACT)
        assert_canonical(space, state, generator, kinds=("permutation",))


def test_equal_branches(generator: torch.Generator) -> None:
    """Units that tie whatever is summed, and change places in two layers at once."""
    space, state = tanh_net(3, 4, 4, 2)
    for name in ("0.weight", "0.bias", "2.bias"):
        state[name][:] = state[name][:1]
    state["4.weight"][:] = state["4.weight"][:, :1]
    a, b = 0.7, 0.3
    ring = torch.tensor([[a, b, 0, 0], [0, a, b, 0], [0, 0, a, b], [b, 0, 0, a]])
    state["2.weight"] = ring.double()
    for _ in range(9):
        assert_canonical(space, state, generator, kinds=("permutation",))


def test_a_diagonal_tells_units_apart(generator: torch.Generator) -> None:
    """Rows and columns hold the same numbers; only where they stand in them differs."""
    a = Group("a", 4, ("permutation",))
    space = WeightSpace((Param("w", (Axis((a,)), Axis((a,)))),))
    w = torch.tensor([[1, 2, 0, 0], [2, 1, 0, 0], [0, 0, 2, 1], [0, 0, 1, 2]]).double()
    for _ in range(9):
        assert_canonical(space, {"w": w}, generator, kinds=("permutation",))


def test_ties_that_rounding_would_break(generator: torch.Generator) -> None:
    """Units of one size that only signed keys tell apart; scales leave noise in their sizes."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    space = wspace.trace(net, torch.zeros(1, 3))
    state = states(space)
    for x in (state["0.weight"], state["0.bias"]):
        x[:] = x[:1]
    state["2.weight"] = torch.tensor([[1.0, 2, 1, -2], [2, 1, -2, 1]]).double() / 3
    for _ in range(9):
        assert_canonical(space, state, generator, kinds=KINDS)


def test_fresh_networks(generator: torch.Generator) -> None:
    """Biases of zero and gains of one tie; the weights tell units apart."""
    for name in ("lora_gpt2", "vit", "mlp_batchnorm", "mlp_layernorm_tanh", "gpt2"):
        module = build(name)[0]
        assert_canonical(space_of(name), state_of(module), generator, kinds=EXACT)
    for name in ("mlp_batchnorm", "lora_mlp"):
        module = build(name)[0]
        assert_canonical(space_of(name), state_of(module), generator, kinds=KINDS)


def test_zeros(generator: torch.Generator) -> None:
    for name in ("mlp", "siren", "attention_per_head"):
        space = space_of(name)
        state = {n: torch.zeros_like(x) for n, x in states(space).items()}
        assert_same(canonicalize(state, space), state)
        assert_canonical(space, state, generator, kinds=EXACT)


def test_a_chain_of_signs_without_an_end(generator: torch.Generator) -> None:
    """No entry is met by one sign alone: two groups that only meet each other."""
    a, b = Group("a", 3, EXACT), Group("b", 4, EXACT)
    gauges = (
        Gauge("sign", "a", (("w", 0, 0, 1), ("v", 0, 0, 1))),
        Gauge("sign", "b", (("w", 1, 0, 1), ("v", 1, 0, 1))),
    )
    axes = (Axis((a,)), Axis((b,)))
    space = WeightSpace((Param("w", axes), Param("v", axes)), gauges=gauges)
    state = states(space)
    state["w"][0, 1:] = 0  # not connected through w alone
    state["w"][1:, 0] = 0
    for _ in range(5):
        assert_canonical(space, state, generator, kinds=EXACT)


# -------------------------------------------------------------------------------- sines


class Sines(nn.Module):
    """Two hidden layers of ``sin(ω(Wx + b))``."""

    def __init__(self, omega: float) -> None:
        super().__init__()
        self.omega = omega
        self.layers = nn.ModuleList([nn.Linear(2, 9), nn.Linear(9, 7), nn.Linear(7, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.sin(self.omega * layer(x))
        return self.layers[-1](x)


def published(state: State) -> dict[str, Tensor]:
    """The algorithm of the ScaleGMN appendix, as coded: no frequency, and the last layer, too."""
    out = dict(state)
    for i in range(3):
        w, b = out[f"layers.{i}.weight"], out[f"layers.{i}.bias"]
        sign = torch.where(b < 0, -1.0, 1.0).double()
        b = b * sign
        b = torch.where(b > 2 * math.pi, b.remainder(2 * math.pi), b)
        far, near = b > math.pi, (b > math.pi / 2) & (b <= math.pi)
        turn = torch.where(far | near, -1.0, 1.0).double()
        b = torch.where(far, b + math.pi, torch.where(near, b - math.pi, b))
        out[f"layers.{i}.weight"], out[f"layers.{i}.bias"] = sign[:, None] * w, b
        if i < 2:
            follow = out[f"layers.{i + 1}.weight"]
            out[f"layers.{i + 1}.weight"] = follow * (sign * turn)
    return out


@pytest.mark.parametrize("omega", [1.0, 30.0])
@pytest.mark.parametrize("std", [0.02, 1.0, 3.0])
def test_sines_land_in_the_interval(omega: float, std: float, generator: torch.Generator) -> None:
    net, x = Sines(omega).double(), torch.rand(16, 2, dtype=torch.float64)
    space = wspace.trace(net, x)
    state = states(space)
    for n in state:
        if "bias" in n:
            state[n] = state[n] * std
    form = canonicalize(state, space)
    before = outputs(net, state, (x,), {})
    assert gap(before, outputs(net, form, (x,), {})) <= LIMIT
    for i in range(2):
        b = form[f"layers.{i}.bias"]
        assert bool((b >= 0).all())
        assert bool((b <= math.pi / 2 / omega * (1 + 1e-12)).all())
    assert_same(form["layers.2.bias"], state["layers.2.bias"])
    assert_canonical(space, state, generator, kinds=KINDS)


def test_the_published_form_is_not_ours() -> None:
    """At ω = 30 it leaves the phases of small biases, and changes the function for large ones."""
    net, x = Sines(30.0).double(), torch.rand(16, 2, dtype=torch.float64)
    space = wspace.trace(net, x)
    state = states(space)
    before = outputs(net, state, (x,), {})
    assert gap(before, outputs(net, published(state), (x,), {})) > 0.1
    assert gap(before, outputs(net, canonicalize(state, space), (x,), {})) <= LIMIT
    for i in range(3):
        state[f"layers.{i}.bias"] *= 0.2
    left = published(state)["layers.0.bias"]
    assert_same(left, state["layers.0.bias"].abs())
    assert bool((left > math.pi / 60).any())


# ------------------------------------------------------------------------------- balance


def norms(state: State) -> tuple[Tensor, Tensor]:
    """Squared norms of what comes into, and of what leaves, the units of `relu_net`."""
    come = state["0.weight"].square().sum(-1) + state["0.bias"].square()
    return come, state["2.weight"].square().sum(-2)


def relu_net() -> tuple[WeightSpace, dict[str, Tensor]]:
    net = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 2))
    space = wspace.trace(net, torch.zeros(1, 3))
    return space, states(space)


def total(state: State) -> float:
    return float(sum(x.square().sum() for x in state.values()))


def test_balanced_units_come_and_leave_with_one_norm() -> None:
    space, state = relu_net()
    come, leave = norms(state)
    (factor,) = balance(state, space).factors.values()
    assert_close(factor, (leave / come) ** 0.25)
    come, leave = norms(wspace.act(balance(state, space), state, space))
    assert_close(come, leave)


@pytest.mark.parametrize("name", SCALED)
def test_balanced_weights_are_smallest(name: str, generator: torch.Generator) -> None:
    """No scale near by or far away makes the total square smaller."""
    space = space_of(name)
    one_sided = {i for i, g in enumerate(space.gauges) if len({e > 0 for *_, e in g.slots}) == 1}
    state = states(space)
    even = wspace.act(balance(state, space), state, space)
    least = total({p.name: even[p.name] for p in space.params})
    for power in (1.0, 0.01):
        t = wspace.sample(space, generator=generator, kinds=("scale",))
        factors = {i: s**power for i, s in t.factors.items() if i not in one_sided}
        other = wspace.act(Transform(space, {}, factors), even, space)
        if factors:
            assert total({p.name: other[p.name] for p in space.params}) > least


@pytest.mark.parametrize("name", ["mlp", "mlp_batchnorm", "highway", "moe_dense", "llama"])
def test_balance_commutes_with_other_symmetries(name: str, generator: torch.Generator) -> None:
    space = space_of(name)
    state, t = states(space), wspace.sample(space, generator=generator, kinds=EXACT)
    moved = wspace.act(t, state, space)
    left = wspace.act(balance(moved, space), moved, space)
    assert_close(wspace.act(t, wspace.act(balance(state, space), state, space), space), left)


def test_units_without_weights_on_a_side() -> None:
    """One side alone has unit norm; no side at all keeps its factor; nothing is NaN."""
    space, state = relu_net()
    state["2.weight"][:, 0] = 0
    state["0.weight"][1], state["0.bias"][1] = 0, 0
    for name, dim in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1)):
        state[name].select(dim, 2).zero_()
    t = balance(state, space)
    come, leave = norms(wspace.act(t, state, space))
    assert_close(come[0], torch.ones(()).double())
    assert_close(leave[1], torch.ones(()).double())
    assert float(t.factors[0][2]) == 1.0
    assert_close(come[3:], leave[3:])
    scaled = wspace.act(wspace.sample(space, kinds=("scale",)), state, space)
    assert_close(wspace.act(t, state, space), wspace.act(balance(scaled, space), scaled, space))


def test_exponents_other_than_one() -> None:
    """A squared ReLU: what leaves shrinks by the square of what comes."""
    a = Group("a", 5, ("permutation", "scale"))
    params = (Param("w", (Axis((a,)), Axis((Group("3", 3),)))), Param("v", (Axis((a,)),)))
    space = WeightSpace(params, gauges=(Gauge("scale", "a", (("w", 0, 0, 1), ("v", 0, 0, -2))),))
    state = states(space)
    form = wspace.act(balance(state, space), state, space)
    assert_close(form["w"].square().sum(1), 2 * form["v"].square())


def test_a_matrix_on_both_sides_of_one_group(generator: torch.Generator) -> None:
    """``W[i, j] s[i] / s[j]`` is balanced where rows and columns have one norm (Osborne 1960)."""
    a = Group("a", 7, ("permutation", "scale"))
    slots = (("w", 0, 0, 1), ("w", 1, 0, -1))
    space = WeightSpace(
        (Param("w", (Axis((a,)), Axis((a,)))),), gauges=(Gauge("scale", "a", slots),)
    )
    state = states(space)
    form = wspace.act(balance(state, space), state, space)["w"]
    assert_close(form.square().sum(0), form.square().sum(1))
    assert_canonical(space, state, generator, kinds=("permutation", "scale"))
    state["w"] = state["w"].tril()  # no minimum: it must stop, and stay finite
    assert bool(torch.isfinite(balance(state, space, steps=20).factors[0]).all())


def test_batches_are_balanced_row_by_row() -> None:
    space, _ = relu_net()
    state = states(space, 3)
    t = balance(state, space)
    assert t.batch == (3,)
    for r in range(3):
        alone = balance({n: x[r] for n, x in state.items()}, space)
        assert_close(alone.factors[0], t.factors[0][r])


# ------------------------------------------------------------------------ random networks


class Residual(nn.Module):
    """A random residual network: blocks with norms or without, of random widths."""

    def __init__(self, draw: random.Random, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        width = draw.randint(3, 9)
        self.act, self.inp, self.out = act, nn.Linear(4, width), nn.Linear(width, 3)
        inner = [draw.randint(2, 11) for _ in range(draw.randint(1, 3))]
        self.up = nn.ModuleList(nn.Linear(width, n) for n in inner)
        self.down = nn.ModuleList(nn.Linear(n, width) for n in inner)
        norms = draw.choice([nn.Identity, nn.BatchNorm1d, nn.LayerNorm])
        self.norms = nn.ModuleList(norms(width) for _ in inner)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for up, norm, down in zip(self.up, self.norms, self.down, strict=True):
            x = x + down(self.act(up(norm(x))))
        return self.out(x)


class Plain(nn.Module):
    """A random network without residuals."""

    def __init__(self, draw: random.Random, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        widths = [4, *(draw.randint(2, 11) for _ in range(draw.randint(1, 5))), 3]
        bias = draw.random() < 0.8
        self.act = act
        self.layers = nn.ModuleList(
            nn.Linear(a, b, bias=bias) for a, b in zip(widths, widths[1:], strict=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.act(layer(x))
        return self.layers[-1](x)


def sine(x: Tensor) -> Tensor:
    return torch.sin(7 * x)


@pytest.mark.parametrize("act", [torch.tanh, torch.relu, sine])
@pytest.mark.parametrize("make", [Plain, Residual])
def test_random_networks(
    make: type[nn.Module], act: Callable[[Tensor], Tensor], generator: torch.Generator
) -> None:
    draw = random.Random(int(torch.randint(1000, (), generator=generator)))
    for _ in range(4):
        net, x = make(draw, act).double().eval(), torch.randn(5, 4, dtype=torch.float64)
        space = wspace.trace(net, x)
        state = generic(state_of(net), generator)
        assert_canonical(
            space, {p.name: state[p.name] for p in space.params}, generator, kinds=KINDS
        )
        form = canonicalize(state, space)
        assert gap(outputs(net, state, (x,), {}), outputs(net, form, (x,), {})) <= LIMIT
