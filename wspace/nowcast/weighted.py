"""Predictors without a network: fixed weighted sums of the past states."""

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from wspace.errors import NowcastError, message
from wspace.nowcast.predictor import Past, Predictor, pieces


class Weighted(Predictor):
    """A weighted sum of the past states, the same weights for every entry."""

    @abstractmethod
    def _weights(self, horizon: int) -> Tensor:
        """Weights of the past states, ``(c,)`` float64, of sum 1."""

    def _ahead(self, past: Past, horizon: int) -> Iterator[tuple[str, Tensor]]:
        weights = self._weights(horizon).tolist()[:-1]
        for name in past.names:
            window = past.windows[name]
            wide = torch.promote_types(window[-1].dtype, torch.float32)
            made = window[-1].clone(memory_format=torch.contiguous_format)
            for out, *some in pieces(made, *window):
                last = some[-1].to(wide)
                total = last.clone()
                for w, x in zip(weights, some[:-1], strict=True):
                    total.add_(x - last, alpha=w)  # differences: what never moves stays exactly
                out.copy_(total)
            yield name, made


class NoChange(Predictor):
    """The last state."""

    def _ahead(self, past: Past, horizon: int) -> Iterator[tuple[str, Tensor]]:
        for name in past.names:
            yield name, past.windows[name][-1].clone(memory_format=torch.contiguous_format)


class LinearFit(Weighted):
    """The least-squares line through the past values of every entry, extended.

    Exact where the past lies on a line. One past state gives that state.

    Example:
        >>> line = torch.nn.Linear(1, 1, bias=False)
        >>> states = [{"weight": torch.tensor([[0.5 * t]])} for t in range(5)]
        >>> LinearFit().predict(line, states, horizon=3)["weight"]
        tensor([[3.5000]])
    """

    def _weights(self, horizon: int) -> Tensor:
        t = torch.arange(self.context, dtype=torch.float64)
        t = t - t.mean()
        spread = float((t * t).sum())
        return 1 / self.context + (t * (t[-1] + horizon) / spread if spread else torch.zeros(1))


class Average(Weighted):
    """The mean of the past states, whatever the horizon.

    Args:
        decay: Weight of a state relative to the next; 1 is the plain mean ("latest weight
            averaging"), less is an exponential moving average.

    References:
        Kaddour (2022), Stop wasting my time! arXiv:2209.14981
    """

    def __init__(
        self, decay: float = 1.0, *, context: int = 5, longest: int = 40, still: bool = True
    ) -> None:
        super().__init__(context=context, longest=longest, still=still)
        if not 0 < decay <= 1:
            raise NowcastError(
                message("Average: impossible decay", expected="0 < decay <= 1", got=f"{decay}")
            )
        self.decay = decay

    def _weights(self, horizon: int) -> Tensor:
        powers = self.decay ** torch.arange(self.context - 1, -1, -1, dtype=torch.float64)
        return powers / powers.sum()
