"""The example that says whether weights are worth having, on phantom sites."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import torch
from conftest import run_script
from safetensors.torch import save_file

import phantom
from desam_nnunet.encoders.registry import ENCODERS
from desam_nnunet.encoders.weights import identify

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "compare_encoders.py"


def compare(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_encoders", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sites")
    phantom.write_unseen(folder, sites=("SiteA",), cases=5)
    phantom.write_unseen(folder, sites=("SiteB",), cases=2)
    (folder / "SiteA").rename(folder / "RUNMC")
    (folder / "SiteB").rename(folder / "UCL")
    return folder


@pytest.fixture
def data(sites: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sites, tmp_path / "data"))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    (tmp_path / "given").mkdir()
    state = {key: 1.01 * value for key, value in ENCODERS["vit_tiny"].architecture.random_state().items()}
    save_file(state, tmp_path / "given" / "weights.safetensors")
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
    rows = re.findall(r"^\| (\w+) \| (\w+) \| (\d+) \| [\d., \w]+ \| ([\d.]+) \([\d.]+ to [\d.]+\) \|", text, re.M)
    assert [row[:2] for row in rows] == [("DeSAMTrainerWholeBox", "random"), ("DeSAMTrainerWholeBox", "given"),
                                         ("nnUNetTrainer", "1x")]
    assert rows[0][2] == rows[1][2]  # as many iterations
    assert "Less random weights" in text
    assert text.count("| DeSAMTrainerWholeBox | given | nnUNetTrainer 1x |") == 1
    for name, encoder in (("random", "vit_tiny_random"), ("given", str(weights))):
        (plans,) = (tmp_path / "work" / f"DeSAMTrainerWholeBox_{name}").glob("nnUNet_results/*/*/plans.json")
        section = json.loads(plans.read_text())["configurations"]["2d"]["sam"]
        assert (section["encoder"], section["identity"]) == (encoder, identify(encoder))
    cases = text.split("Every case of RUNMC")[1].split("Every case of UCL")
    assert [part.count("\n| ") - 2 for part in cases] == [5, 2]  # without head and rule
    again = compare(*words)
    assert again.returncode == 0
    assert (tmp_path / "work" / "encoders.md").read_text() == text
    save_file(ENCODERS["vit_tiny"].architecture.random_state(), weights)  # another file in the old one's place
    other = compare(*words)
    assert other.returncode == 1
    assert re.search(r"DeSAMTrainerWholeBox_given was made with identity md5:\w+, not md5:\w+: give another WORK",
                     other.stderr)


def test_the_report_pairs_cases_with_random_weights_and_with_nnunet(example: ModuleType) -> None:
    def row(trainer: str, name: str, minutes: float, source: list[float], target: list[float]) -> tuple:
        return example.Row(trainer, name, 500, 3, minutes, *(
            pd.Series(values, [f"Case{number}" for number in range(len(values))]) for values in (source, target)))

    rows = [row("DeSAMTrainer", "random", 3.0, [0.5, 0.7], [0.2, 0.2]),
            row("DeSAMTrainer", "given", 3.1, [0.6, 0.8], [0.6, 0.8]),
            row("DeSAMTrainerWholeBox", "given", 3.0, [0.9, 0.9], [0.9, 0.9]),
            row("nnUNetTrainer", "10x", 3.5, [0.1, 0.1], [0.0, 0.0])]
    options = argparse.Namespace(minutes=3.0, image_size=256, lr=5e-4)
    text = example.report(options, rows, {"DeSAMTrainer": example.Pace(0.3, 6)})
    random, baseline = text.split("Less random weights")[1].split("Less nnUNetTrainer")
    assert random.count("| DeSAMTrainer |") == 1
    assert re.search(r"\| DeSAMTrainer \| given \| DeSAMTrainer random \| 0\.100 .*\| 0\.500 ", random)
    assert re.search(r"\| DeSAMTrainer \| given \| nnUNetTrainer 10x \| 0\.600 .*\| 0\.700 ", baseline)
    assert baseline.split("Every case")[0].count("| nnUNetTrainer 10x |") == 3
    assert "| nnUNetTrainer | 10x | 500 | 3.5, wanted 3 |" in text
    assert "| DeSAMTrainer | given | 500 | 3.1 |" in text
    assert "| Case1 | 0.700 | 0.800 | 0.900 | 0.100 |" in text


@pytest.mark.parametrize(("words", "message"), [
    (["nothing.pth"], "No weights file nothing.pth in "),
    (["vit_tiny", "vit_tiny"], "vit_tiny would be called vit_tiny, as other weights are"),
    (["random/weights.safetensors"], "random/weights.safetensors would be called random, as other weights are"),
    (["random", "-tr", "nnUNetTrainer"], "--baselines trains it"),
    (["random", "--minutes", "nan"], "--minutes and --baselines must be positive"),
    (["random", "--minutes", "0"], "--minutes and --baselines must be positive"),
    (["random", "-tr", "DeSAMTrianer"], "-tr DeSAMTrianer: nnU-Net finds no trainer of that name"),
])
def test_what_cannot_be_compared_is_refused_at_once(
    words: list[str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(SCRIPT, data, tmp_path / "work", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_a_folder_without_the_sites_is_refused(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phantom.write_unseen(tmp_path / "data", sites=("SiteB",), cases=1)
    assert run_script(SCRIPT, tmp_path / "data", tmp_path / "work", weights) == 2
    assert "has no folder RUNMC and no folder UCL" in capsys.readouterr().err


def test_weights_of_another_size_are_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zero = torch.zeros(())
    state = {key: zero.expand(shape) for key, shape in ENCODERS["vit_b"].architecture.shapes().items()}
    torch.save(state, tmp_path / "large.pth")  # one zero
    assert run_script(SCRIPT, data, tmp_path / "work", tmp_path / "large.pth") == 2
    assert "large.pth holds weights of vit_b, but only those of vit_tiny's size" in capsys.readouterr().err
