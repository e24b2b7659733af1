"""Methods of federated learning: what a round is, and which network a client ends up with.

Each is a module whose gradients `FederatedMethod.round` fills; the caller takes the optimiser's
step. Between the two sides go only what `Round.messages` lists.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor, nn

from wspace.hyper.federated.local import Client, LocalTraining, train_locally
from wspace.hyper.federated.messages import Message, Round, size_of
from wspace.hyper.federated.servers import AverageServer, HyperServer, check_target

States = dict[str, Tensor]


class FederatedMethod(nn.Module):
    """Base of the methods: clients that train a network, and a way to find its weights.

    Args:
        target: The network of the clients.
    """

    def __init__(self, target: nn.Module) -> None:
        super().__init__()
        check_target(target)
        self.target = deepcopy(target).requires_grad_(False)

    def round(
        self,
        clients: Sequence[Client],
        ids: Tensor,
        how: LocalTraining,
        generator: torch.Generator | None = None,
    ) -> Round:
        """One round: weights go out, changes come back, gradients are added to ``.grad``.

        Args:
            clients: B clients that take part.
            ids: Which of all clients they are, ``(B,)``.
            how: Their local steps.
            generator: Source of randomness.

        Returns:
            What happened.
        """
        raise NotImplementedError

    def personal(
        self,
        clients: Sequence[Client],
        ids: Tensor | None,
        how: LocalTraining,
        generator: torch.Generator | None = None,
    ) -> States:
        """Weights for clients, once training is over.

        Args:
            clients: B clients.
            ids: Which of all clients they are, ``(B,)``; None if they never took part.
            how: Local steps, where the method takes some.
            generator: Source of randomness.

        Returns:
            ``(B, *shape)`` by name.
        """
        raise NotImplementedError


class LocalOnly(FederatedMethod):
    """Every client trains alone, from the same initial weights.

    Args:
        target: The network of the clients, with those weights.
        clients: How many there are.
        rounds: Rounds that a new client trains for, each of the usual local steps.
    """

    def __init__(self, target: nn.Module, clients: int, rounds: int = 50) -> None:
        super().__init__(target)
        self.rounds = rounds
        self.names = [name for name, _ in self.target.named_parameters()]
        for k, p in enumerate(self.target.parameters()):
            self.register_buffer(f"state_{k}", p.detach().repeat(clients, *[1] * p.dim()))

    def _rows(self) -> States:
        return {name: self.get_buffer(f"state_{k}") for k, name in enumerate(self.names)}

    def round(
        self,
        clients: Sequence[Client],
        ids: Tensor,
        how: LocalTraining,
        generator: torch.Generator | None = None,
    ) -> Round:
        """Trains on; nothing is sent. See `FederatedMethod.round`."""
        rows = self._rows()
        after, losses = train_locally(
            self.target, {n: x[ids] for n, x in rows.items()}, clients, how, generator
        )
        for name, x in after.items():
            rows[name][ids] = x
        return Round(losses, _samples(clients), ())

    def personal(
        self,
        clients: Sequence[Client],
        ids: Tensor | None,
        how: LocalTraining,
        generator: torch.Generator | None = None,
    ) -> States:
        """Each client's own weights; a new one trains first. See `FederatedMethod.personal`."""
        if ids is not None:
            return {n: x[ids] for n, x in self._rows().items()}
        now = _repeated(self.target, len(clients))
        for _ in range(self.rounds):
            now, _ = train_locally(self.target, now, clients, how, generator)
        return now


class FedAvg(FederatedMethod):
    """One network for all; see `AverageServer`. Take plain SGD with rate 1 for it.

    Args:
        target: The network of the clients, with its initial weights.
    """

    def __init__(self, target: nn.Module) -> None:
        super().__init__(target)
        self.server = AverageServer(target)

    def round(
        self,
        clients: Sequence[Client],
        ids: Tensor,
        how: LocalTraining,
        generator: torch.Generator | None = None,
    ) -> Round:
        """See `FederatedMethod.round`."""
        del ids
        sent = self.server.weights(len(clients))
        after, losses = train_locally(self.target, sent, clients, how, generator)
        delta = _change(sent, after)
        self.server.receive(delta, _samples(clients))
        size = size_of(sent, len(clients))
        said = (
            Message("server", "weights", size),
            Message("client", "change of weights, number of examples", size + 8),
        )
        return Round(losses, _samples(clients), said)

    def personal(
        self,
        clients: Sequence[Client],
        ids: Tensor | None,
        how: LocalTraining,
        generator: torch.Generator | None = None,
    ) -> States:
        """The one network for everybody. See `FederatedMethod.personal`."""
        del ids, how, generator
        return self.server.weights(len(clients))


