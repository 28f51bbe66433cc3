"""Gradients of the first step under many settings, each compared with a reference, in one process group.

usage: run_gradients.py PIPELINE PLAN.json

PLAN.json: `engines`, lists of overrides, an engine for each; `cases`, pairs of overrides and the safetensors file with
the reference gradients, each run with every engine; `output`, the JSON to write; `adapters`, if LoRA is to begin with
the values of a safetensors file: where its B is zero, A has no gradient. AdamW with beta1 = 0 keeps as its
first moment the very gradient that it is given, and a learning rate of 0 leaves the weights for the next case.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])
EXACT = ["train.adam_beta1=0", "train.gradient_clipping=0", "train.max_steps=1"]


def main() -> None:
    import torch

    from shared.load_config import load_config
    from stage2_train.distributed import meet
    from stage2_train.setup import prepare
    from stage2_train.trainer import Trainer

    pipeline, plan = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    world = meet()
    if "adapters" in plan:
        begin_with(plan["adapters"])
    found = []
    for engine in plan["engines"]:
        first, _ = plan["cases"][0]
        trainer = Trainer(prepare(load_config(pipeline, [*first, *EXACT, *engine])), world)
        for group in trainer.engine.optimizer.param_groups:
            group["lr"] = 0.0
        for overrides, reference in plan["cases"]:
            job = prepare(load_config(pipeline, [*overrides, *EXACT, *engine]))
            loss, gradients = gradients_of(trainer, job)
            if world.rank == 0:
                found.append({"engine": engine, "case": overrides, "loss": loss, **errors(gradients, reference)})
    if world.rank == 0:
        Path(plan["output"]).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def begin_with(adapters: str) -> None:
    """Make LoRA begin with given values."""
    from safetensors.torch import load_file

    from stage2_train import engine

    add_lora = engine.add_lora

    def add(model: Any, *arguments: Any) -> None:
        add_lora(model, *arguments)
        _, unexpected = model.load_state_dict(load_file(adapters), strict=False)
        assert not unexpected

    engine.add_lora = add


def gradients_of(trainer: Any, job: Any) -> tuple[float, dict[str, Any]]:
    """Loss of step 1 of a job, and the gradients that the optimizer was given; called by all ranks."""
    from deepspeed.utils import safe_get_full_optimizer_state

    from shared.stopping import StopSwitch
    from stage2_train.step import accumulate_gradients, weigh_step
    from stage2_train.step_loader import StepLoader
    from stage2_train.weigh import StepWeigher

    engine, world = trainer.engine, trainer.world
    weigher = StepWeigher(job.weighting, job.config, job.cache, world.all_reduce)
    loader = StepLoader(job, world, trainer.form, weigher)
    loaded, _ = loader.get(1)
    loader.close()
    totals = accumulate_gradients(
        engine, world, weigh_step(1, loaded, weigher, engine, world), len(loaded.rows), StopSwitch()
    )
    engine.step()
    gradients = {
        name: safe_get_full_optimizer_state(parameter, "exp_avg").clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }
    return totals.loss, gradients


def errors(gradients: dict[str, Any], reference: str) -> dict[str, float]:
    """Norm of the difference to the reference over the norm of the reference: of all, and of the worst parameter."""
    from safetensors.torch import load_file

    expected = load_file(reference)
    assert gradients.keys() == expected.keys(), gradients.keys() ^ expected.keys()
    squares = {
        name: (float((gradients[name].double() - exact).square().sum()), float(exact.square().sum()))
        for name, exact in expected.items()
    }
    difference, norm = (sum(pair[i] for pair in squares.values()) for i in (0, 1))
    worst = max((off / exact if exact else off) for off, exact in squares.values())
    return {"error": (difference / norm) ** 0.5 if norm else difference**0.5, "worst": worst**0.5, "norm": norm**0.5}


if __name__ == "__main__":
    main()
