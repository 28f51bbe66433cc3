"""The config tree of both stages, and how a YAML file and overrides become one. Imports no torch.

Every field states its meaning and unit; unknown keys are refused with the nearest known one.
"""

import difflib
import re
from datetime import date
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from shared.rules import DEFAULT_COLUMNS, METHODS, RULE_PARAMETERS, Column, Source

RuleName = Literal[
    "sft", "prob", "mass", "prob_power", "prob_threshold", "prob_above",
    "talr", "infosft", "entropy", "chord", "deft", "idft",
]  # fmt: skip

DEEPSPEED_KEYS_OF_TRAIN = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_tokens",
    "gradient_accumulation_steps": "train.batch_size and train.micro_batch_tokens",
    "managed_gradient_accumulation": "nothing: the trainer owns the step's boundary",
    "gradient_allreduce_op": "nothing: the loss is normalised over the whole batch",
    "gradient_clipping": "train.gradient_clipping",
    "optimizer": "train.learning_rate, train.weight_decay and train.adam_*",
    "scheduler": "train.schedule and train.warmup_ratio",
    "bf16": "train.dtype",
    "fp16": "train.dtype (float16 training is not offered)",
}
"""DeepSpeed keys that the trainer writes itself, and what to set instead."""


DEEPSPEED_KEYS_OF_THE_USER = (
    "activation_checkpointing", "aio", "checkpoint", "comms_logger", "communication_data_type", "csv_monitor",
    "data_types", "dump_state", "flops_profiler", "gradient_predivide_factor", "memory_breakdown",
    "prescale_gradients", "steps_per_print", "tensorboard", "torch_autocast", "wall_clock_breakdown", "wandb",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
)  # fmt: skip
"""Sections of DeepSpeed's config that `train.deepspeed` may hold. DeepSpeed itself ignores a misspelt one."""


VLLM_KEYS_OF_SCORE = {
    "model": "prior.model",
    "revision": "prior.revision",
    "trust_remote_code": "prior.trust_remote_code",
    "dtype": "prior.dtype",
    "max_model_len": "data.max_length",
    "max_num_batched_tokens": "score.batch_tokens",
    "tensor_parallel_size": "score.tensor_parallel",
    "runner": "nothing: the prior runs as a pooling model",
    "convert": "nothing: the prior runs as a pooling model",
    "enable_prefix_caching": "nothing: a cached prefix has no statistics",
    "skip_tokenizer_init": "nothing: the engine sees token ids only",
    "additional_config": "nothing: it carries the columns to the workers",
    "load_format": "nothing: only safetensors are read",
}
"""Arguments of `vllm.LLM` that the vLLM engine sets itself, and what to set instead."""


VLLM_KEYS_OF_THE_USER = (
    "attention_backend", "attention_config", "compilation_config", "disable_custom_all_reduce", "disable_log_stats",
    "distributed_executor_backend", "enforce_eager", "gpu_memory_utilization", "kv_cache_memory_bytes", "max_num_seqs",
    "safetensors_load_strategy",
)  # fmt: skip
"""Arguments of `vllm.LLM` that `score.vllm` may hold: how the prior runs, never what it is. The identity of a store
does not name them."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class ColumnsConfig(_Strict):
    """Names of the columns (JSON fields) that the data is read from."""

    id: str | None = None
    """The user's row id; None takes `row_id` or `id` where there is one."""
    messages: str | None = None
    """A conversation: a list of {role, content, ...}, or of {from, value} (ShareGPT). None takes `messages`,
    `conversations` or `conversation`, whichever is there."""
    tools: str = "tools"
    """Tool definitions, passed to the chat template: a list, or the JSON text of one; optional in every row."""
    system: str = "system"
    """ShareGPT, Alpaca: the system's text; optional in every row."""
    prompt: str = "prompt"
    """What comes before the completion: text, or messages."""
    completion: str = "completion"
    """What is trained on: text, or messages."""
    instruction: str = "instruction"
    """Alpaca: what is asked."""
    input: str = "input"
    """Alpaca: what the instruction speaks of; optional in every row."""
    output: str = "output"
    """Alpaca: the response, which is trained on."""
    history: str = "history"
    """Alpaca: earlier turns, pairs of what was asked and the response, trained on too; optional in every row."""
    text: str = "text"
    """Plain text."""
    input_ids: str = "input_ids"
    """Token ids, for data that is tokenised already."""
    target_mask: str = "target_mask"
    """1 or true where the token is a target; as long as `input_ids`."""


