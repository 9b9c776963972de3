"""The store's promises: what it finds, what it refuses, its size, and what it does when the disk fails."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from disk_harness import (
    BATCH,
    FAR,
    FORM,
    RECORD,
    SHAPE,
    fill,
    held,
    items,
    key,
    open_store,
    payload,
    same,
    segments,
    tokens,
    until,
)

from jaxkv.runtime.disk import DiskError, DiskFormat

CAPACITY = 200_000  # bytes: some 110 pages in segments of 15


def size(path):
    return sum(file.stat().st_size for file in segments(path))


def test_pages_come_back_now_and_after_a_restart(tmp_path):
    store = open_store(tmp_path / "new" / "folder")
    assert store.match([key(0)]) == 0 and store.read(items([0])).result() == []
    fill(store, range(10))
    for _ in range(2):
        assert store.match([key(i) for i in range(12)]) == 10
        assert store.match([key(11), key(0)]) == 0
        pages = store.read(items(range(12))).result(FAR)
        assert len(pages) == 10 and all(same(page, payload(i)) for i, page in enumerate(pages))
        assert not store.put(key(3), tokens(3), payload(3)), "it is there"
        stats = store.stats()
        assert (stats.pages, stats.hits, stats.misses, stats.corrupt, stats.refused) == (10, 10, 1 + (stats.written > 0), 0, 0)
        assert stats.bytes == size(tmp_path / "new" / "folder")
        assert store.close()
        assert store.read(items([1])).result() == [] and not store.put(key(99), tokens(99), payload(99))
        store = open_store(tmp_path / "new" / "folder")
    store.close()


def test_other_tokens_never_hit(tmp_path):
    store = open_store(tmp_path)
    fill(store, [1, 2])
    assert store.read([(key(1), tokens(2))]).result() == []
    assert store.stats().corrupt == 1 and store.match([key(1)]) == 0
    fill(store, [1])
    assert held(store, [1, 2]) == [1, 2]
    store.close()


@pytest.mark.parametrize("form", [DiskFormat("other model", 4, FORM.pages), DiskFormat("model", 8, FORM.pages),
                                  DiskFormat("model", 4, FORM.pages[:1] * 2),
                                  DiskFormat("model", 4, ((SHAPE, "float16"), (SHAPE, "float32")))])
def test_another_format_is_left_alone(form, tmp_path, caplog):
    caplog.set_level("INFO")
    store = open_store(tmp_path)
    fill(store, range(5))
    store.close()
    mine = {file: file.read_bytes() for file in segments(tmp_path)}
    for _ in range(2):
        other = open_store(tmp_path, CAPACITY, form)
        assert other.match([key(0)]) == 0 and other.read(items([0])).result() == []
        assert other.stats().pages == other.stats().bytes == 0
        assert "1 segments" in caplog.text and "other models or settings" in caplog.text
        other.close()
    assert {file: file.read_bytes() for file in segments(tmp_path)} == mine
    store = open_store(tmp_path)
    assert held(store, range(5)) == list(range(5))
    store.close()


def test_a_renamed_segment_is_damaged_not_believed(tmp_path):
    store = open_store(tmp_path)
    fill(store, range(3))
    store.close()
    (file,) = segments(tmp_path)
    file.rename(file.with_name(file.name[:17] + "0" * 16 + file.suffix))
    store = open_store(tmp_path)
    assert store.match([key(0)]) == 0 and store.stats().damaged == 1
    store.close()


# ---- size

def test_the_capacity_holds_and_the_oldest_unused_pages_go(tmp_path):
    store = open_store(tmp_path, CAPACITY)
    for first in range(0, 400, 4):
        fill(store, range(first, first + 4))
        assert size(tmp_path) <= CAPACITY
    kept = held(store, range(400))
    assert kept == list(range(400 - len(kept), 400)) and len(kept) > 80
    stats = store.stats()
    assert stats.evicted == 400 - len(kept) and stats.rewritten == 0
    store.close()
    assert size(tmp_path) <= CAPACITY


def test_pages_in_use_outlive_their_segment(tmp_path):
    store = open_store(tmp_path, CAPACITY)
    fill(store, range(20))
    for first in range(20, 400, 4):
        fill(store, range(first, first + 4))
        assert held(store, [0, 7]) == [0, 7]
        assert size(tmp_path) <= CAPACITY
    assert store.stats().rewritten > 0 and store.match([key(1)]) == 0
    store.close()


@pytest.mark.parametrize("used", [False, True])
def test_any_capacity_is_kept_to_the_byte(used, tmp_path):
    """And each new page finds room, whatever is worth keeping."""
    for capacity in range(15_000, 40_000, 3_777):
        folder = tmp_path / str(capacity)
        store = open_store(folder, capacity)
        for i in range(40):
            fill(store, [i])
            assert held(store, range(i + 1) if used else [i])[-1] == i
            assert size(folder) <= capacity
        assert store.stats().lost == 0
        store.close()
        assert size(folder) <= capacity


def test_a_smaller_capacity_shrinks_an_old_store(tmp_path):
    store = open_store(tmp_path, 2 * CAPACITY)
    fill(store, range(200))
    store.close()
    store = open_store(tmp_path, CAPACITY // 2)
    fill(store, [500])
    assert size(tmp_path) <= CAPACITY // 2 and held(store, [500, 199, 0]) == [500, 199]
    store.close()


def test_the_least_capacity_works(tmp_path):
    with pytest.raises(DiskError, match="at least") as error:
        open_store(tmp_path, BATCH)
    least = int(str(error.value).split("at least ")[1].split()[0])
    store = open_store(tmp_path, least)
    for i in range(30):
        fill(store, [i])
        assert held(store, [i]) == [i] and size(tmp_path) <= least
    store.close()


def test_a_full_queue_refuses_and_never_blocks(tmp_path, monkeypatch):
    gate, write = threading.Event(), os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda *args: gate.wait() and write(*args))
    store = open_store(tmp_path, queue_bytes=0)  # then two batches
    taken = [i for i in range(100) if store.put(key(i), tokens(i), payload(i))]
    assert len(taken) < 15 and store.stats().refused == 100 - len(taken)
    assert store.stats().queued_bytes <= 2 * BATCH and not store.flush(0.01)
    assert not store.put(key(0), tokens(0), payload(0)), "on its way"
    assert store.stats().refused == 100 - len(taken)
    gate.set()
    assert store.flush(FAR) and held(store, range(100)) == taken
    store.close()


def test_an_encoded_page_longer_than_a_batch_is_refused(tmp_path):
    store = open_store(tmp_path)
    assert not store.put(key(1), tokens(1), (np.zeros(BATCH, np.uint8), None)) and store.stats().refused == 1
    assert store.put(key(1), tokens(1), (np.zeros(BATCH // 2, np.uint8), None))
    store.close()


# ---- bad starts

@pytest.mark.parametrize("path, capacity, message", [
    ("file", 10**6, "is not a directory"), ("file/below", 10**6, "is not a directory"), ("ok", 1000, "at least"),
    ("ok", 2**62, "more than the disk"), ("/proc/nothing", 10**6, "cannot be written")])
def test_bad_starts_are_one_line(path, capacity, message, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match=message) as error:
        open_store(tmp_path / path, capacity)
    assert "\n" not in str(error.value)


def test_a_read_only_disk_is_refused_at_the_start(tmp_path, monkeypatch):
    """Root may write anywhere, so the error of a read-only file system is injected."""
    opened = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, *args, **kwargs: opened(path, flags, *args, **kwargs)
                        if not flags & (os.O_WRONLY | os.O_RDWR) else _fail(errno.EROFS))
    with pytest.raises(DiskError, match="cannot be written: Read-only file system"):
        open_store(tmp_path)


# ---- a disk that fails later

def _fail(number):
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("call", ["pwritev", "fdatasync", "open", "unlink"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_failing_disk_stops_writing_and_goes_on_reading(call, number, tmp_path, monkeypatch, caplog):
    store = open_store(tmp_path, CAPACITY, retry_s=0.2)
    fill(store, range(100))
    known = held(store, range(100))
    real = getattr(os, call)

    def broken(first, *args, **kwargs):
        if call == "pwritev":  # a part gets there
            real(first, [bytes(args[0][0])[:100]], args[1])
        if call == "open" and not args[0] & os.O_CREAT:
            return real(first, *args, **kwargs)
        _fail(number)

    monkeypatch.setattr(os, call, broken)
    for i in range(100, 160):
        store.put(key(i), tokens(i), payload(i))
        store.flush(FAR)
    until(lambda: store.stats().write_errors)
    stats = store.stats()
    assert not stats.writing and stats.refused + stats.lost > 0
    assert len([line for line in caplog.messages if "cannot be written" in line]) == 1
    readable = held(store, range(160))
    assert set(known[-60:]) <= set(readable), "reading goes on"
    assert size(tmp_path) <= CAPACITY + BATCH
    monkeypatch.setattr(os, call, real)

    def writes_again():
        store.put(key(200), tokens(200), payload(200))
        return store.flush(FAR) and store.stats().writing

    until(writes_again)
    assert "writes again" in caplog.text and held(store, [200]) == [200]
    assert call != "pwritev" or store.stats().torn_bytes >= 100, "the segment was given up and cut"
    store.close()
    again = open_store(tmp_path, CAPACITY)
    assert held(again, [200]) == [200]
    again.close()


def test_a_real_limit_on_file_size(tmp_path):
    """RLIMIT_FSIZE is the full disk that needs no privileges: EFBIG in the middle of a batch."""
    code = f"""if True:
        import resource, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from disk_harness import fill, held, items, key, open_store, payload, tokens
        store = open_store(Path({str(tmp_path)!r}))
        fill(store, range(10))
        resource.setrlimit(resource.RLIMIT_FSIZE, ({HEADER_AND_12}, resource.RLIM_INFINITY))
        for i in range(10, 30):
            store.put(key(i), tokens(i), payload(i))
        store.flush(2.0)
        stats = store.stats()
        assert stats.write_errors == 1 and not stats.writing and stats.lost, stats
        print(len(held(store, range(30))))
        assert store.close()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    readable = int(done.stdout)
    assert readable >= 10
    store = open_store(tmp_path)
    assert len(held(store, range(30))) == readable
    store.close()


