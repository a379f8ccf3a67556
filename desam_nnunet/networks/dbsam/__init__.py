"""DB-SAM's network."""
