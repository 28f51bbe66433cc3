"""A scoring run: plan the shards, score the missing ones, write each when it is whole."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from shared.config import Config
from shared.errors import UserError
from shared.files import probe_writable, remove_stale_temporaries
from shared.pretrained import PretrainedFiles, find_pretrained, load_tokenizer, vocab_rows_of
from shared.score_store import MANIFEST_NAME, DataFile, Manifest, Source, create_or_match, read_manifest
from shared.shards import dropped_path, open_store, read_footer, shard_path, write_shard
from stage1_score.engine import Engine
from stage1_score.examples import Example, RowFormat
from stage1_score.identity import build_manifest
from stage1_score.progress import scoring_progress
from stage1_score.raw_rows import expand_paths
from stage1_score.read import detect_format, read_rows, scan_source
from stage1_score.tokenization import (
    TEMPLATE_REASON,
    DroppedRow,
    RowTokenizer,
    TokenizedExample,
    choose_template,
    marked_text,
)

_SAMPLE_ROWS = 2000
_MOST_MISFITS = 0.01


@dataclass(frozen=True)
class Plan:
    """All that a run needs to know before it loads the prior."""

    store: Path
    manifest: Manifest
    row_format: RowFormat
    row_tokenizer: RowTokenizer
    files: PretrainedFiles
    missing: list[int]
    """Shards that are not there yet."""


@dataclass(frozen=True)
class TokenizedShard:
    """The rows of a shard, ready for the engine."""

    index: int
    examples: list[TokenizedExample]
    dropped: list[DroppedRow]


def run(config: Config, command: Sequence[str]) -> None:
    """Score what is missing of the store that the config describes.

    Args:
        command: the words of the command line, for messages that give a command.

    Raises:
        UserError: any mistake in config, data, prior or store; nothing half-written is left.
    """
    plan = make_plan(config, command)
    # Loaded before the store is begun: a prior that cannot be loaded leaves nothing behind.
    engine = load_engine(config, plan) if plan.missing else None
    begun = create_or_match(plan.store, plan.manifest, command)
    if begun.fingerprint != plan.manifest.fingerprint:
        raise UserError(f"{plan.store}: another start began it with other columns meanwhile; run the command again")
    if engine is not None:
        tokens_per_second = score_shards(plan, engine)
        print(f"scored {tokens_per_second:,.0f} tokens/s")
    _summarise(plan.store)


def make_plan(config: Config, command: Sequence[str]) -> Plan:
    """Read the data once, compare with the store that is there, and print what will be done."""
    if config.prior.model is None or config.score.output is None:
        missing = "prior.model" if config.prior.model is None else "score.output"
        raise UserError(f"expected {missing}; got none")
    store = Path(config.score.output)
    paths = expand_paths(config.data)
    files = find_pretrained(config.prior.model, config.prior.revision, config.prior.trust_remote_code)
    row_format = detect_format(paths, config.data, vocab_rows_of(files.config()))
    tokenizer = load_tokenizer(files)
    template = choose_template(config.data, row_format.name, tokenizer)
    found = read_manifest(store) if (store / MANIFEST_NAME).is_file() else None
    source = _source(config, paths, row_format, found.source if found else None)
    wanted = build_manifest(config, files, tokenizer, source, template, _dtypes(config), _engine(config, found))
    stop_ids = frozenset(wanted.stop_token_ids)
    row_tokenizer = RowTokenizer(tokenizer, config.data, template, stop_ids, wanted.vocab_size)
    print(f"data: {row_format.name} rows, template {template}, targets {config.data.targets}")
    _note_positions(files, config.data.max_length)
    if found is None:
        _preview(store, source, row_format, row_tokenizer, tokenizer, len(config.score.columns))
    probe_writable(store)
    manifest = wanted if found is None else create_or_match(store, wanted, command)
    # The store may name the files as another start saw them: read them where they are now.
    manifest = manifest.model_copy(update={"source": source})
    remove_stale_temporaries(store)
    missing = [index for index in range(source.num_shards) if not _is_done(store, manifest, index)]
    print(f"{store}: {source.num_shards - len(missing)} of {source.num_shards} shards done, {len(missing)} to score")
    return Plan(store, manifest, row_format, row_tokenizer, files, missing)


def score_shards(plan: Plan, engine: Engine) -> float:
    """Score and write the missing shards; returns tokens per second, padding not counted."""
    source = plan.manifest.source
    misfits = _listed_misfits(plan)
    with scoring_progress(sum(len(source.rows_of_shard(index)) for index in plan.missing)) as progress:
        for shard in _prefetched(lambda index: tokenize_shard(plan, index), plan.missing):
            misfits += sum(row.breaks_template for row in shard.dropped)
            _refuse_misfits(misfits, source.num_rows, shard.dropped)
            progress.add(len(shard.dropped), 0)
            rows = engine.score(shard.examples, progress.add)
            listed = [{"row_id": r.row_id, "source_index": r.source_index, "reason": r.reason} for r in shard.dropped]
            write_shard(plan.store, shard.index, plan.manifest, rows, listed, engine.describe())
        return progress.tokens_per_second


def tokenize_shard(plan: Plan, index: int) -> TokenizedShard:
    """Read and tokenise the source rows of one shard."""
    source = plan.manifest.source
    rows = read_rows(source, plan.row_format, source.rows_of_shard(index))
    return TokenizedShard(index, *_tokenize(rows, plan.row_tokenizer))


def _tokenize(
    examples: Iterator[Example], row_tokenizer: RowTokenizer
) -> tuple[list[TokenizedExample], list[DroppedRow]]:
    results = [row_tokenizer.tokenize(example) for example in examples]
    kept = [result for result in results if isinstance(result, TokenizedExample)]
    return kept, [result for result in results if isinstance(result, DroppedRow)]


def _prefetched(function: Callable[[int], TokenizedShard], indices: Sequence[int]) -> Iterator[TokenizedShard]:
    """Results in order, the next one made in a thread while the engine works on this one."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = [pool.submit(function, index) for index in indices[:1]]
        for following in [*indices[1:], None]:
            current = pending.pop()
            result = current.result()
            if following is not None:
                pending.append(pool.submit(function, following))
            yield result