HEADER_AND_12 = 4096 + 12 * RECORD + RECORD // 2


def test_neighbours_are_read_together(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    fill(store, range(9))
    real, calls = os.preadv, []

    def short(fd, buffers, offset):
        calls.append(offset)
        return real(fd, [buffers[0][:RECORD + 7]], offset)

    for batch, expected in [([0, 1, 2, 4, 5, 8], 3), ([3, 2, 1], 3)]:
        monkeypatch.setattr(os, "preadv", lambda *args: calls.append(0) or real(*args))
        assert all(same(page, payload(i)) for page, i in zip(store.read(items(batch)).result(), batch, strict=True))
        assert len(calls) == expected
        monkeypatch.setattr(os, "preadv", short)
        assert all(same(page, payload(i)) for page, i in zip(store.read(items(batch)).result(), batch, strict=True))
        calls.clear()
    store.close()


def test_a_read_error_costs_one_page(tmp_path, monkeypatch, caplog):
    store = open_store(tmp_path)
    fill(store, range(6))
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: _fail(errno.EIO))
    assert store.read(items(range(6))).result() == [] == store.read(items(range(1, 6))).result()
    monkeypatch.setattr(os, "preadv", real)
    assert store.stats().read_errors == 2 and held(store, range(6)) == [2, 3, 4, 5]
    assert caplog.text.count("cannot be read") == 1

    def bad_sector(fd, buffers, offset):
        """Nothing of the third page."""
        if offset + len(buffers[0]) > store._index.find(key(4)).entry.offset:
            _fail(errno.EIO)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", bad_sector)
    assert len(store.read(items(range(2, 6))).result()) == 2, "a run that cannot be read as a whole is read one by one"
    store.close()


