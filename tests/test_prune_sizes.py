"""Numbers in a module's code: which follow a size, which tie groups, and which fix them."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wspace
from wspace.errors import PruneError, SpaceMismatch
from wspace.prune import Pruner, Restriction, prunable
from wspace.trace.numbers import Attribute, Number, Numbers
from wspace.trace.polynomials import constant, of_axis, over, paired, plus, renamed, times
from wspace.trace.sizes import Sizes, find_sizes

X = torch.randn(4, 6)


class Heads(nn.Module):
    """Two projections viewed as heads; the width of a head is kept in a config."""

    width = 12  # read from the class

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(heads=3, extra={"d": 4})
        self.sizes = (7, 12)
        self.a, self.b, self.out = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        a = self.a(x).view(n, self.config.heads, self.config.extra["d"])
        b = self.b(x).view(n, self.config.heads, -1)
        y = F.gelu(a) * b / (1 + a.norm(dim=-1, keepdim=True))
        return self.out(y.reshape(n, self.sizes[1]) * torch.ones(self.width))


class Joint(nn.Module):
    """Nothing tells heads from their dimensions, so all twelve are one group; the code views it."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.a, self.out = 3, nn.Linear(6, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.a(x).view(len(x), self.heads, -1)).flatten(1))


class Fixed(nn.Module):
    """A number in the code, and a group that nothing fixes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu().reshape(len(x), 8)).relu())


class Halves(nn.Module):
    """Two branches that a chunk cuts apart again, so they are as wide as each other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.cat([self.a(x).relu(), self.b(x).tanh()], 1).chunk(2, 1)
        return self.c(a) + self.c(b.detach() * 0 + 1) * self.c(b).sum()


