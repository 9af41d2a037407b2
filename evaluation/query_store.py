"""What a model gave at every query of a benchmark, on disk, so that models of different runs are compared in pairs.

One safetensors file for each model on each benchmark, named by the hash of what the figures depend on: the weights,
the data, how texts were prepared. It holds each distinct list of numbers once, in the smallest type that keeps it.
"""

import hashlib
import json
import logging
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from longclip_hf.errors import FileError
from longclip_hf.evaluation.loading import as_json
from longclip_hf.evaluation.misses import Misses, from_json, to_json
from longclip_hf.evaluation.scores import Measured
from longclip_hf.files import write_atomically
from longclip_hf.results import BenchmarkInfo, Model, Results

logger = logging.getLogger(__name__)

FORMAT = "longclip-queries-1"
FOLDER = "queries"  # of an evaluation's output


class QueryStore:
    """Folders of such files: it writes to the first and reads from all.

    Args:
        folders: need not exist.
    """

    def __init__(self, *folders: Path) -> None:
        self.folders = folders

    def write(self, model: Model, info: BenchmarkInfo, prepared: Iterable[object], measured: Measured) -> None:
        """Adds the metrics of `measured` to those that the file has.

        Args:
            model, info: what was measured.
            prepared: how texts were prepared; equal settings have equal figures.
            measured: every metric query by query.

        Raises:
            FileError: if it cannot be written.
        """
        key = _key(model, info, prepared)
        file = self.folders[0] / f"{key}.safetensors"
        beside = file.with_name(f".{uuid.uuid4().hex}.safetensors")
        before = _read(file, key)
        queries = {**(before.queries if before else {}), **measured.queries}
        groups = {**(before.groups if before else {}), **measured.groups}
        tensors: dict[str, torch.Tensor] = {}
        metadata = {
            "format": FORMAT,
            "key": key,
            "queries": json.dumps({name: _put(values, tensors) for name, values in queries.items()}),
            "groups": json.dumps({name: None if of is None else _put(of, tensors) for name, of in groups.items()}),
            "labels": json.dumps(None if measured.labels is None else _put(measured.labels, tensors)),
        }
        try:
            self.folders[0].mkdir(parents=True, exist_ok=True)
            save_file(tensors, beside, metadata)
            beside.replace(file)
        except (OSError, SafetensorError) as error:
            raise FileError(
                f"{file} cannot be written: {error}. Make room, or name another --output; what is encoded stays."
            ) from error
        finally:
            beside.unlink(missing_ok=True)

    def read(self, model: Model, info: BenchmarkInfo, prepared: Iterable[object]) -> Measured | None:
        """What was written of them, without `values`; None where nothing was, or the file is damaged (a warning)."""
        key = _key(model, info, prepared)
        found = (_read(folder / f"{key}.safetensors", key) for folder in self.folders)
        return next((measured for measured in found if measured is not None), None)

    def write_misses(
        self, model: Model, info: BenchmarkInfo, prepared: Iterable[object], misses: Sequence[Misses]
    ) -> None:
        """Keeps what a page shows of a model on a benchmark, instead of what was kept before."""
        file = self.folders[0] / f"{_key(model, info, prepared)}.misses.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, to_json(misses).encode())

    def read_misses(self, results: Results) -> list[Misses]:
        """What was kept of every score of `results`."""
        models = {model.name: model for model in results.models}
        infos = {info.name: info for info in results.benchmarks}
        found: list[Misses] = []
        for score in results.scores:
            key = _key(models[score.model], infos[score.benchmark], prepared_of(results))
            files = [folder / f"{key}.misses.json" for folder in self.folders]
            file = next((file for file in files if file.exists()), None)
            try:
                found += from_json(file.read_text(encoding="utf-8"), score.model, score.benchmark) if file else []
            except (OSError, ValueError, KeyError, TypeError) as error:
                logger.warning("%s is not used and can be deleted: it holds no misses (%s).", file, error)
        return found


def prepared_of(results: Results) -> tuple[bool, ...]:
    """How the texts of `results` were prepared."""
    return results.clean_captions, results.neutralise_special_tokens


def _key(model: Model, info: BenchmarkInfo, prepared: Iterable[object]) -> str:
    parts = [model.fingerprint, model.dtype, model.positions, info.fingerprint, list(prepared)]
    return hashlib.sha256(as_json(parts)).hexdigest()[:32]


def _put(values: torch.Tensor, tensors: dict[str, torch.Tensor]) -> str:
    """The name of an equal tensor in `tensors`, to which it is added if there is none."""
    small = values.cpu()
    for dtype in (torch.uint8, torch.int32):
        if torch.equal(small.to(dtype).to(small.dtype), small):
            small = small.to(dtype)
            break
    for name, other in tensors.items():
        if other.dtype == small.dtype and torch.equal(other, small):
            return name
    tensors[name := str(len(tensors))] = small.contiguous()
    return name


def _read(file: Path, key: str) -> Measured | None:
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if (metadata.get("format"), metadata.get("key")) != (FORMAT, key):
                raise ValueError("it has another format, or belongs to another model or benchmark")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        queries: Mapping[str, str] = json.loads(metadata["queries"])
        groups: Mapping[str, str | None] = json.loads(metadata["groups"])
        labels: str | None = json.loads(metadata["labels"])
        return Measured(
            {name: tensors[place].double() for name, place in queries.items()},
            {name: None if place is None else tensors[place].long() for name, place in groups.items()},
            {},
            0,
            None if labels is None else tensors[labels].long(),
        )
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        logger.warning("%s is not used and can be deleted: it holds no figures of queries (%s).", file, error)
        return None
