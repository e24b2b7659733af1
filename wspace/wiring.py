"""How parameters connect the units of a network: node sets and blocks. Data only.

The record behind the parameter graph: derived with a weight space by `trace`, part of its JSON.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class NodeSet:
    """The units of one activation axis.

    Attributes:
        size: Number of units.
        kind: ``"input"``, ``"hidden"``, ``"output"``, or ``"global"`` for the one unit that carries
            what acts on no units.
        op: Operator that computes them.
        depth: Length of the longest path from an input.
        fixed: True if no unit may be permuted; only then does a unit's position mean anything.
        acts: Elementwise operators and norms applied to them, in order of appearance.
        groups: Names of the groups that index them, when a parameter shows them.
    """

    size: int
    kind: str = "hidden"
    op: str = ""
    depth: int = 0
    fixed: bool = False
    acts: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Ends:
    """The units that the entries of a block are attached to, at one end.

    Attributes:
        nodes: Index of the node set.
        loops: Loops of the block on which the unit depends.
        boxes: The units in row-major order of these loops, as nested arithmetic sequences
            ``(start, n, step, n, step …)``, outermost first.
    """

    nodes: int
    loops: tuple[int, ...]
    boxes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Block:
    """One use of a parameter, or of a window of one, as edges or as node features.

    The entries are a nest of loops over the window: a view of the parameter, no copy.

    Attributes:
        param: Name of the parameter; empty for a structural block, which carries no value.
        op: Operator kind: ``linear``, ``conv``, ``embedding``, ``norm``, ``add`` …
        source: Input end; None for node features.
        target: Output end, or the units that the features belong to.
        window: ``(start, stop, step)`` for each dimension of the parameter.
        sizes: Length of every loop.
        of: Dimension of the parameter that each loop walks, -1 if it repeats the same entries.
            Loops of one dimension are row-major.
        roles: What each loop runs over: ``"source"``, ``"target"``, ``"both"`` or ``"feature"``
            (kernel taps, positions).
        tag: What tells this block from others of its shape: slot, activation, stride …
        again: True if an earlier block already holds these entries (shared or tied parameters).
    """

    param: str
    op: str
    source: Ends | None
    target: Ends
    window: tuple[tuple[int, int, int], ...] = ()
    sizes: tuple[int, ...] = ()
    of: tuple[int, ...] = ()
    roles: tuple[str, ...] = ()
    tag: str = ""
    again: bool = False

    @property
    def structural(self) -> bool:
        """True if the block carries no value."""
        return not self.param


@dataclass(frozen=True, slots=True)
class Reading:
    """A matrix that a module input is multiplied with, as it is.

    Attributes:
        param: Name of the matrix.
        dim: Its dimension that runs over the input's coordinates.
        start: Where the first coordinate is along that dimension.
        biases: Names of the vectors that are added to the product, one for each of its uses; empty
            if some use has none of its own.
    """

    param: str
    dim: int
    start: int
    biases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Input:
    """How a module reads one of its input tensors.

    Attributes:
        size: Coordinates: the size of its last axis.
        readings: Matrices that it is multiplied with.
        others: Operators that read it, or what is made of it, in another way.
    """

    size: int
    readings: tuple[Reading, ...] = ()
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wiring:
    """How parameters connect the units of a network.

    `trace` hands out a wiring that is derived on first use (`later`), since only graphs need it.

    Attributes:
        nodes: Node sets; the first is the global one.
        blocks: Uses of parameters, and structural connections, in order of execution.
        unknown: Operators through which units could not be followed.
        inputs: How the module reads its input tensors, in their order; empty if that is not known,
            as in files of earlier versions, whose wirings are equal to those of this one.
    """

    nodes: tuple[NodeSet, ...]
    blocks: tuple[Block, ...]
    unknown: tuple[str, ...] = field(default_factory=tuple)
    inputs: tuple[Input, ...] = field(default_factory=tuple, compare=False)

    @classmethod
    def later(cls, derive: Callable[[], Self]) -> Self:
        """A wiring that `derive` makes when something of it is first asked for.

        Args:
            derive: Returns the wiring; called at most once.

        Returns:
            A wiring equal to what `derive` returns.
        """
        wiring = object.__new__(cls)
        object.__setattr__(wiring, "_derive", derive)
        return wiring

    def __getattr__(self, name: str) -> Any:  # only for what is not there yet
        derive = self.__dict__.get("_derive")
        if derive is None or name not in {f.name for f in fields(self)}:
            raise AttributeError(f"'Wiring' has no attribute {name!r}")
        made = derive()
        del self.__dict__["_derive"]
        self.__dict__.update({f.name: getattr(made, f.name) for f in fields(self)})
        return self.__dict__[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.nodes, self.blocks, self.unknown, self.inputs)

    def to_data(self) -> dict[str, Any]:
        """The wiring as lists and numbers, for JSON."""
        return {
            "nodes": [
                [n.size, n.kind, n.op, n.depth, n.fixed, n.acts, n.groups] for n in self.nodes
            ],
            "blocks": [
                [
                    *(b.param, b.op, _ends_to(b.source), _ends_to(b.target), b.window),
                    *(b.sizes, b.of, b.roles, b.tag, b.again),
                ]
                for b in self.blocks
            ],
            "unknown": self.unknown,
            "inputs": [
                [i.size, [[r.param, r.dim, r.start, r.biases] for r in i.readings], i.others]
                for i in self.inputs
            ],
        }

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Self:
        """The wiring written by `to_data`, after a trip through JSON.

        Args:
            data: What `to_data` returned.

        Returns:
            An equal wiring.
        """
        return cls(
            nodes=tuple(
                NodeSet(size, kind, op, depth, fixed, tuple(acts), tuple(groups))
                for size, kind, op, depth, fixed, acts, groups in data["nodes"]
            ),
            blocks=tuple(
                Block(
                    *(param, op, None if source is None else _ends_from(source)),
                    *(_ends_from(target), tuple((w[0], w[1], w[2]) for w in window)),
                    *(tuple(sizes), tuple(of), tuple(roles), tag, again),
                )
                for param, op, source, target, window, sizes, of, roles, tag, again in data[
                    "blocks"
                ]
            ),
            unknown=tuple(data["unknown"]),
            inputs=tuple(
                Input(
                    size,
                    tuple(Reading(name, dim, at, tuple(of)) for name, dim, at, of in readings),
                    tuple(others),
                )
                for size, readings, others in data.get("inputs", ())  # absent in older files
            ),
        )


def _ends_to(ends: Ends | None) -> list[Any] | None:
    return None if ends is None else [ends.nodes, ends.loops, ends.boxes]


def _ends_from(data: list[Any]) -> Ends:
    return Ends(data[0], tuple(data[1]), tuple(map(tuple, data[2])))