class PFedHN(FederatedMethod):
    """A hypernetwork with a learned vector for every client, which the server keeps.

    Shamsian et al. (2021), arXiv 2103.04628. For a client that never took part the hypernetwork
    stays as it is, and a vector is fitted: it begins at the mean of all vectors, and every round
    moves it by Adam along the gradient that the client's change of weights gives.

    Args:
        server: The hypernetwork's server.
        target: The network of the clients.
        clients: How many there are.
        rounds: Rounds in which a new client's vector is fitted.
        lr: Adam's rate in these.
        generator: Source of initial vectors, which are normal.
    """

    def __init__(
        self,
        server: HyperServer,
        target: nn.Module,
        clients: int,
        rounds: int = 20,
        lr: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(target)
        self.server, self.rounds, self.lr = server, rounds, lr
        width = server.hyper.head.width
        self.vectors = nn.Parameter(torch.randn(clients, width, generator=generator))

    def round(
        self,
        clients: Sequence[Client],
        ids: Tensor,
        how: LocalTraining,
        generator: torch.Generator | None = None,
    ) -> Round:
        """See `FederatedMethod.round`."""
        v = self.vectors.detach()[ids]
        sent = self.server.weights(v)
        after, losses = train_locally(self.target, sent, clients, how, generator)
        slope = self.server.receive(v, _change(sent, after))
        grad = torch.zeros_like(self.vectors) if self.vectors.grad is None else self.vectors.grad
        self.vectors.grad = grad.index_add(0, ids, slope)
        size = size_of(sent, len(clients))
        said = (Message("server", "weights", size), Message("client", "change of weights", size))
        return Round(losses, _samples(clients), said)

    def personal(
        self,
        clients: Sequence[Client],
        ids: Tensor | None,
        how: LocalTraining,
        generator: torch.Generator | None = None,
    ) -> States:
        """Weights for each client's vector; that of a new one is fitted first."""
        if ids is not None:
            return self.server.weights(self.vectors.detach()[ids])
        return self.server.weights(self.fit(clients, how, generator))

    def fit(
        self,
        clients: Sequence[Client],
        how: LocalTraining,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Vectors for clients that never took part; the hypernetwork is left alone.

        Args:
            clients: B clients, each fitted for itself.
            how: Local steps of each round.
            generator: Source of randomness.

        Returns:
            ``(B, width)``.
        """
        v = self.vectors.detach().mean(0).repeat(len(clients), 1).requires_grad_()
        adam = torch.optim.Adam([v], self.lr)
        for _ in range(self.rounds):
            sent = self.server.weights(v.detach())
            after, _ = train_locally(self.target, sent, clients, how, generator)
            slope = self.server.receive(v.detach(), _change(sent, after), learn=False)
            v.grad = slope * len(clients)  # each client's own, not the mean of several
            adam.step()
        return v.detach()


class PeFLL(FederatedMethod):
    """A hypernetwork that is told what a client is by a descriptor of its examples.

    Scott et al. (2023), arXiv 2306.05515: v = mean of φ(x, y) over a client's examples, made by the
    client; θ = h(v), made by the server. φ and h learn together. A client that never took part
    needs two forward passes.

    Args:
        server: The hypernetwork's server, made with ``standardise=True``.
        target: The network of the clients.
        describe: φ: examples ``(n, …)`` and labels ``(n,)`` to ``(n, width)``.
        examples: How many training examples a client describes itself by in a round; None for all.
            In `personal` it is always all.
    """

    def __init__(
        self,
        server: HyperServer,
        target: nn.Module,
        describe: nn.Module,
        examples: int | None = 32,
    ) -> None:
        super().__init__(target)
        self.server, self.describe, self.examples = server, describe, examples

    def round(
        self,
        clients: Sequence[Client],
        ids: Tensor,
        how: LocalTraining,
        generator: torch.Generator | None = None,
    ) -> Round:
        """See `FederatedMethod.round`."""
        del ids
        shown = _some(clients, self.examples, generator)
        with torch.enable_grad():
            described = descriptors(self.describe, shown)  # by the clients
        v = described.detach()
        sent = self.server.weights(v)
        after, losses = train_locally(self.target, sent, clients, how, generator)
        slope = self.server.receive(v, _change(sent, after))
        described.backward(slope)  # by the clients; the server adds up what they send
        size, own = size_of(sent, len(clients)), size_of(v, len(clients))
        encoder = size_of(self.describe.parameters())
        said = (
            Message("server", "descriptor network", encoder),
            Message("client", "descriptor", own),
            Message("server", "weights", size),
            Message("client", "change of weights", size),
            Message("server", "gradient in the descriptor", own),
            Message("client", "gradient in the descriptor network", encoder),
        )
        return Round(losses, _samples(clients), said)

    @torch.no_grad()
    def personal(
        self,
        clients: Sequence[Client],
        ids: Tensor | None,
        how: LocalTraining,
        generator: torch.Generator | None = None,
    ) -> States:
        """Weights by two forward passes, for all clients alike."""
        del ids, how, generator
        return self.server.weights(descriptors(self.describe, clients))


def descriptors(describe: nn.Module, clients: Sequence[Client]) -> Tensor:
    """Mean of φ(x, y) over the training examples of each client.

    Args:
        describe: φ.
        clients: B clients, of different numbers of examples maybe.

    Returns:
        ``(B, width)``; every example of a client counts as much as every other.
    """
    counts = _samples(clients)
    x = torch.cat([c.train.x for c in clients])
    y = torch.cat([c.train.y for c in clients])
    answers = describe(x, y)
    owner = torch.arange(len(clients), device=x.device).repeat_interleave(counts.to(x.device))
    sums = answers.new_zeros(len(clients), answers.shape[-1]).index_add(0, owner, answers)
    return sums / counts.to(sums)[:, None]


def _some(
    clients: Sequence[Client], examples: int | None, generator: torch.Generator | None
) -> list[Client]:
    """Clients with that many of their training examples, drawn at random; all if they have less."""
    found: list[Client] = []
    for client in clients:
        x, y = client.train
        if examples is None or len(y) <= examples:
            found.append(client)
            continue
        rows = torch.randperm(len(y), generator=generator)[:examples].to(y.device)
        found.append(replace(client, train=type(client.train)(x[rows], y[rows])))
    return found


def _samples(clients: Sequence[Client]) -> Tensor:
    return torch.tensor([len(c.train.y) for c in clients])


def _change(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> States:
    return {name: before[name] - x for name, x in after.items()}


def _repeated(module: nn.Module, count: int) -> States:
    return {
        n: p.detach().repeat(count, *[1] * p.dim()).view(count, *p.shape)
        for n, p in module.named_parameters()
    }
