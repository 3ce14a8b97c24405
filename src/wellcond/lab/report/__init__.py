"""Show a comparison: the page, its plots, its files, the terminal's table."""
