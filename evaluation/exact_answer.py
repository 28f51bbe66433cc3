"""Share of problems that a model answers exactly, by greedy decoding.

    python -m evaluation.exact_answer PROBLEMS.jsonl MODEL_DIR [MODEL_DIR ...]

Each line of PROBLEMS.jsonl holds `id`, `prompt` and `answer`. The model reads BOS and the prompt; the answer
it gives is the integer on the first line of the form `#### 42` in what it writes. A wrong answer and a
missing one both count as wrong: every problem is in the denominator. For a model in `<run>/model` the
result also goes to `<run>/evaluation.json` and, problem by problem, `<run>/evaluation_samples.jsonl`.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from shared.errors import UserError
from shared.files import replacing

# Prompts in, what the model writes after each of them out, in the same order.
Generate = Callable[[Sequence[str]], Sequence[str]]

ANSWER_LINE = re.compile(r"^####[ \t]*(-?\d+)[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Problem:
    """A prompt with its right answer."""

    id: str
    prompt: str
    answer: int


@dataclass(frozen=True)
class Sample:
    """What a model wrote for one problem, and whether its answer is the right one."""

    id: str
    answer: int
    generated: str
    correct: bool


def read_problems(path: Path) -> list[Problem]:
    """The problems of a JSONL file; raises UserError for a line without the three fields."""
    problems = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            problems.append(Problem(str(row["id"]), row["prompt"], int(row["answer"])))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} line {number}: expected id, prompt and a whole-number answer ({error!r})"
            ) from error
    if not problems:
        raise UserError(f"{path} holds no problems")
    return problems


def extract_answer(text: str) -> int | None:
    """The integer of the first answer line, or None where no line is one.

    The first line counts, since a model that runs on past its answer is held to what it answered.
    """
    match = ANSWER_LINE.search(text)
    return int(match[1]) if match else None


def evaluate(problems: Sequence[Problem], generate: Generate) -> list[Sample]:
    """One sample for each problem, in order."""
    texts = generate([problem.prompt for problem in problems])
    return [
        Sample(problem.id, problem.answer, text, extract_answer(text) == problem.answer)
        for problem, text in zip(problems, texts, strict=True)
    ]


def wilson_interval(num_correct: int, num_problems: int) -> tuple[float, float]:
    """95 % interval of a share in [0, 1] (Wilson 1927), sound near 0 and 1 where the normal one is not."""
    z = 1.959964
    share = num_correct / num_problems
    denominator = 1 + z**2 / num_problems
    centre = share + z**2 / (2 * num_problems)
    half = z * math.sqrt(share * (1 - share) / num_problems + z**2 / (4 * num_problems**2))
    return max(0.0, (centre - half) / denominator), min(1.0, (centre + half) / denominator)


def load_generate(model_dir: Path, max_new_tokens: int, batch_size: int) -> Generate:
    """Greedy decoding by the model in `model_dir`, on the GPU where there is one."""
    import torch

    from shared.pretrained import find_pretrained, load_causal_lm, load_tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    files = find_pretrained(str(model_dir))
    tokenizer = load_tokenizer(files)
    model = load_causal_lm(files, "auto").to(device).eval()
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    bos_ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def generate_batch(prompts: Sequence[str]) -> list[str]:
        rows = [bos_ids + tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
        width = max(map(len, rows))
        # Padding stands on the left, so that every row goes on from its own last prompt token.
        ids = torch.tensor([[pad_token_id] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad_token_id,
        )
        return tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)

    def generate(prompts: Sequence[str]) -> list[str]:
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        texts = [""] * len(prompts)
        with torch.inference_mode():
            for start in range(0, len(prompts), batch_size):
                chosen = by_length[start : start + batch_size]
                for index, text in zip(chosen, generate_batch([prompts[i] for i in chosen]), strict=True):
                    texts[index] = text
        return texts

    return generate


def name_run(model_dir: Path) -> str:
    """`<run>` for `<run>/model`, else the folder's own name."""
    # absolute, not resolve: a run whose model is a link keeps its own name.
    path = model_dir.absolute()
    return path.parent.name if path.name == "model" else path.name


def write_result(run_dir: Path, samples: Sequence[Sample], output_name: str) -> None:
    """Writes the share, and beside it the samples under the same stem."""
    num_correct = sum(sample.correct for sample in samples)
    result = {"exact_answers": num_correct / len(samples), "num_problems": len(samples)}
    output = run_dir / output_name
    lines = (json.dumps(asdict(sample)) + "\n" for sample in samples)
    with replacing(output.with_name(f"{output.stem}_samples.jsonl")) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    with replacing(output) as temporary:
        temporary.write_text(json.dumps(result) + "\n", encoding="utf-8")


def print_table(counts: Sequence[tuple[str, int, int]]) -> None:
    """One row for each (run, number correct, number of problems)."""
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "exact answers", "k/n", "95 % interval")
    for run, num_correct, num_problems in counts:
        low, high = wilson_interval(num_correct, num_problems)
        table.add_row(
            run,
            f"{num_correct / num_problems:.3f}",
            f"{num_correct}/{num_problems}",
            f"{low:.3f} to {high:.3f}",
        )
    Console().print(table)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.exact_answer",
        description="Share of problems answered exactly, by greedy decoding.",
    )
    parser.add_argument("problems", type=Path, help="JSONL with id, prompt and answer")
    parser.add_argument("model_dirs", type=Path, nargs="+", metavar="MODEL_DIR", help="folder of a model and tokenizer")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="per problem (default 64)")
    parser.add_argument("--batch-size", type=int, default=64, help="problems decoded together (default 64)")
    parser.add_argument("--output-name", default="evaluation.json", help="file written beside <run>/model")
    arguments = parser.parse_args(argv)
    for name in ("max_new_tokens", "batch_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return arguments


def check_files(arguments: argparse.Namespace) -> None:
    """Raises UserError for the first path that is not there, before minutes go into the others."""
    if not arguments.problems.is_file():
        raise UserError(f"no such file of problems: {arguments.problems}")
    for model_dir in arguments.model_dirs:
        if not (model_dir / "config.json").is_file():
            raise UserError(f"no model in {model_dir}: expected {model_dir / 'config.json'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code, see `shared/cli.py`."""
    arguments = parse_arguments(argv)

    from shared.cli import exit_code_of

    return exit_code_of(lambda: run(arguments), "exact_answer")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate every model, write its result beside it, and print the table."""
    check_files(arguments)
    problems = read_problems(arguments.problems)
    counts = []
    for model_dir in arguments.model_dirs:
        generate = load_generate(model_dir, arguments.max_new_tokens, arguments.batch_size)
        samples = evaluate(problems, generate)
        counts.append((name_run(model_dir), sum(sample.correct for sample in samples), len(samples)))
        if model_dir.absolute().name == "model":
            write_result(model_dir.absolute().parent, samples, arguments.output_name)
    print_table(counts)


if __name__ == "__main__":
    sys.exit(main())
