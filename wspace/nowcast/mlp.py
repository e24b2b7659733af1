"""Predictors that see every entry of a parameter alone, whatever it is connected to."""

import warnings
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wspace.errors import NowcastError, message
from wspace.nn.edge_kernel import Room
from wspace.nowcast import topology as top
from wspace.nowcast.predictor import Past, Predictor, check_precision, draw_small
from wspace.nowcast.streaming import EPS, moved
from wspace.nowcast.topology import flat
from wspace.nowcast.wiring import guessed, space_of, traced
from wspace.space import WeightSpace

Kinds = list[tuple[int, Tensor | None]]
"""Kinds, with the entries that have them; None for all."""

_WARNED: WeakSet[nn.Module] = WeakSet()


def kinds_of(past: Past) -> dict[str, Kinds]:
    """Kinds of the entries of every parameter to be predicted.

    Args:
        past: What is predicted. With ``topology="traced"`` kinds are those of the topology of the
            weight space: the one given, or traced with the inputs given or guessed. They follow
            from names and shapes with ``topology="published"``, and, with a warning once for a
            module, where no guess runs.

    Returns:
        For every name, kinds with the entries that have them; None for all.

    Raises:
        NowcastError: If a part of a parameter is to be predicted and its place says the kind.
    """
    space = _space(past) if past.topology == "traced" else None
    held: dict[str, list[top.Edges]] = {}
    for b in traced(space).blocks if space is not None else ():
        held.setdefault(b.param, []).append(b)
    out: dict[str, Kinds] = {}
    for name in past.names:
        window = past.windows.get(name)
        if space is not None and name in space.by_name:
            whole = space[name].shape
            part = whole if window is None else tuple(window[-1].shape)
            out[name] = _by_blocks(name, held.get(space[name].name, []), whole, part)
        else:
            out[name] = _by_name(past, name)
    return out


def _space(past: Past) -> WeightSpace | None:
    """The weight space, if one is given or the module can be traced."""
    module = past.module
    if isinstance(module, WeightSpace):
        return past.space or module
    if past.space is not None or any(x is not None for x in past.example):
        return space_of(past)
    found = guessed(module)
    if found is None and module not in _WARNED:
        _WARNED.add(module)
        warnings.warn(
            message(
                f"predict: kinds of the parameters of {type(module).__name__} are guessed",
                expected="`space=`, or `args=` and `kwargs=` to trace it with",
                got="a module that cannot be traced without; names and shapes are gone by",
                help="space = wspace.trace(module, inputs), or topology='published' to go by names",
            ),
            UserWarning,
            stacklevel=2,
        )
    return found


def _by_name(past: Past, name: str) -> Kinds:
    from wspace.nowcast.published import is_gpt2, published_kind

    gpt2 = isinstance(past.module, nn.Module) and is_gpt2(past.module)
    shape = past.windows[name][-1].shape
    kind = published_kind(name, shape, gpt2=gpt2)
    if kind != top.QUERY:
        return [(kind, None)]
    third = torch.arange(shape.numel()).view(shape[0], 3, -1)
    return [(top.QUERY + i, third[:, i].reshape(-1)) for i in range(3)]


def _by_blocks(
    name: str, blocks: Sequence[top.Edges], whole: tuple[int, ...], part: tuple[int, ...]
) -> Kinds:
    """Kinds of a parameter, or of some of its rows where these are alike."""
    kinds = sorted({b.kind for b in blocks})
    if len(kinds) <= 1:
        return [(kinds[0] if kinds else top.BIAS, None)]
    if part == whole:
        return [
            (k, torch.cat([b.entries.flatten() for b in blocks if b.kind == k]).unique())
            for k in kinds
        ]
    rows = torch.zeros(prod(whole), dtype=torch.int8)
    for b in blocks:
        rows[b.entries.flatten()] = b.kind
    rows = rows.view(whole[0], -1)
    if part[1:] != whole[1:] or bool((rows != rows[:1]).any()):
        raise NowcastError(
            message(
                f"predict: which part of {name!r} this is decides on its kinds",
                expected=f"all of its shape {whole}, or rows of parameters whose rows are alike",
                got=f"a part of shape {part}, and rows of the kinds {', '.join(map(str, kinds))}",
                help="leave it out with `names=`, or take topology='published', one kind for each",
            )
        )
    row = rows[:1].expand(part[0], -1).flatten()
    return [(k, (row == k).nonzero()[:, 0]) for k in kinds]


