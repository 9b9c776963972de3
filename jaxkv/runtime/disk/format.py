"""What the bytes of a segment file mean. Owns no file: bytes in, values out, and back.

    segment  header block (4096 bytes: magic, version, checksum, the format as JSON), records, and once sealed a footer
    record   head (the same size for all records of a format), then the page of each KV group; each padded to 64 bytes
    footer   (key, offset, length) of every record, then a trailer at the very end (magic, count, checksum)

Little endian. Pages are raw bytes in the canonical layout, all heads of the model and each once: any mesh can read them.
Checksums are xxh3_64. Those of header, heads and footer are seeded with the file's name, so that a stale block of another
segment, which a power failure may leave in a file, is never taken for a record of this one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from struct import Struct
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

try:
    from xxhash import xxh3_64
except ImportError:  # an engine without a disk tier runs without it
    xxh3_64 = None  # type: ignore[assignment, misc]

from jaxkv.cache.trie import DIGEST_BYTES, TOKEN_BYTES

VERSION = 1
HEADER_BYTES = 4096
HEADS = -2  # axis of the KV heads: pages are [L, 2, ps, Hkv, C], or [Hkv, B] with a lossy codec
ALIGN = 64  # bytes: records and pages begin at multiples, so that arrays over them are aligned for any dtype

# By KV group an array: canonical page [L, 2, ps, Hkv, C] or encoded page [bytes] uint8; or None. What is to be written may be
# a jax.Array on its way to the host: only the writer's thread looks inside.
Payload = tuple[Any, ...]

_HEADER = Struct("<8sIIQ")  # magic, version, bytes of JSON, checksum of the JSON
_FIXED = Struct(f"<4sI{DIGEST_BYTES}sQ")  # magic, bytes of tokens, key, checksum of the payload
_SUM = Struct("<Q")
_ENTRY = Struct(f"<{DIGEST_BYTES}sQQ")  # key, offset, length
_TRAILER = Struct("<4sIQ")  # magic, number of entries, checksum of the entries
_HEADER_MAGIC, _RECORD_MAGIC, _FOOTER_MAGIC = b"jaxkvseg", b"jkvr", b"jkvf"
_ABSENT, _CANONICAL = -2, -1  # instead of the bytes of an encoded page


class CorruptError(Exception):
    """Bytes that are not what was written; the message says what is wrong with them."""


@dataclass(frozen=True)
class DiskFormat:
    """What every segment's header says. Segments of another format are another engine's: left alone, never read.

    ``fingerprint`` names model, weights, KV layout and adapter; ``page_size`` is in tokens; ``pages`` holds shape and dtype
    of a page on disk by KV group. ``copies``: how often every KV head stands in a page in memory, on a mesh with more devices
    than heads; the disk has it once, so this is no part of what the header says. ValueError if that does not fit a header
    block or a dtype is unknown.
    """

    fingerprint: str
    page_size: int
    pages: tuple[tuple[tuple[int, ...], str], ...]
    copies: int = 1

    def __post_init__(self) -> None:
        for _, dtype in self.pages:
            np_dtype(dtype)
        if len(self.to_json()) > HEADER_BYTES - _HEADER.size:
            raise ValueError(f"disk format of {len(self.to_json())} bytes does not fit a header of {HEADER_BYTES} bytes")

    def to_json(self) -> bytes:
        """One spelling of the format; equal formats have equal bytes."""
        return json.dumps([self.fingerprint, self.page_size, self.pages]).encode()


def np_dtype(name: str) -> np.dtype:
    """NumPy's dtype of a name, those of ml_dtypes (bfloat16, float8_e4m3fn) included. ValueError if there is none."""
    try:
        dtype = np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:
        dtype = np.dtype(object)
    if dtype.hasobject:
        raise ValueError(f"unknown dtype {name!r}")
    return dtype


class Record(NamedTuple):
    """A page to write; the arrays are the caller's and must not change until they are written."""

    key: bytes
    tokens: bytes
    payload: Payload
    length: int  # bytes in the segment


