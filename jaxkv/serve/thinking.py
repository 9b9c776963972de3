"""Reasoning and grammars together: the answer must follow its grammar, the reasoning before it is free.

Owns the grammar of both: a Lark grammar of llguidance, into which the answer's is put.
"""

from __future__ import annotations

import json
import re
from typing import Any

from jaxkv.runtime.structured.grammar import json_rule
from jaxkv.serve.parsers.reasoning import BEGIN, END
from jaxkv.types import Structured

_OPTIONAL = "start: reasoning? answer\n"
_BEGUN = "start: reasoning answer\n"


def after_reasoning(structured: Structured, inside: bool, tokenizer: Any) -> Structured:
    """``structured`` for what follows a <think> block, which must come if the prompt has begun it (``inside``) and may
    come otherwise. ValueError for a kind that cannot be put behind one."""
    added = tokenizer.hf.get_added_vocab()
    begin = "" if inside else f"/\\s{{0,4}}/ {_tag(BEGIN, added)} "
    if END in added:  # a token of its own, which no regular expression matches
        rules = f"reasoning: {begin}THOUGHT {END}\nTHOUGHT: /(.|\\n)*/\n"
    else:
        rules = f"reasoning: {begin}thought\nthought[lazy]: /(.|\\n)*<\\/think>/\n"
    answer = _answer(structured)
    return Structured("grammar", f"{_BEGUN if inside else _OPTIONAL}{rules}answer: /\\s{{0,4}}/ result\nresult: {answer}\n")


def _tag(tag: str, added: dict[str, int]) -> str:
    return tag if tag in added else json.dumps(tag)


def _answer(structured: Structured) -> str:
    """The body of a Lark rule."""
    match structured.kind:
        case "json_object":
            return json_rule({"type": "object"})
        case "json_schema":
            try:
                schema = json.loads(structured.value)
            except RecursionError:
                raise ValueError("the JSON schema is nested too deeply") from None
            return json_rule(schema)
        case "regex":
            pattern = re.sub(r"\\.|/", lambda found: "\\/" if found[0] == "/" else found[0], structured.value)
            return "/" + pattern.replace("\n", "\\n").replace("\r", "\\r") + "/"
        case "choice":
            return " | ".join(map(json.dumps, json.loads(structured.value)))
    raise ValueError("a grammar cannot stand behind reasoning")
