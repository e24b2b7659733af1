"""`build_metanet`: any metanet by name, made for the networks of a zoo.

Owns what of a zoo a metanet has to know before its weights exist: the one weight space of a model
that reads one space, the module that probes run through. All metanets made here are called on a
list of graphs and answer ``(rows, out)``, one row for each network, in the order of the list.
"""

import difflib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from wspace.errors import CheckpointError, SpaceMismatch, WSpaceError, message
from wspace.graph import ParameterGraph, decode
from wspace.io import load_checkpoint
from wspace.nn import (
    NFN,
    UNF,
    DWSNet,
    FlatMLP,
    GraphMetanet,
    Metanet,
    NeuralGraphGNN,
    NeuralGraphTransformer,
    ParameterDeepSets,
    ProbeOnly,
    Probes,
    ScaleGMN,
    StatNN,
)
from wspace.nn.batch import by_space, stacked
from wspace.space import WeightSpace
from wspace.zoo import Architecture, Zoo

GRAPH: dict[str, type[Metanet]] = {
    c.__name__: c for c in (GraphMetanet, NeuralGraphGNN, NeuralGraphTransformer, ScaleGMN)
}
"""Metanets of graphs of any architecture."""

STATE: dict[str, Callable[..., nn.Module]] = {"DWSNet": DWSNet, "NFN": NFN, "UNF": UNF}
"""Models of states of one space."""

OTHER: dict[str, Callable[..., nn.Module]] = {
    "FlatMLP": FlatMLP,
    "StatNN": StatNN,
    "ParameterDeepSets": ParameterDeepSets,
    "ProbeOnly": ProbeOnly,
}
"""Baselines: they answer with vectors only."""

NAMES = (*GRAPH, *STATE, *OTHER)

FOUND = {"self", "space", "module", "example", "inputs", "out", "head"}
"""Parameters that the zoo or the task decides."""

PROBES = "probe_inputs"
"""Option that names a file; see `build_metanet`."""

FREE = {"dropout", "stream", "chunk", PROBES}
"""Options that change neither what a weight means nor its shape."""

MORE: dict[str, tuple[str, ...]] = {
    "NeuralGraphTransformer": ("heads",),
    "ScaleGMN": ("bidirectional",),
    "ProbeOnly": ("learn", "loop", PROBES),
    "StatNN": ("mixed",),
}
"""Options that a signature does not name."""


class Kinds(Protocol):
    """The architectures that a model may meet; a `wspace.zoo.Zoo` has them."""

    @property
    def architectures(self) -> Sequence[Architecture]:
        """How to build the networks, without weights."""
        ...

    @property
    def spaces(self) -> Sequence[WeightSpace]:
        """Their weight spaces, in the same order."""
        ...


@dataclass(frozen=True)
class Seen:
    """Architectures without a zoo, as a checkpoint keeps them; see `Kinds`.

    Attributes:
        architectures: How to build the networks, without weights.
        spaces: Their weight spaces.
    """

    architectures: tuple[Architecture, ...] = ()
    spaces: tuple[WeightSpace, ...] = ()

    @classmethod
    def of(cls, zoo: Zoo, *, but: Zoo | None = None) -> "Seen":
        """The architectures of the networks of a zoo, in order.

        Args:
            zoo: The zoo, or a part of one.
            but: Another part of it, whose architectures are left out.

        Returns:
            Those that have a network.
        """
        out = set() if but is None else {int(k) for k in but.kind}
        used = sorted({int(k) for k in zoo.kind} - out)
        return cls(tuple(zoo.architectures[k] for k in used), tuple(zoo.spaces[k] for k in used))

    def __add__(self, other: "Seen") -> "Seen":
        return Seen(self.architectures + other.architectures, self.spaces + other.spaces)

    def pairs(self) -> list[tuple[Architecture, WeightSpace]]:
        """Architectures with their spaces."""
        return list(zip(self.architectures, self.spaces, strict=True))

    def to_list(self) -> list[dict[str, Any]]:
        """Plain data for JSON."""
        return [
            {"architecture": json.loads(a.to_json()), "space": json.loads(s.to_json())}
            for a, s in self.pairs()
        ]

    @classmethod
    def from_list(cls, data: Sequence[Mapping[str, Any]]) -> "Seen":
        """Inverts `to_list`."""
        return cls(
            tuple(Architecture.from_json(json.dumps(d["architecture"])) for d in data),
            tuple(WeightSpace.from_json(json.dumps(d["space"])) for d in data),
        )


@runtime_checkable
class Fitted(Protocol):
    """A metanet that normalises what it reads by statistics of training networks."""

    def fit_statistics(self, graphs: Sequence[ParameterGraph]) -> None:
        """Sets the statistics, which are buffers of the metanet."""
        ...


