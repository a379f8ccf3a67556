"""The end of a study: one page to show, and all figures as CSV and JSON. It is made from what lies on disk alone, so
that the same study gives the same report."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined

from desam_nnunet import __version__
from desam_nnunet.cross_site.charts import box_plot
from desam_nnunet.cross_site.costs import cost_of, encoding_minutes, machines_of
from desam_nnunet.cross_site.sites import ALL
from desam_nnunet.cross_site.study import Study, method_of, plain
from desam_nnunet.cross_site.tables import all_scores, comparisons, summaries
from desam_nnunet.evaluation.metrics import METRICS, Metric
from desam_nnunet.evaluation.protocols import PROTOCOLS
from desam_nnunet.planning.facts import CONFIGURATION
from desam_nnunet.system.files import replace_file

_PACKAGES = ("nnunetv2", "torch", "monai", "scipy", "SimpleITK")
_PLOTTED = ("dice", "hd95")
_SIGNIFICANT = 0.05
_NONE = "\N{EN DASH}"


def write_report(study: Study) -> Path:
    """Writes ``report.html``, ``report.json``, ``scores.csv`` and ``summary.csv``; returns the first."""
    scores = all_scores(study)
    summary, pairs = summaries(scores), comparisons(scores)
    costs = [cost_of(study, source, trainer)._asdict() for source in study.sources for trainer in study.trainers]
    encoding = {source: minutes for source in study.sources if (minutes := encoding_minutes(study, source)) > 0}
    settings = {source: {trainer: _settings(study, source, trainer) for trainer in study.trainers}
                for source in study.sources}
    versions = {"desam-nnunet": __version__} | {name: version(name) for name in _PACKAGES}
    content = {"study": plain(study), "versions": versions, "settings": settings, "costs": costs,
               "machines": machines_of(study), "encoding_minutes": encoding,
               "summaries": _records(summary), "comparisons": _records(pairs)}
    replace_file(study.out / "report.json", [json.dumps(content, indent=1, default=str).encode()])
    for name, table in (("scores", scores), ("summary", summary)):
        replace_file(study.out / f"{name}.csv", [table.to_csv(index=False).encode()])
    page = _page(study, scores, summary, pairs, content)
    path = study.out / "report.html"
    replace_file(path, [page.encode()])
    return path


def _page(
    study: Study, scores: pd.DataFrame, summary: pd.DataFrame, pairs: pd.DataFrame, content: dict[str, Any]
) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(shade=_shade, number=_number, interval=_interval)
    source = files("desam_nnunet.cross_site").joinpath("report.html")
    template = environment.from_string(source.read_text(encoding="utf-8"))
    classes = list(dict.fromkeys(scores["class"]))
    overall_class = ALL if len(classes) > 1 else classes[0]
    volume = scores[scores["protocol"] == "volume"]
    has_diagonal = "all" not in study.folds
    return template.render(
        study=study, metrics=METRICS, protocols=PROTOCOLS, classes=classes, overall_class=overall_class,
        look=_Look(summary, overall_class), pairs=_chosen_pairs(pairs, overall_class), costs=content["costs"],
        encoding=content["encoding_minutes"], settings=content["settings"], versions=content["versions"],
        machines=content["machines"],
        plots={target: [box_plot(volume, target, metric) for metric in METRICS if metric.key in _PLOTTED]
               for target in dict.fromkeys(volume["target"])},
        pictures=_drawn(study, study.pictures), maps=_drawn(study, study.score_picture),
        random=_random_encoders(content["settings"]),
        columns=[site for site in study.sites if site in study.targets or (has_diagonal and site in study.sources)],
        cases={site: len(cases) for site, cases in study.sites.items()}, all_sites=ALL,
        has_diagonal=has_diagonal, significant=_SIGNIFICANT)


class _Look:
    """Looks a summary up by what it is of; None where there is none."""

    def __init__(self, summary: pd.DataFrame, overall_class: str) -> None:
        keys = ["protocol", "class", "source", "target", "trainer", "metric"]
        self._rows = {tuple(row[key] for key in keys): row for row in summary.to_dict("records")}
        self._class = overall_class

    def __call__(
        self, protocol: str, source: str, target: str, trainer: str, metric: str, of_class: str | None = None
    ) -> dict[str, Any] | None:
        return self._rows.get((protocol, of_class or self._class, source, target, trainer, metric))


def _chosen_pairs(pairs: pd.DataFrame, of_class: str) -> list[dict[str, Any]]:
    """Comparisons over all unseen sites, and at each of them."""
    if pairs.empty:
        return []
    chosen = pairs[(pairs["class"] == of_class) & (pairs["source"] == ALL) & pairs["metric"].isin(_PLOTTED)]
    return _records(chosen)


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows, with None where a value is not a number."""
    rows: list[Any] = table.to_dict("records")
    return [{key: None if value != value else value for key, value in row.items()} for row in rows]


def _settings(study: Study, source: str, trainer: str) -> dict[str, Any]:
    """What the model folder says of itself, without nnU-Net's network."""
    plans = json.loads((study.model(source, trainer) / "plans.json").read_text())
    configuration = plans["configurations"][CONFIGURATION]
    method = method_of(trainer)
    keys = ("batch_size", "patch_size", "spacing", "normalization_schemes", *(("sam", method.name) if method else ()))
    return {"plans": plans["plans_name"]} | {key: configuration[key] for key in keys if key in configuration}


def _random_encoders(settings: dict[str, Any]) -> list[str]:
    """Encoders whose weights nobody trained: figures with them say nothing about SAM."""
    sections = [row.get("sam", {}) for of_source in settings.values() for row in of_source.values()]
    return sorted({section["encoder"] for section in sections if section.get("identity", "").startswith("random:")})


def _drawn(study: Study, place: Callable[[str, str, str], Path]) -> list[tuple[str, str, str, str]]:
    """Every cell with its picture, where there is one."""
    return [(*cell, _embedded(place(*cell))) for cell in study.cells() if place(*cell).is_file()]


def _embedded(path: Path) -> str:
    return f"data:image/webp;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _number(value: float | None, metric: Metric) -> str:
    """As the metric is printed; a dash where there is none."""
    return _NONE if value is None or value != value else f"{value:.{metric.digits}f}"


def _interval(row: dict[str, Any], metric: Metric) -> str:
    if row["low"] != row["low"]:
        return ""
    return f"{_number(row['low'], metric)} to {_number(row['high'], metric)}"


def _shade(value: float | None, metric: Metric) -> str:
    """A cell's colour: the deeper the better; without a scale of its own, distances fade out at 30 mm."""
    if value is None or value != value:
        return "#ffffff"
    share = value if metric.better == "high" else 1 - min(abs(value) / 30, 1)
    light = round(97 - 42 * max(0.0, min(1.0, share)))
    return f"hsl(160, 45%, {light}%)"
