"""From `Example` to `TokenizedExample`: which ids the prior sees, and which of them are targets.

A conversation is rendered by the model's own template (`stage1_score/chat.py`). Where its assistant turns cannot be
found exactly, the row is dropped with the reason; a mask is never guessed.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.config import DataConfig
from shared.errors import UserError
from stage1_score.chat import ChatRenderer, MisfitTurn, RenderedRow, TemplateMisfit
from stage1_score.examples import Content, Conversation, Example, Instruction, PromptCompletion, Text, TokenIds

TEMPLATE_REASON = "chat template"
"""How the reason of a row begins that does not fit the chat template."""


@dataclass(frozen=True)
class TokenizedExample:
    """What the prior sees of a row."""

    row_id: str
    source_index: int
    input_ids: np.ndarray
    """int32 (T,)."""
    target_positions: np.ndarray
    """int32 (N,), ascending, each in [1, T), N >= 1."""
    target_weights: np.ndarray | None = None
    """float32 (N,), > 0: the data's own weights; None where all are 1."""
    turn: int | None = None
    """Index of the message that alone is trained on here; None where the row holds all that its conversation trains."""


@dataclass(frozen=True)
class DroppedRow:
    """A row that cannot be scored, and why."""

    row_id: str
    source_index: int
    reason: str
    breaks_template: bool
    """Whether the chat template is to blame, rather than the row."""

    def __str__(self) -> str:
        return f"row {self.row_id!r} (source_index {self.source_index}): {self.reason}"


def choose_template(data: DataConfig, format_name: str, tokenizer: Any) -> str:
    """The template that `data.template` means for this format and tokenizer: chat, chat_prompt, plain or tokens.

    Raises:
        UserError: the choice does not fit the format or the tokenizer.
    """
    if format_name == "tokens":
        if data.template != "auto" or data.targets == "last_turn":
            raise UserError(
                f"the data holds tokens: data.template={data.template} and data.targets={data.targets} speak of text; "
                "leave data.template=auto and data.targets=completion (or all)"
            )
        return "tokens"
    has_chat = bool(tokenizer.chat_template)
    with_chat = {"prompt_completion": "chat_prompt", "alpaca": "chat"}
    without_turns = format_name == "text" or (format_name in with_chat and not has_chat)
    automatic = "plain" if without_turns else with_chat.get(format_name, "chat")
    template = automatic if data.template == "auto" else data.template
    if format_name == "text" and template != "plain":
        raise UserError(f"the data holds plain text, which has no turns: data.template={template}; expected plain")
    if template != "plain" and not has_chat:
        raise UserError(
            f"the data holds {format_name} rows and data.template is {template}: that needs a chat template, but the "
            "prior's tokenizer has none; take a prior with one, or prompts and completions with data.template=plain"
        )
    if template == "plain" and format_name in ("messages", "sharegpt", "prompt_messages"):
        raise UserError("data.template=plain needs prompts and completions, but the data holds messages")
    if template != "chat" and tokenizer.eos_token_id is None:
        raise UserError(f"data.template={template} ends each row with EOS, but the tokenizer has no eos token")
    if template != "chat" and data.targets == "last_turn":
        raise UserError(f"data.targets=last_turn needs data.template=chat; the template is {template}")
    return template


