"""The stand-ins have the shapes of the real checkpoints and a tokenizer that behaves like CLIP's."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, CLIPModel

from examples.random_clip import SENTENCES, clip_config, write_tokenizer

# Parameters in millions, as the checkpoints' own cards and papers give them.
MILLIONS = {
    "ViT-B/32": 151.3,
    "ViT-B/16": 149.6,
    "ViT-L/14": 427.6,
    "ViT-L/14-336": 427.9,
    "ViT-H/14": 986.1,
    "ViT-bigG/14": 2539.6,
}


@pytest.mark.parametrize("size", MILLIONS)
def test_official_sizes_have_their_official_number_of_parameters(size: str) -> None:
    with torch.device("meta"):
        model = CLIPModel(clip_config(size))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(MILLIONS[size], abs=0.06)


def test_tokenizer_reads_back_what_it_was_given(tmp_path: Path) -> None:
    vocab_size = write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer([SENTENCES[1], "Zürich, 北京!"]).input_ids
    assert all(row[0] == vocab_size - 2 and row[-1] == vocab_size - 1 for row in ids)
    assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == SENTENCES[1]
    assert tokenizer.model_max_length == 77
