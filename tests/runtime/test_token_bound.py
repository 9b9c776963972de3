"""A text of more characters than ``characters_per_token`` allows never has fewer tokens than that says."""

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from jaxkv.runtime.token_bound import characters_per_token
from tests.text_models import write_byte_level, write_characters, write_sentencepiece_like

TEXT = st.text(max_size=60) | st.text(" \n\tadefinr(e\u0301\u0308ẹ̈ﬃ각▁日🙂", max_size=200) | \
    st.sampled_from([" ", "e\u0301", "\u1100\u1161\u11a8", "α\u0313\u0300\u0345", "<|im_end|>", "def "]).map(lambda s: s * 50)


def built(write, directory, change=lambda data: None):
    """A tokenizer of ``text_models`` whose JSON was changed."""
    data = json.loads((write(directory) / "tokenizer.json").read_text())
    change(data)
    return Tokenizer.from_str(json.dumps(data))


def normalizer(*parts):
    return lambda data: data.update(normalizer=json.loads(normalizers.Sequence(list(parts)).__getstate__()))


@pytest.fixture(scope="module")
def sure(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sure")
    return [built(write_byte_level, directory), built(write_sentencepiece_like, directory),
            built(write_byte_level, directory, normalizer(normalizers.NFC())),
            built(write_byte_level, directory, normalizer(normalizers.NFKC(), normalizers.Lowercase())),
            built(write_byte_level, directory, normalizer(normalizers.Replace("a", "bb")))]


@settings(max_examples=200, deadline=None)
@given(TEXT)
def test_no_text_has_fewer_tokens(sure, text):
    for tokenizer in sure:
        assert len(tokenizer.encode(text, add_special_tokens=False).ids) * characters_per_token(tokenizer) >= len(text)


def test_it_is_the_longest_name():
    path = Path(__file__).parents[2] / "checkpoints" / "default" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    assert characters_per_token(tokenizer) == max(map(len, tokenizer.get_vocab())) == 49
    tokenizer.add_tokens(["x" * 60])
    assert characters_per_token(tokenizer) == 60
    tokenizer.normalizer = normalizers.NFC()
    assert characters_per_token(tokenizer) == 240


def test_no_character_decomposes_to_more_than_four():
    assert max(len(unicodedata.normalize("NFD", chr(c))) for c in range(0x110000) if not 0xD800 <= c < 0xE000) == 4


@pytest.mark.parametrize("change", [
    lambda t: t.enable_truncation(10), lambda t: t.add_tokens([AddedToken("<mask>", lstrip=True)]),
    lambda t: t.add_tokens([AddedToken("<mask>", rstrip=True)]), *(
        lambda t, part=part: setattr(t, "normalizer", part) for part in (
            normalizers.Strip(), normalizers.StripAccents(), normalizers.Nmt(), normalizers.Replace("ab", "c"),
            normalizers.Sequence([normalizers.NFC(), normalizers.Sequence([normalizers.BertNormalizer()])]))), *(
        lambda t, part=part: setattr(t, "pre_tokenizer", pre_tokenizers.Sequence([part, pre_tokenizers.ByteLevel()]))
        for part in (pre_tokenizers.Whitespace(), pre_tokenizers.Split(" ", "removed")))])
def test_where_nothing_is_sure(tmp_path, change):
    tokenizer = built(write_byte_level, tmp_path)
    assert characters_per_token(tokenizer)
    change(tokenizer)
    assert characters_per_token(tokenizer) is None


def test_a_part_written_in_python(tmp_path):
    tokenizer = built(write_byte_level, tmp_path)
    tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(object())
    assert characters_per_token(tokenizer) is None


def test_vocabularies_that_lose_text(tmp_path):
    assert characters_per_token(built(write_characters, tmp_path)) is None  # bytes without a token are dropped
    assert characters_per_token(Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>"))) is None

    def without_fallback(data):
        data["model"]["byte_fallback"] = False

    assert characters_per_token(built(write_sentencepiece_like, tmp_path, without_fallback)) is None
