"""Models: loading, adapters, and what they are trained for."""
