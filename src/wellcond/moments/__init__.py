"""Second moments of layers' inputs, as an object: what it holds, what can be asked of it, and its file."""
