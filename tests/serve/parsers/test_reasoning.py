"""<think> blocks: with the tag in the answer or in the prompt, cut anywhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxkv.serve.parsers.reasoning import ThinkParser

PARTS = ["<think>", "</think>", "<", "think>", "</", " ", "\n", "a", "naïve 🙂", ">"]


def read(pieces, inside=False):
    parser = ThinkParser(inside)
    out = [*(parser.feed(piece) for piece in pieces), parser.finish()]
    return tuple("".join(part) for part in zip(*out))


@pytest.mark.parametrize(("text", "inside", "expected"), [
    ("<think>\nhm\n</think>\n\nHello", False, ("hm\n", "Hello")),
    ("\n<think>hm</think>", False, ("hm", "")),
    ("hm</think>Hello", True, ("hm", "Hello")),
    ("<think>\nhm</think>Hello", True, ("hm", "Hello")),  # the tag is in the prompt, and the model repeats it
    ("hm, never done </thin", True, ("hm, never done </thin", "")),
    ("<think>cut", False, ("cut", "")),
    ("Hello <think>no</think>", False, ("", "Hello <think>no</think>")),
    ("  spaces stay ", False, ("", "  spaces stay ")),
    ("<think></think>  a </think>", False, ("", "a </think>")),
    ("<thin", False, ("", "<thin")), ("", False, ("", "")), ("", True, ("", "")),
])
def test_reading(text, inside, expected):
    assert read([text], inside) == expected
    assert read(text, inside) == expected


@given(st.lists(st.sampled_from(PARTS), max_size=12).map("".join), st.lists(st.integers(0, 60), max_size=8), st.booleans())
def test_any_cutting_gives_the_same(text, at, inside):
    borders = [0, *sorted(min(a, len(text)) for a in at), len(text)]
    assert read([text[a:b] for a, b in zip(borders, borders[1:])], inside) == read([text], inside)


def test_plain_text_is_not_delayed():
    parser = ThinkParser(False)
    assert [parser.feed(piece) for piece in ("The ", "cat < dog ", "</think>")] == [
        ("", "The "), ("", "cat < dog "), ("", "</think>")]
