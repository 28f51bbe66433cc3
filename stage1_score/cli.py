"""`prift-score`: run the prior once over a data set and store what it thinks of every target."""

import argparse
import sys


def main() -> None:
    """Entry point; see the exit codes in `shared/cli.py`."""
    parser = argparse.ArgumentParser(
        prog="prift-score",
        description="Score every target token of a data set with a frozen pretrained model into Parquet.",
        epilog="Every key is described in pipeline.yaml. A rerun scores only what is missing.",
    )
    parser.add_argument("pipeline", help="YAML file with the sections data, prior and score")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="run=NAME, or a key such as data.limit=16")
    arguments = parser.parse_args()

    from shared.cli import exit_code_of, leave

    def command() -> None:
        from shared.load_config import load_config

        config = load_config(arguments.pipeline, arguments.overrides)
        from stage1_score.run import run

        run(config, ["prift-score", *sys.argv[1:]])

    leave(exit_code_of(command, "prift-score"))


if __name__ == "__main__":
    main()
