"""Long-CLIP for transformers: CLIP that reads 248 tokens (arXiv 2403.15378)."""

from .configuration_longclip import LongCLIPConfig as LongCLIPConfig
from .configuration_longclip import LongCLIPTextConfig as LongCLIPTextConfig
from .modeling_longclip import LongCLIPModel as LongCLIPModel
from .modeling_longclip import LongCLIPTextModel as LongCLIPTextModel
from .modeling_longclip import LongCLIPTextModelWithProjection as LongCLIPTextModelWithProjection

__version__ = "0.1.0"
