"""What turns an image into features: encoders, their weights and where these come from."""
