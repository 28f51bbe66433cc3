"""What a publication rests on: the notice, the citation, the bill of materials, the wheel."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from launching import free_port

WORDS_OF = {
    "Apache-2.0": "apache", "MIT": "mit", "BSD-3-Clause": "bsd", "MPL-2.0": "mpl",
    "LicenseRef-Matplotlib": "matplotlib",
}  # fmt: skip
"""What the metadata of a package says in some words where NOTICE names a licence."""


def requirements(repository: Path) -> dict[str, str]:
    """Names of what pyproject.toml asks for, extras included, to the requirement."""
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    given = [*project["dependencies"], *(each for extra in extras for each in extra)]
    names = {re.split(r"[\[<>=;~! ]", each)[0].lower(): each for each in given}
    return {name: each for name, each in names.items() if name != "prift"}


def noticed(repository: Path) -> dict[str, str]:
    """Names to licences, as NOTICE lists them."""
    return dict(re.findall(r"^  ([a-z0-9-]+) {2,}(.+)$", (repository / "NOTICE").read_text(), re.MULTILINE))


def test_notice_names_every_dependency(repository: Path):
    missing = requirements(repository).keys() - noticed(repository).keys()
    assert not missing, f"NOTICE lacks {sorted(missing)}"


def test_notice_agrees_with_what_the_packages_say(repository: Path):
    checked = 0
    for name, licence in noticed(repository).items():
        try:
            metadata = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        said = " ".join(
            it for field in ("License-Expression", "License", "Classifier") for it in metadata.get_all(field) or []
            if field != "Classifier" or it.startswith("License")
        )  # fmt: skip
        if not said:  # a distribution that only carries the text of its licence
            continue
        word = WORDS_OF[licence.split()[0]]
        assert word in said.lower(), (name, licence, said[:200])
        checked += 1
    assert checked >= 13  # at least what is needed at run time


def test_citation_names_the_paper(repository: Path):
    citation = yaml.safe_load((repository / "CITATION.cff").read_text())
    paper = citation["preferred-citation"]
    assert paper["title"].startswith("PriFT")
    assert paper["url"].endswith("2606.09396")
    assert [author["family-names"] for author in paper["authors"]] == ["Wang", "Li", "Salzmann", "Frossard"]
    assert citation["version"] == tomllib.loads((repository / "pyproject.toml").read_text())["project"]["version"]


def test_bill_of_materials(repository: Path, tmp_path: Path):
    output = tmp_path / "sbom.cdx.json"
    subprocess.run([sys.executable, repository / ".ci" / "sbom.py", output], check=True, timeout=300)
    text = output.read_text()
    content = json.loads(text)
    assert content["bomFormat"] == "CycloneDX"
    components = {it["name"].lower().replace("_", "-"): it for it in content["components"]}
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"]:
        name = re.split(r"[\[<>=;~! ]", requirement)[0].lower()
        assert components[name]["version"] == importlib.metadata.version(name)
        assert components[name]["licenses"], name
    # It says what is installed, not where, nor where it was fetched from.
    for place in {str(repository), str(Path.home()), sys.prefix, sysconfig.get_path("purelib"), "file://"} - {"/"}:
        assert place not in text, place
    assert "PackageSource" not in text


@pytest.fixture(scope="module")
def sources(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a build reads, apart from what earlier builds left behind in the repository."""
    folder = tmp_path_factory.mktemp("sources") / "prift"
    left = shutil.ignore_patterns("build", "dist", "runs", "*.egg-info", "__pycache__", ".*cache", ".venv", ".git")
    shutil.copytree(repository, folder, ignore=left)
    return folder


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network: its build needs setuptools only."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--sdist", "--outdir", str(folder)]
    done = subprocess.run([*command, str(sources)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path, repository: Path):
    packages = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    patterns = [f"{package}/*.py" for package in packages] + ["inspection/page/*"]
    expected = {str(path.relative_to(repository)) for pattern in patterns for path in repository.glob(pattern)}
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in names}
    with tarfile.open(next(wheel.parent.glob("*.tar.gz"))) as file:
        assert expected <= {name.partition("/")[2] for name in file.getnames()}


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment whose only package of its own is the wheel; it sees the dependencies installed here."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    (own,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth is put on the path as it is: the .pth files there, of an editable install, are not read.
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_wheel_scores_verifies_and_trains_in_an_empty_folder(installed: Path, repository: Path, tmp_path: Path):
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE")
    }
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path / "home")}

    def run(*words: str | Path) -> str:
        command = [str(word) for word in words]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = run(installed, "-c", "import shared, inspection; print(shared.__file__, inspection.__file__)").split()
    assert all(Path(path).is_relative_to(installed.parents[1]) for path in where), where
    shutil.copytree(repository / "data" / "demo", tmp_path / "data" / "demo")
    shutil.copy(repository / "pipeline.yaml", tmp_path)
    commands = installed.parent
    small = ["pipeline.yaml", "data.limit=8", "score.output=store", "score.engine=transformers", "score.device=cpu"]
    run(commands / "prift-score", *small)
    assert "8 rows" in run(commands / "prift-inspect", "verify", "store")
    run(commands / "prift-inspect", "report", "store", "-o", "report.html")
    training = [
        "stage2_train.train", "pipeline.yaml", "train.scores=store", "train.method=prift_prob", 
        "train.batch_size=4", "train.max_steps=1", "train.eval_scores=null", "train.cache_dir=cache",
    ]  # fmt: skip
    launchers = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=1", "--module"],
        "deepspeed": ["deepspeed.launcher.runner", "--num_gpus=1", f"--master_port={free_port()}", "--module"],
    }
    for name, launcher in launchers.items():
        run(installed, "-m", *launcher, *training, f"train.output={name}")
        (line,) = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        assert json.loads(line)["step"] == 1
        assert (tmp_path / name / "model" / "config.json").is_file()
