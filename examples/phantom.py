"""A small MR-like phantom: one organ, look-alikes around it, three sites that picture it differently.

    python examples/phantom.py OUT --cases 10 --unseen-cases 4 --seed 0

writes a training set in nnU-Net's raw format (one site) and test folders from the two other sites.
Anatomy is drawn in millimetres, as functions of position, before any site has a say: the same random
state gives the same patient at every site, and what differs between sites is the picture alone.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

Field = Callable[[np.ndarray], np.ndarray]

EDGE = 0.6  # mm over which one tissue fades into the next
FILE_ENDING = ".nii.gz"


@dataclass(frozen=True)
class Site:
    """One scanner. Tissue signals lie between 0 and 1, before gamma and gain.

    Everywhere the organ (both zones) is brighter than the interior that surrounds it, darker than
    fluid, and as bright on average as muscle: a site shifts the contrasts, it never flips that order.
    """

    name: str
    spacing: float  # mm in plane
    thickness: float  # mm, from slice to slice
    matrix: tuple[int, int]  # rows, columns
    organ: tuple[float, float]  # inner zone, outer zone
    interior: float
    rim: float
    muscle: float
    fluid: float
    dark: float  # vessels
    gamma: float
    noise: float  # Rician, sd of each component
    bias: float  # sd of the bias field's logarithm
    blur: float  # mm, sd of the in-plane point spread
    gain: float  # signal to stored intensity


# fmt: off
SITES: tuple[Site, ...] = (
    #     name     mm    mm   matrix      organ         inter. rim   muscle fluid dark  gamma noise  bias  blur gain
    Site("SiteA", 1.25, 3.6, (96, 96),   (0.44, 0.62), 0.30, 0.82, 0.53, 0.92, 0.08, 1.00, 0.030, 0.08, 0.6, 600.0),
    Site("SiteB", 0.90, 4.5, (128, 128), (0.41, 0.56), 0.28, 0.72, 0.48, 0.80, 0.12, 1.00, 0.045, 0.16, 0.6, 350.0),
    Site("SiteC", 1.50, 3.0, (78, 80),   (0.46, 0.60), 0.30, 0.84, 0.52, 0.92, 0.10, 0.92, 0.035, 0.10, 0.9, 900.0),
)
# fmt: on


@dataclass(frozen=True)
class Blob:
    """An ellipsoid or, with a very long first radius, a tube. Positions in mm, axes z, y, x."""

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    angle: float = 0.0  # in-plane rotation, radians
    lean: tuple[float, float] = (0.0, 0.0)  # shift in y, x per mm along z

    def depth(self, points: np.ndarray) -> np.ndarray:
        """Roughly the distance in mm to the surface, positive inside: (3, Z, Y, X) -> (Z, Y, X)."""
        z = points[0] - self.centre[0]
        y = points[1] - self.centre[1] - self.lean[0] * z
        x = points[2] - self.centre[2] - self.lean[1] * z
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        turned = (z, cos * y - sin * x, sin * y + cos * x)
        radius = np.sqrt(sum((axis / r) ** 2 for axis, r in zip(turned, self.radii, strict=True)))
        return (1 - radius) * np.sqrt(self.radii[1] * self.radii[2])


@dataclass(frozen=True)
class Anatomy:
    """One patient, free of any grid."""

    extent: float  # mm along z that a scan covers
    body: Blob
    rim: float  # mm of fat under the skin
    organ: Blob
    core: Blob  # the organ's inner zone
    distractors: tuple[tuple[str, Blob], ...]  # (tissue, shape), painted in this order
    warp: tuple[Field, ...]  # of everything, one per axis
    dent: Field  # of the organ alone
    grain: Field  # texture of the tissue in between
    nodules: Field  # texture of the inner zone
    fibres: Field  # texture of muscle


def waves(rng: np.random.Generator, shortest: float, longest: float, count: int = 14) -> Field:
    """A random smooth function of position, mean 0 and sd 1, with wavelengths in mm."""
    direction = rng.normal(size=(count, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    vectors = 2 * np.pi * direction / rng.uniform(shortest, longest, size=(count, 1))
    phases = rng.uniform(0, 2 * np.pi, size=count)

    def at(points: np.ndarray) -> np.ndarray:  # 3 Z Y X -> Z Y X
        total = np.zeros(points.shape[1:])
        for vector, phase in zip(vectors, phases, strict=True):
            total += np.sin(np.tensordot(vector, points, 1) + phase)
        return total * np.sqrt(2 / count)

    return at


def draw_organ(rng: np.random.Generator, extent: float) -> tuple[Blob, Blob]:
    """The organ and its inner zone, which lies forward, so that the outer zone is a crescent."""
    half = 0.5 * extent * rng.uniform(0.42, 0.56)
    wide = rng.uniform(17, 24)
    tall = wide * rng.uniform(0.7, 0.95)
    z, y, x = rng.uniform((-4, -5, -9), (4, 7, 9))
    angle = rng.uniform(-0.35, 0.35)
    scale = rng.uniform(0.58, 0.74)
    forward = tall * rng.uniform(0.12, 0.26)
    core = Blob((z, y - forward, x), (scale * half * 1.1, scale * tall, scale * wide), angle)
    return Blob((z, y, x), (half, tall, wide), angle), core


def beside(rng: np.random.Generator, organ: Blob, towards: float, radius: float) -> tuple[float, float]:
    """A centre (y, x) in mm for something of that radius next to the organ, in about that direction."""
    angle = towards + rng.uniform(-0.45, 0.45)
    # The direction turns with the organ; its outline there decides the distance.
    outline = 1 / np.hypot(np.sin(angle) / organ.radii[1], np.cos(angle) / organ.radii[2])
    reach = outline + radius + rng.uniform(2, 6)
    y = organ.centre[1] + reach * np.sin(angle + organ.angle)
    return y, organ.centre[2] + reach * np.cos(angle + organ.angle)


def draw_tube(
    rng: np.random.Generator, organ: Blob, towards: float, radius: float, aspect: float
) -> Blob:
    """Something that runs through all slices beside the organ."""
    y, x = beside(rng, organ, towards, radius)
    lean_y, lean_x = rng.uniform(-0.12, 0.12, size=2)
    return Blob((0, y, x), (400, radius * aspect, radius), rng.uniform(-0.4, 0.4), (lean_y, lean_x))


def draw_distractors(rng: np.random.Generator, organ: Blob) -> tuple[tuple[str, Blob], ...]:
    """Muscles left and right, a round bladder in front, vessels behind, small bright spots."""
    front, back = -np.pi / 2, np.pi / 2
    sides = [0.0, np.pi] if rng.random() < 0.7 else [float(rng.choice([0.0, np.pi]))]
    found = [
        ("muscle", draw_tube(rng, organ, side, rng.uniform(7, 10), rng.uniform(1.4, 2.4)))
        for side in sides
    ]
    ball = rng.uniform(7, 11)
    height = rng.choice([-1, 1]) * rng.uniform(8, 22)
    found.append(("fluid", Blob((height, *beside(rng, organ, front, ball)), (2 * ball, ball, ball))))
    for _ in range(rng.integers(1, 3)):
        towards = back + rng.uniform(-0.9, 0.9)
        found.append(("dark", draw_tube(rng, organ, towards, rng.uniform(2.5, 4.5), 1.0)))
    for _ in range(rng.integers(2, 6)):
        size = rng.uniform(1.5, 2.8)
        place = beside(rng, organ, rng.uniform(-np.pi, np.pi), size)
        found.append(("fluid", Blob((rng.uniform(-28, 28), *place), (2.5 * size, size, size))))
    return tuple(found)


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """A random patient."""
    extent = rng.uniform(53, 63)
    organ, core = draw_organ(rng, extent)
    body = Blob((0, 0, 0), (95, *rng.uniform((43, 48), (48, 53))), rng.uniform(-0.1, 0.1))
    return Anatomy(
        extent=extent,
        body=body,
        rim=rng.uniform(3, 6),
        organ=organ,
        core=core,
        distractors=draw_distractors(rng, organ),
        warp=tuple(waves(rng, 60, 140) for _ in range(3)),
        dent=waves(rng, 25, 60),
        grain=waves(rng, 7, 30, count=24),
        nodules=waves(rng, 6, 14, count=24),
        fibres=waves(rng, 4, 8, count=24),
    )


def voxel_centres(site: Site, extent: float) -> np.ndarray:
    """Positions (3, Z, Y, X) in mm, the origin in the middle of the scan."""
    shape = (round(extent / site.thickness), *site.matrix)
    steps = (site.thickness, site.spacing, site.spacing)
    axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, steps, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"))


def cover(depth: np.ndarray) -> np.ndarray:
    """How much of a voxel a tissue fills, from the depth in mm of the voxel's centre below its surface."""
    return 0.5 * (1 + np.tanh(depth / EDGE))


