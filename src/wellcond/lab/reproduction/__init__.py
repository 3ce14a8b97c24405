"""Recipes of the sources' tables and figures, and what repeats them."""
