"""An export rearranged as immich, a photo server, reads its models: two ONNX folders and OpenCLIP's configuration.

Names are those of immich's `machine-learning/immich_ml/models/clip`: `textual/model.onnx` takes `text`, int32 of shape
`(1, length)`, `visual/model.onnx` takes `image`, float32 of shape `(1, 3, side, side)`. The first output is read.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from transformers import CLIPConfig

from longclip_hf.conversion import towers
from longclip_hf.conversion.export import ExportedFile
from longclip_hf.conversion.open_clip_config import open_clip_config
from longclip_hf.errors import ProofError
from longclip_hf.files import read_json, write_json

FOLDERS = {"text": "textual", "image": "visual"}
INPUTS = {"text": "text", "image": "image"}
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def rearrange(work: Path, config: CLIPConfig, files: Sequence[ExportedFile]) -> list[ExportedFile]:
    """Makes immich's folders of an export of one precision, with inputs of one shape; what it does not read goes.

    Args:
        work: the export, with its tokenizer and image settings.
        config: of the model.
        files: both towers.

    Returns:
        The same files, where they are now.

    Raises:
        ConversionError: if OpenCLIP's configuration cannot say what the model is.
        ProofError: if a rearranged file gives other features.
    """
    images = read_json(work / "preprocessor_config.json")
    side, length = config.vision_config.image_size, config.text_config.max_position_embeddings
    said = open_clip_config(config, images)
    moved = []
    for exported in files:
        place = work / FOLDERS[exported.tower]
        place.mkdir()
        old, new = work / exported.name, place / "model.onnx"
        shape = [1, length] if exported.tower == "text" else [1, 3, side, side]
        _rename_input(old, new, INPUTS[exported.tower], shape)
        _prove_same(old, new, shape, config.text_config.eos_token_id)
        nbytes = sum(file.stat().st_size for file in place.iterdir())
        moved.append(replace(exported, name=f"{place.name}/model.onnx", nbytes=nbytes))
    for name in _TOKENIZER:
        shutil.copyfile(work / name, work / "textual" / name)
    preprocess = {"size": side, "mode": "RGB", **said["preprocess_cfg"]}
    write_json(work / "visual" / "preprocess_cfg.json", preprocess)
    for file in work.iterdir():
        if file.is_file():
            file.unlink()
        elif file.name not in FOLDERS.values():
            shutil.rmtree(file)
    write_json(work / "config.json", said["model_cfg"])
    return moved


def _rename_input(source: Path, file: Path, name: str, shape: list[int]) -> None:
    """`source` with its input under another name, in one shape; token ids are int32 there."""
    model = onnx.load(source)
    graph = model.graph
    (given,) = graph.input
    kind = given.type.tensor_type.elem_type
    is_ids = kind == TensorProto.INT64
    operation: dict[str, Any] = {"to": kind} if is_ids else {}
    graph.node.insert(0, helper.make_node("Cast" if is_ids else "Identity", [name], [given.name], **operation))
    graph.input.remove(given)
    graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT32 if is_ids else kind, shape))
    for result in graph.output:
        result.type.tensor_type.shape.dim[0].ClearField("dim_param")
        result.type.tensor_type.shape.dim[0].dim_value = 1
    towers.save_onnx(model, file)


def _prove_same(old: Path, new: Path, shape: list[int], eos_token_id: int) -> None:
    """Both files give equal features, to what another order of sums explains."""
    first, second = towers.open_session(old), towers.open_session(new)
    draw = np.random.default_rng(0)
    values: np.ndarray = draw.standard_normal(shape).astype(np.float32)
    if len(shape) == 2:
        values = draw.integers(0, max(eos_token_id - 1, 1), shape)
        values[:, -1] = eos_token_id if eos_token_id != 2 else values.max() + 1
    theirs = first.run(None, {first.get_inputs()[0].name: values})[0]
    given = values.astype(np.int32) if len(shape) == 2 else values
    ours = second.run(None, {second.get_inputs()[0].name: given})[0]
    worst = float(np.abs(ours - theirs).max())
    if not worst <= 1e-4 * max(1.0, float(np.abs(theirs).max())):
        raise ProofError(f"{new.parent.name}/{new.name} differs from {old.name} by {worst:.1e}.")
