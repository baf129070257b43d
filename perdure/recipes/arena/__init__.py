"""The reasoning arena: online learning, its problems, and comparisons."""
