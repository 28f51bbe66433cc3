"""`deepspeed stage2_train/train.py`: fine-tune from a score store, without the prior in memory."""

import argparse
import os
import sys


def main() -> None:
    """Entry point; see the exit codes in `shared/cli.py`."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Fine-tune a model with the token weights of a score store. Run it with deepspeed or torchrun.",
        epilog="Every key is described in pipeline.yaml. A rerun goes on from the newest checkpoint.",
    )
    parser.add_argument("pipeline", help="YAML file with the section train")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="run=NAME, or a key such as train.seed=1")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    arguments = parser.parse_args()
    if arguments.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))
    # A script's own folder stands first on the path; the packages lie one above.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

    from shared.cli import exit_code_of
    from shared.stopping import STOP_SIGNALS, stopped_at_once

    def command() -> None:
        # Until the training loop, which has something to save, handles them itself.
        with stopped_at_once(STOP_SIGNALS):
            train(arguments.pipeline, arguments.overrides)

    code = exit_code_of(command, "train.py")
    sys.stdout.flush()
    # An interpreter that shuts down while the process group is open may be aborted by the threads of gloo, and the
    # exit code would be lost.
    os._exit(code)


def train(pipeline: str, overrides: list[str]) -> None:
    """Run the training that a pipeline and overrides describe, as one of its ranks."""
    from shared.load_config import load_config

    config = load_config(pipeline, overrides)
    from stage2_train.distributed import choose_accelerator, lost_ranks_named, make_deterministic, meet

    choose_accelerator()
    if config.train.deterministic:
        make_deterministic()
    from stage2_train.setup import prepare

    job = prepare(config)
    timeout = config.train.timeout_seconds
    with lost_ranks_named(timeout):
        world = meet(timeout)
        from stage2_train.announce import announce
        from stage2_train.trainer import Trainer

        trainer = Trainer(job, world)
        if world.rank == 0:
            announce(job, world, trainer.form, trainer.model)
        trainer.run()
    # Not after an error: closing the group would end the others before this rank has said what it met.
    import torch

    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
