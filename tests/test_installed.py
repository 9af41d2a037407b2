"""The wheel as users get it, built of what the sdist holds and installed outside the checkout."""

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from modeling_longclip import __version__

# One process builds and installs, for all of this file.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("installed")]

ROOT = Path(__file__).parents[1]
OURS = {"longclip_hf", "modeling_longclip"}
SHIPPED = ("conversion", "evaluation", "longclip_hf", "modeling_longclip", "search", "training")
BESIDE = ("LICENSE", "MANIFEST.in", "README.md", "model_card.md", "pyproject.toml", "setup.cfg", "setup.py")


def commands() -> dict[str, str]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    pairs = (line.split("=") for line in parser["options.entry_points"]["console_scripts"].strip().splitlines())
    return {name.strip(): target.strip() for name, target in pairs}


def run(words: Sequence[str | Path], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Without what the tests' own process was given to find the checkout."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env={**kept, **env},
        capture_output=True, text=True, check=False, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done


class Installed:
    """The sdist, the wheel, and an environment of the wheel alone that borrows the dependencies of this one."""

    def __init__(self, folder: Path) -> None:
        source = folder / "source"
        for name in SHIPPED:
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in BESIDE:
            shutil.copy(ROOT / name, source)
        self.sdist = self.built("sdist", source, folder / "dist")
        with tarfile.open(self.sdist) as archive:
            archive.extractall(folder, filter="data")
        self.wheel = self.built("wheel", folder / self.sdist.name.removesuffix(".tar.gz"), folder / "dist")

        venv.create(folder / "env", with_pip=False)
        self.bin = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.bin / "python"
        asked = run([self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder)
        self.site = Path(asked.stdout.strip())
        self.pip("--python", self.python, "install", self.wheel)
        self.top = {path.name for path in self.site.iterdir()}
        (self.site / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n", encoding="utf-8")

        # What a user's folder may hold: each would break an import if we took it for ours.
        self.packages, self.modules = folder / "packages", folder / "modules"
        self.modules.mkdir()
        for name in ("conversion", "evaluation", "search", "training"):
            (self.packages / name).mkdir(parents=True)
            for file in (self.packages / name / "__init__.py", self.modules / f"{name}.py"):
                file.write_text("raise RuntimeError('the user\\'s own')\n", encoding="utf-8")

    def built(self, kind: str, source: Path, output: Path) -> Path:
        code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(output)!r}))"
        return output / run([sys.executable, "-W", "ignore", "-c", code], source).stdout.split()[-1]

    def pip(self, *words: str | Path) -> None:
        first = words[: words.index("install") + 1]
        options = ("--quiet", "--no-deps", "--no-index", "--ignore-installed", "--disable-pip-version-check")
        run([sys.executable, "-m", "pip", *first, *options, *words[len(first) :]], self.wheel.parent)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"))


def test_names_at_the_top(installed: Installed) -> None:
    """Nothing else that could be in the way of a user's own."""
    assert {name for name in installed.top if not name.endswith(".dist-info")} == OURS
    with zipfile.ZipFile(installed.wheel) as wheel:
        assert {name.split("/")[0] for name in wheel.namelist()} == OURS | {f"longclip_hf-{__version__}.dist-info"}


