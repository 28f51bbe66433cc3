"""Fixtures that several test modules share: a tiny prior with a real tokenizer, commands, stores, reference numbers."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

# No test may reach for the hub: a name that is not a folder is an error at once. Read by huggingface_hub on import.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("RANK", None)

REPOSITORY = Path(__file__).resolve().parents[1]

BOS, EOS, IM_START, IM_END = 256, 257, 258, 259
VOCAB_SIZE = 300
"""Rows of the prior's softmax: more than the tokenizer's 262, as in models with padded vocabularies."""

CHATML = (
    "{% if tools %}<|im_start|>tools\n{% for tool in tools %}{{ tool.name }};{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the repository."""
    return REPOSITORY


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of reference data and numbers: PRIFT_SHARED, or `shared` beside the repository."""
    folder = Path(os.environ.get("PRIFT_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"NO REFERENCE NUMBERS: {folder}/golden is not there; set PRIFT_SHARED to the folder that holds it")
    return folder


def make_tokenizer(chat_template: str | None = CHATML, merges: Sequence[tuple[str, str]] = (("t", "h"), ("th", "e"))):
    """A byte-level BPE tokenizer whose id of a byte is the byte: ids of "hi" are list(b"hi").

    Merges come after the four special tokens: "th" is 260 and "the" is 261, so that what is encoded apart shows.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    assert set(letters.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    specials = {"<s>": BOS, "</s>": EOS, "<|im_start|>": IM_START, "<|im_end|>": IM_END}
    vocabulary = {letter: byte for byte, letter in letters.items()} | specials
    vocabulary |= {left + right: 260 + n for n, (left, right) in enumerate(merges)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(specials))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=chat_template
    )


@pytest.fixture(scope="session")
def tokenizer_with() -> Callable[..., Any]:
    """`make_tokenizer`, for tests that need a template or merges of their own."""
    return make_tokenizer


@pytest.fixture(scope="session")
def chat_tokenizer() -> Any:
    """The tokenizer with a ChatML template."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def plain_tokenizer() -> Any:
    """The tokenizer without a template."""
    return make_tokenizer(None)


def save_prior(folder: Path, chat_template: str | None = CHATML, seed: int = 0) -> Path:
    """A random Llama of two layers with the tokenizer above."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=None,
        # Far from uniform, or every statistic of every token would be much the same.
        initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(chat_template).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prior_with() -> Callable[..., Path]:
    """`save_prior`, for tests that need weights or a template of their own."""
    return save_prior


@pytest.fixture(scope="session")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random prior whose tokenizer has a ChatML template."""
    return save_prior(tmp_path_factory.mktemp("prior") / "tiny")


@pytest.fixture(scope="session")
def plain_prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights with a tokenizer that has no chat template."""
    return save_prior(tmp_path_factory.mktemp("plain-prior") / "tiny", None)


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, Iterable[Any]], Path]:
    """Write rows as JSON lines; returns the path."""

    def write(path: Path, rows: Iterable[Any]) -> Path:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., Outcome]:
    """Run `python -m MODULE ARGUMENT ...` in a process of its own."""

    def run(module: str, *arguments: str | Path, **options: Any) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            capture_output=True, text=True, timeout=300, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, **options,
        )  # fmt: skip
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def call_main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Callable[[], None], Sequence[str | Path]], Outcome]:
    """Call a command's entry point in this process: all of its behaviour without a second start of torch."""

    def call(main: Callable[[], None], words: Sequence[str | Path]) -> Outcome:
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def prift_score(call_main: Callable[..., Outcome], tmp_path: Path) -> Callable[..., Outcome]:
    """`prift-score PIPELINE key=value ...` with an empty pipeline."""
    from stage1_score.cli import main

    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text("data: {}\n")
    return lambda *overrides: call_main(main, ["prift-score", pipeline, *overrides])


