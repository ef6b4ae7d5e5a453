"""What pyproject.toml declares is what the package imports, no more and no less."""

import re
import sys
from pathlib import Path

import pytest
from test_layers import imports

# A package whose import has another name.
DISTRIBUTIONS = {"PIL": "pillow", "starlette": "fastapi"}  # FastAPI is made of Starlette
# Declared and not imported here: (package) → reason.
BEHIND_OTHERS = {
    "protobuf": "sentencepiece's classes of a model are made by it, and sentencepiece does not declare it",
    "python-multipart": "FastAPI reads forms with it, and does not declare it",
}
OF_DEVELOPERS = {"test", "tools", "browser", "dev"}


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-") for requirement in requirements}


def test_what_is_declared_is_imported_and_the_other_way_round():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: names(of) for name, of in project["optional-dependencies"].items() if name not in OF_DEVELOPERS}
    declared = names(project["dependencies"]).union(*extras.values())
    packages = {found.imported for found in imports() if not (found.ours or found.for_types)} - sys.stdlib_module_names
    imported = {DISTRIBUTIONS.get(name, name).lower().replace("_", "-") for name in packages}
    assert imported - declared == set(), "imported, but not declared"
    assert declared - imported == BEHIND_OTHERS.keys(), "declared, but not imported"
