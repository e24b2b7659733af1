"""HyperLSTM: an LSTM whose weights a smaller LSTM changes at every step (Ha, Dai, Le 2016).

For inputs ``x_t``, states ``h, c`` and those of the small cell ``h^, c^`` (section 3.2 and appendix
A.2.2 of arXiv:1609.09106), with ``[;]`` for one below the other and ``*`` entry by entry::

    h^_t, c^_t = LSTM([h_{t-1}; x_t], h^_{t-1}, c^_{t-1})
    for each gate y of i, f, g, o:
        z_h = A_h h^_t + a_h       d_h = S_h z_h
        z_x = A_x h^_t + a_x       d_x = S_x z_x
        z_b = A_b h^_t             b   = S_b z_b + b_0
        y   = d_h * W_h h_{t-1} + d_x * W_x x_t + b
    c_t = sigmoid(f + forget_bias) * c_{t-1} + sigmoid(i) * drop(tanh(g))
    h_t = sigmoid(o) * tanh(c_t)

With layer normalisation each ``y``, before the forget bias, and the ``c_t`` that ``h_t`` is made of
are normalised, in both cells. The paper writes ``h^_{t-1}`` in the lines with z; its figures are of
code that takes ``h^_t``, and so is this.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wspace.hyper.cells.gates import GATES, GateNorm, drop_mask, orthogonal, with_forget_bias
from wspace.hyper.cells.hyper_recurrence import HyperState, Loop, run
from wspace.hyper.cells.sequence import Layers, RecurrentCell, check_options

START = 0.1
"""Every factor d at the start (Cooijmans et al. 2016)."""


class HyperLSTMCell(RecurrentCell[HyperState]):
    """One layer of a `HyperLSTM`; called, it takes one step.

    Args:
        input_size: Length of an input.
        hidden_size: Units H of the LSTM that is changed.
        hyper_size: Units M of the small one.
        embedding_size: Length Nz of each embedding z.
        layer_norm: Whether gates and cell states are normalised.
        recurrent_dropout: Share of the candidates ``tanh(g)`` that are dropped in training.
        forget_bias: Added to the forget gates of both cells.
        eps: Added to variances.
        noise: Standard deviation of noise on S_h and S_x at the start, with sum 0 in each row, so
            that every d is 0.1 all the same. Published is 0; then the entries of z_h have equal
            gradients, and so remain equal for ever, and likewise z_x: as if Nz were 1.
        fused: Whether gradients are taken by hand. They are autograd's, of any order, in three
            fifths of the memory and a sixth less time; `torch.func` and forward mode need False.
        generator: Source of the initial weights.
        device: Device of the parameters.
        dtype: Their type.

    Raises:
        HyperError: If a size is not positive, or `recurrent_dropout` is not in [0, 1).

    Attributes:
        weight_x: W_x of the gates i, f, g, o, ``(4 H, input_size)``.
        weight_h: W_h, ``(4 H, H)``.
        bias: b_0, ``(4 H,)``.
        hyper_weight_x: Weights of the small cell on ``x_t``, ``(4 M, input_size)``.
        hyper_weight_h: Its weights on ``[h; h^]``, ``(4 M, H + M)``.
        hyper_bias: Its biases, ``(4 M,)``.
        embed: A of h, x and b, ``(3, 4, Nz, M)``.
        embed_bias: a of h and x, ``(2, 4, Nz)``.
        scale: S of h, x and b, ``(3, 4, H, Nz)``.
        norm, hyper_norm: Layer normalisations of both cells; None for none.

    Example:
        >>> cell = HyperLSTMCell(3, 5, hyper_size=4, embedding_size=2)
        >>> state = cell(torch.randn(7, 3))
        >>> state.h.shape, cell(torch.randn(7, 3), state).hyper_h.shape
        (torch.Size([7, 5]), torch.Size([7, 4]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        hyper_size: int = 32,
        embedding_size: int = 8,
        *,
        layer_norm: bool = False,
        recurrent_dropout: float = 0.0,
        forget_bias: float = 1.0,
        eps: float = 1e-3,
        noise: float = 0.0,
        fused: bool = True,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = input_size, hidden_size, hyper_size, embedding_size
        check_options("HyperLSTM", sizes, recurrent_dropout)
        self.input_size, self.hidden_size = input_size, hidden_size
        self.hyper_size, self.embedding_size = hyper_size, embedding_size
        self.recurrent_dropout, self.forget_bias, self.eps = recurrent_dropout, forget_bias, eps
        self.noise, self.fused = noise, fused
        made: dict[str, Any] = {"device": device, "dtype": dtype}

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, **made))

        h, m, nz = hidden_size, hyper_size, embedding_size
        self.weight_x = empty(GATES * h, input_size)
        self.weight_h = empty(GATES * h, h)
        self.bias = empty(GATES * h)
        self.hyper_weight_x = empty(GATES * m, input_size)
        self.hyper_weight_h = empty(GATES * m, h + m)
        self.hyper_bias = empty(GATES * m)
        self.embed = empty(3, GATES, nz, m)
        self.embed_bias = empty(2, GATES, nz)
        self.scale = empty(3, GATES, h, nz)
        self.norm = GateNorm(h, **made) if layer_norm else None
        self.hyper_norm = GateNorm(m, **made) if layer_norm else None
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the initial weights (appendix A.2.3).

        Matrices are orthogonal for each gate; A_h, A_x, S_b and all biases are 0; a_h, a_x are 1;
        A_b has a standard deviation of 0.01; S_h, S_x are ``0.1 / Nz``. So ``d_h = d_x = 0.1`` and
        ``b = 0`` for any input: an LSTM with a tenth of W_h and W_x.

        Args:
            generator: Source of randomness.
        """
        h, m, nz = self.hidden_size, self.hyper_size, self.embedding_size
        self.weight_x.copy_(orthogonal(h, self.input_size, generator))
        self.weight_h.copy_(orthogonal(h, h, generator))
        small = orthogonal(m, h + self.input_size, generator)
        self.hyper_weight_x.copy_(small[:, h:])
        self.hyper_weight_h.copy_(torch.cat([small[:, :h], orthogonal(m, m, generator)], 1))
        for shift in (self.bias, self.hyper_bias):
            shift.zero_()
        self.embed.zero_()
        self.embed[2].copy_(0.01 * torch.randn(GATES, nz, m, generator=generator))
        self.embed_bias.fill_(1.0)
        self.scale.zero_()
        self.scale[:2] = START / nz
        if self.noise and nz > 1:
            drawn = torch.randn(2, GATES, h, nz, generator=generator).to(self.scale)
            self.scale[:2] += self.noise * (drawn - drawn.mean(-1, keepdim=True))

    def widths(self) -> tuple[int, ...]:
        """Lengths of the parts of a state."""
        return (self.hidden_size,) * 2 + (self.hyper_size,) * 2

    def pack(self, parts: Sequence[Tensor]) -> HyperState:
        """A state of its parts."""
        return HyperState(*parts)

    def factors(self, hyper_h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the small cell makes of the weights: for looking at.

        Args:
            hyper_h: Hidden states of the small cell, ``(…, M)``.

        Returns:
            d_h, d_x and b, without the forget bias, ``(…, 4, H)`` each.
        """
        maps, shifts = self._maps(0.0)
        d_h, d_x, b = (hyper_h @ maps.mT + shifts).unflatten(-1, (3, GATES, -1)).unbind(-3)
        return d_h, d_x, b

    def _maps(self, forget_bias: float) -> tuple[Tensor, Tensor]:
        """S A of h, x and b, and their constants: ``(12 H, M)``, ``(12 H,)``."""
        maps = (self.scale @ self.embed).flatten(0, 2)
        factors = (self.scale[:2] @ self.embed_bias.unsqueeze(-1)).flatten()
        return maps, torch.cat([factors, with_forget_bias(self.bias, forget_bias)])

    def sequence(self, x: Tensor, state: HyperState) -> tuple[Tensor, HyperState]:
        """Runs over a sequence.

        Args:
            x: Inputs, ``(T, B, input_size)``.
            state: State at the start, parts ``(B, width)``.

        Returns:
            Hidden states, ``(T, B, hidden_size)``, and the state at the end.
        """
        plain = 0.0 if self.norm is not None else self.forget_bias
        hyper_bias = with_forget_bias(self.hyper_bias, plain)
        mask = None
        if self.training and self.recurrent_dropout:
            mask = drop_mask(x, self.hidden_size, self.recurrent_dropout)
        loop = Loop(
            nn.functional.linear(x, self.weight_x),
            nn.functional.linear(x, self.hyper_weight_x, hyper_bias),
            state,
            self.weight_h,
            self.hyper_weight_h,
            *self._maps(plain),
            None if self.norm is None else self.norm.norms(self.forget_bias),
            None if self.hyper_norm is None else self.hyper_norm.norms(self.forget_bias),
            mask,
        )
        return run(loop, self.eps, fused=self.fused)

    def extra_repr(self) -> str:
        """Sizes."""
        sizes = f"{self.input_size}, {self.hidden_size}, {self.hyper_size}, {self.embedding_size}"
        return f"{sizes}, layer_norm={self.norm is not None}"


