"""Federated learning: clients side by side, and gradients that are pulled back."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from wspace.errors import HyperError
from wspace.hyper.federated import (
    AverageServer,
    Client,
    Examples,
    FedAvg,
    HyperServer,
    ImageLabels,
    Labels,
    LocalOnly,
    LocalTraining,
    PeFLL,
    PFedHN,
    accuracies,
    descriptors,
    draw_batches,
    lenet,
    local_steps,
    size_of,
    train_locally,
)
from wspace.hyper.heads.full import FullHead
from wspace.testing import assert_close, assert_same

CLASSES = 3
ONE_STEP = LocalTraining(steps=1, lr=0.07, momentum=0.0, weight_decay=0.0, batch_size=11, clip=None)
SEVERAL = LocalTraining(steps=4, lr=0.07, momentum=0.9, weight_decay=1e-3, batch_size=5, clip=0.5)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def client(seed: int, n: int = 11, test: int = 6) -> Client:
    g = generator(seed)
    parts = [
        Examples(
            torch.randn(k, 1, 6, 6, generator=g, dtype=torch.float64),
            torch.randint(CLASSES, (k,), generator=g),
        )
        for k in (n, 4, test)
    ]
    return Client(*parts)


def target() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return lenet(1, 6, CLASSES, kernels=2, hidden=7, taps=3).double()


def describer() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return ImageLabels(1, 6, CLASSES, width=5, kernels=2).double()


def server(*, standardise: bool = False, **options: Any) -> HyperServer:
    made = HyperServer(
        target(), 5, FullHead([9]), standardise=standardise, generator=generator(), **options
    )
    return made.double()


def stacked(module: nn.Module, count: int) -> dict[str, Tensor]:
    """Different weights for each client."""
    g = generator(7)
    return {
        n: p.detach() + 0.1 * torch.randn(count, *p.shape, generator=g, dtype=p.dtype)
        for n, p in module.named_parameters()
    }


# --- clients ----------------------------------------------------------------------


@pytest.mark.parametrize("how", [ONE_STEP, SEVERAL], ids=["plain", "momentum, decay, clipping"])
def test_clients_side_by_side_are_clients_one_after_another(how: LocalTraining) -> None:
    """And each is what torch.optim.SGD makes of it."""
    clients, module = [client(i) for i in range(3)], target()
    states = stacked(module, 3)
    batches = draw_batches(clients, how.steps, how.batch_size, generator(1))
    after, losses = local_steps(module, states, batches, how)
    for i in range(3):
        one = Examples(batches.x[i : i + 1], batches.y[i : i + 1])
        alone, loss = local_steps(module, {n: x[i : i + 1] for n, x in states.items()}, one, how)
        assert_close({n: x[i : i + 1] for n, x in after.items()}, alone)
        assert_close(losses[i : i + 1], loss)
        assert_close({n: x[i] for n, x in after.items()}, by_sgd(states, batches, how, i))


def by_sgd(
    states: dict[str, Tensor], batches: Examples, how: LocalTraining, i: int
) -> dict[str, Tensor]:
    module = target()
    module.load_state_dict({n: x[i] for n, x in states.items()})
    sgd = torch.optim.SGD(
        module.parameters(), how.lr, momentum=how.momentum, weight_decay=how.weight_decay
    )
    for k in range(how.steps):
        sgd.zero_grad()
        F.cross_entropy(module(batches.x[i, k]), batches.y[i, k]).backward()
        if how.clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), how.clip)
        sgd.step()
    return {n: p.detach() for n, p in module.named_parameters()}


def test_clipping_and_decay_are_not_without_effect() -> None:
    """Negative control of the comparison above."""
    clients, module = [client(0)], target()
    states = stacked(module, 1)
    batches = draw_batches(clients, 4, 5, generator(1))
    after, _ = local_steps(module, states, batches, SEVERAL)
    for change in ({"clip": None}, {"weight_decay": 0.0}, {"momentum": 0.0}):
        other = LocalTraining(**{**vars(SEVERAL), **change})
        with pytest.raises(AssertionError):
            assert_close({n: x[0] for n, x in after.items()}, by_sgd(states, batches, other, 0))


def test_batches_run_through_shuffles() -> None:
    some = client(0, n=7)
    x = torch.arange(7.0)
    some = Client(Examples(x, some.train.y), some.val, some.test)
    drawn = draw_batches([some, some], 4, 5, generator()).x
    assert drawn.shape == (2, 4, 5)
    for row in drawn.flatten(1):
        assert [sorted(row[k : k + 7].tolist()) for k in (0, 7)] == [list(range(7))] * 2
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn, draw_batches([some, some], 4, 5, generator()).x)


def test_no_local_step_changes_nothing() -> None:
    states = stacked(target(), 2)
    how = LocalTraining(steps=0)
    after, losses = train_locally(target(), states, [client(0), client(1)], how)
    assert_same(after, states)
    assert losses.isnan().all()


def test_accuracies_of_clients_of_different_sizes() -> None:
    clients, module = [client(0, test=6), client(1, test=9)], target()
    states = stacked(module, 2)
    found = accuracies(module, states, clients)
    for i, c in enumerate(clients):
        logits = functional_call(module, {n: x[i] for n, x in states.items()}, (c.test.x,))
        assert found[i] == (logits.argmax(1) == c.test.y).double().mean()


def test_masking_takes_absent_classes_out() -> None:
    """Also where a logit of zero would be the largest."""
    x = torch.randn(4, 2)
    part = Examples(x, torch.tensor([0, 1, 0, 1]))
    module = nn.Linear(2, 3, bias=True)
    weights = {"weight": torch.zeros(1, 3, 2), "bias": torch.tensor([[-1.0, -2.0, 5.0]])}
    one = Client(part, part, part)
    assert float(accuracies(module, weights, [one])) == 0
    assert float(accuracies(module, weights, [one], masked=True)) == 0.5
    logits = module.weight.new_tensor([[-1.0, -2.0, 5.0]]) * torch.tensor([1, 1, 0])
    assert logits.argmax() == 2  # the published way chooses the absent class


# --- gradients that are pulled back -------------------------------------------------


def loss_end_to_end(weights: dict[str, Tensor], clients: list[Client]) -> Tensor:
    """Mean of the clients' losses with their weights, with gradients to whatever made these."""
    losses = [
        F.cross_entropy(
            functional_call(target(), {n: x[i] for n, x in weights.items()}, (c.train.x,)),
            c.train.y,
        )
        for i, c in enumerate(clients)
    ]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("base", [None, "trained"])