class Asked(nn.Module):
    """The code asks whether two of its widths are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = 8, 6
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu().view(-1, self.inside)
        return self.b(y) if self.inside != self.outside else y


def sizes_of(module: nn.Module, x: Tensor = X) -> tuple[wspace.WeightSpace, Sizes]:
    space = wspace.trace(module, x)
    return space, find_sizes(space, module, x)


def group(space: wspace.WeightSpace, name: str, dim: int = 0) -> str:
    """The first group on a dimension of a parameter."""
    return next(space[name].axes[dim].groups()).name


def test_attributes_follow_their_axis() -> None:
    module = Heads()
    space, sizes = sizes_of(module)
    assert not sizes.pinned
    heads, d = (g.name for g in space["a.weight"].axes[0].groups())
    keep = {heads: torch.tensor([True, False, True]), d: torch.rand(3, 4).argsort(-1) < 3}
    values = {
        (a.path, a.chain, a.index): v
        for a, v in sizes.solve(Restriction(space, keep).small).items()
    }
    assert values == {
        ("", ("config", "heads"), None): 2,
        ("", ("config", "extra", "d"), None): 3,
        ("", ("sizes",), 1): 6,
        ("", ("width",), None): 6,
    }
    small = Pruner(module, space).prune(keep)
    assert (small.config.heads, small.sizes, small.width) == (2, (7, 6), 6)
    assert (small.config.extra, module.config.extra) == ({"d": 3}, {"d": 4})
    assert (module.config.heads, module.sizes, Heads.width) == (3, (7, 12), 12)
    assert small(X).shape == (4, 2)


def test_the_module_is_left_as_it_was() -> None:
    module = Heads()
    space = wspace.trace(module, X)
    before = dict(module.__dict__), dict(module.config.__dict__)
    find_sizes(space, module, X)
    assert (dict(module.__dict__), dict(module.config.__dict__)) == before
    kept = [*module.__dict__.values(), *module.config.__dict__.values(), *module.sizes]
    assert not any(isinstance(x, Number) for x in kept)
    assert "width" not in module.__dict__


def test_a_number_in_the_code_fixes_a_group() -> None:
    module = Fixed()
    space, sizes = sizes_of(module)
    first, second = group(space, "a.weight"), group(space, "b.weight")
    assert set(sizes.pinned) == {first}
    assert "the number 8 at test_prune_sizes.py" in sizes.pinned[first]
    with pytest.raises(PruneError, match=r"8 where h\d needs 5"):
        Pruner(module, space).prune({first: torch.arange(8) < 5})
    small = Pruner(module, space).prune({second: torch.arange(10) < 5})
    assert small(X).shape == (4, 2)


def test_a_number_of_parts_fixes_the_whole() -> None:
    space, sizes = sizes_of(Joint())
    assert [len(list(a.groups())) for a in space["a.weight"].axes] == [1, 1]
    (why,) = sizes.pinned.values()
    assert why == "3 is the length of a part of it at heads"


def test_halves_keep_equal_counts() -> None:
    module = Halves()
    space, sizes = sizes_of(module)
    a, b = group(space, "a.weight"), group(space, "b.weight")
    assert a == b or [sorted(t) for t in sizes.ties()] == [sorted([a, b])]


class Uses(nn.Module):
    """A layer of 12 units, in the middle of which one function uses the sizes 8 and 4."""

    def __init__(self, middle: Callable[["Uses", Tensor], Tensor]) -> None:
        super().__init__()
        self.middle, self.wide, self.most, self.few = middle, 12, 8, 4
        self.a, self.c = nn.Linear(6, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.middle(self, self.a(x).tanh()))


def joined(*parts: Tensor) -> Tensor:
    return torch.cat([k * part.sin() for k, part in enumerate(parts, 1)], 1)


@pytest.mark.parametrize(
    "middle",
    [
        lambda m, y: joined(*y.chunk(2, 1)),
        lambda m, y: joined(*y.split([m.most, m.few], 1)),
        lambda m, y: joined(*y.split(m.few, 1)),
        lambda m, y: joined(y.narrow(1, 0, m.most), y.narrow(1, m.most, m.few)),
        lambda m, y: joined(y[:, : m.most], y[:, m.most :]),
        lambda m, y: joined(y[:, : -m.few], y[:, -m.few :]),
        lambda m, y: joined(y[..., : y.shape[1] // 2], y[..., y.shape[1] // 2 :]),
        lambda m, y: y + torch.zeros(len(y), m.wide),
        lambda m, y: y * y.new_ones(m.wide),
        lambda m, y: y.reshape(-1, m.wide),
        lambda m, y: y.sort(-1).values,
    ],
    ids="chunk split parts narrow slice last half zeros new_ones reshape sort".split(),
)
def test_each_use_of_a_size_is_seen(middle: Callable[[Uses, Tensor], Tensor]) -> None:
    """Half of every group that the code does not fix can go, with those tied to it."""
    module = Uses(middle)
    space, sizes = sizes_of(module)
    kept = {n: g.size // 2 for n, g in prunable(space).items() if n not in sizes.pinned}
    assert kept or sizes.pinned
    pruner = Pruner(module, space)
    for names in [[n] for n in kept if not any(n in t for t in sizes.ties())] + sizes.ties():
        sized = {n: torch.arange(space.groups[n].size) < kept[n] for n in names if n in kept}
        if len(sized) == len(names):
            pruner.prune(sized)  # which runs it beside the masked one


def test_a_comparison_must_not_turn() -> None:
    module = Asked()
    space, sizes = sizes_of(module)
    name = group(space, "a.weight")
    assert name not in sizes.pinned
    Pruner(module, space).prune({name: torch.arange(8) < 5})
    with pytest.raises(PruneError, match="comparison that was false"):
        Pruner(module, space).prune({name: torch.arange(8) < 6})


def test_as_many_units_stay_as_are_chosen() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k, self.gate, self.table = 3, nn.Linear(6, 5), nn.Parameter(torch.randn(5, 7))

        def forward(self, x: Tensor) -> Tensor:
            value, index = self.gate(x).topk(self.k, -1)
            return (value.softmax(-1)[..., None] * self.table[index]).sum(1)

    module = Gate()
    space, sizes = sizes_of(module)
    name = group(space, "gate.weight")
    assert sizes.least == {name: 3}
    with pytest.raises(PruneError, match="2 units, of which 3 are chosen"):
        Pruner(module, space).prune({name: torch.arange(5) < 2})
    Pruner(module, space).prune({name: torch.arange(5) < 3})


def test_code_that_fails_is_an_error_that_says_so() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).relu()
            if y.shape[1] % 4:
                raise ValueError("widths are multiples of four")
            return self.b(y)

    module = Picky()
    space = wspace.trace(module, X)
    before = {n: x.clone() for n, x in module.state_dict().items()}
    with pytest.raises(PruneError, match="does not run[^$]*widths are multiples of four"):
        Pruner(module, space).prune({"h1": torch.arange(8) < 6})
    assert all(torch.equal(x, before[n]) for n, x in module.state_dict().items())
    assert Pruner(module, space).prune({"h1": torch.arange(8) < 4})(X).shape == (4, 2)


def test_another_module_is_refused() -> None:
    space = wspace.trace(Heads(), X)
    with pytest.raises(SpaceMismatch, match="not a module of this space"):
        find_sizes(space, Fixed(), X)


# ---------------------------------------------------------------------------- numbers


def test_numbers_are_whole_numbers_with_a_history() -> None:
    run = Numbers()
    a = run.number(12, Attribute("", ("a",), None, 12))
    b = run.number(3, Attribute("", ("b",), None, 3))
    assert isinstance(a, int) and [a + b, a - b, a * b, a // b, a % 5, 2 * a, 25 // a] == [
        15, 9, 36, 4, 2, 24, 2,
    ]  # fmt: skip
    assert all(isinstance(x, Number) for x in (a + b, 5 - a, a // b * 2, -a))
    assert torch.zeros(2, 12).view(a, 2).shape == (12, 2) and list(range(b)) == [0, 1, 2]
    assert {12: "x"}[a] == "x" and f"{a}" == "12"
    assert not run.scales
    assert a / 2 == 6.0 and a**0.5 == 12**0.5 and a * 1.5 == 18.0 and float(b) == 3.0
    assert len(run.scales) == 4
    assert a != b and a == run.number(12, Attribute("", ("c",), None, 12))
    assert [equal for _, _, equal, _ in run.compared] == [False, True]
    run.active = False
    assert type(a + b) is int and not run.compared[2:]


# ------------------------------------------------------------------------- polynomials


def test_polynomials() -> None:
    h, d, e = (wspace.Group(n, s, ("permutation",)) for n, s in (("h", 3), ("d", 4), ("e", 12)))
    three = wspace.Group("5", 5)
    axis = (h * d) + (h * d) + wspace.Axis((three,))
    form = of_axis(axis)
    assert form == {("d", "h"): 2, (): 5}
    assert over(times(form, constant(6)), constant(3)) == {("d", "h"): 4, (): 10}
    assert over({("d", "h"): 2}, {("h",): 2}) == {("d",): 1} and over(form, {("h",): 1}) is None
    assert plus(form, form, -1) == {}
    assert renamed({("h",): 1, ("d",): 1}, {"d": "h"}) == {("h",): 2}
    size = {"h": 3, "d": 4, "e": 12, "f": 4}
    assert paired({("d",): 1}, {("d",): 1}, size) == []
    assert paired({("d", "h"): 1}, {("f", "h"): 1}, size) == [("d", "f")]
    assert paired({("d", "h"): 1}, of_axis(wspace.Axis((e,))), size) is None
    assert paired({("d",): 1}, constant(4), size) is None
    assert paired({("d",): 1, ("h",): 1}, {("d",): 1, ("h",): 1, (): 0}, size) is not None
