"""`Nowcasting`: training a predictor of future states on the trajectories of a zoo.

Masked absolute error of all horizons at once, in the scale of the past states, after Knyazev et al.
(2025), "Accelerating training with neuron interaction and nowcasting networks" (arXiv 2409.04434).
Everything is float32, and a loss that is not finite ends the training: nothing is skipped or begun
again. A batch holds trajectories of one architecture; the zoo may hold several.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from wspace.errors import WSpaceError, ZooError, message
from wspace.graph import ParameterGraph, encode
from wspace.lit.data import stream
from wspace.lit.task import Optimization, Task
from wspace.lit.windows import Cut, Scaled, Windows, cut, line, reach, scaled, trained_names
from wspace.nowcast.graph import NiNoGraph
from wspace.nowcast.mlp import NiNoMLP, kinds_of
from wspace.nowcast.predictor import Past
from wspace.nowcast.store import save
from wspace.nowcast.topology import Topology
from wspace.nowcast.wiring import traced
from wspace.space import WeightSpace
from wspace.zoo import Zoo, ZooBatch

log = logging.getLogger(__name__)

Network = NiNoMLP | NiNoGraph
PREDICTORS: dict[str, type[NiNoMLP] | type[NiNoGraph]] = {
    "NiNoMLP": NiNoMLP,
    "NiNoGraph": NiNoGraph,
}
"""Predictors that can be trained, by name."""

FILE = "predictor.safetensors"
"""What a run leaves in its folder, for `wspace.nowcast.load`."""

SHOWN = (1, 5, 10, 20, 40)
"""Horizons whose errors are logged."""


class Nowcasting(Task):
    """A predictor of future states, on trajectories; ``wspace zoo build mixed_trajectories``.

    Logs the error relative to that of no change (``relative``, at single horizons
    ``relative_10``, as far as trajectories go, of every architecture ``relative_of_0`` …) and to
    that of the least-squares line (``relative_to_line``). Needs ``data.time: null``. The run's
    folder gets
    ``predictor.safetensors``, which `wspace.nowcast.load` reads.

    Args:
        metanet: Name of a predictor (`PREDICTORS`), or one.
        options: Options of the predictor that is named.
        windows: How windows are cut out of trajectories.
        optimization: Optimiser and learning rate.
        trust: See `Task`.

    Raises:
        WSpaceError: If there is no such predictor, or it has no such option.
    """

    monitor = ("val/relative", "min")

    def __init__(
        self,
        metanet: str | nn.Module = "NiNoMLP",
        options: dict[str, Any] | None = None,
        *,
        windows: Windows = Windows(),  # noqa: B008  (frozen)
        optimization: Optimization = Optimization(lr=3e-3),  # noqa: B008  (frozen)
        trust: Sequence[str] = (),
    ) -> None:
        made = _made(metanet, options or {}) if isinstance(metanet, str) else metanet
        if not isinstance(made, NiNoMLP | NiNoGraph):
            raise _unknown(type(made).__name__)
        super().__init__(made, options, optimization, 1, trust, {"windows": asdict(windows)})
        self.given = not isinstance(metanet, str)
        self.windows = windows
        self.sums: dict[int, Tensor] = {}
        self._known: dict[WeightSpace, Any] = {}

    @property
    def predictor(self) -> Network:
        """What is trained."""
        return cast(Network, self.metanet)

    # ------------------------------------------------------------ what a task says

    def prepare(self, zoo: Zoo) -> None:
        """Checks that the zoo has trajectories, long enough, and that they come whole."""
        if zoo.steps is None or self.data.time is not None:
            raise ZooError(
                message(
                    f"Nowcasting: {zoo.path} gives single states",
                    expected="trajectories: a zoo with a time axis, and data.time: null",
                    got="no time axis" if zoo.steps is None else f"data.time {self.data.time}",
                    help="wspace zoo build mixed_trajectories …",
                )
            )
        if self.data.augment:
            raise ZooError(
                message("Nowcasting: trajectories are not augmented", help="data.augment: []")
            )
        lengths = (self.predictor.context, self.predictor.longest)
        cut(1, len(zoo.steps), self.windows, lengths, torch.Generator())
        most = reach(len(zoo.steps), self.windows, self.predictor.context)
        if most < self.predictor.longest:
            lost = [f"relative_{k}" for k in SHOWN if most < k <= self.predictor.longest]
            rank_zero_only(log.warning)(
                "Nowcasting: trajectories of %d states reach %d spacings ahead; the predictor "
                "learns nothing of horizons %d to %d%s",
                *(len(zoo.steps), most, most + 1, self.predictor.longest),
                f", and {', '.join(lost)} are left out" if lost else "",
            )

    def build(self, *, fresh: bool = True) -> None:
        """Nothing: the predictor is there."""
        del fresh

    def fit_statistics(self, graphs: Sequence[ParameterGraph]) -> None:
        """Nothing: predictors scale every window by itself."""
        del graphs
        self.fitted = True

    def forward(self, graphs: ParameterGraph | Sequence[ParameterGraph]) -> NoReturn:
        """Predictors do not read single networks.

        Raises:
            WSpaceError: Always.
        """
        del graphs
        raise WSpaceError(
            message(
                "Nowcasting: a predictor reads the last states of a run, not networks",
                help="wspace.nowcast.load(path).predict(module, states, horizon=…)",
            )
        )

    def columns(self, answer: Any) -> dict[str, Tensor]:
        """There are none, see `forward`."""
        del answer
        return {}

    def loss(self, batch: ZooBatch, stage: str) -> Tensor:
        """Mean absolute error of all entries and known horizons, in the scale of the past."""
        total, count = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for graph in batch.graphs:
            values = graph.values
            some = next(iter(values.values()))
            drawn = self._generator(batch, stage)
            lengths = (self.predictor.context, self.predictor.longest)
            where = cut(some.shape[0], some.shape[1], self.windows, lengths, drawn)
            errors = self._errors(graph, where, drawn, stage)
            total, count = total + errors[0].sum(), count + errors[-1].sum()
            if stage != "train":
                self._note(graph.space, errors)
        return total / count.clamp(min=1)

    def _generator(self, batch: ZooBatch, stage: str) -> torch.Generator:
        """In training the batch's, in validation always the same for the same rows."""
        if stage == "train":
            return self.data.generator(batch, 7)
        return stream(self.data.seed, int(batch.index[0]), len(batch.index))

    def _diverged(self, batch: ZooBatch, batch_idx: int, loss: float) -> str:
        summed = [  # what is not finite at any time is so in the sum
            encode(g.space, {n: x.double().sum(1) for n, x in g.values.items()})
            for g in batch.graphs
        ]
        return super()._diverged(replace(batch, graphs=summed), batch_idx, loss)

    # ------------------------------------------------------------ errors

    def _errors(
        self, graph: ParameterGraph, where: Cut, drawn: torch.Generator, stage: str
    ) -> Tensor:
        """Sums over entries, ``(4, longest)``: errors of predictor, no change, line; number."""
        known = where.known.to(self.device)
        names = trained_names(graph.space)
        everything = isinstance(self.predictor, NiNoGraph)
        entries = None if everything else self.windows.entries
        parts = list(scaled(graph.values, names, where, entries=entries, generator=drawn))
        if everything:
            changes = self._by_graph(graph.space, parts)
        else:
            if self.windows.mirror and stage == "train":
                parts = _mirrored(parts, drawn)
            changes = self._by_entry(graph.space, parts)
        return _sums(parts, changes, known, stage == "train")

    def _by_entry(self, space: WeightSpace, parts: Sequence[Scaled]) -> list[Tensor]:
        """Predicted changes ``(n, longest, entries)`` of every tensor, in one pass."""
        if space not in self._known:
            self._known[space] = _kinds(space)
        kinds = cast(Mapping[str, Tensor], self._known[space])
        rows: list[Tensor] = []
        for p in parts:
            kind = kinds[p.name].to(p.past.device)
            kind = kind if p.chosen is None else kind[p.chosen]
            rows.append(kind.expand(len(p.past), -1).flatten())
        x = torch.cat([p.past.mT.flatten(0, 1) for p in parts])
        made = cast(NiNoMLP, self.predictor)(x, torch.cat(rows)).split([len(r) for r in rows])
        return [y.unflatten(0, (len(p.past), -1)).mT for p, y in zip(parts, made, strict=True)]

    def _by_graph(self, space: WeightSpace, parts: Sequence[Scaled]) -> list[Tensor]:
        """The same with all tensors of a network together."""
        if space not in self._known:
            with torch.inference_mode(False):
                self._known[space] = traced(space)
        topology = cast(Topology, self._known[space])
        shapes = {p.name: space[p.name].shape for p in parts}
        windows = {p.name: p.past.unflatten(2, shapes[p.name] or (1,)) for p in parts}
        windows = {n: x if shapes[n] else x[..., 0] for n, x in windows.items()}
        # what a topology keeps must be fit for training, though Lightning validates first
        with torch.inference_mode(False), torch.set_grad_enabled(self.training):
            made = cast(NiNoGraph, self.predictor)(topology, windows)
        return [
            made[p.name].flatten(2) if shapes[p.name] else made[p.name][..., None] for p in parts
        ]

    # ------------------------------------------------------------ metrics and the result

    def _note(self, space: WeightSpace, errors: Tensor) -> None:
        assert self.seen is not None
        spaces = self.data.zoo.spaces
        kind = spaces.index(space)
        self.sums[kind] = self.sums.get(kind, torch.zeros_like(errors)) + errors.detach()

    def _report(self, stage: str) -> None:
        """Logs relative errors of all validation networks; sums of several processes are added."""
        longest = self.predictor.longest
        none = torch.zeros(4, longest, device=self.device)
        every = [self.sums.get(k, none) for k in range(len(self.data.zoo.spaces))]
        self.sums = {}
        summed = cast(Tensor, self.trainer.strategy.reduce(torch.stack(every), reduce_op="sum"))
        model, still, straight, _ = summed.sum(0).unbind()
        if not bool(still.any()):
            if self.trainer.sanity_checking:
                return  # of a few networks only
            raise ZooError(
                message(
                    f"Nowcasting: no network for {stage} moves",
                    expected="states that differ, for errors relative to that of no change",
                    help="choose other `fractions`, or a zoo of networks that were trained",
                )
            )
        found = {"relative": model.sum() / still.sum()}
        if bool(straight.any()):
            found["relative_to_line"] = model.sum() / straight.sum()
        for k in SHOWN:
            if k <= longest and float(still[k - 1]):  # else no trajectory goes so far
                found[f"relative_{k}"] = model[k - 1] / still[k - 1]
        for kind, (one, other, *_) in enumerate(summed.sum(2)):
            if other > 0:
                found[f"relative_of_{kind}"] = one / other
        self.report(stage, found)

    def on_validation_epoch_end(self) -> None:
        """Logs the errors of all networks."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Logs the errors of all networks."""
        self._report("test")

    def on_fit_end(self) -> None:
        """Writes the predictor as it is now into the run's folder."""
        folder = self.trainer.log_dir  # all processes have to ask
        if folder is not None and self.trainer.is_global_zero:
            Path(folder).mkdir(parents=True, exist_ok=True)
            card = {"zoo": str(self.data.path), "steps": self.trainer.global_step, **self.config}
            save(self.predictor, Path(folder) / FILE, card=card)


