"""The small module beside the masked one: what is caught, what is undone, what stays."""

import copy
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import wspace
from wspace.errors import PruneError
from wspace.prune import Pruner, Restriction, prune
from wspace.prune.agreement import agree, gap, outputs

X = torch.randn(4, 6, dtype=torch.float64)


def group(space: wspace.WeightSpace, name: str, dim: int = 0) -> str:
    return next(space[name].axes[dim].groups()).name


class Two(nn.Module):
    """Two hidden layers, the second normalised; what `forward` does to the first is given."""

    def __init__(self) -> None:
        super().__init__()
        self.d = 8
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(12, 2)
        self.norm = nn.LayerNorm(12)
        self.double()

    def hidden(self, x: Tensor) -> Tensor:
        return self.a(x).relu().view(-1, self.d)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.norm(self.b(self.hidden(x))).relu())


class Hidden(Two):
    """A size becomes a factor where a number cannot see it: a float stands on the left."""

    def hidden(self, x: Tensor) -> Tensor:
        return super().hidden(x) * torch.as_tensor(0.5 * self.d, dtype=torch.float64)


class Lost(Two):
    """Not a number once it is narrow."""

    def hidden(self, x: Tensor) -> Tensor:
        y = super().hidden(x)
        return y if y.shape[1] >= 8 else y * float("nan")