def _source(config: Config, paths: list[Path], row_format: RowFormat, found: Source | None) -> Source:
    """The source as it is now; files whose size and time are those recorded are not read again."""
    data, score = config.data, config.score
    recorded = () if found is None or score.rehash else found.files
    is_known = len(recorded) == len(paths) and all(map(_is_unchanged, recorded, paths))
    if found is None or not is_known:
        return scan_source(paths, row_format, data.limit, score.shard_rows)
    return Source(format=row_format.name, columns=row_format.columns_read(), limit=data.limit, files=recorded,
                  shard_rows=score.shard_rows)  # fmt: skip


def _is_unchanged(file: DataFile, path: Path) -> bool:
    stat = path.stat()
    return (file.path, file.size, file.mtime_ns) == (str(path), stat.st_size, stat.st_mtime_ns)


def _preview(
    store: Path, source: Source, row_format: RowFormat, row_tokenizer: RowTokenizer, tokenizer: Any, num_columns: int
) -> None:
    """Tokenise the first rows: refuse what cannot work, print an example and the estimated size."""
    num_sampled = min(source.num_rows, _SAMPLE_ROWS)
    sampled = islice(read_rows(source, row_format, range(num_sampled)), num_sampled)
    kept, dropped = _tokenize(sampled, row_tokenizer)
    _refuse_misfits(sum(row.breaks_template for row in dropped), num_sampled, dropped)
    if not kept and num_sampled == source.num_rows:
        raise UserError(
            f"no row left with a target: all {num_sampled} rows were dropped, the first because of: {dropped[0].reason}"
        )
    for example in kept[:1]:
        print(f"first row, {len(example.input_ids)} tokens, targets marked:\n{marked_text(example, tokenizer)}")
    share = source.num_rows / num_sampled
    num_tokens = round(share * sum(len(example.input_ids) for example in kept))
    num_targets = round(share * sum(len(example.target_positions) for example in kept))
    num_bytes = 2 * num_tokens + 4 * num_columns * num_targets
    about = "" if num_sampled == source.num_rows else "about "
    print(
        f"{source.num_rows:,} rows, {about}{num_targets:,} targets in {num_tokens:,} tokens, "
        f"about {num_bytes / 1e6:,.1f} MB to write"
    )
    parent = next(folder for folder in [store, *store.resolve().parents] if folder.is_dir())
    if num_bytes > shutil.disk_usage(parent).free:
        raise UserError(f"{store}: about {num_bytes / 1e6:,.0f} MB are needed, more than the disk has free")


