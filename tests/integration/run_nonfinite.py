"""Run trainings in one process group whose last rank makes numbers that are not finite.

usage: run_nonfinite.py PIPELINE CASES.json, each case being {"overrides": [...], "steps": [...], "kind": "loss" |
"gradient"}; a user's mistake ends its case only, and is printed.
"""

import json
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])


def main() -> None:
    import torch

    from shared.errors import UserError
    from shared.load_config import load_config
    from stage2_train import trainer as module
    from stage2_train.distributed import meet
    from stage2_train.loss import WeightedLM
    from stage2_train.setup import prepare

    world = meet()
    weigh_step, forward = module.weigh_step, WeightedLM.forward
    now = {"step": 0, "case": {}}

    def noting_weigh_step(step, *arguments):
        now["step"] = step
        return weigh_step(step, *arguments)

    def broken_forward(self, *arguments):
        total, *others = forward(self, *arguments)
        if now["step"] in now["case"]["steps"] and world.rank == world.size - 1 and total.requires_grad:
            if now["case"]["kind"] == "gradient":
                total.register_hook(lambda gradient: gradient * float("inf"))
            else:
                total = total * float("nan")
        return total, *others

    module.weigh_step, WeightedLM.forward = noting_weigh_step, broken_forward
    for case in json.loads(Path(sys.argv[2]).read_text()):
        now["case"], now["step"] = case, 0
        try:
            module.Trainer(prepare(load_config(sys.argv[1], case["overrides"])), world).run()
        except UserError as error:
            print(f"[rank {world.rank}] {error}", flush=True)
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
