"""What an answer must follow, together with what may come before or instead: reasoning, which is free, and calls of tools.

Owns the grammar of all: a Lark grammar of llguidance, into which the answer's and the calls' are put.
"""

from __future__ import annotations

import json
import re
from typing import Any

from jaxkv.params import Structured
from jaxkv.runtime.structured.grammar import json_rule
from jaxkv.serve.parsers.reasoning import BEGIN, END


def after_reasoning(structured: Structured, inside: bool | None, tokenizer: Any, calls: str = "") -> Structured:
    """``structured``, or ``calls`` (see ``ToolParser.grammar``) where there are any, behind a <think> block, which must come if
    the prompt has begun it (``inside``), may come otherwise, and has no place if None. ValueError for a kind that cannot be
    put into another grammar."""
    result = "(result | calls)" if calls else "result"
    rules = f"result: {_answer(structured)}\n{calls}"
    if inside is None:
        return Structured("grammar", f"start: {result}\n{rules}")
    begin = "" if inside else f"/\\s{{0,4}}/ {token_of(BEGIN, tokenizer)} "
    if END in tokenizer.hf.get_added_vocab():  # a token of its own, which no regular expression matches
        reasoning = f"reasoning: {begin}THOUGHT {END}\nTHOUGHT: /(.|\\n)*/\n"
    else:
        reasoning = f"reasoning: {begin}thought\nthought[lazy]: /(.|\\n)*<\\/think>/\n"
    optional = "" if inside else "?"
    return Structured("grammar", f"start: reasoning{optional} answer\n{reasoning}answer: /\\s{{0,4}}/ {result}\n{rules}")


def token_of(marker: str, tokenizer: Any) -> str:
    """A marker in a Lark rule: the token that it is, or its text."""
    token = tokenizer.hf.get_added_vocab().get(marker)
    return json.dumps(marker) if token is None else marker if marker.startswith("<") else f"<[{token}]>"


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
    raise ValueError("a grammar cannot be a part of another")
