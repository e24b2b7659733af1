"""The functional dimension of a network: in how many directions its weights change its function."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils._pytree import tree_map_only

from wspace.action import State, shape_of
from wspace.align.distances import arguments
from wspace.batchnorm import moved
from wspace.errors import MeasureError, message
from wspace.restore import drawn_again
from wspace.space import WeightSpace
from wspace.trace.sandbox import attributes_restored, evaluation_mode, tensors_in


@dataclass(frozen=True)
class FunctionalDimension:
    """The rank of the Jacobian of a network's outputs in its parameters, and what it rests on.

    Attributes:
        rank: Singular values above `tolerance`.
        params: Number of parameters that were varied, tied ones once.
        bound: What the rank cannot exceed for any inputs (`dimension_bound`); None without a space.
        growth: Pairs of a number of inputs and the rank on these: if it still grows at the end,
            more inputs are needed.
        singular_values: Of the Jacobian, the largest first.
        tolerance: ``max(outputs, params) * eps`` times the largest singular value: what rounding
            alone may leave where the exact value is 0.
    """

    rank: int
    params: int
    bound: int | None
    growth: tuple[tuple[int, int], ...]
    singular_values: Tensor = field(repr=False)
    tolerance: float

    @property
    def gap(self) -> float:
        """Ratio of the least singular value that counts to the largest that does not.

        The rank is beyond doubt if it is large, and a matter of tolerance if it is near 1.
        """
        s = self.singular_values
        if not 0 < self.rank < len(s) or s[self.rank] == 0:
            return float("inf")
        return float(s[self.rank - 1] / s[self.rank])


def functional_dimension(
    module: nn.Module,
    inputs: Tensor | Iterable[Any],
    *,
    state: State | None = None,
    space: WeightSpace | None = None,
    names: Sequence[str] | None = None,
    rows: int = 8,
    chunk: int = 64,
) -> FunctionalDimension:
    r"""In how many directions the parameters change what a network computes on given inputs.

    The rank of :math:`\partial f_\theta(x_1 … x_m) / \partial \theta` (batch functional dimension).
    For enough generic inputs it is the functional dimension at :math:`\theta`; symmetries that are
    continuous, such as scaling a ReLU unit, lower it, and so do units that are never active.

    Computed in float64. The Jacobian is never held: its blocks are reduced one after another to a
    triangular factor (Golub and Van Loan, section 5.2), whose singular values are the Jacobian's to
    full precision, which those of its Gram matrix are not. Memory is :math:`O(n^2)`, `n` the number
    of outputs or of parameters, whichever is less, and one block: `rows` inputs and all parameters,
    or, if there are more parameters than outputs, one tensor and all inputs.

    Args:
        module: Evaluated, and left as it was.
        inputs: One batch as a tensor, which is cut; or batches, each taken whole (a dict of
            arguments by name, of a tuple or list the first, or else the only argument).
        state: Parameters and buffers; the module's own if None.
        space: Its weight space, for the bound.
        names: Parameters to vary; all of floating point if None.
        rows: Inputs of a block, if `inputs` is a tensor.
        chunk: How many outputs are differentiated at once.

    Returns:
        The rank, and how it grew with the inputs.

    Raises:
        MeasureError: If there are no inputs, or a name is not a parameter.

    References:
        Grigsby, Lindsey, Meyerhoff, Wu (2022), Functional dimension of feedforward ReLU neural
        networks. arXiv:2209.04036
    """
    if isinstance(inputs, Tensor):
        batches: list[Any] = list(inputs.split(rows))
    else:
        batches = list(inputs)
    fixed, varied = _parts(module, state, names)
    device = next(iter(varied.values())).device
    batches = [tree_map_only(Tensor, _double, moved(x, device)) for x in batches]
    with drawn_again(module), evaluation_mode(module), attributes_restored(module):
        jacobian = _Jacobian(module, fixed, varied, chunk)
        sizes = [jacobian.outputs(batch) for batch in batches]
        if not sum(sizes):
            raise MeasureError(
                message("functional_dimension: no inputs", help="give at least one batch")
            )
        columns = sum(x.numel() for x in varied.values())
        if columns <= sum(sizes):
            measured = _by_rows(jacobian, batches)
        else:
            measured = _by_tensors(jacobian, batches, sizes)
    marks = _counts(batches)
    tolerance = max(columns, sum(sizes)) * torch.finfo(torch.float64).eps
    growth: list[tuple[int, int]] = []
    values = torch.zeros(0)
    for at, values in measured:
        growth.append((sum(marks[:at]), int((values > tolerance * values[0]).sum())))
    bound = None if space is None else dimension_bound(space, names)
    top = float(values[0])
    return FunctionalDimension(
        growth[-1][1], columns, bound, tuple(growth), values, tolerance * top
    )


def dimension_bound(space: WeightSpace, names: Sequence[str] | None = None) -> int:
    """Number of parameters less that of units whose scale is free: no rank is larger.

    Each unit of a scale symmetry that moves parameters only is a direction in which the function
    stays; where it moves statistics too, these are held, so that it is none.

    Args:
        space: The weight space.
        names: The parameters that vary; all if None. A symmetry counts if it moves no others.

    Returns:
        The bound.
    """
    varied = [p for p in space.params if not p.buffer and p.dtype.startswith(("float", "bfloat"))]
    if names is not None:
        varied = [p for p in varied if {p.name, *p.ties} & set(names)]
    free = {p.name for p in varied}
    scales = [g for g in space.gauges if g.kind == "scale" and {s[0] for s in g.slots} <= free]
    lost = sum(prod(shape_of(space.all_groups[g.group], space)) for g in scales)
    return sum(p.numel for p in varied) - lost


# ------------------------------------------------------------------------------- blocks


class _Jacobian:
    """Derivatives of a module's outputs in its parameters, for one batch at a time."""

    def __init__(
        self, module: nn.Module, fixed: State, varied: dict[str, Tensor], chunk: int
    ) -> None:
        self.module, self.fixed, self.varied, self.chunk = module, fixed, varied, chunk

    def _call(self, varied: Mapping[str, Tensor], batch: Any) -> Tensor:
        args, kwargs = arguments(batch)
        held = {n: x.clone() for n, x in self.fixed.items()}  # a pass may write into buffers
        found = tensors_in(functional_call(self.module, {**held, **varied}, args, kwargs))
        return torch.cat([x.reshape(-1) for x in found if x.is_floating_point()])

    def outputs(self, batch: Any) -> int:
        with torch.no_grad():
            return self._call(self.varied, batch).numel()

    def block(self, batch: Any, names: Iterable[str]) -> Tensor:
        """Derivatives in these parameters: ``(outputs, entries)``."""
        some = {n: self.varied[n] for n in names}
        rest = {n: x for n, x in self.varied.items() if n not in some}

        def f(x: dict[str, Tensor]) -> Tensor:
            return self._call({**rest, **x}, batch)

        found: Any = jacrev(f, chunk_size=self.chunk)(some)
        return torch.cat([x.detach().flatten(1) for x in found.values()], 1)


