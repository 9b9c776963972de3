"""Loading, special tokens, chat templates and end-of-sequence ids."""

import threading
from pathlib import Path

import pytest

from jaxkv.config import ConfigError
from jaxkv.runtime.generation_config import eos_token_ids
from jaxkv.runtime.tokenizer import Tokenizer, load_tokenizer
from tests.text_models import SPECIAL, write_byte_level, write_sentencepiece_like

DEFAULT = Path(__file__).parents[2] / "checkpoints" / "default"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(write_byte_level(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(write_sentencepiece_like(tmp_path_factory.mktemp("sentencepiece")))


def test_round_trip_and_special_tokens(tokenizer):
    text = "def main():\n  'naïve' 日本 👩‍👩‍👧\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    marked = tokenizer.encode("a<|im_end|>b")
    assert marked[1] == SPECIAL.index("<|im_end|>")
    assert tokenizer.decode(marked) == "ab"
    assert tokenizer.decode(marked, skip_special_tokens=False) == "a<|im_end|>b"
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.byte_level


def test_bytes_of_every_token_are_its_share_of_the_text(tokenizer):
    for token in range(tokenizer.vocab_size):
        assert tokenizer.token_text(token) == tokenizer.decode([token], skip_special_tokens=False)
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b""  # padding of the embedding
    ids = tokenizer.encode("日本語")
    assert b"".join(tokenizer.token_bytes(token) for token in ids).decode() == "日本語"


def test_sentencepiece_is_not_byte_level(sentencepiece):
    assert not sentencepiece.byte_level
    assert sentencepiece.decode(sentencepiece.encode("The quick fox")) == "The quick fox"


@pytest.mark.skipif(not (DEFAULT / "tokenizer.json").exists(), reason="the built-in model is not trained yet")
def test_built_in_model():
    tokenizer = load_tokenizer(DEFAULT)
    assert tokenizer.byte_level
    assert tokenizer.special_ids == {0, 1, 2}
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert set(eos_token_ids(DEFAULT, tokenizer, 4096)) == {0, 2}


def test_bad_text_is_a_value_error(tokenizer):
    with pytest.raises(ValueError, match="prompt is not valid Unicode"):
        tokenizer.encode("\ud800")
    with pytest.raises(ValueError, match="prompt must be a string, got int"):
        tokenizer.encode(3)


def test_chat_template(tokenizer):
    messages = [{"role": "system", "content": None}, {"role": "user", "content": [{"type": "text", "text": "a"},
                                                                                 {"type": "text", "text": "b"}]}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False) == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n")
    assert tokenizer.apply_chat_template(messages[1:]).endswith("<|im_start|>assistant\n")
    assert tokenizer.apply_chat_template(messages[1:], chat_template="{{ messages[0]['content'] }}") == "a\nb"
    open_ended = [*messages[1:], {"role": "assistant", "content": "so"}]
    text = tokenizer.apply_chat_template(open_ended, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("assistant\nso")


@pytest.mark.parametrize(("messages", "message"), [
    ([], "messages must be a non-empty list"),
    ("hello", "messages must be a non-empty list"),
    (["hello"], r"messages\[0\] must be an object"),
    ([{"content": "x"}], r"messages\[0\].role must be a string"),
    ([{"role": "user", "content": 3}], r"messages\[0\].content must be a string or a list"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\].content\[0\].type must be .*image_url"),
    ([{"role": "pirate", "content": "x"}], "messages cannot be rendered by the chat template: unknown role"),
])
def test_bad_messages_name_the_field(tokenizer, messages, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.apply_chat_template(messages)


def test_chat_without_a_template(sentencepiece):
    with pytest.raises(ValueError, match="chat_template is missing"):
        sentencepiece.apply_chat_template([{"role": "user", "content": "x"}])


def test_a_directory_without_tokenizer_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="has no tokenizer that loads") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_threads_share_a_tokenizer(tokenizer):
    failures = []

    def work():
        for index in range(200):
            text = f"text {index} 日本"
            if tokenizer.decode(tokenizer.encode(text)) != text:
                failures.append(text)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
