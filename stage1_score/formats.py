"""The formats that data comes in: which one a source has, and from a raw row of it to `Example`.

The table in docs/data.md shows a row of each and what of it is trained on.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shared.config import ColumnsConfig, DataConfig
from shared.errors import UserError
from shared.score_store import TARGET_WEIGHT_BOUNDS
from stage1_score.examples import (
    Content,
    Conversation,
    Example,
    Instruction,
    PromptCompletion,
    Text,
    TokenIds,
    content_hash,
)
from stage1_score.raw_rows import shown

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
"""What ShareGPT's `from` says, as the role that chat templates know."""

_CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
"""Where a conversation is looked for when data.columns.messages does not say."""


@dataclass(frozen=True)
class RowFormat:
    """How a row of this source is read, settled by its first row."""

    name: str
    """A key of `_FORMATS`, as in data.format."""
    columns: ColumnsConfig
    """With the name of the conversation's column, where the format has one."""
    id_column: str | None
    vocab_size: int | None = None
    """Ids of tokenised rows are below it."""

    def columns_read(self) -> dict[str, str | None]:
        """Names of the columns that are read, as recorded in the store."""
        return {"id": self.id_column, **{name: getattr(self.columns, name) for name in _FORMATS[self.name].columns}}


@dataclass(frozen=True)
class _Format:
    needs: tuple[str, ...]
    """Fields of `data.columns` that a row must have."""
    may_have: tuple[str, ...]
    parse: Callable[[dict[str, Any], RowFormat, str], Content]

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.needs, *self.may_have)


def settle_format(first: dict[str, Any], config: DataConfig, place: str, vocab_size: int | None) -> RowFormat:
    """The format of a source, from its first row.

    Args:
        place: of the data, for messages.
        vocab_size: ids of tokenised rows must be below it.

    Raises:
        UserError: the row's columns are none of the known ones.
    """
    columns = config.columns
    if columns.messages is None:
        found = next((name for name in _CONVERSATION_COLUMNS if name in first), _CONVERSATION_COLUMNS[0])
        columns = columns.model_copy(update={"messages": found})
    fitting = [name for name in _FORMATS if _fits(name, first, columns)]
    name = config.format if config.format != "auto" else (fitting or [None])[0]
    if name is None or not {getattr(columns, need) for need in _FORMATS[name].needs} <= first.keys():
        wanted = [_FORMATS[name]] if name else _FORMATS.values()
        expected = " or ".join(dict.fromkeys("+".join(getattr(columns, need) for need in it.needs) for it in wanted))
        raise UserError(
            f"{place}: expected the columns {expected}, found {', '.join(map(repr, first))}; "
            "name yours with data.columns.*"
        )
    id_column = columns.id or next((name for name in ("row_id", "id") if name in first), None)
    return RowFormat(name, columns, id_column, vocab_size)


def parse_row(row: dict[str, Any], row_format: RowFormat, source_index: int, place: str) -> Example:
    """The example that a raw row holds.

    Args:
        place: file:line, for messages.

    Raises:
        UserError: the row is not of this format.
    """
    content = _FORMATS[row_format.name].parse(row, row_format, place)
    if row_format.id_column is None:
        return Example(source_index, place, content_hash(content), content)
    row_id = row.get(row_format.id_column)
    if isinstance(row_id, bool) or not isinstance(row_id, str | int):
        raise UserError(f"{place}: expected a string or number as {row_format.id_column!r}, got {shown(row_id)}")
    if any("\ud800" <= character <= "\udfff" for character in str(row_id)):
        raise UserError(f"{place}: row id {shown(row_id)} has half a surrogate pair")
    return Example(source_index, place, str(row_id), content)


def _fits(name: str, row: dict[str, Any], columns: ColumnsConfig) -> bool:
    if not {getattr(columns, need) for need in _FORMATS[name].needs} <= row.keys():
        return False
    if name in ("prompt_completion", "prompt_messages"):
        return isinstance(row[columns.prompt], list) == (name == "prompt_messages")
    if name in ("messages", "sharegpt"):
        turns = row[columns.messages or ""]
        speaks_sharegpt = isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]
        return speaks_sharegpt == (name == "sharegpt")
    return True


