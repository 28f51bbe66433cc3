"""Models and tokenizers on disk: identified by content, loaded without running anything that came with them."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import UserError
from shared.pretrained import (
    PretrainedFiles,
    find_pretrained,
    load_causal_lm,
    load_tokenizer,
    stop_token_ids,
    text_digest,
    tokenizer_content,
)


class Touch:
    """Unpickling this creates a file: what a hostile checkpoint would do with more imagination."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.fixture
def copied(prior: Path, tmp_path: Path) -> Path:
    """A copy of the prior that a test may change."""
    return Path(shutil.copytree(prior, tmp_path / "copy"))


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_and_not_run(copied: Path, tmp_path: Path, name: str):
    marker = tmp_path / "pickle was run"
    (copied / "model.safetensors").unlink()
    (copied / name).write_bytes(pickle.dumps(Touch(marker)))
    with pytest.raises(UserError, match=r"expected safetensors weights, model\.safetensors is missing"):
        find_pretrained(str(copied))
    # Even a caller that skips the search reads no pickle.
    with pytest.raises(UserError, match="cannot be loaded"):
        load_causal_lm(PretrainedFiles(str(copied), None, copied, False), torch.float32)
    assert not marker.exists()
    pickle.loads((copied / name).read_bytes())
    assert marker.exists()  # the trap works


def test_an_adapter_is_no_model(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"found a LoRA adapter: train.lora.export=merged writes a model"):
        find_pretrained(str(tmp_path))


def test_code_that_comes_with_a_model_does_not_run(copied: Path, tmp_path: Path):
    marker = tmp_path / "code was run"
    (copied / "modeling_custom.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Custom: ...\n")
    (copied / "configuration_custom.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass CustomConfig: ...\n")
    automatic = {"AutoConfig": "configuration_custom.CustomConfig", "AutoModelForCausalLM": "modeling_custom.Custom"}
    edit_json(copied / "config.json", model_type="custom", auto_map=automatic)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_causal_lm(find_pretrained(str(copied)), torch.float32)
    assert not marker.exists()


def test_a_folder_without_config_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"expected a model folder with config\.json"):
        find_pretrained(str(tmp_path))


@pytest.mark.parametrize("name", ["no-such-owner/no-such-model", "no/such/folder/anywhere"])
def test_a_name_that_is_nowhere_is_refused(name: str):
    with pytest.raises(UserError, match=f"{name}: neither a folder nor a model that the hub gives"):
        find_pretrained(name)


def test_digests_follow_content_not_names(prior: Path, copied: Path, prior_with, tmp_path: Path):
    first, second = find_pretrained(str(prior)), find_pretrained(str(copied))
    assert first.weights_digest() == second.weights_digest()
    assert first.tokenizer_files_digest() == second.tokenizer_files_digest()
    other = find_pretrained(str(prior_with(tmp_path / "other", seed=1)))
    assert other.weights_digest() != first.weights_digest()
    assert other.tokenizer_files_digest() == first.tokenizer_files_digest()
    # One bit of one weight.
    weights = bytearray((copied / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copied / "model.safetensors").write_bytes(weights)
    assert second.weights_digest() != first.weights_digest()


def test_sharded_weights_are_all_hashed_and_all_needed(prior: Path, tmp_path: Path):
    model = load_causal_lm(find_pretrained(str(prior)), torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    files = find_pretrained(str(tmp_path))
    assert len(files.weight_files()) > 1
    before = files.weights_digest()
    last = files.weight_files()[-1]
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    assert files.weights_digest() != before
    last.unlink()
    with pytest.raises(UserError, match=last.name):
        find_pretrained(str(tmp_path))


def test_weights_load_in_the_dtype_asked_for(prior: Path):
    model = load_causal_lm(find_pretrained(str(prior)), torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_damaged_weights_are_the_users_to_mend(copied: Path):
    (copied / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_causal_lm(find_pretrained(str(copied)), torch.float32)


def test_a_folder_without_tokenizer_is_refused(copied: Path):
    for path in copied.glob("*token*"):
        path.unlink()
    with pytest.raises(UserError, match="tokenizer cannot be loaded"):
        load_tokenizer(find_pretrained(str(copied)))


def test_tokenizers_are_compared_by_what_they_do(prior: Path, plain_prior: Path, tokenizer_with):
    loaded = tokenizer_content(load_tokenizer(find_pretrained(str(prior))))
    assert loaded == tokenizer_content(tokenizer_with())
    # Neither a chat template nor padding turns text into other ids.
    assert loaded == tokenizer_content(load_tokenizer(find_pretrained(str(plain_prior))))
    padded = tokenizer_with()
    padded.pad_token = "</s>"
    padded.padding_side = "left"
    assert loaded == tokenizer_content(padded)
    assert loaded.special_ids == {"bos": 256, "eos": 257, "unk": None}


def test_tokenizers_that_differ_are_told_apart(tokenizer_with):
    base = tokenizer_content(tokenizer_with())
    # The same two tokens by name and id, the merges in another order.
    swapped = tokenizer_with(merges=(("t", "h"), ("h", "e")))
    assert tokenizer_content(swapped).token_map != base.token_map
    reordered = tokenizer_with(merges=(("a", "b"), ("b", "c")))
    original = tokenizer_with(merges=(("b", "c"), ("a", "b")))
    assert tokenizer_content(reordered) != tokenizer_content(original)
    other_end = tokenizer_with()
    other_end.eos_token = "<|im_end|>"
    changed = tokenizer_content(other_end)
    assert (changed.token_map, changed.merges) == (base.token_map, base.merges)
    assert changed.special_ids != base.special_ids


def test_merges_alone_make_a_difference(tokenizer_with):
    """Same token map, other order of merges: "abc" becomes ab + c or a + bc."""
    from tokenizers import Tokenizer

    first = tokenizer_with(merges=(("a", "b"), ("b", "c")))
    state = json.loads(first.backend_tokenizer.to_str())
    state["model"]["merges"].reverse()
    second = tokenizer_with(merges=(("a", "b"), ("b", "c")))
    second._tokenizer = Tokenizer.from_str(json.dumps(state))
    assert first.encode("abc") != second.encode("abc")
    one, two = tokenizer_content(first), tokenizer_content(second)
    assert one.token_map == two.token_map
    assert one.merges != two.merges


def test_stop_tokens_come_from_files_tokenizer_and_chat_formats(copied: Path, chat_tokenizer):
    files = find_pretrained(str(copied))
    assert stop_token_ids(files, chat_tokenizer) == [257, 259]  # </s>, and <|im_end|> by its name
    edit_json(copied / "config.json", eos_token_id=[10, 11])
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": 12}))
    assert stop_token_ids(files, chat_tokenizer) == [10, 11, 12, 257, 259]
    edit_json(copied / "config.json", eos_token_id=None)
    (copied / "generation_config.json").unlink()
    assert stop_token_ids(files, chat_tokenizer) == [257, 259]


def test_text_digest():
    assert text_digest(None) is None
    assert text_digest("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
