"""The plan of a scoring run: what the store is, which shards are missing, and what is needed to score them."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from shared.config import Config
from shared.errors import UserError
from shared.files import probe_writable, remove_stale_temporaries
from shared.places import Place, RemotePath, place
from shared.pretrained import PretrainedFiles, find_pretrained, load_tokenizer, vocab_rows_of
from shared.score_store import MANIFEST_NAME, DataFile, HubSource, Manifest, Source, create_or_match, read_manifest
from shared.shards import read_dropped, read_footers, shards_there
from stage1_score.choose_engine import choose_device, choose_dtypes, choose_engine
from stage1_score.extend import grown_manifest
from stage1_score.formats import RowFormat
from stage1_score.hub import fetch, pin
from stage1_score.identity import build_manifest
from stage1_score.raw_rows import expand_paths
from stage1_score.read import detect_format, read_rows, scan_source
from stage1_score.tokenization import TEMPLATE_REASON, RowTokenizer, choose_template, marked_text, tokenize_rows

_SAMPLE_ROWS = 2000
_MOST_MISFITS = 0.01


@dataclass(frozen=True)
class Plan:
    """All that a run needs to know before it loads the prior."""

    store: Place
    manifest: Manifest
    row_format: RowFormat
    row_tokenizer: RowTokenizer
    files: PretrainedFiles
    missing: list[int]
    """Shards that are not there yet, of this run's part."""
    grown_from: Manifest | None = None
    """The store's manifest before this run extends it."""


def make_plan(config: Config, command: Sequence[str]) -> Plan:
    """Read the data once, compare with the store that is there, and print what will be done."""
    if config.prior.model is None or config.score.output is None:
        missing = "prior.model" if config.prior.model is None else "score.output"
        raise UserError(f"expected {missing}; got none")
    store = place(config.score.output)
    if isinstance(store, RemotePath):
        store.refuse_read_only()
    found = read_manifest(store) if (store / MANIFEST_NAME).is_file() else None
    paths, hub = _data_files(config, found)
    files = find_pretrained(config.prior.model, config.prior.revision, config.prior.trust_remote_code)
    row_format = detect_format(paths, config.data, vocab_rows_of(files.config()))
    tokenizer = load_tokenizer(files)
    template = choose_template(config.data, row_format.name, tokenizer)
    source = _source(config, paths, row_format, found.source if found else None, hub)
    engine = choose_engine(config, files.config(), found.identity.engine if found else None)
    dtypes = choose_dtypes(config, engine)
    wanted = build_manifest(config, files, tokenizer, source, template, dtypes, engine)
    stop_ids = frozenset(wanted.stop_token_ids)
    row_tokenizer = RowTokenizer(tokenizer, config.data, template, stop_ids, wanted.vocab_size)
    weights = ", some of weights of their own" if source.weighted else ""
    print(f"data: {row_format.name} rows, template {template}, targets {config.data.targets}{weights}")
    print(f"prior: {engine} on {choose_device(config)}, weights {dtypes[0]}, forward pass {dtypes[1]}")
    _note_positions(files, config.data.max_length)
    if found is None:
        _preview(store, source, row_format, row_tokenizer, tokenizer, len(config.score.columns))
    probe_writable(store)
    manifest, grown_from = _settle(store, config, wanted, found, command)
    num_shards = manifest.source.num_shards
    remove_stale_temporaries(store)
    done = shards_there(store, range(num_shards))
    read_footers(store, manifest, done)
    missing = sorted(set(range(num_shards)) - set(done))
    summary = f"{store}: {num_shards - len(missing)} of {num_shards} shards done"
    if config.score.part is not None:
        part, count = map(int, config.score.part.split("/"))
        missing = [index for index in missing if index % count == part]
        summary += f", part {config.score.part}"
    print(f"{summary}, {len(missing)} to score")
    return Plan(store, manifest, row_format, row_tokenizer, files, missing, grown_from)


def _settle(
    store: Place, config: Config, wanted: Manifest, found: Manifest | None, command: Sequence[str]
) -> tuple[Manifest, Manifest | None]:
    """The manifest to score by, and that of the store before it grows, where it is to grow."""
    if found is None:
        return wanted, None
    source, grown = wanted.source, None
    if config.score.extend:
        # Compared in all but the files: how those may differ is looked at next.
        names = ("files", "limit", "extended_at", "weighted", "hub")
        known = {name: getattr(found.source, name) for name in names}
        same = create_or_match(store, wanted.model_copy(update={"source": source.model_copy(update=known)}), command)
        grown = grown_manifest(same, source)
        if grown is None or grown.source.num_rows == found.source.num_rows:
            print(f"{store}: the data has no row that the store has not")
        else:
            print(f"{store}: {grown.source.num_rows - found.source.num_rows:,} rows are new")
    if grown is not None:
        return grown, found
    manifest = create_or_match(store, wanted, command)
    # The store may name the files as another start saw them: read them where they are now.
    return manifest.model_copy(update={"source": source}), None