def _parse_tokens(row: dict[str, Any], row_format: RowFormat, place: str) -> TokenIds:
    columns = row_format.columns
    ids, mask = (_field(row, name, list, place) for name in (columns.input_ids, columns.target_mask))
    if len(ids) != len(mask):
        raise UserError(f"{place}: {columns.input_ids} has {len(ids)} tokens, {columns.target_mask} has {len(mask)}")
    if not all(type(token) is int for token in ids) or not all(flag in (0, 1) for flag in mask):
        raise UserError(f"{place}: expected integers as {columns.input_ids} and 0 or 1 as {columns.target_mask}")
    largest = row_format.vocab_size
    if largest is not None and ids and not 0 <= min(ids) <= max(ids) < largest:
        wrong = next(token for token in ids if not 0 <= token < largest)
        raise UserError(f"{place}: token id {wrong} is outside the prior's vocabulary of {largest}")
    return TokenIds(ids, [bool(flag) for flag in mask])


def _parse_messages(row: dict[str, Any], row_format: RowFormat, place: str) -> Conversation:
    columns = row_format.columns
    assert columns.messages is not None
    tools = _tools(row.get(columns.tools), columns.tools, place)
    return _conversation(_messages(_field(row, columns.messages, list, place), place), tools, place)


def _parse_sharegpt(row: dict[str, Any], row_format: RowFormat, place: str) -> Conversation:
    columns = row_format.columns
    assert columns.messages is not None
    turns = _field(row, columns.messages, list, place)
    if not turns or not all(isinstance(turn, dict) and turn.get("from") in _ROLES for turn in turns):
        wrong = next((turn for turn in turns if not isinstance(turn, dict) or turn.get("from") not in _ROLES), turns)
        raise UserError(f"{place}: expected turns with `from` one of {', '.join(_ROLES)}, got {shown(wrong)}")
    system = _optional_text(row, columns.system, place)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [_sharegpt_message(turn, place) for turn in turns]
    return _conversation(messages, _tools(row.get(columns.tools), columns.tools, place), place)


def _sharegpt_message(turn: dict[str, Any], place: str) -> dict[str, Any]:
    flags = {name: turn[name] for name in ("train", "weight") if turn.get(name) is not None}
    value = _field(turn, "value", str, place)
    if turn["from"] != "function_call":
        return {"role": _ROLES[turn["from"]], "content": value, **flags}
    try:
        calls = json.loads(value)
    except ValueError:
        raise UserError(f"{place}: expected JSON as the value of a function_call, got {shown(value)}") from None
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise UserError(f"{place}: expected a function_call with name and arguments, got {shown(value)}")
    functions = [{"name": call["name"], "arguments": call.get("arguments", {})} for call in calls]
    called = [{"type": "function", "function": function} for function in functions]
    return {"role": "assistant", "content": "", "tool_calls": called, **flags}


def _parse_prompt_completion(row: dict[str, Any], row_format: RowFormat, place: str) -> PromptCompletion:
    columns = row_format.columns
    return PromptCompletion(*(_field(row, name, str, place) for name in (columns.prompt, columns.completion)))


def _parse_prompt_messages(row: dict[str, Any], row_format: RowFormat, place: str) -> Conversation:
    columns = row_format.columns
    asked, answer = (_messages(_field(row, name, list, place), place) for name in (columns.prompt, columns.completion))
    # What is in the prompt is context, whoever said it.
    asked = [{**message, "train": False} if message["role"] == "assistant" else message for message in asked]
    return _conversation([*asked, *answer], _tools(row.get(columns.tools), columns.tools, place), place)


def _parse_alpaca(row: dict[str, Any], row_format: RowFormat, place: str) -> Instruction:
    columns = row_format.columns
    instruction, response = (_field(row, name, str, place) for name in (columns.instruction, columns.output))
    history = row.get(columns.history) or []
    pairs_of_text = isinstance(history, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    )
    if not pairs_of_text:
        raise UserError(f"{place}: expected pairs of texts as {columns.history!r}, got {shown(history)}")
    texts = [_optional_text(row, name, place) for name in (columns.input, columns.system)]
    return Instruction(instruction, texts[0], response, texts[1], tuple((asked, said) for asked, said in history))


