"""BOS once, whoever writes it; prompt lengths are those transformers counts."""

import httpx
import pytest
from serve_fakes import FakeEngine, serving
from test_completions import post

from jaxkv.runtime.tokenizer import load_tokenizer
from tests.text_models import write_with_bos

BOS = 0
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "naïve 日本?"}]


@pytest.fixture(scope="module", params=[True, False], ids=["BOS in the template too", "BOS by the tokenizer only"])
def server(request, tmp_path_factory):
    tokenizer = load_tokenizer(write_with_bos(tmp_path_factory.mktemp("bos"), in_template=request.param))
    assert tokenizer.encode("x")[0] == BOS
    with serving(lambda: FakeEngine(tokenizer)) as running, httpx.Client(base_url=running.url) as http:
        yield running.engine, http, tokenizer.hf, request.param


@pytest.mark.parametrize(("path", "body"), [
    ("/v1/chat/completions", {"messages": MESSAGES}), ("/v1/responses", {"input": MESSAGES}),
    ("/tokenize", {"messages": MESSAGES}),
])
def test_a_conversation_has_the_tokens_of_transformers(server, path, body):
    engine, http, hf, in_template = server
    expected = hf.apply_chat_template(MESSAGES, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert expected.count(BOS) == in_template
    answer = post(http, path, **body)
    if path == "/tokenize":
        assert answer["tokens"] == expected
    else:
        assert list(engine.requests[-1].prompt) == expected
        usage = answer["usage"]
        assert usage.get("prompt_tokens", usage.get("input_tokens")) == len(expected)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings", "/tokenize"])
def test_a_bare_text_has_bos_once_unless_told_otherwise(server, path):
    engine, http, hf, _ = server
    field = "input" if "embeddings" in path else "prompt"
    for special in (None, True, False):
        answer = post(http, path, **{field: "some text"}, add_special_tokens=special)
        seen = answer["tokens"] if path == "/tokenize" else list(engine.requests[-1].prompt)
        assert seen == hf.encode("some text", add_special_tokens=special is not False)
        assert seen.count(BOS) == (special is not False)
        assert path == "/tokenize" or answer["usage"]["prompt_tokens"] == len(seen)
    assert post(http, "/detokenize", tokens=[BOS, 70, 71])["prompt"].startswith("<|endoftext|>")