class RowTokenizer:
    """Turns examples of one source into ids and targets."""

    def __init__(self, tokenizer: Any, data: DataConfig, template: str, stop_ids: frozenset[int], vocab_size: int):
        self._tokenizer, self._data, self._template = tokenizer, data, template
        self._vocab_size = vocab_size
        self._chat = ChatRenderer(tokenizer, data, stop_ids)

    def tokenize(self, example: Example) -> list[TokenizedExample | DroppedRow]:
        """Ids and targets of a row, or why there are none; several where a conversation is split into its turns.

        Raises:
            UserError: an id beyond the vocabulary, or a row that is too long where data.overlong=error.
        """
        if not _is_unicode(example.content):
            return [DroppedRow(example.row_id, example.source_index, "text with half a surrogate pair", False)]
        try:
            rendered = self._rendered(example)
        except TemplateMisfit as error:
            return [DroppedRow(example.row_id, example.source_index, f"{TEMPLATE_REASON}: {error}", True)]
        return [self._finished(example, row) for row in rendered]

    def _finished(self, example: Example, row: RenderedRow | MisfitTurn) -> TokenizedExample | DroppedRow:
        row_id = example.row_id if row.turn is None else f"{example.row_id}#{row.turn}"
        if isinstance(row, MisfitTurn):
            return DroppedRow(row_id, example.source_index, f"{TEMPLATE_REASON}: {row.reason}", True)
        ids, longest = row.ids, self._data.max_length
        if ids and not 0 <= min(ids) <= max(ids) < self._vocab_size:
            wrong = next(token for token in ids if not 0 <= token < self._vocab_size)
            raise UserError(
                f"{example.place}: token id {wrong} is outside the prior's vocabulary of {self._vocab_size}"
            )
        if len(ids) > longest:
            reason = f"{len(ids)} tokens, data.max_length is {longest}"
            if self._data.overlong == "error":
                raise UserError(f"{example.place}: {reason}; data.overlong=drop or truncate goes on")
            if self._data.overlong == "drop":
                return DroppedRow(row_id, example.source_index, reason, False)
        # The first token has nothing before it that could support it: it is never a target.
        weights_T = np.array(row.weights[:longest], dtype=np.float32)
        weights_T[:1] = 0.0
        positions = np.flatnonzero(weights_T).astype(np.int32)
        if not len(positions):
            return DroppedRow(row_id, example.source_index, "no target token", False)
        given = weights_T[positions] if example.is_weighted else None
        ids_T = np.array(ids[:longest], np.int32)
        return TokenizedExample(row_id, example.source_index, ids_T, positions, given, row.turn)

    def _rendered(self, example: Example) -> list[RenderedRow | MisfitTurn]:
        content = example.content
        if isinstance(content, TokenIds):
            mask = [True] * len(content.input_ids) if self._all else content.target_mask
            return [RenderedRow(content.input_ids, list(map(float, mask)))]
        if self._template == "plain":
            plain = _as_prompt_completion(content)
            bos = self._tokenizer.bos_token_id
            prompt = ([] if bos is None else [bos]) + self._encode(plain.prompt)
            return [self._joined(prompt, plain.completion, 1.0)]
        conversation = _as_conversation(content)
        if self._all and conversation.turn_weights is not None:
            raise UserError(
                f"{example.place}: data.targets=all trains on every token alike, but the row has `train` or `weight`: "
                "take data.targets=completion"
            )
        if self._template == "chat_prompt":
            messages, completion = _prompt_and_completion(conversation)
            weight = conversation.weight_of(len(messages))
            prompt = self._chat.prompt(messages, conversation.tools)
            return [self._joined(prompt, self._chat.continuation(prompt, completion), weight)]
        return self._chat.rows(conversation)

    @property
    def _all(self) -> bool:
        return self._data.targets == "all"

    def _joined(self, prompt: list[int], completion: str, weight: float) -> RenderedRow:
        answer = [*self._encode(completion), self._tokenizer.eos_token_id]
        return RenderedRow(prompt + answer, [float(self._all)] * len(prompt) + [weight] * len(answer))

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)


def tokenize_rows(
    examples: Iterable[Example], row_tokenizer: RowTokenizer
) -> tuple[list[TokenizedExample], list[DroppedRow]]:
    """Kept and dropped rows, each in order."""
    results = [result for example in examples for result in row_tokenizer.tokenize(example)]
    kept = [result for result in results if isinstance(result, TokenizedExample)]
    return kept, [result for result in results if isinstance(result, DroppedRow)]


def _is_unicode(content: Content) -> bool:
    """JSON may hold half a surrogate pair, which is no text that a tokenizer takes."""
    if isinstance(content, TokenIds):
        return True
    try:
        json.dumps(vars(content), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_conversation(content: Content) -> Conversation:
    if isinstance(content, PromptCompletion):
        content = Instruction(content.prompt, "", content.completion)
    if isinstance(content, Instruction):
        return content.conversation()
    assert isinstance(content, Conversation), content
    return content


def _as_prompt_completion(content: Content) -> PromptCompletion:
    if isinstance(content, Instruction):
        if content.history:
            raise TemplateMisfit("earlier turns (data.columns.history) need a chat template; data.template is plain")
        return content.prompt_completion()
    if isinstance(content, Text):
        return PromptCompletion("", content.text)
    assert isinstance(content, PromptCompletion), content
    return content


def _prompt_and_completion(content: Conversation) -> tuple[list[dict[str, Any]], str]:
    last = content.messages[-1]
    if last["role"] != "assistant" or not isinstance(last.get("content"), str):
        raise TemplateMisfit("chat_prompt needs a conversation that ends with an assistant's text")
    for field in ("tool_calls", "reasoning_content"):
        if last.get(field):
            raise TemplateMisfit(f"chat_prompt trains on the text of the last turn, and leaves out its {field}")
    return content.messages[:-1], last["content"]


def marked_text(example: TokenizedExample, tokenizer: Any) -> str:
    """The example as text, targets between ⟦ and ⟧, control characters escaped."""
    is_target = np.zeros(len(example.input_ids), dtype=bool)
    is_target[example.target_positions] = True
    edges = np.flatnonzero(np.diff(is_target)) + 1
    pieces = []
    for run in np.split(np.arange(len(is_target)), edges):
        text = tokenizer.decode(example.input_ids[run].tolist())
        text = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
        pieces.append(f"⟦{text}⟧" if is_target[run[0]] else text)
    return "".join(pieces)
