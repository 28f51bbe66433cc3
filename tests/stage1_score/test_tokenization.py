"""Ids and targets, written out. The tokenizer's id of a byte is the byte, so b"hi" stands for its ids."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from shared.config import DataConfig
from shared.errors import UserError
from stage1_score.examples import Conversation, Example, Instruction, PromptCompletion, Text, TokenIds
from stage1_score.tokenization import DroppedRow, RowTokenizer, TokenizedExample, choose_template, marked_text

BOS, EOS, IM_START, IM_END, TH, THE = 256, 257, 258, 259, 260, 261
NEWLINE = 10
VOCAB_SIZE = 300

MULTI_TURN = [
    {"role": "system", "content": "be"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "so"},
]
MULTI_TURN_IDS = [
    IM_START, *b"system\nbe", IM_END, NEWLINE,
    IM_START, *b"user\nhi", IM_END, NEWLINE,
    IM_START, *b"assistant\nyo", IM_END, NEWLINE,
    IM_START, *b"user\nwhy", IM_END, NEWLINE,
    IM_START, *b"assistant\nso", IM_END, NEWLINE,
]  # fmt: skip
FIRST_TURN, SECOND_TURN = [33, 34, 35], [59, 60, 61]
"""Positions of b"yo" and b"so", each with the <|im_end|> that ends its turn."""


def tokenize(
    tokenizer: Any, content: Any, template: str, stop_ids: tuple[int, ...] = (EOS, IM_END), **data: Any
) -> TokenizedExample | DroppedRow:
    row_tokenizer = RowTokenizer(tokenizer, DataConfig(**data), template, frozenset(stop_ids), VOCAB_SIZE)
    (result,) = row_tokenizer.tokenize(Example(3, "data.jsonl:4", "row", content))
    return result


def kept(result: TokenizedExample | DroppedRow) -> tuple[list[int], list[int]]:
    assert isinstance(result, TokenizedExample), result
    assert (result.row_id, result.source_index) == ("row", 3)
    assert (result.input_ids.dtype, result.target_positions.dtype) == (np.int32, np.int32)
    return result.input_ids.tolist(), result.target_positions.tolist()


def dropped(result: TokenizedExample | DroppedRow) -> DroppedRow:
    assert isinstance(result, DroppedRow), result
    return result


def test_plain(plain_tokenizer):
    ids, targets = kept(tokenize(plain_tokenizer, PromptCompletion("a t", "he b"), "plain"))
    # Encoded apart: "t" + "he" does not become the token "the".
    assert ids == [BOS, *b"a t", *b"he b", EOS]
    assert targets == [4, 5, 6, 7, 8]


def test_plain_merges_within_a_part(plain_tokenizer):
    ids, targets = kept(tokenize(plain_tokenizer, PromptCompletion("the", "th"), "plain"))
    assert ids == [BOS, THE, TH, EOS]
    assert targets == [2, 3]


def test_plain_without_bos(tokenizer_with):
    tokenizer = tokenizer_with(None)
    tokenizer.bos_token = None
    assert kept(tokenize(tokenizer, PromptCompletion("a", "b"), "plain")) == ([*b"ab", EOS], [1, 2])
    # The first token has nothing before it: it is never a target.
    assert kept(tokenize(tokenizer, PromptCompletion("", "bc"), "plain")) == ([*b"bc", EOS], [1, 2])


def test_plain_all_targets(plain_tokenizer):
    ids, targets = kept(tokenize(plain_tokenizer, PromptCompletion("a", "b"), "plain", targets="all"))
    assert ids == [BOS, *b"ab", EOS]
    assert targets == [1, 2, 3]


def test_chat_prompt(chat_tokenizer):
    ids, targets = kept(tokenize(chat_tokenizer, PromptCompletion("a", "bc"), "chat_prompt"))
    # The paper's form: the tokenizer's EOS ends the row, not the template's <|im_end|>.
    assert ids == [IM_START, *b"user\na", IM_END, NEWLINE, IM_START, *b"assistant\n", *b"bc", EOS]
    assert targets == [20, 21, 22]
    assert [ids[position] for position in targets] == [*b"bc", EOS]


def test_chat_prompt_of_messages(chat_tokenizer):
    ids, targets = kept(tokenize(chat_tokenizer, Conversation(MULTI_TURN, None), "chat_prompt"))
    assert ids == [*MULTI_TURN_IDS[:59], *b"so", EOS]
    assert targets == SECOND_TURN


def test_chat_prompt_needs_an_assistant_at_the_end(chat_tokenizer):
    row = dropped(tokenize(chat_tokenizer, Conversation(MULTI_TURN[:4], None), "chat_prompt"))
    assert "ends with an assistant's text" in row.reason


def test_chat_of_a_prompt(chat_tokenizer):
    ids, targets = kept(tokenize(chat_tokenizer, PromptCompletion("a", "bc"), "chat"))
    assert ids == [IM_START, *b"user\na", IM_END, NEWLINE, IM_START, *b"assistant\n", *b"bc", IM_END, NEWLINE]
    assert [ids[position] for position in targets] == [*b"bc", IM_END]


@pytest.mark.parametrize(
    ("targets", "positions"),
    [("completion", FIRST_TURN + SECOND_TURN), ("last_turn", SECOND_TURN), ("all", list(range(1, 63)))],
)
def test_chat_of_several_turns(chat_tokenizer, targets: str, positions: list[int]):
    assert kept(tokenize(chat_tokenizer, Conversation(MULTI_TURN, None), "chat", targets=targets)) == (
        MULTI_TURN_IDS,
        positions,
    )


def test_weights_of_turns(chat_tokenizer):
    def weighed(*weights: float, **data: Any) -> TokenizedExample:
        result = tokenize(chat_tokenizer, Conversation(MULTI_TURN, None, weights), "chat", **data)
        assert isinstance(result, TokenizedExample), result
        return result

    both = weighed(0.0, 0.0, 0.5, 0.0, 2.0)
    assert kept(both) == (MULTI_TURN_IDS, FIRST_TURN + SECOND_TURN)
    assert both.target_weights is not None
    assert (both.target_weights.dtype, both.target_weights.tolist()) == (np.float32, [0.5] * 3 + [2.0] * 3)
    # A weight of zero makes the turn context; weights of one are no weights.
    for one, positions in (((0, 0, 0, 0, 1), SECOND_TURN), ((0, 0, 1, 0, 0), FIRST_TURN)):
        assert kept(weighed(*one)) == (MULTI_TURN_IDS, positions)
        assert weighed(*one).target_weights is None
    assert weighed(0, 0, 3, 0, 1, targets="last_turn").target_weights.tolist() == [1.0] * 3
    row = tokenize(chat_tokenizer, Conversation(MULTI_TURN, None, (0, 0, 1, 0, 0)), "chat", targets="last_turn")
    assert dropped(row).reason == "no target token"


def test_the_weight_of_the_last_turn_is_that_of_its_completion(chat_tokenizer):
    result = tokenize(chat_tokenizer, Conversation(MULTI_TURN, None, (0, 0, 1, 0, 0.25)), "chat_prompt")
    assert kept(result) == ([*MULTI_TURN_IDS[:59], *b"so", EOS], SECOND_TURN)
    assert result.target_weights.tolist() == [0.25] * 3


def test_weights_go_with_the_targets_that_are_left(chat_tokenizer):
    content = Conversation(MULTI_TURN, None, (0, 0, 0.5, 0, 2))
    result = tokenize(chat_tokenizer, content, "chat", max_length=61, overlong="truncate")
    assert result.target_weights.tolist() == [0.5] * 3 + [2.0] * 2


def test_flags_are_refused_where_every_token_is_trained_on(chat_tokenizer):
    with pytest.raises(UserError, match=r"^data\.jsonl:4: data\.targets=all trains on every token alike"):
        tokenize(chat_tokenizer, Conversation(MULTI_TURN, None, (0, 0, 0.5, 0, 2)), "chat", targets="all")


def test_an_alpaca_row_is_a_conversation_or_a_plain_prompt(chat_tokenizer, plain_tokenizer):
    row = Instruction("hi", "", "yo", "be", (("a", "b"),))
    ids, targets = kept(tokenize(chat_tokenizer, row, "chat"))
    assert ids == [
        IM_START, *b"system\nbe", IM_END, NEWLINE,
        IM_START, *b"user\na", IM_END, NEWLINE,
        IM_START, *b"assistant\nb", IM_END, NEWLINE,
        IM_START, *b"user\nhi", IM_END, NEWLINE,
        IM_START, *b"assistant\nyo", IM_END, NEWLINE,
    ]  # fmt: skip
    assert [ids[position] for position in targets] == [*b"b", IM_END, *b"yo", IM_END]
    assert "data.columns.history" in dropped(tokenize(plain_tokenizer, row, "plain")).reason
    ids, targets = kept(tokenize(plain_tokenizer, Instruction("hi", "", "yo"), "plain"))
    assert plain_tokenizer.decode(ids).endswith("### Instruction:\nhi\n\n### Response:yo</s>")
    assert [ids[position] for position in targets] == [*b"yo", EOS]


def test_text_is_all_targets(plain_tokenizer):
    assert kept(tokenize(plain_tokenizer, Text("the"), "plain")) == ([BOS, THE, EOS], [1, 2])


@pytest.mark.parametrize(
    ("format_name", "has_chat", "template"),
    [
        ("messages", True, "chat"),
        ("sharegpt", True, "chat"),
        ("prompt_messages", True, "chat"),
        ("alpaca", True, "chat"),
        ("alpaca", False, "plain"),
        ("prompt_completion", True, "chat_prompt"),
        ("prompt_completion", False, "plain"),
        ("text", True, "plain"),
        ("text", False, "plain"),
    ],
)
def test_the_template_that_is_chosen(tokenizer_with, format_name: str, has_chat: bool, template: str):
    tokenizer = tokenizer_with("{{ messages }}" if has_chat else None)
    assert choose_template(DataConfig(), format_name, tokenizer) == template


def test_text_has_no_turns(chat_tokenizer):
    with pytest.raises(UserError, match=r"plain text, which has no turns: data\.template=chat"):
        choose_template(DataConfig(template="chat"), "text", chat_tokenizer)


def test_the_stop_token_of_a_turn_is_a_target_and_the_newline_after_it_is_not(chat_tokenizer):
    ids, targets = kept(tokenize(chat_tokenizer, Conversation(MULTI_TURN, None), "chat"))
    for position in (35, 61):
        assert ids[position] == IM_END
        assert ids[position + 1] == NEWLINE
        assert position in targets
        assert position + 1 not in targets


def test_tools_reach_the_template(chat_tokenizer):
    tools = [{"name": "add"}, {"name": "sub"}]
    ids, targets = kept(tokenize(chat_tokenizer, Conversation(MULTI_TURN[1:3], tools), "chat"))
    assert ids == [
        IM_START, *b"tools\nadd;sub;", IM_END, NEWLINE,
        IM_START, *b"user\nhi", IM_END, NEWLINE,
        IM_START, *b"assistant\nyo", IM_END, NEWLINE,
    ]  # fmt: skip
    assert [ids[position] for position in targets] == [*b"yo", IM_END]


def test_template_arguments_reach_the_template(tokenizer_with):
    tokenizer = tokenizer_with("{% if thinking %}T{% endif %}{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    content = Conversation(MULTI_TURN[1:3], None)
    assert kept(tokenize(tokenizer, content, "chat", template_arguments={"thinking": True}))[0][0] == ord("T")
    assert kept(tokenize(tokenizer, content, "chat"))[0] == [*b"hi", EOS, *b"yo", EOS]


def test_the_date_of_a_template_is_fixed(tokenizer_with):
    """A template that prints today's date gives the same ids on every day, and the config's date is what it prints."""
    dated = tokenizer_with("{{ strftime_now('%d %b %Y') }}:{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    content = Conversation(MULTI_TURN[1:3], None)
    assert kept(tokenize(dated, content, "chat"))[0] == [*b"26 Jul 2024:hi", EOS, *b"yo", EOS]
    other = kept(tokenize(dated, content, "chat", template_date="2031-01-02"))
    assert other == ([*b"02 Jan 2031:hi", EOS, *b"yo", EOS], [15, 16, 17])


def test_a_template_that_changes_earlier_turns_is_not_guessed_at(tokenizer_with):
    # As reasoning models do: an assistant turn that is not the last one loses a part.
    forgetful = tokenizer_with(
        "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}<{% endif %}{{ m.content }}</s>{% endfor %}"
    )
    row = dropped(tokenize(forgetful, Conversation(MULTI_TURN, None), "chat", split_turns=False))
    assert row.breaks_template
    assert row.reason == "chat template: the conversation up to message 2 is not rendered as a prefix of the whole"
    # The last turn alone is rendered as it is trained.
    ids, targets = kept(tokenize(forgetful, Conversation(MULTI_TURN, None), "chat", targets="last_turn"))
    assert [ids[position] for position in targets] == [*b"<so", EOS]


def test_a_generation_prompt_that_the_turn_does_not_begin_with(tokenizer_with):
    thinking = tokenizer_with(
        "{% for m in messages %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    )
    row = dropped(tokenize(thinking, Conversation(MULTI_TURN[1:3], None), "chat"))
    assert row.breaks_template
    assert "the prompt for turn 1 has '<think>' where the turn as the template renders it has 'yo</s>'" in row.reason


def test_a_turn_without_stop_token(tokenizer_with):
    endless = tokenizer_with("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    row = dropped(tokenize(endless, Conversation(MULTI_TURN[1:3], None), "chat"))
    assert row.breaks_template
    assert row.reason == "chat template: the assistant turn 1 does not end on a stop token"
    # The stop token of the user's turn before is not taken for it.
    users_only = tokenizer_with(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}</s>{% endif %}{% endfor %}"
    )
    assert "stop token" in dropped(tokenize(users_only, Conversation(MULTI_TURN[1:3], None), "chat")).reason


def test_a_turn_that_goes_on_after_its_stop_token_is_not_cut_there(tokenizer_with):
    # The text itself holds a stop token; what the template adds after it is no stop token.
    loose = tokenizer_with("{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}</s>{% endif %}{% endfor %}")
    messages = [MULTI_TURN[1], {"role": "assistant", "content": "one</s>two"}]
    row = dropped(tokenize(loose, Conversation(messages, None), "chat"))
    assert "does not end on a stop token" in row.reason


def test_a_template_that_raises_drops_the_row(tokenizer_with):
    strict = tokenizer_with(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{{ m.content }}</s>{% endfor %}"
    )
    row = dropped(tokenize(strict, Conversation(MULTI_TURN, None), "chat"))
    assert row.breaks_template
    assert row.reason == "chat template: no system turn"


def test_a_conversation_without_assistant_has_no_target(chat_tokenizer):
    row = dropped(tokenize(chat_tokenizer, Conversation(MULTI_TURN[:2], None), "chat"))
    assert (row.reason, row.breaks_template) == ("no target token", False)


def test_tokens_are_taken_as_given(chat_tokenizer):
    content = TokenIds([5, 6, 7, 8], [True, False, True, False])
    # A mask that marks token 0 is not followed there.
    assert kept(tokenize(chat_tokenizer, content, "tokens")) == ([5, 6, 7, 8], [2])
    assert kept(tokenize(chat_tokenizer, content, "tokens", targets="all")) == ([5, 6, 7, 8], [1, 2, 3])


@pytest.mark.parametrize("content", [TokenIds([5, 6], [True, False]), TokenIds([5], [True]), TokenIds([], [])])
def test_tokens_without_target_are_dropped(chat_tokenizer, content: TokenIds):
    row = dropped(tokenize(chat_tokenizer, content, "tokens"))
    assert row == DroppedRow("row", 3, "no target token", False)


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE, 2**40])
def test_ids_beyond_the_vocabulary_are_refused(chat_tokenizer, token: int):
    with pytest.raises(UserError, match=rf"data\.jsonl:4: token id {token} is outside the prior's vocabulary of 300"):
        tokenize(chat_tokenizer, TokenIds([1, token, 2], [False, True, True]), "tokens")
    kept(tokenize(chat_tokenizer, TokenIds([0, VOCAB_SIZE - 1], [False, True]), "tokens"))


LONG = TokenIds(list(range(10)), [False] * 4 + [True] * 6)


def test_overlong_rows_are_dropped_by_default(chat_tokenizer):
    row = dropped(tokenize(chat_tokenizer, LONG, "tokens", max_length=9))
    assert row == DroppedRow("row", 3, "10 tokens, data.max_length is 9", False)
    assert kept(tokenize(chat_tokenizer, LONG, "tokens", max_length=10))[1] == [4, 5, 6, 7, 8, 9]


def test_overlong_rows_are_cut_on_the_right(chat_tokenizer):
    result = tokenize(chat_tokenizer, LONG, "tokens", max_length=6, overlong="truncate")
    assert kept(result) == ([0, 1, 2, 3, 4, 5], [4, 5])
    row = dropped(tokenize(chat_tokenizer, LONG, "tokens", max_length=4, overlong="truncate"))
    assert row.reason == "no target token"


def test_a_cut_conversation_need_not_end_on_a_stop_token(chat_tokenizer):
    result = tokenize(chat_tokenizer, Conversation(MULTI_TURN, None), "chat", max_length=61, overlong="truncate")
    assert kept(result) == (MULTI_TURN_IDS[:61], [*FIRST_TURN, *SECOND_TURN[:2]])


def test_overlong_rows_can_be_an_error(chat_tokenizer):
    with pytest.raises(UserError, match=r"data\.jsonl:4: 10 tokens, data\.max_length is 9; data\.overlong=drop"):
        tokenize(chat_tokenizer, LONG, "tokens", max_length=9, overlong="error")


def test_choice_of_template(chat_tokenizer, plain_tokenizer):
    def choose(tokenizer: Any, format_name: str, template: str = "auto") -> str:
        return choose_template(DataConfig(template=template), format_name, tokenizer)  # pyright: ignore

    assert choose(chat_tokenizer, "messages") == "chat"
    assert choose(chat_tokenizer, "prompt_completion") == "chat_prompt"
    assert choose(plain_tokenizer, "prompt_completion") == "plain"
    assert choose(chat_tokenizer, "tokens") == "tokens"
    for template in ("chat", "chat_prompt", "plain"):
        assert choose(chat_tokenizer, "prompt_completion", template) == template
    assert choose(chat_tokenizer, "messages", "chat_prompt") == "chat_prompt"


def test_templates_that_do_not_fit_are_refused(chat_tokenizer, plain_tokenizer, tokenizer_with):
    for template in ("chat", "chat_prompt"):
        with pytest.raises(UserError, match="needs a chat template"):
            choose_template(DataConfig(template=template), "prompt_completion", plain_tokenizer)
    with pytest.raises(UserError, match="needs a chat template"):
        choose_template(DataConfig(), "messages", plain_tokenizer)
    with pytest.raises(UserError, match="the data holds messages"):
        choose_template(DataConfig(template="plain"), "messages", chat_tokenizer)
    with pytest.raises(UserError, match=r"last_turn needs data\.template=chat"):
        choose_template(DataConfig(targets="last_turn"), "prompt_completion", chat_tokenizer)
    endless = tokenizer_with()
    endless.eos_token = None
    with pytest.raises(UserError, match="no eos token"):
        choose_template(DataConfig(template="plain"), "prompt_completion", endless)


def test_marked_text_shows_exactly_the_targets(chat_tokenizer):
    result = tokenize(chat_tokenizer, Conversation(MULTI_TURN[1:3], None), "chat")
    assert isinstance(result, TokenizedExample)
    assert marked_text(result, chat_tokenizer) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦yo<|im_end|>⟧\n"
    )
    bell = dataclasses.replace(result, input_ids=np.array([7, 97], np.int32), target_positions=np.array([1], np.int32))
    assert marked_text(bell, chat_tokenizer) == "\\x07⟦a⟧"


def test_text_that_is_no_unicode_drops_the_row(chat_tokenizer):
    # JSON may hold half a surrogate pair; no tokenizer takes it.
    assert not dropped(tokenize(chat_tokenizer, PromptCompletion("a", "\ud800"), "plain")).breaks_template
