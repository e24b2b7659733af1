"""`pull_back`: a change of generated weights, as a gradient of what generates them."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from wspace.errors import HyperError, message
from wspace.hyper.hypernetwork import HyperNetwork


def pull_back(
    hyper: HyperNetwork, cond: Any, delta: Mapping[str, Tensor], *, accumulate: bool = False
) -> dict[str, Tensor]:
    """Gradient of ``sum(generate(cond) * delta)``: the change `delta`, seen from the parameters.

    With ``delta = theta - stepped`` after one step of gradient descent with learning rate η, it is
    η times the gradient of the loss, end to end; after several steps it is what a server learns
    from a client that shows neither its data nor its loss. Shamsian, Navon, Fetaya, Chechik (2021),
    "Personalized Federated Learning using Hypernetworks", algorithm 1 (arXiv 2103.04628).

    Args:
        hyper: The hypernetwork.
        cond: What is conditioned on.
        delta: By name of every generated tensor, ``(*batch, *shape)``.
        accumulate: True to add to the parameters' ``grad`` as well.

    Returns:
        By name of the parameters of `hyper` (those of its condition among them) on which what is
        generated depends.

    Raises:
        HyperError: If names or shapes differ from those of what is generated, or no parameter
            requires a gradient.
    """
    named = {n: p for n, p in hyper.named_parameters() if p.requires_grad}
    if not named or torch.is_inference_mode_enabled():
        got = "inference mode" if named else "no parameter that requires a gradient"
        raise HyperError(message("pull_back: there is nothing to learn", got=got))
    with torch.enable_grad():
        made = hyper.generate(cond)
        _check(made, delta)
        kept = [n for n in made if made[n].requires_grad]
        grads = torch.autograd.grad(
            [made[n] for n in kept],
            list(named.values()),
            [delta[n].detach().to(made[n]) for n in kept],
            allow_unused=True,
        )
    every = cast(Sequence[Tensor | None], grads)
    found = {n: g for n, g in zip(named, every, strict=True) if g is not None}
    if accumulate:
        for n, g in found.items():
            old = named[n].grad
            named[n].grad = g.clone() if old is None else old + g
    return found


def _check(made: Mapping[str, Tensor], delta: Mapping[str, Tensor]) -> None:
    wrong = [f"no tensor {n!r}" for n in made if n not in delta]
    wrong += [f"{n!r}, which is not generated" for n in delta if n not in made]
    wrong += [
        f"{n!r} of shape {tuple(delta[n].shape)}, expected {tuple(made[n].shape)}"
        for n in made
        if n in delta and delta[n].shape != made[n].shape
    ]
    if wrong:
        raise HyperError(
            message("pull_back: the change does not fit what is generated", got=wrong,
                    help="pass theta - stepped, by the names of hyper.generate(cond)")
        )  # fmt: skip
