"""Every kernel over named shapes, against the machine's measured limits, against others, and against the targets.

    python -m bench.kernels                          this machine's device: under 8 minutes on an H100, 2 on two CPU cores
    python -m bench.kernels --only decode,prefill    some kinds of rows
    python -m bench.kernels --json FILE              and the figures as JSON

First the kernels' tests that need the device run (pytest marker `gpu`), then the limits are measured, then the rows
(`kernel_runs`). Times are per call and layer. Shares refer to the measured limits, never to a data sheet.

`--seconds` bounds all of it from the start: the tests end after two fifths, no row starts after them, and FILE is written
after every section. What there was no time for is listed. A run that hangs ends 90 seconds later, with a traceback.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from bench.report import add_json, write
from bench.roofline import KINDS, judge, losses
from bench.timing import ends_within

ROOT = Path(__file__).resolve().parent.parent
TESTS = "tests/pallas_kernels/test_on_gpu.py"
SECONDS, CPU_SECONDS = 470, 110


def device_tests(seconds: float) -> tuple[str, str]:
    """Runs the kernels' tests that need the device in a process of their own, for so long at most; whether they "passed",
    "failed", "did not run" or "did not finish", and what pytest said. They need pytest alone, no plugin and no settings."""
    if importlib.util.find_spec("pytest") is None:
        return "did not run", "not run: pytest is not installed"
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", ".", "--noconftest", "-p", "no:cacheprovider",
               "-o", "markers=gpu", "-q", TESTS]
    env = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"").decode(errors="replace").strip().splitlines() or ["nothing"]
        failed = any(re.fullmatch(r"[.sxX]*[FE][.sxXFE]*( *\[ *\d+%\])?", line) for line in said)
        return "failed" if failed else "did not finish", f"not finished in {seconds:.0f} s: {said[-1]}"
    said = (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["nothing"])[-1].strip("= ")
    if done.returncode:
        print(done.stdout[-4000:])
        sys.stderr.write(done.stderr[-4000:])
    return "failed" if done.returncode else "passed", said


def main() -> int:
    """Prints the table. Exit status 1: a test failed, so that there is nothing to measure."""
    parser = argparse.ArgumentParser(prog="bench.kernels", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(KINDS), help="kinds of rows, separated by commas")
    parser.add_argument("--setup", choices=("auto", "cpu", "gpu", "tiny"), default="auto", help="which shapes")
    parser.add_argument("--seconds", type=float, help="for everything; what is left then is listed as not measured")
    parser.add_argument("--samples", type=int, default=7, help="of each time, taken in turn")
    parser.add_argument("--skip-tests", action="store_true")
    add_json(parser)
    args = parser.parse_args()
    if set(args.only.split(",")) - set(KINDS):
        parser.error(f"--only: kinds are {', '.join(KINDS)}, got {args.only!r}")
    start, longest = time.monotonic(), args.seconds or SECONDS
    with ends_within(longest + 90):
        ended, said = ("did not run", "skipped") if args.skip_tests else device_tests(0.4 * longest)
        print(f"kernel tests on the device: {said}", flush=True)
        return measure(args, start, ended, said) if ended != "failed" else 1


def measure(args: argparse.Namespace, start: float, ended: str, said: str) -> int:
    """All but the tests, of which `ended` and `said` are the outcome: no target is met by kernels that they did not prove."""
    import jax

    from bench.kernel_report import document, show
    from bench.kernel_runs import CPU, GPU, TINY, Bench, measure_all
    from bench.limits import measure_limits

    platform = jax.default_backend()
    if ended == "passed" and platform != "cpu" and " passed" not in said:
        ended = "did not run"  # all were skipped, as they are on a CPU
    unproven = "" if ended == "passed" else f"not proven: device tests {ended}"
    setups = {"cpu": CPU, "gpu": GPU, "tiny": TINY}
    setup = setups["cpu" if platform == "cpu" else "gpu"] if args.setup == "auto" else setups[args.setup]
    limits = measure_limits(platform)
    end = start + (args.seconds or (CPU_SECONDS if platform == "cpu" else SECONDS))
    bench = Bench(setup, platform, limits, end - time.monotonic(), args.samples)

    def save(waiting: list[str]) -> dict:
        rows = sorted(bench.rows, key=lambda row: KINDS.index(row["kind"]))
        verdicts = judge(rows, platform)
        if unproven:
            verdicts = [v if v.verdict == "not on this device" else v._replace(verdict=unproven) for v in verdicts]
        result = document(limits, rows, verdicts, losses(rows), bench.absent,
                          bench.skipped + [f"{name}: not reached" for name in waiting], said)
        write(args.json, result)
        return result

    measure_all(bench, set(args.only.split(",")), save)
    show(save([]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
