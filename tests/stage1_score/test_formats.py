"""The formats that data comes in: which one `auto` sees, what a row of each means, and what is refused."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from shared.config import ColumnsConfig, DataConfig
from shared.errors import UserError
from stage1_score.examples import Conversation, Instruction, PromptCompletion, Text, content_hash
from stage1_score.formats import parse_row, settle_format

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
HUMAN, GPT = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}


def read_row(row: dict[str, Any], **data: Any) -> Any:
    """What a row holds, in the format that it alone settles."""
    config = DataConfig(**data)
    return parse_row(row, settle_format(row, config, "data.jsonl", None), 0, "data.jsonl:1").content


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": [USER, ASSISTANT]}, "messages"),
        ({"conversations": [USER, ASSISTANT]}, "messages"),
        ({"conversation": [HUMAN, GPT]}, "sharegpt"),
        ({"conversations": [HUMAN, GPT], "system": "be"}, "sharegpt"),
        ({"messages": [HUMAN, GPT]}, "sharegpt"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt_messages"),
        ({"instruction": "a", "output": "b"}, "alpaca"),
        ({"instruction": "a", "input": "", "output": "b", "text": "Below is ..."}, "alpaca"),
        ({"text": "a"}, "text"),
        ({"text": "a", "messages": [USER, ASSISTANT]}, "messages"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_auto_sees_the_format(row: dict[str, Any], name: str):
    row_format = settle_format(row, DataConfig(), "data.jsonl", None)
    assert row_format.name == name
    # A row that was given its format by name is read alike.
    assert read_row(row, format=name) == read_row(row)


def test_the_columns_that_are_read_are_recorded_by_their_own_names():
    row = {"conversation": [HUMAN, GPT], "setting": "be"}
    columns = ColumnsConfig(system="setting")
    row_format = settle_format(row, DataConfig(columns=columns), "data.jsonl", None)
    assert row_format.columns_read() == {
        "id": None, "messages": "conversation", "system": "setting", "tools": "tools",
    }  # fmt: skip


def test_sharegpt_says_what_messages_say():
    row = {
        "system": "be",
        "conversations": [
            HUMAN,
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "one"},
        ],
        "tools": '[{"name": "add"}]',
    }
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    assert read_row(row) == Conversation(
        [
            {"role": "system", "content": "be"},
            USER,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "one"},
        ],
        [{"name": "add"}],
    )


@pytest.mark.parametrize("speaker", ["human", "user"])
@pytest.mark.parametrize("answerer", ["gpt", "assistant", "chatgpt", "model", "bot"])
def test_names_of_sharegpt_speakers(speaker: str, answerer: str):
    row = {"conversations": [{"from": speaker, "value": "hi"}, {"from": answerer, "value": "hello"}]}
    assert read_row(row) == Conversation([USER, ASSISTANT], None)


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"from": "nobody", "value": "a"}, "expected turns with `from` one of human, .*nobody"),
        ({"from": "human"}, "expected str as 'value', got None"),
        ({"from": "function_call", "value": "add(1)"}, "expected JSON as the value of a function_call"),
        ({"from": "function_call", "value": '{"arguments": {}}'}, "expected a function_call with name and arguments"),
        ("hi", "expected turns"),
    ],
)
def test_malformed_sharegpt(turn: Any, message: str):
    with pytest.raises(UserError, match=rf"^data\.jsonl:1: {message}"):
        read_row({"conversations": [turn]}, format="sharegpt")


def test_alpaca():
    row = {"instruction": "Add.", "input": "1 1", "output": "2", "system": "be", "history": [["hi", "hello"]]}
    content = read_row(row)
    assert content == Instruction("Add.", "1 1", "2", "be", (("hi", "hello"),))
    assert content.conversation() == Conversation(
        [
            {"role": "system", "content": "be"},
            USER,
            ASSISTANT,
            {"role": "user", "content": "Add.\n1 1"},
            {"role": "assistant", "content": "2"},
        ],
        None,
    )


def test_alpaca_without_a_chat_template_is_stanfords_prompt():
    assert Instruction("Add.", "1 1", "2").prompt_completion() == PromptCompletion(
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 1\n\n"
        "### Response:",
        "2",
    )
    assert Instruction("Add.", "", "2").prompt_completion() == PromptCompletion(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Response:",
        "2",
    )


@pytest.mark.parametrize("history", ["hi", [["hi"]], [["hi", 1]], [3]], ids=repr)
def test_malformed_history(history: Any):
    with pytest.raises(UserError, match=r"^data\.jsonl:1: expected pairs of texts as 'history'"):
        read_row({"instruction": "a", "output": "b", "history": history})


def test_text():
    assert read_row({"text": "once upon"}) == Text("once upon")
    with pytest.raises(UserError, match="expected str as 'text', got None"):
        read_row({"text": None}, format="text")


def test_what_stands_in_the_prompt_is_context_whoever_said_it():
    content = read_row({"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]})
    assert content == Conversation([USER, ASSISTANT, USER, ASSISTANT], None, (0.0, 0.0, 0.0, 1.0))


def turns(**flags: Any) -> list[dict[str, Any]]:
    return [USER, {**ASSISTANT, **flags}, USER, ASSISTANT]


@pytest.mark.parametrize(
    ("flags", "weights"),
    [
        ({"train": False}, (0.0, 0.0, 0.0, 1.0)),
        ({"weight": 0}, (0.0, 0.0, 0.0, 1.0)),
        ({"weight": 0.5}, (0.0, 0.5, 0.0, 1.0)),
        ({"weight": 2, "train": True}, (0.0, 2.0, 0.0, 1.0)),
        # What says no more than the default leaves the row as it is without.
        ({"train": True}, None),
        ({"weight": 1, "train": None}, None),
    ],
    ids=repr,
)
def test_train_flags_and_weights(flags: dict[str, Any], weights: tuple[float, ...] | None):
    expected = Conversation(turns(), None, weights)
    assert read_row({"messages": turns(**flags)}) == expected
    speakers = {"user": "human", "assistant": "gpt"}
    spoken = [{"from": speakers[m.pop("role")], "value": m.pop("content"), **m} for m in map(dict, turns(**flags))]
    assert read_row({"conversations": spoken}) == expected
    assert content_hash(expected) == content_hash(read_row({"messages": turns(**flags)}))
    if weights is None:
        assert content_hash(expected) == content_hash(Conversation(turns(), None))
    else:
        assert content_hash(expected) != content_hash(Conversation(turns(), None))


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({**ASSISTANT, "train": "yes"}, "message 1: expected true or false as 'train', got 'yes'"),
        ({**ASSISTANT, "weight": -1}, "message 1: expected 0 or a number from 1e-06 to 1e+06 as 'weight', got -1"),
        ({**ASSISTANT, "weight": True}, "message 1: expected 0 or a number from 1e-06 to 1e+06 as 'weight', got True"),
        (
            {**ASSISTANT, "weight": float("nan")},
            "message 1: expected 0 or a number from 1e-06 to 1e+06 as 'weight', got nan",
        ),
        ({**ASSISTANT, "weight": 1e-9}, "message 1: expected 0 or a number from 1e-06 to 1e+06 as 'weight', got 1e-09"),
        ({**ASSISTANT, "weight": 2, "train": False}, "message 1: train is false, but its weight is 2"),
        ({**USER, "train": True}, "message 1 is marked to be trained on, but its role is 'user'"),
        ({**USER, "weight": 0.5}, "message 1 is marked to be trained on, but its role is 'user'"),
    ],
    ids=repr,
)
def test_flags_that_make_no_sense(message: dict[str, Any], reason: str):
    with pytest.raises(UserError) as refused:
        read_row({"messages": [USER, message]})
    assert str(refused.value).startswith(f"data.jsonl:1: {reason}")


@pytest.mark.parametrize("role", ["Assistant", "bot", "model", "gpt"])
def test_an_assistant_of_another_name_is_not_taken_for_context(role: str):
    with pytest.raises(UserError, match=f"^data.jsonl:1: message 1: expected 'assistant' .*, got '{role}'"):
        read_row({"messages": [USER, {"role": role, "content": "hello"}]})
    # Roles that only a template knows are its matter.
    assert read_row({"messages": [{"role": "developer", "content": "be"}, USER, ASSISTANT]}).messages[0]["role"]


def test_tools_as_json_text():
    row = {"messages": [USER, ASSISTANT], "tools": '[{"name": "add"}]'}
    assert read_row(row) == Conversation([USER, ASSISTANT], [{"name": "add"}])
    assert read_row({**row, "tools": ""}) == read_row({**row, "tools": "[]"}) == Conversation([USER, ASSISTANT], None)


def test_every_format_stands_in_the_table_of_the_docs(repository: Path):
    text = (repository / "docs" / "data.md").read_text()
    names = set(get_args(DataConfig.model_fields["format"].annotation)) - {"auto"}
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    assert {line.split("`")[1] for line in lines} >= names
    for line in lines:
        name = line.split("`")[1]
        if name in names:
            row = json.loads(line.split("`")[3])
            assert settle_format(row, DataConfig(), "docs/data.md", None).name == name
