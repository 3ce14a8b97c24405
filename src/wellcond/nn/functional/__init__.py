"""What the layers compute with."""
