"""The topology of any traced module, and the choice of one for a prediction.

Nodes are the units of the parameter graph, and one more for every block of node features, from
which they come as edges. Each entry of a parameter is an edge once: where it is used again (ties,
recurrence) the graph has no further edge. What only passes activations on (additions, products,
attention) is contracted: a constant edge leads from the units whose parameters are behind it, since
two rounds of messages would not get through more than one such step.

A parameter that the trace could not place is connected to the global node alone.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from wspace.errors import NowcastError, WSpaceError, message
from wspace.graph import ParameterGraph, Structure, structure_of
from wspace.nn.layout import EdgeForm, FeatureForm, Forms, forms_of
from wspace.nowcast import topology as top
from wspace.nowcast.predictor import Past, ties_of
from wspace.nowcast.ranks import in_parts
from wspace.nowcast.topology import TAPS, Builder, Edges, Topology, lasting, located, spans
from wspace.space import WeightSpace
from wspace.trace import trace

LINKS = 1 << 22
"""Most links that a contraction may make; beyond, its steps stay."""


def topology_of(past: Past) -> Topology:
    """The topology that a prediction asks for.

    Args:
        past: The prediction's inputs.

    Returns:
        It, with the names that the windows have.

    Raises:
        NowcastError: If there is none, or the windows do not fit.
    """
    if past.topology == "published":
        from wspace.nowcast.published import published_topology

        return published_topology(past.module)
    space = space_of(past)
    names = {n: p.name for p in space.params for n in (p.name, *p.ties)}
    known = {names[n]: n for n in past.windows if n in names}
    lost = [n for n in past.windows if n not in names]
    lost += [p.name for p in space.params if not p.buffer and p.name not in known]
    wrong = [
        f"{n!r} of shape {tuple(x[-1].shape)}, not {space[n].shape}"
        for n, x in past.windows.items()
        if n in names and tuple(x[-1].shape) != space[n].shape
    ]
    if lost or wrong:
        raise NowcastError(
            message(
                "predict: the states do not fit the weight space",
                expected="all parameters of the module, in every state",
                got=[*(f"{n!r} on one side only" for n in lost), *wrong],
                help="a graph predictor needs them all; trace the module again if it has changed",
            )
        )
    made = traced(space)
    if all(a == b for a, b in known.items()):
        return made
    return replace(
        made, blocks=tuple(replace(b, param=known.get(b.param, b.param)) for b in made.blocks)
    )


# ----------------------------------------------------------------------- the space


def space_of(past: Past) -> WeightSpace:
    """The weight space: the one given, or traced with the inputs given, or with guessed ones.

    Args:
        past: The prediction's inputs.

    Returns:
        It.

    Raises:
        NowcastError: If no inputs are given and the guesses do not run.
        TraceError: If the module does not run on those given.
    """
    if past.space is not None:
        return past.space
    assert isinstance(past.module, nn.Module)
    args, kwargs = past.example
    if args is not None or kwargs is not None:
        return trace(past.module, tuple(args or ()), kwargs or {})
    space = guessed(past.module)
    if space is not None:
        return space
    raise NowcastError(
        message(
            f"predict: no example inputs of {type(past.module).__name__} are known",
            expected="`space=`, or `args=` and `kwargs=` to trace it with",
            got="a module that runs on none of the inputs tried",
            help="space = wspace.trace(module, inputs), once, and pass it to every prediction",
        )
    )


_GUESSED: WeakKeyDictionary[nn.Module, tuple[object, WeightSpace | None]] = WeakKeyDictionary()


def guessed(module: nn.Module) -> WeightSpace | None:
    """The weight space of a module, traced with guessed inputs.

    It is kept until modules or parameters are added, removed, resized or tied. A module with a
    parameter in parts is not traced: its forward pass waits for other processes.

    Args:
        module: The module.

    Returns:
        Its space; None if it runs on none of the inputs tried.
    """
    own = dict(module.named_parameters(remove_duplicate=False))
    if any(in_parts(p) for p in own.values()):
        return None
    ties = tuple(ties_of(module).items())
    parts = tuple((name, type(m)) for name, m in module.named_modules())
    form = (ties, parts, tuple(p.shape for p in own.values()))
    found = _GUESSED.get(module)
    if found is None or found[0] != form:
        found = _GUESSED[module] = form, _tried(module)
    return found[1]


def _tried(module: nn.Module) -> WeightSpace | None:
    for guess, named in _guesses(module):
        try:
            return trace(module, guess, named)
        except WSpaceError:
            continue
    return None


def _guesses(module: nn.Module) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Example inputs that a module may run on, the likeliest first."""
    dummy = getattr(module, "dummy_inputs", None)
    first = [((), dict(dummy))] if isinstance(dummy, Mapping) else []
    return [*first, *_by_layer(module)]


