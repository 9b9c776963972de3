"""Compiling grammars: each once, within bounds of time and memory, and whatever they do to the compiler."""

import gc
import json
import re
import time
import weakref
from concurrent.futures import Future

import pytest

from jaxkv.params import Structured
from jaxkv.runtime.structured import compiler as module
from jaxkv.runtime.structured import trial
from jaxkv.runtime.structured.compiler import CompilerBusy, GrammarCompiler
from jaxkv.runtime.structured.grammar import FREELY, grammar_of
from jaxkv.runtime.tokenizer import load_tokenizer
from tests.text_models import write_byte_level, write_sentencepiece_like

DEEP = Structured("grammar", "start: r0\n" + "".join(f"r{i}: r{i + 1} \"x\"\n" for i in range(3000)) + "r3000: \"y\"\n")
SLOW = Structured("grammar", "start: T\nT: " + " & ".join(f"/(.*[a-{chr(98 + i % 24)}]){{{i % 7 + 1}}}.*/"
                                                          for i in range(300)) + "\n")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_byte_level(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture
def grammars(tokenizer):
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size + 31, (2,))
    yield compiler
    compiler.close()


def test_each_is_compiled_once(grammars):
    one, again = (Structured("regex", "".join("a+b")) for _ in range(2))
    first = grammars.compile(one)
    assert grammars.compile(again) is first and grammars.compiled == 1
    assert grammars.compile(Structured("grammar", 'start: "a+b"')) is not first and grammars.compiled == 2
    for _ in range(2):
        with pytest.raises(ValueError, match="^structured cannot be compiled: "):
            grammars.compile(Structured("regex", "(a"))
    assert grammars.compiled == 3, "failures are remembered too"


def test_a_failure_keeps_nobody_alive(grammars):
    class Request:
        pass

    def ask(request):
        with pytest.raises(ValueError):
            grammars.compile(Structured("regex", "(b"))
        return weakref.ref(request)

    gone = ask(Request())
    gc.collect()
    assert gone() is None


def test_the_cache_is_bounded_and_what_is_in_use_stays(grammars, monkeypatch):
    monkeypatch.setattr(module, "MAX_CACHED", 2)
    held = grammars.compile(Structured("regex", "held"))
    for i in range(4):
        grammars.compile(Structured("regex", f"x{i}"))
    assert len(grammars._recent) == 2 and grammars.compiled == 5
    assert grammars.compile(Structured("regex", "held")) is held and grammars.compiled == 5
    gc.collect()
    assert len(grammars._alive) == 2


def test_too_many_at_once_are_refused(grammars, monkeypatch):
    monkeypatch.setattr(module, "MAX_PENDING", 1)
    monkeypatch.setattr(grammars._pool, "submit", lambda *_: Future())
    grammars.submit(Structured("regex", "a"))
    assert not grammars.submit(Structured("regex", "a")).done(), "the same one waits with it"
    with pytest.raises(CompilerBusy, match="structured"):
        grammars.submit(Structured("regex", "b"))


def test_what_takes_too_long_or_crashes_ends_a_child_only(grammars, monkeypatch):
    start = time.monotonic()
    with pytest.raises(ValueError, match="too large or too deeply nested"):
        grammars.compile(DEEP)
    assert grammars.compile(Structured("regex", "ab")) and time.monotonic() - start < 5
    with pytest.raises(ValueError, match=f"longer than {trial.SECONDS:g} seconds"):
        grammars.compile(SLOW)
    assert time.monotonic() - start < trial.SECONDS + 5
    assert grammars.compile(Structured("regex", "cd"))


@pytest.mark.parametrize("kind, value, message", [
    ("regex", "(a{1000}){1000}", "too many"), ("regex", "(?!a)b", "look-around"), ("json_schema", "[1]", "object"),
    ("json_schema", '{"type": "wizard"}', "wizard"), ("json_schema", "{", "JSON|double quotes"), ("choice", "[]", "choices"),
    ("json_schema", '{"$ref": "http://127.0.0.1:9/x.json"}', "does not fetch"), ("choice", '[""]', "choices"),
    ("json_schema", '{"$ref": "file:///etc/passwd"}', "does not fetch"), ("json_schema", "false", "object"),
    ("json_schema", '{"items":' * 2000 + "{}" + "}" * 2000, "recursion"), ("grammar", "start: (", "Expected"),
    ("grammar", "root ::= " + "(" * 9000, "recursion"), ("grammar", "%import /etc/passwd\nstart: \"a\"", "Expected"),
    ("json_schema", '{"$ref": "#"}', "."), ("grammar", "", "non-empty")], ids=str)
