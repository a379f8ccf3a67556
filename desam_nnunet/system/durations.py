"""Times as people say them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """In hours and minutes; less than a minute is said as that."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else "less than a minute"
