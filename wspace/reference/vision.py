"""`torchvision:` and `timm:` untrained models of those libraries."""

import inspect
from collections.abc import Iterable
from typing import Any

from wspace.errors import CheckpointError, message
from wspace.reference.model import BATCH, SIDE, Model, building, library, near, random


def from_torchvision(name: str, meta: bool) -> Model:
    """Untrained model of torchvision. `get_model` would do, but its defaults download backbones."""
    models = library("torchvision.models", "vision", "torchvision")
    known: list[str] = models.list_models()
    if name.lower() not in known:
        raise _unknown(f"torchvision:{name}", name, known)
    build = models.get_model_builder(name)
    task = build.__module__
    if ".detection." in task:
        raise CheckpointError(
            message(
                f"resolve: torchvision:{name} detects objects",
                expected="a model whose output is a function of its input alone, box by box",
                got="a model that selects boxes by their scores",
                help="name its backbone by a factory: py:package.module:name",
            )
        )
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(build).parameters:
        options["weights_backbone"] = None  # its default would be downloaded
    if name.lower().removeprefix("quantized_") in {"inception_v3", "googlenet"}:
        options["init_weights"] = True  # the default, but torchvision warns unless it is said
    with building(f"torchvision:{name}", meta):
        module = build(**options)
    if ".video." in task:
        short = name.lower() not in {"s3d", "mvit_v1_b", "mvit_v2_s"}
        shape = (1, 3, 8, 112, 112) if short else (1, 3, 16, SIDE, SIDE)
        return Model(name, module, (random(*shape),))
    if ".optical_flow." in task:
        pair = tuple(random(1, 3, 128, 128) for _ in range(2))
        return Model(name, module, pair)
    side = 299 if "inception" in name.lower() else SIDE
    return Model(name, module, (random(BATCH, 3, side, side),))


def from_timm(name: str, meta: bool) -> Model:
    """Untrained model of timm."""
    timm = library("timm", "timm", "timm")
    known: list[str] = timm.list_models()
    if not timm.is_model(name.partition(".")[0]):
        raise _unknown(f"timm:{name}", name.partition(".")[0], known)  # a hub name would download
    with building(f"timm:{name}", meta):
        module = timm.create_model(name, pretrained=False)
    settings: Any = getattr(module, "default_cfg", None) or {}
    shape: tuple[int, ...] = settings.get("input_size") or (3, SIDE, SIDE)
    return Model(name, module, (random(BATCH, *shape),))


def _unknown(reference: str, name: str, known: Iterable[str]) -> CheckpointError:
    scheme = reference.partition(":")[0]
    help = near(name, known) or f"{scheme}.list_models() lists them"
    return CheckpointError(message(f"resolve: there is no model {reference}", help=help))
