"""What `trace` accepts, refuses and falls back to; and modules written in unusual ways."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from cases import build
from cases_mlp import ControlFlow, mlp
from oracles import disagreements
from test_laws import changes, observed
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.nn.utils import parametrize

import wspace
from wspace.errors import TraceError, UnknownOp
from wspace.space import Role, WeightSpace
from wspace.trace import rules

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two layers around a function of the hidden units."""

    def __init__(self, between: Callable[..., Tensor], hidden: int = 12, out: int = 12) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, hidden), nn.Linear(out, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.between(self.one(x)))


def proved(module: nn.Module, *args: object, **kwargs: object) -> WeightSpace:
    """The space of a module, traced without a change to it and verified."""
    before = observed(module, args, kwargs)
    space = wspace.trace(module, args, kwargs)
    assert changes(before, observed(module, args, kwargs)) == []
    assert wspace.verify(space, module, args, kwargs).ok
    return space


def is_plain(space: WeightSpace, hidden: str = "h", out: str = "h") -> bool:
    """True if a `Net` has the symmetry of a plain network."""
    want = {"one.weight": f"{hidden},5!", "one.bias": hidden, "two.weight": f"3!,{out}"}
    return not disagreements(space, want | {"two.bias": "3!"})


# ------------------------------------------------------------------------------------ errors


def test_a_module_without_parameters() -> None:
    with pytest.raises(TraceError, match="trace: Softmax has no parameters"):
        wspace.trace(nn.Softmax(-1), X)


def test_a_forward_that_fails() -> None:
    with pytest.raises(TraceError, match="Sequential failed on the example inputs") as caught:
        wspace.trace(mlp(5, 12, 3), torch.zeros(1, 6))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert "shapes" in str(caught.value)


def test_the_users_own_error_is_the_cause() -> None:
    def fail(h: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(TraceError, match="KeyError: 'mine'") as caught:
        wspace.trace(Net(fail), X)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_failing_forward_changes_nothing() -> None:
    module = nn.Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.Linear(13, 3))
    before = observed(module, (X,), {})
    with pytest.raises(TraceError, match="failed on the example inputs"):
        wspace.trace(module, X)
    assert changes(before, observed(module, (X,), {})) == []


def test_control_flow_on_weights_needs_weights() -> None:
    with pytest.raises(TraceError, match="could not be run without its weights") as caught:
        wspace.trace(ControlFlow().to("meta"), X)
    assert "real weights" in str(caught.value)


def test_control_flow_on_weights_is_run_for_real() -> None:
    space = proved(ControlFlow(), X)
    assert space.capture == "concrete"
    assert "concrete capture" in str(space)


