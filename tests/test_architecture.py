"""What may import what, read from the source: the directions, and the rules for code that is copied to the Hub."""

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import run_python
from packaging.requirements import Requirement
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

import longclip_hf.errors
import modeling_longclip
from longclip_hf.conversion.folder import CODE_FILES
from modeling_longclip.configuration_longclip import AUTO_MAP

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "modeling_longclip"

# Folder -> what it may import of the project, itself aside. The floor of everything above is `longclip_hf`.
DIRECTIONS = {
    "modeling_longclip": set(),
    "longclip_hf": {"modeling_longclip"},
    "conversion": {"modeling_longclip", "longclip_hf"},
    "evaluation": {"modeling_longclip", "longclip_hf"},
    "training": {"modeling_longclip", "longclip_hf", "evaluation"},
    "search": {"modeling_longclip", "longclip_hf", "evaluation"},
    "examples": {"modeling_longclip", "longclip_hf", "conversion", "training", "evaluation", "search"},
    "benchmarks": {"modeling_longclip", "longclip_hf", "conversion", "training", "evaluation", "search", "examples"},
}
INSTALLED = (
    "conversion",
    "evaluation",
    "search",
    "training",
)  # folder X is imported as longclip_hf.X, and by no other name
# Module -> modules of the project that it must not import: mathematics never touches the process group.
PURE = {
    "training/losses.py": {"training.gathering", "training.trainer"},
    "training/components.py": {"training.gathering", "training.trainer"},
}
FACADE = ROOT / "longclip_hf" / "__init__.py"
HUB_REQUIREMENTS = {"torch", "transformers", "packaging"}


def files_of(*folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


SOURCE = files_of(*DIRECTIONS)
HUB_FILES = [file for file in files_of("modeling_longclip") if file.name != "__init__.py"]
every_source = pytest.mark.parametrize("file", SOURCE, ids=name_of)
every_hub_file = pytest.mark.parametrize("file", HUB_FILES, ids=name_of)


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imported(file: Path) -> Iterator[str]:
    """Full names of what `file` imports anywhere, inside functions too: `a.b.c` for `from a.b import c`."""
    package = file.parent.relative_to(ROOT).parts
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            yield from (".".join(filter(None, (base, node.module, alias.name))) for alias in node.names)


def modules(file: Path) -> Iterator[str]:
    """As `imported`, but by folders: `training.losses` for `longclip_hf.training.losses`."""
    for name in imported(file):
        below = name.removeprefix("longclip_hf.")
        yield below if below.split(".")[0] in INSTALLED else name


def tops(file: Path) -> set[str]:
    return {module.split(".")[0] for module in modules(file)}


def relative(file: Path) -> list[ast.ImportFrom]:
    return [node for node in ast.walk(parse(file)) if isinstance(node, ast.ImportFrom) and node.level]


@every_source
def test_directions(file: Path) -> None:
    own = name_of(file).split("/")[0]
    project = set(DIRECTIONS) | {"tests", "conftest", "hub_server"}
    if file != FACADE:  # which shows what all of them have, and imports it when it is first used
        assert tops(file) & project <= DIRECTIONS[own] | {own}


@pytest.mark.parametrize("file", files_of(*DIRECTIONS, "tests"), ids=name_of)
def test_no_module_exists_twice(file: Path) -> None:
    """A folder's own name would be a second copy of its modules, and a user may call a package of theirs so."""
    assert not {name.split(".")[0] for name in imported(file)} & set(INSTALLED)


@pytest.mark.parametrize(("module", "forbidden"), PURE.items(), ids=list(PURE))
def test_mathematics_is_apart(module: str, forbidden: set[str]) -> None:
    assert not [name for name in modules(ROOT / module) if name.startswith(tuple(forbidden))]


@pytest.mark.parametrize("file", files_of("longclip_hf", *INSTALLED), ids=name_of)
def test_errors_have_one_root(file: Path) -> None:
    """Public ones stand in one file, below `LongCLIPError`. What is private never leaves its module."""
    classes = [node for node in ast.walk(parse(file)) if isinstance(node, ast.ClassDef)]
    errors = [node for node in classes if node.name.endswith("Error") and not node.name.startswith("_")]
    assert bool(errors) == (file.name == "errors.py")
    for node in errors:
        assert issubclass(getattr(longclip_hf.errors, node.name), longclip_hf.LongCLIPError)
    bases = {ast.unparse(base) for node in classes for base in node.bases if not node.name.startswith("_")}
    assert not bases & {"Exception", "ValueError", "RuntimeError"} or file.name == "errors.py"


@every_source
def test_imports_are_absolute_but_on_the_hub(file: Path) -> None:
    """A module that is run by its path has no package to be relative to."""
    if file.parent != PACKAGE:
        assert not relative(file)


@every_source
def test_nothing_private_of_transformers(file: Path) -> None:
    theirs = [name for name in modules(file) if name.split(".")[0] == "transformers"]
    assert not [name for name in theirs if any(part.startswith("_") for part in name.split(".")[1:])]
    # The class that transformers 5.6 removed.
    assert not [name for name in theirs if name.endswith("CLIPTextTransformer")]


class TestHubCopies:
    """transformers copies the files by regular expressions and flattens them."""

    @every_hub_file
    def test_only_flat_siblings(self, file: Path) -> None:
        for node in relative(file):
            assert node.level == 1 and node.module is not None, "only `from .sibling import X` is found"
            assert (PACKAGE / f"{node.module}.py").is_file()

    @every_hub_file
    def test_the_regular_expressions_see_the_imports(self, file: Path) -> None:
        """All of them, and no line of a docstring that looks like one."""
        siblings = {node.module for node in relative(file)}
        assert set(get_relative_imports(file)) == siblings

    @every_hub_file
    def test_requirements(self, file: Path) -> None:
        """Every other import would be asked of everybody who loads a checkpoint; on the Hub there is no package."""
        siblings = {f"modeling_longclip.{node.module}.{name.name}" for node in relative(file) for name in node.names}
        outside = {name.split(".")[0] for name in set(modules(file)) - siblings}
        assert outside - set(sys.stdlib_module_names) <= HUB_REQUIREMENTS
        assert set(get_imports(file)) == outside, "nothing hides in a `try`"

    def test_what_is_saved_again_is_what_was_written(self) -> None:
        """A conversion copies `CODE_FILES`; saving a loaded model copies what its module reaches."""
        model = PACKAGE / "modeling_longclip.py"
        reached = {model.name} | {Path(name).name for name in get_relative_import_files(model)}
        assert reached == {file.name for file in CODE_FILES} == {file.name for file in HUB_FILES}

    def test_auto_map_names_what_is_there(self) -> None:
        for place in AUTO_MAP.values():
            module, name = place.split(".")
            assert f"{module}.py" in {file.name for file in CODE_FILES}
            assert getattr(modeling_longclip, name).__module__ == f"modeling_longclip.{module}"


@pytest.mark.parametrize("file", files_of("modeling_longclip", "conversion"), ids=name_of)
def test_numbers_of_the_paper_stand_once(file: Path) -> None:
    tree = parse(file)
    # 2**20 bytes are a mebibyte.
    powers = {
        id(node.right) for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow)
    }
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in powers]
    numbers = [node.value for node in constants if type(node.value) is int]
    home = file.name == "defaults.py"
    assert [number for number in numbers if number in (20, 77, 248)] == ([20, 77] if home else [])


