"""Timings: what perdure adds to a bare training loop."""