def plan_of_manifest(config: Config, manifest: Manifest) -> Plan:
    """The plan of a worker: all is settled by the manifest, nothing is hashed, printed or compared again."""
    assert config.prior.model is not None and config.score.output is not None  # noqa: PT018
    # The commit that was hashed, not what a branch means by now.
    revision = manifest.prior_revision or config.prior.revision
    files = find_pretrained(config.prior.model, revision, config.prior.trust_remote_code)
    if manifest.source.hub:
        # A worker on another machine makes its own copy.
        file = manifest.source.files[0].model_copy(update={"path": str(fetch(manifest.source.hub))})
        manifest = manifest.model_copy(update={"source": manifest.source.model_copy(update={"files": (file,)})})
    paths = [place(file.path) for file in manifest.source.files]
    row_format = detect_format(paths, config.data, manifest.vocab_size)
    row_tokenizer = RowTokenizer(
        load_tokenizer(files), config.data, manifest.identity.template, frozenset(manifest.stop_token_ids),
        manifest.vocab_size,
    )  # fmt: skip
    return Plan(place(config.score.output), manifest, row_format, row_tokenizer, files, [])


def _data_files(config: Config, found: Manifest | None) -> tuple[list[Place], HubSource | None]:
    if config.data.hub.id is None:
        return expand_paths(config.data), None
    hub = pin(config.data.hub, found.source.hub if found else None)
    print(f"data set of the hub: {hub}")
    return [fetch(hub)], hub


def _source(
    config: Config, paths: list[Place], row_format: RowFormat, found: Source | None, hub: HubSource | None
) -> Source:
    """The source as it is now; files of the recorded size and time are read again only for rows that never were."""
    data, score = config.data, config.score
    recorded = () if found is None or score.rehash else found.files
    is_known = (
        found is not None
        and found.hub == hub
        and len(recorded) == len(paths)
        and all(map(_is_unchanged, recorded, paths))
    )
    source = None
    if found is not None and is_known:
        source = Source(format=row_format.name, columns=row_format.columns_read(), limit=data.limit, files=recorded,
                        shard_rows=score.shard_rows, weighted=found.weighted, hub=hub)  # fmt: skip
    # Rows that a larger limit adds were not parsed when the files were read.
    if source is None or found is None or source.num_rows > found.num_rows:
        source = scan_source(paths, row_format, data.limit, score.shard_rows, hub)
    # Without files or a limit that grew, the shards are those of the store.
    if found is None or found.num_rows != source.num_rows:
        return source
    return source.model_copy(update={"extended_at": found.extended_at})


def _is_unchanged(file: DataFile, path: Place) -> bool:
    stat = path.stat()
    return (file.path, file.size, file.mtime_ns) == (str(path), stat.st_size, stat.st_mtime_ns)


def _preview(
    store: Place, source: Source, row_format: RowFormat, row_tokenizer: RowTokenizer, tokenizer: Any, num_columns: int
) -> None:
    """Tokenise the first rows: refuse what cannot work, print an example and the estimated size."""
    num_sampled = min(source.num_rows, _SAMPLE_ROWS)
    sampled = islice(read_rows(source, row_format, range(num_sampled)), num_sampled)
    kept, dropped = tokenize_rows(sampled, row_tokenizer)
    misfits = [row for row in dropped if row.breaks_template]
    refuse_misfits(len({row.source_index for row in misfits}), num_sampled, str(misfits[0]) if misfits else None)
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
    if isinstance(store, RemotePath):
        return
    parent = next(folder for folder in [store, *store.resolve().parents] if folder.is_dir())
    if num_bytes > shutil.disk_usage(parent).free:
        raise UserError(f"{store}: about {num_bytes / 1e6:,.0f} MB are needed, more than the disk has free")


def _note_positions(files: PretrainedFiles, max_length: int) -> None:
    positions = files.config().get("max_position_embeddings")
    if positions and max_length > positions:
        print(f"note: data.max_length={max_length} is more than the {positions} positions the prior was made for")


def refuse_misfits(num_misfits: int, num_rows: int, example: str | None) -> None:
    """Stop where more than 1 % of all rows do not fit the chat template: the template is wrong, not the rows.

    Args:
        num_misfits: rows of the data that do not fit, in one of their turns or in several.
        num_rows: rows of the data.
        example: one of them in words.
    """
    if num_misfits > _MOST_MISFITS * num_rows:
        raise UserError(
            f"{num_misfits} of {num_rows} rows do not fit the chat template, more than 1 %; such as {example}"
        )


def listed_misfits(plan: Plan) -> int:
    """Rows of the finished shards that did not fit the chat template: they count towards the limit of a resumed run."""
    there = shards_there(plan.store, range(plan.manifest.source.num_shards))
    listed = [row for shard in read_footers(plan.store, plan.manifest, there) for row in read_dropped(shard)]
    return len({row["source_index"] for row in listed if row["reason"].startswith(f"{TEMPLATE_REASON}: ")})