def test_pefll_learns_from_one_step_what_the_loss_says(base: str | None) -> None:
    """η times the gradient of the mean loss: in φ and in h, through all messages."""
    method = PeFLL(server(standardise=True, base=base), target(), describer(), examples=None)
    clients = [client(i, n=11) for i in range(3)]
    method.server.weights(descriptors(method.describe, clients))  # sets the scale
    method.round(clients, torch.arange(3), ONE_STEP, generator())
    pulled = grads(method)
    loss = loss_end_to_end(
        method.server.hyper.generate(descriptors(method.describe, clients)), clients
    )
    loss.backward()
    assert_close({n: ONE_STEP.lr * g for n, g in grads(method).items()}, pulled)
    assert any("describe" in n for n in pulled) and any("server" in n for n in pulled)


@pytest.mark.parametrize(
    "how",
    [
        LocalTraining(**{**vars(ONE_STEP), "steps": 2}),
        LocalTraining(**{**vars(ONE_STEP), "weight_decay": 0.1}),
    ],
    ids=["two steps", "weight decay"],
)
def test_it_is_not_the_gradient_otherwise(how: LocalTraining) -> None:
    """Negative control."""
    method = PeFLL(server(standardise=True), target(), describer(), examples=None)
    clients = [client(i) for i in range(3)]
    method.server.weights(descriptors(method.describe, clients))
    method.round(clients, torch.arange(3), how, generator())
    pulled = grads(method)
    loss_end_to_end(
        method.server.hyper.generate(descriptors(method.describe, clients)), clients
    ).backward()
    with pytest.raises(AssertionError, match="not close"):
        assert_close({n: how.lr * g for n, g in grads(method).items()}, pulled)


