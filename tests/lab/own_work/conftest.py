"""The projects are users' own, imported from their folder alone."""

collect_ignore = ["projects"]
