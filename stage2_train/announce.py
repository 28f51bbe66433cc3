"""What a run says before it begins: its arithmetic, and what its weights will do."""

from typing import Any

from shared.config import TrainConfig
from shared.files import remove_stale_temporaries
from shared.outlook import describe, warnings_of
from stage2_train.batch import BatchForm
from stage2_train.distributed import World
from stage2_train.lora import count_parameters, target_names
from stage2_train.metrics import metrics_path
from stage2_train.mixture import MixedCache, described
from stage2_train.outlook import weight_outlook
from stage2_train.setup import Job, resolve_dtype, write_config


def announce(job: Job, world: World, form: BatchForm, model: Any) -> None:
    """Write config.yaml and print the batch arithmetic, what is trained, and warnings; called by rank 0."""
    config, plan, cache = job.config, job.plan, job.cache
    remove_stale_temporaries(job.output)
    if not job.checkpoints and metrics_path(job.output).is_file():
        print(f"{job.output} holds a run that was stopped before its first checkpoint: it starts over at step 1")
    write_config(job)
    rows = plan.rows_of_step(1)
    dealt = job.deal(rows, world.size, form)
    stage = config.zero_stage()
    num_tokens, num_targets = int(cache.lengths[rows].sum()), int(cache.num_targets[rows].sum())
    layout = "packed" if form.packed else "padded"
    print(
        f"{len(cache):,} rows x {config.epochs} epochs / {plan.batch_size} per step: {plan.num_steps} steps; step 1 is "
        f"{num_tokens:,} tokens, {num_targets:,} targets, as {len(dealt[0])} {layout} micro-batches on each of "
        f"{_ranks(world, form)}; {resolve_dtype(config)}, ZeRO-{max(1, stage)}, rule "
        f"{job.weighting.rule}/{job.weighting.source}, normalised by {config.normalize_by}",
        flush=True,
    )
    if isinstance(cache, MixedCache):
        print("\n".join(["the rows are of several stores:", *described(cache, config.scores, plan)]), flush=True)
        priors = {part.manifest.identity.prior_weights for part in cache.parts}
        if len(priors) > 1:
            print("WARNING: the stores were scored by different priors: weights mean another model's support in each")
    print(_trained(model, config), flush=True)
    if stage == 0:
        print("ZeRO stage 0 runs as stage 1: in DeepSpeed 0.19 stage 0 misses the first step's bias correction")
    if outlook := weight_outlook(cache, job.weighting):
        print(f"{describe(outlook)}: about {outlook.effective_share * num_targets:,.0f} in step 1", flush=True)
        for warning in warnings_of(outlook, job.weighting):
            print(warning, flush=True)


def _trained(model: Any, config: TrainConfig) -> str:
    num_trained, num_parameters = count_parameters(model)
    if config.lora is None:
        return f"trains all {num_parameters:,} parameters"
    return (
        f"trains {num_trained:,} parameters, {num_trained / num_parameters:.2%} of {num_parameters:,}: LoRA of rank "
        f"{config.lora.rank} on {', '.join(target_names(model))}"
    )


def _ranks(world: World, form: BatchForm) -> str:
    if form.num_parts == 1:
        return f"{world.size} ranks"
    return f"{world.size // form.num_parts} groups of {form.num_parts} ranks"
