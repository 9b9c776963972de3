"""What moving and computing are learnt to take, by hand."""

import pytest

from jaxkv.cache.costs import Costs
from jaxkv.types import Tier


@pytest.fixture
def costs() -> Costs:
    """A fetch takes 100 ms and 1 ms a page, a token 0.2 ms at any depth; pages of 16."""
    costs = Costs(16)
    for pages in (4, 16, 64):
        costs.fetched(Tier.HOST, pages, 0.1 + 0.001 * pages)
    for tokens in (128, 512):
        costs.stepped(tokens, tokens * (tokens - 1) // 2, 0.0002 * tokens)
    return costs


def test_what_is_said_is_what_was_measured(costs):
    assert costs.fetch_seconds(Tier.HOST, 32) == pytest.approx(0.132)
    assert costs.prefill_seconds(0, 256) == pytest.approx(0.0512)


def test_a_few_pages_are_kept_though_they_alone_are_not_worth_a_fetch(costs):
    assert costs.worth_moving(Tier.HOST, 1024, 1040)  # 1 ms in a longer fetch, 3.2 ms to compute
    assert costs.best_cut(1024, [(Tier.HOST, 1)], 1100) == 0  # 101 ms alone
    assert costs.best_cut(0, [(Tier.HOST, 64), (Tier.HOST, 1)], 1100) == 2  # 165 ms against 208
    for _ in range(400):
        costs.fetched(Tier.HOST, 1, 0.104)
        costs.fetched(Tier.HOST, 21, 0.184)
    assert not costs.worth_moving(Tier.HOST, 1024, 1040)  # 4 ms a page is more than it takes to compute one
