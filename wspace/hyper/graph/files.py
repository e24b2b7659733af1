"""Graph hypernetworks in files: safetensors, with their options and a card in the header."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wspace.hyper.graph.network import GraphHyperNetwork
from wspace.io.shipped import Shipped

SHIPPED: tuple[str, ...] = ("ghn-small",)
"""Names that `load_ghn` knows."""

_FILES = Shipped(
    folder=Path(__file__).parent.parent / "trained",
    names=SHIPPED,
    format="wspace-ghn-1",
    reader="load_ghn",
    kind="a graph hypernetwork",
    writer="save_ghn",
)


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
    _FILES.save(ghn, ghn.options, path, card=card, half=half)


def load_ghn(name: str | Path) -> GraphHyperNetwork:
    """The graph hypernetwork of a name or in a file.

    Args:
        name: One of `SHIPPED`, or a file written by `save_ghn`.

    Returns:
        The hypernetwork in float32 and evaluation mode, without gradients.

    Raises:
        CheckpointError: If there is no such hypernetwork, or the file holds something else.
    """
    return _FILES.load(name, GraphHyperNetwork)


def ghn_card(name: str | Path) -> dict[str, Any]:
    """The card of a graph hypernetwork.

    Args:
        name: As for `load_ghn`.

    Returns:
        What `save_ghn` was given.
    """
    return _FILES.card(name)
