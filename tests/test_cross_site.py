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
from desam_nnunet.cache.store import open_stores
from desam_nnunet.commands.__main__ import main
from desam_nnunet.cross_site.engine import Progress
from desam_nnunet.cross_site.executor import JOBS, THREADS, is_local, placed
from desam_nnunet.cross_site.jobs import is_to_be_cached
from desam_nnunet.cross_site.report import write_report
from desam_nnunet.cross_site.study import FILE, LOCK, Study, Trainer, read_study
from desam_nnunet.evaluation.pictures import colour_of, draw_cases
from desam_nnunet.evaluation.scores import chosen_cases, read_rows
from desam_nnunet.nnunet.labels import classes_of
from desam_nnunet.nnunet.leftovers import is_preprocessed, is_trained, put_damaged_aside, remove_stale_predictions
from desam_nnunet.nnunet.names import FOLDERS
from desam_nnunet.nnunet.sites import Case

TRAINERS = ("DeSAMTrainer", "nnUNetTrainer")
KILLS = (  # before one of these is renamed, or opened to be written
    r"^open .*/nnUNetTrainer__CrossSitePlans__2d/fold_0/progress.png",  # of its first epoch, whose checkpoint is there
    r"^os.rename .*/report.json",
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")


class Ran:
    """A study that was run to its end. `words` are the command's."""

    def __init__(self, root: Path) -> None:
        self.data, self.out = root / "data", root / "study"
        phantom.write_unseen(self.data, sites=("SiteA",), cases=5)
        phantom.write_unseen(self.data, sites=("SiteB",), cases=2)
        phantom.write_unseen(self.data, sites=("SiteC",), cases=1)
        settings = tiny_sections(encoder="vit_tiny_random", image_size=64, features="online", epochs=2)
        settings |= {"batch_size": 2}
        settings["desam"]["iou_threshold"] = 0.0
        (root / "settings.json").write_text(json.dumps(settings))
        self.words = ["cross-site", str(self.data), "-o", str(self.out), "-tr", *TRAINERS, "--sources", "SiteA",
                      "--settings", str(root / "settings.json"), "--labels", "organ=1", "-device", "cpu"]

    def page(self) -> str:
        return (self.out / "report.html").read_text()

    def scores(self) -> pd.DataFrame:
        return pd.read_csv(self.out / "scores.csv")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """One source, two other sites, two trainers; the first calls are killed, with all that they started."""
    ran = Ran(tmp_path_factory.mktemp("cross_site"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_n_proc_DA", "1")
        patch.setenv("nnUNet_def_n_proc", "1")
        for pattern in KILLS:
            assert killed_at(1, pattern, ran.words, ran.out.parent) == -signal.SIGKILL, pattern
        assert main(ran.words) == 0
        yield ran


def killed_at(number: int, pattern: str, words: list[str], folder: Path) -> int:
    """How the command ends that is killed, with its group, at the `number`-th event of that pattern."""
    count = folder / "count"
    count.unlink(missing_ok=True)
    paths = [str(Path(__file__).with_name("killing_site")), os.environ.get("PYTHONPATH", "")]
    environment = {"KILLED_AT": f"{number} {count} {pattern}", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    program = Path(sys.executable).with_name("desam")
    return subprocess.run([program, *words], env=os.environ | environment, start_new_session=True).returncode


def copy_of(ran: Ran, folder: Path) -> tuple[Path, list[str]]:
    """The study in another folder, to be changed, and the command that goes on with it."""
    out = folder / "study"
    shutil.copytree(ran.out, out, symlinks=True)
    return out, [str(out) if word == str(ran.out) else word for word in ran.words]


def test_what_is_done_is_not_done_again(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    """Every job left what it is for, and a second call has none to do."""
    found = sorted(str(path.relative_to(ran.out)) for name in ("records", "scores", "errors", "pictures")
                   for path in (ran.out / name).rglob("*.*"))
    cells = [f"SiteA/{trainer}/Site{target}" for trainer in TRAINERS for target in "ABC"]
    assert found == sorted([
        "records/prepare/SiteA.json", "records/plan/SiteA/CrossSitePlans.json", "records/encode/SiteA/desam.json",
        *(f"records/train/SiteA/{trainer}/0.json" for trainer in TRAINERS),
        *(f"records/predict/{cell}.json" for cell in cells if not cell.endswith("A")),
        *(f"{name}/{cell}.json" for cell in cells for name in ("scores", "errors")),
        *(f"pictures/{cell}/cases.webp" for cell in cells),
        *(f"pictures/SiteA/DeSAMTrainer/Site{target}/points.webp" for target in "BC")])
    assert len(list((ran.out / "benchmarks").rglob("*.tsv"))) == 1 + 1 + 1 + 2 + 4 + 6 + 6 + 1
    before = (ran.out / "report.html").stat()
    assert main(ran.words) == 0
    assert "[1 of" not in capsys.readouterr().out
    assert (ran.out / "report.html").stat() == before


def test_a_training_that_was_killed_is_resumed(ran: Ran) -> None:
    """nnU-Net's checkpoint survives: the second epoch is trained by the call after the one that trained the first."""
    fold = ran.out / "nnUNet_results" / "Dataset001_SiteA" / "nnUNetTrainer__CrossSitePlans__2d" / "fold_0"
    logs = [re.findall(r"Epoch (\d+)\s*\n", path.read_text()) for path in sorted(fold.glob("training_log_*.txt"))]
    assert [log for log in logs if log] == [["0"], ["1"]]


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
        assert set(re.findall(r"Epoch (\d+)\s*\n", logs)) == {"0", "1"}
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
                  "protocol “volume”", "protocol “published”", "p, corrected", "peak memory in training, MB",
                  "nnunetv2 2.", "Best, median and worst", "Where DeSAM looks",
                  "In plain words", "Where it fails", "Volumes in ml",
                  "upper third (base)", "At home and elsewhere", "SiteA alone", "all sources",
                  "What the encoders have seen"):
        assert words in page, words
    assert page.count("data:image/webp;base64,") == 6 + 2
    assert page.count("<svg") == 6 + 1
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


def test_pictures_show_reference_and_prediction(ran: Ran, tmp_path: Path) -> None:
    """One colour for the class: a line around a prediction that is the reference, moved, and a see-through area."""
    study = read_study(ran.out / FILE, ran.out)
    predictions = {}
    for case in study.sites["SiteB"]:
        reference = sitk.ReadImage(case.label)
        moved = sitk.GetImageFromArray(np.roll(sitk.GetArrayFromImage(reference), 6, axis=2))
        moved.CopyInformation(reference)
        predictions[case.name] = tmp_path / f"{case.name}.nii.gz"
        sitk.WriteImage(moved, predictions[case.name])
    chosen = chosen_cases(read_rows(study.scores("SiteA", "DeSAMTrainer", "SiteB")))
    cases = {case.name: case for case in study.sites["SiteB"]}
    draw_cases(chosen, cases, predictions, *classes_of(study.dataset_json), tmp_path / "picture.webp")
    seen = pictures.imread(tmp_path / "picture.webp")[..., :3] / 255
    line = np.abs(seen - to_rgb(colour_of(0))).max(-1) < 0.02
    area = seen[..., 0] - seen[..., 2] > 0.15  # orange; all else is grey
    assert 500 < line.sum() < area.sum() / 3


def test_names_of_others_are_text(ran: Ran, tmp_path: Path) -> None:
    out, _ = copy_of(ran, tmp_path)
    for path in (*(out / "scores").rglob("*.json"), *(out / "errors").rglob("*.json")):
        path.write_text(path.read_text().replace('"organ"', '"<script>alert(1)</script>"')
                        .replace('"SiteB_000"', '"<b>B & \'</b>"'))
    study = read_study(out / FILE, out)
    study.dataset_json["labels"] = {"background": 0, "<script>alert(1)</script>": 1}
    write_report(study)
    page = (out / "report.html").read_text()
    assert "<script" not in page
    assert "<b>B" not in page
    assert "&lt;b&gt;B &amp; &#39;&lt;/b&gt;" in page
    assert page.count("alert(1)") == 1  # in the data's labels


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
    out, words = copy_of(ran, tmp_path)
    (out / "predictions" / "SiteA" / "DeSAMTrainer" / "SiteB" / "SiteB_000.nii.gz").unlink()
    assert main([*words, "--snakemake", "--forcerun", "scores/SiteA/DeSAMTrainer/SiteB.json"]) == 0
    scores = pd.read_csv(out / "scores.csv")
    (lost,) = scores[(scores["outcome"] == "missing") & (scores["protocol"] == "volume")].to_dict("records")
    assert (lost["case"], lost["trainer"], lost["dice"]) == ("SiteB_000", "DeSAMTrainer", 0.0)
    summary = pd.read_csv(out / "summary.csv")
    cell = summary.query("protocol == 'volume' and source == 'SiteA' and target == 'SiteB' and metric == 'dice'")
    assert cell.set_index("trainer").loc["DeSAMTrainer", "cases"] == 2
    assert cell.set_index("trainer").loc["DeSAMTrainer", "failures"] >= 1


def test_a_failed_job_says_why_and_the_others_go_on(
    ran: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, words = copy_of(ran, tmp_path)
    shutil.rmtree(out / "nnUNet_results" / "Dataset001_SiteA" / "nnUNetTrainer__CrossSitePlans__2d")
    before = (out / "scores" / "SiteA" / "DeSAMTrainer" / "SiteC.json").stat()
    again = [f"records/predict/SiteA/{trainer}/SiteC.json" for trainer in TRAINERS]
    assert main([*words, "--snakemake", "--forcerun", *again]) == 1
    said = capsys.readouterr().err
    log = out / "logs" / "predict" / "SiteA" / "nnUNetTrainer" / "SiteC.log"
    assert "Failed: 'predict SiteA nnUNetTrainer SiteC'. Jobs that do not need them are done." in said
    assert f"The end of {log}:" in said
    assert log.read_text().splitlines()[-1] in said
    assert "checkpoint_final.pth" in said
    assert "Mend it and start again: what is done stays done." in said
    assert (out / "scores" / "SiteA" / "DeSAMTrainer" / "SiteC.json").stat() != before
    assert not (out / "records" / "predict" / "SiteA" / "nnUNetTrainer" / "SiteC.json").exists()


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
    assert is_trained(fold)
    final.write_bytes(final.read_bytes()[:-20])
    assert not is_trained(fold)
    assert final.exists()  # who asks changes nothing
    put_damaged_aside(fold)
    assert not is_trained(fold)
    assert not final.exists()
    assert (fold / "checkpoint_final.pth.damaged").exists()


def test_a_job_done_again_takes_along_what_rests_on_it(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    def again(record: str) -> set[str]:
        assert main([*ran.words, "--dry-run", "--snakemake", "--forcerun", f"records/{record}.json"]) == 0
        return {line.removeprefix("[to do] ").partition("    ")[0] for line in capsys.readouterr().out.splitlines()
                if line.startswith("[to do] ")}

    cell = "SiteA nnUNetTrainer SiteB"
    assert again("predict/SiteA/nnUNetTrainer/SiteB") == {f"predict {cell}", f"score {cell}", f"picture {cell}",
                                                          "report"}
    assert {job for job in again("encode/SiteA/desam") if "nnUNetTrainer" in job} == set()
    assert len(again("prepare/SiteA")) == 1 + 1 + 1 + 2 + 4 + 6 + 6 + 1


def test_two_calls_do_not_work_at_the_same_study(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    with FileLock(ran.out / LOCK):
        assert main(ran.words) == 1
    assert f"Another call works at the study in {ran.out}: wait for it" in capsys.readouterr().err


def test_the_time_that_is_left_is_unknown_until_each_rule_has_run(tmp_path: Path) -> None:
    progress = Progress(tmp_path)
    progress.left.update(train=2, predict=1, score=0, report=1)
    for name, seconds in (("train/A/0", 600), ("train/A/1", 1200)):
        path = tmp_path / "benchmarks" / f"{name}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"s\tmax_rss\n{seconds}\t1\n")
    assert progress.time_left() == "unknown time"
    (tmp_path / "benchmarks" / "predict").mkdir()
    (tmp_path / "benchmarks" / "predict" / "A.tsv").write_text("s\tmax_rss\n60\t1\n")
    assert progress.time_left() == "about 31 min of work"
    (tmp_path / "records" / "train" / "A").mkdir(parents=True)
    (tmp_path / "records" / "train" / "A" / "0.json").write_text('{"skipped": true}')
    assert progress.time_left() == "about 41 min of work"  # it found the training done, and took no time
    (tmp_path / "records" / "train" / "A" / "1.json").write_text('{"skipped": true}')
    assert progress.time_left() == "unknown time"


def test_a_gpu_has_one_job_unless_a_cluster_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SNAKEMAKE_PROFILE", raising=False)
    assert is_local([])
    assert is_local(["--executor", "local", "--jobs", "3"])
    assert is_local(["--executor=local"])
    assert is_local(["--profile", "none"])
    for words in (["--executor", "slurm"], ["--executor=slurm"], ["-e", "slurm"], ["--profile", "x"], ["--profile=x"],
                  ["--workflow-profile", "x"]):
        assert not is_local(words)
    monkeypatch.setenv("SNAKEMAKE_PROFILE", "lab")
    assert not is_local([])
    assert is_local(["--profile", "none"])


def test_a_cluster_is_told_how_many_jobs_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SNAKEMAKE_PROFILE", raising=False)
    ours = ["--workflow-profile", "none"]
    assert placed(["--executor", "slurm"], "cuda", None) == (THREADS, [*ours, "--jobs", str(JOBS)])
    assert placed(["--executor", "slurm", "--jobs", "3"], "cuda", 2) == (2, ours)
    assert placed(["--executor", "slurm", "-j=3"], "cuda", None) == (THREADS, ours)
    assert placed(["--profile", "lab"], "cuda", None) == (THREADS, ours)  # which says it
    assert placed(["--workflow-profile", "lab"], "cuda", None) == (THREADS, [])
    assert placed([], "cpu", 3) == (3, [*ours, "--cores", "3", "--resources", "gpu=1"])


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
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        assert main([*words, "--dry-run"]) == 0
        assert signal.getsignal(signal.SIGTERM) == terminate
        assert "[to do] train SiteA DeSAMTrainer 0    nnUNetv2_train 501 2d 0" in capsys.readouterr().out
        assert not (tmp_path / "study").exists()
        (raw / "dataset.json").write_text(json.dumps(description | {"labels": {"background": 0, "other": 1}}))
        assert main([*words, "--dry-run"]) == 1
        assert "The data sets of SiteA and SiteB differ in labels" in capsys.readouterr().err
    finally:
        shutil.rmtree(raw)
    study = opened_study(trained, tmp_path)
    cases = [case.name for case in study.sites["SiteA"]]
    assert is_preprocessed(trained.preprocessed, PLANS, ".nii.gz", cases)
    assert not is_preprocessed(trained.preprocessed, PLANS, ".nii.gz", [*cases, "another"])
    assert not is_to_be_cached(study, "SiteA", "desam")
    assert is_trained(trained.model("DeSAMTrainer") / "fold_0")


def test_what_studies_share_is_locked_beside_it(
    trained: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders that the environment names from where the command is typed, too."""
    monkeypatch.chdir(trained.root)
    monkeypatch.setenv("nnUNet_preprocessed", "nnUNet_preprocessed")
    study = opened_study(trained, tmp_path)
    locks = trained.root / "nnUNet_preprocessed" / "desam_locks" / "Dataset501_Phantom"
    training = ("train", "SiteA", "DeSAMTrainer", "0")
    assert study.lock(*training) == locks / "train" / f"DeSAMTrainer__{PLANS}__2d" / "0.lock"
    assert study.lock("encode", "SiteA", "desam") == locks / "encode" / f"desam__{PLANS}.lock"
    pdmm = replace(study, trainers=study.trainers | {"PDMMTrainer": Trainer("pdmm", PLANS, True)})
    assert pdmm.lock("encode", "SiteA", "pdmm") != pdmm.lock("encode", "SiteA", "desam")  # on the same plans
    assert study.lock("prepare", "SiteA") == locks / "prepare" / "all.lock"
    assert study.lock("score", "SiteA", "DeSAMTrainer", "SiteB") == (
        tmp_path / "locks" / "score" / "SiteA" / "DeSAMTrainer" / "SiteB.lock")
    assert replace(study, existing=False).lock(*training) == tmp_path / "locks" / "train/SiteA/DeSAMTrainer/0.lock"
    alias = replace(study, sites={"Elsewhere": study.sites["SiteA"]}, datasets={"Elsewhere": "Dataset501_Phantom"})
    assert alias.lock("train", "Elsewhere", "DeSAMTrainer", "0") == study.lock(*training)  # the same folder
    other = replace(study, datasets={"SiteA": "Dataset502_Other"})
    assert other.lock(*training) != study.lock(*training)


def opened_study(trained: Workspace, out: Path) -> Study:
    """The preprocessed data set of all tests as a study's only site."""
    raw = trained.root / "nnUNet_raw" / "Dataset501_Phantom"
    cases = [Case(path.name.removesuffix(".nii.gz"), (), path) for path in sorted((raw / "labelsTr").iterdir())]
    return Study(out, {"SiteA": cases}, {"SiteA": "Dataset501_Phantom"}, {"file_ending": ".nii.gz"}, True,
                 {"DeSAMTrainer": Trainer("desam", PLANS, True)}, ("SiteA",), (), plans=PLANS)


@pytest.mark.slow
def test_data_sets_of_nnunets_own_folders(
    trained: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fold that is there is used as it is: what is left to do is to segment the other site."""
    monkeypatch.chdir(trained.root)
    for name in FOLDERS:  # as some have them; jobs run in another folder
        monkeypatch.setenv(name, name)
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
def test_sigkill_at_every_output_gives_the_same_figures(
    ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a copy with the models alone, so that what is compared does not depend on chance in training: each call has
    done one job when it is killed before the next one's output; the last one between the files of the report."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    out, words = copy_of(ran, tmp_path)
    for folder in ("records", "predictions", "scores", "errors", "pictures", "sites", "benchmarks", "logs",
                   ".snakemake"):
        shutil.rmtree(out / folder)
    for name in ("report.html", "report.json", "scores.csv", "summary.csv"):
        (out / name).unlink()
    words = [*words, "--cores", "1"]
    one_a_job = r"^os.rename .*/((records|scores)/[^.]*\.json|pictures/[^.]*/cases\.webp|report\.json)$"
    jobs = 1 + 1 + 1 + 2 + 4 + 6 + 6 + 1
    for _ in range(jobs - 1):
        assert killed_at(2, one_a_job, words, tmp_path) == -signal.SIGKILL
    assert killed_at(3, r"^os.rename .*/(report|scores|summary)\.\w+$", words, tmp_path) == -signal.SIGKILL
    assert killed_at(2, one_a_job, words, tmp_path) == 0
    for name in ("scores.csv", "summary.csv"):
        assert (out / name).read_bytes() == (ran.out / name).read_bytes()
    assert figures(out) == figures(ran.out)


@pytest.mark.slow
def test_a_kill_inside_a_job_is_made_good(ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From nothing, with features that are stored: in the middle of preprocessing, of the store, before the first
    segmentation and between scores and errors. Every case has its tiles and its scores in the end."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    settings = json.loads((ran.out.parent / "settings.json").read_text())
    settings["sam"] |= {"features": "cached", "epochs": 1}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    out = tmp_path / "study"
    words = ["cross-site", str(ran.data), "-o", str(out), "-tr", "DeSAMTrainer", "--sources", "SiteA", "--targets",
             "SiteB", "--settings", str(tmp_path / "settings.json"), "--labels", "organ=1", "-device", "cpu"]
    for number, pattern in ((3, r"^open .*/nnUNetPlans_2d/[^/]*\.pkl"), (5, r"^os.rename .*/desam_cache/.*\.tile$"),
                            (1, r"^open .*/predictions/.*\.json"), (1, r"^os.rename .*/errors/.*\.json$")):
        assert killed_at(number, pattern, words, tmp_path) == -signal.SIGKILL, pattern
    assert main(words) == 0
    (store,) = open_stores(out / "nnUNet_preprocessed" / "Dataset001_SiteA")
    assert len(store.cases()) == 5
    found = pd.read_csv(out / "scores.csv").query("protocol == 'volume'")
    assert found["case"].nunique() == len(found) == 3  # one held out, two of the other site
    assert "missing" not in set(found["outcome"])
    assert {path.name for path in (out / "predictions").rglob("*.nii.gz")} == {"SiteB_000.nii.gz", "SiteB_001.nii.gz"}


def figures(out: Path) -> dict[str, Any]:
    """All of the report that is not what it took."""
    content = json.loads((out / "report.json").read_text())
    return {key: value for key, value in content.items() if key not in ("costs", "encoding_minutes", "machines")}


def test_a_job_ends_with_the_process_that_started_it(ran: Ran, tmp_path: Path) -> None:
    """And so does its worker: both hold the end of a pipe, which closes with the last of them."""
    read_study(ran.out / FILE, tmp_path).write(tmp_path / FILE)
    reader, writer = os.pipe()
    command = [sys.executable, Path(__file__).with_name("orphan.py"), str(writer)]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    with (subprocess.Popen(command, pass_fds=[writer], cwd=tmp_path, env=environment) as process,
          open(reader, "rb") as stream):
        os.close(writer)
        assert stream.read(2) == b"..", "it ended by itself"
        process.kill()
        assert stream.read() == b""
