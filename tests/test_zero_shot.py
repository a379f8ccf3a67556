"""The example that asks a SAM for masks without any training, on phantom sites."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import run_script

import phantom

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "zero_shot.py"


def zero_shot(data: Path, out: Path, encoder: str) -> int:
    return run_script(SCRIPT, data, out, "--encoder", encoder, "--label", "organ")


def test_a_box_of_the_reference_knows_the_slices_and_a_second_call_segments_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phantom.write_unseen(tmp_path / "data", sites=("SiteB",), cases=2)
    assert zero_shot(tmp_path / "data", tmp_path / "out", "vit_tiny") == 0
    text = (tmp_path / "out" / "zero_shot.md").read_text()
    boxed, whole = (float(re.search(rf"^\| {prompt} \| SiteB \| 2 \| ([\d.]+) ", text, re.M)[1])
                    for prompt in ("box of the reference", "whole slice"))
    assert boxed > whole
    assert "generated" in text  # what it was trained on
    written = sorted((tmp_path / "out" / "box_of_the_reference" / "SiteB").iterdir())
    assert len(written) == 2
    for path in written:
        reference = tmp_path / "data" / "SiteB" / "labels" / path.name
        organ, mask = (sitk.GetArrayFromImage(sitk.ReadImage(file)) for file in (reference, path))
        assert not mask[~organ.any((1, 2))].any()
        assert np.isin(mask, (0, 1)).all()
    before = [path.stat().st_mtime_ns for path in written]
    capsys.readouterr()
    assert zero_shot(tmp_path / "data", tmp_path / "out", "vit_tiny") == 0
    assert text in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in written] == before


def test_random_weights_have_no_zero_shot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phantom.write_unseen(tmp_path / "data", sites=("SiteB",), cases=1)
    assert zero_shot(tmp_path / "data", tmp_path / "out", "vit_tiny_random") == 2
    assert "without a trained mask decoder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
