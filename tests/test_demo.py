"""The demonstration as `make demo` runs it, and what its training must reach."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_demonstration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least 90 % of the organ-free slices of each unseen site are predicted empty, and the organ is found."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # other tests train without workers
    subprocess.run([sys.executable, ROOT / "examples" / "demo.py", "--work", tmp_path], check=True)
    text = (tmp_path / "demo.md").read_text()
    rows = re.findall(r"\*\*(Site\w)\*\* \| \*\*([\d.]+)\*\* \| \d+ \| \d+ \((\d+)%\)", text)
    assert [site for site, *_ in rows] == ["SiteB", "SiteC"]
    assert all(float(dice) > 0.6 for _, dice, _ in rows)
    assert all(int(empty) >= 90 for *_, empty in rows)
    assert (tmp_path / "demo.png").stat().st_size > 50_000
