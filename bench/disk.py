"""The disk tier against plain files: GB/s of writing and reading pages, and the time to reopen.

    python -m bench.disk          512 MiB in pages of Llama-3-8B and of a small model

Plain: the same bytes from the same arrays in calls of one batch, synced as often as the store seals a segment; read back page
by page into new arrays. Both take turns, best of --repeat. "cold" reads come after the system was asked to forget the files,
which a virtual disk's host may not do.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import add_json, write
from jaxkv.runtime.disk import DiskFormat, DiskStore
from jaxkv.runtime.disk.segment import write_all
from jaxkv.runtime.disk.store import BATCH_BYTES, BATCHES_PER_SEGMENT

SHAPES = {"Llama-3-8B, 16 tokens": (32, 2, 16, 8, 128), "small, 16 tokens": (8, 2, 16, 4, 64)}
READ_PAGES = 64  # per read call: a prefix of 1,024 tokens
DISTINCT = 64  # arrays that take turns


class Case:
    """``count`` pages of one shape, bfloat16, in folder ``folder``; each method does all of them once."""

    def __init__(self, folder: Path, shape: tuple[int, ...], size: int) -> None:
        rng = np.random.default_rng(0)
        words = [rng.integers(0, 2**16, shape, np.uint16) for _ in range(DISTINCT)]
        self.form = DiskFormat("bench", shape[2], ((shape, "bfloat16"),))
        self.arrays = [page.view("bfloat16") for page in words]
        self.page_bytes = words[0].nbytes
        self.count = size // self.page_bytes
        self.items = [(blake2b(b"%d" % i, digest_size=16).digest(), i.to_bytes(4, "little") * shape[2])
                      for i in range(self.count)]
        self.folder, self.plain = folder, folder / "plain"
        self.capacity = 2 * size + (64 << 20)

    def plain_write(self) -> None:
        fd = os.open(self.plain, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        raw = [page.reshape(-1).view(np.uint8).data for page in self.arrays]
        step = max(1, BATCH_BYTES // self.page_bytes)
        for number, at in enumerate(range(0, self.count, step), 1):
            batch = [raw[i % DISTINCT] for i in range(at, min(at + step, self.count))]
            write_all(fd, batch, at * self.page_bytes)
            if number % BATCHES_PER_SEGMENT == 0:
                os.fdatasync(fd)
        os.fdatasync(fd)
        os.close(fd)

    def plain_read(self) -> None:
        fd = os.open(self.plain, os.O_RDONLY)
        for first in range(0, self.count, READ_PAGES):
            pages = [np.empty(self.page_bytes, np.uint8) for _ in range(first, min(first + READ_PAGES, self.count))]
            for i, page in enumerate(pages, first):
                assert os.preadv(fd, [page.data], i * self.page_bytes) == self.page_bytes
        os.close(fd)

    def store_write(self) -> None:
        store = self.open()
        for i, (key, tokens) in enumerate(self.items):
            while not store.put(key, tokens, (self.arrays[i % DISTINCT],)):
                time.sleep(0.001)
        assert store.close()

    def store_read(self) -> None:
        store = self.open()
        for first in range(0, self.count, READ_PAGES):
            items = self.items[first:first + READ_PAGES]
            assert len(store.read(items).result()) == len(items)
        store.close()

    def reopen(self) -> None:
        assert self.open().close()

    def open(self) -> DiskStore:
        return DiskStore(self.folder / "store", self.capacity, self.form)

    def clear(self) -> None:
        """Deletes the files, before they are written again."""
        self.plain.unlink(missing_ok=True)
        shutil.rmtree(self.folder / "store", ignore_errors=True)
        os.sync()

    def forget(self) -> None:
        """Asks the system to drop the files from memory."""
        for path in [self.plain, *(self.folder / "store").glob("*")]:
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(folder: Path, name: str, shape: tuple[int, ...], size: int, repeat: int) -> dict[str, Any]:
    """Best seconds of each job, as GB/s; reopen in seconds."""
    case = Case(folder, shape, size)
    best: dict[str, float] = {}
    for _ in range(repeat):
        case.clear()
        for job in ("plain_write", "store_write", "plain_read", "store_read", "plain_read cold", "store_read cold", "reopen"):
            if job.endswith("cold"):
                case.forget()
            best[job] = min(best.get(job, float("inf")), seconds(getattr(case, job.removesuffix(" cold"))))
    total = case.count * case.page_bytes
    return {"shape": name, "page_bytes": case.page_bytes, "pages": case.count, "bytes": total, "reopen_s": best.pop("reopen"),
            "gb_per_s": {job: total / taken / 1e9 for job, taken in best.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--dir", type=Path, help="where to write; default: the system's temporary directory")
    add_json(parser)
    args = parser.parse_args()
    rows = []
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            rows.append(measure(Path(folder), name, shape, args.mib << 20, args.repeat))
    print(f"{'page':<24}{'KiB':>6}{'job':>12}{'plain GB/s':>12}{'store GB/s':>12}{'ratio':>7}")
    for row in rows:
        rate = row["gb_per_s"]
        for job in ("write", "read", "read cold"):
            plain, store = rate[f"plain_{job}"], rate[f"store_{job}"]
            print(f"{row['shape']:<24}{row['page_bytes'] >> 10:>6}{job:>12}{plain:>12.2f}{store:>12.2f}{store / plain:>7.2f}")
        print(f"{row['shape']:<24}{'':>6}{'reopen':>12}{row['pages']:>8} pages in {row['reopen_s'] * 1e3:.1f} ms")
    write(args.json, {"load": os.getloadavg()[0], "rows": rows}, device=False)


if __name__ == "__main__":
    main()
