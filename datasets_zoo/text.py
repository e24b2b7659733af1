"""Text that small language models are trained on, and its tokens.

===================  ==========================================================================
name                 source and licence
===================  ==========================================================================
``tinyshakespeare``  1.1 MB of plays of Shakespeare, collected by A. Karpathy; public domain.
                     Looked for as ``tinyshakespeare.txt`` like images
                     (`datasets_zoo.images`), else fetched
``python_docs``      the language reference that Python carries for ``help()`` (PSF licence);
                     about 0.5 MB, needs no file, but differs between versions of Python
``zen``              "The Zen of Python" (PSF licence), 856 characters: for tests
===================  ==========================================================================
"""

import ast
import codecs
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from datasets_zoo.download import VARIABLE, Remote, data_folders, fetch
from wspace.errors import ZooError, message

SHAKESPEARE = Remote(
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)


def text(name: str = "tinyshakespeare", root: str | Path | None = None) -> str:
    """A text by name.

    Args:
        name: One of the table at the top of this file.
        root: File, or folder with ``<name>.txt``, of a text that is not bundled.

    Returns:
        The text.

    Raises:
        ZooError: If there is no such text, or its file cannot be had or is not UTF-8.
    """
    if name in _BUNDLED:
        return _BUNDLED[name]()
    if name != "tinyshakespeare":
        known = ", ".join((*_BUNDLED, "tinyshakespeare"))
        raise ZooError(message("text: no such text", expected=f"one of {known}", got=repr(name)))
    places = data_folders(root)
    files = [place / f"{name}.txt" if place.is_dir() else place for place in places]
    if root and not files[0].is_file():
        raise ZooError(message(f"text: {name} is not in {places[0]}", expected=f"{name}.txt"))
    ways = (f"root=… or {VARIABLE}=… with {name}.txt",)
    path = files[0] if files and files[0].is_file() else fetch(SHAKESPEARE, name, others=ways)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ZooError(message(f"text: {path} cannot be read", got=str(error))) from error


@dataclass(frozen=True)
class Tokenizer:
    """Characters as numbers.

    Attributes:
        characters: The vocabulary in order; empty for bytes of UTF-8.

    Example:
        >>> tokens = Tokenizer.of("abba")
        >>> tokens.encode("baa").tolist(), tokens.decode(torch.tensor([0, 1])), len(tokens)
        ([1, 0, 0], 'ab', 2)
    """

    characters: str = ""

    @classmethod
    def of(cls, sample: str) -> "Tokenizer":
        """The characters of a text, sorted.

        Args:
            sample: The text.

        Returns:
            A tokenizer for it.
        """
        return cls("".join(sorted(set(sample))))

    def __len__(self) -> int:
        return len(self.characters) or 256

    def encode(self, sample: str) -> Tensor:
        """Numbers of a text, int64.

        Args:
            sample: The text.

        Returns:
            One number for each character, or byte.

        Raises:
            ZooError: If a character is not in the vocabulary.
        """
        if not self.characters:
            return torch.tensor(list(sample.encode()), dtype=torch.long)
        place = {character: i for i, character in enumerate(self.characters)}
        if lost := sorted(set(sample) - place.keys()):
            raise ZooError(message("text: characters that are not known", got=repr(lost[:8])))
        return torch.tensor([place[character] for character in sample], dtype=torch.long)

    def decode(self, tokens: Tensor) -> str:
        """Text of numbers; bytes that are no UTF-8 are replaced.

        Args:
            tokens: Numbers, ``(n,)``.

        Returns:
            The text.
        """
        if not self.characters:
            return bytes(tokens.tolist()).decode(errors="replace")
        return "".join(self.characters[i] for i in tokens.tolist())


def _zen() -> str:
    """The Zen, from the source of the module `this` (importing it would print)."""
    spec = importlib.util.find_spec("this")
    origin = spec.origin if spec else None
    if origin is None or not origin.endswith(".py"):
        raise ZooError(message("text: this Python comes without the source of `this`"))
    tree = ast.parse(Path(origin).read_text(encoding="utf-8"))
    first = cast(ast.Assign, tree.body[0])
    return codecs.decode(ast.literal_eval(first.value), "rot13")


def _python_docs() -> str:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError) as error:
        raise ZooError(
            message("text: this Python comes without `pydoc_data`", got=str(error))
        ) from error
    return "\n\n".join(topics[name] for name in sorted(topics))


_BUNDLED: dict[str, Callable[[], str]] = {"zen": _zen, "python_docs": _python_docs}