class StateModel(nn.Module):
    """A model of states of one space in the interface of a metanet.

    Args:
        model: Called on a state, ``(*batch, *shape)`` for each parameter; has a method ``fit``.
        space: Its weight space.
    """

    def __init__(self, model: nn.Module, space: WeightSpace) -> None:
        super().__init__()
        self.model, self.space = model, space

    def forward(self, graphs: ParameterGraph | Sequence[ParameterGraph]) -> Any:
        """Runs on one graph or a list of graphs of the space.

        Args:
            graphs: A graph, whose leading batch axes stand for several networks; or a list.

        Returns:
            ``(*batch, out)``, for a list ``(rows, out)``; with a head for parameters a state, for a
            list one for each graph.

        Raises:
            SpaceMismatch: If a graph is of another space, or the list is empty.
        """
        if isinstance(graphs, ParameterGraph):
            self._check([graphs])
            return self.model(decode(graphs))
        self._check(graphs)
        answer = self.model(decode(stacked(graphs)))
        if isinstance(answer, Tensor):
            return answer
        rows = [prod(g.batch) for g in graphs]
        pieces = {name: x.split(rows) for name, x in answer.items()}
        return [
            {n: x[i].reshape(*g.batch, *x[i].shape[1:]) for n, x in pieces.items()} | dict(g.rest)
            for i, g in enumerate(graphs)
        ]

    def fit_statistics(self, graphs: Sequence[ParameterGraph]) -> None:
        """Sets the statistics by which states are standardised.

        Args:
            graphs: Training networks of the space.

        Raises:
            SpaceMismatch: If a graph is of another space, or the list is empty.
        """
        self._check(graphs)
        cast(Any, self.model).fit([decode(g) for g in graphs])

    def _check(self, graphs: Sequence[ParameterGraph]) -> None:
        for places in by_space(graphs):
            space = graphs[places[0]].space
            if space is not self.space and space != self.space:
                raise SpaceMismatch(
                    message(
                        f"{type(self.model).__name__}: the graph is of another weight space",
                        expected=self.space.summary(),
                        got=space.summary(),
                        help="this model reads one architecture",
                    )
                )


def build_metanet(
    name: str,
    options: Mapping[str, Any] | None = None,
    kinds: Kinds | None = None,
    *,
    out: int | None = 1,
    trust: Sequence[str] = (),
) -> nn.Module:
    """A metanet with fresh weights for the networks of a zoo.

    Args:
        name: One of `NAMES`: the classes of `wspace.nn`.
        options: Keyword arguments of the class, as plain values. Graph metanets take ``probes``, a
            number: learned inputs that are pushed through the networks, all of one architecture.
            They and ``ProbeOnly`` take ``probe_inputs``, a safetensors file whose tensor ``inputs``
            holds the probes' first values, ``(at least that number, *shape)``, such as some inputs
            that the networks were trained on; see `without_files`.
            ``StatNN`` takes ``mixed``: True to average over tensors, which is what several
            architectures need; False for statistics of every tensor in a row; None decides.
        kinds: The zoo, or anything with its architectures. Needed unless the metanet takes any.
        out: Length of the answer; None for a metanet that returns changed parameters.
        trust: Packages, beside `wspace` and `datasets_zoo`, whose functions the zoo may name.

    Returns:
        A module that is called on a list of graphs.

    Raises:
        WSpaceError: If the name or an option is unknown, or the model cannot return parameters.
        SpaceMismatch: If the model reads one architecture and the zoo has several.
        ZooError: If an architecture comes from a package that is not trusted.
    """
    given = dict(options or {})
    check_metanet(name, given)
    if out is None and name in OTHER:
        raise WSpaceError(
            message(
                f"metanet: {name} answers with vectors, not with parameters",
                expected=f"one of {', '.join((*GRAPH, *STATE))}",
            )
        )
    if name in GRAPH:
        return _graph_metanet(name, given, kinds, out, trust)
    if name in STATE:
        space = _only(kinds, name).spaces[0]
        head = "parameters" if out is None else "invariant"
        return StateModel(STATE[name](space, out=out, head=head, **given), space)
    if name == "FlatMLP":
        return FlatMLP(_only(kinds, name).spaces[0], cast(int, out), **given)
    if name == "ProbeOnly":
        only = _only(kinds, name)
        count, path = int(given.pop("count", 32)), given.pop(PROBES, None)
        module, inputs = _module(only, count, trust, path)
        return ProbeOnly(module, only.spaces[0], cast(int, out), count=count, **inputs, **given)
    if name == "StatNN":
        mixed = given.pop("mixed", None)
        mixed = len(kinds.spaces) != 1 if mixed is None and kinds is not None else mixed
        space = _only(kinds, "StatNN with mixed=False").spaces[0] if mixed is False else None
        return StatNN(cast(int, out), space=space, **given)
    return ParameterDeepSets(cast(int, out), **given)


def check_metanet(name: str, options: Mapping[str, Any]) -> None:
    """Refuses a name or an option that no metanet has.

    Args:
        name: One of `NAMES`.
        options: Options of `build_metanet`.

    Raises:
        WSpaceError: If the name or an option is unknown; says what was probably meant.
    """
    if name not in NAMES:
        raise WSpaceError(
            message(
                f"metanet: unknown name {name!r}",
                expected=f"one of {', '.join(NAMES)}",
                help=_near(name, NAMES),
            )
        )
    known = {*_defaults(name), *MORE.get(name, ())} | ({PROBES} if name in GRAPH else set())
    wrong = [key for key in options if key not in known]
    if wrong:
        raise WSpaceError(
            message(
                f"metanet: {name} has no option {', '.join(map(repr, wrong))}",
                expected=f"options among {', '.join(sorted(known))}",
                help=_near(wrong[0], known),
            )
        )


