"""How much text one token can stand for at most, so that a text that cannot fit is known without tokenising it.

Owns the proof, from the parts that a tokenizer of the ``tokenizers`` library says it has: a part that is not known here to
keep every character means that there is no bound.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

# Characters of text that become one, at most. No character's canonical decomposition has more than 4, and decomposing first
# never makes a text shorter (https://www.unicode.org/faq/normalization.html).
_SHRINKS = {"NFC": 4, "NFKC": 4, "NFD": 1, "NFKD": 1, "Lowercase": 1, "Prepend": 1, "ByteLevel": 1}
_KEEPS = {"ByteLevel", "Metaspace", "Digits"}
_CUTS = {"Split", "Punctuation"}  # they keep what they find unless told to remove it


def characters_per_token(backend: Tokenizer) -> int | None:
    """Characters of text that a token stands for at most; None where nothing is sure. A token of a byte-level vocabulary
    stands for as many bytes as its name has characters, and for no more characters than that."""
    try:
        normalizers, cutters = _parts(backend.normalizer), _parts(backend.pre_tokenizer)
    except Exception:  # the library's own of no other class: a part that is written in Python does not say what it does
        return None
    if backend.truncation is not None or not isinstance(backend.model, BPE) or not all(map(_keeps, cutters)):
        return None
    if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values()):
        return None  # such a token takes all the blanks beside it
    shrink = 1
    for part in normalizers:
        shrink *= _shrinks(part)
    names = backend.get_vocab()
    byte_level = any(part["type"] == "ByteLevel" for part in (*normalizers, *cutters))
    every_byte = ByteLevel.alphabet() if byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
    if not (byte_level or backend.model.byte_fallback) or not all(byte in names for byte in every_byte):
        return None  # what is unknown may be dropped, or any number of it be one token
    return shrink * max(map(len, names)) or None


def _parts(step: Any) -> list[Mapping[str, Any]]:
    """The parts of a normalizer or pre-tokenizer as its JSON has them."""
    if step is None:
        return []
    parts = [json.loads(step.__getstate__())]
    while any(part["type"] == "Sequence" for part in parts):
        parts = [inner for part in parts for inner in part.get("normalizers") or part.get("pretokenizers") or
                 ([] if part["type"] == "Sequence" else [part])]
    return parts


def _keeps(part: Mapping[str, Any]) -> bool:
    return part["type"] in _KEEPS or part["type"] in _CUTS and part["behavior"] != "Removed"


def _shrinks(part: Mapping[str, Any]) -> int:
    """Characters that become one at most; 0: any number."""
    if part["type"] == "Replace":
        found = part["pattern"].get("String", "")
        return int(0 < len(found) <= len(part["content"]))
    return _SHRINKS.get(part["type"], 0)
