"""Pretrained models and tokenizers on disk: found, identified by content, loaded safely.

A model is identified by the files it is loaded from, never by live tensors (sharded ones are empty). Only
safetensors weights are read; code that comes with a model runs only where the user allowed it.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from shared.errors import UserError, first_line
from shared.files import sha256_of_file, sha256_of_json

_HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_TURN_END_TOKENS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|return|>", "<|eot|>",
    "<|end_of_text|>", "<|endoftext|>", "<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>", "</s>",
)  # fmt: skip
"""Tokens with which common chat formats end a turn; base models often have them in the vocabulary only."""


@dataclass(frozen=True)
class PretrainedFiles:
    """A model and tokenizer on the local disk."""

    name: str
    """As the user gave it: a folder or a hub id."""
    revision: str | None
    """The commit of a hub id."""
    folder: Path
    trust_remote_code: bool

    def config(self) -> dict[str, Any]:
        """Content of config.json."""
        return json.loads((self.folder / "config.json").read_text(encoding="utf-8"))

    def weight_files(self) -> list[Path]:
        """The safetensors files that the model is loaded from."""
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return [self.folder / Path(name).name for name in names]
        return [self.folder / "model.safetensors"]

    def weights_digest(self) -> str:
        """sha256 over names and contents of the weight files, whatever the folder is called."""
        return sha256_of_json([[file.name, sha256_of_file(file)] for file in self.weight_files()])

    def tokenizer_files_digest(self) -> str:
        """sha256 over names and contents of the tokenizer's files."""
        files = [self.folder / name for name in _TOKENIZER_FILES]
        return sha256_of_json([[file.name, sha256_of_file(file)] for file in files if file.is_file()])


def vocab_rows_of(config: dict[str, Any]) -> int:
    """Rows of the softmax, as a config.json says."""
    return int(config.get("vocab_size") or config["text_config"]["vocab_size"])


def rope_type_of(config: dict[str, Any]) -> str:
    """Kind of rotary embedding, as a config.json says.

    With `dynamic` and `longrope` the frequencies of a row depend on the longest row beside it, and with `dynamic` on
    those that went before.
    """
    text = config.get("text_config") or config
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    return rope.get("rope_type") or rope.get("type") or "default"


def find_pretrained(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedFiles:
    """Find a model on the disk, or fetch it from the hub (offline settings of huggingface_hub are honoured).

    Raises:
        UserError: not found, or without safetensors weights.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder, revision = _fetch(name, revision, [*_HUB_PATTERNS, "*.py"] if trust_remote_code else _HUB_PATTERNS)
    files = PretrainedFiles(name, revision, folder, trust_remote_code)
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{name}: expected a model, found a LoRA adapter: train.lora.export=merged writes a model")
    if not (folder / "config.json").is_file():
        raise UserError(f"{name}: expected a model folder with config.json, found none")
    missing = [file.name for file in files.weight_files() if not file.is_file()]
    if missing:
        raise UserError(
            f"{name}: expected safetensors weights, {missing[0]} is missing; pickled weights (.bin, .pt) are not read. "
            "Convert them with save_pretrained of transformers"
        )
    return files


def _fetch(name: str, revision: str | None, patterns: list[str]) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{name}: neither a folder nor a model that the hub gives ({reason})") from None
    return folder, folder.name


def load_tokenizer(files: PretrainedFiles) -> Any:
    """The model's tokenizer.

    Raises:
        UserError: there is none, or it needs code that is not trusted.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(files.folder, trust_remote_code=files.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{files.name}: its tokenizer cannot be loaded: {first_line(error)}") from error


def load_causal_lm(files: PretrainedFiles, dtype: Any) -> Any:
    """The model, from safetensors only, weights in `dtype`.

    Raises:
        UserError: it cannot be loaded, or needs code that is not trusted.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    text_config = files.config().get("text_config") or files.config()
    # transformers' default attention drops the soft-capping of attention logits (Gemma 2) without a word.
    attention = {"attn_implementation": "eager"} if text_config.get("attn_logit_softcapping") else {}
    try:
        return AutoModelForCausalLM.from_pretrained(
            files.folder, dtype=dtype, use_safetensors=True, trust_remote_code=files.trust_remote_code, **attention
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{files.name}: the model cannot be loaded: {first_line(error)}") from error


class TokenizerContent(BaseModel):
    """A tokenizer by what it does, not by its files: the ground on which two are compared."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    token_map: str
    """sha256 of the map from tokens to ids."""
    merges: str
    """sha256 of everything else that turns text into ids: merges or scores, normaliser, pre-tokeniser."""
    special_ids: dict[str, int | None]
    """Ids of bos, eos and unk."""


def tokenizer_content(tokenizer: Any) -> TokenizerContent:
    """What two tokenizers are compared by. Padding is left out: nothing that is scored or trained on is padding."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = {key: value for key, value in backend["model"].items() if key != "vocab" or isinstance(value, list)}
    rules = {"model": model, "normalizer": backend["normalizer"], "pre_tokenizer": backend["pre_tokenizer"]}
    return TokenizerContent(
        token_map=sha256_of_json(tokenizer.get_vocab()),
        merges=sha256_of_json(rules),
        special_ids={name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk")},
    )


def stop_token_ids(files: PretrainedFiles, tokenizer: Any) -> list[int]:
    """Ids that end a turn or a text: those the model's files name, and the turn ends of common chat formats."""
    ids: set[int] = set()
    generation = files.folder / "generation_config.json"
    for config in (files.config(), json.loads(generation.read_text()) if generation.is_file() else {}):
        eos = config.get("eos_token_id")
        ids.update(eos if isinstance(eos, list) else [eos] if isinstance(eos, int) else [])
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    vocabulary = tokenizer.get_vocab()
    ids.update(vocabulary[token] for token in _TURN_END_TOKENS if token in vocabulary)
    return sorted(ids)


def text_digest(text: str | None) -> str | None:
    """sha256 of a text; None stays None."""
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()
