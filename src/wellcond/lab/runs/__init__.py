"""The description of a run, and what is kept of it."""
