"""The words of ``desam doctor``."""

from __future__ import annotations

import argparse

from desam_nnunet.commands.words import Commands, add_command, device_named


def add(commands: Commands) -> None:
    """Adds the command."""
    doctor = add_command(commands, "doctor", _run, "say how trainers, weights, device and folders stand, and what to "
                         "do; or whether the device computes what it should")
    doctor.add_argument("--self-test", action="store_true",
                        help="a minute or two of real work on the device, compared with the CPU")
    doctor.add_argument("-device", choices=["cuda", "cpu", "mps"], help="to test; default: the fastest that is here")


def _run(options: argparse.Namespace) -> int:
    if options.self_test:
        return _self_test(options.device)
    if options.device:
        raise ValueError(f"-device {options.device} says which device to test: add --self-test.")
    from desam_nnunet.commands.findings import examine, report

    wrong = report(examine())
    print(f"{wrong} thing(s) marked !! must be mended first." if wrong else "Nothing is wrong.")
    return 1 if wrong else 0


def _self_test(name: str | None) -> int:
    """Prints machine, table and verdict, as a block of Markdown; the exit code says whether all passed."""
    from desam_nnunet.selftest.run import header, run_checks, table_line, verdict
    from desam_nnunet.system.machine import best_device, limit_threads

    device = device_named(name) if name else best_device()
    limit_threads(device)
    print(f"```text\n{header(device)}\n", flush=True)
    rows = []
    for row in run_checks(device):
        print(table_line(row), flush=True)
        rows.append(row)
    print(f"\n{verdict(rows, device)}\n```\nIn an issue, paste everything between the two lines of backticks.")
    return 0 if all(row.passed for row in rows) else 1
