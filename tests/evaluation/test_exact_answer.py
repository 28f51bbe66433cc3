import json
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.exact_answer import Problem, evaluate, extract_answer, main, read_problems, wilson_interval

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "data" / "demo"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("4*6=24\n24-9=15\n#### 15", 15),
        ("#### 15\n", 15),
        ("####15", 15),
        ("#### -3", -3),
        ("#### 007", 7),
        ("1+2=3\n#### 3\nSums:\n#### 9", 3),
        ("1+2=3\n####", None),
        ("1+2=3", None),
        ("", None),
        ("#### plums", None),
        ("#### 4 plums", None),
        ("#### 4.5", None),
        ("### 15", None),
        ("The answer is #### 15", None),
        ("####\n15", None),
    ],
)
def test_answer_is_the_integer_of_the_first_answer_line(text, answer):
    assert extract_answer(text) == answer


def test_planted_generator_with_37_of_100_right_counts_37():
    problems = [Problem(f"p{i}", f"prompt {i}", i) for i in range(100)]

    def generate(prompts):
        texts = []
        for i, prompt in enumerate(prompts):
            assert prompt == f"prompt {i}"
            wrong = ["", f"#### {i + 1}", f"the answer is {i}", f"####\n{i}"][i % 4]
            texts.append(f"1+1=2\n#### {i}" if i < 37 else wrong)
        return texts

    samples = evaluate(problems, generate)
    assert [sample.correct for sample in samples] == [True] * 37 + [False] * 63
    assert [sample.id for sample in samples] == [problem.id for problem in problems]


def test_a_generator_that_loses_a_problem_is_refused():
    problems = [Problem("a", "1", 1), Problem("b", "2", 2)]
    with pytest.raises(ValueError):
        evaluate(problems, lambda prompts: ["#### 1"])


@pytest.mark.parametrize(("num_correct", "num_problems"), [(37, 100), (1, 4), (249, 250)])
def test_wilson_ends_are_the_shares_that_lie_two_sided_95_percent_away(num_correct, num_problems):
    share = num_correct / num_problems
    low, high = wilson_interval(num_correct, num_problems)
    assert low < share < high
    for end in (low, high):
        assert abs(share - end) == pytest.approx(1.959964 * (end * (1 - end) / num_problems) ** 0.5)


def test_wilson_interval_holds_its_ends_where_all_or_none_are_right():
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_problem_without_answer_is_named_by_line(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"id": "a", "prompt": "1+1", "answer": 2}\n{"id": "b", "prompt": "1+1"}\n')
    with pytest.raises(ValueError, match=r"line 2.*answer"):
        read_problems(path)


@pytest.mark.parametrize("missing", ["problems", "model"])
def test_missing_file_is_one_line_and_exit_code_2(tmp_path, capsys, missing):
    problems = tmp_path / "problems.jsonl"
    if missing == "model":
        problems.write_text('{"id": "a", "prompt": "1+1", "answer": 2}\n')
    assert main([str(problems), str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(problems if missing == "problems" else tmp_path / "model") in error


def test_run_folder_gets_share_and_samples(tmp_path, capsys):
    run = tmp_path / "my_run"
    run.mkdir()
    (run / "model").symlink_to(DEMO / "prior")
    lines = (DEMO / "heldout.jsonl").read_text().splitlines()[:12]
    problems = tmp_path / "problems.jsonl"
    problems.write_text("\n".join(lines) + "\n")

    assert main([str(problems), str(run / "model"), "--max-new-tokens", "40"]) == 0

    samples = [json.loads(line) for line in (run / "evaluation_samples.jsonl").read_text().splitlines()]
    assert [sample["id"] for sample in samples] == [json.loads(line)["id"] for line in lines]
    for sample in samples:
        assert sample["correct"] == (extract_answer(sample["generated"]) == sample["answer"])
    num_correct = sum(sample["correct"] for sample in samples)
    result = json.loads((run / "evaluation.json").read_text())
    assert result == {"exact_answers": num_correct / 12, "num_problems": 12}
    assert f"{num_correct}/12" in capsys.readouterr().out


def test_left_padding_changes_no_answer(tmp_path):
    """Prompts of unequal length decoded together and one by one give the same text."""
    from evaluation.exact_answer import load_generate

    prompts = ["Sums:\n12+30=", "Mia wrote on a scrap of paper:\n40-24=16\n16*3=48\n48-", "Sums:\n7*8="]
    together = load_generate(DEMO / "prior", max_new_tokens=8, batch_size=3)(prompts)
    alone = load_generate(DEMO / "prior", max_new_tokens=8, batch_size=1)(prompts)
    assert together == alone
    assert together[0].startswith("42\n")


def test_help_loads_no_torch():
    code = (
        "import sys, evaluation.exact_answer as e\n"
        "try: e.main(['--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.endswith("False\n")
