"""Probes: learned inputs pushed through the networks under study, and what their units answer.

Owns running a stack of states on shared inputs and reading the activations of node sets off module
hooks. What a metanet makes of the features is left to it.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map_only

from wspace.errors import SpaceMismatch, message
from wspace.graph.parameter import ParameterGraph
from wspace.graph.structure import structure_of, units_of
from wspace.space import WeightSpace
from wspace.trace.sandbox import tensors_in
from wspace.wiring import Block, Ends

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""Arguments of a module: its one argument, the positional ones, or the named ones."""


class ProbeFeatures(NamedTuple):
    """What networks answer to probes.

    Attributes:
        outputs: First tensor that the module returns, ``(*batch, count, *output shape)``.
        nodes: By index of the node set, activations of its units, ``(*batch, size, count)``.
        more: Further tensors that the module returns, shaped as `outputs`.
    """

    outputs: Tensor
    nodes: dict[int, Tensor]
    more: tuple[Tensor, ...] = ()


class Probes(nn.Module):
    """Inputs shared by all networks of a space, learned or given, and the networks' answers.

    Outputs are invariant to permutations of hidden units, and activations move with the units, so
    both may enter an equivariant network. Activations are those of `torch.nn.Linear`, convolutions
    and `torch.nn.Embedding`, before the activation function and averaged over space or sequence;
    a module that runs several times contributes the average of its calls, several modules that
    write into one node set contribute their sum. Input units carry what the first module receives.

    Kofinas et al. (2024), "Graph Neural Networks for Learning Equivariant Representations of Neural
    Networks", section 3.3 (arXiv 2403.12143), extended to convolutions; there, activations are
    taken after the non-linearity.

    Args:
        module: The architecture; its weights are not used (they may be on the meta device), its
            buffers that no checkpoint holds are. It is copied without weights and run in
            evaluation mode, one probe at a time, so that its inputs' first axis has size 1.
        space: Weight space of the module.
        count: Number of probes; with `inputs`, their length.
        inputs: Values of the probes: a tensor ``(count, *shape)``, one for each positional
            argument, or a dict of keyword arguments; what is not a tensor is passed on as it is.
        example: Inputs of which only shapes are used, ``(any, *shape)``, such as those given to
            `wspace.trace`; the probes' values are then drawn uniformly from [-1, 1]. Needed unless
            `inputs` are given or the module takes vectors of its input units.
        learn: True to make floating-point inputs parameters. Integers (tokens) are never learned.
        loop: True to run one network and one probe at a time, for modules with operators that
            `torch.vmap` does not know (fused recurrent kernels) or that branch on values.
        generator: Source of randomness of the first values.

    Attributes:
        count: Number of probes.
        shape: Shape of `ProbeFeatures.outputs` without batch axes.
        covered: Indices of the node sets whose activations are read, in order.

    Raises:
        SpaceMismatch: If inputs are needed, do not fit, or the module does not run on them.

    Example:
        >>> import wspace
        >>> net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> space = wspace.trace(net, torch.zeros(1, 3))
        >>> features = Probes(net, space, count=7)(net.state_dict())
        >>> features.outputs.shape, {n: tuple(x.shape) for n, x in features.nodes.items()}
        (torch.Size([7, 2]), {1: (3, 7), 2: (5, 7), 3: (2, 7)})
    """

    def __init__(
        self,
        module: nn.Module,
        space: WeightSpace,
        *,
        count: int = 16,
        inputs: Inputs | None = None,
        example: Inputs | None = None,
        learn: bool = True,
        loop: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.space = space
        values = _values(space, count, inputs, example, generator)
        self.count, self.loop = _length(values), loop
        self._others = {k: x for k, x in values.items() if not isinstance(x, Tensor)}
        self._slots = {k: f"input_{k}" for k, x in values.items() if isinstance(x, Tensor)}
        for key, name in self._slots.items():
            x = values[key].detach().clone()
            if learn and x.is_floating_point():
                self.register_parameter(name, nn.Parameter(x))
            else:
                self.register_buffer(name, x)
        skeleton, constants = _without_weights(module, space)
        self._skeleton = (skeleton,)  # in a tuple, so that it is no submodule
        self._constants = {name: f"constant_{i}" for i, name in enumerate(constants)}
        for name, x in constants.items():
            self.register_buffer(self._constants[name], x, persistent=False)
        outs, calls = self._rehearsed()
        self.shape = (self.count, *outs[0].shape)
        self._readers = [r for r in _readers(space, skeleton) if r.fits(calls)]
        self.covered = tuple(sorted({r.nodes for r in self._readers}))

    def forward(self, graph: ParameterGraph | Mapping[str, Tensor]) -> ProbeFeatures:
        """Runs the networks on the probes.

        Args:
            graph: Graph or state of this space, with any batch axes.

        Returns:
            Outputs and activations; differentiable in the state and in the inputs.

        Raises:
            SpaceMismatch: If the graph or state is of another space.
        """
        state, batch = self._state(graph)
        first = next(iter(state.values()))
        dtype = first.dtype
        inputs = [_cast(getattr(self, name), dtype) for name in self._slots.values()]
        fixed = {k: _cast(getattr(self, name), dtype) for k, name in self._constants.items()}
        each = _looped if self.loop else vmap
        run = each(partial(self._one, fixed), in_dims=(None, 0))
        names = {name: p.name for p in self.space.params for name in (p.name, *p.ties)}
        flat = {
            name: x.reshape(prod(batch), *x.shape[len(batch) :]) if batch else x
            for name, x in state.items()
        }

        def whole(values: dict[str, Tensor]) -> tuple[list[Tensor], dict[int, Tensor]]:
            return run({name: values[of] for name, of in names.items()}, inputs)

        outs, nodes = (each(whole, in_dims=(0,)) if batch else whole)(flat)
        nodes = {n: x.transpose(-1, -2) for n, x in nodes.items()}
        if batch:
            outs = [x.unflatten(0, batch) for x in outs]
            nodes = {n: x.unflatten(0, batch) for n, x in nodes.items()}
        return ProbeFeatures(outs[0], nodes, tuple(outs[1:]))

    def _state(
        self, graph: ParameterGraph | Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], tuple[int, ...]]:
        """Parameters and float buffers by canonical name, and the batch axes."""
        if not isinstance(graph, ParameterGraph):
            self.space.validate(graph)
        elif graph.space is not self.space and graph.space != self.space:
            raise SpaceMismatch(
                message(
                    "probes: the graph is of another weight space",
                    expected=self.space.summary(),
                    got=graph.space.summary(),
                    help="probes run one architecture; make one `Probes` for each",
                )
            )
        values = graph.values if isinstance(graph, ParameterGraph) else graph
        state = {p.name: values[p.name] for p in self.space.params}
        p = self.space.params[0]
        shape = tuple(state[p.name].shape)
        return state, shape[: len(shape) - len(p.axes)]

    def _one(
        self, fixed: dict[str, Tensor], state: dict[str, Tensor], inputs: list[Tensor]
    ) -> tuple[list[Tensor], dict[int, Tensor]]:
        """One network on one probe: its outputs, and ``(size,)`` activations of node sets."""
        outs, calls = self._called(fixed, state, inputs)
        nodes: dict[int, Tensor] = {}
        for r in self._readers:
            x = r.read(calls)
            if not r.side:  # several layers receive one input: their average
                x = x / sum(q.nodes == r.nodes and not q.side for q in self._readers)
            nodes[r.nodes] = nodes[r.nodes] + x if r.nodes in nodes else x
        return outs, dict(sorted(nodes.items()))

    def _called(
        self, fixed: dict[str, Tensor], state: dict[str, Tensor], inputs: list[Tensor]
    ) -> tuple[list[Tensor], "_Calls"]:
        """Runs the module on one probe and notes what its layers receive and return."""
        module, calls = self._skeleton[0], _Calls({})
        given = self._others | {k: x[None] for k, x in zip(self._slots, inputs, strict=True)}
        args = [given[k] for k in sorted(k for k in given if isinstance(k, int))]
        kwargs = {k: x for k, x in given.items() if isinstance(k, str)}

        def note(path: str, _: nn.Module, args: Any, out: Any) -> None:
            calls.setdefault(path, []).append((args[0], out))

        handles = [
            layer.register_forward_hook(partial(note, path))
            for path, layer in module.named_modules(remove_duplicate=False)
            if isinstance(layer, _LAYERS)
        ]
        try:
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no batching rule
                result = functional_call(
                    module, {**fixed, **state}, tuple(args), kwargs, tie_weights=False
                )
        finally:
            for handle in handles:
                handle.remove()
        return [x[0] if x.dim() and len(x) == 1 else x for x in tensors_in(result)], calls

    def _rehearsed(self) -> tuple[list[Tensor], "_Calls"]:
        """A run of zero weights on the first probe."""
        inputs = [getattr(self, name)[0].detach() for name in self._slots.values()]
        floats = [x.dtype for x in inputs if x.is_floating_point()]
        dtype = floats[0] if floats else torch.get_default_dtype()
        zero = torch.zeros((), dtype=dtype)
        state = {n: zero.expand(p.shape) for p in self.space.params for n in (p.name, *p.ties)}
        fixed = {k: _cast(getattr(self, name), dtype) for k, name in self._constants.items()}
        try:
            with torch.no_grad():
                outs, calls = self._called(fixed, state, inputs)
        except Exception as error:
            shapes = [tuple(x[None].shape) for x in inputs]
            raise SpaceMismatch(
                message(
                    f"probes: {type(self._skeleton[0]).__name__} does not run on probes",
                    got=[f"inputs of shape {s}" for s in shapes] + [str(error)],
                    help="give `example` inputs of the right shape, the first axis counting "
                    "examples; buffers that no checkpoint holds must not be on the meta device",
                )
            ) from error
        if not outs:
            raise SpaceMismatch("probes: the module returns no tensor")
        return outs, calls


