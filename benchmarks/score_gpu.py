"""Stage 1 on one GPU against the GPU's own matrix rate, at the shapes of real models with random weights.

    python benchmarks/score_gpu.py --shapes Qwen2.5-1.5B Qwen2.5-7B --json out.json

First parity: the statistics kernel against float64, and packed against padded rows. Then times: a square bfloat16
matrix product, the transformers engine on rows of about 1,000 tokens, head product and statistics kernel apart. The
share is of the matrix rate measured in the same run; its operations are linear layers, causal attention, and the head
on target rows; tokens are the rows' own.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[0] = str(REPOSITORY)
COLUMNS = ("logprob", "mass_rank", "entropy")
SHAPES = {
    "Qwen2.5-0.5B": (151936, 896, 4864, 24, 14, 2),
    "Qwen2.5-1.5B": (151936, 1536, 8960, 28, 12, 2),
    "Qwen2.5-7B": (152064, 3584, 18944, 28, 28, 4),
    "tiny": (1000, 256, 512, 2, 4, 2),
}
"""Vocabulary, hidden size, intermediate size, layers, heads, heads of keys and values."""


def main() -> None:
    """Print a table, and write it as JSON where asked."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["Qwen2.5-1.5B", "Qwen2.5-7B"])
    parser.add_argument("--tokens", type=int, default=262_144, help="tokens of a timed pass")
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=1000, help="mean tokens of a row; lengths vary by half of it")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": torch.__version__,
        "kernel": kernel_parity(device), "matrix_teraflops": matrix_rate(device),
    }  # fmt: skip
    for shape in arguments.shapes:
        found[shape] = measure(shape, device, found["matrix_teraflops"], arguments)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    show(found)


def kernel_parity(device: str) -> dict[str, float]:
    """Largest error of each statistic against float64 on rows that are far from uniform."""
    import torch

    from shared.statistics import token_statistics

    torch.manual_seed(0)
    logits = torch.randn(256, 151_937, device=device) * 6
    targets = torch.randint(0, 151_937, (256,), device=device)
    exact = token_statistics(logits.double(), targets, COLUMNS)
    ours = token_statistics(logits, targets, COLUMNS)
    return {name: float((ours[name] - exact[name]).abs().max()) for name in COLUMNS}


def matrix_rate(device: str) -> float:
    """TFLOP/s of a square bfloat16 product."""
    import torch

    size = 8192 if device == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, 30) / 1e12


def seconds_of(function: Callable[[], Any], repeats: int) -> float:
    """Mean seconds of a call, after warming up."""
    import torch

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    for _ in range(2):
        function()
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        function()
    wait()
    return (time.perf_counter() - started) / repeats


