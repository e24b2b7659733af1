"""What is left of a space and of its states; masks on a live module; pruned files."""

from pathlib import Path

import pytest
import torch
from cases import build
from torch import Tensor, nn

import wspace
from wspace.action import shape_of
from wspace.errors import CheckpointError, PruneError, SpaceMismatch
from wspace.prune import Mask, Pruner, Restriction, load, prunable, prune, save

X = torch.randn(4, 5)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2))


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {n: x.clone() for n, x in module.state_dict().items()}


def same(module: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(x, before[n]) for n, x in module.state_dict().items())


@pytest.mark.parametrize("name", ["maxout", "attention_gqa", "moe_dense", "grouped_se", "lstm"])
def test_there_and_back(name: str, generator: torch.Generator) -> None:
    """`expand` puts what `state` took where it was; batch axes are carried along."""
    module, args, kwargs = build(name)
    space = wspace.trace(module, args, kwargs)
    keep = {
        n: torch.rand(shape_of(g, space), generator=generator).argsort(-1) < max(1, g.size // 2)
        for n, g in prunable(space).items()
    }
    few = Restriction(space, keep)
    state = {p.name: torch.randn(3, *p.shape, generator=generator) for p in space.params}
    small = few.state(state)
    few.small.validate(small)
    back = few.expand(small)
    for p in space.params:
        kept = few.kept(p)
        assert torch.equal(back[p.name], torch.where(kept, state[p.name], 0.0))
        assert int(kept.sum()) == (few.small[few.names[p.name]].numel if p.name in few.names else 0)
    again = few.state(back)
    assert all(torch.equal(again[n], small[n]) for n in small)
    assert Restriction(space, {}).small.params == space.params


def test_units_stay_in_their_contexts(generator: torch.Generator) -> None:
    """Where the inner group varies slower than the one it depends on, entries are not in a row."""
    module, args, kwargs = build("maxout")  # fc2.weight(h4*h1, h2), h4 its own for each h1
    space = wspace.trace(module, args, kwargs)
    pieces, units = space["fc2.weight"].axes[0].groups()
    mask = torch.rand(units.size, pieces.size, generator=generator).argsort(-1) < 2
    few = Restriction(space, {pieces.name: mask})
    x = torch.arange(pieces.size * units.size).double()
    cut = few.cut(space["fc2.bias"], x).reshape(2, units.size)
    for u in range(units.size):
        expected = [i * units.size + u for i in range(pieces.size) if mask[u, i]]
        assert cut[:, u].tolist() == expected


@pytest.mark.parametrize(
    ("keep", "match"),
    [
        ({"h9": torch.ones(12, dtype=torch.bool)}, "'h9', which is no group of the space"),
        ({"h1": torch.ones(11, dtype=torch.bool)}, r"expected bool \(12,\)"),
        ({"h1": torch.ones(12)}, r"'h1' of float32 \(12,\), expected bool"),
        ({"h1": [True] * 12}, r"'h1' of list, expected a bool tensor \(12,\)"),
        ({"h1": torch.zeros(12, dtype=torch.bool)}, "'h1' with none of its 12 units"),
        ({"5": torch.ones(5, dtype=torch.bool)}, "'5', which cannot lose units: it is fixed"),
    ],
)
def test_masks_that_do_not_fit(keep: dict[str, Tensor], match: str) -> None:
    module = mlp()
    space, before = wspace.trace(module, X), snapshot(module)
    for attempt in (
        lambda: Restriction(space, keep),
        lambda: prune(module, space, keep),
        lambda: Mask(module, space, keep),
    ):
        with pytest.raises(PruneError, match=match):
            attempt()
    assert same(module, before)


def test_counts_must_agree_between_contexts() -> None:
    module, args, kwargs = build("attention_gqa")
    space = wspace.trace(module, args, kwargs)
    name, g = next((n, g) for n, g in prunable(space).items() if g.over)
    mask = torch.ones(shape_of(g, space), dtype=torch.bool)
    mask[0, 0] = False
    with pytest.raises(PruneError, match="units in one context and"):
        Restriction(space, {name: mask})
    outer = torch.arange(space.groups[g.over[0]].size) > 0  # the odd context goes: all is well
    assert Restriction(space, {name: mask, g.over[0]: outer}).counts()[name] == g.size


def test_neither_or_both_of_keep_and_amount() -> None:
    module = mlp()
    space = wspace.trace(module, X)
    with pytest.raises(PruneError, match="got neither"):
        prune(module, space)
    with pytest.raises(PruneError, match="got both"):
        prune(module, space, {"h1": torch.arange(12) < 3}, amount=0.5)
    with pytest.raises(PruneError, match="got both"):
        prune(module, space, 0.5, amount=0.25)
    with pytest.raises(PruneError, match="no way to rebuild called 'cpy'"):
        prune(module, space, amount=0.5, rebuild="cpy")  # type: ignore[arg-type]
    assert prune(module, space, torch.tensor(0.5))[0].out_features < 12  # type: ignore[arg-type]
    with pytest.raises(PruneError, match="prune `module.module`"):
        prune(nn.DataParallel(module), space, amount=0.5)
    with pytest.raises(PruneError, match="no option 'rounds'"):
        prune(module, space, amount=0.5, rounds=3)  # type: ignore[call-arg]
    with pytest.raises(PruneError, match="at least one unit of every group stays"):
        prune(module, space, amount=1.0)


def test_a_space_from_a_file_needs_inputs() -> None:
    module = mlp()
    space = wspace.WeightSpace.from_json(wspace.trace(module, X).to_json())
    with pytest.raises(PruneError, match="no example inputs"):
        prune(module, space, {"h1": torch.arange(12) < 3})
    assert prune(module, space, {"h1": torch.arange(12) < 3}, args=X)[0].out_features == 3


class Trained(nn.Module):
    """In training mode it draws numbers and moves its statistics; it changes its input, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.drop = nn.Linear(5, 12), nn.BatchNorm1d(12), nn.Dropout(0.5)
        self.b = nn.Linear(12, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.drop(self.norm(self.a(x)).relu())
        return self.b(y) + x.mul_(2).sum() + 0 * torch.rand(())


class Summed(nn.Module):
    """Branches in a list, added up from the last to the first: no gate says which is which."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(mlp() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(x) for branch in reversed(self.branches))


def test_branches_keep_the_order_of_their_list() -> None:
    module = Summed()
    space = wspace.trace(module, X)
    (name,) = (n for n, g in space.groups.items() if g.size == 4)
    for gone in range(4):
        few = Restriction(space, {name: torch.arange(4) != gone})
        small = prune(module, space, few)
        (lost,) = (p for p in space.params if p.at == (name, gone) and p.name.endswith("4.bias"))
        stay = [
            b for i, b in enumerate(module.branches) if not lost.name.startswith(f"branches.{i}")
        ]
        for a, b in zip(small.branches, stay, strict=True):
            assert all(map(torch.equal, a.parameters(), b.parameters()))
        state = few.state(module.state_dict())
        assert all(torch.equal(x, small.state_dict()[n]) for n, x in state.items())


def test_pruning_leaves_everything_as_it_was() -> None:
    """Modes, generators, statistics, inputs; what is frozen stays frozen in the small module."""
    module, x = Trained(), X.clone()
    module.a.weight.requires_grad_(False)
    module.norm.eval()
    space = wspace.trace(module, x)
    assert torch.equal(x, X)
    before, drawn = snapshot(module), torch.get_rng_state()
    small = prune(module, space, {"h1": torch.arange(12) < 5})
    assert same(module, before) and torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(x, X)
    for m in (module, small):
        assert [k.training for k in m.modules()] == [True, True, False, True, True]
        assert [p.requires_grad for p in m.parameters()] == [False, *[True] * 5]
        assert all(p.grad is None for p in m.parameters())


# ------------------------------------------------------------------------------- masks


def test_masks_hold_while_training_and_come_off() -> None:
    module = mlp()
    space, before = wspace.trace(module, X), snapshot(module)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    mask = Mask(module, space, {"h1": torch.arange(12) < 5}).hold(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        module(X).square().sum().backward()
        optimizer.step()
        assert not module[0].weight[5:].any() and not module[2].weight[:, 5:].any()
    small = Pruner(module, space).prune(mask.restriction)
    assert torch.allclose(small(X), module(X), atol=1e-6)
    trained = snapshot(module)
    mask.remove()
    assert torch.equal(module[0].weight[5:], before["0.weight"][5:])
    assert torch.equal(module[0].weight[:5], trained["0.weight"][:5])
    optimizer.step()
    assert module[0].weight[5:].any()
    with pytest.raises(PruneError, match="it was removed"):
        mask.remove()


@pytest.mark.parametrize("sparse", [False, True])
def test_masks_clear_gradients_of_what_is_off(sparse: bool) -> None:
    """Else gradients that are summed over steps would move it again."""
    ids = torch.tensor([[1, 2]])
    module = nn.Sequential(nn.Embedding(6, 8, sparse=sparse), nn.Linear(8, 2))
    space = wspace.trace(module, ids)
    mask = Mask(module, space, {"h1": torch.arange(8) < 5})
    module[0](ids).sum().backward()  # through the table alone, every unit has a gradient
    assert module[0].weight.grad.to_dense()[1].all()
    mask.again()
    gradient = module[0].weight.grad
    assert gradient.is_sparse == sparse
    assert gradient.to_dense()[1, :5].any() and not gradient.to_dense()[:, 5:].any()


def test_masks_come_off_after_an_error() -> None:
    module = mlp()
    space, before = wspace.trace(module, X), snapshot(module)
    with (
        pytest.raises(RuntimeError, match="in between"),
        Mask(module, space, {"h2": torch.arange(8) > 3}),
    ):
        assert not same(module, before)
        raise RuntimeError("in between")
    assert same(module, before)


def test_directions_under_weight_norm_are_not_switched_off() -> None:
    """A direction of length zero is none: the output would be nan."""
    module, args, kwargs = build("mlp_weight_norm")
    space = wspace.trace(module, args, kwargs)
    with Mask(module, space, {"h2": torch.arange(20) < 9}):
        y = module(*args, **kwargs)
    assert torch.isfinite(y).all()


def test_tied_names_are_switched_off_together() -> None:
    module, args, kwargs = build("language_model_tied")
    space = wspace.trace(module, args, kwargs)
    name, g = next(iter(prunable(space).items()))
    few = Restriction(space, {name: (torch.arange(g.size) > 0).expand(shape_of(g, space))})
    masked = few.masked(module.state_dict())
    (tied,) = (p for p in space.params if p.ties)
    for tie in tied.ties:
        assert torch.equal(masked[tie], masked[tied.name])
        assert not torch.equal(masked[tie], module.state_dict()[tie])


def test_masks_follow_a_module_that_is_cast() -> None:
    module = mlp().double()
    space, before = wspace.trace(module, X.double()), snapshot(module)
    mask = Mask(module, space, {"h1": torch.arange(12) < 5})
    module.float()
    mask.again()
    mask.remove()
    assert all(torch.equal(x, before[n].float()) for n, x in module.state_dict().items())


def test_masks_do_not_write_in_dead_tensors() -> None:
    module = mlp()
    space = wspace.trace(module, X)
    mask = Mask(module, space, {"h1": torch.arange(12) < 5})
    module[0].weight = nn.Parameter(torch.ones(12, 5))
    for attempt in (mask.again, mask.remove):
        with pytest.raises(PruneError, match=r"were replaced[^$]*'0.weight'"):
            attempt()
    assert (module[0].weight == 1).all()


def test_two_prunings_do_not_know_of_each_other() -> None:
    module = mlp()
    space = wspace.trace(module, X)
    first = prune(module, space, {"h1": torch.arange(12) < 5})
    second = prune(module, space, {"h2": torch.arange(8) < 3})
    assert (first[0].out_features, first[2].out_features) == (5, 8)
    assert (second[0].out_features, second[2].out_features) == (12, 3)
    with torch.no_grad():
        first[0].weight.fill_(7.0)
    assert not (second[0].weight == 7.0).any() and not (module[0].weight == 7.0).any()


# ------------------------------------------------------------------------------- files


def test_a_saved_network_is_loaded(tmp_path: Path) -> None:
    module, args, kwargs = build("attention_gqa")
    space = wspace.trace(module, args, kwargs)
    pruner = Pruner(module, space)
    heads = next(
        n for n, g in prunable(space).items() if any(n in h.over for h in space.groups.values())
    )
    few = Restriction(space, {heads: torch.arange(space.groups[heads].size) > 0})
    small = pruner.prune(few)
    save(small, few, tmp_path / "small.safetensors")
    again = load(module, space, tmp_path / "small.safetensors")
    assert torch.equal(again(*args, **kwargs), small(*args, **kwargs))
    with pytest.raises(CheckpointError, match="a file .safetensors"):
        save(small, few, tmp_path / "small.pt")
    with pytest.raises(CheckpointError, match="no tensor"):
        save(mlp(), few, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor '.*' of shape"):
        save(module, few, tmp_path / "large.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["small.safetensors"]


def test_a_state_of_another_network_is_refused() -> None:
    module = mlp()
    space = wspace.trace(module, X)
    state = snapshot(module)
    with pytest.raises(CheckpointError, match="is not a pruned state|does not fit"):
        load(module, space, {**state, "2.weight": torch.zeros(8, 11)})
    with pytest.raises(CheckpointError, match="counts of 'h9'"):
        load(module, space, state, {"h9": 3})
    with pytest.raises(CheckpointError, match="missing 0.weight"):
        load(module, space, {"4.bias": state["4.bias"]})


def test_a_module_of_another_space_is_refused() -> None:
    space = wspace.trace(mlp(), X)
    other = nn.Sequential(nn.Linear(5, 11), nn.ReLU(), nn.Linear(11, 2))
    with pytest.raises(SpaceMismatch):
        prune(other, space, {"h1": torch.arange(12) < 5})
    with pytest.raises(SpaceMismatch):
        Mask(other, space, {"h1": torch.arange(12) < 5})
    few = Restriction(wspace.trace(other, X), {"h1": torch.arange(11) < 5})
    with pytest.raises(PruneError, match="of another weight space"):
        Mask(mlp(), space, few)
