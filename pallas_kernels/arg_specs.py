"""Named real shapes of attention, for tests, tuning and benchmarks. Data only."""

from __future__ import annotations

from typing import NamedTuple


class HeadSpec(NamedTuple):
    """What one attention layer of a model looks like to a kernel, and how many there are."""

    q_heads: int
    kv_heads: int
    head_dim: int
    layers: int
    window: int | None = None


class BatchSpec(NamedTuple):
    """Lengths of a ragged batch; the first `shared` tokens of every sequence lie in the same pages."""

    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    shared: int = 0


MODELS = {
    "llama-3-8b": HeadSpec(q_heads=32, kv_heads=8, head_dim=128, layers=32),
    "qwen3-0.6b": HeadSpec(q_heads=16, kv_heads=8, head_dim=128, layers=28),
    "mistral-7b": HeadSpec(q_heads=32, kv_heads=8, head_dim=128, layers=32, window=4096),
    "peers-small": HeadSpec(q_heads=12, kv_heads=4, head_dim=64, layers=12),
    "default": HeadSpec(q_heads=4, kv_heads=2, head_dim=64, layers=4),
}

BATCHES = {
    "decode-1": BatchSpec((1,), (200,)),
    "decode-8": BatchSpec((1,) * 8, (512,) * 8),
    "decode-32-ragged": BatchSpec((1,) * 32, tuple(32 + 19 * i for i in range(32))),
    "decode-24-long": BatchSpec((1,) * 24, (1100,) * 24),
    "decode-24-shared": BatchSpec((1,) * 24, (1100,) * 24, shared=1024),
    "prefill-512": BatchSpec((200, 100, 32, 180), (200, 100, 32, 180)),
    "prefill-2048": BatchSpec((512, 512, 512, 512), (512, 512, 512, 512)),
    "prefill-16-shared": BatchSpec((64,) * 16, (1088,) * 16, shared=1024),
    "mixed": BatchSpec((300, 1, 1, 1, 5, 204), (300, 500, 200, 100, 640, 600)),
    **{f"decode-{n}x{k}k": BatchSpec((1,) * n, (1024 * k,) * n) for k in (1, 4, 32) for n in (1, 8, 32, 128, 256)},
    **{f"prefill-{k}k": BatchSpec((1024 * k,), (1024 * k,)) for k in (2, 4, 8, 16, 32)},
    "decode-64-shared-8k": BatchSpec((1,) * 64, (8448,) * 64, shared=8192),
    "mixed-64": BatchSpec((1536, *(1,) * 64), (1536, *(512 + 61 * i for i in range(64)))),
}
