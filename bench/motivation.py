"""The experiments behind the engine, as tables and plots.

    python -m bench.motivation swap                moving KV out and in against computing it
    python -m bench.motivation swap --json FILE    and the figures as JSON; beside it the same name with .png, a plot

swap: prefill alone, and the whole request, for the built-in model up to its window and for a model of Llama-3-8B's widths and
KV size (random weights; 32 layers, or ``--layers`` of them and seconds multiplied), exact and with the KV codec. "kept" is the
share of the tokens whose KV is kept: 100 % until a sparsity policy keeps fewer. Break-even: the prompt from which on moving is
quicker than computing; "in" for KV that is below HBM already, "out + in" for KV that first has to leave.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import matplotlib

from bench.engine import config_dir
from bench.report import add_json, earlier, write
from bench.swap import Compute, break_even, compute_seconds, swap_seconds
from jaxkv.cli import engine_config
from jaxkv.runtime.startup import build_engine
from jaxkv.types import KVGroup
from pallas_kernels import CODECS
from pallas_kernels.arg_specs import MODELS

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  after the backend is chosen

CASES: dict[str, dict[str, Any]] = {  # tokens of prompts, of the whole request's prompt and answer
    "default": {"lengths": (16, 32, 64, 128, 256, 512, 1024, 2048, 3584), "answer": 512, "steps": 512},
    "llama-3-8b": {"lengths": (512, 1024, 2048, 4096, 8192, 16384), "answer": 2048, "steps": 33},
}


def compute(model: str, layers: int, repeat: int) -> tuple[Compute, KVGroup]:
    """What computing takes, and the KV of the whole model."""
    case, heads = CASES[model], MODELS[model]
    options: dict[str, Any] = {"skip_tokenizer_init": True, "max_num_seqs": 1, "max_num_batched_tokens": 512, "overlap": False,
                               "enable_prefix_caching": False, "host_kv_memory": 0,
                               "max_model_len": max(case["lengths"]) + case["steps"]}
    factor = 1.0
    if model != "default":
        options |= {"model": config_dir(model, num_hidden_layers=layers, vocab_size=1024, max_position_embeddings=32768),
                    "load_format": "dummy", "kv_cache_dtype": "bfloat16"}
        factor = heads.layers / layers
    engine = build_engine(engine_config(options))
    dtype = engine.scheduler.cache.groups[0].dtype
    group = KVGroup(tuple(range(heads.layers)), heads.kv_heads, heads.head_dim, dtype)
    return compute_seconds(engine, case["lengths"], case["steps"], repeat, factor), group


def experiment(model: str, codecs: list[str], layers: int, repeat: int) -> dict[str, Any]:
    """Rows for each codec and prompt, the whole request, and the break-even lengths."""
    case = CASES[model]
    took, group = compute(model, layers, repeat)
    lengths, whole = case["lengths"], max(case["lengths"]) + case["answer"]
    prefill = {n: took.factor * seconds for n, seconds in took.prefill.items()}
    request = prefill[max(lengths)] + took.factor * took.decode * (case["answer"] - 1)
    rows, requests, even = [], [], []
    for codec in codecs:
        swaps = swap_seconds(group, (*lengths, whole), codec, repeat)
        label = {"codec": codec, "kept": 1.0}
        rows += [{**label, **swap, "prefill_s": prefill[n]} for n, swap in zip(lengths, swaps)]
        requests.append({**label, **swaps[-1], "prompt": max(lengths), "answer": case["answer"], "request_s": request})
        even.append({**label, **{way: break_even(lengths, [sum(swap[k] for k in keys) for swap in swaps[:-1]],
                                                 list(prefill.values()))
                                 for way, keys in (("in", ("in_s",)), ("out + in", ("out_s", "in_s")))}})
    return {"model": model, "dtype": group.dtype, "computed_layers": group.layers[-1] + 1 if took.factor == 1 else layers,
            "factor": took.factor, "decode_steps": case["steps"] - 1, "decode_step_s": took.factor * took.decode,
            "rows": rows, "requests": requests, "break_even": even}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: one row for each prompt and codec, the whole requests at the end of each model."""
    lines = ["| model | tokens | codec | kept | MiB | out ms | in ms | computed s | computed / in | computed / (out + in) |",
             "|---|--:|---|" + "--:|" * 7]
    for result in results:
        for r in result["rows"] + result["requests"]:
            tokens, seconds = (f"{r['tokens']:,}", r["prefill_s"]) if "prefill_s" in r else (
                f"{r['prompt']:,} + {r['answer']:,}", r["request_s"])
            lines.append(f"| {result['model']} | {tokens} | {r['codec']} | {r['kept']:.0%} | {r['bytes'] / 2**20:,.1f} | "
                         f"{1e3 * r['out_s']:,.2f} | {1e3 * r['in_s']:,.2f} | {seconds:,.4g} | {seconds / r['in_s']:,.1f} | "
                         f"{seconds / (r['out_s'] + r['in_s']):,.1f} |")
    for result in results:
        shortest = result["rows"][0]["tokens"]
        lines.append(f"\nbreak-even of {result['model']}, tokens: " + "; ".join(
            f"{e['codec']}: in {_said(e['in'], shortest)}, out + in {_said(e['out + in'], shortest)}"
            for e in result["break_even"]))
        if result["factor"] > 1:
            lines.append(f"  computed: {result['computed_layers']} layer(s) measured, seconds x {result['factor']:g}; decode: "
                         f"{result['decode_steps']} steps after the longest prompt measured, x the length of the answer")
    return "\n".join(lines)


