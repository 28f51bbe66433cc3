"""The transformers engine: which number belongs to which token, whatever the batches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import stage1_score.transformers_engine as engine_module
from shared.config import ScoreConfig
from shared.errors import UserError
from shared.pretrained import find_pretrained
from stage1_score.tokenization import TokenizedExample
from stage1_score.transformers_engine import TransformersEngine

COLUMNS = ("logprob", "mass_rank", "entropy", "entropy_top20", "collision")


def example(index: int, ids: list[int], targets: list[int]) -> TokenizedExample:
    return TokenizedExample(f"row-{index}", index, np.array(ids, np.int32), np.array(targets, np.int32))


def len_of(row: TokenizedExample) -> int:
    return len(row.input_ids)


def family_model(model_type: str) -> Any:
    """A tiny random model; its windows, where it has any, are shorter than the rows."""
    windows = {
        "mistral": {"sliding_window": 7},
        "gemma3_text": {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    }
    config = transformers.AutoConfig.for_model(
        model_type, vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.3,
        **windows.get(model_type, {}),
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


def random_examples(count: int = 12) -> list[TokenizedExample]:
    generator = np.random.default_rng(0)
    rows = []
    for index in range(count):
        length = int(generator.integers(2, 40))
        positions = 1 + np.flatnonzero(generator.random(length - 1) < 0.6)
        rows.append(example(index, generator.integers(0, 300, length).tolist(), positions.tolist() or [length - 1]))
    return rows


@pytest.fixture
def engine_of(prior: Path, manifest_with):
    """An engine on the tiny prior, float64 throughout; `score` keys by name."""

    def make(compute_dtype: str = "float64", **score: Any) -> TransformersEngine:
        identity = manifest_with(columns=COLUMNS, compute_dtype=compute_dtype).identity
        return TransformersEngine(find_pretrained(str(prior)), identity, "cpu", ScoreConfig(**score))

    return make


class Bigram(torch.nn.Module):
    """A causal model made by hand: the distribution of the next token is a row of a table, chosen by the last token."""

    def __init__(self, table_VV: torch.Tensor):
        super().__init__()
        vocab_size = len(table_VV)
        self.head = torch.nn.Linear(vocab_size, vocab_size, bias=False)
        self.head.weight.data = table_VV.t().clone()
        self.config = type("Config", (), {"vocab_size": vocab_size, "_attn_implementation": "none"})()
        self.config.get_text_config = lambda: self.config

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head

    def base_model(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        hidden = torch.nn.functional.one_hot(input_ids, self.head.in_features).to(self.head.weight.dtype)
        return type("Output", (), {"last_hidden_state": hidden})()

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        logits = self.head(self.base_model(input_ids, use_cache).last_hidden_state)
        return type("Output", (), {"logits": logits})()


def test_value_i_is_about_token_i_given_the_token_before(prior: Path, manifest_with, monkeypatch):
    """Written out by hand: token v is followed by v + 1 with probability 0.7, by v + 2 with 0.2, by the rest evenly."""
    vocab_size = 6
    table = torch.full((vocab_size, vocab_size), 0.1 / (vocab_size - 2), dtype=torch.float64)
    for token in range(vocab_size):
        table[token, (token + 1) % vocab_size] = 0.7
        table[token, (token + 2) % vocab_size] = 0.2
    monkeypatch.setattr(engine_module, "load_causal_lm", lambda files, dtype: Bigram(table.log()))
    engine = TransformersEngine(find_pretrained(str(prior)), manifest_with().identity, "cpu", ScoreConfig())
    rows = engine.score(
        [example(0, [0, 1, 3, 2, 3], [1, 2, 3, 4]), example(1, [5, 0], [1]), example(2, [4, 5, 1], [2])]
    )
    #        0->1  1->3  3->2          2->3
    expected = [[0.7, 0.2, 0.1 / 4, 0.7], [0.7], [0.2]]
    above = [[0.0, 0.7, 0.9, 0.0], [0.0], [0.7]]
    for row, probabilities, masses in zip(rows, expected, above, strict=True):
        np.testing.assert_allclose(np.exp(row.statistics["logprob"]), probabilities, rtol=1e-6)
        np.testing.assert_allclose(row.statistics["mass_rank"], masses, rtol=1e-6, atol=1e-7)
    assert [row.target_positions.tolist() for row in rows] == [[1, 2, 3, 4], [1], [2]]


def test_scores_are_those_of_the_model_itself(engine_of, prior: Path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(prior).double()
    for row in engine_of().score(random_examples()):
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
        with torch.no_grad():
            logp = model(ids).logits[0].log_softmax(-1)
        for place, position in enumerate(row.target_positions):
            before, token = logp[position - 1], row.input_ids[position]
            assert row.statistics["logprob"][place] == pytest.approx(before[token].item(), abs=1e-6)
            assert row.statistics["mass_rank"][place] == pytest.approx(
                before[before > before[token]].exp().sum().item(), abs=1e-6
            )
            assert row.statistics["entropy"][place] == pytest.approx(-(before.exp() * before).sum().item(), abs=1e-6)


def test_what_comes_after_a_token_does_not_change_its_value(engine_of):
    engine = engine_of()
    ids = list(range(50, 70))
    whole = engine.score([example(0, ids, list(range(1, 20)))])[0].statistics
    changed = engine.score([example(0, ids[:10] + [7] * 10, list(range(1, 20)))])[0].statistics
    for column in COLUMNS:
        np.testing.assert_array_equal(whole[column][:9], changed[column][:9])
    assert (whole["logprob"][9:] != changed["logprob"][9:]).all()


def test_batches_and_padding_do_not_change_the_numbers(engine_of):
    examples = random_examples()
    alone = [engine_of(batch_tokens=16).score([each])[0] for each in examples]
    for batch_tokens, mebibytes in [(16, 1), (120, 1), (100_000, 64)]:
        engine = engine_of(batch_tokens=batch_tokens, logits_mebibytes=mebibytes)
        together = engine.score(examples)
        assert [row.row_id for row in together] == [each.row_id for each in examples]
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one.target_positions, other.target_positions)
            for column in COLUMNS:
                # Equal but for one rounding to float32: float64 leaves no more.
                np.testing.assert_allclose(one.statistics[column], other.statistics[column], rtol=2e-7, atol=1e-9)
                assert other.statistics[column].dtype == np.float32


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_packing_does_not_change_the_numbers(prior: Path, manifest_with, monkeypatch, family: str):
    monkeypatch.setattr(engine_module, "load_causal_lm", lambda files, dtype: family_model(family).to(dtype))
    identity, files = manifest_with(columns=COLUMNS).identity, find_pretrained(str(prior))
    examples = random_examples()
    padded = TransformersEngine(files, identity, "cpu", ScoreConfig(padding_free=False)).score(examples)
    for batch_tokens in (16, 100, 100_000):
        config = ScoreConfig(padding_free=True, batch_tokens=batch_tokens)
        packed = TransformersEngine(files, identity, "cpu", config).score(examples)
        assert [row.row_id for row in packed] == [row.row_id for row in padded]
        for one, other in zip(padded, packed, strict=True):
            for column in COLUMNS:
                np.testing.assert_allclose(one.statistics[column], other.statistics[column], rtol=1e-6, atol=1e-6)


def test_packed_rows_do_not_see_each_other(engine_of):
    engine = engine_of(padding_free=True)
    first, second = random_examples(2)
    changed = example(0, ((first.input_ids + 100) % 300).tolist(), first.target_positions.tolist())
    for order in (slice(None), slice(None, None, -1)):
        before = {row.row_id: row for row in engine.score([first, second][order])}
        after = {row.row_id: row for row in engine.score([changed, second][order])}
        for column in COLUMNS:
            np.testing.assert_array_equal(before["row-1"].statistics[column], after["row-1"].statistics[column])
        assert (before["row-0"].statistics["logprob"] != after["row-0"].statistics["logprob"]).all()


def test_packed_batches_count_real_tokens(engine_of):
    examples = random_examples()
    engine = engine_of(batch_tokens=80, padding_free=True)
    batches = engine.batches(examples)
    lengths = [[len(examples[index].input_ids) for index in batch] for batch in batches]
    assert all(len(batch) == 1 or sum(batch) <= 80 for batch in lengths)
    assert any(len(batch) * max(batch) > 80 for batch in lengths if len(batch) > 1)
    assert [length for batch in lengths for length in batch] == sorted(map(len_of, examples), reverse=True)
    batch = engine.batch_of([examples[index] for index in batches[0]])
    assert batch.input_ids_BT.shape == (1, sum(lengths[0]))
    assert engine.forward(batch)["logprob"].shape == (len(batch.target_ids_N),)


def test_packing_is_told_in_the_description(engine_of):
    assert engine_of(padding_free=True).describe()["attention"] == "prift_packed"
    assert engine_of(padding_free="auto").describe()["attention"] == "sdpa"


def test_a_model_that_cannot_be_packed(prior: Path, manifest_with, monkeypatch, capsys):
    monkeypatch.setattr(engine_module, "load_causal_lm", lambda files, dtype: family_model("gemma2"))
    identity, files = manifest_with(columns=COLUMNS).identity, find_pretrained(str(prior))
    with pytest.raises(UserError, match=r"score.padding_free=true .* type gemma2 .*; set score.padding_free=false"):
        TransformersEngine(files, identity, "cpu", ScoreConfig(padding_free=True))
    # `auto` on a GPU: it is padded, and says so.
    monkeypatch.setattr(type(family_model("gemma2")), "device", torch.device("cuda"))
    engine = TransformersEngine(files, identity, "cpu", ScoreConfig())
    assert "note: rows are padded, not packed: models of type gemma2" in capsys.readouterr().out
    assert engine.batch_of(random_examples(2)).boundaries is None


def test_batches_are_bounded_and_longest_first(engine_of):
    examples = random_examples()
    batches = engine_of(batch_tokens=80).batches(examples)
    assert sorted(index for batch in batches for index in batch) == list(range(12))
    lengths = [[len(examples[index].input_ids) for index in batch] for batch in batches]
    assert all(len(batch) == 1 or len(batch) * max(batch) <= 80 for batch in lengths)
    flat = [length for batch in lengths for length in batch]
    assert flat == sorted(flat, reverse=True)


def test_no_logits_tensor_exceeds_the_bound(engine_of, monkeypatch):
    sizes = []
    whole = engine_module.logits_of_hidden

    def watched(model: Any, hidden: torch.Tensor) -> torch.Tensor:
        logits = whole(model, hidden)
        sizes.append(logits.nbytes)
        return logits

    monkeypatch.setattr(engine_module, "logits_of_hidden", watched)
    # 1,500 targets of 300 logits each are 1.8 MB in float32, 3.6 MB in float64.
    rows = [example(index, list(range(151)), list(range(1, 151))) for index in range(10)]
    engine_of(logits_mebibytes=1).score(rows)
    assert len(sizes) > 1
    assert max(sizes) <= 1 << 20


def test_progress_is_told_of_every_batch(engine_of):
    seen = []
    examples = random_examples()
    engine_of(batch_tokens=80).score(examples, lambda rows, tokens: seen.append((rows, tokens)))
    assert len(seen) > 1
    assert sum(rows for rows, _ in seen) == 12
    assert sum(tokens for _, tokens in seen) == sum(len(each.input_ids) for each in examples)


class SmallMemory:
    """Has room for a batch of so many tokens, padding included."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int):
        self.sizes: list[int] = []
        self.room, self._run = room, engine_module.hidden_states
        monkeypatch.setattr(engine_module, "hidden_states", self)

    def __call__(self, model: Any, input_ids_BT: torch.Tensor, boundaries: Any) -> torch.Tensor:
        self.sizes.append(input_ids_BT.numel())
        if input_ids_BT.numel() > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return self._run(model, input_ids_BT, boundaries)