def differing(
    name: str, one: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Options in which two metanets of one name differ, so that weights do not mean the same.

    Args:
        name: One of `NAMES`.
        one: Options of `build_metanet`.
        other: Options of the other.

    Returns:
        Both values by name of the option; those of `FREE` do not count.
    """
    plain = {"probes": 0} if name in GRAPH else {}
    defaults = {**dict.fromkeys(MORE.get(name, ())), **_defaults(name), **plain}
    a, b = ({k: _plain(x) for k, x in {**defaults, **given}.items()} for given in (one, other))
    return {k: (a[k], b[k]) for k in a if k not in FREE and a[k] != b[k]}


def _defaults(name: str) -> dict[str, Any]:
    """Options that the signature of a metanet names, and their defaults."""
    made = GRAPH.get(name) or STATE.get(name) or OTHER[name]
    own = inspect.signature(cast(Any, made)).parameters.values()
    kinds = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    return {p.name: p.default for p in own if p.kind in kinds and p.name not in FOUND}


def _plain(value: Any) -> Any:
    """Tuples as the lists that they are in YAML and JSON."""
    return list(value) if isinstance(value, tuple) else value


def fit_statistics(metanet: nn.Module, graphs: Sequence[ParameterGraph]) -> bool:
    """Sets the statistics by which a metanet normalises, where it has any.

    Args:
        metanet: The metanet.
        graphs: Training networks.

    Returns:
        Whether the metanet has statistics.
    """
    if not isinstance(metanet, Fitted):
        return False
    metanet.fit_statistics(graphs)
    return True


def _graph_metanet(
    name: str,
    given: dict[str, Any],
    kinds: Kinds | None,
    out: int | None,
    trust: Sequence[str],
) -> nn.Module:
    count, path = given.pop("probes", 0), given.pop(PROBES, None)
    if count:
        only = _only(kinds, f"{name} with probes")
        module, inputs = _module(only, int(count), trust, path)
        given["probes"] = Probes(module, only.spaces[0], count=int(count), **inputs)
    head = "parameter" if out is None else "graph"
    return GRAPH[name](out or 1, head=head, **given)


def _only(kinds: Kinds | None, what: str) -> Kinds:
    """The zoo, which has to be of one architecture."""
    if kinds is None:
        raise WSpaceError(
            message(f"metanet: {what} is made for one architecture", help="pass the zoo as `kinds`")
        )
    if len(kinds.spaces) != 1:
        shown = [space.summary() for space in kinds.spaces[:4]]
        more = len(kinds.spaces) - len(shown)
        raise SpaceMismatch(
            message(
                f"metanet: {what} reads one architecture",
                expected="a zoo of one architecture",
                got=[*shown, *([f"{more} more"] if more else [])],
                help=f"take {', '.join(GRAPH)} without probes, StatNN or ParameterDeepSets, or "
                "choose one architecture of the zoo with `where`",
            )
        )
    return kinds


def without_files(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a metanet whose weights are known, so that first values need not be read.

    Args:
        options: Options of `build_metanet`.

    Returns:
        Those that decide what its weights are.
    """
    return {key: value for key, value in options.items() if key != PROBES}


def _probe_inputs(path: str | Path, count: int) -> Tensor:
    """The first `count` inputs in a file."""
    try:
        found = load_checkpoint(path).get("inputs")
    except CheckpointError as error:
        text = f"metanet: {PROBES} cannot be read"
        raise CheckpointError(message(text, got=str(error))) from error
    if found is None or not found.dim() or len(found) < count:
        raise WSpaceError(
            message(
                f"metanet: {path} does not hold the probes' first values",
                expected=f"a tensor 'inputs' of at least {count} inputs",
                got="no such tensor" if found is None else f"shape {tuple(found.shape)}",
                help="write it with safetensors.torch.save_file({'inputs': x}, path)",
            )
        )
    return found[:count]


def _module(
    kinds: Kinds, count: int, trust: Sequence[str], path: str | Path | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The module that probes run through, and the options of `Probes` that give the inputs."""
    architecture = kinds.architectures[0]
    module = architecture.module(trust=trust)
    if path is not None:
        return module, {"inputs": _probe_inputs(path, count)}
    example = architecture.example(torch.Generator().manual_seed(0))
    if all(x.is_floating_point() for x in example):
        return module, {"example": example}
    generator = torch.Generator().manual_seed(0)
    drawn = [architecture.example(generator) for _ in range(count)]
    inputs = tuple(torch.cat([d[i][:1] for d in drawn]) for i in range(len(example)))
    return module, {"inputs": inputs}


def _near(name: str, known: Sequence[str] | set[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"did you mean {found[0]!r}?" if found else ""
