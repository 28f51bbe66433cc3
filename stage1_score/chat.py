"""Conversations as the model's own chat template renders them, and where their assistant turns stand.

A template is a program that comes with the model. Nothing is assumed of it: a turn is what the template adds to the
prompt that the model would be given, and where that cannot be found exactly the turn is not trained on.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import TemplateError

from shared.config import DataConfig
from stage1_score.examples import Conversation
from stage1_score.tool_calls import forms, without_each_call

_TROUBLES = (TemplateError, TypeError, ValueError, KeyError, AttributeError)
"""What a template trips over comes up as it is."""


class TemplateMisfit(Exception):
    """The turns of a conversation cannot be found exactly in its rendering."""


class _CallsLeftOut(TemplateMisfit):
    """The template renders the conversation as if a tool were not called."""


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
        return self._render(self._settle(messages, tools, True), tools, True)

    def continuation(self, prompt: list[int], completion: str) -> str:
        """The completion without the `<think>` that the prompt ends in already (DeepSeek-R1, QwQ).

        Raises:
            TemplateMisfit: prompt and completion both open the thinking, but not alike.
        """
        opened = re.search(r"<think>\s*$", self._tokenizer.decode(prompt[-16:]))
        if opened is None or not completion.lstrip().startswith("<think>"):
            return completion
        if not completion.startswith(opened.group()):
            raise TemplateMisfit(
                f"the prompt ends in {opened.group()!r}, and the completion begins with {_shortened(completion)!r}: "
                "let it begin as the prompt ends"
            )
        return completion.removeprefix(opened.group())

    def rows(self, conversation: Conversation) -> list[RenderedRow | MisfitTurn]:
        """One row for the whole conversation; where the template renders a turn otherwise once others follow it, and
        `data.split_turns` allows it, one for each trained turn, as it would be generated.

        Raises:
            TemplateMisfit: no turn can be found exactly, or the template does not take the conversation.
        """
        messages, tools = conversation.messages, conversation.tools
        conversation = Conversation(self._settle(messages, tools, False), tools, conversation.turn_weights)
        ids = self._render(conversation.messages, tools, False)
        if self._data.targets == "all":
            return [RenderedRow(ids, [1.0] * len(ids))]
        assistant = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        chosen = assistant[-1:] if self._data.targets == "last_turn" else assistant
        turns = [index for index in chosen if conversation.weight_of(index)]
        try:
            return [self._together(conversation, ids, turns)]
        except TemplateMisfit:
            if not self._data.split_turns:
                raise
        rows = [self._apart(conversation, index) for index in turns]
        if not any(isinstance(row, RenderedRow) for row in rows):
            raise TemplateMisfit(next(row.reason for row in rows if isinstance(row, MisfitTurn)))
        return rows

    def _together(self, conversation: Conversation, ids: list[int], turns: Sequence[int]) -> RenderedRow:
        weights = [0.0] * len(ids)
        for index in turns:
            before, through = self._turn(conversation, index)
            if ids[: len(before)] != before or ids[: len(through)] != through:
                raise TemplateMisfit(f"the conversation up to message {index} is not rendered as a prefix of the whole")
            weights[len(before) : len(through)] = [conversation.weight_of(index)] * (len(through) - len(before))
        return RenderedRow(ids, weights)

    def _apart(self, conversation: Conversation, index: int) -> RenderedRow | MisfitTurn:
        try:
            before, through = self._turn(conversation, index)
        except TemplateMisfit as error:
            return MisfitTurn(index, str(error))
        if through[: len(before)] != before:
            common = next(i for i, (a, b) in enumerate(zip(before, [*through, None], strict=False)) if a != b)
            prompt, turn = (_shortened(self._tokenizer.decode(ids[common:])) for ids in (before, through))
            return MisfitTurn(
                index,
                f"the prompt for turn {index} has {prompt!r} where the turn as the template renders it has {turn!r}: "
                "data.template=chat_prompt trains on the last turn without rendering it",
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

    def _settle(self, messages: list[dict[str, Any]], tools: Any, add_generation_prompt: bool) -> list[dict[str, Any]]:
        """The messages in the form of their tool calls that the template takes."""
        choices = forms(messages)
        if len(choices) == 1:
            return choices[0]
        troubles: list[TemplateMisfit] = []
        for form in choices:
            try:
                text = self._render(form, tools, add_generation_prompt, as_ids=False)
                for index, less in without_each_call(form):
                    if self._renders_as(text, less, tools, add_generation_prompt):
                        raise _CallsLeftOut(f"it leaves out a tool call of message {index}")
                return form
            except TemplateMisfit as error:
                troubles.append(error)
        raise next((error for error in troubles if isinstance(error, _CallsLeftOut)), troubles[0])

    def _renders_as(self, text: str, messages: list[dict[str, Any]], tools: Any, add_generation_prompt: bool) -> bool:
        try:
            return self._render(messages, tools, add_generation_prompt, as_ids=False) == text
        except TemplateMisfit:
            return False

    def _render(
        self, messages: list[dict[str, Any]], tools: Any, add_generation_prompt: bool, *, as_ids: bool = True
    ) -> Any:
        if not messages:
            raise TemplateMisfit("nothing stands before the first assistant turn")
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                tokenize=as_ids,
                return_dict=False,
                # A template that prints today's date would give other ids tomorrow.
                strftime_now=self._today.strftime,
                **self._data.template_arguments,
            )
        except _TROUBLES as error:
            raise TemplateMisfit(str(error)) from None


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
