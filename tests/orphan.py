"""Starts a measured command that lasts, and waits for it. Run by test_cross_site.py, which kills it.

Its argument is the end of a pipe: command and worker write a byte each to it, and hold it as long as they live.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path


def last() -> None:
    """Says that it runs, and so does its worker; neither ends by itself."""
    os.fork()
    os.write(int(sys.argv[1]), b".")
    while True:
        signal.pause()


if __name__ == "__main__":
    words = [str(os.getpid()), "/dev/null", "cpu", "orphan:last", sys.argv[1]]
    subprocess.run([sys.executable, "-m", "desam_nnunet.cross_site.measured", *words], cwd=Path(__file__).parent,
                   start_new_session=True, pass_fds=[int(sys.argv[1])])
