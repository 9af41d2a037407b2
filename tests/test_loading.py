"""One folder loads everywhere: from disk and from a Hub id, with its own code and without, on both majors.

Every load runs in a fresh process. The numbers are compared with those of a model that was built by hand from the
folder's configuration and tensors, without `from_pretrained`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_python
from hub_server import HubServer

ROOT = Path(__file__).parents[1]
CODE = {"compat.py", "configuration_longclip.py", "modeling_longclip.py"}
# Largest difference between two ways to load, on the same inputs and the same major: the same operations run.
EXACT = 0.0
# Between the majors: 4.57 hands sdpa a dense causal mask, 5 says is_causal. The numbers are of order 1 to 10.
ACROSS = 1e-5

# Every child runs this first. `args` are the test's; outputs go to `args["out"]`, and `report` to the test.
CHILD = """
import json, sys
from pathlib import Path

if args.get("blocked", True):
    for name in ("modeling_longclip", "conversion", "training", "evaluation", "examples"):
        sys.modules[name] = None  # importing it raises ModuleNotFoundError

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import (
    AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, AutoTokenizer,
    CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, pipeline,
)

LONG = "a red bicycle leans against a white wall next to a wooden door " * 6
TEXTS = ["a dog", LONG, LONG * 4]  # the last one is cut at 248 tokens
IMAGES = [Image.fromarray(np.arange(n, n + 40 * 50 * 3).reshape(40, 50, 3).astype(np.uint8)) for n in (0, 99)]
LABELS = ["a dog", LONG]

def batch(source, **kwargs):
    processor = AutoProcessor.from_pretrained(source, **kwargs)
    made = processor(text=TEXTS, images=IMAGES, padding=True, truncation=True, return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask", "pixel_values")}

def tensor(output):
    return output if isinstance(output, torch.Tensor) else output.pooler_output

@torch.inference_mode()
def outputs(model, inputs):
    model.eval()
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    if not hasattr(model, "vision_model"):
        found = model(**text)
        projected = {"text": found["text_embeds"]} if "text_embeds" in found else {"pooled": found.pooler_output}
        return {"states": found.last_hidden_state, **projected}
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
    return [type(classify.model).__name__, {
        entry["label"]: entry["score"] for entry in classify(IMAGES[0], candidate_labels=LABELS)
    }]

def origin(thing):
    return f"{type(thing).__module__}.{type(thing).__name__}"

def report(**values):
    print("REPORT" + json.dumps(values))
"""


def child(code: str, env: dict[str, str] | None = None, python: str = sys.executable, **args: Any) -> dict[str, Any]:
    """What the child's `report` said."""
    args = {name: str(value) if isinstance(value, Path) else value for name, value in args.items()}
    printed = run_python(f"args = {args!r}\n{CHILD}\n{code}", env=env, python=python)
    return json.loads(printed.split("REPORT")[-1])
