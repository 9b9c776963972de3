"""What a model's directory says about generating with it: the ids that end a sequence and the sampling defaults."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from jaxkv.config import ConfigError
from jaxkv.params import MAX_STOP_IDS, SamplingParams
from jaxkv.runtime.tokenizer import Tokenizer

log = logging.getLogger("jaxkv")

_FIELDS = {"temperature": float, "top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float,
           "max_new_tokens": int}


def default_sampling(directory: str | Path) -> dict[str, Any]:
    """``SamplingParams`` fields that generation_config.json sets, those that vLLM takes from it. ConfigError names a field
    that cannot work."""
    values = {name: value for name, value in _read(Path(directory) / "generation_config.json").items()
              if name in _FIELDS and value is not None}
    try:
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, (int, _FIELDS[name])):
                raise ValueError(f"{name} must be a number, got {value!r}")
        if "max_new_tokens" in values:
            values["max_tokens"] = values.pop("max_new_tokens")
        SamplingParams(**values)
    except ValueError as error:
        raise ConfigError(f"generation_config.json: {error}; generation_config none leaves it out") from None
    return values


def eos_token_ids(directory: str | Path, tokenizer: Tokenizer | None, vocab_size: int) -> tuple[int, ...]:
    """Ids that end a sequence: those of generation_config.json (else config.json), then the tokenizer's own. Ids outside of
    the vocabulary, which no model can give, are left out. ConfigError names the file whose value is no id."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        if not ids:
            value = _read(Path(directory) / name).get("eos_token_id")
            ids += value if isinstance(value, list) else [] if value is None else [value]
            if any(type(i) is not int for i in ids) or len(ids) >= MAX_STOP_IDS:
                raise ConfigError(f"{name}: eos_token_id must be an integer or a list of fewer than {MAX_STOP_IDS}, "
                                  f"got {value!r}")
    if tokenizer is not None and tokenizer.hf.eos_token_id is not None:
        ids.append(tokenizer.hf.eos_token_id)
    if outside := [i for i in ids if not 0 <= i < vocab_size]:
        log.warning("eos_token_id %s: outside of the vocabulary of %d, left out", outside, vocab_size)
    return tuple(i for i in dict.fromkeys(ids) if i not in outside)


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"cannot read {file}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"cannot read {file}: not a JSON object")
    return data
