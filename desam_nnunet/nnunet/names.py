"""nnU-Net's names for things. Importing this imports nothing heavy."""

CONFIGURATION = "2d"
STOCK_PLANS = "nnUNetPlans"
TRIAL = "Quick"  # what our plans of a trial have at the end of their name
FOLDS = 5  # of nnU-Net's split
SPLITS = "splits_final.json"
CHECKPOINT = "checkpoint_final.pth"  # what predicts
ITERATIONS = ("epochs", "iterations_per_epoch", "val_iterations_per_epoch")  # a trainer's attributes, after num_
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")  # its variables
