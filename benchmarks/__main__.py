"""Runs benchmarks, prints a table and updates results.jsonl: `python -m benchmarks [NAME ...]`.

Without a name, all benchmarks run. Exit codes: 0 if no benchmark failed, 1 if a benchmark failed (the other benchmarks
still run), 2 if a name is unknown. Tested in tests/benchmarks/test_harness.py.
"""

import argparse
import difflib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import RESULTS, entries, save, table
from rl.exits import DONE, FAILED, WRONG_INPUT


def main(arguments: Sequence[str] | None = None) -> int:
    known = entries()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Runs benchmarks, prints a table and updates the results file.",
        epilog="\n".join(f"{name}: {(entry.__doc__ or '').splitlines()[0]}" for name, entry in known.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (default: all)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file to update (default: %(default)s)")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in known:
            near = difflib.get_close_matches(name, list(known), n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            print(f"no benchmark is called {name!r}{hint}; there are: {', '.join(known)}", file=sys.stderr)
            return WRONG_INPUT
    records, failed = [], []
    for name in dict.fromkeys(options.names or known):
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            records.append(known[name]().record(name))
        except Exception:  # one benchmark may need a missing package; the other benchmarks still run
            traceback.print_exc()
            failed.append(name)
        else:
            save(records[-1:], options.results)
    print(table(records))
    if failed:
        print(f"failed benchmarks (errors above): {', '.join(failed)}", file=sys.stderr)
    return FAILED if failed else DONE


if __name__ == "__main__":
    sys.exit(main())