class HubConfig(_Strict):
    """A data set of the hub, in place of `data.path` (the extra `hub`)."""

    id: str | None = None
    """Such as openai/gsm8k."""
    config: str | None = None
    """Which of its configurations, where it has several."""
    split: str = Field(default="train", min_length=1)
    """Which of its splits."""
    revision: str | None = None
    """Commit, tag or branch; the commit that it means is recorded, and a resume goes on with it."""


class DataConfig(_Strict):
    """What is scored: where it lies, how a row becomes token ids, and which of them are targets."""

    path: str | tuple[str, ...] | None = None
    """JSONL, JSONL.gz or Parquet: a file, a URL (s3, gs, hf), a glob, or a list of them. Or give `hub.id`."""
    hub: HubConfig = HubConfig()
    format: Literal[
        "auto", "messages", "sharegpt", "prompt_completion", "prompt_messages", "alpaca", "text", "tokens"
    ] = "auto"
    """What a row holds, see docs/data.md; `auto` looks at the first row and prints its choice."""
    columns: ColumnsConfig = ColumnsConfig()
    template: Literal["auto", "chat", "chat_prompt", "plain"] = "auto"
    """How text becomes ids. `plain`: BOS + prompt + completion + EOS, encoded apart. `chat`: the model's chat
    template. `chat_prompt`: the prompt through the chat template, then completion + EOS (the paper's form).
    `auto`: `chat` for conversations, `chat` for Alpaca and `chat_prompt` for prompts where the tokenizer has a
    template, else `plain`; text is always `plain`."""
    template_arguments: dict[str, Any] = {}
    """Extra variables for the chat template, such as {enable_thinking: false}."""
    template_date: str = "2024-07-26"
    """The day that a chat template is told is today, so that the ids do not change overnight."""
    targets: Literal["completion", "last_turn", "all"] = "completion"
    """Which tokens are trained on: all assistant turns, the last one only, or every token but the first."""
    split_turns: bool = True
    """A conversation whose turns the chat template renders otherwise once others follow (Qwen3 leaves earlier thinking
    out) becomes a row for each trained turn, in the context in which it is generated; false: it is dropped."""
    max_length: int = Field(default=2048, ge=2)
    """Longest row in tokens."""
    overlong: Literal["drop", "truncate", "error"] = "drop"
    """What happens to a longer row; truncation cuts on the right."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first so many rows of the source."""

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if self.path is not None and self.hub.id is not None:
            raise ValueError(f"data.path={self.path} and data.hub.id={self.hub.id} are given: expected one of them")
        return self

    @field_validator("template_date")
    @classmethod
    def _is_a_day(cls, value: str) -> str:
        try:
            date.fromisoformat(value)
        except ValueError:
            raise ValueError(f"data.template_date={value!r}: expected a day such as 2024-07-26") from None
        return value


class PriorConfig(_Strict):
    """The frozen pretrained model whose support is measured."""

    model: str | None = None
    """A local folder or a hub id. Required by `prift-score`. Only safetensors weights are read."""
    revision: str | None = None
    """Commit, tag or branch of a hub id; the commit it resolves to is recorded."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights; `auto` is float32 on a CPU and bfloat16 on CUDA. The head is always float32 out."""
    compute_dtype: Literal["auto", "weights", "float64", "float64_products"] = "auto"
    """Dtype of the forward pass. `weights`: that of the weights. `float64` (transformers): exact to about 2e-6, at half
    the speed and twice the memory of float32, which is off by up to 5e-5. `float64_products` (vLLM): matrix products
    in float64, all else in float32, off by about 1e-5. `auto`: the last two for float32 weights on a CPU."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: such models are refused."""


