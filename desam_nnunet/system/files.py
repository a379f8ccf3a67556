"""Files that are either as they were or as they are to be, and never half."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def told(name: object) -> str:
    """A name as it can be printed: escaped where it has control characters."""
    text = str(name)
    return text if text.isprintable() else repr(text)


def read_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds.

    Raises:
        ValueError: It is no file, no JSON in UTF-8, or holds something else than an object.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file, but a folder or a device.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, but must hold an object.")
    return content


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
