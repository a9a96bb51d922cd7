"What a user installs: the wheel holds every module and every data file, and works away from the checkout."
import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = "sdalab", "data"
SETTINGS = "settings.ini", "setup.py", "pyproject.toml", "README.md"

PROBE = """
import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import sdalab
assert sdalab.__file__.startswith(sys.argv[1]), sdalab.__file__
assert sys.argv[2] not in sys.path
for module in pkgutil.walk_packages(sdalab.__path__, "sdalab."):
    if not module.name.endswith("__main__"): importlib.import_module(module.name)
from sdalab.checked import data_file
for name in sys.argv[3:]:
    path = data_file(name)
    assert str(path).startswith(sys.argv[1]), path
print("fine")
"""


def shipped(folder, pattern="*"):
    "The files of a folder that a wheel should hold, relative to it."
    found = (p.relative_to(folder) for p in folder.rglob(pattern) if p.is_file())
    return sorted(p.as_posix() for p in found if not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts))


def settings():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel of a copy of the checkout: no leftovers of earlier builds, and none left here."
    copy, made = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES: shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in SETTINGS: shutil.copy(ROOT / name, copy)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", made, copy)
    return next(made.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    "A folder with the wheel's content, installed by pip."
    target = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)
    return target


def run(*command, **options):
    "Run a command; show what it said when it fails."
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_every_module_and_data_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"sdalab/{name}" for name in shipped(ROOT / "sdalab", "*.py")}
    wanted |= {f"sdalab/data/{name}" for name in shipped(ROOT / "data")}
    assert wanted - names == set()


def test_the_wheel_holds_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if not name.startswith("sdalab/") and ".dist-info/" not in name] == []


def test_the_wheel_states_version_requirements_and_command(wheel):
    archive, cfg = zipfile.ZipFile(wheel), settings()
    folder = f"sdalab-{cfg['version']}.dist-info"
    metadata = archive.read(f"{folder}/METADATA").decode()
    assert f"Requires-Python: >={cfg['min_python']}" in metadata
    assert metadata.count("Requires-Dist: ") == sum(len(cfg[key].split()) for key in cfg if key.endswith("requirements"))
    assert "sdalab = sdalab.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()


def test_it_works_away_from_the_checkout(installed, tmp_path):
    assert run(sys.executable, "-I", "-c", PROBE, installed, ROOT, *shipped(ROOT / "data"), cwd=tmp_path) == "fine\n"
