"""The original's forward in straight lines, written from its description: what a converted checkpoint must compute.

Everything is a function of a state dict in the original's layout. Nothing is shared with the code under test: no
modules, no table of names, no merging of tables.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import layer_norm

State = Mapping[str, torch.Tensor]


def text_features(
    state: State, input_ids: torch.Tensor, keep: int = 20, activation: str = "quick_gelu"
) -> torch.Tensor:
    """Features of `input_ids` of shape `(batch_size, sequence_length)`, pooled at the first EOT, the highest id."""
    length, width = input_ids.shape[1], state["ln_final.weight"].shape[0]
    eot = state["token_embedding.weight"].shape[0] - 1
    hidden = state["token_embedding.weight"][input_ids]
    table = state["positional_embedding"]
    for position in range(length):
        trained = "positional_embedding_res" in state and position >= keep
        hidden[:, position] += (state["positional_embedding_res"] if trained else table)[position]
    causal = torch.full((length, length), -math.inf).triu(1)
    hidden = _blocks(state, "transformer.resblocks", hidden, width // 64, causal, activation)
    hidden = layer_norm(hidden, (width,), state["ln_final.weight"], state["ln_final.bias"], 1e-5)
    pooled = torch.stack([row[ids.tolist().index(eot)] for row, ids in zip(hidden, input_ids, strict=True)])
    return pooled @ state["text_projection"]


def image_features(
    state: State, pixel_values: torch.Tensor, heads: int | None = None, activation: str = "quick_gelu"
) -> torch.Tensor:
    """Features of `pixel_values` of shape `(batch_size, 3, side, side)`."""
    kernel = state["visual.conv1.weight"]
    width, _, patch, _ = kernel.shape
    batch, _, side, _ = pixel_values.shape
    grid = side // patch
    patches = pixel_values.view(batch, 3, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
    hidden = patches.reshape(batch, grid * grid, 3 * patch * patch) @ kernel.reshape(width, -1).T
    hidden = torch.cat([state["visual.class_embedding"].expand(batch, 1, width), hidden], dim=1)
    hidden = hidden + state["visual.positional_embedding"]
    hidden = layer_norm(hidden, (width,), state["visual.ln_pre.weight"], state["visual.ln_pre.bias"], 1e-5)
    mask = torch.zeros(grid * grid + 1, grid * grid + 1)
    hidden = _blocks(state, "visual.transformer.resblocks", hidden, heads or width // 64, mask, activation)
    first = layer_norm(hidden[:, 0], (width,), state["visual.ln_post.weight"], state["visual.ln_post.bias"], 1e-5)
    return first @ state["visual.proj"]


def _blocks(
    state: State, prefix: str, hidden: torch.Tensor, heads: int, mask: torch.Tensor, activation: str
) -> torch.Tensor:
    batch, length, width = hidden.shape
    layer = 0
    while f"{prefix}.{layer}.ln_1.weight" in state:
        weights = {
            name.removeprefix(f"{prefix}.{layer}."): tensor
            for name, tensor in state.items()
            if name.startswith(f"{prefix}.{layer}.")
        }
        normed = layer_norm(hidden, (width,), weights["ln_1.weight"], weights["ln_1.bias"], 1e-5)
        mixed = normed @ weights["attn.in_proj_weight"].T + weights["attn.in_proj_bias"]
        query, key, value = (
            mixed[..., part * width : (part + 1) * width].view(batch, length, heads, width // heads).transpose(1, 2)
            for part in range(3)
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(width // heads) + mask
        attended = (scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(batch, length, width)
        hidden = hidden + attended @ weights["attn.out_proj.weight"].T + weights["attn.out_proj.bias"]
        normed = layer_norm(hidden, (width,), weights["ln_2.weight"], weights["ln_2.bias"], 1e-5)
        inner = normed @ weights["mlp.c_fc.weight"].T + weights["mlp.c_fc.bias"]
        if activation == "quick_gelu":
            inner = inner * torch.sigmoid(1.702 * inner)
        else:
            inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        hidden = hidden + inner @ weights["mlp.c_proj.weight"].T + weights["mlp.c_proj.bias"]
        layer += 1
    return hidden


def random_state(
    text: tuple[int, int, int],
    vision: tuple[int, int, int],
    image: tuple[int, int],
    projection: int,
    vocab_size: int,
    rows: int = 248,
    tables: int = 2,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Random weights in the original's layout, of about the sizes that trained ones have.

    Args:
        text: width, MLP width and layers of the text tower.
        vision: those of the image tower.
        image: side and patch in pixels.
        projection: width of the joint space.
        vocab_size: rows of the token embedding; the last is EOT.
        rows: of the tables of text positions.
        tables: how many there are; with two, the rows that are not read are random too.
        seed: of the weights.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float, mean: float = 0.0) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) * std + mean

    def norm(name: str, width: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": normal(width, std=0.1, mean=1.0), f"{name}.bias": normal(width, std=0.1)}

    def block(name: str, width: int, mlp: int) -> dict[str, torch.Tensor]:
        return {
            **norm(f"{name}.ln_1", width),
            f"{name}.attn.in_proj_weight": normal(3 * width, width, std=width**-0.5),
            f"{name}.attn.in_proj_bias": normal(3 * width, std=0.1),
            f"{name}.attn.out_proj.weight": normal(width, width, std=width**-0.5),
            f"{name}.attn.out_proj.bias": normal(width, std=0.1),
            **norm(f"{name}.ln_2", width),
            f"{name}.mlp.c_fc.weight": normal(mlp, width, std=width**-0.5),
            f"{name}.mlp.c_fc.bias": normal(mlp, std=0.1),
            f"{name}.mlp.c_proj.weight": normal(width, mlp, std=mlp**-0.5),
            f"{name}.mlp.c_proj.bias": normal(width, std=0.1),
        }

    side, patch = image
    state: dict[str, Any] = {
        "logit_scale": torch.tensor(4.6052),
        "positional_embedding": normal(rows, text[0], std=0.1),
        "text_projection": normal(text[0], projection, std=text[0] ** -0.5),
        "token_embedding.weight": normal(vocab_size, text[0], std=0.1),
        **norm("ln_final", text[0]),
        "visual.class_embedding": normal(vision[0], std=0.5),
        "visual.conv1.weight": normal(vision[0], 3, patch, patch, std=(3 * patch * patch) ** -0.5),
        "visual.positional_embedding": normal((side // patch) ** 2 + 1, vision[0], std=0.1),
        "visual.proj": normal(vision[0], projection, std=vision[0] ** -0.5),
        **norm("visual.ln_pre", vision[0]),
        **norm("visual.ln_post", vision[0]),
    }
    if tables == 2:
        state["positional_embedding_res"] = normal(rows, text[0], std=0.1)
    for layer in range(text[2]):
        state |= block(f"transformer.resblocks.{layer}", *text[:2])
    for layer in range(vision[2]):
        state |= block(f"visual.transformer.resblocks.{layer}", *vision[:2])
    return state