@pytest.mark.parametrize("grouped", [False, True])
def test_attention_run_for_real(grouped: bool) -> None:
    """Fused attention kernels are one operator only where tensors are real."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            kv = 14 if grouped else 28
            self.q, self.k, self.v = nn.Linear(5, 28), nn.Linear(5, kv), nn.Linear(5, kv)
            self.out = nn.Linear(28, 3)

        def forward(self, x: Tensor) -> Tensor:
            if self.q(x).sum() > 1e9:  # needs the weights
                return x
            q, k, v = (
                m(x).unflatten(-1, (-1, 7)).transpose(1, 2) for m in (self.q, self.k, self.v)
            )
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
            return self.out(y.transpose(1, 2).flatten(2))

    space = proved(Attention(), torch.randn(2, 6, 5))
    assert space.capture == "concrete"
    queries = "g*r*d,5!" if grouped else "g*d,5!"
    values = "3!,g*r*v" if grouped else "3!,g*v"
    over = {"d": "g", "v": "g"} | ({"r": "g"} if grouped else {})
    want = {"q.weight": queries, "k.weight": "g*d,5!", "v.weight": "g*v,5!", "out.weight": values}
    weights = WeightSpace(tuple(p for p in space.params if p.name in want))
    assert disagreements(weights, want, over) == []


@pytest.mark.parametrize("capture", ["abstract", "concrete"])
def test_attention_to_a_learned_memory(capture: str) -> None:
    """The slots of the memory are in no order: keys and values move together."""

    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.out = nn.Linear(5, 7), nn.Linear(7, 3)
            self.k, self.v = (nn.Parameter(torch.randn(9, 7)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            if capture == "concrete" and self.k.sum() > 1e9:
                return x
            k, v = (t.expand(len(x), 1, -1, -1) for t in (self.k, self.v))
            y = F.scaled_dot_product_attention(self.q(x)[:, None], k, v)
            return self.out(y[:, 0])

    space = proved(Memory(), torch.randn(2, 6, 5))
    assert space.capture == capture
    want = {"q.weight": "d,5!", "k": "m,d", "v": "m,e", "out.weight": "3!,e"}
    weights = WeightSpace(tuple(p for p in space.params if p.name in want))
    assert disagreements(weights, want) == []


def test_control_flow_on_inputs_is_abstract() -> None:
    module = Net(lambda h: h.relu())
    module.register_forward_pre_hook(lambda m, a: (a[0] if a[0].sum() > 0 else -a[0],))
    space = proved(module, X)
    assert space.capture == "abstract"
    assert is_plain(space)


def test_meta_inputs_are_refused() -> None:
    with pytest.raises(TraceError, match="real tensors"):
        wspace.trace(mlp(5, 12, 3), X.to("meta"))


# ---------------------------------------------------------------------- unknown operators


@pytest.fixture(scope="module")
def opaque_op() -> Iterator[Callable[[Tensor], Tensor]]:
    """An operator that torch cannot take apart: it reverses the last axis."""
    with torch.library._scoped_library("wspace_test", "FRAGMENT") as library:
        library.define("reverse(Tensor x) -> Tensor")
        library.impl("reverse", lambda x: x.flip(-1), "CPU")
        library.impl("reverse", torch.empty_like, "Meta")
        yield torch.ops.wspace_test.reverse


def test_an_unknown_operator_is_frozen_and_listed(opaque_op: Callable[[Tensor], Tensor]) -> None:
    module = nn.Sequential(
        nn.Linear(5, 7), nn.ReLU(), Net(opaque_op, 12, 12), nn.ReLU(), nn.Linear(3, 2)
    )
    module[2].one = nn.Linear(7, 12)
    space = proved(module, X)
    assert [op.op for op in space.opaque] == ["wspace_test.reverse.default"]
    assert space.opaque[0].source.startswith("test_trace.py:")
    assert "Net.forward" in space.opaque[0].source
    assert {g.size for g in space.groups.values()} == {7, 3}  # lost, but only there
    assert "1 opaque" in space.summary()
    assert f"frozen by {space.opaque[0].op}" in str(space)


def test_an_unknown_operator_may_raise(opaque_op: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UnknownOp, match=r"no rule for wspace_test\.reverse(.|\n)*test_trace\.py"):
        wspace.trace(Net(opaque_op), X, on_unknown="raise")
    assert wspace.trace(Net(torch.relu), X, on_unknown="raise").opaque == ()


def test_a_composite_operator_is_taken_apart() -> None:
    with torch.library._scoped_library("wspace_test", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x.relu() + x.tanh(), "CompositeImplicitAutograd")
        space = proved(Net(torch.ops.wspace_test.twice), X)
    assert space.opaque == ()
    assert is_plain(space)


def test_a_rule_that_fails_is_not_a_missing_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(s: object, self: object) -> None:
        raise ZeroDivisionError("the rule is wrong")

    assert "permute" in rules.RULES
    monkeypatch.setitem(rules.RULES, "permute", broken)
    monkeypatch.setitem(rules._SIGNATURES, "permute", ("self",))
    with pytest.raises(ZeroDivisionError, match="the rule is wrong"):
        wspace.trace(Net(lambda h: h.permute(1, 0).permute(1, 0)), X)


def test_a_rule_of_the_wrong_shape_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rules.RULES, "permute", lambda s, self: list(self.axes))
    monkeypatch.setitem(rules._SIGNATURES, "permute", ("self",))
    with pytest.raises(AssertionError, match="rule of aten.permute"):
        wspace.trace(Net(lambda h: h.permute(1, 0).permute(1, 0)), X)


# -------------------------------------------------------------- modules in unusual clothes


def written(h: Tensor) -> Tensor:
    """A buffer filled in two pieces, through views."""
    buffer = torch.zeros(h.shape[0], 2, h.shape[1], dtype=h.dtype)
    buffer[:, 0] = h
    buffer[:, 1].copy_(h.tanh())
    return buffer.sum(1)


def view_then_change(h: Tensor) -> Tensor:
    view = h.view(4, 3, 4)
    h.mul_(2)  # seen through the view
    return view.relu().flatten(1)


def half_in_place(h: Tensor) -> Tensor:
    """Four of twelve units are changed in place: they are apart from the others."""
    h[:, :4] += 1
    return h.relu()


def swapped_in_place(h: Tensor) -> Tensor:
    """The first half is overwritten by the second."""
    h[:, :6] = h[:, 6:]
    return h.relu()


@pytest.mark.parametrize(
    "between",
    [
        lambda h: h.relu_().mul_(2).add_(h),
        lambda h: F.relu(h, inplace=True),
        lambda h: torch.nn.functional.dropout(h, 0.5, training=False).clamp_(-1, 1),
        lambda h: h.data.tanh(),
        lambda h: h.detach().clone().relu_(),
        lambda h: torch.where(h > 0, h, torch.zeros_like(h)),
        lambda h: h.masked_fill(h < 0, 0.0),
        lambda h: torch.stack([h, h.tanh()], 0).mean(0),
        lambda h: (h[..., None] * h[:, None]).sum(-1).relu(),
        lambda h: h.unflatten(1, (3, 4)).flatten(1).sigmoid(),
        lambda h: torch.utils.checkpoint.checkpoint(torch.tanh, h, use_reentrant=False),
        torch.vmap(torch.tanh),
        lambda h: h.new_tensor(2.0) * h.softmax(-1),
        lambda h: h.to(torch.float64).sin().to(h.dtype),
        written,
        view_then_change,
    ],
    ids=[
        "in place", "inplace relu", "clamp_", "data", "detach", "where", "masked_fill", "stack",
        "outer", "views", "checkpoint", "vmap", "new_tensor", "cast",
        "written through views", "view then change",
    ],
)  # fmt: skip
def test_the_hidden_units_stay_free(between: Callable[[Tensor], Tensor]) -> None:
    space = proved(Net(between), X)
    assert space.capture == "abstract"
    assert all(g.size in (12, 3, 4) for g in space.groups.values())
    assert space.coverage > 0.9


@pytest.mark.parametrize(
    "between",
    [
        lambda h: torch.view_as_real(torch.complex(h, h.tanh()) * (1 + 2j)).sum(-1),
        lambda h: torch.polar(h.abs(), h).real,
        lambda h: torch.fft.fft(h, dim=0).abs(),
    ],
    ids=["complex", "polar", "fft over the batch"],
)
def test_complex_numbers_keep_the_symmetry_or_say_where_it_went(
    between: Callable[[Tensor], Tensor],
) -> None:
    space = proved(Net(between), X)
    assert space.opaque or is_plain(space)


def test_an_in_place_change_of_some_units_sets_them_apart() -> None:
    """Sound whatever it finds: no unit of the four may change places with one of the others."""
    space = proved(Net(half_in_place), X)
    assert all(g.size in (4, 8) for g in space.groups.values())


def test_units_that_are_overwritten() -> None:
    space = proved(Net(swapped_in_place), X)
    assert all(g.size == 6 for g in space.groups.values())


class Plain(nn.Module):
    """Parameters in lists and dicts, a tensor that is no buffer, and one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(5, 12), torch.randn(12, 3)])
        self.named = nn.ParameterDict({"bias": nn.Parameter(torch.randn(12))})
        self.mask = torch.ones(12)  # not registered
        self.index = torch.arange(4)
        self.register_buffer("shift", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        h = (x[self.index] @ self.weights[0] + self.named["bias"]) * self.mask
        return (h + self.shift).relu() @ self.weights[1]


def test_parameters_in_lists_and_dicts() -> None:
    want = {"weights.0": "5!,h", "weights.1": "h,3!", "named.bias": "h", "shift": ""}
    space = wspace.trace(Plain(), X)
    del want["shift"]
    assert not disagreements(WeightSpace(space.params[:3]), want)
    assert wspace.verify(space, module := Plain(), X).ok
    assert isinstance(module.mask, Tensor)


def test_nothing_is_left_on_tensors_of_the_module() -> None:
    """Constants keep a `_wspace` attribute, which holds axes of a finished trace."""
    module = Plain()
    wspace.trace(module, X)
    left = [vars(t) for t in (module.mask, module.index, module.shift, *module.parameters())]
    assert left == [{}] * len(left)


def test_a_constant_that_two_modules_share_is_new_to_each() -> None:
    """The second trace uses the axes that the first has given to a constant."""

    def net(shared: Tensor) -> nn.Module:
        return Net(lambda h: h.relu() * shared)

    want = wspace.trace(net(torch.ones(12)), X)
    shared = torch.ones(12)
    wspace.trace(nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 5), net(shared)), X)
    assert wspace.trace(net(shared), X) == want