class HyperLSTM(Layers[HyperState]):
    """Layers of `HyperLSTMCell`, called like `torch.nn.LSTM`.

    Args:
        input_size: Length of an input.
        hidden_size: Units of each layer.
        hyper_size: Units of each layer's small cell.
        embedding_size: Length Nz of each embedding.
        num_layers: Layers; each has a small cell of its own.
        batch_first: Whether inputs and outputs are ``(B, T, …)`` instead of ``(T, B, …)``.
        options: As for `HyperLSTMCell`.

    Raises:
        HyperError: If a size is not positive, or an option makes no sense.

    Example:
        >>> lstm = HyperLSTM(3, 5, hyper_size=4, embedding_size=2, batch_first=True)
        >>> out, state = lstm(torch.randn(7, 11, 3))
        >>> out.shape, state.h.shape
        (torch.Size([7, 11, 5]), torch.Size([1, 7, 5]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        hyper_size: int = 32,
        embedding_size: int = 8,
        num_layers: int = 1,
        *,
        batch_first: bool = False,
        **options: Any,
    ) -> None:
        check_options("HyperLSTM", (num_layers,))
        inputs = [input_size, *[hidden_size] * (num_layers - 1)]
        super().__init__(
            [HyperLSTMCell(n, hidden_size, hyper_size, embedding_size, **options) for n in inputs],
            batch_first=batch_first,
        )
