import json
import random
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "data"
DEMO = DATA / "demo"
SUM = re.compile(r"(\d+)([+*-])(\d+)=(\d+)")


@pytest.fixture(scope="module")
def load():
    """Imports a module of data/, which are scripts: they find each other in their own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DATA))
        yield import_module


def read_rows(name):
    return [json.loads(line) for line in (DEMO / name).read_text().splitlines()]


def find_flaw(completion):
    """The flaw of a completion, judged from its lines alone; None where every sum is true and they chain."""
    *lines, last = completion.split("\n")
    results, wrong = [], []
    for line in lines:
        match = SUM.fullmatch(line)
        if match is None:
            return "garbage"
        left, operator, right, result = int(match[1]), match[2], int(match[3]), int(match[4])
        true = {"+": left + right, "-": left - right, "*": left * right}[operator]
        assert not results or left == results[-1], completion
        results.append(result)
        if result != true:
            wrong.append(result)
    assert last == f"#### {results[-1]}", completion
    return "wrong" if wrong else None


def test_data_made_anew_equals_the_committed_files(load):
    for name, content in load("make_demo").make_data_files().items():
        assert (DEMO / name).read_bytes() == content, name


def test_check_passes_and_names_a_changed_file(tmp_path):
    shutil.copytree(DATA, tmp_path / "data")
    command = [sys.executable, str(tmp_path / "data" / "make_demo.py"), "--check"]
    assert subprocess.run(command).returncode == 0
    with open(tmp_path / "data" / "demo" / "heldout.jsonl", "a") as file:
        file.write("\n")
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (3, "differs: heldout.jsonl\n")


def test_every_file_of_the_demo_has_a_checksum(load):
    make_demo = load("make_demo")
    files = {path.relative_to(DEMO).as_posix() for path in DEMO.rglob("*") if path.is_file()}
    assert files - {"SHA256SUMS"} == set(make_demo.read_checksums())
    assert make_demo.find_differences() == []


def test_half_of_the_training_rows_are_spoilt():
    flaws = [find_flaw(row["completion"]) for row in read_rows("train.jsonl")]
    shares = {flaw: flaws.count(flaw) / len(flaws) for flaw in (None, "wrong", "garbage")}
    assert shares == {None: 0.5, "wrong": 0.4, "garbage": 0.1}


def test_heldout_solutions_are_sound_and_end_in_the_answer():
    for row in read_rows("heldout.jsonl"):
        assert find_flaw(row["completion"]) is None
        assert row["completion"].endswith(f"\n#### {row['answer']}")


def test_heldout_and_training_share_no_prompt():
    train, heldout = ({row["prompt"] for row in read_rows(name)} for name in ("train.jsonl", "heldout.jsonl"))
    assert len(train) == 2400
    assert len(heldout) == 250
    assert not train & heldout


def test_slip_forgets_every_carry_and_borrow(load):
    rng = random.Random(0)
    for _ in range(200):
        demonstration = load("demo_problems").make_demonstration(rng, "slip")
        *lines, last = demonstration.completion.split("\n")
        assert last != f"#### {demonstration.answer}"
        for line in lines:
            match = SUM.fullmatch(line)
            assert match is not None
            left, operator, right, result = int(match[1]), match[2], int(match[3]), int(match[4])
            true = {"+": left + right, "-": left - right, "*": left * right}[operator]
            assert (true - result) % 10 == 0, line


def test_prior_loads_and_scores_its_own_text_as_recorded(load):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "prior")
    model = AutoModelForCausalLM.from_pretrained(DEMO / "prior", use_safetensors=True).eval()
    recorded = json.loads((DEMO / "pretraining.json").read_text())["prior_text_nll"]
    nll = load("demo_prior").measure_nll(model, tokenizer, read_rows("prior_text.jsonl"))
    assert nll == pytest.approx(recorded, abs=1e-3)


def test_tokenizer_trained_anew_equals_the_committed_one(load, tmp_path):
    load("demo_prior").train_tokenizer(load("make_demo").SEED).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == (DEMO / "prior" / "tokenizer.json").read_text()


def test_tokenizer_reads_digits_singly_and_loses_nothing():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "prior")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("36+45=81")) == list("36+45=81")
    for row in read_rows("train.jsonl")[:100]:
        text = row["prompt"] + row["completion"]
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template) == ("<s>", "</s>", None)
