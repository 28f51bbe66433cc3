"""The command `prift-score`: arguments and exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest


def test_help_is_quick_because_it_imports_nothing_heavy(repository: Path):
    code = (
        "import sys; sys.argv = ['prift-score', '--help']\n"
        "from stage1_score.cli import main\n"
        "try: main()\n"
        "except SystemExit as ended: print('exit', ended.code)\n"
        "heavy = {'torch', 'transformers', 'pyarrow', 'polars', 'numpy', 'pydantic'}\n"
        "print('heavy', sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert "usage: prift-score" in done.stdout
    assert done.stdout.splitlines()[-2:] == ["exit 0", "heavy []"]


def test_no_argument_is_exit_2(run_cli):
    outcome = run_cli("stage1_score.cli")
    assert outcome.code == 2
    assert "usage: prift-score" in outcome.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.yaml"], "nowhere.yaml: no such pipeline file"),
        (["pipeline.yaml", "data.limit"], "'data.limit': expected key=value"),
        (["pipeline.yaml", "run=any"], "run=any: "),
        (["pipeline.yaml", "data.limit=0"], "pipeline.yaml: data.limit=0: "),
        (["."], ""),
    ],
    ids=["missing", "override", "run", "value", "folder"],
)
def test_mistakes_in_the_arguments_are_one_line(call_main, tmp_path: Path, monkeypatch, words: list[str], message: str):
    from stage1_score.cli import main

    (tmp_path / "pipeline.yaml").write_text("data: {}\n")
    monkeypatch.chdir(tmp_path)
    outcome = call_main(main, ["prift-score", *words])
    assert outcome.code == 2
    assert outcome.stderr.startswith(f"prift-score: {message}")
    assert len(outcome.stderr.splitlines()) == 1


def test_a_defect_of_ours_is_not_dressed_up_as_the_users(call_main, tmp_path: Path, monkeypatch):
    import stage1_score.run
    from stage1_score.cli import main

    def broken(config: object, command: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(stage1_score.run, "run", broken)
    (tmp_path / "pipeline.yaml").write_text("data: {}\n")
    monkeypatch.setattr(sys, "argv", ["prift-score", str(tmp_path / "pipeline.yaml")])
    with pytest.raises(ZeroDivisionError, match="ours"):
        main()
