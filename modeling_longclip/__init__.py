"""Long-CLIP for transformers: CLIP that reads 248 tokens (arXiv 2403.15378)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_longclip import LongCLIPConfig, LongCLIPTextConfig
    from .modeling_longclip import LongCLIPModel, LongCLIPTextModel, LongCLIPTextModelWithProjection

__version__ = "0.1.0"
__all__ = [
    "LongCLIPConfig",
    "LongCLIPModel",
    "LongCLIPTextConfig",
    "LongCLIPTextModel",
    "LongCLIPTextModelWithProjection",
]


def __getattr__(name: str) -> Any:
    """Imports torch and transformers when a class is first asked for, so that `--help` need not wait for them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "configuration_longclip" if name.endswith("Config") else "modeling_longclip"
    return getattr(import_module(f".{module}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