class ScoreConfig(_Strict):
    """How the prior is run, and where its numbers go."""

    output: str | None = None
    """Folder of the score store, or a URL (s3, gs). Required by `prift-score`."""
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """What runs the prior. `auto`: what the store began with; else vLLM on CUDA where it is installed and knows the
    model, and transformers elsewhere."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    batch_tokens: int = Field(default=16384, ge=16)
    """Tokens of a forward pass, padding included. transformers: a longer row goes alone; vLLM: it goes in pieces."""
    padding_free: Literal["auto"] | bool = "auto"
    """transformers: rows laid end to end, variable-length attention. `auto`: on CUDA, for the models that allow it."""
    logits_mebibytes: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """No logits tensor is larger than so many MiB (one row of logits at least). `auto`: 1024 on CUDA, where a product
    of fewer rows is slow; 64 on a CPU."""
    columns: tuple[Column, ...] = DEFAULT_COLUMNS
    """Statistics to store; `entropy_top20` and `collision` serve the rules `entropy` and `deft`."""
    shard_rows: int = Field(default=2048, ge=1, le=1 << 24)
    """Source rows of a shard, the unit of resuming and of what workers share; fixed once the store is begun. A killed
    run loses at most the shards it was in."""
    rehash: bool = False
    """Hash the data files again on a resume; else size and modification time are compared."""
    extend: bool = False
    """Score the rows that the data gained since the store was made; what it holds stays as it is."""
    workers: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Processes that score shards side by side. `auto`: one for each visible GPU (for each `tensor_parallel` of them);
    one on a CPU; with ray, as many as the cluster has GPUs for."""
    tensor_parallel: int = Field(default=1, ge=1)
    """vLLM: GPUs that share one copy of the model. More than 1 only where the model does not fit into one."""
    part: str | None = None
    """`K/N`: score the shards i with i mod N = K only, K from 0; for job arrays on a shared file system, any order."""
    launcher: Literal["local", "ray"] = "local"
    """What starts the workers: processes of this machine, or Ray actors (the extra `ray`)."""
    ray_address: str | None = None
    """Address of a Ray cluster, or `auto`; None starts Ray on this machine."""
    vllm: dict[str, Any] = {}
    """Arguments of `vllm.LLM` that say how it runs, such as gpu_memory_utilization; those that would change the prior
    are refused."""

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        for key in self.vllm.keys() & VLLM_KEYS_OF_SCORE.keys():
            raise ValueError(f"score.vllm.{key} is set by the engine; set {VLLM_KEYS_OF_SCORE[key]} instead")
        for key in self.vllm.keys() - set(VLLM_KEYS_OF_THE_USER):
            near = difflib.get_close_matches(key, VLLM_KEYS_OF_THE_USER, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"score.vllm.{key} is not one of the arguments that leave the numbers as they are; the nearest of "
                f"those is score.vllm.{near}"
            )
        if self.ray_address is not None and self.launcher != "ray":
            raise ValueError(f"score.ray_address={self.ray_address} is given, but score.launcher is {self.launcher}")
        if self.part is not None:
            if not re.fullmatch(r"\d+/[1-9]\d*", self.part):
                raise ValueError(f"score.part={self.part}: expected K/N, such as 0/8 for the first of eight parts")
            index, count = map(int, self.part.split("/"))
            if index >= count:
                raise ValueError(f"score.part={self.part}: parts count from 0, so the last is {count - 1}/{count}")
        return self

    @model_validator(mode="after")
    def _has_logprob(self) -> Self:
        if "logprob" not in self.columns or len(set(self.columns)) != len(self.columns):
            raise ValueError(f"score.columns must hold logprob, and each name once; got {list(self.columns)}")
        return self

    def logits_bytes(self, device: str) -> int:
        """`logits_mebibytes` resolved for a device, cpu or cuda, in bytes."""
        return _logits_bytes(self.logits_mebibytes, device)


def _logits_bytes(mebibytes: int | Literal["auto"], device: str) -> int:
    return (mebibytes if mebibytes != "auto" else 1024 if device == "cuda" else 64) << 20