How = tuple[int, int, tuple[float, float]]
"""Kind, horizon, and mean and standard deviation of a parameter."""


class Pointwise(Predictor):
    """A network applied to every entry's window by itself."""

    chunk: int = 8192

    def _ahead(self, past: Past, horizon: int) -> Iterator[tuple[str, Tensor]]:
        kinds, rooms = kinds_of(past), defaultdict[torch.device, Room](Room)
        for name in past.names:
            window = past.windows[name]
            made = torch.empty_like(window[-1], memory_format=torch.contiguous_format)
            rows, out = [flat(x) for x in window], made.view(-1)
            for kind, at in kinds[name]:
                room = rooms[out.device]
                ahead = self._chunked((kind, horizon, past.moments[name]), room, out.device)
                count = len(out) if at is None else len(at)
                for start in range(0, count, self.chunk):
                    part = slice(start, min(start + self.chunk, count))
                    where = part if at is None else at[part].to(out.device)
                    out[where] = ahead([row[where] for row in rows]).to(out.dtype)
            yield name, made

    @abstractmethod
    def _chunked(
        self, how: How, room: Room, device: torch.device
    ) -> Callable[[Sequence[Tensor]], Tensor]:
        """A function of past values ``(n,)``, oldest first, to predictions ``(n,)``."""