def _parse_text(row: dict[str, Any], row_format: RowFormat, place: str) -> Text:
    return Text(_field(row, row_format.columns.text, str, place))


def _messages(messages: list[Any], place: str) -> list[dict[str, Any]]:
    # Parquet gives every message every key; a template takes a null for a value.
    messages = [{k: v for k, v in m.items() if v is not None} if isinstance(m, dict) else m for m in messages]
    if not messages or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        raise UserError(f"{place}: expected messages with a role each, got {shown(messages)}")
    for index, role in enumerate(message["role"] for message in messages):
        # Spelt otherwise, the turn would be context, without a word.
        if role != "assistant" and _ROLES.get(role.lower()) == "assistant":
            raise UserError(f"{place}: message {index}: expected 'assistant' as the role of its turns, got {role!r}")
    return messages


def _conversation(messages: list[dict[str, Any]], tools: list[Any] | None, place: str) -> Conversation:
    """Take `train` and `weight` out of the messages: they speak to the trainer, not to the template."""
    if not any("train" in message or "weight" in message for message in messages):
        return Conversation(messages, tools)
    weights = tuple(_turn_weight(index, message, place) for index, message in enumerate(messages))
    plain = [{k: v for k, v in message.items() if k not in ("train", "weight")} for message in messages]
    is_default = all(weight == (m["role"] == "assistant") for weight, m in zip(weights, plain, strict=True))
    return Conversation(plain, tools, None if is_default else weights)


def _turn_weight(index: int, message: dict[str, Any], place: str) -> float:
    train, weight = message.get("train"), message.get("weight")
    if train is not None and not isinstance(train, bool):
        raise UserError(f"{place}: message {index}: expected true or false as 'train', got {shown(train)}")
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    low, high = TARGET_WEIGHT_BOUNDS
    if weight is not None and not (is_number and (weight == 0 or low <= weight <= high)):
        expected = f"0 or a number from {low:g} to {high:g}"
        raise UserError(f"{place}: message {index}: expected {expected} as 'weight', got {shown(weight)}")
    if train is False and weight:
        raise UserError(f"{place}: message {index}: train is false, but its weight is {weight}")
    is_assistant = message["role"] == "assistant"
    if not is_assistant and (train or weight):
        raise UserError(
            f"{place}: message {index} is marked to be trained on, but its role is {shown(message['role'])}: only "
            "assistant turns can be"
        )
    return 0.0 if train is False or not is_assistant else 1.0 if weight is None else float(weight)


def _tools(tools: Any, name: str, place: str) -> list[Any] | None:
    """Tool definitions, as a list or as the JSON text of one."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise UserError(f"{place}: expected a list of objects as {name!r}, got {shown(tools)}") from None
    if not tools or tools == "":
        return None
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UserError(f"{place}: expected a list of objects as {name!r}, got {shown(tools)}")
    return tools


def _optional_text(row: dict[str, Any], name: str, place: str) -> str:
    return "" if row.get(name) is None else _field(row, name, str, place)


def _field(row: dict[str, Any], name: str, kind: type, place: str) -> Any:
    value = row.get(name)
    if not isinstance(value, kind):
        raise UserError(f"{place}: expected {kind.__name__} as {name!r}, got {shown(value)}")
    return value


_FORMATS = {
    "tokens": _Format(("input_ids", "target_mask"), (), _parse_tokens),
    "messages": _Format(("messages",), ("tools",), _parse_messages),
    "sharegpt": _Format(("messages",), ("system", "tools"), _parse_sharegpt),
    "prompt_completion": _Format(("prompt", "completion"), (), _parse_prompt_completion),
    "prompt_messages": _Format(("prompt", "completion"), ("tools",), _parse_prompt_messages),
    "alpaca": _Format(("instruction", "output"), ("input", "system", "history"), _parse_alpaca),
    "text": _Format(("text",), (), _parse_text),
}
"""In the order in which `auto` tries them."""