def paint(signal: np.ndarray, amount: np.ndarray, tissue: float | np.ndarray) -> np.ndarray:
    """Lay a tissue over what is there."""
    return signal + amount * (tissue - signal)


def render(anatomy: Anatomy, site: Site, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Noise-free signal and organ mask (Z, Y, X) at the given positions (3, Z, Y, X)."""
    where = points + 3.0 * np.stack([field(points) for field in anatomy.warp])
    skin = anatomy.body.depth(where)
    inside = cover(skin - anatomy.rim)
    dent = 1.3 * anatomy.dent(where)
    organ = anatomy.organ.depth(where) + dent
    tissue = {
        "muscle": site.muscle * (1 + 0.10 * anatomy.fibres(where)),
        "fluid": site.fluid,
        "dark": site.dark,
    }
    signal = paint(np.zeros(skin.shape), cover(skin), site.rim)
    signal = paint(signal, inside, site.interior * (1 + 0.22 * anatomy.grain(where)))
    for name, blob in anatomy.distractors:
        signal = paint(signal, inside * cover(blob.depth(where)), tissue[name])
    inner, outer = site.organ
    # A thin capsule of interior tissue keeps the organ apart from what touches it.
    signal = paint(signal, cover(organ + 1.2), 0.75 * site.interior)
    signal = paint(signal, cover(organ), outer)
    core = cover(np.minimum(anatomy.core.depth(where) + dent, organ - 2))
    signal = paint(signal, core, inner * (1 + 0.16 * anatomy.nodules(where)))
    return np.clip(signal, 0, None), organ > 0


def scan(signal: np.ndarray, site: Site, points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a site makes of a signal (Z, Y, X): contrast curve, blur, coil shading, Rician noise."""
    signal = gaussian_filter(signal**site.gamma, (0, site.blur / site.spacing, site.blur / site.spacing))
    signal = signal * np.exp(site.bias * waves(rng, 120, 300, count=6)(points))
    real, imaginary = rng.normal(scale=site.noise, size=(2, *signal.shape))
    gain = site.gain * rng.uniform(0.85, 1.15)
    return gain * np.hypot(signal + real, imaginary)


def make_case(site: Site, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One patient at one site.

    Returns:
        The image (Z, Y, X) in float32 and the label (Z, Y, X) in uint8, 1 where the organ is.
    """
    anatomy = draw_anatomy(rng)
    points = voxel_centres(site, anatomy.extent)
    signal, organ = render(anatomy, site, points)
    return scan(signal, site, points, rng).astype(np.float32), organ.astype(np.uint8)


def find_site(name: str) -> Site:
    """The row of `SITES` with that name."""
    for site in SITES:
        if site.name == name:
            return site
    raise ValueError(f"no site {name!r}: choose from {', '.join(site.name for site in SITES)}")


def write_volume(path: Path, array: np.ndarray, site: Site) -> None:
    """Write (Z, Y, X) under a temporary name one folder up, where nnU-Net does not look, then rename."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((site.spacing, site.spacing, site.thickness))
    part = path.parent.parent / f".part-{os.getpid()}-{path.name}"
    sitk.WriteImage(image, str(part), useCompression=True)
    part.replace(path)


def refuse_strangers(folders: Iterable[Path], names: set[str]) -> None:
    """Cases left by an earlier, larger call would silently join the data set."""
    strangers = sorted(
        str(file) for folder in folders for file in folder.iterdir() if file.name not in names
    )
    if strangers:
        raise FileExistsError(f"{strangers[0]} is not of this data set: remove it, or write elsewhere")


def write_cases(images: Path, labels: Path, *, site: Site, cases: int, seed: int) -> None:
    """Write `cases` images and labels. Case k depends on the seed, the site and k alone."""
    if cases < 1:
        raise ValueError(f"cases is {cases}: ask for at least 1")
    for folder in (images, labels):
        folder.mkdir(parents=True, exist_ok=True)
    keys = [f"{site.name}_{k:03d}" for k in range(cases)]
    files = {f"{key}{end}{FILE_ENDING}" for key in keys for end in ("", "_0000")}
    refuse_strangers((images, labels), files)
    for k, key in enumerate(keys):
        image, label = make_case(site, np.random.default_rng([seed, SITES.index(site), k]))
        write_volume(images / f"{key}_0000{FILE_ENDING}", image, site)
        write_volume(labels / f"{key}{FILE_ENDING}", label, site)


def write_dataset(
    raw: Path,
    *,
    dataset_id: int = 501,
    name: str = "Phantom",
    source: str = "SiteA",
    cases: int = 10,
    seed: int = 0,
) -> Path:
    """Write `raw/DatasetXXX_Name` in nnU-Net's raw format and return that folder."""
    folder = raw / f"Dataset{dataset_id:03d}_{name}"
    site = find_site(source)
    write_cases(folder / "imagesTr", folder / "labelsTr", site=site, cases=cases, seed=seed)
    description = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "organ": 1},
        "numTraining": cases,
        "file_ending": FILE_ENDING,
    }
    part = folder / f".part-{os.getpid()}-dataset.json"
    part.write_text(json.dumps(description, indent=4) + "\n")
    part.replace(folder / "dataset.json")
    return folder


def write_unseen(
    folder: Path, *, sites: Sequence[str] = ("SiteB", "SiteC"), cases: int = 4, seed: int = 1
) -> None:
    """Write `folder/<site>/images` and `folder/<site>/labels`, named as in a training set."""
    for name in sites:
        images, labels = folder / name / "images", folder / name / "labels"
        write_cases(images, labels, site=find_site(name), cases=cases, seed=seed)


def main(argv: Sequence[str] | None = None) -> None:
    """Write OUT/nnUNet_raw/Dataset501_Phantom and OUT/unseen/<site>."""
    parser = argparse.ArgumentParser(description="Write a small phantom data set with three sites.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument("--cases", type=int, default=10, help="training cases (default: 10)")
    parser.add_argument("--unseen-cases", type=int, default=4, help="cases per unseen site (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    args = parser.parse_args(argv)
    print(write_dataset(args.out / "nnUNet_raw", cases=args.cases, seed=args.seed))
    write_unseen(args.out / "unseen", cases=args.unseen_cases, seed=args.seed + 1)
    print(args.out / "unseen")


if __name__ == "__main__":
    main()
