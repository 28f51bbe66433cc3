"""A scoring run: plan the shards, have the missing ones scored by one process or many workers, sum up."""

from collections.abc import Sequence
from contextlib import closing
from typing import Any

from shared.config import Config
from shared.errors import UserError
from shared.places import Place
from shared.score_store import create_or_match, read_manifest, replace_manifest
from shared.shards import open_store, read_dropped, shards_there
from shared.stopping import StopSwitch, stop_switch
from stage1_score.choose_engine import choose_device, load_engine
from stage1_score.dispatch import Dispatcher, Pool
from stage1_score.engine import Engine
from stage1_score.job_metrics import JobMetrics, metrics_path
from stage1_score.local_workers import LocalPool, devices_of_workers, visible_gpus
from stage1_score.plan import Plan, listed_misfits, make_plan, refuse_misfits
from stage1_score.progress import ScoringProgress, scoring_progress
from stage1_score.score_shard import ShardReport, prefetched, score_shard, tokenize_shard
from stage1_score.worker import Task


def run(config: Config, command: Sequence[str]) -> None:
    """Score what is missing of the store that the config describes.

    Args:
        command: the words of the command line, for messages that give a command.

    Raises:
        UserError: any mistake in config, data, prior or store; nothing half-written is left.
        Stopped: by a signal; finished shards are kept.
    """
    plan = make_plan(config, command)
    with stop_switch() as switch:
        if not plan.missing:
            _begin_store(plan, command)
        else:
            num_rows = sum(len(plan.manifest.source.rows_of_shard(index)) for index in plan.missing)
            with scoring_progress(num_rows) as progress:
                job = Job(config, plan, command, progress)
                summary = job.run(switch)
            workers = len(summary["shards_of_worker"])
            by = "" if workers == 1 else f" by {workers} workers"
            print(f"scored {summary['tokens_per_second']:,.0f} tokens/s{by}, loading not counted")
    _summarise(plan.store, config.score.part)


class Job:
    """The scoring of the missing shards, whoever does it."""

    def __init__(self, config: Config, plan: Plan, command: Sequence[str], progress: ScoringProgress):
        self._config, self._plan, self._command, self._progress = config, plan, command, progress
        self._metrics = JobMetrics(metrics_path(plan.store, config.score.part))
        self._num_misfits = listed_misfits(plan)

    def run(self, switch: StopSwitch) -> dict[str, Any]:
        """Score all missing shards; returns the summary of the metrics."""
        score = self._config.score
        # Settled here: a worker that sees no GPU must not score on its CPU instead.
        settled = score.model_copy(update={"device": choose_device(self._config)})
        task = Task(self._config.model_copy(update={"score": settled}), self._plan.manifest)
        if score.launcher == "ray":
            from stage1_score.ray_workers import RayPool

            with RayPool(task, was_auto=score.device == "auto") as pool:
                self._dispatch(pool, pool.num_workers, switch)
        else:
            devices = self._devices()
            if len(devices) == 1:
                with closing(load_engine(self._config, self._plan.files, self._plan.manifest.identity)) as engine:
                    self.score_here(engine, switch)
            else:
                with LocalPool(task, devices) as pool:
                    self._dispatch(pool, len(devices), switch)
        return self._metrics.summarise()

    def score_here(self, engine: Engine, switch: StopSwitch) -> None:
        """Score in this process, the next shard tokenised meanwhile."""
        switch.check()
        # Only now is the store begun: a prior that cannot be loaded leaves nothing behind.
        self._on_ready()

        def on_batch(num_rows: int, num_tokens: int) -> None:
            self._progress.add(num_rows, num_tokens)
            switch.check()

        for shard in prefetched(lambda index: tokenize_shard(self._plan, index), self._plan.missing):
            self._on_done(score_shard(self._plan, engine, shard, on_batch, "0"))
            switch.check()

    def _dispatch(self, pool: Pool, num_workers: int, switch: StopSwitch) -> None:
        dispatcher = Dispatcher(pool, self._plan.missing, num_workers)
        dispatcher.run(self._on_ready, self._progress.add, self._on_done, switch.check)

    def _devices(self) -> list[dict[str, str]]:
        score = self._config.score
        gpus = visible_gpus() if choose_device(self._config) == "cuda" else []
        wanted = max(1, len(gpus) // score.tensor_parallel) if score.workers == "auto" else score.workers
        useful = min(wanted, len(self._plan.missing))
        if useful < wanted:
            print(
                f"{useful} of {wanted} workers are used, one for each shard; a new store with a smaller "
                "score.shard_rows divides the work further"
            )
        devices = devices_of_workers(useful, gpus, score.tensor_parallel)
        if score.workers != "auto" and gpus and wanted * score.tensor_parallel > len(gpus):
            raise UserError(
                f"score.workers={wanted} with score.tensor_parallel={score.tensor_parallel} needs "
                f"{wanted * score.tensor_parallel} GPUs; {len(gpus)} are visible"
            )
        if not devices:
            raise UserError(
                f"score.tensor_parallel={score.tensor_parallel} needs as many GPUs; {len(gpus)} are visible"
            )
        return devices

    def _on_ready(self) -> None:
        # Loading the prior is not scoring: what is reported are the speeds of the work itself.
        self._metrics.start_clock()
        self._progress.start_clock()
        _begin_store(self._plan, self._command)

    def _on_done(self, report: ShardReport) -> None:
        self._metrics.add(report)
        # Counted so far are rows that were scored: those of one conversation may be several.
        self._progress.add(len(self._plan.manifest.source.rows_of_shard(report.shard)) - report.num_rows, 0)
        self._num_misfits += report.num_misfits
        refuse_misfits(self._num_misfits, self._plan.manifest.source.num_rows, report.first_misfit)


def _begin_store(plan: Plan, command: Sequence[str]) -> None:
    if plan.grown_from is not None:
        replace_manifest(plan.store, plan.grown_from, plan.manifest)
        return
    begun = create_or_match(plan.store, plan.manifest, command)
    if begun.fingerprint != plan.manifest.fingerprint:
        raise UserError(f"{plan.store}: another start began it with other columns meanwhile; run the command again")


def _summarise(store: Place, part: str | None) -> None:
    planned = range(read_manifest(store).source.num_shards)
    num_done = len(shards_there(store, planned))
    if part is not None and num_done < len(planned):
        print(f"{store}: part {part} is done; {num_done} of {len(planned)} shards are there")
        return
    manifest, shards = open_store(store)
    num_rows, num_targets = sum(shard.num_rows for shard in shards), sum(shard.num_targets for shard in shards)
    num_dropped = sum(len(read_dropped(shard)) for shard in shards)
    num_bytes = sum(shard.path.stat().st_size for shard in shards)
    if not num_rows:
        raise UserError(f"{store}: no row left with a target; see the .dropped.jsonl files for the reasons")
    print(
        f"{store}: {num_rows:,} rows kept, {num_dropped:,} dropped (see *.dropped.jsonl), "
        f"{num_targets:,} targets, {num_bytes / 1e6:,.1f} MB, fingerprint {manifest.fingerprint[:12]}"
    )
