"""Small pages whose content follows from a number, and stores small enough to run full."""

import time
from hashlib import blake2b

import numpy as np
import pytest

pytest.importorskip("xxhash", reason="the disk tier needs xxhash")

from jaxkv.runtime.disk import DiskFormat, DiskStore

SHAPE = (2, 2, 4, 2, 8)
FORM = DiskFormat("model", 4, ((SHAPE, "bfloat16"), (SHAPE, "float32")))
BATCH = 8 << 10
RECORD = 128 + 512 + 1024  # bytes of a page of both groups, head first
FAR = 2.0  # seconds that nothing here should take


def key(i):
    return blake2b(b"%d" % i, digest_size=16).digest()


def tokens(i):
    return np.arange(i, i + 4, dtype=np.int32).tobytes()


def payload(i, version=0):
    """Every third page has a hole in the second group."""
    words = np.arange(256, dtype=np.uint16) + i + 1000 * version
    return words.view("bfloat16").reshape(SHAPE), None if i % 3 == 0 else (words.astype(np.float32) / 7).reshape(SHAPE)


def items(numbers):
    return [(key(i), tokens(i)) for i in numbers]


def same(a, b):
    """Bit for bit, as NaN is no reason to differ."""
    return len(a) == len(b) and all(
        x is y is None or (x is not None and y is not None and x.dtype == y.dtype and x.shape == y.shape
                           and x.tobytes() == y.tobytes()) for x, y in zip(a, b))


def open_store(path, capacity=1 << 20, form=FORM, **options):
    return DiskStore(path, capacity, form, **{"batch_bytes": BATCH, "refresh_s": 0.02, **options})


def fill(store, numbers):
    """Puts pages and waits; every page must be taken."""
    for i in numbers:
        deadline = time.monotonic() + FAR
        while not store.put(key(i), tokens(i), payload(i)):
            assert time.monotonic() < deadline, f"page {i} is not taken: {store.stats()}"
            time.sleep(0.001)
    assert store.flush(FAR)


def held(store, numbers):
    """Which of the pages can be read; what is read must be right."""
    found = []
    for i in numbers:
        for page in store.read(items([i])).result(FAR):
            assert same(page, payload(i)), f"page {i} came back wrong"
            found.append(i)
    return found


def segments(path):
    return sorted(path.glob("*.kvseg"))


def until(condition):
    """Waits for something that another thread or process does soon."""
    deadline = time.monotonic() + FAR
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)
