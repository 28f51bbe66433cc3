"""`prift-inspect cross-check`: rows of a store scored again, and how far the new numbers lie from the stored ones.

Imports no torch: it comes with the engine.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from shared.config import Config, PriorConfig, ScoreConfig
from shared.errors import CheckFailed, UserError
from shared.files import sha256_of_json
from shared.places import Place
from shared.pretrained import PretrainedFiles, find_pretrained
from shared.score_store import Identity, Manifest, read_manifest
from shared.shards import ScoredRow, Shard, flatten, read_batches, read_footers, shards_there
from shared.verify import row_problems
from stage1_score.choose_engine import WIDER_COMPUTE, choose_device, load_engine
from stage1_score.compare_scores import compare, flips, print_differences, print_flips
from stage1_score.engine import Engine
from stage1_score.tokenization import TokenizedExample

_TOLERANCES = {"bfloat16": 0.15, "float16": 0.02, "float32": 1e-4, "float64": 1e-4}
"""Largest p99 of |logprob difference|, nats, between two engines that are both right, by the coarser dtype of what
passes between their layers. bfloat16 keeps 8 bits; float16 keeps 3 more, so an eighth. float64 is stored as float32."""

_CHUNK_ROWS = 1024
"""Rows scored at once: enough to fill batches, few enough for any memory."""

# YAML 1.1 reads 1e-3 as text, because it has no dot.
_Number = Annotated[float, Field(strict=False)]


class CrossCheckOptions(BaseModel):
    """The key=value words of `prift-inspect cross-check`; its help lists them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    rows: int = Field(default=64, ge=1)
    """Rows to score again, spread evenly over the store; all where it holds fewer."""
    thresholds: tuple[Annotated[_Number, Field(gt=0, le=1)], ...] = Field(default=(0.3, 0.5, 0.7, 0.9), min_length=1)
    """Thresholds at which the decisions of PriFT-mass are compared."""
    engine: Literal["transformers", "vllm"] | None = None
    """What scores again; None: the engine that did not make the store."""
    model: str | None = None
    """Where the prior lies now; None: where the store says."""
    tolerance: Annotated[_Number, Field(ge=0)] | None = None
    """Largest p99 of |logprob difference|, nats; None: by the dtypes."""
    flips: Annotated[_Number, Field(ge=0, le=1)] = 0.01
    """Largest share of PriFT-mass decisions that may flip, at any of the thresholds."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    batch_tokens: int | None = Field(default=None, ge=16)
    """Tokens of a forward pass; None: as `prift-score` does by default."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    @field_validator("thresholds", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        """YAML has lists only; `0.3,0.5` is text to it, and a number alone is meant as a list of one."""
        if isinstance(value, str):
            return tuple(value.split(","))
        return tuple(value) if isinstance(value, list) else (value,)


def parse_options(words: Sequence[str]) -> CrossCheckOptions:
    """Options from key=value words, values read as YAML, the later ones winning.

    Raises:
        UserError: an unknown key (names the nearest known one), or a value out of range.
    """
    known, given = list(CrossCheckOptions.model_fields), {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"{word!r}: expected key=value, such as rows=256")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown key {key}; the nearest known one is {near}")
        try:
            given[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            given[key] = text
    try:
        return CrossCheckOptions.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{first['loc'][0]}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}") from None


def cross_check(store: Place, options: CrossCheckOptions) -> None:
    """Score a sample of a store's rows again and print how the numbers differ.

    Raises:
        UserError: no rows, another prior, or no engine that could score.
        CheckFailed: the p99 of |logprob difference| is above the tolerance.
    """
    manifest = read_manifest(store)
    shards = finished_shards(store, manifest)
    config, identity = rescoring(manifest.identity, options)
    files = _same_prior(manifest, options, config, identity)
    num_rows = sum(shard.num_rows for shard in shards)
    ordinals = evenly_spread(num_rows, options.rows)
    print(f"{store}: {num_rows:,} rows in {len(shards)} of {manifest.source.num_shards} shards")
    print(f"made by {_described(manifest.identity)}, {len(ordinals):,} rows scored again by {_described(identity)}")
    engine = load_engine(config, files, identity)
    try:
        stored, rescored = _rescore(engine, sampled_rows(shards, ordinals, manifest), identity.columns)
    finally:
        engine.close()
    differences = compare(stored, rescored)
    print_differences(differences)
    decisions = []
    if "mass_rank" in stored:
        decisions = [flips(stored["mass_rank"], rescored["mass_rank"], value) for value in options.thresholds]
        print_flips(decisions)
    else:
        print("decisions of PriFT-mass are not compared: mass_rank is not stored")
    tolerance = default_tolerance(manifest.identity, identity) if options.tolerance is None else options.tolerance
    p99 = differences[0].p99
    found = f"p99 of |logprob difference| is {p99:.3g} nats"
    if not p99 <= tolerance:
        raise CheckFailed(f"{store}: {found}, the tolerance is {tolerance:g}")
    print(f"{found}, within the tolerance of {tolerance:g}")
    for it in decisions:
        if it.num_flipped > options.flips * it.num_targets:
            raise CheckFailed(
                f"{store}: {it.num_flipped} of {it.num_targets} decisions flip at threshold {it.threshold:g}, the "
                f"share allowed is {options.flips:g}"
            )


def finished_shards(store: Place, manifest: Manifest) -> list[Shard]:
    """The shards that are there, of a finished or unfinished store.

    Raises:
        UserError: there is no row in them.
    """
    done = shards_there(store, range(manifest.source.num_shards))
    shards = read_footers(store, manifest, done)
    if not any(shard.num_rows for shard in shards):
        raise UserError(
            f"{store}: expected scored rows, found none in {len(done)} of {manifest.source.num_shards} shards; run "
            "prift-score first"
        )
    return shards


def rescoring(stored: Identity, options: CrossCheckOptions) -> tuple[Config, Identity]:
    """How the rows are scored again: with the store's dtypes, as far as the engine has them."""
    engine = options.engine or ("transformers" if stored.engine == "vllm" else "vllm")
    is_wider = stored.compute_dtype != stored.weight_dtype
    compute_dtype = WIDER_COMPUTE[engine] if is_wider else stored.weight_dtype
    score = ScoreConfig(engine=engine, device=options.device)
    if options.batch_tokens is not None:
        score = score.model_copy(update={"batch_tokens": options.batch_tokens})
    config = Config(prior=PriorConfig(trust_remote_code=options.trust_remote_code), score=score)
    return config, stored.model_copy(update={"engine": engine, "compute_dtype": compute_dtype})


