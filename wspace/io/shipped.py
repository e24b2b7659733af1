"""Networks in files that say how to make them: options and a card in a safetensors header.

Some come with the package and are known by name. What they are is the business of who makes them.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from wspace.errors import CheckpointError, HyperError, message

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Shipped:
    """Files of one kind of network, and those of them that come with the package.

    Attributes:
        folder: Where those lie.
        names: What they are called.
        format: What the header of such a file says that it is.
        reader: Who reads them, for errors: ``load_ghn``.
        kind: What they hold, for errors: ``a graph hypernetwork``.
        writer: Who writes them, for errors: ``save_ghn``.
    """

    folder: Path
    names: tuple[str, ...]
    format: str
    reader: str
    kind: str
    writer: str

    def save(
        self,
        network: nn.Module,
        options: Mapping[str, Any],
        path: str | Path,
        *,
        card: Mapping[str, Any] | None = None,
        half: bool = False,
    ) -> None:
        """Writes a network.

        Args:
            network: The network.
            options: Arguments that it is made of again; anything that JSON can hold.
            path: File to write.
            card: What a reader should know; anything that JSON can hold.
            half: Whether to write numbers in half precision.
        """
        from safetensors.torch import save_file

        metadata = {
            "format": self.format,
            "options": json.dumps(dict(options)),
            "card": json.dumps(dict(card or {})),
        }
        state = {k: x.detach().cpu().contiguous() for k, x in network.state_dict().items()}
        save_file({k: x.half() for k, x in state.items()} if half else state, path, metadata)

    def load(self, name: str | Path, make: Callable[..., Network]) -> Network:
        """The network of a name or in a file.

        Args:
            name: One of `names`, or a file that `save` wrote.
            make: From options to the network.

        Returns:
            The network in evaluation mode, without gradients; its numbers have the types that
            `make` gives them.

        Raises:
            CheckpointError: If there is no such network, or the file holds something else.
        """
        path = self._place(name)
        metadata, state = self._read(path)
        if metadata.get("format") != self.format:
            raise self._bad(path, metadata.get("format") or "weights of another network")
        try:
            network = make(**json.loads(metadata["options"]))
        except (TypeError, KeyError, ValueError, HyperError) as error:  # later version, or damaged
            raise self._bad(path, f"{type(error).__name__}: {error}") from error
        wanted = {k: x.shape for k, x in network.state_dict().items()}
        if wanted != {k: x.shape for k, x in state.items()}:
            raise self._bad(path, "tensors of another form")
        network.load_state_dict(state)
        return network.eval().requires_grad_(requires_grad=False)

    def card(self, name: str | Path) -> dict[str, Any]:
        """The card of a network.

        Args:
            name: As for `load`.

        Returns:
            What `save` was given.
        """
        found: dict[str, Any] = json.loads(self._read(self._place(name))[0].get("card", "{}"))
        return found

    def _place(self, name: str | Path) -> Path:
        return self.folder / f"{name}.safetensors" if name in self.names else Path(name)

    def _read(self, path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return dict(file.metadata() or {}), state
        except (SafetensorError, OSError) as error:
            raise self._bad(path, f"{type(error).__name__}: {error}") from error

    def _bad(self, path: Path, got: str) -> CheckpointError:
        known = ", ".join(self.names) or "none in this version"
        return CheckpointError(
            message(
                f"{self.reader}: {str(path)!r} is not {self.kind}",
                expected=f"a file written by `{self.writer}`, or a name: {known}",
                got=got,
            )
        )
