"""Images as an unseen scanner might have given them, to choose models by without looking at another hospital.

    python -m desam_nnunet.evaluation.shift IMAGES OUT

No augmentation of this package or of nnU-Net draws these changes: local contrast, sharpening and ghosts are of a kind
that none has; the receive coil's fall-off is several times the strongest bias field, and the order of intensities
changes about a value, which no monotone curve does. Geometry stays, so that references stay as well. Training with
weaker relatives of a change still helps against it: a simulated hospital is no real one.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage
from skimage.exposure import equalize_adapthist

_PERCENTILES = (0.5, 99.5)


def shifted(volume: np.ndarray, name: str) -> np.ndarray:
    """One channel of a case (slices, rows, columns), the same whenever it is asked for under this name.

    Two to four of the changes. Intensities keep their range, in float32.
    """
    random = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()))
    low, high = np.percentile(volume, _PERCENTILES)
    seen = np.clip((volume.astype(np.float32) - low) / max(high - low, 1e-6), 0, 1)
    changes = (_local_contrast, _coil, _reordered, _sharpened, _ghosts)
    for number in sorted(random.permutation(len(changes))[: random.integers(2, len(changes))]):
        seen = np.clip(changes[number](seen, random), 0, 1)
    return (low + (high - low) * seen).astype(np.float32)


def _local_contrast(seen: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Contrast that is equalised in tiles of the slices, as far as drawn."""
    share, limit = random.uniform(0.3, 1), random.uniform(0.005, 0.03)
    equalised = np.stack([equalize_adapthist(plane, clip_limit=limit) for plane in seen])
    return (1 - share) * seen + share * equalised


def _coil(seen: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A signal that falls off from a point at the rim of the slices, to a third to a seventh of it at the far side."""
    angle, fall = random.uniform(0, 2 * np.pi), random.uniform(np.log(3), np.log(7))
    rows, columns = np.meshgrid(*(np.linspace(-1, 1, side) for side in seen.shape[1:]), indexing="ij")
    distance = np.hypot(rows - np.sin(angle), columns - np.cos(angle)) / 2
    field = np.exp(-fall * distance)
    return seen * (field / field.mean())


def _reordered(seen: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Intensities about a value are so much darker or brighter that the order of some tissues changes."""
    centre, width = random.uniform(0.2, 0.8), random.uniform(0.08, 0.15)
    depth = width * random.uniform(1.5, 2.5) * random.choice([-1, 1])  # monotone up to 1.17 times the width
    return seen + depth * np.exp(-(((seen - centre) / width) ** 2))


def _sharpened(seen: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """An unsharp mask in the slices."""
    sigma, amount = random.uniform(0.7, 2), random.uniform(0.5, 2)
    return seen + amount * (seen - ndimage.gaussian_filter(seen, (0, sigma, sigma)))


def _ghosts(seen: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Weaker copies along rows or columns, as movement in the phase direction leaves them."""
    axis, copies, strength = random.integers(1, 3), random.integers(2, 5), random.uniform(0.05, 0.2)
    step = seen.shape[axis] // copies
    return seen + sum(strength / number * np.roll(seen, number * step, axis) for number in range(1, copies))


def main() -> None:
    """Writes draws of every image of a folder of nnU-Net's to another: CASE_draw0_0000, CASE_draw1_0000, ..."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of CASE_0000 files")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument("--draws", type=int, default=1, help="of each image (default: 1)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for path in sorted(options.images.iterdir()):
        if not (named := re.fullmatch(r"(.+)_(\d{4}\..+)", path.name)):
            parser.error(f"{path} is not named as nnU-Net's images are, CASE_0000 and an ending.")
        case, channel = named.groups()
        image = sitk.ReadImage(path)
        if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
            parser.error(f"{path} is no volume of one channel.")
        for draw in range(options.draws):
            name = f"{case}_draw{draw}_{channel}"
            changed = sitk.GetImageFromArray(shifted(sitk.GetArrayFromImage(image), name))
            changed.CopyInformation(image)
            begun = options.out / f".begun_{name}"
            sitk.WriteImage(changed, begun)
            begun.replace(options.out / name)


if __name__ == "__main__":
    main()
