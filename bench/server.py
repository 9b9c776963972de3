"""What HTTP costs: the server against the engine in process on the same requests in turns, and the CPU time of its event loop.

    python -m bench.server                       the built-in model
    python -m bench.server --shape small         random weights, 124.7 M parameters

64 requests at once, streamed, by a client in another process. API CPU is the CPU time of the thread of the event loop (HTTP,
JSON, tokenising); text is made on the engine's thread, by ``output``. A long prompt then arrives beside running streams.
Turns of server and engine alternate. The ratio is the median of each turn's own; on a busy machine only it and CPU times mean
something.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from bench.engine import SHAPES, config_dir, drive, percentile
from bench.report import add_json, write
from bench.workloads import Job

ROOT = Path(__file__).resolve().parent.parent
STREAMS = 64
PROMPT, TOKENS = 64, 64


class Server:
    """``python -m jaxkv.serve`` on a free port, until the block ends."""

    def __init__(self, args: list[str]) -> None:
        self.child = subprocess.Popen([sys.executable, "-m", "jaxkv.serve", "--port", "0", "--no-request-log", *args], cwd=ROOT,
                                      text=True, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})

    def __enter__(self) -> Server:
        assert self.child.stdout
        for line in self.child.stdout:
            if line.startswith("ready: "):
                self.url = line.split()[1].removesuffix("/v1")
                return self
        raise SystemExit("the server did not start")

    def __exit__(self, *_: object) -> None:
        self.child.terminate()
        self.child.wait(30)

    def api_cpu(self) -> float:
        """CPU seconds of the event loop's thread."""
        return int(Path(f"/proc/{self.child.pid}/task/{self.child.pid}/schedstat").read_text().split()[0]) / 1e9

    def cpu(self) -> float:
        """CPU seconds of the process."""
        fields = Path(f"/proc/{self.child.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

    def output(self) -> float:
        """CPU seconds of the engine's thread for text and stop strings."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return float(next(line for line in lines if "step_host_seconds_total" in line and '"output"' in line).split()[-1])

    def send(self, requests: list[tuple[float, dict[str, Any]]]) -> list[dict[str, Any]]:
        """The client's results; every stream must have ended well."""
        done = subprocess.run([sys.executable, "-m", "bench.server_client", self.url], input=json.dumps(requests), text=True,
                              capture_output=True, cwd=ROOT, check=True)
        results = json.loads(done.stdout)
        assert all(r["status"] == 200 and r["tokens"] for r in results), [r["status"] for r in results]
        return results


def jobs(vocab: int, seed: int, tokens: int, count: int = STREAMS, prompt: int = PROMPT) -> list[Job]:
    """``count`` random prompts."""
    rng = random.Random(seed)
    low = min(300, vocab // 2)
    return [Job(str(i), [rng.randrange(low, vocab) for _ in range(prompt)], tokens) for i in range(count)]


def bodies(some: list[Job], text: bool) -> list[tuple[float, dict[str, Any]]]:
    """What the client sends for jobs; without a tokenizer streams carry token ids."""
    return [(0.0, {"prompt": job.prompt, "max_tokens": job.max_new, "ignore_eos": True, "temperature": 0,
                   "return_token_ids": not text}) for job in some]


def measure(server: Server, engine: Any, repeat: int) -> dict[str, Any]:
    """Turns of server and engine on the same number of requests."""
    vocab, text = engine.vocab_size, engine.tokenizer is not None
    rows = []
    for turn in range(repeat + 1):
        output, api, start = server.output(), server.api_cpu(), time.perf_counter()
        results = server.send(bodies(jobs(vocab, 10 * turn, TOKENS), text))
        api = server.api_cpu() - api
        output = server.output() - output
        wall = max(r["times"][-1] for r in results) - min(r["sent"] for r in results)
        offline, _ = drive(engine, jobs(vocab, 10 * turn + 1, TOKENS), None, 0)
        one = server.api_cpu()
        server.send(bodies(jobs(vocab, 10 * turn + 2, 1), text))
        one = server.api_cpu() - one
        gaps = [b - a for r in results for a, b in zip(r["times"], r["times"][1:])]
        count = sum(r["tokens"] for r in results)
        assert count == STREAMS * TOKENS
        if turn:  # the first warms up
            rows.append({"server_tok_s": count / wall, "offline_tok_s": count / offline, "ratio": offline / wall,
                         "api_us_per_token": 1e6 * api / count, "output_us_per_token": 1e6 * output / count,
                         "api_ms_per_request": 1e3 * one / STREAMS,
                         "ttft_p50_ms": 1e3 * percentile([r["times"][0] - r["sent"] for r in results], 0.5),
                         "ttft_p99_ms": 1e3 * percentile([r["times"][0] - r["sent"] for r in results], 0.99),
                         "itl_p50_ms": 1e3 * percentile(gaps, 0.5), "itl_p99_ms": 1e3 * percentile(gaps, 0.99),
                         "seconds": time.perf_counter() - start})
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]} | {"turns": rows}


