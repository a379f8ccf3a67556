"""Starts a job that lasts, in the study's folder where it is run, and waits for it. Run by test_cross_site.py, which
kills it.

Its argument is the end of a pipe: job and worker write a byte each to it, and hold it as long as they live.
"""

import os
import signal
import subprocess
import sys


def last() -> None:
    """Says that it runs, and so does its worker; neither ends by itself."""
    os.fork()
    os.write(int(sys.argv[2]), b".")
    while True:
        signal.pause()


if __name__ == "__main__":
    if sys.argv[1] == "last":
        last()
    words = [str(os.getpid()), "cpu", "prepare", "SiteA", "--", "python", "-m", "orphan", "last", sys.argv[1]]
    subprocess.run([sys.executable, "-m", "desam_nnunet.cross_site.jobs", *words], pass_fds=[int(sys.argv[1])])
