"""`prift-inspect`: look at score stores."""

import argparse
import sys
from pathlib import Path


def main() -> None:
    """Entry point; see the exit codes in `shared/cli.py`."""
    parser = argparse.ArgumentParser(prog="prift-inspect", description="Look at score stores.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verify = verbs.add_parser("verify", help="reread every page and check every row; exit 3 with the first offenders")
    verify.add_argument("store", type=Path)
    arguments = parser.parse_args()

    from shared.cli import exit_code_of

    sys.exit(exit_code_of(lambda: _verify(arguments.store), "prift-inspect"))


def _verify(store: Path) -> None:
    from shared.errors import CheckFailed
    from shared.verify import verify_store

    result = verify_store(store)
    if result.problems:
        raise CheckFailed("\n  ".join([f"{store} does not hold:", *result.problems]))
    print(f"{store}: {result.num_rows:,} rows, {result.num_targets:,} targets, all pages and invariants hold")


if __name__ == "__main__":
    main()