@pytest.mark.parametrize("file", files_of("modeling_longclip", "longclip_hf", *INSTALLED), ids=name_of)
def test_versions_of_transformers_are_known_in_one_place(file: Path) -> None:
    tree = parse(file)
    attributes = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == "__version__"
        and isinstance(node.value, ast.Name)
        and node.value.id == "transformers"
    ]
    asked = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith("version")
        and any(isinstance(argument, ast.Constant) and argument.value == "transformers" for argument in node.args)
    ]
    imported = [name for name in modules(file) if name == "transformers.__version__"]
    assert bool(attributes or asked or imported) == (file.name == "compat.py")


# Commands. `load_check.py` is run by one of them, in a process that knows nothing of the project.
SCRIPTS = [
    file
    for file in files_of("conversion", "training", "evaluation", "search")
    if "__main__" in file.read_text() and file.name != "load_check.py"
]


@pytest.mark.parametrize("file", SCRIPTS, ids=name_of)
def test_a_script_shows_its_help_without_heavy_imports(file: Path) -> None:
    module = "longclip_hf." + name_of(file).removesuffix(".py").replace("/", ".")
    loaded = run_python(f"import sys, {module}; print(*sorted(sys.modules))", cwd=ROOT, fresh=True).split()
    assert module in loaded
    assert not {"torch", "transformers", "numpy", "huggingface_hub"} & set(loaded)


def test_no_module_is_named_after_a_dependency() -> None:
    """A script that is run from the folder of such a module would import it instead."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lines = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    required = {Requirement(line).name for text in lines for line in text.strip().splitlines()}
    taken = {re.sub(r"[-.]", "_", name).lower() for name in required} | {"pil", "yaml", "numpy", "sklearn"}
    taken |= {name.lower() for name in sys.stdlib_module_names}
    names = {file.stem: name_of(file) for file in [*SOURCE, *files_of("tests")]}
    assert {stem: name for stem, name in names.items() if stem.lower() in taken} == {}


def test_every_script_is_a_command_that_explains_itself() -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lines = parser["options.entry_points"]["console_scripts"].strip().splitlines()
    commands = dict(re.split(r"\s*=\s*", line) for line in lines)
    targets = {f"longclip_hf.{name_of(file).removesuffix('.py').replace('/', '.')}:main" for file in SCRIPTS}
    assert set(commands.values()) == targets
    for command in commands:
        script = Path(sys.executable).with_name(command)
        done = subprocess.run([script, "--help"], capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0 and command in done.stdout, done.stderr
