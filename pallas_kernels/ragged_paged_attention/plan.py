"""The host's half of an attention call: what an implementation wants worked out before the step; rides in its buffer.

The XLA and TPU kernels derive their work lists inside the jit, once per step. The Hopper kernel takes a balanced list from the
host, which also sees the prefixes that decodes share (FlashInfer's split of plan and run).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .mosaic_gpu.plan import PlanSpec, make_plan, plan_size, plan_spec


@dataclass(frozen=True)
class AttentionPlanner:
    """Plans for batches of one static shape. ``size``: int32 entries of a plan, 0 where none is wanted."""

    spec: PlanSpec | None = None
    page_size: int = 0

    @property
    def size(self) -> int:
        return 0 if self.spec is None else plan_size(self.spec)

    def __call__(
        self, q_lens: np.ndarray, kv_lens: np.ndarray, page_table: np.ndarray, window: int | None = None
    ) -> np.ndarray:
        """int32 [size], from int32 [n], [n] and [n, P] of n <= S sequences."""
        if self.spec is None:
            return np.zeros(0, np.int32)
        return make_plan(self.spec, q_lens, kv_lens, page_table=page_table, page_size=self.page_size, window=window)


def attention_planner(
    impl: str, *, tokens: int, seqs: int, q_heads: int, kv_heads: int, head_dim: int, page_size: int, kv_dtype: str,
    max_q_len: int | None,
) -> AttentionPlanner:
    """The planner of calls with T tokens and S sequences; heads are those of one device."""
    if impl != "mosaic_gpu":
        return AttentionPlanner()
    spec = plan_spec(tokens, seqs, q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size,
                     kv_dtype=kv_dtype, max_q_len=1 if tokens == 1 else max_q_len)
    return AttentionPlanner(spec, page_size)
