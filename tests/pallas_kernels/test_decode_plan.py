"""The work list of attention on Hopper: every key of every sequence exactly once, evenly spread, shared prefixes read once."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.ragged_paged_attention.mosaic_gpu import plan as plans

PAGE = 16


def spec_of(seqs, tokens, *, groups=4, kv_heads=8, page_size=PAGE, max_q_len=None):
    return plans.plan_spec(tokens, seqs, q_heads=groups * kv_heads, kv_heads=kv_heads, head_dim=128, page_size=page_size,
                           kv_dtype="bfloat16", max_q_len=max_q_len)


def lognormal_lengths(seqs):
    return np.clip(np.exp(np.random.default_rng(seqs).normal(np.log(8192), 1, seqs)), 1024, 131072).astype(np.int32)


def reads(spec, made, window=None):
    """What each token's rows read: token -> list of (first key, end, reader, sees all). Asserts each item has one worker."""
    owners = np.zeros(len(made.items), int)
    for begin, end in zip(made.worker_items[:-1], made.worker_items[1:]):
        owners[begin:end] += 1
    real = made.items[:, 4] > made.items[:, 3]
    assert (owners[real] == 1).all() and (owners[~real] <= 1).all()
    seen = {}
    for item in made.items[real]:
        for row in made.row_token[item[0] : item[0] + 8 * item[1]]:
            if row >= 0 and row % spec.groups == 0:
                seen.setdefault(row // spec.groups, []).append((item[3], item[4], item[2], item[6] == 0))
    return seen


@pytest.mark.parametrize("seqs", [1, 2, 5, 16, 64, 256])
def test_work_is_balanced_over_132_multiprocessors(seqs):
    kv_lens = lognormal_lengths(seqs)
    spec = spec_of(seqs, seqs, max_q_len=1)
    made = plans.unpack(plans.make_plan(spec, np.ones(seqs, int), kv_lens), spec)
    pages = -(-(made.items[:, 4] - made.items[:, 3]) // PAGE)
    work = np.array([pages[a:b].sum() for a, b in zip(made.worker_items[:-1], made.worker_items[1:])])
    total = (-(-kv_lens // PAGE)).sum()
    assert work.sum() == total
    assert work.max() == -(-total // spec.workers), "no worker may have more than one page above the mean"
    blocks = 2 * 132  # two to a multiprocessor, idle ones count
    assert work.max() / (total * 8 / blocks) <= 1.1


@settings(max_examples=10)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 900)), min_size=1, max_size=12),
       st.sampled_from([None, 1, 37, 500]), st.sampled_from([8, 16, 256]), st.sampled_from([1, 4, 6]), st.booleans())
def test_every_key_is_read_once_by_the_right_kernel(lengths, window, page_size, groups, on_device):
    q_lens = np.array([q for q, _ in lengths])
    kv_lens = np.array([q + past if q else 7 for q, past in lengths])
    seqs, tokens = len(lengths) + 2, int(q_lens.sum()) + 5
    spec = spec_of(seqs, tokens, groups=groups, page_size=page_size)
    if on_device:
        cu = np.concatenate([[0], np.cumsum(np.append(q_lens, [0, 0]))]).astype(np.int32)
        made = jax.jit(plans.device_plan, static_argnums=(0, 3))(spec, cu, np.append(kv_lens, [3, 0]).astype(np.int32), window)
        made = plans.Plan(*(np.asarray(x) for x in made))
    else:
        packed = plans.make_plan(spec, q_lens, kv_lens, window=window)
        assert packed.dtype == np.int32 and packed.shape == (plans.plan_size(spec),)
        made = plans.unpack(packed, spec)
        places = [part.__array_interface__["data"][0] - packed.__array_interface__["data"][0] for part in made if part.size]
        assert all(place % 256 == 0 for place in places), "XLA may pass a part as a pointer into the plan"
    seen, first = reads(spec, made), 0
    long_rows = {}
    for seq, token, rows, _ in made.prefill[made.prefill[:, 2] > 0]:
        long_rows.setdefault(seq, []).extend(range(token, token + rows))
    for s, (q, kv) in enumerate(zip(q_lens, kv_lens)):
        rows = range(first, first + q)
        if 0 < q <= spec.own_tokens:
            assert s not in long_rows
            low = 0 if window is None else max(0, kv - q - window + 1) // spec.unit_keys * spec.unit_keys
            for i, token in enumerate(rows):
                parts = sorted(seen[token])
                assert parts[0][0] == low and parts[-1][1] == kv and all(a[1] == b[0] for a, b in zip(parts, parts[1:]))
                assert {p[2] for p in parts} == {s}
                assert made.token_slot[token] == s * plans.TILE_ROWS + i * groups
        else:
            assert long_rows.get(s, []) == list(rows)
            assert not any(token in seen for token in rows) and (made.token_slot[list(rows)] == -1).all()
        first += q
    assert (made.token_slot[first:] == -1).all()
    out_rows = [(item[7], item[7] + 8 * item[1]) for item in made.items if item[4] > item[3]]
    assert all(a[1] <= b[0] for a, b in zip(sorted(out_rows), sorted(out_rows)[1:]))
    assert all(end <= spec.partial_rows for _, end in out_rows)


def test_a_shared_prefix_is_read_once():
    rng = np.random.default_rng(0)
    table = rng.permutation(40 * 64).reshape(40, 64).astype(np.int32)
    sharers = rng.permutation(40)[:30]
    table[sharers, :20] = table[sharers[0], :20]
    kv_lens = rng.integers(330, 1000, 40)
    spec = spec_of(40, 40, max_q_len=1)
    made = plans.unpack(plans.make_plan(spec, np.ones(40, int), kv_lens, page_table=table, page_size=PAGE), spec)
    seen = reads(spec, made)
    for s in range(40):
        parts = sorted(seen[s])
        assert parts[0][0] == 0 and parts[-1][1] == kv_lens[s] and all(a[1] == b[0] for a, b in zip(parts, parts[1:]))
        for low, high, reader, whole in parts:
            pages = slice(low // PAGE, -(-high // PAGE))
            np.testing.assert_array_equal(table[reader, pages], table[s, pages])
            assert whole == (s in sharers and high <= 320)
    pages = -(-(made.items[:, 4] - made.items[:, 3]) // PAGE)
    alone = (-(-kv_lens // PAGE)).sum()
    assert pages.sum() == alone - 30 * 20 + 2 * 20, "two tiles of at most 16 members read the prefix"


def test_tables_that_agree_only_in_the_middle_share_nothing():
    table = np.arange(8 * 32).reshape(8, 32).astype(np.int32)
    table[:, 1:20] = table[0, 1:20]
    spec = spec_of(8, 8, max_q_len=1)
    args = spec, np.ones(8, int), np.full(8, 400)
    np.testing.assert_array_equal(plans.make_plan(*args, page_table=table, page_size=PAGE), plans.make_plan(*args))


def test_a_plan_for_another_batch_is_an_error():
    spec = spec_of(4, 8)
    with pytest.raises(ValueError, match=r"plan must be int32 \[\d+\].*\(3,\)"):
        plans.unpack(np.zeros(3, np.int32), spec)
    with pytest.raises(NotImplementedError, match="got 65"):
        spec_of(4, 8, groups=65)
