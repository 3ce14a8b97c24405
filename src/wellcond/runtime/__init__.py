"""The surroundings of a computation: ranks, models, arguments, warnings, and what torch is doing now."""
