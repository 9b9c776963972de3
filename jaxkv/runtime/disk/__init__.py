"""The disk tier: KV pages in log-structured files that outlive the process and that processes share."""

from jaxkv.runtime.disk.format import DiskFormat, Payload
from jaxkv.runtime.disk.stats import DiskError, DiskStats
from jaxkv.runtime.disk.store import DiskStore

__all__ = ["DiskError", "DiskFormat", "DiskStats", "DiskStore", "Payload"]
