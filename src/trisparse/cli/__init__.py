"""The command line: prune, retrain, export, eval, inspect, metrics, search, env, demo and bench.

Heavy imports happen inside the commands, so that ``trisparse --help`` answers at once.
"""

from __future__ import annotations

import sys
from importlib import import_module

from trisparse.cli.options import app

__all__ = ["app", "main"]

# in the order that --help shows them
for _commands in (
    "prune", "evaluate", "retrain", "export", "search", "bench", "bench_run", "bench_papers", "bench_report"
):  # fmt: skip
    import_module(f"trisparse.cli.{_commands}")


def main() -> None:
    """Entry point: what a user can mend ends in one line on standard error and exit code 2."""
    from trisparse.sparsity.hardware import keep_freed_memory

    keep_freed_memory()
    try:
        app()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if type(error) is RuntimeError:  # torch's own: a defect, to be seen whole
            raise
        print(f"error: {error}", file=sys.stderr)
        for note in getattr(error, "__notes__", []):
            print(note, file=sys.stderr)
        raise SystemExit(2) from None
