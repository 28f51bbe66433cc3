"""Makes the demo: its problems, its texts and the tiny prior.

    python data/make_demo.py              write the data files (a second)
    python data/make_demo.py --pretrain   write them and pretrain the prior (about ten minutes)
    python data/make_demo.py --check      write nothing; exit 3 where a file differs from SHA256SUMS

The data files are the same on every machine. The weights are not: sums of floats depend on the processor
and the number of threads, so the check makes the data files anew and only hashes the prior.
"""

import argparse
import hashlib
import json
import random
import sys
from pathlib import Path
from typing import Any

from demo_problems import FLAWS, make_demonstration
from demo_text import write_prior_text

FOLDER = Path(__file__).parent / "demo"
SEED = 20260609

NUM_TRAIN = 2400
NUM_HELDOUT = 250
NUM_PRIOR_TEXTS = 200
# The flaw of training row i is FLAW_CYCLE[i % 10]: 40 % slips, 10 % garbage, half of the rows sound.
FLAW_CYCLE = (None, "slip", None, "slip", None, "slip", None, "slip", None, "garbage")
assert set(FLAW_CYCLE) == {None, *FLAWS}


def make_data_files() -> dict[str, bytes]:
    """The three data files by name. No prompt stands in both train.jsonl and heldout.jsonl."""
    rng = random.Random(f"{SEED} problems")
    seen: set[str] = set()
    train = [_draw_new_row(rng, seen, f"train-{i:04}", FLAW_CYCLE[i % 10]) for i in range(NUM_TRAIN)]
    for row in train:
        del row["answer"]
    # From a sequence of their own, which no choice of data or settings has looked at.
    rng = random.Random(f"{SEED} heldout")
    heldout = [_draw_new_row(rng, seen, f"heldout-{i:04}", None) for i in range(NUM_HELDOUT)]
    rng = random.Random(f"{SEED} prior text")
    texts = [{"id": f"prior-{i:04}", "prompt": "", "completion": write_prior_text(rng)} for i in range(NUM_PRIOR_TEXTS)]
    return {
        name: "".join(json.dumps(row) + "\n" for row in rows).encode()
        for name, rows in (("train.jsonl", train), ("heldout.jsonl", heldout), ("prior_text.jsonl", texts))
    }


def _draw_new_row(rng: random.Random, seen: set[str], row_id: str, flaw: str | None) -> dict[str, Any]:
    while True:
        demonstration = make_demonstration(rng, flaw)
        if demonstration.prompt not in seen:
            seen.add(demonstration.prompt)
            return {"id": row_id, **vars(demonstration)}


def read_checksums() -> dict[str, str]:
    """sha256 by file name, relative to the demo folder."""
    lines = (FOLDER / "SHA256SUMS").read_text().splitlines()
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def write_checksums() -> None:
    files = sorted(path for path in FOLDER.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    lines = [f"{_hash(path.read_bytes())}  {path.relative_to(FOLDER).as_posix()}\n" for path in files]
    (FOLDER / "SHA256SUMS").write_text("".join(lines))


def find_differences() -> list[str]:
    """The files whose bytes, made anew or as they stand, are not those of SHA256SUMS."""
    made = make_data_files()
    differences = []
    for name, digest in read_checksums().items():
        path = FOLDER / name
        stands = path.is_file() and _hash(path.read_bytes()) == digest
        if not stands or (name in made and _hash(made[name]) != digest):
            differences.append(name)
    return differences


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the demo's data files and its prior.")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--pretrain", action="store_true", help="also pretrain the prior")
    action.add_argument("--check", action="store_true", help="compare with SHA256SUMS and write nothing")
    arguments = parser.parse_args()
    if arguments.check:
        differences = find_differences()
        print("\n".join(f"differs: {name}" for name in differences) or "all files are as SHA256SUMS says")
        return 3 if differences else 0
    FOLDER.mkdir(exist_ok=True)
    for name, content in make_data_files().items():
        (FOLDER / name).write_bytes(content)
    if arguments.pretrain:
        # Imported here, since torch takes longer to load than the data files to make.
        from demo_prior import make_prior

        rows = [json.loads(line) for line in (FOLDER / "prior_text.jsonl").read_text().splitlines()]
        record = make_prior(FOLDER / "prior", rows, SEED)
        (FOLDER / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")
        print(json.dumps(record))
    write_checksums()
    return 0


if __name__ == "__main__":
    sys.exit(main())
