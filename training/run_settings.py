"""What a run was begun with, recorded in its checkpoints: a run goes on as what it is, or says what was changed."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from longclip_hf.errors import CheckpointError
from longclip_hf.training.captions import CaptionRows
from longclip_hf.training.joined import Joined
from longclip_hf.training.streams import CaptionStream, shard_rows

# Of the training arguments, those that decide which weights a run ends with: not how fast (groups, caches, workers of
# a table), nor what is logged, evaluated and saved.
COMPARED = (
    "strategy", "num_components", "components_of", "components_scope", "short_loss_weight", "mixed_length_share",
    "drop_first_sentence", "sample_sentences", "shuffle_sentences", "short_prefix", "sentence_dropout",
    "distillation", "hard_negative_margin", "keep", "train_length", "distinct_short_captions",
    "label_smoothing_factor", "logit_scale", "min_logit_scale", "max_logit_scale",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs",
    "optim", "optim_args", "learning_rate", "vision_learning_rate", "text_learning_rate", "layer_decay",
    "frozen_vision_layers", "frozen_text_layers",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "weight_decay", "decay_all",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed", "data_seed",
    "bf16", "fp16",
)  # fmt: skip
SAMPLES = 16  # rows of the data and numbers of every tensor that make a fingerprint


def describe_run(args: Any, model: Mapping[str, Any], dataset: Any, processes: int) -> dict[str, Any]:
    """The settings of a run, as JSON has them.

    Args:
        args: `LongCLIPTrainingArguments`.
        model: what `describe_model` said when the run began.
        dataset: the rows to train on.
        processes: how many train together.
    """
    settings = {name: getattr(args, name, None) for name in COMPARED}
    settings = {name: None if value in ("", {}, []) else value for name, value in settings.items()}
    settings |= {**model, "data": fingerprint(dataset), "processes": processes}
    if isinstance(dataset, CaptionRows | CaptionStream):
        settings |= dataset.read.settings
    if isinstance(dataset, IterableDataset):
        settings["dataloader_num_workers"] = args.dataloader_num_workers  # they divide a stream among them
    described: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return described


def describe_model(model: Any) -> dict[str, Any]:
    """The weights that a run begins with, sampled: adapters are drawn anew by every start, and not meant."""
    adapters = {
        name: [config.r, config.lora_alpha, sorted(config.target_modules)]
        for name, config in getattr(model, "peft_config", {}).items()
        if hasattr(config, "r")
    }
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if "lora_" not in name:
            values = tensor.detach().flatten()
            values = values[:: max(1, len(values) // SAMPLES)].cpu().contiguous().view(torch.uint8)
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + values.numpy().tobytes())
    return {"model": digest.hexdigest()[:16], "adapters": adapters or None}


def fingerprint(dataset: Any) -> str:
    """Of a dataset: its size, and the texts of some rows where they can be read without decoding an image."""
    if isinstance(dataset, CaptionStream):
        texts = [_texts(next(iter(shard_rows(dataset.rows, shard)), {})) for shard in (0, dataset.rows.num_shards - 1)]
        shape = f"{dataset.rows.num_shards} shards from {dataset.begin}, drawn from {dataset.shuffle_buffer}"
        return f"{shape}: {_digest(texts)}"
    if isinstance(dataset, CaptionRows):
        drawn = "" if isinstance(dataset.places, range) else f", {_sha(np.asarray(dataset.places).tobytes())}"
        return f"{len(dataset)}{drawn} of {fingerprint(dataset.rows)}"
    if isinstance(dataset, Joined):
        return "; ".join(map(fingerprint, dataset.tables))
    rows = getattr(dataset, "table", dataset)  # of files of JSON and tars
    if not hasattr(rows, "__len__"):
        return type(rows).__name__
    if not hasattr(rows, "with_format") or not hasattr(rows, "features"):
        return f"{len(rows)} rows"
    # Of the library datasets, whose texts come without the rest of the row.
    columns = [name for name, kind in rows.features.items() if getattr(kind, "dtype", None) == "string"]
    columns = [name for name in columns if type(rows.features[name]).__name__ == "Value"]
    texts = rows.with_format(None).select_columns(columns)[:: max(1, len(rows) // SAMPLES)] if columns else {}
    return f"{len(rows)} rows: {_digest(texts)}"


def _texts(row: Any) -> dict[str, str]:
    if not isinstance(row, Mapping):  # a bad row, or one of several sources
        return _texts(row[1]) if isinstance(row, tuple) else {}
    return {name: value for name, value in row.items() if isinstance(value, str) and not name.startswith("__")}


def _digest(value: Any) -> str:
    return _sha(json.dumps(value, sort_keys=True).encode())


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def changes_since(
    folder: Any, record: Mapping[str, Any], settings: Mapping[str, Any], allowed: bool
) -> list[dict[str, Any]]:
    """The changes that the run of a checkpoint went through so far, with those of this start.

    Args:
        folder: the checkpoint.
        record: what it holds.
        settings: of this start.
        allowed: whether there may be differences.

    Raises:
        CheckpointError: naming the differences, if there may be none.
    """
    before: Mapping[str, Any] = record.get("settings", {})
    different = [name for name in settings if name in before and before[name] != settings[name]]
    changes: list[dict[str, Any]] = list(record.get("changes", []))
    if not different:
        return changes
    if not allowed:
        named = ", ".join(f"{name} was {before[name]} and is {settings[name]}" for name in different)
        raise CheckpointError(
            f"{folder} belongs to a run with other settings: {named}. Give it the same ones or another --output_dir; "
            "or go on with the new ones by --resume_with_changes, which the next checkpoints then record."
        )
    at = str(folder).rpartition("-")[2]
    was, now = ({name: of[name] for name in different} for of in (before, settings))
    return [*changes, {"after_step": int(at) if at.isdecimal() else None, "was": was, "is": now}]
