"""A zoo on disk as a collection of networks: opened by its markers and tables, read by memory map.

A `Zoo` is a view, as in PyTorch Geometric: indexing it by anything but one number gives another
view of the same files. Networks are numbered in the order of their cohorts.
"""

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast, overload

import numpy as np
import torch
from torch import Tensor

from wspace.errors import NotASymmetry, SpaceMismatch, ZooError, message
from wspace.graph import encode
from wspace.space import WeightSpace
from wspace.trace.verify import VerifyReport
from wspace.trace.verify import verify as prove
from wspace.zoo.architecture import Architecture
from wspace.zoo.batch import ZooBatch
from wspace.zoo.card import card
from wspace.zoo.format import Header
from wspace.zoo.shard import Marker, map_tensors, place
from wspace.zoo.split import (
    COLUMN,
    PARTS,
    Split,
    leaks,
    read_split,
    rule_of,
    split_names,
    write_split,
)
from wspace.zoo.table import check_values

Index = int | slice | Sequence[int] | Sequence[bool] | np.ndarray | Tensor


@dataclass(eq=False)
class Files:
    """What all views of a zoo share: its shards, and those of them that are mapped."""

    folder: Path
    header: Header
    markers: tuple[Marker, ...]
    digests: tuple[str, ...]
    architectures: tuple[Architecture, ...]
    spaces: tuple[WeightSpace, ...]
    damaged: tuple[str, ...] = ()
    mapped: dict[int, dict[str, Tensor]] = field(default_factory=dict[int, dict[str, Tensor]])
    loaded: dict[int, dict[str, Tensor]] = field(default_factory=dict[int, dict[str, Tensor]])

    @cached_property
    def kinds(self) -> np.ndarray:
        """Place in `architectures` of the networks of every shard."""
        place = {digest: k for k, digest in enumerate(self.digests)}
        return np.array([place[m.architecture] for m in self.markers], dtype=np.int64)

    @cached_property
    def firsts(self) -> np.ndarray:
        """Row of the whole zoo at which each shard begins."""
        rows = np.array([m.rows for m in self.markers], dtype=np.int64)
        return np.cumsum(rows) - rows

    @cached_property
    def starts(self) -> np.ndarray:
        """Row at which each shard begins among those of its architecture."""
        rows = np.array([m.rows for m in self.markers], dtype=np.int64)
        starts = np.zeros_like(rows)
        for kind in range(len(self.digests)):
            mine = self.kinds == kind
            starts[mine] = np.cumsum(rows[mine]) - rows[mine]
        return starts

    def tensors(self, shard: int) -> dict[str, Tensor]:
        """Tensors of a shard, mapped once."""
        if shard not in self.mapped:
            space = self.spaces[self.kinds[shard]]
            self.mapped[shard] = map_tensors(self.folder, self.markers[shard], space)
        return self.mapped[shard]

    def load(self, kind: int) -> None:
        """Copies the shards of an architecture into memory, one after another."""
        parts = [self.tensors(k) for k in np.flatnonzero(self.kinds == kind).tolist()]
        self.loaded[kind] = {name: torch.cat([x[name] for x in parts]) for name in parts[0]}

    def __getstate__(self) -> dict[str, Any]:  # another process maps the files itself
        return {**self.__dict__, "mapped": {}, "loaded": {}}


