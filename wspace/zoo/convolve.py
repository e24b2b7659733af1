"""Convolutions of many networks at once, as products of matrices.

`torch.func.vmap` turns them into one convolution with many groups, which the library underneath
does badly. Here they are products of stacked matrices instead. Within, the images of
a batch come last, ``(n, C, H, W, B)``: then every tap of a kernel at every place is one contiguous
row of B numbers, and neither gathering these rows nor the product needs a transposition. Outside,
tensors have the shape PyTorch gives them; strides say the rest, so that the operators between
convolutions, which keep strides, cost no copies either.

Rows are gathered and added up by ``embedding_bag``, the fastest such loop PyTorch has: a bag holds
the one row of a tap (none in the padding), and on the way back all taps that read a row. What is
gathered is small enough to stay in the cache, and is gathered again in the backward pass.
"""

from collections.abc import Sequence
from copy import deepcopy
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CACHE = 1 << 20
"""Bytes of gathered rows at once; these and their gradients fit a core's cache."""

NARROW = 4
"""Fewer outputs than this in a group are left to PyTorch, whose depthwise convolutions are good."""


class Geometry(NamedTuple):
    """What a convolution is, apart from its weights; a pair is height and width."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def answers(self, x: Tensor) -> tuple[int, int]:
        """Height and width of the answers to images ``(n, C, H, W, B)``."""
        return self.places((x.shape[2], x.shape[3]))

    def places(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the answers to images of some size."""
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        high, wide = (
            (n + 2 * p - span) // s + 1
            for n, p, span, s in zip(size, self.padding, spans, self.stride, strict=True)
        )
        return high, wide

    @staticmethod
    def of(module: nn.Conv2d) -> "Geometry":
        """Of a layer."""
        how = (module.kernel_size, module.stride, module.padding, module.dilation)
        kernel, stride, padding, dilation = (_pair(cast("Sequence[int]", x)) for x in how)
        return Geometry(kernel, stride, padding, dilation, module.groups)

    @property
    def trivial(self) -> bool:
        """Whether every place is a tap of itself, and of no other."""
        return self[:3] == ((1, 1), (1, 1), (0, 0))


class Bags(NamedTuple):
    """Rows to add up: those of bag i are ``rows[ends[i]:ends[i + 1]]``."""

    rows: Tensor
    ends: Tensor

    def sum(self, x: Tensor) -> Tensor:
        """Adds up rows of ``(rows, B)``; returns ``(bags, B)``."""
        return F.embedding_bag(self.rows, x, self.ends, mode="sum", include_last_offset=True)


@lru_cache(maxsize=64)
def bags(planes: int, size: tuple[int, int], geometry: Geometry) -> tuple[Bags, Bags]:
    """Which rows convolutions read.

    Args:
        planes: Number of networks times channels.
        size: Height and width of the images.
        geometry: Of the convolution.

    Returns:
        For every tap of every place, ``(planes, k, k, H', W')`` in order, its row among
        ``(planes, H, W)``; for every such row the taps that read it.
    """
    padding, (high, wide) = geometry.padding, geometry.places(size)
    first, second = (
        torch.arange(k)[:, None] * d + torch.arange(n) * s - p
        for k, d, n, s, p in zip(
            geometry.kernel, geometry.dilation, (high, wide), geometry.stride, padding, strict=True
        )
    )  # (k, H'), (k, W')
    y, x = first[:, None, :, None], second[None, :, None, :]
    inside = (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])
    places = torch.arange(planes)[:, None] * prod(size) + (y * size[1] + x).flatten()
    inside = inside.flatten().expand_as(places).flatten()
    taps = inside.nonzero()[:, 0]
    rows = places.flatten()[taps]
    readers = taps[rows.argsort(stable=True)]
    counts = rows.bincount(minlength=planes * prod(size))
    return Bags(rows, _ends(inside.long())), Bags(readers, _ends(counts))


def _ends(counts: Tensor) -> Tensor:
    return F.pad(counts.cumsum(0), (1, 0))


def answers(
    x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry, *, relu: bool = False
) -> Tensor:
    """Convolutions of n networks, each with its own kernels; no tape is kept.

    Args:
        x: Images, ``(n, C, H, W, B)``, contiguous.
        w: Kernels, ``(n, C', C / groups, k, k)``.
        b: Biases, ``(n, C')``, or none.
        geometry: Strides and the like.
        relu: Whether what is negative becomes zero.

    Returns:
        ``(n, C', H', W', B)``.
    """
    out = x.new_empty(len(x), w.shape[1], *geometry.answers(x), x.shape[-1])
    w = _matrices(w, geometry)
    flat = out.view(*w.shape[:3], -1)
    for some in _parts(x, geometry):
        part = flat[some].flatten(0, 1)
        torch.bmm(w[some].flatten(0, 1), _gather(x[some], geometry), out=part)
        if b is not None:  # while they are in the cache
            part.add_(b[some].reshape(len(part), -1, 1))
        if relu:
            part.relu_()
    return out


