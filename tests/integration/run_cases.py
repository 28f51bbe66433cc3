"""Run several trainings one after the other in one process group: a launcher's start costs more than a tiny run.

usage: run_cases.py PIPELINE CASES.json, the cases being lists of overrides
"""

import json
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])


def main() -> None:
    import torch

    from shared.load_config import load_config
    from stage2_train.announce import announce
    from stage2_train.distributed import meet
    from stage2_train.setup import prepare
    from stage2_train.trainer import Trainer

    pipeline, cases = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    world = meet()
    for overrides in cases:
        job = prepare(load_config(pipeline, overrides))
        trainer = Trainer(job, world)
        if world.rank == 0:
            announce(job, world, trainer.form, trainer.model)
        trainer.run()
    # As stage2_train/train.py leaves: gloo's threads may abort an interpreter that ends while the group is open.
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
