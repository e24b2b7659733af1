"""Modules that are hard on `call`: parts with two names, odd answers, tensors that are kept."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wspace.errors import HyperError
from wspace.hyper import FullHead, HyperNetwork, TaskEmbedding, call, functional_loss
from wspace.testing import assert_close, assert_same

pytestmark = pytest.mark.usefixtures("float64")
METHODS = pytest.mark.parametrize("method", ["auto", "vmap", "loop"])


def stacked(module: nn.Module, count: int) -> dict[str, Tensor]:
    return {n: torch.randn(count, *x.shape) for n, x in module.named_parameters()}


def one_by_one(module: nn.Module, state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The oracle: copies of the module with the weights loaded, one after another."""
    found: list[Tensor] = []
    for i in range(len(next(iter(state.values())))):
        again = copy.deepcopy(module)
        again.load_state_dict({n: v[i] for n, v in state.items()}, strict=False)
        found.append(again(x))
    return torch.stack(found)


class Twice(nn.Module):
    """One part under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


@METHODS
def test_a_part_with_two_names_gets_its_weights_back(method: Any) -> None:
    module, x = Twice(), torch.randn(5, 3)
    weight, before = module.a.weight, copy.deepcopy(dict(module.state_dict()))
    state = stacked(module, 4)
    assert_close(
        call(module, state, (x,), inputs="shared", method=method), one_by_one(module, state, x)
    )
    call(module, {n: v[0] for n, v in state.items()}, (x,))
    both = {f"{part}.{n}": state[f"a.{n}"] for part in "ab" for n in ("weight", "bias")}
    assert_close(
        call(module, both, (x,), inputs="shared", method=method), one_by_one(module, state, x)
    )
    assert module.a.weight is weight and isinstance(module.a.weight, nn.Parameter)
    assert_same(dict(module.state_dict()), before)
    hyper = HyperNetwork(module, TaskEmbedding(3, 2), FullHead([8]))
    hyper.run(torch.tensor([0, 1]), x, inputs="shared", method=method)
    copy.deepcopy(hyper)
    assert hyper.target.a.weight.isnan().all()  # the placeholder is back


def test_two_values_for_one_tensor_are_refused() -> None:
    state = {"a.weight": torch.zeros(3, 3), "b.weight": torch.ones(3, 3)}
    with pytest.raises(HyperError, match=r"'a\.weight' and 'b\.weight', one tensor of one part"):
        call(Twice(), state, (torch.randn(5, 3),))


class Odd(nn.Module):
    """Answers with what it is told to."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(3, 2), kind

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        return {
            "none": lambda: (y, None, {"name": "k", "size": 7, "none": None}),
            "number": lambda: (y, float(y.detach().sum())),
            "object": lambda: Answered(y),
        }[self.kind]()


@dataclass
class Answered:
    logits: Tensor


@METHODS
def test_none_and_equal_values_pass(method: Any) -> None:
    module, x = Odd("none"), torch.randn(5, 3)
    y, none, rest = call(module, stacked(module, 4), (x,), inputs="shared", method=method)
    assert y.shape == (4, 5, 2) and none is None
    assert rest == {"name": "k", "size": 7, "none": None}


def test_what_is_no_tensor_must_be_equal() -> None:
    x = torch.randn(5, 3)
    for kind, match in (("number", "differ in more than their tensors"), ("object", "Answered")):
        module = Odd(kind)
        one = call(module, {n: v[0] for n, v in stacked(module, 4).items()}, (x,))
        assert one is not None  # a single network may answer as it likes
        for method in ("auto", "loop"):
            with pytest.raises(HyperError, match=match):
                call(module, stacked(module, 4), (x,), inputs="shared", method=method)


