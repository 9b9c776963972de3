"""Random lives of a directory against a dict: two stores, restarts, kills, damage, a failing disk.

Whatever happens, a page that is read is the page that was written, and the files stay within the capacity. A page is *sure*
from when it was flushed without an error until something happens that may cost pages; where nothing is evicted, it must be
there. A store that was open when a file was damaged may go on writing into that file, so it makes nothing sure until it is
opened again.
"""

import errno
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from disk_harness import BATCH, FAR, held, key, open_store, payload, segments, tokens
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

NUMBERS = range(60)


class DiskMachine(RuleBasedStateMachine):
    capacity = 1 << 22

    @initialize()
    def start(self):
        self.root = Path(tempfile.mkdtemp())
        self.lives = 0
        self.real = os.pwritev
        self.broken = False
        os.pwritev = self.write
        self.sure = set()
        self.hurt = set()  # stores that may have a damaged file open
        self.folder = self.root / "0"
        self.stores = [self.open(), self.open()]

    def open(self):
        return open_store(self.folder, self.capacity, refresh_s=0.005, retry_s=0.0)

    def write(self, fd, buffers, offset):
        if self.broken:
            self.real(fd, [bytes(buffers[0])[:50]], offset)
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.real(fd, buffers, offset)

    @rule(which=st.integers(0, 1), first=st.sampled_from(NUMBERS), count=st.integers(1, 20), wait=st.booleans())
    def put(self, which, first, count, wait):
        store = self.stores[which]
        assert store.flush(FAR)
        lost = store.stats().lost
        taken = {i for i in range(first, min(first + count, len(NUMBERS))) if store.put(key(i), tokens(i), payload(i))}
        if wait:
            assert store.flush(FAR)
            if store.stats().lost == lost and not self.broken and not self.hurt:
                self.sure |= taken

    @rule(which=st.integers(0, 1), numbers=st.lists(st.sampled_from(NUMBERS), max_size=8))
    def read(self, which, numbers):
        held(self.stores[which], numbers)

    @rule(which=st.integers(0, 1))
    def reopen(self, which):
        self.broken = False
        assert self.stores[which].close()
        self.stores[which] = self.open()
        self.hurt.discard(which)
        if self.capacity > 1 << 20:
            assert self.sure <= set(held(self.stores[which], NUMBERS))

    @rule(torn=st.integers(0, 4 * BATCH), wait=st.booleans())
    def kill(self, torn, wait):
        """Both processes die now: what the files hold is what is left, less the end of what was open."""
        for store in self.stores:
            if wait:
                assert store.flush(FAR)
        self.lives += 1
        folder = self.root / str(self.lives)
        folder.mkdir()
        for file in segments(self.folder):
            try:
                shutil.copy(file, folder)
            except FileNotFoundError:
                continue  # evicted meanwhile
        if torn and (files := segments(folder)):
            os.truncate(files[-1], max(0, files[-1].stat().st_size - torn))
            self.sure.clear()
        self.broken = False
        for store in self.stores:
            assert store.close()
        shutil.rmtree(self.folder)
        self.folder = folder
        self.stores = [self.open(), self.open()]
        self.hurt.clear()
        if self.capacity > 1 << 20:
            assert self.sure <= set(held(self.stores[0], NUMBERS))

    @rule(which=st.integers(0, 9), at=st.integers(0, 1 << 20), bit=st.integers(0, 7), gone=st.integers(0, 9))
    def damage(self, which, at, bit, gone):
        """A bit flips anywhere, or a file goes."""
        self.sure.clear()
        self.hurt = {0, 1}
        files = segments(self.folder)
        try:
            file = files[which % len(files)]
            if gone == 0:
                file.unlink()
                return
            with open(file, "r+b") as raw:
                raw.seek(at % file.stat().st_size)
                byte = raw.read(1)[0]
                raw.seek(-1, os.SEEK_CUR)
                raw.write(bytes([byte ^ 1 << bit]))
        except (ZeroDivisionError, FileNotFoundError):
            return  # nothing there, or evicted meanwhile

    @rule(broken=st.booleans())
    def fault(self, broken):
        self.broken = broken

    @invariant()
    def size(self):
        if hasattr(self, "stores") and not self.broken:
            total = 0
            for file in segments(self.folder):
                try:
                    total += file.stat().st_size
                except FileNotFoundError:
                    continue
            assert total <= self.capacity + 2 * BATCH  # a torn write that is not cut yet; footers of open segments

    def teardown(self):
        if hasattr(self, "stores"):
            os.pwritev = self.real
            for store in self.stores:
                assert store.close()
                stats = store.stats()
                assert stats.queued_bytes == 0
            shutil.rmtree(self.root)


@pytest.mark.parametrize("capacity", [40_000, 1 << 22])
def test_machine(capacity):
    machine = type("Machine", (DiskMachine,), {"capacity": capacity})
    run_state_machine_as_test(machine, settings=settings(max_examples=20, stateful_step_count=20, deadline=None))
