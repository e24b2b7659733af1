"""Files of data sets that are fetched once and kept.

A file is known by its checksum: what arrives is compared with it before anybody sees it, so the
address need not be trusted. Nothing is left behind by a failed attempt.
"""

import hashlib
import os
import tempfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

from wspace.errors import ZooError, message

VARIABLE = "WSPACE_DATA"
"""Environment variable: the folder where data sets lie."""

TIMEOUT = 30.0
"""Seconds without an answer after which a server counts as absent."""


@dataclass(frozen=True)
class Remote:
    """A file that can be fetched.

    Attributes:
        url: Where from.
        checksum: ``"md5:…"`` or ``"sha256:…"`` of the file. Publishers of old data sets give MD5,
            which notices damage, not an attack.
    """

    url: str
    checksum: str

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.url.rpartition("/")[2]


def data_folders(root: str | Path | None) -> list[Path]:
    """Where to look for a data set before fetching it.

    Args:
        root: Given by the caller; the only place then.

    Returns:
        The folders or files, the nearest first: `root`, or what `WSPACE_DATA` names.

    Raises:
        ZooError: If such a place is named and is not there.
    """
    given = root or os.environ.get(VARIABLE)
    if not given:
        return []
    path = Path(given).expanduser()
    if not path.exists():
        who = "`root`" if root else VARIABLE
        raise ZooError(message(f"data: {who} names {path}, which is not there"))
    return [path]


def cache_folder() -> Path:
    """Folder of fetched files: ``wspace`` in `XDG_CACHE_HOME`, which is ``~/.cache`` by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wspace"


def fetch(remote: Remote, folder: str, *, others: Sequence[str] = ()) -> Path:
    """A file, from the cache or from the net.

    Args:
        remote: What.
        folder: Folder in the cache.
        others: Lines for the error message: what the user can give instead.

    Returns:
        Path of the whole and verified file.

    Raises:
        ZooError: If it cannot be had, or is not what it should be.
    """
    target = cache_folder() / folder / remote.name
    if target.is_file() and checksum(target, remote.checksum) == remote.checksum:
        return target
    help = "; ".join(["give a local copy", *others])
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".fetch-")
    except OSError as error:
        raise ZooError(
            message(f"data: no room for {remote.name} at {target.parent}", got=str(error))
        ) from error
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as out:
            _copy(remote.url, out)
        found = checksum(part, remote.checksum)
        if found != remote.checksum:
            raise ZooError(
                message(
                    f"data: {remote.url} is not the file it should be",
                    expected=remote.checksum,
                    got=f"{found}, {part.stat().st_size} bytes",
                    help=help,
                )
            )
        part.replace(target)
    except (OSError, HTTPException) as error:
        raise ZooError(
            message(f"data: could not fetch {remote.url}", got=str(error), help=help)
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return target


def _copy(url: str, out: BinaryIO) -> None:
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
        while block := answer.read(1 << 20):
            out.write(block)
    out.flush()
    os.fsync(out.fileno())


def checksum(path: Path, like: str) -> str:
    """Checksum of a file, of the kind of another.

    Args:
        path: The file.
        like: ``"kind:digits"``.

    Returns:
        ``"kind:digits"`` of the file.
    """
    kind = like.partition(":")[0]
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, lambda: hashlib.new(kind, usedforsecurity=False))
    return f"{kind}:{digest.hexdigest()}"