def test_a_segment_that_cannot_be_opened_now_is_read_later(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    fill(store, range(4))
    store.close()
    real = os.open

    def too_many(path, *args, **kwargs):
        return _fail(errno.EMFILE) if str(path).endswith(".kvseg") else real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", too_many)
    store = open_store(tmp_path)
    assert store.match([key(0)]) == 0 and store.stats().damaged == 0 < store.stats().read_errors
    monkeypatch.setattr(os, "open", real)
    until(lambda: store.match([key(0)]))
    assert held(store, range(4)) == [0, 1, 2, 3]
    store.close()


def test_a_segment_that_vanished_is_a_miss(tmp_path):
    store = open_store(tmp_path)
    fill(store, range(3))
    store.close()
    store = open_store(tmp_path, refresh_s=60.0)
    segments(tmp_path)[0].unlink()
    assert store.match([key(0)]) == 1 and store.read(items([0])).result() == []
    assert store.match([key(0)]) == 0 and store.stats().misses == 1
    store.close()


def test_files_deleted_under_a_running_store(tmp_path):
    store = open_store(tmp_path)
    fill(store, range(3))
    segments(tmp_path)[0].unlink()
    until(lambda: not store.match([key(0)]))
    fill(store, range(2))
    store.close()
    store = open_store(tmp_path)
    assert held(store, range(3)) == [0, 1]
    store.close()


def test_many_threads(tmp_path):
    store = open_store(tmp_path, CAPACITY)
    errors = []

    def work(seed):
        rng = np.random.default_rng(seed)
        try:
            for i in map(int, rng.integers(0, 200, 300)):
                if store.match([key(i)]):
                    held(store, [i])
                else:
                    store.put(key(i), tokens(i), payload(i))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and store.flush(FAR)
    stats = store.stats()
    assert stats.written - stats.rewritten + stats.refused > 0 == stats.corrupt == stats.lost
    assert size(tmp_path) <= CAPACITY
    store.close()


def test_close_is_not_held_up_by_reads(tmp_path):
    store = open_store(tmp_path)
    fill(store, range(50))
    reads = [store.read(items(range(50))) for _ in range(10)]
    assert store.close()
    assert all(len(read.result(FAR)) == 50 for read in reads)


def test_what_is_still_to_be_written_is_found(tmp_path):
    store = open_store(tmp_path)
    assert store.put(key(1), tokens(1), payload(1))
    assert store.match([key(1), key(2)]) == 1 and store.stats().pages == 0
    (found,) = store.read(items([1])).result(10)
    assert same(found, payload(1))
    store.close()


@pytest.mark.parametrize("batch", [BATCH, 1 << 16], ids=["sealed segments", "an open segment"])
def test_a_forgotten_page_is_never_read_again_and_may_come_again(tmp_path, batch):
    store = open_store(tmp_path, batch_bytes=batch)
    other = open_store(tmp_path, batch_bytes=batch)
    fill(store, range(20))
    store.forget([key(3), key(4), key(99)])
    assert store.match([key(3)]) == store.match([key(4)]) == 0 and store.match([key(2)]) == 1
    fill(store, [4])
    assert store.match([key(4)]) == 1 and held(store, range(20)) == [i for i in range(20) if i != 3]
    assert store.close() and other.close()
    again = open_store(tmp_path)
    assert held(again, range(20)) == [i for i in range(20) if i != 3]
    fill(again, [3])
    assert held(again, range(20)) == list(range(20)) and again.close()


def test_a_page_is_forgotten_on_its_way(tmp_path):
    store = open_store(tmp_path, batch_bytes=1 << 16)
    for i in range(4):
        assert store.put(key(i), tokens(i), payload(i))
    store.forget([key(1)])
    assert store.match([key(0), key(1)]) == 1 and store.flush(FAR)
    assert held(store, range(4)) == [0, 2, 3] and store.close()
    again = open_store(tmp_path)
    assert held(again, range(4)) == [0, 2, 3] and again.close()
