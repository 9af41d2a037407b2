"""Pre-training writes a CLIP of 77 positions, and the one that is committed knows its world."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, CLIPModel

from examples.scenes import CLIP
from examples.scenes.captions import CLASS_NAMES, TEMPLATES
from examples.scenes.dataset import example
from examples.scenes.pretrain import LOG, Collator, configuration, main
from longclip_hf.evaluation.classification import class_embeddings, classification_ranks
from longclip_hf.evaluation.retrieval import retrieval_ranks
from modeling_longclip.compat import features

MEGABYTES = 5


def test_what_is_committed_is_small_and_of_the_script() -> None:
    files = [file for file in CLIP.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= MEGABYTES * 1e6
    processor = AutoProcessor.from_pretrained(CLIP)
    expected, found = configuration(processor.tokenizer), CLIPModel.config_class.from_pretrained(CLIP)
    for tower in ("text_config", "vision_config"):
        of_script, of_file = (getattr(config, tower).to_dict() for config in (expected, found))
        differ = {name for name in of_script if of_script[name] != of_file.get(name)}
        assert differ <= {"dtype", "torch_dtype", "transformers_version", "_name_or_path"}, differ
    assert found.text_config.max_position_embeddings == 77
    details, _, both = json.loads((CLIP / LOG).read_text())
    assert details[0]["loss"] > 5 and both[-2]["loss"] < details[-2]["loss"] < 2.6


@torch.inference_mode()
def test_what_is_committed_knows_main_objects_and_details() -> None:
    """On a part of each test; README.md has the figures of the whole."""
    model, processor = CLIPModel.from_pretrained(CLIP, dtype=torch.float32).eval(), AutoProcessor.from_pretrained(CLIP)

    def images(split: str, indices: range) -> torch.Tensor:
        pictures = [example(split, index)["image"] for index in indices]
        return features(model.get_image_features(**processor(images=pictures, return_tensors="pt")))

    def texts(captions: list[str]) -> torch.Tensor:
        return features(model.get_text_features(**processor.tokenizer(captions, padding=True, return_tensors="pt")))

    prompts = texts([template.format(name) for name in CLASS_NAMES for template in TEMPLATES])
    classes = class_embeddings(prompts.unflatten(0, (len(CLASS_NAMES), len(TEMPLATES))))
    labels = torch.tensor([example("classes", index)["label"] for index in range(210)])
    assert classification_ranks(images("classes", range(210)), classes, labels).hits(1).float().mean() >= 0.95

    # Lists of all details, of pictures that share the main object: chance is half a percent.
    rows = range(0, 800, 4)
    lists = [list_of_details(index) for index in rows]
    ranks = retrieval_ranks(images("hard", rows), texts(lists), torch.arange(len(rows)))
    assert ranks["t2i"].hits(1).float().mean() > 0.7


def list_of_details(index: int) -> str:
    from examples.scenes.world import draw_scene

    named = [f"a {detail.colour} {detail.shape}" for detail in draw_scene("hard", index).details]
    return f"{', '.join(named[:-1])} and {named[-1]}.".capitalize()


@pytest.mark.filterwarnings("ignore")  # of the Trainer's, about the machine
def test_pretraining_writes_a_clip_of_77_positions(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    threads = torch.get_num_threads()
    assert main(["--output", str(folder), "--steps", "2", "--batch_size", "8"]) == 0
    assert torch.get_num_threads() == threads
    model = CLIPModel.from_pretrained(folder)
    assert model.config.text_config.max_position_embeddings == 77
    assert len(json.loads((folder / LOG).read_text())) == 1
    assert not (tmp_path / "clip.training").exists()
    assert len(AutoProcessor.from_pretrained(folder).tokenizer) == model.config.text_config.vocab_size == 738

    further = ["--start", str(folder), "--main_share", "0.5", "--output", str(tmp_path / "further")]
    assert main([*further, "--steps", "1", "--batch_size", "8"]) == 0
    assert len(json.loads((tmp_path / "further" / LOG).read_text())) == 2


def test_a_batch_is_what_the_processor_makes() -> None:
    processor = AutoProcessor.from_pretrained(CLIP)
    rows = [example("pretrain", index) for index in range(5)]
    made = Collator(processor)(rows)
    mains = Collator(processor, main_share=0.4)(rows)
    expected = processor(
        text=[row["caption"] for row in rows], images=[row["image"] for row in rows], padding=True, return_tensors="pt"
    )
    assert made.pop("return_loss") is True
    assert made.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(made[name], values)
    length = min(made["input_ids"].shape[1], mains["input_ids"].shape[1])
    changed = (made["input_ids"][:, :length] != mains["input_ids"][:, :length]).any(1)
    assert not changed[2:].any() and processor.tokenizer.decode(mains["input_ids"][0], True).startswith(
        rows[0]["short_caption"].lower()[:20]
    )
