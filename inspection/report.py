"""`prift-inspect report`: one HTML page on a score store, complete in itself.

Whatever the data holds is text: the template escapes it, the script sets it as text, and the page's own policy lets
no other script run and nothing be fetched.
"""

import argparse
import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.cli import local_argument, place_argument
from shared.places import Place

if TYPE_CHECKING:
    from inspection.example_rows import ExampleRow
    from inspection.store_numbers import StoreNumbers, TokenNumbers
    from shared.score_store import Manifest

_PAGE = Path(__file__).parent / "page"
_NUM_TOKENS_LISTED = 25
_LEAST_SUPPORT = 0.1
_LABELS = {"prob": "Prior probability p", "u": "u = 1 - mass_rank", "entropy": "Entropy of the prior, nats"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `prift-inspect report`."""
    parser.add_argument("store", type=place_argument)
    parser.add_argument("-o", "--output", type=local_argument, default=Path("report.html"), help="default: report.html")
    parser.add_argument("--row", action="append", default=[], metavar="ID", help="show this row as well; repeatable")
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="where the prior's tokenizer lies; default: as the store says"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the page, all at once.

    Raises:
        UserError: no finished store, a row that is not there, or another tokenizer.
    """
    from shared.files import replacing

    page = report_page(arguments.store, arguments.row, arguments.tokenizer)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(arguments.output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"{arguments.output}: {len(page.encode()) / 1e6:.2f} MB")


def report_page(store: Place, asked: Sequence[str] = (), tokenizer_path: str | None = None) -> str:
    """The page as text."""
    from inspection.decoded import load_store_tokenizer
    from inspection.example_rows import choose_rows, load_rows
    from inspection.harmless import harmless
    from inspection.measure import measure
    from shared.shards import open_store

    manifest, shards = open_store(store)
    tokenizer = load_store_tokenizer(manifest, tokenizer_path)
    numbers = measure(store)
    chosen = choose_rows(shards, asked)
    rows = load_rows(shards, chosen, tokenizer)
    script = (_PAGE / "report.js").read_text(encoding="utf-8")
    template = _environment().get_template("report.html")
    return template.render(
        name=harmless(store.resolve().name), prior_name=harmless(manifest.prior_name), rows=rows,
        warnings=_warnings(numbers, manifest, tokenizer, len(chosen) - len(rows)),
        identity=_identity(manifest), data=_data(rows, numbers), script=script,
        style=_safe((_PAGE / "report.css").read_text(encoding="utf-8")),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **_tables(numbers, manifest, tokenizer),
    )  # fmt: skip


def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(loader=FileSystemLoader(_PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True)


def _safe(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)


def _tables(numbers: "StoreNumbers", manifest: "Manifest", tokenizer: Any | None) -> dict[str, Any]:
    from inspection.charts import histogram_chart, position_chart, threshold_chart
    from inspection.store_numbers import THRESHOLDS

    return {
        "sizes": _sizes(numbers),
        "histograms": [
            (key, _LABELS[key], histogram_chart(it, _LABELS[key]), it) for key, it in numbers.histograms.items()
        ],
        "columns": numbers.columns,
        "rules": [
            (it.rule, ", ".join(f"{name} {value:g}" for name, value in it.parameters.items()), outlook)
            for it, outlook in numbers.rules
        ],
        "thresholds": THRESHOLDS,
        "kept_by_mass": numbers.kept_by_mass,
        "kept_by_prob": numbers.kept_by_prob,
        "threshold_svg": threshold_chart(numbers.kept_by_mass, numbers.kept_by_prob, numbers.num_targets),
        "positions": numbers.positions,
        "position_svg": position_chart(numbers.positions),
        "token_tables": [_special_tokens(numbers, manifest, tokenizer), _dropped_tokens(numbers, tokenizer)],
    }


def _sizes(numbers: "StoreNumbers") -> list[tuple[str, str, float, str]]:
    return [
        ("rows", "num_rows", numbers.num_rows, "{:,}"),
        ("rows dropped", "num_dropped_rows", numbers.num_dropped_rows, "{:,}"),
        ("tokens", "num_tokens", numbers.num_tokens, "{:,}"),
        ("targets", "num_targets", numbers.num_targets, "{:,}"),
        ("longest row, tokens", "longest_row", numbers.longest_row, "{:,}"),
        ("shards", "num_shards", numbers.num_shards, "{:,}"),
        ("bytes", "num_bytes", numbers.num_bytes, "{:,}"),
        ("median nll of a row, nats", "tau", numbers.tau, "{:.3f}"),
    ]


_TokenTable = tuple[str, str, str, list[tuple[str, "TokenNumbers", bool]]]


def _special_tokens(numbers: "StoreNumbers", manifest: "Manifest", tokenizer: Any | None) -> _TokenTable:
    """Stop tokens and the tokenizer's special tokens that are targets, with those marked that lack support."""
    from inspection.decoded import single_text

    special = set(manifest.stop_token_ids) | set(tokenizer.all_special_ids if tokenizer else ())
    found = [it for it in numbers.tokens if it.token in special]
    lines = [(single_text(tokenizer, it.token), it, it.mean_prob < _LEAST_SUPPORT) for it in found]
    about = "Where the prior hardly supports a stop token, a weighted run may not learn to stop."
    return "special", "Special and stop tokens", about, lines


def _dropped_tokens(numbers: "StoreNumbers", tokenizer: Any | None) -> _TokenTable:
    from inspection.decoded import single_text

    most = sorted(numbers.tokens, key=lambda it: (-it.num_dropped, it.token))[:_NUM_TOKENS_LISTED]
    lines = [(single_text(tokenizer, it.token), it, False) for it in most if it.num_dropped]
    return "dropped", "Tokens most often dropped", "By PriFT-mass at threshold 0.5.", lines


def _warnings(numbers: "StoreNumbers", manifest: "Manifest", tokenizer: Any | None, num_left_out: int) -> list[str]:
    from shared.outlook import warnings_of

    found = [
        f"Rule {weighting.rule}: {warning.removeprefix('WARNING: ')}"
        for weighting, outlook in numbers.rules
        if weighting.rule in ("prob", "mass")
        for warning in warnings_of(outlook, weighting)
    ]
    if not any(it.token in manifest.stop_token_ids for it in numbers.tokens):
        found.append("No stop token is a target anywhere: a model trained on this store will not learn to stop.")
    if tokenizer is None:
        found.append(
            f"The prior's tokenizer is not at {manifest.prior_name}: tokens are shown as ids; --tokenizer says where "
            "it lies."
        )
    if num_left_out:
        found.append(f"The page has no room for {num_left_out:,} of the rows to show; prift-inspect show finds each.")
    return found


def _identity(manifest: "Manifest") -> list[tuple[str, str]]:
    source = manifest.source
    fields = {
        "fingerprint": manifest.fingerprint, "prior": manifest.prior_name, "revision": manifest.prior_revision,
        **manifest.identity.model_dump(mode="json"), "format": source.format, "limit": source.limit,
        "shard_rows": source.shard_rows, **{f"file {it.path}": it.sha256 for it in source.files},
        "stop_token_ids": manifest.stop_token_ids, "vocab_size": manifest.vocab_size, **manifest.software,
    }  # fmt: skip
    from inspection.harmless import harmless

    return [(harmless(name), "none" if value is None else harmless(str(value))) for name, value in fields.items()]


def _data(rows: "Sequence[ExampleRow]", numbers: "StoreNumbers") -> str:
    """JSON of what the script shows; `<` is escaped, or a text could end the element that holds it."""
    columns = [name for name in numbers.columns if name not in ("logprob", "mass_rank")]
    shown = [
        {**asdict(row), "scores": {name: [_short(it) for it in values] for name, values in row.scores.items()}}
        for row in rows
    ]
    value = {"rows": shown, "columns": ["logprob", *columns], "kept": numbers.kept_by_mass,
             "num_targets": numbers.num_targets}  # fmt: skip
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _short(value: float | None) -> float | None:
    """With as many digits as tell float32 values apart."""
    return None if value is None else float(f"{value:.9g}")
