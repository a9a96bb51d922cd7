"The notebooks are the source: the package is what they export, and they are committed without outputs."
import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
EXPERIMENTS = [p for p in NOTEBOOKS if p.parent.name == "experiments"]


def files(folder, pattern):
    "The files below `folder`, as a mapping from relative path to content."
    found = (p for p in folder.rglob(pattern) if not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


def code_cells(notebook):
    return [c for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


def directive(notebook, name):
    "The arguments of every `#| name` in a notebook."
    found = (re.findall(rf"^#\|\s*{name}\b[ :]*(.*)$", "".join(c["source"]), re.M) for c in code_cells(notebook))
    return [argument.strip() for cell in found for argument in cell]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    "The notebooks alone, cleaned, and exported into an empty place."
    folder = tmp_path_factory.mktemp("sync")
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name in "pyproject.toml", "settings.ini", "setup.py", "README.md": shutil.copy(ROOT / name, folder)
    for command in "nbdev-export", "nbdev-clean":
        subprocess.run([Path(sys.executable).with_name(command)], cwd=folder, check=True)
    return folder


def test_every_module_comes_from_a_notebook(fresh):
    exported, present = files(fresh / "sdalab", "*.py"), files(ROOT / "sdalab", "*.py")
    assert present.keys() - exported.keys() == set(), "modules that no notebook exports: delete them"
    assert exported.keys() - present.keys() == set(), "modules not exported yet: run nbdev-export"


def test_no_module_was_edited_by_hand(fresh):
    exported, present = files(fresh / "sdalab", "*.py"), files(ROOT / "sdalab", "*.py")
    differing = [name for name in exported if name != "__init__.py" and exported[name] != present.get(name)]
    assert differing == [], "run nbdev-export (after nbdev-update, if the module holds the newer text)"


def test_notebooks_are_clean(fresh):
    clean, committed = files(fresh / "nbs", "*.ipynb"), files(ROOT / "nbs", "*.ipynb")
    assert [name for name in clean if clean[name] != committed[name]] == [], "run nbdev-clean"


def test_notebooks_carry_no_outputs():
    assert [p.name for p in NOTEBOOKS if any(c["outputs"] for c in code_cells(p))] == []


def test_a_module_has_one_notebook():
    modules = [module for p in NOTEBOOKS for module in directive(p, "default_exp")]
    assert sorted(modules) == sorted(set(modules))


def test_chapter_numbers_are_unique():
    numbers = [re.match(r"\d+[a-z]?", p.name)[0] for p in NOTEBOOKS if p.name[0].isdigit() and p not in EXPERIMENTS]
    assert sorted(numbers) == sorted(set(numbers))


def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def test_the_version_is_the_settings_version():
    assert (ROOT / "sdalab/__init__.py").read_text() == f'__version__ = "{settings()["version"]}"\n'


def test_the_lock_satisfies_the_settings():
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    locked = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    wanted = [Requirement(text) for key, value in settings().items() if key.endswith("requirements") for text in value.split()]
    assert [str(r) for r in wanted if not r.specifier.contains(locked.get(canonicalize_name(r.name), "0"))] == [], "run make lock"


def test_experiments_take_parameters():
    tagged = {p.name: sum("parameters" in c["metadata"].get("tags", []) for c in code_cells(p)) for p in EXPERIMENTS}
    assert tagged == dict.fromkeys(tagged, 1), "papermill ignores -p without exactly one cell tagged `parameters`"


def test_experiments_export_nothing():
    assert [p.name for p in EXPERIMENTS if directive(p, "export") or directive(p, "default_exp")] == []
