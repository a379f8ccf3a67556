"""Manifests of studies that nobody would write."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from fuzzing import JSON, outcome
from hypothesis import given
from hypothesis import strategies as st

from desam_nnunet.nnunet.sites import check_sites, read_sites

LABEL = np.zeros((3, 4, 5), np.uint8)
LABEL[1, 1:3, 1:3] = 1
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


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three volumes, no two of them alike, and their references."""
    folder = tmp_path_factory.mktemp("volumes")
    for number in range(3):
        for name, array in ((f"{number}", np.full((3, 4, 5), number, np.float32)), (f"{number}_label", LABEL)):
            sitk.WriteImage(sitk.GetImageFromArray(array), folder / f"{name}.nii.gz")
    return folder


def mostly(good: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(good, good, good, good, CELLS)


FILES = [f"{number}.nii.gz" for number in range(3)]
ROWS = st.lists(st.fixed_dictionaries({
    "case": mostly(st.sampled_from(["a", "b", "c"])), "site": mostly(st.sampled_from(["X", "Y"])),
    "image": mostly(st.sampled_from(FILES)),
    "label": mostly(st.sampled_from([f"{number}_label.nii.gz" for number in range(3)]))}), min_size=1, max_size=3)


@given(ROWS, st.booleans())
def test_what_is_accepted_is_what_was_written(volumes: Path, rows: list[dict[str, str]], as_json: bool) -> None:
    """Every row is a case of its site with its files, and no file is of two."""
    path = volumes / f"manifest.{'json' if as_json else 'csv'}"
    if as_json:
        path.write_text(json.dumps(rows))
    else:
        with open(path, "w", newline="", encoding="utf-8", errors="replace") as stream:
            table = csv.DictWriter(stream, COLUMNS)
            table.writeheader()
            table.writerows(rows)
    sites = outcome(lambda: read_sites(path))
    if sites is None or outcome(lambda: check_sites(sites)) is None:
        return
    found = [(case.name, site, [image.name for image in case.images], case.label.name)
             for site, cases in sites.items() for case in cases]
    assert sorted(found) == sorted((row["case"], row["site"], [row["image"].strip()], row["label"]) for row in rows)
    files = [name for _, _, images, label in found for name in (*images, label)]
    assert len(set(files)) == len(files)
