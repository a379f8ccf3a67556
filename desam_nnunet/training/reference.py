"""The reference of the plans' sections, from the sections themselves: ``python -m desam_nnunet.training.reference``."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields
from typing import get_type_hints

from desam_nnunet.settings.sections import SamSection
from desam_nnunet.training.registry import TRAINERS

_HEAD = """# Every key of the plans' sections

Written by `python -m desam_nnunet.training.reference > docs/keys.md` from the code that checks them; see
[plans](plans.md) for how to use them. An unknown key, a wrong type or a value that is not allowed ends a run before it
begins.
"""


def reference() -> str:
    """Markdown: one table per section, one row per key with type, default and effect."""
    methods = {trainer.method.name: trainer.method.section for trainer in TRAINERS.values()}
    sections = {"sam": SamSection} | methods
    return "\n".join([_HEAD, *(_section(name, kind) for name, kind in sections.items())])


def _section(name: str, kind: type) -> str:
    documented = inspect.getdoc(kind) or ""
    effects = dict(re.findall(r"^    (\w+): ((?:.|\n        )+)", documented, re.MULTILINE))
    hints = get_type_hints(kind)
    rows = [f"## `{name}`\n", documented.splitlines()[0] + "\n",
            "| key | type | default | effect |", "|---|---|---|---|"]
    for row in fields(kind):  # type: ignore[arg-type]
        effect = re.sub(r"\s+", " ", effects[row.name]).replace("``", "`")
        default = row.metadata["default"] if row.default is MISSING else f"`{row.default}`"
        rows.append(f"| `{name}.{row.name}` | {hints[row.name].__name__} | {default} | {effect} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
