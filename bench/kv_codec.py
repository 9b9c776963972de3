"""What the KV codec of the lower tiers costs: quality by layer and by codec, and the time to encode and decode.

    python -m bench.kv_codec                      the built-in model
    python -m bench.kv_codec --json FILE          and the figures as JSON; beside it FILE's name with -layers.png, a plot

Quality as `bench.kv_quality` takes it, with one difference: before a chunk of a sequence runs, every full page of the
tokens before it has been through the codec once, as if it came back from the host. Encoding decoded pages again changes
nothing, so this is also what many moves cost.
Rates: GB/s of plain pages on this machine, shapes of Llama-3-8B, beside a memcpy of the same pages.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import pallas_kernels as pk
from bench.kv_quality import Questions, ask, card, make_llm
from bench.report import add_json, earlier, write
from bench.timing import Candidate, time_together
from jaxkv.runtime.executor import JaxExecutor
from jaxkv.types import StepPlan
from pallas_kernels.arg_specs import MODELS

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  after the backend is chosen

BATCH = 64  # pages at once
Trip = Callable[[jax.Array], jax.Array]  # canonical pages -> what comes back from the tier


def trip(spec: pk.CodecSpec, pages: jax.Array) -> jax.Array:
    return pk.decode_pages(spec, pk.encode_pages(spec, pages), pages.shape[1:], pages.dtype)


def trip_alike(axis: int, spec: pk.CodecSpec, pages: jax.Array) -> jax.Array:
    """As if keys and values were grouped alike: by channel (0, as keys are) or by token (1, as values are)."""
    trips = [trip(spec, pages), trip(spec, pages[:, :, ::-1])]
    return jnp.stack([x[:, :, axis] for x in (trips if axis == 0 else trips[::-1])], axis=2)


class ThroughTier:
    """Stands in for `submit` of an executor with one KV group: pages that became prefix make the trip, once."""

    def __init__(self, executor: JaxExecutor, trip: Trip) -> None:
        self._executor, self._submit = executor, type(executor).submit
        self._rows: dict[int, list[int]] = {}  # slot -> page numbers
        self._done: dict[int, int] = {}  # slot -> how many of them have made the trip
        layout = executor.kv.layout

        def run(pools: tuple, ids: jax.Array) -> tuple:
            return pk.scatter_pages(pools, ids, trip(pk.gather_pages(pools, ids, layout=layout)), layout=layout)

        self._run = jax.jit(run, donate_argnums=0)

    def __call__(self, plan: StepPlan, *masks: Any) -> Any:
        executor, kv, ids = self._executor, self._executor.kv, []
        for c in plan.chunks:
            if not c.start:
                self._rows[c.slot], self._done[c.slot] = [], 0
            (first, pages), = c.pages
            row = self._rows[c.slot] = self._rows[c.slot][:first] + list(pages) if pages else self._rows[c.slot]
            ids += row[self._done[c.slot] : c.start // kv.page_size]
            self._done[c.slot] = c.start // kv.page_size
        for at in range(0, len(ids), BATCH):
            batch = ids[at : at + BATCH]
            padded = np.array(batch + [kv.num_pages[0]] * (BATCH - len(batch)), np.int32)
            executor.state = executor.state._replace(pools=(self._run(executor.state.pools[0], padded),))
        return self._submit(executor, plan, *masks)


def quality(questions: Questions) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Cards of the named codecs, and of one lossy layer at a time."""
    llm = make_llm("auto")
    executor = llm.engine.executor
    group, page_size = executor.kv.groups[0], executor.kv.page_size
    layers = len(group.layers)
    shape = (layers, 2, page_size, group.kv_heads, group.head_dim)
    rows: list[dict[str, Any]] = []
    more = 2 * layers * group.kv_heads * (group.head_dim - page_size)  # ends of all groups by channel

    def measure(name: str, label: str, make_trip: Callable[..., jax.Array] = trip, ends: int = 0) -> dict[str, Any]:
        spec = pk.codec_spec(name, layers)
        executor.submit = ThroughTier(executor, partial(make_trip, spec))  # type: ignore[method-assign]
        row = {"codec": label, "levels": spec.levels, "bytes_per_token": {
            dtype: (pk.encoded_bytes(spec, shape, dtype) + ends * size) / page_size
            for dtype, size in (("float32", 4), ("bfloat16", 2))},
            **card(llm, questions, rows[0]["answers"] if rows else None)}
        row["loss_more"] = row["loss"] - (rows[0]["loss"] if rows else row["loss"])
        print(f"{label:24} {row['bytes_per_token']['bfloat16']:11,.0f} {row['perplexity']:11.4f} {row['loss_more']:+9.5f} "
              f"{row['recall']:8.1%} {row['agreement']:10.2%}", flush=True)
        return row

    print(f"{'codec, bytes: bfloat16':24} {'bytes/token':>11} {'perplexity':>11} {'loss':>9} {'recall':>8} {'agreement':>10}")
    rows.append(measure("exact", "exact"))
    deeper_coarser = ["int8"] * (layers - layers // 2) + ["int4"] * (layers // 2)
    turned = ",".join(reversed(deeper_coarser)), ",".join(["int4"] * (layers - 1) + ["int8"])
    rows += [measure(name, name) for name in (*pk.CODECS[1:], ",".join(deeper_coarser), *turned)]
    for axis, label in enumerate(("values by channel", "keys by token")):
        rows += [measure(name, f"{name}, {label}", partial(trip_alike, axis), more if axis == 0 else -more)
                 for name in ("int8", "int4")]
    by_layer = []
    for level in ("int8", "int4"):
        for layer in range(layers):
            levels = ",".join(level if i == layer else "exact" for i in range(layers))
            by_layer.append({"layer": layer, "level": level, **measure(levels, f"layer {layer} {level}")})
    for row in rows + by_layer:
        del row["answers"]
    return rows, by_layer


def rates(pages: int) -> list[dict[str, Any]]:
    """GB/s of plain pages: each codec's two ways, and memcpy."""
    model = MODELS["llama-3-8b"]
    out: list[dict[str, Any]] = []
    for dtype in ("bfloat16", "float32"):
        shape = (model.layers, 2, 16, model.kv_heads, model.head_dim)
        plain = jax.random.normal(jax.random.key(0), (pages, *shape)).astype(dtype)
        source, target = np.asarray(plain), np.empty_like(np.asarray(plain))
        jobs = {"memcpy": Candidate(lambda s=source, t=target: np.copyto(t, s), lambda _: None, 1)}
        for name in pk.CODECS:
            spec = pk.codec_spec(name, model.layers)
            encode = jax.jit(partial(pk.encode_pages, spec))
            decode = jax.jit(lambda x, spec=spec, shape=shape, dtype=dtype: pk.decode_pages(spec, x, shape, dtype))
            encoded = encode(plain)
            jobs[f"{name} encode"] = Candidate(partial(encode, plain), jax.block_until_ready, 1)
            jobs[f"{name} decode"] = Candidate(partial(decode, encoded), jax.block_until_ready, 1)
        for name, timing in time_together(jobs).items():
            median, high, low = (plain.nbytes / seconds / 1e9 for seconds in timing[:3])
            out.append({"dtype": dtype, "job": name, "bytes": plain.nbytes, "gb_s": median, "gb_s_low": low, "gb_s_high": high})
            print(f"{dtype:9} {name:14} {out[-1]['gb_s']:6.2f} GB/s", flush=True)
    return out


def plot(by_layer: list[dict[str, Any]], path: Path) -> None:
    """Loss and recall with one lossy layer."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), dpi=80)
    for level, colour in (("int8", "tab:blue"), ("int4", "tab:orange")):
        rows = [row for row in by_layer if row["level"] == level]
        x = [row["layer"] + (0.2 if level == "int4" else -0.2) for row in rows]
        left.bar(x, [row["loss_more"] for row in rows], 0.4, color=colour, label=level)
        right.bar(x, [row["recall"] for row in rows], 0.4, color=colour, label=level)
    left.axhline(0, color="black", linewidth=0.8)
    left.set(xlabel="the one layer whose KV is lossy", ylabel="more loss (nats per token)", xticks=range(len(rows)))
    right.set(xlabel="the one layer whose KV is lossy", ylabel="recall", xticks=range(len(rows)), ylim=(0, 1.05))
    left.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--windows", type=int, default=16, help="of 2,047 held-out tokens")
    parser.add_argument("--pages", type=int, default=64, help="in a timed batch")
    parser.add_argument("--part", choices=("quality", "rates"), help="this one only; the JSON keeps the other")
    add_json(parser)
    args = parser.parse_args()
    result = earlier(args.json)
    if args.part != "quality":
        result["rates"] = {"pages": args.pages, "rows": rates(args.pages)}
    if args.part != "rates":
        codecs, layers = quality(ask(args.prompts, args.windows))
        result["quality"] = {"prompts": args.prompts, "windows": args.windows, "codecs": codecs, "layers": layers}
        if args.json:
            plot(layers, args.json.with_name(args.json.stem + "-layers.png"))
    write(args.json, result)


if __name__ == "__main__":
    main()
