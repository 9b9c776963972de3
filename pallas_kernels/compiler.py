"""What the kernels ask of XLA's compiler."""

from __future__ import annotations

import jax


def refuse_other_gpus() -> None:
    """NotImplementedError if this process has a GPU that the Mosaic GPU kernels are not for."""
    if jax.default_backend() == "gpu":  # else they are compiled for a machine elsewhere
        device = jax.local_devices()[0]
        if device.compute_capability != "9.0":
            raise NotImplementedError(f"{device.device_kind} has compute capability {device.compute_capability}: the kernels "
                                      "are for 9.0 (H100, H200)")


def compiler_options(platform: str) -> dict[str, int]:
    """Options for whatever is compiled for a platform ("cpu", "gpu", "tpu"): `jax.jit(f, compiler_options=...)`.

    XLA:CPU uses half the width of AVX-512 registers by default; at full width a softmax's exponentials take a little over
    half the time. Processors without them ignore the option.
    """
    return {"xla_cpu_prefer_vector_width": 512} if platform == "cpu" else {}