class Zoo:
    """Networks with what is known of them; an immutable view of the files.

    Attributes:
        path: Folder of the zoo.
        table: Columns of what is known of every network: int64, float64, bool or str arrays.
        kind: Place in `architectures` of every network.
    """

    def __init__(
        self, files: Files, shard: np.ndarray, row: np.ndarray, table: Mapping[str, np.ndarray]
    ) -> None:
        self._files, self._shard, self._row = files, shard, row
        for array in table.values():
            array.flags.writeable = False
        self.table: Mapping[str, np.ndarray] = MappingProxyType(dict(table))
        self.kind: np.ndarray = files.kinds[shard]
        self.path = files.folder

    def __len__(self) -> int:
        return len(self._row)

    def __iter__(self) -> Iterator[tuple[WeightSpace, dict[str, Tensor]]]:
        return (self[i] for i in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "table": dict(self.table)}  # a proxy cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "table": MappingProxyType(state["table"])})

    @property
    def architectures(self) -> tuple[Architecture, ...]:
        """All architectures of the zoo, those out of this view too."""
        return self._files.architectures

    @property
    def spaces(self) -> tuple[WeightSpace, ...]:
        """Weight spaces of `architectures`."""
        return self._files.spaces

    @property
    def header(self) -> Header:
        """How the zoo was made: recipe, versions, date."""
        return self._files.header

    @property
    def steps(self) -> np.ndarray | None:
        """Optimizer steps of the time axis, the same for all networks; None without one."""
        steps = next((marker.steps for marker in self._files.markers), None)
        return None if steps is None else np.array(steps, dtype=np.int64)

    @property
    def cohorts(self) -> int:
        """Number of cohorts that were read."""
        return len(self._files.markers)

    @property
    def whole(self) -> bool:
        """True if every cohort of the recipe is committed and was read."""
        return self.cohorts == self.header.cohorts and not self.header.stale

    @property
    def damaged(self) -> tuple[str, ...]:
        """Errors of the shards that ``open(damaged="skip")`` left out."""
        return self._files.damaged

    @property
    def splits(self) -> dict[str, Split]:
        """Rules of the splits that are saved beside the zoo."""
        found = {name: read_split(self.path, name) for name in split_names(self.path)}
        return {name: rule for name, rule in found.items() if rule is not None}

    @property
    def rows(self) -> np.ndarray:
        """Place of every network in the whole zoo that was opened."""
        return self._files.firsts[self._shard] + self._row

    @property
    def ids(self) -> np.ndarray:
        """What every network is called wherever the zoo goes: ``"cohort/row"``."""
        numbers = [marker.number for marker in self._files.markers]
        pairs = zip(self._shard.tolist(), self._row.tolist(), strict=True)
        return np.array([f"{numbers[k]}/{r}" for k, r in pairs], dtype=np.str_)

    @overload
    def __getitem__(self, index: int) -> tuple[WeightSpace, dict[str, Tensor]]: ...
    @overload
    def __getitem__(
        self, index: slice | Sequence[int] | Sequence[bool] | np.ndarray | Tensor
    ) -> "Zoo": ...
    def __getitem__(self, index: Index) -> "Zoo | tuple[WeightSpace, dict[str, Tensor]]":
        """One network, its state in float32; or a view of several.

        Args:
            index: A number; or a slice, numbers or a mask, as lists, arrays or tensors.

        Returns:
            Weight space and state, ``(*shape)`` or with a time axis ``(T, *shape)``; or a `Zoo`.
        """
        if isinstance(index, int | np.integer) or (isinstance(index, Tensor) and index.ndim == 0):
            (graph,) = self.batch([int(index)]).graphs
            return graph.space, {name: x[0] for name, x in graph.values.items()}
        at = self._places(index)
        table = {name: array[at] for name, array in self.table.items()}
        return Zoo(self._files, self._shard[at], self._row[at], table)

    def where(self, **equal: object) -> "Zoo":
        """The networks whose columns have these values.

        Args:
            equal: Column → a value, or several of which one has to be there.

        Returns:
            A view.

        Raises:
            ZooError: If there is no such column, or no network of this view has one of the values.
        """
        keep = np.ones(len(self), dtype=np.bool_)
        for name, value in equal.items():
            column = self.column(name)
            several = isinstance(value, list | tuple | set | frozenset | np.ndarray | Tensor)
            wanted = [
                x.item() if isinstance(x, np.generic | Tensor) else x
                for x in (list(cast(Any, value)) if several else [value])
            ]
            check_values(column, wanted, f"zoo: {self.path}", name)
            keep &= np.isin(column, np.array(wanted, dtype=column.dtype if not wanted else None))
        return self[keep]

    def column(self, name: str) -> np.ndarray:
        """A column of the table.

        Args:
            name: Of the column.

        Returns:
            Its values, one for every network.

        Raises:
            ZooError: If there is none of this name.
        """
        if name not in self.table:
            near = difflib.get_close_matches(name, list(self.table), n=1)
            raise ZooError(
                message(
                    f"zoo: {self.path} has no column {name!r}",
                    expected=f"one of {', '.join(self.table) or '(none)'}",
                    help=f"did you mean {near[0]!r}?" if near else "",
                )
            )
        return self.table[name]

    def batch(
        self,
        indices: slice | Sequence[int] | Sequence[bool] | np.ndarray | Tensor,
        *,
        time: slice | int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> ZooBatch:
        """Networks as graphs, one for each weight space, in the order of `indices` within each.

        Args:
            indices: Which, as for indexing.
            time: Place or slice on the time axis; a place drops the axis. None for all of it.
            dtype: Of the values, and of the columns that hold floats.

        Returns:
            The batch; its memory is its own.

        Raises:
            ZooError: If there is no time axis to choose from, or no such place on it.
        """
        if time is not None and self.steps is None:
            raise ZooError(message(f"zoo: {self.path} has no time axis", help="leave `time` out"))
        if isinstance(time, int) and self.steps is not None:
            most = len(self.steps)
            if not -most <= time < most:
                text = f"zoo: {self.path} has no state {time} of each network"
                raise ZooError(message(text, expected=f"{-most} … {most - 1}"))
        at = self._places(indices)
        kinds = self.kind[at]
        order = np.argsort(kinds, kind="stable")
        at, kinds = at[order], kinds[order]
        graphs = [
            encode(self.spaces[kind], self._stacked(at[kinds == kind], time, dtype))
            for kind in np.unique(kinds).tolist()
        ]
        table = {
            name: torch.from_numpy(array[at])
            for name, array in self.table.items()
            if array.dtype.kind != "U"
        }
        table = {k: x.to(dtype) if x.is_floating_point() else x for k, x in table.items()}
        return ZooBatch(graphs, table, torch.from_numpy(self.rows[at]))

    def split(
        self,
        train: float | None = None,
        val: float | None = None,
        test: float | None = None,
        *,
        by: str | None = None,
        seed: int | None = None,
        name: str = "default",
    ) -> dict[str, "Zoo"]:
        """Parts for training, validation and testing; equal values of `by` are never parted.

        A network goes where the hash of its value falls, so it stays there when the zoo grows. The
        rule is saved under its name; later calls need the name only. Without fractions, a column
        ``split`` decides where there is one.

        Args:
            train: Share of the values; 0.8 unless the rule is saved. What the shares leave over
                is in no part.
            val: Likewise, 0.1.
            test: Likewise, 0.1.
            by: Column whose values stay together, such as the image that an INR was fitted to; ""
                for single networks. None takes the saved rule's, else the one that the recipe
                declares (`Header.grouped_by`).
            seed: Of the hash; 0 unless the rule is saved.
            name: Of the rule.

        Returns:
            Views ``train``, ``val`` and ``test``, and what else the column ``split`` names.

        Raises:
            ZooError: If the name is taken by another rule, or the column ``split`` parts networks
                of one value of `by`.
        """
        asked = {"train": train, "val": val, "test": test, "by": by, "seed": seed}
        given = {key: x or None if key == "by" else x for key, x in asked.items() if x is not None}
        saved = read_split(self.path, name)
        rule = rule_of(name, saved, given, self.table, self.header.grouped_by)
        if rule.by is not None:
            self.column(rule.by)
        if saved is None and os.access(self.path / "splits", os.W_OK):
            write_split(self.path, name, rule)
        if rule.fractions is None:
            column = self.column(COLUMN)
            names = [*PARTS, *sorted({*np.unique(column).tolist()} - {*PARTS})]
            parts = {part: self[column == part] for part in names}
        else:
            place = rule.places(self.ids if rule.by is None else self.column(rule.by))
            parts = {part: self[place == at] for at, part in enumerate(PARTS)}
        if rule.by is not None:
            keys = {part: zoo.column(rule.by) for part, zoo in parts.items() if part}
            if found := leaks(keys):
                text = f"split: the column {COLUMN!r} parts networks of one {rule.by!r}"
                help = 'pass fractions, or by="" to part them'
                raise ZooError(message(text, got=found[:5], help=help))
        return parts

    def verify(
        self,
        networks: int = 4,
        *,
        generator: torch.Generator | None = None,
        trust: Sequence[str] = (),
    ) -> list[VerifyReport]:
        """Proves the weight spaces on the weights of sampled networks, with negative controls.

        Every architecture is sampled before one is sampled again; of a time axis, the last state.

        Args:
            networks: How many.
            generator: Source of randomness; seeded with 0 when None.
            trust: Packages whose factories may be imported, as for `Architecture.module`.

        Returns:
            What `wspace.verify` measured, for each.

        Raises:
            ZooError: If a factory is not trusted, or a network does not have the symmetry.
        """
        generator = generator or torch.Generator().manual_seed(0)
        order = torch.randperm(len(self), generator=generator).numpy()
        turn = np.zeros(len(self), dtype=np.int64)
        for kind in np.unique(self.kind):
            mine = self.kind[order] == kind
            turn[mine] = np.arange(mine.sum())
        return [
            self._prove(int(i), generator, trust)
            for i in order[np.argsort(turn, kind="stable")][:networks]
        ]

    def _prove(self, i: int, generator: torch.Generator, trust: Sequence[str]) -> VerifyReport:
        space, state = self[i]
        architecture = self.architectures[self.kind[i]]
        module = architecture.module(trust=trust, device="cpu")
        last = {name: x if self.steps is None else x[-1] for name, x in state.items()}
        named = {n: last[p.name] for p in space.params for n in (p.name, *p.ties)}
        try:
            module.load_state_dict({**module.state_dict(), **named})
            return prove(space, module, architecture.example(), generator=generator)
        except (NotASymmetry, SpaceMismatch, RuntimeError) as error:
            text = f"zoo: network {i} of {self.file_of(i)} is not what its weight space says"
            raise ZooError(f"{message(text)}\n{error}") from error

    def load(self) -> "Zoo":
        """This view, once the states of its architectures are copied into memory.

        Random batches then cost the same however many cohorts there are. All views of the files
        share the copy; processes that are started later map the files again.

        Returns:
            The view itself.
        """
        for kind in np.unique(self.kind).tolist():
            if kind not in self._files.loaded:
                self._files.load(kind)
        return self

    def file_of(self, i: int) -> Path:
        """The file that holds the state of a network."""
        return place(self.path, self._files.markers[self._shard[i]].number, "safetensors")

    def statistics(self) -> list[dict[str, tuple[float, float, float, float]]]:
        """Mean, standard deviation, least and greatest entry of every tensor, by architecture.

        They were stored when the shards were made, so they cover all networks of the zoo, those
        for testing too, and those out of this view.

        Returns:
            The four numbers by name of the tensor, for each of `architectures`.
        """
        out: list[dict[str, tuple[float, float, float, float]]] = []
        for digest, space in zip(self._files.digests, self.spaces, strict=True):
            mine = [m for m in self._files.markers if m.architecture == digest]
            weight = np.array([m.rows for m in mine], dtype=np.float64)
            out.append({})
            for p in space.params:
                mean, std, low, high = np.array([m.statistics[p.name] for m in mine]).T
                average = float((weight * mean).sum() / weight.sum())
                spread = std**2 + (mean - average) ** 2
                deviation = float((weight * spread).sum() / weight.sum()) ** 0.5
                out[-1][p.name] = (average, deviation, float(low.min()), float(high.max()))
        return out

    def card(self) -> str:
        """What the zoo is, on one screen."""
        return card(self)

    def __repr__(self) -> str:
        kinds = len(np.unique(self.kind))
        of = "1 architecture" if kinds == 1 else f"{kinds} architectures"
        return f"Zoo({str(self.path)!r}: {len(self)} networks of {of})"

    def _stacked(
        self, at: np.ndarray, time: slice | int | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """States of networks of one architecture, shard by shard and put back in order."""
        kind = int(self.kind[at[0]])
        if kind in self._files.loaded:
            rows = torch.from_numpy(self._files.starts[self._shard[at]] + self._row[at])
            return {
                name: (x if time is None else x[:, time]).index_select(0, rows).to(dtype)
                for name, x in self._files.loaded[kind].items()
            }
        shards, rows = self._shard[at], torch.from_numpy(self._row[at])
        order = np.argsort(shards, kind="stable")
        bounds = np.flatnonzero(np.diff(shards[order])) + 1
        groups = [torch.from_numpy(group) for group in np.split(order, bounds)]
        parts = [self._files.tensors(int(shards[int(group[0])])) for group in groups]
        picked = [rows[group] for group in groups]
        back = None
        if len(groups) > 1:
            back = torch.from_numpy(np.argsort(order, kind="stable"))
        state: dict[str, Tensor] = {}
        for name in parts[0]:
            pieces = [
                (part[name] if time is None else part[name][:, time]).index_select(0, chosen)
                for part, chosen in zip(parts, picked, strict=True)
            ]
            x = pieces[0] if back is None else torch.cat(pieces).index_select(0, back)
            state[name] = x.to(dtype)
        return state

    def _places(self, index: Any) -> np.ndarray:
        """Rows of this view, none negative."""
        if isinstance(index, slice):
            return np.arange(len(self))[index]
        at = np.asarray(index.detach().cpu() if isinstance(index, Tensor) else index)
        at = at.astype(np.int64) if at.size == 0 and at.dtype.kind == "f" else at
        if at.ndim != 1 or at.dtype.kind not in "iub":
            raise IndexError(f"a zoo is indexed by numbers or a mask, not by {at.dtype} {at.shape}")
        if at.dtype.kind == "b":
            if len(at) != len(self):
                raise IndexError(f"a mask of {len(at)} for {len(self)} networks")
            return np.flatnonzero(at)
        if at.size and (at.min() < -len(self) or at.max() >= len(self)):
            raise IndexError(f"{at.min()} … {at.max()} of {len(self)} networks")
        return np.where(at < 0, at + len(self), at).astype(np.int64)
