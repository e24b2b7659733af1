"""Elastic weight consolidation, on the parameters of any module: a target's, or a hypernetwork's.

Kirkpatrick et al. (2017), "Overcoming catastrophic forgetting in neural networks" (arXiv
1612.00796), equation 3: λ / 2 · Σ_i F_i (θ_i - θ*_i)² for every earlier task, F the diagonal of the
Fisher information. Online: Schwarz et al. (2018), "Progress & Compress" (arXiv 1805.06370), section
3.3: one anchor, the last task's, and F ← γ F + F_T.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from wspace.errors import HyperError, message

Logits = Callable[[dict[str, Tensor], Tensor], Tensor]
"""(parameters by name, inputs ``(1, …)``) → logits ``(1, classes)``."""


class EWC:
    """Penalty on moving parameters that earlier tasks need.

    Args:
        weight: λ.
        online: Whether there is one anchor, that of the last task, and one sum of informations.
            Otherwise memory grows with the tasks.
        decay: γ of the online variant.

    Raises:
        HyperError: If an option makes no sense.

    Example:
        >>> ewc = EWC(weight=2.0)
        >>> ewc.consolidate({"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 0.0])})
        >>> float(ewc.penalty({"w": torch.tensor([3.0, 5.0])}))
        9.0
    """

    def __init__(self, weight: float, *, online: bool = False, decay: float = 1.0) -> None:
        if weight < 0 or not 0 <= decay <= 1:
            raise HyperError(
                message(
                    "EWC: options",
                    expected="weight from 0, decay from 0 to 1",
                    got=f"{weight}, {decay}",
                )
            )
        self.weight, self.online, self.decay = weight, online, decay
        self.anchors: list[dict[str, dict[str, Tensor]]] = []

    def consolidate(self, params: Mapping[str, Tensor], information: Mapping[str, Tensor]) -> None:
        """After a task: where the parameters are, and how much it needs each of them.

        Args:
            params: Parameters by name.
            information: Diagonal of the Fisher information, of the same names and shapes.

        Raises:
            HyperError: If names or shapes differ from those of the parameters or of earlier tasks.
        """
        shapes = {name: x.shape for name, x in params.items()}
        _same(shapes, information, "information")
        if self.anchors:
            _same(shapes, self.anchors[-1]["at"], "an earlier task")
        at = {name: x.detach().clone() for name, x in params.items()}
        needed = {name: x.detach().clone() for name, x in information.items()}
        if self.online and self.anchors:
            before = self.anchors.pop()["information"]
            needed = {name: x + self.decay * before[name] for name, x in needed.items()}
        self.anchors.append({"at": at, "information": needed})

    def penalty(self, params: Mapping[str, Tensor]) -> Tensor:
        """λ / 2 · Σ F (θ - θ*)², over parameters and earlier tasks.

        Args:
            params: Parameters by name.

        Returns:
            A number; 0 if there are no earlier tasks.

        Raises:
            HyperError: If names or shapes differ from those of earlier tasks.
        """
        total = next(iter(params.values())).new_zeros(())
        for anchor in self.anchors:
            _same({name: x.shape for name, x in params.items()}, anchor["at"], "an earlier task")
            for name, x in params.items():
                moved = (x - anchor["at"][name]).square()
                total = total + (anchor["information"][name] * moved).sum()
        return self.weight / 2 * total

    def state_dict(self) -> dict[str, Any]:
        """Anchors, as tensors: for a checkpoint."""
        return {"anchors": self.anchors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.anchors = list(state["anchors"])


def _same(shapes: Mapping[str, torch.Size], other: Mapping[str, Tensor], whose: str) -> None:
    found = {name: x.shape for name, x in other.items()}
    if found != shapes:
        names = sorted(n for n in {*shapes, *found} if shapes.get(n) != found.get(n))
        raise HyperError(
            message(
                f"EWC: parameters and those of {whose} differ",
                got=[f"{n}: {shapes.get(n)} and {found.get(n)}" for n in names],
            )
        )


def fisher(
    logits: Logits,
    params: Mapping[str, Tensor],
    x: Tensor,
    y: Tensor | None = None,
    *,
    chunk: int = 32,
    method: str = "vmap",
) -> dict[str, Tensor]:
    """Diagonal of the Fisher information of a classifier, example by example.

    The mean over examples of the square of each example's gradient of log p(y | x). (The square of
    a batch's mean gradient, which is often taken for it, is another thing, and smaller.)

    Args:
        logits: The classifier as a function of its parameters.
        params: Parameters by name.
        x: Examples, ``(n, …)``.
        y: Their labels: then the "empirical" information. None for the expectation over the labels
            that the classifier itself predicts: the information proper.
        chunk: Examples at a time.
        method: ``"vmap"`` takes the examples of a chunk side by side, ``"loop"`` one after another:
            for modules that `torch.func.vmap` has no rules for.

    Returns:
        Values of the parameters' shapes, by name.

    Raises:
        HyperError: If there are no examples, or no such method.

    Example:
        >>> line = lambda params, x: x @ params["w"].T
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> fisher(line, {"w": torch.zeros(2, 1)}, x)["w"].tolist()  # p (1 - p) x², the mean
        [[1.25], [1.25]]
    """
    if not len(x) or method not in {"vmap", "loop"}:
        raise HyperError(
            message(
                "fisher: cannot be estimated",
                expected="examples, and method vmap or loop",
                got=f"{len(x)} examples, method {method!r}",
            )
        )
    fixed = {name: p.detach() for name, p in params.items()}

    def of_one(x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        jacobian, logp = jacrev(_log_probabilities, has_aux=True)(fixed, logits, x, y)
        share = logp.exp() if y is None else torch.ones_like(logp)
        return {
            name: (j.square() * share.reshape(-1, *[1] * (j.dim() - 1))).sum(0)
            for name, j in jacobian.items()
        }

    total = {name: torch.zeros_like(p) for name, p in fixed.items()}
    for start in range(0, len(x), chunk):
        rows = [part[start : start + chunk] for part in (x, y) if part is not None]
        if method == "vmap":
            parts = vmap(of_one)(*rows)
        else:
            each = [of_one(*one) for one in zip(*rows, strict=True)]
            parts = {name: torch.stack([e[name] for e in each]) for name in total}
        total = {name: s + parts[name].sum(0) for name, s in total.items()}
    return {name: s / len(x) for name, s in total.items()}


def _log_probabilities(
    params: dict[str, Tensor], logits: Logits, x: Tensor, y: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of one example: of all classes, or of its label ``(1,)``; twice."""
    logp = logits(params, x[None])[0].log_softmax(-1)
    chosen = logp if y is None else logp.gather(0, y[None])
    return chosen, chosen.detach()
