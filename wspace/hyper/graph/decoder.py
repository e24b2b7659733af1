"""From the state of a node to a tensor of any shape, in batches of tensors of one form."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor, nn

from wspace.hyper.graph.fit import UnitCodes, tap_index, tile_index
from wspace.hyper.graph.form import TensorForm, Units


@dataclass(frozen=True, eq=False)
class Wanted:
    """A tensor to decode: its form, and the row of its node among all states."""

    form: TensorForm
    row: int


class TileDecoder(nn.Module):
    """Decodes tiles ``(C, C, S, S)``, fits them to the forms asked for, and scales them.

    Matrices have exactly the mean square ``gain / fan_in`` times a learned factor that is 1 at
    first; scales are ``2 sigmoid(p / 2)`` and shifts ``tanh(p / 5)`` (Knyazev et al. 2021).
    Tensors wider than the tile are products of unit codes and the tile, hence of rank C at most for
    each tap, and no more than the tile is decoded for them.

    Args:
        width: Width of the states.
        channels: Units C of a tile.
        side: Side S of its kernel.
        hidden: Width inside the decoder.
        codes: Whether repeated units have codes; without, they are identical.
        generator: Draws the codes.
    """

    def __init__(
        self,
        width: int,
        channels: int = 32,
        side: int = 5,
        *,
        hidden: int = 128,
        codes: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.side, self.hidden = channels, side, hidden
        self.norm = nn.LayerNorm(width)
        self.taps = nn.Linear(width, hidden // 2 * side * side)
        self.mix = nn.Linear(hidden // 2, hidden)
        self.tile = nn.Linear(hidden, channels * channels)
        self.gain = nn.Linear(width, 1)
        self.vectors = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU())
        self.scale = nn.Linear(2 * width, channels)
        self.shift = nn.Linear(2 * width, channels)
        self.codes = UnitCodes(channels, generator=generator) if codes else None
        nn.init.zeros_(self.gain.weight)
        nn.init.zeros_(self.gain.bias)

    def forward(self, states: Tensor, wanted: Sequence[Wanted]) -> list[Tensor]:
        """The tensors asked for.

        Args:
            states: ``(rows, width)``.
            wanted: What to decode, from which row.

        Returns:
            Tensors in the shapes of their parameters.
        """
        states = self.norm(states)
        known: dict[int, Tensor] = {}
        out: list[Tensor | None] = [None] * len(wanted)
        for places in _grouped(wanted, self._rounded):
            groups = [[places[k] for k in some] for some in
                      _grouped([wanted[i] for i in places], _exact)]  # fmt: skip
            order = [i for some in groups for i in some]
            rows = states[[wanted[i].row for i in order]]
            forms = [wanted[some[0]].form for some in groups]
            counts = [len(some) for some in groups]
            make = self._vectors if forms[0].vector else self._tiles
            gains = self.gain(rows).exp().split(counts)
            for some, form, tile, gain in zip(
                groups, forms, make(rows, forms, counts), gains, strict=True
            ):
                fitted = tile
                own = [wanted[i].form for i in some]
                for dim, ends in ((1, [f.out for f in own]), (2, [f.into for f in own])):
                    fitted = self._along(fitted, dim, ends, known)
                made = form.place(self._scaled(fitted, gain, form)).unbind()
                for i, x in zip(some, made, strict=True):
                    out[i] = x
        return [x for x in out if x is not None]

    def _rounded(self, form: TensorForm) -> tuple[object, ...]:
        """What is decoded at once: vectors of one kind, tiles of one rounded number of channels."""
        if form.vector:
            return (form.kind,)
        return ("tile", *(self._step(n) for n in form.sizes[:2]))

    def _step(self, size: int) -> int:
        """Channels that are decoded: half of the tile's, or all."""
        half = -(-self.channels // 2)
        return half if size <= half else self.channels

    def _vectors(
        self, rows: Tensor, forms: Sequence[TensorForm], counts: Sequence[int]
    ) -> Iterable[Tensor]:
        """For every form ``(count, C, 1, 1)``."""
        read = self.scale if forms[0].kind == "scale" else self.shift
        return read(self.vectors(rows))[..., None, None].split(list(counts))

    def _tiles(
        self, rows: Tensor, forms: Sequence[TensorForm], counts: Sequence[int]
    ) -> Iterator[Tensor]:
        """For every form ``(count, out, in, taps)``: only the channels and taps that it takes."""
        c, s = self.channels, self.side
        out, into = (self._step(n) for n in forms[0].sizes[:2])
        taps = [_taken(f.taps, s) for f in forms]
        index = torch.cat([t.repeat(n) for t, n in zip(taps, counts, strict=True)])
        each = [len(t) for t, n in zip(taps, counts, strict=True) for _ in range(n)]
        which = torch.arange(len(rows)).repeat_interleave(torch.tensor(each))
        x = torch.relu(self.taps(rows)).unflatten(-1, (s * s, -1))
        x = torch.relu(self.mix(x[which.to(x.device), index.to(x.device)]))
        weight, bias = self.tile.weight, self.tile.bias
        if (out, into) != (c, c):
            weight = weight.unflatten(0, (c, c))[:out, :into].flatten(0, 1)
            bias = bias.unflatten(0, (c, c))[:out, :into].flatten()
        x = nn.functional.linear(x, weight, bias).unflatten(-1, (out, into))
        sizes = [len(t) * n for t, n in zip(taps, counts, strict=True)]
        for part, t, form in zip(x.split(sizes), taps, forms, strict=True):
            tile = part.unflatten(0, (-1, len(t))).permute(0, 2, 3, 1)
            yield tile if len(t) == prod(form.taps) else tile[..., _repeated(form.taps, s)]

    def _along(
        self, tiles: Tensor, dim: int, ends: Sequence[Units], known: dict[int, Tensor]
    ) -> Tensor:
        n = ends[0].size
        if n <= self.channels:
            return tiles.narrow(dim, 0, n)
        if self.codes is None:
            return tiles.index_select(dim, tile_index(n, self.channels).to(tiles.device))
        for u in ends:
            if id(u) not in known:
                known[id(u)] = self.codes(u)
        codes = torch.stack([known[id(u)] for u in ends])
        return torch.einsum("gnc,gcik->gnik" if dim == 1 else "gnc,gock->gonk", codes, tiles)

    def _scaled(self, x: Tensor, gain: Tensor, form: TensorForm) -> Tensor:
        """Entries ``(G, out, in, taps)`` in the form's shape, scaled by what they are for."""
        if form.vector:
            x = x.reshape(len(x), *form.sizes)
            return 2 * torch.sigmoid(x / 2) if form.kind == "scale" else torch.tanh(x / 5)
        size = x.square().mean((1, 2, 3), keepdim=True).add(1e-12).rsqrt()
        x = (x * size).reshape(len(x), *form.sizes)
        if form.kind == "scale":
            return 2 * torch.sigmoid(x / 2)
        return x * (gain * form.deviation).reshape(-1, *[1] * (x.dim() - 1))


@lru_cache(maxsize=1024)
def _taken(taps: tuple[int, ...], side: int) -> Tensor:
    """Taps of a tile that a form takes, each once unless all are different anyway."""
    index = tap_index(taps, side)
    once = torch.unique(index)
    return index if len(once) == len(index) else once


@lru_cache(maxsize=1024)
def _repeated(taps: tuple[int, ...], side: int) -> Tensor:
    """Which of `_taken` stands at every tap of a form."""
    return torch.unique(tap_index(taps, side), return_inverse=True)[1]


def _exact(form: TensorForm) -> tuple[object, ...]:
    return (form.kind, form.sizes, form.gain, form.shape, form.split, form.order)


def _grouped(
    wanted: Sequence[Wanted], key: Callable[[TensorForm], tuple[object, ...]]
) -> list[list[int]]:
    """Places of what has one key, key by key."""
    out: dict[tuple[object, ...], list[int]] = {}
    for i, w in enumerate(wanted):
        out.setdefault(key(w.form), []).append(i)
    return list(out.values())
