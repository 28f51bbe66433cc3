"""The training loop."""

import time
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from shared.errors import UserError
from stage2_train.batch import Batch
from stage2_train.checkpoint import load_newest, save_checkpoint
from stage2_train.checkpoint_files import prune_checkpoints, read_state, remove_checkpoints_after
from stage2_train.deepspeed_config import learning_rate_at
from stage2_train.distributed import World
from stage2_train.engine import build_engine
from stage2_train.evaluate import evaluate
from stage2_train.export import export_model
from stage2_train.loss import GivenWeights
from stage2_train.metrics import StepMetrics, TrainingProgress, append_line, cut_after, eval_path, metrics_path
from stage2_train.preflight import refuse_misaligned, stored_logprobs
from stage2_train.setup import Job, layout, resolve_dtype
from stage2_train.step import accumulate_gradients, weigh_step
from stage2_train.step_loader import StepLoader
from stage2_train.weigh import StepWeigher


class Trainer:
    """A run on one rank, from its first or resumed step to the exported model."""

    def __init__(self, job: Job, world: World):
        """Load the model, and the checkpoint if there is one; called by all ranks."""
        self.job, self.world, self.config = job, world, job.config
        self.weigher = StepWeigher(job.weighting, job.config, job.cache, world.all_reduce)
        self.engine, self.model, self.form = build_engine(job, world)
        self.loader = StepLoader(job, world, self.form, self.weigher)
        self.engine.train()
        self.first_step = 1
        if job.checkpoints:
            self.first_step = self._resume()

    def run(self) -> None:
        """Train to the last step, evaluate, and export the model; called by all ranks."""
        num_steps = self.job.plan.num_steps
        if self.world.rank == 0:
            cut_after(metrics_path(self.job.output), self.first_step - 1)
            # A run that starts over evaluates before its first step again.
            cut_after(eval_path(self.job.output), self.first_step - 1 if self.job.checkpoints else -1)
        if self.first_step == 1:
            self._evaluate(0)
        with TrainingProgress(self.job.output, self.first_step, num_steps, self.world.rank == 0) as progress:
            for step in range(self.first_step, num_steps + 1):
                progress.record(self._step(step))
                is_last = step == num_steps
                if is_last or (self.config.eval_steps and step % self.config.eval_steps == 0):
                    self._evaluate(step)
                if is_last or step % self.config.checkpoint_steps == 0:
                    self._save(step)
        self.loader.close()
        export_model(self.engine, self.model, self.job.tokenizer, self.job.output / "model")
        self.world.barrier()

    def _step(self, step: int) -> StepMetrics:
        """One optimizer step: every micro-batch forward and backward, then the update."""
        started = time.perf_counter()
        learning_rate = learning_rate_at(step, self.job.plan.num_steps, self.config)
        loaded, waited = self.loader.get(step)
        rows = loaded.rows
        # Dropout, where a model has it, is a function of step and rank: a resumed run draws the same.
        torch.manual_seed((self.config.seed * 1_000_003 + step) * 65_537 + self.world.rank)
        weighed = weigh_step(step, loaded, self.weigher, self.engine, self.world)
        if step == 1 and self.job.starts_from_prior:
            self._refuse_misaligned(rows, [part.batch for part in weighed])
        totals = accumulate_gradients(self.engine, self.world, weighed, len(rows))
        self._refuse_non_finite(step, rows, totals.row_nll_R, totals.loss)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        grad_norm = float(self.engine.get_global_grad_norm())
        if not np.isfinite(grad_norm):
            raise UserError(
                f"step {step}: the gradient's norm is {grad_norm}; the step was not applied. {self._advice()}"
            )
        num_targets = int(self.job.cache.num_targets[rows].sum())
        nll = totals.nll(num_targets)
        return StepMetrics(
            step=step, loss=totals.loss, nll=nll,
            nll_sampled=totals.nll_sampled(num_targets) if nll is None else None,
            num_nll_targets=totals.num_kept + totals.num_watched,
            weight_mean=totals.weight_sum / num_targets, weight_zero_fraction=1.0 - totals.num_kept / num_targets,
            grad_norm=grad_norm, lr=learning_rate, num_targets=num_targets,
            tokens_per_second=totals.num_tokens / (time.perf_counter() - started), data_wait_seconds=waited,
        )  # fmt: skip

    def _refuse_non_finite(self, step: int, rows: np.ndarray, row_nll_R: np.ndarray, loss: float) -> None:
        """Stop before the update where a number is not finite, and name the rows."""
        is_bad_R = ~np.isfinite(row_nll_R)
        if is_bad_R.any() or not np.isfinite(loss):
            named = self._row_ids(rows[is_bad_R if is_bad_R.any() else slice(None)])
            raise UserError(
                f"step {step}: the loss is not finite before the update; rows concerned: {', '.join(named)}. "
                + self._advice()
            )

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
        dtypes = {resolve_dtype(self.config), self.job.cache.manifest.identity.weight_dtype}
        refuse_misaligned(self.job.cache, rows.tolist(), means.tolist(), dtypes, self.job.files.name)

    def _row_ids(self, rows: Sequence[int] | np.ndarray, most: int = 8) -> list[str]:
        named = [repr(row["row_id"]) for row in self.job.cache.stored_rows(list(rows[:most]), ["row_id"])]
        return named + ([f"and {len(rows) - most} more"] if len(rows) > most else [])

    def _advice(self) -> str:
        return "Lower train.learning_rate, raise train.warmup_ratio, or look at these rows"

    @torch.no_grad()
    def _nll(self, batch: Batch) -> Tensor:
        """nll_N of a micro-batch without dropout and gradient; called by all ranks."""
        self.engine.eval()
        none = torch.zeros(0, dtype=torch.int64, device=self.world.device)
        everywhere_N = torch.arange(len(batch.places_N), device=self.world.device)
        nll_N = self.engine(batch.tokens, GivenWeights(none.float(), none, everywhere_N))[1]
        self.engine.train()
        return nll_N

    def _evaluate(self, step: int) -> None:
        for name, cache in self.job.eval_caches.items():
            result = evaluate(step, name, cache, self._nll, self.world, self.job.bounds(self.form), self.form)
            if self.world.rank == 0:
                append_line(eval_path(self.job.output), asdict(result))
                supported = "none" if result.nll_supported is None else f"{result.nll_supported:.4f}"
                print(f"evaluation after step {step} on {name}: nll {result.nll:.4f}, of supported targets {supported}")

    def _save(self, step: int) -> None:
        state = {**layout(self.config), "settings": self.job.settings()}
        save_checkpoint(self.engine, self.job.output, step, state, self.world)
        if self.world.rank == 0:
            prune_checkpoints(self.job.output, self.config.keep_checkpoints)

    def _resume(self) -> int:
        """Load the checkpoint; returns the step to go on with."""
        if self.world.rank == 0:
            for problem in self.job.damaged:
                print(f"WARNING: {problem}: passed over", flush=True)
        folder = load_newest(self.engine, self.job.checkpoints, self.world)
        step = int(read_state(folder)["step"])
        if self.world.rank == 0:
            # Where an older checkpoint was asked for or taken, what came after it is made again.
            remove_checkpoints_after(self.job.output, step)
            print(f"resumed from {folder}, after step {step}", flush=True)
        return step + 1
