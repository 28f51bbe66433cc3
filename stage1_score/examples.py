"""From a raw row to `Example`: what a row holds, checked and typed."""

from dataclasses import dataclass
from typing import Any

from shared.config import ColumnsConfig
from shared.errors import UserError
from shared.files import sha256_of_json
from stage1_score.raw_rows import shown


@dataclass(frozen=True)
class Conversation:
    """Chat messages as the template takes them, with the tools they may call."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None


@dataclass(frozen=True)
class PromptCompletion:
    """A prompt, and the text that is trained on."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class TokenIds:
    """Tokens given as such."""

    input_ids: list[int]
    target_mask: list[bool]


@dataclass(frozen=True)
class Example:
    """One row of the source."""

    source_index: int
    place: str
    """file:line, for messages."""
    row_id: str
    """The user's own, else a hash of the content."""
    content: Conversation | PromptCompletion | TokenIds


@dataclass(frozen=True)
class RowFormat:
    """How a row of this source is read, settled by its first row."""

    name: str
    """messages, prompt_completion or tokens."""
    columns: ColumnsConfig
    id_column: str | None
    vocab_size: int | None = None
    """Ids of tokenised rows are below it."""

    def columns_read(self) -> dict[str, str | None]:
        """Names of the columns that are read, as recorded in the store."""
        names = {"messages": ["messages", "tools"], "prompt_completion": ["prompt", "completion"]}
        read = names.get(self.name, ["input_ids", "target_mask"])
        return {"id": self.id_column, **{name: getattr(self.columns, name) for name in read}}


def parse_row(row: dict[str, Any], row_format: RowFormat, source_index: int, place: str) -> Example:
    """The example that a raw row holds.

    Args:
        place: file:line, for messages.

    Raises:
        UserError: the row is not of this format.
    """
    content = _parse_content(row, row_format, place)
    if row_format.id_column is None:
        return Example(source_index, place, sha256_of_json(vars(content))[:32], content)
    row_id = row.get(row_format.id_column)
    if isinstance(row_id, bool) or not isinstance(row_id, str | int):
        raise UserError(f"{place}: expected a string or number as {row_format.id_column!r}, got {shown(row_id)}")
    if any("\ud800" <= character <= "\udfff" for character in str(row_id)):
        raise UserError(f"{place}: row id {shown(row_id)} has half a surrogate pair")
    return Example(source_index, place, str(row_id), content)


def _parse_content(
    row: dict[str, Any], row_format: RowFormat, place: str
) -> Conversation | PromptCompletion | TokenIds:
    columns = row_format.columns
    if row_format.name == "messages":
        messages = _field(row, columns.messages, list, place)
        # Parquet gives every message every key; a template takes a null for a value.
        messages = [{k: v for k, v in m.items() if v is not None} if isinstance(m, dict) else m for m in messages]
        if not messages or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
            raise UserError(f"{place}: expected messages with a role each, got {shown(messages)}")
        tools = row.get(columns.tools) or None
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise UserError(f"{place}: expected a list of objects as {columns.tools!r}, got {shown(tools)}")
        return Conversation(messages, tools)
    if row_format.name == "prompt_completion":
        return PromptCompletion(*(_field(row, name, str, place) for name in (columns.prompt, columns.completion)))
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


def _field(row: dict[str, Any], name: str, kind: type, place: str) -> Any:
    value = row.get(name)
    if not isinstance(value, kind):
        raise UserError(f"{place}: expected {kind.__name__} as {name!r}, got {shown(value)}")
    return value