@pytest.mark.parametrize("padding_free", [False, True])
def test_out_of_memory_halves_the_batches_from_there_on(engine_of, monkeypatch, capsys, padding_free: bool):
    examples = random_examples(30)
    expected = engine_of(padding_free=padding_free).score(examples)
    engine = engine_of(batch_tokens=400, padding_free=padding_free)
    memory, seen = SmallMemory(monkeypatch, 120), []
    found = engine.score(examples, lambda rows, tokens: seen.append((rows, tokens)))
    assert [row.row_id for row in found] == [row.row_id for row in expected]
    for one, other in zip(expected, found, strict=True):
        for column in COLUMNS:
            np.testing.assert_allclose(one.statistics[column], other.statistics[column], rtol=2e-7, atol=1e-9)
    failed = [size for size in memory.sizes if size > 120]
    assert 1 <= len(failed) <= 3
    assert capsys.readouterr().out == "".join(
        f"out of memory at {size} tokens; going on with {size // 2}\n" for size in failed
    )
    # Each row is counted once, and the next shard begins where this one ended.
    assert sum(rows for rows, _ in seen) == 30
    assert sum(tokens for _, tokens in seen) == sum(map(len_of, examples))
    memory.sizes.clear()
    engine.score(examples)
    assert max(memory.sizes) <= 120


