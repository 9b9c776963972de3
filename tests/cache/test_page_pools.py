import pytest

from jaxkv.cache.pages import PagePool, WindowPool


def test_free_list_is_deterministic():
    pool = PagePool(4)
    assert [pool.take(), pool.take()] == [0, 1] and (pool.free, pool.used) == (2, 2)
    pool.give(0)
    assert pool.take_many(2) == [0, 2]
    assert pool.take_many(0) == [] and pool.take() == 3
    with pytest.raises(IndexError):
        pool.take()


def test_take_many_equals_take():
    a, b = PagePool(9), PagePool(9)
    assert a.take_many(5) == [b.take() for _ in range(5)] and a.free_pages() == b.free_pages()
    with pytest.raises(AssertionError):
        a.take_many(5)


def test_idle_pages_leave_in_order_of_release():
    pool, node = WindowPool(4), object()
    for page in pool.take_many(3):
        pool.adopt(page, node, 1)
    pool.share(1)
    for page in (2, 1, 0):
        pool.unshare(page)
    assert list(pool.idle) == [2, 0] and pool.users[1] == 1
    pool.share(2)
    pool.unshare(2)
    assert pool.oldest_idle() == 0
    pool.disown(0)
    pool.give(0)
    assert list(pool.idle) == [2] and pool.free == 2 and 0 not in pool.owner
