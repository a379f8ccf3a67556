"""The plans' sections, and how they are completed."""