def test_refusals_say_why_in_one_short_line(grammars, kind, value, message):
    with pytest.raises(ValueError, match=message) as refusal:
        grammars.compile(Structured(kind, value))
    assert len(str(refusal.value)) < 400 and "\n" not in str(refusal.value)


def test_many_choices_are_one_lexeme(grammars):
    names = [f"choice {i} é\n" for i in range(2000)]
    matcher = grammars.compile(Structured("choice", json.dumps(names))).matcher()
    assert not matcher.is_error() and matcher.compute_bitmask()


@pytest.mark.parametrize("write", [write_byte_level, write_sentencepiece_like])
def test_masks_agree_with_the_text_of_tokens(tmp_path, write):
    """Byte-level tokenizers and those with word borders; ids past the tokenizer's are never allowed."""
    tokenizer = load_tokenizer(write(tmp_path))
    vocab = tokenizer.vocab_size + 31
    grammars = GrammarCompiler(tokenizer, vocab, (2,))
    text = "The quick fox, 12"
    matcher = grammars.compile(Structured("regex", r"[A-Za-z ,]+[0-9]*")).matcher()
    ids = tokenizer.encode(text, add_special_tokens=False)
    for token in ids:
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        assert mask >> token & 1 and not mask >> tokenizer.vocab_size
        assert matcher.consume_token(token)
    final = int.from_bytes(matcher.compute_bitmask(), "little")
    assert final >> 2 & 1, "the end"
    for token in range(3, tokenizer.vocab_size):
        whole = tokenizer.decode([*ids, token], skip_special_tokens=False)
        fits = re.fullmatch(r"[A-Za-z ,]+[0-9]*", whole) is not None and len(whole) > len(tokenizer.decode(ids))
        if "\ufffd" not in whole:
            assert bool(final >> token & 1) == fits, (whole, token)
    grammars.close()


@pytest.mark.parametrize("kind, value, text", [
    ("json_schema", '{"enum": ["a<|im_start|>b"]}', '"a<|im_start|>b"'), ("regex", r"<\|im_start\|>", "<|im_start|>"),
    ("json_schema", r'{"const": "\u003c|im_start|>"}', '"<|im_start|>"'), ("choice", '["<|im_start|>"]', "<|im_start|>"),
    ("grammar", 'start: "x<|im_start|>"', "x<|im_start|>"), ("grammar", 'root ::= "<|im_start|>"', "<|im_start|>"),
    ("grammar", 'start: <|im_start|> "x<|im_start|>"', "<|im_start|>x<|im_start|>")], ids=str)
def test_the_name_of_a_special_token_is_a_text_like_any_other(grammars, tokenizer, kind, value, text):
    matcher, ids = grammars.compile(Structured(kind, value)).matcher(), []
    while not matcher.is_stopped():
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        assert mask and not matcher.is_error()
        ids.append((mask & -mask).bit_length() - 1)
        assert matcher.consume_token(ids[-1])
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert (1 in ids) == (kind == "grammar" and value.startswith("start: <"))


@pytest.mark.parametrize("text, freely", [
    ('start: <tool> "x"', False), ('start: "<tool>"', True), (r'start: /[a-z]*<\/?tool>/ "</tool>"', True),
    ('start: "a" <tool> "b"', False)])
def test_a_token_that_a_grammar_names_is_no_text(text, freely):
    """It changes nothing about how the texts around it are spelt."""
    assert grammar_of(Structured("grammar", text), ["<tool>", "</tool>"]).endswith(FREELY) == freely


def test_without_an_end_token_there_is_none(tokenizer):
    grammars = GrammarCompiler(tokenizer, tokenizer.vocab_size, ())
    with pytest.raises(ValueError, match="no end-of-sequence"):
        grammars.compile(Structured("regex", "a"))
    grammars.close()
