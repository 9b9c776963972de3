"""A process that writes to the disk tier is killed at a random moment; what the next one finds must be right.

``kill_once`` is one such death. The child writes pages whose content follows from their number, and says how many it has
flushed. Those must all be there afterwards (the capacity holds more than one life), each page that is there must be bit for
bit what was written, and unfinished writes must be gone.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from hashlib import blake2b
from pathlib import Path

import numpy as np

from jaxkv.runtime.disk import DiskFormat, DiskStore

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (4, 2, 16, 8, 64)  # 128 KiB in bfloat16
FORM = DiskFormat("soak", SHAPE[2], ((SHAPE, "bfloat16"), (SHAPE, "bfloat16")))
LIFE = 400  # pages a child writes if it lives: 75 MiB
CAPACITY = 400 << 20
BATCH = 32 << 20
LONGEST_S = 0.12  # a life takes about that long


def page(number: int) -> tuple[bytes, bytes, tuple[np.ndarray | None, ...]]:
    """Key, tokens and payload; every other page has a hole."""
    words = (np.arange(np.prod(SHAPE), dtype=np.uint32) * 2654435761 + number).astype(np.uint16).reshape(SHAPE)
    array = words.view("bfloat16")
    return (blake2b(b"%d" % number, digest_size=16).digest(), np.full(SHAPE[2], number, np.int32).tobytes(),
            (array, None if number % 2 else array))


def write_a_life(folder: Path, first: int) -> None:
    """The child: pages from ``first`` on, and a line for every few that are flushed."""
    pages = [page(number) for number in range(first, first + LIFE)]
    store = DiskStore(folder, CAPACITY, FORM, batch_bytes=BATCH)
    print("go", flush=True)
    for done, (key, tokens, payload) in enumerate(pages, 1):
        while not store.put(key, tokens, payload):
            time.sleep(0.0005)
        if done % 100 == 0 and store.flush(10.0):
            print(done, flush=True)
    store.close()


def kill_once(folder: Path, number: int) -> dict[str, int]:
    """Death ``number`` in a directory that has seen the earlier ones.

    Counts: ``killed`` (0: it had finished), ``acknowledged`` pages of this life, ``pages`` of this life found, ``lost``
    (acknowledged but not found), ``checked`` (of any life), ``wrong`` (not what was written), ``torn_bytes`` cut off.
    """
    first = number * LIFE
    child = subprocess.Popen([sys.executable, "-m", "bench.soak_disk", str(folder), str(first)], cwd=ROOT, text=True,
                             stdout=subprocess.PIPE)
    assert child.stdout and child.stdout.readline() == "go\n"
    time.sleep(random.Random(number).uniform(0, LONGEST_S))
    killed = child.poll() is None
    child.kill()
    acknowledged = max((int(line) for line in child.stdout.read().split("\n")[:-1]), default=0)
    child.wait()
    child.stdout.close()
    store = DiskStore(folder, CAPACITY, FORM, batch_bytes=BATCH)
    found = wrong = checked = 0
    for other in range(max(0, first - 2 * LIFE), first + LIFE):
        key, tokens, payload = page(other)
        if not store.match([key]):
            continue
        for got in store.read([(key, tokens)]).result():
            checked += 1
            found += other >= first
            wrong += any((a is None) != (b is None) or (a is not None and b is not None and a.tobytes() != b.tobytes())
                         for a, b in zip(got, payload))
    lost = sum(not store.match([page(first + i)[0]]) for i in range(acknowledged))
    stats = store.stats()
    store.close()
    assert stats.corrupt == stats.damaged == 0, stats
    return {"killed": int(killed), "acknowledged": acknowledged, "pages": found, "lost": lost, "checked": checked,
            "wrong": wrong, "torn_bytes": stats.torn_bytes, "torn": int(stats.torn_bytes > 0)}


if __name__ == "__main__":
    write_a_life(Path(sys.argv[1]), int(sys.argv[2]))
