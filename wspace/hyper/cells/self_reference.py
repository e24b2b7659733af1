"""Cells that programme their own weights: the self-referential weight matrix and its controls.

`SRWM` is Irie, Schlag, Csordás, Schmidhuber (2022), "A modern self-referential weight matrix that
learns to modify itself"; `FakeSR` is the same network with the modification off; `DeltaNet` is
Schlag, Irie, Schmidhuber (2021), "Linear transformers are secretly fast weight programmers", whose
fast weights follow the delta rule but whose slow ones stay. All map ``(*batch, T, width)`` to
the same shape and carry a state; each batch element has fast weights of its own.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor, nn

from wspace.errors import HyperError, message

Run = Callable[..., tuple[Tensor, Tensor]]


def _exactly(run: Run) -> Run:
    """Runs outside of autocast, in the type of the weights: errors of fast weights add up."""

    @wraps(run)
    def wrapped(cell: Any, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not torch.is_autocast_enabled(x.device.type):
            return run(cell, x, state)
        with torch.autocast(x.device.type, enabled=False):
            dtype = cell.weight.dtype
            return run(cell, x.to(dtype), None if state is None else state.to(dtype))

    return wrapped


class FastWeightCell(nn.Module):
    """What the cells share: heads, and the shapes of inputs and states.

    The width is split among the heads: each sees its own slice of the input, and what they answer
    is put side by side again.

    Args:
        width: Length of inputs and outputs.
        heads: Number of heads; it divides the width.
        rows: Rows of the fast weights of a head.

    Raises:
        HyperError: If the heads do not divide the width.
    """

    def __init__(self, width: int, heads: int, rows: int | None = None) -> None:
        super().__init__()
        name = type(self).__name__
        if heads < 1 or width < 1 or width % heads:
            raise HyperError(
                message(
                    f"{name}: heads do not divide the width",
                    expected="a positive width, a multiple of heads",
                    got=f"width {width}, heads {heads}",
                )
            )
        self.width, self.heads, self.size = width, heads, width // heads
        self.rows = self.size if rows is None else rows

    def start(self, x: Tensor, state: Tensor | None) -> Tensor:
        """The state to begin with, once inputs and state are seen to fit.

        Args:
            x: Inputs, ``(*batch, T, width)``.
            state: A state or None.

        Returns:
            The state, ``(*batch, heads, rows, width / heads)``; zeros for None.

        Raises:
            HyperError: If a shape does not fit, or there is no step.
        """
        name = type(self).__name__
        if x.dim() < 2 or x.shape[-1] != self.width or not x.shape[-2]:
            raise HyperError(
                message(
                    f"{name}: inputs do not fit",
                    expected=f"(*batch, T, {self.width}), T at least 1",
                    got=f"{tuple(x.shape)}",
                )
            )
        shape = (*x.shape[:-2], self.heads, self.rows, self.size)
        if state is None:
            return x.new_zeros(shape)
        if tuple(state.shape) != shape:
            raise HyperError(
                message(
                    f"{name}: the state does not fit the inputs",
                    expected=f"{shape}: batch, heads, rows, columns",
                    got=f"{tuple(state.shape)}",
                    help="a state is what `forward` gave for the same batch; None begins anew",
                )
            )
        return state

    def split(self, x: Tensor) -> Tensor:
        """``(*batch, T, heads * D)`` as ``(*batch, heads, T, D)``."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

    def joined(self, y: Tensor) -> Tensor:
        """Inverts `split`."""
        return y.transpose(-2, -3).flatten(-2)