def default_tolerance(stored: Identity, rescored: Identity) -> float:
    """Largest p99 of |logprob difference|, nats, that rounding explains."""
    # vLLM's float64 products are rounded to the dtype of the weights again; float64 of transformers stays.
    passed_on = [it.weight_dtype if it.engine == "vllm" else it.compute_dtype for it in (stored, rescored)]
    return max(_TOLERANCES[dtype] for dtype in passed_on)


def _same_prior(manifest: Manifest, options: CrossCheckOptions, config: Config, identity: Identity) -> PretrainedFiles:
    """The store's prior on the disk, found to be the same and fit for the engine."""
    name = options.model or manifest.prior_name
    revision = manifest.prior_revision if name == manifest.prior_name else None
    try:
        files = find_pretrained(name, revision, options.trust_remote_code)
    except UserError as error:
        raise UserError(f"{error}; model=PATH says where the prior of the store lies") from None
    if identity.engine == "vllm":
        from stage1_score.vllm_engine import obstacle

        reason = obstacle(files.config(), choose_device(config))
        if reason is not None:
            made_by = manifest.identity.engine
            meaning = "compares the engine with itself" if made_by == "transformers" else "is the other engine"
            raise UserError(f"engine=vllm: {reason}; engine=transformers {meaning}")
    found = {"weights": files.weights_digest(), "config.json": sha256_of_json(files.config())}
    expected = {"weights": manifest.identity.prior_weights, "config.json": manifest.identity.prior_config}
    for part, digest in found.items():
        if digest != expected[part]:
            raise UserError(
                f"{name} is not the prior of this store, {manifest.prior_name}: sha256 of the {part} is "
                f"{digest[:16]}..., expected {expected[part][:16]}...; model=PATH says where the prior lies"
            )
    return files


