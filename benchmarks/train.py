"""What a training step costs with stored statistics, without them, and in TRL: speed and memory on one machine.

    python benchmarks/train.py --small                                  # random weights; minutes on a CPU
    python benchmarks/train.py --json out.json train.batch_size=64      # more rounds, a larger head
    python benchmarks/train.py --shape qwen2.5-1.5b --rounds 3 --steps 10   # CUDA: bfloat16, model FLOP utilisation

prift_mass, prift_prob  this trainer, weights from a score store that `prift-score` makes of the same model
... + reference         the same, with the frozen model in memory and run on every batch, as the published code does;
                        given the same packed forward pass and chunked statistics of targets only, without gradient
sft; sft, padded        this trainer, plain fine-tuning, packed as all others here, and padded
trl sft                 TRL's SFTTrainer, plain fine-tuning: packing (bfd), its chunked loss (`loss_type="nll"`), fused
                        AdamW; plain PyTorch where ours is DeepSpeed with ZeRO-1 on one rank

All train on the same rows and targets with about as many tokens a step, without logs, evaluation and checkpoints. Ours
get the same batches; TRL, given token ids and completion masks, those that its packing makes. Without FlashAttention
its packed rows are kept apart by a mask over all pairs of their tokens, so they are made short (--trl-row-tokens);
`--trl-attention prift_packed` lends it the attention used here. On a CPU its loss runs the head on all tokens, targets
or not, in plain torch operations. On CUDA its weights are bfloat16 without a float32 copy: less work than ours do.

How many targets prift_mass drops depends on the prior. Random weights drop more than half of them, a real prior fewer.

Each way is a process of its own. Rounds go by turns, and a ratio is of two ways in one round. On a CPU the processes
wait in memory for their turns; on CUDA each is started anew. Tokens are the rows' own, padding not counted; the first
steps are left out. Memory is the growth over the state before the model was loaded: of the peak resident set (VmHWM of
/proc/self/status, as ru_maxrss would begin at the parent's), or of torch.cuda.max_memory_allocated.

Model FLOP utilisation counts 6 operations for each real token and weight of a linear layer, 6 for each target of
non-zero weight and weight of the head, and 6 * T^2 * heads * head size for the causal attention of a layer in a
document of T tokens: half of all pairs. Nothing is counted for a reference or for recomputation; the rate is
H100_FLOPS.
"""

import argparse
import ctypes
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any, TextIO

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[0] = str(REPOSITORY)
SHAPES = {
    "small": (50_304, 256, 704, 8, 8, 4),
    "qwen2.5-0.5b": (151_936, 896, 4864, 24, 14, 2),
    "qwen2.5-1.5b": (151_936, 1536, 8960, 28, 12, 2),
}
"""Rows of the vocabulary, hidden and intermediate size, layers, heads, heads of keys; Qwen2 with tied embeddings."""
BATCH_SIZES = {"small": 12, "qwen2.5-0.5b": 64, "qwen2.5-1.5b": 64}
REFERENCE = " + reference"
PADDED, TRL = "sft, padded", "trl sft"
WAYS = ("prift_mass", "prift_prob", "prift_mass" + REFERENCE, "prift_prob" + REFERENCE, "sft", PADDED, TRL)
HEADS = ("weighted head", "naive head")
HEAD_ROWS = 151_936
RATIOS: dict[str, tuple[str, str, float | None]] = {
    "prift_over_online_reference": ("prift_mass", "prift_mass" + REFERENCE, 1.25),
    "prift_prob_over_online_reference": ("prift_prob", "prift_prob" + REFERENCE, 1.25),
    "prift_over_sft": ("prift_mass", "sft", 1.0),
    "prift_prob_over_sft": ("prift_prob", "sft", 0.97),
    "sft_over_trl": ("sft", TRL, 1.0),
    "sft_packed_over_padded": ("sft", PADDED, None),
}
"""Ratio of tokens per second: name, ways, and the least it should be."""
MOST_HEAD_MEMORY = 0.2
H100_FLOPS = 989e12
"""Dense bfloat16 products of an H100 or H200 SXM, a second, as NVIDIA states them."""
NUM_ROWS = 256
MEMORY_STEPS = 2
MEBIBYTE = 2**20
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Has glibc's malloc get larger tensors from the system one by one, and give each back when it is freed."""


