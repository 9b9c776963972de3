"""A grammar behind reasoning, as llguidance understands it: the reasoning is free, the answer is not."""

import json

import llguidance
import pytest

from jaxkv.params import Structured
from jaxkv.runtime.tokenizer import Tokenizer, load_tokenizer
from jaxkv.serve.thinking import after_reasoning

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module", params=["tag is a token", "tag is text"])
def model(request, tokenizer):
    if request.param == "tag is text":
        return tokenizer
    hf = load_tokenizer(tokenizer.hf.name_or_path).hf
    hf.add_tokens(["<think>", "</think>"])
    return Tokenizer(hf)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(("structured", "good", "bad"), [
    (Structured("json_schema", json.dumps(SCHEMA)), '{"a": 1}', '{"b"'), (Structured("json_object"), '{"q": [1]}', "[1"),
    (Structured("regex", "a/b\\/c\\d+\n\\\\/x"), "a/b/c12\n\\/x", "a\\"),
    (Structured("choice", '["yes", "n\\"o/"]'), 'n"o/', "maybe"),
])
def test_what_it_takes(model, structured, good, bad, inside):
    grammar = after_reasoning(structured, inside, model)
    assert grammar.kind == "grammar"
    llm_tokens = llguidance.LLTokenizer(model.hf.backend_tokenizer.to_str(), eos_token=2)

    def takes(text):
        matcher = llguidance.LLMatcher(llm_tokens, grammar.value)
        assert not matcher.is_error(), matcher.get_error()
        ids = model.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    begin = "" if inside else "<think>"
    assert takes(f"{begin}\nhm {{}} < \n</think>\n\n{good}") and takes(f"{begin}</think>{good}")
    assert not takes(f"{begin}hm</think>{bad}") and not takes(f"{begin}hm</think>so {good}")
    assert takes(good) is not inside  # reasoning that the prompt has not begun may be left out
    assert not takes(f"{begin}hm")


@pytest.mark.parametrize("structured", [
    Structured("grammar", "start: /a/"), Structured("json_schema", "[1]"), Structured("json_schema", "{"),
    Structured("json_schema", "[" * 60_000),
])
def test_what_has_no_place_behind_reasoning(tokenizer, structured):
    with pytest.raises(ValueError):
        after_reasoning(structured, True, tokenizer)
