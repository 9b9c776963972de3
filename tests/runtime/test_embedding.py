"""The hidden state of a prompt: equal to the dense forward's, whatever else is in the batch, however the prompt was cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.device import models
from jaxkv.params import SamplingParams
from tests.engine_harness import engine, executor, greedy, model, run_all
from tests.oracle import dense_attention

EMBED = SamplingParams(max_tokens=1, embed=True)
PROMPTS = [[5, 9, 2, 33, 14, 60, 7, 21], [3], [40, 3, 18, 25, 50, 11] * 9]  # the last one: several chunks beside others


def dense_hidden(prompt):
    spec, params, _ = model(False)

    def attend(layer, q, k, v):
        return dense_attention(q, k, v, scale=spec.scale, window=spec.windows[layer])

    with jax.default_matmul_precision("highest"):
        positions = jnp.arange(len(prompt), dtype=jnp.int32)
        hidden = models.finish(spec, params, *models.forward(spec, params, jnp.asarray(prompt, jnp.int32), positions, attend))
    return np.asarray(hidden[-1])


@pytest.mark.parametrize("overlap", [False, True])
def test_hidden_state_is_the_dense_one_and_others_are_left_alone(overlap, highest_precision):
    free = {f"g{i}": ([7, 8, 9, i], greedy(12, logprobs=1)) for i in range(2)}
    alone = run_all(engine(executor(False), overlap=overlap, budget=24), free)
    run = engine(executor(False), overlap=overlap, budget=24)
    for turn in range(2):  # the second time all but the last token comes from the cache
        requests = {f"e{i}": (prompt, EMBED) for i, prompt in enumerate(PROMPTS)}
        results = run_all(run, dict(list(free.items())[:1]) | requests | dict(list(free.items())[1:]))
        for i, prompt in enumerate(PROMPTS):
            (delta,) = results[f"e{i}"].deltas
            assert delta.token_ids == () and delta.text == "" and delta.finish_reason
            np.testing.assert_allclose(delta.hidden, dense_hidden(prompt), atol=1e-4)
            assert delta.num_cached_tokens == (len(prompt) - 1 if turn else 0)
        assert all(results[name].tokens == alone[name].tokens for name in free)
        assert not any(delta.hidden for name in free for delta in results[name].deltas)
    assert run.metrics.generation_tokens == 2 * 2 * 12, "an embedding is no generated token"


def test_embed_generates_nothing_else():
    for wrong in ({"max_tokens": 2}, {"max_tokens": 1, "n": 2}, {"max_tokens": None}):
        with pytest.raises(ValueError, match="embed needs max_tokens 1"):
            SamplingParams(embed=True, **wrong)