def long_prompt(server: Server, engine: Any, streams: int = 16) -> dict[str, float]:
    """Time between tokens of running streams when the longest possible prompt arrives, beside what one chunk takes."""
    vocab, text, budget = engine.vocab_size, engine.tokenizer is not None, engine.config.sched.max_num_batched_tokens
    length = engine.max_model_len - 8
    chunk = min(drive(engine, jobs(vocab, 90 + i, 1, 1, min(budget, length)), None, 0)[0] for i in range(3))
    running = bodies(jobs(vocab, 95, 200, streams), text)
    quiet = [b - a for r in server.send(running) for a, b in zip(r["times"], r["times"][1:])]
    running = bodies(jobs(vocab, 96, 200, streams), text)
    intruder = [(0.3, bodies(jobs(vocab, 97, 2, 1, length), text)[0][1])]
    results = server.send(running + intruder)
    gaps = [b - a for r in results[:-1] for a, b in zip(r["times"], r["times"][1:])]
    return {"prompt_tokens": length, "chunk_tokens": min(budget, length), "chunk_ms": 1e3 * chunk,
            "itl_p50_ms": 1e3 * percentile(quiet, 0.5), "itl_p99_ms_without": 1e3 * percentile(quiet, 0.99),
            "itl_p99_ms": 1e3 * percentile(gaps, 0.99), "itl_max_ms": 1e3 * max(gaps)}


def idle(server: Server, seconds: float = 2.0) -> float:
    """CPU seconds of the whole process in so many of nothing to do."""
    time.sleep(6)  # past the check that an idle engine makes
    start = server.cpu()
    time.sleep(seconds)
    return server.cpu() - start


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.server", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape instead of the built-in model")
    parser.add_argument("--repeat", type=int, default=3)
    add_json(parser)
    args = parser.parse_args()
    name = args.shape or "default"
    options: dict[str, Any] = {"kv_cache_memory": "512M", "host_kv_memory": 0}
    if args.shape:
        options |= {"model": config_dir(args.shape), "load_format": "dummy", "dtype": "float32", "skip_tokenizer_init": True}
    from jaxkv.cli import engine_config
    from jaxkv.runtime.startup import build_engine

    engine = build_engine(engine_config(options))
    flags = [part for key, value in options.items() for part in
             ([f"--{key.replace('_', '-')}"] if value is True else [f"--{key.replace('_', '-')}", str(value)])]
    with Server(flags) as server:
        report = {"model": name, "streams": STREAMS, "prompt_tokens": PROMPT, "answer_tokens": TOKENS,
                  "load_average": os.getloadavg()[0], **measure(server, engine, args.repeat),
                  "long_prompt": long_prompt(server, engine), "idle_cpu_s_in_2_s": idle(server)}
    for key, value in report.items():
        if isinstance(value, float):
            print(f"{key:22} {value:12.3f}")
    print("long prompt:", {key: round(value, 1) for key, value in report["long_prompt"].items()})
    write(args.json, report)


if __name__ == "__main__":
    main()
