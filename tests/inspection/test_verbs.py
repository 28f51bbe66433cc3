"""What all verbs promise."""

import re
import subprocess
import sys
from pathlib import Path


def test_the_help_waits_for_no_library(repository: Path):
    code = """
import argparse, sys
from inspection import diff, export, merge, show
for verb in (diff, export, merge, show):
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    assert "-h" in parser.format_help()
heavy = {"torch", "transformers", "datasets", "pyarrow", "polars", "numpy", "rich"}
print(sorted(heavy & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_stage_2(repository: Path):
    modules = sorted((repository / "inspection").rglob("*.py"))
    assert len(modules) > 5
    assert any(re.search(r"^\s*from shared\b", path.read_text(), re.MULTILINE) for path in modules)
    for path in modules:
        assert not re.search(r"^\s*(from|import) stage2_train\b", path.read_text(), re.MULTILINE), path
