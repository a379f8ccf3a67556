"""What the machine has, times, and progress."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import joblib
import pytest
import torch
from conftest import Workspace, make_trainer

from desam_nnunet.system.cores import usable_cores
from desam_nnunet.system.durations import duration, seconds_of
from desam_nnunet.system.files import read_object
from desam_nnunet.system.gpus import one_gpu, visible_gpus
from desam_nnunet.system.machine import limit_threads
from desam_nnunet.system.progress import progress


@pytest.mark.parametrize("module", ["desam_nnunet.training.desam", "desam_nnunet.commands.findings"])
def test_nobody_is_warned_of_what_timm_calls(module: str) -> None:
    words = [sys.executable, "-W", "default", "-c", f"import {module}"]
    assert "torch.jit" not in subprocess.run(words, capture_output=True, text=True, check=True).stderr


@pytest.mark.parametrize(("seconds", "words"), [
    (0, "1 s"), (29, "29 s"), (59.6, "1 min"), (3570, "1 h 0 min"), (90000, "25 h 0 min")])
def test_durations_are_hours_and_minutes(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_benchmarks_that_a_kill_has_left_empty_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "fold").mkdir()
    (tmp_path / "fold" / "0.tsv").write_text("s\th:m:s\n12.5\t0:00:12\n")
    (tmp_path / "1.tsv").write_text("s\th:m:s\n-\t-\n")
    (tmp_path / "2.tsv").write_text("other\n1\n")
    (tmp_path / "3.tsv").touch()
    assert seconds_of(tmp_path) == [12.5]
    assert seconds_of(tmp_path / "none") == []


def test_jobs_of_one_machine_get_a_gpu_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as there are any; afterwards all are there again."""
    seen = []
    with ExitStack() as jobs:
        for _ in range(3):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-1b2c")  # as each job's own process has it
            jobs.enter_context(one_gpu(tmp_path))
            seen.append(visible_gpus())
    assert seen == [["0"], ["GPU-1b2c"], ["0", "GPU-1b2c"]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-1b2c")
    with one_gpu(tmp_path):
        assert visible_gpus() == ["0"]
    assert visible_gpus() == ["0", "GPU-1b2c"]


@pytest.mark.parametrize(("asked", "cores"), [("1", 1), ("1,4", 1), ("", None), ("0", None), ("many", None)])
def test_cores_are_those_that_the_user_leaves(monkeypatch: pytest.MonkeyPatch, asked: str, cores: int | None) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert usable_cores() == (cores or joblib.cpu_count())


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to a core")
def test_cores_are_those_that_a_process_is_bound_to() -> None:
    script = ("import os; os.environ.pop('OMP_NUM_THREADS', None); core = min(os.sched_getaffinity(0)); "
              "os.sched_setaffinity(0, [core]); from desam_nnunet.system import cores; print(cores.usable_cores())")
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "1\n"


def test_a_trainer_takes_no_more_threads_than_it_may(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """nnUNetv2_train has just set as many as the machine has cores."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        torch.set_num_threads(2)
        limit_threads(torch.device("cuda"))
        assert torch.get_num_threads() == 2
        make_trainer("DeSAMTrainer", workspace)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_json_is_an_object_of_a_file_or_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    for content, message in ((b"{", "can't be read as JSON"), (b'{"a": "\xe4"}', "can't be read as JSON"),
                             (b"[" * 10**5, "can't be read as JSON"), (b"[1]", "holds list, but must hold an object"),
                             (b"null", "holds NoneType, but must hold an object")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_object(path)
    path.write_text('{"a": 1}')
    assert read_object(path) == {"a": 1}
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "nothing.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_json_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path, tmp_path / "pipe.json"):
        with pytest.raises(ValueError, match="is no file, but a folder or a device"):
            read_object(path)


def test_progress_in_a_file_is_a_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress(range(1000), "Encoding", "tiles")) == list(range(1000))
    lines = [line for line in stream.getvalue().replace("\r", "").splitlines() if line]
    assert 2 <= len(lines) <= 3
    assert lines[0].startswith("Encoding: 0 of 1000 tiles, 00:00")
    assert lines[-1].startswith("Encoding: 1000 of 1000 tiles")