class WeightingConfig(_Strict):
    """The weight of a target, from its statistics. A parameter left out takes the rule's default."""

    rule: RuleName | None = None
    """Name of the rule; `train.method` may name it instead."""
    source: Source | None = None
    """`prior`: the stored statistics. `online`: those of the model in training, detached."""
    threshold: float | None = Field(default=None, gt=0, le=1)
    """mass: the smallest u = 1 - mass_rank that is kept, a probability."""
    alpha: float | None = Field(default=None, gt=0)
    """prob_power, entropy: exponent."""
    min_prob: float | None = Field(default=None, gt=0, le=1)
    """prob_threshold, prob_above: smallest probability that is kept."""
    max_prob: float | None = Field(default=None, gt=0.5, lt=1)
    """infosft: probability from which on the weight is 0; above 0.5, where its logit is positive."""
    beta: float | None = Field(default=None, gt=0)
    """idft: temperature."""
    lo: float | None = Field(default=None, gt=0)
    """idft: smallest exponent."""
    hi: float | None = Field(default=None, gt=0)
    """idft: largest exponent."""
    floor: float | None = Field(default=None, ge=0, le=1)
    """Any rule: no weight is smaller than this. talr: its own floor, 0.01 unless given."""
    stop_token_weight: float | None = Field(default=None, ge=0)
    """Weight of stop tokens in place of the rule's; None leaves them to the rule, as the paper does."""


class LoraConfig(_Strict):
    """LoRA (arXiv 2106.09685): matrices A and B are trained for some of the weights, which are frozen."""

    rank: int = Field(default=16, ge=1)
    """Rows of A and columns of B."""
    alpha: float = Field(default=32.0, gt=0)
    """`alpha / rank * B A` is added to a weight."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (arXiv 2312.03732)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the inputs of A that is set to zero in training."""
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """Which weights: those of all linear modules but the head, or a list of names, or of their last parts: [q_proj]."""
    export: Literal["adapter", "merged"] = "adapter"
    """What `model/` holds: A and B, for `PeftModel.from_pretrained`, or (`merged`) a plain model that they are added
    to."""


class StoreShare(_Strict):
    """One of several stores that a run draws from."""

    store: str
    """Folder of the score store."""
    weight: float | None = Field(default=None, gt=0)
    """Its share of the examples, in proportion to the other weights; None, for all of them: each row once an epoch."""


def _as_shares(scores: Any) -> Any:
    """One folder, or folders without weights, in the form of the list."""
    listed = () if scores is None else (scores,) if isinstance(scores, str) else scores
    if not isinstance(listed, list | tuple):
        raise ValueError(f"train.scores={scores!r}: expected a folder, or a list of folders or of {{store, weight}}")
    return tuple({"store": each} if isinstance(each, str) else each for each in listed)


