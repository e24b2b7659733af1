"""A module for a plain checkpoint: a chain of layers known by names and shapes alone."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wspace.errors import CheckpointError
from wspace.io.fit import load_into
from wspace.io.layout import Checkpoint, State, text

Activation = Literal["relu", "tanh", "gelu", "sin", "silu", "leaky_relu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "sin": torch.sin,
    "silu": F.silu,
    "leaky_relu": F.leaky_relu,
}
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # by spatial axes
LEAVES = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
SIDE = 8  # of an image that may have any size
STEPS = 20_000  # of the search for an order
HELP = "name the code that built it: py:package.module:factory, or hf:folder"


def module_from_checkpoint(
    state: Mapping[str, Tensor],
    *,
    activation: Activation = "relu",
    order: Sequence[str] | None = None,
) -> tuple[nn.Module, tuple[Tensor]]:
    """A module that a checkpoint without code fits: a chain of linear, conv and BatchNorm layers.

    Names are kept. Every layer has to take what the one before it gives; before the first linear
    layer after convolutions the image is averaged if the channels alone fit, and flattened if a
    multiple of them does. Activations follow all layers but the last, after a BatchNorm. Strides,
    poolings and paddings leave no trace in a checkpoint: convolutions keep the size of the image
    here, so the symmetry is that of the network that was trained, its outputs need not be. Skip
    connections between layers of one width leave no trace either; name the code of such a network.

    Args:
        state: The checkpoint; the values are copied.
        activation: Between the layers.
        order: Names of the layers from input to output. By default the order of the state. A
            safetensors file has lost it: there numbers count, and shapes have to decide the rest.

    Returns:
        The module in eval mode, and example inputs for it.

    Raises:
        CheckpointError: If the layers are of other kinds, or do not form one chain.
    """
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise CheckpointError(
            _text(f"unknown activation {activation!r}", expected=f"one of {known}")
        )
    layers = _layers(state)
    if order is None and isinstance(state, Checkpoint) and state.layout.kind == "safetensors":
        chain = _search(layers)
    elif order is None:
        chain = layers
    else:
        chain = _in_order(layers, order)
    if not any(layer.dims is not None for layer in chain):
        raise CheckpointError(_text("there is no linear or convolution layer", got=list(state)))
    links = _links(chain)
    module = _assemble(chain, links, ACTIVATIONS[activation])
    load_into(module, state)
    return module.eval(), (_example(chain, links),)


class Signal(NamedTuple):
    """What flows between layers: channels, and number of spatial axes (None: not known yet)."""

    width: int | None = None
    dims: int | None = None

    def __str__(self) -> str:
        kind = {None: "", 0: " features"}.get(self.dims, f" channels of a {self.dims}-d image")
        return f"{self.width}{kind}"


@dataclass(frozen=True, eq=False)
class Layer:
    """Tensors of one layer, by leaf name; `dims` is None for a BatchNorm, 0 for a linear layer."""

    name: str
    tensors: State

    @property
    def first(self) -> Tensor:
        """Tensor that tells the sizes."""
        return self.tensors["running_mean" if self.dims is None else "weight"]

    @property
    def dims(self) -> int | None:
        """Number of spatial axes; None for a BatchNorm."""
        return None if "running_mean" in self.tensors else self.tensors["weight"].ndim - 2

    @property
    def inputs(self) -> int:
        """Features or channels that the layer takes."""
        return self.first.shape[0 if self.dims is None else 1]

    @property
    def outputs(self) -> int:
        """Features or channels that it gives."""
        return self.first.shape[0]

    @property
    def kernel(self) -> tuple[int, ...]:
        """Size of the kernel; empty unless it is a convolution."""
        return tuple(self.first.shape[2:])

    def __str__(self) -> str:
        kind = {None: "BatchNorm", 0: "Linear"}.get(self.dims, f"Conv{self.dims}d")
        return f"{self.name} ({kind} {tuple(self.first.shape)})"


def _layers(state: Mapping[str, Tensor]) -> list[Layer]:
    found: dict[str, State] = {}
    for name, tensor in state.items():
        found.setdefault(name.rpartition(".")[0], {})[name.rpartition(".")[2]] = tensor
    bad = [f"{name}: {fault}" for name, item in found.items() if (fault := _fault(item))]
    bad += [
        f"{inner}: lies inside of the layer {outer!r}"
        for outer in found
        for inner in found
        if inner != outer and (not outer or inner.startswith(f"{outer}."))
    ]
    if bad or not found:
        raise CheckpointError(
            _text(
                "not a plain chain of layers",
                expected="linear and convolution layers and whole BatchNorms",
                got=bad or "an empty checkpoint",
            )
        )
    return [Layer(name, tensors) for name, tensors in found.items()]


def _fault(tensors: State) -> str:
    """Why these tensors are not those of a layer that is known here; empty if they are."""
    if extra := tensors.keys() - LEAVES:
        return f"holds {', '.join(sorted(extra))}"
    if "running_mean" in tensors or "running_var" in tensors:
        pairs = [{"running_mean", "running_var"}, {"weight", "bias"}]
        whole = all(len(pair & tensors.keys()) != 1 for pair in pairs)
        flat = all(tensor.ndim == 1 for name, tensor in tensors.items() if name[:3] != "num")
        return "" if whole and flat else "is not a whole BatchNorm"
    if "weight" not in tensors:
        return "has no weight"
    weight = tensors["weight"]
    if not weight.is_floating_point():
        return f"has weights of {weight.dtype}"
    if weight.ndim < 2:
        return "is a norm or activation whose kind the shapes do not tell"
    return "" if weight.ndim <= 5 else f"has a weight with {weight.ndim} axes"


# --- the chain ------------------------------------------------------------------------------------


def _next(signal: Signal, layer: Layer) -> Signal | None:
    """What the layer makes of the signal; None if it cannot take it."""
    free = signal.width is None
    if layer.dims is None:
        return Signal(layer.outputs, signal.dims) if free or signal.width == layer.inputs else None
    if layer.dims == 0:
        spatial = bool(signal.dims) and layer.inputs % (signal.width or 1) == 0
        fits = free or signal.width == layer.inputs or spatial
    else:
        depthwise = layer.inputs == 1 and signal.width == layer.outputs
        fits = signal.dims in {None, layer.dims} and (
            free or signal.width == layer.inputs or depthwise
        )
    return Signal(layer.outputs, layer.dims) if fits else None


def _links(chain: list[Layer]) -> list[Signal]:
    """What each layer of the chain is given."""
    signal = Signal()
    links: list[Signal] = []
    for before, layer in zip([None, *chain], chain, strict=False):
        links.append(signal)
        after = _next(signal, layer)
        if after is None:
            raise CheckpointError(
                _text(
                    f"the link {before} → {layer} does not fit",
                    expected=f"a layer that takes {signal}",
                    got=f"one that takes {layer.inputs}",
                )
            )
        signal = after
    dims = next(layer.dims for layer in chain if layer.dims is not None)
    return [link._replace(dims=dims) if link.dims is None else link for link in links]


def _in_order(layers: list[Layer], order: Sequence[str]) -> list[Layer]:
    known = {layer.name: layer for layer in layers}
    if sorted(order) != sorted(known):
        expected = f"each of {', '.join(known)} once"
        raise CheckpointError(
            _text("`order` does not name the layers", expected=expected, got=", ".join(order))
        )
    return [known[name] for name in order]


def _search(layers: list[Layer]) -> list[Layer]:
    """The only order in which the layers form a chain and numbers in their names count up."""
    layers = sorted(layers, key=lambda layer: _pieces(layer.name))
    earlier = {
        layer.name: {other.name for other in layers if _counts_up(other.name, layer.name)}
        for layer in layers
    }
    budget = iter(range(STEPS))

    def extend(chain: list[Layer], signal: Signal) -> Iterator[list[Layer]]:
        done = {layer.name for layer in chain}
        if len(done) == len(layers):
            yield chain
        for layer in layers:
            if layer.name in done or not earlier[layer.name] <= done:
                continue
            if next(budget, None) is None:
                return
            if after := _next(signal, layer):
                yield from extend([*chain, layer], after)

    found = [chain for chain, _ in zip(extend([], Signal()), range(2), strict=False)]
    if len(found) == 1 and next(budget, None) is not None:
        return found[0]
    if not found and next(budget, None) is not None:
        return layers  # its broken link is reported
    raise CheckpointError(
        _text(
            "the order of the layers is not known (a safetensors file does not keep it)",
            expected="names or shapes that allow one order only",
            got=[", ".join(layer.name for layer in chain) for chain in found],
            help="give it: order=(...), or load the .pt file",
        )
    )


def _pieces(name: str) -> list[tuple[str, int]]:
    """Text and numbers in turn, as sort keys: `fc10` comes after `fc9`."""
    return [("", int(item)) if item.isdigit() else (item, 0) for item in re.split(r"(\d+)", name)]


def _counts_up(a: str, b: str) -> bool:
    """Whether the names first differ in a number, which is lower in `a`."""
    for left, right in zip(_pieces(a), _pieces(b), strict=False):
        if left != right:
            return left[0] == right[0] == "" and left[1] < right[1]
    return False


# --- the module -----------------------------------------------------------------------------------


class Step(NamedTuple):
    """A layer in a chain, and what happens before it."""

    name: str
    activate: bool
    pool: Literal["", "mean", "flatten"]


class Chain(nn.Module):
    """Layers in a row, under the names of a checkpoint."""

    def __init__(self, steps: list[Step], activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._steps = steps
        self._activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Output of the last layer."""
        for step in self._steps:
            if step.activate:
                x = self._activation(x)
            if step.pool == "mean":
                x = x.mean(dim=tuple(range(2, x.ndim)))
            elif step.pool == "flatten":
                x = x.flatten(1)
            x = self.get_submodule(step.name)(x)
        return x


