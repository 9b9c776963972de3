"""What the kernels ask of XLA's compiler."""

from __future__ import annotations


def compiler_options(platform: str) -> dict[str, int]:
    """Options for whatever is compiled for a platform ("cpu", "gpu", "tpu"): `jax.jit(f, compiler_options=...)`.

    XLA:CPU uses half the width of AVX-512 registers by default; at full width a softmax's exponentials take a little over
    half the time. Processors without them ignore the option.
    """
    return {"xla_cpu_prefer_vector_width": 512} if platform == "cpu" else {}
