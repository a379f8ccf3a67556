"""A file of named arrays that is checked before any of it is interpreted.

Layout: magic, length and CRC-32 of a JSON header, the header, then each array's bytes as blosc2 compressed them. The
header names every array's type, shape, length and CRC-32, so that damage is found before blosc2 sees a byte. Nothing
is ever unpickled. Files are written under a temporary name and renamed.
"""

from __future__ import annotations

import errno
import json
import stat
import struct
import threading
import zlib
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import blosc2
import numpy as np

from desam_nnunet.system.files import replace_file

Arrays = dict[str, np.ndarray]
_MAGIC = b"DESAM\x00\x01\n"
_PREFIX = struct.Struct("<8sII")  # magic, header length, header CRC
_LARGEST_HEADER = 2**20
_TYPES = {"float16", "float32", "int8", "int16", "uint8"}
_scratch = threading.local()
_COMPRESSION = {"codec": blosc2.Codec.LZ4, "clevel": 1, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1}


class DamagedEntryError(ValueError):
    """The file is not what was written: truncated, changed, or no entry at all."""


def write_entry(path: Path, arrays: Arrays, meta: dict[str, Any]) -> int:
    """Writes `arrays` and JSON-able `meta`, replacing what was there; returns the file's size in bytes.

    Raises:
        OSError: The disk is full or not writable; no partial file is left under `path`.
    """
    return replace_file(path, packed(arrays, meta))


def packed(arrays: Arrays, meta: dict[str, Any]) -> list[bytes]:
    """The parts of a file, one after the other."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    payloads = [blosc2.compress2(array, typesize=array.itemsize, **_COMPRESSION) for array in arrays.values()]
    rows = [{"name": name, "dtype": str(array.dtype), "shape": array.shape, "bytes": len(payload),
             "crc": zlib.crc32(payload)} for (name, array), payload in zip(arrays.items(), payloads, strict=True)]
    header = json.dumps({"meta": meta, "arrays": rows}).encode()
    prefix = _PREFIX.pack(_MAGIC, len(header), zlib.crc32(header))
    return [prefix, header, *payloads]


def read_meta(path: Path) -> dict[str, Any]:
    """Only the header's `meta`; the file's length is checked, its arrays are not. Errors as :func:`read_entry`."""
    with _open(path) as stream:
        header = _read_header(path, stream)
        expected = stream.tell() + sum(row["bytes"] for row in header["arrays"])
    if path.stat().st_size != expected:
        raise DamagedEntryError(f"{path} is truncated or longer than it was written.")
    return header["meta"]


def read_entry(path: Path, into: Arrays | None = None) -> tuple[Arrays, dict[str, Any]]:
    """All arrays and `meta`, every byte checked.

    Args:
        into: Arrays to fill, where the caller has a place for them; type and shape must be those stored.

    Raises:
        ValueError: An array of `into` has another type or shape.
        DamagedEntryError, OSError.
    """
    with _open(path) as stream:
        header = _read_header(path, stream)
        arrays = {}
        for row in header["arrays"]:
            payload = _scratch_of(row["bytes"])
            whole = stream.readinto(payload) == row["bytes"] and zlib.crc32(payload) == row["crc"]
            if not whole or row["dtype"] not in _TYPES:
                raise DamagedEntryError(f"{path} is damaged: '{row['name']}' is not what was written.")
            array = (into or {}).get(row["name"])
            if array is None:
                array = np.empty(row["shape"], row["dtype"])
            if array.dtype != row["dtype"] or list(array.shape) != row["shape"]:
                raise ValueError(f"{path}: '{row['name']}' is {row['dtype']} {row['shape']}, not {array.dtype} "
                                 f"{list(array.shape)}.")
            if blosc2.get_cbuffer_sizes(payload)[0] != array.nbytes:
                raise DamagedEntryError(f"{path} is damaged: '{row['name']}' has another length than its shape says.")
            blosc2.decompress2(payload, dst=array, nthreads=1)
            arrays[row["name"]] = array
        if stream.read(1):
            raise DamagedEntryError(f"{path} is damaged: it is longer than it was written.")
    return arrays, header["meta"]


def _open(path: Path) -> BufferedReader:
    """For reading; a pipe in the place of a file would never end, and a folder is refused by the system."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(path, "rb")


def _scratch_of(size: int) -> memoryview:
    """Memory of this thread's own, used again and again: new memory costs more than the reading."""
    if len(getattr(_scratch, "buffer", b"")) < size:
        _scratch.buffer = bytearray(size)
    return memoryview(_scratch.buffer)[:size]


def _read_header(path: Path, stream: BinaryIO) -> dict[str, Any]:
    prefix = stream.read(_PREFIX.size)
    if len(prefix) != _PREFIX.size:
        raise DamagedEntryError(f"{path} is damaged: it is too short.")
    magic, length, crc = _PREFIX.unpack(prefix)
    if magic != _MAGIC or length > _LARGEST_HEADER:
        raise DamagedEntryError(f"{path} is no cache entry of this version.")
    header = stream.read(length)
    if len(header) != length or zlib.crc32(header) != crc:
        raise DamagedEntryError(f"{path} is damaged: its header is not what was written.")
    try:
        content = json.loads(header)
    except (ValueError, RecursionError) as error:  # the sum is right: it was made so
        raise DamagedEntryError(f"{path} is no cache entry: its header is not JSON.") from error
    if not _is_header(content):
        raise DamagedEntryError(f"{path} is no cache entry: its header has other fields.")
    return content


def _is_header(content: Any) -> bool:
    if not isinstance(content, dict) or not isinstance(content.get("meta"), dict):
        return False
    rows = content.get("arrays")
    return isinstance(rows, list) and all(
        isinstance(row, dict) and isinstance(row.get("name"), str) and isinstance(row.get("dtype"), str)
        and isinstance(row.get("shape"), list) and all(map(is_count, [*row["shape"], row.get("bytes"), row.get("crc")]))
        for row in rows)


def is_count(value: object) -> TypeGuard[int]:
    """Whether it is a whole number from 0 on."""
    return type(value) is int and value >= 0
