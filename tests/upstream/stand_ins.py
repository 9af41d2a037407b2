"""Makes transformers' common test modules importable without the rest of its `tests` folder.

The source distribution holds the files directly under `tests/` only.  What those import beyond that is provided here,
as small as it can be; the docstring of each stand-in says what is therefore not run.
"""

from __future__ import annotations

import copy
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import re
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from families import Family
from transformers import PretrainedConfig
from transformers.utils import is_vision_available


class GenerationTesterMixin:
    """For `tests.generation.test_utils`: no CLIP model generates, so nothing is lost.

    The common tests check that a model which can generate inherits this class, and that one which cannot does not.
    """


class ExportTesterMixin:
    """For `tests.exporters.test_export` (transformers 5).

    Its exporter back ends (ONNX, ExecuTorch ...) are not run.  What it is about most, `torch.export` giving the same
    numbers as the eager model, is done here in the way transformers 4 had it in its common tests.
    """

    model_tester: Any
    all_model_classes: tuple[type, ...]

    def test_torch_export(self) -> None:
        """The exported program returns what the model returns."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(copy.deepcopy(config)).eval()
            exported = torch.export.export(model, args=(), kwargs=inputs, strict=True)
            with torch.no_grad():
                expected, found = model(**inputs), exported.module()(**inputs)
            names = [name for name, value in expected.items() if isinstance(value, torch.Tensor)]
            assert names
            for name in names:
                torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4)


def _config_common_kwargs() -> dict[str, Any]:
    """For `tests.utils.test_configuration_utils`: a value other than the default for what every config takes.

    Only the arguments that the installed major knows are kept.  The arguments for generation are not in it, since
    transformers 5 refuses them.
    """
    values: dict[str, Any] = {
        "return_dict": False,
        "output_hidden_states": True,
        "output_attentions": True,
        "torchscript": True,
        "dtype": "float16",  # the one that `ConfigTester` expects
        "tie_word_embeddings": False,
        "chunk_size_feed_forward": 3,
        "pruned_heads": {"0": [1]},
        "is_encoder_decoder": True,
        "is_decoder": True,
        "cross_attention_hidden_size": 24,
        "add_cross_attention": True,
        "tie_encoder_decoder": True,
        "architectures": ["AnyModel"],
        "finetuning_task": "any task",
        "id2label": {0: "short", 1: "long"},
        "label2id": {"short": 0, "long": 1},
        "task_specific_params": {"any task": {"beams": 2}},
        "problem_type": "single_label_classification",
        "tokenizer_class": "AnyTokenizer",
        "prefix": "any prefix",
        "bos_token_id": 11,
        "pad_token_id": 12,
        "eos_token_id": 13,
        "sep_token_id": 14,
        "decoder_start_token_id": 15,
    }
    plain = PretrainedConfig()
    return {key: value for key, value in values.items() if hasattr(plain, key)}


class _PipelineTests:
    """What `tests.pipelines.test_pipelines_<task>` has for a task that is of no concern here."""

    def get_test_pipeline(self, model: Any, tokenizer: Any = None, **parts: Any) -> tuple[Any, Any]:
        """No pipeline: the mixin then skips the test."""
        return None, None

    def run_pipeline_test(self, pipeline: Any, examples: Any) -> None:
        """Never reached without a pipeline."""
        raise NotImplementedError


class FeatureExtractionPipelineTests(_PipelineTests):
    """The pipeline `feature-extraction` over texts; the upstream tests with checkpoints of the hub are not run."""

    def get_test_pipeline(self, model: Any, tokenizer: Any = None, **parts: Any) -> tuple[Any, Any]:
        pipeline = transformers.FeatureExtractionPipeline(
            model=model, tokenizer=tokenizer, dtype=getattr(torch, parts["dtype"])
        )
        return pipeline, ["A short text", "And another text, which is a little longer than the first"]

    def run_pipeline_test(self, pipeline: Any, examples: Any) -> None:
        rows = [torch.tensor(row) for row in pipeline(examples)]
        for row, text in zip(rows, examples, strict=True):
            count = len(pipeline.tokenizer(text)["input_ids"])
            assert row.shape == (1, count, pipeline.model.config.hidden_size)
            assert row.isfinite().all()


class ZeroShotImageClassificationPipelineTests(_PipelineTests):
    """The pipeline `zero-shot-image-classification`; the upstream tests with checkpoints of the hub are not run."""

    labels = ("cat", "a plane in the sky", "remote")

    def get_test_pipeline(self, model: Any, tokenizer: Any = None, **parts: Any) -> tuple[Any, Any]:
        from PIL import Image

        labels = list(self.labels)

        class Pipeline(transformers.ZeroShotImageClassificationPipeline):
            """The batch test of the mixin calls the pipeline with the examples alone."""

            def __call__(self, image: Any, candidate_labels: list[str] = labels, **kwargs: Any) -> Any:
                return super().__call__(image, candidate_labels=candidate_labels, **kwargs)

        pipeline = Pipeline(
            model=model,
            tokenizer=tokenizer,
            image_processor=parts["image_processor"],
            dtype=getattr(torch, parts["dtype"]),
        )
        return pipeline, [Image.new("RGB", (24, 32), colour) for colour in ("red", "green")]

    def run_pipeline_test(self, pipeline: Any, examples: Any) -> None:
        for answers in pipeline(examples):
            assert {answer["label"] for answer in answers} == set(self.labels)
            scores = [answer["score"] for answer in answers]
            assert scores == sorted(scores, reverse=True)
            assert abs(sum(scores) - 1) < 1e-2


_PIPELINES: Mapping[str, type] = {
    "FeatureExtractionPipelineTests": FeatureExtractionPipelineTests,
    "ZeroShotImageClassificationPipelineTests": ZeroShotImageClassificationPipelineTests,
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the stand-ins; placed after the ordinary finders, so that a file of the distribution comes first."""

    modules: Mapping[str, Mapping[str, Any]] = {
        "tests.generation": {},
        "tests.generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
        "tests.exporters": {},
        "tests.exporters.test_export": {"ExportTesterMixin": ExportTesterMixin},
        "tests.utils": {},
        "tests.utils.test_configuration_utils": {"config_common_kwargs": _config_common_kwargs()},
        "tests.pipelines": {},
    }
    pipelines = re.compile(r"tests\.pipelines\.test_pipelines_\w+")

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A name that is not listed stays an ImportError: a release that needs more has to be looked at."""
        if name in self.modules or self.pipelines.fullmatch(name):
            return importlib.util.spec_from_loader(name, self, is_package=name.count(".") == 1)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module).update(self.modules.get(module.__name__, {}))
        if self.pipelines.fullmatch(module.__name__):
            # Each of these files is asked for one class, whose name only its user knows.
            def attribute(name: str) -> type:
                if not name.endswith("PipelineTests"):
                    raise AttributeError(name)
                return _PIPELINES.get(name) or type(name, (_PipelineTests,), {})

            vars(module)["__getattr__"] = attribute


def install(source: Path) -> None:
    """Makes `tests` the folder `source`, with the stand-ins for what it lacks."""
    # Placed into `sys.modules` rather than found by path: this project has a folder `tests` too.
    package = types.ModuleType("tests")
    package.__path__ = [str(source)]
    sys.modules["tests"] = package
    sys.meta_path.append(_Finder())

    # The common files load the library anew from a checkout around them, only to look classes up by name.
    importlib.import_module("transformers.utils").direct_transformers_import = lambda path, file="": transformers


def write_tiny_models(family: Family, folder: Path) -> None:
    """Writes what the pipeline tests read: a tiny model with tokenizer and image processor per class.

    The upstream tests take them from the hub.  They read the place from the environment when they are imported.
    """
    os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = str(folder)
    major = int(transformers.__version__.partition(".")[0])
    tokenizers = ["CLIPTokenizer"] if major >= 5 else ["CLIPTokenizer", "CLIPTokenizerFast"]
    # The one that needs no torchvision has its own name from transformers 5 on.
    images = "CLIPImageProcessorPil" if major >= 5 else "CLIPImageProcessor"

    # Single bytes, then the special tokens: enough to write any text, with no merges.
    letters = list(_byte_letters())
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    ids = {token: index for index, token in enumerate(vocabulary)}
    text = {
        "vocab_size": len(ids),
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": ids["<|startoftext|>"],
        "eos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "projection_dim": 16,
        **family.extra,
    }
    vision = {key: text[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "projection_dim")}
    vision |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    configs = {
        family.text_model: family.text_config(**text),
        family.text_model_with_projection: family.text_config(**text),
        family.model: family.config(text_config=text, vision_config=vision, projection_dim=16),
    }

    summary: dict[str, Any] = {}
    for model_class, config in configs.items():
        place = folder / model_class.config_class.model_type / model_class.__name__
        torch.manual_seed(0)
        model_class(config).save_pretrained(place)
        (place / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
        (place / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        # The fast class of transformers 4 makes its file from the two above; nothing else is asked of them.
        vocabulary_files = [str(place / "vocab.json"), str(place / "merges.txt")]
        if major >= 5:
            tokenizer = transformers.CLIPTokenizer(vocab=ids, merges=[], model_max_length=64)
        else:
            tokenizer = transformers.CLIPTokenizerFast(*vocabulary_files, model_max_length=64)
        tokenizer.save_pretrained(place)
        processors = []
        if model_class is family.model and is_vision_available():
            size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
            getattr(transformers, images)(**size).save_pretrained(place)
            processors = [images]
        summary[model_class.__name__] = {"tokenizer_classes": tokenizers, "processor_classes": processors}
    (folder / "reports").mkdir(parents=True)
    (folder / "reports" / "tiny_model_summary.json").write_text(json.dumps(summary), encoding="utf-8")


def _byte_letters() -> str:
    """The printable letters that byte-level BPE writes the 256 bytes with."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return "".join(map(chr, [*printable, *range(256, 256 + len(rest))]))
