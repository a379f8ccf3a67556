"""The page of a study: for a reader who has not seen it, and without anything to download. It knows what was found, and
nothing of how it was run."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined

from desam_nnunet.encoders.registry import row_by_name
from desam_nnunet.evaluation.errors import THIRDS
from desam_nnunet.evaluation.findings import FEWEST
from desam_nnunet.evaluation.metrics import METRICS, NONE, Metric
from desam_nnunet.evaluation.pictures import agreement_plot, box_plot
from desam_nnunet.evaluation.scores import PROTOCOLS
from desam_nnunet.evaluation.statistics import SIGNIFICANT
from desam_nnunet.nnunet.sites import ALL

_PLOTTED = ("dice", "hd95")
Cell = tuple[str, str, str]  # source, trainer and target


def render_page(
    content: dict[str, Any], scores: pd.DataFrame, errors: pd.DataFrame, summary: pd.DataFrame, *,
    cells: Sequence[Cell], pictures: Mapping[Cell, Path], maps: Mapping[Cell, Path],
) -> str:
    """HTML.

    Args:
        content: That of ``report.json``: what was asked, the findings in words, costs, settings.
        scores, errors, summary: A row per segmentation, per segmentation and class, and per group of them.
        cells: In order; a source's own held-out cases are a target too.
        pictures, maps: Files of best, median and worst cases, and of the scores of a grid's points.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(shade=_shade, interval=_interval)
    template = environment.from_string(files("desam_nnunet.evaluation").joinpath("page.html").read_text("utf-8"))
    classes = list(dict.fromkeys(scores["class"]))
    overall_class = ALL if len(classes) > 1 else classes[0]
    volume = scores[scores["protocol"] == "volume"]
    tested = {target for _, _, target in cells}
    # over all unseen sites, and at each of them
    pairs = [pair for pair in content["comparisons"]
             if (pair["class"], pair["source"]) == (overall_class, ALL) and pair["metric"] in _PLOTTED]
    return template.render(content | {
        "cells": cells, "metrics": METRICS, "by_key": {metric.key: metric for metric in METRICS},
        "protocols": PROTOCOLS, "classes": classes, "overall_class": overall_class,
        "look": _look_up(summary, overall_class), "pairs": pairs, "thirds": THIRDS, "fewest": FEWEST,
        "agreement": agreement_plot(errors),
        "plots": [box_plot(volume, target, metric) for target in dict.fromkeys(volume["target"])
                  for metric in METRICS if metric.key in _PLOTTED],
        "pictures": _embedded(pictures), "maps": _embedded(maps), "encoders": _encoders(content["settings"]),
        "columns": [site for site in content["study"]["sites"] if site in tested], "all_sites": ALL,
        "has_diagonal": any(source == target for source, _, target in cells), "significant": SIGNIFICANT})


def _look_up(summary: pd.DataFrame, overall_class: str) -> Callable[..., dict[str, Any] | None]:
    """Finds a row of the summary by what it is of; None where there is none."""
    keys = ["protocol", "source", "target", "trainer", "metric", "class"]
    rows = {tuple(row[key] for key in keys): row for row in summary.to_dict("records")}
    return lambda *key: rows.get(key if len(key) == len(keys) else (*key, overall_class))


def _encoders(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that the models use: whether their weights are RANDOM, and what they were trained on, if it is known."""
    sections = [row.get("sam", {}) for of_source in settings.values() for row in of_source.values()]
    names = {section["encoder"]: section.get("identity", "") for section in sections if "encoder" in section}
    rows = {name: row_by_name(name) for name in names}
    return [{"name": name, "random": identity.startswith("random:"),
             "trained_on": row.trained_on if (row := rows[name]) else ""}
            for name, identity in sorted(names.items())]


def _embedded(paths: Mapping[Cell, Path]) -> list[tuple[str, str, str, str]]:
    """Every cell with its picture as a URL."""
    return [(*cell, f"data:image/webp;base64,{base64.b64encode(path.read_bytes()).decode()}")
            for cell, path in paths.items()]


def _interval(row: Any, metric: Metric, low: str = "low", high: str = "high") -> str:
    ends = [metric.text(row[key] if isinstance(row, dict) else getattr(row, key)) for key in (low, high)]
    return "" if ends[0] == NONE else " to ".join(ends)


def _shade(value: float | None, metric: Metric) -> str:
    """A cell's colour: the deeper the better; without a scale of its own, distances fade out at 30 mm."""
    if value is None or value != value:
        return "#ffffff"
    share = value if metric.better == "high" else 1 - min(abs(value) / 30, 1)
    light = round(97 - 42 * max(0.0, min(1.0, share)))
    return f"hsl(160, 45%, {light}%)"
