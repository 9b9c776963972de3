"""Attention of a ragged batch over paged KV."""
