"""Large JSON in pieces is the same JSON, and what is wrong stays wrong."""

import json
import random
import threading
import time

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkv.serve import pieces
from jaxkv.serve.pieces import Outline, TooMany

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=80) | st.text('\\"[]{},:\né日🙂 a', max_size=80)
VALUES = st.recursive(st.none() | st.booleans() | st.integers(-2**60, 2**60) | TEXT,
                      lambda inner: st.lists(inner, max_size=9) | st.dictionaries(TEXT, inner, max_size=9), max_leaves=40)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 32)
    monkeypatch.setattr(pieces, "ITEMS", 2)


def whole(text):
    return Outline(text, 10**9).load()


def either(text):
    """(what orjson makes of it, what pieces do), None for an error."""
    out = []
    for load in (orjson.loads, whole):
        try:
            out.append(load(text))
        except orjson.JSONDecodeError:
            out.append(None)
    return out


@settings(max_examples=300, deadline=None)
@given(VALUES, st.sampled_from([None, 1]), st.booleans())
def test_as_orjson(value, indent, escaped):
    text = json.dumps({"value": value, "again": [value]}, indent=indent, ensure_ascii=escaped).encode()
    assert whole(text) == orjson.loads(text)


@settings(max_examples=300, deadline=None)
@given(VALUES, st.data())
def test_what_is_broken_is_refused(value, data):
    """One byte is put in, left out or changed."""
    text = bytearray(json.dumps([value, value]).encode())
    place = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.sampled_from([b"", *(bytes([c]) for c in b'[]{},:"\\ 1')]))
    text[place : place + data.draw(st.integers(0, 1))] = other
    expected, found = either(bytes(text))
    assert found == expected


@settings(max_examples=300, deadline=None)
@given(VALUES)
def test_written_as_by_orjson(value):
    for thing in (value, {"a": value, "rows": [{"x": value, "y": [value] * 5}] * 3, "none": {}}):
        parts = pieces.dumps(thing)
        assert b"".join(parts) == orjson.dumps(thing) and all(parts[:-1])


def test_a_list_is_bounded():
    assert Outline(b"[" + b"1," * 100 + b"1]", 101).load() == [1] * 101
    with pytest.raises(TooMany, match="at most 100"):
        Outline(b'{"a": [' + b"1," * 10**6 + b"1]}", 100).load()


def test_size_and_depth_are_known_before_parsing():
    outline = Outline(b'{"a": [[1, "]]{", [2]], {}], "b": "' + b"x\\\\" * 50 + b'"}', 9)
    assert (outline.levels, outline.containers) == (4, 5)
    for broken in (b"[" * 100, b'{"a": "' + b"x" * 100, b"[1" + b"]" * 100, b'["' + b"\\" * 99 + b'"]'):
        assert either(broken) == [None, None]


@pytest.mark.parametrize("text", [b"[1,,2]", b"[1,2,]", b"[,1]", b'{"a":1,}', b'{"a":1,,"b":2}', b'[1]}{"a":[2]', b"[1] 2"])
def test_commas_and_ends(text):
    long = text.replace(b"1", b"1" + b" " * 100).replace(b"2", b"2" + b" " * 100)
    assert either(long) == [None, None]


def test_other_threads_go_on(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 2**16)
    rng = random.Random(0)
    text = json.dumps({"prompt": [rng.randrange(4096) for _ in range(2_000_000)]}).encode()

    def longest_wait(work):
        """Seconds that another thread was kept from running."""
        waits, done = [], threading.Event()

        def watch():
            while not done.is_set():
                start = time.perf_counter()
                time.sleep(0.0005)
                waits.append(time.perf_counter() - start)

        thread = threading.Thread(target=watch)
        thread.start()
        work()
        done.set()
        thread.join()
        return max(waits)

    once, cut = (min(longest_wait(lambda load=load: load(text)) for _ in range(5)) for load in (orjson.loads, whole))
    assert cut < once / 2, (cut, once)
