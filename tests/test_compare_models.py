"""The example that compares models at the source alone, on phantom sites."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import run_script, tiny_sections

import phantom

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "compare_models.py"
PROBE = {"trainer": "PDMMTrainer", "batch_size": 2, "pdmm": {"width": 16}}


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sites")
    phantom.write_unseen(folder, sites=("SiteA",), cases=5)
    phantom.write_unseen(folder, sites=("SiteB",), cases=2)
    return folder


@pytest.fixture
def data(sites: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sites, tmp_path / "data"))


def arguments(data: Path, models: dict[str, Any]) -> tuple[Path, Path, Path]:
    path = data.with_name("models.json")
    path.write_text(json.dumps(models))
    return data, data.with_name("work"), path


def compare(data: Path, models: dict[str, Any], *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments(data, models), *map(str, words)], capture_output=True,
                          text=True)


@pytest.mark.slow
def test_models_are_compared_and_a_second_call_does_nothing_again(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    sam = tiny_sections(encoder="vit_tiny", image_size=64)["sam"]
    views = sam | {"views": 2, "augmentation": "strong", "view_geometry": "case"}  # which slabs need
    models = {"strong": PROBE | {"sam": views}, "slabs": PROBE | {"slices": 3, "sam": views},
              "nnU-Net": {"trainer": "nnUNetTrainer", "batch_size": 2, "sam": sam},
              "both": {"ensemble": ["strong", "slabs", "nnU-Net"]}}
    words = ["--source", "SiteA", "-f", 0, "--shifts", 2, "--disable_tta", "--label", "organ"]
    result = compare(data, models, *words)
    assert result.returncode == 0, result.stderr[-3000:]
    text = (data.with_name("work") / "SiteA__0.md").read_text()
    (head,) = [line for line in text.splitlines() if line.startswith("| model")]
    assert all(f"{where}: Dice" in head for where in ("held out", "simulated shift", "SiteB"))
    assert len(re.findall(r"^\| (strong|slabs|nnU-Net|both) \| [\d.]+ \| [\d.]+ \| [\d.]+ ", text, re.M)) == 4
    held_out, shifted = (text.split(f"Dice of every case, {where}:")[1].split("Dice of")[0].count("| case")
                         for where in ("held out", "simulated shift"))
    assert held_out == shifted  # two draws of a case are one case
    again = compare(data, models, *words)
    assert again.returncode == 0
    assert "+ " not in again.stdout
    assert text in again.stdout
    models["strong"]["pdmm"] = {"width": 32}
    assert "'strong' was trained with other settings" in compare(data, models, *words).stderr
    models = models | {"strong": {**models["strong"], "pdmm": PROBE["pdmm"]}, "both": {"ensemble": ["strong", "slabs"]}}
    assert "'both' was made of other models" in compare(data, models, *words).stderr


@pytest.mark.parametrize(("models", "words", "message"), [
    ({"a": PROBE}, ["--source", "SiteC"], "--source SiteC: "),
    ({"a": {"sam": {}}}, ["--source", "SiteA"], "a has no trainer"),
    ({"a": PROBE, "b": {"ensemble": ["a", "c"]}}, ["--source", "SiteA"], "c is in an ensemble, but no model of that"),
    ({"a, b": PROBE, "a b": PROBE}, ["--source", "SiteA"], "names must differ in more than signs"),
    ({"a": PROBE}, ["--source", "SiteA", "-f", "all"], "invalid choice: 'all'"),
    ({"a": PROBE}, ["--source", "SiteA", "--targets", "SiteA"], "--targets SiteA: choose from SiteB"),
    ({"a": PROBE}, ["--source", "SiteA", "--shifts", "0"], "--shifts 0: at least one draw"),
])
def test_what_cannot_be_compared_is_refused_at_once(
    data: Path, capsys: pytest.CaptureFixture[str], models: dict[str, Any], words: list[str], message: str
) -> None:
    assert run_script(SCRIPT, *arguments(data, models), *words) == 2
    assert message in capsys.readouterr().err
    assert not data.with_name("work").exists()
