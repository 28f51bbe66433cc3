"""`prift-inspect`: look at score stores."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from shared.cli import place_argument
from shared.places import Place

_CROSS_CHECK_OPTIONS = """\
options, as key=value words:
  rows=64                          rows to score again, spread evenly over the store; all where it holds fewer
  thresholds=[0.3, 0.5, 0.7, 0.9]  thresholds at which the decisions of PriFT-mass are compared
  engine=transformers|vllm         what scores again; default: the engine that did not make the store
  model=PATH                       where the prior lies now, a folder or hub id; default: where the store says
  tolerance=NATS                   largest p99 of |logprob difference|; default: 0.15 for bfloat16, 0.02 for float16,
                                   0.0001 for float32, by the coarser of the two forward passes
  flips=0.01                       largest share of PriFT-mass decisions that may flip at any of the thresholds
  device=auto|cpu|cuda             auto takes CUDA where there is one
  batch_tokens=16384               tokens of a forward pass, padding included
  trust_remote_code=false          run Python code that comes with the model
"""


_MODULES = {
    "report": "one HTML page on a store: support, rules, tokens, rows",
    "show": "one row in the terminal, targets coloured by prior support",
    "stats": "the numbers of a store, or as JSON",
    "diff": "how two stores differ: fields, numbers, decisions that flip",
    "merge": "several stores of one identity into one",
    "migrate": "a store of an older schema version lifted to this one, without scoring",
    "export": "rows with a rule's weights baked in, for other trainers",
}
"""Verbs that are a module of this package, with what they do."""


def main() -> None:
    """Entry point; see the exit codes in `shared/cli.py`."""
    parser = argparse.ArgumentParser(prog="prift-inspect", description="Look at score stores.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verify = verbs.add_parser("verify", help="reread every page and check every row; exit 3 with the first offenders")
    verify.add_argument("store", type=place_argument)
    verify.set_defaults(run=lambda arguments: _verify(arguments.store))
    meaning = "score a sample of the rows again by the other engine; exit 3 where the numbers differ too much"
    check = verbs.add_parser(
        "cross-check",
        help=meaning,
        description=f"{meaning[0].upper()}{meaning[1:]}.",
        epilog=_CROSS_CHECK_OPTIONS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("store", type=place_argument, help="folder of the score store, finished or not")
    check.add_argument("options", nargs="*", metavar="key=value", help="see below")
    check.set_defaults(run=lambda arguments: _cross_check(arguments.store, arguments.options))
    for name, about in _MODULES.items():
        module = import_module(f"inspection.{name}")
        verb = verbs.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    arguments = parser.parse_args()

    from shared.cli import exit_code_of, leave

    leave(exit_code_of(lambda: _to_the_end(lambda: arguments.run(arguments)), "prift-inspect"))


def _to_the_end(verb: Callable[[], None]) -> None:
    """Run a verb; that its reader (`| head`) has seen enough is no mistake."""
    try:
        verb()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _verify(store: Place) -> None:
    from shared.errors import CheckFailed
    from shared.verify import verify_store

    result = verify_store(store)
    if result.problems:
        raise CheckFailed("\n  ".join([f"{store} does not hold:", *result.problems]))
    print(f"{store}: {result.num_rows:,} rows, {result.num_targets:,} targets, all pages and invariants hold")


def _cross_check(store: Place, options: Sequence[str]) -> None:
    from stage1_score.cross_check import cross_check, parse_options

    cross_check(store, parse_options(options))


if __name__ == "__main__":
    main()
