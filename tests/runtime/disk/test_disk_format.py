"""Records and segments byte by byte: what is written comes back, anything else does not."""

import os
import shutil

import numpy as np
import pytest
from disk_harness import FORM, RECORD, SHAPE, fill, held, items, key, open_store, payload, same, segments, tokens

from jaxkv.runtime.disk import DiskFormat
from jaxkv.runtime.disk.format import HEADER_BYTES, CorruptError, Entry, Layout, np_dtype
from jaxkv.runtime.disk.segment import scan

DTYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn", "uint8")


def written(layout, record, seed=5):
    return np.frombuffer(b"".join(bytes(part) for part in layout.buffers(record, seed)), np.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_bit_for_bit(dtype, tmp_path):
    form = DiskFormat("m", 4, ((SHAPE, dtype),))
    page = np.random.default_rng(0).integers(0, 256, 4096, np.uint8)
    store = open_store(tmp_path, form=form)
    page = page.view(np_dtype(dtype))[:256].reshape(SHAPE)
    assert store.put(key(1), tokens(1), (page,))
    assert store.flush(2.0)
    assert same(store.read(items([1])).result()[0], (page,))
    assert store.close()


def test_holes_encoded_and_strided_pages():
    layout = Layout(FORM)
    encoded = np.arange(77, dtype=np.uint8)
    strided = np.moveaxis(np.ones((2, 2, 4, 8, 2), np.float32), -1, -2)
    for pages in [(None, None), (encoded, None), (None, encoded[:0]), (payload(1)[0], encoded), (encoded, strided)]:
        record = layout.record(key(3), b"abc", pages)
        raw = written(layout, record)
        assert raw.size == record.length and raw.size % 64 == 0
        assert layout.entry(raw[:layout.head_bytes].tobytes(), 0, 5) == Entry(key(3), 0, record.length)
        got = layout.payload(raw, Entry(key(3), 0, record.length), 5)
        assert got[0] == b"abc" and same(got[1], pages)


def test_what_is_no_page_of_the_format_is_refused():
    layout = Layout(FORM)
    good = payload(1)
    for k, t, pages in [(b"short", tokens(1), good), (key(1), tokens(1) + b"x", good), (key(1), tokens(1), good[:1]),
                        (key(1), tokens(1), (good[1], good[1])), (key(1), tokens(1), (good[0][0], None))]:
        with pytest.raises(ValueError, match="page"):
            layout.record(k, t, pages)
    for shape, dtype in [((2,), "bfloat17"), ((2,), "finfo")]:
        with pytest.raises(ValueError, match="unknown dtype"):
            DiskFormat("m", 4, ((shape, dtype),))
    with pytest.raises(ValueError, match="does not fit a header"):
        DiskFormat("m" * HEADER_BYTES, 4, ())


def test_every_flipped_byte_is_noticed():
    layout = Layout(FORM)
    record = layout.record(key(1), tokens(1), payload(1))
    good = written(layout, record)
    entry = Entry(key(1), 0, record.length)
    stored, pages = layout.payload(good, entry, 5)
    assert stored == tokens(1) and same(pages, payload(1))
    unseen = 0
    for at in range(good.size):
        bad = good.copy()
        bad[at] ^= 1 << at % 8
        try:
            stored, pages = layout.payload(bad, entry, 5)
        except CorruptError:
            continue
        unseen += 1
        assert stored == tokens(1) and same(pages, payload(1)), f"byte {at}: wrong bytes served"
    assert unseen < 64, "only padding may go unnoticed"
    with pytest.raises(CorruptError):
        layout.payload(good, entry, 6)  # the record of another file


def test_cut_at_every_byte(tmp_path):
    """An unsealed segment that ends anywhere holds the records before, whole."""
    store = open_store(tmp_path)
    fill(store, [1, 2])
    (file,) = segments(tmp_path)  # not sealed yet
    copy = tmp_path / "copy" / file.name
    copy.parent.mkdir()
    shutil.copy(file, copy)
    store.close()
    size = copy.stat().st_size
    assert size == HEADER_BYTES + 2 * RECORD
    layout = Layout(FORM)
    for cut in range(size, HEADER_BYTES - 1, -1):
        os.truncate(copy, cut)
        found = scan(copy, layout)
        assert [entry.key for entry in found.entries] == [key(1), key(2)][:(cut - HEADER_BYTES) // RECORD]
        assert found.torn == (cut - HEADER_BYTES) % RECORD and not found.sealed
    os.truncate(copy, HEADER_BYTES - 1)
    assert scan(copy, layout) is None


@pytest.mark.parametrize("cut", [0, 7, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 100, HEADER_BYTES + RECORD - 1,
                                 HEADER_BYTES + RECORD, HEADER_BYTES + 2 * RECORD - 64])
def test_torn_orphans_are_cut_and_go_on_being_served(cut, tmp_path, caplog):
    (tmp_path / "a").mkdir()
    store = open_store(tmp_path / "b")
    fill(store, [1, 2])
    (file,) = segments(tmp_path / "b")
    (tmp_path / "a" / file.name).write_bytes(file.read_bytes()[:cut])
    store.close()
    whole = max(0, (cut - HEADER_BYTES) // RECORD)
    for torn in (cut - whole * RECORD - HEADER_BYTES if cut >= HEADER_BYTES else cut, 0):
        after = open_store(tmp_path / "a")
        assert after.match([key(1), key(2)]) == whole
        assert held(after, [1, 2]) == [1, 2][:whole]
        assert after.stats().torn_bytes == torn
        assert ("unfinished write" in caplog.text) == bool(torn)
        caplog.clear()
        after.close()
    assert len(segments(tmp_path / "a")) == bool(whole), "an orphan without a page is deleted"


def test_a_scan_goes_on_where_the_last_one_ended(tmp_path):
    """Also over the footer, so that what was dropped meanwhile does not come back."""
    store, layout = open_store(tmp_path), Layout(FORM)
    fill(store, [1, 2])
    (file,) = segments(tmp_path)
    first = scan(file, layout)
    fill(store, [3])
    second = scan(file, layout, first.end)
    assert [entry.key for entry in second.entries] == [key(3)] and not second.sealed
    store.close()
    assert scan(file, layout, second.end)._replace(size=0, mtime_ns=0) == ([], second.end, 0, True, 0)
    assert scan(file, layout, first.end).entries == second.entries
    assert [entry.key for entry in scan(file, layout).entries] == [key(1), key(2), key(3)]


def test_a_damaged_footer_is_replaced_by_a_scan(tmp_path):
    store = open_store(tmp_path)
    fill(store, range(4))
    store.close()
    (file,) = segments(tmp_path)
    good = file.read_bytes()
    for at in (len(good) - 1, len(good) - 16, len(good) - 40):
        bad = bytearray(good)
        bad[at] ^= 4
        file.write_bytes(bad)
        after = open_store(tmp_path)
        assert held(after, range(4)) == [0, 1, 2, 3]
        after.close()
        assert file.read_bytes() == good, "it was sealed again"


def test_a_damaged_header_or_record_costs_what_is_damaged(tmp_path, caplog):
    store = open_store(tmp_path)
    fill(store, range(1, 6))
    store.close()
    (file,) = segments(tmp_path)
    good = bytearray(file.read_bytes())
    layout = Layout(FORM)
    raw = np.frombuffer(bytes(good), np.uint8)
    at = good.index(key(3)) - 8  # its head
    assert layout.entry(raw[at:at + layout.head_bytes].tobytes(), at, 0) is None  # needs the file's own seed
    file.write_bytes(good[:at + 300] + bytes([good[at + 300] ^ 1]) + good[at + 301:])
    after = open_store(tmp_path)
    assert after.match([key(i) for i in range(1, 6)]) == 5
    assert len(after.read(items(range(1, 6))).result()) == 2, "leading good pages only"
    assert held(after, range(1, 6)) == [1, 2, 4, 5]
    assert after.stats().corrupt == 1 and after.match([key(3)]) == 0
    assert "damaged page" in caplog.text
    fill(after, [3])
    assert held(after, range(1, 6)) == [1, 2, 3, 4, 5]
    after.close()
    file.write_bytes(b"x" + good[1:])
    broken = open_store(tmp_path)
    assert "header is damaged" in caplog.text
    assert broken.stats().damaged == 1 and held(broken, [1, 2, 4, 5]) == []
    broken.close()
