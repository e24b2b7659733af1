"""Graph hypernetworks in files: safetensors, with their options and a card in the header."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from wspace.errors import CheckpointError, HyperError, message
from wspace.hyper.graph.network import GraphHyperNetwork

TRAINED = Path(__file__).parent.parent / "trained"
SHIPPED: tuple[str, ...] = ("ghn-small",)
"""Names that `load_ghn` knows."""
FORMAT = "wspace-ghn-1"


def save_ghn(
    ghn: GraphHyperNetwork,
    path: str | Path,
    *,
    card: Mapping[str, Any] | None = None,
    half: bool = False,
) -> None:
    """Writes a graph hypernetwork, with its options.

    Args:
        ghn: The hypernetwork.
        path: File to write, safetensors.
        card: What a reader should know: data, seeds, results; anything that JSON can hold.
        half: Whether to write numbers in half precision.
    """
    from safetensors.torch import save_file

    metadata = {
        "format": FORMAT,
        "options": json.dumps(ghn.options),
        "card": json.dumps(dict(card or {})),
    }
    state = {k: x.detach().cpu().contiguous() for k, x in ghn.state_dict().items()}
    if half:
        state = {k: x.half() for k, x in state.items()}
    save_file(state, path, metadata)


def load_ghn(name: str | Path) -> GraphHyperNetwork:
    """The graph hypernetwork of a name or in a file.

    Args:
        name: One of `SHIPPED`, or a file written by `save_ghn`.

    Returns:
        The hypernetwork in float32 and evaluation mode, without gradients.

    Raises:
        CheckpointError: If there is no such hypernetwork, or the file holds something else.
    """
    path = _place(name)
    metadata, state = _read(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(_bad(path, metadata.get("format") or "weights of another network"))
    try:
        ghn = GraphHyperNetwork(**json.loads(metadata["options"]))
    except (TypeError, KeyError, ValueError, HyperError) as error:  # of a later version, or damaged
        raise CheckpointError(_bad(path, f"{type(error).__name__}: {error}")) from error
    wanted = {k: x.shape for k, x in ghn.state_dict().items()}
    if wanted != {k: x.shape for k, x in state.items()}:
        raise CheckpointError(_bad(path, "tensors of another form"))
    ghn.load_state_dict({k: x.float() for k, x in state.items()})
    return ghn.eval().requires_grad_(requires_grad=False)


def ghn_card(name: str | Path) -> dict[str, Any]:
    """The card of a graph hypernetwork.

    Args:
        name: As for `load_ghn`.

    Returns:
        What `save_ghn` was given.
    """
    found: dict[str, Any] = json.loads(_read(_place(name))[0].get("card", "{}"))
    return found


def _place(name: str | Path) -> Path:
    return TRAINED / f"{name}.safetensors" if name in SHIPPED else Path(name)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return dict(file.metadata() or {}), state
    except (SafetensorError, OSError) as error:
        raise CheckpointError(_bad(path, f"{type(error).__name__}: {error}")) from error


def _bad(path: Path, got: str) -> str:
    known = ", ".join(SHIPPED) or "none in this version"
    return message(
        f"load_ghn: {str(path)!r} is not a graph hypernetwork",
        expected=f"a file written by `save_ghn`, or a name: {known}",
        got=got,
    )
