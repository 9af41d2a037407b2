"""Files in other layouts: what is read from them, and the configuration that their shapes make."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPModel

from examples.random_clip import SIZES
from examples.random_clip import clip_config as random_clip_config
from longclip_hf.conversion.key_map import to_original
from longclip_hf.conversion.layouts import Original, clip_config, merge_tables, read_original, stretch_settings
from longclip_hf.conversion.open_clip_config import (
    OPEN_CLIP_CONFIG,
    image_settings,
    open_clip_config,
    read_open_clip_config,
)
from longclip_hf.errors import ConversionError, LongCLIPError
from tests.conversion.straight_line import random_state

IMAGES = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3, "size": {"shortest_edge": 224}}


def original(size: str, model_cfg: dict[str, Any] | None = None, two_tables: bool = False, **text: int) -> Original:
    """A checkpoint of an official size, whole, with shapes and no values."""
    with torch.device("meta"):
        tensors = to_original(CLIPModel(random_clip_config(size, **text)).state_dict())
    open_clip = None if model_cfg is None else {"model_cfg": {"vision_cfg": {}, "text_cfg": {}} | model_cfg}
    return Original(size, Path("x.pt"), tensors, open_clip, two_tables, False, [])


def small(**settings: Any) -> dict[str, torch.Tensor]:
    return random_state((64, 96, 2), (128, 160, 1), (32, 16), 24, 50, **settings)


class TestConfig:
    @pytest.mark.parametrize("size", [size for size in SIZES if size != "tiny"])
    def test_sizes_come_from_the_shapes(self, size: str) -> None:
        activation = "gelu" if size in ("ViT-H/14", "ViT-bigG/14") else "quick_gelu"
        config = clip_config(original(size, max_position_embeddings=77), activation)
        for tower in ("text", "vision"):
            found = getattr(config, f"{tower}_config")
            sizes = found.hidden_size, found.intermediate_size, found.num_hidden_layers, found.num_attention_heads
            assert sizes == SIZES[size][tower]
            assert found.hidden_act == activation
            assert found.layer_norm_eps == 1e-5
        assert (config.vision_config.image_size, config.vision_config.patch_size) == SIZES[size]["image"]
        assert config.projection_dim == config.text_config.projection_dim == SIZES[size]["projection"]
        assert config.text_config.vocab_size == 49408
        assert (config.text_config.bos_token_id, config.text_config.eos_token_id) == (49406, 49407)

    @pytest.mark.parametrize("size", [size for size in SIZES if size != "tiny"])
    def test_open_clips_configuration_there_and_back(self, size: str) -> None:
        config = random_clip_config(size)
        written = open_clip_config(config, IMAGES)["model_cfg"]
        # As OpenCLIP computes it.
        for tower in ("text", "vision"):
            part = written[f"{tower}_cfg"]
            assert int(part["width"] * part["mlp_ratio"]) == SIZES[size][tower][1]
        again = clip_config(original(size, written))
        for tower in ("text_config", "vision_config"):
            assert getattr(again, tower).to_dict() == getattr(config, tower).to_dict()

    def test_open_clips_own_files(self) -> None:
        """bigG and DFN's H as they are published."""
        big = {"embed_dim": 1280, "vision_cfg": {"image_size": 224, "layers": 48, "width": 1664, "head_width": 104}}
        big["vision_cfg"] |= {"mlp_ratio": 4.9231, "patch_size": 14, "pool_type": "tok", "patch_dropout": 0.5}
        big["text_cfg"] = {"context_length": 77, "vocab_size": 49408, "width": 1280, "heads": 20, "layers": 32}
        config = clip_config(original("ViT-bigG/14", big))
        assert (config.vision_config.num_attention_heads, config.vision_config.hidden_act) == (16, "gelu")
        assert clip_config(original("ViT-bigG/14", big | {"quick_gelu": True})).text_config.hidden_act == "quick_gelu"

    def test_heads_of_a_tower_that_is_in_no_table(self) -> None:
        with pytest.raises(ConversionError, match=r"width 1280 has 16 heads in OpenCLIP's .* and 20 by OpenAI's rule"):
            clip_config(original("ViT-H/14", two_tables=True))
        assert clip_config(original("ViT-H/14", two_tables=True), None, 16).vision_config.num_attention_heads == 16
        with pytest.raises(ConversionError, match="image tower of width 1280 cannot have 7 heads"):
            clip_config(original("ViT-H/14"), "gelu", 7)
        tensors = random_state((64, 96, 1), (96, 96, 1), (32, 16), 24, 50)
        odd = Original("odd.pt", Path("x.pt"), tensors, None, True, False, [])
        with pytest.raises(ConversionError, match=r"odd.pt: the image tower of width 96 cannot have 1.5 heads"):
            clip_config(odd)
        assert clip_config(odd, None, 6).vision_config.num_attention_heads == 6

    def test_the_activation_is_never_guessed(self) -> None:
        with pytest.raises(ConversionError, match=r"ViT-B/16 does not say its activation.*--activation quick_gelu"):
            clip_config(original("ViT-B/16"))
        assert clip_config(original("ViT-B/16", two_tables=True)).text_config.hidden_act == "quick_gelu"
        with pytest.raises(ConversionError, match=r"--activation gelu, and ViT-B/16 has quick_gelu"):
            clip_config(original("ViT-B/16", two_tables=True), "gelu")
        with pytest.raises(ConversionError, match=r"--vision-heads 8, and open_clip_config.json says 12"):
            clip_config(original("ViT-B/16", {"embed_dim": 512}), None, 8)

    @pytest.mark.parametrize(
        ("model_cfg", "message"),
        [
            ({"embed_dim": 640}, "model_cfg.embed_dim = 640, and the tensors say 512"),
            ({"vision_cfg": {"image_size": 240}}, "vision_cfg.image_size = 240, and the tensors say 224"),
            ({"text_cfg": {"context_length": 248, "width": 640}}, "context_length = 248, .* 77; text_cfg.width = 640"),
            ({"text_cfg": {"hf_model_name": "roberta"}}, "asks for what CLIP has not: text_cfg.hf_model_name = 'rob"),
            ({"vision_cfg": {"pool_type": "avg"}}, "asks for what CLIP has not: vision_cfg.pool_type = 'avg'"),
            ({"init_logit_bias": -10}, "asks for what CLIP has not: model_cfg.init_logit_bias = -10"),
            ({"multimodal_cfg": {"width": 8}}, "asks for what CLIP has not: model_cfg.multimodal_cfg"),
            ({"text_cfg": {"heads": 7}}, "text tower of width 512 cannot have 7 heads"),
        ],
    )
    def test_open_clips_configuration_of_another_model(self, model_cfg: dict[str, Any], message: str) -> None:
        with pytest.raises(ConversionError, match=message):
            clip_config(original("ViT-B/16", model_cfg))

    @pytest.mark.parametrize(
        ("name", "shape", "message"),
        [
            ("visual.positional_embedding", (6, 128), "has 6 rows, not one and a square of patches"),
            ("visual.positional_embedding", (1, 128), "has 1 rows, not one and a square of patches"),
            (
                "visual.conv1.weight",
                (128, 3, 16),
                r"x: visual.conv1.weight has shape \(128, 3, 16\), and 4 dim",
            ),
            ("ln_final.weight", (63,), r"x: the shapes make no CLIP: ln_final.weight has shape \(63,\), not \(64,\)"),
            ("visual.conv1.weight", (128, 1, 16, 16), r"\(128, 1, 16, 16\), not \(128, 3, 16, 16\)"),
            ("logit_scale", (1,), r"logit_scale has shape \(1,\), not \(\)"),
        ],
    )
    def test_shapes_that_do_not_fit(self, name: str, shape: tuple[int, ...], message: str) -> None:
        tensors = small(tables=1) | {name: torch.zeros(shape)}
        with pytest.raises(ConversionError, match=message):
            clip_config(Original("x", Path("x.pt"), tensors, None, True, False, []))

    @pytest.mark.parametrize(
        ("length", "keep", "ratio"), [(248, 20, 4), (231, 0, 3), (218, 30, 4), (400, 30, 8), (240, 20, 4), (77, 20, 1)]
    )
    def test_the_ratio_is_what_makes_the_length(self, length: int, keep: int, ratio: int) -> None:
        assert stretch_settings(length, keep, True)["ratio"] == ratio


