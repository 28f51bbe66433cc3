"""Conversations as the model's own chat template renders them, and where their assistant turns stand.

A template is a program that comes with the model. Nothing is assumed of it: a turn is what the template adds to the
prompt that the model would be given, and where that cannot be found exactly the turn is not trained on.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import TemplateError

from shared.config import DataConfig
from stage1_score.examples import Conversation

_TROUBLES = (TemplateError, TypeError, ValueError, KeyError, AttributeError)
"""What a template trips over comes up as it is."""


class TemplateMisfit(Exception):
    """The turns of a conversation cannot be found exactly in its rendering."""


class _Unstable(TemplateMisfit):
    """A turn is rendered otherwise once others follow it."""


@dataclass(frozen=True)
class RenderedRow:
    """What becomes one row of the store."""

    ids: list[int]
    weights: list[float]
    """The data's own weight of each token; 0 where it is no target."""
    turn: int | None = None
    """Index of the message that alone is trained on; None where the row holds all that the conversation trains."""


@dataclass(frozen=True)
class MisfitTurn:
    """A turn that is left out, beside others of its conversation that are not."""

    turn: int
    reason: str


class ChatRenderer:
    """The chat template of one prior, with the arguments of a run."""

    def __init__(self, tokenizer: Any, data: DataConfig, stop_ids: frozenset[int]):
        self._tokenizer, self._data, self._stop_ids = tokenizer, data, stop_ids
        self._today = datetime.fromisoformat(data.template_date)

    def prompt(self, messages: list[dict[str, Any]], tools: Sequence[Any] | None) -> list[int]:
        """Ids of messages and of what asks the model for its answer.

        Raises:
            TemplateMisfit: the template does not take them.
        """
        return self._render(messages, tools, True)

    def rows(self, conversation: Conversation) -> list[RenderedRow | MisfitTurn]:
        """One row for the whole conversation; where the template renders a turn otherwise once others follow it, and
        `data.split_turns` allows it, one for each trained turn, as it would be generated.

        Raises:
            TemplateMisfit: no turn can be found exactly, or the template does not take the conversation.
        """
        messages, tools = conversation.messages, conversation.tools
        if self._data.targets == "all":
            ids = self._render(messages, tools, False)
            return [RenderedRow(ids, [1.0] * len(ids))]
        assistant = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        chosen = assistant[-1:] if self._data.targets == "last_turn" else assistant
        turns = [index for index in chosen if conversation.weight_of(index)]
        try:
            return [self._together(conversation, turns)]
        except _Unstable:
            if not self._data.split_turns:
                raise
        rows = [self._apart(conversation, index) for index in turns]
        if not any(isinstance(row, RenderedRow) for row in rows):
            raise TemplateMisfit(next(row.reason for row in rows if isinstance(row, MisfitTurn)))
        return rows

    def _together(self, conversation: Conversation, turns: Sequence[int]) -> RenderedRow:
        ids = self._render(conversation.messages, conversation.tools, False)
        weights = [0.0] * len(ids)
        for index in turns:
            before, through = self._turn(conversation, index)
            if ids[: len(before)] != before or ids[: len(through)] != through:
                raise _Unstable(f"the conversation up to message {index} is not rendered as a prefix of the whole")
            weights[len(before) : len(through)] = [conversation.weight_of(index)] * (len(through) - len(before))
        return RenderedRow(ids, weights)

    def _apart(self, conversation: Conversation, index: int) -> RenderedRow | MisfitTurn:
        try:
            before, through = self._turn(conversation, index)
        except TemplateMisfit as error:
            return MisfitTurn(index, str(error))
        if through[: len(before)] != before:
            common = next(i for i, (a, b) in enumerate(zip(before, [*through, None], strict=False)) if a != b)
            prompt = self._tokenizer.decode(before[common:])
            return MisfitTurn(
                index,
                f"the prompt for turn {index} ends in {prompt!r}, which the turn as the template renders it does not "
                "begin with: data.template=chat_prompt trains on the last turn without rendering it",
            )
        weight = conversation.weight_of(index)
        weights = [0.0] * len(before) + [weight] * (len(through) - len(before))
        return RenderedRow(through, weights, index)

    def _turn(self, conversation: Conversation, index: int) -> tuple[list[int], list[int]]:
        """Ids of the prompt for turn `index`, and of the conversation through the stop token that ends the turn."""
        before = self._render(conversation.messages[:index], conversation.tools, True)
        through = self._render(conversation.messages[: index + 1], conversation.tools, False)
        end = next((i + 1 for i in reversed(range(len(through))) if through[i] in self._stop_ids), 0)
        # The last stop token may be one of the prompt. What follows it may be a newline of the template; text there
        # means that it stood inside the turn, and none ends it.
        if before[:end] == through[:end] or self._tokenizer.decode(through[end:]).strip():
            raise TemplateMisfit(f"the assistant turn {index} does not end on a stop token")
        return before, through[:end]

    def _render(self, messages: list[dict[str, Any]], tools: Any, add_generation_prompt: bool) -> list[int]:
        if not messages:
            raise TemplateMisfit("nothing stands before the first assistant turn")
        trouble: Exception | None = None
        for form in _forms(messages):
            try:
                return self._tokenizer.apply_chat_template(
                    form,
                    tools=tools,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=True,
                    return_dict=False,
                    # A template that prints today's date would give other ids tomorrow.
                    strftime_now=self._today.strftime,
                    **self._data.template_arguments,
                )
            except _TROUBLES as error:
                trouble = trouble or error
        raise TemplateMisfit(str(trouble))


def _forms(messages: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The messages with arguments of tool calls as objects, which most templates turn into JSON themselves, and as JSON
    text, which the others want. Text given to the first kind would be quoted twice, without a word."""
    if not any(message.get("tool_calls") for message in messages):
        return [messages]
    return [_with_arguments(messages, as_text) for as_text in (False, True)]


def _with_arguments(messages: list[dict[str, Any]], as_text: bool) -> list[dict[str, Any]]:
    messages = copy.deepcopy(messages)
    calls = [call for message in messages for call in _listed(message.get("tool_calls")) if isinstance(call, dict)]
    for call in calls:
        function = call["function"] if isinstance(call.get("function"), dict) else call
        arguments = function.get("arguments")
        if as_text and isinstance(arguments, dict):
            function["arguments"] = json.dumps(arguments, ensure_ascii=False)
        elif not as_text and isinstance(arguments, str):
            function["arguments"] = _parsed(arguments)
    return messages


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _parsed(text: str) -> Any:
    """The object that a JSON text holds; the text where it holds none."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, dict) else text
