"""`Continual`: tasks one after another, with a hypernetwork that remembers, and what it is held to.

Methods: a hypernetwork with a penalty on what it makes for earlier tasks (von Oswald et al. 2020),
whose head makes chunks side by side or one after another (the latter in the spirit of Chandra et
al. 2023); the same without the penalty; elastic weight consolidation on the plain network; all
tasks at once.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from wspace.errors import HyperError, message
from wspace.hyper import HyperNetwork, RecurrentHead, TaskEmbedding
from wspace.hyper.continual import (
    OutputRegularizer,
    TaskStatistics,
    by_entropy,
    lookahead,
    used_outputs,
)
from wspace.hyper.ewc import EWC, fisher
from wspace.lit.data import stream
from wspace.lit.hyper.named import head_named, target_named
from wspace.lit.hyper.task import HyperTask
from wspace.lit.task import Optimization

HEADS = {"chunked": "ChunkedHead", "recurrent": "RecurrentHead", "finetune": "ChunkedHead"}
"""Methods with a hypernetwork, and their heads."""
METHODS = (*HEADS, "ewc", "joint")
"""Methods; ``"finetune"`` is ``"chunked"`` without a penalty."""
PENALTIES = ("outputs", "states", "ewc")
"""What a hypernetwork's penalty is on: generated weights, hidden states, its own parameters."""