def test_a_traced_module_can_be_copied_and_pickled() -> None:
    """Once wrong in capture: as above; a copy or a pickle would carry the trace along."""
    module = Plain()
    before = pickle.dumps(module)
    wspace.trace(module, X)
    assert len(pickle.dumps(module)) == len(before)
    assert wspace.trace(copy.deepcopy(module), X) == wspace.trace(module, X)


def test_parametrizations() -> None:
    class Symmetric(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w.triu() + w.triu(1).T

    module = mlp(5, 12, 12, 3)
    parametrize.register_parametrization(module[2], "weight", Symmetric())
    space = proved(module, X)
    assert space.opaque == ()
    weight = "parametrizations.weight.original"
    assert [a.fixed for a in space[f"2.{weight}"].axes] == [True, True]

    class Exp(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w.exp() / w.exp().sum(-1, keepdim=True)

    module = mlp(5, 12, 20, 3)
    parametrize.register_parametrization(module[2], "weight", Exp())
    space = proved(module, X)
    assert [a.fixed for a in space[f"2.{weight}"].axes] == [False, False]


def test_spectral_norm() -> None:
    """The rule of `dot` is also that of `vdot`, whose argument is named `other`."""
    module = mlp(5, 12, 20, 3)
    nn.utils.parametrizations.spectral_norm(module[2])
    space = proved(module, X)
    assert space.coverage > 0.9


def test_hooks_are_part_of_the_function() -> None:
    module = mlp(5, 12, 20, 3)
    module[0].register_forward_hook(lambda m, a, y: y.roll(1, -1))  # the order matters now
    module[3].register_forward_pre_hook(lambda m, a: (a[0] * 2,))
    space = proved(module, X)
    assert [g.size for g in space.groups.values()] == [20]


def test_shared_modules_are_one() -> None:
    layer = nn.Linear(12, 12)
    module = nn.Sequential(nn.Linear(5, 12), layer, nn.Tanh(), layer, nn.Linear(12, 3))
    space = proved(module, X)
    assert space["1.weight"] is space["3.weight"]
    assert space["1.weight"].ties == ("3.weight",)
    assert str(space["1.weight"]) == "1.weight(h1, h1)"


def test_a_module_under_two_names() -> None:
    module = Net(torch.relu)
    module.alias = module.one
    space = proved(module, X)
    assert set(space.by_name) >= {"one.weight", "alias.weight"}
    assert len([p for p in space.params if "weight" in p.name]) == 2


def test_ties_by_storage() -> None:
    module = Net(torch.tanh, 12, 12)
    module.three = nn.Linear(5, 12, bias=False)
    module.three.weight.data = module.one.weight.data
    space = proved(module, X)
    assert space["one.weight"] is space["three.weight"]


def test_tied_transposed_weights() -> None:
    """Every group lies on one tensor only, so no control breaks the symmetry."""

    class Auto(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(12, 5))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.w.T).relu() @ self.w

    assert str(proved(Auto(), X).params[0]) == "w(h1, 5!)"


def test_a_view_that_cannot_be_described() -> None:
    """The part of a view that was placed before it gave up stayed free."""

    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.randn(6, 2))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.p.view(2, 2, 3)

    assert not proved(Viewed(), torch.randn(2, 2, 3)).groups


