"""Conversations under the chat templates of seven families, token by token.

`templates/FAMILY.jinja` is written for these tests after the family's published template: its markers, spaces,
newlines and quirks, with shorter instructions. `templates/FAMILY.txt` holds what must come of each conversation below:
a token follows each ·, a newline is ↵ (and a line of the file ends there), and each token that is trained on stands in
⟦ ⟧.
"""

import copy
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from shared.config import DataConfig
from stage1_score.examples import Conversation, Example
from stage1_score.tokenization import DroppedRow, RowTokenizer, TokenizedExample

TEMPLATES = Path(__file__).parent / "templates"
MARKERS = {
    "llama3": "<|begin_of_text|> <|eot_id|> <|start_header_id|> <|end_header_id|> <|eom_id|> <|python_tag|>",
    "qwen2.5": "<|endoftext|> <|im_end|> <|im_start|> <tool_call> </tool_call>",
    "qwen3": "<|endoftext|> <|im_end|> <|im_start|> <tool_call> </tool_call> <tool_response> </tool_response> <think> "
    "</think>",
    "mistral": "<s> </s> [INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] "
    "[/TOOL_RESULTS]",
    "gemma3": "<bos> <end_of_turn> <start_of_turn>",
    "deepseek_r1": "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜> <think> </think> "
    "<｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜> <｜tool▁sep｜> "
    "<｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜> <｜tool▁output▁begin｜> <｜tool▁output▁end｜>",
    "chatml": "<|endoftext|> <|im_end|> <|im_start|>",
}
"""What the family's tokenizer takes for one token: what begins a text, what ends a turn, the others."""

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
SYSTEM = {"role": "system", "content": "Be brief."}
CALLED = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "4"},
    {"role": "assistant", "content": "It is 4."},
]
TWO_CALLS = [
    CALLED[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL, {**CALL, "id": "call00002"}]},
    CALLED[2],
    {**CALLED[2], "tool_call_id": "call00002"},
    CALLED[3],
]


def asked(question: str, answer: str, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]


MORE = [*asked("And 3+3?", "6."), *asked("Thanks!", "Bye.")]
THREE_TURNS = [SYSTEM, *CALLED, *MORE]
WITHOUT_CALL = [SYSTEM, *asked("What is 2+2?", "It is 4."), *MORE]
REASONED = [
    SYSTEM,
    *asked("What is 2+2?", "It is 4.", reasoning_content="Two and two."),
    *asked("And 3+3?", "6.", reasoning_content="Three and three."),
    *asked("Thanks!", "Bye.", reasoning_content="They leave."),
]
INLINE = [*asked("What is 2+2?", "<think>\nTwo and two.\n</think>\n\nIt is 4."), *asked("Thanks!", "Bye.")]


