"""Images: how they are found, read, split, augmented and batched."""