def test_a_dependence_on_an_index_that_occurs_twice() -> None:
    """Once wrong in solve.settle: with axes (h, h, d), d may not depend on h: which of the two?"""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p, self.q = nn.Parameter(torch.randn(2, 2, 3)), nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.dot(self.p.flatten(), self.p.transpose(0, 1).flatten()) * self.q * x

    module, x = Twice(), torch.randn(5)
    space = wspace.trace(module, x)
    state = {n: t.detach().double() for n, t in module.named_parameters()}
    for seed in range(5):
        t = wspace.sample(space, generator=torch.Generator().manual_seed(seed))
        p = wspace.act(t, state, space)["p"]
        assert torch.allclose(
            (p * p.mT.mT.transpose(0, 1)).sum(), (state["p"] * state["p"].transpose(0, 1)).sum()
        )


def test_a_dependence_on_one_of_two_fixed_indices_that_are_exchanged() -> None:
    """Fixed axes that are identified stay two atoms, so d may depend on one of them.

    The units d at place (i, j) meet those at (j, i), so that they must agree.
    """

    class Exchanged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.randn(2, 2, 3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            squares = (self.p * self.p).sum((1, 2)) * x  # the first axis is an output
            return squares, torch.dot(self.p.flatten(), self.p.transpose(0, 1).flatten()), x

    module, x = Exchanged(), torch.randn(2)
    space = wspace.trace(module, x)
    p = module.p.detach().double()
    for seed in range(5):
        t = wspace.sample(space, generator=torch.Generator().manual_seed(seed))
        q = wspace.act(t, {"p": p}, space)["p"]
        torch.testing.assert_close((q * q.transpose(0, 1)).sum(), (p * p.transpose(0, 1)).sum())


# -------------------------------------------------------------------------- inputs, outputs


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Inputs(nn.Module):
    """Positional and keyword inputs, nested; a nested output."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.one, self.two = nn.Embedding(11, 5), nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(
        self,
        ids: Tensor,
        pair: tuple[Tensor, dict[str, Tensor]],
        *,
        scale: float = 1.0,
        mask: Tensor,
    ) -> dict[str, object]:
        h = self.one(self.table(ids) * scale + pair[0] + pair[1]["x"]).relu() * mask
        return {"a": [self.two(h)], "b": Pair(h.sum(-1), ids), "c": None, "d": "text"}


def test_inputs_and_outputs_of_every_form() -> None:
    module, ids = Inputs(), torch.arange(4)
    space = proved(module, ids, (X, {"x": X}), mask=torch.ones(4, 1), scale=2.0)
    assert [g.size for g in space.groups.values()] == [12]  # x is added to the embedding
    assert str(space["two.weight"]) == "two.weight(3!, h1)"
    assert space["table.weight"].role is Role.TABLE


def test_a_returned_hidden_state_is_fixed() -> None:
    class Both(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.one(x).relu()
            return h, self.two(h)

    assert not proved(Both(torch.relu), X).groups


def test_a_tensor_stands_for_a_tuple_of_one() -> None:
    module = mlp(5, 12, 3)
    assert wspace.trace(module, X) == wspace.trace(module, (X,)) == wspace.trace(module, [X])  # type: ignore[arg-type]
    assert wspace.trace(module, kwargs={"input": X}) == wspace.trace(module, X)


def test_inputs_are_not_changed() -> None:
    """In the abstract mode an in-place operator writes to the caller's input."""
    module = Net(torch.relu)
    module.register_forward_pre_hook(lambda m, a: (a[0].mul_(2),))
    for m in (module, ControlFlow()):
        x = X.clone()
        wspace.trace(m, x)
        assert torch.equal(x, X)
        assert vars(x) == {}


def test_inputs_that_want_gradients() -> None:
    x = X.clone().requires_grad_()
    module = mlp(5, 12, 3)
    assert wspace.trace(module, x) == wspace.trace(module, X)
    assert x.grad is None


def test_float16_and_complex_parameters() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.randn(5, 12, dtype=torch.complex64))
            self.two = nn.Parameter(torch.randn(12, 3, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x.to(torch.complex64) @ self.one) @ self.two

    space = wspace.trace(Complex(), X)
    assert [str(p) for p in space.params] == ["one(5!, h1)", "two(h1, 3!)"]
    assert space.params[0].dtype == "complex64"
    half = wspace.trace(mlp(5, 12, 3).half(), X.half())
    assert half.params[0].dtype == "float16"


# --------------------------------------------------------------------------- no real weights


MAKERS = {"mlp": lambda: mlp(5, 12, 20, 3), "in place": lambda: Net(written)}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_meta_modules(make: Callable[[], nn.Module]) -> None:
    want = wspace.trace(make(), X)
    with torch.device("meta"):
        assert wspace.trace(make(), X) == want


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_fake_modules(make: Callable[[], nn.Module]) -> None:
    """ "operator prim::device does not exist" for parameters of a FakeTensorMode."""
    want = wspace.trace(make(), X)
    with FakeTensorMode():
        fake = make()
    assert wspace.trace(fake, X) == want


def test_recurrent_modules_need_no_weights() -> None:
    """Once wrong in capture: `nn.LSTM` on the meta device refuses inputs on the CPU."""

    class Readout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.LSTM(5, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0])

    x = torch.randn(4, 2, 5)
    with torch.device("meta"):
        blank = Readout()
    blank_space, space = wspace.trace(blank, x), wspace.trace(Readout(), x)
    assert (blank_space.params, blank_space.gauges) == (space.params, space.gauges)