def _by_layer(module: nn.Module) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the first layer takes."""
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(1))
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            return [((like.new_zeros(2, layer.in_features),), {})]
        if isinstance(layer, nn.Embedding):
            return [((torch.zeros(1, 8, dtype=torch.int64, device=like.device),), {})]
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            shape, sizes = [1, layer.in_channels], (32, 64, 28, 16, 8, 224)
            dims = len(layer.kernel_size)
            return [((like.new_zeros([*shape, *[s] * dims]),), {}) for s in sizes]
    return []


# -------------------------------------------------------------------- the topology


@lru_cache(maxsize=16)
@lasting
def traced(space: WeightSpace) -> Topology:
    """The topology of a traced module.

    Args:
        space: Its weight space.

    Returns:
        The topology; made once for a space.
    """
    return _Traced(space).build()


Links = dict[tuple[int, int], Any]
"""(node set, kind of edge) → scipy.sparse matrix ``(units, units of that set)``."""


class _Traced:
    def __init__(self, space: WeightSpace) -> None:
        self.space = space
        self.structure: Structure = structure_of(space)
        self.forms: Forms = forms_of(self.structure)
        self.builder = Builder()
        self.builder.add(self.structure.total)
        values = {p.name: torch.empty(p.shape, device="meta") for p in space.params}
        self.graph = ParameterGraph(space, MappingProxyType(values), MappingProxyType({}))
        self.own = [f for f in self.forms.edges if not f.block.structural and not f.block.again]
        self.features = [
            f for f in self.forms.features
            if not f.block.again and not space[f.block.param].buffer
        ]  # fmt: skip
        self.own = [f for f in self.own if not space[f.block.param].buffer]
        self.passing = {f.block.target.nodes for f in self.forms.edges if f.block.structural}
        self.passing -= {f.block.target.nodes for f in (*self.own, *self.features)}
        self.behind: dict[int, Links] = {}
        self.marks: dict[int, Tensor] = {}

    def build(self) -> Topology:
        self._contract()
        self._mark()
        tables = self._tables()
        for form in self.own:
            for kind, start, stop in self._kinds(form, tables):
                self._edges(form, kind, (start, stop))
        for form in self.features:
            self._features(form)
        self._links()
        return self.builder.build()

    # ------------------------------------------------------------ edges with values

    def _at(self, nodes: int) -> int:
        return self.structure.offsets[nodes]

    def _edges(self, form: EdgeForm, kind: int, rows: tuple[int, int]) -> None:
        """A block, or some of its targets."""
        block = form.block
        assert block.source is not None
        p, t, _, f = form.sizes
        target = (form.target + self._at(block.target.nodes)).view(p, t)
        target = target[:, rows[0] : rows[1]].reshape(-1)
        source = form.source + self._at(block.source.nodes)
        if block.op == "global":
            target, source = self._alone(len(target)), self._alone(len(source))

        def view(x: Tensor) -> Tensor:
            raw = form.raw(self._with(block.param, x), 1)
            assert raw is not None
            return raw[0][:, rows[0] : rows[1]]

        self._cut(block.param, kind, (target, source), view, conv=block.op == "conv", taps=f)

    def _features(self, form: FeatureForm) -> None:
        block = form.block
        target = form.target + self._at(block.target.nodes)
        if block.op == "global":
            target = self._alone(len(target))
        source = self._alone(1)

        def view(x: Tensor) -> Tensor:
            return form.raw(self._with(block.param, x), 1)[0][None, :, None]

        kind = _feature_kind(form)
        self._cut(block.param, kind, (target, source), view, conv=False, taps=form.sizes[1])

    def _alone(self, count: int) -> Tensor:
        return self.builder.add(count)

    def _with(self, name: str, x: Tensor) -> ParameterGraph:
        return replace(self.graph, values=MappingProxyType({**self.graph.values, name: x}))

    def _cut(
        self, param: str, kind: int, ends: tuple[Tensor, Tensor], view: top.Views, **taps: int
    ) -> None:
        """Adds ``(P, T, S, taps)`` as edges of at most `TAPS` features, and parallel ones."""
        count, conv = taps["taps"], bool(taps["conv"])
        each = min(count, TAPS) if conv else 1
        whole = count // each * each
        parts = [(0, whole, each), (whole, count, count - whole)]
        for start, stop, size in parts:
            if start == stop:
                continue

            def five(x: Tensor, a: int = start, b: int = stop, n: int = size) -> Tensor:
                return view(x)[..., a:b].unflatten(-1, (-1, n))

            sizes, strides, offset, index = located(self.space[param].shape, five)
            self.builder.blocks.append(Edges(kind, sizes, *ends, param, strides, offset, index))

    # ----------------------------------------------------------------------- kinds

    def _kinds(self, form: EdgeForm, tables: dict[str, int]) -> list[tuple[int, int, int]]:
        """Runs of targets that take edges of one kind: kind, start and stop."""
        op, (p, t, _, _) = form.block.op, form.sizes
        kind = {"conv": top.CONV, "token": top.TOKEN, "linear": top.FC}.get(op, top.BIAS)
        if op == "embedding":
            kind = tables[form.block.param]
        marks = self.marks.get(form.block.target.nodes)
        if op != "linear" or marks is None:
            return [(kind, 0, t)]
        rows = marks[form.target].view(p, t)
        rows = torch.where(rows == 0, torch.tensor(top.FC), rows)
        if bool((rows != rows[:1]).any()):
            return [(top.FC, 0, t)]
        return list(spans(rows[0]))

    def _mark(self) -> None:
        """Finds queries, keys and values: operands of products before and after a softmax."""
        products = [f for f in self.forms.edges if f.block.op == "product"]
        scores = {
            f.block.source.nodes: f.block.target.nodes
            for f in products
            if f.block.source is not None and "softmax" in f.block.tag
        }
        for form in products:
            source, target = form.block.source, form.block.target.nodes
            assert source is not None
            if target in scores:
                self._set(form, top.QUERY if form.block.tag.startswith("0") else top.KEY)
            elif target in scores.values() and source.nodes not in scores:
                self._set(form, top.VALUE)

    def _set(self, form: EdgeForm, kind: int) -> None:
        assert form.block.source is not None
        nodes = form.block.source.nodes
        used = torch.zeros(self.structure.nodes[nodes].size, dtype=torch.bool)
        used[form.source] = True
        for (origin, _), links in self._origins(nodes).items():
            units = links[used.numpy()].indices if links is not None else used.nonzero()[:, 0]
            marks = self.marks.setdefault(
                origin, torch.zeros(self.structure.nodes[origin].size, dtype=torch.int64)
            )
            at = torch.as_tensor(units, dtype=torch.int64).unique()
            clash = (marks[at] != 0) & (marks[at] != kind)
            marks[at] = torch.where(clash, torch.tensor(top.FC), torch.tensor(kind))

    def _tables(self) -> dict[str, int]:
        """Kinds of embeddings: of those that are added up, the one of most rows holds tokens."""
        forms = [f for f in self.own if f.block.op == "embedding"]
        joined = {f.block.target.nodes: f.block.target.nodes for f in forms}
        for f in self.forms.edges:
            if f.block.op == "add" and f.block.source is not None:
                a, b = f.block.source.nodes, f.block.target.nodes
                if a in joined and b in joined:
                    old = joined[b]
                    joined = {k: joined[a] if v == old else v for k, v in joined.items()}
        most: dict[int, int] = {}
        for f in forms:
            group = joined[f.block.target.nodes]
            most[group] = max(most.get(group, 0), f.sizes[2])
        return {
            f.block.param: top.TOKEN
            if f.sizes[2] == most[joined[f.block.target.nodes]]
            else top.POSITION
            for f in forms
        }

    # ----------------------------------------------------------------- contraction

    def _origins(self, nodes: int) -> Links:
        """What is behind a node set; None stands for the set itself."""
        return self.behind.get(nodes) or {(nodes, top.RESIDUAL): None}

    def _contract(self) -> None:
        """For every set that only passes activations on, links from the sets behind it."""
        for form in self.forms.edges:
            block = form.block
            if block.structural and block.target.nodes in self.passing:
                made = self.behind.setdefault(block.target.nodes, {})
                for key, links in self._through(form).items():
                    made[key] = _union(made.get(key), links)

    def _through(self, form: EdgeForm) -> Links:
        """Links into the targets of a structural block, from what is behind its sources."""
        from scipy.sparse import csr_matrix

        block = form.block
        assert block.source is not None
        p, t, s, _ = form.sizes
        target = form.target.view(p, t, 1).expand(p, t, s).reshape(-1).numpy()
        source = form.source.view(p, 1, s).expand(p, t, s).reshape(-1).numpy()
        nodes = self.structure.nodes
        shape = (nodes[block.target.nodes].size, nodes[block.source.nodes].size)
        step = csr_matrix((torch.ones(len(target)).numpy(), (target, source)), shape)
        plain = block.op == "add" and t == s == 1
        out: Links = {}
        for (origin, kind), links in self._origins(block.source.nodes).items():
            made = step if links is None else step @ links
            if made.nnz > LINKS:  # too many to write out: stop here
                return {(block.source.nodes, top.OTHER): step}
            key = (origin, kind if plain else top.OTHER)
            out[key] = _union(out.get(key), made)
        return out

    def _links(self) -> None:
        """Constant edges into every set that edges with values touch."""
        touched = {f.block.target.nodes for f in (*self.own, *self.features)}
        touched |= {f.block.source.nodes for f in self.own if f.block.source is not None}
        into: dict[int, Links] = {n: self.behind[n] for n in touched if n in self.behind}
        for form in self.forms.edges:
            nodes = form.block.target.nodes
            if form.block.structural and nodes in touched and nodes not in self.passing:
                made = into.setdefault(nodes, {})
                for key, links in self._through(form).items():
                    made[key] = _union(made.get(key), links)
        for nodes, some in sorted(into.items()):
            for (origin, kind), links in some.items():
                pairs = links.tocoo()
                target = torch.as_tensor(pairs.row, dtype=torch.int64) + self._at(nodes)
                source = torch.as_tensor(pairs.col, dtype=torch.int64) + self._at(origin)
                self.builder.link(kind, target, source)


def _feature_kind(form: FeatureForm) -> int:
    op, tag = form.block.op, form.block.tag
    if op == "token":
        return top.TOKEN
    if op == "add":
        return top.POSITION if form.sizes[1] > 1 else top.BIAS
    if op == "mul" or (op == "norm" and tag.startswith("norm.scale")):
        return top.NORM
    return top.BIAS


def _union(a: Any, b: Any) -> Any:
    """The links of either, each once."""
    total = b if a is None else a + b
    total.data[:] = 1
    return total