def slopes(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    geometry: Geometry,
    *,
    images: bool = True,
    y: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of convolutions. What was gathered is gathered again, being not worth keeping.

    Args:
        g: Gradient in the answers, ``(n, C', H', W', B)``.
        x: As for `answers`.
        w: As for `answers`.
        geometry: As for `answers`.
        images: Whether the gradient in the images is wanted.
        y: The answers, if what was negative became zero.

    Returns:
        Gradients in images (or None), kernels and biases.
    """
    shape, w = w.shape, _matrices(w, geometry)
    flat = g.contiguous().view(*w.shape[:3], -1)
    dw, db = w.new_empty(*w.shape[:2], w.shape[3], w.shape[2]), w.new_empty(shape[:2])
    dx = torch.empty_like(x) if images else None
    for some in _parts(x, geometry):
        part = flat[some]
        if y is not None:
            part = torch.ops.aten.threshold_backward(part, y[some].view(part.shape), 0)
        torch.sum(part.flatten(1, 2), 2, out=db[some])
        part = part.flatten(0, 1)
        # this way round: with the long axis last in both, the product takes thrice as long
        torch.bmm(_gather(x[some], geometry), part.mT, out=dw[some].flatten(0, 1))
        if dx is not None:
            taps = torch.bmm(w[some].flatten(0, 1).mT, part)
            dx[some] = _add_up(taps, x[some].shape, geometry)
    return dx, dw.mT.reshape(shape), db


class Convolve(torch.autograd.Function):
    """`answers` and `slopes` for autograd; `vmap` adds networks."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry) -> Tensor:
        """See `answers`."""
        return answers(x.detach(), w.detach(), None if b is None else b.detach(), geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps images and kernels."""
        del output
        x, w, _, ctx.geometry = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `slopes`."""
        x, w = (t.detach() for t in ctx.saved_tensors)
        dx, dw, db = slopes(slope, x, w, ctx.geometry, images=ctx.needs_input_grad[0])
        return dx, dw, db if ctx.needs_input_grad[2] else None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        """Takes further networks."""
        n, (x, w, b, geometry) = info.batch_size, inputs
        x, w = _merge(x, in_dims[0], n), _merge(w, in_dims[1], n)
        b = None if b is None else _merge(b, in_dims[2], n)
        return convolve(x, w, b, geometry).unflatten(0, (n, -1)), 0


def _merge(x: Tensor, dim: int | None, n: int) -> Tensor:
    return (x.expand(n, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)


def convolve(x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry) -> Tensor:
    """Runs `Convolve`; networks that share their images are channels of one."""
    n = len(w)
    shared = n > 1 and x.stride(0) == 0 and geometry.groups == 1
    if shared:
        x, w, b = x[:1], w.flatten(0, 1)[None], None if b is None else b.flatten()[None]
    out = cast("Tensor", Convolve.apply(x.contiguous(), w, b, geometry))
    return out.view(n, -1, *out.shape[2:]) if shared else out


def _matrices(w: Tensor, geometry: Geometry) -> Tensor:
    """Kernels as matrices, ``(n, groups, C' / groups, C / groups * k * k)``."""
    return w.reshape(len(w), geometry.groups, w.shape[1] // geometry.groups, -1)


def _parts(x: Tensor, geometry: Geometry) -> list[slice]:
    """Few networks at a time, whose gathered rows fit the cache."""
    taps = x.shape[1] * prod(geometry.kernel) * prod(geometry.answers(x)) * x.shape[-1]
    some = max(1, CACHE // (taps * x.element_size()))
    return [slice(start, start + some) for start in range(0, len(x), some)]


def _gather(x: Tensor, geometry: Geometry) -> Tensor:
    """What kernels see, ``(n * groups, C / groups * k * k, H' * W' * B)``."""
    n, channels, high, wide, images = x.shape
    if not geometry.trivial:
        x = bags(n * channels, (high, wide), geometry)[0].sum(x.view(-1, images))
    return x.view(n * geometry.groups, channels // geometry.groups * prod(geometry.kernel), -1)


def _add_up(taps: Tensor, shape: Sequence[int], geometry: Geometry) -> Tensor:
    """The adjoint of `_gather`."""
    n, channels, high, wide, images = shape
    if not geometry.trivial:
        taps = bags(n * channels, (high, wide), geometry)[1].sum(taps.view(-1, images))
    return taps.view(*shape)


class SideBySide(nn.Module):
    """An `nn.Conv2d` for `vmap`, with the same parameters."""

    def __init__(self, module: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias, self.geometry = module.weight, module.bias, Geometry.of(module)

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Conv2d`, of ``(B, C, H, W)`` or ``(C, H, W)``."""
        if x.dim() == 3:
            return self(x[None]).squeeze(0)
        images, b = x.permute(1, 2, 3, 0)[None], None if self.bias is None else self.bias[None]
        y = convolve(images, self.weight[None], b, self.geometry)
        return y.squeeze(0).permute(3, 0, 1, 2)


def side_by_side(module: nn.Module) -> nn.Module:
    """The same module for `vmap`: a copy in which convolutions that suit are `SideBySide`.

    Args:
        module: Any module; it is left as it is.

    Returns:
        Itself, if there are none.
    """
    if suits(module):
        return SideBySide(cast("nn.Conv2d", module))
    if not any(suits(child) for child in module.modules()):
        return module
    module = deepcopy(module)
    for name, child in list(module.named_modules(remove_duplicate=False)):
        if suits(child):
            above, _, last = name.rpartition(".")
            setattr(module.get_submodule(above), last, SideBySide(cast("nn.Conv2d", child)))
    return module


def suits(module: nn.Module) -> bool:
    """Whether a layer is a convolution that is best run here; subclasses may do anything."""
    if type(module) is not nn.Conv2d or isinstance(module.padding, str):
        return False
    wide = module.groups == 1 or module.out_channels // module.groups >= NARROW
    return wide and module.padding_mode == "zeros"


def _pair(value: Sequence[int]) -> tuple[int, int]:
    return value[0], value[1]
