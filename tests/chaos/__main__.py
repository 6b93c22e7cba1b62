"""Runs chaos rounds by hand.

    python tests/chaos --rounds=100 --seed=1
    python tests/chaos --rounds=10 --seed=1 --kind=corrupt
    python tests/chaos --seed=1 --round=17              that round alone, again

Prints one line a round, and a table at the end; exits with 1 if a round fails. The folder of a
failed round is kept.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

# As in the tests: states are compared on the CPU.
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path[:0] = [str(Path(__file__).parent.parent.parent), str(Path(__file__).parent.parent)]

import checks
from rounds import Place, Result, make_reference, run_round, why_no_disk
from script import HOPELESS, KINDS, PATIENCE_KINDS, Script, draw


def main() -> int:
    options = _parse()
    # SIGTERM cleans up as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    numbers = range(options.rounds) if options.round is None else [options.round]
    scripts = [draw(options.seed, number, options.kind) for number in numbers]
    folder = Path(tempfile.mkdtemp(prefix="podlift-chaos-"))
    place = Place(folder, folder / "cache", in_memory=not options.no_in_memory)
    print(f"in {folder}", flush=True)
    reference = checks.read(make_reference(place))
    results = []
    for script in scripts:
        if any(d.kind == "fill" for d in script.disturbances) and why_no_disk():
            print(f"round {script.number}  {script.kind}  left out: {why_no_disk()}", flush=True)
            continue
        results.append(run_round(script, place, reference))
        _print_result(results[-1], options)
        if not results[-1].problems and not options.keep:
            shutil.rmtree(results[-1].folder)
    _print_table(results)
    failed = any(result.problems for result in results)
    if not failed and not options.keep:
        shutil.rmtree(folder)
    return 1 if failed else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python tests/chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=10, help="number of rounds (default: 10)")
    parser.add_argument("--round", type=int, help="run only the round with this number")
    parser.add_argument("--seed", type=int, default=0, help="of the whole series (default: 0)")
    parser.add_argument(
        "--kind", choices=(*KINDS, *PATIENCE_KINDS, HOPELESS), help="only disturbances of one kind"
    )
    parser.add_argument("--keep", action="store_true", help="keep the folders of all rounds")
    parser.add_argument("--no_in_memory", action="store_true", help="save no in-memory checkpoints")
    return parser.parse_args()


def again(script: Script, options: argparse.Namespace) -> str:
    """The command that repeats one round."""
    kind = f" --kind={options.kind}" if options.kind else ""
    in_memory = " --no_in_memory" if options.no_in_memory else ""
    return f"python tests/chaos --seed={script.seed} --round={script.number}{kind}{in_memory}"


def _print_result(result: Result, options: argparse.Namespace) -> None:
    script = result.script
    print(
        f"round {script.number}  seed {script.seed}  {script.kind}  fast {script.fast_secs}  "
        f"{'; '.join(result.done) or 'nothing done'}  "
        f"{result.starts} start{'s' * (result.starts != 1)}  {result.seconds:.0f} s  "
        f"{'FAILED' if result.problems else 'passed'}",
        flush=True,
    )
    if result.problems:
        for problem in result.problems:
            print("  " + problem.rstrip().replace("\n", "\n    "))
        print(f"  folder: {result.folder}\n  again: {again(script, options)}", flush=True)


def _print_table(results: list[Result]) -> None:
    print(f"\n{'kind':10} {'rounds':>6} {'failed':>6} {'starts':>6} {'seconds':>8}")
    for kind in (*KINDS, *PATIENCE_KINDS, HOPELESS):
        mine = [result for result in results if result.script.kind == kind]
        if mine:
            failed = sum(bool(result.problems) for result in mine)
            starts = sum(result.starts for result in mine)
            seconds = sum(result.seconds for result in mine)
            print(f"{kind:10} {len(mine):6} {failed:6} {starts:6} {seconds:8.0f}")


if __name__ == "__main__":
    sys.exit(main())
