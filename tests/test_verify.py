"""The proof rejects wrong spaces, accepts right ones, and touches nothing."""

import dataclasses

import pytest
import torch
from cases import build
from cases_mlp import mlp
from test_laws import changes, observed
from torch import Tensor, nn

import wspace
from wspace.errors import NotASymmetry, SpaceMismatch
from wspace.space import Axis, Concat, Group, Param, WeightSpace
from wspace.trace.verify import difference

# --------------------------------------------------------------------- spaces made wrong


def rewritten(space: WeightSpace, **axes: tuple[Axis, ...]) -> WeightSpace:
    """The space with other axes for some parameters (``__`` stands for a dot), and no gauges."""
    new = {name.replace("__", "."): value for name, value in axes.items()}
    params = tuple(dataclasses.replace(p, axes=new.get(p.name, p.axes)) for p in space.params)
    assert not new.keys() - {p.name for p in params}
    return WeightSpace(params)


def fixed(size: int) -> Axis:
    return Axis((Group(str(size), size),))


def free(name: str, size: int, *over: str) -> Group:
    return Group(name, size, ("permutation",), over)


def rejects(space: WeightSpace, module: nn.Module, args: object, kwargs: object = None) -> None:
    """Whatever the random elements are: a proof that passes one time in ten is no proof."""
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        with pytest.raises(NotASymmetry, match="verify: moving .* changed the output"):
            wspace.verify(space, module, args, kwargs, generator=generator)


