"""The testers for transformers' common tests, written once for stock CLIP and for ours.

Not to be collected by this project's own pytest run (hence no `test_` in the name): `run.py` runs it, once for each
family of classes, with the common files of the installed release as the package `tests`.
"""

from __future__ import annotations

import contextlib
import unittest
import unittest.mock
from collections.abc import Iterator
from typing import Any, ClassVar

import families
import torch
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin
from tests.test_pipeline_mixin import PipelineTesterMixin, task_to_pipeline_and_spec_mapping
from transformers import CLIPVisionConfig, PreTrainedModel, set_seed
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

FAMILY = families.family()

# A check of the pipelines' docstrings against the hub's client library, which is about no model, and which stock
# transformers fails with the client library that it installs.
task_to_pipeline_and_spec_mapping.clear()

WORD, BOS, PAD, EOS = 0, 1, 2, 3
"""A word that is in every text, and the special tokens.

Small ids, since some tests clamp ids to a smaller vocabulary. Not 2 for the last: stock CLIP then looks for the
highest id instead. 0 is the word: `test_model_forward_default_config_values` makes 0 the end token, and our classes
refuse a row that has none or begins with one.
"""


def _generator() -> torch.Generator:
    """Every test gets the same inputs, for either family."""
    return torch.Generator().manual_seed(0)


class TextTester:
    """Makes configurations and inputs for a text model."""

    batch_size = 12
    seq_length = 24  # beyond the 20 positions that Long-CLIP keeps, so that stretched ones take part
    vocab_size = 99
    hidden_size = 32
    intermediate_size = 37
    num_hidden_layers = 2
    num_attention_heads = 4
    max_position_embeddings = 64
    projection_dim = 16
    is_training = False  # no text model of CLIP has a loss; the full model trains in its own tests

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent

    def text_arguments(self) -> dict[str, Any]:
        """The keywords of a text configuration."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "max_position_embeddings": self.max_position_embeddings,
            "projection_dim": self.projection_dim,
            "bos_token_id": BOS,
            "pad_token_id": PAD,
            "eos_token_id": EOS,
            **FAMILY.extra,
        }

    def get_config(self) -> Any:
        """A tiny configuration."""
        return FAMILY.text_config(**self.text_arguments())

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        """A configuration, and rows of varied length that each end with the end token."""
        shape = (self.batch_size, self.seq_length)
        input_ids = torch.randint(EOS + 1, self.vocab_size, shape, generator=_generator())
        # No row ends at the last place but one, which `test_resize_tokens_embeddings` overwrites.
        lengths = torch.randint(3, self.seq_length - 1, (self.batch_size, 1), generator=_generator())
        lengths[::3] = self.seq_length
        places = torch.arange(self.seq_length)
        input_ids[:, 0] = BOS
        input_ids[:, 1] = WORD
        input_ids[places == lengths - 1] = EOS
        input_ids[places >= lengths] = PAD
        return self.get_config(), {"input_ids": input_ids, "attention_mask": (places < lengths).long()}


class VisionTester:
    """Makes inputs for the vision model, which is the stock one in both families."""

    batch_size = TextTester.batch_size
    num_hidden_layers = 2
    size: ClassVar = {"image_size": 16, "num_channels": 3}

    def vision_arguments(self) -> dict[str, Any]:
        """The keywords of a vision configuration."""
        return {
            **self.size,
            "patch_size": 4,
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": 4,
            "projection_dim": TextTester.projection_dim,
        }

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        """A configuration and random images."""
        height, channels = self.size["image_size"], self.size["num_channels"]
        images = torch.rand(self.batch_size, channels, height, height, generator=_generator())
        return CLIPVisionConfig(**self.vision_arguments()), {"pixel_values": images}


class DualTester:
    """Makes configurations and inputs for the full model."""

    batch_size = TextTester.batch_size
    is_training = True

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent
        self.text_model_tester = TextTester(parent)
        self.vision_model_tester = VisionTester()

    def get_config(self) -> Any:
        """A tiny configuration."""
        return FAMILY.config(
            text_config=self.text_model_tester.text_arguments(),
            vision_config=self.vision_model_tester.vision_arguments(),
            projection_dim=TextTester.projection_dim,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        """A configuration, texts and images."""
        _, texts = self.text_model_tester.prepare_config_and_inputs_for_common()
        _, images = self.vision_model_tester.prepare_config_and_inputs_for_common()
        return self.get_config(), texts | images


class _ModelTests(ModelTesterMixin, PipelineTesterMixin):
    """What is the same for the three models."""

    # Off by default for a model as old as CLIP, whose text models pass them nevertheless.
    test_can_init_all_missing_weights_before_2023 = True
    test_torch_exportable = True
    # CLIP has neither; only transformers 4 knows the two.
    test_pruning = False
    test_head_masking = False

    def setUp(self) -> None:
        set_seed(0)  # as the inputs, the weights are the same in every run


class TextModelTest(_ModelTests, unittest.TestCase):
    """The text model."""

    all_model_classes = (FAMILY.text_model,)
    pipeline_model_mapping: ClassVar = {"feature-extraction": FAMILY.text_model}

    def setUp(self) -> None:
        super().setUp()
        self.model_tester = TextTester(self)


class TextModelWithProjectionTest(_ModelTests, unittest.TestCase):
    """The text model with projection; a class of its own, since some tests look at the first class only."""

    all_model_classes = (FAMILY.text_model_with_projection,)
    pipeline_model_mapping: ClassVar[dict[str, type]] = {}

    def setUp(self) -> None:
        super().setUp()
        self.model_tester = TextTester(self)


class ModelTest(_ModelTests, unittest.TestCase):
    """The full model."""

    all_model_classes = (FAMILY.model,)
    additional_model_inputs = ("pixel_values",)
    pipeline_model_mapping: ClassVar = {"zero-shot-image-classification": FAMILY.model}
    _is_composite = True

    # The full model has no input embeddings of its own.
    test_resize_embeddings = False

    def setUp(self) -> None:
        super().setUp()
        self.model_tester = DualTester(self)

    def _prepare_for_class(self, inputs_dict: Any, model_class: type, return_labels: bool = False) -> Any:
        """Where a test wants a loss, CLIP has to be asked for its own."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        return inputs | {"return_loss": True} if return_labels else inputs

    def test_training(self) -> None:
        with _trained_too():
            super().test_training()

    def check_training_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        with _trained_too():
            super().check_training_gradient_checkpointing(*args, **kwargs)

    def test_sdpa_can_dispatch_composite_models(self) -> None:
        """The common test asks both towers what they support, which in transformers 4 are plain modules."""
        if not isinstance(FAMILY.model(self.model_tester.get_config()).vision_model, PreTrainedModel):
            self.skipTest("The towers are no models of their own.")
        super().test_sdpa_can_dispatch_composite_models()

    @unittest.skip("CLIP does not set its logit_scale anew if a checkpoint lacks it.")
    def test_can_init_all_missing_weights(self) -> None: ...

    @unittest.skip("The output of the full model holds the attentions within those of the towers.")
    def test_attention_outputs(self) -> None: ...

    @unittest.skip("The output of the full model holds the hidden states within those of the towers.")
    def test_hidden_states_output(self) -> None: ...

    @unittest.skip("The output of the full model holds the hidden states within those of the towers.")
    def test_retain_grad_hidden_states_attentions(self) -> None: ...

    @unittest.skip("The full model has no input embeddings of its own.")
    def test_model_get_set_embeddings(self) -> None: ...


