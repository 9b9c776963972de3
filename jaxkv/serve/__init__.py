"""The OpenAI-compatible HTTP server: ``python -m jaxkv.serve``."""
