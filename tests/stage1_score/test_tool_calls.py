"""Conversations that call tools, under templates that want the calls in one form or leave them out."""

from typing import Any

import pytest

from shared.config import DataConfig
from stage1_score.examples import Conversation, Example
from stage1_score.tokenization import DroppedRow, RowTokenizer

EOS = 257


def call(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": {}}}


def tokenize(tokenizer: Any, answer: dict[str, Any], **data: Any) -> str:
    """What is trained on of an answer, or why it is dropped."""
    rows = RowTokenizer(tokenizer, DataConfig(**data), "chat", frozenset([EOS]), 300)
    conversation = Conversation([{"role": "user", "content": "q"}, {"role": "assistant", **answer}], None)
    (row,) = rows.tokenize(Example(0, "data.jsonl:1", "row", conversation))
    if isinstance(row, DroppedRow):
        assert row.breaks_template
        return row.reason
    return "".join("$" if token == EOS else chr(token) for token in row.input_ids[row.target_positions])


WITHOUT = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
FIRST = WITHOUT.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls[0].function.name if m.tool_calls }}")
EVERY = WITHOUT.replace(
    "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}({{ c.function.name }}){% endfor %}"
)


@pytest.mark.parametrize("targets", ["completion", "last_turn", "all"])
def test_a_call_that_is_left_out_drops_the_row(tokenizer_with, targets: str):
    answer = {"content": "so", "tool_calls": [call("f"), call("g")]}
    left_out = "chat template: it leaves out a tool call of message 1"
    assert tokenize(tokenizer_with(WITHOUT), answer, targets=targets) == left_out
    assert tokenize(tokenizer_with(FIRST), answer, targets=targets) == left_out
    assert tokenize(tokenizer_with(EVERY), answer, targets=targets).endswith("so(f)(g)$")


def test_one_call_where_the_template_takes_one(tokenizer_with):
    assert tokenize(tokenizer_with(FIRST), {"content": "so", "tool_calls": [call("f")]}) == "sof$"


def test_calls_that_are_written_alike_are_each_looked_for(tokenizer_with):
    answer = {"content": "", "tool_calls": [call("f"), call("f")]}
    assert tokenize(tokenizer_with(EVERY), answer) == "(f)(f)$"
    assert "leaves out" in tokenize(tokenizer_with(FIRST), answer)


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}], ids=repr)
@pytest.mark.parametrize(
    "wanted", ["m.content is not defined", "m.content is none", "m.content is string"], ids=["none", "null", "text"]
)
def test_content_beside_calls_is_given_as_the_template_wants_it(tokenizer_with, content: dict[str, Any], wanted: str):
    calls = "{% if m.tool_calls and " + wanted + " %}({{ m.tool_calls[0].function.name }}){% endif %}"
    tokenizer = tokenizer_with(WITHOUT.replace("{{ m.content }}", "{{ m.content or '' }}" + calls))
    found = tokenize(tokenizer, {**content, "tool_calls": [call("f")]})
    if wanted == "m.content is not defined" and content:
        # What the row says itself is not taken away.
        assert found == "chat template: it leaves out a tool call of message 1"
    else:
        assert found == "(f)$"


def test_words_beside_calls_stay(tokenizer_with):
    only_null = WITHOUT.replace("{{ m.content }}", "{{ m.content }}{% if m.content is none %}call{% endif %}")
    assert "leaves out" in tokenize(tokenizer_with(only_null), {"content": "so", "tool_calls": [call("f")]})


def test_a_list_without_a_call_is_none(tokenizer_with):
    strict = WITHOUT.replace("{{ m.content }}", "{% if 'tool_calls' in m %}call{% else %}{{ m.content }}{% endif %}")
    assert tokenize(tokenizer_with(strict), {"content": "so", "tool_calls": []}) == "so$"


def test_the_trouble_of_the_data_as_it_is_comes_first(tokenizer_with):
    raising = WITHOUT.replace("{{ m.content }}", "{{ raise_exception('no ' ~ (m.content or 'words')) }}")
    assert tokenize(tokenizer_with(raising), {"tool_calls": [call("f")]}) == "chat template: no q"
    # That a call is left out says more than that the content is not there.
    joining = WITHOUT.replace("m.content", "m.role + m.content")
    assert "leaves out" in tokenize(tokenizer_with(joining), {"tool_calls": [call("f")]})