@pytest.mark.parametrize("padding_free", [False, True])
def test_out_of_memory_in_the_middle_of_a_shard(engine_of, monkeypatch, padding_free: bool):
    """Memory that shrinks: what is done stays done."""
    examples = random_examples(30)
    expected = engine_of(padding_free=padding_free).score(examples)
    engine = engine_of(batch_tokens=100, padding_free=padding_free)
    memory = SmallMemory(monkeypatch, 100)
    done: list[int] = []

    def on_batch(rows: int, tokens: int) -> None:
        done.append(rows)
        if len(done) == 3:
            memory.room = 50

    found = engine.score(examples, on_batch)
    assert sum(done) == 30
    for one, other in zip(expected, found, strict=True):
        assert one.row_id == other.row_id
        for column in COLUMNS:
            np.testing.assert_allclose(one.statistics[column], other.statistics[column], rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("padding_free", [False, True])
def test_a_row_that_does_not_fit_alone_is_named(engine_of, monkeypatch, padding_free: bool):
    rows = [example(0, [1, 2, 3], [1]), example(1, list(range(50)), [49]), example(2, [4, 5], [1])]
    SmallMemory(monkeypatch, 40)
    with pytest.raises(
        UserError, match=r"row 'row-1' \(source_index 1\): its 50 tokens .* even alone; lower data.max_length"
    ):
        engine_of(padding_free=padding_free).score(rows)


def test_a_lost_device_is_told_with_what_to_do(engine_of, monkeypatch):
    def lost(*arguments: Any) -> torch.Tensor:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nmore lines")

    engine = engine_of()
    monkeypatch.setattr(engine_module, "hidden_states", lost)
    with pytest.raises(UserError) as caught:
        engine.score(random_examples())
    assert str(caught.value) == (
        "the device cpu was lost (CUDA error: unspecified launch failure); finished shards are kept: run the same "
        "command again"
    )


def test_nothing_to_score(engine_of):
    assert engine_of().score([]) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", COLUMNS)
def test_a_number_that_is_not_finite_names_row_and_token(engine_of, monkeypatch, column: str, bad: float):
    compute = engine_module.statistics_in_chunks

    def spoiled(*arguments: Any) -> dict[str, torch.Tensor]:
        statistics = compute(*arguments)
        statistics[column][1] = bad
        return statistics

    monkeypatch.setattr(engine_module, "statistics_in_chunks", spoiled)
    rows = [example(0, [1, 2, 3], [1, 2]), example(1, [4, 77, 5, 6], [1, 3])]
    # The longest row goes first: its second target, token 3, has the spoiled number.
    with pytest.raises(UserError, match=r"row 'row-1' \(source_index 1\): .* not finite to token 3"):
        engine_of().score(rows)


def test_float32_is_close_to_float64(engine_of):
    examples = random_examples()
    for one, other in zip(engine_of("float32").score(examples), engine_of().score(examples), strict=True):
        for column in COLUMNS:
            np.testing.assert_allclose(one.statistics[column], other.statistics[column], rtol=0, atol=2e-4)


def test_bfloat16_weights_give_float32_logits_without_ties(engine_of, prior: Path, manifest_with):
    identity = manifest_with(columns=COLUMNS, weight_dtype="bfloat16", compute_dtype="bfloat16").identity
    engine = TransformersEngine(find_pretrained(str(prior)), identity, "cpu", ScoreConfig())
    rows = engine.score(random_examples())
    values = np.concatenate([row.statistics["logprob"] for row in rows])
    # bfloat16 has 8 bits of mantissa: rounded to it, hardly any value would stay as it is.
    rounded = torch.from_numpy(values).bfloat16().float().numpy()
    assert (values != rounded).mean() > 0.9


def test_the_engine_describes_itself(engine_of):
    described = engine_of().describe()
    assert described["engine"] == "transformers"
    assert described["device"] == "cpu"
    assert described.keys() == {"engine", "transformers", "torch", "device", "attention"}
    assert all(isinstance(value, str) and value for value in described.values())


def test_an_unknown_head_is_refused(prior: Path, manifest_with, monkeypatch):
    class Doubling(Bigram):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            output = super().forward(input_ids, use_cache)
            output.logits = output.logits * 2
            return output

    monkeypatch.setattr(engine_module, "load_causal_lm", lambda files, dtype: Doubling(torch.randn(6, 6)))
    with pytest.raises(UserError, match="Doubling: its logits differ"):
        TransformersEngine(find_pretrained(str(prior)), manifest_with().identity, "cpu", ScoreConfig())


@pytest.mark.parametrize(("weights", "compute"), [("bfloat16", "bfloat16"), ("float32", "float64")])
def test_rotary_frequencies_are_never_rounded_down(prior: Path, manifest_with, weights: str, compute: str):
    """In bfloat16 the angle of position 1000 would be off by a radian."""
    identity = manifest_with().identity.model_copy(update={"weight_dtype": weights, "compute_dtype": compute})
    engine = TransformersEngine(find_pretrained(str(prior)), identity, "cpu", ScoreConfig())
    buffers = dict(engine._model.named_buffers())
    frequencies = [buffer for name, buffer in buffers.items() if name.endswith("inv_freq")]
    assert frequencies
    assert all(buffer.dtype in (torch.float32, torch.float64) for buffer in frequencies)
    assert next(engine._model.parameters()).dtype == getattr(torch, compute)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_run_in_float64(tmp_path: Path, manifest_with, model_type: str):
    config = transformers.AutoConfig.for_model(
        model_type, vocab_size=300, hidden_size=32, intermediate_size=48, moe_intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    identity = manifest_with(columns=COLUMNS, compute_dtype="float64").identity
    engine = TransformersEngine(find_pretrained(str(tmp_path)), identity, "cpu", ScoreConfig())
    assert len(engine.score(random_examples(4))) == 4


def rope_model(folder: Path, model_type: str, positions: int, rope: dict[str, Any]) -> Path:
    config = transformers.AutoConfig.for_model(
        model_type, vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=positions, pad_token_id=0, initializer_range=0.3,
        rope_parameters={"rope_theta": 10000.0, **rope},
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_rows_go_alone_where_the_rotary_frequencies_look_at_the_batch(tmp_path: Path, manifest_with):
    factors = {"short_factor": [1.0] * 4, "long_factor": [9.0] * 4, "original_max_position_embeddings": 20}
    files = find_pretrained(str(rope_model(tmp_path, "phi3", 80, {"rope_type": "longrope", **factors})))
    identity = manifest_with(columns=COLUMNS, compute_dtype="float64").identity
    engine = TransformersEngine(files, identity, "cpu", ScoreConfig())
    rows = random_examples(12)
    assert min(map(len_of, rows)) < 20 < max(map(len_of, rows))
    together = engine.score(rows)
    for row, scored in zip(rows, together, strict=True):
        (alone,) = engine.score([row])
        np.testing.assert_array_equal(alone.statistics["logprob"], scored.statistics["logprob"])


def test_a_rotary_embedding_that_remembers_longer_rows_is_refused(tmp_path: Path, manifest_with):
    files = find_pretrained(str(rope_model(tmp_path, "llama", 20, {"rope_type": "dynamic", "factor": 4.0})))
    longer = manifest_with(compute_dtype="float64", max_length=21).identity
    with pytest.raises(UserError, match=r"set data\.max_length=20"):
        TransformersEngine(files, longer, "cpu", ScoreConfig())
    TransformersEngine(files, manifest_with(compute_dtype="float64", max_length=20).identity, "cpu", ScoreConfig())
