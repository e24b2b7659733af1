"""`HyperClassifier`: a classifier some of whose weights a hypernetwork makes, without a condition.

Ha, Dai, Le (2016), "HyperNetworks" (arXiv 1609.09106), section 3.1: a static hypernetwork for the
kernels of a convolutional network, with the same network trained as it is beside it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wspace.errors import HyperError, message
from wspace.hyper import HyperNetwork
from wspace.lit.hyper.named import head_named, target_named
from wspace.lit.hyper.task import HyperTask
from wspace.lit.task import Optimization

METHODS = ("hyper", "plain")
"""With a hypernetwork, and the control without one."""


class HyperClassifier(HyperTask):
    """Images into classes by cross entropy; batches ``(x, y)``. Logs ``loss`` and ``accuracy``.

    Args:
        target: Factory of the network, ``"package.module:function"``.
        target_options: Its arguments.
        method: ``"hyper"``, or ``"plain"``: the network as it is.
        head: Head that makes the weights, by name; it must need no condition.
        head_options: Its options.
        select: Globs on names of the parameters that are generated; all others are trained with it.
        init: Scheme of `wspace.hyper.initialize`.
        decay_made: Weight of half the sum of squares of the generated weights.
        optimization: Optimiser and learning rate.
        trust: Packages whose factories may be imported, beside `datasets_zoo` and wspace.

    Raises:
        HyperError: If there is no such method or head, or nothing is selected.

    Attributes:
        network: The hypernetwork, or the network.
    """

    monitor = ("val/accuracy", "max")

    def __init__(
        self,
        target: str = "datasets_zoo.experiments.networks:two_convolutions",
        target_options: dict[str, Any] | None = None,
        *,
        method: str = "hyper",
        head: str = "TiledHead",
        head_options: dict[str, Any] | None = None,
        select: Sequence[str] = ("*",),
        init: str = "hyperfan_in",
        decay_made: float = 0.0,
        optimization: Optimization | None = None,
        trust: Sequence[str] = (),
    ) -> None:
        super().__init__(optimization)
        if method not in METHODS:
            raise HyperError(
                message("HyperClassifier: method", expected=" or ".join(METHODS), got=repr(method))
            )
        net = target_named(target, target_options, trust=trust)
        self.network: nn.Module = net
        if method == "hyper":
            made = head_named(head, head_options)
            scheme: Any = init
            self.network = HyperNetwork(net, None, made, select=tuple(select), init=scheme)
        self.decay_made = decay_made
        options = {"target": target, "target_options": target_options, "method": method}
        options |= {"head": head, "head_options": head_options, "select": list(select)}
        options |= {"init": init, "decay_made": decay_made, "trust": list(trust)}
        self.save_hyperparameters({**options, "optimization": asdict(self.optimization)})

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(n, classes)`` of images ``(n, channels, height, width)``."""
        return self.answer(x)[0]

    def answer(self, x: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Logits, and the weights that were made for them.

        Args:
            x: Images.

        Returns:
            Logits ``(n, classes)``; generated weights by name.
        """
        if isinstance(self.network, HyperNetwork):
            made = self.network.generate()
            return cast(Tensor, self.network.run_with(made, x)), made
        return self.network(x), {}

    def parameters_used(self) -> dict[str, int]:
        """How many numbers are trained, by ``"total"``, ``"generator"`` and ``"made"``.

        Returns:
            All of them; those of the head; weights that it makes.
        """
        total = sum(p.numel() for p in self.network.parameters() if p.requires_grad)
        if not isinstance(self.network, HyperNetwork):
            return {"total": total, "generator": 0, "made": 0}
        head = sum(p.numel() for p in self.network.head.parameters())
        return {"total": total, "generator": head, "made": self.network.generated}

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch.

        Args:
            batch: Images and labels.
            batch_idx: Number of the batch.

        Returns:
            Cross entropy, and the decay.
        """
        del batch_idx
        x, y = batch
        logits, made = self.answer(x)
        loss = F.cross_entropy(logits, y)
        self.log_all({"loss": loss.detach()}, "train", len(y))
        if self.decay_made:
            loss = loss + self.decay_made / 2 * sum(w.square().sum() for w in made.values())
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Loss and accuracy of a batch."""
        del batch_idx
        self._judge(batch, "val")

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Loss and accuracy of a batch."""
        del batch_idx
        self._judge(batch, "test")

    def _judge(self, batch: Sequence[Tensor], stage: str) -> None:
        x, y = batch
        logits = self(x)
        right = (logits.argmax(1) == y).to(torch.float32).mean()
        self.log_all({"loss": F.cross_entropy(logits, y), "accuracy": right}, stage, len(y))
