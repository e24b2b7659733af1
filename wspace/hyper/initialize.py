"""Initialisation of heads: which variance every generated tensor begins with.

A scheme says the second moment of the entries of each weight; `Head.reset` brings the head there,
and `activation_variance` measures what comes of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import sqrt
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from wspace.errors import HyperError, message
from wspace.hyper.heads.head import Head
from wspace.hyper.target import Weight
from wspace.restore import buffers_of, drawn_again, put_back
from wspace.space import Role

if TYPE_CHECKING:
    from wspace.hyper.hypernetwork import HyperNetwork

Scheme = Literal["hyperfan_in", "hyperfan_out", "hyperfan_harmonic", "residual", "bias", "default"]

GAIN = 2.0
"""c of the hyperfan formulas: rectified units halve the second moment."""
SMALL = 1e-2
"""Standard deviation of what is made for norms' scales and shifts, around 1 and 0."""
RESIDUAL = 0.1
"""Standard deviation of a residual over that of the fan-in rule."""


def hyperfan_in(w: Weight) -> float:
    """Variance that keeps the second moment of activations on the way forward.

    Half of it comes from the bias where the layer has one. Chang, Flokas, Lipson (2020),
    "Principled Weight Initialization for Hypernetworks", table 1.

    Args:
        w: A matrix, or a bias.

    Returns:
        Variance of its entries.
    """
    if w.role is Role.SHIFT:
        return GAIN / 2
    return GAIN / ((2 if w.bias else 1) * w.fan_in)


def hyperfan_out(w: Weight) -> float:
    """Variance that keeps the second moment of gradients on the way back.

    Args:
        w: A matrix, or a bias.

    Returns:
        Variance of its entries.
    """
    if w.role is Role.SHIFT:
        return max(0.0, GAIN * (1 - w.fan_in / w.fan_out))
    return GAIN / w.fan_out


def hyperfan_harmonic(w: Weight) -> float:
    """Between the two: harmonic mean of their variances of a matrix, 2 / (1/a + 1/b).

    The bias gets what is then left to keep the second moment of activations, as it does in both
    other rules. (The harmonic mean of their biases' variances would be 0 wherever the fan-out rule
    needs no bias, and activations would fade by 2/3 in every layer.)

    Args:
        w: A matrix, or a bias.

    Returns:
        Variance of its entries.
    """
    a, b = GAIN / ((2 if w.bias else 1) * w.fan_in), GAIN / w.fan_out
    matrix = 2 / (1 / a + 1 / b)
    return max(0.0, GAIN - w.fan_in * matrix) if w.role is Role.SHIFT else matrix


_RULES: dict[str, Callable[[Weight], float]] = {
    "hyperfan_in": hyperfan_in,
    "hyperfan_out": hyperfan_out,
    "hyperfan_harmonic": hyperfan_harmonic,
}


def variances(weights: Sequence[Weight], scheme: Scheme) -> dict[str, float]:
    """Second moment with which the entries of every weight are to begin.

    Args:
        weights: What is generated.
        scheme: A hyperfan rule, or ``"residual"``: a hundredth of that of the fan-in rule, to be
            added to a base.

    Returns:
        By name. Scales and shifts of norms, and what is added otherwise (position embeddings), vary
        by 0.01 (`centre`); entries of tables have variance 1, as in `torch.nn.Embedding`.
    """
    rule = _RULES.get(scheme, hyperfan_in)
    factor = RESIDUAL**2 if scheme == "residual" else 1.0
    return {w.name: factor * _variance(w, rule) for w in weights}


def _variance(w: Weight, rule: Callable[[Weight], float]) -> float:
    if w.role is Role.TABLE:
        return 1.0
    matrix = w.role is Role.MATRIX or (w.role is Role.OTHER and len(w.shape) >= 2)
    layer = (w.fan_in, w.fan_out) != (1, 1)  # else it is added to a norm, or alone
    if matrix or (w.role is Role.SHIFT and layer and len(w.shape) < 2):
        return rule(w)
    return SMALL**2


def centre(w: Weight) -> float:
    """Value around which a weight without a base is made.

    Args:
        w: The weight.

    Returns:
        The mean of the target's own values for scales and other vectors that are not added (so 1
        for a norm's, whoever wrote the norm), 0 for all others but the lengths of a weight norm:
        these are what rows of the variance of `hyperfan_in` have, whatever the scheme.
    """
    if w.spans:
        return sqrt(w.spans * hyperfan_in(replace(w, role=Role.MATRIX)))
    if w.role is Role.SCALE or (w.role is Role.OTHER and len(w.shape) < 2):
        return w.mean if w.mean is not None else float(w.role is Role.SCALE)
    return 0.0


def check_scheme(scheme: str) -> None:
    """Raises a HyperError unless there is such a scheme."""
    if scheme not in get_args(Scheme):
        raise HyperError(
            message(f"hypernetwork: unknown init {scheme!r}", expected=f"one of {get_args(Scheme)}")
        )


def initialize(head: Head, scheme: Scheme, *, generator: torch.Generator | None = None) -> None:
    """Brings a bound head to a scheme.

    Args:
        head: The head.
        scheme: One of `variances`; ``"bias"`` makes nothing, so that the base is all there is at
            first; ``"default"`` leaves the head as it was built.
        generator: Source of randomness.

    Raises:
        HyperError: If there is no such scheme.
    """
    check_scheme(scheme)
    if scheme == "default":
        return
    head.reset(variances(head.weights, "residual" if scheme == "bias" else scheme), generator)
    if scheme == "bias":
        head.silence()


@torch.no_grad()
def activation_variance(hyper: "HyperNetwork", cond: Any, *args: Any) -> dict[str, Tensor]:
    """Second moment of what every layer of the target answers, with generated weights.

    Args:
        hyper: The hypernetwork; buffers of its target stay as they are.
        cond: What is conditioned on.
        args: Inputs of the target, the same for all networks.

    Returns:
        For every module without parts (parametrised ones and attention count as such), by name in
        the order of their calls: ``(networks,)``, or ``()`` without a batch of conditions. Several
        calls of one module are averaged.
    """
    made = hyper.generate(cond)
    first = hyper.weights[0]
    batch = made[first.name].shape[: made[first.name].dim() - len(first.shape)]
    seen: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, out: Any) -> None:
            x = out[0] if isinstance(out, tuple) else out
            if isinstance(x, Tensor) and x.is_floating_point():
                seen.setdefault(name, []).append(x.square().mean())

        return hook

    leaves = [(n, m) for n, m in hyper.target.named_modules() if _answers(n, m)]
    hooks = [m.register_forward_hook(watch(n)) for n, m in leaves]
    before = buffers_of(hyper.target)
    try:
        with drawn_again(hyper.target):
            hyper.run_with(made, *args, inputs="shared", method="loop")
    finally:
        put_back(before)
        for h in hooks:
            h.remove()
    return {n: torch.stack(x).reshape(*batch, -1).mean(-1) for n, x in seen.items()}


def _answers(name: str, module: nn.Module) -> bool:
    """Whether a module is looked at: it has no parts but those that compute its weights."""
    inside = "parametrizations" in name.split(".")
    parts = [n for n, _ in module.named_children() if n != "parametrizations"]
    return not inside and (not parts or isinstance(module, nn.MultiheadAttention))
