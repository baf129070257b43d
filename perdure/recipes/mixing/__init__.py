"""Data mixing: one task, then another with chosen rows of the first mixed in."""
