"""The training loop."""

import time
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from shared.stopping import STOP_SIGNALS, Stopped, StopSwitch, stop_switch
from stage2_train.batch import Batch
from stage2_train.checkpoint import load_newest, save_checkpoint
from stage2_train.checkpoint_files import TrainerState, prune_checkpoints, read_state, remove_checkpoints_after
from stage2_train.deepspeed_config import learning_rate_at
from stage2_train.distributed import World
from stage2_train.engine import build_engine
from stage2_train.evaluate import evaluate
from stage2_train.export import export_model
from stage2_train.loss import GivenWeights
from stage2_train.metrics import (
    StepMetrics,
    TrainingProgress,
    append_line,
    cut_after,
    eval_path,
    evaluated,
    finite_or_none,
    metrics_path,
)
from stage2_train.nonfinite import NonFiniteGuard
from stage2_train.preflight import refuse_misaligned, stored_logprobs
from stage2_train.probe import probe_nll, refuse_other_loss
from stage2_train.setup import Job, resolve_dtype, zero_stage
from stage2_train.step import StepTotals, accumulate_gradients, weigh_step
from stage2_train.step_loader import StepLoader
from stage2_train.tracking import track
from stage2_train.weigh import StepWeigher


class Trainer:
    """A run on one rank, from its first or resumed step to the exported model."""

    def __init__(self, job: Job, world: World):
        """Load the model, and the checkpoint if there is one; called by all ranks."""
        self.job, self.world, self.config = job, world, job.config
        self.weigher = StepWeigher(job.weighting, job.config, job.cache, world.all_reduce)
        self.engine, self.model, self.form = build_engine(job, world)
        world.limit_waits(self.config.timeout_seconds)
        self.loader = StepLoader(job, world, self.form, self.weigher)
        self.guard = NonFiniteGuard(self.config.max_nonfinite_steps, self._row_ids, self._say)
        self.stop = StopSwitch("saving a checkpoint, then stopping" if world.rank == 0 else "", insists=False)
        self.engine.train()
        # Ranks may see a shared folder in different states: what is tried, and in which order, rank 0 says.
        names = world.of_rank_0([folder.name for folder in job.checkpoints])
        self.is_resumed = bool(names)
        self.saved_step = self._resume(names) if names else 0

    def run(self) -> None:
        """Train to the last step, evaluate, and export the model; called by all ranks.

        Raises:
            Stopped: a signal came to any rank; a checkpoint of the last step made is there.
        """
        done = self.saved_step if self.is_resumed else None
        tracking = track(self.config, self.job.output, done, self.world.rank == 0)
        with stop_switch(STOP_SIGNALS, self.stop), tracking as self.trackers:
            # Trackers start and end on rank 0 alone, and may wait for a server.
            self.world.wait_for_all()
            self._train()
        self.world.wait_for_all()
        self.loader.close()
        export_model(self.engine, self.model, self.job)
        self.world.wait_for_all()

    def _train(self) -> None:
        done, num_steps = self.saved_step, self.job.plan.num_steps
        if self.world.rank == 0:
            cut_after(metrics_path(self.job.output), done)
            # A run that starts over evaluates before its first step again.
            cut_after(eval_path(self.job.output), done if self.is_resumed else -1)
        if self._evaluate(done):
            raise Stopped
        with TrainingProgress(self.job.output, done + 1, num_steps, self.world.rank == 0) as progress:
            for step in range(done + 1, num_steps + 1):
                metrics, is_stopping = self._step(step)
                progress.record(metrics)
                self.trackers.record(asdict(metrics))
                if step == num_steps or step % self.config.checkpoint_steps == 0:
                    self._save(step)
                if is_stopping or self._evaluate(step):
                    self._save(step)
                    raise Stopped

    def _step(self, step: int) -> tuple[StepMetrics, bool]:
        """One optimizer step: every micro-batch forward and backward, then the update.

        Returns:
            Its metrics, and whether any rank was asked to stop.
        """
        started = time.perf_counter()
        loaded, waited = self.loader.get(step)
        rows = loaded.rows
        # Dropout, where a model has it, is a function of step and rank: a resumed run draws the same.
        torch.manual_seed(((self.config.seed * 1_000_003 + step) * 65_537 + self.world.rank) % 2**63)
        weighed = weigh_step(step, loaded, self.weigher, self.engine, self.world)
        if step == 1 and self.job.starts_from_prior:
            self._refuse_misaligned(rows, [part.batch for part in weighed])
        totals = accumulate_gradients(self.engine, self.world, weighed, len(rows), self.stop)
        grad_norm, was_applied = self._update(step, rows, totals)
        num_targets = int(self.job.cache.num_targets[rows].sum())
        nll = totals.nll(num_targets)
        metrics = StepMetrics(
            step=step, loss=finite_or_none(totals.loss), nll=finite_or_none(nll),
            nll_sampled=finite_or_none(totals.nll_sampled(num_targets)) if nll is None else None,
            num_nll_targets=totals.num_kept + totals.num_watched,
            weight_mean=finite_or_none(totals.weight_sum / num_targets),
            weight_zero_fraction=1.0 - totals.num_kept / num_targets,
            grad_norm=finite_or_none(grad_norm), update_applied=was_applied,
            lr=learning_rate_at(step, self.job.plan.num_steps, self.config), num_targets=num_targets,
            tokens_per_second=totals.num_tokens / (time.perf_counter() - started), data_wait_seconds=waited,
        )  # fmt: skip
        return metrics, totals.num_stopping > 0

    def _update(self, step: int, rows: np.ndarray, totals: StepTotals) -> tuple[float, bool]:
        """Let DeepSpeed apply the accumulated gradients; the norm before clipping, and whether it did."""
        is_finite = self.guard.check_loss(step, rows, totals)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, self.job.plan.num_steps, self.config)
        self.engine.step()
        grad_norm, was_applied = float(self.engine.get_global_grad_norm()), self.engine.was_step_applied()
        if is_finite:
            self.guard.check_update(step, rows, grad_norm, was_applied)
        return grad_norm, was_applied

    def _refuse_misaligned(self, rows: np.ndarray, batches: Sequence[Batch]) -> None:
        """Stop where the model, which is still the prior, does not give the stored scores."""
        stored = stored_logprobs(self.job.cache, rows.tolist())
        difference_R = torch.zeros(len(rows), dtype=torch.float64, device=self.world.device)
        for batch in batches:
            nll_N = self._nll(batch)
            if len(nll_N):
                pairs = zip(batch.places_N.tolist(), batch.positions_N.tolist(), strict=True)
                stored_N = torch.tensor([stored[place][position] for place, position in pairs], device=nll_N.device)
                difference_R.index_add_(0, batch.places_N, (nll_N + stored_N).abs().double())
        means = self.world.all_reduce(difference_R).cpu().numpy() / self.job.cache.num_targets[rows]
        stored = {part.manifest.identity.weight_dtype for part in self.job.cache.parts}
        dtypes = {resolve_dtype(self.config), *stored}
        refuse_misaligned(self.job.cache, rows.tolist(), means.tolist(), dtypes, self.job.files.name)

    def _row_ids(self, rows: Sequence[int] | np.ndarray, most: int = 8) -> list[str]:
        named = [repr(row["row_id"]) for row in self.job.cache.stored_rows(list(rows[:most]), ["row_id"])]
        return named + ([f"and {len(rows) - most} more"] if len(rows) > most else [])

    def _say(self, message: str) -> None:
        if self.world.rank == 0:
            print(message, flush=True)

    @torch.no_grad()
    def _nll(self, batch: Batch) -> Tensor:
        """nll_N of a micro-batch without dropout and gradient; called by all ranks."""
        self.engine.eval()
        none = torch.zeros(0, dtype=torch.int64, device=self.world.device)
        everywhere_N = torch.arange(len(batch.places_N), device=self.world.device)
        nll_N = self.engine(batch.tokens, GivenWeights(none.float(), none, everywhere_N))[1]
        self.engine.train()
        return nll_N

    def _evaluate(self, step: int) -> bool:
        """Evaluate on the stores that are due after a step; whether a rank was asked to stop meanwhile."""
        every, num_steps = self.config.eval_steps, self.job.plan.num_steps
        if not (step in (0, num_steps) or (every and step % every == 0)):
            return False
        for name, cache in self.job.eval_caches.items():
            # A run that was stopped while it evaluated does what is left when it goes on.
            if self.world.any(self.world.rank == 0 and (step, name) in evaluated(self.job.output)):
                continue
            bounds = self.job.bounds(self.form)
            result = evaluate(step, name, cache, self._nll, self.world, bounds, self.form, self.stop)
            if result is None:
                return True
            if self.world.rank == 0:
                append_line(eval_path(self.job.output), asdict(result))
                self.trackers.record_evaluation(asdict(result))
                supported = "none" if result.nll_supported is None else f"{result.nll_supported:.4f}"
                print(f"evaluation after step {step} on {name}: nll {result.nll:.4f}, of supported targets {supported}")
        return False

    def _save(self, step: int) -> None:
        """Save the checkpoint after a step, unless it is there."""
        if self.saved_step == step:
            return
        state = TrainerState(
            step, self.world.size, zero_stage(self.config), self.job.settings(), self._probe(step), self.guard.num_steps
        )
        save_checkpoint(self.engine, self.job.output, state, self.world)
        self.saved_step = step
        if self.world.rank == 0:
            prune_checkpoints(self.job.output, self.config.keep_checkpoints)

    def _resume(self, names: list[str]) -> int:
        """Load the first whole checkpoint of a list; returns the step after which it was saved."""
        for problem in self.job.damaged:
            self._say(f"WARNING: {problem}: passed over")
        folders = [self.job.output / "checkpoints" / name for name in names]
        folder = load_newest(self.engine, folders, self.world)
        state = read_state(folder)
        self.guard.num_steps = state.num_nonfinite_steps
        refuse_other_loss(state.probe_nll, self._probe(state.step), resolve_dtype(self.config), folder)
        # Where an older checkpoint was asked for or taken, what came after it is made again.
        later = remove_checkpoints_after(self.job.output, state.step) if self.world.rank == 0 else []
        removed = f"; {', '.join(later)} removed, these steps are made again" if later else ""
        self._say(f"resumed from {folder}, after step {state.step}{removed}")
        if self.config.resume != "auto":
            self._say("WARNING: train.resume=PATH begins there at each start: leave it out to go on from what comes")
        return state.step

    def _probe(self, step: int) -> float:
        return probe_nll(self.job, step, self.world, self.form, self._nll)
