"""The core of hypernetworks: choice of tensors, calls, gradients, errors, and what follows them."""

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm

import wspace
from wspace.errors import HyperError
from wspace.hyper import ChunkedHead, FullHead, HyperNetwork, TaskEmbedding, call, pull_back
from wspace.hyper.target import parameters_of
from wspace.space import Role
from wspace.testing import TOLERANCE, assert_close, assert_same

pytestmark = pytest.mark.usefixtures("float64")
TIGHT = TOLERANCE[torch.float64]


class Tied(nn.Module):
    """A linear layer used twice, a norm, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.norm = nn.LayerNorm(5)
        self.shift = nn.Parameter(torch.randn(5))
        self.register_buffer("constant", torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(self.first(x).tanh())) + self.shift * self.constant


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 2))


def hyper_of(target: nn.Module, **options: Any) -> HyperNetwork:
    return HyperNetwork(target, TaskEmbedding(4, 3), FullHead([8]), **options)


# --------------------------------------------------------------------------- choosing


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("*", {"shift", "first.weight", "first.bias", "second.bias", "norm.weight", "norm.bias"}),
        ("*.bias", {"first.bias", "second.bias", "norm.bias"}),
        (nn.Linear, {"first.weight", "first.bias", "second.bias"}),
        ("type:LayerNorm", {"norm.weight", "norm.bias"}),
        (["second.weight", "shift"], {"first.weight", "shift"}),
        (lambda name, owner, p: p.dim() == 2, {"first.weight"}),
    ],
)
def test_select_chooses(select: Any, expected: set[str]) -> None:
    hyper = hyper_of(Tied(), select=select)
    assert set(hyper.coverage.generated) == expected
    every = {f.names[0] for f in parameters_of(Tied())}
    assert set(hyper.coverage.shared) == every - expected
    assert set(hyper.coverage.untouched) == {"constant"}
    trained = {n for n, _ in hyper.target.named_parameters()}
    assert trained == every - expected


def test_share_chooses_what_is_trained() -> None:
    hyper = hyper_of(Tied(), select="first.*", share="norm.*")
    assert set(hyper.coverage.shared) == {"norm.weight", "norm.bias"}
    assert set(hyper.coverage.untouched) == {"constant", "shift", "second.bias"}
    trained = {n for n, p in hyper.target.named_parameters() if p.requires_grad}
    assert trained == {"norm.weight", "norm.bias"}
    nothing = hyper_of(Tied(), select="first.*", share=None)
    assert not any(p.requires_grad for p in nothing.target.parameters())


def test_star_leaves_frozen_parameters_and_names_do_not() -> None:
    target = net()
    target[0].weight.requires_grad_(False)
    assert "0.weight" in hyper_of(target).coverage.untouched
    assert "0.weight" in hyper_of(target, select="0.*").coverage.generated


def test_weights_are_described() -> None:
    parts = nn.ModuleDict(
        {
            "conv": nn.Conv2d(4, 6, 3, groups=2),
            "up": nn.ConvTranspose2d(4, 6, 3, groups=2),
            "strided": nn.ConvTranspose2d(4, 6, 3, stride=2),
            "lstm": nn.LSTM(5, 7),
            "gru": nn.GRU(5, 7),
            "attention": nn.MultiheadAttention(6, 2),
            "table": nn.Embedding(11, 3),
            "norm": nn.GroupNorm(2, 4),
            "normed": weight_norm(nn.Linear(3, 8)),
        }
    )
    found = {w.name: w for w in hyper_of(parts).weights}
    assert (found["conv.weight"].fan_in, found["conv.weight"].fan_out) == (18, 27)
    assert (found["conv.bias"].fan_in, found["conv.bias"].role) == (18, Role.SHIFT)
    assert (found["up.weight"].fan_in, found["up.weight"].fan_out) == (18, 27)
    assert (found["lstm.weight_hh_l0"].fan_in, found["lstm.weight_hh_l0"].fan_out) == (7, 7)
    assert found["lstm.weight_ih_l0"].fan_in == 5
    assert (found["gru.weight_hh_l0"].fan_in, found["gru.weight_hh_l0"].fan_out) == (7, 7)
    assert (found["strided.weight"].fan_in, found["strided.weight"].fan_out) == (9, 54)
    assert (
        found["attention.in_proj_weight"].fan_in,
        found["attention.in_proj_weight"].fan_out,
    ) == (6, 6)
    assert found["attention.out_proj.weight"].fan_in == 6
    assert found["table.weight"].role is Role.TABLE
    assert found["norm.weight"].role is Role.SCALE
    assert found["norm.bias"].role is Role.SHIFT
    assert found["normed.parametrizations.weight.original1"].fan_in == 3
    assert all(w.bias for n, w in found.items() if n.startswith(("conv", "up", "lstm")))


def test_roles_of_a_space_are_used() -> None:
    target = Tied()
    space = wspace.trace(target, torch.randn(2, 5))
    found = {w.name: w.role for w in hyper_of(target, space=space).weights}
    assert found == {n: space[n].role for n in found}
    assert found["shift"] is not Role.MATRIX


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"select": "3.*"}, r"select='3\.\*' chooses no parameter"),
        ({"select": "type:Conv2d"}, "select='type:Conv2d' chooses no"),
        ({"select": "*.bias", "share": "x"}, "share='x' chooses no"),
        ({"select": lambda *_: False}, "no parameter to generate"),
        ({"base": "theirs"}, "unknown base 'theirs'"),
        ({"base": {"0.weight": torch.zeros(7, 4)}}, r"'0\.weight' of shape \(7, 4\)"),
        ({"init": "xavier"}, "unknown init 'xavier'"),
        ({"init": "residual"}, "init='residual' changes values that are there"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], match: str) -> None:
    target = net()
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(HyperError, match=match):
        hyper_of(target, **options)
    assert_same(dict(target.state_dict()), dict(before))


def test_lazy_and_complex_parameters() -> None:
    with pytest.raises(HyperError, match=r"'0\.weight' has no shape yet"):
        hyper_of(nn.Sequential(nn.LazyLinear(3)))
    target = net()
    target.register_parameter("phase", nn.Parameter(torch.zeros(2, dtype=torch.complex128)))
    assert "phase" in hyper_of(target).coverage.shared
    with pytest.raises(HyperError, match="phase of torch.complex128"):
        hyper_of(target, select=["phase"])


def test_target_with_hooked_weights_says_so() -> None:
    layer = nn.Linear(3, 4)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer)
    layer(torch.zeros(1, 3))
    with pytest.raises(HyperError, match="Linear cannot be copied"):
        hyper_of(layer)


def test_head_serves_one_hypernetwork() -> None:
    head = FullHead([4])
    HyperNetwork(net(), TaskEmbedding(2, 3), head)
    with pytest.raises(HyperError, match="FullHead is bound already"):
        HyperNetwork(net(), TaskEmbedding(2, 3), head)
    with pytest.raises(HyperError, match="FullHead needs a condition"):
        HyperNetwork(net(), None, FullHead([4]))
    with pytest.raises(HyperError, match="FullHead is not bound"):
        FullHead([4])(torch.zeros(3))
    with pytest.raises(HyperError, match="takes another vector"):
        hyper_of(net()).generate_from(torch.zeros(2))


# ----------------------------------------------------------------------------- calling


def stacked(module: nn.Module, count: int) -> dict[str, Tensor]:
    return {n: torch.randn(count, *x.shape) for n, x in module.state_dict().items()}


def test_inputs_go_with_networks() -> None:
    module, x = net(), torch.randn(4, 4, 3)
    state = stacked(module, 4)
    one = [{n: v[i] for n, v in state.items()} for i in range(4)]
    paired = torch.stack([functional_call(module, s, (x[i],)) for i, s in enumerate(one)])
    shared = torch.stack([functional_call(module, s, (x[0],)) for s in one])
    single = torch.stack(
        [functional_call(module, s, (x[0, i : i + 1],))[0] for i, s in enumerate(one)]
    )
    for method in ("vmap", "loop", "auto"):
        assert_close(call(module, state, (x,), method=method), paired)
        assert_close(call(module, state, (x[0],), inputs="shared", method=method), shared)
        assert_close(call(module, state, (x[0],), inputs="samples", method=method), single)
    assert not torch.allclose(paired[:, 0], single)  # the three are three things


def test_inputs_that_do_not_pair_up_are_refused() -> None:
    module = net()
    with pytest.raises(HyperError, match=r"do not pair up with 4 networks(.|\n)*shape \(5, 3\)"):
        call(module, stacked(module, 4), (torch.randn(5, 3),))
    with pytest.raises(HyperError, match=r"'0\.weight' of shape \(3, 7\)"):
        call(module, {"0.weight": torch.zeros(3, 7)}, (torch.randn(5, 3),))
    with pytest.raises(HyperError, match="'9.weight', which the module does not have"):
        call(module, {"9.weight": torch.zeros(3, 7)}, (torch.randn(5, 3),))
    mixed = {"0.weight": torch.zeros(2, 7, 3), "0.bias": torch.zeros(4, 7)}
    with pytest.raises(HyperError, match="'0.bias' with 4 networks"):
        call(module, mixed, (torch.randn(4, 5, 3),))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_fall_back_to_the_loop(kind: Any) -> None:
    module, x = kind(3, 5), torch.randn(4, 6, 2, 3)
    state = stacked(module, 4)
    found, hidden = call(module, state, (x,))
    assert all(
        w is getattr(module, n)
        for w, n in zip(module._flat_weights, module._flat_weights_names, strict=True)
    )
    assert_close(found, call(module, state, (x,), method="loop")[0])
    for i in range(4):
        alone, _ = functional_call(module, {n: v[i] for n, v in state.items()}, (x[i],))
        assert_close(found[i], alone)
    assert len(hidden if isinstance(hidden, Tensor) else hidden[0]) == 4


class Branching(nn.Module):
    """Branches on values: no batching rule."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.weight if self.weight.sum() > 0 else x - self.weight


