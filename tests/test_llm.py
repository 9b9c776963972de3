"""``LLM``: shapes of prompts, outputs, errors that leave nothing behind."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import jaxkv
from jaxkv import LLM, SamplingParams, Structured
from jaxkv.cli import EngineOptions, engine_config
from jaxkv.llm import whole_steps
from jaxkv.runtime import executor, weights
from tests.text_models import SMALL, small_llm, small_model

ROOT = Path(__file__).parent.parent
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return small_model()


@pytest.fixture(scope="module")
def llm() -> LLM:
    return small_llm()


@pytest.fixture(autouse=True)
def _nothing_is_left(request):
    """Every test, failing calls included, leaves the engine empty and consistent."""
    yield
    if "llm" in request.fixturenames:
        engine = request.getfixturevalue("llm").engine
        assert not engine.has_work
        engine.check()


def test_import_is_light():
    code = ("import time; t = time.perf_counter(); import jaxkv; jaxkv.SamplingParams(); s = time.perf_counter() - t; "
            "import sys; print(s < 0.5, sorted({'jax', 'numpy', 'transformers'} & set(sys.modules)))")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "True []"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = jaxkv.nothing
    assert all(getattr(jaxkv, name) for name in jaxkv.__all__)


def test_prompts_in_every_shape(llm):
    tokenizer = llm.get_tokenizer()
    text, ids = "The quick", tokenizer.encode("The quick")
    shapes = [text, [text], ids, [ids], np.array(ids).tolist(), [np.int64(i) for i in ids], {"prompt": text},
              {"prompt_token_ids": ids}, [{"prompt": text, "prompt_token_ids": ids}], [tuple(ids)]]
    results = [llm.generate(shape, GREEDY, use_tqdm=False) for shape in shapes]
    for result in results:
        assert len(result) == 1
        assert result[0].prompt_token_ids == ids
        assert result[0].outputs[0].token_ids == results[0][0].outputs[0].token_ids
    assert results[0][0].prompt == text
    assert results[2][0].prompt is None
    assert llm.generate([], GREEDY) == []


def test_many_prompts_keep_their_order(llm):
    prompts = [f"{number} x" for number in range(11)]
    params = [SamplingParams(temperature=0, max_tokens=1 + number % 5, ignore_eos=True) for number in range(11)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1 + number % 5 for number in range(11)]
    assert [int(output.request_id) for output in outputs] == sorted(int(output.request_id) for output in outputs)
    alone = llm.generate(prompts[7], params[7], use_tqdm=False)[0]
    assert alone.outputs[0].token_ids == outputs[7].outputs[0].token_ids


def test_what_an_output_holds(llm):
    params = SamplingParams(n=2, temperature=0.8, seed=3, max_tokens=6, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    output = llm.generate("The quick brown fox", params, use_tqdm=False)[0]
    assert output.finished
    assert [answer.index for answer in output.outputs] == [0, 1]
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert output.prompt_logprobs[0] is None
    assert all(t in row for t, row in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:]))
    for answer in output.outputs:
        assert answer.finish_reason == "length"
        text = llm.engine.tokenizer.decode(answer.token_ids)
        assert answer.text in (text, text.removesuffix("\ufffd"))  # a last unfinished character is no text
        assert [2 <= len(row) <= 3 for row in answer.logprobs] == [True] * 6
        chosen = [row[token] for token, row in zip(answer.token_ids, answer.logprobs)]
        assert answer.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in chosen))
        assert all(entry.decoded_token == llm.engine.tokenizer.token_text(t)
                   for entry, t in zip(chosen, answer.token_ids))
    again = llm.generate("The quick brown fox", params, use_tqdm=False)[0]
    assert [a.token_ids for a in again.outputs] == [a.token_ids for a in output.outputs]
    assert output.metrics.arrival_time <= output.metrics.first_token_time <= output.metrics.finished_time


def test_cached_tokens_and_salts(llm):
    prompt = "some text that nobody else sends here, ever"
    first, second, other = (llm.generate({"prompt": prompt, "cache_salt": salt}, GREEDY, use_tqdm=False)[0]
                            for salt in ("a", "a", "b"))
    assert (first.num_cached_tokens, other.num_cached_tokens) == (0, 0)
    assert second.num_cached_tokens == len(first.prompt_token_ids) - 1
    assert first.outputs[0].token_ids == second.outputs[0].token_ids == other.outputs[0].token_ids


def test_stop_strings(llm):
    whole = llm.generate("The quick", SamplingParams(temperature=0, max_tokens=24, ignore_eos=True), use_tqdm=False)
    text = whole[0].outputs[0].text
    stop = text[len(text) // 2:len(text) // 2 + 3]
    cut = llm.generate("The quick", SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop=stop),
                       use_tqdm=False)[0].outputs[0]
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (text[:text.index(stop)], "stop", stop)
    assert cut.token_ids == whole[0].outputs[0].token_ids[:len(cut.token_ids)]


def test_chat(llm):
    conversation = [{"role": "user", "content": "hi"}]
    one = llm.chat(conversation, GREEDY, use_tqdm=False)
    two = llm.chat([conversation, [*conversation, {"role": "assistant", "content": "so"},
                                   {"role": "user", "content": "ok"}]], GREEDY, use_tqdm=False)
    assert [len(one), len(two)] == [1, 2]
    assert one[0].prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert one[0].prompt_token_ids[0] == llm.get_tokenizer().convert_tokens_to_ids("<|im_start|>")
    assert two[0].outputs[0].token_ids == one[0].outputs[0].token_ids
    bare = llm.chat(conversation, GREEDY, use_tqdm=False, add_generation_prompt=False)
    assert bare[0].prompt.endswith("<|im_end|>\n")
    with pytest.raises(ValueError, match=r"conversation 1: messages\[0\].role must be a string"):
        llm.chat([conversation, [{"content": "x"}]], GREEDY)
    with pytest.raises(ValueError, match="messages must be a non-empty list"):
        llm.chat([], GREEDY)


@pytest.mark.parametrize(("prompts", "params", "message"), [
    (3, None, "prompts must be a string, token ids, a dict"),
    (["ok", 3], None, r"prompts\[1\] must be a string or a list of token ids, got int"),
    ("", None, "prompts must not be empty"),
    (["ok", ""], None, r"prompts\[1\] must not be empty"),
    (["ok", []], None, r"prompts\[1\] must not be empty"),
    ([[1, "x"]], None, r"prompts\[0\] must hold token ids \(integers\), got 'x'"),
    ([[1, True]], None, r"prompts\[0\] must hold token ids"),
    ([1, -2], None, "token id -2"),
    (["ok", [5, 400]], None, r"prompts\[1\].*token id 400.*vocabulary of 400"),
    (["ok", [5] * 128], None, r"prompts\[1\].*128 tokens; max_model_len is 128"),
    ({"text": "x"}, None, "prompts has an unknown key 'text'"),
    ({"prompt_token_ids": "12 13"}, None, "prompts.prompt_token_ids must be a list of token ids, got str"),
    ([{"prompt": "x", "prompt_token_ids": ""}], None, r"prompts\[0\].prompt_token_ids must be a list of token ids, got str"),
    ({}, None, "prompts must hold prompt or prompt_token_ids"),
    ({"prompt": "x", "cache_salt": 3}, None, "prompts.cache_salt must be a string"),
    ("\ud800", None, "prompt is not valid Unicode"),
    (["a", "b"], [GREEDY], r"as many as prompts \(2\), got 1"),
    ("a", "greedy", "sampling_params must be SamplingParams"),
    (["a"], [{"max_tokens": 3}], r"sampling_params\[0\] must be SamplingParams, got dict"),
    (["a", "b"], [GREEDY, SamplingParams(stop_token_ids=[400])], r"prompts\[1\].*stop_token_ids.*400"),
])
def test_bad_input_runs_nothing(llm, prompts, params, message):
    steps = llm.engine.metrics.steps
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, params, use_tqdm=False)
    assert llm.engine.metrics.steps == steps


def test_unknown_options_and_bad_settings(model_dir):
    with pytest.raises(jaxkv.ConfigError, match="unknown option 'block_sizes'"):
        LLM(str(model_dir), block_sizes=3)
    with pytest.raises(jaxkv.ConfigError, match="page_size must be an integer of at least 1, got 0"):
        LLM(str(model_dir), page_size=0)
    with pytest.raises(jaxkv.ConfigError, match="kv_cache_memory must be bytes or a number"):
        LLM(str(model_dir), kv_cache_memory="lots")
    with pytest.raises(jaxkv.ConfigError, match="overlap must be True or False"):
        LLM(str(model_dir), overlap="no")


@pytest.mark.parametrize("name", ["model", *EngineOptions.__annotations__])
def test_no_setting_is_a_list(name):
    with pytest.raises(jaxkv.ConfigError, match=f"^{name} must be .*, got \\[1\\]$"):
        LLM(**{name: [1]})


@pytest.mark.parametrize("options, message", [
    (dict(model=5), "model must be a string or None, got 5"),
    (dict(answer_worth="x"), "answer_worth must be an integer, got 'x'"),
    (dict(max_model_len=True), "max_model_len must be an integer or None, got True"),
    (dict(max_model_len=1), "max_model_len must be an integer of at least 2, got 1"),
    (dict(kv_cache_memory=[1]), r"kv_cache_memory must be bytes or a number with K, M or G, got \[1\]"),
    (dict(kv_cache_memory=True), "kv_cache_memory must be bytes"), (dict(seed=None), "seed must be an integer, got None"),
    (dict(page_size=16.0), "page_size must be an integer, got 16.0"),
    (dict(disk_kv_path=5), "disk_kv_path must be a string or None"),
])
def test_settings_of_another_type_are_refused(options, message):
    with pytest.raises(jaxkv.ConfigError, match=message):
        LLM(**options)


def test_paths_may_be_path_objects(tmp_path):
    config = engine_config({"model": tmp_path, "disk_kv_path": tmp_path})
    assert config.model.model == config.cache.disk_kv_path == str(tmp_path)


def test_a_failure_between_steps_leaves_nothing(llm, monkeypatch):
    step, calls = llm.engine.step, []

    def failing():
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("boom")
        return step()

    monkeypatch.setattr(llm.engine, "step", failing)
    with pytest.raises(RuntimeError, match="boom"):
        llm.generate(["a", "b"] * 5, GREEDY, use_tqdm=False)
    monkeypatch.undo()
    assert not llm.engine.has_work
    assert llm.generate("The quick", GREEDY, use_tqdm=False)[0].finished


@pytest.mark.parametrize("where", ["JaxExecutor._submit", "Handle._read"])
def test_a_failure_inside_a_step_is_told_by_every_later_call(model_dir, monkeypatch, where):
    owner, name = getattr(executor, where.partition(".")[0]), where.partition(".")[2]
    inner, calls = getattr(owner, name), []

    def failing(*args):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("boom")
        return inner(*args)

    with LLM(str(model_dir), **SMALL) as llm:
        monkeypatch.setattr(owner, name, failing)
        with pytest.raises(RuntimeError, match="^boom$"):
            llm.generate(["a", "b"] * 5, GREEDY, use_tqdm=False)
        monkeypatch.undo()
        assert not llm.engine.has_work
        for call in (llm.generate, lambda text, *rest, **more: llm.chat([{"role": "user", "content": text}], *rest, **more)):
            with pytest.raises(RuntimeError, match="the engine has failed.*RuntimeError: boom") as told:
                call("The quick", GREEDY, use_tqdm=False)
            assert str(told.value.__cause__) == "boom"


@pytest.fixture
def default_sigint():
    """A shell's background job ignores SIGINT, and pytest with it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_nothing(llm, default_sigint):
    before = signal.getsignal(signal.SIGINT)
    killer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    killer.start()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(200):
            llm.generate(["a b c"] * 40, SamplingParams(max_tokens=100, ignore_eos=True), use_tqdm=False)
            assert time.sleep(0) is None
    killer.join()
    assert signal.getsignal(signal.SIGINT) is before
    assert not llm.engine.has_work


