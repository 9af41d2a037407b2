"""Long-CLIP's model classes: CLIP's own, with 248 text positions and errors where CLIP is silent.

The state-dict keys are CLIP's (`text_model.embeddings.position_embedding.weight`, ...) on every supported version, so
stock `CLIPModel` and `CLIPTextModel` load the same checkpoints. The stretching that makes them is a conversion's work
(`conversion/positions.py`), and holding the first rows fixed is a trainer's; neither is code of the model.
"""

from typing import Any, ClassVar, Unpack

import torch
from torch import nn
from transformers import CLIPModel, CLIPPreTrainedModel, CLIPTextModel, CLIPTextModelWithProjection
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import TransformersKwargs

from .compat import encode_text, misfits, text_transformer
from .configuration_longclip import LongCLIPConfig, LongCLIPTextConfig

# `eos_token_id` of configurations older than 2023, for which CLIP pools at the highest id instead.
_LEGACY_EOS_TOKEN_ID = 2
# What a text tower leaves out of a full checkpoint; that is no news.
_IMAGE_TOWER = [r"^vision_model\.", r"^visual_projection\.", r"^logit_scale$"]


class _LongCLIPPreTrainedModel(CLIPPreTrainedModel):
    """What the three classes share: strict loading, and CLIP's own initialisation of weights."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, so that transformers 5 initialises the projections as CLIP does, and not as a plain linear layer."""
        return False

    @classmethod
    def from_pretrained(
        cls, *args: Any, ignore_mismatched_sizes: bool = False, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Loads a checkpoint folder or Hub id; see [`~transformers.PreTrainedModel.from_pretrained`].

        Raises:
            ValueError: if the checkpoint lacks a tensor of the model (unless `output_loading_info` reports it), or has
                the positional table (or, without `ignore_mismatched_sizes`, any tensor) in another shape. transformers
                would draw them at random.
        """
        model, info = super().from_pretrained(*args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs)
        source = str(args[0] if args else kwargs.get("pretrained_model_name_or_path"))
        misfitting = misfits(info)
        tables = [name for name in misfitting if "text_model.embeddings.position_embedding" in f"text_model.{name}"]
        if tables:
            positions = getattr(model.config, "text_config", model.config).max_position_embeddings
            found = misfitting[tables[0]]
            rows = "another number of" if found is None else found[0]  # 4.57 says it only in the report that it logs
            raise ValueError(
                f"{source}: the positional table {tables[0]} has {rows} rows, and config.json says {positions}. A "
                f"CLIP that was never stretched is stretched first: python conversion/stretch.py {source} --output DIR"
            )
        if misfitting and not ignore_mismatched_sizes:
            raise ValueError(
                f"{source}: these tensors have another shape than the configuration asks for: {list(misfitting)}"
            )
        # Who asks for the loading information, or starts from a configuration alone, sees to missing tensors himself.
        missing = sorted(info["missing_keys"])
        if missing and not output_loading_info and source != "None":
            raise ValueError(f"{source}: no {cls.__name__}, these tensors are missing: {missing}")
        return (model, info) if output_loading_info else model


def _watch_text(text_model: Any) -> None:
    """Makes CLIP's text transformer refuse what it would misread. Hooks: all three classes call it in one way."""
    text_model.checks_eot = True
    text_model.register_forward_pre_hook(_check_text, with_kwargs=True)
    text_model.register_forward_hook(_mark_unpooled, with_kwargs=True)


def _check_text(text_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Runs before the text transformer. On a GPU the check for EOT waits for `input_ids`; who knows that every row has
    one, as a collator does that put it there, turns it off: `text_model.checks_eot = False`.

    Raises:
        ValueError: if `input_ids` of shape `(batch_size, sequence_length)` is longer than the positional table, or a
            row has no EOT token or begins with one, as padding on the left makes it: CLIP pools at the first EOT, and
            in both cases silently at position 0.
    """
    input_ids = args[0] if args else kwargs.get("input_ids")
    if input_ids is None:
        return  # CLIP's own error says it
    positions = text_model.embeddings.position_embedding.num_embeddings
    if input_ids.shape[-1] > positions:
        raise ValueError(
            f"The text has {input_ids.shape[-1]} tokens and the model {positions} positions. Tokenize with "
            f"truncation=True, max_length={positions}, or stretch the checkpoint to a longer table."
        )
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
    if input_ids.is_meta or tracing or torch.compiler.is_compiling() or not text_model.checks_eot:
        return  # there are no values to look at, or none to wait for
    pools = _pools_at_its_end(text_model, input_ids)
    if pools is not None and not pools.all():
        rows = (~pools.flatten()).nonzero().flatten().tolist()
        named = f"rows {rows[:10]}{' ...' if len(rows) > 10 else ''}"
        remedy = "Tokenize with CLIP's tokenizer, which appends it, and cut with truncation=True, which keeps it."
        wrong = f"no EOT token (id {text_model.eos_token_id})"
        if (input_ids[..., 0] == text_model.eos_token_id).any():
            wrong, remedy = f"{wrong}, or begin with it", 'Pad on the right, with padding_side="right".'
        raise ValueError(
            f"{len(rows)} of {pools.numel()} texts have {wrong}, {named}: CLIP pools at the first EOT. {remedy}"
        )


def _mark_unpooled(text_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Runs after a compiled text transformer: a row that pools at position 0 gets NaN instead.

    A compiled graph cannot raise an error for a value: a branch would break the graph, and an assertion ends the whole
    process where the code around it runs on several threads.
    """
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return output
    pools = _pools_at_its_end(text_model, args[0] if args else kwargs["input_ids"])
    if pools is None:
        return output
    pooled = output[1].masked_fill(~pools[:, None], float("nan"))
    if isinstance(output, BaseModelOutputWithPooling):
        output.pooler_output = pooled
        return output
    return (output[0], pooled, *output[2:])


def _pools_at_its_end(text_model: Any, input_ids: torch.Tensor) -> torch.Tensor | None:
    """Which rows have an EOT and do not begin with it, of shape `(batch_size,)`; None where CLIP pools without one."""
    if text_model.eos_token_id == _LEGACY_EOS_TOKEN_ID:
        return None
    is_eot = input_ids == text_model.eos_token_id
    return is_eot.any(dim=-1) & ~is_eot[..., 0]


class LongCLIPTextModel(_LongCLIPPreTrainedModel, CLIPTextModel):
    """The text tower: per-token states of shape `(batch_size, sequence_length, hidden_size)`, and their EOT state.

    The transformer is `self.text_model` on every version of transformers, as it was in CLIPTextModel up to 4.57.
    """

    config_class = LongCLIPTextConfig
    base_model_prefix = "text_model"
    _keys_to_ignore_on_load_unexpected: ClassVar = [*_IMAGE_TOWER, r"^text_projection\."]

    def __init__(self, config: LongCLIPTextConfig) -> None:
        CLIPPreTrainedModel.__init__(self, config)  # CLIPTextModel's would build a second transformer
        self.text_model = text_transformer(config)
        _watch_text(self.text_model)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.embeddings.token_embedding = value

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> BaseModelOutputWithPooling:
        """See [`~transformers.CLIPTextModel.forward`]; all inputs are of shape `(batch_size, sequence_length)`."""
        output = encode_text(
            self.text_model, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class LongCLIPTextModelWithProjection(_LongCLIPPreTrainedModel, CLIPTextModelWithProjection):
    """The text tower and its projection: `text_embeds` of shape `(batch_size, projection_dim)`, not normalised."""

    config_class = LongCLIPTextConfig
    _keys_to_ignore_on_load_unexpected: ClassVar = _IMAGE_TOWER

    def __init__(self, config: LongCLIPTextConfig) -> None:
        super().__init__(config)
        _watch_text(self.text_model)


class LongCLIPModel(_LongCLIPPreTrainedModel, CLIPModel):
    """Both towers: CLIP's `forward`, `get_text_features` and `get_image_features`, for texts of up to 248 tokens."""

    config_class = LongCLIPConfig
    # transformers 5 thinks that a forward with **kwargs divides its loss by the accumulation steps; CLIP's does not.
    accepts_loss_kwargs = False

    def __init__(self, config: LongCLIPConfig) -> None:
        super().__init__(config)
        _watch_text(self.text_model)

    # CLIPModel answers with NotImplementedError, and FSDP2 asks.
    def get_input_embeddings(self) -> nn.Module:
        """The table of words, of the text tower."""
        table: nn.Module = self.text_model.embeddings.token_embedding
        return table

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces it."""
        self.text_model.embeddings.token_embedding = value


# A model that is saved again takes its code along.
LongCLIPTextModel.register_for_auto_class("AutoModel")
LongCLIPTextModelWithProjection.register_for_auto_class("AutoModel")
LongCLIPModel.register_for_auto_class("AutoModel")