def main() -> None:
    """Print tables and goals, and write all figures as JSON where asked."""
    arguments = parse()
    if arguments.in_process:
        run_in_process(arguments)
        return
    with tempfile.TemporaryDirectory() as scratch:
        arguments.folder = Path(scratch)
        about = answer_of("prepare", arguments)
        rounds = list(measure(arguments, together=about["device"] == "cpu"))
        heads = {head: answer_of(head, arguments) for head in HEADS}
    summary = summarise(about, rounds, heads)
    show(summary)
    if arguments.json:
        arguments.json.write_text(json.dumps(summary, indent=2) + "\n")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="fewer rounds and steps, a smaller head")
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--rounds", type=int, help="default: 9, --small: 7")
    parser.add_argument("--steps", type=int, help="timed steps of each way in a round; default: 3, --small: 1")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--trl-row-tokens", type=int, help="bounds the length of TRL's packed rows")
    parser.add_argument("--trl-attention", help="default: flash_attention_2 where it is installed, else sdpa")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--in-process", choices=["prepare", *WAYS, *HEADS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.micro_batch_tokens=4096")
    arguments = parser.parse_intermixed_args()
    arguments.rounds = arguments.rounds or (7 if arguments.small else 9)
    arguments.steps = arguments.steps or (1 if arguments.small else 3)
    return arguments


class Worker:
    """A process that trains one way, a block of steps whenever it is asked."""

    def __init__(self, what: str, arguments: argparse.Namespace):
        words = [sys.executable, __file__, *sys.argv[1:], "--in-process", what, "--folder", str(arguments.folder)]
        self._what, self._log = what, arguments.folder / f"{what}.log"
        environment = {
            "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), **os.environ, **RETURN_MEMORY,
            "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(arguments.folder / "datasets"),
        }  # fmt: skip
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        self.first = self._answer()

    def ask(self) -> dict[str, Any]:
        """Figures of the next block of steps."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._what} failed:\n" + "\n".join(self._log.read_text().splitlines()[-20:]))
        return json.loads(line)


def answer_of(what: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The answer of a process that gives one."""
    with closing(Worker(what, arguments)) as worker:
        return worker.first


def measure(arguments: argparse.Namespace, together: bool) -> Iterator[dict[str, dict[str, Any]]]:
    """Figures of each way, round by round."""
    with ExitStack() as stack:
        waiting = {way: stack.enter_context(closing(Worker(way, arguments))) for way in arguments.ways if together}
        for _ in range(arguments.rounds):
            figures = {}
            for way in arguments.ways:
                if together:
                    figures[way] = waiting[way].ask()
                else:
                    with closing(Worker(way, arguments)) as worker:
                        figures[way] = worker.ask()
            yield figures