# ------------------------------------------------------------------------- inputs


def _values(
    space: WeightSpace,
    count: int,
    inputs: Inputs | None,
    example: Inputs | None,
    generator: torch.Generator | None,
) -> dict[int | str, Any]:
    """First values of the probes by argument."""
    if inputs is not None:
        return _arguments(inputs)
    dtype = getattr(torch, space.params[0].dtype)
    if example is None:
        example = torch.empty(1, _vector(space), dtype=dtype, device="meta")
    out: dict[int | str, Any] = {}
    for key, x in _arguments(example).items():
        if isinstance(x, Tensor) and not x.is_floating_point():
            raise SpaceMismatch(
                message(
                    "probes: integer inputs cannot be drawn",
                    expected="their values",
                    got=f"an example of {x.dtype}",
                    help="pass tokens as `inputs`, (count, *shape)",
                )
            )
        if isinstance(x, Tensor):
            new = torch.empty(count, *x.shape[1:], dtype=x.dtype)
            out[key] = new.uniform_(-1.0, 1.0, generator=generator)
        else:
            out[key] = x
    return out


def _arguments(given: Inputs) -> dict[int | str, Any]:
    if isinstance(given, Mapping):
        return {name: x for name, x in given.items()}  # noqa: C416  (the keys' type is wider)
    return dict(enumerate([given] if isinstance(given, Tensor) else given))


