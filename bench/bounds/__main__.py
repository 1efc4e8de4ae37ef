"""Count bounds anew and write their records: ``python -m trisparse.bench.bounds [NAME ...]``; needs ptxsim.

The names are those of `studies.STUDIES`; without one, all. `trisparse bench run roofline` shows the same figures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trisparse.bench.bounds.record import RESULTS
from trisparse.bench.bounds.studies import STUDIES


def main(arguments: list[str] | None = None) -> None:
    """Write the records of the named studies."""
    parser = argparse.ArgumentParser(prog="python -m trisparse.bench.bounds", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(STUDIES)}; all by default")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the records")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in STUDIES]:
        parser.error(f"there is no study {unknown[0]!r}; known are {', '.join(STUDIES)}")
    for name in options.names or STUDIES:
        STUDIES[name].record(options.out)
        print(f"{name}: {options.out / STUDIES[name].file}", flush=True)


if __name__ == "__main__":
    main()
