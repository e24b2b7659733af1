r"""How much each unit is worth keeping, measured with data: from gradients and activations.

Everything is summed while batches go by; no gradient and no activation is kept. The module is run
in evaluation mode and left bit for bit as it was: parameters, gradients, buffers, attributes,
modes, random generators; also when the loss raises.

Entries are summed by unit over all coupled slices, biases included: taking a unit away sets all of
them to zero. (An entry that a group holds twice, on the diagonal of a recurrent matrix, counts
twice.)
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wspace.action import shape_of
from wspace.batchnorm import Batches, moved
from wspace.errors import PruneError, message
from wspace.prune.importance.slices import (
    Scores,
    batch_of,
    check_finite,
    check_option,
    unit_sums,
    weights_of,
)
from wspace.prune.importance.weights import WeightImportance, completed
from wspace.prune.restriction import prunable
from wspace.restore import buffers_of, drawn_again, generators_of, put_back
from wspace.space import WeightSpace
from wspace.trace.observe import Key, Observer, Plan, Use
from wspace.trace.sandbox import attributes_restored, dense_experts, evaluation_mode
from wspace.trace.sites import CONTRACTION, NONLINEARITY

Loss = Callable[[nn.Module, Any], Tensor]
"""(the module, one batch) → its loss, a scalar."""
Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]
Absolute = Literal["unit", "entry"]
Estimate = Literal["fisher", "hutchinson"]
Statistic = Literal["mean_abs", "rms"]


@dataclass(frozen=True)
class Taylor:
    r"""First-order change of the loss when a unit is taken away.

    With :math:`g_b` the gradient of the loss on batch b, the mean over batches of

    - ``"unit"``: :math:`|\sum_{w \in u} g_b(w)\, w|`, the change to first order;
    - ``"entry"``: :math:`\sum_{w \in u} |g_b(w)\, w|`, its upper bound, in which nothing cancels.

    Absolute values are taken batch by batch, since the mean gradient of a trained network is near
    zero. For that of the whole data, give it as one batch.

    Attributes:
        batches: Batches, or a function that gives them anew; all count equally.
        loss: Called with the module and a batch; returns a scalar.
        absolute: Where absolute values are taken.

    References:
        Molchanov et al. (2019), Importance Estimation for Neural Network Pruning, equation 8 (there
        squared). arXiv:1906.10771
    """

    batches: Batches
    loss: Loss
    absolute: Absolute = "unit"

    def __post_init__(self) -> None:
        check_option("Taylor", "absolute", self.absolute, get_args(Absolute))

    def __call__(self, module: nn.Module, space: WeightSpace) -> Scores:
        """Scores of a module.

        Args:
            module: A module of the space, with real weights; left as it was.
            space: Its weight space.

        Returns:
            Prunable group → ``(*sizes of over, size)``, float64.

        Raises:
            PruneError: If there are no batches, the loss is not a scalar that depends on a
                parameter, or weights, loss or gradients are not finite.
            SpaceMismatch: If the module is not of this space.
        """  # noqa: DOC502 (helpers raise)
        entry = self.absolute == "entry"
        found: Scores = {}
        with _lent("Taylor", module, space, self.batches) as run:
            count = 0
            for loss in run(self.batches, self.loss):
                change = run.times_weights(run.gradients(loss))
                if entry:
                    change = {name: x.abs() for name, x in change.items()}
                for group, x in run.totals(change).items():
                    found[group] = found.get(group, 0) + x.abs()
                count += 1
        return _mean("Taylor", found, count, run.weights, space)


@dataclass(frozen=True)
class HessianDiagonal:
    r"""Second-order change of the loss when a unit is taken away, by the Hessian's diagonal.

    :math:`I_u = \sum_{w \in u} \tfrac12 h(w)\, w^2`, where h is, as a mean over batches,

    - ``"fisher"``: the empirical Fisher information :math:`g_b(w)^2`, from the gradient of each
      batch: for the usual one, of examples, give batches of one. Never negative;
    - ``"hutchinson"``: the Hessian's own, by an estimate without bias of all :math:`h(w)\, w^2`,
      :math:`zw \odot H (zw)` with random signs z; exact where the Hessian is diagonal. (The weights
      stand inside, so that noise does not depend on the scale of units either.) It needs second
      derivatives, is noisy, and is negative where the loss curves down.

    Attributes:
        batches: As for `Taylor`.
        loss: As for `Taylor`.
        estimate: Where the diagonal comes from.
        samples: Draws of z for every batch.
        generator: For z, on the CPU; torch's own if None, which is put back afterwards.

    References:
        LeCun, Denker, Solla (1989), Optimal Brain Damage, equation 5 (saliency of single weights).
        Bekas, Kokiopoulou, Saad (2007), An estimator for the diagonal of a matrix.
    """

    batches: Batches
    loss: Loss
    estimate: Estimate = "fisher"
    samples: int = 1
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_option("HessianDiagonal", "estimate", self.estimate, get_args(Estimate))
        if self.samples < 1:
            raise PruneError(
                message("HessianDiagonal: too few samples", expected="at least 1",
                        got=f"{self.samples}")
            )  # fmt: skip

    def __call__(self, module: nn.Module, space: WeightSpace) -> Scores:
        """Scores of a module.

        Args:
            module: A module of the space, with real weights; left as it was.
            space: Its weight space.

        Returns:
            Prunable group → ``(*sizes of over, size)``, float64.

        Raises:
            PruneError: As for `Taylor`, or if a second derivative is needed and there is none.
            SpaceMismatch: If the module is not of this space.
        """  # noqa: DOC502 (helpers raise)
        found: Scores = {}
        fisher = self.estimate == "fisher"
        with _lent("HessianDiagonal", module, space, self.batches) as run:
            count = 0
            for loss in run(self.batches, self.loss):
                for saliency in self._fisher(run, loss) if fisher else self._hutchinson(run, loss):
                    for group, x in run.totals(saliency).items():
                        found[group] = found.get(group, 0) + x / 2
                    count += 1
        return _mean("HessianDiagonal", found, count, run.weights, space)

    def _fisher(self, run: "_Run", loss: Tensor) -> Iterator[dict[str, Tensor]]:
        yield {n: x.square() for n, x in run.times_weights(run.gradients(loss)).items()}

    def _hutchinson(self, run: "_Run", loss: Tensor) -> Iterator[dict[str, Tensor]]:
        first = run.gradients(loss, again=True)
        for _ in range(self.samples):
            signed = run.times_weights({n: self._signs(x) for n, x in first.items()})
            along = torch.stack([(first[n] * x).sum() for n, x in signed.items()]).sum()
            if along.requires_grad:
                with _differentiable():
                    second = run.gradients(along, kept=True)
                yield {n: x * second[n] for n, x in signed.items()}
            else:  # the loss is linear
                yield {n: torch.zeros_like(x) for n, x in signed.items()}

    def _signs(self, like: Tensor) -> Tensor:
        signs = torch.empty(like.shape).bernoulli_(0.5, generator=self.generator) * 2 - 1
        return signs.to(like.device, like.dtype)


@dataclass(frozen=True)
class ActivationNorm:
    r"""Size of a unit's activations: the mean of :math:`|a|`, or the root of that of :math:`a^2`.

    Over all samples (examples, tokens, pixels) of all batches, then over the results that show the
    group: see `wspace.trace.observe.observe` for which those are.

    Attributes:
        batches: Inputs, or a function that gives them anew. Moved to the module's device.
        statistic: ``"mean_abs"`` or ``"rms"``.
        kinds: Kinds of results that are read, by preference all of these, else what there is.
        most: Results per group at most; None for all.
        inputs: Gives the positional and keyword inputs of a batch. By default a dict is inputs by
            name, of a tuple or list the first is the input, anything else is the input.
        otherwise: Scores of groups that no activation shows: an importance of weights, or one
            number. An error if None.

    References:
        Hu et al. (2016), Network Trimming, section 3.1, where the share of zeros stands in place of
        the size. arXiv:1607.03250
    """

    batches: Batches
    statistic: Statistic = "mean_abs"
    kinds: Sequence[str] = (NONLINEARITY, CONTRACTION)
    most: int | None = 4
    inputs: Callable[[Any], Inputs] | None = None
    otherwise: WeightImportance | float | None = None

    def __post_init__(self) -> None:
        check_option("ActivationNorm", "statistic", self.statistic, get_args(Statistic))

    def __call__(self, module: nn.Module, space: WeightSpace) -> Scores:
        """Scores of a module.

        Args:
            module: A module of the space, with real weights; left as it was.
            space: Its weight space.

        Returns:
            Prunable group → ``(*sizes of over, size)``, float64.

        Raises:
            PruneError: If there are no batches, activations are not finite, or no activation shows
                a group and `otherwise` is None.
            SpaceMismatch: If the module is not of this space.
            TraceError: If the module cannot be run.
        """  # noqa: DOC502 (helpers raise)
        observer = Observer(space, groups=[*prunable(space)], kinds=self.kinds, most=self.most)
        sums: dict[Key, tuple[Tensor, int]] = {}
        weights = weights_of(module)
        batch_of(weights, space)
        count = 0
        with _as_it_was(module, self.batches):
            for batch in _each(self.batches):
                args, kwargs = (self.inputs or _inputs_of)(moved(batch, _device(module)))
                for key, (x, samples) in self._seen(observer, module, args, kwargs).items():
                    y, before = sums.get(key, (0, 0))
                    sums[key] = y + x, before + samples
                count += 1
        _some("ActivationNorm", count)
        parts: dict[str, list[Tensor]] = {}
        for key, (x, samples) in sums.items():
            if samples:
                mean = x / samples
                parts.setdefault(key[0], []).append(
                    mean.sqrt() if self.statistic == "rms" else mean
                )
        found = {group: torch.stack(xs).mean(0) for group, xs in parts.items()}
        return completed("ActivationNorm", found, self.otherwise, weights, space)

    def _seen(
        self,
        observer: Observer,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> dict[Key, tuple[Tensor, int]]:
        """Sums over the samples of one batch, and how many these are, by site."""
        found: dict[Key, tuple[Tensor, int]] = {}

        def use(plan: Plan) -> Use:
            found.clear()

            def add(i: int, x: Tensor) -> None:
                y = x.detach().double()
                y = y.square() if self.statistic == "rms" else y.abs()
                shape = shape_of(observer.space.groups[plan.keys[i][0]], observer.space)
                found[plan.keys[i]] = y.sum(0).expand(shape).clone(), len(x)

            return add

        observer.run(module, args, kwargs, use)
        return found


# ---------------------------------------------------------------------------- gradients


class _Run:
    """Losses of a module and their gradients for all parameters of a space."""

    def __init__(self, name: str, module: nn.Module, space: WeightSpace) -> None:
        named = dict(module.named_parameters(remove_duplicate=False))
        self.name, self.module = name, module
        self.weights = weights_of(module)
        self.space = space
        self.parameters = {
            p.name: named[p.name]
            for p in space.params
            if p.name in named and (named[p.name].is_floating_point() or named[p.name].is_complex())
        }

    def __call__(self, batches: Batches, loss: Loss) -> Iterator[Tensor]:
        """The loss of every batch, a scalar with a graph."""
        for batch in _each(batches):
            found = cast("object", loss(self.module, batch))
            if not isinstance(found, Tensor) or found.numel() != 1:
                got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
                raise PruneError(
                    message(f"{self.name}: the loss is not one number, a tensor", got=got,
                            help="take its mean")
                )  # fmt: skip
            if not bool(found.isfinite().all()):
                check_finite(self.name, {"loss": found.detach()}, self.weights, self.space)
            if not found.requires_grad:
                raise PruneError(
                    message(
                        f"{self.name}: the loss does not depend on any parameter",
                        expected="a loss that gradients can be taken of",
                        help="compute it from the module's output, without no_grad or detach",
                    )
                )
            yield found.reshape(())

    def gradients(
        self, of: Tensor, *, again: bool = False, kept: bool = False
    ) -> dict[str, Tensor]:
        """Gradients of a scalar by name, zero for parameters that it does not depend on."""
        found = cast(
            "Sequence[Tensor | None]",
            torch.autograd.grad(
                of,
                list(self.parameters.values()),
                create_graph=again,
                retain_graph=again or kept,
                allow_unused=True,
            ),
        )
        return {
            name: _real(torch.zeros_like(x) if g is None else g.to_dense())
            for (name, x), g in zip(self.parameters.items(), found, strict=True)
        }

    def times_weights(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Numbers per entry times the weights."""
        return {n: values[n].detach() * _real(p.detach()) for n, p in self.parameters.items()}

    def totals(self, values: Mapping[str, Tensor]) -> Scores:
        """Sums over all slices of every unit, ``(*over, size)``; zeros where a group has none."""
        zero = torch.zeros((), device=_device(self.module))
        every = {p.name: zero.expand(p.shape) for p in self.space.params if not p.buffer}
        for name, x in values.items():
            complex_ = self.parameters[name].is_complex()
            every[name] = torch.view_as_complex(x.contiguous()) if complex_ else x
        found: Scores = {}
        for group, slices in unit_sums(every, self.space).items():
            shape = shape_of(self.space.groups[group], self.space)
            none = zero.double().expand(shape)
            found[group] = sum(slices[1:], slices[0]) if slices else none
        return found