class TestMerge:
    def test_rows_come_from_the_table_that_is_read(self) -> None:
        tables = {
            "positional_embedding": torch.arange(6.0)[:, None].expand(6, 2),
            "positional_embedding_res": 10 + torch.arange(6.0)[:, None].expand(6, 2),
            "other": torch.ones(1),
        }
        merged = merge_tables(tables, 2)
        assert merged["positional_embedding"][:, 0].tolist() == [0, 1, 12, 13, 14, 15]
        assert merged.keys() == {"positional_embedding", "other"}
        assert merge_tables(tables, 0)["positional_embedding"][:, 1].tolist() == [10, 11, 12, 13, 14, 15]
        assert "positional_embedding_res" in tables, "the argument stays"

    @pytest.mark.parametrize(
        ("tables", "message"),
        [
            (
                {"positional_embedding_res": torch.ones(6, 2)},
                "positional_embedding is missing, which holds the first 2",
            ),
            (
                {"positional_embedding_res": torch.ones(6, 2), "positional_embedding": torch.ones(5, 2)},
                r"has shape \(5, 2\) and positional_embedding_res \(6, 2\)",
            ),
            (
                {"positional_embedding_res": torch.ones(1, 2), "positional_embedding": torch.ones(1, 2)},
                r"shape \(1, 2\): not a matrix, or without 2 rows",
            ),
        ],
    )
    def test_refuses(self, tables: dict[str, torch.Tensor], message: str) -> None:
        with pytest.raises(ConversionError, match=message):
            merge_tables(tables, 2)