def run_in_process(arguments: argparse.Namespace) -> None:
    """What a process is started for; it answers on its standard output, which nothing else may write to."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from stage2_train.distributed import choose_accelerator

    choose_accelerator()
    what = arguments.in_process
    if what == "prepare":
        tell(answers, prepare(arguments))
    elif what in HEADS:
        tell(answers, run_head(what, arguments.small))
    elif what == TRL:
        train_with_trl(arguments, answers)
    else:
        train_with_ours(what, arguments, answers)


def tell(answers: TextIO, answer: dict[str, Any]) -> None:
    """Answer the parent process."""
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


class Pace:
    """Holds a training loop until the next block of steps is asked for; made before the model is loaded.

    The peak of memory is that of the first steps, which are not timed. On a CPU what they free goes back to the system
    at once (RETURN_MEMORY): otherwise the peak would be the heap's, with what lies idle in it.
    """

    def __init__(self, answers: TextIO, steps: int):
        self._answers, self._steps = answers, steps
        self._before, self._peak = resident_bytes(), 0
        self._num_done, self._left = 0, MEMORY_STEPS + 1
        self._tokens, self._started = 0, time.perf_counter()

    def after_step(self, num_tokens: int, **facts: Any) -> None:
        """Count a step; at the end of a block answer and wait. Ends the process when nothing more is asked."""
        self._num_done, self._left, self._tokens = self._num_done + 1, self._left - 1, self._tokens + num_tokens
        if self._num_done == MEMORY_STEPS:
            self._peak = peak_bytes() - self._before
            keep_memory()
        if self._left:
            return
        synchronize()
        rate = self._tokens / (time.perf_counter() - self._started)
        tell(self._answers, {"tokens_per_second": rate, "peak_bytes": self._peak, **facts})
        if not sys.stdin.readline():
            # The collectives' threads may abort an interpreter that shuts down in order.
            os._exit(0)
        self._left, self._tokens, self._started = self._steps, 0, time.perf_counter()


def keep_memory() -> None:
    """From here on malloc keeps what is freed, for the sake of speed, up to the sizes that it comes to by itself."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 32 * MEBIBYTE)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, 64 * MEBIBYTE)  # M_TRIM_THRESHOLD


def prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make model and rows, and score them as `prift-score` does; says what there is."""
    import torch

    from stage1_score.run import run

    folder = arguments.folder
    on_cuda = torch.cuda.is_available()
    num_parameters = make_model(folder / "model", arguments.shape, torch.bfloat16 if on_cuda else torch.float32)
    make_rows(folder / "rows.jsonl", SHAPES[arguments.shape][0])
    (folder / "pipeline.yaml").write_text("data: {}\n")
    run(config_of(arguments, "sft"), ["prift-score", str(folder / "pipeline.yaml")])
    cache = cache_of(folder)
    return {
        "command": " ".join([Path(sys.executable).name, "benchmarks/train.py", *sys.argv[1:-4]]),
        "device": torch.cuda.get_device_name() if on_cuda else "cpu",
        **{name: version(name) for name in ("torch", "transformers", "deepspeed", "trl")},
        "threads": torch.get_num_threads(),
        "shape": arguments.shape,
        "parameters": num_parameters,
        "reference_bytes": num_parameters * (2 if on_cuda else 4),
        "rows": len(cache), "row_tokens": cache.lengths.sum(), "row_targets": cache.num_targets.sum(),
        "steps_a_round": arguments.steps, "batch_size": config_of(arguments, "sft").train.batch_size,
    }  # fmt: skip


def make_model(folder: Path, shape: str, dtype: Any) -> int:
    """A Qwen2 with random weights and the demo's tokenizer; its number of parameters."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    vocab, hidden, intermediate, layers, heads, kv_heads = SHAPES[shape]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=4096, bos_token_id=1,
        eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REPOSITORY / "data/demo/prior" / name, folder)
    return sum(parameter.numel() for parameter in model.parameters())


def make_rows(path: Path, vocab_size: int) -> None:
    """Rows of 100 to 300 random tokens, as long as those of GSM8K; the last 35 % to 65 % of each are targets."""
    import numpy as np

    generator = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(NUM_ROWS):
            length = int(generator.integers(100, 301))
            num_targets = int(length * generator.uniform(0.35, 0.65))
            ids = generator.integers(3, vocab_size, length).tolist()
            mask = [0] * (length - num_targets) + [1] * num_targets
            file.write(json.dumps({"input_ids": ids, "target_mask": mask}) + "\n")


