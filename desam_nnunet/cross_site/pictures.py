"""Slices with contours: the best, the median and the worst case of a model at a site."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from desam_nnunet.cross_site.study import Study
from desam_nnunet.evaluation.protocols import slice_axis
from desam_nnunet.evaluation.scores import Row, classes_of, read_rows
from desam_nnunet.system.files import replace_file

TRUTH, PREDICTION = "lime", "magenta"
_INSIDE = (0.2, 0.5, 0.8)  # of the organ's extent
_WINDOW = (0.5, 99.5)  # percentiles of the volume


class Volume(NamedTuple):
    """Image, reference and prediction, each (slices, rows, columns); `aspect` is a row's height by a column's width."""

    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    aspect: float


def draw_cases(study: Study, source: str, trainer: str, target: str) -> None:
    """Writes the picture of one cell of the study."""
    chosen = chosen_cases(read_rows(study.scores(source, trainer, target)))
    predictions = study.predictions(source, trainer, target)
    classes, ignored = classes_of(study.dataset_json)
    columns = len(_INSIDE) + 1
    figure = Figure(figsize=(2.2 * columns, 2.35 * len(chosen)), layout="constrained")
    rows = figure.subplots(len(chosen), columns, squeeze=False)
    cases = {case.name: case for case in study.sites[target]}
    for axes, (word, case, dice) in zip(rows, chosen, strict=True):
        volume = _read(cases[case].images[0], cases[case].label, predictions.get(case))
        low, high = np.percentile(volume.image, _WINDOW)
        for axis, (z, what) in zip(axes, _slices(volume, list(classes.values()), ignored), strict=True):
            axis.imshow(volume.image[z], cmap="gray", vmin=low, vmax=high, aspect=volume.aspect)
            for values in classes.values():
                outline(axis, np.isin(volume.truth[z], values), TRUTH, 1.8)
                outline(axis, np.isin(volume.prediction[z], values), PREDICTION, 1.1)
            axis.set_title(f"slice {z}{what}", fontsize=7)
            axis.set_xticks([])
            axis.set_yticks([])
        axes[0].set_ylabel(f"{word}: {case}\nDice {dice:.3f}", fontsize=8)
    save(figure, study.pictures(source, trainer, target))


def chosen_cases(rows: list[Row]) -> list[tuple[str, str, float]]:
    """Best, median and worst case by mean Dice over classes, all slices counted; of two best and worst, of one it."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["protocol"] == "volume":
            found.setdefault(row["case"], []).append(row["dice"])
    ranked = sorted(((float(np.mean(dice)), case) for case, dice in found.items()), reverse=True)
    places = {"only case" if len(ranked) == 1 else "best": 0, "worst": len(ranked) - 1, "median": len(ranked) // 2}
    words: dict[int, str] = {}
    for word, place in places.items():
        words.setdefault(place, word)
    return [(words[place], ranked[place][1], ranked[place][0]) for place in sorted(words)]


def outline(axis: Axes, mask: np.ndarray, colour: str, width: float) -> None:
    """The border of a mask; nothing where it is empty."""
    if mask.any():
        axis.contour(mask, [0.5], colors=colour, linewidths=width)


def save(figure: Figure, path: Path) -> None:
    """As lossless WebP, without a time stamp, so that the same picture is the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = BytesIO()
    figure.savefig(buffer, format="webp", dpi=100, pil_kwargs={"lossless": True})  # else contours lose their colour
    replace_file(path, [buffer.getvalue()])


def _read(image: Path, label: Path, prediction: Path | None) -> Volume:
    reference = sitk.ReadImage(label)
    spacing = reference.GetSpacing()[::-1]
    axis = slice_axis(spacing)
    truth = sitk.GetArrayFromImage(reference)
    found: Any = np.zeros_like(truth)
    if prediction is not None and prediction.is_file():
        found = sitk.GetArrayFromImage(sitk.ReadImage(prediction))
    seen, truth, found = (np.moveaxis(array, axis, 0)
                          for array in (sitk.GetArrayFromImage(sitk.ReadImage(image)), truth, found))
    rows, columns = (spacing[other] for other in range(3) if other != axis)
    return Volume(seen, truth, found, rows / columns)


def _slices(volume: Volume, classes: list[tuple[int, ...]], ignored: int | None) -> list[tuple[int, str]]:
    """Three through the organ, and the one with the largest error."""
    wanted = np.isin(volume.truth, [value for values in classes for value in values])
    with_organ = np.flatnonzero(wanted.any((1, 2)))
    if len(with_organ) == 0:
        with_organ = np.arange(len(wanted))
    inside = [int(with_organ[round(place * (len(with_organ) - 1))]) for place in _INSIDE]
    errors = ((volume.truth != volume.prediction) & (volume.truth != ignored)).sum((1, 2))
    return [*((z, "") for z in inside), (int(errors.argmax()), ", most errors")]