def test_unknown_modules_fall_back_and_count_once() -> None:
    module, x = Branching(), torch.randn(4, 2, 3)
    state = {"weight": torch.randn(4, 3)}
    expected = [
        functional_call(module, {"weight": w}, (y,))
        for w, y in zip(state["weight"], x, strict=True)
    ]
    module.calls.zero_()
    assert_close(call(module, state, (x,)), torch.stack(expected))
    assert module.calls == 4  # the attempt to vectorise has left no trace
    with pytest.raises(RuntimeError):
        call(module, state, (x,), method="vmap")


def test_batch_norm_keeps_its_statistics() -> None:
    target = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    hyper, x = hyper_of(target, select="0.*"), torch.randn(11, 3)
    plain = copy.deepcopy(target)
    state = hyper.cache(1)
    functional_call(plain, {n: state[n] for n in ("0.weight", "0.bias")}, (x,))
    hyper.run(1, x)
    assert_close(hyper.target[1].running_mean, plain[1].running_mean)
    assert target[1].num_batches_tracked == 0
    hyper.run(torch.tensor([0, 1]), torch.randn(2, 11, 3))  # one after another
    assert hyper.target[1].num_batches_tracked == 3
    hyper.eval()
    y = torch.randn(2, 11, 3)
    conds = torch.tensor([2, 3])
    assert_close(hyper.run(conds, y, method="vmap"), hyper.run(conds, y, method="loop"))


