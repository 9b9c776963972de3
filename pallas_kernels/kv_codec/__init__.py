"""Smaller pages for the tiers below device memory."""