def _assemble(
    chain: list[Layer], links: list[Signal], activation: Callable[[Tensor], Tensor]
) -> nn.Module:
    if not chain[0].name:
        return _build(chain[0], links[0])
    steps: list[Step] = []
    started = False  # nothing to activate before the first weight
    for layer, link in zip(chain, links, strict=True):
        pool: Literal["", "mean", "flatten"] = ""
        if layer.dims == 0 and link.dims:
            pool = "mean" if layer.inputs == link.width else "flatten"
        steps.append(Step(layer.name, started and layer.dims is not None, pool))
        started = started or layer.dims is not None
    module = Chain(steps, activation)
    for layer, link in zip(chain, links, strict=True):
        parent: nn.Module = module
        *outer, last = layer.name.split(".")
        try:
            for part in outer:
                if part not in dict(parent.named_children()):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, _build(layer, link))
        except KeyError as error:
            raise CheckpointError(
                _text(f"{layer.name!r} cannot be the name of a layer", got=str(error))
            ) from error
    return module


def _build(layer: Layer, link: Signal) -> nn.Module:
    """The layer without values."""
    bias, dtype = "bias" in layer.tensors, layer.first.dtype
    if layer.dims is None:
        norm = NORMS[link.dims or 0](layer.outputs, affine=bias, device="meta", dtype=dtype)
        if "num_batches_tracked" not in layer.tensors:
            norm.num_batches_tracked = None
        return norm.to_empty(device="cpu")
    if layer.dims == 0:
        linear = nn.Linear(layer.inputs, layer.outputs, bias, device="meta", dtype=dtype)
        return linear.to_empty(device="cpu")
    groups = (link.width or layer.inputs) // layer.inputs
    conv = CONVS[layer.dims - 1](
        layer.inputs * groups,
        layer.outputs,
        layer.kernel,  # pyright: ignore[reportArgumentType]  # its length is that of the class
        padding=tuple((size - 1) // 2 for size in layer.kernel),  # pyright: ignore[reportArgumentType]
        groups=groups,
        bias=bias,
        device="meta",
        dtype=dtype,
    )
    return conv.to_empty(device="cpu")


def _example(chain: list[Layer], links: list[Signal]) -> Tensor:
    """Two inputs, of the size that the flattening asks for."""
    dims = links[0].dims or 0
    size = [SIDE] * dims
    for layer, link in zip(chain, links, strict=True):
        if layer.dims == 0 and link.dims and layer.inputs != link.width:
            size = _sides(layer.inputs // (link.width or 1), dims)
    for layer in chain:  # a kernel of even size takes one off
        size = [
            side + (k % 2 == 0) for side, k in zip(size, layer.kernel or [1] * dims, strict=True)
        ]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, chain[0].inputs, *size, generator=generator).to(chain[0].first.dtype)


def _sides(volume: int, dims: int) -> list[int]:
    """Sides of a box of this volume, as near to a cube as they can be."""
    if dims == 1:
        return [volume]
    root = round(volume ** (1 / dims))
    side = max(n for n in range(1, root + 1) if volume % n == 0)
    return [side, *_sides(volume // side, dims - 1)]


def _text(what: str, *, expected: str = "", got: str | list[str] = "", help: str = HELP) -> str:
    return text(what, verb="module_from_checkpoint", expected=expected, got=got, help=help)
