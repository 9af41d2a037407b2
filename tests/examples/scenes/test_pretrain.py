"""Pre-training writes a CLIP of 77 positions, and the one that is committed knows its world."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, CLIPModel

from examples.scenes import CLIP
from examples.scenes.dataset import example
from examples.scenes.pretrain import LOG, Collator, configuration, main
from examples.scenes.resemblance import measure, spectrum

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
    log = json.loads((CLIP / LOG).read_text())
    assert log[0]["loss"] > 4 and log[-2]["loss"] < 1.9


def test_what_is_committed_resembles_clip_and_knows_its_world() -> None:
    """Bounds around README.md's figures, on half as many scenes."""
    model, processor = CLIPModel.from_pretrained(CLIP, dtype=torch.float32).eval(), AutoProcessor.from_pretrained(CLIP)
    found = measure(model, processor, rows=512)
    assert found["variance of 128 by 16"] < 0.75 and found["variance of 128 by 32"] < 0.95
    assert found["main objects"] > 0.97
    assert min(found["lists i2t"], found["lists t2i"], found["long lists i2t"], found["long lists t2i"]) > 0.95
    # Like CLIP, it knows what there is and not where: of a family of twenty it finds no more than one by chance.
    assert max(found["placed lists i2t"], found["placed lists t2i"]) < 0.15


def test_the_spectrum_of_what_is_known() -> None:
    """Two directions of variances 4 and 1: the first of them holds 0.8."""
    rows = torch.zeros(128, 8)
    rows[::2, 0], rows[1::2, 0], rows[:64, 1], rows[64:, 1] = 2, -2, 1, -1
    assert spectrum(rows + 5, 128) == pytest.approx([1.0] * 5)
    rows = torch.eye(8).repeat(16, 1)  # seven directions, equal
    assert spectrum(rows, 128) == pytest.approx([4 / 7, 1, 1, 1, 1])


@pytest.mark.filterwarnings("ignore")  # of the Trainer's, about the machine
def test_pretraining_writes_a_clip_of_77_positions(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    threads = torch.get_num_threads()
    assert main(["--output", str(folder), "--steps", "2", "--batch_size", "8"]) == 0
    assert torch.get_num_threads() == threads
    model = CLIPModel.from_pretrained(folder)
    assert model.config.text_config.max_position_embeddings == 77
    assert json.loads((folder / LOG).read_text())[-1]["step"] == 2
    assert not (tmp_path / "clip.training").exists()
    assert len(AutoProcessor.from_pretrained(folder).tokenizer) == model.config.text_config.vocab_size == 882


def test_a_batch_is_what_the_processor_makes() -> None:
    processor = AutoProcessor.from_pretrained(CLIP)
    rows = [example("pretrain", index) for index in range(5)]
    made = Collator(processor)(rows)
    expected = processor(
        text=[row["caption"] for row in rows], images=[row["image"] for row in rows], padding=True, return_tensors="pt"
    )
    assert made.pop("return_loss") is True
    assert made.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(made[name], values)
