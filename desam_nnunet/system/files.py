"""Files that are either as they were or as they are to be, and never half."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp"


def replace_file(path: Path, parts: Iterable[bytes]) -> int:
    """Writes a file under a temporary name and renames it; returns its size in bytes."""
    with replacing(path) as temporary, open(temporary, "wb") as stream:
        stream.writelines(parts)
        return stream.tell()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; what was written under it, if anything, is renamed in the end."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{TEMPORARY}")
    try:
        yield temporary
        if temporary.is_file():
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def damage_told(what: str, remedy: str = "") -> Iterator[None]:
    """For reading what may be damaged, which makes a reader raise anything.

    Raises:
        ValueError: `what`, the error's name and `remedy`. What the system says of a file that it names (``OSError``)
            stays as it is.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(f"{what} ({type(error).__name__}){remedy}.") from error
