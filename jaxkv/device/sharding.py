"""Where a weight lives on the mesh: logical axes of the weight table to the mesh axis "tp".

Heads, MLP columns and vocabulary are split; everything else is whole on every device. XLA's partitioner follows the
weights, so the models contain no collective. Owns no arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxkv.device import models
from jaxkv.device.models.table import WeightDecl
from jaxkv.device.spec import ModelSpec

MESH_AXES: Mapping[str, str] = MappingProxyType({"heads": "tp", "mlp": "tp", "vocab": "tp"})


def leaf_sharding(decl: WeightDecl, mesh: Mesh) -> NamedSharding:
    """Of one leaf with ``decl.axes``; axes without a rule are replicated."""
    return NamedSharding(mesh, PartitionSpec(*(MESH_AXES.get(axis) for axis in decl.axes)))


def param_shardings(spec: ModelSpec, mesh: Mesh) -> tuple[NamedSharding, ...]:
    """One per leaf, in table order; ``spec.tp`` must be the size of the mesh's "tp" axis."""
    assert spec.tp == mesh.shape["tp"], f"weights laid out for {spec.tp} devices, mesh has {mesh.shape['tp']}"
    return tuple(leaf_sharding(decl, mesh) for decl in models.weight_table(spec))
