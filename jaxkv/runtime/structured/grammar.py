"""From a ``Structured`` to an llguidance matcher (github.com/guidance-ai/llguidance). Standard library and llguidance only.

llguidance parses with Earley's algorithm over lexemes that are derivatives of regular expressions; its limits bound what
one step may cost. Theirs are for trusted grammars (a step took 0.9 s within them, 0.03 s within ours).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from jaxkv.params import Structured
from jaxkv.runtime.structured.unions import with_tagged_unions

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Between two tokens of JSON stands a blank or an indented new line: small models find no end to what may be any length.
WHITE_SPACE: Any = {"whitespace_pattern": r"[ \t]|\r?\n[ \t]{0,20}"}
MAX_REASON = 300  # characters of llguidance's message that are passed on
ONE_OF = ("oneOf is followed only where it is certain that no two branches hold at once: give each a required property with "
          "a const or enum of its own, or say anyOf")
FREELY = '\n%llguidance {"no_forcing": true}\n'  # whichever tokens spell a text that must follow: else those of the tokenizer
_LITERAL = re.compile(r'"(?:[^"\\\n]|\\.)*"|/(?:[^/\\\n]|\\.)+/')  # in a grammar; a bare <name> there is a token itself
_LIMITS: Any = {"max_items_in_row": 500, "initial_lexer_fuel": 500_000, "step_lexer_fuel": 60_000, "step_max_items": 10_000,
                "max_lexer_states": 20_000, "max_grammar_size": 200_000, "verbose_errors": False}


def make_tokenizer(tokenizer_json: str, vocab_size: int, eos_ids: list[int]) -> LLTokenizer:
    """llguidance's view of a Hugging Face tokenizer; ids from its size to ``vocab_size`` are never allowed. ValueError."""
    from llguidance import LLTokenizer

    return LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=eos_ids)


def make_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at its first token, whose mask is computed already. ValueError says why there is none."""
    from llguidance import LLMatcher, LLParserLimits

    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**_LIMITS))
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(reason(matcher))
    if matcher.is_stopped() and not matcher.is_accepting():
        raise ValueError("no text follows it")
    return matcher


def special_texts(tokenizer: LLTokenizer, tokenizer_json: str) -> list[str]:
    """How the tokens are called that stand for no text."""
    return [token["content"] for token in json.loads(tokenizer_json)["added_tokens"] if tokenizer.is_special_token(token["id"])]


def grammar_of(structured: Structured, special: Iterable[str] = ()) -> str:
    """What ``make_matcher`` takes. ValueError says why there is none.

    A text of ``special`` may be part of an answer like any other, letter by letter. Where it must follow, llguidance takes
    the tokenizer's token for it and fails, since that stands for no text: so then nothing is spelt by the tokenizer.
    """
    grammar = _grammar_of(structured)
    plain = (grammar if grammar.startswith("{") else " ".join(_LITERAL.findall(grammar))).replace("\\", "")
    if not any(text in plain or json.dumps(text)[1:-1].replace("\\", "") in plain for text in special):
        return grammar
    if grammar.startswith("{"):  # JSON, which has no place for options
        part, = json.loads(grammar)["grammars"]
        grammar = part["lark_grammar"] or "start: %json " + json.dumps(part["json_schema"])
    return grammar + FREELY


def _grammar_of(structured: Structured) -> str:
    from llguidance import LLMatcher, grammar_from

    kind, value = structured.kind, structured.value
    if kind == "json_object":
        return LLMatcher.grammar_from_json_schema('{"type": "object"}', defaults=WHITE_SPACE)
    if kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(json.dumps(followed(json.loads(value))), defaults=WHITE_SPACE)
    if kind == "regex":
        return LLMatcher.grammar_from_regex(value)
    if kind == "choice":
        choices = json.loads(value)
        if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
            raise ValueError("choices must be a non-empty list of non-empty strings")
        # one lexeme: as rules of a grammar, many choices would be as many items of the parser
        return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, choices)))
    return grammar_from("grammar", value)


def followed(schema: Any) -> dict[str, Any]:
    """A JSON schema that means the same and that llguidance can follow. ValueError."""
    if not isinstance(schema, dict):
        raise ValueError("a JSON schema must be an object")
    try:
        return with_tagged_unions(schema)
    except RecursionError:
        raise ValueError("the JSON schema is nested too deeply") from None


def json_rule(schema: Any) -> str:
    """A JSON schema within a Lark rule. ValueError."""
    return "%json " + json.dumps({"x-guidance": WHITE_SPACE, **followed(schema)})


def reason(matcher: LLMatcher) -> str:
    """Why a matcher is in error, in one short line."""
    error = matcher.get_error().replace("<non-verbose/>", "")
    return ONE_OF if "coerce_one_of" in error else shorten(error)


def shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_REASON else line[:MAX_REASON] + "..."
