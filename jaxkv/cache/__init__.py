"""Which KV pages are where, and why: page pools, prefix trie, tiers and eviction. Standard library only.

``controller.CacheController`` is the only part other layers use.
"""