class TrainConfig(_Strict):
    """One training run from score stores."""

    scores: Annotated[tuple[StoreShare, ...], BeforeValidator(_as_shares)] = ()
    """Folder or URL of the score store, which training requires; or a list of them, or of {store, weight}."""
    eval_scores: str | dict[str, str] | None = None
    """Score stores to evaluate on: a folder or URL, or names and folders."""
    eval_steps: int = Field(default=0, ge=0)
    """Evaluate after every so many steps; 0: before the first and after the last step only."""
    model: str | None = None
    """Folder or hub id of the model to train; None takes the prior that scored the store."""
    model_revision: str | None = None
    """Revision of a hub id."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: such models are refused."""
    output: str | None = None
    """Folder of the run. None: `runs/` and the run's name, or `runs/train`."""
    cache_dir: str | None = None
    """Node-local folder for the memory-mapped copy of the store; None: `~/.cache/prift`."""
    method: Literal["sft", "dft", "prift_prob", "prift_mass"] | None = None
    """The paper's names: sft, dft = prob/online, prift_prob = prob/prior, prift_mass = mass/prior."""
    weighting: WeightingConfig = WeightingConfig()
    normalize_by: Literal["targets", "kept", "weights", "micro_batch"] = "targets"
    """What sum(weight * nll) is divided by: the targets of the global batch, those of non-zero weight, the sum
    of weights; or the mean over targets of each micro-batch, then the mean over micro-batches (the authors')."""
    batch_size: int = Field(default=64, ge=1)
    """Examples of an optimizer step, over all ranks."""
    micro_batch_tokens: int = Field(default=8192, ge=16)
    """Tokens of a micro-batch on one rank, padding included; a longer example goes alone."""
    padding_free: Literal["auto"] | bool = "auto"
    """Examples laid end to end, variable-length attention. `auto`: for the models that allow it."""
    sequence_parallel: int = Field(default=1, ge=1)
    """Ranks that share each micro-batch, a part of its tokens each (Ulysses): for examples too long for one GPU.
    They together hold so many times `micro_batch_tokens`."""
    logits_mebibytes: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """No logits tensor of the training loss is larger than so many MiB (one row of logits at least). `auto`: 1024 on
    CUDA, 64 on a CPU."""
    nll_every: int = Field(default=16, ge=1)
    """Targets of weight zero skip the head, but for one of so many, from which the plain nll in the log is estimated
    (`nll_sampled`). 1: none skips it, and `nll` is exact, for a third of the head's work on those targets."""
    micro_batch_examples: int | None = Field(default=None, ge=1)
    """Most examples of a micro-batch; the authors use 4."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the rows; the last partial batch of each is dropped."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many optimizer steps, whichever comes first."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order of examples, and of what LoRA begins with."""
    lora: LoraConfig | None = None
    """None: all parameters are trained. Else only those that LoRA adds (the extra `lora`)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` is bfloat16 on CUDA (with float32 master weights) and float32 on a CPU."""
    learning_rate: float = Field(default=5e-5, gt=0)
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """After warm-up: half a cosine that would reach 0 one step after the last, constant, or wsd (warm-up, stable,
    decay): constant, then a straight line that would reach 0 one step after the last."""
    decay_ratio: float = Field(default=0.1, ge=0, le=1)
    """wsd: share of the steps over which the learning rate falls."""
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises linearly."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay, on all parameters that are trained."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's decay of the mean of gradients."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's decay of the mean of squared gradients."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's addend to the denominator."""
    gradient_clipping: float = Field(default=1.0, ge=0)
    """Largest norm of the gradient; 0 does not clip."""
    gradient_checkpointing: bool | Literal["offload"] = False
    """Recompute activations in the backward pass: less memory, about a third more work. `offload`: what is kept of
    each layer, its input, waits in host memory."""
    deterministic: bool = False
    """Only operations that give the same bits each time, so that a resumed run on CUDA ends with the same weights; some
    are slower. On a CPU runs are so without it."""
    max_nonfinite_steps: int = Field(default=0, ge=0)
    """Steps of the run whose loss or gradient may be not finite before it stops; their rows are named."""
    timeout_seconds: int = Field(default=600, ge=5)
    """A rank that lets the others wait for so long ends the run; a dead one ends it at once."""
    checkpoint_steps: int = Field(default=500, ge=1)
    """Save a checkpoint after every so many steps, after the last, and when SIGTERM, SIGUSR1 or Ctrl-C comes."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """The newest so many checkpoints are kept."""
    resume: str = "auto"
    """`auto`: from the newest checkpoint of `train.output`. `never`: refuse a folder that holds a run. Else the
    path of a checkpoint, for one start: those of later steps are removed."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """What else gets each line of metrics.jsonl and eval.jsonl: tensorboard, wandb (the extra `tracking`)."""
    tracking_project: str = Field(default="prift", min_length=1)
    """wandb: the project that the run stands in."""
    deepspeed: dict[str, Any] = {}
    """DeepSpeed's own config, passed on verbatim but for the keys that the trainer writes."""

    @model_validator(mode="after")
    def _rule_has_its_parameters(self) -> Self:
        rule, _ = self.rule_and_source()
        given = self.weighting.model_dump(exclude={"rule", "source", "floor", "stop_token_weight"}, exclude_none=True)
        for name in given:
            if rule is None or name not in RULE_PARAMETERS[rule]:
                takes = sorted(RULE_PARAMETERS[rule]) if rule else []
                raise ValueError(
                    f"train.weighting.{name}={given[name]} is given, but rule {rule} takes {takes or 'no parameter'}"
                )
        for name, default in RULE_PARAMETERS[rule].items() if rule else ():
            if default is None and name not in given:
                raise ValueError(f"rule {rule} has no default for train.weighting.{name}: give it")
        lo, hi = self.weighting.lo or 0.1, self.weighting.hi or 2.0
        if rule == "idft" and lo > hi:
            raise ValueError(f"train.weighting.lo={lo} is above train.weighting.hi={hi}")
        return self

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if len(set(self.trackers)) != len(self.trackers):
            raise ValueError(f"train.trackers must hold each name once; got {list(self.trackers)}")
        if self.schedule == "wsd" and self.warmup_ratio + self.decay_ratio > 1:
            raise ValueError(
                f"train.warmup_ratio={self.warmup_ratio} and train.decay_ratio={self.decay_ratio} make more than 1"
            )
        if self.sequence_parallel > 1 and self.padding_free is False:
            raise ValueError("train.sequence_parallel needs packed micro-batches, but train.padding_free is false")
        if self.normalize_by == "micro_batch" and self.micro_batch_examples is None:
            raise ValueError(
                "train.normalize_by=micro_batch needs train.micro_batch_examples, which is None (the authors use 4)"
            )
        for key in self.deepspeed.keys() & DEEPSPEED_KEYS_OF_TRAIN.keys():
            raise ValueError(
                f"train.deepspeed.{key} is written by the trainer; set {DEEPSPEED_KEYS_OF_TRAIN[key]} instead"
            )
        for key in self.deepspeed.keys() - set(DEEPSPEED_KEYS_OF_THE_USER):
            near = difflib.get_close_matches(key, DEEPSPEED_KEYS_OF_THE_USER, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown key train.deepspeed.{key}; the nearest known one is train.deepspeed.{near}")
        stage = self.zero_stage()
        if stage not in (0, 1, 2, 3):
            raise ValueError(f"train.deepspeed.zero_optimization.stage must be 0, 1, 2 or 3; got {stage!r}")
        return self

    @model_validator(mode="after")
    def _stores_agree(self) -> Self:
        for share in self.scores:
            if [other.store for other in self.scores].count(share.store) > 1:
                raise ValueError(f"train.scores names {share.store} twice: give it the sum of both weights")
        without = [share.store for share in self.scores if share.weight is None]
        if without and len(without) < len(self.scores):
            raise ValueError(f"train.scores gives {without[0]} no weight, but others: give all of them one, or none")
        return self

    def logits_bytes(self, device: str) -> int:
        """`logits_mebibytes` resolved for a device, cpu or cuda, in bytes."""
        return _logits_bytes(self.logits_mebibytes, device)

    def zero_stage(self) -> Any:
        """The ZeRO stage asked for; 1 where none is."""
        zero = self.deepspeed.get("zero_optimization", {})
        return zero.get("stage", 1) if isinstance(zero, dict) else zero

    def rule_and_source(self) -> tuple[str | None, Source]:
        """The rule and its source, from `method` and `weighting` together.

        Raises:
            ValueError: they contradict each other.
        """
        rule, source = self.weighting.rule, self.weighting.source
        if self.method is not None:
            preset = METHODS[self.method]
            for name, ours, theirs in (("rule", rule, preset[0]), ("source", source, preset[1])):
                if ours not in (None, theirs):
                    raise ValueError(
                        f"train.method={self.method} means {name} {theirs}, but train.weighting.{name}={ours}; "
                        "give one of them"
                    )
            return preset
        return rule, source or "prior"


class Config(_Strict):
    """A pipeline: one prior, one data set, one score store, and the runs that train from it."""

    data: DataConfig = DataConfig()
    prior: PriorConfig = PriorConfig()
    score: ScoreConfig = ScoreConfig()
    train: TrainConfig = TrainConfig()
