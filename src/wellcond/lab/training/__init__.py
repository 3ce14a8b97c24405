"""Train one run, and measure it."""
