"""Names the optimizers, transforms, norms and layers that are compared."""