def measure(shape: str, device: str, rate: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of one model."""
    import torch

    from shared.config import ScoreConfig

    config = ScoreConfig(batch_tokens=arguments.batch_tokens)
    rows = make_rows(shape, arguments.tokens, arguments.length)
    engine = make_engine(shape, device, config)
    padded = make_engine(shape, device, config.model_copy(update={"padding_free": False}))
    some = rows[:16]
    difference = max(
        float(abs(a.statistics["logprob"] - b.statistics["logprob"]).max())
        for a, b in zip(engine.score(some), padded.score(some), strict=True)
    )
    del padded
    num_tokens = sum(len(row.input_ids) for row in rows)
    engine.score(rows[: len(rows) // 4])
    seconds = seconds_of(lambda: engine.score(rows), 1)
    flops = float(operations(shape, rows))
    return {
        "tokens_per_second": num_tokens / seconds,
        "teraflops": flops / seconds / 1e12,
        "share_of_matrix_rate": flops / seconds / 1e12 / rate,
        "packed_against_padded": difference,
        "attention": engine.describe()["attention"],
        "peak_memory_gibibytes": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
        **head_times(engine, device, config),
    }


def make_rows(shape: str, num_tokens: int, mean_length: int) -> list[Any]:
    """Random ids; every token but the first is a target."""
    import numpy as np

    from stage1_score.tokenization import TokenizedExample

    generator = np.random.default_rng(0)
    lengths = generator.integers(mean_length // 2, mean_length * 3 // 2, max(1, num_tokens // mean_length))
    return [
        TokenizedExample(
            f"r{index}", index, generator.integers(0, 1000, length).astype(np.int32),
            np.arange(1, length, dtype=np.int32),
        )
        for index, length in enumerate(lengths)
    ]  # fmt: skip


def make_engine(shape: str, device: str, config: Any) -> Any:
    """The transformers engine on random weights that never lie on a disk."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import stage1_score.transformers_engine as module
    from shared.pretrained import PretrainedFiles
    from shared.score_store import Identity

    vocab, hidden, intermediate, layers, heads, kv_heads = SHAPES[shape]
    model_config = Qwen2Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=4096, dtype=torch.bfloat16,
        tie_word_embeddings=False,
    )  # fmt: skip
    fields: dict[str, Any] = dict.fromkeys(Identity.model_fields, "") | {
        "columns": COLUMNS, "max_length": 4096, "statistics_version": 1, "weight_dtype": "bfloat16",
        "split_turns": False,
        "compute_dtype": "bfloat16",
    }  # fmt: skip

    def load(files: Any, dtype: torch.dtype) -> Any:
        torch.manual_seed(0)
        with torch.device(device):
            torch.set_default_dtype(dtype)
            try:
                return Qwen2ForCausalLM(model_config)
            finally:
                torch.set_default_dtype(torch.float32)

    with tempfile.TemporaryDirectory() as folder:
        model_config.save_pretrained(folder)
        files = PretrainedFiles(shape, None, Path(folder), False)
        # The engine's own loader wants files; all else is the engine as it is.
        original, module.load_causal_lm = module.load_causal_lm, load
        try:
            return module.TransformersEngine(files, Identity(**fields), device, config)
        finally:
            module.load_causal_lm = original


def operations(shape: str, rows: list[Any]) -> int:
    """Floating point operations of a pass: two for each multiplication and addition."""
    vocab, hidden, intermediate, layers, heads, kv_heads = SHAPES[shape]
    head_size = hidden // heads
    linear = hidden * (heads + 2 * kv_heads) * head_size + heads * head_size * hidden + 3 * hidden * intermediate
    total = 0
    for row in rows:
        length = len(row.input_ids)
        # Causal: half of the products of queries and keys, and of probabilities and values.
        total += 2 * layers * linear * length + 2 * layers * heads * head_size * length**2
        total += 2 * hidden * vocab * len(row.target_positions)
    return total


def head_times(engine: Any, device: str, config: Any) -> dict[str, float]:
    """Milliseconds for 8,192 rows: head product to float32 logits, and statistics of these logits, in their chunks."""
    import torch

    from shared.head import float32_product
    from shared.statistics import token_statistics

    weight = engine._model.get_output_embeddings().weight
    num_rows = max(1, config.logits_bytes(device) // (4 * len(weight)))
    hidden = torch.randn(num_rows, weight.shape[1], device=device, dtype=weight.dtype)
    targets = torch.randint(0, len(weight), (num_rows,), device=device)
    chunks = 8192 / num_rows
    with torch.inference_mode():
        logits = float32_product(hidden, weight)
        product = seconds_of(lambda: float32_product(hidden, weight), 5)
        found = seconds_of(lambda: token_statistics(logits, targets, COLUMNS), 5)
    return {"head_product_ms": 1e3 * chunks * product, "statistics_ms": 1e3 * chunks * found}


def show(found: dict[str, Any]) -> None:
    """The figures as a short table."""
    errors = ", ".join(f"{name} {error:.1e}" for name, error in found["kernel"].items())
    print(f"{found['device']}, torch {found['torch']}; kernel against float64: {errors}")
    print(f"bf16 matrix rate {found['matrix_teraflops']:.1f} TFLOP/s")
    for shape in SHAPES:
        if shape in found:
            f = found[shape]
            print(
                f"{shape:<14} {f['tokens_per_second']:>9,.0f} tokens/s  {f['teraflops']:.1f} TFLOP/s  share "
                f"{f['share_of_matrix_rate']:.3f}  {f['attention']}  packed-padded {f['packed_against_padded']:.1e}  "
                f"per 8192 rows: head {f['head_product_ms']:.1f} ms, statistics {f['statistics_ms']:.1f} ms"
            )


if __name__ == "__main__":
    main()
