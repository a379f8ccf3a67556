"""What a user is told about the time that encoding takes, against what it takes: on the phantom, by the commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from desam_nnunet.encoders.weights import is_here
from desam_nnunet.nnunet.names import FOLDERS
from measure import Report, Row

ENCODERS = ("vit_tiny", "lite_medsam")
CASES = 2
WITHIN = 2.0
PHANTOM = Path(__file__).resolve().parents[1] / "examples" / "phantom.py"
UNITS = {"h": 3600, "min": 60, "s": 1}
TIME = r"((?:\d+ (?:h|min|s) ?)+)"
PLANNED, BUILT = re.compile(rf"about {TIME}to encode"), re.compile(rf"free\) and {TIME}\.")


def run(device: torch.device, repeats: int) -> Report:
    report = Report("estimates", "What is said about the time that encoding takes", (
        f"{CASES} cases of the phantom, planned by desam plan and encoded by desam cache, once. What the plan and what "
        f"the build said, over what its process took from that sentence on; each within a factor of {WITHIN:g}."),
        device, heads=("took (s)", "said (s)", "said over took"))
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {name: str(Path(folder) / name) for name in FOLDERS}
        call(environment, sys.executable, str(PHANTOM), folder, "--cases", str(CASES), "--unseen-cases", "1")
        call(environment, "nnUNetv2_plan_and_preprocess", "-d", "501", "-c", "2d", "-np", "2", "-npfp", "2")
        for encoder in filter(is_here, ENCODERS):
            planned = call(environment, "desam", "plan", "-d", "501", "--encoder", encoder, "-device", device.type,
                           "-overwrite_plans_name", encoder)
            built, took = timed(environment, "desam", "cache", "-d", "501", "-p", encoder, "-device", device.type)
            for what, said in (("desam plan", seconds(PLANNED, planned)), ("desam cache", built)):
                ratio = said / took
                report.add(encoder, Row(what, took, said, ratio, ratio, ratio, 1 / WITHIN, most=WITHIN))
    return report


def call(environment: dict[str, str], program: str, *arguments: str) -> str:
    words = [program if "/" in program else str(Path(sys.executable).with_name(program)), *arguments]
    return subprocess.run(words, check=True, capture_output=True, text=True, env=environment).stdout


def timed(environment: dict[str, str], program: str, *arguments: str) -> tuple[float, float]:
    """What the command says of the time, and seconds from there to the end."""
    words = [str(Path(sys.executable).with_name(program)), *arguments]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as job:
        assert job.stdout
        line = next(line for line in job.stdout if BUILT.search(line))
        begin = time.perf_counter()
        job.stdout.read()
    assert job.returncode == 0, words
    return seconds(BUILT, line), time.perf_counter() - begin


def seconds(pattern: re.Pattern[str], text: str) -> float:
    found = pattern.search(text)
    assert found, text
    return sum(int(number) * UNITS[unit] for number, unit in re.findall(r"(\d+) (h|min|s)", found[1]))
