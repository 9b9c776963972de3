"""Benchmarks: each prints a table and writes JSON with the command that made it. They may import anything."""