@pytest.fixture
def prift_inspect(call_main: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """`prift-inspect WORD ...`."""
    from inspection.cli import main

    return lambda *words: call_main(main, ["prift-inspect", *words])


@pytest.fixture(scope="session")
def read_store() -> Callable[[Path], list[dict[str, Any]]]:
    """All rows of a store by pyarrow alone, in the order of the shards."""

    def read(store: Path) -> list[dict[str, Any]]:
        return [row for path in sorted(store.glob("*.parquet")) for row in pq.ParquetFile(path).read().to_pylist()]

    return read


@pytest.fixture(scope="session")
def manifest_with() -> Callable[..., Any]:
    """A manifest of a store that no prior has seen; fields of its identity by name."""
    from shared.pretrained import TokenizerContent
    from shared.score_store import SCHEMA_VERSION, DataFile, Identity, Manifest, Source

    def make(num_rows: int = 4, shard_rows: int = 4, user_row_ids: bool = True, **fields: Any) -> Manifest:
        identity = Identity(
            **{
                "prior_weights": "a" * 64, "prior_config": "b" * 64, "quantization": None, "tokenizer_files": "c" * 64,
                "chat_template": None, "template_arguments": None, "template": "tokens", "targets": "completion",
                "split_turns": False,
                "max_length": 64, "overlong": "drop", "special_tokens": "as given", "weight_dtype": "float32",
                "compute_dtype": "float64", "head_dtype": "float32", "engine": "transformers", "statistics_version": 1,
                "columns": ("logprob", "mass_rank", "entropy"), **fields,
            }
        )  # fmt: skip
        file = DataFile(path="rows.jsonl", size=1, mtime_ns=1, sha256="d" * 64, num_rows=num_rows)
        columns = {"id": "row_id" if user_row_ids else None, "input_ids": "input_ids", "target_mask": "target_mask"}
        source = Source(format="tokens", columns=columns, limit=None, files=(file,), shard_rows=shard_rows)
        return Manifest(
            schema_version=SCHEMA_VERSION, fingerprint=identity.fingerprint(), identity=identity, source=source,
            prior_name="prior", prior_revision=None, vocab_size=100,
            tokenizer=TokenizerContent(token_map="e" * 64, merges="f" * 64, special_ids={"bos": 1, "eos": 2}),
            stop_token_ids=(2,), user_row_ids=user_row_ids, software={"torch": "0"},
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def scored_row() -> Callable[..., Any]:
    """A well-formed scored row of five tokens, three of them targets; any field may be replaced."""
    from shared.shards import ScoredRow

    def make(index: int, **changes: Any) -> ScoredRow:
        fields = {
            "row_id": f"row-{index}",
            "source_index": index,
            "input_ids": np.array([1, 10 + index, 20 + index, 30 + index, 2], np.int32),
            "target_positions": np.array([2, 3, 4], np.int32),
            "statistics": {
                "logprob": np.array([-0.5, -1.5, -0.25], np.float32) - np.float32(index),
                "mass_rank": np.array([0.0, 0.5 ** (1 + index), 1.0], np.float32),
                "entropy": np.array([1.0, 2.0, 0.0], np.float32) + np.float32(index),
            },
        }
        return ScoredRow(**{**fields, **changes})

    return make


@pytest.fixture(scope="session")
def store_of() -> Callable[..., Path]:
    """Write a finished store from a manifest and its rows, cut into the planned shards."""
    import json

    from shared.score_store import MANIFEST_NAME
    from shared.shards import write_shard

    def write(folder: Path, manifest: Any, rows: Sequence[Any]) -> Path:
        folder.mkdir(parents=True)
        (folder / MANIFEST_NAME).write_text(json.dumps(manifest.model_dump(mode="json")))
        for index in range(manifest.source.num_shards):
            planned = slice(index * manifest.source.shard_rows, (index + 1) * manifest.source.shard_rows)
            write_shard(folder, index, manifest, rows[planned], [], {"engine": "none"})
        return folder

    return write


@pytest.fixture(scope="session")
def rewrite() -> Callable[..., None]:
    """Pass the table of a Parquet file through a function and write it again, footer metadata kept."""

    def change(path: Path, function: Callable[[Any], Any]) -> None:
        with pq.ParquetFile(path) as file:
            metadata, table = file.schema_arrow.metadata, file.read()
        pq.write_table(function(table).replace_schema_metadata(metadata), path, write_page_checksum=True)

    return change


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Any]:
    """A local S3 server behind a link that can be cut."""
    pytest.importorskip("moto.server", reason="NO S3 SERVER: moto[s3], flask and s3fs are not installed")
    pytest.importorskip("s3fs", reason="NO S3 CLIENT: s3fs is not installed")
    from object_store import served

    with served() as link:
        yield link


@pytest.fixture
def object_store(s3_server: Any) -> Iterator[Any]:
    """A new bucket on it."""
    from object_store import ObjectStore

    from shared.files import remove_scratch

    yield ObjectStore(s3_server)
    remove_scratch()