class Attention(nn.Module):
    """One head; the scores are divided by the root of the width of the values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, 8) for _ in range(4))
        self.o = nn.Linear(8, 6)
        self.d = 8
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).view(-1, self.d) for m in (self.q, self.k, self.v))
        scores = q @ k.T / torch.full([], v.size(-1) ** 0.5, dtype=v.dtype)
        return self.o(scores.softmax(-1) @ v)


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("kind", [Hidden, Lost])
def test_what_is_not_the_masked_module_is_refused(kind: type[Two], *, with_norm: bool) -> None:
    """Also when another group, which a norm counts, loses units at the same time."""
    module = kind()
    space = wspace.trace(module, X)
    keep = {group(space, "a.weight"): torch.arange(8) < 5}
    if with_norm:
        keep[group(space, "b.weight")] = torch.arange(12) < 7
    with pytest.raises(PruneError, match="is not the masked one"):
        prune(module, space, keep)
    assert prune(Two(), wspace.trace(Two(), X), keep)(X).shape == (4, 2)


def test_a_scale_is_undone_on_the_side_that_it_is_of() -> None:
    module = Attention()
    space = wspace.trace(module, X)
    pruner = Pruner(module, space)
    keys, values = group(space, "q.weight"), group(space, "v.weight")
    assert sorted(pruner.ties[0]) == sorted([keys, values])
    few = Restriction(space, dict.fromkeys((keys, values), torch.arange(8) < 5))
    small = pruner.prune(few)
    assert not pruner.counted(few)
    state = few.masked(dict(module.named_parameters()))
    assert gap(outputs(module, ((X,), {}), state), outputs(small, ((X,), {}))) < 1e-12


def test_a_length_of_zeros_is_a_length() -> None:
    """`zeros_like(x)` is as wide as x, so what is added to it stays as wide, too."""

    class Scattered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).relu()
            where = torch.arange(len(x))
            return self.c(torch.zeros_like(y).index_add(0, where, self.b(x).relu())) + y.sum()

    module = Scattered().double()
    space = wspace.trace(module, X)
    prune(module, space, amount=0.3)
    y, added = group(space, "a.weight"), group(space, "b.weight")
    assert y == added or sorted(Pruner(module, space).ties[0]) == sorted([y, added])


# ------------------------------------------------------------------------ copies


def test_a_result_that_was_kept_does_not_stop_the_copy() -> None:
    class Caching(Two):
        def hidden(self, x: Tensor) -> Tensor:
            self.cache = super().hidden(x)
            return self.cache

    module = Caching()
    space = wspace.trace(module, X)
    module(X)
    assert not module.cache.is_leaf
    assert prune(module, space, {group(space, "a.weight"): torch.arange(8) < 5})(X).shape == (4, 2)


def test_what_cannot_be_copied_is_named() -> None:
    module = Two()
    module.norm.lock = threading.Lock()
    space = wspace.trace(module, X)
    with pytest.raises(PruneError, match=r"cannot be copied[^$]*norm\.lock"):
        prune(module, space, {group(space, "a.weight"): torch.arange(8) < 5})


def test_tables_are_not_renormalised_by_the_check() -> None:
    table = nn.Embedding(7, 6, max_norm=0.5).double()
    module = nn.Sequential(table, nn.Linear(6, 8).double(), nn.ReLU(), nn.Linear(8, 2).double())
    ids = torch.tensor([1, 2, 3])
    space = wspace.trace(module, ids)
    before = table.weight.detach().clone()
    prune(module, space, {group(space, "1.weight"): torch.arange(8) < 5})
    assert torch.equal(table.weight, before)


# ------------------------------------------------------------------------ comparing


def test_gaps() -> None:
    a, nan = torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("nan")])
    one, two = torch.tensor([1]), torch.tensor([2])
    assert gap([a], [a.clone()]) == 0.0 and gap([a], [a + 0.5]) == 0.25
    assert gap([nan], [nan.clone()]) == 0.0
    assert gap([a], [nan]) == gap([a], [a[:1]]) == gap([one], [two]) == float("inf")
    assert gap([one], [one]) == 0.0 and gap([a * 0], [a * 0]) == 0.0
    assert agree([a], [a * (1 + 1e-5)], nn.Linear(1, 1))
    assert not agree([a], [a * (1 + 1e-2)], nn.Linear(1, 1))


def test_a_copy_does_not_save_a_config_that_is_wrong(tmp_path: Path) -> None:
    import transformers

    config = transformers.GPT2Config(
        n_layer=1, n_embd=12, n_head=2, vocab_size=9, n_positions=8, use_cache=False
    )
    module = transformers.GPT2LMHeadModel(config).eval()
    space = wspace.trace(module, torch.arange(4)[None])
    neurons = group(space, "transformer.h.0.mlp.c_fc.weight", 1)
    keep = {neurons: torch.arange(48) < 20}
    small = prune(module, space, keep, rebuild="copy")
    with pytest.raises(PruneError, match=r"wspace\.prune\.save"):
        small.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    built = prune(module, space, keep)
    assert built.config.n_inner == 20 and module.config.n_inner is None
    built.save_pretrained(tmp_path)


def test_a_copy_that_mixes_tensors_up_is_refused() -> None:
    class Swapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.d = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.d(self.c(self.b(self.a(x).relu()).relu()).relu())

        def __deepcopy__(self, memo: dict[int, object]) -> "Swapping":
            made = Swapping.__new__(Swapping)
            made.__dict__.update(copy.deepcopy(self.__dict__, memo))
            made.b, made.c = made.c, made.b
            return made

    module = Swapping().double()
    space = wspace.trace(module, X)
    with pytest.raises(PruneError, match=r"b\.weight, which holds another tensor"):
        prune(module, space, {group(space, f"{n}.weight"): torch.arange(8) < 5 for n in "abc"})


def test_a_factor_that_nothing_undoes_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Times(Two):
        def hidden(self, x: Tensor) -> Tensor:
            y = super().hidden(x)
            return y + 0.1 * torch.tanh(y * y.shape[-1])

    module = Times()
    space = wspace.trace(module, X)
    prune(module, space, {group(space, "a.weight"): torch.arange(8) < 5})
    assert "is used as a factor at test_prune_agreement.py" in caplog.text
    caplog.clear()
    prune(Two(), wspace.trace(Two(), X), {group(space, "a.weight"): torch.arange(8) < 5})
    assert not caplog.text