def _vector(space: WeightSpace) -> int:
    """Number of input units, if the module evidently takes vectors of them."""
    structure = structure_of(space)
    sets = [i for i, n in enumerate(structure.nodes) if n.kind == "input"]
    first = [b for b in structure.blocks if b.source is not None and b.source.nodes in sets]
    if len(sets) != 1 or any(b.op != "linear" or "feature" in b.roles for b in first):
        raise SpaceMismatch(
            message(
                "probes: the shape of the inputs is unknown",
                got=f"{len(sets)} sets of input units, read by "
                f"{', '.join(sorted({b.op for b in first})) or 'nothing'}",
                help="pass the inputs given to `wspace.trace` as `example`",
            )
        )
    return structure.nodes[sets[0]].size


def _length(values: Mapping[Any, Any]) -> int:
    """The common length of all tensors."""
    sizes = [tuple(x.shape) for x in values.values() if isinstance(x, Tensor)]
    if len({s[:1] for s in sizes}) != 1 or not sizes[0] or not sizes[0][0]:
        raise SpaceMismatch(
            message(
                "probes: the inputs do not say how many probes there are",
                expected="tensors (count, *shape) with one count, at least 1",
                got=[f"shape {s}" for s in sizes] or "no tensor",
            )
        )
    return sizes[0][0]


