"""Ragged paged attention on Hopper, in Mosaic GPU: decodes and drafts (`decode`), long chunks (`prefill`), one entry."""
