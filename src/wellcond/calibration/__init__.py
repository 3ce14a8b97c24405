"""Statistics of a trained model, from passes over data."""
