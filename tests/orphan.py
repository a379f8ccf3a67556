"""Starts a measured command that lasts, and waits for it. Run by test_cross_site.py, which kills it."""

import os
import subprocess
import sys
import time
from pathlib import Path


def last() -> None:
    """Says that it runs, for as long as it does."""
    alive = Path(sys.argv[1])
    while True:
        alive.touch()
        time.sleep(0.1)


if __name__ == "__main__":
    words = [str(os.getpid()), "/dev/null", "cpu", "orphan:last", sys.argv[1]]
    subprocess.run([sys.executable, "-m", "desam_nnunet.cross_site.measured", *words], cwd=Path(__file__).parent,
                   start_new_session=True)
