"""The `desam` commands: parsing and words."""