def evenly_spread(num_rows: int, wanted: int) -> np.ndarray:
    """Ordinals (int64, ascending) of `wanted` rows of `num_rows`: the middles of as many equal parts; all of fewer."""
    if num_rows <= wanted:
        return np.arange(num_rows)
    return (2 * np.arange(wanted) + 1) * num_rows // (2 * wanted)


def sampled_rows(shards: Iterable[Shard], ordinals: np.ndarray, manifest: Manifest) -> Iterator[ScoredRow]:
    """The rows at these ordinals, counted through all shards; shards without any are not read.

    Raises:
        UserError: a page is corrupted, or a sampled row breaks an invariant of the format.
    """
    first = 0
    for shard in shards:
        inside = _within(ordinals, first, shard.num_rows)
        if len(inside):
            yield from _rows_of_shard(shard, inside, manifest)
        first += shard.num_rows


def _within(ordinals: np.ndarray, first: int, count: int) -> np.ndarray:
    """Those of the ordinals that lie in [first, first + count), counted from `first`."""
    return ordinals[(ordinals >= first) & (ordinals < first + count)] - first


def _rows_of_shard(shard: Shard, wanted: np.ndarray, manifest: Manifest) -> Iterator[ScoredRow]:
    # All columns by name: the digest is not compared, so an edited value shows as the difference that it makes.
    names = list(manifest.columns)
    first = 0
    for table in read_batches(shard, names):
        sample = table.take(pa.array(_within(wanted, first, table.num_rows)))
        problems = row_problems(sample, manifest, shard)
        if problems:
            raise UserError(f"{problems[0]}; prift-inspect verify lists more")
        yield from scored_rows(sample, manifest.identity.columns)
        first += table.num_rows
        if first > wanted[-1]:
            return


def scored_rows(table: pa.Table, columns: Sequence[str]) -> Iterator[ScoredRow]:
    """The rows of a table of a store; every invariant of the format holds."""
    ids = flatten(table.column("input_ids"))
    # Arrow's memory is read-only, and torch warns of such.
    ids_of_all = ids.values.copy()
    flat = {column: flatten(table.column(column)) for column in columns}
    row_ids, indices = table.column("row_id").to_pylist(), table.column("source_index").to_pylist()
    turns = table.column("turn").to_pylist() if "turn" in table.column_names else [None] * table.num_rows
    stop = 0
    for row_id, index, turn, length in zip(row_ids, indices, turns, ids.lengths, strict=True):
        start, stop = stop, stop + int(length)
        positions = np.flatnonzero(flat["logprob"].valid[start:stop]).astype(np.int32)
        statistics = {column: flat[column].values[start:stop][positions] for column in columns}
        yield ScoredRow(row_id, index, ids_of_all[start:stop], positions, statistics, turn)


def _rescore(
    engine: Engine, rows: Iterator[ScoredRow], columns: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Stored and new statistics (targets of all rows,) by column."""
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {column: [] for column in columns}
    while chunk := list(islice(rows, _CHUNK_ROWS)):
        examples = [TokenizedExample(r.row_id, r.source_index, r.input_ids, r.target_positions) for r in chunk]
        for old, new in zip(chunk, engine.score(examples), strict=True):
            for column in columns:
                pairs[column].append((old.statistics[column], new.statistics[column]))
    stored = {column: np.concatenate([old for old, _ in found]) for column, found in pairs.items()}
    return stored, {column: np.concatenate([new for _, new in found]) for column, found in pairs.items()}


def _described(identity: Identity) -> str:
    return f"{identity.engine} (weights {identity.weight_dtype}, forward pass {identity.compute_dtype})"