def test_ctrl_c_after_the_last_step_is_not_lost(default_sigint):
    with pytest.raises(KeyboardInterrupt), whole_steps() as check_interrupt:
        check_interrupt()
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(ValueError, match="the first"), whole_steps():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("the first")


def test_it_works_from_another_thread(llm):
    results = []
    thread = threading.Thread(target=lambda: results.extend(llm.generate("The quick", GREEDY, use_tqdm=False)))
    thread.start()
    thread.join()
    assert results[0].finished


def test_progress_bar(llm, capsys):
    llm.generate(["a", "b"], GREEDY)
    assert "2/2" in (err := capsys.readouterr().err)
    assert "toks/s" in err


def test_answers_that_follow_something(llm):
    """Each prompt its own, beside one that is free."""
    free = llm.generate("The quick", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    asked = [Structured("regex", "[a-z]{3}-[0-9]{2}"), Structured("choice", '["yes", "no"]'), None]
    params = [replace(GREEDY, max_tokens=20 if s else 8, structured=s) for s in asked]
    pattern, choice, beside = (o.outputs[0] for o in llm.generate(["The quick"] * 3, params, use_tqdm=False))
    assert re.fullmatch("[a-z]{3}-[0-9]{2}", pattern.text) and pattern.finish_reason == "stop"
    assert choice.text in ("yes", "no") and beside.token_ids == free
    with pytest.raises(ValueError, match=r"^prompts\[1\]: structured cannot be compiled: .*unclosed"):
        llm.generate(["a", "b"], [GREEDY, replace(GREEDY, structured=Structured("regex", "(a"))], use_tqdm=False)


def test_without_tokenizer(model_dir):
    with LLM(str(model_dir), **SMALL, skip_tokenizer_init=True) as llm:
        output = llm.generate([5, 6, 7], GREEDY, use_tqdm=False)[0]
        assert len(output.outputs[0].token_ids) == 8
        assert output.outputs[0].text == ""
        for call in (lambda: llm.generate("text", GREEDY), llm.get_tokenizer, lambda: llm.chat([{"role": "user"}])):
            with pytest.raises(ValueError, match="needs a tokenizer"):
                call()
        with pytest.raises(ValueError, match="stop needs a tokenizer"):
            llm.generate([5], SamplingParams(stop="x"), use_tqdm=False)
        with pytest.raises(ValueError, match="structured needs a tokenizer"):
            llm.generate([5], SamplingParams(structured=Structured("regex", "a")), use_tqdm=False)
        assert not llm.engine.has_work
    with pytest.raises(RuntimeError, match="shut down"):
        llm.generate([5])


@pytest.mark.parametrize("options, message", [
    (dict(attention_impl="mosaic_tpu"), "needs a TPU, but the devices are cpu"),
    (dict(attention_impl="mosaic_gpu"), "needs a GPU"),
    (dict(attention_impl="triton"), "attention_impl must be one of auto, xla"),
    (dict(kv_cache_dtype="int3"), "kv_cache_dtype must be one of auto, bfloat16"),
    (dict(kv_layout="columns"), "kv_layout must be one of auto, token_major"),
    (dict(kv_codec="int3"), "kv_codec must be one of exact, int8, int4, mixed, or"),
    (dict(kv_codec=None), "kv_codec must be a string, got None"),
    (dict(kv_codec="int8,mixed"), "kv_codec must be one of .* for each layer"),
    (dict(kv_codec="exact,int8", kv_cache_dtype="int8"), "kv_codec must be exact with kv_cache_dtype int8"),
])
def test_kernels_and_caches_that_cannot_be(options, message, tmp_path):
    """They are refused before the model is looked for."""
    with pytest.raises(ValueError, match=message):
        LLM(str(tmp_path / "no model"), **options)


@pytest.mark.parametrize("options, message", [
    ({"kv_codec": "int8,int8,int4"}, r"kv_codec: .* or 2 of .* a layer, got 'int8,int8,int4'"),
    ({"page_size": 129}, r"page_size must be at most 128 \(max_model_len is 128\), got 129"),
    ({"page_size": 33, "max_model_len": 20}, r"page_size must be at most 32 \(max_model_len is 20\), got 33"),
    ({"max_model_len": 257}, "max_model_len is 257, but the model's window is 256 tokens"),
])
def test_what_does_not_fit_the_model_is_refused_before_weights_are_read(options, message, model_dir, monkeypatch):
    monkeypatch.setattr(weights, "place", None)
    with pytest.raises(jaxkv.ConfigError, match=message):
        LLM(str(model_dir), **SMALL | options)
    with pytest.raises(TypeError, match="not callable"):
        LLM(str(model_dir), **SMALL | {"page_size": 32, "max_model_len": 20})
