"""Array kernels over a paged KV cache. Knows arrays, never requests; imports nothing from jaxkv.

Dimensions: T tokens, S sequences, P pages per sequence, N pool pages, ps page size, Hq/Hkv heads, D head_dim, L layers,
G = Hq / Hkv query heads per KV head. Every op has a folder with ``api.py`` (the public function: validation, dispatch),
``ref.py`` (the definition, slow) and one file per fast implementation. Only ``layout.py`` knows what a pool looks like.
"""

from .compiler import compiler_options
from .dispatch import ARGUMENT_ALIGN, implementations_used, note_implementation
from .kv_codec.api import decode_pages, encode_pages
from .kv_codec.spec import CODECS, CodecSpec, codec_spec, encoded_bytes, encoded_shape
from .kv_write.api import IMPLEMENTATIONS as KV_WRITE_IMPLEMENTATIONS
from .kv_write.api import kv_write
from .layout import (
    LAYOUTS,
    Pool,
    QuantPool,
    canonical_row,
    kv_head_axis,
    pool_format,
    pool_page_bytes,
    pool_shape,
    resolve_layout,
    storage_dtype,
    zero_pool,
)
from .page_copy.api import IMPLEMENTATIONS as PAGE_MOVE_IMPLEMENTATIONS
from .page_copy.api import copy_pages, gather_pages, scatter_pages
from .ragged_paged_attention.api import ragged_paged_attention
from .ragged_paged_attention.checks import check_batch
from .ragged_paged_attention.plan import AttentionPlanner, attention_planner
from .sharded import MeshOps

__all__ = [
    "ARGUMENT_ALIGN",
    "CODECS",
    "KV_WRITE_IMPLEMENTATIONS",
    "AttentionPlanner",
    "CodecSpec",
    "LAYOUTS",
    "MeshOps",
    "PAGE_MOVE_IMPLEMENTATIONS",
    "Pool",
    "QuantPool",
    "attention_planner",
    "canonical_row",
    "check_batch",
    "codec_spec",
    "compiler_options",
    "copy_pages",
    "decode_pages",
    "encode_pages",
    "encoded_bytes",
    "encoded_shape",
    "gather_pages",
    "implementations_used",
    "kv_head_axis",
    "kv_write",
    "note_implementation",
    "pool_format",
    "pool_page_bytes",
    "pool_shape",
    "ragged_paged_attention",
    "resolve_layout",
    "scatter_pages",
    "storage_dtype",
    "zero_pool",
]
