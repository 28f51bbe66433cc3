"""What trackers wrote, read back by other means than they were written with."""

import json
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

_BLOCK = 32768


def tensorboard_scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of every scalar by name, in the order of the files, as TensorBoard shows them."""
    events = EventAccumulator(str(run / "tracking" / "tensorboard")).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def tensorboard_text(run: Path, name: str) -> str:
    """The newest text of a name."""
    events = EventAccumulator(str(run / "tracking" / "tensorboard")).Reload()
    return events.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0].decode()


def lines_as_scalars(lines: list[dict[str, Any]], prefix: str = "") -> dict[str, list[tuple[int, float]]]:
    """The same of lines of metrics.jsonl or eval.jsonl, without nulls, rounded as TensorBoard does."""
    scalars = defaultdict(list)
    for line in lines:
        for name, value in line.items():
            if name not in ("step", "name") and value is not None:
                single = struct.unpack("f", struct.pack("f", value))[0]
                scalars[f"{prefix}{name}"].append((line["step"], single))
    return dict(scalars)


def wandb_files(run: Path) -> list[Path]:
    """The files of the offline sessions, oldest first."""
    return sorted((run / "tracking" / "wandb").glob("offline-run-*/run-*.wandb"))


def wandb_records(path: Path) -> Iterator[Record]:
    """The records of a file of an offline session: a header of 7 bytes, then the blocks of a LevelDB log."""
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    place, parts = 7, b""
    while place + 7 <= len(content):
        if _BLOCK - place % _BLOCK < 7:
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


def wandb_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of the history in a file, without W&B's clocks."""
    rows = []
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({name: items[name] for name in items if name not in ("_runtime", "_timestamp")})
    return rows
