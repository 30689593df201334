"""A world small enough to know everything about, and what is measured in it."""
