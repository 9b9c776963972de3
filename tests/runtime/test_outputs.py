"""Incremental text, stop strings, and the outputs users see."""

import codecs
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxkv.params import SamplingParams
from jaxkv.runtime.detokenizer import ByteDetokenizer, StopStrings, WindowDetokenizer, make_detokenizer
from jaxkv.runtime.outputs import Delta, OutputProcessor, RequestState, logprob_dict
from jaxkv.runtime.tokenizer import Tokenizer, load_tokenizer
from jaxkv.types import Logprobs, Request, TokenEvent
from tests.text_models import write_byte_level, write_sentencepiece_like


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(write_byte_level(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(write_sentencepiece_like(tmp_path_factory.mktemp("sentencepiece")))


def pieces_of(detokenizer, tokens: list[int]) -> list[str]:
    return [detokenizer.push((token,)) for token in tokens]


def whole_characters(tokenizer, ids: list[int], skip: bool = True) -> str:
    """The text of all bytes at once, without an unfinished character at its end."""
    data = b"".join(tokenizer.token_bytes(token) for token in ids if not (skip and token in tokenizer.special_ids))
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(data)
    assert tokenizer.decode(ids, skip) in (text, text + "\ufffd")
    return text


@given(ids=st.lists(st.integers(0, 420), max_size=40), skip=st.booleans())
def test_any_tokens_give_the_text_of_decoding_all_at_once(tokenizer, ids, skip):
    assert "".join(pieces_of(ByteDetokenizer(tokenizer, skip), ids)) == whole_characters(tokenizer, ids, skip)


@given(text=st.text(max_size=40))
def test_unicode_comes_out_in_whole_characters(tokenizer, text):
    pieces = pieces_of(ByteDetokenizer(tokenizer, True), tokenizer.encode(text))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(data=st.binary(max_size=12))
def test_any_bytes(tokenizer, data):
    byte_ids = {tokenizer.token_bytes(token): token for token in range(3, tokenizer.vocab_size)}
    ids = [byte_ids[bytes([byte])] for byte in data]
    assert "".join(pieces_of(ByteDetokenizer(tokenizer, True), ids)) == whole_characters(tokenizer, ids)


@given(text=st.text(max_size=40).filter(lambda text: "\ufffd" not in text))
def test_sentencepiece_text(sentencepiece, text):
    ids = sentencepiece.encode(text)
    pieces = pieces_of(WindowDetokenizer(sentencepiece, (), True), ids)
    assert "".join(pieces) == sentencepiece.decode(ids) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_sentencepiece_keeps_the_space_after_the_prompt(sentencepiece):
    ids = sentencepiece.encode("The quick fox")
    cut = next(i for i, token in enumerate(ids) if i and sentencepiece.hf.convert_ids_to_tokens(token).startswith("▁"))
    detokenizer = make_detokenizer(sentencepiece, ids[:cut], True)
    answer = "".join(pieces_of(detokenizer, ids[cut:]))
    assert answer.startswith(" ")
    assert sentencepiece.decode(ids[:cut]) + answer == "The quick fox"


def test_sentencepiece_skips_special_tokens_between_words(sentencepiece):
    quick, fox = sentencepiece.encode("quick"), sentencepiece.encode("fox")
    eos = sentencepiece.hf.eos_token_id
    assert "".join(pieces_of(WindowDetokenizer(sentencepiece, (), True), [*quick, eos, eos, *fox])) == "quick fox"


def test_sentencepiece_gives_up_on_broken_bytes(sentencepiece):
    broken = sentencepiece.hf.convert_tokens_to_ids("<0xE4>")
    pieces = pieces_of(WindowDetokenizer(sentencepiece, (), True), [broken] * 40)
    assert sum(map(len, pieces)) == 40
    assert any(pieces[:10])  # does not wait for ever


def reference_stop(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Where the first stop string ends; of those ending there, the longest."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            stop = max(hits, key=len)
            return text[:end] if include else text[:end - len(stop)], stop
    return text, None


@given(pieces=st.lists(st.text("ab", max_size=4), max_size=12),
       stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4), include=st.booleans())
def test_stop_strings_depend_on_the_text_only(pieces, stops, include):
    expected, stop = reference_stop("".join(pieces), stops, include)
    finder, shown = StopStrings(stops, include), ""
    for piece in pieces:
        text, hit = finder.push(piece)
        shown += text
        assert expected.startswith(shown)  # nothing is shown that would have to be taken back
        if hit is not None:
            break
    else:
        hit, shown = None, shown + finder.flush()
    assert (shown, hit) == (expected, stop)


@given(text=st.text("ab", max_size=30), stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3))
def test_only_what_may_begin_a_stop_string_is_held_back(text, stops):
    finder, shown = StopStrings(stops, include=False), ""
    for count, char in enumerate(text, 1):
        piece, hit = finder.push(char)
        shown += piece
        if hit is not None:
            return
        held = text[len(shown):count]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def request(tokenizer: Tokenizer | None, prompt=(5,), **params) -> OutputProcessor:
    return OutputProcessor(Request("r#1", tuple(prompt), SamplingParams(**params), 100, child=1, parent="r"), tokenizer)


def run(processor: OutputProcessor, ids: list[int], reason: str = "length", step: int = 1, **last) -> list[Delta]:
    """Feeds tokens until the processor finds the end."""
    deltas = []
    for start in range(0, len(ids), step):
        final = start + step >= len(ids)
        event = TokenEvent("r#1", tuple(ids[start:start + step]), finish_reason=reason if final else None,
                           **(last if final else {}))
        delta, stop = processor.process(event)
        deltas.append(delta)
        if delta.finish_reason is not None:
            break
        assert stop is None
    return deltas


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_stop_string_across_tokens(tokenizer):
    ids = tokenizer.encode("The quick brown fox jumps over")
    for step in (1, 2, 5, 100):
        deltas = run(request(tokenizer, stop=["own f", "never"]), ids, step=step)
        assert text_of(deltas) == "The quick br"
        assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "own f")
        assert (deltas[-1].request_id, deltas[-1].index) == ("r", 1)
        used = [token for delta in deltas for token in delta.token_ids]
        assert used == ids[:len(used)]
        assert "own f" in tokenizer.decode(used)
        assert "own f" not in tokenizer.decode(used[:-1])  # the last token is the one that completed it


