"""What a conversion starts from: every form that a CLIP comes in, and the forms that are refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from examples.random_clip import clip_config
from longclip_hf.conversion.checkpoint import (
    DERIVED_BUFFERS,
    POSITION_TABLE,
    expected_shapes,
    long_config,
    read_checkpoint,
)
from longclip_hf.conversion.stretch import stretch
from longclip_hf.errors import ConversionError, FileError, LongCLIPError
from modeling_longclip import (
    LongCLIPConfig,
    LongCLIPModel,
    LongCLIPTextConfig,
    LongCLIPTextModel,
    LongCLIPTextModelWithProjection,
)

Edit = Callable[..., None]

TEXT_CLASSES = [
    (CLIPTextModel, LongCLIPTextModel, 36),
    (CLIPTextModelWithProjection, LongCLIPTextModelWithProjection, 37),
]


def has_values(folder: Path, expected: dict[str, torch.Tensor]) -> bool:
    tensors = read_checkpoint(str(folder)).tensors
    return tensors.keys() == expected.keys() and all(
        torch.equal(tensors[name].load(), expected[name]) for name in expected
    )


def test_a_clip_model(clip_folder: Path) -> None:
    checkpoint = read_checkpoint(str(clip_folder))
    saved = load_file(clip_folder / "model.safetensors")
    assert has_values(clip_folder, saved)
    assert isinstance(checkpoint.config, CLIPConfig) and checkpoint.has_image_tower
    assert checkpoint.text_config.max_position_embeddings == 77
    assert checkpoint.model_class is LongCLIPModel
    assert checkpoint.nbytes() == sum(tensor.nbytes for tensor in saved.values())
    assert checkpoint.dropped == []
    assert checkpoint.folder == clip_folder


def test_bytes_of_another_dtype(copy_of: Callable[[Path], Path], clip_folder: Path) -> None:
    folder = copy_of(clip_folder)
    saved = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    saved["logit_scale"] = saved["logit_scale"].float()  # dtypes may be mixed
    save_file(saved, folder / "model.safetensors")
    checkpoint, count = read_checkpoint(str(folder)), sum(tensor.numel() for tensor in saved.values())
    assert checkpoint.nbytes() == 2 * count + 2
    assert [checkpoint.nbytes(dtype) for dtype in (torch.float16, torch.float32)] == [2 * count, 4 * count]


@pytest.mark.parametrize("names", ["nested", "flat", "all nested"])
@pytest.mark.parametrize(("stock", "ours", "count"), TEXT_CLASSES, ids=["text", "projection"])
def test_a_text_tower_alone(stock: type, ours: type, count: int, names: str, tmp_path: Path) -> None:
    model = stock(clip_config("tiny", 100).text_config)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    nested = {name if name.startswith("text_") else f"text_model.{name}": tensor for name, tensor in saved.items()}
    assert len(nested) == count
    if names == "all nested":  # what transformers 5.6 to 5.9 save of a tower that they took out of a CLIP
        save_file({f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in nested.items()},
                  tmp_path / "model.safetensors")  # fmt: skip
    if names == "flat":  # the names in memory of transformers 5
        flattened = {name.removeprefix("text_model."): tensor for name, tensor in nested.items()}
        save_file(flattened, tmp_path / "model.safetensors")
    checkpoint = read_checkpoint(str(tmp_path))
    assert has_values(tmp_path, nested)
    assert checkpoint.model_class is ours
    assert not checkpoint.has_image_tower
    assert checkpoint.text_config is checkpoint.config


@pytest.mark.parametrize("form", ["save_pretrained", "safetensors", "bin"])
def test_shards(
    form: str, copy_of: Callable[[Path], Path], clip_folder: Path, shard: Callable[..., list[Path]]
) -> None:
    expected = load_file(clip_folder / "model.safetensors")
    folder = copy_of(clip_folder)
    if form == "save_pretrained":
        (folder / "model.safetensors").unlink()
        CLIPModel.from_pretrained(clip_folder).save_pretrained(folder, max_shard_size="100KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 2
    else:
        shard(folder, 3, form)
    assert has_values(folder, expected)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_one_bin(zipped: bool, copy_of: Callable[[Path], Path], clip_folder: Path) -> None:
    folder = copy_of(clip_folder)
    expected = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(expected, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert has_values(folder, expected)


def test_safetensors_is_read_before_bin(copy_of: Callable[[Path], Path], clip_folder: Path) -> None:
    folder = copy_of(clip_folder)
    (folder / "pytorch_model.bin").write_bytes(b"stale")
    assert has_values(folder, load_file(folder / "model.safetensors"))


@pytest.mark.parametrize(("form", "ids"), [("patch32", (0, 2)), ("patch14", (49406, 49407))])
def test_openais_old_form(
    form: str, ids: tuple[int, int], copy_of: Callable[[Path], Path], clip_folder: Path, to_old_form: Edit
) -> None:
    folder = copy_of(clip_folder)
    expected = load_file(folder / "model.safetensors")
    to_old_form(folder, form)

    checkpoint = read_checkpoint(str(folder))
    assert checkpoint.dropped == list(DERIVED_BUFFERS)
    assert has_values(folder, expected)
    text = checkpoint.text_config
    assert (text.hidden_size, text.num_hidden_layers, text.vocab_size) == (32, 2, 759)
    assert (text.bos_token_id, text.eos_token_id) == ids
    assert checkpoint.config.vision_config.patch_size == 16

    config = long_config(checkpoint, max_position_embeddings=248, keep=20, eos_token_id=758)
    assert isinstance(config, LongCLIPConfig)
    text = config.text_config
    assert (text.hidden_size, text.vocab_size, text.projection_dim) == (32, 759, 24)
    assert (text.max_position_embeddings, text.keep, text.bos_token_id, text.eos_token_id) == (248, 20, ids[0], 758)
    assert (config.vision_config.patch_size, config.projection_dim) == (16, 24)


def test_long_config_of_a_text_tower(tmp_path: Path) -> None:
    CLIPTextModel(clip_config("tiny", 100, hidden_act="gelu").text_config).save_pretrained(tmp_path)
    config = long_config(read_checkpoint(str(tmp_path)), max_position_embeddings=100, keep=7)
    assert isinstance(config, LongCLIPTextConfig)
    assert (config.max_position_embeddings, config.keep, config.hidden_act, config.vocab_size) == (100, 7, "gelu", 100)


def test_the_joint_space_is_the_full_models(
    copy_of: Callable[[Path], Path], clip_folder: Path, set_config: Edit
) -> None:
    """CLIPModel ignores the towers' `projection_dim`, which old configurations leave at 512."""
    folder = copy_of(clip_folder)
    set_config(folder, text_config={"projection_dim": 512}, vision_config={"projection_dim": 512})
    config = long_config(read_checkpoint(str(folder)))
    assert config.projection_dim == config.text_config.projection_dim == config.vision_config.projection_dim == 24


