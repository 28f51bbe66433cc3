"""Who may import whom, and what must not pull in torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

STAGES = {"stage1_score", "stage2_train"}


def imported_packages(path: Path) -> set[str]:
    """Top-level names that a module imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import path = folder path, no relative imports"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("shared", {*STAGES, "inspection"}),
        ("stage1_score", {"stage2_train", "inspection"}),
        ("stage2_train", {"stage1_score", "inspection"}),
        ("inspection", {"stage2_train"}),
    ],
)
def test_packages_keep_apart(repository: Path, package: str, forbidden: set[str]):
    modules = sorted((repository / package).rglob("*.py"))
    assert len(modules) > 5
    for path in modules:
        assert not imported_packages(path) & forbidden, path
    assert any("shared" in imported_packages(path) for path in modules)  # the reader of imports sees them


@pytest.mark.parametrize(
    "module",
    ["shared.config", "shared.load_config", "shared.score_store", "shared.shards", "shared.verify", "shared.cli",
     "shared.batching", "stage1_score.cli", "inspection.cli", "stage1_score.read"],
)  # fmt: skip
def test_no_torch_is_imported(repository: Path, module: str):
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'deepspeed'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_module_bears_the_name_of_a_library(repository: Path):
    taken = set(sys.stdlib_module_names) | {"torch", "transformers", "pyarrow", "polars", "yaml", "rich", "datasets"}
    # A script puts its own folder first on the path: there a module of such a name would hide the library.
    for package in ("shared", "inspection", *STAGES):
        names = {path.stem for path in (repository / package).glob("*.py")} - {"__init__"}
        # `shared.statistics` is imported by its full name only; no script lies beside it.
        assert names & taken <= ({"statistics"} if package == "shared" else set())
