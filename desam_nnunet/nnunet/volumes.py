"""What is looked at in every volume of a study, image and reference, before any work begins."""

from __future__ import annotations

import filecmp
import gzip
import math
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import SimpleITK as sitk

_APART = {"Size": 0, "Spacing": 1e-3, "Origin": 1e-2, "Direction": 1e-2}  # mm, and of direction cosines
_NIFTI = (".nii", ".nii.gz")
_NIFTI_HEADER = 352  # bytes
_CHUNK = 1 << 22


def check_volumes(where: str, images: Iterable[Path], label: Path) -> set[int]:
    """The values of a reference, after it and its images have been read to their ends.

    Args:
        where: What messages begin with.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file that is no volume of one number per voxel, or ends too early; images whose geometry is not
            the reference's; an image that is the reference; values that are not whole numbers from 0 on.
    """
    images = list(images)
    for path in (*images, label):
        if not path.is_file():
            raise FileNotFoundError(f"{where}: {path} does not exist, or is no file.")
    if any(filecmp.cmp(label, path, shallow=False) for path in images):
        raise ValueError(f"{where}: {label} is the image and its own reference: give another file for one of them.")
    headers = {path: _header(path) for path in (label, *images)}
    for path in images:
        _check_geometry(where, headers[path], headers[label])
    for path, header in headers.items():
        _check_length(path, header)
    values = np.unique(sitk.GetArrayFromImage(sitk.ReadImage(label)))
    if not np.array_equal(values, values.astype(int)) or values.min() < 0:
        raise ValueError(f"{where}: {label} has values that are not whole numbers from 0 on.")
    return set(values.astype(int).tolist())


def _check_geometry(where: str, image: sitk.ImageFileReader, reference: sitk.ImageFileReader) -> None:
    for name, apart in _APART.items():
        of_image, of_label = (getattr(reader, f"Get{name}")() for reader in (image, reference))
        if len(of_image) != len(of_label) or not np.allclose(of_image, of_label, rtol=0, atol=apart):
            raise ValueError(f"{where}: the image's {name.lower()} is {_rounded(of_image)}, its reference's "
                             f"{_rounded(of_label)}: resample one onto the other.")


def _header(path: Path) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ValueError(f"{path} can't be read as an image: it is damaged, or not what its name says.") from error
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if reader.GetNumberOfComponents() != 1 or "complex" in kind:
        raise ValueError(f"{path} has voxels of the type '{kind}', but must have one number per voxel: convert it.")
    if reader.GetDimension() != 3:
        raise ValueError(f"{path} has {reader.GetDimension()} axes, but must be a volume of 3.")
    return reader


def _check_length(path: Path, header: sitk.ImageFileReader) -> None:
    """Refuses a file that ends too early, which ITK fills with zeros or finds when it is too late."""
    try:
        if path.name.endswith(_NIFTI):
            if _bytes_in(path) >= _bytes_of(header):
                return
        else:
            sitk.ReadImage(path)
            return
    except (EOFError, OSError, zlib.error, RuntimeError) as error:
        raise ValueError(f"{path} can't be read to its end: it is damaged or cut off. Copy it again.") from error
    raise ValueError(f"{path} is cut off: it ends before its last voxel. Copy it again.")


def _bytes_in(path: Path) -> int:
    """Of the file, uncompressed."""
    if not path.name.endswith(".gz"):
        return path.stat().st_size
    with gzip.open(path) as stream:
        return sum(len(chunk) for chunk in iter(lambda: stream.read(_CHUNK), b""))


def _bytes_of(nifti: sitk.ImageFileReader) -> int:
    """Of header and voxels, whose type on disk is another than ITK's where the header has a slope.

    Raises:
        EOFError: Voxels that begin within the header.
    """
    voxel, begin = int(nifti.GetMetaData("bitpix")) // 8, float(nifti.GetMetaData("vox_offset"))
    if not _NIFTI_HEADER <= begin < math.inf:
        raise EOFError(begin)
    return int(begin) + math.prod(nifti.GetSize()) * voxel


def _rounded(values: Iterable[float]) -> str:
    return "(" + ", ".join(f"{value + 0.0:.5g}" for value in values) + ")"
