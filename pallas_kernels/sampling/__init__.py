"""Choosing tokens out of a truncated distribution."""