def grads(method: nn.Module) -> dict[str, Tensor]:
    """Gradients by name; they are taken away."""
    found = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    for p in method.parameters():
        p.grad = None
    return found


def test_pfedhn_learns_from_one_step_what_the_loss_says() -> None:
    method = PFedHN(server(), target(), clients=4, generator=generator()).double()
    clients, ids = [client(i) for i in range(3)], torch.tensor([3, 0, 2])
    method.round(clients, ids, ONE_STEP, generator())
    pulled = grads(method)
    loss_end_to_end(method.server.hyper.generate(method.vectors[ids]), clients).backward()
    assert_close({n: ONE_STEP.lr * g for n, g in grads(method).items()}, pulled)
    assert float(pulled["vectors"][1].abs().max()) == 0  # took no part
    assert float(pulled["vectors"][0].abs().max()) > 0


def test_rounds_add_up() -> None:
    method = PFedHN(server(), target(), clients=2, generator=generator()).double()
    clients, ids = [client(i) for i in range(2)], torch.arange(2)
    method.round(clients, ids, ONE_STEP, generator())
    once = {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}
    method.round(clients, ids, ONE_STEP, generator())
    assert_close({n: 2 * g for n, g in once.items()}, grads(method))


def test_a_new_clients_vector_is_fitted_and_nothing_else() -> None:
    method = PFedHN(server(), target(), clients=4, rounds=8, lr=0.3, generator=generator()).double()
    before = {n: x.clone() for n, x in method.state_dict().items()}
    clients = [client(8), client(9)]
    fitted = method.fit(clients, ONE_STEP, generator())
    start = method.vectors.detach().mean(0).expand(2, -1)
    losses = [
        float(loss_end_to_end(method.server.weights(v), clients).detach()) for v in (start, fitted)
    ]
    assert losses[1] < losses[0]
    assert_same(before, method.state_dict())
    assert grads(method) == {}
    assert_close(fitted[:1], method.fit(clients[:1], ONE_STEP, generator()))  # each for itself


# --- averages -----------------------------------------------------------------------


def test_fedavg_is_the_weighted_mean() -> None:
    method, clients = FedAvg(target()), [client(0, n=4), client(1, n=12)]
    sent = method.server.weights(2)
    after, _ = train_locally(target(), sent, clients, SEVERAL, generator(5))
    method.round(clients, torch.arange(2), SEVERAL, generator(5))
    torch.optim.SGD(method.server.parameters(), lr=1.0).step()
    now = {n: x[0] for n, x in method.server.weights(1).items()}
    assert_close({n: 0.25 * x[0] + 0.75 * x[1] for n, x in after.items()}, now)
    with pytest.raises(AssertionError):
        assert_close({n: x.mean(0) for n, x in after.items()}, now)


def test_local_only_trains_rows() -> None:
    method, clients = LocalOnly(target(), 4, rounds=2), [client(0), client(1)]
    start = {n: p.detach() for n, p in target().named_parameters()}
    ids = torch.tensor([2, 0])
    said = method.round(clients, ids, SEVERAL, generator())
    assert said.messages == () and said.bytes("client") == 0
    expected, _ = train_locally(
        target(), {n: torch.stack([x] * 2) for n, x in start.items()}, clients, SEVERAL, generator()
    )
    assert_close(method.personal(clients, ids, SEVERAL), expected)
    rest = method.personal(clients, torch.tensor([1, 3]), SEVERAL)
    assert_same({n: torch.stack([x] * 2) for n, x in start.items()}, rest)
    new = method.personal(clients, None, SEVERAL, generator())
    assert any(not torch.equal(new[n], expected[n]) for n in new)


