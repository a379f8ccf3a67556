"""Pairs measured in one run, as ratios with their spread, and where they were measured."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from desam_nnunet.system.files import replace_file
from desam_nnunet.system.machine import describe_machine

RESULTS = Path(__file__).resolve().parent / "results"
Work = Callable[[], Any]


@dataclass
class Row:
    """One pair.

    Attributes:
        reference, ours: Median seconds.
        ratio, low, high: Of the times, reference to ours: median, least and greatest over the repeats.
        required: What the ratio must reach; None where nothing is asked.
        most: What it must not exceed.
        notes: More columns.
    """

    what: str
    reference: float
    ours: float
    ratio: float
    low: float
    high: float
    required: float | None = None
    notes: dict[str, str] = field(default_factory=dict)
    most: float = math.inf

    @property
    def passed(self) -> bool:
        return (self.required is None or self.ratio >= self.required) and self.ratio <= self.most

    @property
    def asked(self) -> str:
        """What is asked, and whether that is so."""
        if self.required is None:
            return ""
        limits = f"{self.required:.3g}" if self.most == math.inf else f"{self.required:.3g} to {self.most:.3g}"
        return f"{limits}: {'PASS' if self.passed else 'FAIL'}"


def compare(what: str, reference: Work, ours: Work, *, device: torch.device, repeats: int,
            required: float | None = None, notes: dict[str, str] | None = None) -> Row:
    """Times both in turn, so that the machine's moods hit both. The caller has run them once, to compare outputs."""
    times = [(seconds(reference, device), seconds(ours, device)) for _ in range(repeats)]
    ratios = [theirs / mine for theirs, mine in times]
    theirs, mine = (statistics.median(column) for column in zip(*times, strict=True))
    row = Row(what, theirs, mine, statistics.median(ratios), min(ratios), max(ratios), required, notes or {})
    print(f"{what}: {theirs:.3g} s, {mine:.3g} s, {row.ratio:.2f} times", flush=True)
    return row


def seconds(work: Work, device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begin


def compute_exactly() -> None:
    """On a GPU, convolutions in float32 keep all its digits (cuDNN would drop 13 bits): outputs are compared first."""
    torch.backends.cudnn.allow_tf32 = False


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of five."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    a @ b
    return 2 * side**3 / min(seconds(lambda: a @ b, device) for _ in range(5))


@dataclass
class Report:
    """One benchmark's results, written as Markdown and JSON at every addition, so that a stopped run keeps them."""

    name: str
    title: str
    settings: str
    device: torch.device
    tables: dict[str, list[Row]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    heads: tuple[str, str, str] = ("reference (s)", "ours (s)", "times as fast (least to greatest)")

    @property
    def passed(self) -> bool:
        return all(row.passed for rows in self.tables.values() for row in rows)

    def add(self, table: str, row: Row) -> None:
        self.tables.setdefault(table, []).append(row)
        self.write()

    def fact(self, what: str, value: str) -> None:
        print(f"{what}: {value}", flush=True)
        self.facts[what] = value
        self.write()

    def write(self) -> None:
        RESULTS.mkdir(parents=True, exist_ok=True)
        stem = self.name if self.device.type == "cpu" else f"{self.name}_{self.device.type}"
        tables = {name: [_plain(row) for row in rows] for name, rows in self.tables.items()}
        result = {"benchmark": self.name, "settings": self.settings, "machine": describe_machine(self.device),
                  "tables": tables, "facts": self.facts}
        replace_file(RESULTS / f"{stem}.json", [json.dumps(result, indent=2).encode(), b"\n"])
        replace_file(RESULTS / f"{stem}.md", [self._markdown().encode()])

    def _markdown(self) -> str:
        where = ", ".join(f"{key} {value}" for key, value in describe_machine(self.device).items())
        parts = [f"# {self.title}", self.settings, f"Machine: {where}."]
        parts += [f"## {name}\n\n{_table(self.heads, rows)}" for name, rows in self.tables.items()]
        if self.facts:
            parts.append("## Facts\n\n" + "\n".join(f"- {what}: {value}" for what, value in self.facts.items()))
        return "\n\n".join(parts) + "\n"


def _plain(row: Row) -> dict[str, Any]:
    content = asdict(row) | {"passed": row.passed}
    if row.most == math.inf:  # which JSON has no word for
        del content["most"]
    return content


def _table(heads: tuple[str, str, str], rows: list[Row]) -> str:
    extra = list(dict.fromkeys(key for row in rows for key in row.notes))
    head = ["", *heads, "required", *extra]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        lines.append([row.what, f"{row.reference:.3g}", f"{row.ours:.3g}",
                      f"{row.ratio:.2f} ({row.low:.2f} to {row.high:.2f})", row.asked,
                      *(row.notes.get(key, "") for key in extra)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
