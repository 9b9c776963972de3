"""The built-in model and how it was made; a package so that the wheel carries it."""
