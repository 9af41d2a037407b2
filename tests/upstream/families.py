"""The two sets of classes that the common tests are run against: stock CLIP, and ours."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

VARIABLE = "LONGCLIP_UPSTREAM_FAMILY"
NAMES = ("stock", "ours")


@dataclasses.dataclass(frozen=True)
class Family:
    """The classes under test, and what their text configuration takes beyond that of CLIP."""

    text_config: type
    config: type
    text_model: type
    text_model_with_projection: type
    model: type
    extra: dict[str, Any]


@functools.cache
def family() -> Family:
    """The family that the environment names."""
    name = os.environ[VARIABLE]
    if name == "stock":
        from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        return Family(CLIPTextConfig, CLIPConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPModel, {})
    if name == "ours":
        from modeling_longclip import (
            LongCLIPConfig,
            LongCLIPModel,
            LongCLIPTextConfig,
            LongCLIPTextModel,
            LongCLIPTextModelWithProjection,
        )

        ours = Family(
            LongCLIPTextConfig,
            LongCLIPConfig,
            LongCLIPTextModel,
            LongCLIPTextModelWithProjection,
            LongCLIPModel,
            {"keep": 20},
        )
        _make_known(ours)
        return ours
    raise ValueError(f"{VARIABLE} has to be one of {', '.join(NAMES)}, not {name!r}")


def _make_known(ours: Family) -> None:
    """Enters our classes where some common tests look up which they apply to.

    Otherwise those would leave ours out and run for stock CLIP only, such as `test_torch_save_load` by the first of
    the two tables and `test_model_forward_default_config_values` by the second.
    """
    from transformers import AutoModel
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    for config, model in ((ours.text_config, ours.text_model), (ours.config, ours.model)):
        AutoModel.register(config, model)
        MODEL_MAPPING_NAMES[model.__name__] = model.__name__
