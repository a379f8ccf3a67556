"""What turns an image into features: encoders, their weights and where these come from."""

import warnings

with warnings.catch_warnings():  # of PyTorch, about what timm calls on import: nothing that a user could act on
    warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", FutureWarning)
    import timm  # noqa: F401
