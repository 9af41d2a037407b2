"""The committed releases fit what users are promised, and name nothing that only one machine has."""

import configparser
import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from modeling_longclip import __version__

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "constraints").glob("*.txt"))
WORKFLOWS = ROOT / ".github" / "workflows"
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def pinned(file: Path) -> dict[str, Version]:
    pairs = (line.split("==") for line in file.read_text(encoding="utf-8").splitlines())
    return {name: Version(version) for name, version in pairs}


def requirements() -> list[Requirement]:
    """What setup.cfg asks for, with the extras that the tests install; torch is the Makefile's TORCH."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    extras = ("dev", "train", "evaluate", "diffusion", "export", "search")
    texts = [parser["options"]["install_requires"], *(parser["options.extras_require"][extra] for extra in extras)]
    found = [Requirement(line) for text in texts for line in text.strip().splitlines() if not line.startswith("#")]
    return [requirement for requirement in found if requirement.name != "torch"]


def test_one_for_each_environment() -> None:
    assert sorted(file.stem for file in FILES) == ["tf4", "tf4-oldest", "tf5", "tf5-oldest"]


@every_file
def test_names_and_versions_only(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line)] == []
    assert [name for name in pinned(file) if re.match("torch$|triton|nvidia-|cuda-", name)] == []


@every_file
def test_all_that_setup_cfg_asks_for(file: Path) -> None:
    releases = pinned(file)
    for requirement in requirements():
        version = releases[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}: {version}"


def test_the_oldest_are_the_lower_bounds() -> None:
    """Of transformers in both majors; of the rest, those that its lowest release does not lift."""
    oldest = {major: pinned(ROOT / "constraints" / f"tf{major}-oldest.txt") for major in "45"}
    assert {major: str(releases["transformers"]) for major, releases in oldest.items()} == {
        "4": "4.57.0",
        "5": "5.6.0",
    }
    (transformers,) = (requirement for requirement in requirements() if requirement.name == "transformers")
    assert not any(transformers.specifier.contains(older) for older in ("4.56.2", "5.0.0", "5.5.4", "6.0.0"))
    bounds = {
        canonicalize_name(requirement.name): Version(part.version)
        for requirement in requirements()
        for part in requirement.specifier
        if part.operator == ">=" and requirement.name != "transformers"
    }
    held = {name for name, bound in bounds.items() if oldest["4"][name] == bound}
    assert {"accelerate", "datasets", "diffusers", "matplotlib", "numpy", "onnx", "peft", "pillow"} <= held


@pytest.mark.parametrize("file", sorted(WORKFLOWS.glob("*.yml")), ids=lambda file: file.stem)
def test_workflows_run_what_was_reviewed(file: Path) -> None:
    """Actions by commit, with read access but for what publishing needs."""
    text = file.read_text(encoding="utf-8")
    used = re.findall(r"uses: (.*)", text)
    assert used and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", action) for action in used)
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    more = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
    assert more == ({"publish": {"id-token": "write"}} if file.stem == "release" else {})
    # The newest of everything decides nothing.
    undecided = [name for name, job in workflow["jobs"].items() if job.get("continue-on-error")]
    assert undecided == (["newest"] if file.stem == "ci" else [])


def test_one_version_and_one_torch() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == __version__
    torch = re.search(r"^export TORCH \?= (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert torch and f"ARG TORCH={torch[1]}\n" in (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_forms_of_the_repository_are_yaml() -> None:
    files = [ROOT / ".github" / "dependabot.yml", *(ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")]
    assert len(files) == 4
    for file in files:
        assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict), file