class Continual(HyperTask):
    """Tasks one after another: batches ``(x, y, task)``, as of `datasets_zoo.experiments`.

    Logs, after every epoch, the accuracy of each task's own images (``accuracy_0`` …), the ``mean``
    over all tasks, also those to come, and over those ``so_far``, ``forgetting`` (the mean over
    earlier tasks of the best accuracy so far less the present one) and ``drift`` (of the first
    task's generated weights, relative). Tests add ``mean_by_entropy`` and ``task_found``: nobody
    says the task, and the surest network answers.

    The optimiser is Adam with a constant rate, begun anew with each task.

    Args:
        target: Factory of the network, ``"package.module:function"``.
        target_options: Its arguments.
        method: One of `METHODS`.
        head_options: Options of the method's head.
        width: Length of the tasks' embeddings.
        tasks: Number of tasks.
        outputs: Outputs of the network.
        heads: ``"split"``: each task has outputs of its own; ``"shared"``: all have all.
        beta: Weight of the penalty on outputs or hidden states.
        penalty: One of `PENALTIES`.
        targets: See `wspace.hyper.OutputRegularizer`.
        subset: See there.
        ahead: Whether the penalty is taken after the step that the task's loss alone would make.
        mask: Whether the penalty leaves out outputs that a task does not use.
        grow: Hidden units that a recurrent head gets with each new task; the old ones are frozen.
        ewc: Weight λ of elastic weight consolidation.
        online: Whether that keeps one anchor.
        fisher: Examples with which it estimates the Fisher information of a task.
        init: Scheme of `wspace.hyper.initialize`.
        lr: Learning rate.
        trust: Packages whose factories may be imported, beside `datasets_zoo` and wspace.

    Raises:
        HyperError: If an option is unknown, or they do not go together.

    Attributes:
        network: The hypernetwork, or the network.
        matrix: Accuracy of task i (column) after task j (row), NaN where it is not known.
    """

    monitor = ("val/mean", "max")

    def __init__(
        self,
        target: str = "datasets_zoo.architectures:mlp",
        target_options: dict[str, Any] | None = None,
        *,
        method: str = "chunked",
        head_options: dict[str, Any] | None = None,
        width: int = 32,
        tasks: int = 5,
        outputs: int = 10,
        heads: str = "split",
        beta: float = 0.01,
        penalty: str = "outputs",
        targets: str = "snapshot",
        subset: int | None = None,
        ahead: bool = False,
        mask: bool = False,
        grow: int = 0,
        ewc: float = 1000.0,
        online: bool = False,
        fisher: int = 512,
        init: str = "hyperfan_in",
        lr: float = 5e-4,
        trust: Sequence[str] = (),
    ) -> None:
        options = {k: v for k, v in locals().items() if k not in {"self", "__class__"}}
        super().__init__(Optimization(lr=lr, weight_decay=0.0, warmup=0.0, last=1.0))
        self.save_hyperparameters({**options, "trust": list(trust)})
        self.automatic_optimization = False
        _check(options)
        self.grow = grow
        self.method, self.kind, self.ahead, self.mask = method, penalty, ahead, mask
        self.tasks, self.examples = tasks, fisher
        self.classes = _classes(heads, tasks, outputs)
        net = target_named(target, target_options, trust=trust)
        self.network: nn.Module = net
        if method in HEADS:
            head = head_named(HEADS[method], head_options)
            scheme: Any = init
            self.network = HyperNetwork(net, TaskEmbedding(tasks, width), head, init=scheme)
        read: Any = {} if penalty == "outputs" else {"read": _states}
        self.regularizer = OutputRegularizer(
            self.network, beta, targets=targets, subset=subset, **read
        )
        self.elastic = EWC(ewc, online=online)
        self.statistics = TaskStatistics(self.network)
        self._begin()

    def _begin(self) -> None:
        """Nothing is done yet."""
        self.register_buffer("finished", torch.zeros(self.tasks, dtype=torch.bool))
        for i in range(self.tasks):  # so that weights in a file have what earlier tasks need
            for k, x in enumerate(self.statistics.buffers()):
                self.register_buffer(f"past_{i}_{k}", torch.zeros_like(x))
        self.task: int | None = None
        self.done: list[int] = []
        self.matrix = torch.full((self.tasks, self.tasks), torch.nan)
        self.needed: dict[str, Tensor] = {}  # Fisher information of the present task
        self.first: dict[str, Tensor] = {}  # the first task's weights when it was done
        self.recent: list[tuple[Tensor, Tensor]] = []
        self._counts: dict[str, Tensor] = {}

    # ------------------------------------------------------------ tasks

    @property
    def hyper(self) -> HyperNetwork | None:
        """The hypernetwork, if the method has one."""
        return self.network if isinstance(self.network, HyperNetwork) else None

    @property
    def uses_outputs(self) -> bool:
        """Whether what is made for earlier tasks is to stay."""
        return self.method in {"chunked", "recurrent"} and self.kind != "ewc"

    @property
    def uses_elastic(self) -> bool:
        """Whether parameters that earlier tasks need are to stay."""
        return self.method == "ewc" or (
            self.method in {"chunked", "recurrent"} and self.kind == "ewc"
        )

    def setup(self, stage: str) -> None:
        """Checks that the data has such tasks.

        Args:
            stage: Any of Lightning's stages.

        Raises:
            HyperError: If it has not.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        tasks = getattr(data, "tasks", self.tasks)
        joint = getattr(data, "joint", self.method == "joint")
        if tasks != self.tasks or (stage == "fit" and joint != (self.method == "joint")):
            raise HyperError(
                message(
                    f"Continual: the data does not suit method {self.method!r}",
                    expected=f"{self.tasks} tasks, joint: {self.method == 'joint'}",
                    got=f"{tasks} tasks, joint: {joint}",
                )
            )

    def change(self, task: int) -> None:
        """Ends the present task and begins another.

        Args:
            task: The new one.

        Raises:
            HyperError: If it was there before.
        """
        if task in self.done:
            raise HyperError(message(f"Continual: task {task} comes again", got=str(self.done)))
        if self.task is not None:
            self.done.append(self.task)
            self.statistics.keep(self.task)
            self.get_buffer("finished")[self.task] = True
            for k, x in enumerate(self.statistics.kept[self.task]):
                self.get_buffer(f"past_{self.task}_{k}").copy_(x)
            if self.uses_elastic:
                self.elastic.consolidate(self.moving(), self.needed)
            if self.hyper is not None and not self.first:
                made = self.hyper.generate(self.done[0])
                self.first = {name: x.detach().clone() for name, x in made.items()}
            if self.hyper is not None:
                cast(TaskEmbedding, self.hyper.condition).freeze(self.task)
            self.statistics.reset()
            optimizer = cast(Any, self.optimizers()).optimizer
            optimizer.state.clear()
            optimizer.param_groups[0]["params"].extend(self._grown())
        self.task, self.recent = task, []
        if self.uses_outputs and self.done:
            where = torch.tensor(self.done, device=self.device)
            self.regularizer.start(where, self._importance() if self.mask else None)

    def _grown(self) -> list[nn.Parameter]:
        """Parameters of new hidden units; none if none are wanted."""
        if not self.grow or self.hyper is None:
            return []
        drawn = torch.Generator().manual_seed(len(self._units()))  # the same when a run goes on
        head = cast(RecurrentHead, self.hyper.head)
        return head.grow(self.grow, freeze=True, generator=drawn)

    def _importance(self) -> dict[str, Tensor]:
        """1 for the outputs that earlier tasks use, of the tensors of the last layer."""
        assert self.hyper is not None
        last = self.hyper.weights[-1].layer
        shapes = {w.name: w.shape for w in self.hyper.weights if w.layer == last}
        found = used_outputs(shapes, [self.classes[i] for i in self.done])
        return {name: x.to(self.device) for name, x in found.items()}

    def moving(self) -> dict[str, Tensor]:
        """Parameters by name: what elastic weight consolidation holds."""
        return dict(self.network.named_parameters())

    def on_train_epoch_end(self) -> None:
        """Estimates what the present task needs."""
        if self.uses_elastic and self.recent and self.task is not None:
            x, y = (torch.cat(parts)[: self.examples] for parts in zip(*self.recent, strict=True))
            del y
            mode = self.network.training
            self.network.eval()
            task, running = self.task, _Running(self.network)
            used = list(self.classes[task])

            def logits(params: dict[str, Tensor], x: Tensor) -> Tensor:
                named = {f"network.{name}": p for name, p in params.items()}
                return functional_call(running, named, (task, x))[:, used]

            self.needed = fisher(logits, self.moving(), x)
            self.network.train(mode)

    # ------------------------------------------------------------ steps

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam; `change` begins it anew."""
        how = self.optimization
        return torch.optim.Adam(self.network.parameters(), how.lr, how.betas)

    def logits(self, task: int, x: Tensor) -> Tensor:
        """What the network of a task answers.

        Args:
            task: The task.
            x: Images ``(n, …)``.

        Returns:
            ``(n, outputs)``, those of other tasks included.
        """
        if self.hyper is not None:
            return self.hyper.run(task, x)
        return self.network(x)

    def forward(self, task: int, x: Tensor) -> Tensor:
        """As `logits`, with the statistics of BatchNorm that the task was done with."""
        with self.statistics.of(task):
            return self.logits(task, x)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One step.

        Args:
            batch: Images, labels and their task.
            batch_idx: Number of the batch.
        """
        x, y, task = batch[0], batch[1], int(batch[2])
        if self.method != "joint" and task != self.task:
            self.change(task)
        if self.uses_elastic and len(self.recent) * len(y) < self.examples:
            self.recent.append((x, y))
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        used = self.classes[task]
        loss = F.cross_entropy(self.logits(task, x)[:, used.start : used.stop], y - used.start)
        shift: Mapping[str, Tensor] | None = None
        total = loss
        if self.ahead and self.uses_outputs and self.done:
            self.manual_backward(loss)
            shift = lookahead(optimizer.optimizer, self.network.named_parameters())
            total = loss.new_zeros(())
        penalty = self._penalty(shift)
        if penalty is not None:
            total = total + penalty
        if total.requires_grad:
            self.manual_backward(total)
        optimizer.step()
        if (batch_idx + 1) % cast(Any, self.trainer).log_every_n_steps == 0:  # it takes its time
            shown = {"loss": loss.detach()}
            shown |= {} if penalty is None else {"penalty": penalty.detach()}
            self.log_all(shown, "train", len(y))

    def _penalty(self, shift: Mapping[str, Tensor] | None) -> Tensor | None:
        if not self.done:
            return None
        if self.uses_outputs:
            drawn = stream(self.task or 0, self.global_step)  # so that a resumed run goes on
            return self.regularizer.penalty(shift, generator=drawn)
        return self.elastic.penalty(self.moving()) if self.uses_elastic else None

    # ------------------------------------------------------------ judging

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Counts right answers of a task."""
        del batch_idx, dataloader_idx
        self._count(batch, "known")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Counts right answers of a task, and those without knowing it."""
        del batch_idx, dataloader_idx
        self._count(batch, "known")
        x, y, task = batch[0], batch[1], int(batch[2])
        found, label = by_entropy(
            torch.stack([self(i, x) for i in range(self.tasks)]), self.classes
        )
        self._add("found", task, found == task)
        self._add("entropy", task, label == y)

    def _count(self, batch: Any, name: str) -> None:
        x, y, task = batch[0], batch[1], int(batch[2])
        used = self.classes[task]
        kept = task if task in self.done else -1  # others: present statistics
        with self.statistics.of(kept):
            logits = self.logits(task, x)[:, used.start : used.stop]
        self._add(name, task, logits.argmax(1) == y - used.start)

    def _add(self, name: str, task: int, right: Tensor) -> None:
        sums = self._counts.setdefault(name, torch.zeros(2, self.tasks))
        sums[:, task] += torch.tensor([float(right.sum()), float(len(right))])

    def _shares(self, name: str) -> Tensor:
        right, count = self._counts.pop(name)
        return right / count

    def on_validation_epoch_end(self) -> None:
        """Notes and logs how well each task is done now."""
        shares = self._shares("known")
        if self.trainer.sanity_checking:
            return
        row = self.tasks - 1 if self.task is None else self.task
        self.matrix[row] = shares
        seen = range(self.tasks) if self.task is None else [*self.done, self.task]
        values = {f"accuracy_{i}": float(a) for i, a in enumerate(shares)}
        values |= {"mean": float(shares.mean()), "so_far": float(shares[list(seen)].mean())}
        if self.done:
            values["forgetting"] = self.forgetting()
        if self.first and self.hyper is not None:
            values["drift"] = self.drift()
        self.log_all(values, "val", 1)

    def on_test_epoch_end(self) -> None:
        """Logs accuracies with and without knowing the task."""
        known, found, entropy = (self._shares(name) for name in ("known", "found", "entropy"))
        values = {f"accuracy_{i}": float(a) for i, a in enumerate(known)}
        values |= {"mean": float(known.mean()), "task_found": float(found.mean())}
        values["mean_by_entropy"] = float(entropy.mean())
        self.log_all(values, "test", 1)

    def forgetting(self) -> float:
        """Mean over earlier tasks of the best accuracy after any task less the present one."""
        rows = self.matrix[[*self.done, *([] if self.task is None else [self.task])]]
        lost = rows.nan_to_num(0.0).max(0).values - rows[-1]
        return float(lost[self.done].mean())

    @torch.no_grad()
    def drift(self) -> float:
        """Distance of the first task's generated weights from those it was done with, relative."""
        assert self.hyper is not None
        now = self.hyper.generate(self.done[0])
        moved = sum((now[n] - x).square().sum() for n, x in self.first.items())
        whole = sum(x.square().sum() for x in self.first.values())
        return float((cast(Tensor, moved) / cast(Tensor, whole)).sqrt())

    # ------------------------------------------------------------ checkpoints

    def with_state_of(self, cond: int | None) -> AbstractContextManager[None]:
        """The statistics of BatchNorm that a task was done with."""
        return nullcontext() if cond is None else self.statistics.of(cond)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what is remembered of earlier tasks."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["continual"] = {
            **{name: getattr(self, name) for name in _REMEMBERED},
            "regularizer": self.regularizer.state_dict(),
            "elastic": self.elastic.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes back what `on_save_checkpoint` added; of weights alone there is nothing to take."""
        super().on_load_checkpoint(checkpoint)
        found = checkpoint.get("continual")
        if found is None:
            return
        for name in _REMEMBERED:
            setattr(self, name, found[name])
        self.regularizer.load_state_dict(found["regularizer"])
        self.elastic.load_state_dict(found["elastic"])

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Takes weights, hidden units that were added and statistics of earlier tasks included.

        Args:
            state_dict: As `state_dict` gave it.
            strict: See `torch.nn.Module.load_state_dict`.
            assign: See there.

        Returns:
            Names that are missing, and unexpected ones.
        """
        there = {name.split(".")[3] for name in state_dict if name.startswith(_UNITS)}
        while self.grow and self.hyper is not None and len(there) > len(self._units()):
            self._grown()
        found = super().load_state_dict(state_dict, strict=strict, assign=assign)
        tasks = self.get_buffer("finished").nonzero()[:, 0].tolist()
        count = len(self.statistics.buffers())
        for i in tasks:
            past = [self.get_buffer(f"past_{i}_{k}") for k in range(count)]
            self.statistics.kept[i] = [x.clone() for x in past]
        self.done = self.done or tasks
        return found

    def _units(self) -> nn.ModuleList:
        assert self.hyper is not None
        return cast(RecurrentHead, self.hyper.head).units