def test_stop_string_kept_on_request(tokenizer):
    ids = tokenizer.encode("The quick brown fox jumps over")
    assert text_of(run(request(tokenizer, stop="own f", include_stop_str_in_output=True), ids)) == "The quick brown f"


def test_the_processor_says_that_a_stop_string_ended_it(tokenizer):
    processor = request(tokenizer, stop="x")
    delta, stop = processor.process(TokenEvent("r#1", tuple(tokenizer.encode("a x b")), num_cached=3))
    assert (delta.text, delta.finish_reason, stop, delta.num_cached_tokens) == ("a ", "stop", "x", 3)


def test_held_back_text_comes_at_the_end(tokenizer):
    ids = tokenizer.encode("The quick bro")
    deltas = run(request(tokenizer, stop="brown"), ids)
    assert text_of(deltas) == "The quick bro"
    assert text_of(deltas[:-1]) == "The quick "[:len(text_of(deltas[:-1]))]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("length", None)


def test_min_tokens_comes_before_stop_strings(tokenizer):
    ids = tokenizer.encode("a b a b a b a b")
    assert text_of(run(request(tokenizer, stop="b", max_tokens=50), ids)) == "a "
    deltas = run(request(tokenizer, stop="b", min_tokens=4, max_tokens=50), ids)
    assert sum(len(delta.token_ids) for delta in deltas) > 4
    assert text_of(deltas).startswith("a b a ")
    assert deltas[-1].stop_reason == "b"
    spanning = run(request(tokenizer, stop="b a b", min_tokens=4, max_tokens=50), ids)  # begins before, ends after
    assert deltas[-1].finish_reason == spanning[-1].finish_reason == "stop"


def test_stop_tokens_are_returned_but_are_no_text(tokenizer):
    ids = tokenizer.encode("The quick")
    for params, shown, reason in (({}, "The", None), ({"stop_token_ids": [ids[-1]]}, "The", ids[-1]),
                                  ({"include_stop_str_in_output": True}, "The quick", None)):
        deltas = run(request(tokenizer, **params), ids, "stop", stop_token=ids[-1])
        assert text_of(deltas).startswith(shown)
        assert (text_of(deltas) == "The quick") == ("include_stop_str_in_output" in params)
        assert [t for delta in deltas for t in delta.token_ids] == ids
        assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", reason)