class Normed(nn.Module):
    """A convolution and a batch norm, with weights as they are when training begins."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 7, 1), nn.BatchNorm2d(7), nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.conv(x)).relu())


@pytest.mark.parametrize("buffer", ["running_mean", "running_var", "weight", "bias"])
def test_batch_norm_without_one_of_its_tensors(buffer: str) -> None:
    """Fresh statistics are constant: every order of them is the same until they are replaced."""
    module, x = Normed(), torch.randn(2, 3, 4, 4)
    space = wspace.trace(module, x)
    assert wspace.verify(space, module, x).ok
    rejects(rewritten(space, **{f"norm__{buffer}": (fixed(7),)}), module, x)


def gpt2() -> tuple[nn.Module, tuple[object, ...], dict[str, object], WeightSpace]:
    module, args, kwargs = build("gpt2", dtype=torch.float32)
    return module, args, kwargs, wspace.trace(module, args, kwargs)


def test_gpt2_is_right() -> None:
    module, args, kwargs, space = gpt2()
    assert wspace.verify(space, module, args, kwargs).ok


def with_attention(space: WeightSpace, fused: Axis, proj: Axis) -> WeightSpace:
    """The space with other axes in the attention of the first block."""
    stream = space["transformer.wte.weight"].axes[1]
    at = "transformer__h__0__attn__"
    return rewritten(
        space,
        **{
            f"{at}c_attn__weight": (stream, fused),
            f"{at}c_attn__bias": (fused,),
            f"{at}c_proj__weight": (proj, stream),
        },
    )


def test_gpt2_with_the_right_attention_by_hand() -> None:
    module, args, kwargs, space = gpt2()
    h, qk, v = free("h", 3), free("qk", 5, "h"), free("v", 5, "h")
    right = with_attention(space, Axis((Concat((h * qk, h * qk, h * v)),)), h * v)
    assert wspace.verify(right, module, args, kwargs).ok


def test_gpt2_with_heads_of_q_and_v_apart() -> None:
    module, args, kwargs, space = gpt2()
    h, g = free("h", 3), free("g", 3)
    qk, v = free("qk", 5, "h"), free("v", 5, "g")
    rejects(
        with_attention(space, Axis((Concat((h * qk, h * qk, g * v)),)), g * v),
        module, args, kwargs,
    )  # fmt: skip


def test_gpt2_with_dims_of_q_and_k_apart() -> None:
    module, args, kwargs, space = gpt2()
    h, v = free("h", 3), free("v", 5, "h")
    q, k = free("q", 5, "h"), free("k", 5, "h")
    rejects(
        with_attention(space, Axis((Concat((h * q, h * k, h * v)),)), h * v), module, args, kwargs
    )


def test_gpt2_with_permutations_across_heads() -> None:
    """All 15 dims in any order: what a method that does not know of heads would do."""
    module, args, kwargs, space = gpt2()
    qk, v = free("qk", 15), free("v", 15)
    rejects(
        with_attention(space, Axis((Concat((Axis((qk,)), Axis((qk,)), Axis((v,)))),)), Axis((v,))),
        module, args, kwargs,
    )  # fmt: skip


def test_gpt2_with_an_untied_head() -> None:
    """The embedding as if it were not also the output matrix."""
    module, args, kwargs, space = gpt2()
    params = tuple(dataclasses.replace(p, ties=()) if p.ties else p for p in space.params)
    head = Param("lm_head.weight", (fixed(37), fixed(15)))
    rejects(WeightSpace((*params, head)), module, args, kwargs)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_constant_head_lets_nothing_pass(value: float) -> None:
    """With a zero head (as ViT's) the output is constant; it must be replaced first."""
    module, x = mlp(5, 12, 20, 3), torch.randn(4, 5)
    for t in module[4].parameters():
        nn.init.constant_(t, value)
    space = wspace.trace(module, x)
    assert wspace.verify(space, module, x).ok
    rejects(rewritten(space, **{"2__bias": (fixed(20),)}), module, x)
    rejects(rewritten(space, **{"4__weight": (fixed(3), Axis((free("z", 20),)))}), module, x)


@pytest.mark.parametrize("size", [2, 3])
def test_small_groups_are_moved_for_certain(size: int) -> None:
    """A random permutation of two units is the identity half of the time."""
    module, x = mlp(5, size, 3), torch.randn(4, 5)
    space = wspace.trace(module, x)
    assert wspace.verify(space, module, x).ok
    rejects(rewritten(space, **{"0__bias": (fixed(size),)}), module, x)


def test_a_fixed_axis_declared_free() -> None:
    module, x = mlp(5, 12, 3), torch.randn(4, 5)
    space = wspace.trace(module, x)
    inputs = Axis((free("x", 5),))
    rejects(rewritten(space, **{"0__weight": (space["0.bias"].axes[0], inputs)}), module, x)


def test_a_wrong_gauge() -> None:
    """Positive scaling through tanh."""
    module, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(4, 3)
    space = wspace.trace(module, x)
    slots = (("0.weight", 0, 0, 1), ("0.bias", 0, 0, 1), ("2.weight", 1, 0, -1))
    gauge = wspace.space.Gauge("scale", "h1", slots)
    rejects(dataclasses.replace(space, gauges=(gauge,)), module, x)
    relu = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    assert wspace.verify(dataclasses.replace(space, gauges=(gauge,)), relu, x).ok


def test_a_right_space_whose_groups_have_no_partner() -> None:
    """Once wrong in verify: here no control can fail, since one tensor alone carries each group."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.randn(7))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.p.square().sum()

    module, x = Mean(), torch.randn(3)
    assert wspace.verify(wspace.trace(module, x), module, x).ok


# ----------------------------------------------------------------------------- inputs


def test_output_that_ignores_the_weights_proves_nothing() -> None:
    module = mlp(5, 12, 3)
    space = wspace.trace(module, torch.randn(2, 5))
    module[1].register_forward_hook(lambda *a: torch.zeros_like(a[-1]))
    with pytest.raises(NotASymmetry, match="controls did not change"):
        wspace.verify(space, module, torch.randn(2, 5))


def test_nan_is_never_equal_to_a_number() -> None:
    nan, one = torch.tensor([torch.nan, 1.0]), torch.tensor([1.0, 1.0])
    assert difference([nan], [one]) == float("inf")
    assert difference([one], [nan]) == float("inf")
    assert difference([nan], [nan.clone()]) == 0.0
    inf = torch.tensor([torch.inf, 1.0])
    assert difference([inf], [-inf]) > 0
    assert difference([torch.zeros(2)], [torch.zeros(3)]) == float("inf")
    assert difference([torch.tensor([True])], [torch.tensor([False])]) == 1.0
    assert difference([torch.empty(0)], [torch.empty(0)]) == 0.0
    assert difference([torch.tensor([2.0])], [torch.tensor([3.0])]) == 0.5
    assert difference([torch.zeros(1)], [torch.ones(1)]) == 1.0


def test_output_of_nothing_but_nan_proves_nothing() -> None:
    class Nan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(5, 12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * torch.nan

    module, x = Nan(), torch.randn(2, 5)
    with pytest.raises(NotASymmetry, match="verify"):
        wspace.verify(wspace.trace(module, x), module, x)


def test_partly_nan_output_is_compared_where_it_is_not() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(5, 12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.net(x), torch.full_like(x, torch.nan)], 1)

    module, x = Partly(), torch.randn(2, 5)
    space = wspace.trace(module, x)
    assert wspace.verify(space, module, x).ok
    rejects(rewritten(space, **{"net__0__bias": (fixed(12),)}), module, x)


def test_a_space_of_another_module() -> None:
    space = wspace.trace(mlp(5, 12, 3), torch.zeros(1, 5))
    with pytest.raises(SpaceMismatch, match="'0.weight'"):
        wspace.verify(space, mlp(5, 13, 3), torch.zeros(1, 5))


def test_integer_outputs_count() -> None:
    class Best(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(5, 12, 30)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).argmax(-1)

    module, x = Best(), torch.randn(64, 5)
    assert wspace.verify(wspace.trace(module, x), module, x).ok


# --------------------------------------------------------------------- what it leaves alone


class Careful(nn.Module):
    """Batch norm, dropout, a counter, a cache and a hook: all that a forward might change."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.Dropout(0.5))
        self.out = nn.Linear(12, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.cache: dict[str, Tensor] = {}
        self.count = 0
        self.net[0].register_forward_hook(lambda m, a, y: y * 2)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.calls += 1
        self.cache["x"] = x
        return self.out(self.net(x).relu())


@pytest.mark.parametrize("training", [True, False])
def test_verify_changes_nothing(training: bool) -> None:
    module, x = Careful(), torch.randn(4, 5)
    module.train(training)
    module.net[2].train(not training)
    space = wspace.trace(module, x)
    before = observed(module, (x,), {})
    wspace.verify(space, module, x)
    assert changes(before, observed(module, (x,), {})) == []


def test_failure_changes_nothing_either() -> None:
    module, x = Careful(), torch.randn(4, 5)
    space = rewritten(wspace.trace(module, x), **{"net__0__bias": (fixed(12),)})
    before = observed(module, (x,), {})
    rejects(space, module, x)
    assert changes(before, observed(module, (x,), {})) == []


# -------------------------------------------------------------------------------- report


def test_report() -> None:
    module, x = mlp(5, 12, 20, 3), torch.randn(4, 5)
    space = wspace.trace(module, x)
    report = wspace.verify(space, module, x)
    assert report.ok is True
    assert report.moved == ("h1", "h2")
    assert {"*", "h1", "h2"} <= set(report.errors)
    assert report.max_error == max(report.errors.values()) <= 1e-10
    assert set(report.controls) >= {k for k in report.controls if k.startswith(("h1", "h2"))}
    assert len(report.controls) == 2
    assert report.control_error == min(report.controls.values()) > 1e-6
    assert str(report).startswith("proved: 2 groups moved")


def test_the_same_call_gives_the_same_report() -> None:
    module, x = mlp(5, 12, 20, 3), torch.randn(4, 5)
    space = wspace.trace(module, x)
    assert wspace.verify(space, module, x) == wspace.verify(space, module, x)


def test_kinds_may_be_chosen() -> None:
    module, x = mlp(5, 12, 3), torch.randn(4, 5)
    space = wspace.trace(module, x)
    report = wspace.verify(space, module, x, kinds=("permutation",))
    assert not any("scale" in key for key in report.errors)


def test_the_error_names_the_wrong_group_alone() -> None:
    module, x = mlp(5, 12, 20, 3), torch.randn(4, 5)
    space = rewritten(wspace.trace(module, x), **{"2__bias": (fixed(20),)})
    with pytest.raises(NotASymmetry, match="moving h2 alone changed the output") as caught:
        wspace.verify(space, module, x)
    assert "h1" not in str(caught.value)