class NiNoMLP(Pointwise):
    """The published "WNN+": a network of a window and the kind of a parameter, shared by all.

    Args:
        channels: Width.
        context: Number of past states.
        longest: Number of horizons it predicts.
        kinds: Number of kinds of parameters.
        precision: ``"float32"`` or ``"bfloat16"``.
        chunk: Entries computed at once.
        still: Entries of which all past values are equal do not move.
        drift: Scale back by slightly less than what was divided by, as the published code does: all
            entries shrink towards the mean, by 1e-6 of a standard deviation of 1.

    References:
        Knyazev et al. (2025), arXiv:2409.04434
    """

    def __init__(
        self,
        channels: int = 128,
        *,
        context: int = 5,
        longest: int = 40,
        kinds: int = 15,
        precision: str = "float32",
        chunk: int = 8192,
        still: bool = True,
        drift: bool = False,
    ) -> None:
        super().__init__(context=context, longest=longest, still=still)
        check_precision(precision)
        self.channels, self.kinds, self.precision = channels, kinds, precision
        self.chunk, self.drift = chunk, drift
        self.kind = nn.Embedding(kinds, channels)
        self.enter = nn.Linear(context, channels)
        hidden = [m for _ in range(3) for m in (nn.Linear(channels, channels), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(channels, longest))
        draw_small(self)

    def forward(self, x: Tensor, kind: Tensor | int) -> Tensor:
        """Changes for all horizons.

        Args:
            x: Scaled past values, ``(…, c)``.
            kind: Kind of each, ``(…)`` or one.

        Returns:
            ``(…, K)``: what to add to the last scaled value.
        """
        row = self.kind.weight[kind]
        return cast("Tensor", self.layers(self.enter(x) + row))

    def _chunked(
        self, how: How, room: Room, device: torch.device
    ) -> Callable[[Sequence[Tensor]], Tensor]:
        kind, horizon, (mean, std) = how
        maps = self._maps(kind, horizon, device)
        like, low = self.enter.weight.new_empty(0, device=device), maps[0][0]

        def ahead(past: Sequence[Tensor]) -> Tensor:
            n = len(past[-1])
            x = room("window", (len(past), n), like)
            for i, row in enumerate(past):
                x[i].copy_(row)
            h = x.sub_(mean).mul_(1 / (std + EPS)).mT.to(low.dtype)
            for i, (m, bias) in enumerate(maps):
                h = torch.addmm(bias, h, m, out=room(f"layer{i % 2}", (n, m.shape[1]), low))
                if i < len(maps) - 1:
                    F.silu(h, inplace=True)
            change = h[:, 0].to(like.dtype)
            return moved(past[-1], change, (mean, std), drift=self.drift)

        return ahead

    def _maps(self, kind: int, horizon: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Products and biases of one kind and horizon; the first two layers are one."""
        exact = self.enter.weight.dtype
        low = exact == torch.float32 and self.precision == "bfloat16"
        linears = [m for m in self.layers if isinstance(m, nn.Linear)]
        pairs = [(m.weight.double().mT, m.bias.double()) for m in linears]
        bias = self.enter.bias.double() + self.kind.weight[kind].double()
        m, b = pairs[0]
        pairs[0] = (self.enter.weight.double().mT @ m, bias @ m + b)
        m, b = pairs[-1]
        pairs[-1] = (m[:, horizon - 1 : horizon], b[horizon - 1 : horizon])
        dtype = torch.bfloat16 if low else exact
        return [(m.to(device, dtype).contiguous(), b.to(device, dtype)) for m, b in pairs]


class WNN(Pointwise):
    """The "weight nowcaster": two streams, of the values and of their differences.

    Values are taken relative to the first and in units of twice their range, entry by entry, so an
    entry that did not move does not move. There is one network for convolutions, one for matrices
    and one for the rest. The published one predicts one horizon; this one has an output for each.
    Its weights are random until it is trained.

    Args:
        channels: Width of each stream.
        context: Number of past states, at least 2.
        longest: Number of horizons it predicts.
        chunk: Entries computed at once.
        still: Entries of which all past values are equal do not move.

    References:
        Jang et al. (2023), Learning to boost training by periodic nowcasting near future weights.
    """

    def __init__(
        self,
        channels: int = 64,
        *,
        context: int = 5,
        longest: int = 40,
        chunk: int = 8192,
        still: bool = True,
    ) -> None:
        super().__init__(context=context, longest=longest, still=still)
        if context < 2:
            raise NowcastError(f"WNN: differences need two states\n  got context={context}")
        self.channels, self.chunk = channels, chunk
        self.values = nn.ModuleList([nn.Linear(context, channels) for _ in range(3)])
        self.steps = nn.ModuleList([nn.Linear(context - 1, channels) for _ in range(3)])
        self.hidden = nn.ModuleList([nn.Linear(2 * channels, channels) for _ in range(3)])
        self.heads = nn.ModuleList([nn.Linear(channels, longest) for _ in range(3)])

    def forward(self, x: Tensor, kind: int) -> Tensor:
        """Changes for all horizons, in the units of the values.

        Args:
            x: Past values, ``(…, c)``.
            kind: Their kind.

        Returns:
            ``(…, K)``: what to add to the last value.
        """
        i = {top.CONV: 0, top.BIAS: 2, top.NORM: 2}.get(kind, 1)
        size = 2 * (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True))
        y = (x - x[..., :1]) / torch.where(size == 0, torch.ones_like(size), size)
        both = torch.cat([self.values[i](y), self.steps[i](y.diff(dim=-1))], -1)
        made = self.heads[i](F.relu(self.hidden[i](F.relu(both))))
        return torch.tanh(made) * size

    def _chunked(
        self, how: How, room: Room, device: torch.device
    ) -> Callable[[Sequence[Tensor]], Tensor]:
        kind, horizon, _ = how
        like = next(self.parameters())
        if like.device != device:
            raise NowcastError(
                message(
                    "predict: the predictor is elsewhere than the states",
                    expected=f"device {device}",
                    got=f"{like.device}",
                    help="predictor.to(device)",
                )
            )

        def ahead(past: Sequence[Tensor]) -> Tensor:
            x = torch.stack([row.to(like.dtype) for row in past], -1)
            return past[-1] + self(x, kind)[:, horizon - 1]

        return ahead
