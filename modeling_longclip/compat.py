"""The one place that knows transformers 4 from transformers 5. It travels to the Hub with every checkpoint."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import CLIPTextConfig, CLIPTextModel

SUPPORTED_TRANSFORMERS = ">=4.57,<5 or >=5.6,<6"

_installed = Version(transformers.__version__)
if _installed < Version("4.57") or Version("5.0.dev0") <= _installed < Version("5.6"):
    raise ImportError(
        f"Long-CLIP needs transformers {SUPPORTED_TRANSFORMERS}, found {transformers.__version__} (5.0 to 5.5 lose "
        'the hidden states of CLIP\'s text model). Run: pip install "transformers>=5.6,<6"'
    )


def text_transformer(config: CLIPTextConfig) -> Any:
    """CLIP's text transformer: `CLIPTextModel.text_model` up to 4.57, `CLIPTextModel` itself since 5.6."""
    model = CLIPTextModel._from_config(config)
    return getattr(model, "text_model", model)


def features(output: Any) -> torch.Tensor:
    """What `get_text_features` and `get_image_features` computed, of shape `(batch_size, projection_dim)`.

    They return the tensor up to 4.57, and since 5 an output that holds it as `pooler_output`.
    """
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def misfits(loading_info: Mapping[str, Any]) -> list[str]:
    """The names of tensors that a checkpoint had in another shape, from `from_pretrained`'s loading information.

    4.57 lists names, 5 lists `(name, shape in the checkpoint, shape in the model)`.
    """
    return sorted(entry if isinstance(entry, str) else entry[0] for entry in loading_info["mismatched_keys"])