def config_of(arguments: argparse.Namespace, way: str) -> Any:
    """The pipeline as a way reads it."""
    from shared.load_config import load_config

    folder = arguments.folder
    method = "sft" if way == PADDED else way.removesuffix(REFERENCE)
    return load_config(folder / "pipeline.yaml", [
        f"data.path={folder}/rows.jsonl", f"prior.model={folder}/model", "prior.compute_dtype=weights",
        f"score.output={folder}/store", "score.engine=transformers", "score.workers=1",
        f"train.scores={folder}/store", f"train.cache_dir={folder}/cache", f"train.output={folder}/runs/{way}",
        f"train.method={method}", f"train.padding_free={str(way != PADDED).lower()}",
        f"train.batch_size={BATCH_SIZES[arguments.shape]}", "train.epochs=1000", "train.schedule=constant",
        *arguments.overrides,
    ])  # fmt: skip


def cache_of(folder: Path) -> Any:
    """The rows of the store."""
    from stage2_train.cache import open_cache

    return open_cache(folder / "store", (), folder / "cache")


def train_with_ours(way: str, arguments: argparse.Namespace, answers: TextIO) -> None:
    """Run this trainer's steps at the pace that the parent sets."""
    import numpy as np

    from stage2_train.distributed import meet
    from stage2_train.setup import prepare
    from stage2_train.trainer import Trainer

    job, world = prepare(config_of(arguments, way)), meet()
    pace = Pace(answers, arguments.steps)
    trainer: Any = Trainer(job, world)
    if way.endswith(REFERENCE):
        add_reference(trainer)
    for step in count(1):
        metrics, _ = trainer._step(step)
        rows = job.plan.rows_of_step(step)
        dropped, lengths = metrics.weight_zero_fraction, job.cache.lengths[rows]
        flops = flops_of(arguments.shape, lengths, float(np.sum(job.cache.num_targets[rows])) * (1 - dropped))
        pace.after_step(
            int(lengths.sum()), dropped=dropped, loss=metrics.loss, flops_per_token=flops / int(lengths.sum())
        )


def add_reference(trainer: Any) -> None:
    """Have a trainer weigh by a frozen copy of the model, run on every batch, in place of the store."""
    import torch

    from shared.head import prepare_head
    from shared.packed_attention import use_packed_attention
    from shared.pretrained import load_causal_lm
    from stage2_train.setup import resolve_dtype
    from stage2_train.step_loader import StepLoader

    job, world = trainer.job, trainer.world
    reference = load_causal_lm(job.files, getattr(torch, resolve_dtype(job.config))).to(world.device).eval()
    reference.requires_grad_(False)
    prepare_head(reference)
    if trainer.form.packed:
        use_packed_attention(reference)
    weigher: Any = ReferenceWeigher(trainer.weigher, reference, job.config.logits_bytes(world.device.type))
    trainer.weigher, trainer.loader = weigher, StepLoader(job, world, trainer.form, weigher)


class ReferenceWeigher:
    """In place of a `stage2_train.weigh.StepWeigher`: the same weights from statistics that a model gives now."""

    def __init__(self, weigher: Any, reference: Any, max_logits_bytes: int):
        self._weigher, self._reference, self._max_logits_bytes = weigher, reference, max_logits_bytes

    def given(self, step: int, rows: Any, batches: Sequence[Any]) -> None:
        """Nothing is known before the batches are on the device."""

    def prepare(self, step: int, rows: Any, batches: Sequence[Any], given: None, *others: Any) -> Any:
        """Weights and scales, as `StepWeigher.prepare`; targets of weight zero skip the trained model's head."""
        fresh = [self._weights(step, rows, batch) for batch in batches]
        return self._weigher.prepare(step, rows, batches, fresh, *others)

    def _weights(self, step: int, rows: Any, batch: Any) -> Any:
        import torch

        from shared.head import hidden_states, logits_of_hidden, vocab_rows
        from shared.statistics import statistics_in_chunks

        tokens, model = batch.tokens, self._reference
        with torch.no_grad():
            hidden_BTD = hidden_states(model, tokens.input_ids_BT, tokens.boundaries)
            columns = statistics_in_chunks(
                hidden_BTD.flatten(0, 1)[tokens.hidden_rows_N], tokens.target_ids_N, self._weigher._weighting.columns,
                lambda hidden_nD: logits_of_hidden(model, hidden_nD), vocab_rows(model), self._max_logits_bytes,
            )  # fmt: skip
        weights_N = self._weigher._weigh(columns, slice(None), batch=batch, row_nll_R=None)
        return self._weigher._chosen(step, rows, batch, weights_N)


