"""Files that are either as they were or as they are to be, and never half."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from pathlib import Path

TEMPORARY = ".tmp"


def replace_file(path: Path, parts: Iterable[bytes]) -> int:
    """Writes a file under a temporary name and renames it; returns its size in bytes."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{TEMPORARY}")
    try:
        with open(temporary, "wb") as stream:
            stream.writelines(parts)
            size = stream.tell()
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return size