def _said(tokens: float | None, shortest: int) -> str:
    return "none" if tokens is None else f"{tokens:,.0f}" if tokens else f"below {shortest}"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Seconds by prompt length, one panel for each model, both axes logarithmic."""
    figure, panels = plt.subplots(1, len(results), figsize=(5 * len(results), 3.8), dpi=80, squeeze=False)
    for panel, result in zip(panels[0], results):
        codecs = [e["codec"] for e in result["break_even"]]
        for codec, colour in zip(codecs, ("tab:blue", "tab:orange", "tab:green", "tab:purple")):
            rows = [r for r in result["rows"] if r["codec"] == codec]
            x = [r["tokens"] for r in rows]
            panel.plot(x, [r["in_s"] for r in rows], "-o", color=colour, markersize=3, label=f"in, {codec}")
            panel.plot(x, [r["out_s"] for r in rows], "--", color=colour, label=f"out, {codec}")
        label = "computed" + (f" ({result['computed_layers']} layer(s) x {result['factor']:g})" if result["factor"] > 1 else "")
        panel.plot(x, [r["prefill_s"] for r in rows], "-k", linewidth=2, label=label)
        panel.set(title=result["model"], xlabel="prompt (tokens)", ylabel="seconds", xscale="log", yscale="log")
        panel.legend(fontsize=7, loc="upper left")
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=("swap",))
    parser.add_argument("--models", default=",".join(CASES), help="with commas; the JSON keeps the others")
    parser.add_argument("--codecs", default="exact,int8,int4", help=f"with commas, of {', '.join(CODECS)}")
    parser.add_argument("--layers", type=int, help="of the large model that compute (default: 1 on CPU, else all)")
    parser.add_argument("--repeat", type=int, default=5)
    add_json(parser)
    args = parser.parse_args()
    old = earlier(args.json).get("models", [])
    layers = args.layers or (1 if jax.default_backend() == "cpu" else MODELS["llama-3-8b"].layers)
    new = {name: experiment(name, args.codecs.split(","), layers, args.repeat) for name in args.models.split(",")}
    either = [new.get(name) or next((r for r in old if r["model"] == name), None) for name in CASES]
    results = [result for result in either if result]
    print(table(results))
    write(args.json, {"models": results})
    if args.json:
        plot(results, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
