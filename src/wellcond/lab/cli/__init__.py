"""The commands of `wellcond`, one module each: ``add_parser`` declares the options, ``run`` does the work."""