def _note_positions(files: PretrainedFiles, max_length: int) -> None:
    positions = files.config().get("max_position_embeddings")
    if positions and max_length > positions:
        print(f"note: data.max_length={max_length} is more than the {positions} positions the prior was made for")


def _refuse_misfits(num_misfits: int, num_rows: int, dropped: Sequence[DroppedRow]) -> None:
    if num_misfits > _MOST_MISFITS * num_rows:
        shown = next(row for row in dropped if row.breaks_template)
        raise UserError(
            f"{num_misfits} of {num_rows} rows do not fit the chat template, more than 1 %; such as row "
            f"{shown.row_id!r} (source_index {shown.source_index}): {shown.reason}"
        )


def _listed_misfits(plan: Plan) -> int:
    """Rows of the finished shards that did not fit the chat template: they count towards the limit of a resumed run."""
    done = set(range(plan.manifest.source.num_shards)) - set(plan.missing)
    texts = (dropped_path(plan.store, index).read_text(encoding="utf-8") for index in done)
    return sum(f'"reason": "{TEMPLATE_REASON}: ' in line for text in texts for line in text.splitlines())


def _is_done(store: Path, manifest: Manifest, index: int) -> bool:
    path = shard_path(store, index)
    return path.is_file() and read_footer(path, manifest, index).index == index


def _dtypes(config: Config) -> tuple[str, str]:
    """Dtype of the weights and of the forward pass, `auto` resolved for the device."""
    on_cuda = _device(config) == "cuda"
    weights = config.prior.dtype
    if weights == "auto":
        weights = "bfloat16" if on_cuda else "float32"
    compute = config.prior.compute_dtype
    if compute == "auto":
        compute = "float64" if weights == "float32" and not on_cuda else "weights"
    return weights, weights if compute == "weights" else compute


def _device(config: Config) -> str:
    import torch

    if config.score.device == "cuda" and not torch.cuda.is_available():
        raise UserError("score.device=cuda, but torch sees no CUDA device here")
    if config.score.device != "auto":
        return config.score.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _engine(config: Config, found: Manifest | None) -> str:
    """`auto` goes on with what the store began with."""
    if config.score.engine != "auto":
        return config.score.engine
    return found.identity.engine if found else "transformers"


def load_engine(config: Config, plan: Plan) -> Engine:
    """Load the prior as the store's identity says."""
    from stage1_score.transformers_engine import TransformersEngine

    return TransformersEngine(plan.files, plan.manifest.identity, _device(config), config.score)


def _summarise(store: Path) -> None:
    manifest, shards = open_store(store)
    num_rows, num_targets = sum(shard.num_rows for shard in shards), sum(shard.num_targets for shard in shards)
    num_bytes = sum(shard.path.stat().st_size for shard in shards)
    if not num_rows:
        raise UserError(f"{store}: no row left with a target; see the .dropped.jsonl files for the reasons")
    print(
        f"{store}: {num_rows:,} rows kept, {manifest.source.num_rows - num_rows:,} dropped (see *.dropped.jsonl), "
        f"{num_targets:,} targets, {num_bytes / 1e6:,.1f} MB, fingerprint {manifest.fingerprint[:12]}"
    )
