"""What a merge of score stores is made of: which rows are whose, and what stands against it. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from inspection.harmless import harmless
from inspection.provenance import Span, differing_meanings, differing_sources, field_table, spans
from shared.errors import UserError
from shared.local_copies import kept_copy
from shared.places import Place
from shared.score_store import SCHEMA_VERSION, DataFile, Manifest
from shared.shards import Shard, open_store
from shared.verify import collected

_AND = " and "


@dataclass(frozen=True)
class Duplicates:
    """Rows of a store that a store before it holds too."""

    rows: range
    """Their source indices in the store."""
    span: Span
    holder: Place
    """The store that they are kept from."""


@dataclass(frozen=True)
class Part:
    """A store that is merged."""

    store: Place
    manifest: Manifest
    shards: list[Shard]
    first: int
    """`source_index` of its row 0 in the new store."""
    duplicates: list[Duplicates]


def merged_manifest(manifests: Sequence[Manifest]) -> Manifest:
    """The manifest of the new store: the first one's, but for the source and the recorded software."""
    files = [_as_used(span) for manifest in manifests for span in spans(manifest.source)]
    is_weighted = any(manifest.source.weighted for manifest in manifests)
    # What is read from the hub is one data set; the file's path still names it and its commit.
    update = {"files": tuple(files), "limit": None, "extended_at": (), "weighted": is_weighted, "hub": None}
    source = manifests[0].source.model_copy(update=update)
    software = joined([manifest.software for manifest in manifests])
    return manifests[0].model_copy(update={"source": source, "software": software})


def _as_used(span: Span) -> DataFile:
    """The record of a data file with the rows that were used of it."""
    if span.num_rows == span.file.num_rows:
        return span.file
    # No file was changed then: a run of prift-score on the new store reads the file again, and finds more rows.
    return span.file.model_copy(update={"num_rows": span.num_rows, "mtime_ns": 0})


def open_parts(stores: Sequence[Place]) -> list[Part]:
    """Open the stores in their order, and find which rows of each are duplicates of rows in those before it."""
    parts: list[Part] = []
    # Of each file's content: how many of its first rows the stores so far hold, and which of them holds them.
    held: dict[str, list[tuple[int, Place]]] = {}
    first = 0
    for store in stores:
        manifest, shards = open_store(store)
        own = spans(manifest.source)
        duplicates = [found for span in own if (found := _duplicates(span, held.get(span.file.sha256, [])))]
        parts.append(Part(store, manifest, shards, first, [each for found in duplicates for each in found]))
        for span in own:
            held.setdefault(span.file.sha256, []).append((span.num_rows, store))
        first += manifest.source.num_rows
    return parts


def _duplicates(span: Span, held: Sequence[tuple[int, Place]]) -> list[Duplicates]:
    """The rows of a span that the stores before hold, by which of them comes first."""
    found, start = [], 0
    for count, holder in held:
        stop = min(count, span.num_rows)
        if stop > start:
            found.append(Duplicates(range(span.first + start, span.first + stop), span, holder))
            start = stop
    return found


def refuse_what_cannot_be_one(parts: Sequence[Part], may_repeat: bool) -> None:
    """Refuse stores that do not belong together.

    Args:
        may_repeat: whether several stores may hold the same row of a data file.

    Raises:
        UserError: another identity, or rows or the user's row ids in more than one store.
    """
    _refuse_other_meanings(parts)
    if not may_repeat:
        _refuse_duplicates(parts)
    if parts[0].manifest.user_row_ids:
        _refuse_repeated_ids(parts)


def _refuse_other_meanings(parts: Sequence[Part]) -> None:
    """Refuse stores whose numbers do not mean the same, with a table of the fields that differ."""
    first = parts[0]
    for part in parts[1:]:
        versions = [each.manifest.schema_version for each in (first, part)]
        if (versions[0] < SCHEMA_VERSION) != (versions[1] < SCHEMA_VERSION):
            raise UserError(
                f"{first.store} and {part.store} are of schema versions {versions[0]} and {versions[1]}: lift the "
                "older by `prift-inspect migrate`"
            )
        pairs = differing_meanings(first.manifest, part.manifest)
        # What was read of a row is recorded once for the whole source.
        pairs += [
            pair
            for pair in differing_sources(first.manifest, part.manifest)
            if pair[0] in ("source.format", "source.columns")
        ]
        if pairs:
            table = field_table(pairs, str(first.store), str(part.store))
            raise UserError(
                f"stores of one meaning are merged, {part.store} is of another than {first.store}:\n{table}"
            )


def _refuse_duplicates(parts: Sequence[Part]) -> None:
    """Refuse stores that hold the same rows, naming the first."""
    found = [(part, each) for part in parts for each in part.duplicates]
    if found:
        part, each = found[0]
        count = sum(len(each.rows) for _, each in found)
        raise UserError(
            f"{part.store}: row {each.rows[0] - each.span.first} of {harmless(each.span.file.path)} (sha256 "
            f"{each.span.file.sha256[:12]}...) is in {each.holder} too; {count:,} rows are in more than one store: "
            "--duplicates keep-first keeps each from the first store that has it"
        )


def _refuse_repeated_ids(parts: Sequence[Part]) -> None:
    """Refuse row ids of the user that two stores have, for different rows."""
    import polars as pl

    scans = []
    for number, part in enumerate(parts):
        if not any(shard.num_rows for shard in part.shards):
            continue
        scan = pl.scan_parquet([kept_copy(shard.path) for shard in part.shards if shard.num_rows])
        scan = scan.select("row_id", "source_index")
        for each in part.duplicates:
            scan = scan.filter(~pl.col("source_index").is_between(each.rows.start, each.rows.stop, closed="left"))
        scans.append(scan.select("row_id", store=pl.lit(number)))
    if not scans:
        return
    ids = pl.concat(scans).group_by("row_id").agg(pl.len(), pl.col("store").min(), last=pl.col("store").max())
    repeated = collected(ids.filter(pl.col("len") > 1).sort("store", "last", "row_id").head(1), parts[0].store)
    for row_id, _, one, other in repeated.iter_rows():
        raise UserError(
            f"row id {row_id!r} stands in {parts[one].store} and in {parts[other].store}, for rows of different data "
            "files; row ids of the user must be unique: give the rows other ids and score again"
        )


def joined(described: Sequence[dict[str, str]]) -> dict[str, str]:
    """The values of each name, those that differ joined by `and`; what was joined before is not repeated."""
    found: dict[str, dict[str, None]] = {}
    for each in described:
        for name, value in each.items():
            found.setdefault(name, {}).update(dict.fromkeys(str(value).split(_AND)))
    return {name: _AND.join(values) for name, values in found.items()}
