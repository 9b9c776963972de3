"""Sampling against sort-based numpy references and exact distributions; tiny shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.device import sampling
from jaxkv.device.sampling import SamplingColumns, columns_for
from jaxkv.device.sampling.noise import exponential, row_keys, token_bits
from jaxkv.device.sampling.sampler import NO_TOKEN
from jaxkv.params import MAX_LOGPROBS, SamplingParams
from jaxkv.types import Admit

B = 4  # slots
FLOATS = {"temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}
R, SMALL, LARGE = 8, 12, 200  # one executable per vocabulary serves most tests
sampler = jax.jit(sampling.sample)
admit = jax.jit(sampling.admit, donate_argnums=0)


def step(logits, columns, state, allowed=None):
    """One row of ``allowed`` token ids per row, where it is masked."""
    masks = np.zeros((logits.shape[0], sampling.mask_words(logits.shape[1])), np.uint32)
    for row, tokens in enumerate(allowed or ()):
        for token in tokens or ():
            masks[row, token // 32] |= np.uint32(1 << token % 32)
    return sampler(logits, columns, state, masks.view(np.int32))


def columns(rows):
    """From one dict per row: params, seed, child, position, slot, ban, allowed."""
    table = []
    for r in rows:
        c = columns_for(r.get("params", SamplingParams()), r.get("seed", 1), r.get("child", 0))
        c["flags"] |= 2 * r.get("ban", False) | 8 * ("allowed" in r)
        table.append(c | {"position": r.get("position", 0), "slot": r.get("slot", 0)})
    return SamplingColumns(*(np.array([c[n] for c in table], np.float32 if n in FLOATS else np.int32)
                             for n in SamplingColumns._fields))


def sample(logits, rows, state):
    """Of up to R rows, the rest padding."""
    more = R - len(rows)
    logits = np.concatenate([logits, np.zeros((more, logits.shape[1]), np.float32)])
    tokens, state, logprobs = step(logits, columns(rows + [{"slot": B}] * more), state, [r.get("allowed") for r in rows])
    return np.asarray(tokens)[: len(rows)], state, [np.asarray(a)[: len(rows)] for a in logprobs]


def admitted(state, slot, params, prompt=(), output=(), stop_ids=(), piece=4):
    vocab = state.history.shape[1]
    sequence = Admit(slot, "r", params, 1, 0, len(prompt), (*prompt, *output), stop_ids)
    for args in sampling.admit_pieces(sequence, vocab, piece):
        assert [(a.shape, a.dtype) for a in args] == [(a.shape, a.dtype) for a in sampling.admit_arguments(piece)]
        state = admit(state, *args)
    return state


# -- greedy -------------------------------------------------------------------------------------------------------


def test_temperature_zero_is_greedy_whatever_else_is_set():
    x = np.random.default_rng(0).normal(size=(6, LARGE)).astype(np.float32)
    x[:, 7] = x[:, 30] = 9.0
    greedy = SamplingParams(temperature=0.0, top_k=3, top_p=0.5, min_p=0.2)
    mixed = [{"params": greedy}] * 5 + [{"params": SamplingParams(top_k=2, top_p=0.9)}]
    for rows in ([{"params": greedy}] * 6, mixed):
        assert sample(x, rows, sampling.init_sampler_state(B, LARGE))[0][:5].tolist() == [7] * 5


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 0.01, 1.0, 100.0])
def test_hostile_logits_give_a_token_and_end(temperature):
    x = np.zeros((7, LARGE), np.float32)
    x[0], x[1, 3], x[2], x[3, 5], x[4, 6], x[5] = np.nan, np.nan, -np.inf, np.inf, 3e38, -3e38
    x[6], x[6, 9] = -np.inf, -5.0
    params = SamplingParams(temperature=temperature, top_k=100, top_p=0.7, min_p=0.01)
    tokens = sample(x, [{"params": params}] * 7, sampling.init_sampler_state(B, LARGE))[0]
    assert tokens[0] == NO_TOKEN and np.all((tokens[1:] >= 0) & (tokens[1:] < LARGE))
    assert tokens[2] == 0 and tokens[3] == 5 and tokens[4] == 6 and tokens[6] == 9


# -- masks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [SMALL, LARGE])
@pytest.mark.parametrize("params", [
    SamplingParams(temperature=0.0), SamplingParams(temperature=2.0), SamplingParams(top_k=1), SamplingParams(top_p=0.1),
    SamplingParams(temperature=0.0, logit_bias={3: 100.0}, frequency_penalty=-2.0), SamplingParams(logit_bias={3: 100.0}),
], ids=["greedy", "hot", "top_k", "top_p", "greedy, bias and penalty", "bias"])
def test_only_what_the_mask_allows_is_chosen(vocab, params):
    """Though the logits, a bias and a penalty below zero all speak for token 3."""
    x = np.random.default_rng(2).normal(size=(R, vocab)).astype(np.float32)
    x[:, 3] = 60.0
    state = admitted(sampling.init_sampler_state(B, vocab), 1, params, (3,), (3, 3, 3))
    allowed = [(vocab - 1,), (0, 5, vocab - 2), (7, 8), (1,), (vocab - 1, 2), (10,)]
    rows = [{"params": params, "slot": 1, "position": i, "allowed": ids} for i, ids in enumerate(allowed)]
    tokens, _, logprobs = sample(x[:7], rows + [{"params": SamplingParams(temperature=0.0)}], state)
    assert all(token in ids for token, ids in zip(tokens, allowed))
    assert tokens[6] == 3, "a row without a mask is free"
    if params.temperature == 0.0:
        assert tokens[:6].tolist() == [max(ids, key=lambda t, row=row: x[row, t]) for row, ids in enumerate(allowed)]


def test_masked_rows_sample_the_distribution_of_what_is_left():
    n, vocab, allowed = 20_000, 12, [1, 4, 6, 11]
    logits = (np.random.default_rng(3).normal(size=vocab) * 2).astype(np.float32)
    logits[2] = 200.0  # the best token is far away and not allowed
    c = columns([{"params": SamplingParams(), "allowed": allowed}])
    c = SamplingColumns(*(np.repeat(a, n) for a in c))._replace(position=np.arange(n, dtype=np.int32))
    tokens = np.asarray(step(np.tile(logits, (n, 1)), c, sampling.init_sampler_state(B, vocab), [allowed] * n)[0])
    p = np.exp(logits[allowed].astype(np.float64))
    counts = np.bincount(tokens, minlength=vocab)
    assert counts[allowed].sum() == n
    chi = np.sum((counts[allowed] - n * p / p.sum()) ** 2 / (n * p / p.sum()))
    assert chi < 3 + 4 * np.sqrt(6)


def test_logprobs_are_those_of_the_raw_distribution_under_a_mask():
    x = np.random.default_rng(5).normal(size=(1, LARGE)).astype(np.float32)
    rows = [{"params": SamplingParams(temperature=0.0, logprobs=3), "allowed": [int(x[0].argmin())]}]
    tokens, _, (logprob, rank, top, _) = sample(x, rows, sampling.init_sampler_state(B, LARGE))
    assert tokens[0] == x[0].argmin() and rank[0] == LARGE and top[0, 0] == x[0].argmax()
    assert logprob[0] == pytest.approx(x[0].min() - np.log(np.exp(x[0]).sum()), abs=1e-4)


# -- noise --------------------------------------------------------------------------------------------------------


def keys(seed, child, position):
    lo, hi, child, position = (np.asarray(a, np.int64) for a in (seed & 0xFFFFFFFF, seed >> 32, child, position))
    shape = np.broadcast_shapes(lo.shape, child.shape, position.shape)
    return jax.jit(row_keys)(*(np.broadcast_to(a, shape).astype(np.uint32).view(np.int32)
                               for a in (lo, hi, child, position)))


def test_noise_is_the_same_bits_in_any_batch():
    seed, child, position = np.array([3, 3, 3, -1, 2**40, 7, 7, 0]), np.arange(8) % 3, np.arange(8) * 1000
    order = np.random.default_rng(0).permutation(8)
    whole = jax.jit(exponential, static_argnums=1)(keys(seed, child, position), 501)
    moved = jax.jit(exponential, static_argnums=1)(keys(seed[order], child[order], position[order]), 501)
    np.testing.assert_array_equal(np.asarray(whole)[order], moved)
    for i in range(8):
        one = jax.jit(exponential, static_argnums=1)(keys(seed[i : i + 1], child[i : i + 1], position[i : i + 1]), 501)
        np.testing.assert_array_equal(np.asarray(whole)[i], np.asarray(one)[0])


def test_row_keys_are_those_of_jax_random():
    seed, child, position = np.array([3, -1, 2**40 + 7, -(2**63), 0]), np.array([0, 1, 2**31 - 1, 5, 0]), np.arange(5) * 999
    for i, row in enumerate(np.asarray(keys(seed, child, position))):
        words = np.array([seed[i] & 0xFFFFFFFF, seed[i] >> 32 & 0xFFFFFFFF], np.uint32)
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        want = jax.random.fold_in(jax.random.fold_in(key, child[i]), position[i])
        np.testing.assert_array_equal(row, jax.random.key_data(want))


def test_noise_depends_on_every_part_of_its_key():
    seed = np.array([5, 6, 5 + 2**32, 5, 5], np.int64)
    k = np.asarray(keys(seed, np.array([0, 0, 0, 1, 0]), np.array([0, 0, 0, 0, 1])))
    bits = np.asarray(token_bits(jnp.asarray(k), 64))
    assert len({b.tobytes() for b in bits}) == 5
    agree = [np.mean((bits[0] ^ b)[:, None] >> np.arange(32, dtype=np.uint32) & 1) for b in bits[1:]]
    assert all(abs(a - 0.5) < 0.05 for a in agree)  # 2048 bits each: 0.05 is 4.5 sigma


@pytest.mark.parametrize("along", ["tokens", "positions", "seeds"])
def test_noise_is_exponential_and_uncorrelated(along):
    rows, vocab = {"tokens": (4, 50_000), "positions": (50_000, 4), "seeds": (50_000, 4)}[along]
    i = np.arange(rows)
    part = {"tokens": "child", "positions": "position", "seeds": "seed"}[along]
    k = keys(**({"seed": 0 * i + 11, "child": 0 * i, "position": 0 * i} | {part: i}))
    e = np.asarray(exponential(k, vocab), np.float64)
    assert np.all(np.isfinite(e)) and e.min() > 0
    u = np.exp(-e)
    sorted_u = np.sort(u.ravel())
    ks = np.abs(sorted_u - (np.arange(u.size) + 0.5) / u.size).max() * np.sqrt(u.size)
    assert ks < 1.95  # p = 0.001
    counts = np.histogram(u, 256, (0, 1))[0]
    chi = np.sum((counts - u.size / 256) ** 2) / (u.size / 256)
    assert chi < 255 + 3.3 * np.sqrt(2 * 255)
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)


# -- distribution -------------------------------------------------------------------------------------------------


def reference_probabilities(logits, params):
    """float64, and how far the mass is from a tie at top_p; equal tokens are kept or dropped together."""
    z = logits.astype(np.float64) / params.temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    keep = p >= params.min_p * p.max()
    if 0 < params.top_k < len(p):
        keep &= p >= np.sort(p)[-params.top_k]
    margin = np.inf
    if params.top_p < 1:
        order = np.argsort(-p, kind="stable")
        cumulative = np.cumsum(np.where(keep, p, 0)[order])
        target = params.top_p * cumulative[-1]
        margin = np.abs(cumulative - target).min()
        keep &= p >= p[order][np.argmax(cumulative >= target)]
    p = np.where(keep, p, 0)
    return p / p.sum(), margin


@pytest.mark.parametrize("params", [
    SamplingParams(),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=2.0, top_k=5),
    SamplingParams(top_p=0.8),
    SamplingParams(min_p=0.1),
    SamplingParams(temperature=1.5, top_k=9, top_p=0.9, min_p=0.02),
], ids=["plain", "cold", "top_k", "top_p", "min_p", "all"])
def test_samples_follow_the_distribution(params):
    n, vocab = 20_000, 16
    logits = (np.random.default_rng(3).normal(size=vocab) * 2).astype(np.float32)
    c = columns([{"params": params}])
    c = SamplingColumns(*(np.repeat(a, n) for a in c))._replace(position=np.arange(n, dtype=np.int32))
    tokens = np.asarray(step(np.tile(logits, (n, 1)), c, sampling.init_sampler_state(B, vocab))[0])
    p, margin = reference_probabilities(logits, params)
    assert margin > 1e-5
    counts = np.bincount(tokens, minlength=vocab)
    assert np.all(counts[p == 0] == 0)
    likely = p * n >= 5
    expected = np.append(p[likely], 1 - p[likely].sum()) * n
    observed = np.append(counts[likely], n - counts[likely].sum())
    keep = expected > 1
    chi = np.sum((observed - expected)[keep] ** 2 / expected[keep])
    freedom = keep.sum() - 1
    assert chi < freedom + 4 * np.sqrt(2 * freedom) + 4


def test_the_winner_is_the_best_race_among_the_kept():
    """Truncation only ever removes tokens: what wins untruncated and is kept still wins."""
    logits = (np.random.default_rng(1).normal(size=(64, 300)) * 3).astype(np.float32)
    state = sampling.init_sampler_state(B, 300)
    free = np.asarray(step(logits, columns([{"position": i} for i in range(64)]), state)[0])
    for params in (SamplingParams(top_p=0.7), SamplingParams(top_k=90), SamplingParams(top_k=80, top_p=0.9)):
        cut = np.asarray(step(logits, columns([{"params": params, "position": i} for i in range(64)]), state)[0])
        kept = np.array([reference_probabilities(r, params)[0] > 0 for r in logits])
        assert np.all(kept[np.arange(64), cut])
        inside = kept[np.arange(64), free]
        assert 5 < inside.sum() < 64
        np.testing.assert_array_equal(cut[inside], free[inside])


def test_sampled_and_greedy_rows_with_penalties_share_a_batch():
    """Greedy rows race on what penalties left of their logits, whether or not another row is random."""
    logits = np.random.default_rng(4).normal(size=(3, LARGE)).astype(np.float32)
    logits[:2, 3], logits[:2, 8] = 9.0, 8.5
    params = SamplingParams(temperature=0.0, presence_penalty=1.0)
    state = admitted(sampling.init_sampler_state(B, LARGE), 2, params, (1,), (3,))
    rows = [{"params": params, "slot": 2}, {"params": SamplingParams(temperature=0.0)}]
    assert sample(logits[:2], rows, state)[0].tolist() == [8, 3]
    assert sample(logits, rows + [{"params": SamplingParams(top_p=0.5)}], state)[0][:2].tolist() == [8, 3]


def test_a_row_samples_the_same_alone_and_in_company():
    logits = (np.random.default_rng(2).normal(size=(8, LARGE)) * 2).astype(np.float32)
    state = admitted(sampling.init_sampler_state(B, LARGE), 2, SamplingParams(presence_penalty=1.0), (1, 2), (3,))
    choices = [SamplingParams(), SamplingParams(top_k=70), SamplingParams(top_p=0.5), SamplingParams(temperature=0.0),
               SamplingParams(presence_penalty=1.0), SamplingParams(min_p=0.1, logprobs=3),
               SamplingParams(temperature=3.0), SamplingParams(temperature=0.3, top_k=4, top_p=0.6)]
    rows = [{"params": p, "seed": 2**50 + i, "child": i % 3, "position": 9 * i, "slot": 2 if p.needs_slot_state else 1}
            for i, p in enumerate(choices)]
    together = sample(logits, rows, state)[0]
    backwards = sample(logits[::-1], rows[::-1], state)[0][::-1]
    alone = [int(step(logits[i : i + 1], columns(rows[i : i + 1]), state)[0][0]) for i in range(8)]
    assert together.tolist() == backwards.tolist() == alone


# -- slot state ---------------------------------------------------------------------------------------------------


def test_penalties_bias_and_counts_match_a_plain_loop():
    rng = np.random.default_rng(5)
    vocab, steps = SMALL, 30
    params = SamplingParams(temperature=0.0, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3,
                            logit_bias=((2, 1.5), (11, -2.0), (2, 0.5)))
    prompt, output = (0, 3, 3, 5, 0, 1), [4, 3, 4]
    state = admitted(sampling.init_sampler_state(B, vocab), 1, SamplingParams(presence_penalty=1.0), (7, 7), (8,) * 9)
    state = admitted(state, 1, params, prompt, output)  # what the slot knew before is gone
    for _ in range(steps):
        logits = rng.normal(size=vocab).astype(np.float32)
        x = logits.copy()
        for t, b in params.logit_bias:
            x[t] += np.float32(b)
        for t in {*prompt, *output}:
            x[t] = x[t] / np.float32(1.3) if x[t] > 0 else x[t] * np.float32(1.3)
        for t in set(output):
            x[t] -= np.float32(0.3) * output.count(t) + np.float32(0.4)
        tokens, state, _ = sample(np.stack([logits, logits]), [{"params": params, "slot": 1},
                                  {"params": SamplingParams(temperature=0.0), "slot": 2}], state)
        assert tokens.tolist() == [int(np.argmax(x)), int(np.argmax(logits))]
        output.append(int(tokens[0]))
    history = np.asarray(state.history)
    assert history[1].tolist() == [output.count(t) + (t in prompt) * 2**30 for t in range(vocab)]
    assert not history[[0, 2, 3]].any()


def test_stop_ids_are_banned_only_while_asked_and_only_in_their_slot():
    params = SamplingParams(temperature=0.0, min_tokens=5)
    state = admitted(sampling.init_sampler_state(B, SMALL), 3, params, (1,), (), stop_ids=(4, 2))
    logits = np.zeros((3, SMALL), np.float32)
    logits[:, 4], logits[:, 2], logits[:, 6] = 3, 2, 1
    rows = [{"params": params, "slot": 3, "ban": True}, {"params": params, "slot": 3},
            {"params": params, "slot": 0, "ban": True}]
    assert sample(logits, rows, state)[0].tolist() == [6, 4, 4]


def test_rows_without_slot_state_ignore_what_a_slot_remembers():
    params = SamplingParams(temperature=0.0, logit_bias=((5, 100.0),), presence_penalty=2.0)
    state = admitted(sampling.init_sampler_state(B, SMALL), 0, params, (1,), (2,))
    logits = np.tile(np.arange(SMALL, dtype=np.float32), (3, 1))
    rows = [{"params": params, "slot": 0}, {"params": SamplingParams(temperature=0.0), "slot": 0},
            {"params": params, "slot": B}]
    tokens, after, _ = sample(logits, rows, state)
    assert tokens.tolist() == [5, 11, 11]
    assert int(after.history[0, 5]) == 1 and int(jnp.sum(after.history)) == int(jnp.sum(state.history)) + 1


def test_ids_outside_the_vocabulary_are_left_out():
    params = SamplingParams(temperature=0.0, logit_bias=((SMALL, 50.0), (3, 1.0)))
    state = admitted(sampling.init_sampler_state(B, SMALL), 0, params, (1, 400), (-1,), stop_ids=(77,))
    assert np.asarray(state.history[0]).tolist() == [0, 2**30] + [0] * (SMALL - 2)
    assert int(sample(np.zeros((1, SMALL), np.float32), [{"params": params, "ban": True}], state)[0][0]) == 3


def test_the_state_is_updated_in_place_and_nothing_is_compiled_twice(as_shipped):
    vocab = 257
    state = sampling.init_sampler_state(B, vocab)
    donating = jax.jit(sampling.sample, donate_argnums=2)
    rows = columns([{"slot": i} for i in range(3)])
    logits = np.zeros((3, vocab), np.float32)
    masks = np.zeros((3, sampling.mask_words(vocab)), np.int32)
    compiled = donating.lower(logits, rows, state, masks).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= state.history.nbytes
    for params in (SamplingParams(), SamplingParams(top_k=3, logprobs=2), SamplingParams(presence_penalty=1.0)):
        _, state, _ = donating(logits, columns([{"params": params, "slot": i} for i in range(3)]), state, masks)
    assert donating._cache_size() == 1


# -- log-probabilities --------------------------------------------------------------------------------------------


def reference_logprobs(logits, tokens):
    x = logits.astype(np.float64)
    lp = x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True)
    chosen = lp[np.arange(len(x)), tokens]
    order = np.argsort(-x, axis=1, kind="stable")[:, :MAX_LOGPROBS]
    return chosen, 1 + (logits > logits[np.arange(len(x)), tokens][:, None]).sum(1), order, np.take_along_axis(
        lp, order, 1)


def test_logprobs_are_of_the_raw_distribution():
    logits = np.random.default_rng(0).integers(-6, 6, (5, LARGE)).astype(np.float32)
    params = SamplingParams(temperature=0.3, top_k=2, presence_penalty=2.0, logprobs=4)
    state = admitted(sampling.init_sampler_state(B, LARGE), 0, params, (1,), (2, 3))
    tokens, _, got = sample(logits, [{"params": params, "position": i} for i in range(5)], state)
    chosen, rank, ids, top = reference_logprobs(logits, tokens)
    np.testing.assert_allclose(got[0], chosen, atol=1e-5)
    np.testing.assert_array_equal(got[1], rank)
    np.testing.assert_array_equal(got[2], ids)
    np.testing.assert_allclose(got[3], top, atol=1e-5)


def test_logprobs_are_zeros_when_nobody_asks_and_padded_when_the_vocabulary_is_small():
    state = sampling.init_sampler_state(B, SMALL)
    logits = np.zeros((2, SMALL), np.float32)
    asks = {"params": SamplingParams(logprobs=0)}
    assert not any(np.any(a) for a in sample(logits, [{}, {}], state)[2])
    assert not any(np.any(a) for a in sample(logits, [asks | {"slot": B}, {}], state)[2])
    _, _, (logprob, _, ids, top) = sample(logits, [{}, asks], state)
    assert ids.shape == (2, MAX_LOGPROBS) and ids[1].tolist() == [*range(SMALL), *[-1] * (MAX_LOGPROBS - SMALL)]
    np.testing.assert_allclose(logprob[1], -np.log(SMALL), rtol=1e-6)
    assert np.all(top[1, SMALL:] == -np.inf)


@pytest.mark.parametrize("tokens,rows", [(1, 64), (7, 64), (16, 4), (18, 4)])
@pytest.mark.parametrize("wanted", ["none", "some", "all"])
def test_prompt_logprobs_equal_the_dense_ones(tokens, rows, wanted, as_shipped):
    rng = np.random.default_rng(tokens)
    vocab, d = 50, 6
    hidden, w = rng.normal(size=(tokens, d)).astype(np.float32), rng.normal(size=(d, vocab)).astype(np.float32)
    targets = rng.integers(0, vocab, tokens).astype(np.int32)
    targets[{"none": slice(None), "some": rng.random(tokens) < 0.7, "all": slice(0)}[wanted]] = -1
    op = jax.jit(lambda h, t, w: sampling.prompt_logprobs((h,), t, lambda x: x @ w, rows))
    got = op(hidden, targets, w)
    on = targets >= 0
    chosen, rank, ids, top = reference_logprobs(hidden @ w, np.maximum(targets, 0))
    np.testing.assert_allclose(np.asarray(got.logprob)[on], chosen[on], atol=1e-4)
    np.testing.assert_array_equal(np.asarray(got.rank)[on], rank[on])
    np.testing.assert_array_equal(np.asarray(got.top_ids)[on], ids[on])
    np.testing.assert_allclose(np.asarray(got.top_logprobs)[on], top[on], atol=1e-4)
    if tokens > rows:
        assert f"[{tokens},{vocab}]" not in op.lower(hidden, targets, w).compile().as_text()


# -- host ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 2**32])
def test_columns_carry_the_whole_seed(seed):
    c = columns_for(SamplingParams(logprobs=0, presence_penalty=0.1), seed, 3)
    assert ((c["seed_hi"] & 0xFFFFFFFF) << 32 | c["seed_lo"] & 0xFFFFFFFF) == seed % 2**64
    assert c["child"] == 3 and c["flags"] == 5 and columns_for(SamplingParams(), 0, 0)["flags"] == 0
    assert {*c, "position", "slot"} == set(SamplingColumns._fields)
