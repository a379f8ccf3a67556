"""What the start-up line adds to every Python start, in milliseconds.

The line from startup/desam_nnunet.pth is run in fresh interpreters, as site.py runs it, on a search path
like a real one's. Timed inside the process: the noise of starting Python is larger than what is measured.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from measure import RESULTS

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "nnUNet_extTrainer"

CHILD = f"""
import os, sys, time
line = open(sys.argv[1]).read()
sys.path += sys.argv[2:]
begin = time.perf_counter()
exec(line)
print((time.perf_counter() - begin) * 1000)
assert {VARIABLE!r} in os.environ, "the start-up line found no trainers folder"
"""


def measure(repeats: int) -> list[float]:
    """Milliseconds of each run; one unmeasured run first writes the byte code that an installation has."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    with tempfile.TemporaryDirectory() as bytecode:
        # -S: this environment's own start-up line must not have run before ours is timed.
        command = [sys.executable, "-I", "-S", "-X", f"pycache_prefix={bytecode}", "-c", CHILD,
                   str(ROOT / "startup" / "desam_nnunet.pth"), sysconfig.get_path("purelib"), str(ROOT)]
        runs = [subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
                for _ in range(repeats + 1)]
    return [float(run.stdout) for run in runs[1:]]


def run(repeats: int = 40, limit: float = 5.0) -> bool:
    """Measures and writes; True where the median is within `limit` milliseconds."""
    times = measure(repeats)
    median, worst = statistics.median(times), max(times)
    result = {
        "benchmark": "startup", "unit": "ms", "repeats": repeats, "limit": limit,
        "median": round(median, 3), "max": round(worst, 3), "passed": median <= limit,
        "python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}",
    }
    verdict = "PASS" if result["passed"] else "FAIL"
    table = (
        "# Cost of the start-up line\n\n"
        f"Python {result['python']}, {result['machine']}, {repeats} fresh interpreters.\n\n"
        "| median (ms) | max (ms) | limit on the median (ms) | |\n|---|---|---|---|\n"
        f"| {median:.2f} | {worst:.2f} | {limit:g} | {verdict} |\n"
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "startup.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "startup.md").write_text(table)
    print(table)
    return median <= limit
