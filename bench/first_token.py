"""From the launch of a process to the first token of a request: interpreter, imports, weights, compile cache, one step.

    python -m bench.first_token '{"max_num_seqs": 8}'    one such process; the options of ``LLM`` as JSON
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxkv.config import EngineConfig


def measure(config: EngineConfig, repeat: int) -> dict[str, Any]:
    """Median seconds over ``repeat`` processes with these settings, once another has filled the compile cache, and the
    executables of the last. SystemExit if one ends without a token."""
    parts = asdict(config)
    options = parts["model"] | parts["cache"] | parts["sched"] | parts["mesh"] | {"seed": config.seed}
    command = [sys.executable, "-m", "bench.first_token", json.dumps(options)]
    root = str(Path(__file__).parent.parent)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    seconds = []
    for _ in range(1 + repeat):
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as child:
            assert child.stdout
            line = child.stdout.readline()
            seconds.append(time.perf_counter() - start)
        if child.returncode:
            raise SystemExit(child.returncode)
    return {"start_to_first_token_s": statistics.median(seconds[1:]), "start_executables": json.loads(line)}


def compile_events() -> list[str]:
    """What JAX says of its compile cache from now on; for ``executables``."""
    import jax

    events: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    return events


def executables(events: list[str]) -> dict[str, int]:
    """How many were compiled, and how many came from the compile cache."""
    loaded = events.count("/jax/compilation_cache/cache_hits")
    return {"compiled": events.count("/jax/compilation_cache/compile_requests_use_cache") - loaded, "loaded": loaded}


def main() -> None:
    from jaxkv import LLM, SamplingParams
    from jaxkv.cli import one_line_errors

    events = compile_events()
    with one_line_errors("bench.first_token"), LLM(**json.loads(sys.argv[1])) as llm:
        llm.generate([1], SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True), use_tqdm=False)
        print(json.dumps(executables(events)), flush=True)


if __name__ == "__main__":
    main()