def train_with_trl(arguments: argparse.Namespace, answers: TextIO) -> None:
    """Run TRL's trainer at the pace that the parent sets."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

    from shared.packed_attention import ATTENTION_NAME, use_packed_attention
    from shared.pretrained import find_pretrained, load_causal_lm

    on_cuda = torch.cuda.is_available()
    attention, settings = trl_settings(arguments, on_cuda)
    folder = arguments.folder
    cache = cache_of(folder)
    pace = Pace(answers, arguments.steps)
    model = load_causal_lm(find_pretrained(str(folder / "model")), torch.bfloat16 if on_cuda else torch.float32)
    if attention == ATTENTION_NAME:
        use_packed_attention(model)
    else:
        model.set_attn_implementation(attention)
    trainer: Any = SFTTrainer(
        model, SFTConfig(output_dir=str(folder / "trl"), **settings), train_dataset=Dataset.from_list(trl_rows(cache)),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )  # fmt: skip
    flops = flops_of(arguments.shape, cache.lengths[:], cache.num_targets.sum()) / cache.lengths.sum()
    facts = {"flops_per_token": flops, "attention": attention, "row_tokens": settings["max_length"]}

    class Paced(TrainerCallback):
        num_tokens = 0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            done, self.num_tokens = trainer._total_train_tokens - self.num_tokens, trainer._total_train_tokens
            pace.after_step(done, **facts)

    trainer.add_callback(Paced())
    trainer.train()


def trl_settings(arguments: argparse.Namespace, on_cuda: bool) -> tuple[str, dict[str, Any]]:
    """Attention, and what `trl.SFTConfig` is given: as many tokens a step as ours, and what makes it fast."""
    from transformers.utils.import_utils import is_flash_attn_2_available

    train = config_of(arguments, "sft").train
    attention = arguments.trl_attention or ("flash_attention_2" if is_flash_attn_2_available() else "sdpa")
    with_mask = 2048 if on_cuda else 512
    most = arguments.trl_row_tokens or (with_mask if attention == "sdpa" else train.micro_batch_tokens)
    cache = cache_of(arguments.folder)
    tokens_of_step = cache.lengths.sum() / len(cache) * train.batch_size
    rows_of_step = math.ceil(tokens_of_step / most)
    return attention, {
        "packing": True, "packing_strategy": "bfd", "max_length": math.ceil(tokens_of_step / rows_of_step),
        "completion_only_loss": True,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": rows_of_step, "max_steps": 10**6,
        "learning_rate": train.learning_rate, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.1,
        "optim": "adamw_torch_fused", "adam_beta1": train.adam_beta1, "adam_beta2": train.adam_beta2,
        "weight_decay": train.weight_decay, "max_grad_norm": train.gradient_clipping, "gradient_checkpointing": False,
        "use_cpu": not on_cuda, "bf16": on_cuda, "dataloader_num_workers": 2 if on_cuda else 0,
        "logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip


def trl_rows(cache: Any) -> list[dict[str, Any]]:
    """The rows of a store as TRL takes tokenised ones."""
    rows = []
    for index in range(len(cache)):
        row = cache.row(index)
        is_target = [0] * len(row.input_ids)
        for position in row.target_positions.tolist():
            is_target[position] = 1
        rows.append({"input_ids": row.input_ids.tolist(), "completion_mask": is_target})
    return rows


def flops_of(shape: str, lengths: Any, num_weighted_targets: float) -> float:
    """Floating point operations of forward and backward pass on documents of such lengths; see the module."""
    vocab, hidden, intermediate, layers, heads, kv_heads = SHAPES[shape]
    head_size = hidden // heads
    linear = 2 * hidden * (heads + kv_heads) * head_size + 3 * hidden * intermediate
    attention = heads * head_size * float((lengths.astype(float) ** 2).sum())
    return 6.0 * (layers * (linear * int(lengths.sum()) + attention) + hidden * vocab * num_weighted_targets)


def run_head(what: str, is_small: bool) -> dict[str, Any]:
    """Seconds of the loss alone, forward and backward, and peak memory beyond hidden states and weight."""
    import torch

    from shared.config import TrainConfig
    from shared.head import Float32Head

    on_cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_cuda else ("cpu", torch.float32)
    num_targets, hidden_size = (2048, 256) if is_small and not on_cuda else (4096, 896)
    max_logits_bytes = TrainConfig().logits_bytes(device)
    loss_and_gradients(what, Float32Head(8, 64, device=device, dtype=dtype), 4, max_logits_bytes)()
    head = Float32Head(hidden_size, HEAD_ROWS, bias=False, device=device, dtype=dtype)
    work = loss_and_gradients(what, head, num_targets, max_logits_bytes)
    synchronize()
    before = torch.cuda.memory_allocated() if on_cuda else resident_bytes()
    work()
    synchronize()
    peak = peak_bytes()
    keep_memory()
    started = time.perf_counter()
    work()
    synchronize()
    return {
        "seconds": time.perf_counter() - started, "extra_bytes": peak - before, "targets": num_targets,
        "hidden_size": hidden_size, "vocabulary": HEAD_ROWS, "dtype": str(dtype),
    }  # fmt: skip


def loss_and_gradients(what: str, head: Any, num_targets: int, max_logits_bytes: int) -> Any:
    """A function that works out the weighted loss of random targets and its gradients, and drops them."""
    import torch
    import torch.nn.functional as F

    from shared.head import LogitTransform
    from stage2_train.weighted_head import weighted_cross_entropy

    hidden = torch.empty(num_targets, head.in_features, device=head.weight.device, dtype=head.weight.dtype).normal_()
    hidden.requires_grad_()
    targets = torch.randint(0, head.out_features, (num_targets,), device=hidden.device)
    weights = torch.rand(num_targets, device=hidden.device)

    def ours() -> Any:
        arguments = targets, lambda _, part: weights[part], LogitTransform(), max_logits_bytes
        return weighted_cross_entropy(head, hidden, *arguments)[0]

    def naive() -> Any:
        logits = F.linear(hidden, head.weight, head.bias).float()
        return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()

    def work() -> None:
        (ours if what == HEADS[0] else naive)().backward()
        hidden.grad = None
        head.zero_grad()

    return work


def synchronize() -> None:
    """Wait for what is queued on a GPU."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def resident_bytes() -> int:
    """Memory in use on the device that trains."""
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _of_status("VmRSS")


