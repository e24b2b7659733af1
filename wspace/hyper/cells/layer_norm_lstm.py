"""LSTM with layer normalisation: the control of `HyperLSTM`, with the same gates and start.

Equations as of a `HyperLSTM` whose factors are 1 and whose b is the bias; Ba, Kiros, Hinton 2016,
with one normalisation for each gate instead of one for the two products.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from wspace.hyper.cells.gates import (
    GATES,
    ROWS,
    GateNorm,
    Norms,
    Record,
    Rewind,
    Tape,
    differentiable,
    drop_mask,
    orthogonal,
    step,
    with_forget_bias,
)
from wspace.hyper.cells.sequence import Layers, RecurrentCell, check_options


class LSTMState(NamedTuple):
    """State of a `LayerNormLSTM`.

    Attributes:
        h: Hidden state, ``(…, hidden_size)``.
        c: Cell state, ``(…, hidden_size)``.
    """

    h: Tensor
    c: Tensor

    def detach(self) -> "LSTMState":
        """The state without the graph it was made with."""
        return LSTMState(self.h.detach(), self.c.detach())


class LayerNormLSTMCell(RecurrentCell[LSTMState]):
    """One layer of a `LayerNormLSTM`; called, it takes one step.

    Args:
        input_size: Length of an input.
        hidden_size: Units H.
        layer_norm: False for an LSTM without normalisation.
        recurrent_dropout: Share of the candidates ``tanh(g)`` that are dropped in training.
        forget_bias: Added to the forget gate.
        eps: Added to variances.
        fused: As for `wspace.hyper.HyperLSTMCell`.
        generator: Source of the initial weights, orthogonal for each gate.
        device: Device of the parameters.
        dtype: Their type.

    Raises:
        HyperError: If a size is not positive, or `recurrent_dropout` is not in [0, 1).

    Attributes:
        weight_x: Weights on inputs, of the gates i, f, g, o, ``(4 H, input_size)``.
        weight_h: Weights on hidden states, ``(4 H, H)``.
        bias: Biases, ``(4 H,)``.
        norm: Layer normalisation; None for none.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        layer_norm: bool = True,
        recurrent_dropout: float = 0.0,
        forget_bias: float = 1.0,
        eps: float = 1e-3,
        fused: bool = True,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options("LayerNormLSTM", (input_size, hidden_size), recurrent_dropout)
        self.input_size, self.hidden_size = input_size, hidden_size
        self.recurrent_dropout, self.forget_bias = recurrent_dropout, forget_bias
        self.eps, self.fused = eps, fused
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight_x = nn.Parameter(torch.empty(GATES * hidden_size, input_size, **made))
        self.weight_h = nn.Parameter(torch.empty(GATES * hidden_size, hidden_size, **made))
        self.bias = nn.Parameter(torch.zeros(GATES * hidden_size, **made))
        self.norm = GateNorm(hidden_size, **made) if layer_norm else None
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the initial weights: orthogonal for each gate, biases 0.

        Args:
            generator: Source of randomness.
        """
        for weight in (self.weight_x, self.weight_h):
            weight.copy_(orthogonal(self.hidden_size, weight.shape[1], generator))
        self.bias.zero_()

    def widths(self) -> tuple[int, ...]:
        """Lengths of the parts of a state."""
        return self.hidden_size, self.hidden_size

    def pack(self, parts: Sequence[Tensor]) -> LSTMState:
        """A state of its parts."""
        return LSTMState(*parts)

    def sequence(self, x: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState]:
        """Runs over a sequence.

        Args:
            x: Inputs, ``(T, B, input_size)``.
            state: State at the start, parts ``(B, hidden_size)``.

        Returns:
            Hidden states, ``(T, B, hidden_size)``, and the state at the end.
        """
        norms = None if self.norm is None else self.norm.norms(self.forget_bias)
        bias = self.bias if norms else with_forget_bias(self.bias, self.forget_bias)
        mask = None
        if self.training and self.recurrent_dropout:
            mask = drop_mask(x, self.hidden_size, self.recurrent_dropout)
        x = nn.functional.linear(x, self.weight_x, bias)
        flat = x, *state, self.weight_h, *(norms or (None,) * 4), mask
        needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in flat)
        if not (self.fused and needed):
            out, c = _by_autograd(flat, self.eps)
        else:
            out, c = cast("tuple[Tensor, Tensor]", _ByHand.apply(self.eps, *flat))
        return out, LSTMState(out[-1], c)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.input_size}, {self.hidden_size}, layer_norm={self.norm is not None}"


class LayerNormLSTM(Layers[LSTMState]):
    """Layers of `LayerNormLSTMCell`, called like `torch.nn.LSTM`.

    Args:
        input_size: Length of an input.
        hidden_size: Units of each layer.
        num_layers: Layers.
        batch_first: Whether inputs and outputs are ``(B, T, …)`` instead of ``(T, B, …)``.
        options: As for `LayerNormLSTMCell`.

    Raises:
        HyperError: If a size is not positive, or an option makes no sense.

    Example:
        >>> out, state = LayerNormLSTM(3, 5)(torch.randn(11, 7, 3))
        >>> out.shape, state.c.shape
        (torch.Size([11, 7, 5]), torch.Size([1, 7, 5]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        batch_first: bool = False,
        **options: Any,
    ) -> None:
        check_options("LayerNormLSTM", (num_layers,))
        inputs = [input_size, *[hidden_size] * (num_layers - 1)]
        cells = [LayerNormLSTMCell(n, hidden_size, **options) for n in inputs]
        super().__init__(cells, batch_first=batch_first)


Flat = Sequence[Tensor | None]
"""Projected inputs ``(T, B, 4 H)``, h, c, ``W_h``, four `Norms` or None, mask or None."""


def _parts(flat: Flat) -> tuple[list[Tensor], Norms | None, Tensor | None]:
    norms = None if flat[4] is None else Norms(*cast("list[Tensor]", flat[4:8]))
    return cast("list[Tensor]", list(flat[:4])), norms, flat[8]


def _by_autograd(flat: Flat, eps: float) -> tuple[Tensor, Tensor]:
    (xs, h, c, weight), norms, mask = _parts(flat)
    masks = [None] * len(xs) if mask is None else mask.unbind()
    out: list[Tensor] = []
    for x, dropped in zip(xs, masks, strict=True):
        h, c = step(torch.addmm(x, h, weight.mT), c, norms, dropped, eps)
        out.append(h)
    return torch.stack(out), c


class _ByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, eps: float, *flat: Tensor | None) -> tuple[Tensor, ...]:
        (x, h, c, weight), norms, mask = _parts(flat)
        tape = Tape(c, len(x), norms, mask, eps)
        states = x.new_empty(len(x) + 1, *h.shape)
        states[0] = h
        each, weight = states.unbind(), weight.mT
        for t, given in enumerate(x.unbind()):
            torch.addmm(given, each[t], weight, out=tape.sums[t])
            tape.take(t, each[t + 1])
        ctx.eps = eps
        ctx.save_for_backward(*flat, states, *tape.record)
        return states[1:].clone(), tape.record.cells[-1].clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        flat, kept = ctx.saved_tensors[:9], ctx.saved_tensors[9:]
        wants = ctx.needs_input_grad[1:]
        with torch.autocast(slopes[0].device.type, enabled=False):
            if torch.is_grad_enabled():
                return None, *differentiable(_by_autograd, flat, wants, ctx.eps, slopes)
            return None, *_backward(flat, kept, slopes, ctx.eps)


def _backward(
    flat: Flat, kept: Sequence[Tensor], slopes: Sequence[Tensor], eps: float
) -> tuple[Tensor | None, ...]:
    """Gradients of all tensors of a loop, in their order."""
    states, *kept = kept
    (x, h, c, weight), norms, mask = _parts(flat)
    steps, batch = x.shape[:2]
    span = min(steps, max(1, ROWS // batch))
    made, by_x = x.new_empty(span, *x.shape[1:]), torch.empty_like(x)
    rewind = Rewind(Record(*kept), norms, mask, eps, made)
    h, c, total = torch.zeros_like(h), slopes[1].clone(), weight.new_zeros(weight.mT.shape)
    each = made.unbind()
    for stop in range(steps, 0, -span):
        start = max(0, stop - span)
        rewind.load(start, stop)
        for t in range(stop - 1, start - 1, -1):
            h.add_(slopes[0][t])
            rewind.back(t - start, h, c)
            torch.mm(each[t - start], weight, out=h)
        some = made[: stop - start]
        by_x[start:stop] = some
        total.addmm_(states[start:stop].flatten(0, 1).mT, some.flatten(0, 1))
        rewind.add_up(stop - start)
    return by_x, h, c, total.mT, *rewind.norm_slopes, None
