"""Write sbom.cdx.json: what is installed beside this package, by cyclonedx-py, without where it was installed from.

Usage: python .ci/sbom.py OUTPUT
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run cyclonedx-py on the environment of this interpreter."""
    output = Path(sys.argv[1])
    pyproject = str(REPOSITORY / "pyproject.toml")
    options = ["--pyproject", pyproject, "--short-PURLs", "--output-reproducible", "--of", "JSON", sys.executable]
    done = subprocess.run(
        [sys.executable, "-m", "cyclonedx_py", "environment", *options], check=True, capture_output=True, text=True
    )
    content = json.loads(done.stdout)
    noticed = licences_of(REPOSITORY / "NOTICE")
    for component in content["components"]:
        without_its_origin(component)
        name = component["name"].lower().replace("_", "-")
        if not component.get("licenses") and name in noticed:
            # Metadata with a licence in words, and no expression and no classifier: cyclonedx-py leaves it out.
            component["licenses"] = [{"license": {"acknowledgement": "declared", "name": noticed[name]}}]
    output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def without_its_origin(component: dict[str, Any]) -> None:
    """Leave out the place that a package was installed from (PEP 610): it says something of a machine, not of it."""
    references = component.get("externalReferences", [])
    component["externalReferences"] = [it for it in references if not it.get("comment", "").startswith("PackageSource")]


def licences_of(notice: Path) -> dict[str, str]:
    """Name of a package to its licence, as NOTICE lists them."""
    return dict(re.findall(r"^  ([a-z0-9-]+) {2,}(.+)$", notice.read_text(encoding="utf-8"), re.MULTILINE))


if __name__ == "__main__":
    main()
