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
from desam_nnunet.cross_site.study import Study, plain
from desam_nnunet.cross_site.tables import all_errors, all_scores, cost_of, encoding_minutes, machines_of
from desam_nnunet.encoders.registry import row_by_name
from desam_nnunet.evaluation.errors import THIRDS
from desam_nnunet.evaluation.findings import position_means, sentences, shift, worst_cases
from desam_nnunet.evaluation.metrics import METRICS, Metric
from desam_nnunet.evaluation.pictures import agreement_plot, box_plot
from desam_nnunet.evaluation.scores import PROTOCOLS, without_nan
from desam_nnunet.evaluation.tables import comparisons, summaries
from desam_nnunet.nnunet.model_folder import read_description
from desam_nnunet.nnunet.names import CONFIGURATION
from desam_nnunet.nnunet.sites import ALL
from desam_nnunet.system.files import replace_file

_PACKAGES = ("nnunetv2", "torch", "monai", "scipy", "SimpleITK")
_PLOTTED = ("dice", "hd95")
_SIGNIFICANT = 0.05
_NONE = "\N{EN DASH}"


def write_report(study: Study) -> None:
    """Writes ``report.html``, ``report.json``, ``scores.csv`` and ``summary.csv``."""
    scores, errors = all_scores(study), all_errors(study)
    summary, pairs = summaries(scores), comparisons(scores)
    volume = scores[scores["protocol"] == "volume"]
    content = {
        "study": plain(study), "versions": {"desam-nnunet": __version__} | {name: version(name) for name in _PACKAGES},
        "settings": {source: {trainer: _settings(study, source, trainer) for trainer in study.trainers}
                     for source in study.sources},
        "costs": [cost_of(study, source, trainer)._asdict() for source in study.sources for trainer in study.trainers],
        "machines": machines_of(study),
        "encoding_minutes": {source: minutes for source in study.sources
                             if (minutes := encoding_minutes(study, source)) > 0},
        "sentences": sentences(volume), "worst": worst_cases(volume, errors), "positions": position_means(errors),
        "summaries": without_nan(summary.to_dict("records")), "comparisons": without_nan(pairs.to_dict("records"))}
    _write(study.out / "report.json", json.dumps(content, indent=1, default=str))
    for name, table in (("scores", scores), ("summary", summary)):
        _write(study.out / f"{name}.csv", table.map(_no_formula).to_csv(index=False))
    _write(study.out / "report.html", _page(study, scores, errors, summary, content))


def _write(path: Path, text: str) -> None:
    replace_file(path, [text.encode()])


def _no_formula(cell: object) -> object:
    """A text that a spreadsheet would compute is marked as text."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@")) else cell


def _page(
    study: Study, scores: pd.DataFrame, errors: pd.DataFrame, summary: pd.DataFrame, content: dict[str, Any]
) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(shade=_shade, number=_number, interval=_interval)
    template = environment.from_string(files("desam_nnunet.cross_site").joinpath("report.html").read_text("utf-8"))
    classes = list(dict.fromkeys(scores["class"]))
    overall_class = ALL if len(classes) > 1 else classes[0]
    volume = scores[scores["protocol"] == "volume"]
    has_diagonal = "all" not in study.folds
    # over all unseen sites, and at each of them
    pairs = [pair for pair in content["comparisons"]
             if (pair["class"], pair["source"]) == (overall_class, ALL) and pair["metric"] in _PLOTTED]
    return template.render(content | {
        "study": study, "metrics": METRICS, "by_key": {metric.key: metric for metric in METRICS},
        "protocols": PROTOCOLS, "classes": classes, "overall_class": overall_class,
        "look": _look_up(summary, overall_class), "pairs": pairs, "shift": shift(volume), "thirds": THIRDS,
        "agreement": agreement_plot(errors),
        "plots": [box_plot(volume, target, metric) for target in dict.fromkeys(volume["target"])
                  for metric in METRICS if metric.key in _PLOTTED],
        "pictures": _embedded(study, "cases"), "maps": _embedded(study, "points"),
        "encoders": _encoders(content["settings"]),
        "columns": [site for site in study.sites if site in study.targets or (has_diagonal and site in study.sources)],
        "cases": {site: len(cases) for site, cases in study.sites.items()}, "all_sites": ALL,
        "has_diagonal": has_diagonal, "significant": _SIGNIFICANT})


def _look_up(summary: pd.DataFrame, overall_class: str) -> Callable[..., dict[str, Any] | None]:
    """Finds a row of the summary by what it is of; None where there is none."""
    keys = ["protocol", "source", "target", "trainer", "metric", "class"]
    rows = {tuple(row[key] for key in keys): row for row in summary.to_dict("records")}
    return lambda *key: rows.get(key if len(key) == len(keys) else (*key, overall_class))


def _settings(study: Study, source: str, trainer: str) -> dict[str, Any]:
    """What the model folder says of itself, without nnU-Net's network."""
    plans, _ = read_description(study.model(source, trainer))
    configuration = plans["configurations"][CONFIGURATION]
    method = study.trainers[trainer].method
    keys = ("batch_size", "patch_size", "spacing", "normalization_schemes", *(("sam", method) if method else ()))
    return {"plans": plans["plans_name"]} | {key: configuration[key] for key in keys if key in configuration}


def _encoders(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that the models use: whether their weights are RANDOM, and what is known of what they were trained on."""
    sections = [row.get("sam", {}) for of_source in settings.values() for row in of_source.values()]
    names = {section["encoder"]: section.get("identity", "") for section in sections if "encoder" in section}
    rows = {name: row_by_name(name) for name in names}
    return [{"name": name, "random": identity.startswith("random:"),
             "trained_on": row.trained_on if (row := rows[name]) else "what nobody has told"}
            for name, identity in sorted(names.items())]


def _embedded(study: Study, of: str) -> list[tuple[str, str, str, str]]:
    """Every cell with its picture as a URL, where there is one."""
    paths = [(cell, path) for cell in study.cells() if (path := study.picture(*cell, of=of)).is_file()]
    return [(*cell, f"data:image/webp;base64,{base64.b64encode(path.read_bytes()).decode()}") for cell, path in paths]


def _number(value: float | None, metric: Metric) -> str:
    """As the metric is printed; a dash where there is none."""
    return _NONE if value is None or value != value else f"{value:.{metric.digits}f}"


def _interval(row: dict[str, Any], metric: Metric) -> str:
    low, high = (_number(row[key], metric) for key in ("low", "high"))
    return "" if low == _NONE else f"{low} to {high}"


def _shade(value: float | None, metric: Metric) -> str:
    """A cell's colour: the deeper the better; without a scale of its own, distances fade out at 30 mm."""
    if value is None or value != value:
        return "#ffffff"
    share = value if metric.better == "high" else 1 - min(abs(value) / 30, 1)
    light = round(97 - 42 * max(0.0, min(1.0, share)))
    return f"hsl(160, 45%, {light}%)"
