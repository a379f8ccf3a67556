"""What differs from nnU-Net's own trainer, and nothing else."""
