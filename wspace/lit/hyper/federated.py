"""`Federated`: personalised federated learning, all methods with one way of being judged."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from wspace.errors import HyperError, message
from wspace.hyper import FullHead
from wspace.hyper.federated import (
    Client,
    FedAvg,
    FederatedMethod,
    HyperServer,
    ImageLabels,
    Labels,
    LocalOnly,
    LocalTraining,
    PeFLL,
    PFedHN,
    accuracies,
    lenet,
    train_locally,
)
from wspace.hyper.federated.local import Part
from wspace.lit.data import stream
from wspace.lit.hyper.task import HyperTask
from wspace.lit.task import Optimization

_Options = TypeVar("_Options", LocalTraining, Optimization)

METHODS = ("pefll", "pfedhn", "fedavg", "local")
DESCRIPTORS = ("images", "labels")


class _Data(Protocol):
    clients: list[Client]
    seen: int


class Federated(HyperTask):
    """Networks for clients that keep their data: one batch is the numbers of a round's clients.

    After training, the accuracy of every client's network on its own examples is reported as it is
    sent (``accuracy``) and after `tune` further local steps (``tuned``), with and without a choice
    among the client's own classes only (``…_masked``). ``fedavg`` with tuning is the usual
    baseline.

    Args:
        method: ``"pefll"``, ``"pfedhn"``, ``"fedavg"`` or ``"local"``.
        channels: Of the images.
        size: Their height and width.
        classes: Number of labels.
        clients: Clients that take part in training.
        kernels: Channels of the first convolution of the clients' network (`lenet`).
        hidden: Width of its first linear layer.
        taps: Height and width of its kernels.
        width: Length of the vector of a client.
        head: Widths of the layers between that vector and the weights.
        base: As for `HyperNetwork`.
        init: As for `HyperNetwork`.
        descriptor: Of ``"pefll"``: by ``"images"`` and labels, or by ``"labels"`` alone.
        examples: Training examples by which a client describes itself in a round.
        local: Local steps of a round.
        tune: Local steps after training, for ``tuned``.
        new_rounds: Rounds that a client that took no part trains for (``"local"``) or has its
            vector fitted in (``"pfedhn"``).
        new_lr: Rate of that fit.
        clip: Bound of the norm of the server's gradient.
        optimization: Of the server: AdamW. Not used by ``"fedavg"``, which takes the mean.
        seed: Decides initial weights and the clients' batches.

    Raises:
        HyperError: If the method is unknown.

    Attributes:
        method: What is trained.
        traffic: Bytes that one client got and sent in the last round.
    """

    monitor: ClassVar[tuple[str, str]] = ("val/accuracy", "max")

    def __init__(
        self,
        method: str = "pefll",
        *,
        channels: int = 1,
        size: int = 8,
        classes: int = 10,
        clients: int = 20,
        kernels: int = 4,
        hidden: int = 32,
        taps: int = 5,
        width: int = 32,
        head: Sequence[int] = (100, 100),
        base: Literal["frozen", "trained"] | None = "trained",
        init: str = "hyperfan_in",
        descriptor: Literal["images", "labels"] = "images",
        examples: int = 32,
        local: LocalTraining | dict[str, Any] | None = None,
        tune: int = 20,
        new_rounds: int = 20,
        new_lr: float = 0.1,
        clip: float = 50.0,
        optimization: Optimization | dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(_made(Optimization, optimization))
        self.automatic_optimization = False
        options = _plain(locals())
        self.save_hyperparameters(options)
        self.local = _made(LocalTraining, local) or LocalTraining()
        self.tune, self.clip = tune, clip
        self.clients, self.seed, self.classes = clients, seed, classes
        self.traffic = (0, 0)
        self.method = _method(options)

    # ------------------------------------------------------------------------- data

    @property
    def data(self) -> _Data:
        """The clients that the trainer runs on.

        Raises:
            HyperError: If the trainer has none.
        """
        found: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(found, "clients") or not hasattr(found, "seen"):
            raise HyperError(
                message(
                    "Federated: the trainer has no clients",
                    expected="a data module with `clients` and `seen`",
                    got=type(found).__name__,
                    help="trainer.fit(task, datamodule=datasets_zoo.experiments.clients.Clients())",
                )
            )
        return cast(_Data, found)

    def setup(self, stage: str) -> None:
        """Checks that the clients are those that the method was made for.

        Args:
            stage: Not used.

        Raises:
            HyperError: If there are more or fewer, or their images are of another shape.
        """
        del stage
        data = self.data
        options = dict(self.hparams)
        shape = (options["channels"], options["size"], options["size"])
        bad = [f"clients of {data.seen}"] if data.seen != self.clients else []
        if self.trainer.world_size > 1:  # the simulated server's gradients are not reduced
            bad.append(f"{self.trainer.world_size} processes, where one simulates all clients")
        x = data.clients[0].train.x
        bad += [f"images of {tuple(x.shape[1:])}"] if tuple(x.shape[1:]) != shape else []
        most = max(int(c.train.y.max()) for c in data.clients)
        bad += [f"label {most}"] if most >= self.classes else []
        if bad:
            raise HyperError(
                message(
                    "Federated: the data do not fit the options",
                    expected=f"{self.clients} clients, images of {shape}, {self.classes} classes",
                    got=bad,
                    help="set model.clients, model.channels, model.size, model.classes",
                )
            )

    def _clients(self, ids: Tensor) -> list[Client]:
        return [self.data.clients[i] for i in ids.tolist()]

    # ------------------------------------------------------------------------ steps

    def configure_optimizers(self) -> Any:
        """The server's: AdamW with its schedule; for an average, SGD of rate 1."""
        if isinstance(self.method, FedAvg):
            return torch.optim.SGD(self.method.server.parameters(), lr=1.0)
        if isinstance(self.method, LocalOnly):  # has none, and Lightning wants one
            return torch.optim.SGD(self.method.target.parameters(), lr=0.0)
        return super().configure_optimizers()

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """One round.

        Args:
            batch: Numbers of the clients, ``(B,)``.
            batch_idx: Number of the round in the epoch.

        Raises:
            HyperError: If a client's loss is not finite.
        """
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        generator = stream(self.seed, 2, self.current_epoch, batch_idx)
        clients = [c.to(self.device) for c in self._clients(batch)]
        done = self.method.round(clients, batch, self.local, generator)
        if not bool(done.losses.isfinite().all()):
            raise HyperError(
                message(
                    "Federated: a loss is not finite",
                    got=str(done.losses.tolist()),
                    help="lower local.lr, or optimization.lr",
                )
            )
        server = [p for p in self.method.parameters() if p.requires_grad]
        if not isinstance(self.method, FedAvg):
            nn.utils.clip_grad_norm_(server, self.clip)
        optimizer.step()
        schedule: Any = self.lr_schedulers()
        if schedule is not None:
            schedule.step()
        self.traffic = (done.bytes("server"), done.bytes("client"))
        self.log_all({"loss": done.losses.mean()}, "train", len(batch))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Accuracies on validation examples.

        Args:
            batch: Numbers of the clients, ``(B,)``.
            batch_idx: Not used.
        """
        del batch_idx
        found = self.judged(self._clients(batch), batch, "val")
        self.log_all({n: x.mean() for n, x in found.items()}, "val", len(batch))

    def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Accuracies on test examples, of clients that took part and of those that did not.

        Args:
            batch: Numbers of the clients, ``(B,)``.
            batch_idx: Not used.
            dataloader_idx: Not used.
        """
        del batch_idx, dataloader_idx
        new = bool((batch >= self.clients).all())
        found = self.judged(self._clients(batch), None if new else batch, "test")
        who = "unseen" if new else "seen"
        named = {f"test/{who}_{n}": x.mean() for n, x in found.items()}
        self.log_dict(named, batch_size=len(batch), add_dataloader_idx=False, sync_dist=True)

    def judged(
        self, clients: Sequence[Client], ids: Tensor | None, part: Part = "test"
    ) -> dict[str, Tensor]:
        """Accuracies of the clients' networks, as sent and after local steps.

        Args:
            clients: B clients.
            ids: Their numbers, ``(B,)``; None if they took no part in training.
            part: Which of their examples.

        Returns:
            ``accuracy``, ``tuned``, ``accuracy_masked``, ``tuned_masked``, each ``(B,)``.
        """
        with torch.inference_mode(False), torch.no_grad():
            clients = [c.to(self.device) for c in clients]
            sent = self.method.personal(clients, ids, self.local, stream(self.seed, 3))
            how = _changed(self.local, steps=self.tune)
            tuned, _ = train_locally(self.method.target, sent, clients, how, stream(self.seed, 4))
            found: dict[str, Tensor] = {}
            for name, states in (("accuracy", sent), ("tuned", tuned)):
                for masked in (False, True):
                    key = f"{name}_masked" if masked else name
                    found[key] = accuracies(
                        self.method.target, states, clients, part, masked=masked
                    ).float()
            return found