def test_expected_shapes_are_the_models(clip_folder: Path) -> None:
    checkpoint = read_checkpoint(str(clip_folder))
    config = long_config(checkpoint, max_position_embeddings=248)
    saved = {name: tuple(tensor.shape) for name, tensor in load_file(clip_folder / "model.safetensors").items()}
    assert expected_shapes(checkpoint, config) == saved | {POSITION_TABLE: (248, 32)}


def test_bad_sources_are_refused_by_name(bad_source: tuple[Path, str]) -> None:
    folder, message = bad_source
    with pytest.raises(LongCLIPError, match=message) as caught:
        read_checkpoint(str(folder))
    assert str(folder) in str(caught.value)
    assert not (folder / "executed").exists()


def test_a_stretched_checkpoint_is_refused(longclip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="is already a Long-CLIP of 248 positions"):
        read_checkpoint(str(longclip_folder))
    LongCLIPTextModel.from_pretrained(longclip_folder).save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="is already a Long-CLIP of 248 positions"):
        read_checkpoint(str(tmp_path))


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c"])
def test_an_unknown_folder_is_refused(source: str) -> None:
    with pytest.raises(ConversionError, match=f"^{re.escape(source)}: no such folder."):
        read_checkpoint(source)


@pytest.mark.parametrize("source", ["nobody/nothing", "nothing", "no spaces/allowed"])
def test_an_unknown_hub_id_is_refused(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConversionError, match=f"^{source}: no such folder here, and the Hub gave no such model"
    ) as caught:
        read_checkpoint(source)
    assert "\n" not in str(caught.value)


