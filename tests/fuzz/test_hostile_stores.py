"""A store from elsewhere is untrusted input: whatever is in it, a clear error or a right result.

`make fuzz` tries more of them: PRIFT_FUZZ_EXAMPLES says how many.
"""

import argparse
import contextlib
import io
import os
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_stores import HostileStore, stores
from hypothesis import HealthCheck, Phase, given, settings

from inspection import diff, export, merge, migrate, report, show, stats
from shared.config import Config
from shared.errors import UserError
from shared.score_store import TARGET_WEIGHT
from shared.verify import verify_store
from stage2_train.cache import open_cache
from stage2_train.setup import prepare

EXAMPLES = int(os.environ.get("PRIFT_FUZZ_EXAMPLES", "300"))
MOST_SECONDS = 20
MOST_BYTES = 3 << 30
"""What all of one process may grow by."""


@pytest.fixture(scope="module")
def bases(
    tmp_path_factory: pytest.TempPathFactory, manifest_with, scored_row, store_of, plain_prior: Path
) -> dict[str, Path]:
    """Good stores of six rows in three shards: an ordinary one, one with turns and weights, and one of version 1."""
    from transformers import AutoTokenizer

    from shared.pretrained import tokenizer_content

    folder = tmp_path_factory.mktemp("bases")
    content = tokenizer_content(AutoTokenizer.from_pretrained(plain_prior))
    about = {"prior_name": str(plain_prior), "tokenizer": content}
    plain = manifest_with(6, 2).model_copy(update=about)
    made = {"plain": store_of(folder / "plain", plain, [scored_row(n) for n in range(6)])}
    split = manifest_with(6, 2, split_turns=True, template="chat").model_copy(update=about)
    split = split.model_copy(update={"source": split.source.model_copy(update={"weighted": True})})
    rows = [scored_row(n) for n in range(6)]
    for row in rows:
        row.statistics[TARGET_WEIGHT] = np.array([1.0, 0.5, 2.0], np.float32)
    made["split"] = store_of(folder / "split", split, rows)
    identity = plain.identity.model_copy(update={"split_turns": None})
    first = {"schema_version": 1, "identity": identity, "fingerprint": identity.fingerprint()}
    made["version 1"] = store_of(folder / "first", plain.model_copy(update=first), [scored_row(n) for n in range(6)])
    return made


def verb(module: Any, *words: Any) -> None:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    module.run(parser.parse_args([str(word) for word in words]))


def ways(store: Path, good: Path, out: Path) -> dict[str, Callable[[], object]]:
    """Everything that reads a store."""
    training = {"scores": [{"store": str(store)}], "method": "prift_mass", "batch_size": 2, "output": str(out / "run"),
                "cache_dir": str(out / "cache")}  # fmt: skip
    return {
        "verify": lambda: verify_store(store),
        "cache": lambda: open_cache(store, ("logprob", "mass_rank"), out / "cache"),
        "show": lambda: verb(show, store, "#0"),
        "show an id": lambda: verb(show, store, "row-3"),
        "stats": lambda: verb(stats, store),
        "diff": lambda: verb(diff, store, good),
        "merge": lambda: verb(merge, store, good, "-o", out / "merged", "--duplicates", "keep-first"),
        "migrate": lambda: verb(migrate, store, "-o", out / "migrated"),
        "export": lambda: verb(export, store, "--method", "prift_mass", "--format", "jsonl", "-o", out / "rows.jsonl"),
        "report": lambda: verb(report, store, "-o", out / "report.html"),
        "train": lambda: prepare(Config.model_validate({"train": training})),
    }


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """End what takes too long; nothing may take more memory than the tests' own bound."""

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"more than {MOST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(MOST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def entries(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def memory_bound() -> Iterator[None]:
    """No allocation beyond a few gigabytes: a size that a store names must not be believed."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_BYTES, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def test_any_store_is_read_right_or_refused(
    bases: dict[str, Path], tmp_path: Path, memory_bound: None, capsys: pytest.CaptureFixture[str]
):
    outcomes: Counter[str] = Counter()
    good = bases["plain"]
    untouched = {name: {path.name: path.read_bytes() for path in base.iterdir()} for name, base in bases.items()}

    @settings(
        max_examples=EXAMPLES, derandomize=True, deadline=None, database=None,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    @given(stores(sorted(bases)))
    def try_one(hostile: HostileStore) -> None:
        outcomes["stores"] += 1
        room = tmp_path / "room"
        shutil.rmtree(room, ignore_errors=True)
        room.mkdir()
        store = hostile.make(bases, room / "store")
        there = entries(room)
        chosen = ways(store, good, room / "out")
        if len(repr(hostile)) % 8:
            del chosen["report"]  # it draws, which takes its time
        for name, read in chosen.items():
            (room / "out").mkdir(exist_ok=True)
            with bounded(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                try:
                    result = read()
                except UserError:
                    outcomes["refusals"] += 1
                else:
                    is_sound = name != "verify" or not result.problems  # type: ignore[attr-defined]
                    outcomes["read" if is_sound else "refusals"] += 1
                    if not hostile.changes:
                        assert is_sound
        if not hostile.changes:
            assert outcomes["read"] > 0
        assert {entry for entry in entries(room) if not entry.startswith("out")} == there, "files beside the output"

    try_one()
    assert {
        name: {path.name: path.read_bytes() for path in base.iterdir()} for name, base in bases.items()
    } == untouched
    with capsys.disabled():
        print(f"\nfuzz: {outcomes['stores']:,} stores tried in up to {len(ways(good, good, tmp_path))} ways each: "
              f"{outcomes['refusals']:,} refusals, {outcomes['read']:,} read, 0 failures")  # fmt: skip
    assert outcomes["refusals"] > outcomes["stores"], "most of them are no stores any more"


@pytest.mark.parametrize("name", ["plain", "split", "version 1"])
def test_a_good_store_is_read_in_every_way(bases: dict[str, Path], tmp_path: Path, name: str):
    refused = {}
    for way, read in ways(bases[name], bases["plain"], tmp_path).items():
        try:
            read()
        except UserError as error:
            refused[way] = str(error)
    # Only an older store is lifted, and none is merged with one of another version or identity.
    expected = {"plain": {"migrate"}, "split": {"migrate", "merge"}, "version 1": {"merge"}}
    assert refused.keys() == expected[name], refused