class Failing(nn.Module):
    """Raises after its first layer has run."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        raise ArithmeticError(f"after {tuple(self.layer(x).shape)}")


@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
def test_an_exception_leaves_the_module_as_it_was(method: Any) -> None:
    module = Failing()
    before = {n: (p, p.detach().clone()) for n, p in module.named_parameters()}
    with pytest.raises(ArithmeticError, match="after"):
        call(module, stacked(module, 2), (torch.randn(2, 4, 3),), method=method)
    with pytest.raises(ArithmeticError, match="after"):
        hyper_of(module).run(0, torch.randn(4, 3))
    after = dict(module.named_parameters())
    assert all(after[n] is p and torch.equal(p, x) for n, (p, x) in before.items())
    assert torch.backends.mha.get_fastpath_enabled()


def test_keyword_inputs_and_nested_answers() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor, *, factor: float) -> dict[str, Any]:
            return {"a": self.layer(x) * factor, "name": "two", "b": (x.sum(-1),)}

    module, x = Two(), torch.randn(4, 5, 3)
    state = stacked(module, 4)
    for method in ("vmap", "loop"):
        found = call(module, state, kwargs={"x": x, "factor": 2.0}, method=method)
        assert found["name"] == "two"
        assert found["b"][0].shape == (4, 5)
        expected = functional_call(
            module, {n: v[3] for n, v in state.items()}, (x[3],), {"factor": 2.0}
        )
        assert_close(found["a"][3], expected["a"])


# ------------------------------------------------------------------------ hypernetworks


def test_scales_begin_around_one() -> None:
    hyper = hyper_of(nn.Sequential(nn.Linear(3, 64), nn.LayerNorm(64)))
    state = hyper.cache(torch.arange(4))
    assert float((state["1.weight"] - 1).abs().max()) < 0.1
    assert float(state["1.bias"].abs().max()) < 0.1
    assert float(state["1.weight"].std()) > 0


def test_bases() -> None:
    target = net()
    frozen = hyper_of(target, base="frozen", init="bias")
    trained = hyper_of(target, base="trained", init="bias")
    other = {n: torch.randn_like(x) for n, x in target.state_dict().items()}
    given = hyper_of(target, base=other, init="bias")
    for hyper, expected in (
        (frozen, target.state_dict()),
        (trained, target.state_dict()),
        (given, other),
    ):
        assert_same(hyper.cache(0), dict(expected))
    frozen.requires_grad_(True)  # as whoever unfreezes everything does
    assert not any(p.requires_grad for p in frozen.base.values())
    assert all(p.requires_grad for p in trained.base.values())
    assert (
        target[0].weight is not trained.base.values()[0]
    )  # a copy: training it does not move the target
    trained.run(0, torch.randn(5, 3)).sum().backward()
    assert all(p.grad is not None for p in trained.base.values())


def test_parameters_counted() -> None:
    hyper = hyper_of(net(), select="*.weight")
    own = 4 * 3 + (3 * 8 + 8) + (8 * 35 + 35)
    assert sum(p.numel() for p in hyper.parameters()) == own + 9
    assert f"generates 35 entries from {own} (+ 9 shared)" in repr(hyper)
    assert "generated     2 tensors           35" in str(hyper.coverage)


def test_moves_copies_and_saves(tmp_path: Any) -> None:
    hyper = hyper_of(net(), base="trained", init="residual")
    half = copy.deepcopy(hyper).float()
    assert half.cache(0)["0.weight"].dtype == torch.float32
    assert_close(half.cache(0)["0.weight"], hyper.cache(0)["0.weight"].float())
    fresh = hyper_of(net(), base="trained", init="residual")
    assert not torch.equal(fresh.cache(0)["0.weight"], hyper.cache(0)["0.weight"])
    wspace.save_checkpoint(hyper.state_dict(), tmp_path / "h.safetensors")
    fresh.load_state_dict(wspace.load_checkpoint(tmp_path / "h.safetensors"))
    assert_same(fresh.cache(0), hyper.cache(0))


def test_low_precision_targets_get_their_type() -> None:
    hyper = hyper_of(net().bfloat16())
    assert hyper.cache(1)["2.weight"].dtype == torch.bfloat16
    assert hyper.head.gains.dtype == torch.float32


def test_write_to_writes_all_or_nothing() -> None:
    hyper, module = hyper_of(net()), net()
    hyper.write_to(module, 2)
    assert_same(dict(module.state_dict()), hyper.cache(2))
    other = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 5))
    before = copy.deepcopy(dict(other.state_dict()))
    with pytest.raises(HyperError, match=r"'2\.bias' of shape \(2,\) for \(5,\)"):
        hyper.write_to(other, 2)
    assert_same(dict(other.state_dict()), before)
    with torch.no_grad():
        hyper.head.last.bias[-1] = torch.inf
    with pytest.raises(HyperError, match=r"'2\.bias' with values that are not finite"):
        hyper.write_to(module, 1)


def test_no_condition_takes_no_condition() -> None:
    hyper = HyperNetwork(net(), None, ChunkedHead(9, hidden=(4,)))
    assert hyper()["0.weight"].shape == (7, 3)
    with pytest.raises(HyperError, match="there is no condition"):
        hyper(0)


# ---------------------------------------------------------------------------- gradients


def test_pull_back_of_one_step_is_the_gradient() -> None:
    eta, x, y = 0.3, torch.randn(9, 3), torch.randn(9, 2)
    hyper = hyper_of(net(), select="*.weight")
    loss = (hyper.run(1, x) - y).square().mean()
    named = {n: p for n, p in hyper.named_parameters() if not n.startswith("target")}
    expected = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    theta = {n: p.detach().requires_grad_() for n, p in hyper.generate(1).items()}
    inner = (hyper.run_with(theta, x) - y).square().mean()
    steps = dict(zip(theta, torch.autograd.grad(inner, list(theta.values())), strict=True))
    moved = {n: p.detach() - eta * steps[n] for n, p in theta.items()}
    delta = {n: theta[n].detach() - moved[n] for n in theta}
    found = pull_back(hyper, 1, delta)
    assert set(found) == set(expected)
    for n, g in found.items():
        assert_close(g, eta * expected[n])
    other = pull_back(hyper, 2, delta)  # control: another condition
    assert not torch.allclose(other["condition.table"], found["condition.table"])
    assert all(p.grad is None for p in hyper.parameters())
    pull_back(hyper, 1, delta, accumulate=True)
    pull_back(hyper, 1, delta, accumulate=True)
    assert_close(hyper.condition.table.grad, 2 * found["condition.table"])


def test_pull_back_refuses_what_does_not_fit() -> None:
    hyper = hyper_of(net(), select="*.weight")
    with pytest.raises(
        HyperError, match=r"no tensor '2\.weight'(.|\n)*'x', which is not generated"
    ):
        pull_back(hyper, 0, {"0.weight": torch.zeros(7, 3), "x": torch.zeros(1)})
    with pytest.raises(HyperError, match=r"'2\.weight' of shape \(7, 2\), expected \(2, 7\)"):
        pull_back(hyper, 0, {"0.weight": torch.zeros(7, 3), "2.weight": torch.zeros(7, 2)})


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_gradients_are_those_of_finite_differences(method: Any) -> None:
    hyper = HyperNetwork(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)),
                         TaskEmbedding(2, 2), FullHead([4]))  # fmt: skip
    x, conds = torch.randn(2, 3, 2), torch.tensor([1, 0])

    def answer(table: Tensor, last: Tensor) -> Tensor:
        own = {"condition.table": table, "head.last.weight": last}
        with torch.nn.utils.stateless._reparametrize_module(hyper, own):
            return hyper.run(conds, x, method=method)

    inputs = [p.detach().requires_grad_() for p in (hyper.condition.table, hyper.head.last.weight)]
    assert torch.autograd.gradcheck(answer, inputs)


def test_generated_states_enter_metanets() -> None:
    target = net()
    space = wspace.trace(target, torch.randn(4, 3))
    hyper = HyperNetwork(target, TaskEmbedding(4, 3), FullHead([32]))
    metanet = wspace.nn.GraphMetanet(3, channels=8, layers=2)
    state = hyper(torch.tensor([0, 3]))
    graph = wspace.encode(space, state)
    scores = metanet(graph)
    scores.square().sum().backward()
    assert scores.shape == (2, 3)
    grad = hyper.condition.table.grad
    assert grad is not None and grad[0].abs().max() > 0 and grad[1].abs().max() == 0
    t = wspace.sample(space, generator=torch.Generator().manual_seed(0))
    moved = wspace.act(t, hyper(torch.tensor([0, 3])), space)
    assert_close(metanet(wspace.encode(space, moved)), scores)
    x = torch.randn(5, 3)
    assert_close(
        call(target, moved, (x,), inputs="shared"),
        hyper.run(torch.tensor([0, 3]), x, inputs="shared"),
    )


# -------------------------------------------------------------- roles of unusual modules


class OwnNorm(nn.Module):
    """A norm that is none of torch's, a gain, and a matrix that is multiplied from the left."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.matrix = nn.Parameter(torch.randn(6, 30))
        self.act = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * self.scale
        return self.act(x @ self.matrix) / self.temperature


