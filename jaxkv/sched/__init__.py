"""Who runs next: requests become step plans, step results become tokens. Standard library only."""
