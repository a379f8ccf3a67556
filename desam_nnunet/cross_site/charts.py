"""Box plots of a metric, one drawing for each site that was segmented."""

from __future__ import annotations

from io import StringIO

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from desam_nnunet.evaluation.metrics import Metric
from desam_nnunet.evaluation.statistics import per_case

_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#000000")  # Okabe and Ito


def box_plot(scores: pd.DataFrame, target: str, metric: Metric) -> str:
    """SVG: for each source one group, in it a box for each trainer, every case a dot.

    Args:
        scores: Of one protocol, all classes.
    """
    here = scores[scores["target"] == target]
    sources, trainers = list(dict.fromkeys(here["source"])), list(dict.fromkeys(scores["trainer"]))
    with matplotlib.rc_context({"svg.hashsalt": "desam", "svg.fonttype": "none", "font.size": 9}):
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
                shift = [0.12 * ((index % 3) - 1) for index in range(len(values))]
                axis.scatter([place + by for by in shift], values, s=9, color=colour, zorder=3,
                             label=trainer if group == 0 else None)
        centre = (len(trainers) - 1) / 2
        words = [f"{source}\n(held-out cases)" if source == target else f"trained at {source}" for source in sources]
        axis.set_xticks([group * (len(trainers) + 0.8) + centre for group in range(len(sources))], words)
        axis.set_ylabel(metric.name + (f", {metric.unit}" if metric.unit else ""))
        axis.set_ylim(*((-0.02, 1.02) if metric.better == "high" else (0, 1.05 * axis.get_ylim()[1])))
        axis.set_title(f"Segmented: {target}", fontsize=10)
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg"):]
