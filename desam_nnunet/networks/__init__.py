"""The published decoders and adapters behind nnU-Net's network contract."""
