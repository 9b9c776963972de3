"""Structured output: what a request must follow, compiled by llguidance and applied to every token it samples.

grammar.py   a ``Structured`` to an llguidance matcher, within limits
trial.py     the same in a process of its own first: it may take too long, too much, or crash
compiler.py  threads, cache and bounds around both
matchers.py  the matcher of every open sequence: token masks for a step, and what was sampled
"""