@contextlib.contextmanager
def _trained_too() -> Iterator[None]:
    """The training tests leave out every model that the library lists as one without a head, thus without a loss."""
    kept = {key: name for key, name in MODEL_MAPPING_NAMES.items() if name != FAMILY.model.__name__}
    with unittest.mock.patch.dict(MODEL_MAPPING_NAMES, kept, clear=True):
        yield


class _ConfigTests:
    """One test per check of `ConfigTester`, whose own entry stops at the first that fails."""

    config_tester: ConfigTester

    def test_config(self) -> None:
        """All checks, as upstream runs them."""
        self.config_tester.run_common_tests()


def _add_check(name: str) -> None:
    def test(self: _ConfigTests) -> None:
        getattr(self.config_tester, name)()

    setattr(_ConfigTests, f"test_{name.removeprefix('create_and_test_')}", test)


for _name in dir(ConfigTester):
    if _name.startswith(("create_and_test_", "check_")):
        _add_check(_name)


class TextConfigTest(_ConfigTests, unittest.TestCase):
    """The configuration of the text models."""

    def setUp(self) -> None:
        self.model_tester = TextTester(self)
        self.config_tester = ConfigTester(self, config_class=FAMILY.text_config, hidden_size=64)


class ConfigTest(_ConfigTests, unittest.TestCase):
    """The configuration of the full model."""

    def setUp(self) -> None:
        self.model_tester = DualTester(self)
        self.config_tester = ConfigTester(
            self,
            config_class=FAMILY.config,
            has_text_modality=False,
            common_properties=["projection_dim", "logit_scale_init_value"],
        )