def test_scales_of_own_norms_begin_around_their_values() -> None:
    state = hyper_of(OwnNorm()).cache(torch.arange(4))
    assert float((state["scale"] - 1).abs().max()) < 0.1
    assert float((state["temperature"] - 2).abs().max()) < 0.1
    assert float((state["act.weight"] - 0.25).abs().max()) < 0.1


def test_a_space_says_which_axis_is_summed() -> None:
    target, x = OwnNorm(), torch.randn(200, 6)
    space = wspace.trace(target, x)
    plain, told = hyper_of(target), hyper_of(target, space=space)
    found = {w.name: w for w in told.weights}["matrix"]
    assert (found.fan_in, found.fan_out, found.axis) == (6, 30, 1)
    guessed = {w.name: w for w in plain.weights}["matrix"]
    assert (guessed.fan_in, guessed.axis) == (30, 0)  # without it, that of torch.nn.Linear


def test_conv1d_of_transformers_is_known() -> None:
    from transformers.pytorch_utils import Conv1D

    found = {w.name: w for w in hyper_of(nn.Sequential(Conv1D(7, 5))).weights}
    assert [(w.fan_in, w.fan_out, w.bias) for w in found.values()] == [(5, 7, True)] * 2
    assert (found["0.weight"].axis, found["0.bias"].axis) == (1, 0)


