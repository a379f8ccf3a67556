"""Manifests of studies that nobody would write."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from pathlib import Path
from typing import Any

from fuzzing import JSON, outcome
from hypothesis import given
from hypothesis import strategies as st

from desam_nnunet.nnunet.sites import check_sites, read_sites

COLUMNS = ["case", "site", "image", "label"]
CELLS = st.one_of(st.text(max_size=12), st.sampled_from(["", " ", "../x", "=1", "all", "A", "a", "x" * 300, "\0", "."]))


def read(name: str, content: bytes) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        return outcome(lambda: check_sites(read_sites(path)))  # no file is there, so that nothing is ever accepted


@given(st.one_of(JSON, st.lists(st.dictionaries(st.sampled_from(COLUMNS), st.one_of(CELLS, JSON)), max_size=3)))
def test_json_is_refused_in_one_sentence(rows: Any) -> None:
    assert read("manifest.json", json.dumps(rows).encode()) is None


@given(st.lists(st.lists(CELLS, min_size=1, max_size=5), max_size=3), st.permutations(COLUMNS), st.integers(0, 4))
def test_csv_is_refused_in_one_sentence(rows: list[list[str]], head: list[str], columns: int) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([head[:columns] or ["x"], *rows])
    assert read("manifest.csv", text.getvalue().encode(errors="replace")) is None


@given(st.binary(max_size=200), st.sampled_from(["json", "csv", "txt"]))
def test_bytes_are_refused_in_one_sentence(content: bytes, ending: str) -> None:
    assert read(f"manifest.{ending}", content) is None