def _real(x: Tensor) -> Tensor:
    """Real and imaginary parts as weights of their own: ``(*shape, 2)``."""
    return torch.view_as_real(x) if x.is_complex() else x


@contextmanager
def _differentiable() -> Generator[None]:
    """Context in which an operator without a second derivative is an error of ours."""
    try:
        yield
    except RuntimeError as error:
        if "derivative" not in str(error) or "not implemented" not in str(error):
            raise
        raise PruneError(
            message(
                "HessianDiagonal: an operator of the module has no second derivative",
                got=str(error),
                help="estimate='fisher' needs first derivatives only",
            )
        ) from error


@contextmanager
def _lent(name: str, module: nn.Module, space: WeightSpace, batches: Batches) -> Generator[_Run]:
    """A module that gradients can be taken of, for all of its parameters; put back afterwards."""
    run = _Run(name, module, space)
    batch_of(run.weights, space)
    check_finite(name, {}, run.weights, space)
    frozen = [x for x in run.parameters.values() if not x.requires_grad and x.is_leaf]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_as_it_was(module, batches))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # fused kernels have no second derivative
        if any(isinstance(m, nn.RNNBase) for m in module.modules()):  # cuDNN's train only
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        try:
            for x in frozen:
                x.requires_grad_(True)
            yield run
        finally:
            for x in frozen:
                x.requires_grad_(False)