def test_no_weight_is_read() -> None:
    """NaN weights, and weights far too large to exist, are traced all the same."""
    module = mlp(5, 12, 3)
    want = wspace.trace(module, X)
    for t in module.parameters():
        nn.init.constant_(t, torch.nan)
    assert wspace.trace(module, X) == want
    with torch.device("meta"):
        huge = mlp(5, 300_000, 300_007, 3)
    assert [g.size for g in wspace.trace(huge, X).groups.values()] == [300_000, 300_007]


# ------------------------------------------------------------------- modes and statistics


def test_training_modules_keep_mode_and_statistics() -> None:
    module = nn.Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.Dropout(), nn.Linear(12, 3))
    module.train()
    module[2].eval()
    space = proved(module, X)  # looks at every mode and buffer
    assert [m.training for m in module] == [True, True, False, True]
    assert int(module[1].num_batches_tracked) == 0
    assert space["1.running_mean"].buffer
    assert space["1.running_mean"].role is Role.STATISTIC


def test_gradients_and_flags_survive() -> None:
    module = mlp(5, 12, 3)
    module[0].weight.requires_grad_(False)
    module(X).sum().backward()
    before = module[2].weight.grad
    assert before is not None
    proved(module, X)
    assert module[2].weight.grad is before
    assert module[0].weight.grad is None


