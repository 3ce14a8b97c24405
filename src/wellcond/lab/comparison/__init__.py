"""Run the plan's runs, choose learning rates, and summarize what they gave."""