@cache
def make_tokenizer(family: str) -> Any:
    """Markers, words, two newlines and indents are a token each; all else is bytes, so that nothing is unknown."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    template = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    texts = [template.replace("\\n", " "), json.dumps([CASES, FOR_SOME]), "Jul Feb type object"]
    words = sorted({word for text in texts for word in re.findall(r"[A-Za-z]{2,}", text)})
    spaces = ["ĊĊ", *("Ġ" * (4 * n) for n in (1, 2, 3))]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *spaces, *words, *(f"Ġ{word}" for word in words)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    parts = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|\n+| +|."), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([parts, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    bos, eos, *_ = markers = MARKERS[family].split()
    backend.add_special_tokens(markers)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, chat_template=template)


def tokenize(
    family: str, messages: list[dict[str, Any]], tools: list[Any] | None = None, template: str = "chat", **data: Any
) -> list[TokenizedExample | DroppedRow]:
    tokenizer = make_tokenizer(family)
    stops = {tokenizer.eos_token, "<|eom_id|>"} & set(MARKERS[family].split())
    stop_ids = frozenset(map(tokenizer.convert_tokens_to_ids, stops))
    rows = RowTokenizer(tokenizer, DataConfig(max_length=4096, **data), template, stop_ids, len(tokenizer))
    given = copy.deepcopy(messages)
    result = rows.tokenize(Example(0, "data.jsonl:1", "row", Conversation(messages, tools)))
    assert messages == given, "the data is left as it is"
    return result


def written(family: str, rows: list[TokenizedExample | DroppedRow]) -> str:
    """Rows in the notation of `templates/FAMILY.txt`."""
    tokenizer, lines = make_tokenizer(family), []
    for row in rows:
        if isinstance(row, DroppedRow):
            lines.append(f"{row.row_id} dropped: {row.reason}\n")
            continue
        targets = set(row.target_positions.tolist())
        text = f"{row.row_id}\n"
        for place, token in enumerate(row.input_ids.tolist()):
            piece = tokenizer.decode([token]).replace("\n", "↵")
            text += f"⟦{piece}⟧" if place in targets else f"·{piece}"
            text += "\n" if piece.endswith("↵") else ""
        lines.append(text.rstrip("\n") + "\n")
    return "".join(lines)


CASES: dict[str, dict[str, Any]] = {
    "three turns": {"messages": THREE_TURNS, "tools": TOOLS},
    "three turns, last_turn": {"messages": THREE_TURNS, "tools": TOOLS, "targets": "last_turn"},
    "three turns, all": {"messages": THREE_TURNS, "tools": TOOLS, "targets": "all"},
    "without a call": {"messages": WITHOUT_CALL},
    "without a system message": {"messages": [*CALLED, *MORE[:2]], "tools": TOOLS},
    "ends in a call": {"messages": CALLED[:2], "tools": TOOLS},
    "two calls": {"messages": TWO_CALLS, "tools": TOOLS},
    "reasoning_content": {"messages": REASONED},
    "inline thinking": {"messages": INLINE},
    "an answer that begins with a line break": {"messages": asked("What is 2+2?", "\nIt is 4.")},
}
CHAT_PROMPT = {
    "chat_prompt": {"messages": [SYSTEM, *INLINE[:2]]},
    "chat_prompt of two turns": {"messages": [*INLINE[:2], *REASONED[3:4], *INLINE[1:2]]},
    "chat_prompt without thinking": {"messages": [*THREE_TURNS[:5], *MORE[:2]]},
    "chat_prompt that thinks at once": {"messages": asked("What is 2+2?", "<think>Two and two.</think>It is 4.")},
    "chat_prompt of a call": {"messages": CALLED[:2]},
    "chat_prompt of reasoning_content": {"messages": REASONED},
}
FOR_SOME: dict[str, dict[str, dict[str, Any]]] = {
    "deepseek_r1": {name: {**case, "template": "chat_prompt"} for name, case in CHAT_PROMPT.items()},
    "mistral": {"chat_prompt": {"messages": WITHOUT_CALL, "template": "chat_prompt"}},
    "qwen3": {
        "enable_thinking=false": {"messages": WITHOUT_CALL, "template_arguments": {"enable_thinking": False}},
    },
    "llama3": {
        "builtin_tools": {
            "messages": json.loads(json.dumps(CALLED[:2]).replace('{"a": 2, "b": 2}', '{"query": "2+2"}')),
            "template_arguments": {"builtin_tools": ["add"]},
        },
        "another day": {"messages": CALLED[:2], "template_date": "2025-02-03"},
    },
}


@pytest.mark.parametrize("family", MARKERS)
def test_rows_token_by_token(family: str):
    cases = CASES | FOR_SOME.get(family, {})
    found = {name: written(family, tokenize(family, **case)) for name, case in cases.items()}
    text = (TEMPLATES / f"{family}.txt").read_text(encoding="utf-8")
    _, *parts = re.split(r"^== (.*)\n", text, flags=re.MULTILINE)
    expected = {name: rows.rstrip("\n") + "\n" for name, rows in zip(parts[::2], parts[1::2], strict=True)}
    assert found == expected


PUBLISHED = {
    "llama3": "llama3_2", "qwen2.5": "qwen2_5", "qwen3": "qwen3", "gemma3": "gemma3",
    "deepseek_r1": "deepseek_r1_distill",
}  # fmt: skip
"""The published template of a family among those that trl ships for its tests."""


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_published_template_gives_the_same_rows(family: str, monkeypatch: pytest.MonkeyPatch):
    trl = pytest.importorskip("trl")
    published = Path(trl.__file__).parent / "chat_templates" / f"{PUBLISHED[family]}.jinja"
    cases = CASES | {name: case for name, case in FOR_SOME.get(family, {}).items() if name != "builtin_tools"}
    ours = {name: written(family, tokenize(family, **case)) for name, case in cases.items()}
    text = published.read_text(encoding="utf-8")
    for long, short in SHORTENED:
        text = re.sub(long, lambda _, short=short: short, text, flags=re.DOTALL)
    monkeypatch.setattr(make_tokenizer(family), "chat_template", text)
    assert {name: written(family, tokenize(family, **case)) for name, case in cases.items()} == ours


SHORTENED = [
    (r'"Given the following functions.*?Do not use variables\.\\n\\n"', '"Functions:\\n\\n"'),
    (r"# Tools\\n\\nYou may call.*?XML tags:\\n<tools>", r"# Tools\n<tools>"),
    (r"</tools>\\n\\nFor each function call.*?</tool_call><\|im_end\|>", "</tools><|im_end|>"),
    ("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", "You are Qwen."),
]
"""The instructions of published templates, and what stands for them here."""


def variants(messages: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The same conversation as other data sets write it."""

    def changed(**more: Any) -> list[dict[str, Any]]:
        return [{**message, **more} if message.get("tool_calls") else message for message in messages]

    as_text = {**CALL, "function": {**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"])}}
    without = [{k: v for k, v in m.items() if k != "content" or not m.get("tool_calls")} for m in messages]
    empty = [{"tool_calls": [], **m} if m["role"] == "assistant" else m for m in messages]
    return {
        "content is null": changed(content=None), "arguments as text": changed(tool_calls=[as_text]),
        "no content": without, "empty lists of calls": empty,
    }  # fmt: skip


@pytest.mark.parametrize("family", MARKERS)
def test_it_does_not_matter_how_a_call_is_written(family: str):
    as_given = written(family, tokenize(family, THREE_TURNS, TOOLS))
    for name, messages in variants(THREE_TURNS).items():
        assert written(family, tokenize(family, messages, TOOLS)) == as_given, name