class Keeping(nn.Module):
    """Keeps a running mean, and its last answer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("mean", torch.zeros(()))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean()
        self.last = y.detach()
        return y


def test_tensors_that_a_module_keeps_are_those_of_the_loop() -> None:
    module, x = Keeping(), torch.randn(5, 3)
    state = stacked(module, 4)
    expected, mean = one_by_one(module, state, x), torch.zeros(())
    for y in expected:
        mean = 0.9 * mean + 0.1 * y.mean()
    assert_close(call(module, state, (x,), inputs="shared"), expected)
    assert_close(module.mean, mean)
    copy.deepcopy(module)
    before = module.mean
    with pytest.raises(HyperError, match=r"Keeping keeps tensors of its run(.|\n)*mean"):
        call(module, state, (x,), inputs="shared", method="vmap")
    assert module.mean is before


def test_states_are_not_written_into() -> None:
    module = nn.Sequential(nn.Embedding(7, 3, max_norm=0.1), nn.Linear(3, 4), nn.BatchNorm1d(4))
    x = torch.tensor([0, 3, 6, 1])
    state = {n: v.detach().clone() for n, v in module.state_dict().items()}
    many = {n: torch.stack([v, v + 1]) for n, v in state.items()}
    before = copy.deepcopy((state, many))
    call(module, state, (x,))
    call(module, many, (x,), inputs="shared")
    functional_loss(module, many, many, x)
    assert_same(state, before[0])
    assert_same(many, before[1])
    hyper = HyperNetwork(module, TaskEmbedding(3, 2), FullHead([8]))
    whole = hyper(torch.tensor([0, 2]))
    call(module, whole, (x,), inputs="shared")
    assert hyper.target[2].num_batches_tracked == 0


@METHODS
def test_padding_rows_have_no_gradient(method: Any) -> None:
    hyper = HyperNetwork(nn.Embedding(7, 3, padding_idx=2), TaskEmbedding(4, 5), FullHead([16]))
    conds, x = torch.tensor([1, 3]), torch.tensor([0, 2, 2, 6])
    made = {n: v.detach().requires_grad_() for n, v in hyper.generate(conds).items()}
    hyper.run_with(made, x, inputs="shared", method=method).sum().backward()
    grad = made["weight"].grad
    assert grad is not None
    assert torch.equal(grad[:, 2], torch.zeros(2, 3))
    assert torch.equal(grad[:, [0, 6]], torch.ones(2, 2, 3))


def test_options_and_empty_batches() -> None:
    module = nn.Linear(3, 2)
    with pytest.raises(HyperError, match="inputs='pairs'"):
        call(module, stacked(module, 2), (torch.randn(2, 5, 3),), inputs="pairs")  # type: ignore[arg-type]
    with pytest.raises(HyperError, match="no network to run"):
        call(module, stacked(module, 0), (torch.randn(0, 5, 3),), method="loop")
    assert call(module, stacked(module, 0), (torch.randn(0, 5, 3),)).shape == (0, 5, 2)
    one = call(module, stacked(module, 1), (torch.randn(1, 5, 3),))
    assert one.shape == (1, 5, 2)


class Logging(nn.Module):
    """Appends its answers to a list, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.log, self.calls = nn.Linear(3, 2), list[Tensor](), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(self.layer(x))
        return self.log[-1]


def test_lists_of_a_module_hold_no_dead_tensors() -> None:
    module, x = Logging(), torch.randn(5, 3)
    state = stacked(module, 4)
    found = call(module, state, (x,), inputs="shared")
    assert module.calls == len(module.log) == 4
    assert_close(torch.stack(module.log), found)
    with pytest.raises(HyperError, match=r"Logging keeps tensors of its run(.|\n)*log"):
        call(module, state, (x,), inputs="shared", method="vmap")
    assert module.calls == len(module.log) == 4


