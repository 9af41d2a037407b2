"""Configuration of Long-CLIP: CLIP's own, with a text table of 248 positions and the stretch that made it."""

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, PretrainedConfig

from .defaults import KEEP, LENGTH, RATIO

# What `AutoX.from_pretrained(..., trust_remote_code=True)` finds beside a checkpoint of both towers.
AUTO_MAP = {
    "AutoConfig": "configuration_longclip.LongCLIPConfig",
    "AutoModel": "modeling_longclip.LongCLIPModel",
    "AutoModelForZeroShotImageClassification": "modeling_longclip.LongCLIPModel",
}


class LongCLIPTextConfig(CLIPTextConfig):
    """Configuration of the text tower.

    `model_type` stays `"clip_text_model"`: stock CLIP classes read the same folder, and transformers 5 finds the
    renaming of its tensors by that name.

    Args:
        max_position_embeddings: rows of the positional table, the longest text in tokens, BOS and EOT included.
        keep: leading rows that were kept unchanged by the stretch, and that fine-tuning does not move (section 3.2).
        ratio: how many rows each row after `keep` became.
        stretch_method: `"knowledge-preserving"` (eq. 2) or `"linear"` (eq. 1, the direct fine-tuning baseline).
        stretch_arithmetic: `"float32"`, or `"float16"` as in the released checkpoints.
        **kwargs: everything [`~transformers.CLIPTextConfig`] takes.

    Raises:
        ValueError: if `keep` is not within `0 ... max_position_embeddings`, or `ratio` is below 1.
    """

    model_type = "clip_text_model"

    def __init__(
        self,
        max_position_embeddings: int = LENGTH,
        keep: int = KEEP,
        ratio: int = RATIO,
        stretch_method: str = "knowledge-preserving",
        stretch_arithmetic: str = "float32",
        **kwargs: Any,
    ) -> None:
        if not 0 <= keep <= max_position_embeddings:
            raise ValueError(f"keep must be within 0 ... {max_position_embeddings} (the table's rows), got {keep}.")
        if ratio < 1:
            raise ValueError(f"ratio must be at least 1, got {ratio}.")
        super().__init__(max_position_embeddings=max_position_embeddings, **kwargs)
        self.keep = keep
        self.ratio = ratio
        self.stretch_method = stretch_method
        self.stretch_arithmetic = stretch_arithmetic


class LongCLIPConfig(CLIPConfig):
    """Configuration of both towers.

    `model_type` stays `"clip"` and `auto_map` stands beside it, so that one folder serves `AutoModel` with custom code
    (-> `LongCLIPModel`) and without it (-> `CLIPModel` with 248 positions).

    Args:
        text_config: a [`LongCLIPTextConfig`] or its dictionary; the defaults are ViT-B's.
        vision_config: a [`~transformers.CLIPVisionConfig`] or its dictionary.
        **kwargs: everything [`~transformers.CLIPConfig`] takes.
    """

    model_type = "clip"
    # transformers 5 builds the parts from `sub_configs_defaults`, 4.57 reads `sub_configs`.
    sub_configs: ClassVar = {"text_config": LongCLIPTextConfig, "vision_config": CLIPVisionConfig}
    sub_configs_defaults: ClassVar = {"text_config": LongCLIPTextConfig, "vision_config": CLIPVisionConfig}

    def __init__(
        self,
        text_config: Mapping[str, Any] | PretrainedConfig | None = None,
        vision_config: Mapping[str, Any] | PretrainedConfig | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs["auto_map"] = dict(AUTO_MAP)  # a Hub id that an earlier load wrote into it would be saved again
        # `text_config_dict`, the name of before 2023, wins as in CLIPConfig, which would fill in 77 positions with it.
        text_config = _as_dict(text_config) | _as_dict(kwargs.pop("text_config_dict", None))
        # Stock CLIPTextConfig fills in 77 where a configuration names no length.
        text_config = {"max_position_embeddings": LENGTH} | text_config
        super().__init__(text_config=text_config, vision_config=_as_dict(vision_config), **kwargs)
        # 4.57 builds a stock text configuration whatever `sub_configs` says.
        if not isinstance(self.text_config, LongCLIPTextConfig):
            attention = self.text_config._attn_implementation  # to_dict leaves it out
            self.text_config: Any = LongCLIPTextConfig(**self.text_config.to_dict(), attn_implementation=attention)


def _as_dict(config: Mapping[str, Any] | PretrainedConfig | None) -> dict[str, Any]:
    if isinstance(config, PretrainedConfig):
        return config.to_dict()
    return dict(config or {})


# A model that is saved again takes this file along.
LongCLIPTextConfig.register_for_auto_class()
LongCLIPConfig.register_for_auto_class()
