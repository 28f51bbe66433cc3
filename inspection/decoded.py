"""Token ids of a store as text that is safe to print."""

from collections.abc import Sequence
from typing import Any

from inspection.harmless import harmless
from shared.errors import UserError
from shared.pretrained import tokenizer_content
from shared.score_store import Manifest


def load_store_tokenizer(manifest: Manifest, path: str | None) -> Any | None:
    """The tokenizer that made a store's ids.

    Args:
        path: where it lies; None: where the store says, if it is there still.

    Returns:
        None where no path is given and the prior is not on this machine.

    Raises:
        UserError: the tokenizer is another one.
    """
    from transformers import AutoTokenizer

    name, revision = (path, None) if path else (manifest.prior_name, manifest.prior_revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, local_files_only=True)
    except (OSError, ValueError):
        if path:
            raise UserError(f"--tokenizer {path}: expected the folder of a tokenizer, found none") from None
        return None
    if tokenizer_content(tokenizer) != manifest.tokenizer:
        if path:
            raise UserError(f"--tokenizer {path}: the ids of the store are not made by this tokenizer")
        return None
    return tokenizer


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token, harmless to print; a character of several tokens stands at the last of them."""
    texts, waiting = [], []
    for token in ids:
        waiting.append(int(token))
        text = tokenizer.decode(waiting, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        # An unfinished character decodes to the replacement character; no character has more than four bytes.
        if text.endswith("\ufffd") and len(waiting) < 4:
            texts.append("")
        else:
            texts.append(harmless(text, keep_line_breaks=True))
            waiting = []
    if waiting:  # the row ends within a character
        text = tokenizer.decode(waiting, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        texts[-1] = harmless(text, keep_line_breaks=True)
    return texts
