"""How fast the prior's numbers are had, five ways, one after the other in turn on one machine.

    python benchmarks/score.py                                          # a small random model on whatever is here
    python benchmarks/score.py --model FOLDER --data FILE.jsonl --json out.json score.batch_tokens=32768

transformers      stage 1 with the transformers engine, from text to written shards
bare loop         the same batches, forward pass and statistics only
vllm              stage 1 with the vLLM engine, from text to written shards
prompt_logprobs   vLLM's own `prompt_logprobs=1` on the same rows: logprob only, no mass rank
full logits       a padded Hugging Face loop with the logits of every token, as one would write it

Tokens are the rows' own, padding not counted. Each way runs in a process of its own, started anew in every round.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[0] = str(REPOSITORY)
RATIOS = [
    ("transformers", "bare loop"), ("vllm", "prompt_logprobs"), ("vllm", "transformers"),
    ("transformers", "full logits"), ("vllm", "full logits"),
]  # fmt: skip


def main() -> None:
    """Print a table and the ratios, and write them as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a pretrained model; default: random weights, 4 M parameters")
    parser.add_argument("--data", help="JSONL with prompt and completion; default: made from the demo's problems")
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="passes over the rows in each process, after a first")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--in-process", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as score.batch_tokens=8192")
    arguments = parser.parse_intermixed_args()
    if arguments.in_process:
        print(json.dumps(measure(arguments.in_process, arguments)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        arguments.model = arguments.model or str(make_model(Path(scratch) / "model"))
        arguments.data = arguments.data or str(make_data(Path(scratch) / "data.jsonl"))
        figures = [{way: in_own_process(way, arguments) for way in arguments.ways} for _ in range(arguments.rounds)]
    summary = summarise(figures)
    show(summary)
    if arguments.json:
        arguments.json.write_text(json.dumps(summary, indent=2) + "\n")


def in_own_process(way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of one way, from a process that ends with it."""
    words = ["--in-process", way, "--model", arguments.model, "--data", arguments.data]
    words += ["--rows", str(arguments.rows), "--repeats", str(arguments.repeats), *arguments.overrides]
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of the first pass, which compiles what is compiled, and of those after it; peak memory."""
    import torch

    from shared.load_config import load_config
    from stage1_score.plan import make_plan
    from stage1_score.score_shard import tokenize_shard

    with tempfile.TemporaryDirectory() as scratch:
        pipeline = Path(scratch) / "pipeline.yaml"
        pipeline.write_text("data: {}\n")
        # In float32 on a CPU the forward pass is fastest, and whatever stands around it weighs most.
        given = [f"prior.model={arguments.model}", f"data.path={arguments.data}", f"data.limit={arguments.rows}",
                 "data.template=plain", "prior.compute_dtype=weights", f"score.output={scratch}/store",
                 f"score.engine={'vllm' if way == 'vllm' else 'transformers'}"]  # fmt: skip
        config = load_config(pipeline, [*given, *arguments.overrides])
        plan = make_plan(config, [])
        shards = [tokenize_shard(plan, index).examples for index in plan.missing]
        num_tokens = sum(len(example.input_ids) for examples in shards for example in examples)
        one_pass = WAYS[way](config, plan, [example for examples in shards for example in examples])
        first = timed(one_pass)
        seconds = [timed(one_pass) for _ in range(arguments.repeats)]
    on_cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if on_cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "tokens_per_second": num_tokens / statistics.median(seconds),
        "first_pass_tokens_per_second": num_tokens / first,
        "peak_memory_mebibytes": peak / 2**20,
        "tokens": num_tokens,
        "device": torch.cuda.get_device_name() if on_cuda else "cpu",
        "torch": torch.__version__,
    }


def timed(one_pass: Callable[[], None]) -> float:
    """Seconds of a pass, what it queued on a GPU included."""
    import torch

    started = time.perf_counter()
    one_pass()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def with_engine(config: Any, plan: Any, examples: list[Any]) -> Callable[[], None]:
    """Stage 1 as `prift-score` runs it, once the prior is loaded."""
    from stage1_score.choose_engine import load_engine
    from stage1_score.score_shard import prefetched, score_shard, tokenize_shard

    engine = load_engine(config, plan.files, plan.manifest.identity)

    def one_pass() -> None:
        for shard in prefetched(lambda index: tokenize_shard(plan, index), plan.missing):
            score_shard(plan, engine, shard, lambda rows, tokens: None, "0")

    return one_pass


def bare_loop(config: Any, plan: Any, examples: list[Any]) -> Callable[[], None]:
    """Forward pass and statistics of the batches that the transformers engine would run."""
    import torch

    from stage1_score.choose_engine import load_engine

    engine: Any = load_engine(config, plan.files, plan.manifest.identity)
    batches = engine.batches(examples)

    def one_pass() -> None:
        with torch.inference_mode():
            for batch in batches:
                engine.forward(engine.batch_of([examples[index] for index in batch]))

    return one_pass


def prompt_logprobs(config: Any, plan: Any, examples: list[Any]) -> Callable[[], None]:
    """vLLM's own way to the log-probabilities of a prompt; its scheduler gets the same budget."""
    import torch

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    longest = max(len(example.input_ids) for example in examples)
    budget = config.score.batch_tokens
    llm = LLM(
        model=str(plan.files.folder), dtype=plan.manifest.identity.weight_dtype, skip_tokenizer_init=True,
        max_model_len=longest + 1, max_num_batched_tokens=budget, max_num_seqs=max(1, min(1024, budget // 16)),
        enable_prefix_caching=False, enforce_eager=not torch.cuda.is_available(), disable_log_stats=True,
    )  # fmt: skip
    prompts: Any = [{"prompt_token_ids": example.input_ids.tolist()} for example in examples]
    params = SamplingParams(max_tokens=1, prompt_logprobs=1, detokenize=False)

    def one_pass() -> None:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        for example, output in zip(examples, outputs, strict=True):
            found = output.prompt_logprobs or []
            [found[i][int(example.input_ids[i])].logprob for i in example.target_positions]  # pyright: ignore

    return one_pass


def full_logits(config: Any, plan: Any, examples: list[Any]) -> Callable[[], None]:
    """Eight rows at a time, sorted by length, padded; logits of every token, then the targets' statistics."""
    import torch

    from shared.padding import pad_and_shift
    from shared.pretrained import load_causal_lm
    from shared.statistics import token_statistics
    from stage1_score.choose_engine import choose_device

    identity = plan.manifest.identity
    model = load_causal_lm(plan.files, getattr(torch, identity.weight_dtype)).to(choose_device(config)).eval()
    ordered = sorted(examples, key=lambda example: -len(example.input_ids))
    groups = [ordered[first : first + 8] for first in range(0, len(ordered), 8)]

    def one_pass() -> None:
        with torch.inference_mode():
            for members in groups:
                batch = pad_and_shift(members).to(model.device)
                logits = model(input_ids=batch.input_ids_BT, use_cache=False).logits.float()
                rows = logits.flatten(0, 1)[batch.hidden_rows_N]
                found = token_statistics(rows, batch.target_ids_N, identity.columns)
                [values.cpu() for values in found.values()]

    return one_pass


WAYS: dict[str, Callable[[Any, Any, list[Any]], Callable[[], None]]] = {
    "transformers": with_engine,
    "bare loop": bare_loop,
    "vllm": with_engine,
    "prompt_logprobs": prompt_logprobs,
    "full logits": full_logits,
}


def summarise(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds, and ratios of ways within each round."""
    first = next(iter(rounds[0].values()))
    ways = {
        way: {
            "tokens_per_second": statistics.median(figures[way]["tokens_per_second"] for figures in rounds),
            "first_pass_tokens_per_second": statistics.median(
                figures[way]["first_pass_tokens_per_second"] for figures in rounds
            ),
            "peak_memory_mebibytes": max(figures[way]["peak_memory_mebibytes"] for figures in rounds),
        }
        for way in rounds[0]
    }
    ratios = {}
    for ours, theirs in RATIOS:
        if ours in ways and theirs in ways:
            found = [r[ours]["tokens_per_second"] / r[theirs]["tokens_per_second"] for r in rounds]
            ratios[f"{ours} / {theirs}"] = {
                "median": statistics.median(found), "lowest": min(found), "highest": max(found),
            }  # fmt: skip
    about = {name: first[name] for name in ("tokens", "device", "torch")}
    return {"ways": ways, "ratios": ratios, "rounds": len(rounds), **about}


def show(summary: dict[str, Any]) -> None:
    """The figures as two tables."""
    print(f"{summary['tokens']:,} tokens a pass, {summary['rounds']} rounds, {summary['device']}, {summary['torch']}")
    for way, figures in summary["ways"].items():
        rate, first = figures["tokens_per_second"], figures["first_pass_tokens_per_second"]
        peak = figures["peak_memory_mebibytes"]
        print(f"  {way:<16} {rate:>10,.0f} tokens/s (first pass {first:>8,.0f})  {peak:>8,.0f} MiB")
    for pair, ratio in summary["ratios"].items():
        print(f"  {pair:<30} {ratio['median']:.3f}  ({ratio['lowest']:.3f} to {ratio['highest']:.3f})")


def make_model(folder: Path) -> Path:
    """A Qwen 2 with random weights and the demo's tokenizer; its vocabulary is padded to 4,096 rows."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=4096, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REPOSITORY / "data/demo/prior" / name, folder)
    return folder


def make_data(path: Path) -> Path:
    """Rows of 100 to 600 tokens: problems of the demo strung together."""
    lines = (REPOSITORY / "data/demo/train.jsonl").read_text().splitlines()
    problems = [json.loads(line) for line in lines]
    with path.open("w") as file:
        for row in range(512):
            members = [problems[(row * 9 + i) % len(problems)] for i in range(1 + row % 8)]
            completion = "\n".join(f"{member['prompt']}{member['completion']}" for member in members)
            file.write(json.dumps({"prompt": members[0]["prompt"], "completion": completion}) + "\n")
    return path


if __name__ == "__main__":
    main()
