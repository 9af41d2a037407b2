"""Features are those of the plain way, padded and one by one; of any number of processes; computed once."""

import io
import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fork_server
import numpy as np
import pytest
import torch
from conftest import run_python
from encoding_runs import KILL_AT, encoded, make_captions, make_encoder, make_images
from hub_server import HubServer
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, CLIPModel, CLIPTextModelWithProjection, SiglipConfig, SiglipModel

from examples.random_clip import SENTENCES, write_image_settings, write_tokenizer
from longclip_hf.errors import EncodingError
from longclip_hf.evaluation import encoding, loading
from longclip_hf.evaluation.benchmarks import ImageFile
from longclip_hf.evaluation.encoding import Encoder
from longclip_hf.evaluation.feature_store import FeatureStore
from modeling_longclip.compat import features
from modeling_longclip.defaults import LENGTH

ROOT = Path(__file__).resolve().parents[2]
# Features are of length 1 or so, in float32: what the order of sums leaves.
CLOSE = {"rtol": 0, "atol": 2e-6}


@pytest.fixture(scope="module")
def encoder(longclip_folder: Path) -> Encoder:
    return make_encoder(longclip_folder)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore(tmp_path / "store")


@torch.no_grad()
def padded(folder: Path, texts: list[str], length: int) -> torch.Tensor:
    """The plain way: everything padded to `length`, with its mask."""
    model, tokenizer = CLIPModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder).tokenizer
    batch = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    assert batch["input_ids"].shape == (len(texts), length)
    return features(model.get_text_features(**batch))


