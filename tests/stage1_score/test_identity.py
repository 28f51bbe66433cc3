"""What goes into a store's identity: everything that changes its numbers, and nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from shared.config import Config
from shared.pretrained import find_pretrained, load_tokenizer
from shared.score_store import Manifest
from stage1_score.identity import build_manifest


@pytest.fixture
def manifest_of(manifest_with):
    """The manifest that a run on a folder would make; config sections by name."""

    def make(
        folder: Path, template: str = "chat", dtypes: tuple[str, str] = ("float32", "float64"), **sections: Any
    ) -> Manifest:
        files = find_pretrained(str(folder))
        source = manifest_with().source
        config = Config.model_validate(sections)
        return build_manifest(config, files, load_tokenizer(files), source, template, dtypes, "transformers")

    return make


@pytest.fixture
def copied(prior: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prior, tmp_path / "copy"))


def differing(one: Manifest, other: Manifest) -> set[str]:
    old, new = one.identity.model_dump(), other.identity.model_dump()
    assert (one.fingerprint == other.fingerprint) == (old == new)
    return {name for name in old if old[name] != new[name]}


def test_where_and_how_a_run_goes_is_not_in_it(manifest_of, prior: Path, copied: Path):
    base = manifest_of(prior)
    # The same files under another name, another output, other batches.
    other = manifest_of(
        copied, score={"output": "elsewhere", "batch_tokens": 99, "shard_rows": 7, "rehash": True},
        data={"path": "x.jsonl", "limit": 3}, train={"seed": 5},
    )  # fmt: skip
    assert differing(base, other) == set()
    assert (base.prior_name, other.prior_name) == (str(prior), str(copied))


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"data": {"max_length": 100}}, "max_length"),
        ({"data": {"overlong": "truncate"}}, "overlong"),
        ({"data": {"targets": "all"}}, "targets"),
        ({"data": {"template_date": "2025-01-01"}}, "template_arguments"),
        ({"data": {"template_arguments": {"enable_thinking": False}}}, "template_arguments"),
        ({"score": {"columns": ("logprob",)}}, "columns"),
    ],
)
def test_what_changes_the_numbers_is_in_it(manifest_of, prior: Path, sections: dict[str, Any], field: str):
    assert differing(manifest_of(prior), manifest_of(prior, **sections)) == {field}


def test_dtypes_are_in_it(manifest_of, prior: Path):
    base = manifest_of(prior)
    assert differing(base, manifest_of(prior, dtypes=("float32", "float32"))) == {"compute_dtype"}
    assert differing(base, manifest_of(prior, dtypes=("bfloat16", "float64"))) == {"weight_dtype"}


def test_the_template_is_in_it_only_where_one_is_used(manifest_of, prior: Path, copied: Path):
    (copied / "chat_template.jinja").write_text("{{ messages }}")
    # The template lies among the tokenizer's files, so their digest speaks too.
    assert differing(manifest_of(prior), manifest_of(copied)) == {"chat_template", "tokenizer_files"}
    plain = manifest_of(prior, "plain")
    assert (plain.identity.chat_template, plain.identity.template_arguments) == (None, None)
    assert differing(plain, manifest_of(prior, "plain", data={"template_date": "2025-01-01"})) == set()
    assert differing(plain, manifest_of(prior, "tokens")) == {"template", "special_tokens"}


def test_the_priors_files_are_in_it(manifest_of, prior: Path, copied: Path, prior_with, tmp_path: Path):
    base = manifest_of(prior)
    assert differing(base, manifest_of(prior_with(tmp_path / "other", seed=1))) == {"prior_weights"}
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert differing(base, manifest_of(copied)) == {"prior_config"}
    (copied / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    assert differing(base, manifest_of(copied)) == {"prior_config", "quantization"}


def test_the_layout_of_config_json_is_not_in_it(manifest_of, prior: Path, copied: Path):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert differing(manifest_of(prior), manifest_of(copied)) == set()


def test_what_stage_2_needs_stands_beside_it(manifest_of, prior: Path):
    manifest = manifest_of(prior)
    assert manifest.vocab_size == 300  # the model's rows, not the tokenizer's 262
    assert manifest.stop_token_ids == (257, 259)
    assert manifest.tokenizer.special_ids == {"bos": 256, "eos": 257, "unk": None}
    assert manifest.user_row_ids
    assert manifest.software.keys() == {"torch", "transformers", "pyarrow"}
