"""Ids as text: characters of several tokens, spaces, and what must not act."""

from pathlib import Path

import pytest

from inspection.decoded import load_store_tokenizer, single_text, token_texts
from shared.errors import UserError
from shared.pretrained import tokenizer_content


def test_a_character_stands_at_the_token_that_ends_it(plain_tokenizer):
    texts = token_texts(plain_tokenizer, list("aü漢b".encode()))
    assert texts == ["a", "", "ü", "", "", "漢", "b"]


def test_bytes_that_are_no_character_are_shown_and_the_rest_is_right(plain_tokenizer):
    texts = token_texts(plain_tokenizer, [0x61, 0xFF, 0x62, 0x63, 0xE6, 0xBC])
    assert len(texts) == 6
    assert "".join(texts) == "a\ufffdbc\ufffd"


def test_bytes_that_undo_a_character_are_shown(reference: Path):
    """A tokenizer with byte fallback joins neighbouring bytes: a broken character takes a whole one with it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reference / "data/stories260K")
    newline, broken, word = tokenizer.convert_tokens_to_ids(["<0x0A>", "<0xE6>", "▁the"])
    texts = token_texts(tokenizer, [newline, broken, word, word, newline])
    assert texts[0] == "\n"
    assert texts[1] == ""
    assert "\ufffd" in texts[2]
    assert "the" in texts[2]
    assert "".join(texts[3:]).strip(" ") == "the\n"


def test_special_tokens_and_line_breaks_are_seen_and_controls_named(plain_tokenizer):
    assert token_texts(plain_tokenizer, [256, 0x0A, 0x1B, 257]) == ["<s>", "\n", r"\x1b", "</s>"]
    assert single_text(plain_tokenizer, 0x1B) == r"\x1b"
    assert single_text(plain_tokenizer, 0xE6) not in ("", "\ufffd")


def test_spaces_of_a_sentencepiece_tokenizer_are_kept(reference: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reference / "data/stories260K")
    text = "Once upon a time, there was a ü."
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts).strip() == text


def test_without_a_tokenizer_ids_are_shown():
    assert token_texts(None, [5, 7]) == ["#5", "#7"]


def test_the_tokenizer_must_be_the_stores(
    plain_prior: Path, tmp_path: Path, manifest_with, plain_tokenizer, tokenizer_with
):
    manifest = manifest_with().model_copy(update={"tokenizer": tokenizer_content(plain_tokenizer)})
    assert load_store_tokenizer(manifest) is None, "no folder is called `prior` here"
    assert load_store_tokenizer(manifest, str(plain_prior)) is not None
    tokenizer_with(None, [("a", "b")]).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="not made by this tokenizer"):
        load_store_tokenizer(manifest, str(tmp_path / "other"))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_store_tokenizer(manifest, str(tmp_path))
