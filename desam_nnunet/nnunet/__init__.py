"""What is known of nnU-Net's files: data sets, labels, checkpoints and trainers."""