def test_a_backward_pass_may_be_under_way() -> None:
    for module in (mlp(5, 12, 3), ControlFlow()):
        loss = module(X).square().sum()
        wspace.trace(module, X)
        loss.backward()
        assert all(p.grad is not None for n, p in module.named_parameters() if "no" not in n)


def test_inside_inference_and_grad_modes() -> None:
    """Once wrong in capture: under `inference_mode` the scale symmetry of a ReLU layer is lost."""
    module = mlp(5, 12, 3)
    want = wspace.trace(module, X)
    with torch.inference_mode():
        assert wspace.trace(module, X) == want
    with torch.no_grad():
        assert wspace.trace(module, X) == want


def test_random_forward_is_repeatable() -> None:
    class Noisy(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.randn_like(x)) + torch.rand(3)

    space = proved(Noisy(torch.relu), X)
    assert is_plain(space)


def test_unused_parameters_are_fixed_and_say_so() -> None:
    module = Net(torch.relu)
    module.spare = nn.Linear(12, 7)
    space = proved(module, X)
    assert space["spare.weight"].fixed
    assert space["spare.weight"].role is Role.UNUSED


@pytest.mark.parametrize(
    ("module", "roles"),
    [
        (mlp(5, 12, 3), {"0.weight": "matrix", "0.bias": "shift"}),
        (
            nn.Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.Linear(12, 3)),
            {"1.weight": "scale", "1.bias": "shift", "1.running_var": "statistic"},
        ),
        (
            nn.Sequential(nn.Linear(5, 12), nn.LayerNorm(12), nn.Linear(12, 3)),
            {"1.weight": "scale", "1.bias": "shift"},
        ),
    ],
)
def test_roles(module: nn.Module, roles: dict[str, str]) -> None:
    space = wspace.trace(module, X)
    assert {name: space[name].role.value for name in roles} == roles


