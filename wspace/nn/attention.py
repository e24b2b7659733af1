"""Attention between slices of weights: the layer of Neural Functional Transformers, for any space.

Zhou et al. (2023), Neural Functional Transformers, arXiv:2305.13546, equation 3 and section 3.
There the coordinates of a token are the units of one layer; here they are the units of any free
group. What depends on a group (the dims of each head on the heads) moves with it, so the group and
its dependents are the coordinates together, and there is no attention along a dependent alone.
"""

from collections.abc import Iterator
from math import prod, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wspace.errors import SpaceMismatch, message
from wspace.nn.basis import Slot, cells, permutable
from wspace.nn.cells import Cutter, Features, checked, layout, shapes
from wspace.space import WeightSpace


class WeightSpaceAttention(nn.Module):
    r"""Every slice of every tensor along a group attends to all other slices along that group.

    For a group with :math:`n` units, a token is a slice, ``(n, channels)``: a row or column of a
    matrix, or a bias. Tokens of all tensors attend to one another with logits

    .. math:: \frac{1}{n \sqrt{c}} \sum_{i=1}^{n} \langle q_i, k_i \rangle,

    ``c`` channels per head: a mean over the units, so that the size of a logit does not depend on
    the width (the published layer divides the sum by ``sqrt(n * c)``). A second attention runs over
    the means of all cells, broadcast back. The two are summed, then mapped once more. Maps to
    queries, keys, values and to the result are those of each cell.

    Time and memory grow with the square of the number of slices along a group.

    Args:
        space: Weight space of the features.
        channels: Number of channels, of input and output.
        heads: Number of heads; divides `channels`.
        basis: ``"full"``, or ``"np"`` to attend along inputs and outputs as well.

    Shape:
        Input and output: for each parameter ``(*batch, *shape, channels)``.

    Raises:
        SpaceMismatch: If `heads` does not divide `channels`, or `basis` is unknown.
    """

    def __init__(
        self, space: WeightSpace, channels: int, heads: int = 4, *, basis: str = "full"
    ) -> None:
        super().__init__()
        if channels % heads or basis not in {"full", "np"}:
            raise SpaceMismatch(
                message(
                    f"WeightSpaceAttention: {channels} channels, {heads} heads, basis {basis!r}",
                    expected="heads that divide the channels; basis 'full' or 'np'",
                )
            )
        self.space, self.channels, self.heads = space, channels, heads
        self._want = shapes(space, channels)
        self.acting = permutable(space) if basis == "np" else space
        every, self._cutter = cells(self.acting), Cutter(self.acting)
        self._forms = [layout(slots) for slots in every]
        self._families: dict[tuple[str, ...], list[tuple[int, tuple[int, ...]]]] = {}
        for i, slots in enumerate(every):
            for name, axes in coordinates(slots):
                self._families.setdefault(name, []).append((i, axes))
        std = 1 / sqrt(channels)
        self.project = nn.Parameter(torch.randn(len(every), channels, 3 * channels) * std)
        self.overall = nn.Parameter(torch.randn(len(every), channels, 3 * channels) * std)
        self.result = nn.Parameter(torch.randn(len(every), channels, channels) * std)
        self.shift = nn.Parameter(torch.zeros(len(every), channels))

    def forward(self, features: Features) -> dict[str, Tensor]:
        """Features mapped to features.

        Args:
            features: For each parameter ``(*batch, *shape, channels)``.

        Returns:
            The same shapes.

        Raises:
            SpaceMismatch: If the features do not fit the space.
        """
        batch = checked(self._want, features, "WeightSpaceAttention")
        found = [
            x.unflatten(-1, (form.folded, self.channels))  # (N, *loose, F, C)
            for x, form in zip(self._cutter.read(features, batch), self._forms, strict=True)
        ]
        weights = self.project.unbind()
        qkv = [x @ w for x, w in zip(found, weights, strict=True)]
        sums: list[Tensor] = list(self._overall(found))
        for members in self._families.values():
            tokens = [self._tokens(qkv[i], axes) for i, axes in members]
            mixed = self._attend(torch.cat(tokens, 1)).split([t.shape[1] for t in tokens], 1)
            for (i, axes), y in zip(members, mixed, strict=True):
                sums[i] = sums[i] + self._placed(y, qkv[i].shape, axes)
        maps = zip(sums, self.result.unbind(), self.shift.unbind(), found, strict=True)
        out = [(y @ w + b).expand(x.shape).flatten(-2) for y, w, b, x in maps]
        return self._cutter.write(out, batch)

    def _overall(self, found: list[Tensor]) -> Iterator[Tensor]:
        """Attention between the means of all cells.

        Yields:
            For each cell ``(N, 1, ..., 1, C)``.
        """
        means = torch.stack([x.flatten(1, -2).mean(1) for x in found], 1)  # (N, cells, C)
        qkv = torch.einsum("ntc,tcd->ntd", means, self.overall).unsqueeze(2)
        for x, y in zip(found, self._attend(qkv).unbind(1), strict=True):
            yield y.reshape(len(x), *[1] * (x.dim() - 2), self.channels)

    def _tokens(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        """``(N, *loose, F, 3C)`` as ``(N, tokens, n, 3C)``, `axes` the coordinates."""
        y = x.permute(self._order(x.dim(), axes))
        n = prod(x.shape[a] for a in axes)
        return y.reshape(x.shape[0], -1, n, x.shape[-1])

    def _placed(self, y: Tensor, shape: torch.Size, axes: tuple[int, ...]) -> Tensor:
        """``(N, tokens, n, C)`` as ``(N, *loose, F, C)``: inverts `_tokens`."""
        order = self._order(len(shape), axes)
        y = y.reshape(*(shape[a] for a in order[:-1]), self.channels)
        return y.permute(sorted(range(len(order)), key=order.__getitem__))

    def _order(self, dims: int, axes: tuple[int, ...]) -> list[int]:
        return [0, *(d for d in range(1, dims - 1) if d not in axes), *axes, dims - 1]

    def _attend(self, qkv: Tensor) -> Tensor:
        """Attention between tokens: ``(N, tokens, n, 3C)`` to ``(N, tokens, n, C)``."""
        batch, count, n, _ = qkv.shape
        parts = qkv.reshape(batch, count, n, 3, self.heads, -1).permute(3, 0, 4, 1, 2, 5)
        q, k, v = parts.flatten(-2).unbind()  # (N, heads, tokens, n * c)
        scale = 1 / (n * sqrt(self.channels // self.heads))
        y = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return y.unflatten(-1, (n, -1)).permute(0, 2, 3, 1, 4).flatten(-2)

    def extra_repr(self) -> str:
        """Channels, heads and groups attended along."""
        return f"{self.channels}, heads={self.heads}, along {len(self._families)} groups"


def coordinates(slots: tuple[Slot, ...]) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """The sets of slots of a cell along which it can be cut into tokens.

    Args:
        slots: Slots of the cell.

    Yields:
        Names of the groups, and their axes in ``(N, *loose, F, C)``: a free group that depends on
        no other, with all that depends on it and what these depend on.
    """
    loose = layout(slots).loose
    for i, s in enumerate(slots):
        if s.fixed or s.over:
            continue
        chosen = {i}
        while True:
            more = {j for j, t in enumerate(slots) if chosen & {*t.over}}
            more |= {o for j in chosen | more for o in slots[j].over}
            if more <= chosen:
                break
            chosen |= more
        order = sorted(chosen, key=lambda j: (j != i, slots[j].group, j))
        yield tuple(slots[j].group for j in order), tuple(1 + loose.index(j) for j in order)