class TestRead:
    @pytest.mark.parametrize("form", ["plain", "safetensors", "training", "distributed", "custom_text", "linear"])
    def test_every_form_gives_the_same_tensors(self, form: str, tmp_path: Path) -> None:
        state = small(tables=1)
        file = tmp_path / ("model.safetensors" if form == "safetensors" else "model.pt")
        left_out = []
        if form == "safetensors":
            save_file(state, file)
        elif form in ("training", "distributed"):
            prefix = "module." if form == "distributed" else ""
            content = {f"{prefix}{name}": tensor for name, tensor in state.items()}
            torch.save({"epoch": 3, "name": "run", "state_dict": content, "optimizer": {"state": {}}}, file)
            left_out = [f"{name} (training state)" for name in ("epoch", "name", "optimizer")]
        elif form == "custom_text":
            text = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
            torch.save({f"text.{name}" if name.startswith(text) else name: t for name, t in state.items()}, file)
        elif form == "linear":
            named = {
                f"text.{name}": tensor for name, tensor in state.items() if not name.startswith(("visual", "logit"))
            }
            named["text.text_projection.weight"] = named.pop("text.text_projection").t().contiguous()
            torch.save({name: t for name, t in state.items() if name.startswith(("visual", "logit"))} | named, file)
        else:
            torch.save(state, file)
        read = read_original(str(file))
        assert read.tensors.keys() == state.keys()
        assert all(torch.equal(read.tensors[name], state[name]) for name in state)
        assert read.left_out == left_out
        assert not read.two_tables and not read.openai and read.open_clip is None

    def test_openais_numbers_are_no_weights(self, tmp_path: Path) -> None:
        numbers = {"input_resolution": 32, "context_length": 77, "vocab_size": 50}
        state = small(tables=1) | {name: torch.tensor(value) for name, value in numbers.items()}
        torch.save(state, tmp_path / "clip.pt")
        read = read_original(str(tmp_path), "clip.pt")
        assert read.openai and read.left_out == list(numbers)
        assert read.tensors.keys() == small(tables=1).keys()

    def test_the_configuration_beside_the_file(self, tmp_path: Path) -> None:
        config = {"model_cfg": {"embed_dim": 24, "vision_cfg": {}, "text_cfg": {}}}
        (tmp_path / OPEN_CLIP_CONFIG).write_text(json.dumps(config))
        torch.save(small(), tmp_path / "x.pt")
        assert read_original(str(tmp_path / "x.pt")).open_clip == config
        for text in ("{", "[]", "{}", '{"model_cfg": {"vision_cfg": []}}'):
            (tmp_path / OPEN_CLIP_CONFIG).write_text(text)
            with pytest.raises(
                LongCLIPError, match=r"open_clip_config.json (is no JSON file|holds no JSON object|has no model_cfg)"
            ):
                read_original(str(tmp_path / "x.pt"))

    def test_names_that_stand_twice(self, tmp_path: Path) -> None:
        torch.save(small() | {"text.text_projection": torch.zeros(2)}, tmp_path / "x.pt")
        with pytest.raises(ConversionError, match=r"twice, under text. too: text_projection"):
            read_original(str(tmp_path / "x.pt"))

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("nowhere.pt",), r"nowhere.pt: no such file. In a Hub repository, name the file too: ID FILE"),
            ((".",), r"\. is a folder. Name the file in it .* --to"),
            ((".", "x.pt"), r"\. holds no file x.pt"),
            ((".", "x.pt", "main"), r"\. is on this machine, and --revision main is for Hub ids"),
        ],
    )
    def test_no_such_file(
        self, args: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConversionError, match=message):
            read_original(*args)


