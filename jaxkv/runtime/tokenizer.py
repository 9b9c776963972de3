"""Text to token ids and back, on top of the ``transformers`` tokenizer of a model directory.

Owns loading, chat templates, the bytes behind a token id and which ids end a sequence. Owns no state of a request
(``detokenizer`` does). Nothing here changes the wrapped tokenizer, so one may be used from several threads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers.decoders import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jaxkv.config import ConfigError
from jaxkv.runtime.token_bound import characters_per_token

LONG = 4096  # tokens whose text is made without the interpreter's lock


class Tokenizer:
    """Wraps a Hugging Face tokenizer, which stays reachable as ``hf``.

    ``byte_level``: whether every token id stands for fixed bytes (GPT-2, Llama 3, Qwen and the built-in model), so that
    text can be decoded token by token without looking back. ``characters_per_token``: characters of a text that become one
    token at most, None where that is not certain.
    """

    def __init__(self, hf: PreTrainedTokenizerBase) -> None:
        self.hf = hf
        self._backend = getattr(hf, "backend_tokenizer", None) or getattr(hf, "_tokenizer", None)
        self.byte_level = self._backend is not None and isinstance(self._backend.decoder, ByteLevel)
        added = self._backend.get_added_tokens_decoder() if self._backend is not None else hf.added_tokens_decoder
        self.special_ids = frozenset(token for token, info in added.items() if info.special)
        self.vocab_size = len(hf)  # ids from here on are padding of the model's embedding and decode to nothing
        self.characters_per_token = characters_per_token(self._backend) if self._backend is not None else None
        self._bytes: dict[int, bytes] = {}  # filled on demand
        self._characters: dict[int, str | None] = {}  # likewise
        self._codes = _byte_codes()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; ``add_special_tokens`` puts what the model expects around a bare prompt, such as a
        BOS token (not after a chat template, which writes its own). Special tokens spelled out in the text count as
        such. ValueError for a lone surrogate, which has no UTF-8."""
        try:
            if self._backend is not None:
                # the batch call releases the interpreter lock, so that a long prompt stalls nobody
                return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
            return self.hf.encode(text, add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:
            if not isinstance(text, str):
                raise ValueError(f"prompt must be a string, got {type(text).__name__}") from None
            raise ValueError(f"prompt is not valid Unicode text: {error}") from None

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``token_ids``; bytes that are not UTF-8 become U+FFFD."""
        if self._backend is not None and len(token_ids) > LONG:  # as above
            return str(self._backend.decode_batch([list(token_ids)], skip_special_tokens)[0])
        return str(self.hf.decode(list(token_ids), skip_special_tokens=skip_special_tokens,
                                  clean_up_tokenization_spaces=False))

    def token_text(self, token_id: int) -> str:
        """One token on its own, special tokens spelled out; an unfinished character shows as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for (of its text alone, where the tokenizer is not byte level)."""
        data = self._bytes.get(token_id)
        if data is None:
            data = self._bytes[token_id] = self._lookup(token_id)
        return data

    def token_characters(self, token_id: int) -> str | None:
        """The token's text if its bytes are whole characters, else None."""
        try:
            return self._characters[token_id]
        except KeyError:
            try:
                text = self.token_bytes(token_id).decode()
            except UnicodeDecodeError:
                text = None
            self._characters[token_id] = text
            return text

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True,
        continue_final_message: bool = False, chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None, **template_kwargs: Any,
    ) -> str:
        """The conversation as prompt text; encode it with ``add_special_tokens=False``. ValueError names the field."""
        if add_generation_prompt and continue_final_message:
            raise ValueError("add_generation_prompt and continue_final_message exclude each other")
        if chat_template is None and not self.hf.chat_template:
            raise ValueError("chat_template is missing: this model's tokenizer brings none; pass one, "
                             "or complete plain text")
        try:
            return str(self.hf.apply_chat_template(
                _plain_messages(messages), tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message, chat_template=chat_template,
                tools=[dict(t) for t in tools] if tools else None, **template_kwargs))
        except TemplateError as error:
            raise ValueError(f"messages cannot be rendered by the chat template: {error}") from None
        except (TypeError, KeyError) as error:
            raise ValueError(f"messages do not suit the chat template: {error}") from None
        except RecursionError:
            raise ValueError("messages are nested too deeply for the chat template") from None

    def to_json(self) -> str:
        """The tokenizer as the JSON of the ``tokenizers`` library, without padding and truncation. ValueError if it is
        not one of that library's."""
        if self._backend is None:
            raise ValueError("it is no tokenizer of the tokenizers library")
        return json.dumps(json.loads(self._backend.to_str()) | {"padding": None, "truncation": None})

    def _lookup(self, token_id: int) -> bytes:
        token = self.hf.convert_ids_to_tokens(token_id) if 0 <= token_id < self.vocab_size else None
        if token is None:
            return b""
        if not self.byte_level:
            return self.decode([token_id], skip_special_tokens=False).encode("utf-8", "replace")
        try:
            return bytes([self._codes[char] for char in token])
        except KeyError:  # an added token with characters of its own
            return str(token).encode()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model directory (no network) or hub id. ConfigError in one line if there is none."""
    local = Path(path).is_dir()
    try:
        return Tokenizer(AutoTokenizer.from_pretrained(str(path), local_files_only=local))
    except Exception as error:  # transformers raises whatever the first missing or broken file led to
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"model {str(path)!r} has no tokenizer that loads ({reason}); "
                          "skip_tokenizer_init works with token ids only") from None


def _plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Checks roles and contents; text parts of a list content are joined by newlines, None becomes empty text."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ValueError("messages must be a non-empty list of {'role', 'content'} objects")
    plain = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where} must be an object with role and content, got {type(message).__name__}")
        if not isinstance(message.get("role"), str):
            raise ValueError(f"{where}.role must be a string, got {message.get('role')!r}")
        plain.append({**message, "content": _plain_content(message.get("content"), f"{where}.content")})
    return plain


def _plain_content(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise ValueError(f"{where} must be a string or a list of text parts, got {type(content).__name__}")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{where}[{index}].type must be 'text' with a string in text, got {kind!r}")
        texts.append(part["text"])
    return "\n".join(texts)


def _byte_codes() -> dict[str, int]:
    """Character of a byte-level vocabulary -> byte: printable Latin-1 stands for itself, the others follow at U+0100
    (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    codes = {chr(byte): byte for byte in printable}
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return codes | {chr(256 + index): byte for index, byte in enumerate(rest)}
