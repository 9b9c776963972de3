"""Every tool parser: what it reads, what it leaves alone, and that the cutting of the text never matters."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxkv.serve.parsers import TOOL_PARSERS, tool_parser_for
from jaxkv.serve.parsers.base import NAME, CallDelta, overlap
from jaxkv.serve.parsers.forced import NamedParser, RequiredParser
from jaxkv.serve.parsers.message import MessageReader
from jaxkv.serve.parsers.pythonic import call_of
from jaxkv.serve.parsers.reasoning import ThinkParser

PARSERS = {**TOOL_PARSERS, "required": RequiredParser, "named": lambda: NamedParser("f")}
NASTY = {"city": "São \"Paulo\" {[\\]} 🙂", "n": [1, -2.5, {"deep": {"er": [[]]}}], "x": None, "t": True,
         "tag": "</tool_call><tool_call>[TOOL_CALLS]<|python_tag|>", "esc": "a\\\"b\n\t\u2028'"}


def write(kind: str, calls) -> str:
    """What a model of the family writes for these calls."""
    if kind == "hermes":
        return "\n".join("<tool_call>\n" + json.dumps({"name": n, "arguments": a}, ensure_ascii=False) + "\n</tool_call>"
                         for n, a in calls)
    if kind == "llama3_json":
        return "; ".join(json.dumps({"name": n, "parameters": a}, ensure_ascii=False) for n, a in calls)
    if kind == "mistral":
        return "[TOOL_CALLS]" + json.dumps([{"name": n, "arguments": a} for n, a in calls])
    if kind == "mistral_names":
        return "".join(f"[TOOL_CALLS]{n}{json.dumps(a)}" for n, a in calls)
    if kind == "required":
        return json.dumps([{"name": n, "parameters": a} for n, a in calls], indent=1)
    assert kind == "pythonic"
    return "[" + ", ".join(f"{n}({', '.join(f'{k}={v!r}' for k, v in a.items())})" for n, a in calls) + "]"


def read(parser, texts) -> tuple[str, list[tuple[str, str]]]:
    """Content and the (name, arguments) of every call of a text in pieces."""
    content, calls = "", []
    for piece in [*(piece for text in texts for piece in parser.feed(text)), *parser.finish()]:
        if isinstance(piece, str):
            content += piece
        elif piece.name is not None:
            assert piece.index == len(calls)
            calls.append((piece.name, piece.arguments))
        else:
            calls[piece.index] = calls[piece.index][0], calls[piece.index][1] + piece.arguments
    return content, calls


def parse(parser, text: str) -> tuple[str, list[tuple[str, str]]]:
    return read(parser, [text])


def decoded(calls):
    return [(name, json.loads(arguments)) for name, arguments in calls]


def parser_of(kind: str):
    return PARSERS[kind.removesuffix("_names")]()


KINDS = ["hermes", "llama3_json", "mistral", "mistral_names", "pythonic", "required"]
SYNTAX = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<|python_start|>", "<|python_end|>",
          '{"name": "f", "arguments": {"a": 1}}', '{"name": "g", "parameters": {}}', '{"name": "f"', '"arguments": {', "{",
          "}", "[", "]", '"', "\\", "'", ",", ";", ":", " ", "\n", "f", "(a=1)", "(", ")", "=", "[f(a='x'), g()]", "[ARGS]",
          '"name"', "null", "1e5", "<", "🙂", "naïve", '{"a": "\\ud800"}', "[CALL_ID]abc", "<think>", "</think>"]
texts = st.one_of(st.lists(st.sampled_from(SYNTAX), max_size=14).map("".join), st.text(max_size=30))


@st.composite
def cut(draw, source):
    """A text and the same text in pieces."""
    text = draw(source)
    at = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return text, [text[a:b] for a, b in zip([0, *at], [*at, len(text)])]


@pytest.mark.parametrize("kind", KINDS)
def test_calls_come_back(kind):
    calls = [("get_weather", NASTY), ("list", {}), ("get-it_2" if kind != "pythonic" else "mod.get", {"a": 1})]
    text = write(kind, calls)
    content, found = parse(parser_of(kind), text)
    assert content == "" and decoded(found) == calls
    by_character = read(parser_of(kind), text)
    assert by_character == (content, found)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost_or_changed_by_any_cutting_of_real_calls(kind):
    text = write(kind, [("f", NASTY), ("g", {"a": "b"})])
    whole = parse(parser_of(kind), text)
    for size in (1, 2, 3, 7, 50):
        assert read(parser_of(kind), [text[i:i + size] for i in range(0, len(text), size)]) == whole
    for at in range(len(text)):  # ended anywhere: what is out of a cut call is the beginning of its arguments
        _, calls = parse(parser_of(kind), text[:at])
        for (name, arguments), (expected, full) in zip(calls, whole[1]):
            assert name == expected and full.startswith(arguments)


@pytest.mark.parametrize("kind", list(PARSERS))
def test_any_cutting_gives_the_same(kind):
    @given(cut(texts))
    def check(case):
        text, pieces = case
        whole = parse(parser_of(kind), text)
        assert read(parser_of(kind), pieces) == whole
        assert all(kind == "named" or NAME.fullmatch(name) for name, _ in whole[1])

    check()


@given(cut(texts), st.booleans(), st.booleans())
def test_reasoning_and_calls_together_do_not_mind_the_cutting(case, inside, parallel):
    def message(pieces):
        reader = MessageReader(ThinkParser(inside), TOOL_PARSERS["hermes"](), parallel)
        parts = [*(reader.feed(piece, False) for piece in pieces), reader.feed("", True)]
        calls: dict[int, str] = {}
        for call in (call for part in parts for call in part.calls):
            calls[call.index] = calls.get(call.index, "") + (call.name or "") + call.arguments
        assert reader.called == bool(calls) and (parallel or len(calls) <= 1)
        return "".join(part.reasoning for part in parts), "".join(part.content for part in parts), calls

    text, pieces = case
    assert message(pieces) == message([text])


@pytest.mark.parametrize("kind", list(TOOL_PARSERS))
def test_plain_text_passes_at_once_and_unchanged(kind):
    letters = st.characters(codec="utf-8", exclude_categories=("Z", "C"), exclude_characters="<[{")

    @given(st.lists(st.text(letters, min_size=1, max_size=8)))
    def check(pieces):
        parser = parser_of(kind)
        assert [parser.feed(piece) for piece in pieces] == [[piece] for piece in pieces]
        assert parser.finish() == []

    check()
    for text in ("See [1] and {x}: a < b, <b>bold</b>, [TOOL, <tool_cal", "  \n", "x <|python", "{", "[", "[]", "[1, 2]",
                 '{"answer": [1, {"b": "}"}]}', "", "{}", '{"name": "Ann"}', "[f(x) for x in y]", "[f(1)]", "[f(a=b)]", "("):
        assert parse(parser_of(kind), text) == (text, [])


@pytest.mark.parametrize("kind", ["hermes", "mistral", "mistral_names"])
def test_text_around(kind):
    text = write(kind, [("f", {"a": 1})])
    content, calls = parse(parser_of(kind), f"I look.\n{text}\n")
    assert (content, decoded(calls)) == ("I look.\n", [("f", {"a": 1})])
    content, calls = parse(parser_of(kind), f"{text} Done.\n{text}\n\n{text}")
    assert (content, decoded(calls)) == (" Done.\n", [("f", {"a": 1})] * 3)


def test_arguments_come_in_pieces_and_the_name_once():
    parser = TOOL_PARSERS["hermes"]()
    text = '<tool_call>{"name": "f", "arguments": {"text": "' + "abc " * 20 + '"}}</tool_call>'
    pieces = [piece for char in text for piece in parser.feed(char)]
    assert len(pieces) > 80 and all(isinstance(piece, CallDelta) for piece in pieces)
    assert [piece.name for piece in pieces if piece.name] == ["f"] and pieces[0].name == "f"
    assert json.loads("".join(piece.arguments for piece in pieces)) == {"text": "abc " * 20}


@pytest.mark.parametrize(("kind", "text", "content", "calls"), [
    ("hermes", "<tool_call>I think so</tool_call>", "<tool_call>I think so</tool_call>", []),
    ("hermes", '<tool_call>{"arguments": {"a": 1}}</tool_call>', '<tool_call>{"arguments": {"a": 1}}</tool_call>', []),
    ("hermes", '<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1', "", [("f", '{"a": [1')]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}', "", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_c', "", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f g", "arguments": {}}', '<tool_call>{"name": "f g", "arguments": {}}', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}}</tool_call>', "}", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}\n<tool_call>{"name": "g", "arguments": {}}', "",
     [("f", "{}"), ("g", "{}")]),
    ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    ("llama3_json", 'Sure. <|python_tag|>{"type": "function", "name": "f", "parameters": {}}', "Sure. ", [("f", "{}")]),
    ("llama3_json", '<|python_tag|>search.call(query="x")', 'search.call(query="x")', []),
    ("llama3_json", ' {"name": "f", "parameters": {}}, {"name": "g", "arguments": {}} ok', " ok",
     [("f", "{}"), ("g", "{}")]),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "abcdefghi"}]', "", [("f", "{}")]),
    ("mistral", '[TOOL_CALLS]f[CALL_ID]xyz[ARGS]{"a": "}"}', "", [("f", '{"a": "}"}')]),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1}</s>', "</s>", [("f", '{"a": 1}')]),
    ("mistral", "[TOOL_CALLS]oops, no call", "oops, no call", []),
    ("mistral", "[TOOL_CALLS][oops]", "[oops]", []),
    ("mistral", "[TOOL_CALLS]" + "x" * 500, "x" * 500, []),
    ("pythonic", "<|python_start|>[f(a=-1, b=(1, 2), c={'k': [true, null, None]})]<|python_end|>", "",
     [("f", '{"a": -1, "b": [1, 2], "c": {"k": [true, null, null]}}')]),
    ("pythonic", "[f(a=1), g(__import__('os'))]", ", g(__import__('os'))]", [("f", '{"a": 1}')]),
    ("pythonic", "[f(a='x)', b=\"\\\"]\"), g(", ", g(", [("f", '{"a": "x)", "b": "\\"]"}')]),
    ("required", '[{"name": "f"', '[{"name": "f"', []),
    ("required", "no array", "no array", []),
])
def test_odd_texts(kind, text, content, calls):
    assert parse(parser_of(kind), text) == (content, calls)
    assert read(parser_of(kind), text) == (content, calls)


@pytest.mark.parametrize("source", [
    "f(x)", "f(a=open('x'))", "f(a=1+1)", "f(**{'a': 1})", "f(a=1, a=2)", "f(a={1: 2})", "f(a={1, 2})", "f(a=b'x')",
    "f(a=1j)", "f(a=1e999)", "f(a='\\ud800')", "f(a=lambda: 0)", "f(a=[x for x in y])", "f()()", "(f)(a=1)[0]", "f(a=...)",
    "f(a=f'{x}')", "f(" + "a=" + "[" * 5000, "f(a=" + "9" * 5000 + ")", "f(\0)", "",
])
def test_pythonic_reads_literals_and_nothing_else(source):
    assert call_of(source) is None


def test_pythonic_calls_have_a_bounded_length():
    for count in (5_000, 20_000):
        text = "[f(a=f'" + "{x}" * count + "'), g()]"
        assert parse(TOOL_PARSERS["pythonic"](), text) == (text, [])
        assert read(TOOL_PARSERS["pythonic"](), [text[:1000], text[1000:70_000], text[70_000:]]) == (text, [])


def test_named_is_the_arguments():
    assert read(NamedParser("f"), ['{"a"', ": 1}"]) == ("", [("f", '{"a": 1}')])
    assert parse(NamedParser("f"), "") == ("", [])


def test_overlap():
    assert overlap("ab<to", "<tool>") == 3 and overlap("<tool>", "<tool>") == 0 and overlap("a<<", "<<<", "<t") == 2


def test_work_is_linear_in_the_text():
    """A call of a million characters in pieces of four: seconds if anything were looked at twice."""
    for kind in ("hermes", "llama3_json", "mistral", "required"):
        text = write(kind, [("f", {"text": "x{y" * 100_000})])
        pieces = [text[i:i + 40] for i in range(0, len(text), 40)]
        assert len(read(parser_of(kind), pieces)[1][0][1]) > 300_000


@pytest.mark.parametrize(("template", "name"), [
    ("... <tool_call>\n{\"name\": ...", "hermes"), ("<tool_call>\n<function=x>", None), ("<tool_call>f<arg_key>", None),
    ("[TOOL_CALLS] [", "mistral"), ('in the format {"name": function name, "parameters": dictionary}', "llama3_json"),
    ("[func_name1(params_name1=params_value1)]", "pythonic"), ("<tool_call> [TOOL_CALLS]", None), ("plain", None),
])
def test_choice_by_template(template, name):
    assert tool_parser_for(template) == name