@contextmanager
def _as_it_was(module: nn.Module, batches: Batches) -> Generator[None]:
    """A module in evaluation mode; buffers, attributes, modes and generators are put back."""
    buffers = buffers_of(module)
    with ExitStack() as stack:
        stack.callback(put_back, buffers)
        stack.enter_context(attributes_restored(module))
        stack.enter_context(evaluation_mode(module))
        stack.enter_context(dense_experts(module))
        stack.enter_context(drawn_again(module, generators_of(batches)))
        yield


# ------------------------------------------------------------------------------- batches


def _each(batches: Batches) -> Iterable[Any]:
    return batches() if callable(batches) else batches


def _inputs_of(batch: Any) -> Inputs:
    """Inputs of a batch: a dict by name, of a tuple or list the first, or else the batch itself."""
    if isinstance(batch, Mapping):
        return (), dict(cast("Mapping[str, Any]", batch))
    return (batch[0] if isinstance(batch, tuple | list) else batch,), {}


def _device(module: nn.Module) -> torch.device | None:
    return next((x.device for x in (*module.parameters(), *module.buffers())), None)


def _mean(
    name: str, found: Scores, count: int, weights: Mapping[str, Tensor], space: WeightSpace
) -> Scores:
    _some(name, count)
    check_finite(name, found, weights, space)
    return {group: x / count for group, x in found.items()}


def _some(name: str, count: int) -> None:
    if not count:
        raise PruneError(
            message(f"{name}: no batches", expected="at least one",
                    help="batches=[batch, ...], or a function that gives batches anew: an iterator "
                    "can be gone through only once")
        )  # fmt: skip
