"""Two engine processes, one directory: each finds the other's pages, and no death of one hurts the other."""

import subprocess
import sys
from pathlib import Path

import pytest
from disk_harness import FORM, fill, held, key, open_store, segments, until

from bench.soak_disk import kill_once
from jaxkv.runtime.disk import DiskError
from jaxkv.runtime.disk.directory import Directory
from jaxkv.runtime.disk.format import Layout
from jaxkv.runtime.disk.index import Index
from jaxkv.runtime.disk.stats import Counters

PEER = f"""if True:
    import sys
    from pathlib import Path
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    from disk_harness import fill, held, key, open_store, until
    store = open_store(Path(sys.argv[1]), int(sys.argv[2]))
    print("open", flush=True)
    for line in sys.stdin:
        what, first, last = line.split()
        numbers = range(int(first), int(last))
        if what == "fill":
            fill(store, numbers)
            print("filled", flush=True)
        elif what == "wait":
            until(lambda: store.match([key(i) for i in numbers]) == len(numbers))
            print(len(held(store, numbers)), flush=True)
    print(store.close(), flush=True)
"""


class Peer:
    """A process with a store on ``path``."""

    def __init__(self, path, capacity):
        self.process = subprocess.Popen([sys.executable, "-c", PEER, str(path), str(capacity)], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.answer() == "open"

    def answer(self):
        return self.process.stdout.readline().strip()

    def ask(self, what, first=0, last=0):
        print(what, first, last, file=self.process.stdin, flush=True)
        return self.answer()

    def end(self):
        self.process.stdin.close()
        last = self.answer()
        self.process.wait(10)
        return last

    def kill(self):
        self.process.kill()
        self.process.wait(10)


@pytest.fixture
def peer(tmp_path):
    peer = Peer(tmp_path, 1 << 20)
    yield peer
    peer.kill()


def test_each_serves_the_pages_of_the_other(peer, tmp_path):
    store = open_store(tmp_path)
    assert peer.ask("fill", 0, 10) == "filled"
    until(lambda: store.match([key(i) for i in range(10)]) == 10)
    assert held(store, range(10)) == list(range(10)), "of a segment that the other still appends to"
    assert not store.put(key(3), b"", (None, None)), "it is there"
    fill(store, range(10, 30))
    assert peer.ask("wait", 10, 30) == "20"
    assert peer.ask("fill", 30, 50) == "filled"
    until(lambda: store.match([key(49)]))
    assert held(store, range(60)) == list(range(50))
    assert store.stats().damaged == store.stats().torn_bytes == store.stats().corrupt == 0
    assert store.close() and peer.end() == "True"
    after = open_store(tmp_path)
    assert held(after, range(60)) == list(range(50))
    after.close()


def test_the_dead_are_inherited(peer, tmp_path):
    """Pages of a killed process are served by one that runs and by the next; its segment is sealed by who writes next."""
    store = open_store(tmp_path)
    assert peer.ask("fill", 0, 3) == "filled"
    until(lambda: store.match([key(2)]))
    (orphan,) = segments(tmp_path)
    size = orphan.stat().st_size
    fill(store, [9])
    assert orphan.stat().st_size == size, "its owner lives"
    peer.kill()
    with open(orphan, "ab") as file:
        file.write(b"torn" * 100)
    fill(store, [10])
    assert size < orphan.stat().st_size < size + 400, "cut and sealed"
    assert store.stats().torn_bytes == 400
    assert held(store, range(12)) == [0, 1, 2, 9, 10]
    store.close()


def test_one_capacity_for_all(tmp_path):
    peer, store = Peer(tmp_path, 100_000), open_store(tmp_path, 100_000)
    for first in range(0, 200, 10):
        assert peer.ask("fill", first, first + 5) == "filled"
        fill(store, range(first + 5, first + 10))
        assert sum(file.stat().st_size for file in segments(tmp_path)) <= 100_000
    until(lambda: len(held(store, range(150, 200))) > 20)
    assert held(store, range(50)) == []
    assert store.stats().corrupt == 0
    store.close()
    assert peer.end() == "True"


def test_no_room_beside_other_processes(tmp_path):
    """Open segments of others cannot be dropped: then pages are lost, nothing else."""
    peer, store = Peer(tmp_path, 1 << 20), open_store(tmp_path, 20_000)
    assert peer.ask("fill", 0, 12) == "filled"
    for i in range(20, 40):
        store.put(key(i), b"", (None, None))
        store.flush(2.0)
    stats = store.stats()
    assert stats.lost > 0 and stats.writing and not stats.write_errors
    until(lambda: held(store, range(12)) == list(range(12)))
    store.close()
    peer.kill()


def test_use_by_another_process_keeps_a_segment(tmp_path):
    mine, theirs = open_store(tmp_path, 100_000), open_store(tmp_path, 100_000)
    for first in range(0, 120, 10):
        fill(mine, range(first, first + 10))
        until(lambda first=first: theirs.match([key(first + 9)]))
        assert held(theirs, [2]) == [2]
        until(lambda: not theirs._index._used)
    assert mine.match([key(2)]) == 1 and mine.match([key(20)]) == 0
    mine.close()
    theirs.close()


def test_a_lock_that_is_never_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxkv.runtime.disk.directory._LOCK_S", 0.05)
    store = open_store(tmp_path)
    other = Directory(tmp_path, Layout(FORM), Index(), Counters())
    with other.locked():
        with pytest.raises(DiskError, match="another process holds"):
            open_store(tmp_path)
        store.put(key(1), b"", (None, None))
        assert store.flush(2.0) and store.stats().write_errors == 1
    other.close()
    store.close()


def test_killed_while_writing(tmp_path):
    """One per cent of the proof in bench.soak."""
    kills = [kill_once(tmp_path, number) for number in range(2)]
    assert all(kill["wrong"] == kill["lost"] == 0 for kill in kills)
    assert all(kill["pages"] >= kill["acknowledged"] for kill in kills)
