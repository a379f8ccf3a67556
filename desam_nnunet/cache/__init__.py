"""Embeddings of the frozen encoder on disk: one store per preprocessed data set, encoder and settings."""
