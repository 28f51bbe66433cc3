"""How often ZeRO-3 gathers weights with as many rows as the vocabulary, for each micro-batch of a few steps.

usage: run_gathers.py PIPELINE OUTPUT.json [key=value ...]
"""

import json
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])


def main() -> None:
    import torch

    from shared.load_config import load_config
    from shared.stopping import StopSwitch
    from stage2_train.distributed import meet
    from stage2_train.setup import prepare
    from stage2_train.step import accumulate_gradients, weigh_step
    from stage2_train.trainer import Trainer

    world = meet()
    gathered = record_gathers()
    trainer = Trainer(prepare(load_config(sys.argv[1], sys.argv[3:])), world)
    found = []
    for step in (1, 2, 3):
        loaded, _ = trainer.loader.get(step)
        gathered.clear()
        weighed = weigh_step(step, loaded, trainer.weigher, trainer.engine, world)
        accumulate_gradients(trainer.engine, world, weighed, len(loaded.rows), StopSwitch())
        trainer.engine.step()
        wide = sum(shape[0] == trainer.model.config.vocab_size for shape in gathered)
        found.append({"micro_batches": len(loaded.batches), "gathers": wide})
    if world.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def record_gathers() -> list[tuple[int, ...]]:
    """A list that grows by the whole shape of each parameter that is gathered."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    name = "_PartitionedParameterCoordinator__all_gather_params_"
    gather, gathered = getattr(PartitionedParameterCoordinator, name), []

    def recording(self, params, forward, quantize=False):
        gathered.extend(tuple(parameter.ds_shape) for parameter in params)
        return gather(self, params, forward, quantize)

    setattr(PartitionedParameterCoordinator, name, recording)
    return gathered


if __name__ == "__main__":
    main()
