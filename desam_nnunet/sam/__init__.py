"""Segment Anything inside this package: frozen encoder, weights, prompts and the tile mapping."""
