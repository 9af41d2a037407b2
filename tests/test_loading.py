"""One folder loads everywhere: from disk and from a Hub id, with its own code and without, on both majors.

Every load runs in a fresh process, where the project cannot be imported unless the claim is about it. The numbers are
compared with those of a model that was built by hand from the folder's configuration and tensors.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fork_server
import pytest
import torch
from conftest import run_python
from hub_server import HubServer

ROOT = Path(__file__).parents[1]
CODE = {file.name for file in (ROOT / "modeling_longclip").glob("*.py")} - {"__init__.py"}
AUTO_MAP = {
    "AutoConfig": "configuration_longclip.LongCLIPConfig",
    "AutoModel": "modeling_longclip.LongCLIPModel",
    "AutoModelForZeroShotImageClassification": "modeling_longclip.LongCLIPModel",
}
# Measured for outputs of order 1: 0.0 for every class, on one major and across the two, and 6e-8 for the pipeline's
# scores. Weights that lie elsewhere in memory, or another processor, may round differently.
TOLERANCE = 1e-6

# Every child begins with this. `args` are the test's; `report` speaks to the test.
CHILD = """
import json, sys
from pathlib import Path

if args.get("blocked", True):
    for name in ("modeling_longclip", "longclip_hf", "examples"):
        sys.modules[name] = None  # importing it raises ModuleNotFoundError

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import (
    AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, AutoTokenizer,
    CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, pipeline,
)

LONG = "a red bicycle leans against a white wall next to a wooden door " * 6
TEXTS = ["a dog", LONG, LONG * 4]  # the last one is cut
LABELS = ["a dog", LONG]
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)
IMAGES = [Image.fromarray(pixels) for pixels in PIXELS]