def _made(name: str, options: Mapping[str, Any]) -> nn.Module:
    if name not in PREDICTORS:
        raise _unknown(name)
    try:
        made = PREDICTORS[name](**options)
    except TypeError as error:
        raise WSpaceError(message(f"Nowcasting: options of {name}", got=str(error))) from error
    begin(made)
    return made


def begin(predictor: Network, *, gain: float = 10.0) -> None:
    """Initial weights from which a predictor learns fast.

    States of one window differ little against the deviation of the whole tensor, so the first map
    reads the last of them and differences from it times a gain. The last map is zero: training
    begins with no change.

    Args:
        predictor: Its weights are replaced.
        gain: Factor of the differences.
    """
    for module in predictor.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
    last = predictor.layers[-1] if isinstance(predictor, NiNoMLP) else predictor.head
    for x in last.parameters():
        nn.init.zeros_(x)
    context = predictor.context
    read = torch.eye(context)
    read[:-1] *= -gain
    read[:-1, -1] = gain
    with torch.no_grad():
        weight = predictor.enter.weight.unflatten(1, (-1, context))
        weight.copy_(torch.randn_like(weight) * context**-0.5 @ read)


def _unknown(name: str) -> WSpaceError:
    return WSpaceError(
        message(
            "Nowcasting: no predictor that can be trained",
            expected=" or ".join(PREDICTORS),
            got=name,
        )
    )


