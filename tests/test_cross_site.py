"""A study of the phantom's three sites through nnU-Net's own commands, interrupted after every step."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from conftest import PLANS, Workspace, tiny_sections
from filelock import FileLock
from matplotlib import image as pictures
from matplotlib.colors import to_rgb

import phantom
from desam_nnunet.commands.__main__ import main
from desam_nnunet.cross_site import runner
from desam_nnunet.cross_site.conditions import (
    is_to_be_cached,
    is_unprepared,
    is_untrained,
    put_damaged_aside,
    remove_stale_predictions,
)
from desam_nnunet.cross_site.pictures import colour_of, draw_cases
from desam_nnunet.cross_site.sites import Case
from desam_nnunet.cross_site.steps import follows, steps_of
from desam_nnunet.cross_site.study import Study

TRAINERS = ("DeSAMTrainer", "nnUNetTrainer")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")


class Killed(BaseException):
    """As SIGKILL between two steps: nothing of the run stays but what is on disk."""


class Ran:
    """A study that was run to its end. `words` are the command's."""

    def __init__(self, root: Path) -> None:
        self.data, self.out = root / "data", root / "study"
        phantom.write_unseen(self.data, sites=("SiteA",), cases=5)
        phantom.write_unseen(self.data, sites=("SiteB",), cases=2)
        phantom.write_unseen(self.data, sites=("SiteC",), cases=1)
        settings = tiny_sections(encoder="vit_tiny_random", image_size=64, features="online") | {"batch_size": 2}
        settings["desam"]["iou_threshold"] = 0.0
        (root / "settings.json").write_text(json.dumps(settings))
        self.words = ["cross-site", str(self.data), "-o", str(self.out), "-tr", *TRAINERS, "--sources", "SiteA",
                      "--settings", str(root / "settings.json"), "--labels", "organ=1", "-device", "cpu"]
        self.interruptions = 0

    def page(self) -> str:
        return (self.out / "report.html").read_text()

    def scores(self) -> pd.DataFrame:
        return pd.read_csv(self.out / "scores.csv")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """One source, two other sites, two trainers; the run is lost after each of its steps and started again."""
    ran = Ran(tmp_path_factory.mktemp("cross_site"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_n_proc_DA", "1")
        patch.setenv("nnUNet_def_n_proc", "1")
        write = runner.replace_file

        def killed(path: Path, parts: Any) -> int:
            write(path, parts)
            raise Killed

        patch.setattr(runner, "replace_file", killed)
        while True:
            try:
                assert main(ran.words) == 0
                break
            except Killed:
                ran.interruptions += 1
        patch.setattr(runner, "replace_file", write)
        yield ran


def study_of(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> Study:
    """The study as the command opens it."""
    found: list[Study] = []
    monkeypatch.setattr(runner, "run_study", lambda study, *_: found.append(study))
    assert main(ran.words) == 0
    return found[0]


def test_every_step_is_done_once(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = steps_of(study_of(ran, monkeypatch), "cpu")
    assert ran.interruptions == len(steps) == len(list((ran.out / "state").glob("*.json")))
    kinds = [step.kind for step in steps]
    assert {kind: kinds.count(kind) for kind in ("prepare", "encode", "train", "predict", "score", "look")} == {
        "prepare": 1, "encode": 1, "train": 2, "predict": 4, "score": 6, "look": 6}
    for log in (ran.out / "logs").glob("*.log"):
        assert log.read_text().count("$ ") >= 1
        assert len(re.findall(r"^\$ ", log.read_text(), re.MULTILINE)) == 1


def test_nothing_of_a_target_reaches_the_source(ran: Ran) -> None:
    """Fingerprint, plans and split are those of the source's five cases."""
    folders = [path.name for path in (ran.out / "nnUNet_preprocessed").iterdir()]
    assert folders == ["Dataset001_SiteA"]
    folder = ran.out / "nnUNet_preprocessed" / "Dataset001_SiteA"
    splits = json.loads((folder / "splits_final.json").read_text())
    assert {case for split in splits for case in split["train"]} == {f"SiteA_00{number}" for number in range(5)}
    assert "SiteB" not in (folder / "dataset.json").read_text()
    assert len(json.loads((folder / "dataset_fingerprint.json").read_text())["spacings"]) == 5


def test_both_trainers_have_the_same_budget(ran: Ran) -> None:
    for trainer in TRAINERS:
        model = ran.out / "nnUNet_results" / "Dataset001_SiteA" / f"{trainer}__CrossSitePlans__2d"
        logs = "".join(path.read_text() for path in (model / "fold_0").glob("training_log_*.txt"))
        assert re.findall(r"Epoch (\d+)\s*\n", logs) == ["0"]
        assert json.loads((model / "plans.json").read_text())["configurations"]["2d"]["batch_size"] == 2


def test_scores_are_of_every_case_and_right(ran: Ran) -> None:
    scores = ran.scores()
    counted = scores.groupby(["trainer", "target", "protocol"]).size()
    for trainer in TRAINERS:
        for protocol in ("volume", "published"):
            assert [counted[trainer, site, protocol] for site in ("SiteA", "SiteB", "SiteC")] == [1, 2, 1]
    for row in scores[(scores["protocol"] == "volume") & (scores["target"] == "SiteB")].to_dict("records"):
        truth = read(ran.data / "SiteB" / "labels" / f"{row['case']}.nii.gz")
        found = read(ran.out / "predictions" / "SiteA" / row["trainer"] / "SiteB" / f"{row['case']}.nii.gz")
        assert row["dice"] == pytest.approx(2 * (truth & found).sum() / (truth.sum() + found.sum()))


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(path)) > 0


def test_the_report_is_made_from_what_is_on_disk(ran: Ran) -> None:
    names = ("report.html", "report.json", "scores.csv", "summary.csv")
    before = {name: (ran.out / name).read_bytes() for name in names}
    for name in names:
        (ran.out / name).unlink()
    assert main(ran.words) == 0
    assert {name: (ran.out / name).read_bytes() for name in names} == before


def test_the_report_has_what_it_must(ran: Ran) -> None:
    page = ran.page()
    for words in ("RANDOM weights", "SiteA", "SiteB", "SiteC", *TRAINERS, "held-out cases", "boundary voxels",
                  "protocol “volume”", "protocol “published”", "p, corrected", "peak memory, MB", "nnunetv2 2.",
                  "Best, median and worst", "Where DeSAM looks"):
        assert words in page, words
    assert page.count("data:image/webp;base64,") == 6 + 2
    assert page.count("<svg") == 6
    assert re.findall(r'(?:src|href)="(?!data:)(?!#)[^"]*"', page) == []
    content = json.loads((ran.out / "report.json").read_text())
    cell = ran.scores().query("trainer == 'nnUNetTrainer' and protocol == 'volume' and target == 'SiteC'")
    (found,) = [row for row in content["summaries"] if (row["protocol"], row["source"], row["target"], row["trainer"],
                row["metric"]) == ("volume", "SiteA", "SiteC", "nnUNetTrainer", "hd95")]
    assert found["mean"] == pytest.approx(cell["hd95"].mean())
    assert found["cases"] == 1
    costs = {row["trainer"]: row for row in content["costs"]}
    assert costs["DeSAMTrainer"]["checkpoint_mb"] > 1
    for row in costs.values():
        assert all(row[key] > 0 for key in ("parameters", "training_peak_mb"))
        assert all(isinstance(row[key], float) for key in ("training_minutes", "seconds_per_volume"))


def test_pictures_show_reference_and_prediction(ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One colour for the class: a line around a prediction that is the reference, moved, and a see-through area."""
    shutil.copytree(ran.out, tmp_path / "study", symlinks=True)
    study = replace(study_of(ran, monkeypatch), out=tmp_path / "study")
    for case in study.sites["SiteB"]:
        reference = sitk.ReadImage(case.label)
        moved = sitk.GetImageFromArray(np.roll(sitk.GetArrayFromImage(reference), 6, axis=2))
        moved.CopyInformation(reference)
        sitk.WriteImage(moved, study.prediction_folder("SiteA", "DeSAMTrainer", "SiteB") / f"{case.name}.nii.gz")
    draw_cases(study, "SiteA", "DeSAMTrainer", "SiteB")
    seen = pictures.imread(study.picture("SiteA", "DeSAMTrainer", "SiteB"))[..., :3] / 255
    line = np.abs(seen - to_rgb(colour_of(0))).max(-1) < 0.02
    area = seen[..., 0] - seen[..., 2] > 0.15  # orange; all else is grey
    assert 500 < line.sum() < area.sum() / 3


@in_a_browser
def test_a_browser_shows_the_report(ran: Ran, tmp_path: Path) -> None:
    """Without network: masks, heat map and score map are seen, and nothing is wider than the page."""
    options = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    page = (ran.out / "report.html").as_uri()
    shot, paper = tmp_path / "page.png", tmp_path / "page.pdf"
    subprocess.run([*options, "--window-size=1200,9000", f"--screenshot={shot}", page], check=True,
                   capture_output=True)
    seen = pictures.imread(shot)[..., :3]
    assert seen.shape[:2] == (9000, 1200)
    assert (np.abs(seen - to_rgb(colour_of(0))).max(-1) < 0.1).sum() > 1500  # lines of predictions
    ink = (seen < 0.9).any(-1)
    assert 0.02 < ink.mean() < 0.9
    assert not ink[:, -15:].any()  # the right margin stays free
    subprocess.run([*options, f"--print-to-pdf={paper}", "--no-pdf-header-footer", page], check=True,
                   capture_output=True)
    assert len(re.findall(rb"/Type\s*/Page\b", paper.read_bytes())) >= 3


def test_a_missing_prediction_is_a_failure(ran: Ran, tmp_path: Path) -> None:
    """In a copy: a lost file changes the mean, and the report says how many failed."""
    out = tmp_path / "study"
    shutil.copytree(ran.out, out, symlinks=True)
    words = [str(out) if word == str(ran.out) else word for word in ran.words]
    (out / "predictions" / "SiteA" / "DeSAMTrainer" / "SiteB" / "SiteB_000.nii.gz").unlink()
    for note in (out / "state").glob("score__SiteA__DeSAMTrainer__SiteB*"):
        note.unlink()
    assert main(words) == 0
    scores = pd.read_csv(out / "scores.csv")
    (lost,) = scores[(scores["outcome"] == "missing") & (scores["protocol"] == "volume")].to_dict("records")
    assert (lost["case"], lost["trainer"], lost["dice"]) == ("SiteB_000", "DeSAMTrainer", 0.0)
    summary = pd.read_csv(out / "summary.csv")
    cell = summary.query("protocol == 'volume' and source == 'SiteA' and target == 'SiteB' and metric == 'dice'")
    assert cell.set_index("trainer").loc["DeSAMTrainer", "cases"] == 2
    assert cell.set_index("trainer").loc["DeSAMTrainer", "failures"] >= 1


def test_a_failed_step_says_why_and_leaves_the_rest(
    ran: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    shutil.copytree(ran.out, out, symlinks=True)
    (out / "state" / "predict__SiteA__nnUNetTrainer__SiteC.json").unlink()
    shutil.rmtree(out / "nnUNet_results" / "Dataset001_SiteA" / "nnUNetTrainer__CrossSitePlans__2d")
    words = [str(out) if word == str(ran.out) else word for word in ran.words]
    assert main(words) == 1
    said = capsys.readouterr()
    assert "The step 'predict SiteA nnUNetTrainer SiteC' failed. The end of" in said.err
    assert "Mend it and start again: what is done stays done." in said.err
    assert (out / "predictions" / "SiteA" / "nnUNetTrainer" / "SiteB" / "SiteB_000.nii.gz").is_file()


def test_what_a_kill_cut_off_is_done_again(ran: Ran, tmp_path: Path) -> None:
    """A prediction and a checkpoint of which half is there; what is whole stays."""
    folder = tmp_path / "predictions"
    shutil.copytree(ran.out / "predictions" / "SiteA" / "nnUNetTrainer" / "SiteB", folder)
    cut, whole = (folder / f"SiteB_00{number}.nii.gz" for number in (0, 1))
    cut.write_bytes(cut.read_bytes()[:-20])
    model = ran.out / "nnUNet_results" / "Dataset001_SiteA" / "nnUNetTrainer__CrossSitePlans__2d"
    fold = tmp_path / "fold_0"
    shutil.copytree(model / "fold_0", fold)
    final = fold / "checkpoint_final.pth"
    remove_stale_predictions(folder, [final])
    assert not cut.exists()
    assert whole.exists()
    other = tmp_path / "other" / "fold_0"
    shutil.copytree(model / "fold_0", other)
    (other / final.name).write_bytes(b"another")
    remove_stale_predictions(folder, [other / final.name])
    assert not whole.exists()  # another model's
    assert not is_untrained(fold)
    final.write_bytes(final.read_bytes()[:-20])
    assert is_untrained(fold)
    assert final.exists()  # who asks changes nothing
    put_damaged_aside(fold)
    assert is_untrained(fold)
    assert not final.exists()
    assert (fold / "checkpoint_final.pth.damaged").exists()


def test_a_step_done_again_takes_along_what_rests_on_it(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {step.name: step for step in steps_of(study_of(ran, monkeypatch), "cpu")}
    order = list(steps)

    def after(name: str) -> set[str]:
        return {later for later in order[order.index(name) + 1:] if follows(steps[later], steps[name])}

    assert after("links") == set()
    assert after("prepare__SiteA") == set(order[order.index("prepare__SiteA") + 1:])
    assert after("encode__SiteA__desam") == {name for name in order if "DeSAMTrainer" in name}
    assert after("train__SiteA__nnUNetTrainer__0") == {
        name for name in order if "nnUNetTrainer" in name and not name.startswith("train")}
    assert after("predict__SiteA__nnUNetTrainer__SiteB") == {
        "score__SiteA__nnUNetTrainer__SiteB", "look__SiteA__nnUNetTrainer__SiteB"}


def test_two_processes_do_not_do_the_same_step(
    ran: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    shutil.copytree(ran.out, out, symlinks=True)
    words = [str(out) if word == str(ran.out) else word for word in ran.words]
    (out / "state" / "score__SiteA__DeSAMTrainer__SiteB.json").unlink()
    with FileLock(out / "state" / "score__SiteA__DeSAMTrainer__SiteB.lock"):
        assert main(words) == 1
    assert "Another process is at the step 'score SiteA DeSAMTrainer SiteB'" in capsys.readouterr().err
    assert main(words) == 0


def test_two_parts_end_in_one_report(ran: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a copy without scores: part 0 leaves the second trainer to part 1, which writes the report."""
    out = tmp_path / "study"
    shutil.copytree(ran.out, out, symlinks=True)
    words = [str(out) if word == str(ran.out) else word for word in ran.words]
    for note in (*(out / "state").glob("score*.json"), out / "report.html"):
        note.unlink()
    assert main([*words, "-num_parts", "2", "-part_id", "0"]) == 0
    assert "3 step(s) of other parts are left" in capsys.readouterr().out
    assert not (out / "report.html").exists()
    assert main([*words, "-num_parts", "2", "-part_id", "1"]) == 0
    assert (out / "report.html").is_file()
    assert (out / "scores.csv").read_bytes() == (ran.out / "scores.csv").read_bytes()


def test_parts_share_the_pairs(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = steps_of(study_of(ran, monkeypatch), "cpu")
    for part, trainer in enumerate(TRAINERS):
        assert {step.names[1] for step in steps if step.part == part} == {trainer}
    assert {step.kind for step in steps if step.part is None} == {"links", "data", "prepare", "plan", "encode"}


def test_a_study_of_data_sets_is_described_with_what_is_done(
    trained: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = trained.root / "nnUNet_raw" / "Dataset777_SiteB"
    shutil.copytree(trained.unseen / "images", raw / "imagesTr")
    shutil.copytree(trained.unseen / "labels", raw / "labelsTr")
    description = json.loads((trained.root / "nnUNet_raw" / "Dataset501_Phantom" / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps(description | {"numTraining": 2}))
    words = ["cross-site", "-d", "SiteA=501", "SiteB=777", "-o", str(tmp_path / "study"), "-tr", "DeSAMTrainer", "-p",
             PLANS, "--sources", "SiteA", "--targets", "SiteB", "-device", "cpu"]
    try:
        assert main([*words, "--dry-run"]) == 0
        assert "[to do] train SiteA DeSAMTrainer 0    nnUNetv2_train 501 2d 0" in capsys.readouterr().out
        (raw / "dataset.json").write_text(json.dumps(description | {"labels": {"background": 0, "other": 1}}))
        assert main([*words, "--dry-run"]) == 1
        assert "The data sets of SiteA and SiteB differ in labels" in capsys.readouterr().err
    finally:
        shutil.rmtree(raw)
    study = opened_study(trained, tmp_path)
    assert not is_unprepared(study, "SiteA")
    assert not is_to_be_cached(study, "SiteA", "desam")
    assert not is_untrained(trained.model("DeSAMTrainer") / "fold_0")


def opened_study(trained: Workspace, out: Path) -> Study:
    """The preprocessed data set of all tests as a study's only site."""
    raw = trained.root / "nnUNet_raw" / "Dataset501_Phantom"
    cases = [Case(path.name.removesuffix(".nii.gz"), (), path) for path in sorted((raw / "labelsTr").iterdir())]
    return Study(out, {"SiteA": cases}, {"SiteA": "Dataset501_Phantom"}, {"file_ending": ".nii.gz"}, True,
                 ("DeSAMTrainer",), ("SiteA",), (), plans=PLANS)


@pytest.mark.slow
def test_data_sets_of_nnunets_own_folders(trained: Workspace, tmp_path: Path) -> None:
    """The fold that is there is used as it is: what is left to do is to segment the other site."""
    raw = trained.root / "nnUNet_raw" / "Dataset777_SiteB"
    shutil.copytree(trained.unseen / "images", raw / "imagesTr")
    shutil.copytree(trained.unseen / "labels", raw / "labelsTr")
    description = json.loads((trained.root / "nnUNet_raw" / "Dataset501_Phantom" / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps(description | {"numTraining": 2}))
    model = trained.model("DeSAMTrainerWholeBox")
    weights = model / "fold_0" / "checkpoint_final.pth"
    before = torch.load(weights, weights_only=False)["network_weights"]
    out = tmp_path / "study"
    assert main(["cross-site", "-d", "SiteA=501", "SiteB=777", "-o", str(out), "-tr", "DeSAMTrainerWholeBox",
                 "-p", PLANS, "--sources", "SiteA", "--targets", "SiteB", "-device", "cpu"]) == 0
    after = torch.load(weights, weights_only=False)["network_weights"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not (out / "nnUNet_results").exists()
    scores = pd.read_csv(out / "scores.csv")
    assert set(scores["target"]) == {"SiteA", "SiteB"}
    assert set(scores["class"]) == {"organ"}
    assert "There is one trainer, and so nothing to compare." in (out / "report.html").read_text()
    shutil.rmtree(raw)


@pytest.mark.slow
def test_sigkill_between_all_steps_gives_the_same_figures(
    ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a copy with the models alone, so that what is compared does not depend on chance in training."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    out = tmp_path / "study"
    shutil.copytree(ran.out, out, symlinks=True)
    for folder in ("state", "predictions", "scores", "pictures", "sites"):
        shutil.rmtree(out / folder)
    for name in ("report.html", "report.json", "scores.csv", "summary.csv"):
        (out / name).unlink()
    words = [str(out) if word == str(ran.out) else word for word in ran.words]
    steps = steps_of(study_of(ran, monkeypatch), "cpu")
    kills = 0
    while (code := killed_at_its_second_note(words)) == -signal.SIGKILL:
        kills += 1
    assert code == 0
    assert kills == len(steps) - 1
    for name in ("scores.csv", "summary.csv"):
        assert (out / name).read_bytes() == (ran.out / name).read_bytes()


def killed_at_its_second_note(words: list[str]) -> int:
    """How the command ends that is killed when it has done two steps and noted one."""
    script = Path(__file__).with_name("killing.py")
    return subprocess.run([sys.executable, script, "2", r"^os\.rename .*/state/\w+\.json$", "desam", *words]).returncode


def test_a_command_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """And so does its worker: both hold the end of a pipe, which closes with the last of them."""
    reader, writer = os.pipe()
    command = [sys.executable, Path(__file__).with_name("orphan.py"), str(writer)]
    with subprocess.Popen(command, pass_fds=[writer]) as process, open(reader, "rb") as stream:
        os.close(writer)
        assert stream.read(2) == b"..", "it ended by itself"
        process.kill()
        assert stream.read() == b""
