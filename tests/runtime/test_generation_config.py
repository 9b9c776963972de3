"""What generation_config.json says, and what of it may not be."""

import json

import pytest

from jaxkv.config import ConfigError
from jaxkv.runtime.generation_config import default_sampling, eos_token_ids
from jaxkv.runtime.tokenizer import load_tokenizer
from tests.text_models import SPECIAL, write_byte_level


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_byte_level(tmp_path_factory.mktemp("byte_level")))


@pytest.mark.parametrize(("generation", "config", "files"), [
    ({"eos_token_id": [7, 8]}, {"eos_token_id": 9}, (7, 8)),
    ({"eos_token_id": 7}, {}, (7,)),
    ({}, {"eos_token_id": 9}, (9,)),
    (None, {"eos_token_id": None}, ()),
    ({"eos_token_id": [7, 10, -1]}, {"eos_token_id": 9}, (7,)),
    ({}, {"eos_token_id": 50256}, ()),  # GPT2Config's default in a model of few tokens
])
def test_eos_ids(tmp_path, tokenizer, generation, config, files):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert eos_token_ids(tmp_path, None, 10) == files
    assert eos_token_ids(tmp_path, tokenizer, 10) == (*files, SPECIAL.index("<|im_end|>"))


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("value", ["2", True, 2.0, [2, "x"], [[2]], {"a": 2}, "", list(range(32))])
def test_eos_ids_that_are_none_end_the_start(tmp_path, file, value):
    (tmp_path / file).write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ConfigError, match=rf"^{file}: eos_token_id must be an integer or a list of fewer than 32"):
        eos_token_ids(tmp_path, None, 10)


def test_sampling_defaults_are_the_fields_that_are_set(tmp_path):
    assert default_sampling(tmp_path) == {}
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_new_tokens": 99, "min_p": None,
                                "do_sample": True, "eos_token_id": 3, "num_beams": 4}))
    assert default_sampling(tmp_path) == {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_tokens": 99}


@pytest.mark.parametrize(("text", "word"), [
    ('{"top_p": 7}', "top_p"), ('{"temperature": "hot"}', "temperature"), ('{"top_k": 2.5}', "top_k"),
    ('{"max_new_tokens": 0}', "max_tokens"), ("{", "generation_config.json"), ("[]", "not a JSON object"),
])
def test_defaults_that_cannot_work_end_the_start(tmp_path, text, word):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=word):
        default_sampling(tmp_path)