class Dropping(nn.Module):
    """Draws, and then branches on a value, which vmap refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.dropout(self.layer(x), 0.5, training=True)
        return y if y.sum() > 0 else -y


def test_an_attempt_draws_no_random_numbers() -> None:
    module, x = Dropping(), torch.randn(5, 3)
    state = stacked(module, 4)
    torch.manual_seed(5)
    found = call(module, state, (x,), inputs="shared")
    torch.manual_seed(5)
    assert torch.equal(found, call(module, state, (x,), inputs="shared", method="loop"))


def test_large_buffers_are_not_copied() -> None:
    module = nn.Linear(3, 2)
    module.register_buffer("mask", torch.zeros(300, 300))
    state = {**stacked(module, 4), "mask": module.mask.expand(4, 300, 300)}
    seen: list[int] = []
    module.register_forward_pre_hook(lambda m, _: seen.append(m.mask.data_ptr()))
    call(module, state, (torch.randn(5, 3),), inputs="shared", method="loop")
    assert set(seen) == {module.mask.data_ptr()}


def test_checkpointing_inside_is_refused() -> None:
    module = nn.Sequential(nn.Linear(3, 2))
    module.gradient_checkpointing = True  # type: ignore[assignment]
    state = {n: x.detach() for n, x in module.named_parameters()}
    with pytest.raises(HyperError, match="activation checkpointing inside of a module"):
        call(module, state, (torch.randn(5, 3),))
    call(module.eval(), state, (torch.randn(5, 3),))


def test_ragged_answers_are_refused() -> None:
    class Ragged(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            y = super().forward(input)
            return y[y[:, 0] > 0]

    module, x = Ragged(3, 2), torch.randn(50, 3)
    with pytest.raises(HyperError, match="answers of Ragged differ in shape"):
        call(module, stacked(module, 4), (x,), inputs="shared")


def test_parameters_may_be_given() -> None:
    hyper = HyperNetwork(nn.Linear(3, 2), TaskEmbedding(3, 2), FullHead([8]))
    made = {n: nn.Parameter(x.detach().clone()) for n, x in hyper.generate(1).items()}
    y = hyper.run_with(made, torch.randn(5, 3))
    y.sum().backward()
    assert made["weight"].grad is not None
    assert not dict(hyper.target.named_parameters())
    assert hyper.target.weight.isnan().all()


def test_samples_by_keyword() -> None:
    class Named(nn.Linear):
        def forward(self, *, rows: Tensor) -> Tensor:
            return super().forward(rows) - rows.shape[0]

    module, x = Named(3, 2), torch.randn(4, 3)
    state = stacked(module, 4)
    expected = torch.stack(
        [w @ y + b - 1 for w, b, y in zip(state["weight"], state["bias"], x, strict=True)]
    )
    for method in ("vmap", "loop"):
        found = call(module, state, kwargs={"rows": x}, inputs="samples", method=method)
        assert_close(found, expected)


def test_padded_positions_do_not_depend_on_the_method() -> None:
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    module = nn.TransformerEncoder(layer, 1, enable_nested_tensor=True).eval()
    state, x = stacked(module, 3), torch.randn(2, 5, 6)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        together, alone = (
            call(module, state, (x,), {"src_key_padding_mask": mask}, inputs="shared", method=m)
            for m in ("vmap", "loop")
        )
    assert_close(together, alone)
    assert torch.backends.mha.get_fastpath_enabled()


class Looking(nn.Linear):
    """Looks at its own parameters."""

    def forward(self, input: Tensor) -> Tensor:
        size = torch.stack([p.square().sum() for p in self.parameters()]).sum()
        return super().forward(input).to(next(self.parameters()).dtype) / size


@METHODS
def test_modules_see_generated_parameters(method: Any) -> None:
    hyper, x = HyperNetwork(Looking(3, 2), TaskEmbedding(3, 2), FullHead([8])), torch.randn(5, 3)
    conds = torch.tensor([2, 0])
    found = hyper.run(conds, x, inputs="shared", method=method)
    for i, cond in enumerate(conds):
        made = hyper.generate(cond)
        size = sum(v.square().sum() for v in made.values())
        assert_close(found[i], (x @ made["weight"].T + made["bias"]) / size)
    assert not dict(hyper.target.named_parameters())


def test_dropout_differs_between_networks() -> None:
    module, x = nn.Sequential(nn.Linear(3, 200), nn.Dropout()), torch.randn(5, 3)
    state = {n: v[:1].expand_as(v) for n, v in stacked(module, 2).items()}
    state = {n: v.clone() for n, v in state.items()}  # one network twice
    for method in ("vmap", "loop"):
        a, b = call(module, state, (x,), inputs="shared", method=method)
        assert not torch.equal(a == 0, b == 0)
