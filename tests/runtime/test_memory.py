import pytest

from jaxkv.config import ConfigError, SchedConfig
from jaxkv.runtime.memory import STAGING_PAGES, _steady, plan_capacity
from jaxkv.types import KVGroup

FULL = KVGroup((0, 1), 2, 16, "float32")
WINDOW = KVGroup((2, 3), 2, 16, "float32", window=32)
SCHED = SchedConfig(max_num_seqs=4, max_num_batched_tokens=64)
PAGE = FULL.page_bytes(16)


def plan(groups, kv=None, host=0, free=(2**30, 2**28), free_host=2**30, length=128):
    return plan_capacity(groups, 16, SCHED, length, kv_cache_memory=kv, host_kv_memory=host, free_device=free,
                         free_host=free_host)


def test_given_size_is_used_to_the_page():
    assert plan([FULL], kv=20 * PAGE + 1) .num_pages == (20,)


def test_without_a_size_no_more_than_the_sequences_can_use():
    assert plan([FULL]).num_pages == (4 * 8,)


def test_one_sequence_is_enough():
    sched = SchedConfig(max_num_seqs=1, max_num_batched_tokens=64)
    capacity = plan_capacity([FULL], 16, sched, 128, kv_cache_memory=None, host_kv_memory=0,
                             free_device=(2**30, 2**28), free_host=2**30)
    assert capacity.num_pages == (9,)


def test_on_cpu_the_pools_and_the_host_tier_share_the_memory():
    with pytest.raises(ConfigError, match="besides the KV pools"):
        plan_capacity([FULL], 16, SCHED, 128, kv_cache_memory=40 * PAGE, host_kv_memory=70 * PAGE,
                      free_device=(100 * PAGE, 90 * PAGE), free_host=100 * PAGE, shared=True)


def test_a_window_group_gets_what_its_windows_can_hold_and_the_rest_goes_to_the_full_one():
    capacity = plan([FULL, WINDOW], kv=200 * PAGE)
    full, window = capacity.num_pages
    assert window == 2 * (4 * (2 + 2) + 4) and full == 200 - window
    assert capacity.pool_bytes == 200 * PAGE


def test_padding_on_the_devices_takes_no_host_memory():
    capacity = plan_capacity([FULL], 16, SCHED, 128, kv_cache_memory=40 * PAGE, host_kv_memory=40 * PAGE,
                             free_device=(2**30, 2**28), free_host=2**30, page_bytes=[2 * PAGE])
    assert (capacity.num_pages, capacity.pool_bytes) == ((20,), 40 * PAGE)
    assert capacity.num_host_pages == (40 - STAGING_PAGES,)


def test_host_tier_keeps_room_for_staging():
    assert plan([FULL], host=40 * PAGE).num_host_pages == (40 - STAGING_PAGES,)
    assert plan([FULL], host=0).num_host_pages == (0,)


@pytest.mark.parametrize("kwargs, words", [
    (dict(kv=8 * PAGE), "max_model_len 128"),
    (dict(kv=2**40), "kv_cache_memory"),
    (dict(host=2**40), "host_kv_memory"),
    (dict(host=5 * PAGE), "staging"),
])
def test_impossible_sizes_name_the_field(kwargs, words):
    with pytest.raises(ConfigError, match=words):
        plan([FULL], **kwargs)


def test_what_max_num_seqs_leaves_is_said_where_no_size_was_given():
    with pytest.raises(ConfigError, match="max_num_seqs 4 leave no more"):
        plan([FULL], free=(2**30, 8 * PAGE))
    with pytest.raises(ConfigError, match="to spare\\)$"):
        plan([FULL], kv=8 * PAGE)


@pytest.mark.parametrize("size, steady", [(0, 0), (7, 7), (2**32, 2**32), (2**32 + 12345, 2**32), (7 * 2**29 + 1, 7 * 2**29)])
def test_default_pools_do_not_follow_every_byte_of_free_memory(size, steady):
    assert _steady(size) == steady
