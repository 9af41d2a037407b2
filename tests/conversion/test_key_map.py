"""The table of names: written out once by hand, and read in both directions without a remainder."""

import random
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPConfig, CLIPModel

from longclip_hf.conversion.key_map import TABLE, check_names, round_as_released, to_original, to_ours
from longclip_hf.errors import ConversionError
from tests.conversion.straight_line import random_state

# One layer of each tower, and what the authors' loader holds in float16.
HALF = {
    "text_projection", "visual.proj", "visual.conv1.weight",
    *(f"{tower}.resblocks.0.{name}.{kind}" for tower in ("transformer", "visual.transformer")
      for name in ("attn.out_proj", "mlp.c_fc", "mlp.c_proj") for kind in ("weight", "bias")),
    *(f"{tower}.resblocks.0.attn.in_proj_{kind}" for tower in ("transformer", "visual.transformer")
      for kind in ("weight", "bias")),
}  # fmt: skip


def small(text_layers: int = 1, vision_layers: int = 1, tables: int = 1) -> dict[str, torch.Tensor]:
    return random_state((8, 12, text_layers), (16, 20, vision_layers), (8, 4), 6, 11, rows=9, tables=tables)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def test_the_names_are_those_of_transformers_and_of_the_original() -> None:
    text = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2}
    text |= {"vocab_size": 11, "max_position_embeddings": 9}
    vision = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)).state_dict()
    state = small(3, 2)
    assert to_original(model).keys() == state.keys()
    shapes = {name: tuple(tensor.shape) for name, tensor in to_ours(state).items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in model.items()}


def test_values_by_hand() -> None:
    state = small()
    state["transformer.resblocks.0.attn.in_proj_bias"] = torch.arange(24.0)
    state["text_projection"] = torch.arange(48.0).view(8, 6)
    ours = to_ours(state)
    attention = "text_model.encoder.layers.0.self_attn"
    assert ours[f"{attention}.q_proj.bias"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert ours[f"{attention}.k_proj.bias"].tolist() == [8, 9, 10, 11, 12, 13, 14, 15]
    assert ours[f"{attention}.v_proj.bias"].tolist() == [16, 17, 18, 19, 20, 21, 22, 23]
    assert ours["text_projection.weight"].shape == (6, 8)
    assert ours["text_projection.weight"][1].tolist() == [1, 7, 13, 19, 25, 31, 37, 43]
    weight = state["visual.transformer.resblocks.0.attn.in_proj_weight"]
    assert torch.equal(ours["vision_model.encoder.layers.0.self_attn.v_proj.weight"], weight[32:])
    assert torch.equal(
        ours["vision_model.encoder.layers.0.mlp.fc1.weight"],
        state["visual.transformer.resblocks.0.mlp.c_fc.weight"],
    )


@given(
    layers=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    dtype=st.sampled_from([torch.float32, torch.half]),
    order=st.randoms(use_true_random=False),
)
def test_there_and_back_is_the_identity(layers: tuple[int, int], dtype: torch.dtype, order: random.Random) -> None:
    state = {name: tensor.to(dtype) for name, tensor in small(*layers).items()}
    names = list(state)
    order.shuffle(names)
    ours = to_ours({name: state[name] for name in names})
    assert len(ours) == len(state) + 2 * 2 * sum(layers)
    assert same(to_original(ours), state)
    assert same(to_ours(to_original(ours)), ours)


@given(data=st.data(), original=st.booleans())
def test_a_missing_and_an_unknown_tensor_are_named(data: st.DataObject, original: bool) -> None:
    state = small(2, 2)
    tensors, rename = (state, to_ours) if original else (to_ours(state), to_original)
    lost = data.draw(st.sampled_from(sorted(tensors)))
    missing = {name: tensor for name, tensor in tensors.items() if name != lost}
    with pytest.raises(ConversionError, match=rf"{re.escape(lost)} is missing"):
        rename(missing)
    extra = data.draw(st.sampled_from([f"{lost}.alpha", "visual.trunk.weight", f"module.{lost}", lost.upper(), ""]))
    with pytest.raises(ConversionError, match=rf"{re.escape(extra)} is unknown"):
        rename(tensors | {extra: torch.zeros(1)})


def test_layers_are_counted_from_zero_without_a_gap() -> None:
    state = small(4)
    gap = {name: tensor for name, tensor in state.items() if not name.startswith("transformer.resblocks.2.")}
    with pytest.raises(ConversionError, match=r"transformer\.resblocks\.2\.attn\.in_proj_bias is missing"):
        to_ours(gap)
    far = {
        name.replace("transformer.resblocks.3.", "transformer.resblocks.999999999."): t for name, t in state.items()
    }
    with pytest.raises(ConversionError, match=r"transformer\.resblocks\.3\.\S+ is missing.* more"):
        to_ours(far)
    odd = {name.replace(".resblocks.0.", ".resblocks.00."): tensor for name, tensor in small().items()}
    with pytest.raises(ConversionError, match=r"resblocks\.00\.\S+ is unknown"):
        to_ours(odd)
    literal = {name.replace(".resblocks.0.", ".resblocks.*."): tensor for name, tensor in small().items()}
    with pytest.raises(ConversionError, match=r"resblocks\.\*\.\S+ is unknown"):
        to_ours(literal)


def test_long_complaints_are_cut_and_counted() -> None:
    with pytest.raises(ConversionError) as error:
        check_names([f"layer{index}" for index in range(30)])
    assert str(error.value).count("is unknown") == 10
    assert str(error.value).endswith(f"... and {20 + sum(1 for _ in TABLE)} more.")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("transformer.resblocks.0.attn.in_proj_weight", (25, 8), r"shape \(25, 8\), not 3 equal parts"),
        ("transformer.resblocks.0.attn.in_proj_bias", (), r"shape \(\), not 3 equal parts"),
        ("transformer.resblocks.0.attn.in_proj_bias", (0,), r"shape \(0,\), not 3 equal parts"),
        ("text_projection", (8,), r"text_projection has shape \(8,\); a projection is a matrix"),
    ],
)
def test_a_shape_that_the_rule_does_not_fit(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        to_ours(small() | {name: torch.zeros(shape)})


def test_parts_of_different_shapes() -> None:
    ours = to_ours(small()) | {"text_model.encoder.layers.0.self_attn.k_proj.bias": torch.zeros(7)}
    with pytest.raises(ConversionError, match=r"not of one shape: \S+q_proj\.bias \(8,\), \S+k_proj\.bias \(7,\)"):
        to_original(ours)


def test_rounding_is_of_what_the_loader_holds_in_float16() -> None:
    state = {name: torch.full_like(tensor, 0.1) for name, tensor in small(tables=2).items()}
    rounded = round_as_released(state)
    changed = {name for name in state if not torch.equal(rounded[name], state[name])}
    assert changed == HALF
    assert {tensor.dtype for tensor in rounded.values()} == {torch.float32}
    assert rounded["visual.proj"][0, 0].item() == 0.0999755859375  # the nearest float16
    assert {rule.original for rule in TABLE if rule.half} == {re.sub(r"\.0\.", ".*.", name) for name in HALF}
    assert same(round_as_released(rounded), rounded)
