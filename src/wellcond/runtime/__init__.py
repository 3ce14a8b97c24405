"""What is around a computation: ranks, arguments, warnings."""
