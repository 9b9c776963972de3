"""Owns the text side of the training data: which stdlib files are read, the held-out split, the token stream."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import numpy as np

HELD_OUT_PERCENT = 3
# Table-like or machine-made sources teach a language model nothing; they would eat a tenth of the tokens.
SKIPPED_DIRS = {"site-packages", "__pycache__", "encodings", "idlelib", "lib-dynload", "cjkencodings", "ensurepip"}
SKIPPED_FILES = {"pydoc_data/topics.py", "lib2to3/pgen2/grammar.py", "test/test_ucn.py", "test/test_unicodedata.py"}
MAX_FILE_BYTES = 300_000


def stdlib_root() -> Path:
    """The running interpreter's standard library directory."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_held_out(relative_path: str) -> bool:
    """Whole files are held out, by a hash of their relative path (stable across machines and versions)."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def stdlib_texts(held_out: bool) -> list[tuple[str, str]]:
    """(relative path, text) of every stdlib source of one split, in an order fixed by the path's hash."""
    root = stdlib_root()
    found: list[tuple[str, str, str]] = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root).as_posix()
        if relative in SKIPPED_FILES or SKIPPED_DIRS.intersection(path.relative_to(root).parts):
            continue
        if is_held_out(relative) != held_out or not 200 < path.stat().st_size < MAX_FILE_BYTES:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found.append((hashlib.md5(relative.encode()).hexdigest(), relative, text))
    return [(relative, text) for _, relative, text in sorted(found)]


def token_stream(tokenizer, held_out: bool, cache: Path | None = None) -> np.ndarray:
    """All files of a split as one uint16 stream; every file is followed by the <|endoftext|> token."""
    if cache is not None and cache.exists():
        return np.load(cache)
    end = tokenizer.token_to_id("<|endoftext|>")
    pieces: list[np.ndarray] = []
    for encoding in tokenizer.encode_batch_fast([text for _, text in stdlib_texts(held_out)]):
        pieces.append(np.asarray([*encoding.ids, end], dtype=np.uint16))
    stream = np.concatenate(pieces)
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.save(cache, stream)
    return stream