# ------------------------------------------------------------------------ wrong parts


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: HyperNetwork(net(), TaskEmbedding(2, 3), FullHead), "head=<class"),
        (
            lambda: HyperNetwork(net(), nn.Linear(3, 4), FullHead()),
            "condition=Linear, expected a m",
        ),
        (lambda: hyper_of(net(), scale=float("nan")), "scale=nan, expected a finite number"),
        (lambda: hyper_of(net(), base=net()), "the base is no state"),
        (lambda: hyper_of(net(), select=3), "select takes no such thing"),
        (lambda: hyper_of(net(), select=["*.weight", None]), "select takes no such thing"),
        (lambda: hyper_of(net()).cache(), "TaskEmbedding needs a condition"),
    ],
)
def test_wrong_parts_are_named(build: Any, match: str) -> None:
    with pytest.raises(HyperError, match=match):
        build()


def test_write_to_minds_the_module() -> None:
    hyper = hyper_of(net())
    with pytest.raises(HyperError, match=r"'0\.weight' on the meta device"):
        hyper.write_to(net().to("meta"), 1)
    large, half = hyper_of(net(), scale=1e6), net().half()
    before = copy.deepcopy(dict(half.state_dict()))
    with pytest.raises(HyperError, match="values that are not finite"):
        large.write_to(half, 1)
    assert_same(dict(half.state_dict()), before)
    untied = Tied()
    untied.second = nn.Linear(5, 5)
    with pytest.raises(HyperError, match=r"'first\.weight' and 'second\.weight', which it ties"):
        hyper_of(untied).write_to(Tied(), 0)


