"""What a row of the source holds, once its format is known: `stage1_score/formats.py` makes these of raw rows."""

from dataclasses import dataclass
from typing import Any

from shared.files import sha256_of_json


@dataclass(frozen=True)
class Conversation:
    """Chat messages as the template takes them, with the tools they may call."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    turn_weights: tuple[float, ...] | None = None
    """What the weights of each message's targets are multiplied by, one for each message; 0: context only. None: 1 for
    every assistant turn."""

    def weight_of(self, index: int) -> float:
        """Weight of the message at `index`; 0 where it is not the assistant's."""
        if self.messages[index]["role"] != "assistant":
            return 0.0
        return 1.0 if self.turn_weights is None else self.turn_weights[index]


@dataclass(frozen=True)
class PromptCompletion:
    """A prompt, and the text that is trained on."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Instruction:
    """A row of the Alpaca format: an instruction, perhaps with an input, and the response that is trained on."""

    instruction: str
    input: str
    response: str
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()
    """Earlier turns: what was asked, and the response."""

    def conversation(self) -> Conversation:
        """As chat messages; the input stands on a line of its own below the instruction."""
        system = [("system", self.system)] if self.system else []
        earlier = [pair for asked, said in self.history for pair in (("user", asked), ("assistant", said))]
        asked = "\n".join(text for text in (self.instruction, self.input) if text)
        turns = [*system, *earlier, ("user", asked), ("assistant", self.response)]
        return Conversation([{"role": role, "content": text} for role, text in turns], None)

    def prompt_completion(self) -> PromptCompletion:
        """As Stanford Alpaca wrote it for models without a chat template; the system's text stands before.

        https://github.com/tatsu-lab/stanford_alpaca/blob/main/train.py
        """
        context = ", paired with an input that provides further context" if self.input else ""
        extra = f"### Input:\n{self.input}\n\n" if self.input else ""
        return PromptCompletion(
            f"{self.system}\n\n"
            * bool(self.system)
            + f"Below is an instruction that describes a task{context}. Write a response that appropriately completes "
            f"the request.\n\n### Instruction:\n{self.instruction}\n\n{extra}### Response:",
            self.response,
        )


@dataclass(frozen=True)
class Text:
    """Plain text, all of it trained on."""

    text: str


@dataclass(frozen=True)
class TokenIds:
    """Tokens given as such."""

    input_ids: list[int]
    target_mask: list[bool]


Content = Conversation | PromptCompletion | Instruction | Text | TokenIds


@dataclass(frozen=True)
class Example:
    """One row of the source."""

    source_index: int
    place: str
    """file:line, for messages."""
    row_id: str
    """The user's own, else a hash of the content."""
    content: Content

    @property
    def is_weighted(self) -> bool:
        """Whether some of its targets have another weight than 1 of the data's own."""
        weights = self.content.turn_weights if isinstance(self.content, Conversation) else None
        return any(weight not in (0.0, 1.0) for weight in weights or ())


def content_hash(content: Content) -> str:
    """The row id of a row that has none: the same for the same content."""
    fields = vars(content)
    if fields.get("turn_weights", ()) is None:
        fields = {name: value for name, value in fields.items() if name != "turn_weights"}
    return sha256_of_json(fields)[:32]
