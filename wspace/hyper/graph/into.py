"""Predicted parameters written into a module, all of them or none."""

from typing import Literal, cast

import torch
from torch import Tensor, nn

from wspace.batchnorm import Batches, reestimate, statistics
from wspace.errors import HyperError, message
from wspace.hyper.graph.architecture import architecture_of
from wspace.hyper.graph.network import GraphHyperNetwork, Prediction, coverage_of
from wspace.restore import buffers_of, modes_of, put_back, put_modes
from wspace.space import WeightSpace

Statistics = Batches | Literal["reset", "keep"]


def predict_into(
    ghn: GraphHyperNetwork,
    module: nn.Module,
    space: WeightSpace,
    *,
    batchnorm: Statistics | None = None,
) -> Prediction:
    """Writes predicted parameters into a module; if anything fails, nothing is changed.

    Args:
        ghn: The hypernetwork.
        module: Of the space's architecture, with real weights.
        space: Its weight space.
        batchnorm: What becomes of the running statistics of BatchNorm layers, which fit other
            weights: batches to estimate them anew (`wspace.batchnorm.reestimate`); ``"reset"`` for
            0 and 1, for whoever trains on or judges with the statistics of batches; or ``"keep"``.
            A module that has such statistics needs an answer.

    Returns:
        What was predicted, and what was kept.

    Raises:
        HyperError: If the module is of another architecture, a prediction is not finite, or
            nothing is said about the statistics that the module has.
    """
    given = dict(module.named_parameters(remove_duplicate=False))
    wrong = _misfits(given, space)
    if wrong:
        raise HyperError(
            message("predict_into: the module is not of this space", got=wrong,
                    help="pass wspace.trace(module, example)")
        )  # fmt: skip
    modes = modes_of(module)
    try:
        module.train()
        estimated = bool(statistics(module))
    finally:
        put_modes(modes)
    if estimated and batchnorm is None:
        raise HyperError(
            message("predict_into: running statistics of BatchNorm are not predicted",
                    expected="batchnorm=[batch, ...], 'reset' or 'keep'")
        )  # fmt: skip
    with torch.no_grad():
        state = cast("dict[str, Tensor]", ghn(space))
    bad = [name for name, x in state.items() if not bool(x.isfinite().all())]
    if bad:
        raise HyperError(message("predict_into: predictions that are not finite", got=bad))
    old = {name: x.detach().clone() for name, x in given.items()}
    buffers = buffers_of(module)
    try:
        _write(given, state)
        if estimated:
            _refresh(module, batchnorm)
    except BaseException:
        _write(given, old)
        put_back(buffers)
        raise
    return coverage_of(space)


def _misfits(given: dict[str, nn.Parameter], space: WeightSpace) -> list[str]:
    forms = {name: f for f in architecture_of(space).forms for name in f.names}
    wrong = [f"no parameter {name!r}" for name in forms if name not in given]
    wrong += [
        f"{name!r} of shape {tuple(x.shape)}, in the space {forms[name].shape}"
        for name, x in given.items()
        if name in forms and tuple(x.shape) != forms[name].shape
    ]
    wrong += [f"parameter {name!r} that the space lacks" for name in given if name not in
              space.by_name]  # fmt: skip
    return wrong + [f"{name!r} without values" for name, x in given.items() if x.is_meta]


@torch.no_grad()
def _write(given: dict[str, nn.Parameter], state: dict[str, Tensor]) -> None:
    for name, x in state.items():
        given[name].copy_(x)


def _refresh(module: nn.Module, batchnorm: Statistics | None) -> None:
    if isinstance(batchnorm, str):
        if batchnorm == "reset":
            for m in module.modules():
                if isinstance(m, nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage]
                    m.reset_running_stats()
        elif batchnorm != "keep":
            raise HyperError(
                message("predict_into: batchnorm", expected="batches, 'reset' or 'keep'",
                        got=repr(batchnorm))
            )  # fmt: skip
        return
    assert batchnorm is not None
    reestimate(module, batchnorm, frozen=True)
