"""What the server does: it sends weights, and learns from how clients changed them.

A server sees descriptors and changes of weights; no example and no label reaches it, and nothing of
a hypernetwork leaves it but the weights that it made.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from wspace.errors import HyperError, message
from wspace.hyper.federated.networks import Standardised
from wspace.hyper.heads.head import Head
from wspace.hyper.hypernetwork import Base, HyperNetwork
from wspace.hyper.pull import pull_back


class AverageServer(nn.Module):
    """One network for all: the mean of what clients made of it, by their numbers of examples.

    McMahan et al. (2017), "Communication-Efficient Learning of Deep Networks from Decentralized
    Data" (arXiv 1602.05629). The mean is written as a gradient: with plain SGD of rate 1 the next
    weights are the weighted mean of the clients' weights.

    Args:
        target: The network; a parameter of each name is kept, with its values.
    """

    def __init__(self, target: nn.Module) -> None:
        super().__init__()
        check_target(target)
        self.names = [name for name, _ in target.named_parameters()]
        values = [nn.Parameter(p.detach().clone()) for p in target.parameters()]
        self.values = nn.ParameterList(values)

    def weights(self, clients: int) -> dict[str, Tensor]:
        """The weights for several clients, ``(clients, *shape)`` by name."""
        pairs = zip(self.names, self.values, strict=True)
        return {n: p.detach().expand(clients, *p.shape).clone() for n, p in pairs}

    def receive(self, delta: Mapping[str, Tensor], samples: Tensor) -> None:
        """Adds the weighted mean of changes to the gradients.

        Args:
            delta: Weights sent less weights after local steps, ``(B, *shape)`` by name.
            samples: Examples of each client, ``(B,)``.
        """
        share = samples / samples.sum()
        for name, p in zip(self.names, self.values, strict=True):
            mean = torch.tensordot(share.to(p), delta[name].to(p), 1)
            p.grad = mean if p.grad is None else p.grad + mean


class HyperServer(nn.Module):
    """A network for each client: θ = h(v), v a vector that stands for the client.

    Args:
        target: The network of the clients; all its parameters are generated.
        width: Length of v.
        head: What makes weights of v.
        base: As for `HyperNetwork`: None, or what the head's answer is added to.
        standardise: True for descriptors that clients send; False for vectors that are learned.
        generator: Source of initial weights.
        options: Further ones of `HyperNetwork`.

    Attributes:
        hyper: The hypernetwork.
    """

    def __init__(
        self,
        target: nn.Module,
        width: int,
        head: Head,
        base: Base = None,
        *,
        standardise: bool = False,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_target(target)
        condition = Standardised(width, fixed=not standardise)
        self.hyper = HyperNetwork(target, condition, head, base, generator=generator, **options)

    @torch.no_grad()
    def weights(self, v: Tensor) -> dict[str, Tensor]:
        """The weights for clients.

        Args:
            v: Their vectors, ``(B, width)``. The first that come decide the scale of descriptors.

        Returns:
            ``(B, *shape)`` by name.
        """
        cast(Standardised, self.hyper.condition).fit(v)
        return self.hyper.generate(v)

    def receive(self, v: Tensor, delta: Mapping[str, Tensor], *, learn: bool = True) -> Tensor:
        """Pulls changes of weights back: the gradient of the clients' mean.

        With k = 1 local step of rate η, no momentum and no weight decay, ``delta`` is η times the
        gradient of each client's loss in its weights; what comes out is then exactly η times the
        gradient of the mean loss.

        Args:
            v: Vectors that the weights were made of, ``(B, width)``.
            delta: Weights sent less weights after local steps, ``(B, *shape)`` by name.
            learn: False to leave the hypernetwork's gradients alone.

        Returns:
            Gradient in v, ``(B, width)``.
        """
        share = {name: x / len(v) for name, x in delta.items()}
        if learn:
            pull_back(self.hyper, v.detach(), share, accumulate=True)
        with torch.enable_grad():
            leaf = v.detach().requires_grad_()
            made = self.hyper.generate(leaf)
            seeds = [share[name].to(x) for name, x in made.items()]
            (slope,) = torch.autograd.grad(list(made.values()), leaf, seeds, materialize_grads=True)
        return slope


def check_target(target: nn.Module) -> None:
    """Refuses networks with buffers: clients send parameters, and averages of those alone.

    Args:
        target: The network of the clients.

    Raises:
        HyperError: If it has a buffer, or a frozen parameter.
    """
    bad = [f"buffer {name!r}" for name, _ in target.named_buffers()]
    bad += [f"frozen {name!r}" for name, p in target.named_parameters() if not p.requires_grad]
    if bad:
        raise HyperError(
            message(
                "federated: clients cannot train this network",
                expected="parameters that are all trained, and no buffers",
                got=bad,
                help="use GroupNorm or LayerNorm in place of BatchNorm",
            )
        )
