"""How long a chunk is: padding of steps."""

from hypothesis import given
from hypothesis import strategies as st
from sched_driver import Driver, request

from jaxkv.sched.chunking import STEP_TOKENS, excess_tokens

SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048)


def test_a_few_tokens_more_than_a_size_wait_for_the_next_step():
    assert excess_tokens(528, 400, SIZES) == 16  # 512 and 16 instead of 1,024
    assert excess_tokens(700, 700, SIZES) == 188  # 512 and 256 instead of 1,024
    assert excess_tokens(824, 824, SIZES) == 0  # 512 and 512 are no less than 1,024
    assert excess_tokens(528, 10, SIZES) == 0  # the others have more than 512 already
    assert excess_tokens(528, 528, ()) == 0  # nothing is padded
    assert excess_tokens(50, 50, SIZES) == 0  # a step more costs more than it saves


@given(total=st.integers(1, 2048), last=st.integers(0, 2048), sizes=st.sets(st.sampled_from(SIZES)))
def test_two_steps_are_cheaper_or_nothing_is_left(total, last, sizes):
    sizes = tuple(sorted(sizes | {2048}))
    excess = excess_tokens(total, last, sizes)
    padded = lambda n: next(s for s in sizes if s >= n)  # noqa: E731
    assert 0 <= excess <= min(last, total - 1)
    if excess:
        assert padded(total - excess) + padded(excess) + STEP_TOKENS < padded(total)


def test_scheduler_leaves_the_excess_of_the_last_prompt():
    driver = Driver(pages=200, page_size=16, max_model_len=1024, budget=1024, max_num_seqs=4, step_sizes=SIZES)
    driver.add(request("a", range(260), 4), request("b", range(300, 570), 4))  # 530 tokens
    driver.run()
    assert [p.num_tokens for p in driver.plans[:3]] == [512, 1 + 18, 2]
    driver.add(request("c", range(600, 1000), 8))
    driver.step()
    driver.add(request("d", range(2000, 2650), 8))
    driver.run()
    assert 513 not in {p.num_tokens for p in driver.plans} and 512 in {p.num_tokens for p in driver.plans[4:]}
    driver.check_outputs()
