"""Trained predictors in files: safetensors, with their form and a card in the header."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from wspace.errors import CheckpointError, message
from wspace.nowcast.graph import NiNoGraph
from wspace.nowcast.mlp import WNN, NiNoMLP

FORMAT = "wspace-predictor-1"
TRAINED = Path(__file__).parent / "trained"
SHIPPED = tuple(sorted(file.stem for file in TRAINED.glob("*.safetensors")))
"""Names of the predictors that come with the package."""

LEFT = (
    "training leaves predictor.safetensors in the folder of the run; published predictors are .pt "
    "files (`load_published`)"
)

_FORMS = {"NiNoMLP": NiNoMLP, "NiNoGraph": NiNoGraph, "WNN": WNN}


def save(
    predictor: NiNoMLP | NiNoGraph | WNN, path: str | Path, *, card: Mapping[str, Any] | None = None
) -> None:
    """Writes a predictor, with all its options.

    Args:
        predictor: The predictor.
        path: File to write.
        card: What a reader should know: data, seeds, limits; anything that JSON can hold.
    """
    from safetensors.torch import save_file

    metadata = {
        "format": FORMAT,
        "form": type(predictor).__name__,
        "options": json.dumps(predictor.options),
        "card": json.dumps(dict(card or {})),
    }
    state = {k: x.detach().cpu().contiguous() for k, x in predictor.state_dict().items()}
    save_file(state, path, metadata)


def load(name: str | Path, **options: Any) -> NiNoMLP | NiNoGraph | WNN:
    """The predictor of a name or in a file.

    Args:
        name: One of `SHIPPED`, or a file written by `save`.
        options: Options other than those it was saved with: ``precision``, ``laplacian``,
            ``chunk``, ``still``, ``drift``, those that it has.

    Returns:
        The predictor, in evaluation mode.

    Raises:
        CheckpointError: If there is no such predictor, or the file holds something else.
        NowcastError: If it has no such option.
    """
    path = TRAINED / f"{name}.safetensors" if name in SHIPPED else Path(name)
    metadata, state = _read(path)
    form = _FORMS.get(metadata.get("form", ""))
    if metadata.get("format") != FORMAT or form is None:
        raise CheckpointError(_bad(path, *_other(path, metadata, state)))
    chosen = form.checked("load", options)
    try:
        predictor = form(**{**json.loads(metadata["options"]), **chosen})
    except (TypeError, KeyError, ValueError) as error:  # of a later version, or damaged
        raise CheckpointError(_bad(path, f"{type(error).__name__}: {error}")) from error
    wanted = {k: x.shape for k, x in predictor.state_dict().items()}
    if wanted != {k: x.shape for k, x in state.items()}:
        raise CheckpointError(_bad(path, "tensors of another form"))
    predictor.to(next(iter(state.values())).dtype).load_state_dict(state)
    predictor.origin = path.stem
    return predictor.eval().requires_grad_(False)


def card_of(name: str | Path) -> dict[str, Any]:
    """The card of a predictor.

    Args:
        name: As for `load`.

    Returns:
        What `save` was given.
    """
    path = TRAINED / f"{name}.safetensors" if name in SHIPPED else Path(name)
    return cast("dict[str, Any]", json.loads(_read(path)[0].get("card", "{}")))


def _read(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return dict(file.metadata() or {}), state
    except (SafetensorError, OSError) as error:
        raise CheckpointError(_bad(path, f"{type(error).__name__}: {error}")) from error


def _other(path: Path, metadata: Mapping[str, str], state: Mapping[str, Any]) -> tuple[str, str]:
    """What a file is that is no predictor, and what to take instead."""
    held = metadata.get("format", "")
    if held == FORMAT:
        return f"a predictor of the form {metadata.get('form')!r}", "a later version wrote it"
    if held.startswith("wspace-task"):
        near = path.parent.parent / "predictor.safetensors"
        help = f"the predictor of that run is {near}" if near.is_file() else LEFT
        return "a checkpoint to resume training from", help
    return f"weights of another network: {', '.join(list(state)[:3])}", LEFT


def _bad(path: Path, got: str, help: str = LEFT) -> str:
    known = ", ".join(SHIPPED) or "none in this version"
    return message(
        f"load: {str(path)!r} is not a predictor",
        expected=f"a file written by `wspace.nowcast.save`, or a name: {known}",
        got=got,
        help=help,
    )
