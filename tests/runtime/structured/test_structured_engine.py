"""Structured output in the engine: answers follow their grammar in every schedule, and leave other requests alone."""

import json
import re

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxkv.params import SamplingParams, Structured
from jaxkv.runtime.structured.compiler import GrammarCompiler
from jaxkv.runtime.tokenizer import load_tokenizer
from tests.engine_harness import CONFIG, POOL, engine, executor, greedy, run_all
from tests.text_models import write_characters

EOS = 0
SCHEMA = {"type": "object", "properties": {"id": {"type": "integer", "minimum": 0, "maximum": 999},
                                           "tags": {"type": "array", "items": {"enum": ["on", "off"]}, "maxItems": 2}},
          "required": ["id", "tags"], "additionalProperties": False}
JSON = Structured("json_schema", json.dumps(SCHEMA | {"x-guidance": {"whitespace_flexible": False}}))
PATTERN = Structured("regex", "[a-f]{2,6}-[0-9]{1,30}")
CHOICE = Structured("choice", json.dumps(["red", "green", "ruby (a gem)", "\"{}\""]))
GRAMMAR = Structured("grammar", 'root ::= "(" root ")" | [a-c]')
PROMPT = [5, 9, 2, 33, 14, 60, 7, 21, 40, 3]


def follows(structured: Structured, text: str) -> bool:
    if structured is JSON:
        value = json.loads(text)
        return (set(value) == {"id", "tags"} and 0 <= value["id"] <= 999 and len(value["tags"]) <= 2
                and set(value["tags"]) <= {"on", "off"})
    if structured is PATTERN:
        return re.fullmatch(PATTERN.value, text) is not None
    if structured is CHOICE:
        return text in json.loads(CHOICE.value)
    depth = text.count("(")
    return text in {"(" * depth + letter + ")" * depth for letter in "abc"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_characters(tmp_path_factory.mktemp("characters")))


@pytest.fixture(scope="module")
def grammars(tokenizer):
    compiler = GrammarCompiler(tokenizer, CONFIG["vocab_size"], (EOS,))
    yield compiler
    compiler.close()


@pytest.fixture
def build(tokenizer, grammars, highest_precision):
    """An engine on the compiled executor, with the grammars of the module."""
    def make(**settings):
        built = engine(executor(False), tokenizer=tokenizer, eos_ids=(EOS,), **settings)
        built.grammars.close()
        built.grammars = grammars
        return built

    return make


def texts(results):
    return {name: "".join(d.text for d in result.deltas) for name, result in results.items()}


def reasons(results):
    return {name: result.deltas[-1].finish_reason for name, result in results.items()}


REQUESTS = {f"{s.kind} {t}": (PROMPT + [7 + i], SamplingParams(temperature=t, seed=i, max_tokens=50, structured=s))
            for t in (0.0, 1.5) for i, s in enumerate((JSON, PATTERN, CHOICE, GRAMMAR))}


def check(results):
    done = 0
    for name, text in texts(results).items():
        request = REQUESTS[name.split("/")[0]]
        if results[name].deltas[-1].finish_reason == "stop":
            assert follows(request[1].structured, text), (name, text)
            done += 1
        else:
            assert len(results[name].tokens) == 50
    return done


@pytest.fixture(scope="module")
def expected(tokenizer, grammars):
    """What each request answers alone, without overlap."""
    found = {}
    for name, request in REQUESTS.items():
        run = engine(executor(False), overlap=False, tokenizer=tokenizer, eos_ids=(EOS,))
        run.grammars = grammars
        found |= {k: r.tokens for k, r in run_all(run, {name: request}).items()}
    return found


@pytest.mark.parametrize("settings", [
    {"overlap": False}, {"overlap": True}, {"pages": 18}, {"pages": 18, "overlap": False}, {"budget": 5},
    {"prefix_caching": False}], ids=str)
def test_answers_follow_and_do_not_depend_on_the_schedule(build, expected, settings):
    run = build(**settings)
    results = run_all(run, REQUESTS)
    assert check(results) >= 5
    assert {name: r.tokens for name, r in results.items()} == expected
    assert (run.metrics.preemptions > 0) == ("pages" in settings)
    assert not run._matchers._open


def test_free_requests_get_what_they_get_alone_and_are_not_held_up(build):
    free = {f"free{i}": (PROMPT[i:], greedy(20)) for i in range(2)}
    alone = run_all(build(), free)
    run = build()
    together = run_all(run, free | {name: REQUESTS[name] for name in ("regex 0.0", "json_schema 1.5")})
    assert all(together[name].tokens == alone[name].tokens for name in free)
    assert check({k: v for k, v in together.items() if k in REQUESTS}) > 0


schemas = st.recursive(
    st.one_of(st.just({"type": "boolean"}), st.builds(lambda a, b: {"type": "integer", "minimum": a, "maximum": a + b},
                                                      st.integers(-99, 99), st.integers(0, 50)),
              st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 4)),
              st.lists(st.sampled_from(["on", 7, None, True, "x y"]), min_size=1, unique_by=repr).map(lambda v: {"enum": v})),
    lambda inner: st.one_of(
        st.builds(lambda items, n: {"type": "array", "items": items, "maxItems": n}, inner, st.integers(0, 2)),
        st.lists(inner, min_size=1, max_size=2).map(lambda options: {"anyOf": options}),
        st.dictionaries(st.sampled_from("ab"), inner).map(lambda fields: {
            "type": "object", "properties": fields, "required": sorted(fields), "additionalProperties": False})), max_leaves=4)


