"""Builds the site of mkdocs.yml: the documents as they lie in the checkout, and a reference of all public names.

    make site

The documents link to each other and to files beside them, as on GitHub: so all tracked files but weights and tests go
into the folder that mkdocs reads. Every public name of `longclip_hf` is on a page of the reference. Warnings are
errors.
"""

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE, PACKAGES = ROOT / "build" / "site-source", ROOT / "build" / "site-packages"
LEFT_OUT = ("tests/", ".ci/", "examples/scenes/clip/")
# Page -> title, and where its names are at home.
PAGES = {
    "models": ("Models", ("modeling_longclip",)),
    "conversion": ("Stretch and convert", ("longclip_hf.conversion",)),
    "training": ("Train", ("longclip_hf.training",)),
    "evaluation": ("Evaluate", ("longclip_hf.evaluation", "longclip_hf.results", "longclip_hf.errors")),
    "search": ("Search", ("longclip_hf.search",)),
}


def copy_documents() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    for name in filter(None, tracked.stdout.split("\0")):
        if not name.startswith(LEFT_OUT) and (ROOT / name).is_file():
            target = SOURCE / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)


def copy_packages() -> None:
    """As they are installed: in the checkout, folders of `longclip_hf` lie elsewhere."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    placed = dict(line.split(" = ") for line in setup["options"]["package_dir"].strip().splitlines())
    for package in setup["options"]["packages"].split():
        target = PACKAGES / package.replace(".", "/")
        shutil.copytree(ROOT / placed.get(package, package), target, ignore=shutil.ignore_patterns("__pycache__"))


def write_reference() -> None:
    sys.path.insert(0, str(PACKAGES))
    from longclip_hf import _HOMES

    homes = {name: home for name, home in _HOMES.items() if not name.startswith("_")}
    left = set(homes)
    (SOURCE / "reference").mkdir()
    for page, (title, modules) in PAGES.items():
        names = sorted((n for n, home in homes.items() if home.startswith(modules)), key=str.lower)
        left -= set(names)
        lines = [f"# {title}", "", "Import them from `longclip_hf`: `from longclip_hf import " + names[0] + "`.", ""]
        lines += [f"::: {_path(homes[name], name)}" for name in names]
        (SOURCE / "reference" / f"{page}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if left:
        sys.exit(f"on no page of the reference: {', '.join(sorted(left))}")


def _path(home: str, name: str) -> str:
    """Where mkdocstrings finds a name: the facade loads lazily, which no static reader sees."""
    module, _, there = home.partition(":")
    if module == "modeling_longclip":
        module += ".configuration_longclip" if name.endswith("Config") else ".modeling_longclip"
    return f"{module}.{there or name}"


if __name__ == "__main__":
    for folder in (SOURCE, PACKAGES):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    copy_documents()
    copy_packages()
    write_reference()
    command = [sys.executable, "-P", "-m", "mkdocs", "build", "--strict", "--clean", "--quiet"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    sys.exit(subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode)