_REMEMBERED = ("task", "done", "matrix", "needed", "first", "recent")
_UNITS = "network.head.units."


class _Running(nn.Module):
    """A network that takes its task with its input."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, task: int, x: Tensor) -> Tensor:
        if isinstance(self.network, HyperNetwork):
            return self.network.run(task, x)
        return self.network(x)


def _states(hyper: nn.Module, conditions: Tensor) -> dict[str, Tensor]:
    """Hidden states of a recurrent head, ``(tasks, chunks, hidden)``."""
    made = cast(Any, hyper)
    return {"states": made.head.states(made.embed(conditions))}


def _classes(heads: str, tasks: int, outputs: int) -> list[range]:
    """Outputs that each task uses."""
    if heads == "shared":
        return [range(outputs)] * tasks
    each = outputs // tasks
    return [range(i * each, (i + 1) * each) for i in range(tasks)]


def _check(options: Mapping[str, Any]) -> None:
    bad: list[str] = []
    method, penalty, grow = (options[name] for name in ("method", "penalty", "grow"))
    heads, tasks, outputs = (options[name] for name in ("heads", "tasks", "outputs"))
    if method not in METHODS:
        bad.append(f"method {method!r}; there are {', '.join(METHODS)}")
    if penalty not in PENALTIES:
        bad.append(f"penalty {penalty!r}; there are {', '.join(PENALTIES)}")
    if penalty == "states" and method != "recurrent":
        bad.append(f"penalty 'states' with method {method!r}; only 'recurrent' has states")
    if grow < 0 or (grow and (method != "recurrent" or penalty == "ewc")):
        bad.append(f"grow {grow}; only 'recurrent' with a penalty on outputs or states grows")
    if heads not in {"split", "shared"} or tasks < 1 or (heads == "split" and outputs % tasks):
        bad.append(f"heads {heads!r} of {outputs} outputs for {tasks} tasks")
    if bad:
        raise HyperError(message("Continual: options", got=bad))
