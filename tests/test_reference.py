"""The reference page says what the code does."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from desam_nnunet.settings.sections import SamSection
from desam_nnunet.training.reference import reference
from desam_nnunet.training.registry import TRAINERS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "keys.md"


def test_the_page_is_what_the_code_gives() -> None:
    assert PAGE.read_text() == reference(), "python -m desam_nnunet.training.reference > docs/keys.md"


def test_every_key_has_type_default_and_effect() -> None:
    sections = {"sam": SamSection} | {trainer.method.name: trainer.method.section for trainer in TRAINERS.values()}
    assert list(sections) == ["sam", "desam", "pdmm", "samed", "dbsam"]
    rows = [line.split(" | ") for line in reference().splitlines() if line.startswith("| `")]
    assert [row[0].strip("|` ") for row in rows] == [
        f"{name}.{key.name}" for name, kind in sections.items() for key in fields(kind)]
    assert all(len(row) == 4 and all(cell.strip(" |") for cell in row) for row in rows)
