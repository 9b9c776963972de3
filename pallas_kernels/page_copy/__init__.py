"""Moving whole pages: gather, scatter, copy."""
