"""Values of a batch that kernels would clip are refused on the host."""

import re

import numpy as np
import pytest

import pallas_kernels as pk
from tests.pallas_kernels.paged import make_case

CASE = dict(q_lens=(1, 5, 0, 3), kv_lens=(33, 5, 7, 40), tokens=12)


def arrays(**options):
    case = make_case(**CASE, **options)
    sizes = dict(num_pages=case.pool.shape[0], page_size=16, window=options.get("window"))
    return case.page_table.copy(), case.kv_lens.copy(), case.cu_q_lens.copy(), sizes


@pytest.mark.parametrize("window", [None, 9])
def test_what_no_query_sees_may_hold_anything(window):
    *batch, sizes = arrays(window=window)
    assert (batch[0] < 0).any() or (batch[0] >= sizes["num_pages"]).any()
    pk.check_batch(*batch, **sizes)


@pytest.mark.parametrize("page", [-1, 999])
@pytest.mark.parametrize("seq, index", [(0, 2), (1, 0), (3, 1)])
def test_a_page_out_of_the_pool(seq, index, page):
    table, kv_lens, cu, sizes = arrays()
    table[seq, index] = page
    with pytest.raises(ValueError, match=rf"sequence {seq}: page {index} .* in \[0, {sizes['num_pages']}\), got {page}"):
        pk.check_batch(table, kv_lens, cu, **sizes)


@pytest.mark.parametrize("seq, length", [(0, 1000), (1, 4), (3, 0)])
def test_a_length_that_does_not_fit_its_table(seq, length):
    table, kv_lens, cu, sizes = arrays()
    kv_lens[seq] = length
    q_len, room = int(np.diff(cu)[seq]), table.shape[1] * 16
    with pytest.raises(ValueError, match=re.escape(f"sequence {seq}: kv_len must be in") + f".*{q_len}, {room}.*got {length}"):
        pk.check_batch(table, kv_lens, cu, **sizes)


@pytest.mark.parametrize("cu", [[1, 1, 6, 6, 9], [0, 6, 1, 6, 9]])
def test_rows_that_do_not_ascend(cu):
    table, kv_lens, _, sizes = arrays()
    with pytest.raises(ValueError, match="cu_q_lens must ascend from 0"):
        pk.check_batch(table, kv_lens, np.array(cu, np.int32), **sizes)
