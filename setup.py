"The package's metadata lives in settings.ini; nbdev's in pyproject.toml."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

settings = ConfigParser(delimiters=["="])
settings.read("settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]
lib = cfg["lib_path"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license=cfg["license"],
    python_requires=">=" + cfg["min_python"],
    packages=[*find_packages(include=[lib, lib + ".*"]), lib + ".data"],
    package_dir={lib + ".data": "data"},
    package_data={lib + ".data": ["*", "**/*"]},
    install_requires=cfg["requirements"].split(),
    extras_require={extra: cfg[extra + "_requirements"].split() for extra in ("dev", "docs", "test")},
    entry_points={
        "console_scripts": [f"sdalab={lib}.cli:main"],
        "nbdev": [f"{lib}={lib}._modidx:d"],
    },
)
