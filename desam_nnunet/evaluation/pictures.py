"""Pictures of scores and segmentations: box plots, and slices of the best, the median and the worst case of a model."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
import SimpleITK as sitk
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from desam_nnunet.evaluation.metrics import Metric
from desam_nnunet.evaluation.scores import slice_axis
from desam_nnunet.evaluation.statistics import per_case
from desam_nnunet.nnunet.labels import Classes
from desam_nnunet.nnunet.sites import Case
from desam_nnunet.system.files import replace_file

_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#000000")  # Okabe and Ito
_ON_IMAGES = ("#e69f00", "#56b4e9", "#f0e442", "#cc79a7", "#009e73", "#d55e00")  # those of them that are bright
_NO_MATH: Any = {"text.parse_math": False}  # in names that others gave
_AS_TEXT: Any = {"svg.hashsalt": "desam", "svg.fonttype": "none", "font.size": 9} | _NO_MATH
_FILLED = 0.3  # opacity of the reference
_INSIDE = (0.2, 0.5, 0.8)  # of the organ's extent
_WINDOW = (0.5, 99.5)  # percentiles of the volume


def box_plot(scores: pd.DataFrame, target: str, metric: Metric) -> str:
    """A metric at one site as SVG: for each source one group, in it a box for each trainer, every case a dot.

    Args:
        scores: Of one protocol, all classes.
    """
    here = scores[scores["target"] == target]
    sources, trainers = list(dict.fromkeys(here["source"])), list(dict.fromkeys(scores["trainer"]))
    with matplotlib.rc_context(_AS_TEXT):
        width = 1.6 + len(sources) * (0.55 * len(trainers) + 0.4)
        figure = Figure(figsize=(max(4.0, width), 2.9), layout="constrained")
        axis = figure.subplots()
        for group, source in enumerate(sources):
            table = per_case(here[here["source"] == source], metric.key)
            for number, trainer in enumerate(trainers):
                if trainer not in table:
                    continue
                place = group * (len(trainers) + 0.8) + number
                colour = _COLOURS[number % len(_COLOURS)]
                values = table[trainer].dropna()
                axis.boxplot(values, positions=[place], widths=0.6, showfliers=False, patch_artist=True,
                             boxprops={"facecolor": colour, "alpha": 0.35}, medianprops={"color": "black"})
                places = [place + 0.12 * ((index % 3) - 1) for index in range(len(values))]
                axis.scatter(places, values, s=9, color=colour, zorder=3, label=trainer if group == 0 else None)
        centre = (len(trainers) - 1) / 2
        words = [f"{source}\n(held-out cases)" if source == target else f"trained at {source}" for source in sources]
        axis.set_xticks([group * (len(trainers) + 0.8) + centre for group in range(len(sources))], words)
        axis.set_ylabel(metric.name + (f", {metric.unit}" if metric.unit else ""))
        axis.set_ylim(*((-0.02, 1.02) if metric.better == "high" else (0, 1.05 * axis.get_ylim()[1])))
        axis.set_title(f"Segmented: {target}", fontsize=10)
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
        return _svg(figure)


def agreement_plot(errors: pd.DataFrame) -> str:
    """Volumes as SVG, after Bland and Altman (Lancet 327:307-310, 1986): for each class and trainer, at unseen sites,
    the difference of both volumes over their mean, every segmentation a dot, or a cross where nothing was found, with
    the mean difference and the limits of agreement, 1.96 standard deviations on either side.

    Args:
        errors: Rows of :func:`~desam_nnunet.evaluation.errors.error_rows`, with their trainer, source and target.
    """
    unseen = errors[errors["source"] != errors["target"]]
    trainers, targets, classes = (list(dict.fromkeys(unseen[key])) for key in ("trainer", "target", "class"))
    with matplotlib.rc_context(_AS_TEXT):
        figure = Figure(figsize=(3.1 * len(trainers) + 1.2, 2.9 * len(classes)), layout="constrained")
        axes = figure.subplots(len(classes), len(trainers), squeeze=False, sharex="row", sharey="row")
        for line, name in zip(axes, classes, strict=True):
            for axis, trainer in zip(line, trainers, strict=True):
                rows = unseen[(unseen["trainer"] == trainer) & (unseen["class"] == name)]
                _draw_agreement(axis, rows, targets)
                axis.set_title(f"{trainer}{f', {name}' if len(classes) > 1 else ''}\n{axis.get_title()}", fontsize=9)
            line[0].set_ylabel("predicted \N{MINUS SIGN} reference, ml")
        for axis in axes[-1]:
            axis.set_xlabel("mean of both volumes, ml")
        axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
        return _svg(figure)


def _draw_agreement(axis: Axes, rows: pd.DataFrame, targets: list[str]) -> None:
    """One trainer's segmentations of one class; the title says mean and limits."""
    difference = rows["predicted_ml"] - rows["reference_ml"]
    mean, lost = (rows["predicted_ml"] + rows["reference_ml"]) / 2, (rows["predicted_ml"] == 0) & (difference < 0)
    for number, target in enumerate(targets):
        here, colour = rows["target"] == target, _COLOURS[number % len(_COLOURS)]
        axis.scatter(mean[here & ~lost], difference[here & ~lost], s=12, color=colour, label=target)
        axis.scatter(mean[here & lost], difference[here & lost], s=24, color=colour, marker="x")
    spread = 1.96 * difference.std() if len(difference) > 1 else 0.0
    axis.axhline(difference.mean(), color="black", linewidth=1)
    for limit in (difference.mean() - spread, difference.mean() + spread):
        axis.axhline(limit, color="black", linewidth=1, linestyle="dashed")
    axis.set_title(f"{difference.mean():+.1f} ml, 1.96 SD {spread:.1f}, n = {len(rows)}")
    axis.spines[["top", "right"]].set_visible(False)


