"""Segment Anything's frozen encoder behind nnU-Net v2: DeSAM, SAMed and DB-SAM as trainers."""

# Importing this stays free of torch and nnunetv2: Python does it at every start (see _startup.py).
__version__ = "0.1.0"