class Entry(NamedTuple):
    """Where a segment holds a page, in bytes."""

    key: bytes
    offset: int
    length: int


class Layout:
    """Encodes and decodes what a segment of ``form`` is made of. Immutable, so any thread may use it.

    ``seed`` everywhere is the ``seed`` of the segment's name.
    """

    def __init__(self, form: DiskFormat) -> None:
        self._json = form.to_json()
        self._pages = [(shape, np_dtype(dtype)) for shape, dtype in form.pages]
        self._copies = form.copies
        self._words = Struct(f"<{len(form.pages)}q")
        self._token_room = form.page_size * TOKEN_BYTES
        self._sum_at = _FIXED.size + self._words.size + self._token_room
        self.digest = blake2b(self._json + VERSION.to_bytes(4, "little"), digest_size=8).hexdigest()
        self.head_bytes = _aligned(self._sum_at + _SUM.size)
        self.page_bytes = self._length([_CANONICAL] * len(form.pages))  # of a record with a canonical page of every group

    # ---- records

    def record(self, key: bytes, tokens: bytes, payload: Payload) -> Record:
        """A page to write. ValueError if it is none of this format."""
        if len(key) != DIGEST_BYTES or len(tokens) > self._token_room or len(payload) != len(self._pages):
            raise ValueError(f"a page has a key of {DIGEST_BYTES} bytes, at most {self._token_room} bytes of tokens and "
                             f"{len(self._pages)} groups; got {len(key)}, {len(tokens)}, {len(payload)}")
        return Record(key, tokens, payload, self._length(self._kinds(payload)))

    def buffers(self, record: Record, seed: int) -> list[Any]:
        """What to write, ``record.length`` bytes in all; the pages themselves are not copied."""
        check = xxh3_64()
        parts: list[Any] = []
        for page in record.payload:
            if page is not None:
                raw = np.ascontiguousarray(self._once(page)).reshape(-1).view(np.uint8)
                check.update(raw.data)
                parts += [raw.data, bytes(_aligned(raw.size) - raw.size)]
        head = _FIXED.pack(_RECORD_MAGIC, len(record.tokens), record.key, check.intdigest())
        head += self._words.pack(*self._kinds(record.payload)) + record.tokens.ljust(self._token_room, b"\0")
        return [(head + _checksum(head, seed)).ljust(self.head_bytes, b"\0"), *parts]

    def entry(self, head: bytes, offset: int, seed: int) -> Entry | None:
        """The record that begins with ``head``, as it says; None if no record does."""
        if len(head) < self.head_bytes or head[:len(_RECORD_MAGIC)] != _RECORD_MAGIC \
                or head[self._sum_at:self._sum_at + _SUM.size] != _checksum(head[:self._sum_at], seed):
            return None
        return Entry(_FIXED.unpack_from(head)[2], offset, self._length(self._words.unpack_from(head, _FIXED.size)))

    def payload(self, raw: np.ndarray, entry: Entry, seed: int) -> tuple[bytes, Payload]:
        """Tokens and pages of a whole record (uint8 [length]); the arrays are views where heads have no copies. CorruptError
        if it is not ``entry``."""
        head = raw[:self.head_bytes].tobytes()
        if self.entry(head, entry.offset, seed) != entry or raw.size != entry.length:
            raise CorruptError("damaged head")
        _, count, _, expected = _FIXED.unpack_from(head)
        check = xxh3_64()
        pages: list[np.ndarray | None] = []
        at = self.head_bytes
        for kind, (shape, dtype) in zip(self._words.unpack_from(head, _FIXED.size), self._pages):
            if kind == _ABSENT:
                pages.append(None)
                continue
            part = raw[at:at + (_page_bytes(shape, dtype) if kind == _CANONICAL else kind)]
            check.update(part.data)
            page = part.view(dtype).reshape(shape) if kind == _CANONICAL else part
            pages.append(np.repeat(page, self._copies, axis=HEADS) if kind == _CANONICAL and self._copies > 1 else page)
            at += _aligned(part.size)
        if check.intdigest() != expected:
            raise CorruptError("damaged page")
        tokens_at = _FIXED.size + self._words.size
        return head[tokens_at:tokens_at + count], tuple(pages)

    def _kinds(self, payload: Payload) -> list[int]:
        kinds = []
        for page, (shape, dtype) in zip(payload, self._pages):
            if page is None:
                kinds.append(_ABSENT)
            elif page.dtype == dtype and page.shape == self._held(shape):
                kinds.append(_CANONICAL)
            elif page.ndim == 1 and page.dtype == np.uint8:
                kinds.append(page.size)
            else:
                raise ValueError(f"a page must be {dtype} {self._held(shape)} or encoded uint8 [bytes], "
                                 f"got {page.dtype} {page.shape}")
        return kinds

    def _held(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in memory of a page that has ``shape`` on disk."""
        if self._copies == 1:
            return shape
        return (*shape[:HEADS], shape[HEADS] * self._copies, *shape[HEADS + 1:])

    def _once(self, page: Any) -> np.ndarray:
        """A page with every KV head once."""
        page = np.asarray(page)
        return page if page.ndim == 1 or self._copies == 1 else page[..., ::self._copies, :]

    def _length(self, kinds: Iterable[int]) -> int:
        sizes = (_page_bytes(*page) if kind == _CANONICAL else max(0, kind) for kind, page in zip(kinds, self._pages))
        return self.head_bytes + sum(map(_aligned, sizes))

    # ---- header and footer

    def header(self, seed: int) -> bytes:
        """The first block of a segment."""
        head = _HEADER.pack(_HEADER_MAGIC, VERSION, len(self._json), xxh3_64(self._json, seed=seed).intdigest())
        return (head + self._json).ljust(HEADER_BYTES, b"\0")

    def footer(self, entries: list[Entry], seed: int) -> bytes:
        """The index of a sealed segment."""
        body = b"".join(_ENTRY.pack(*entry) for entry in entries)
        return body + _TRAILER.pack(_FOOTER_MAGIC, len(entries), xxh3_64(body, seed=seed).intdigest())


def read_format(header: bytes, name: str) -> DiskFormat | None:
    """What the header block of the segment file ``name`` says; None if it is damaged or of another version."""
    if len(header) < _HEADER.size:
        return None
    magic, version, length, check = _HEADER.unpack_from(header)
    text = header[_HEADER.size:_HEADER.size + length]
    if magic != _HEADER_MAGIC or version != VERSION or xxh3_64(text, seed=seed(name)).intdigest() != check:
        return None
    fingerprint, page_size, pages = json.loads(text)
    return DiskFormat(fingerprint, page_size, tuple((tuple(shape), dtype) for shape, dtype in pages))


def footer_bytes(pages: int) -> int:
    """Size of the footer of a segment that holds ``pages`` pages."""
    return _TRAILER.size + pages * _ENTRY.size


def footer_size(tail: bytes) -> int | None:
    """Size of the footer that a file with these last bytes claims to end with; None: it is not sealed."""
    if len(tail) < _TRAILER.size:
        return None
    magic, count, _ = _TRAILER.unpack(tail[-_TRAILER.size:])
    return footer_bytes(count) if magic == _FOOTER_MAGIC else None


def entries(footer: bytes, seed: int) -> list[Entry] | None:
    """What a footer lists; None if it is damaged."""
    body, tail = footer[:-_TRAILER.size], footer[-_TRAILER.size:]
    magic, count, check = _TRAILER.unpack(tail)
    if magic != _FOOTER_MAGIC or len(body) != count * _ENTRY.size or xxh3_64(body, seed=seed).intdigest() != check:
        return None
    return [Entry(*fields) for fields in _ENTRY.iter_unpack(body)]


def seed(name: str) -> int:
    """Seed of the checksums in the segment file ``name``."""
    return xxh3_64(name.encode()).intdigest()


def _checksum(data: bytes, seed: int) -> bytes:
    return _SUM.pack(xxh3_64(data, seed=seed).intdigest())


def _page_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _aligned(n: int) -> int:
    return -(-n // ALIGN) * ALIGN
