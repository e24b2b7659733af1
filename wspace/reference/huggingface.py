"""`hf:` the transformers class that a configuration names, its weights, and inputs for it."""

import importlib
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from wspace.errors import CheckpointError, message
from wspace.io import Checkpoint, Layout, fit_checkpoint, load_checkpoint, load_into, weights_file
from wspace.reference.model import BATCH, SIDE, Model, building, library, near, random

TOKENS = 7
WAVE = 4000  # samples: a quarter of a second, more than any of the usual receptive fields


def from_hf(name: str, *, meta: bool, weights: bool | Literal["auto"]) -> Model:
    """Model of a folder, or of a configuration file; the arguments are those of `resolve`."""
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        beside = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        raise CheckpointError(
            message(
                f"resolve: there is no {file}",
                expected="a folder with a config.json, or such a file",
                got=f"hf:{name}",
                help=near(path.name, beside) or f"download it first: hf download {name}",
            )
        )
    transformers = library("transformers", "hf", "hf")
    with building(f"the configuration {file}", False):
        config = transformers.AutoConfig.from_pretrained(
            str(file), local_files_only=True, trust_remote_code=False
        )
    _without_cache(config)
    with building(f"hf:{name}", meta):
        kinds = [getattr(transformers, item, None) for item in config.architectures or []]
        known: list[Any] = [item for item in kinds if _is_model(item, transformers.PreTrainedModel)]
        if known:
            module = cast(nn.Module, known[0](config))
        else:
            module = transformers.AutoModel.from_config(config, trust_remote_code=False)
        module.eval()
    model = Model(name, module, kwargs=_hf_inputs(module, config))
    if not weights or (weights == "auto" and not path.is_dir()):
        return model
    if weights_file(file.parent) is None:
        if weights == "auto":
            return model
        raise CheckpointError(message(f"resolve: folder {file.parent} holds no weights"))
    raw = load_checkpoint(file.parent)
    try:
        checkpoint = fit_checkpoint(raw, module)
    except CheckpointError:
        if meta and weights == "auto":
            return model  # rearranging needs the memory that meta is to save
        rearranged = _rearranged(raw, type(module))
        if rearranged is None:
            raise
        checkpoint = fit_checkpoint(rearranged, module)
    if not meta:
        load_into(module, checkpoint)
    return replace(model, checkpoint=checkpoint)


def _is_model(item: object, model: type) -> bool:
    return isinstance(item, type) and issubclass(item, model)


def _rearranged(raw: Checkpoint, kind: Any) -> Checkpoint | None:
    """The weights as transformers rearranges them while loading; None if it cannot either."""
    # From version 5 on, its modules differ from the files of the hub: ViT has other names, experts
    # of Mixtral are one tensor. `raw` has been read, so the files are known to be safe.
    folder = raw.path
    try:
        loaded, report = kind.from_pretrained(
            str(folder),
            dtype="auto",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception:  # what does not fit is told by the error of `fit_checkpoint`
        return None
    if any(report.values()):
        return None
    name = "model.safetensors"
    layout = Layout("safetensors", folder / name, folder=True, metadata={name: {"format": "pt"}})
    return Checkpoint(loaded.state_dict(), layout)


def _without_cache(config: Any) -> None:
    """Turns key-value caches off, also in the configurations of submodels."""
    for part in _parts(config):
        if getattr(part, "use_cache", None) is not None:
            part.use_cache = False


def _parts(config: Any) -> list[Any]:
    """A configuration and those that it is made of."""
    kind = importlib.import_module("transformers").PretrainedConfig
    inner = [item for item in vars(config).values() if isinstance(item, kind)]
    return [config, *(part for item in inner for part in _parts(item))]


def _setting(config: Any, name: str, default: Any = None) -> Any:
    """First value of this name in a configuration or its parts."""
    values = (getattr(part, name, None) for part in _parts(config))
    return next((value for value in values if value is not None), default)


def _hf_inputs(module: Any, config: Any) -> dict[str, Tensor]:
    """Inputs for the forward of a transformers model; those it declares, shaped by its settings."""
    takes = inspect.signature(module.forward).parameters
    main: str = module.main_input_name
    inputs: dict[str, Tensor] = {}
    if main == "input_ids":
        inputs[main] = _ids(config, TOKENS)
        dual = all(getattr(config, part, None) for part in ("text_config", "vision_config"))
        inserted = any(name.startswith("image_token") for name in vars(config))
        if "pixel_values" in takes and dual and not inserted:  # two encoders, as in CLIP
            inputs["pixel_values"] = random(*_pixels(config))
    elif shape := _shape(main, config):
        inputs[main] = random(BATCH, *shape)
        if main == "pixel_values" and "input_ids" in takes and not config.is_encoder_decoder:
            inputs["input_ids"] = _ids(config, TOKENS)
    elif main in module.dummy_inputs:
        inputs |= module.dummy_inputs
    else:
        raise CheckpointError(
            message(
                f"resolve: no example inputs are known for {type(module).__name__}",
                expected="input_ids, pixel_values, input_values, input_features or past_values",
                got=f"main input {main!r}",
                help="write a factory that returns (module, args, kwargs): py:package.module:name",
            )
        )
    if config.is_encoder_decoder and "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = _ids(getattr(config, "decoder", config), TOKENS - 2)
    return inputs


def _ids(config: Any, length: int) -> Tensor:
    """Tokens without special meaning, and an end."""
    size: int = _setting(config, "vocab_size", 2)
    special = {
        value
        for part in _parts(config)
        for name, item in vars(part).items()
        if name.endswith(("_token_id", "_token_index"))
        for value in (item if isinstance(item, list) else [item])
    }
    free = [token for token in range(min(size, 1000)) if token not in special] or [0]
    ids = torch.tensor([free[(5 * i + 1) % len(free)] for i in range(BATCH * length)])
    ids = ids.reshape(BATCH, length)
    end = _setting(config, "eos_token_id")
    if isinstance(end, int) and 0 <= end < size:
        ids[:, -1] = end
    return ids


def _shape(main: str, config: Any) -> tuple[int, ...]:
    """Shape of one example of the main input; empty if the settings do not tell."""

    def given(*names: str) -> tuple[int, ...]:
        values = tuple(_setting(config, name) for name in names)
        return () if None in values else values

    if main == "pixel_values":
        frames: tuple[int, ...] = given("num_frames")
        return (*frames, *_pixels(config)[1:])
    if main == "input_values":
        channels = given("audio_channels")
        return given("max_length", "num_mel_bins") if _spectral(config) else (*channels, WAVE)
    if main == "input_features":
        whisper = given("num_mel_bins", "max_source_positions")
        width = given("input_feat_per_channel") or given("feature_projection_input_dim")
        if width:
            return (8 * TOKENS, *width)
        return (whisper[0], 2 * whisper[1]) if whisper else ()
    return given("context_length", "num_input_channels") if main == "past_values" else ()


def _spectral(config: Any) -> bool:
    return _setting(config, "num_mel_bins") is not None and not _setting(config, "conv_stride")


def _pixels(config: Any) -> tuple[int, ...]:
    size = _setting(config, "image_size", SIDE)
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    return BATCH, _setting(config, "num_channels", 3), *sides
