"""Pipelines of every kind that read the tokenizer's length, tiny, converted, and run in stock diffusers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from longclip_hf.conversion.diffusion import convert
from longclip_hf.conversion.pipeline import READ_LENGTH, code_of, reads_length
from longclip_hf.errors import ConversionError
from tests.conversion.test_diffusion import (
    WORDS,
    change_json,
    load,
    make_distinct,
    prompt_of,
    sharpen,
    t5,
    text_config,
    tokenizer_files,
    unet,
)

diffusers = pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")

IMAGE = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
NONE = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def flux(parts: dict[str, Any], scratch: Path) -> Any:
    t5s = {name.replace("3", "2"): part for name, part in t5(scratch).items()}
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=64, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    with torch.no_grad():  # a fresh one hardly sees the pooled vector
        for name, value in transformer.named_parameters():
            if "text_embedder" in name or "norm" in name:
                value.mul_(8)
    parts["vae"] = diffusers.AutoencoderKL(
        block_out_channels=(4,), layers_per_block=1, latent_channels=1, norm_num_groups=1, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.FluxPipeline(**parts, **t5s, transformer=transformer, scheduler=scheduler)


def animate(parts: dict[str, Any], scratch: Path) -> Any:
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=4
    )
    return diffusers.AnimateDiffPipeline(
        **parts, unet=unet(cross_attention_dim=32), motion_adapter=adapter, scheduler=ddim()
    )


def controlled(parts: dict[str, Any], scratch: Path) -> Any:
    control = diffusers.ControlNetModel(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), conditioning_embedding_out_channels=(4,),
    )  # fmt: skip
    return diffusers.StableDiffusionControlNetPipeline(
        **parts, **NONE, unet=unet(cross_attention_dim=32), controlnet=control, scheduler=ddim()
    )


def ddim() -> Any:
    return diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)


def stable(name: str, **values: Any) -> Callable[[dict[str, Any], Path], Any]:
    return lambda parts, _: getattr(diffusers, name)(
        **parts, **NONE, unet=unet(cross_attention_dim=32, **values), scheduler=ddim()
    )


def upscaling(parts: dict[str, Any], scratch: Path) -> Any:
    model = unet(cross_attention_dim=32, in_channels=7, num_class_embeds=100)
    parts["vae"].register_to_config(scaling_factor=0.08333)  # or diffusers warns that it is none of the upscaler's
    return diffusers.StableDiffusionUpscalePipeline(
        **parts, unet=model, scheduler=ddim(), low_res_scheduler=diffusers.DDPMScheduler(), max_noise_level=50
    )


# What makes each, and what it is called with beside the prompt.
KINDS: dict[str, tuple[Callable[[dict[str, Any], Path], Any], dict[str, Any]]] = {
    "FluxPipeline": (flux, {"prompt_2": "dog", "height": 8, "width": 8, "max_sequence_length": 16}),
    "LatentConsistencyModelPipeline": (
        lambda parts, _: diffusers.LatentConsistencyModelPipeline(
            **parts, **NONE, unet=unet(cross_attention_dim=32, time_cond_proj_dim=8),
            scheduler=diffusers.LCMScheduler(),
        ),
        {},
    ),
    "AnimateDiffPipeline": (animate, {"num_frames": 2, "height": 8, "width": 8}),
    "StableDiffusionInstructPix2PixPipeline": (
        stable("StableDiffusionInstructPix2PixPipeline", in_channels=8), {"image": IMAGE}
    ),
    "StableDiffusionInpaintPipeline": (
        stable("StableDiffusionInpaintPipeline", in_channels=9),
        {"image": IMAGE, "mask_image": Image.new("L", (8, 8), 255), "height": 8, "width": 8},
    ),
    "StableDiffusionUpscalePipeline": (upscaling, {"image": IMAGE, "noise_level": 10}),
    "StableDiffusionControlNetPipeline": (controlled, {"image": IMAGE}),
}  # fmt: skip


def write_pipeline(folder: Path, kind: str, scratch: Path) -> None:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1)
    encoder = CLIPTextModel(text_config("text_encoder", tokenizer_files(scratch / "tokenizer")))
    make_distinct(encoder)
    parts = {"vae": vae, "text_encoder": encoder, "tokenizer": CLIPTokenizer.from_pretrained(scratch / "tokenizer")}
    pipeline = KINDS[kind][0](parts, scratch)
    sharpen(pipeline.transformer if kind == "FluxPipeline" else pipeline.unet)
    pipeline.save_pretrained(folder)


def picture(pipeline: Any, kind: str, prompt: str) -> np.ndarray:
    made = pipeline(
        prompt, num_inference_steps=1, guidance_scale=3.0, output_type="np", generator=torch.manual_seed(0),
        **KINDS[kind][1],
    )  # fmt: skip
    return np.asarray(getattr(made, "images", None) if hasattr(made, "images") else made.frames)


@pytest.mark.parametrize("kind", KINDS)
def test_token_200_changes_the_picture(kind: str, tmp_path: Path) -> None:
    write_pipeline(tmp_path / "short", kind, tmp_path)
    assert convert(str(tmp_path / "short"), tmp_path / "long").pipeline == kind
    prompts = prompt_of(WORDS), prompt_of(WORDS, w199="cat")
    short, long = (load(tmp_path / name) for name in ("short", "long"))
    assert type(long).__name__ == kind
    assert np.array_equal(*(picture(short, kind, prompt) for prompt in prompts))
    first, second = (picture(long, kind, prompt) for prompt in prompts)
    assert np.isfinite(first).all() and np.abs(first - second).max() > 1e-4


def test_flux_pooled_vector_sees_token_100(tmp_path: Path) -> None:
    """All that FLUX reads of CLIP is one vector: of the end of the text, which sees every token before it."""
    write_pipeline(tmp_path / "short", "FluxPipeline", tmp_path)
    convert(str(tmp_path / "short"), tmp_path / "long")
    pipeline = load(tmp_path / "long")
    prompts = prompt_of(150), prompt_of(150, w100="cat")
    with torch.no_grad():
        first, second = (pipeline.encode_prompt(prompt, "dog", max_sequence_length=16)[1] for prompt in prompts)
    assert first.shape == (1, 32) and (first - second).abs().max() > 1e-3


class TestCapability:
    def test_what_is_known_without_diffusers_is_what_its_code_says(self) -> None:
        """Of every pipeline in the installed diffusers whose name is known here, and that has a CLIP to convert."""
        folder = Path(diffusers.__file__).parent / "pipelines"
        seen: dict[str, bool] = {}
        for file in folder.rglob("pipeline_*.py"):
            code = file.read_text(encoding="utf-8")
            names = [
                line.split("(")[0].removeprefix("class ") for line in code.splitlines() if line.startswith("class ")
            ]
            if "flax" not in file.name and "CLIPTextModel" in code:
                seen |= {name: reads_length(code) for name in names if READ_LENGTH.fullmatch(name)}
        wrong = {name for name, reads in seen.items() if not reads}
        assert len(seen) > 70 and {*KINDS} <= seen.keys()
        # It counts in the editing of weights alone; CLIP's image tower; a wrapper that hands the prompt on.
        assert wrong <= {"StableDiffusionModelEditingPipeline", "StableDiffusionImageVariationPipeline"}

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("HunyuanVideoPipeline", "is a HunyuanVideoPipeline, which counts 77 tokens in its own code"),
            ("Kandinsky5T2VPipeline", "is a Kandinsky5T2VPipeline, which counts 77 tokens in its own code"),
            ("MyFluxPipeline", "is a MyFluxPipeline, of which it is not known .* Install the diffusers that has it"),
            ("../x", "is a ../x, of which it is not known"),
        ],
    )
    def test_others_are_refused_by_name(self, name: str, message: str, tmp_path: Path) -> None:
        write_pipeline(tmp_path / "short", "StableDiffusionInstructPix2PixPipeline", tmp_path)
        change_json(tmp_path / "short" / "model_index.json", _class_name=name)
        with pytest.raises(ConversionError, match=message):
            convert(str(tmp_path / "short"), tmp_path / "long")

    def test_a_component_of_77_states_is_refused(self, tmp_path: Path) -> None:
        write_pipeline(tmp_path / "short", "StableDiffusionInstructPix2PixPipeline", tmp_path)
        change_json(tmp_path / "short" / "model_index.json", prior=["diffusers", "PriorTransformer"])
        with pytest.raises(ConversionError, match="prior, a PriorTransformer, has 77 positions of its own"):
            convert(str(tmp_path / "short"), tmp_path / "long")

    def test_the_code_is_read_and_not_run(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        assert "class FluxPipeline(" in str(code_of("FluxPipeline"))
        assert code_of("NoSuchPipeline") is None
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert code_of("FluxPipeline") is None
        write_pipeline(tmp_path / "short", "StableDiffusionInstructPix2PixPipeline", tmp_path)
        assert convert(str(tmp_path / "short"), tmp_path / "long").length == 248

    def test_seventy_seven_beside_a_missing_tokenizer_is_no_count(self) -> None:
        fallback = "self.tokenizer.model_max_length if self.tokenizer is not None else 77"
        assert reads_length(fallback) and not reads_length(f"{fallback}\nx = 77")
        assert not reads_length("max_length = 77") and not reads_length("")