@pytest.mark.parametrize("params", [{}, {"stop": "never"}, {"stop": "b日"}])
def test_unfinished_character_at_the_end_is_no_text(tokenizer, params):
    ids = tokenizer.encode("ab日")[:-1]
    assert tokenizer.decode(ids) == "ab\ufffd"
    for step in (1, 2, 9):
        assert text_of(run(request(tokenizer, **params), ids, step=step)) == "ab"


def test_without_tokenizer():
    deltas = run(request(None, stop_token_ids=[9]), [7, 8, 9], "stop", stop_token=9)
    assert [t for delta in deltas for t in delta.token_ids] == [7, 8, 9]
    assert text_of(deltas) == ""
    assert deltas[-1].stop_reason == 9
    with pytest.raises(ValueError, match="stop needs a tokenizer"):
        request(None, stop="x")


def entry(token: int, logprob: float = -1.5, rank: int = 3) -> Logprobs:
    return Logprobs(token, logprob, rank, ((10, -0.5), (11, -1.0), (token, logprob)))


def test_prompt_logprobs_wait_for_the_first_token(tokenizer):
    processor = request(tokenizer, prompt=(3, 4, 5, 6), prompt_logprobs=1)
    first, _ = processor.process(TokenEvent("r#1", (), (), (entry(4), entry(5))))
    assert (first.prompt_logprobs, first.token_ids) == ((), ())
    second, _ = processor.process(TokenEvent("r#1", (8,), (), (entry(6),)))
    assert [item.token_id for item in second.prompt_logprobs] == [4, 5, 6]
    third, _ = processor.process(TokenEvent("r#1", (8,)))
    assert third.prompt_logprobs == ()


def test_logprobs_are_only_for_those_who_asked_and_only_for_tokens_kept(tokenizer):
    ids = tuple(tokenizer.encode("a x b"))
    event = TokenEvent("r#1", ids, tuple(map(entry, ids)))
    assert request(tokenizer).process(event)[0].logprobs == ()
    delta, _ = request(tokenizer, logprobs=2, stop="x").process(event)
    assert len(delta.logprobs) == len(delta.token_ids) < len(ids)


def test_logprob_dict(tokenizer):
    found = logprob_dict(entry(40), 2, tokenizer)
    assert list(found) == [40, 10, 11]
    assert (found[40].rank, found[10].rank, found[11].rank) == (3, 1, 2)
    assert found[40].decoded_token == tokenizer.decode([40])
    assert list(logprob_dict(entry(40), 0, None)) == [40]
    assert list(logprob_dict(Logprobs(10, -0.5, 1, ((10, -0.5),)), 5, None)) == [10]


def test_request_output(tokenizer):
    params = SamplingParams(n=2, logprobs=1, prompt_logprobs=0)
    state = RequestState("r", "text", (3, 4), params, tokenizer)
    state.add(Delta("r", 1, (9,), "b", (entry(9),), (entry(4),), num_cached_tokens=1))
    state.add(Delta("r", 0, (8,), "a", (entry(8, -0.25),)))
    assert not state.finished
    state.add(Delta("r", 0, (8,), "a", (entry(8, -0.25),), finish_reason="length"))
    state.add(Delta("r", 1, finish_reason="stop", stop_reason="x"))
    output = state.output()
    assert output.finished
    assert output.prompt == "text"
    assert output.prompt_token_ids == [3, 4]
    assert output.num_cached_tokens == 0
    assert output.prompt_logprobs[0] is None
    assert list(output.prompt_logprobs[1]) == [4]
    first, second = output.outputs
    assert (first.index, first.text, first.token_ids, first.finish_reason) == (0, "aa", [8, 8], "length")
    assert math.isclose(first.cumulative_logprob, -0.5)
    assert list(first.logprobs[0]) == [8, 10]
    assert (second.text, second.stop_reason, second.finished()) == ("b", "x", True)
    assert output.metrics.arrival_time <= output.metrics.first_token_time <= output.metrics.finished_time


def test_cost_per_token_does_not_grow_with_the_answer(tokenizer):
    ids = (tokenizer.encode("The quick brown fox jumps over the lazy dog 日本語 ") * 2000)[:20_000]
    cost = []
    for count in (2_000, 20_000):
        processor = request(tokenizer, stop=["never seen", "the lazy cat"], max_tokens=None)
        start = time.perf_counter()
        for token in ids[:count]:
            processor.process(TokenEvent("r#1", (token,)))
        cost.append((time.perf_counter() - start) / count)
    assert cost[1] < 4 * cost[0]  # quadratic work would be 10x
    assert cost[1] < 200e-6  # some 5 us on a quiet machine