def _svg(figure: Figure) -> str:
    """To be put into a page, without a time stamp."""
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg"):]


class Volume(NamedTuple):
    """Image, reference and prediction, each (slices, rows, columns); `aspect` is a row's height by a column's width."""

    image: np.ndarray
    reference: np.ndarray
    prediction: np.ndarray
    aspect: float


@matplotlib.rc_context(_NO_MATH)
def draw_cases(
    chosen: list[tuple[str, str, float]], cases: Mapping[str, Case], predictions: Mapping[str, Path], classes: Classes,
    ignored: int | None, path: Path,
) -> None:
    """Writes a picture with a row of slices for each of the chosen cases.

    Args:
        chosen: Of :func:`~desam_nnunet.evaluation.scores.chosen_cases`.
        predictions: Files by case; one that is not there is an empty segmentation.
    """
    columns = len(_INSIDE) + 1
    figure = Figure(figsize=(2.2 * columns, 2.35 * len(chosen)), layout="constrained")
    rows = figure.subplots(len(chosen), columns, squeeze=False)
    for axes, (word, case, dice) in zip(rows, chosen, strict=True):
        volume = _read(cases[case].images[0], cases[case].label, predictions.get(case))
        low, high = np.percentile(volume.image, _WINDOW)
        for axis, (z, what) in zip(axes, _slices(volume, list(classes.values()), ignored), strict=True):
            axis.imshow(volume.image[z], cmap="gray", vmin=low, vmax=high, aspect=volume.aspect)
            for number, values in enumerate(classes.values()):
                fill(axis, np.isin(volume.reference[z], values), number)
                outline(axis, np.isin(volume.prediction[z], values), number)
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"slice {z}{what}", fontsize=7)
        axes[0].set_ylabel(f"{word}: {case}\nDice {dice:.3f}", fontsize=8)
    keys = [Patch(facecolor=to_rgba(colour_of(number), _FILLED), edgecolor=colour_of(number), label=name)
            for number, name in enumerate(classes)]
    figure.legend(handles=keys, loc="outside lower left", ncols=6, frameon=False, fontsize=8,
                  title="filled: reference, line: prediction", title_fontsize=8, alignment="left")
    save(figure, path)


def colour_of(number: int) -> str:
    """Of a class, by its place among them."""
    return _ON_IMAGES[number % len(_ON_IMAGES)]


def fill(axis: Axes, mask: np.ndarray, number: int) -> None:
    """A class's mask, see-through; nothing where it is empty."""
    if mask.any():
        axis.contourf(mask, [0.5, 1.5], colors=colour_of(number), alpha=_FILLED)


def outline(axis: Axes, mask: np.ndarray, number: int) -> None:
    """The border of a class's mask; nothing where it is empty."""
    if mask.any():
        axis.contour(mask, [0.5], colors=colour_of(number), linewidths=1.3)


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
    images = [sitk.ReadImage(image), reference]
    if prediction is not None and prediction.is_file():
        images.append(sitk.ReadImage(prediction))
    arrays = [np.moveaxis(sitk.GetArrayFromImage(each), axis, 0) for each in images]
    rows, columns = (spacing[other] for other in range(3) if other != axis)
    return Volume(arrays[0], arrays[1], arrays[2] if len(arrays) > 2 else np.zeros_like(arrays[1]), rows / columns)


def _slices(volume: Volume, classes: list[tuple[int, ...]], ignored: int | None) -> list[tuple[int, str]]:
    """Three through the organ, and the one with the largest error."""
    organ = np.isin(volume.reference, [value for values in classes for value in values])
    with_organ = np.flatnonzero(organ.any((1, 2)))
    if len(with_organ) == 0:
        with_organ = np.arange(len(organ))
    inside = [int(with_organ[round(place * (len(with_organ) - 1))]) for place in _INSIDE]
    errors = ((volume.reference != volume.prediction) & (volume.reference != ignored)).sum((1, 2))
    return [*((z, "") for z in inside), (int(errors.argmax()), ", most errors")]
