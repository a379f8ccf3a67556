"""Checkpoints of the published implementations, in and out."""
