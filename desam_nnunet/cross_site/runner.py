"""Runs a study's steps: each once, whatever killed the run before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from desam_nnunet.cross_site.report import write_report
from desam_nnunet.cross_site.steps import Step, follows, steps_of
from desam_nnunet.cross_site.study import FOLDERS, Study
from desam_nnunet.system.files import replace_file

_TAIL = 15  # lines of a log that are shown when a step fails
_WAIT = 5  # seconds between looks at what another part has done


def run_study(study: Study, device: str, parts: int = 1, part: int = 0) -> Path | None:
    """Does what is not done yet, and writes the report when nothing is left.

    Args:
        parts, part: Pairs of source and trainer are shared among so many processes, on one machine or on several that
            see the same folder; the first does what all need.

    Returns:
        The report, or None while other parts have work left.

    Raises:
        RuntimeError: A step failed; the message has the end of its log.
        ValueError: There is no such part.
    """
    if not 0 <= part < parts:
        raise ValueError(f"-part_id {part} of -num_parts {parts} does not exist: count from 0.")
    study.write()
    steps = steps_of(study, device)
    mine = [step for step in steps if step.part is not None and step.part % parts == part]
    shared = [step for step in steps if step.part is None]
    if part == 0:
        mine = [*shared, *mine]
    else:
        _wait_for(study, shared)
    _run_all(study, steps, mine, device)
    left = [step for step in steps if not is_done(study, step)]
    if left:
        print(f"Done here. {len(left)} step(s) of other parts are left; the last part writes the report.")
        return None
    return write_report(study)


def describe_steps(study: Study, device: str) -> list[str]:
    """Every step, whether it is done, and what it runs."""
    lines = [f"{name}={study.folder(name)}" for name in FOLDERS]
    for step in steps_of(study, device):
        lines.append(f"[{'done' if is_done(study, step) else 'to do'}] {step.title}    {step.typed}".rstrip())
    return [*lines, f"report    {study.out / 'report.html'}"]


def is_done(study: Study, step: Step) -> bool:
    return study.note(step.name).is_file()


def _run_all(study: Study, everything: list[Step], steps: list[Step], device: str) -> None:
    """Does those of `steps` that are not done."""
    names = [step.name for step in everything]
    for number, step in enumerate(steps, 1):
        note = study.note(step.name)
        note.parent.mkdir(exist_ok=True)
        with _lock(note, step):
            if is_done(study, step):
                continue
            print(f"[{number}/{len(steps)}] {step.title}{_time_left(study, steps)}", flush=True)
            for later in everything[names.index(step.name) + 1:]:
                if follows(later, step):
                    study.note(later.name).unlink(missing_ok=True)
            begin = time.monotonic()
            took = _run(study, step, device)
            replace_file(note, [json.dumps({"with_start": time.monotonic() - begin} | took).encode()])


def _lock(note: Path, step: Step) -> AbstractContextManager:
    """One process at a time does a step. The system forgets the lock of a process that was killed."""
    try:
        return FileLock(note.with_suffix(".lock")).acquire(timeout=0)
    except Timeout as error:
        raise RuntimeError(f"Another process is at the step '{step.title}' of this study: wait for it, or share the "
                           "work with -num_parts and -part_id.") from error


def _run(study: Study, step: Step, device: str) -> dict[str, Any]:
    """What it took, as far as it is known."""
    if not step.needed():
        print("    nothing to do", flush=True)
        return {"skipped": True}
    step.work()
    if not step.command:
        return {}
    log, note = (study.out / "logs" / f"{step.name}{ending}" for ending in (".log", ".json"))
    log.parent.mkdir(exist_ok=True)
    print(f"    {log}", flush=True)
    before = _volumes(study, step)
    words = [sys.executable, "-m", "desam_nnunet.cross_site.measured", str(os.getpid()), str(note), device,
             *step.command]
    folders = {name: str(study.folder(name)) for name in FOLDERS}
    with open(log, "ab") as stream:
        stream.write(f"$ {step.typed}\n".encode())
        stream.flush()
        process = subprocess.Popen(words, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                   env=os.environ | folders, start_new_session=True)
        try:
            code = process.wait()
        except BaseException:
            _stop(process)
            raise
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL:])
        raise RuntimeError(f"The step '{step.title}' failed. The end of {log}:\n{tail}\nMend it and start again: what "
                           "is done stays done.")
    return json.loads(note.read_text()) | {"volumes": _volumes(study, step) - before}


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a command with its workers."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _volumes(study: Study, step: Step) -> int:
    """How many volumes a prediction has segmented."""
    return sum(path.is_file() for path in study.predictions(*step.names).values()) if step.kind == "predict" else 0


def _time_left(study: Study, steps: list[Step]) -> str:
    """How long the rest takes at least, from steps of the same kinds that are done."""
    known = defaultdict(list)
    for step in steps:
        if is_done(study, step) and not (note := study.read_note(step.name)).get("skipped"):
            known[step.kind].append(note["with_start"])
    todo = [step.kind for step in steps if not is_done(study, step)]
    minutes = sum(sum(known[kind]) / len(known[kind]) for kind in todo if known[kind]) / 60
    return f" ({'about' if all(known[kind] for kind in todo) else 'at least'} {max(1, round(minutes))} min left)"


def _wait_for(study: Study, steps: list[Step]) -> None:
    if not all(is_done(study, step) for step in steps):
        print("Waiting for part 0, which prepares the data of all parts. Is it running?", flush=True)
    while not all(is_done(study, step) for step in steps):
        time.sleep(_WAIT)
