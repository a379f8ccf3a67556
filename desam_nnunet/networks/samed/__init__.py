"""SAMed's network."""
