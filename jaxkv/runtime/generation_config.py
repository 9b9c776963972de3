"""What a model's directory says about generating with it: the ids that end a sequence and the sampling defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxkv.config import ConfigError
from jaxkv.params import SamplingParams
from jaxkv.runtime.tokenizer import Tokenizer

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
    """Ids that end a sequence: those of generation_config.json (else config.json), then the tokenizer's own. ConfigError names
    the file whose ids are none of the vocabulary."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        if not ids:
            value = _read(Path(directory) / name).get("eos_token_id")
            ids += value if isinstance(value, list) else [] if value is None else [value]
            if any(type(i) is not int or not 0 <= i < vocab_size for i in ids):
                raise ConfigError(f"{name}: eos_token_id must be an integer of the vocabulary, in [0, {vocab_size}), or a list "
                                  f"of them, got {value!r}")
    if tokenizer is not None and tokenizer.hf.eos_token_id is not None:
        ids.append(tokenizer.hf.eos_token_id)
    return tuple(dict.fromkeys(ids))


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"cannot read {file}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"cannot read {file}: not a JSON object")
    return data
