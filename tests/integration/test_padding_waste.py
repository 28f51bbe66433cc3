"""What packed steps of real data compute besides their tokens, and how evenly ranks share them."""

from pathlib import Path

import numpy as np
import pytest

from shared.load_config import load_config
from shared.padding import pack_and_shift
from stage1_score.plan import make_plan as make_scoring_plan
from stage1_score.score_shard import tokenize_shard
from stage2_train.plan import Bounds, deal, make_plan
from stage2_train.sequence_parallel import split

COLUMNS = {"gsm8k_train_2500": ("question", "answer"), "math_train_2000": ("problem", "solution")}


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("num_parts", [1, 4])
def test_less_than_one_percent_is_padding(reference: Path, tmp_path: Path, name: str, num_parts: int):
    """Eight ranks, each step of 64 examples; sequence parallel fills up to equal parts."""
    prompt, completion = COLUMNS[name]
    (tmp_path / "pipeline.yaml").write_text("data: {}\n")
    config = load_config(tmp_path / "pipeline.yaml", [
        f"data.path={reference}/data/{name}.jsonl.gz", f"data.columns.prompt={prompt}", "data.limit=640",
        f"data.columns.completion={completion}", f"prior.model={reference}/data/stories260K", "data.template=plain",
        f"score.output={tmp_path}/store",
    ])  # fmt: skip
    plan = make_scoring_plan(config, [])
    examples = [example for index in plan.missing for example in tokenize_shard(plan, index).examples]
    order = make_plan(len(examples), 64, 1, None, 0)
    bounds = Bounds(2048 * num_parts, packed=True, attention_tokens=12 * 1536)
    num_real = num_computed = 0
    slowest = []
    for step in range(1, order.num_steps + 1):
        members = [examples[row] for row in order.rows_of_step(step)]
        dealt = deal([len(member.input_ids) for member in members], 8 // num_parts, bounds)
        batches = [[pack_and_shift([members[place] for place in batch]) for batch in rank if batch] for rank in dealt]
        parts = [[split(batch, part, num_parts)[0] for batch in rank for part in range(num_parts)] for rank in batches]
        sizes = [sum(part.input_ids_BT.numel() for part in rank) for rank in parts]
        num_real += sum(len(member.input_ids) for member in members)
        num_computed += sum(sizes)
        slowest.append(max(sizes) / np.mean(sizes))
    assert num_real <= num_computed <= 1.01 * num_real
    assert np.mean(slowest) < 1.03