def batch(processor, texts=TEXTS, images=IMAGES):
    made = processor(text=texts, images=images, padding=True, truncation=True, return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask", "pixel_values")}

def tensor(output):
    return output if isinstance(output, torch.Tensor) else output.pooler_output

@torch.inference_mode()
def outputs(model, inputs):
    model.eval()
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    if not hasattr(model, "vision_model"):
        found = model(**text)
        pooled = {"text": found["text_embeds"]} if "text_embeds" in found else {"pooled": found["pooler_output"]}
        return {"states": found["last_hidden_state"], **pooled}
    found = model(**inputs)
    return {
        "states": found.text_model_output.last_hidden_state,
        "pooled": model.text_model(**text).pooler_output,
        "text": tensor(model.get_text_features(**text)),
        "image": tensor(model.get_image_features(pixel_values=inputs["pixel_values"])),
        "logits": found.logits_per_image,
    }

def scores(source, **kwargs):
    classify = pipeline("zero-shot-image-classification", model=source, **kwargs)
    found = {entry["label"]: entry["score"] for entry in classify(IMAGES[0], candidate_labels=LABELS)}
    return {"scores": torch.tensor([found[label] for label in LABELS])}

def load(source, *loaders, **kwargs):
    inputs = batch(AutoProcessor.from_pretrained(source, **kwargs))
    found, kinds = {"inputs": inputs}, {}
    for loader in loaders:
        model = loader.from_pretrained(source, **kwargs)
        found[loader.__name__] = outputs(model, inputs)
        kinds[loader.__name__] = f"{type(model).__module__}.{type(model).__name__}"
    return found, kinds

def message(function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        return str(error)

def report(**values):
    print("REPORT" + json.dumps({"version": transformers.__version__, **values}))
"""
STOCK = {
    "AutoModel": "transformers.models.clip.modeling_clip.CLIPModel",
    "CLIPModel": "transformers.models.clip.modeling_clip.CLIPModel",
    "CLIPTextModel": "transformers.models.clip.modeling_clip.CLIPTextModel",
    "CLIPTextModelWithProjection": "transformers.models.clip.modeling_clip.CLIPTextModelWithProjection",
}
OURS = ("LongCLIPModel", "LongCLIPTextModel", "LongCLIPTextModelWithProjection")


@dataclass(frozen=True)
class Place:
    """Where a checkpoint is loaded from, and the environment in which that works."""

    source: str
    env: Mapping[str, str]


def child(code: str, env: Mapping[str, str], python: str = sys.executable, **args: Any) -> dict[str, Any]:
    """What `code` reported from a fresh process."""
    args = {name: str(value) if isinstance(value, Path) else value for name, value in args.items()}
    return json.loads(run_python(f"args = {args!r}\n{CHILD}\n{code}", env, python).split("REPORT")[-1])


def differences(file: Path, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """For every loader in `file`, the largest difference of its outputs from the `expected` ones of their names."""
    found: dict[str, dict[str, torch.Tensor]] = torch.load(file)
    assert all(t.shape == expected[name].shape for tensors in found.values() for name, t in tensors.items())
    return {
        loader: torch.stack([(t.double() - expected[name].double()).abs().max() for name, t in tensors.items()]).max()
        for loader, tensors in found.items()
    }


def assert_same(file: Path, expected: Mapping[str, torch.Tensor]) -> None:
    found = differences(file, expected)
    assert found and all(difference <= TOLERANCE for difference in found.values()), found


def hermetic(folder: Path) -> dict[str, str]:
    """No network, and a cache of its own: code that is loaded from a folder is copied there."""
    return {"HF_HOME": str(folder / "hf_home"), "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as server:
        yield server


@pytest.fixture(params=["folder", "hub"])
def place(request: pytest.FixtureRequest, longclip_folder: Path, tmp_path: Path) -> Place:
    if request.param == "folder":
        return Place(str(longclip_folder), hermetic(tmp_path))
    server = request.getfixturevalue("hub")
    server.add_repo("user/tiny", longclip_folder)
    return Place("user/tiny", server.environment())


BY_HAND = """
from safetensors.torch import load_file
from modeling_longclip import LongCLIPConfig, LongCLIPModel

def by_hand(folder):
    model = LongCLIPModel(LongCLIPConfig(**json.loads(Path(folder, "config.json").read_text())))
    model.load_state_dict(load_file(Path(folder, "model.safetensors")), strict=True)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = batch(processor)
    labels = batch(processor, [f"This is a photo of {label}." for label in LABELS], IMAGES[:1])
    return {**inputs, **outputs(model, inputs), "scores": outputs(model, labels)["logits"][0].softmax(-1)}
"""


@pytest.fixture(scope="session")
def expected(longclip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Inputs and outputs of the model that was built by hand."""
    folder = tmp_path_factory.mktemp("expected")
    code = f"{BY_HAND}\ntorch.save(by_hand(args['folder']), args['out'])\nreport()"
    child(code, hermetic(folder), folder=longclip_folder, out=folder / "expected.pt", blocked=False)
    return torch.load(folder / "expected.pt")


def test_texts_are_short_long_and_cut(expected: dict[str, torch.Tensor]) -> None:
    short, long, cut = expected["attention_mask"].sum(-1).tolist()
    assert short < 20 and 77 < long < 248 and cut == 248
    ends = expected["input_ids"][torch.arange(3), torch.tensor([short, long, cut]) - 1]
    assert ends.unique().numel() == 1
    # Vectors that differ by far more than the tolerance.
    assert torch.pdist(expected["pooled"]).min() > 0.1 and torch.pdist(expected["image"]).min() > 0.1


def test_stock_classes(place: Place, expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    code = """
found, kinds = load(args["source"], AutoModel, CLIPModel, CLIPTextModel, CLIPTextModelWithProjection)
found["pipeline"] = scores(args["source"])
torch.save(found, args["out"])
lengths = [AutoTokenizer.from_pretrained(args["source"]).model_max_length,
           AutoProcessor.from_pretrained(args["source"]).tokenizer.model_max_length]
report(kinds=kinds, lengths=lengths, custom=[name for name in sys.modules if name.startswith("transformers_modules.")])
"""
    seen = child(code, place.env, source=place.source, out=tmp_path / "found.pt")
    assert seen["kinds"] == STOCK and seen["custom"] == []
    assert seen["lengths"] == [248, 248]
    assert_same(tmp_path / "found.pt", expected)


def test_classes_of_this_project(place: Place, expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    code = """
from modeling_longclip import LongCLIPModel, LongCLIPTextModel, LongCLIPTextModelWithProjection
found, kinds = load(args["source"], LongCLIPModel, LongCLIPTextModel, LongCLIPTextModelWithProjection)
torch.save(found, args["out"])
report(kinds=kinds)
"""
    seen = child(code, place.env, source=place.source, out=tmp_path / "found.pt", blocked=False)
    assert seen["kinds"] == {name: f"modeling_longclip.modeling_longclip.{name}" for name in OURS}
    assert_same(tmp_path / "found.pt", expected)


def test_code_of_the_checkpoint(place: Place, expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Where the project cannot be imported; what is saved again keeps the code and loads again."""
    code = """
trust = {"trust_remote_code": True}
found, kinds = load(args["source"], AutoModel, AutoModelForZeroShotImageClassification, **trust)
found["pipeline"] = scores(args["source"], **trust)
torch.save(found, args["out"])
model = AutoModel.from_pretrained(args["source"], **trust)
long = message(model.get_text_features, torch.zeros(1, 249, dtype=torch.long))
model.save_pretrained(args["again"])
AutoProcessor.from_pretrained(args["source"], **trust).save_pretrained(args["again"])
parts = [f"{type(part).__module__}.{type(part).__name__}" for part in (model.config, model.config.text_config)]
imports = [message(__import__, name) is not None for name in ("modeling_longclip", "longclip_hf")]
report(kinds=kinds, parts=parts, long=long, imports=imports)
"""
    again = tmp_path / "again"
    seen = child(code, place.env, source=place.source, out=tmp_path / "found.pt", again=again)
    assert seen["imports"] == [True, True]
    for kind in [*seen["kinds"].values(), *seen["parts"]]:
        assert kind.startswith("transformers_modules.")
    assert [kind.split(".")[-1] for kind in seen["kinds"].values()] == ["LongCLIPModel", "LongCLIPModel"]
    assert [kind.split(".")[-1] for kind in seen["parts"]] == ["LongCLIPConfig", "LongCLIPTextConfig"]
    assert "249 tokens" in seen["long"] and "truncation=True, max_length=248" in seen["long"]
    assert_same(tmp_path / "found.pt", expected)

    assert {file.name for file in again.glob("*.py")} == CODE
    for name in CODE:
        assert (again / name).read_bytes() == (ROOT / "modeling_longclip" / name).read_bytes()
    assert json.loads((again / "config.json").read_text())["auto_map"] == AUTO_MAP
    code = """
found, stock = load(args["source"], CLIPModel, CLIPTextModel)
more, ours = load(args["source"], AutoModel, trust_remote_code=True)
torch.save({**found, **more}, args["out"])
report(stock=stock, ours=ours, length=AutoTokenizer.from_pretrained(args["source"]).model_max_length)
"""
    seen = child(code, hermetic(tmp_path), source=again, out=tmp_path / "again.pt")
    assert seen["stock"].items() <= STOCK.items()
    assert seen["ours"]["AutoModel"].startswith("transformers_modules.")
    assert seen["length"] == 248
    assert_same(tmp_path / "again.pt", expected)


TOWERS = {"LongCLIPTextModel": "CLIPTextModel", "LongCLIPTextModelWithProjection": "CLIPTextModelWithProjection"}


@pytest.mark.parametrize(("ours", "stock"), TOWERS.items(), ids=list(TOWERS))
def test_text_tower_in_a_repository_of_its_own(
    ours: str, stock: str, hub: HubServer, longclip_folder: Path, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    import modeling_longclip

    getattr(modeling_longclip, ours).from_pretrained(longclip_folder).save_pretrained(tmp_path / "tower")
    torch.save(expected, tmp_path / "expected.pt")
    hub.add_repo("user/tower", tmp_path / "tower")
    code = """
inputs = torch.load(args["inputs"])
plain = getattr(transformers, args["stock"]).from_pretrained("user/tower")
model = AutoModel.from_pretrained("user/tower", trust_remote_code=True)
torch.save({"stock": outputs(plain, inputs), "ours": outputs(model, inputs)}, args["out"])
model.save_pretrained(args["again"])
report(kind=f"{type(model).__module__}.{type(model).__name__}")
"""
    seen = child(
        code, hub.environment(), inputs=tmp_path / "expected.pt", stock=stock, out=tmp_path / "found.pt",
        again=tmp_path / "again",
    )  # fmt: skip
    assert seen["kind"].startswith("transformers_modules.user.tower.") and seen["kind"].endswith(f".{ours}")
    assert_same(tmp_path / "found.pt", expected)
    assert {file.name for file in (tmp_path / "again").glob("*.py")} == CODE
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_longclip.LongCLIPTextConfig",
        "AutoModel": f"modeling_longclip.{ours}",
    }


def test_push_and_pinned_revision(
    hub: HubServer, longclip_folder: Path, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    hub.add_repo("user/tiny", longclip_folder)
    code = """
from huggingface_hub import HfApi
model = AutoModel.from_pretrained("user/tiny", trust_remote_code=True)
AutoProcessor.from_pretrained("user/tiny").push_to_hub("user/again")
model.push_to_hub("user/again")
first = HfApi().model_info("user/again").sha
torch.nn.init.zeros_(model.text_model.embeddings.position_embedding.weight)
model.push_to_hub("user/again")
report(first=first)
"""
    first = child(code, hub.environment())["first"]
    second = hub.commits("user/again")[-1]
    for sha in (first, second):
        files = hub.files("user/again", sha)
        assert files.keys() >= CODE
        assert json.loads(files["config.json"].read_text())["auto_map"] == AUTO_MAP
    code = """
newest, kinds = load("user/again", AutoModel, trust_remote_code=True)
pinned, pinned_kinds = load("user/again", AutoModel, trust_remote_code=True, revision=args["first"])
torch.save({"newest": newest["AutoModel"], "pinned": pinned["AutoModel"]}, args["out"])
report(kinds=[kinds["AutoModel"], pinned_kinds["AutoModel"]])
"""
    seen = child(code, hub.environment(), first=first, out=tmp_path / "found.pt")
    assert seen["kinds"] == [
        f"transformers_modules.user.again.{sha}.modeling_longclip.LongCLIPModel" for sha in (second, first)
    ]
    found = differences(tmp_path / "found.pt", expected)
    assert found["pinned"] <= TOLERANCE and found["newest"] > 0.1


@pytest.fixture
def stretch_command(clip_folder: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*options: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        script = str(ROOT / "conversion" / "stretch.py")
        command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", script]
        line = [*command, str(clip_folder), "--output", str(tmp_path / "long"), *options]
        return fork_server.run(line, cwd=tmp_path, env=env)

    return run


def test_stretch_pushes(
    hub: HubServer,
    stretch_command: Callable[..., subprocess.CompletedProcess[str]],
    longclip_folder: Path,
    expected: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    done = stretch_command("--push-to-hub", "pushed", env=hub.environment())  # the user's own, by the token
    assert done.returncode == 0, done.stderr
    assert f"{hub.endpoint}/user/pushed" in done.stdout
    assert len(hub.commits("user/pushed")) == 2, "one commit makes the repository, one brings all files"
    assert set(hub.files("user/pushed")) - {".gitattributes"} == {file.name for file in longclip_folder.iterdir()}
    code = """
found, kinds = load("user/pushed", AutoModel, trust_remote_code=True)
torch.save(found, args["out"])
report(kinds=kinds)
"""
    seen = child(code, hub.environment(), out=tmp_path / "found.pt")
    assert seen["kinds"]["AutoModel"].startswith("transformers_modules.user.pushed.")
    assert_same(tmp_path / "found.pt", expected)


def test_stretch_with_a_wrong_token(
    hub: HubServer, stretch_command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = stretch_command("--push-to-hub", "user/pushed", env={**hub.environment(), "HF_TOKEN": "hf_wrong"})
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    said = " ".join(done.stderr.split())
    assert "error: user/pushed was not published: " in said and "401" in said
    assert f"complete in {tmp_path / 'long'}" in said and "hf auth login" in said
    assert (tmp_path / "long" / "model.safetensors").is_file()
    assert not [path for _, path in hub.requests if "/commit/" in path]


def test_stretch_pushes_nothing_private_to_a_public_repository(
    hub: HubServer, stretch_command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "public").mkdir()
    (tmp_path / "public" / "README.md").write_text("# Somebody's\n")
    hub.add_repo("user/public", tmp_path / "public")
    done = stretch_command("--push-to-hub", "user/public", "--private", env=hub.environment())
    said = " ".join(done.stderr.split())
    assert done.returncode == 2 and "user/public is there already and public. Nothing was sent" in said
    assert f"complete in {tmp_path / 'long'}" in said and "user/public --yes --private" in said
    assert hub.files("user/public").keys() == {"README.md"} and len(hub.commits("user/public")) == 1


@pytest.fixture
def other_python() -> str:
    python = os.environ.get("LONGCLIP_OTHER_PYTHON")
    if not python:
        pytest.skip("set LONGCLIP_OTHER_PYTHON to a Python that has the other major of transformers")
    return python


@pytest.mark.parametrize("direction", ["this major writes", "other major writes"])
def test_majors_read_each_other(direction: str, other_python: str, clip_folder: Path, tmp_path: Path) -> None:
    pythons = [sys.executable, other_python]
    writer, reader = pythons if direction == "this major writes" else reversed(pythons)
    code = f"""{BY_HAND}
from longclip_hf.conversion.stretch import stretch
stretched, resaved = (str(Path(args["folder"], name)) for name in ("stretched", "resaved"))
stretch(args["clip"], stretched)
torch.save(by_hand(stretched), Path(args["folder"], "expected.pt"))
LongCLIPModel.from_pretrained(stretched).save_pretrained(resaved)
AutoProcessor.from_pretrained(stretched).save_pretrained(resaved)
report()
"""
    env = {**hermetic(tmp_path), "PYTHONPATH": str(ROOT)}
    wrote = child(code, env, writer, clip=clip_folder, folder=tmp_path, blocked=False)
    code = """
found, kinds, lengths = {}, {}, []
for name in ("stretched", "resaved"):
    folder = str(Path(args["folder"], name))
    stock, stock_kinds = load(folder, AutoModel, CLIPModel, CLIPTextModel, CLIPTextModelWithProjection)
    ours, ours_kinds = load(folder, AutoModel, trust_remote_code=True)
    found |= {f"{name} {loader}": tensors for loader, tensors in stock.items()}
    found[f"{name} with its code"] = ours["AutoModel"]
    found[f"{name} pipeline"] = scores(folder, trust_remote_code=True)
    kinds[name] = [stock_kinds, ours_kinds["AutoModel"]]
    lengths.append(AutoTokenizer.from_pretrained(folder).model_max_length)
torch.save(found, Path(args["folder"], "found.pt"))
report(kinds=kinds, lengths=lengths)
"""
    read = child(code, hermetic(tmp_path), reader, folder=tmp_path)
    assert {wrote["version"].split(".")[0], read["version"].split(".")[0]} == {"4", "5"}
    assert read["lengths"] == [248, 248]
    for stock, ours in read["kinds"].values():
        assert stock == STOCK and ours.startswith("transformers_modules.")
    assert_same(tmp_path / "found.pt", torch.load(tmp_path / "expected.pt"))
