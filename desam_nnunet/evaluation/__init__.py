"""Scores of segmentations: metrics of a case, the two protocols, and statistics over cases."""