def test_a_forward_that_casts_its_parameters() -> None:
    """What `Module.to` does inside a forward (Switch's router) outlives the trace."""

    class Casts(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.one = self.one.to(torch.float32)
            if self.one.weight.sum() > 1e9:  # needs the weights
                return x
            return self.two(self.one(x.float()).relu().to(x.dtype))

    module, x = Casts(torch.relu).double(), X.double()
    before = observed(module, (x,), {})
    wspace.trace(module, x)
    assert changes(before, observed(module, (x,), {})) == []


def test_numbers_taken_out_past_the_dispatcher_fix_what_they_come_from() -> None:
    """`tolist` and `numpy` are no operators; what they read decides which units do what."""

    class Ranked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.parts = nn.Linear(5, 4), nn.Parameter(torch.randn(4, 5))

        def forward(self, x: Tensor) -> Tensor:
            counts = self.gate(x).argmax(-1, keepdim=True)
            hits = torch.zeros(len(x), 4, dtype=x.dtype).scatter(1, counts, 1.0).sum(0)
            sizes = hits.long().tolist()
            return x * sum(n * (i + 1) * self.parts[i] for i, n in enumerate(sizes))

    space = proved(Ranked(), torch.randn(9, 5))
    assert space.capture == "concrete"
    assert "gate.weight(4!, 5!)" in str(space)


def test_sorted_indices_are_in_the_order_of_what_they_point_to() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.weight = nn.Linear(5, 4), nn.Parameter(torch.randn(6, 5))

        def forward(self, x: Tensor) -> Tensor:
            order = self.gate(x).argmax(-1).sort().indices
            return x[order] * self.weight

    assert "gate.weight(4!, 5!)" in str(proved(Sorted(), torch.randn(6, 5)))


def test_a_dependence_on_fixed_indices_that_are_identified_late() -> None:
    """Both indices are fixed before they turn out to be one: units may not differ by either."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.randn(2, 2, 3))

        def forward(self, x: Tensor) -> Tensor:
            first = (self.p.square() * x[..., None]).sum(-1)
            return first + (self.p * self.p.transpose(0, 1)).sum(-1)

    proved(Late(), torch.randn(2, 2))


@pytest.mark.parametrize("name", ["moe_dense", "moe_summed", "moe_averaged"])
def test_experts_of_a_sum_are_a_group(name: str) -> None:
    """Whatever a sum starts with; of a stack only where its order is lost."""
    module, args, kwargs = build(name)
    space = wspace.trace(module, args, kwargs)
    slots = [p.at for p in space.params if p.name.startswith("experts.")]
    assert all(slots) and len(set(slots)) == 3


def test_experts_that_are_weighted_by_place_are_none() -> None:
    module, args, kwargs = build("moe_ordered")
    assert not any(p.at for p in wspace.trace(module, args, kwargs).params)