def _method(o: dict[str, Any]) -> FederatedMethod:
    """The method that options say, with its networks."""
    name, width, seed = o["method"], o["width"], o["seed"]
    wrong = [f"method {name!r}"] if name not in METHODS else []
    wrong += [f"descriptor {o['descriptor']!r}"] if o["descriptor"] not in DESCRIPTORS else []
    wrong += [f"clip {o['clip']}"] if not o["clip"] > 0 else []
    if wrong:
        raise HyperError(
            message("Federated: options", got=wrong,
                    expected=f"{', '.join(METHODS)}; {', '.join(DESCRIPTORS)}; a positive clip")
        )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = (o["channels"], o["size"], o["classes"])
        target = lenet(*shape, kernels=o["kernels"], hidden=o["hidden"], taps=o["taps"])
        images = ImageLabels(*shape, width, 2 * o["kernels"])
        describe = images if o["descriptor"] == "images" else Labels(o["classes"], width)
    if name == "local":
        return LocalOnly(target, o["clients"], o["new_rounds"])
    if name == "fedavg":
        return FedAvg(target)
    server = HyperServer(
        target,
        width,
        FullHead(tuple(o["head"])),
        o["base"],
        init=o["init"],
        standardise=name == "pefll",
        generator=stream(seed, 0),
    )
    if name == "pefll":
        return PeFLL(server, target, describe, o["examples"])
    new = (o["clients"], o["new_rounds"], o["new_lr"])
    return PFedHN(server, target, *new, generator=stream(seed, 1))


def _changed(local: LocalTraining, **options: Any) -> LocalTraining:
    return LocalTraining(**{**vars(local), **options})


def _made(kind: type[_Options], value: _Options | dict[str, Any] | None) -> _Options | None:
    """Options of a checkpoint are a dict."""
    return kind(**value) if isinstance(value, dict) else value


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Options as numbers, text, lists and dicts."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if name in {"self", "__class__"}:
            continue
        if isinstance(value, LocalTraining | Optimization):
            found[name] = {
                k: list(v) if isinstance(v, tuple) else v for k, v in vars(value).items()
            }
        else:
            found[name] = list(value) if isinstance(value, tuple) else value
    return found
