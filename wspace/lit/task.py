"""`Task`: what all training tasks share: making the metanet, its optimiser, and checkpoints.

A metanet is made when the zoo is known, in `setup`, and its statistics are taken from training
networks there; both travel in the checkpoint, so that a task read from a file takes the networks a
user has as they are.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil, cos, inf, pi
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from wspace.errors import WSpaceError, ZooError, message
from wspace.graph import ParameterGraph
from wspace.lit.data import ZooDataModule
from wspace.lit.models import (
    Seen,
    build_metanet,
    check_metanet,
    fit_statistics,
    without_files,
)
from wspace.lit.pretrained import Start, start_from
from wspace.nn import Probes
from wspace.zoo import Zoo, ZooBatch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Optimization:
    """AdamW, its learning rate rising linearly and then falling along a cosine, step by step.

    Attributes:
        lr: Largest learning rate.
        weight_decay: Of weight matrices; vectors (biases, norms, statistics) and learned inputs
            (`wspace.nn.Probes`) have none.
        betas: Decay of the two averages.
        warmup: Share of all steps in which the learning rate rises.
        last: Learning rate at the end over the largest.
    """

    lr: float = 1e-3
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.05
    last: float = 0.01

    def factor(self, step: int, total: float) -> float:
        """The learning rate of a step over the largest.

        Args:
            step: Steps taken.
            total: Steps of the whole training; infinite for a constant rate after 1,000 steps.

        Returns:
            A factor between 0 and 1.
        """
        if total == inf:
            return min(1.0, (step + 1) / 1000)
        rise = max(1.0, self.warmup * total)
        if step < rise:
            return min(1.0, (step + 1) / rise)
        fall = min(1.0, (step - rise) / max(1.0, total - rise))
        return self.last + (1 - self.last) * (1 + cos(pi * fall)) / 2


class Task(LightningModule):
    """A metanet and what it is trained for.

    A subclass says how long the metanet's answers are (`prepare`), gives the `loss` of a batch, and
    `columns` of what it predicts. Its own options, as plain values, go into `options_of_task`.

    Args:
        metanet: Name of a metanet (`wspace.lit.models.NAMES`), or a module that takes a list of
            graphs and answers ``(rows, out)``.
        options: Options of the metanet that is named.
        optimization: Optimiser and learning rate.
        statistics: Training networks from which the metanet's statistics are taken.
        trust: Packages whose functions an architecture of the zoo may name.
        own: Options of the subclass, as plain values: with them it is made again from a checkpoint.
        pretrained: Checkpoint of any task with the same metanet, whose weights training begins
            with, statistics included. A head of another size begins fresh.

    Raises:
        WSpaceError: If the metanet or an option of it is unknown, or a module is to begin with a
            checkpoint.

    Attributes:
        monitor: Quantity by which the best checkpoint is chosen, and ``"min"`` or ``"max"``.
        mixed_targets: True if `loss` minds `ZooBatch.mixture`, or needs no targets; else batches of
            mixed networks are refused.
        out: Length of the metanet's answer, None if it returns parameters.
        seen: Architectures that it was trained on, once known.
        others: Those that the zoo has beside them: held out, or in no training part.
        started: What was taken from `pretrained`, once it was.
        resumes: Set it before ``trainer.fit(…, ckpt_path=…)``, as `wspace fit` does: first values
            and statistics are those of the checkpoint, and files that options name are not read.
    """

    monitor: ClassVar[tuple[str, str]] = ("val/loss", "min")
    mixed_targets: ClassVar[bool] = False

    def __init__(
        self,
        metanet: str | nn.Module,
        options: Mapping[str, Any] | None,
        optimization: Optimization,
        statistics: int,
        trust: Sequence[str],
        own: Mapping[str, Any],
        *,
        pretrained: str | Path | None = None,
    ) -> None:
        super().__init__()
        named = isinstance(metanet, str)
        self.name = metanet if isinstance(metanet, str) else type(metanet).__name__
        self.options, self.optimization = dict(options or {}), optimization
        self.statistics, self.trust = statistics, tuple(trust)
        if named:
            check_metanet(self.name, self.options)
        elif pretrained is not None:
            help = "load the weights into the module before"
            raise WSpaceError(message("pretrained: the metanet is a module", help=help))
        self.pretrained = None if pretrained is None else Path(pretrained)
        self.started: Start | None = None
        self.metanet: nn.Module | None = None if named else metanet
        self.given = not named
        self.out: int | None = None
        self.seen: Seen | None = None
        self.others = Seen()
        self.fitted = self.resumes = False
        self.config: dict[str, Any] = {
            "metanet": self.name,
            "options": self.options,
            "optimization": asdict(optimization),
            "statistics": statistics,
            "trust": list(trust),
            "pretrained": None if pretrained is None else str(pretrained),
            **own,
        }
        self.save_hyperparameters(self.config)
        self._random: dict[str, Any] = {}

    # ------------------------------------------------------------ what a subclass says

    def prepare(self, zoo: Zoo) -> int | None:
        """Checks that the zoo has what the task needs.

        Args:
            zoo: All networks.

        Returns:
            Length of the metanet's answer, or None for parameters.
        """
        raise NotImplementedError

    def learn_targets(self, zoo: Zoo) -> None:
        """Takes from the table of the training networks what the task has to know; here nothing.

        Args:
            zoo: Training networks.
        """

    def loss(self, batch: ZooBatch, stage: str) -> Tensor:
        """The loss of a batch; also notes metrics of the stage."""
        raise NotImplementedError

    def columns(self, answer: Any) -> dict[str, Tensor]:
        """What is shown of the answers: columns of one value, or one vector, for each network."""
        raise NotImplementedError

    def learned(self) -> dict[str, Any]:
        """What was found out from the zoo, as plain values; `restore` takes it back."""
        return {"out": self.out}

    def restore(self, learned: Mapping[str, Any]) -> None:
        """Takes back what `learned` gave."""
        self.out = learned["out"]

    # ------------------------------------------------------------ the metanet

    @property
    def data(self) -> ZooDataModule:
        """The zoo that the trainer runs on."""
        found = getattr(self.trainer, "datamodule", None)
        if not isinstance(found, ZooDataModule):
            raise ZooError(
                message(
                    f"{type(self).__name__}: the trainer has no zoo",
                    expected="a ZooDataModule",
                    got=type(found).__name__,
                    help="trainer.fit(task, datamodule=ZooDataModule(path))",
                )
            )
        return found

    def setup(self, stage: str) -> None:
        """Makes the metanet for the zoo; before training, sets its first weights and statistics.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        """
        data = self.data
        if stage != "predict":
            out = self.prepare(data.zoo)
            self.out = out if self.metanet is None or self.given else self.out
        if self.resumes or self.trainer.ckpt_path is not None:
            return  # the metanet is made as the checkpoint says, when that is read
        if self.seen is None:
            self.seen = Seen.of(data.parts["train"])
            self.others = Seen.of(data.zoo, but=data.parts["train"])
        if stage == "fit":
            self.build()
            if not self.fitted:
                self.learn_targets(data.parts["train"])
                if self.pretrained is None:
                    self.fit_statistics(data.networks("train", self.statistics))
                else:
                    self._start(self.pretrained)

    def build(self, *, fresh: bool = True) -> None:
        """Makes the metanet that is named, unless it is there.

        Args:
            fresh: Whether first values are read from the files that options name; not if a
                checkpoint has the weights.
        """
        if self.metanet is None:
            options = self.options if fresh else without_files(self.options)
            self.metanet = build_metanet(
                self.name, options, self.known, out=self.out, trust=self.trust
            )

    @property
    def known(self) -> Seen | None:
        """Architectures that the metanet may meet: those it is trained on, and others."""
        return None if self.seen is None else self.seen + self.others

    def _start(self, path: Path) -> None:
        assert self.metanet is not None
        self.started = start_from(
            path, self.metanet, self.name, self.options, out=self.out, trust=self.trust
        )
        self.fitted = True
        log.info("%s", self.started)

    def fit_statistics(self, graphs: Sequence[ParameterGraph]) -> None:
        """Sets the statistics by which the metanet normalises what it reads.

        Args:
            graphs: Training networks.
        """
        assert self.metanet is not None
        fit_statistics(self.metanet, graphs)
        self.fitted = True

    def forward(self, graphs: ParameterGraph | Sequence[ParameterGraph]) -> Any:
        """The metanet's answers; see `wspace.lit.models`."""
        if self.metanet is None:
            raise WSpaceError(
                message(
                    f"{type(self).__name__}: the metanet {self.name} is not made yet",
                    help="it is made when training starts, or read by wspace.lit.load_task",
                )
            )
        return self.metanet([graphs] if isinstance(graphs, ParameterGraph) else graphs)

    # ------------------------------------------------------------ steps

    def training_step(self, batch: ZooBatch, batch_idx: int) -> Tensor:
        """One step; stops at a loss that is not finite.

        Args:
            batch: Training networks.
            batch_idx: Number of the batch in the epoch.

        Returns:
            The loss.

        Raises:
            WSpaceError: If the loss is NaN or infinite, or networks were mixed and the task cannot
                mix its targets.
        """
        if batch.mixture is not None and not self.mixed_targets:
            raise WSpaceError(
                message(
                    f"{type(self).__name__}: there are no targets for mixed networks",
                    expected="Classification, Prediction or Editing, or a task of your own that "
                    "minds batch.mixture and says so in mixed_targets",
                    help="leave MixUp out of data.augment; SelfMixUp mixes no targets",
                )
            )
        loss = self.loss(batch, "train")
        if not bool(loss.detach().isfinite()):
            raise WSpaceError(self._diverged(batch, batch_idx, float(loss.detach())))
        size = len(batch.index)
        self.log("train/loss", loss, on_step=True, on_epoch=False, prog_bar=True, batch_size=size)
        return loss

    def validation_step(self, batch: ZooBatch, batch_idx: int) -> None:
        """Loss and metrics of a batch."""
        del batch_idx
        self._evaluate(batch, "val")

    def test_step(self, batch: ZooBatch, batch_idx: int) -> None:
        """Loss and metrics of a batch."""
        del batch_idx
        self._evaluate(batch, "test")

    def predict_step(self, batch: ZooBatch, batch_idx: int) -> dict[str, Tensor]:
        """Columns for the networks of a batch, and ``index``, their rows of the zoo."""
        del batch_idx
        found = {name: x.detach().cpu() for name, x in self.columns(self(batch.graphs)).items()}
        return {"index": batch.index.cpu(), **found}

    def _evaluate(self, batch: ZooBatch, stage: str) -> None:
        loss = self.loss(batch, stage)
        size: Any = float(len(batch.index))  # whole ones are averaged over processes, rounded down
        self.log(f"{stage}/loss", loss, on_epoch=True, batch_size=size, sync_dist=True)

    def report(self, stage: str, values: Mapping[str, Tensor | float]) -> None:
        """Logs metrics of a whole stage, the same in all processes.

        Args:
            stage: ``"val"`` or ``"test"``.
            values: Metrics by name.
        """
        named = {f"{stage}/{name}": torch.as_tensor(x).float() for name, x in values.items()}
        self.log_dict(
            {name: x.to(self.device) for name, x in named.items()}, prog_bar=True, sync_dist=True
        )

    def _diverged(self, batch: ZooBatch, batch_idx: int, loss: float) -> str:
        bad = torch.zeros(len(batch.index), dtype=torch.bool)
        start = 0
        for g in batch.graphs:
            lead = len(g.batch)
            rows = max(1, int(torch.tensor(g.batch).prod()))
            for x in g.values.values():
                finite = (
                    x.detach().isfinite().flatten(lead).all(-1)
                    if x.dim() > lead
                    else (x.detach().isfinite())
                )
                bad[start : start + rows] |= ~finite.reshape(rows).cpu()
            start += rows
        part = self.data.parts["train"]
        names = dict(zip(part.rows.tolist(), part.ids.tolist(), strict=True))
        ids = np.array([names[row] for row in batch.index.tolist()])
        own = [n for n, p in self.named_parameters() if not bool(p.isfinite().all())]
        got = [f"{loss} in batch {batch_idx} of epoch {self.current_epoch}, "
               f"networks {', '.join(ids[:8])}{' …' if len(ids) > 8 else ''}"]  # fmt: skip
        if bool(bad.any()):
            got.append(f"weights that are NaN or infinite in {', '.join(ids[bad.numpy()][:8])}")
        if own:
            got.append(f"the metanet's own weights are not finite: {', '.join(own[:3])}")
        return message(
            f"{type(self).__name__}: the loss is not finite",
            got=got,
            help="leave such networks out of the zoo"
            if bool(bad.any())
            else "lower optimization.lr, or set trainer.gradient_clip_val",
        )

    # ------------------------------------------------------------ optimiser

    def configure_optimizers(self) -> Any:
        """AdamW with the schedule of `optimization`."""
        how = self.optimization
        inputs = {p for m in self.modules() if isinstance(m, Probes) for p in m.parameters()}
        trained = [p for p in self.parameters() if p.requires_grad]
        decayed = [p for p in trained if p.dim() > 1 and p not in inputs]
        others = [p for p in trained if p.dim() <= 1 or p in inputs]
        groups = [
            {"params": decayed, "weight_decay": how.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=how.lr, betas=how.betas
        )
        total = self.total_steps()
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: how.factor(step, total)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def total_steps(self) -> float:
        """Steps of the whole training; infinite if nothing ends it."""
        # not Lightning's own estimate: that makes the loader before its state is restored
        trainer = self.trainer
        limits: list[float] = [float(trainer.max_steps)] if trainer.max_steps >= 0 else []
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            batches = float(len(self.data.sampler("train")))
            limit = trainer.limit_train_batches
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
            limits.append(trainer.max_epochs * ceil(batches / trainer.accumulate_grad_batches))
        return min(limits, default=inf)

    # ------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what is needed to make the task again, and the state of the generators."""
        checkpoint["wspace"] = {
            "task": type(self).__name__,
            "config": self.config,
            "module": self.given,
            "learned": self.learned(),
            "seen": [] if self.seen is None else self.seen.to_list(),
            "others": self.others.to_list(),
        }
        checkpoint["random"] = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available() and self.device.type == "cuda":
            checkpoint["random"]["cuda"] = torch.cuda.get_rng_state(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes back what `on_save_checkpoint` added, and makes the metanet if it is missing."""
        found = checkpoint.get("wspace", {})
        if found:
            self.restore(found["learned"])
            self.seen = Seen.from_list(found["seen"])
            self.others = Seen.from_list(found.get("others", []))
            self.build(fresh=False)
        self.fitted = True
        self._random = checkpoint.get("random", {})

    def on_train_batch_start(self, batch: ZooBatch, batch_idx: int) -> None:
        """Before the first step after a resumption, sets the generators as they were."""
        del batch, batch_idx
        if self._random:
            torch.set_rng_state(self._random["cpu"].cpu())
            if "cuda" in self._random and self.device.type == "cuda":
                torch.cuda.set_rng_state(self._random["cuda"].cpu(), self.device)
            self._random = {}