def test_cached_ties_share_one_tensor() -> None:
    state = hyper_of(Tied(), select="norm.*").cache(0)
    assert state["first.weight"] is state["second.weight"]


def test_nothing_of_the_placeholders_is_a_buffer() -> None:
    """Distributed training broadcasts buffers, which tensors without memory do not bear."""
    hyper = hyper_of(net(), base="frozen", init="residual")
    assert all(x.is_contiguous() for x in hyper.buffers())
    assert not list(hyper.target.buffers()) and not list(hyper.target.parameters())
    assert hyper.double().cache(1)["0.weight"].dtype == torch.float64
    assert hyper.half().cache(1)["0.weight"].dtype == torch.float16


def test_cache_is_a_copy_and_states_are_live() -> None:
    hyper = hyper_of(net(), select="*.weight")
    cached, live = hyper.cache(1), hyper(1)
    assert not cached["0.weight"].requires_grad
    with torch.no_grad():
        hyper.target[0].bias.add_(1.0)
    assert_close(live["0.bias"], cached["0.bias"] + 1)


def test_a_wrong_option_leaves_the_head_free() -> None:
    head = FullHead([4])
    with pytest.raises(HyperError, match="unknown init 'x'"):
        HyperNetwork(net(), TaskEmbedding(2, 3), head, init="x")  # type: ignore[arg-type]
    HyperNetwork(net(), TaskEmbedding(2, 3), head)


def test_old_hooks_are_refused() -> None:
    spectral = nn.utils.spectral_norm(nn.Linear(3, 4))
    pruned = nn.Linear(3, 4)
    importlib.import_module("torch.nn.utils.prune").l1_unstructured(pruned, "weight", 0.5)
    for layer in (spectral, pruned):
        with pytest.raises(HyperError, match=r"cannot be copied(.|\n)*got 0\.weight"):
            hyper_of(nn.Sequential(layer))


def test_pull_back_needs_something_to_learn() -> None:
    hyper = hyper_of(net(), share=None).requires_grad_(False)
    delta = {n: torch.ones_like(x) for n, x in hyper.generate(0).items()}
    with pytest.raises(HyperError, match="no parameter that requires a gradient"):
        pull_back(hyper, 0, delta)
