"""What is compared: optimizers, transforms, norms and layers by name."""