def test_a_file_is_no_source(clip_folder: Path) -> None:
    file = clip_folder / "model.safetensors"
    with pytest.raises(ConversionError, match=f"^{re.escape(str(file))} is a file. Name the folder"):
        read_checkpoint(str(file))


def test_a_folder_has_no_revision(clip_folder: Path) -> None:
    with pytest.raises(ConversionError, match="is a folder, and --revision v1 is for Hub ids"):
        read_checkpoint(str(clip_folder), revision="v1")


def test_a_folder_in_the_home_directory(clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(clip_folder, tmp_path / "clip")
    assert read_checkpoint("~/clip").folder == tmp_path / "clip"


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\n---\n# A model\n", "mit"),
        ("---\ntags: [clip]\n---\n# A model\n", None),
        ("# A model\n", None),
        ("---\nlicense: [mit\nother: : x\n---\n", None),
        (None, None),
    ],
    ids=["stated", "not stated", "no metadata", "broken metadata", "no card"],
)
def test_license(card: str | None, expected: str | None, copy_of: Callable[[Path], Path], clip_folder: Path) -> None:
    folder = copy_of(clip_folder)
    if card is not None:
        (folder / "README.md").write_text(card)
    assert read_checkpoint(str(folder)).license() == expected


def test_a_full_configuration_with_a_text_tower_only(copy_of: Callable[[Path], Path], clip_folder: Path) -> None:
    folder = copy_of(clip_folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if n.startswith("text_")}, folder / "model.safetensors")
    with pytest.raises(
        ConversionError, match=r"config.json names 2 layers in vision_model, and there are tensors of 0"
    ):
        read_checkpoint(str(folder))
    text_config = CLIPConfig.from_pretrained(folder).text_config
    CLIPTextConfig.from_dict(text_config.to_dict()).save_pretrained(folder)
    assert read_checkpoint(str(folder)).model_class is LongCLIPTextModelWithProjection


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "README.md",
        "tokenizer_config.json",
        "vocab.json",
        "preprocessor_config.json",
    ],
)
def test_no_file_is_read_from_elsewhere(
    name: str, copy_of: Callable[[Path], Path], clip_folder: Path, tmp_path: Path
) -> None:
    folder = copy_of(clip_folder)
    (tmp_path / "private").write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"mine")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "private")
    with pytest.raises(FileError, match=f"{name} leads out of its folder, to {tmp_path / 'private'}"):
        stretch(str(folder), tmp_path / "long")
    assert not (tmp_path / "long").exists()


def test_nor_named_by_an_index(
    copy_of: Callable[[Path], Path], clip_folder: Path, tmp_path: Path, shard: Callable[..., list[Path]]
) -> None:
    folder = copy_of(clip_folder)
    shards = shard(folder, 2)
    shutil.move(shards[0], tmp_path / "other.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for place in ("../other.safetensors", str(tmp_path / "other.safetensors")):
        changed = {n: place if file == shards[0].name else file for n, file in index["weight_map"].items()}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(FileError, match=r"other.safetensors leads out of its folder"):
            read_checkpoint(str(folder))


@pytest.mark.parametrize("depth", [200, 100_000])
def test_a_deep_card_states_no_licence(depth: int, copy_of: Callable[[Path], Path], clip_folder: Path) -> None:
    folder = copy_of(clip_folder)
    (folder / "README.md").write_text(f"---\nlicense: {'[' * depth}{']' * depth}\n---\n")
    assert read_checkpoint(str(folder)).license() is None
