"""Tasks: data sets with their losses and scores, behind one protocol."""