def seen(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that the text tower is called with."""
    shapes = []
    original = encoder.model.get_text_features

    def spy(**inputs: torch.Tensor) -> Any:
        assert set(inputs) == {"input_ids"}
        shapes.append(tuple(inputs["input_ids"].shape))
        return original(**inputs)

    monkeypatch.setattr(encoder.model, "get_text_features", spy)
    return shapes


class TestTexts:
    def test_grouped_equals_padded(self, encoder: Encoder, longclip_folder: Path) -> None:
        """To 2e-6 absolute, at features of about 1; any two captions differ by far more."""
        captions = make_captions()
        expected = padded(longclip_folder, captions, LENGTH)
        result = encoder.encode_texts(captions)
        assert result.embeds.dtype == torch.float32
        torch.testing.assert_close(result.embeds, expected, **CLOSE)
        assert torch.pdist(expected[:-1]).min() > 1e-2
        assert torch.equal(result.embeds[-1], result.embeds[1])

    @pytest.mark.parametrize("batch_tokens", [1, 250, 1000, 10**6])
    def test_batches_are_bounded_and_of_similar_length(
        self, encoder: Encoder, longclip_folder: Path, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        captions = make_captions()
        expected = encoder.encode_texts(captions).embeds
        shapes = seen(encoder, monkeypatch)
        monkeypatch.setattr(encoder, "batch_tokens", batch_tokens)
        result = encoder.encode_texts(captions)
        torch.testing.assert_close(result.embeds, expected, **CLOSE)
        assert sum(rows for rows, _ in shapes) == len(set(captions))
        assert all(rows * length <= batch_tokens or rows == 1 for rows, length in shapes)
        lengths = [length for _, length in shapes]
        assert lengths == sorted(lengths, reverse=True)
        if batch_tokens == 1:  # every one alone, with no padding at all
            assert sorted(lengths) == sorted(result.lengths[:-1].tolist())

    def test_lengths_and_truncation(self, clip_folder: Path, longclip_folder: Path) -> None:
        """The tokenizer has a token for every word; start and end of text count."""
        texts = ["a dog", "dog " * 75, "dog " * 76, "dog " * 246, "dog " * 247]
        expected = [4, 77, 78, 248, 249]
        for folder, positions, truncated in ((clip_folder, 77, 3), (longclip_folder, LENGTH, 1)):
            encoder = make_encoder(folder)
            assert encoder.positions == positions
            result = encoder.encode_texts(texts)
            assert result.lengths.tolist() == expected
            assert result.truncated == truncated
            torch.testing.assert_close(result.embeds, padded(folder, texts, positions), **CLOSE)
            # What is cut is equal to what is exactly as long.
            assert torch.equal(result.embeds[-1], result.embeds[{77: 1, LENGTH: 3}[positions]])

    @pytest.mark.parametrize("length", [3, 10, 77, 1000])
    def test_shortened_with_the_end_of_text_kept(
        self, encoder: Encoder, longclip_folder: Path, length: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        captions = make_captions()
        shapes = seen(encoder, monkeypatch)
        result = encoder.encode_texts(captions, max_length=length)
        kept = min(length, LENGTH)
        assert max(shape[1] for shape in shapes) == min(kept, int(result.lengths.max()))
        assert result.truncated == int((result.lengths > kept).sum())
        torch.testing.assert_close(result.embeds, padded(longclip_folder, captions, kept), **CLOSE)

    def test_the_part_that_is_read(self, clip_folder: Path, encoder: Encoder) -> None:
        """Whole words that fit into 77 tokens, and not one more; of writing without spaces, letters."""
        short = make_encoder(clip_folder)
        for text in ("a dog, " * 60, "\u72d7\u5728\u8dd1" * 40, "a\n\n red   dog " * 50):
            read = short.read_part(text)
            assert 0 < read < len(text)
            assert int(short.encode_texts([text[:read]]).lengths[0]) <= 77
            following = len(text) - len(text[read:].lstrip()) + 1 if "a" not in text else text.index(" ", read + 1) + 4
            assert int(short.encode_texts([text[:following]]).lengths[0]) > 77
            assert encoder.read_part(text[:60]) == 60
        assert short.read_part("a dog") == 5

    def test_equal_after_the_cut_is_encoded_once(self, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
        shapes = seen(encoder, monkeypatch)
        before = encoder.encoded["text"]
        embeds = encoder.encode_texts(["a dog on the beach", "a dog on a bench", "A  DOG"], max_length=4).embeds
        assert shapes == [(1, 4)]
        assert encoder.encoded["text"] - before == 1
        assert torch.equal(embeds[0], embeds[1]) and torch.equal(embeds[0], embeds[2])

    def test_refusals(self, encoder: Encoder) -> None:
        with pytest.raises(EncodingError, match=r"^2 of 3 texts are empty: 0, 2\. Leave them out\.$"):
            encoder.encode_texts(["", "a dog", " \n"])
        with pytest.raises(EncodingError, match="no texts"):
            encoder.encode_texts([])
        with pytest.raises(EncodingError, match="Of 2 tokens, none is the text's: 3 are the fewest"):
            encoder.encode_texts(["a dog"], max_length=2)


class TestImages:
    def test_equal_to_the_plain_way(self, encoder: Encoder, longclip_folder: Path) -> None:
        images = make_images()
        model, processor = CLIPModel.from_pretrained(longclip_folder), AutoProcessor.from_pretrained(longclip_folder)
        pictures = [Image.open(io.BytesIO(image.read())) for image in images]
        with torch.no_grad():
            expected = features(
                model.get_image_features(processor.image_processor(pictures, return_tensors="pt")["pixel_values"])
            )
        before = encoder.encoded["image"]
        result = encoder.encode_images(images)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, expected, **CLOSE)
        assert torch.pdist(expected[:-1]).min() > 1e-2
        # The last picture is the first under another name.
        assert encoder.encoded["image"] - before == len(images) - 1
        assert torch.equal(result[0], result[-1])

    def test_in_other_processes(self, encoder: Encoder, longclip_folder: Path) -> None:
        images = make_images()
        assert torch.equal(
            make_encoder(longclip_folder, workers=2).encode_images(images), encoder.encode_images(images)
        )

    def test_few_decoded_pixels_are_held(self, longclip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As many as fit and one more; the features are those of a whole batch."""
        made: list[int] = []
        inputs = encoding.image_inputs
        monkeypatch.setattr(encoding, "image_inputs", lambda p, held: made.append(len(held)) or inputs(p, held))

        def encoded() -> torch.Tensor:
            return make_encoder(longclip_folder, workers=0, batch_images=5).encode_images(make_images()[:5])

        whole = encoded()
        monkeypatch.setattr(encoding, "HELD_PIXELS", 40 * 36)
        assert torch.equal(encoded(), whole)
        assert made == [5, 2, 2, 1]

    def test_grey_and_turned(self, encoder: Encoder) -> None:
        """A JPEG in grey, and the same turned on disk and upright by its EXIF data."""
        upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (33, 47), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise
        contents = []
        for image, options in (
            (upright, {}),
            (upright.rotate(90, expand=True), {"exif": exif}),
            (upright.convert("RGB"), {}),
        ):
            file = io.BytesIO()
            image.save(file, "PNG", **options)
            contents.append(file.getvalue())
        embeds = encoder.encode_images([ImageFile(str(i), partial(bytes, c)) for i, c in enumerate(contents)])
        torch.testing.assert_close(embeds[[1, 2]], embeds[[0, 0]], **CLOSE)

    def test_all_that_cannot_be_read_are_named_at_once(self, longclip_folder: Path, store: FeatureStore) -> None:
        images = make_images()
        whole = images[0].read()
        images[2:4] = [
            ImageFile("half.png", partial(bytes, whole[:400])),
            ImageFile("text.png", partial(bytes, b"text")),
        ]
        encoder = make_encoder(longclip_folder, store=store)
        with pytest.raises(
            EncodingError, match=r"^2 of 10 different images cannot be encoded: half\.png is unreadable: .*; text\.png"
        ):
            encoder.encode_images(images)
        # The others are stored.
        again = make_encoder(longclip_folder, store=store)
        again.encode_images([image for image in images if image.name not in ("half.png", "text.png")])
        assert (again.encoded["image"], again.stored["image"]) == (0, 8)

    def test_files_that_are_gone_are_named_before_anything_is_decoded(
        self, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(encoder.model, "get_image_features", lambda **inputs: pytest.fail("was encoded"))
        gone = [ImageFile(f"{i}.png", (tmp_path / f"{i}.png").read_bytes) for i in range(12)]
        with pytest.raises(
            EncodingError, match=r"^12 of 23 images .*0\.png cannot be read: FileNotFoundError.*; and 2 more$"
        ):
            encoder.encode_images([*make_images(), *gone])

    def test_oversized(self, longclip_folder: Path) -> None:
        with pytest.raises(EncodingError, match=r"0\.png is oversized: 36 x 40; at most 100 pixels"):
            make_encoder(longclip_folder, max_pixels=100).encode_images(make_images())
        with pytest.raises(EncodingError, match="no images"):
            make_encoder(longclip_folder).encode_images([])


class TestStore:
    def test_a_second_time_nothing_is_encoded(
        self, longclip_folder: Path, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        captions, images = make_captions(), make_images()
        first = make_encoder(longclip_folder, store=store)
        texts, pictures = first.encode_texts(captions), first.encode_images(images)
        assert first.encoded == {"text": 28, "image": 10} and first.stored == {"text": 0, "image": 0}
        second = make_encoder(longclip_folder, store=store)
        for method in ("get_text_features", "get_image_features"):
            monkeypatch.setattr(second.model, method, lambda **inputs: pytest.fail("was encoded again"))
        again = second.encode_texts(captions)
        assert torch.equal(again.embeds, texts.embeds) and torch.equal(again.lengths, texts.lengths)
        assert torch.equal(second.encode_images(images), pictures)
        assert second.encoded == {"text": 0, "image": 0} and second.stored == {"text": 28, "image": 10}

    def test_another_content_is_encoded(self, longclip_folder: Path, store: FeatureStore) -> None:
        encoder = make_encoder(longclip_folder, store=store)
        captions, images = make_captions(), make_images()
        encoder.encode_texts(captions), encoder.encode_images(images)
        captions[3] += " dog"
        content = encoded(np.zeros((40, 36, 3), dtype=np.uint8))
        images[3] = ImageFile(images[3].name, partial(bytes, content))
        texts, pictures = encoder.encode_texts(captions), encoder.encode_images(images)
        assert encoder.encoded == {"text": 28 + 1, "image": 10 + 1}
        fresh = make_encoder(longclip_folder)
        torch.testing.assert_close(texts.embeds, fresh.encode_texts(captions).embeds, **CLOSE)
        torch.testing.assert_close(pictures, fresh.encode_images(images), **CLOSE)

    def test_a_shorter_caption_is_another_one(self, longclip_folder: Path, store: FeatureStore) -> None:
        """Captions that max_length leaves as they are come from the store."""
        encoder = make_encoder(longclip_folder, store=store)
        captions = ["a dog", "a dog on the beach"]
        encoder.encode_texts(captions)
        encoder.encode_texts(captions, max_length=5)
        assert (encoder.encoded["text"], encoder.stored["text"]) == (3, 1)

    @pytest.mark.parametrize("change", ["weight", "dtype", "pixels", "activation"])
    def test_another_model_is_encoded_again(
        self, change: str, longclip_folder: Path, store: FeatureStore, copy_of: Callable[[Path], Path]
    ) -> None:
        first = make_encoder(longclip_folder, store=store)
        first.encode_texts(["a dog"]), first.encode_images(make_images())
        folder, options = copy_of(longclip_folder), {}
        if change == "weight":
            weights = load_file(folder / "model.safetensors")
            weights["visual_projection.weight"][0, 0] += 1e-4
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
        elif change == "dtype":
            options = {"dtype": torch.bfloat16}
        else:
            name, key, value = {
                "pixels": ("preprocessor_config.json", "image_mean", [0.5, 0.5, 0.5]),
                "activation": ("config.json", "text_config", {"hidden_act": "gelu"}),
            }[change]
            config = json.loads((folder / name).read_text())
            config[key] = config[key] | value if isinstance(value, dict) else value
            (folder / name).write_text(json.dumps(config))
        second = make_encoder(folder, store=store, **options)
        assert (second.fingerprint != first.fingerprint) == (change != "activation")
        second.encode_texts(["a dog"]), second.encode_images(make_images())
        assert second.encoded == {"text": 1, "image": 10}

    def test_a_copy_of_the_model_is_the_same(
        self, longclip_folder: Path, store: FeatureStore, copy_of: Callable[[Path], Path]
    ) -> None:
        first, second = (make_encoder(f, store=store) for f in (longclip_folder, copy_of(longclip_folder)))
        assert first.fingerprint == second.fingerprint and len(first.fingerprint) == 64
        first.encode_texts(["a dog"])
        second.encode_texts(["a dog"])
        assert second.encoded["text"] == 0

    def test_edited_code_encodes_anew(
        self, longclip_folder: Path, store: FeatureStore, copy_of: Callable[[Path], Path]
    ) -> None:
        """The weights, settings and names stay as they are."""
        folder = copy_of(longclip_folder)
        first = make_encoder(folder, store=store, trust_remote_code=True)
        before = first.encode_texts(["a dog"]).embeds
        file = folder / "modeling_longclip.py"
        code = file.read_text()
        file.write_text(
            f"{code}\nfrom .compat import features\n"
            "own = LongCLIPModel.get_text_features\n"
            "LongCLIPModel.get_text_features = lambda self, **inputs: 2 * features(own(self, **inputs))\n"
        )
        # With the same configuration, transformers would take the class that this process has already.
        configuration = folder / "configuration_longclip.py"
        settings = configuration.read_text()
        configuration.write_text(f"{settings}# edited\n")
        second = make_encoder(folder, store=store, trust_remote_code=True)
        assert second.fingerprint == first.fingerprint and second.model_class == first.model_class
        torch.testing.assert_close(second.encode_texts(["a dog"]).embeds, 2 * before, **CLOSE)
        file.write_text(code)
        configuration.write_text(settings)
        third = make_encoder(folder, store=store, trust_remote_code=True)
        assert torch.equal(third.encode_texts(["a dog"]).embeds, before) and third.stored["text"] == 1

    @pytest.mark.parametrize("package", ["pillow", "torch", "transformers"])
    def test_another_version_encodes_anew(
        self, package: str, longclip_folder: Path, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_encoder(longclip_folder, store=store).encode_texts(["a dog"])
        monkeypatch.setattr(loading, "version", lambda name: "0.0" if name == package else version(name))
        second = make_encoder(longclip_folder, store=store)
        second.encode_texts(["a dog"])
        assert second.encoded["text"] == 1

    @pytest.mark.parametrize("tower", ["text", "image"])
    def test_what_is_not_finite_is_named_and_not_stored(
        self, tower: str, longclip_folder: Path, store: FeatureStore, copy_of: Callable[[Path], Path]
    ) -> None:
        """One word's embedding is at fault, and one picture's first pixel."""
        folder = copy_of(longclip_folder)
        weights = load_file(folder / "model.safetensors")
        umbrella = AutoProcessor.from_pretrained(folder).tokenizer("umbrella")["input_ids"][1]
        weights["text_model.embeddings.token_embedding.weight"][umbrella] = torch.inf
        weights["vision_model.embeddings.patch_embedding.weight"] *= torch.nan
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        encoder = make_encoder(folder, store=store)
        said = r"^2 of 4 different texts cannot .*'the umbrella'.*'an umbrella'.* not finite, in float32$"
        with pytest.raises(EncodingError, match=said if tower == "text" else r"features of 0\.png are not finite"):
            if tower == "text":
                encoder.encode_texts(["a dog", "A dog", "the umbrella", "a cat", "an umbrella"])
            else:
                encoder.encode_images(make_images())
        assert list(store.folder.rglob("*.safetensors")) == []


class TestCheckpoints:
    def test_what_is_said_of_it(self, longclip_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        encoder = make_encoder(longclip_folder, trust_remote_code=True, dtype="bfloat16")
        assert (encoder.name, encoder.revision) == (str(longclip_folder), None)
        assert (encoder.model_class, encoder.dtype, encoder.positions) == ("LongCLIPModel", "bfloat16", LENGTH)
        assert encoder.trims and caplog.records == []
        half, whole = (e.encode_texts(SENTENCES).embeds for e in (encoder, make_encoder(longclip_folder)))
        assert half.dtype == torch.float32
        assert 0 < (half - whole).abs().max() < 0.05 * whole.abs().max()

    def test_its_own_code_and_the_stock_class_agree(self, encoder: Encoder, longclip_folder: Path) -> None:
        own = make_encoder(longclip_folder, trust_remote_code=True)
        assert (encoder.model_class, own.model_class) == ("CLIPModel", "LongCLIPModel")
        assert own.fingerprint == encoder.fingerprint
        assert torch.equal(own.encode_texts(SENTENCES).embeds, encoder.encode_texts(SENTENCES).embeds)

    def test_the_table_counts_and_not_an_old_tokenizer(
        self, longclip_folder: Path, copy_of: Callable[[Path], Path]
    ) -> None:
        folder = copy_of(longclip_folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 77}))
        assert make_encoder(folder).encode_texts(["dog " * 100]).truncated == 0

    def test_a_model_that_sees_its_padding_keeps_it(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """SigLIP: attention goes both ways, and the feature is read at the last position."""
        folder = tmp_path / "siglip"
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        vocab = write_tokenizer(folder)
        write_image_settings(folder, 32)
        for name in ("preprocessor_config.json", "tokenizer_config.json"):
            config = json.loads((folder / name).read_text()) | {"processor_class": "CLIPProcessor"}
            config |= {"model_max_length": 40, "model_input_names": ["input_ids"]} if "token" in name else {}
            (folder / name).write_text(json.dumps(config))
        ids = {"bos_token_id": vocab - 2, "eos_token_id": vocab - 1, "pad_token_id": vocab - 1}
        text = {"vocab_size": vocab, "max_position_embeddings": 40, "projection_size": 32, **ids}
        torch.manual_seed(0)
        model = SiglipModel(
            SiglipConfig(text_config=size | text, vision_config=size | {"image_size": 32, "patch_size": 16})
        )
        model.save_pretrained(folder)
        with caplog.at_level(logging.WARNING, "longclip_hf.evaluation.encoding"):
            encoder = make_encoder(folder)
        assert "is no CLIP but a SiglipModel: every text is padded to 40 tokens" in caplog.text
        captions = make_captions(longest=60)
        batch = encoder.tokenizer(captions, padding="max_length", truncation=True, max_length=40, return_tensors="pt")
        with torch.no_grad():
            expected = features(model.eval().get_text_features(input_ids=batch["input_ids"]))
        torch.testing.assert_close(encoder.encode_texts(captions).embeds, expected, **CLOSE)
        assert not encoder.trims
        encoder.trims = True
        assert (encoder.encode_texts(captions).embeds - expected).abs().max() > 1e-2

    @pytest.mark.parametrize("damage", ["hostile", "damaged", "empty"])
    def test_pickled_weights_run_nothing(
        self, damage: str, clip_folder: Path, copy_of: Callable[[Path], Path], tmp_path: Path
    ) -> None:
        class Hostile:
            def __reduce__(self) -> tuple[Any, tuple[str]]:
                return os.system, (f"touch {tmp_path / 'ran'}",)

        folder = copy_of(clip_folder)
        (folder / "model.safetensors").unlink()
        if damage == "hostile":
            torch.save({"logit_scale": Hostile()}, folder / "pytorch_model.bin")
        else:
            (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1})[:9] if damage == "damaged" else b"")
        with pytest.raises(EncodingError, match="cannot be loaded: ") as error:
            make_encoder(folder)
        assert "weights_only" not in str(error.value)
        assert not (tmp_path / "ran").exists()

    def test_no_projection(self, clip_folder: Path, tmp_path: Path) -> None:
        CLIPTextModelWithProjection.from_pretrained(clip_folder).save_pretrained(tmp_path / "tower")
        with pytest.raises(
            EncodingError, match=r"tower is a CLIPTextModel\w*, which has no get_text_features: .* whole CLIP"
        ):
            make_encoder(tmp_path / "tower")

    def test_a_tensor_is_missing(self, clip_folder: Path, copy_of: Callable[[Path], Path]) -> None:
        folder = copy_of(clip_folder)
        weights = load_file(folder / "model.safetensors")
        del weights["text_projection.weight"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(EncodingError, match=r"these tensors of CLIPModel are missing: text_projection\.weight$"):
            make_encoder(folder)

    def test_a_table_that_is_too_short(self, clip_folder: Path, copy_of: Callable[[Path], Path]) -> None:
        folder = copy_of(clip_folder)
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["max_position_embeddings"] = LENGTH
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(EncodingError, match="cannot be loaded"):
            make_encoder(folder)

    def test_the_tokenizer_of_another_checkpoint(self, clip_folder: Path, copy_of: Callable[[Path], Path]) -> None:
        folder = copy_of(clip_folder)
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["eos_token_id"] = 5
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(EncodingError, match="ends a text with id 758, and the model reads the feature at id 5"):
            make_encoder(folder)

    @pytest.mark.parametrize("file", ["config.json", "model.safetensors", "preprocessor_config.json"])
    def test_a_file_is_missing(self, file: str, clip_folder: Path, copy_of: Callable[[Path], Path]) -> None:
        folder = copy_of(clip_folder)
        (folder / file).unlink()
        with pytest.raises(EncodingError, match=f"^{folder}"):
            make_encoder(folder)

    def test_what_is_not_there(self, clip_folder: Path, tmp_path: Path) -> None:
        with pytest.raises(EncodingError, match="nowhere cannot be loaded"):
            make_encoder(tmp_path / "nowhere")
        with pytest.raises(EncodingError, match="is a folder, and revision 'main' is for Hub ids"):
            make_encoder(clip_folder, revision="main")

    @pytest.mark.slow
    def test_a_hub_id_and_its_commit(self, clip_folder: Path, tmp_path: Path) -> None:
        with HubServer(tmp_path / "hub") as hub:
            code = (
                "from huggingface_hub import HfApi\n"
                "from longclip_hf.evaluation.encoding import Encoder\n"
                "api = HfApi()\n"
                "api.create_repo('me/clip')\n"
                f"commit = api.upload_folder(repo_id='me/clip', folder_path={str(clip_folder)!r}).oid\n"
                "encoder = Encoder('me/clip', revision='main', device='cpu')\n"
                "print(encoder.name, encoder.revision == commit, len(encoder.encode_texts(['a dog']).embeds))"
            )
            printed = run_python(code, hub.environment(), cwd=ROOT)
        assert printed.splitlines()[-1] == "me/clip True 1"


# Several processes, and processes that are killed


@pytest.fixture(scope="module")
def folder(longclip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes wrote what they got."""
    folder = tmp_path_factory.mktemp("runs")
    line = [sys.executable, str(ROOT / "tests" / "encoding_runs.py"), str(longclip_folder), str(folder)]
    done = fork_server.run(line, env={"PYTHONPATH": str(ROOT)}, stderr=subprocess.STDOUT, timeout=200)
    assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """What each process of one, of two and of three got, by (rank, processes)."""
    return {(index, count): torch.load(folder / f"{index}-of-{count}.pt") for index, count in EVERY}


EVERY = [(index, count) for count in (1, 2, 3) for index in range(count)]


@pytest.mark.parametrize("key", EVERY)
def test_every_process_gets_the_features_of_one(
    runs: dict[tuple[int, int], dict[str, Any]], key: tuple[int, int], encoder: Encoder
) -> None:
    """To the last bit, with an uneven number of rows and batches; none is lost or doubled."""
    one, run = runs[0, 1], runs[key]
    assert len(one["batches"]) == 7
    assert run["batches"] == one["batches"][key[0] :: key[1]]
    for tower in ("texts", "images"):
        assert torch.equal(run[tower].view(torch.int32), one[tower].view(torch.int32))
    torch.testing.assert_close(run["texts"], encoder.encode_texts(make_captions()).embeds, **CLOSE)
    torch.testing.assert_close(run["images"], encoder.encode_images(make_images()), **CLOSE)
    assert torch.equal(run["lengths"], one["lengths"]) and run["truncated"] == one["truncated"]
    assert run["first"] == ({"text": 28, "image": 10}, {"text": 0, "image": 0})
    # One text is new; the others, and every second picture, come from the store.
    assert run["second"] == ({"text": 29, "image": 10}, {"text": 28, "image": 6 - 1})
    again_texts, again_images = run["again"]
    assert torch.equal(again_texts[:-1], one["texts"].flip(0))
    assert torch.equal(again_images, one["images"][[10, 8, 6, 4, 2, 0]])


@pytest.mark.parametrize("key", EVERY)
def test_every_process_says_what_is_wrong_on_any(
    runs: dict[tuple[int, int], dict[str, Any]], key: tuple[int, int]
) -> None:
    gone, no_pictures, not_finite = runs[key]["said"]
    assert gone == "1 of 12 images cannot be encoded: gone.png cannot be read: FileNotFoundError: no such file"
    assert no_pictures.startswith("3 of 13 different images cannot be encoded: 0.txt is unreadable")
    assert all(f"{number}.txt is unreadable" in no_pictures for number in range(3))
    assert "are not finite, in float32" in not_finite


def test_a_killed_run_goes_on(folder: Path, runs: dict[tuple[int, int], dict[str, Any]]) -> None:
    """With what was finished, and to the last bit equal to the run that nobody killed."""
    kept = [len(load_file(file)["keys"]) for file in (folder / "store-as-killed").rglob("*.safetensors")]
    assert len(kept) == KILL_AT and 0 < sum(kept) < 28
    run = torch.load(folder / "resumed.pt")
    assert run["batches"] == runs[0, 1]["batches"][KILL_AT:]
    assert run["first"] == ({"text": 28 - sum(kept), "image": 10}, {"text": sum(kept), "image": 0})
    assert torch.equal(run["texts"].view(torch.int32), runs[0, 1]["texts"].view(torch.int32))


def test_a_name_is_no_markup(clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the name stands in the progress; `[/]` closes what was never opened, and rich raises."""
    screen = io.StringIO()
    monkeypatch.setattr(
        "longclip_hf.evaluation.encoding.Console", lambda **_: Console(file=screen, force_terminal=True, width=200)
    )
    encoder = make_encoder(clip_folder)
    encoder.name = "[/] [red]clip"
    encoder.encode_texts(["a dog"])
    assert "[/] [red]clip: texts" in screen.getvalue()
    encoder.quiet = True
    before = screen.getvalue()
    encoder.encode_texts(["a cat"])
    assert screen.getvalue() == before