def test_every_file_is_there(installed: Installed) -> None:
    """What is committed below the shipped folders, in the wheel; and the template of the card in the package."""
    with zipfile.ZipFile(installed.wheel) as wheel:
        held = set(wheel.namelist())
    places = {name: name if name in OURS else f"longclip_hf/{name}" for name in SHIPPED}
    expected = {
        f"{places[name]}/{file.relative_to(ROOT / name).as_posix()}"
        for name in SHIPPED
        for file in (ROOT / name).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {name for name in held if ".dist-info/" not in name} == expected | {"longclip_hf/model_card.md"}


def test_commands_explain_themselves_beside_a_users_own_packages(installed: Installed) -> None:
    """`PYTHONPATH=. longclip-train` where the user has a folder `training/`, or a file `training.py`."""
    asked = [(name, "--help", installed.packages) for name in commands()]
    asked += [(name, "--version", installed.modules) for name in commands()]

    def said(name: str, word: str, folder: Path) -> str:
        return run([installed.bin / name, word], folder, PYTHONPATH=".").stdout

    with ThreadPoolExecutor(2) as pool:
        for (name, word, _), text in zip(asked, pool.map(lambda words: said(*words), asked), strict=True):
            assert text == f"{name} {__version__}\n" if word == "--version" else f"usage: {name}" in text


EVERY_OPTION = """
import argparse, contextlib, io, sys
from importlib import import_module

def parser_of(main):
    found = []
    argparse.ArgumentParser.print_help = lambda self, file=None: found.append(self)
    with contextlib.suppress(SystemExit):
        main(["--help"])
    return found[0]

for target in sys.argv[1:]:
    module, _, name = target.partition(":")
    parser = parser_of(getattr(import_module(module), name))
    for action in parser._actions:
        action.required = False
        if not action.option_strings:
            action.nargs = "*"
    options = [word for word in parser._option_string_actions if word.startswith("--")]
    for option in options:
        for spelling in {"--" + option[2:].replace("_", "-"), "--" + option[2:].replace("-", "_")}:
            said = io.StringIO()
            with contextlib.suppress(SystemExit), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                _, unknown = parser.parse_known_args([spelling])
                assert not unknown, (parser.prog, unknown)
            # What is wrong, if anything, is that its value is missing.
            assert "error" not in said.getvalue() or "expected" in said.getvalue(), said.getvalue()
    print(parser.prog, len(options))
"""


def test_every_option_is_understood_with_both_dashes(installed: Installed) -> None:
    said = run([installed.python, "-c", EVERY_OPTION, *commands().values()], installed.packages).stdout
    counts = dict(line.split() for line in said.strip().splitlines())
    assert set(counts) == set(commands())
    assert all(int(count) >= 6 for count in counts.values()), counts


FACADE = """
import sys
import longclip_hf
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
for name in dir(longclip_hf):
    getattr(longclip_hf, name)
import modeling_longclip
print(longclip_hf.__file__)
print(*dir(longclip_hf))
print(*dir(modeling_longclip))
"""
SHOWN = {"LongCLIPModel", "LongCLIPTrainer", "LongCLIPTrainingArguments", "stretch", "convert", "primary_components",
         "primary_component_loss", "retrieval_ranks", "Encoder", "load_benchmark", "LongCLIPError"}  # fmt: skip
CLASSES = {"LongCLIPConfig", "LongCLIPModel", "LongCLIPTextConfig", "LongCLIPTextModel"}


def test_public_names(installed: Installed) -> None:
    """Importing costs nothing; each name loads when it is first used, and is shown before that."""
    file, names, classes = run([installed.python, "-c", FACADE], installed.packages).stdout.strip().splitlines()[-3:]
    assert Path(file).is_relative_to(installed.site)
    assert set(names.split()) >= SHOWN and 20 <= len(names.split()) <= 40
    assert set(classes.split()) >= CLASSES | {"LongCLIPTextModelWithProjection"}


STRETCH = """
import sys
import longclip_hf
from longclip_hf.conversion.stretch import main
print(longclip_hf.__file__)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("layout", ["environment", "prefix"])
def test_stretch_finds_its_template(layout: str, installed: Installed, clip_folder: Path, tmp_path: Path) -> None:
    """Also where `--prefix`, and with it `--user` and Debian's Python, put the package: not below `sys.prefix`."""
    words = [clip_folder, "--output", tmp_path / "long"]
    if layout == "environment":
        run([installed.bin / "longclip-stretch", *words], installed.packages, PYTHONPATH=".")
    else:
        installed.pip("install", "--prefix", tmp_path / "there", installed.wheel)
        (site,) = (file.parents[1] for file in (tmp_path / "there").rglob("longclip_hf/__init__.py"))
        done = run([installed.python, "-c", STRETCH, *words], installed.packages, PYTHONPATH=str(site))
        assert done.stdout.splitlines()[0] == str(site / "longclip_hf" / "__init__.py")
    card = (tmp_path / "long" / "README.md").read_text(encoding="utf-8")
    assert "library_name: transformers" in card and (tmp_path / "long" / "model.safetensors").is_file()


def test_the_template_is_beside_its_package_with_target_too(installed: Installed, tmp_path: Path) -> None:
    installed.pip("install", "--target", tmp_path, installed.wheel)
    assert (tmp_path / "longclip_hf" / "model_card.md").read_bytes() == (ROOT / "model_card.md").read_bytes()
    assert {path.name for path in tmp_path.iterdir() if not path.name.endswith(".dist-info")} == OURS | {"bin"}
