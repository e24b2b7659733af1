"""What all LSTM cells here share: gates, their normalisation, and both by hand through time.

Gates stand in the order of `torch.nn.LSTM`: input, forget, candidate, output. From their sums
``s``, ``(B, 4 N)``, and the cell state ``c``::

    i, f, g, o = LN_i(s_i), LN_f(s_f), LN_g(s_g), LN_o(s_o)
    c' = sigmoid(f) c + sigmoid(i) mask tanh(g)
    h' = sigmoid(o) tanh(LN_c(c'))

`step` is one such step for autograd. `Tape` takes many, and `Rewind` goes back over them: what does
not depend on the gradient is taken at once for some steps, in memory that is used again for others,
which leaves a handful of products for each. A forget bias is part of ``s``, or of LN_f's shift.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GATES = 4
ROWS = 256
"""Steps times batch that are taken back at once: few enough to stay in the cache."""
_NORM: Any = torch.ops.aten.native_layer_norm
_NORM_BACKWARD: Any = torch.ops.aten.native_layer_norm_backward


class Norms(NamedTuple):
    """Factors and shifts of a cell's layer normalisations.

    Attributes:
        gate_scale: Of the gates, ``(4 N,)``.
        gate_shift: Of the gates, ``(4 N,)``.
        cell_scale: Of the cell state, ``(N,)``.
        cell_shift: Of the cell state, ``(N,)``.
    """

    gate_scale: Tensor
    gate_shift: Tensor
    cell_scale: Tensor
    cell_shift: Tensor


class GateNorm(nn.Module):
    """Layer normalisations of a cell: one for each gate, one for the cell state.

    Args:
        size: Units N of the cell.
        options: Device and dtype.
    """

    def __init__(self, size: int, **options: Any) -> None:
        super().__init__()
        self.gate_scale = nn.Parameter(torch.ones(GATES * size, **options))
        self.gate_shift = nn.Parameter(torch.zeros(GATES * size, **options))
        self.cell_scale = nn.Parameter(torch.ones(size, **options))
        self.cell_shift = nn.Parameter(torch.zeros(size, **options))

    def norms(self, forget_bias: float) -> Norms:
        """What `step` and `Tape` take.

        Args:
            forget_bias: Added to the forget gate, behind its normalisation.

        Returns:
            The parameters.
        """
        shift = with_forget_bias(self.gate_shift, forget_bias)
        return Norms(self.gate_scale, shift, self.cell_scale, self.cell_shift)


def with_forget_bias(bias: Tensor, amount: float) -> Tensor:
    """Biases of all gates, more for the forget gate.

    Args:
        bias: Biases, ``(4 N,)``.
        amount: What is added to the second quarter.

    Returns:
        The sum, ``(4 N,)``.
    """
    more = bias.new_tensor((0.0, amount, 0.0, 0.0)).repeat_interleave(len(bias) // GATES)
    return bias + more


def orthogonal(rows: int, columns: int, generator: torch.Generator | None) -> Tensor:
    """A random orthogonal matrix for each gate (Saxe et al. 2014), float32 on the CPU.

    Args:
        rows: Rows of each.
        columns: Columns of each.
        generator: Source of randomness.

    Returns:
        Their rows below each other, ``(4 rows, columns)``.
    """
    made = [nn.init.orthogonal_(torch.empty(rows, columns), generator=generator) for _ in range(4)]
    return torch.cat(made)


def drop_mask(like: Tensor, units: int, rate: float) -> Tensor:
    """Random factors 0 and ``1 / (1 - rate)``: what dropout multiplies with.

    Args:
        like: Its first axes, device and dtype are taken: ``(T, B, …)``.
        units: Last axis.
        rate: Share of zeros.

    Returns:
        Factors, ``(T, B, units)``, drawn from the global generator as `torch.nn.Dropout` does.
    """
    kept = like.new_empty(*like.shape[:-1], units).bernoulli_(1.0 - rate)
    return kept.div_(1.0 - rate)


def step(
    sums: Tensor, c: Tensor, norms: Norms | None, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """One step of the gates, for autograd.

    Args:
        sums: Sums of the gates, ``(B, 4 N)``.
        c: Cell state, ``(B, N)``.
        norms: Layer normalisation; None for none.
        mask: Factors of the candidates, ``(B, N)``.
        eps: Added to variances.

    Returns:
        Hidden and cell state, ``(B, N)`` each.
    """
    size = c.shape[-1:]
    if norms is not None:
        normed = F.layer_norm(sums.unflatten(-1, (GATES, -1)), size, eps=eps).flatten(-2)
        sums = torch.addcmul(norms.gate_shift, normed, norms.gate_scale)
    i, f, g, o = sums.chunk(GATES, -1)
    g = g.tanh() if mask is None else g.tanh() * mask
    c = f.sigmoid() * c + i.sigmoid() * g
    seen = c if norms is None else F.layer_norm(c, size, norms.cell_scale, norms.cell_shift, eps)
    return o.sigmoid() * seen.tanh(), c


class Record(NamedTuple):
    """What a `Tape` keeps for the way back.

    Attributes:
        gates: Sums of the gates if they are normalised, else their activations, ``(T, B, 4 N)``;
            candidates without their mask.
        cells: Cell states, ``(T + 1, B, N)``.
        seen: ``tanh(LN_c(c))``, ``(T, B, N)``.
    """

    gates: Tensor
    cells: Tensor
    seen: Tensor


class Tape:
    """Steps of the gates by hand, outside of autograd.

    Args:
        c: Cell state at the start, ``(B, N)``.
        steps: Number of steps T.
        norms: Layer normalisation; None for none.
        mask: Factors of the candidates, ``(T, B, N)``.
        eps: Added to variances.

    Attributes:
        record: What is kept.
        sums: For every step ``(B, 4 N)``, to be filled with the sums before `take`.
    """

    def __init__(
        self, c: Tensor, steps: int, norms: Norms | None, mask: Tensor | None, eps: float
    ) -> None:
        batch, size = c.shape
        kept = c.new_empty(steps, batch, GATES * size)
        cells = c.new_empty(steps + 1, batch, size)
        cells[0] = c
        self.record = Record(kept, cells, c.new_empty(steps, batch, size))
        self.norms, self.eps, self.size = norms, eps, size
        self.sums, self._rows = kept.unbind(), kept.view(steps, -1, size).unbind()
        self._gates = kept if norms is None else torch.empty_like(kept[:1]).expand_as(kept)
        self._open = self._gates[..., : 2 * size].unbind()
        self._i, self._f, self._g, self._o = (p.unbind() for p in self._gates.split(size, -1))
        self._cells, self._seen = cells.unbind(), self.record.seen.unbind()
        self._mask = None if mask is None else mask.unbind()

    def take(self, t: int, h: Tensor) -> None:
        """Takes a step.

        Args:
            t: Which.
            h: Where the hidden state goes, ``(B, N)``.
        """
        norms, c, seen = self.norms, self._cells[t + 1], self._seen[t]
        if norms is not None:
            normed = _NORM(self._rows[t], (self.size,), None, None, self.eps)[0]
            shape, scale = self.sums[t].shape, norms.gate_scale
            torch.addcmul(norms.gate_shift, normed.view(shape), scale, out=self._gates[t])
        self._open[t].sigmoid_()
        self._o[t].sigmoid_()
        g = self._g[t].tanh_()
        torch.mul(self._f[t], self._cells[t], out=c)
        c.addcmul_(self._i[t], g if self._mask is None else g * self._mask[t])
        if norms is None:
            torch.tanh(c, out=seen)
        else:
            pair = norms.cell_scale, norms.cell_shift
            torch.tanh(_NORM(c, (self.size,), *pair, self.eps)[0], out=seen)
        torch.mul(self._o[t], seen, out=h)


class Rewind:
    """The way back over the steps of a `Tape`, some of them at a time.

    Args:
        record: What was kept.
        norms: As for the tape.
        mask: As for the tape.
        eps: As for the tape.
        out: Where the gradients of the sums of some steps go, ``(S, B, 4 N)``: S at a time at most.

    Attributes:
        norm_slopes: Gradients of the `Norms`, complete after the last `add_up`.
    """

    def __init__(
        self, record: Record, norms: Norms | None, mask: Tensor | None, eps: float, out: Tensor
    ) -> None:
        self.record, self.norms, self.mask, self.eps = record, norms, mask, eps
        size = self.size = record.seen.shape[-1]
        shape = len(out), *record.gates.shape[1:]
        factors, self._through_cell = out.new_empty(shape), out.new_empty(*shape[:2], size)
        self._factors, self._gates = factors.split(size, -1), record.gates
        self._out, self._slopes = out.unbind(), out
        self.norm_slopes: list[Tensor | None] = [None] * 4
        if norms is not None:
            self._gates, self._slopes = out.new_empty(shape), out.new_empty(shape)
            self._cell_slopes = torch.empty_like(self._through_cell)
            self.norm_slopes = [torch.zeros_like(x) for x in norms]
        by_cell = factors[..., : 3 * size].unflatten(-1, (3, size)).unbind()
        inner = self._slopes[..., : 3 * size].unflatten(-1, (3, size)).unbind()
        outer = self._slopes[..., 3 * size :].unbind()
        by_h, through = self._factors[3].unbind(), self._through_cell.unbind()
        self._steps = list(zip(by_cell, by_h, through, inner, outer, strict=True))

    def load(self, start: int, stop: int) -> None:
        """Takes the derivatives of some steps.

        Args:
            start: The first.
            stop: Behind the last.
        """
        kept, cells, seen = self.record
        n, some, seen = stop - start, slice(start, stop), seen[start:stop]
        gates = kept[some] if self.norms is None else self._normalised(kept[some], cells[1:][some])
        i, f, g, o = gates.split(self.size, -1)
        mask = None if self.mask is None else self.mask[some]
        by_i, by_f, by_g, by_o = (x[:n] for x in self._factors)
        dot_sigmoid, dot_tanh = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward
        dot_sigmoid(g if mask is None else g * mask, i, grad_input=by_i)
        dot_sigmoid(cells[some], f, grad_input=by_f)
        dot_tanh(i if mask is None else i * mask, g, grad_input=by_g)
        dot_sigmoid(seen, o, grad_input=by_o)
        dot_tanh(o, seen, grad_input=self._through_cell[:n])
        self._f = f.unbind()

    def _normalised(self, sums: Tensor, cells: Tensor) -> Tensor:
        """Activations of the gates, from what was normalised."""
        norms, shape = self.norms, (self.size,)
        assert norms is not None
        rows = sums.view(len(sums), -1, self.size)
        self._normed, mean, rstd = _NORM(rows, shape, None, None, self.eps)
        self._gate_parts = rows.unbind(), mean.unbind(), rstd.unbind()
        self._normed_cells, mean, rstd = _NORM(cells, shape, None, None, self.eps)
        self._cell_parts = cells.unbind(), mean.unbind(), rstd.unbind()
        gates, normed = self._gates[: len(sums)], self._normed.view_as(sums)
        torch.addcmul(norms.gate_shift, normed, norms.gate_scale, out=gates)
        for part, by in zip(gates.split(self.size, -1), "ssts", strict=True):
            part.tanh_() if by == "t" else part.sigmoid_()
        return gates

    def back(self, k: int, h: Tensor, c: Tensor) -> None:
        """Goes back one step; the gradient of its sums is in ``out[k]`` afterwards.

        Args:
            k: Which of those loaded.
            h: Gradient of the hidden state behind the step, ``(B, N)``.
            c: Gradient of the cell state behind it, ``(B, N)``; becomes that of the one before.
        """
        norms = self.norms
        by_cell, by_h, through, inner, outer = self._steps[k]
        if norms is None:
            c.addcmul_(h, through)
        else:
            slope = torch.mul(h, through, out=self._cell_slopes[k])
            c.add_(_before(slope, self._cell_parts, k, norms.cell_scale))
        torch.mul(c.unsqueeze(1), by_cell, out=inner)
        torch.mul(h, by_h, out=outer)
        c.mul_(self._f[k])
        if norms is not None:
            slope = (self._slopes[k] * norms.gate_scale).view(-1, self.size)
            found = _before(slope, self._gate_parts, k, None)
            self._out[k].copy_(found.view_as(self._out[k]))

    def add_up(self, count: int) -> None:
        """Adds what the steps that were loaded give for the normalisations.

        Args:
            count: Number of steps that were loaded.
        """
        if self.norms is None:
            return
        slopes, cells = self._slopes[:count], self._cell_slopes[:count]
        found = (
            (slopes * self._normed.view_as(slopes)).sum((0, 1)),
            slopes.sum((0, 1)),
            (cells * self._normed_cells).sum((0, 1)),
            cells.sum((0, 1)),
        )
        for total, part in zip(cast("list[Tensor]", self.norm_slopes), found, strict=True):
            total.add_(part)


def _before(slope: Tensor, parts: Sequence[Sequence[Tensor]], k: int, w: Tensor | None) -> Tensor:
    """The gradient before a normalisation, of the gradient behind it."""
    x, mean, rstd = (part[k] for part in parts)
    wanted = (True, False, False)
    return _NORM_BACKWARD(slope, x, slope.shape[-1:], mean, rstd, w, None, wanted)[0]


def differentiable(
    loop: Callable[[Sequence[Tensor | None], float], tuple[Tensor, ...]],
    flat: Sequence[Tensor | None],
    wants: Sequence[bool],
    eps: float,
    slopes: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of a loop by autograd, to be differentiated again.

    Args:
        loop: Takes the tensors and `eps`.
        flat: The tensors.
        wants: Of which of them gradients are wanted.
        eps: Added to variances.
        slopes: Gradients of what it returns.

    Returns:
        Gradients of the tensors; None where not wanted.
    """
    # some inputs are made of others: aliases end the paths that do not lie in this loop
    flat = [None if x is None else x.view_as(x) for x in flat]
    some = [x for x, want in zip(flat, wants, strict=True) if want and x is not None]
    made = loop(flat, eps)
    found = iter(torch.autograd.grad(made, some, slopes, create_graph=True, allow_unused=True))
    return [next(found) if want else None for want in wants]
