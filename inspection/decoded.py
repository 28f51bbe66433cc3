"""Ids of a store as text that is safe to show: whatever a data set holds, it is seen and does nothing."""

from collections.abc import Sequence
from typing import Any

from inspection.harmless import harmless
from shared.errors import UserError, first_line
from shared.pretrained import tokenizer_content
from shared.score_store import Manifest


def load_store_tokenizer(manifest: Manifest, path: str | None = None) -> Any | None:
    """The tokenizer that a store was made with, without the weights of the prior.

    Args:
        path: where it lies now; None looks where the store says. Nothing is fetched.

    Returns:
        The tokenizer; None where the place named by the store has none or another one by now: ids must do.

    Raises:
        UserError: `path` holds none, or another tokenizer than the store's.
    """
    from transformers import AutoTokenizer

    name, revision = path or manifest.prior_name, None if path else manifest.prior_revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        if path is None:
            return None
        raise UserError(f"--tokenizer {path}: its tokenizer cannot be loaded: {first_line(error)}") from None
    if tokenizer_content(tokenizer) != manifest.tokenizer:
        if path is None:
            return None
        raise UserError(f"--tokenizer {path}: the ids of the store were not made by this tokenizer")
    return tokenizer


def token_texts(tokenizer: Any | None, ids: Sequence[int]) -> list[str]:
    """One text for each id, harmless to show; line breaks stay.

    A character of several tokens stands at the one that ends it, and those before have an empty text. Without a
    tokenizer a token is `#id`.
    """
    if tokenizer is None:
        return [f"#{token}" for token in ids]
    from tokenizers.decoders import DecodeStream

    stream, texts, pending = DecodeStream(skip_special_tokens=False), [], []
    for token in map(int, ids):
        pending.append(token)
        try:
            text = stream.step(tokenizer.backend_tokenizer, token)
        # It has no type of its own: bytes that are no character change what the byte before them, already given, means.
        except Exception:
            text, stream = tokenizer.decode(pending), DecodeStream(skip_special_tokens=False)
        texts.append("" if text is None else _shown(text))
        if text is not None:
            pending = []
    if pending:
        texts[-1] = _shown(tokenizer.decode(pending))
    return texts


def single_text(tokenizer: Any | None, token: int) -> str:
    """Text of one token by itself; bytes that are no character are shown as the tokenizer writes them."""
    if tokenizer is None:
        return f"#{token}"
    text = tokenizer.decode([token])
    return _shown(text if "\ufffd" not in text and text else tokenizer.convert_ids_to_tokens(token) or f"#{token}")


def _shown(text: str) -> str:
    return harmless(text, keep_line_breaks=True)