# --- descriptors and messages ---------------------------------------------------------


def test_descriptors_count_samples() -> None:
    """The mean over examples; not their sum over the length of the pair (x, y)."""
    clients, describe = [client(0, n=5), client(1, n=9)], describer()
    found = descriptors(describe, clients)
    for v, c in zip(found, clients, strict=True):
        assert_close(describe(*c.train).mean(0), v)
        with pytest.raises(AssertionError):
            assert_close(describe(*c.train).sum(0) / len(c.train), v)
        halves = [describe(c.train.x[k], c.train.y[k]).sum(0) for k in (slice(3), slice(3, None))]
        assert_close(sum(halves) / len(c.train.y), v)


def test_labels_alone() -> None:
    describe = Labels(CLASSES, 5).double()
    found = descriptors(describe, [client(0), client(1)])
    shares = torch.stack([client(i).shares(CLASSES) for i in range(2)])
    assert_close(shares @ describe.vectors.weight, found)


def test_scale_comes_from_the_first_descriptor() -> None:
    made = server(standardise=True)
    with pytest.raises(HyperError, match="not known yet"):
        made.hyper.generate(torch.ones(1, 5, dtype=torch.float64))
    first = 3 + 7 * torch.randn(2, 5, dtype=torch.float64)
    made.weights(first)
    made.weights(100 * first)
    seen = made.hyper.embed(first)[0]
    assert_close(torch.stack([seen.mean(), seen.std() - 1]) + 1, torch.ones(2, dtype=seen.dtype))
    again = server(standardise=True)
    again.load_state_dict(made.state_dict())
    assert_same(made.weights(first), again.weights(first))


def test_messages_say_what_is_sent() -> None:
    method = PeFLL(server(standardise=True), target(), describer(), examples=4)
    said = method.round([client(i) for i in range(3)], torch.arange(3), ONE_STEP, generator())
    entries = sum(p.numel() for p in target().parameters())
    encoder = sum(p.numel() for p in method.describe.parameters())
    assert [(m.sender, m.bytes) for m in said.messages] == [
        ("server", 8 * encoder),
        ("client", 8 * 5),
        ("server", 8 * entries),
        ("client", 8 * entries),
        ("server", 8 * 5),
        ("client", 8 * encoder),
    ]
    assert said.bytes("server") == said.bytes("client")
    assert said.samples.tolist() == [11, 11, 11]
    assert size_of({"a": torch.zeros(2, 3)}, clients=2) == 12


def test_pefll_needs_no_fit_for_new_clients() -> None:
    method = PeFLL(server(standardise=True), target(), describer(), examples=4)
    method.round([client(0)], torch.tensor([0]), ONE_STEP, generator())
    clients = [client(5, n=3), client(6, n=8)]
    found = method.personal(clients, None, ONE_STEP)
    assert_close(found, method.server.weights(descriptors(method.describe, clients)))


# --- what is refused ------------------------------------------------------------------


def test_wrong_inputs() -> None:
    good = Examples(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))
    with pytest.raises(HyperError, match=r"val: 2 inputs, 0 labels"):
        Client(good, Examples(good.x, good.y[:0]), good)
    with pytest.raises(HyperError, match="buffer '1.running_mean'"):
        FedAvg(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    with pytest.raises(HyperError, match="frozen 'weight'"):
        AverageServer(nn.Linear(2, 3).requires_grad_(False))
    with pytest.raises(HyperError, match="batch_size"):
        LocalTraining(batch_size=0)
    with pytest.raises(HyperError, match="odd taps"):
        lenet(1, 8, taps=4)


def test_the_callers_network_is_left_alone() -> None:
    module = target()
    before = {n: x.clone() for n, x in module.state_dict().items()}
    method = FedAvg(module)
    method.round([client(0)], torch.tensor([0]), ONE_STEP, generator())
    assert_same(before, module.state_dict())
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
