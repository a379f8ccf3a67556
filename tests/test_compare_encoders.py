"""The example that says whether weights are worth having, on phantom sites."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

import phantom
from desam_nnunet.sam.random_weights import random_state
from desam_nnunet.sam.variants import VARIANTS

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "compare_encoders.py"


def compare(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    phantom.write_unseen(tmp_path / "data", sites=("SiteA",), cases=5)
    phantom.write_unseen(tmp_path / "data", sites=("SiteB",), cases=2)
    (tmp_path / "data" / "SiteA").rename(tmp_path / "data" / "RUNMC")
    (tmp_path / "data" / "SiteB").rename(tmp_path / "data" / "UCL")
    return tmp_path / "data"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    (tmp_path / "given").mkdir()
    save_file(random_state(VARIANTS["vit_tiny"]), tmp_path / "given" / "weights.safetensors")
    return tmp_path / "given" / "weights.safetensors"


@pytest.mark.slow
def test_weights_are_compared_with_random_ones_and_with_nnunet(
    data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    words = [data, tmp_path / "work", "random", weights, "--minutes", 0.02, "--image-size", 64, "-tr",
             "DeSAMTrainerWholeBox", "--batch-size", 2]
    result = compare(*words)
    assert result.returncode == 0, result.stderr[-3000:]
    text = (tmp_path / "work" / "encoders.md").read_text()
    rows = re.findall(r"^\| (\w+) \| ([\w ]+) \| (\d+) \| [\d., \w]+ \| ([\d.]+) \([\d.]+ to [\d.]+\) \|", text, re.M)
    assert [row[:2] for row in rows] == [("DeSAMTrainerWholeBox", "random"), ("DeSAMTrainerWholeBox", "given"),
                                         ("nnUNetTrainer", "1 x")]
    assert rows[0][2] == rows[1][2]  # as many iterations
    assert "Less random weights" in text
    assert text.count("| DeSAMTrainerWholeBox | given | nnUNetTrainer 1 x |") == 1
    cases = text.split("Every case of RUNMC")[1].split("Every case of UCL")
    assert [part.count("\n| ") - 2 for part in cases] == [5, 2]  # without head and rule
    again = compare(*words)
    assert again.returncode == 0
    assert (tmp_path / "work" / "encoders.md").read_text() == text


@pytest.mark.parametrize(("words", "message"), [
    (["nothing.pth"], "nothing.pth"),
    (["random", "--minutes", "0"], "--minutes and --baselines must be positive"),
    (["random", "-tr", "DeSAMTrianer"], "-tr DeSAMTrianer: nnU-Net finds no trainer of that name"),
])
def test_what_cannot_be_compared_is_refused_at_once(words: list[str], message: str, data: Path, tmp_path: Path) -> None:
    result = compare(data, tmp_path / "work", *words)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "work").exists()


def test_a_folder_without_the_sites_is_refused(weights: Path, tmp_path: Path) -> None:
    phantom.write_unseen(tmp_path / "data", sites=("SiteB",), cases=1)
    result = compare(tmp_path / "data", tmp_path / "work", weights)
    assert result.returncode == 2
    assert "has no folder RUNMC and no folder UCL" in result.stderr
