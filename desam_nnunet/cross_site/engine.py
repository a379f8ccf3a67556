"""Runs a study with Snakemake: one call at a time in a folder, each job once, whatever killed the call before."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snakemake.cli import main as snakemake
from snakemake_interface_logger_plugins.common import LogEvent

from desam_nnunet.cross_site.executor import placed
from desam_nnunet.cross_site.study import FILE, LOCK, Study
from desam_nnunet.nnunet.sites import link_images
from desam_nnunet.system.durations import duration, seconds_of
from desam_nnunet.system.processes import alone

SNAKEFILE = Path(__file__).with_name("Snakefile")
_TAIL = 15  # lines of a log that are shown when a job fails
_SHOWN = 3  # logs


def run_study(study: Study, device: str, cores: int | None = None, more: Sequence[str] = ()) -> Path:
    """Does what is not done yet, and returns the report.

    Args:
        cores: To use at once, on a cluster in each job; None for all that this process may use, there 8.
        more: Snakemake's own arguments, such as ``--executor slurm``.

    Raises:
        RuntimeError: Jobs failed, and all that do not need them are done; the message has the ends of their logs. Or
            another call works at the study.
    """
    taken = f"Another call works at the study in {study.out}: wait for it, or give another folder with -o."
    os.environ |= study.environment if study.existing else {}  # absolute: jobs run in the study's folder
    with alone(study.out / LOCK, 0, taken):
        study.write(study.out / FILE)
        for site, cases in study.sites.items():
            link_images(study.images(site), cases, study.dataset_json["file_ending"])
        progress = Progress(study.out)
        done = _call(progress, study.out, device, cores, ["--quiet", "all", *more])
    if not done:
        raise RuntimeError(progress.failures())
    return study.out / "report.html"


def describe_study(study: Study, device: str, cores: int | None = None, more: Sequence[str] = ()) -> list[str]:
    """What is left to do, a job a line, and the command that it runs. Nothing is changed. Arguments as
    :func:`run_study`."""
    os.environ |= study.environment if study.existing else {}
    with tempfile.TemporaryDirectory() as folder:
        study.write(Path(folder) / FILE)
        for path in study.out.iterdir() if study.out.is_dir() else ():
            if path.is_dir():
                (Path(folder) / path.name).symlink_to(path)
            elif path.name not in (FILE, LOCK):
                shutil.copy2(path, folder)  # with its time
        progress, said = Progress(Path(folder), show=False), io.StringIO()
        with contextlib.redirect_stderr(said):
            done = _call(progress, Path(folder), device, cores, ["--dry-run", *more],
                         f"out={json.dumps(str(study.out))}")  # YAML
        if not done:
            raise RuntimeError(f"Snakemake can't run the study:\n{said.getvalue()}")
    return [*(f"{name}={path}" for name, path in study.environment.items()), *progress.described]


def _call(progress: Progress, folder: Path, device: str, cores: int | None, more: Sequence[str], *config: str) -> bool:
    """Whether all of it is done."""
    threads, here = placed(more, device, cores)
    words = ["--snakefile", str(SNAKEFILE), "--directory", str(folder), *here, "--keep-going", "--nolock",
             "--rerun-incomplete", "--rerun-triggers", "mtime", *more]
    config = ("--config", f"device={device}", f"threads={threads}", *config)
    logger = logging.getLogger("snakemake")
    logger.addHandler(progress)
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        snakemake([*words, *config])
    except SystemExit as end:
        return not end.code
    finally:
        logger.removeHandler(progress)
        signal.signal(signal.SIGTERM, terminate)  # Snakemake leaves its own, which ends no process that is forked later
    return True


class Progress(logging.Handler):
    """What Snakemake says, in a line a job; and the failures.

    Attributes:
        described: Every job and its command.
        left: How many jobs of each rule are not done.
    """

    def __init__(self, folder: Path, show: bool = True) -> None:
        super().__init__()
        self._show = show
        self.described: list[str] = []
        self._folder = folder
        self.left: Counter[str] = Counter()
        self._total = 0
        self._rules: dict[int, str] = {}
        self._failed: dict[str, Path] = {}

    def emit(self, record: logging.LogRecord) -> None:
        event: Any = vars(record)
        match event.get("event"):
            case LogEvent.RUN_INFO:
                if not self._total:  # said again at the end
                    self.left = Counter(event["stats"])
                    self._total = self.left.pop("total")
            case LogEvent.JOB_INFO:
                self._begin(event)
            case LogEvent.JOB_FINISHED:
                self.left[self._rules[event["job_id"]]] -= 1
            case LogEvent.JOB_ERROR:
                self._failed[_title(event)] = self._folder / event["log"][0]
            case _ if record.levelno >= logging.WARNING:
                print(record.getMessage(), flush=True)

    def _begin(self, job: dict[str, Any]) -> None:
        self._rules[job["jobid"]] = job["rule_name"]
        command = job["shellcmd"].partition(" -- ")[2].rpartition(" > ")[0]
        self.described.append(f"[to do] {_title(job)}    {command}".rstrip())
        if self._show:
            print(f"[{len(self._rules)} of {self._total}] {_title(job)} ({self.time_left()} left)\n"
                  f"    {self._folder / job['log'][0]}", flush=True)

    def time_left(self) -> str:
        """From what jobs of the same rules took; unknown where none has run yet, but for those that found all done. The
        report takes seconds."""
        seconds, benchmarks, records = 0.0, self._folder / "benchmarks", self._folder / "records"
        skipped = {benchmarks / path.relative_to(records).with_suffix(".tsv") for path in records.rglob("*.json")
                   if "skipped" in json.loads(path.read_text())}
        for rule, count in self.left.items():
            known = seconds_of(benchmarks / rule, but=skipped)
            if count and not known and rule != "report":
                return "unknown time"
            seconds += count * sum(known) / max(1, len(known))
        return f"about {duration(seconds)} of work"

    def failures(self) -> str:
        """The ends of the logs of failed jobs, and how to go on."""
        if not self._failed:
            return ("The study was interrupted, or Snakemake could not run it, and said why above. Start it again: "
                    "what is done stays done.")
        jobs, logs = [f"'{title}'" for title in self._failed], list(self._failed.values())[:_SHOWN]
        ends = [f"The end of {log}:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL:])
                for log in logs if log.is_file()]
        return "\n".join([f"Failed: {', '.join(jobs)}. Jobs that do not need them are done.", *ends,
                          "Mend it and start again: what is done stays done."])


def _title(job: dict[str, Any]) -> str:
    """Rule and names, as the files in `logs` are called."""
    return job["log"][0].removeprefix("logs/").removesuffix(".log").replace("/", " ")
