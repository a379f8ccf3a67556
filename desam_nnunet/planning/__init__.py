"""From a data set's fingerprint and this machine to the plans' sections."""
