"""Long-CLIP for Hugging Face: CLIP that reads 248 tokens, from conversion to fine-tuning and evaluation.

    from longclip_hf import LongCLIPTrainer, retrieval_ranks, stretch

The public names, each loaded when it is first used, so that importing this costs nothing. The model classes are also
those of `modeling_longclip`, which travels to the Hub with every checkpoint.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longclip_hf.conversion.back import convert_back
    from longclip_hf.conversion.blend import blend
    from longclip_hf.conversion.diffusion import convert as convert_diffusion
    from longclip_hf.conversion.export import export
    from longclip_hf.conversion.original import convert
    from longclip_hf.conversion.positions import stretch_positions
    from longclip_hf.conversion.stretch import stretch
    from longclip_hf.errors import LongCLIPError
    from longclip_hf.evaluation.benchmarks import load_benchmark
    from longclip_hf.evaluation.classification import classification_ranks
    from longclip_hf.evaluation.effective_length import effective_length
    from longclip_hf.evaluation.encoding import Encoder
    from longclip_hf.evaluation.retrieval import retrieval_ranks
    from longclip_hf.results import read_results
    from longclip_hf.search.search_index import SearchIndex
    from longclip_hf.training.arguments import LongCLIPTrainingArguments
    from longclip_hf.training.collator import CaptionCollator
    from longclip_hf.training.components import primary_components
    from longclip_hf.training.losses import (
        bounded_loss,
        contrastive_loss,
        long_only_loss,
        primary_component_loss,
        undistinguished_loss,
    )
    from longclip_hf.training.sentence_losses import (
        BoundedLoss,
        HiMoLoss,
        LongOnlyLoss,
        PrimaryComponentLoss,
        UndistinguishedLoss,
    )
    from longclip_hf.training.trainer import LongCLIPTrainer
    from modeling_longclip import (
        LongCLIPConfig,
        LongCLIPModel,
        LongCLIPTextConfig,
        LongCLIPTextModel,
        LongCLIPTextModelWithProjection,
        __version__,
    )

# Public name -> where it is, and its name there where that is another.
_HOMES = {
    "BoundedLoss": "longclip_hf.training.sentence_losses",
    "CaptionCollator": "longclip_hf.training.collator",
    "Encoder": "longclip_hf.evaluation.encoding",
    "HiMoLoss": "longclip_hf.training.sentence_losses",
    "LongCLIPConfig": "modeling_longclip",
    "LongCLIPError": "longclip_hf.errors",
    "LongCLIPModel": "modeling_longclip",
    "LongCLIPTextConfig": "modeling_longclip",
    "LongCLIPTextModel": "modeling_longclip",
    "LongCLIPTextModelWithProjection": "modeling_longclip",
    "LongCLIPTrainer": "longclip_hf.training.trainer",
    "LongCLIPTrainingArguments": "longclip_hf.training.arguments",
    "LongOnlyLoss": "longclip_hf.training.sentence_losses",
    "PrimaryComponentLoss": "longclip_hf.training.sentence_losses",
    "SearchIndex": "longclip_hf.search.search_index",
    "UndistinguishedLoss": "longclip_hf.training.sentence_losses",
    "__version__": "modeling_longclip",
    "blend": "longclip_hf.conversion.blend",
    "bounded_loss": "longclip_hf.training.losses",
    "classification_ranks": "longclip_hf.evaluation.classification",
    "contrastive_loss": "longclip_hf.training.losses",
    "convert": "longclip_hf.conversion.original",
    "convert_back": "longclip_hf.conversion.back",
    "convert_diffusion": "longclip_hf.conversion.diffusion:convert",
    "effective_length": "longclip_hf.evaluation.effective_length",
    "export": "longclip_hf.conversion.export",
    "load_benchmark": "longclip_hf.evaluation.benchmarks",
    "long_only_loss": "longclip_hf.training.losses",
    "primary_component_loss": "longclip_hf.training.losses",
    "primary_components": "longclip_hf.training.components",
    "read_results": "longclip_hf.results",
    "retrieval_ranks": "longclip_hf.evaluation.retrieval",
    "stretch": "longclip_hf.conversion.stretch",
    "stretch_positions": "longclip_hf.conversion.positions",
    "undistinguished_loss": "longclip_hf.training.losses",
}
__all__ = [
    "BoundedLoss", "CaptionCollator", "Encoder", "HiMoLoss", "LongCLIPConfig", "LongCLIPError", "LongCLIPModel",
    "LongCLIPTextConfig", "LongCLIPTextModel", "LongCLIPTextModelWithProjection", "LongCLIPTrainer",
    "LongCLIPTrainingArguments", "LongOnlyLoss", "PrimaryComponentLoss", "SearchIndex", "UndistinguishedLoss",
    "__version__", "blend", "bounded_loss", "classification_ranks", "contrastive_loss", "convert", "convert_back",
    "convert_diffusion", "effective_length", "export", "load_benchmark", "long_only_loss", "primary_component_loss",
    "primary_components", "read_results", "retrieval_ranks", "stretch", "stretch_positions", "undistinguished_loss",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    module, _, there = _HOMES[name].partition(":")
    value = globals()[name] = getattr(import_module(module), there or name)
    return value


def __dir__() -> list[str]:
    return __all__
