"""`Head`: from the vector of a condition to the tensors of a target.

A head is made with options alone, and gets parameters when it is bound to the weights it has to
make. What it makes has a wanted variance at initialisation, whatever is inside: `Head.reset`.
"""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor, nn

from wspace.errors import HyperError, message
from wspace.hyper.target import Weight

SAMPLES = 128
"""Vectors of normal entries with which a head's variances are measured; fewer for large targets."""
AT_ONCE = 2**22
"""Entries that are made at once while variances are measured."""


class Head(nn.Module):
    """Base of the heads. A subclass has `build` and `make`, and `merge` if it does not add.

    Attributes:
        weights: What it makes, once bound.
        width: Length of the vectors it takes, once bound; 0 if there is no condition.
        gains: A factor for every weight, ``(len(weights),)``, by which what `make` gives is
            multiplied; a buffer.
        needs_base: True if it changes values of the target, and cannot make any.
    """

    needs_base: ClassVar[bool] = False
    weights: tuple[Weight, ...]
    width: int
    gains: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.width = (), 0
        self.register_buffer("gains", torch.ones(0))

    # ------------------------------------------------------------- for subclasses

    def build(self, generator: torch.Generator | None) -> None:
        """Makes the parameters for `weights` and `width`.

        Args:
            generator: Source of randomness.
        """
        raise NotImplementedError

    def make(self, e: Tensor) -> dict[str, Tensor]:
        """What is made of a vector, before gains.

        Args:
            e: Vectors, ``(*batch, width)``.

        Returns:
            By name of the weight, ``(*batch, *shape)``, or what `merge` takes.
        """
        raise NotImplementedError

    def merge(self, weight: Weight, made: Tensor, base: Tensor | None) -> Tensor:
        """Final values of a weight: those of the base and what was made, added.

        Args:
            weight: The weight.
            made: What `make` gave, times gain and scale.
            base: Values that are changed, ``shape``; None where there are none.

        Returns:
            Values, ``(*batch, *shape)``.
        """
        del weight
        return made if base is None else base + made

    def reset(self, variances: Mapping[str, float], generator: torch.Generator | None) -> None:
        """Sets gains so that what is made has given variances, by measuring.

        The second moment of what `make` gives is measured with vectors of normal entries of
        variance 1, which is what a condition should give at initialisation. A subclass in whose
        last map every weight has rows of its own sets these instead.

        Args:
            variances: Second moment of the entries of every weight, by name.
            generator: Source of randomness.

        Raises:
            HyperError: If zeros are made of all vectors, which no gain changes.
        """
        with torch.no_grad():
            vectors = normal_vectors(self, self.width, generator)
            total = vectors.new_zeros(len(self.weights))
            for e in vectors.split(max(1, AT_ONCE // self.numel)) if self.width else [vectors]:
                made = self.make(e)
                moments = [made[w.name].square().mean() for w in self.weights]
                total += torch.stack(moments) * (len(e) if self.width else 1)
            wanted = torch.tensor([variances[w.name] for w in self.weights]).to(total)
            moment = total / (len(vectors) if self.width else 1)
            silent = [w.name for w, m in zip(self.weights, moment.tolist(), strict=True)
                      if not m and w.numel]  # fmt: skip
            if silent:
                raise HyperError(
                    message(f"hypernetwork: {type(self).__name__} makes nothing to be scaled",
                            got=silent[:8], help="initialize before init='bias', or wider layers")
                )  # fmt: skip
            self.gains.copy_(torch.where(moment > 0, (wanted / moment).sqrt(), 1.0))

    def silence(self) -> None:
        """Sets the last map to zero, so that nothing is made until it is trained."""
        raise NotImplementedError

    # ------------------------------------------------------------------- binding

    def bind(
        self, weights: Sequence[Weight], width: int, generator: torch.Generator | None = None
    ) -> None:
        """Makes the parameters.

        Args:
            weights: What has to be made.
            width: Length of the condition's vector; 0 if there is no condition.
            generator: Source of randomness.

        Raises:
            HyperError: If the head is bound already, or there is nothing to make.
        """
        if self.weights:
            raise HyperError(
                message(
                    f"hypernetwork: {type(self).__name__} is bound already",
                    got=f"to {len(self.weights)} weights",
                    help="make a head for each hypernetwork",
                )
            )
        if not weights:
            raise HyperError("hypernetwork: no weight to generate")
        self.weights, self.width = tuple(weights), width
        self.gains = torch.ones(len(weights))
        try:
            self.build(generator)
        except BaseException:
            self.weights = ()
            raise

    @property
    def numel(self) -> int:
        """Entries that are made for one condition."""
        return sum(w.numel for w in self.weights)

    def forward(
        self, e: Tensor, base: Mapping[str, Tensor] | None = None, scale: float = 1.0
    ) -> dict[str, Tensor]:
        """Weights for a vector.

        Args:
            e: Vectors, ``(*batch, width)``.
            base: Values of the target that are changed, by name; None for none.
            scale: Factor of what is made.

        Returns:
            By name of the weight, ``(*batch, *shape)``.

        Raises:
            HyperError: If the head is not bound, or the vector has another length.
        """
        if not self.weights:
            raise HyperError(f"hypernetwork: {type(self).__name__} is not bound to weights")
        if e.shape[-1] != self.width:
            raise HyperError(
                message(
                    f"hypernetwork: {type(self).__name__} takes another vector",
                    expected=f"length {self.width}",
                    got=f"shape {tuple(e.shape)}",
                )
            )
        made = self.make(e)
        factors = (self.gains * scale).to(e.dtype).unbind()
        return {
            w.name: self.merge(w, made[w.name] * f, None if base is None else base[w.name])
            for w, f in zip(self.weights, factors, strict=True)
        }

    def extra_repr(self) -> str:
        """How much is made."""
        return f"{len(self.weights)} weights, {self.numel:,} entries" if self.weights else "unbound"


def normal_vectors(head: Head, width: int, generator: torch.Generator | None) -> Tensor:
    """Vectors as a condition gives them at initialisation.

    Args:
        head: A bound head.
        width: Length of the vectors.
        generator: Source of randomness.

    Returns:
        ``(n, width)`` with normal entries of variance 1; ``(0,)`` for no width.
    """
    if not width:
        return head.gains[:0]
    n = max(8, min(SAMPLES, 16 * AT_ONCE // head.numel))
    return torch.randn(n, width, generator=generator).to(head.gains)


def set_apart(last: nn.Linear, seen: Tensor, energy: float = 0.95) -> None:
    """Turns the rows of a last map away from what it sees alike in all parts of one target.

    Parts (chunks, rows) that one map makes from similar vectors are similar. The sums of a unit's
    weights over several of them would then vary far more than those of independent weights, and
    units whose rows are alike would die together.

    Args:
        last: The map; its rows lose the directions of the means over parts.
        seen: What it sees, ``(*conditions, parts, n)``.
        energy: Share of the means' square that is taken away, with at most half of the directions.
    """
    if seen.shape[-2] < 2:
        return
    with torch.no_grad():
        _, sizes, directions = torch.linalg.svd(
            seen.mean(-2).reshape(-1, seen.shape[-1]), full_matrices=False
        )
        shares = sizes.square().cumsum(0) / sizes.square().sum()
        rank = min(int((shares < energy).sum()) + 1, seen.shape[-1] // 2)
        gone = directions[:rank]
        last.weight.sub_(last.weight @ gone.mT @ gone)


def split(flat: Tensor, weights: Sequence[Weight]) -> dict[str, Tensor]:
    """A vector cut into tensors, one after another: views.

    Args:
        flat: ``(*batch, n)`` with n at least the entries of all weights; the rest is dropped.
        weights: What it is cut into.

    Returns:
        By name, ``(*batch, *shape)``.
    """
    sizes = [w.numel for w in weights]
    parts = flat[..., : sum(sizes)].split(sizes, -1)
    return {
        w.name: part.unflatten(-1, w.shape) if w.shape else part.squeeze(-1)
        for w, part in zip(weights, parts, strict=True)
    }


def perceptron(
    sizes: Sequence[int],
    generator: torch.Generator | None,
    *,
    activation: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Linear layers, each followed by an activation function; entries keep their second moment.

    Weights are normal with variance 2 / fan-in behind a rectified layer and 1 / fan-in in the
    first, biases zero (He et al. 2015, arXiv 1502.01852).

    Args:
        sizes: Width of the input and of every layer.
        generator: Source of randomness.
        activation: Class of the function.

    Returns:
        The layers; none if there is only one size.
    """
    layers: list[nn.Module] = []
    for k, (n, m) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        layers += [linear(n, m, (2.0 if k else 1.0) / n, generator), activation()]
    return nn.Sequential(*layers)


def linear(
    n: int, m: int, variance: float, generator: torch.Generator | None, *, bias: bool = True
) -> nn.Linear:
    """A linear layer with normal weights and a bias of zeros.

    Args:
        n: Inputs.
        m: Outputs.
        variance: Of its weights.
        generator: Source of randomness.
        bias: Whether it has a bias.

    Returns:
        The layer.
    """
    with torch.random.fork_rng([]):  # its own first values are not used
        layer = nn.Linear(n, m, bias=bias)
    with torch.no_grad():
        layer.weight.normal_(0.0, sqrt(variance), generator=generator)
        if bias:
            layer.bias.zero_()
    return layer
