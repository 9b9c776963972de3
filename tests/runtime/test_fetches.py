"""Fetches: who waits for one sleeps until it has ended."""

import time

import jax
import jax.numpy as jnp
import pytest

from jaxkv.runtime.fetches import Fetches
from jaxkv.types import Fetch, PageMove, Tier


class Slow(Fetches):
    """The watcher hears late that the copies are there, as on a loaded machine."""

    fails = False

    def _watch(self, flight):
        time.sleep(0.2)
        if self.fails:
            self._fail(flight)
        else:
            super()._watch(flight)


@pytest.mark.parametrize("fails", [False, True])
def test_one_wait_is_enough(fails):
    fetches = Slow([64], jax.sharding.SingleDeviceSharding(jax.devices()[0]), None)
    fetches.fails = fails
    move = PageMove(0, (Tier.HOST, 3), (Tier.HBM, 5), last=True)
    fetches.start(Fetch(7, (move,), ()), {(0, 3): jnp.arange(16.0)})
    assert fetches.busy and not fetches.arrivals()
    t0 = time.monotonic()
    fetches.wait(10.0)
    assert 0.1 < time.monotonic() - t0 < 5.0
    arrival, = fetches.arrivals()
    assert (arrival.fetch_id, arrival.ok) == (7, not fails) and not fetches.busy
    landed = fetches.land(7, wanted=arrival.ok)
    assert not landed if fails else landed[0][0] == [move]


def test_nobody_waits_for_nothing():
    fetches = Fetches([64], jax.sharding.SingleDeviceSharding(jax.devices()[0]), None)
    t0 = time.monotonic()
    fetches.wait(10.0)
    assert time.monotonic() - t0 < 1.0


def test_a_wait_has_an_end():
    fetches = Slow([64], jax.sharding.SingleDeviceSharding(jax.devices()[0]), None)
    fetches.start(Fetch(0, (PageMove(0, (Tier.HOST, 0), (Tier.HBM, 0), last=True),), ()), {(0, 0): jnp.zeros(4)})
    fetches.wait(0.01)
    assert fetches.busy and not fetches.arrivals()
