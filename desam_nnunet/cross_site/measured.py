"""Runs one of nnU-Net's commands in this process and notes what it took.

    python -m desam_nnunet.cross_site.measured PARENT NOTE.json DEVICE nnUNetv2_train 501 2d 0 -tr DeSAMTrainer

It ends, with all of its workers, when the process PARENT that started it is gone: otherwise a study that was killed and
started again would train the same model twice at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import psutil

_GROUP = "console_scripts"


def main() -> None:
    parent, note, device_name, command, *arguments = sys.argv[1:]
    _end_with(int(parent))  # before anything that takes time
    if ":" in command:  # module:function
        entry = EntryPoint(command, command, _GROUP)
    else:
        (entry,) = entry_points(group=_GROUP, name=command)
    run = entry.load()
    sys.argv = [command, *arguments]
    begin = time.monotonic()
    code = run()
    if code:
        sys.exit(code)
    seconds = time.monotonic() - begin

    import torch

    from desam_nnunet.system.files import replace_file
    from desam_nnunet.system.machine import describe_machine, peak_memory

    device = torch.device(device_name)
    took = {"seconds": seconds, "peak_mb": peak_memory(device) / 1e6, "machine": describe_machine(device)}
    replace_file(Path(note), [json.dumps(took).encode()])


def _end_with(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent and psutil.pid_exists(parent):  # Windows keeps the number of one that is gone
            time.sleep(0.5)
        if hasattr(os, "killpg"):
            os.killpg(os.getpgid(0), signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
