"""A small encoder of SAM's architecture, pretrained on generated images alone: no patient, no licence question."""
