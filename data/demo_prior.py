"""The demo's prior: its tokenizer, its pretraining on texts of `demo_text`, and what it is measured by."""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from demo_problems import make_demonstration
from demo_text import write_prior_text
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 768
CONTEXT = 128
MAX_POSITIONS = 256
BATCH_ROWS = 32
STEPS = 1600
WARMUP_STEPS = 100
PEAK_LEARNING_RATE = 3e-3


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose digits are single tokens, so that a number is read digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r"\d| ?[A-Za-z]+|[^\sA-Za-z\d]+|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(f"{seed} tokenizer")
    problems = (make_demonstration(rng, None) for _ in range(2000))
    texts = [write_prior_text(rng) for _ in range(4000)] + [p.prompt + p.completion for p in problems]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: Any, seed: int) -> LlamaForCausalLM:
    """A Llama of 0.9 million parameters, initialised at random."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def stream_batches(tokenizer: Any, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches of token ids [BATCH_ROWS, CONTEXT]; texts are drawn anew, never twice, and run on."""
    rng = random.Random(f"{seed} pretraining")
    ids: list[int] = []
    while True:
        while len(ids) < BATCH_ROWS * CONTEXT:
            text = tokenizer(write_prior_text(rng), add_special_tokens=False)["input_ids"]
            ids += [tokenizer.bos_token_id, *text, tokenizer.eos_token_id]
        yield torch.tensor(ids[: BATCH_ROWS * CONTEXT]).view(BATCH_ROWS, CONTEXT)
        ids = ids[BATCH_ROWS * CONTEXT :]


def learning_rate(step: int) -> float:
    """Linear warm-up, then linear decay to zero; `step` counts from 0."""
    return PEAK_LEARNING_RATE * min((step + 1) / WARMUP_STEPS, (STEPS - step) / (STEPS - WARMUP_STEPS))


def pretrain(model: Any, batches: Iterator[torch.Tensor]) -> float:
    """Trains `model` in place and returns the mean loss of the last 100 steps, nats per token."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    losses, start = [], time.monotonic()
    for step, batch in zip(range(STEPS), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            mean = sum(losses[-100:]) / 100
            print(f"step {step + 1}/{STEPS}  loss {mean:.4f}  {time.monotonic() - start:.0f} s", flush=True)
    return sum(losses[-100:]) / 100


def measure_nll(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    """Mean nll over the completions' tokens and EOS given BOS and the prompt, nats per token."""
    total, count = 0.0, 0
    for row in rows:
        prompt, completion = (
            tokenizer(row[field], add_special_tokens=False)["input_ids"] for field in ("prompt", "completion")
        )
        ids = torch.tensor([tokenizer.bos_token_id, *prompt, *completion, tokenizer.eos_token_id])
        with torch.inference_mode():
            logprobs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        targets = ids[1 + len(prompt) :]
        total -= logprobs[len(prompt) :].gather(-1, targets[:, None]).sum().item()
        count += len(targets)
    return total / count


def make_prior(folder: Path, rows: list[dict[str, str]], seed: int) -> dict[str, int | float]:
    """Writes the prior under `folder` and returns the record of its pretraining, with its nll on `rows`."""
    tokenizer = train_tokenizer(seed)
    model = make_model(tokenizer, seed)
    start = time.monotonic()
    loss = pretrain(model, stream_batches(tokenizer, seed))
    seconds = time.monotonic() - start
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "seed": seed,
        "steps": STEPS,
        "tokens_per_step": BATCH_ROWS * CONTEXT,
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "final_loss": round(loss, 4),
        "prior_text_nll": round(measure_nll(model.eval(), tokenizer, rows), 4),
    }
