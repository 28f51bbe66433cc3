"""Tool calls of chat messages, in the forms that chat templates want them."""

import copy
import json
from collections.abc import Iterator
from typing import Any


def forms(messages: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The messages as given, and as other templates want those that call tools.

    Arguments come first as objects, which most templates turn into JSON themselves, then as JSON text: text given to
    the first kind would be quoted twice, without a word. Where nothing is said beside the calls, the content is also
    tried as null (DeepSeek-R1 looks for calls only there) and as empty text. A list without a call is none: Llama 3
    takes every message that has one for a call.
    """
    messages = [{k: v for k, v in m.items() if k != "tool_calls" or v != []} for m in messages]
    silent = [not message.get("content") for message in messages if message.get("tool_calls")]
    contents: list[dict[str, Any]] = [{}, {"content": None}, {"content": ""}] if any(silent) else [{}]
    flags = (False, True) if silent else (False,)
    return [_with_calls(messages, content, as_text) for content in contents for as_text in flags]


def _with_calls(messages: list[dict[str, Any]], content: dict[str, Any], as_text: bool) -> list[dict[str, Any]]:
    messages = copy.deepcopy(messages)
    for message in messages:
        if message.get("tool_calls") and not message.get("content"):
            message.update(content)
        for call in _listed(message.get("tool_calls")):
            function = call["function"] if isinstance(call.get("function"), dict) else call
            arguments = function.get("arguments")
            if as_text and isinstance(arguments, dict):
                function["arguments"] = json.dumps(arguments, ensure_ascii=False)
            elif not as_text and isinstance(arguments, str):
                function["arguments"] = _parsed(arguments)
    return messages


def without_each_call(messages: list[dict[str, Any]]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """For each tool call the index of its message, and the messages without that call."""
    for index, message in enumerate(messages):
        calls = _listed(message.get("tool_calls"))
        for place in range(len(calls)):
            rest = calls[:place] + calls[place + 1 :]
            less = {**message, "tool_calls": rest} if rest else {k: v for k, v in message.items() if k != "tool_calls"}
            yield index, [*messages[:index], less, *messages[index + 1 :]]


def _listed(calls: Any) -> list[dict[str, Any]]:
    return [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []


def _parsed(text: str) -> Any:
    """The object that a JSON text holds; the text where it holds none."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, dict) else text
