"""The README's snippets print what they say, and its tables are true."""

import configparser
import json
import re
from pathlib import Path

import pytest
from conftest import run_python

from longclip_hf.conversion.stretch import stretch
from modeling_longclip.compat import SUPPORTED_TRANSFORMERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = README + "".join(
    (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("evaluation.md", "ecosystem.md")
)
SNIPPETS = re.findall(r"```python\n(.*?)```\s+```text\n(.*?)```", DOCUMENTS, flags=re.DOTALL)
LOADERS = re.findall(r"^\| `([^`]+\bDIR\b[^`]*)` \| `(\w+)` \|$", README, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `make demo` ran, but that its model is not fine-tuned: nothing that the README prints depends on that."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "examples").symlink_to(ROOT / "examples")
    stretch(str(ROOT / "examples" / "scenes" / "clip"), folder / "demo-output" / "longclip", dtype="float32")
    return folder


def test_every_python_snippet_has_its_printed_result() -> None:
    assert len(SNIPPETS) == DOCUMENTS.count("```python") >= 7


@pytest.mark.parametrize(("code", "printed"), SNIPPETS)
def test_snippet_prints_what_the_readme_says(code: str, printed: str, demo: Path) -> None:
    assert run_python(code, cwd=demo) == printed


def test_every_row_of_the_compatibility_table(longclip_folder: Path) -> None:
    assert len(LOADERS) >= 10
    code = f"""
import json, modeling_longclip, transformers
calls = {[call for call, _ in LOADERS]!r}
scope = dict(DIR={str(longclip_folder)!r})
for name in (call.partition("(")[0].partition(".")[0] for call in calls):
    scope[name] = getattr(modeling_longclip if name.startswith("LongCLIP") else transformers, name)
print(json.dumps([type(eval(call, scope)).__name__ for call in calls]))
"""
    given = json.loads(run_python(code).splitlines()[-1])
    assert dict(zip((call for call, _ in LOADERS), given, strict=True)) == dict(LOADERS)


def test_supported_versions_are_those_of_the_package() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert f"| transformers | {SUPPORTED_TRANSFORMERS} " in README
    assert f"| Python | {config['options']['python_requires']} |" in README
    torch = re.search(r"^torch(\S+)$", config["options"]["install_requires"], flags=re.MULTILINE)
    assert torch is not None
    assert f"| torch | {torch[1]} |" in README


@pytest.mark.parametrize("target", re.findall(r"^make ([\w-]+)", README, flags=re.MULTILINE))
def test_commands_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
