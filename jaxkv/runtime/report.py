"""One line now and then that tells a person how the engine is doing. Owns the counters as they were at the last line."""

from __future__ import annotations

from jaxkv.runtime.metrics import EngineMetrics


class Reporter:
    """Rates are since the last line."""

    def __init__(self, metrics: EngineMetrics, now: float) -> None:
        self._metrics = metrics
        self._last = now, 0, 0, 0, 0

    def line(self, now: float) -> str | None:
        """Speed, load, how full the tiers are and what the cache saved; None if no step ran since the last line."""
        m = self._metrics
        then, steps, computed, generated, queried = self._last
        if m.steps == steps or now <= then:
            return None
        self._last = now, m.steps, m.computed_tokens, m.generation_tokens, m.prefix_query_tokens
        prefill = m.computed_tokens - computed - (m.generation_tokens - generated)
        tiers = ", ".join(f"{name} {used.bytes_used / used.bytes_total:.0%}"
                          for name, used in (("device", m.device), ("host", m.host), ("disk", m.disk)) if used.bytes_total)
        found = sum(m.hit_tokens.values())
        return (f"{max(0, prefill) / (now - then):,.0f} prompt and {(m.generation_tokens - generated) / (now - then):,.0f} "
                f"output tokens/s; {m.running} running, {m.waiting} waiting; KV {tiers}; hits "
                + ", ".join(f"{tier} {tokens:,}" for tier, tokens in m.hit_tokens.items())
                + f" of {found + m.computed_tokens:,} tokens; {m.preemptions} preempted, {m.failed_loads} loads failed")