def _looped(run: Callable[..., Any], in_dims: tuple[int | None, ...]) -> Callable[..., Any]:
    """`torch.vmap` as a loop, for functions that return a list and a dict of tensors."""

    def loop(*args: Any) -> Any:
        mapped = [x for x, d in zip(args, in_dims, strict=True) if d is not None]
        length = len(tree_leaves(mapped)[0])
        rows = [
            run(*(
                x if d is None else tree_map_only(Tensor, lambda t, i=i: t[i], x)
                for x, d in zip(args, in_dims, strict=True)
            ))
            for i in range(length)
        ]  # fmt: skip
        outs = [torch.stack(x) for x in zip(*(row[0] for row in rows), strict=True)]
        keys = rows[0][1]
        return outs, {n: torch.stack([row[1][n] for row in rows]) for n in keys}

    return loop


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _without_weights(module: nn.Module, space: WeightSpace) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy of a module that has no weights, in evaluation mode, and the buffers it needs."""
    memo: dict[int, Any] = {}
    constants: dict[str, Tensor] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        if name not in space.by_name:
            raise SpaceMismatch(
                message(
                    f"probes: parameter {name!r} of the module is not in the weight space",
                    help="pass the module that the space was traced from",
                )
            )
    for name, b in module.named_buffers(remove_duplicate=False):
        if name in space.by_name:
            memo[id(b)] = torch.empty_like(b, device="meta")
        elif not b.is_meta:
            constants[name] = b.detach().clone()
    return copy.deepcopy(module, memo).eval(), constants


# ------------------------------------------------------------------- activations

_Calls = dict[str, list[tuple[Any, Any]]]
"""By path of a layer, what it received and returned, for each of its calls."""

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Embedding, *_CONV, *_TRANSPOSED)


@dataclass(frozen=True, eq=False)
class _Reader:
    """Reads activations of one node set off one parameter's layers.

    Attributes:
        nodes: Node set.
        size: Its number of units.
        paths: The layers that hold the parameter.
        side: 0 for what they receive, 1 for what they return.
        axis: Axis of the units, from the end.
        width: Size of that axis.
        entries: Indices on that axis that are read, or None for all in the order of the units.
        units: The unit of every such index.
    """

    nodes: int
    size: int
    paths: tuple[str, ...]
    side: int
    axis: int
    width: int
    entries: Tensor | None
    units: Tensor

    def fits(self, calls: _Calls) -> bool:
        """True if the layers were called and have this axis."""
        found = [call[self.side] for path in self.paths for call in calls.get(path, [])]
        return bool(found) and all(
            isinstance(x, Tensor) and x.dim() >= -self.axis and x.shape[self.axis] == self.width
            for x in found
        )

    def read(self, calls: _Calls) -> Tensor:
        """Activations averaged over everything but units, ``(size,)``."""
        found = [call[self.side] for path in self.paths for call in calls.get(path, [])]
        means = [x.movedim(self.axis, -1).flatten(0, -2).mean(0) for x in found]
        x = torch.stack(means).mean(0) if len(means) > 1 else means[0]
        if self.entries is None:
            return x
        units = self.units.to(x.device)
        each = x[self.entries.to(x.device)]
        count = torch.bincount(units, minlength=self.size).clamp(min=1)
        return each.new_zeros(self.size).index_add(0, units, each) / count


def _readers(space: WeightSpace, module: nn.Module) -> list[_Reader]:
    """Readers of all node sets that a layer of a known kind computes, and of the inputs."""
    structure = structure_of(space)
    inputs = {i for i, n in enumerate(structure.nodes) if n.kind == "input"}
    found: list[_Reader] = []
    for p in space.params:
        blocks = [b for b in structure.blocks if b.param == p.name and b.source is not None]
        for paths, (out, into, axis) in _layers(module, (p.name, *p.ties)).items():
            for side, dim in ((1, out), (0, into)):
                if dim is None:
                    continue
                ends = [(b, b.target if side else b.source) for b in blocks]
                sets = {e.nodes for _, e in ends if e is not None}
                for nodes in sorted(sets if side else sets & inputs):
                    some = [(b, e) for b, e in ends if e is not None and e.nodes == nodes]
                    table = _table(some, dim, p.shape[dim])
                    if table is not None:
                        size = structure.nodes[nodes].size
                        full = table.tolist() == list(range(size))
                        entries = (table >= 0).nonzero()[:, 0]
                        found.append(
                            _Reader(
                                nodes,
                                size,
                                paths,
                                side,
                                axis,
                                p.shape[dim],
                                None if full else entries,
                                table[entries],
                            )
                        )
    return found


def _layers(
    module: nn.Module, names: Sequence[str]
) -> dict[tuple[str, ...], tuple[int, int | None, int]]:
    """Layers that hold a parameter, with its output and input dimension and the units' axis."""
    found: dict[tuple[int, int | None, int], list[str]] = {}
    for name in names:
        path, _, last = name.rpartition(".")
        layer = module.get_submodule(path)
        if last != "weight" or not isinstance(layer, _LAYERS):
            continue
        key = _dimensions(layer)
        if key is not None:
            found.setdefault(key, []).append(path)
    return {tuple(paths): key for key, paths in found.items()}


def _dimensions(layer: nn.Module) -> tuple[int, int | None, int] | None:
    if isinstance(layer, nn.Linear):
        return 0, 1, -1
    if isinstance(layer, nn.Embedding):
        return 1, None, -1
    if isinstance(layer, _CONV):
        return 0, 1 if layer.groups == 1 else None, 1 - layer.weight.dim()
    if isinstance(layer, _TRANSPOSED) and layer.groups == 1:
        return 1, 0, 1 - layer.weight.dim()
    return None


def _table(ends: Sequence[tuple[Block, Ends]], dim: int, width: int) -> Tensor | None:
    """The unit of every index of a parameter's dimension, -1 if none; None if that is not all."""
    table = torch.full((width,), -1)
    for block, end in ends:
        loops = [i for i, d in enumerate(block.of) if d == dim]
        if any(i not in loops and block.sizes[i] > 1 for i in end.loops):
            return None
        shape = [n if i in loops else 1 for i, n in enumerate(block.sizes)]
        units = units_of(end, block.sizes).expand(shape).reshape(-1)
        places = torch.arange(*block.window[dim])
        known = table[places]
        if len(places) != len(units) or bool(((known >= 0) & (known != units)).any()):
            return None
        table[places] = units
    return table if bool((table >= 0).any()) else None
