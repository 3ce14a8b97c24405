"""What a step of each method costs."""
