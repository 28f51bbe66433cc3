"""A worker: one copy of the prior that scores the shards it is given. Processes and Ray actors run the same."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from shared.config import Config
from shared.places import place
from shared.score_store import Manifest
from stage1_score.engine import DeviceLost
from stage1_score.score_shard import ShardReport, TokenizedShard, score_shard, tokenize_shard


@dataclass(frozen=True)
class Task:
    """What a worker needs to know; it hashes nothing and decides nothing."""

    config: Config
    manifest: Manifest

    def with_absolute_paths(self) -> "Task":
        """The same task for a process that starts in another folder."""
        config, source = self.config, self.manifest.source
        assert config.prior.model is not None and config.score.output is not None  # noqa: PT018
        model = Path(config.prior.model)
        prior = config.prior.model_copy(update={"model": str(model.absolute()) if model.is_dir() else str(model)})
        score = config.score.model_copy(update={"output": str(place(config.score.output).absolute())})
        files = tuple(file.model_copy(update={"path": str(place(file.path).absolute())}) for file in source.files)
        return Task(
            config.model_copy(update={"prior": prior, "score": score}),
            self.manifest.model_copy(update={"source": source.model_copy(update={"files": files})}),
        )


class ShardWorker:
    """Scores shards with an engine of its own."""

    def __init__(self, task: Task, name: str):
        """Load tokenizer and prior.

        Raises:
            UserError: as `load_engine`.
            DeviceLost: the task's device is not there.
        """
        import torch

        from stage1_score.choose_engine import load_engine
        from stage1_score.plan import plan_of_manifest

        if task.config.score.device == "cuda" and not torch.cuda.is_available():
            raise DeviceLost("this worker sees no CUDA device")  # never on a CPU instead, with other numbers
        self._name = name
        self._plan = plan_of_manifest(task.config, task.manifest)
        self._engine = load_engine(task.config, self._plan.files, task.manifest.identity)
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._tokenized: dict[int, Future[TokenizedShard]] = {}
        self._seen: set[int] = set()

    def prepare(self, index: int) -> None:
        """Begin to tokenise a shard that will be asked for, beside what is being scored."""
        with self._lock:
            if index not in self._seen:
                self._seen.add(index)
                self._tokenized[index] = self._pool.submit(tokenize_shard, self._plan, index)

    def score(self, index: int, on_batch: Callable[[int, int], None]) -> ShardReport:
        """Score and write a shard; what `on_batch` raises ends it."""
        self.prepare(index)
        shard = self._tokenized.pop(index).result()
        return score_shard(self._plan, self._engine, shard, on_batch, self._name)

    def close(self) -> None:
        """End the engine's own processes."""
        self._pool.shutdown(cancel_futures=True)
        self._engine.close()
