"""The oracle of ``test_oracle`` for the other families: their positions, windows and norms through the paged engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxkv import LLM, SamplingParams
from jaxkv.device.spec import kv_groups
from jaxkv.runtime.memory import STAGING_PAGES
from jaxkv.runtime.weights import load_model
from tests.device.models.test_parity import CASES, make_model, tp_mesh
from tests.engine_harness import few_shapes
from tests.oracle import DenseOracle

PAGE, PAGES, HOST_PAGES, CHUNK, MAX_LEN = 4, 20, 60, 16, 64
NEAR_TIE = 1e-4


def prompts() -> list[list[int]]:
    """Longer than a chunk, with prefixes in common that end inside a page."""
    rng = np.random.default_rng(5)
    base = rng.integers(3, 99, 40).tolist()
    return [base[:shared] + rng.integers(3, 99, own).tolist() for shared, own in ((18, 7), (33, 4), (39, 2), (0, 21), (26, 9))]


@pytest.mark.parametrize("case", ["gpt2", "opt", "mistral-window", "qwen2-layer-types", "qwen3"])
def test_greedy_tokens_are_those_of_a_dense_forward(case: str, tmp_path: Path, monkeypatch, highest_precision) -> None:
    make_model(*CASES[case]).save_pretrained(tmp_path)
    dense = load_model(str(tmp_path), tp_mesh(1))
    oracle = DenseOracle(dense.spec, dense.params)
    page_bytes = sum(g.page_bytes(PAGE) for g in kv_groups(dense.spec, 1, "float32"))
    monkeypatch.setattr("jaxkv.runtime.executor.batch_shapes", few_shapes)  # compiling one takes seconds
    params = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)
    with LLM(str(tmp_path), skip_tokenizer_init=True, dtype="float32", max_model_len=MAX_LEN, max_num_seqs=3, page_size=PAGE,
             max_num_batched_tokens=CHUNK, kv_cache_memory=PAGES * page_bytes,
             host_kv_memory=(HOST_PAGES + STAGING_PAGES) * page_bytes) as llm:
        first = llm.generate(prompts(), params, use_tqdm=False)
        turns = [[*out.prompt_token_ids, *out.outputs[0].token_ids, 7, 8] for out in first]
        second = llm.generate(turns, SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), use_tqdm=False)
        llm.engine.check()
        m = llm.engine.metrics
        assert m.evictions["demoted"] > 0 and m.promotions > 0, "pages go to the host and come back"
        assert (m.preemptions > 0) == (None in dense.spec.windows), "what forgets all that it cannot see fits side by side"
    wrong = total = 0
    for out in first + second:
        tokens = list(out.outputs[0].token_ids)
        expected, gaps = oracle.teacher_forced(list(out.prompt_token_ids), tokens)
        differ = expected != np.array(tokens)
        assert (gaps[differ] < NEAR_TIE).all(), f"{tokens} but dense {expected.tolist()}, gaps {gaps}"
        wrong, total = wrong + int(differ.sum()), total + len(tokens)
    assert total == 5 * (14 + 5) and wrong <= 1
