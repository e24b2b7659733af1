"""Complete equivariant linear maps and invariant pooling on the features of any weight space.

What is computed is enumerated by `basis`: every map is a view of an input cell (diagonals, means),
a matching of the axes kept, and a view of an output cell. Views that can be matched meet in one
matrix product, whose rows are all input views and whose columns are all output views: one product
for everything invariant, one for everything along a group, one for the entries of each kind of
matrix. So the number of products grows with the number of groups, not with the square of the number
of parameters; each mean is computed once, and summands are added before they are expanded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt

import torch
from torch import Tensor, nn

from wspace.errors import SpaceMismatch, message
from wspace.nn.basis import Signature, View, cells, permutable, signatures, stacks
from wspace.nn.cells import (
    Assembler,
    Cutter,
    Features,
    Reader,
    Term,
    averaged,
    checked,
    laid,
    shapes,
    term,
    width,
)
from wspace.space import WeightSpace

BASES = ("full", "np", "hnp", "dws")
OWN = 0.85
"""Share of the variance, at initialisation, of what differs from entry to entry."""

LARGEST = 50_000_000
"""Most weights of a layer: fixed axes (a vocabulary) are dense, and grow quadratically."""


class EquivariantLinear(nn.Module):
    """All linear maps from features to features that commute with the group of a space.

    With one channel in and out the maps have dimension `dim_hom(space)` and the biases
    `dim_bias(space)`: nothing equivariant is missing, for any architecture that can be traced (tied
    axes, concatenations, products with fixed factors, heads, experts, missing biases, one layer).

    At initialisation constant inputs keep their second moment, and independent inputs of variance 1
    give outputs of variance 0.85 to 1, whatever the widths and the depth: summands that differ from
    entry to entry have a share of 0.85 of the variance, those that are broadcast or averaged the
    rest. Means are plain means; a factor ``sqrt(n)`` would keep the variance of averaged noise, and
    blow up everything that is not noise.

    Args:
        space: Weight space of input and output.
        c_in: Channels of the input: one number, or one for each parameter name.
        c_out: Channels of the output.
        basis: ``"full"`` for all maps. ``"hnp"`` and ``"dws"`` are the published organisations of
            the same maps for multilayer perceptrons with fixed inputs and outputs; since ours are
            complete, they are the same as ``"full"``. ``"np"`` treats inputs and outputs as
            permutable too, so that their axes share weights (kernel taps do not).
        bias: Adds the complete equivariant bias, e.g. two numbers per channel for a square matrix
            whose axes are tied (diagonal and rest).
        positions: Number of sinusoids for every input and output axis, added as input channels;
            only with ``"np"``. The layer then tells inputs apart, as ``"full"`` does.

    Attributes:
        acting: Weight space whose group the layer commutes with: `space`, or, with ``"np"`` (and
            no positions), `space` with inputs and outputs free.

    Shape:
        Input: for each parameter ``(*batch, *shape, c_in)``. Output: ``(*batch, *shape, c_out)``.

    Raises:
        SpaceMismatch: If `basis` is unknown, or the layer would have more than 50 million weights.

    Example:
        >>> import wspace
        >>> mlp = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> space = wspace.trace(mlp, torch.zeros(1, 2))
        >>> layer = EquivariantLinear(space, 1, 16)
        >>> x = {name: t[..., None] for name, t in mlp.state_dict().items()}
        >>> layer(x)["2.weight"].shape
        torch.Size([3, 8, 16])

    References:
        Zhou et al. (2023), Permutation Equivariant Neural Functionals, arXiv:2302.14040, sec. 2-3;
        Navon et al. (2023), Equivariant Architectures for Learning in Deep Weight Spaces,
        arXiv:2301.12780, sec. 5; Zhou et al. (2024), Universal Neural Functionals,
        arXiv:2402.05232, theorem 3.1.
    """

    def __init__(
        self,
        space: WeightSpace,
        c_in: int | Mapping[str, int],
        c_out: int,
        basis: str = "full",
        bias: bool = True,
        *,
        positions: int = 0,
    ) -> None:
        super().__init__()
        if basis not in BASES or (positions and basis != "np"):
            raise SpaceMismatch(
                message(
                    f"EquivariantLinear: basis {basis!r}",
                    expected=f"one of {BASES}; positions only with 'np'",
                )
            )
        self.space, self.c_out, self.basis = space, c_out, basis
        self.acting = permutable(space) if basis == "np" else space
        self._want = shapes(space, c_in)
        self.c_in = {name: tail[-1] for name, tail in self._want.items()}
        self._codes, self._positions = dict[str, str](), positions
        inner = dict(self.c_in)
        if positions:
            for name, code in position_codes(space, positions).items():
                self._codes[name] = f"code{len(self._codes)}"
                self.register_buffer(self._codes[name], code, persistent=False)
                inner[name] += code.shape[-1]
        self._plan = Plan(self.acting, inner, c_out)
        self._plan.check("EquivariantLinear")
        self.weights = nn.ParameterDict(
            {p.key: nn.Parameter(torch.empty(p.shape)) for p in self._plan.products}
        )
        for p in self._plan.products:
            self.register_buffer(f"divide_{p.key}", p.divisors(), persistent=False)
        empty = torch.empty(self._plan.invariant.columns) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty)
        self.reset_parameters()

    def reset_parameters(self, *, generator: torch.Generator | None = None) -> None:
        """Draws new weights, as the class describes; biases become zero.

        To be called after a layer built on the meta device was given memory.

        Args:
            generator: Source of randomness; None for torch's global one.
        """
        with torch.no_grad():
            for p in self._plan.products:
                divisors = p.divisors()
                if divisors is not None:
                    self.get_buffer(f"divide_{p.key}").copy_(divisors)
                self.weights[p.key].normal_(generator=generator)
                self.weights[p.key].mul_(self._plan.gains(p).to(self.weights[p.key]))
            if self.bias is not None:
                self.bias.zero_()
            if self._positions:
                for name, code in position_codes(self.space, self._positions).items():
                    self.get_buffer(self._codes[name]).copy_(code)

    def forward(self, features: Features) -> dict[str, Tensor]:
        """Features mapped to features.

        Args:
            features: For each parameter ``(*batch, *shape, c_in)``.

        Returns:
            For each parameter ``(*batch, *shape, c_out)``.

        Raises:
            SpaceMismatch: If the features do not fit the space.
        """
        batch = checked(self._want, features, "EquivariantLinear")
        if self._codes:
            features = {**features, **self._with_codes(features, batch)}
        plan = self._plan
        views, summed = plan.reader(plan.cutter.read(features, batch))
        terms: list[list[Tensor]] = [[] for _ in plan.every]
        at = 0
        for p in plan.products:
            divisors = getattr(self, f"divide_{p.key}") if summed else None
            bias = self.bias if p is plan.invariant else None
            rows = views[at : at + len(p.rows)]
            at += len(p.rows)
            y = p.run(rows, divisors, self.weights[p.key], bias)
            parts = (y,) if len(p.terms) == 1 else y.split(p.split, -1)
            for view, how, part in zip(p.signature.outs, p.terms, parts, strict=True):
                terms[view.cell].append(laid(part, how))
        found = [add(summands) for add, summands in zip(plan.assemble, terms, strict=True)]
        return plan.cutter.write(found, batch)

    def _with_codes(self, features: Features, batch: tuple[int, ...]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, buffer in self._codes.items():
            x, code = features[name], self.get_buffer(buffer)
            out[name] = torch.cat([x, code.to(x).expand(*batch, *code.shape)], -1)
        return out

    def extra_repr(self) -> str:
        """Channels, basis and number of maps."""
        return f"{set(self.c_in.values())} -> {self.c_out}, basis={self.basis!r}"


def position_codes(space: WeightSpace, count: int) -> dict[str, Tensor]:
    """Sinusoids of the index along each input and output axis that ``"np"`` permutes.

    Args:
        space: The weight space.
        count: Number of frequencies, ``2**k`` half-turns over the axis.

    Returns:
        For each parameter with such an axis ``(*shape, 2 * count * axes)``, values in [-1, 1].
    """
    out: dict[str, Tensor] = {}
    for p, q in zip(space.params, permutable(space).params, strict=True):
        codes: list[Tensor] = []
        for d, (a, b) in enumerate(zip(p.axes, q.axes, strict=True)):
            if a != b:
                at = (torch.arange(a.size) + 0.5) / a.size
                angle = at[:, None] * torch.pi * 2 ** torch.arange(count)
                code = torch.cat([angle.sin(), angle.cos()], -1)
                shape = [a.size if i == d else 1 for i in range(len(p.axes))]
                codes.append(code.reshape(*shape, -1).expand(*p.shape, -1))
        if codes:
            out[p.name] = torch.cat(codes, -1)
    return out


def check_size(sizes: Mapping[str, int], who: str) -> None:
    """Refuses a layer whose maps between fixed axes are too large.

    Args:
        sizes: Number of weights of each part.
        who: Name of the layer, for the message.

    Raises:
        SpaceMismatch: If there are more than 50 million in all.
    """
    if sum(sizes.values()) > LARGEST:
        worst = sorted(sizes, key=lambda key: -sizes[key])[:3]
        raise SpaceMismatch(
            message(
                f"{who}: {sum(sizes.values()):.3g} weights",
                expected=f"at most {LARGEST:.3g}; fixed axes have a weight for each of their units",
                got=[f"{sizes[key]:.3g} for the {key}" for key in worst],
                help='pass basis="np" to share weights over inputs and outputs, '
                "or use a graph metanet",
            )
        )


# --------------------------------------------------------------------------------- plan


@dataclass(frozen=True, eq=False)
class Product:
    """One matrix product: every input view of a signature to every output view.

    Attributes:
        signature: The views.
        key: Name of the weight.
        keys: Units of the keyed blocks, for each of which there is a matrix.
        rows: Channels of each input view.
        counts: Entries averaged in each input view.
        split: Channels of each output view.
        terms: What becomes of each output view.
        fresh: True if the result may be overwritten.
    """

    signature: Signature
    key: str
    keys: tuple[int, ...]
    rows: tuple[int, ...]
    counts: tuple[int, ...]
    split: list[int]
    terms: tuple[Term, ...]
    fresh: bool

    @property
    def columns(self) -> int:
        """Channels of all output views."""
        return sum(self.split)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, ``(*keys, rows, columns)``."""
        return (*self.keys, sum(self.rows), self.columns)

    def divisors(self) -> Tensor | None:
        """Number of entries summed in each row, ``(rows,)``; None if all are 1."""
        if all(n == 1 for n in self.counts):
            return None
        return _repeat(self.counts, self.rows)

    def run(
        self, views: list[Tensor], divisors: Tensor | None, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """The product.

        Args:
            views: Input views, ``(N, *sizes, rows)`` each.
            divisors: See there; None if the views are means.
            weight: ``(*keys, rows, columns)``.
            bias: ``(columns,)``, or None.

        Returns:
            ``(N, *sizes, columns)``.
        """
        x = views[0] if len(views) == 1 else torch.cat(views, -1)
        x = x if divisors is None else x / divisors
        if not self.keys:
            y = x @ weight
        else:
            at = [1 + i for i, keyed in enumerate(self.signature.keyed) if keyed]
            to = list(range(len(at)))
            moved = x.movedim(at, to)
            flat = moved.reshape(prod(self.keys), -1, x.shape[-1])
            y = (flat @ weight.flatten(0, -3)).reshape(*moved.shape[:-1], -1).movedim(to, at)
        return y if bias is None else y + bias


def _repeat(values: Sequence[float], counts: Sequence[int]) -> Tensor:
    """Each value as often as its count says; works on the meta device."""
    number = torch.tensor(counts)
    return torch.tensor(values, dtype=torch.get_default_dtype()).repeat_interleave(
        number, output_size=sum(counts)
    )


class Plan:
    """The matrix products of a layer, and the gains of their weights.

    Args:
        space: Weight space whose group is respected.
        channels: Channels of the input, by parameter.
        c_out: Channels of the output.
    """

    def __init__(self, space: WeightSpace, channels: Mapping[str, int], c_out: int) -> None:
        self.every, self.cutter = cells(space), Cutter(space)
        self.channels = [channels[s.names[0]] for s in stacks(space) for _ in s.cells]
        self.c_out = c_out
        names: dict[str, int] = {}
        self.products = [self._product(s, names) for s in signatures(space)]
        self.invariant = next(p for p in self.products if not p.signature.groups)
        self.reader = Reader(self.every, [v for p in self.products for v in p.signature.ins])
        self.assemble = self._assemblers()
        self._fans = self._fan_in()

    def _product(self, s: Signature, names: dict[str, int]) -> Product:
        name = "*".join(g.replace(".", "_") for g in s.groups) or "invariant"
        names[name] = names.get(name, 0) + 1
        terms = tuple(term(self.every[v.cell], v) for v in s.outs)
        keys = tuple(n for n, keyed in zip(s.sizes, s.keyed, strict=True) if keyed)
        straight = all(t.turn == (*range(len(t.turn)),) and not t.unfold for t in terms)
        return Product(
            signature=s,
            key=name if names[name] == 1 else f"{name}#{names[name]}",
            keys=keys,
            rows=tuple(width(self.every[v.cell], v) * self.channels[v.cell] for v in s.ins),
            counts=tuple(averaged(self.every[v.cell], v) for v in s.ins),
            split=[width(self.every[v.cell], v) * self.c_out for v in s.outs],
            terms=terms,
            fresh=len(terms) == 1 and straight and not keys,
        )

    def _assemblers(self) -> list[Assembler]:
        terms: list[list[Term]] = [[] for _ in self.every]
        fresh: list[list[bool]] = [[] for _ in self.every]
        for p in self.products:
            for view, how in zip(p.signature.outs, p.terms, strict=True):
                terms[view.cell].append(how)
                fresh[view.cell].append(p.fresh)
        return [Assembler(a, b) for a, b in zip(terms, fresh, strict=True)]

    def check(self, who: str) -> None:
        """Refuses a layer that is too large.

        Args:
            who: Name of the layer, for the message.

        Raises:
            SpaceMismatch: If it would have more than 50 million weights.
        """
        check_size({f"maps along {p.key}": prod(p.shape) for p in self.products}, who)

    def _entrywise(self, p: Product, v: View) -> bool:
        """True if an output view is not broadcast: it is different for each entry of its cell."""
        used = [b for b in v.blocks if b >= 0]
        return v.plain and len(v.kept) == len(used)

    def _fan_in(self) -> list[list[int]]:
        """For each cell, the rows that act entry by entry, and all others."""
        fans = [[0, 0] for _ in self.every]
        for p in self.products:
            for v in p.signature.outs:
                entrywise = self._entrywise(p, v)
                for rows, n in zip(p.rows, p.counts, strict=True):
                    fans[v.cell][0 if n == 1 and entrywise else 1] += rows
        return fans

    def gains(self, p: Product) -> Tensor:
        """Initial standard deviation of each weight of a product, ``(rows, columns)``."""
        one = [float(n == 1) for n in p.counts]
        single = _repeat(one, p.rows)[:, None] > 0
        fans = [self._fans[v.cell] for v in p.signature.outs]
        each = [self._entrywise(p, v) for v in p.signature.outs]
        near = [sqrt(OWN / f[0]) if e else -1.0 for f, e in zip(fans, each, strict=True)]
        far = [sqrt((1 - OWN) / max(f[1], 1)) for f in fans]
        close, rest = (_repeat(v, p.split)[None] for v in (near, far))
        return torch.where(single & (close > 0), close, rest)


# --------------------------------------------------------------------------------- pool


class InvariantPool(nn.Module):
    """All invariant linear functionals of features, as one vector; optionally mapped on linearly.

    Every cell is averaged over its free slots, separately where they agree and over all of them
    (the trace and the mean of a square matrix with tied axes), for each index of its fixed slots.

    Args:
        space: Weight space of the features.
        c_in: Channels of the features: one number, or one for each parameter name.
        c_out: Length of the result; None for the pooled features themselves.
        moments: Pools ``x, x**2, ..., x**moments``.

    Attributes:
        width: Number of pooled features.

    Shape:
        Input: for each parameter ``(*batch, *shape, c_in)``. Output: ``(*batch, c_out)``, or
        ``(*batch, width)`` with ``width = moments * c_in * dim_bias(space)`` (more if a group has
        fewer units than a tensor has slots of it).

    Raises:
        SpaceMismatch: If the map to `c_out` would have more than 50 million weights.

    References:
        Navon et al. (2023), arXiv:2301.12780, section 5 (invariant layer).
    """

    divide: Tensor

    def __init__(
        self,
        space: WeightSpace,
        c_in: int | Mapping[str, int],
        c_out: int | None = None,
        *,
        moments: int = 1,
    ) -> None:
        super().__init__()
        self.space, self.moments = space, moments
        self._want = shapes(space, c_in)
        every = cells(space)
        views = next(s.ins for s in signatures(space) if not s.groups)
        self._cutter, self._reader = Cutter(space), Reader(every, views)
        channels = [self._want[s.names[0]][-1] for s in stacks(space) for _ in s.cells]
        pairs = [(every[v.cell], v) for v in views]
        self.width = moments * sum(width(slots, v) * channels[v.cell] for slots, v in pairs)
        self._counts = [averaged(slots, v) for slots, v in pairs]
        self._rows = [width(slots, v) * channels[v.cell] for slots, v in pairs]
        self.register_buffer("divide", _repeat(self._counts, self._rows), persistent=False)
        check_size({"pooled features": self.width * (c_out or 0)}, "InvariantPool")
        self.map = None if c_out is None else nn.Linear(self.width, c_out)

    def reset_parameters(self) -> None:
        """New weights; to be called after a layer built on the meta device was given memory."""
        with torch.no_grad():
            self.divide.copy_(_repeat(self._counts, self._rows))
        if self.map is not None:
            self.map.reset_parameters()

    def forward(self, features: Features) -> Tensor:
        """The pooled vector.

        Args:
            features: For each parameter ``(*batch, *shape, c_in)``.

        Returns:
            ``(*batch, c_out)``, or ``(*batch, width)``.

        Raises:
            SpaceMismatch: If the features do not fit the space.
        """
        batch = checked(self._want, features, "InvariantPool")
        found = self._cutter.read(features, batch)
        powers = [found] + [[x**k for x in found] for k in range(2, self.moments + 1)]
        every = [self._reader(tensors) for tensors in powers]
        pooled = torch.stack([torch.cat(views, -1) for views, _ in every], -2)
        if every[0][1]:
            pooled = pooled / self.divide
        pooled = pooled.reshape(*batch, self.width)
        return pooled if self.map is None else self.map(pooled)

    def extra_repr(self) -> str:
        """Number of pooled features."""
        return f"{self.width} pooled, moments={self.moments}"
