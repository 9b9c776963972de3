"""Every kernel over named shapes, against the machine's measured limits, against others, and against the targets.

    python -m bench.kernels                          this machine's device: under 8 minutes on an H100, 2 on two CPU cores
    python -m bench.kernels --only decode,prefill    some kinds of rows
    python -m bench.kernels --json result.json

First the kernels' tests that need the device run (pytest marker `gpu`), then the limits are measured, then the rows
(`kernel_runs`). Times are per call and layer. Shares refer to the measured limits, never to a data sheet.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from bench.roofline import judge, losses

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("decode", "shared", "prefill", "mixed", "decode-quantised", "prefill-quantised", "decode-mass", "kv_write",
         "page_copy", "tier", "sampling")


def device_tests() -> tuple[bool, str]:
    """Runs the kernels' tests with the marker `gpu` in a process of their own; whether none failed, and what pytest said."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/pallas_kernels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JAXKV_TEST_PLATFORM": "gpu"})
    said = (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["nothing"])[-1].strip("= ")
    if done.returncode == 5:  # pytest: no tests were collected
        return True, f"no test of the kernels is marked gpu ({said})"
    if done.returncode:
        print(done.stdout[-4000:])
    return done.returncode == 0, said


def main() -> int:
    """Prints the table and writes the JSON. Exit status 1: a test failed, so that there is nothing to measure."""
    parser = argparse.ArgumentParser(prog="bench.kernels", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(KINDS), help="kinds of rows, separated by commas")
    parser.add_argument("--setup", choices=("auto", "cpu", "gpu", "tiny"), default="auto", help="which shapes")
    parser.add_argument("--seconds", type=float, help="for the rows; what is left then is listed as not measured")
    parser.add_argument("--samples", type=int, default=7, help="of each time, taken in turn")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if set(args.only.split(",")) - set(KINDS):
        parser.error(f"--only: kinds are {', '.join(KINDS)}, got {args.only!r}")
    passed, said = (True, "skipped") if args.skip_tests else device_tests()
    print(f"kernel tests on the device: {said}", flush=True)
    if not passed:
        return 1

    import jax

    from bench.kernel_report import document, show, write
    from bench.kernel_runs import CPU, GPU, TINY, Bench, measure_all
    from bench.limits import measure_limits

    platform = jax.default_backend()
    setups = {"cpu": CPU, "gpu": GPU, "tiny": TINY}
    setup = setups["cpu" if platform == "cpu" else "gpu"] if args.setup == "auto" else setups[args.setup]
    limits = measure_limits(platform)
    bench = Bench(setup, platform, limits, args.seconds or (100 if platform == "cpu" else 390), args.samples)
    measure_all(bench, set(args.only.split(",")))
    command = " ".join(["python", "-m", "bench.kernels", *sys.argv[1:]])
    result = document(command, limits, bench.rows, judge(bench.rows, platform), losses(bench.rows), bench.absent,
                      bench.skipped, said)
    show(result)
    path = args.json or ROOT / "bench" / "results" / f"kernels-{platform if args.setup == 'auto' else args.setup}.json"
    write(path, result)
    print(f"\nwrote {os.path.relpath(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