def test_any_schema(build):
    run, ended = build(), []

    @given(schemas, st.sampled_from([0.0, 1.5]))
    def follow(schema, temperature):
        params = SamplingParams(temperature=temperature, seed=1, max_tokens=50, n=2,
                                structured=Structured("json_schema", json.dumps(schema)))
        results = run_all(run, {"r": (PROMPT, params)})
        for name, reason in reasons(results).items():
            if reason == "stop":
                jsonschema.validate(json.loads(texts(results)[name]), schema)
                ended.append(schema)

    follow()
    assert len(ended) > 20


def test_children_have_grammars_of_their_own(build):
    prompt, params = REQUESTS["regex 1.5"]
    many = {"regex 1.5": (prompt, SamplingParams(temperature=1.5, seed=3, max_tokens=50, n=3, structured=PATTERN))}
    results = run_all(build(), many)
    assert check(results) == 3 and len(set(texts(results).values())) == 3


def test_a_second_turn_hits_the_prefix_cache(build):
    run = build()
    first = run_all(run, {"a": REQUESTS["json_schema 0.0"]})["a"]
    again = run_all(run, {"a": REQUESTS["json_schema 0.0"]})["a"]
    assert again.tokens == first.tokens and again.deltas[0].num_cached_tokens == len(PROMPT)


def test_the_end_token_comes_where_the_grammar_ends_only(build):
    """A bias speaks for the end at once, ``min_tokens`` and ``ignore_eos`` against it."""
    bias, word = {EOS: 100.0}, Structured("regex", "[a-z]{3}[0-9]{0,9}")

    def answer(**fields):
        result = run_all(build(), {"r": (PROMPT, greedy(30, structured=word, logit_bias=bias, **fields))})["r"]
        assert result.deltas[-1].finish_reason == "stop" and result.deltas[-1].stop_reason is None
        return "".join(d.text for d in result.deltas), result.tokens

    text, tokens = answer()
    assert re.fullmatch("[a-z]{3}", text) and tokens[3:] == [EOS]
    text, tokens = answer(min_tokens=6)
    assert re.fullmatch("[a-z]{3}[0-9]{3}", text) and tokens[6:] == [EOS]
    text, tokens = answer(ignore_eos=True)
    assert re.fullmatch("[a-z]{3}[0-9]{9}", text) and len(tokens) == 12, "it ends where nothing may follow"
    text, tokens = answer(min_tokens=20)
    assert re.fullmatch("[a-z]{3}[0-9]{9}", text) and len(tokens) == 12, "the grammar's end comes first"


def test_an_answer_that_is_complete_at_max_tokens_is_complete(build):
    result = run_all(build(), {"r": (PROMPT, greedy(3, structured=Structured("regex", "[a-z]{3}")))})["r"]
    assert len(result.tokens) == 3 and result.deltas[-1].finish_reason == "stop"
    cut = run_all(build(), {"r": (PROMPT, greedy(2, structured=Structured("regex", "[a-z]{3}")))})["r"]
    assert cut.deltas[-1].finish_reason == "length"


def test_stop_strings_and_ids_end_it_before(build, tokenizer):
    word = Structured("regex", "a{5}b{5}")
    run = build()
    cut = run_all(run, {"r": (PROMPT, greedy(20, structured=word, stop=("abb",)))})["r"]
    assert "".join(d.text for d in cut.deltas) == "aaaa" and cut.deltas[-1].stop_reason == "abb"
    b = tokenizer.encode("b")[0]
    cut = run_all(run, {"r": (PROMPT, greedy(20, structured=word, stop_token_ids=(b,)))})["r"]
    assert cut.deltas[-1].stop_reason == b and len(cut.tokens) == 6
    assert not run._matchers._open


def test_abort_in_the_middle_leaves_nothing(build):
    run = build()
    run.add_request("gone", PROMPT, greedy(40, n=2, structured=PATTERN))
    for _ in range(4):
        run.step()
    assert run._matchers._open
    run.abort("gone")
    assert not run._matchers._open
    assert check(run_all(run, {"regex 1.5": REQUESTS["regex 1.5"]})) == 1
    run.check()


def test_a_matcher_that_fails_ends_its_request_alone(build, caplog):
    run = build()
    prompt, params = REQUESTS["regex 1.5"]
    run.add_request("bad", prompt, params)
    run.add_request("good", prompt, params)
    run.step()
    run._matchers._open["bad#0"].matcher.consume_token(1)  # "a", twice or not: from here on it is out of step
    run._matchers._open["bad#0"].matcher.consume_token(30)  # "4": after one or two letters no digit may come
    ended = {}
    while run.has_work:
        for delta in run.step():
            if delta.finish_reason:
                ended[delta.request_id] = delta.finish_reason
        run.check()
    assert ended == {"bad": "error", "good": "stop"} and "structured output failed" in caplog.text


def test_what_cannot_be_is_refused_before_anything_runs(build):
    run = build()
    with pytest.raises(ValueError, match="structured cannot be compiled: .*unclosed"):
        run.add_request("r", PROMPT, greedy(4, structured=Structured("regex", "(a")))
    assert not run.has_work
    plain = engine(executor(False), pages=POOL)
    with pytest.raises(ValueError, match="structured needs a tokenizer"):
        plain.add_request("r", PROMPT, greedy(4, structured=PATTERN))
    for bad, message in ((("yaml", "a"), "kind"), (("regex", ""), "non-empty"), (("regex", "a" * 70_000), "65536")):
        with pytest.raises(ValueError, match=message):
            Structured(*bad)
    with pytest.raises(ValueError, match="structured must be"):
        SamplingParams(structured="[a-z]")