class SRWM(FastWeightCell):
    """A weight matrix that computes its own changes.

    Each head has one matrix ``W`` of ``3 D + 4`` rows in blocks ``[y; q; k; b]``. At every step

        [y, q, k, b] = W x;   W[m] += sigmoid(b[m]) W[m] (phi(q) - phi(k)) ⊗ phi(k)

    for each block ``m``, with ``phi`` the softmax: the four blocks have learning rates of their
    own, b's own block included. The output ``y`` is emitted before the change. Only the initial
    matrix is trained. The state is the sum of all changes so far, one for each batch element.

    Args:
        width: Length of inputs and outputs.
        heads: Number of heads.
        softmax_input: Whether the matrix reads ``phi(x)`` (as the paper writes, and its
            reinforcement learning does) or ``x`` (as its supervised experiments do).
        beta_init: Mean of the initial weights of block b; all others have mean 0. The deviation is
            ``D ** -0.5`` everywhere.
        fused: Whether gradients are computed by a hand-written pass, which is faster but has no
            second derivatives and does not work under `torch.func`; else by autograd.
        generator: Source of the initial weights.

    Raises:
        HyperError: If the heads do not divide the width.

    Attributes:
        weight: Initial matrices, ``(heads, 3 D + 4, D)`` with ``D = width / heads``.

    Example:
        >>> cell = SRWM(6, heads=2)
        >>> y, state = cell(torch.randn(5, 7, 6))
        >>> tuple(y.shape), tuple(state.shape)
        ((5, 7, 6), (5, 2, 13, 3))
        >>> more, state = cell(torch.randn(5, 1, 6), state)
    """

    def __init__(
        self,
        width: int,
        heads: int = 1,
        *,
        softmax_input: bool = False,
        beta_init: float = 0.0,
        fused: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(width, heads, 3 * (width // max(heads, 1)) + 4)
        self.softmax_input, self.beta_init, self.fused = softmax_input, beta_init, fused
        self.weight = nn.Parameter(torch.empty(heads, self.rows, self.size))
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws initial matrices.

        Args:
            generator: Source of randomness.
        """
        self.weight.normal_(0, self.size**-0.5, generator=generator)
        self.weight[:, -4:] += self.beta_init

    @_exactly
    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Runs over a sequence.

        Args:
            x: Inputs, ``(*batch, T, width)``.
            state: What an earlier call gave, ``(*batch, heads, 3 D + 4, D)``; None for none.

        Returns:
            Outputs ``(*batch, T, width)``, and the state after the last step.

        Raises:
            HyperError: If a shape does not fit.
        """
        shift = self.start(x, state)
        z = self.split(x)
        z = z.softmax(-1) if self.softmax_input else z
        z = z.reshape(-1, *z.shape[-2:]).movedim(1, 0)  # (T, N, D), N batch × heads
        before = (shift + self.weight).reshape(-1, self.rows, self.size)
        run: Any = _Fused.apply if self.fused else _stepwise
        y, after = run(z, before)
        y = y.movedim(0, 1).reshape(*x.shape[:-2], self.heads, -1, self.size)
        return self.joined(y), after.reshape(shift.shape) - self.weight

    def extra_repr(self) -> str:
        """Sizes and options."""
        return (
            f"{self.width}, heads={self.heads}, softmax_input={self.softmax_input}, "
            f"beta_init={self.beta_init}, fused={self.fused}"
        )


def _stepwise(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """All steps of all heads, ``x (T, N, D)``, ``w (N, 3 D + 4, D)``; autograd does the rest."""
    d = x.shape[-1]
    block = _blocks(d, x.device)
    ys: list[Tensor] = []
    for z in x:  # row vectors: batched products of matrices and columns are several times slower
        y, q, k, b = (z[:, None] @ w.mT)[:, 0].split((d, d, d, 4), -1)
        c = k.softmax(-1)
        change = ((q.softmax(-1) - c)[:, None] @ w.mT)[:, 0]
        w = torch.addcmul(w, (b.sigmoid()[:, block] * change)[..., None], c[:, None])
        ys.append(y)
    return torch.stack(ys), w


def _blocks(d: int, device: torch.device) -> Tensor:
    """Which of the four learning rates each row has."""
    sizes = torch.tensor((d, d, d, 4), device=device)
    return torch.arange(4, device=device).repeat_interleave(sizes)


class _Fused(torch.autograd.Function):
    """`_stepwise` with its gradient written out.

    Keeps the matrix before every step; all products of a step are batched.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        steps, n, d = x.shape
        block = _blocks(d, x.device)
        grad = any(ctx.needs_input_grad)
        known: list[Tensor] = []  # in one tensor they would be fresh pages of memory in every call
        outputs = x.new_empty(steps, n, w.shape[1])
        keys, moves, changes = (x.new_empty(steps, n, s) for s in (d, d, w.shape[1]))
        for t in range(steps):
            known += [w] if grad else []
            torch.bmm(x[t, :, None], w.mT, out=outputs[t, :, None])
            ahead = outputs[t, :, d : 3 * d].unflatten(1, (2, d)).softmax(-1)
            keys[t] = ahead[:, 1]
            torch.sub(ahead[:, 0], ahead[:, 1], out=moves[t])
            torch.bmm(moves[t, :, None], w.mT, out=changes[t, :, None])
            scaled = outputs[t, :, 3 * d :].sigmoid()[:, block] * changes[t]
            w = torch.addcmul(w, scaled[:, :, None], keys[t, :, None])
        if grad:
            ctx.save_for_backward(x, outputs, keys, moves, changes, *known)
        return outputs[..., :d].clone(), w

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Any
    ) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():  # else they would be dropped wherever `grads` are constants
            raise HyperError(
                message(
                    "SRWM: second derivatives of the gradient that is written by hand",
                    help="SRWM(…, fused=False) has them",
                )
            )
        x, outputs, keys, moves, changes, *known = cast(tuple[Tensor, ...], ctx.saved_tensors)
        steps, n, d = x.shape
        block = _blocks(d, x.device)
        rates = outputs[..., 3 * d :].sigmoid()
        slope = rates * (1 - rates)
        dy, dw = grads[0], grads[1].clone()
        dx = torch.empty_like(x)
        pair = x.new_empty(n, 2, outputs.shape[2])  # gradients of the two products with the matrix
        for t in reversed(range(steps)):
            w, rate = known[t], rates[t][:, block]
            c, e = keys[t], changes[t]
            du = (c[:, None] @ dw.mT)[:, 0]
            dc = ((rate * e)[:, None] @ dw)[:, 0]
            torch.mul(du, rate, out=pair[:, 1])
            da = (pair[:, 1:] @ w)[:, 0]
            dc -= da
            drate = du * e
            db = torch.cat(
                (drate[:, : 3 * d].unflatten(1, (3, d)).sum(-1), drate[:, 3 * d :].sum(-1, True)),
                -1,
            )
            both = torch.stack((moves[t] + c, c), 1)
            back = torch.stack((da, dc), 1)
            pair[:, 0, :d] = dy[t]
            pair[:, 0, d : 3 * d] = _softmax_backward(both, back).flatten(1)
            torch.mul(db, slope[t], out=pair[:, 0, 3 * d :])
            dx[t] = (pair[:, :1] @ w)[:, 0]
            dw.baddbmm_(pair.mT, torch.stack((x[t], moves[t]), 1))
        return dx, dw


def _softmax_backward(y: Tensor, dy: Tensor) -> Tensor:
    """Gradient at the input of a softmax over the last axis that gave ``y``."""
    return y * (dy - (y * dy).sum(-1, keepdim=True))


class FakeSR(SRWM):
    """`SRWM` whose matrix stays as it is: the control that cannot learn from what it reads.

    Parameters have the names and shapes of `SRWM`'s, so that weights can be exchanged; blocks q, k
    and b are not used. What it answers at a step depends on the input of that step alone.
    """

    @_exactly
    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The product of the initial matrix, and the state if any, with every input.

        Args:
            x: Inputs, ``(*batch, T, width)``.
            state: As for `SRWM`.

        Returns:
            Outputs ``(*batch, T, width)``, and the state as it was.

        Raises:
            HyperError: If a shape does not fit.
        """
        shift = self.start(x, state)
        z = self.split(x)
        z = z.softmax(-1) if self.softmax_input else z
        block = self.weight[:, : self.size]
        w = block if state is None else block + shift[..., : self.size, :]
        return self.joined(z @ w.mT), shift


class DeltaNet(FastWeightCell):
    """Fast weights that follow the delta rule, written by slow weights that stay.

    With ``q, k, v, b`` a linear map of the input for each head, and ``phi`` the softmax,

        W += sigmoid(b) (v - W phi(k)) ⊗ phi(k);   y = W phi(q)

    The output is emitted after the change. As k does not depend on ``W``, all changes of a chunk
    follow from one triangular system, without a loop over its steps. The state is ``W``.

    Args:
        width: Length of inputs and outputs.
        heads: Number of heads. Each reads the whole input, and writes its slice of the output.
        chunk: Steps that are solved at once.
        generator: Source of the initial weights.

    Raises:
        HyperError: If the heads do not divide the width, or a chunk is empty.

    Attributes:
        weight: Slow weights, ``(heads * (3 D + 1), width)``: of every head rows for q, k, v, b.
    """

    def __init__(
        self,
        width: int,
        heads: int = 1,
        *,
        chunk: int = 64,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(width, heads)
        if chunk < 1:
            raise HyperError(message("DeltaNet: chunk is at least 1", got=str(chunk)))
        self.chunk = chunk
        self.weight = nn.Parameter(torch.empty(heads * (3 * self.size + 1), width))
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws slow weights of deviation ``width ** -0.5``.

        Args:
            generator: Source of randomness.
        """
        self.weight.normal_(0, self.width**-0.5, generator=generator)

    @_exactly
    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Runs over a sequence.

        Args:
            x: Inputs, ``(*batch, T, width)``.
            state: What an earlier call gave, ``(*batch, heads, D, D)``; None for zeros.

        Returns:
            Outputs ``(*batch, T, width)``, and the state after the last step.

        Raises:
            HyperError: If a shape does not fit.
        """
        w = self.start(x, state)
        d = self.size
        made = self.split(x @ self.weight.T)
        ys: list[Tensor] = []
        for part in made.split(self.chunk, -2):
            q, k, v, b = part.split((d, d, d, 1), -1)
            y, w = _delta_rule(q.softmax(-1), k.softmax(-1), v, b.sigmoid(), w)
            ys.append(y)
        return self.joined(torch.cat(ys, -2)), w

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.width}, heads={self.heads}, chunk={self.chunk}"


def _delta_rule(
    queries: Tensor, keys: Tensor, values: Tensor, rates: Tensor, w: Tensor
) -> tuple[Tensor, Tensor]:
    """The delta rule over ``(*, T, D)``, rates ``(*, T, 1)``, from ``w (*, D, D)``."""
    # step t changes w by u_t ⊗ k_t; u_t = b_t (v_t - w k_t - sum over s < t of (k_s·k_t) u_s)
    among = rates * (keys @ keys.mT).tril(-1)
    right = rates * (values - keys @ w.mT)
    eye = torch.eye(among.shape[-1], dtype=w.dtype, device=w.device)
    u = torch.linalg.solve_triangular(eye + among, right, upper=False, unitriangular=True)
    y = queries @ w.mT + (queries @ keys.mT).tril() @ u
    return y, w + u.mT @ keys