def _kinds(space: WeightSpace) -> dict[str, Tensor]:
    """Kind of every entry of every flat parameter."""
    names = tuple(trained_names(space))
    out = {name: torch.zeros(space[name].numel, dtype=torch.int64) for name in names}
    for name, found in kinds_of(Past(space, {}, names, "traced", space)).items():
        for kind, entries in found:
            out[name][slice(None) if entries is None else entries] = kind
    return out


def _mirrored(parts: Sequence[Scaled], drawn: torch.Generator) -> list[Scaled]:
    """Windows of which half, drawn for every tensor anew, have all signs reversed."""
    out: list[Scaled] = []
    for p in parts:
        sign = torch.randint(2, (len(p.past), 1, 1), generator=drawn).to(p.past) * 2 - 1
        out.append(p._replace(past=p.past * sign, ahead=p.ahead * sign))
    return out


def _sums(parts: Sequence[Scaled], changes: Sequence[Tensor], known: Tensor, train: bool) -> Tensor:
    """See `Nowcasting._errors`; in training those of the predictor and the number only."""
    longest = known.shape[1]
    totals = known.new_zeros(4, longest, dtype=torch.float32)
    weights = None if train else line(parts[0].past.shape[1], longest).to(known.device)
    rows: list[Tensor] = []
    for part, change in zip(parts, changes, strict=True):
        target = part.ahead - part.past[:, -1:]
        mask = known[:, :, None]
        error = ((change - target).abs() * mask).sum((0, 2))
        count = known.sum(0) * part.past.shape[2]
        if weights is None:
            rows.append(torch.stack([error, totals[0], totals[0], count]))
            continue
        still = (target.abs() * mask).sum((0, 2))
        straight = ((weights @ part.past - part.ahead).abs() * mask).sum((0, 2))
        rows.append(torch.stack([error, still, straight, count]))
    return totals + torch.stack(rows).sum(0)
