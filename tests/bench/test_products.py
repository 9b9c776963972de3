"""What the matrix products of a run take by themselves."""

from bench.products import count_steps, product_seconds
from jaxkv import SamplingParams
from tests.text_models import small_llm, small_model


def test_steps_are_counted_and_their_products_timed(monkeypatch):
    engine = small_llm().engine
    monkeypatch.setattr(engine.executor, "steps", dict(engine.executor.steps))
    counts, before = count_steps(engine.executor), engine.metrics.steps
    small_llm().generate([[5, 6, 7]], SamplingParams(max_tokens=6, ignore_eos=True), use_tqdm=False)
    assert sum(counts.values()) == engine.metrics.steps - before >= 6
    once = product_seconds(engine.executor, str(small_model()), engine.metrics.info["dtype"], counts)
    assert once > 0 and all(shape in engine.executor.shapes for shape in counts)
