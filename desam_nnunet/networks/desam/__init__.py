"""DeSAM's network."""