Measured = Iterator[tuple[int, Tensor]]
"""Numbers of batches, and the singular values of the Jacobian on these."""


def _by_rows(jacobian: _Jacobian, batches: Sequence[Any]) -> Measured:
    triangle: Tensor | None = None
    for i, batch in enumerate(batches, 1):
        triangle = _reduced(triangle, jacobian.block(batch, jacobian.varied))
        if _marked(i, len(batches)):
            yield i, torch.linalg.svdvals(triangle)


def _by_tensors(jacobian: _Jacobian, batches: Sequence[Any], sizes: Sequence[int]) -> Measured:
    """As `_by_rows`, of the transpose: its columns are outputs, so the first ones are a batch's."""
    triangle: Tensor | None = None
    for name in jacobian.varied:
        block = torch.cat([jacobian.block(batch, [name]) for batch in batches])
        triangle = _reduced(triangle, block.mT)
    if triangle is not None:
        for i in range(1, len(batches) + 1):
            if _marked(i, len(batches)):
                yield i, torch.linalg.svdvals(triangle[:, : sum(sizes[:i])])


def _reduced(triangle: Tensor | None, block: Tensor) -> Tensor:
    """The triangular factor of everything so far and another block of rows."""
    rows = block if triangle is None else torch.cat([triangle, block])
    return torch.linalg.qr(rows, mode="r").R if rows.shape[0] > rows.shape[1] else rows


def _marked(i: int, last: int) -> bool:
    """True for the last and about four counts in each doubling."""
    return i == last or i % max(1, 1 << (i.bit_length() - 3) if i > 4 else 1) == 0


def _counts(batches: Sequence[Any]) -> list[int]:
    """Number of inputs of each batch: the length of its first tensor."""
    return [len(next(x for x in _leaves(batch) if x.dim())) for batch in batches]


def _leaves(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for x in batch.values():
            yield from _leaves(x)
    elif isinstance(batch, tuple | list):
        for x in batch:
            yield from _leaves(x)


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _parts(
    module: nn.Module, state: State | None, names: Sequence[str] | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is held and what is varied, in float64; each tied tensor under one name only."""
    own = {n: x.detach() for n, x in module.named_parameters()}
    buffers = {n: x.detach() for n, x in module.named_buffers()}
    same: dict[int, str] = {}
    for n, x in module.named_parameters(remove_duplicate=False):
        same.setdefault(id(x), n)
    first = {n: same[id(x)] for n, x in module.named_parameters(remove_duplicate=False)}
    values = own | buffers
    for n, x in (state or {}).items():
        if first.get(n, n) in values:
            values[first.get(n, n)] = x.detach()
    chosen = own if names is None else {first.get(n, n) for n in names}
    wrong = [n for n in chosen if n not in own or not own[n].is_floating_point()]
    if names is not None and wrong or not chosen:
        raise MeasureError(
            message("functional_dimension: not parameters of floating point",
                    got=wrong or "none", expected=f"some of {list(own)}")
        )  # fmt: skip
    varied = {n: _double(x) for n, x in values.items() if n in chosen and n not in wrong}
    return {n: _double(x) for n, x in values.items() if n not in varied}, varied
