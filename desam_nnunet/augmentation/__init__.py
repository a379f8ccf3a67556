"""What images become in training, and how chance is drawn for it."""