class TestImages:
    def test_the_side_is_the_towers(self) -> None:
        settings = image_settings({"size": 224, "crop_size": 224, "image_mean": [0.1], "resample": 3}, 336, None)
        assert settings == {
            "size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}, "do_center_crop": True,
            "image_mean": [0.1], "resample": 3,
        }  # fmt: skip

    @pytest.mark.parametrize("resize", ["shortest", "squash"])
    def test_open_clips_preprocessing_there_and_back(self, resize: str) -> None:
        theirs = {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3], "interpolation": "bilinear", "resize_mode": resize}
        ours = image_settings(IMAGES, 224, {"preprocess_cfg": theirs})
        assert (ours["image_mean"], ours["image_std"], ours["resample"]) == ([0.1, 0.2, 0.3], [1, 2, 3], 2)
        assert ours["do_center_crop"] == (resize == "shortest")
        assert open_clip_config(random_clip_config("ViT-B/16"), ours)["preprocess_cfg"] == theirs

    @pytest.mark.parametrize(
        "theirs, message",
        [({"resize_mode": "longest"}, "resizes by 'longest'"), ({"interpolation": "random"}, "resizes by 'random'")],
    )
    def test_refuses_what_clips_processor_has_not(self, theirs: dict[str, str], message: str) -> None:
        with pytest.raises(ConversionError, match=message):
            image_settings(IMAGES, 224, {"preprocess_cfg": theirs})

    def test_open_clip_needs_all_of_it(self) -> None:
        config = random_clip_config("ViT-B/16")
        with pytest.raises(ConversionError, match=r"preprocessor_config.json lacks image_std, size"):
            open_clip_config(config, {"image_mean": [0], "resample": 3})
        with pytest.raises(ConversionError, match="lacks a known resampling"):
            open_clip_config(config, IMAGES | {"resample": 5})
        config.text_config.hidden_act = "gelu"
        with pytest.raises(ConversionError, match=re.escape("both towers, not gelu, quick_gelu")):
            open_clip_config(config, IMAGES)


# Whatever JSON can say, one of each type; none is what any setting below expects.
WRONG = [None, True, -1, 0, 2.5, 10**30, "x", "", [], [1], [[]], {}, {"a": 1}]

WHOLE: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 512,
        "quick_gelu": True,
        "custom_text": False,
        "vision_cfg": {
            "image_size": 224,
            "patch_size": 32,
            "width": 768,
            "layers": 12,
            "head_width": 64,
            "mlp_ratio": 4.0,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 512,
            "heads": 8,
            "layers": 12,
            "mlp_ratio": 4.0,
        },
    },
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "shortest"},
}  # fmt: skip


class TestWrongTypes:
    """A setting of another type is an error that a user can read, or one that says what CLIP has not; never a bug."""

    @staticmethod
    def places(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        inner = (
            [place for key in value for place in TestWrongTypes.places(value[key], (*path, key))]
            if isinstance(value, dict)
            else []
        )
        return [path, *inner] if path else inner

    def test_at_every_key_of_open_clips_configuration(self, tmp_path: Path) -> None:
        file = tmp_path / OPEN_CLIP_CONFIG
        refused = 0
        model = original("ViT-B/32")
        for place in self.places(WHOLE):
            for wrong in WRONG:
                spoiled = json.loads(json.dumps(WHOLE))
                part = spoiled
                for key in place[:-1]:
                    part = part[key]
                part[place[-1]] = wrong
                file.write_text(json.dumps(spoiled))
                try:
                    read = read_open_clip_config(file)
                    clip_config(replace(model, open_clip=read))
                    image_settings(IMAGES, 224, read)
                except LongCLIPError:
                    refused += 1
        assert refused > 100

    @pytest.mark.parametrize("content", ["[" * 100_000, "{", "[]", "1", '"x"', "\ufeff{}", "NaN"])
    def test_what_is_no_object(self, content: str, tmp_path: Path) -> None:
        (tmp_path / OPEN_CLIP_CONFIG).write_text(content)
        with pytest.raises(LongCLIPError):
            read_open_clip_config(tmp_path / OPEN_CLIP_CONFIG)

    @pytest.mark.parametrize(
        ("part", "name", "value", "message"),
        [
            ("text_cfg", "heads", "8", "text_cfg.heads is '8', expected a count"),
            ("vision_cfg", "head_width", 0, "vision_cfg.head_width is 0, expected a count"),
            ("preprocess_cfg", "mean", 0.5, "preprocess_cfg.mean is 0.5, expected three numbers"),
            ("preprocess_cfg", "interpolation", [], r"preprocess_cfg.interpolation is \[\], expected a text"),
        ],
    )
    def test_the_error_says_where(self, part: str, name: str, value: Any, message: str, tmp_path: Path) -> None:
        spoiled = json.loads(json.dumps(WHOLE))
        (spoiled if part == "preprocess_cfg" else spoiled["model_cfg"])[part][name] = value
        (tmp_path / OPEN_CLIP_CONFIG).write_text(json.dumps(spoiled))
        with pytest.raises(ConversionError, match=message):
            read_open_clip_config(tmp_path / OPEN_CLIP_CONFIG)

    def test_at_every_key_of_the_image_settings(self) -> None:
        config = random_clip_config("ViT-B/32")
        for name in IMAGES:
            for wrong in WRONG:
                try:
                    open_clip_config(config, IMAGES | {name: wrong})
                except LongCLIPError:
                    continue
                assert name == "size"  # which only says whether images are squashed