def peak_bytes() -> int:
    """The most that was in use so far."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _of_status("VmHWM")


def _of_status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


def summarise(about: dict[str, Any], rounds: list[dict[str, Any]], heads: dict[str, Any]) -> dict[str, Any]:
    """Medians over the rounds, ratios of ways within each round, and whether goals are met."""
    on_cuda = about["device"] != "cpu"
    ways = {}
    for way in rounds[0]:
        found = ways[way] = {
            name: statistics.median(figures[way][name] for figures in rounds) if isinstance(value, float) else value
            for name, value in rounds[0][way].items()
        }
        if on_cuda:
            found["mfu"] = found["tokens_per_second"] * found["flops_per_token"] / H100_FLOPS
    ratios = {}
    for name, (ours, theirs, least) in RATIOS.items():
        if ours in ways and theirs in ways:
            found = [r[ours]["tokens_per_second"] / r[theirs]["tokens_per_second"] for r in rounds]
            ratios[name] = {"median": statistics.median(found), "lowest": min(found), "highest": max(found),
                            "goal": least, "met": least is None or statistics.median(found) >= least}  # fmt: skip
    head = heads[HEADS[0]]["extra_bytes"] / heads[HEADS[1]]["extra_bytes"]
    return {
        **{name: ratio["median"] for name, ratio in ratios.items()}, "head_memory_over_naive": head,
        **({"mfu": ways["sft"]["mfu"]} if on_cuda and "sft" in ways else {}),
        "ratios": ratios, "ways": ways, "heads": heads, "rounds": len(rounds), **about,
    }  # fmt: skip


def show(summary: dict[str, Any]) -> None:
    """The figures as tables."""
    s = summary
    print(f"{s['command']}\n{s['device']}, {s['threads']} threads, torch {s['torch']}, TRL {s['trl']}; "
          f"{s['shape']}: {s['parameters']:,} parameters; {s['rows']} rows, {s['row_tokens']:,} tokens, "
          f"{s['row_targets']:,} targets; {s['batch_size']} rows a step, {s['steps_a_round']} steps a round, "
          f"{s['rounds']} rounds")  # fmt: skip
    for way, found in s["ways"].items():
        facts = [f"{found['dropped']:.1%} of targets dropped"] if "dropped" in found else []
        facts += [f"{found['attention']}, rows of {found['row_tokens']}"] if "attention" in found else []
        facts += [f"MFU {found['mfu']:.3f}"] if "mfu" in found else []
        rate, peak = found["tokens_per_second"], found["peak_bytes"] / MEBIBYTE
        print(f"  {way:<24} {rate:>10,.0f} tokens/s  {peak:>9,.0f} MiB  {', '.join(facts)}")
    for name, ratio in s["ratios"].items():
        spread = f"{ratio['lowest']:.3f} to {ratio['highest']:.3f}"
        print(f"  {name:<34} {ratio['median']:.3f}  ({spread})  {goal_of(ratio['goal'], ratio['met'])}")
    for way in ("prift_mass", "prift_prob"):
        if {way, way + REFERENCE} <= s["ways"].keys():
            saved = s["ways"][way + REFERENCE]["peak_bytes"] - s["ways"][way]["peak_bytes"]
            print(f"  peak memory that {way} saves: {saved / MEBIBYTE:,.0f} MiB; the reference's weights: "
                  f"{s['reference_bytes'] / MEBIBYTE:,.0f} MiB ({verdict(saved >= s['reference_bytes'])})")  # fmt: skip
    one = s["heads"][HEADS[0]]
    print(f"loss alone: {one['targets']} targets of width {one['hidden_size']}, {HEAD_ROWS:,} rows, {one['dtype']}")
    for head, found in s["heads"].items():
        print(f"  {head:<24} {found['extra_bytes'] / MEBIBYTE:>10,.0f} MiB  {found['seconds']:>8.2f} s")
    share = s["head_memory_over_naive"]
    print(f"  {'head_memory_over_naive':<34} {share:.3f}  goal: at most {MOST_HEAD_MEMORY} "
          f"({verdict(share <= MOST_HEAD_MEMORY)})")  # fmt: skip


def goal_of(least: float | None, is_met: bool) -> str:
    """What a ratio should be, and whether it is."""
    return "" if least is None else f"goal: at least {least} ({verdict(is_met)})"


def verdict(is_met: bool) -> str:
    """In a word."""
    return "met" if is_met else "MISSED"


if __name__ == "__main__":
    main()
