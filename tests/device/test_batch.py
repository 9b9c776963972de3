import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxkv.device.batch import FIELDS, BatchLayout, BatchShape, batch_shapes, choose_shape, step_sizes


def test_buffer_round_trip_through_the_jit():
    layout = BatchLayout(BatchShape(8, 3, 2), groups=2, pages_per_seq=4, plan_words=5)
    buffer, columns = layout.new()
    rng = np.random.default_rng(0)
    for view in columns.values():
        view[...] = rng.integers(-9, 9, view.shape) if view.dtype == np.int32 else rng.normal(size=view.shape)
    out = jax.jit(layout.unpack)(buffer)
    assert set(out) == {f.name for f in FIELDS} == set(columns)
    for name, view in columns.items():
        assert out[name].dtype == view.dtype
        np.testing.assert_array_equal(out[name], view)


def test_columns_and_the_parts_of_each_group_are_aligned_as_mosaic_gpu_wants_its_arguments():
    layout = BatchLayout(BatchShape(8, 3, 2), groups=2, pages_per_seq=7, plan_words=5)
    buffer, columns = layout.new()
    parts = [part for f in FIELDS for part in (columns[f.name] if f.dims[0] == "G" else [columns[f.name]])]
    places = [(part.__array_interface__["data"][0] - buffer.__array_interface__["data"][0], part.nbytes) for part in parts]
    assert len(places) == len(FIELDS) + 3 and all(start % 256 == 0 for start, _ in places)
    assert all(start + size <= next_start for (start, size), (next_start, _) in zip(places, places[1:]))
    assert places[-1][0] + places[-1][1] <= buffer.nbytes


def test_buffers_are_fresh():
    layout = BatchLayout(BatchShape(1, 1, 1), 1, 1, 0)
    assert layout.new()[0] is not layout.new()[0]


@given(st.integers(1, 512), st.integers(0, 16384), st.data())
def test_every_step_finds_a_shape_and_there_are_at_most_24(seqs, more, data):
    shapes = batch_shapes(seqs, seqs + more)
    assert len(shapes) == len(set(shapes)) <= 24 and all(s.tokens > 0 for s in shapes)
    n = data.draw(st.integers(1, seqs))
    tokens = data.draw(st.integers(n, seqs + more))
    rows = data.draw(st.integers(0, n))
    shape = choose_shape(shapes, tokens, n, rows)
    assert shape.tokens >= tokens and shape.seqs >= n and shape.rows >= rows
    assert not shape.decode or tokens == n


def test_the_default_configuration_decodes_small_batches_tightly():
    shapes = batch_shapes(64, 2048)
    assert [choose_shape(shapes, n, n, n).tokens for n in (1, 2, 3, 33)] == [1, 2, 4, 64]
    assert choose_shape(shapes, 130, 2, 2) == BatchShape(256, 64, 8)
    assert not choose_shape(shapes, 3, 2, 2).decode


def test_a_step_that_no_shape_holds_is_a_broken_invariant():
    with pytest.raises(AssertionError, match="no batch shape"):
        choose_shape(batch_shapes(4, 16), 17, 1, 1)


def test_sizes_the_scheduler_may_aim_at():
    assert step_sizes(batch_shapes(64, 2048)) == (16, 32, 64, 128, 256, 512, 1024, 1536, 2048)
    assert min(step_sizes(batch_shapes(256, 4096))) > 256, "with many sequences only the shapes that hold all of them"
