"""How much of the prior's own speed is left when it scores: `python benchmarks/score.py [--model DIR] [--data FILE]`.

Times, in turn in one process, (a) stage 1 from text to written shards and (b) a bare loop over the very same
batches, forward pass and statistics only. The figure is the median of the pairwise ratios (a) / (b) of tokens per
second, real tokens only; loading the model is in neither. Without --model a Llama with random weights is made.
"""

import argparse
import json
import resource
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[0] = str(REPOSITORY)


def main() -> None:
    """Print the figures, and write them as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a pretrained model; default: random weights, 8 M parameters")
    parser.add_argument("--data", help="JSONL with prompt and completion; default: made from the demo's problems")
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as score.batch_tokens=8192")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = arguments.model or str(make_model(Path(scratch) / "model"))
        data = arguments.data or str(make_data(Path(scratch) / "data.jsonl"))
        figures = measure(model, data, Path(scratch), arguments)
    print(
        f"end to end {figures['end_to_end_tokens_per_second']:,.0f} tokens/s, bare loop "
        f"{figures['bare_loop_tokens_per_second']:,.0f} tokens/s, ratio {figures['ratio']:.3f} "
        f"(pairs {figures['ratio_lowest']:.3f} to {figures['ratio_highest']:.3f}), peak memory "
        f"{figures['peak_memory_mebibytes']:,.0f} MiB on {figures['device']}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def measure(model: str, data: str, scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time both ways in turn."""
    import torch

    from shared.load_config import load_config
    from shared.padding import pad_and_shift
    from stage1_score.run import load_engine, make_plan, score_shards, tokenize_shard

    pipeline = scratch / "pipeline.yaml"
    pipeline.write_text("data: {}\n")
    overrides = [f"prior.model={model}", f"data.path={data}", f"data.limit={arguments.rows}", "data.template=plain"]
    # In float32 the forward pass is fastest, and whatever stands around it weighs most.
    overrides.append("prior.compute_dtype=weights")
    config = load_config(pipeline, [*overrides, f"score.output={scratch}/store-0", *arguments.overrides])
    plan = make_plan(config, [])
    engine: Any = load_engine(config, plan)
    shards = [tokenize_shard(plan, index).examples for index in plan.missing]
    num_tokens = sum(len(example.input_ids) for examples in shards for example in examples)

    def bare_loop() -> float:
        started = time.perf_counter()
        for examples in shards:
            for batch in engine.batches(examples):
                engine.forward(pad_and_shift([examples[index] for index in batch]))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return num_tokens / (time.perf_counter() - started)

    def end_to_end() -> float:
        started = time.perf_counter()
        score_shards(plan, engine)
        speed = num_tokens / (time.perf_counter() - started)
        for shard in plan.store.glob("shard-*"):
            shard.unlink()
        return speed

    with torch.inference_mode():
        bare_loop()
        pairs = [(end_to_end(), bare_loop()) for _ in range(arguments.repeats)]
    ratios = [ours / bare for ours, bare in pairs]
    on_cuda = torch.cuda.is_available()
    peak = (
        torch.cuda.max_memory_allocated() / 2**20
        if on_cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )
    return {
        "end_to_end_tokens_per_second": statistics.median(ours for ours, _ in pairs),
        "bare_loop_tokens_per_second": statistics.median(bare for _, bare in pairs),
        "ratio": statistics.median(ratios), "ratio_lowest": min(ratios), "ratio_highest": max(ratios),
        "peak_memory_mebibytes": peak, "tokens": num_tokens, "device": engine.describe()["device"],
        "torch": torch.__version__,
    }  # fmt: skip


def make_model(folder: Path) -> Path:
    """A Llama with random weights and the demo's tokenizer; its vocabulary is padded to 8,192 rows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
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
