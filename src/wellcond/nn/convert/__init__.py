"""Change the layers of whole models."""
