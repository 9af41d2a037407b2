"""Tiny pipelines with random weights, converted, and run in stock diffusers from end to end."""

import importlib.metadata
import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import run_python
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from examples.random_clip import clip_config, write_image_settings, write_tokenizer
from longclip_hf.conversion.checkpoint import DERIVED_BUFFERS, POSITION_TABLE
from longclip_hf.conversion.diffusion import convert, main
from longclip_hf.conversion.positions import stretch_positions
from longclip_hf.conversion.stretch import stretch
from longclip_hf.errors import ConversionError, FileError, LongCLIPError
from modeling_longclip import LongCLIPTextModel

diffusers = pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")

Convert = Callable[[Path], Path]

ROOT = Path(__file__).parents[2]
KINDS = ("sd", "xl", "sd3")
ENCODERS = {"sd": ["text_encoder"], "xl": ["text_encoder", "text_encoder_2"]}
ENCODERS["sd3"] = ENCODERS["xl"]
WIDTHS = {"text_encoder": 32, "text_encoder_2": 24}
WORDS = 300  # more than any of the encoders reads


def text_config(name: str, vocab_size: int, **values: Any) -> CLIPTextConfig:
    """Of two widths, so that none can stand for the other; the special ids are Stable Diffusion's own."""
    width = WIDTHS[name]
    sizes = {"hidden_size": width, "projection_dim": width, "intermediate_size": 2 * width, "num_hidden_layers": 3}
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    return CLIPTextConfig(**(sizes | ids | {"num_attention_heads": 4, "vocab_size": vocab_size} | values))


def tokenizer_files(folder: Path, pad: str = "<|endoftext|>") -> int:
    vocab_size = write_tokenizer(folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | {"pad_token": pad}))
    return vocab_size


def make_distinct(model: torch.nn.Module) -> None:
    """Embeddings of spread 1 instead of 0.02: fresh ones make hardly a difference."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "vision" not in name and name.endswith(("token_embedding.weight", "position_embedding.weight")):
                value.mul_(50)


def sharpen(denoiser: torch.nn.Module) -> None:
    """Attention that tells tokens apart: fresh ones look at all alike."""
    with torch.no_grad():
        for name, value in denoiser.named_parameters():
            if re.search(r"attn.*(to_q|to_k|to_v|add_k_proj|add_v_proj|add_q_proj)\.weight", name):
                value.mul_(8)


def unet(**values: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **values,
    )  # fmt: skip


def t5(folder: Path) -> dict[str, Any]:
    """SD3's third encoder, of SD3's joint width, with a letter for a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    letters = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.Unigram([(letter, -1.0) for letter in letters], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.save(str(folder / "letters.json"))
    config = T5Config(vocab_size=32, d_model=64, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return {
        "text_encoder_3": T5EncoderModel(config).eval(),
        "tokenizer_3": T5TokenizerFast(tokenizer_file=str(folder / "letters.json"), extra_ids=0),
    }


def write_pipeline(folder: Path, kind: str, scratch: Path) -> None:
    """A pipeline of the kind as stock diffusers saves it; SDXL's tokenizers as the Hub has them: vocab and merges."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1)
    if kind == "sd3":
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, latent_channels=4, use_quant_conv=False,
            use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5,
        )  # fmt: skip
    parts: dict[str, Any] = {"vae": vae}
    for name in ENCODERS[kind]:
        tokenizer = name.replace("text_encoder", "tokenizer")
        vocab_size = tokenizer_files(scratch / tokenizer, "!" if name == "text_encoder_2" else "<|endoftext|>")
        projected = kind == "sd3" or name == "text_encoder_2"
        parts[name] = (CLIPTextModelWithProjection if projected else CLIPTextModel)(text_config(name, vocab_size))
        make_distinct(parts[name])
        parts[tokenizer] = CLIPTokenizer.from_pretrained(scratch / tokenizer)
    ddim = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    if kind == "sd":
        none = dict.fromkeys(("safety_checker", "feature_extractor"))
        pipeline = diffusers.StableDiffusionPipeline(
            **parts, **none, unet=unet(cross_attention_dim=32), scheduler=ddim, requires_safety_checker=False
        )
    elif kind == "xl":
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        model = unet(cross_attention_dim=56, projection_class_embeddings_input_dim=24 + 6 * 8, **added)
        pipeline = diffusers.StableDiffusionXLPipeline(
            **parts, unet=model, scheduler=ddim, add_watermarker=False, force_zeros_for_empty_prompt=False
        )
    else:
        model = diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=56,
        )  # fmt: skip
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        pipeline = diffusers.StableDiffusion3Pipeline(**parts, **t5(scratch), transformer=model, scheduler=scheduler)
    sharpen(pipeline.transformer if kind == "sd3" else pipeline.unet)
    pipeline.save_pretrained(folder)
    if kind == "xl":
        for tokenizer in ("tokenizer", "tokenizer_2"):
            shutil.rmtree(folder / tokenizer)
            shutil.copytree(scratch / tokenizer, folder / tokenizer)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """`main` listens to SIGTERM; the process of the tests does not."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of each kind of pipeline, made once. Read only."""
    root = tmp_path_factory.mktemp("pipelines")

    def folder(kind: str) -> Path:
        if not (root / kind).exists():
            write_pipeline(root / kind, kind, tmp_path_factory.mktemp("scratch"))
        return root / kind

    return folder


@pytest.fixture(scope="module")
def long_pipelines(
    pipelines: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The same, converted."""
    root = tmp_path_factory.mktemp("long-pipelines")

    def folder(kind: str) -> Path:
        if not (root / kind).exists():
            convert(str(pipelines(kind)), root / kind)
        return root / kind

    return folder


@pytest.fixture
def sd(pipelines: Callable[[str], Path], copy_of: Callable[[Path], Path]) -> Path:
    """A copy of the smallest pipeline, to change."""
    return copy_of(pipelines("sd"))


def load(folder: Path, **parts: Any) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prompt_of(words: int, **changed: str) -> str:
    """A prompt of that many words, each a token; `w3="cat"` changes the third."""
    prompt = ["dog"] * words
    for place, word in changed.items():
        prompt[int(place[1:]) - 1] = word
    return " ".join(prompt)


def picture(pipeline: Any, prompt: str, **options: Any) -> np.ndarray:
    options = {"num_inference_steps": 1, "guidance_scale": 3.0} | options
    return pipeline(prompt, output_type="np", generator=torch.manual_seed(0), **options).images[0]


def states(pipeline: Any, prompt: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the denoiser is given of a prompt: per-token states, and SDXL's and SD3's pooled ones."""
    options |= {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    if isinstance(pipeline, diffusers.StableDiffusion3Pipeline):
        options |= {"prompt_3": None}
    if not isinstance(pipeline, diffusers.StableDiffusionPipeline):
        options |= {"prompt_2": None}
    with torch.no_grad():
        encoded = pipeline.encode_prompt(prompt, **options)
    return encoded[0][0], encoded[2] if len(encoded) == 4 else None


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def vocabulary(folder: Path) -> int:
    return json.loads((folder / "text_encoder" / "config.json").read_text())["vocab_size"]


@pytest.mark.parametrize("kind", KINDS)
class TestPictures:
    def test_token_200_changes_the_picture(
        self, kind: str, pipelines: Callable[[str], Path], long_pipelines: Callable[[str], Path]
    ) -> None:
        """In the pipeline as it was it does not: CLIP reads 77. In SD3, T5 would read it, and gets another prompt."""
        same = {"prompt_3": "dog"} if kind == "sd3" else {}
        prompts = prompt_of(WORDS), prompt_of(WORDS, w199="cat")  # after BOS
        tokenizer = CLIPTokenizer.from_pretrained(long_pipelines(kind) / "tokenizer")
        ids = [tokenizer(prompt, truncation=True).input_ids for prompt in prompts]
        assert len(ids[0]) == 248
        assert [place for place, (a, b) in enumerate(zip(*ids, strict=True)) if a != b] == [199]
        short, long = load(pipelines(kind)), load(long_pipelines(kind))
        assert np.array_equal(*(picture(short, prompt, **same) for prompt in prompts))
        first, second = (picture(long, prompt, **same) for prompt in prompts)
        assert np.isfinite(first).all()
        assert np.abs(first - second).max() > 1e-4
        assert np.array_equal(first, picture(long, prompts[0], **same))

    def test_a_short_prompt_has_the_states_that_it_had(
        self, kind: str, pipelines: Callable[[str], Path], long_pipelines: Callable[[str], Path]
    ) -> None:
        short, long = load(pipelines(kind)), load(long_pipelines(kind))
        for words in (1, 8, 18):  # with BOS and EOT, up to 20 tokens
            prompt = prompt_of(words, w1="cat")
            (old, old_pooled), (new, new_pooled) = states(short, prompt), states(long, prompt)
            own = words + 2
            assert new.shape[0] - old.shape[0] == 248 - 77
            torch.testing.assert_close(new[:own], old[:own], rtol=0, atol=2e-6)
            if kind != "sd":
                torch.testing.assert_close(new_pooled, old_pooled, rtol=0, atol=2e-6)
        # Row 20 is the first that is stretched, and stays too; row 21 is the first that moves.
        old, new = (states(pipeline, prompt_of(40))[0] for pipeline in (short, long))
        assert (new[:41] - old[:41])[:, :32].abs().amax(dim=1)[21:].min() > 1e-3

    def test_negative_prompts_are_as_long(self, kind: str, long_pipelines: Callable[[str], Path]) -> None:
        same = {"negative_prompt_3": "dog"} if kind == "sd3" else {}
        pipeline = load(long_pipelines(kind))
        first, second, none = (
            picture(pipeline, prompt_of(9), negative_prompt=negative, **same)
            for negative in (prompt_of(WORDS), prompt_of(WORDS, w199="cat"), None)
        )
        assert np.abs(first - second).max() > 1e-4
        assert np.abs(first - none).max() > 1e-4

    def test_clip_skip(
        self, kind: str, pipelines: Callable[[str], Path], long_pipelines: Callable[[str], Path]
    ) -> None:
        short, long = load(pipelines(kind)), load(long_pipelines(kind))
        if kind == "sd" and not hasattr(long.text_encoder, "text_model"):
            # diffusers asks for it, and stock CLIPTextModel lost it in transformers 5.6: docs/diffusion.md.
            with pytest.raises(AttributeError, match="text_model"):
                picture(long, prompt_of(3), clip_skip=1)
            for folder, pipeline in ((pipelines(kind), short), (long_pipelines(kind), long)):
                pipeline.text_encoder = LongCLIPTextModel.from_pretrained(folder / "text_encoder")
        (old, _), (new, _), (whole, _) = (
            states(pipeline, prompt_of(18), clip_skip=skip) for pipeline, skip in ((short, 1), (long, 1), (long, None))
        )
        torch.testing.assert_close(new[:20], old[:20], rtol=0, atol=2e-6)
        assert (new - whole).abs().max() > 1e-3
        same = {"prompt_3": "dog"} if kind == "sd3" else {}
        first, second = (
            picture(long, prompt, clip_skip=1, **same) for prompt in (prompt_of(WORDS), prompt_of(WORDS, w199="cat"))
        )
        assert np.abs(first - second).max() > 1e-4

    def test_saved_and_loaded_again(self, kind: str, long_pipelines: Callable[[str], Path], tmp_path: Path) -> None:
        pipeline = load(long_pipelines(kind))
        pipeline.save_pretrained(tmp_path / "again")
        again = load(tmp_path / "again")
        prompt = prompt_of(WORDS, w199="cat")
        assert np.array_equal(picture(pipeline, prompt), picture(again, prompt))
        for name in ENCODERS[kind]:
            assert type(getattr(again, name)) in (CLIPTextModel, CLIPTextModelWithProjection)
            assert getattr(again, name).config.max_position_embeddings == 248
            assert getattr(again, name.replace("text_encoder", "tokenizer")).model_max_length == 248

    def test_lora(
        self, kind: str, pipelines: Callable[[str], Path], long_pipelines: Callable[[str], Path], tmp_path: Path
    ) -> None:
        """One that was trained on the pipeline of 77 tokens, on the denoiser and the text encoders."""
        if misfit := peft_misfit():
            pytest.skip(misfit)
        save_lora(load(pipelines(kind)), tmp_path)
        short, long = load(pipelines(kind)), load(long_pipelines(kind))
        before, plain = picture(long, prompt_of(WORDS)), states(long, prompt_of(18))[0]
        for pipeline in (short, long):
            # Named, because diffusers looks for it on the Hub otherwise, which it cannot offline.
            pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
        (old, _), (new, _) = (states(pipeline, prompt_of(18)) for pipeline in (short, long))
        torch.testing.assert_close(new[:20], old[:20], rtol=0, atol=5e-6)
        assert (new - plain).abs().max() > 1e-3
        first, second = (picture(long, prompt) for prompt in (prompt_of(WORDS), prompt_of(WORDS, w199="cat")))
        assert np.abs(first - before).max() > 1e-4
        assert np.abs(first - second).max() > 1e-4
        long.unload_lora_weights()
        assert np.array_equal(picture(long, prompt_of(WORDS)), before)


def peft_misfit() -> str | None:
    """What does not fit, if transformers refuses the installed peft when it is to add an adapter."""
    from transformers.integrations.peft import MIN_PEFT_VERSION
    from transformers.utils import check_peft_version

    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError:
        peft = importlib.metadata.version("peft")
        asked = f"transformers {transformers.__version__} asks for peft >= {MIN_PEFT_VERSION}, found {peft}"
        return f"{asked}; docs/diffusion.md says what fits"
    return None


@pytest.mark.parametrize(("found", "named"), [("0.0.1", True), ("99.0", False)])
def test_releases_that_do_not_fit_are_named(found: str, named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
    assert (f"transformers {transformers.__version__} asks for peft" in str(peft_misfit())) == named


def save_lora(pipeline: Any, folder: Path) -> None:
    """A LoRA of rank 2 whose matrices are random, saved by peft and diffusers."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(1)
    parts = {"unet": ["to_q", "to_k"], "transformer": ["to_q", "to_k"]}
    parts |= {"text_encoder": ["q_proj", "v_proj"], "text_encoder_2": ["q_proj", "v_proj"]}
    layers = {}
    for name, modules in parts.items():
        part = getattr(pipeline, name, None)
        if part is not None:
            part.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=modules, init_lora_weights=False))
            adapters = get_peft_model_state_dict(part)
            layers[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(adapters) if "text" in name else adapters
    type(pipeline).save_lora_weights(folder, **layers)


class TestFolder:
    @pytest.mark.parametrize("kind", KINDS)
    def test_everything_else_is_as_it_was(
        self, kind: str, pipelines: Callable[[str], Path], long_pipelines: Callable[[str], Path]
    ) -> None:
        """model_index.json too: the classes are the stock ones that it names."""
        source, output = pipelines(kind), long_pipelines(kind)
        slow = {f"{folder}/{name}" for folder in ("tokenizer", "tokenizer_2") for name in ("vocab.json", "merges.txt")}
        assert files_of(source) - files_of(output) == set()
        assert files_of(output) - files_of(source) <= slow
        changed = {name for name in files_of(source) if (source / name).read_bytes() != (output / name).read_bytes()}
        expected = set()
        for name in ENCODERS[kind]:
            expected |= {f"{name}/config.json", f"{name}/model.safetensors"}
            expected.add(f"{name.replace('text_encoder', 'tokenizer')}/tokenizer_config.json")
        assert changed == expected
        for name in ENCODERS[kind]:
            old, new = (json.loads((folder / name / "config.json").read_text()) for folder in (source, output))
            assert new == old | {"max_position_embeddings": 248}
            config = f"{name.replace('text_encoder', 'tokenizer')}/tokenizer_config.json"
            old, new = (json.loads((folder / config).read_text()) for folder in (source, output))
            assert new == old | {"model_max_length": 248}

    @pytest.mark.parametrize("kind", KINDS)
    def test_only_the_table_is_stretched(
        self, kind: str, pipelines: Callable[[str], Path], long_pipelines: Callable[[str], Path]
    ) -> None:
        for name in ENCODERS[kind]:
            old, new = (load_file(f(kind) / name / "model.safetensors") for f in (pipelines, long_pipelines))
            # The names of CLIPTextModel up to 4.57, which every version reads; 5.6 and newer save flat ones.
            old = {key if key.startswith("text_") else f"text_model.{key}": value for key, value in old.items()}
            assert old.keys() == new.keys()
            assert [key for key in old if not torch.equal(old[key], new[key])] == [POSITION_TABLE]
            assert torch.equal(new[POSITION_TABLE], stretch_positions(old[POSITION_TABLE]))

    def test_stock_classes_load_every_tensor(self, long_pipelines: Callable[[str], Path]) -> None:
        for stock, kind, name in (
            (CLIPTextModel, "xl", "text_encoder"),
            (CLIPTextModelWithProjection, "xl", "text_encoder_2"),
            (CLIPTextModelWithProjection, "sd3", "text_encoder"),
        ):
            folder = long_pipelines(kind) / name
            model, info = stock.from_pretrained(folder, output_loading_info=True)
            assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            table = load_file(folder / "model.safetensors")[POSITION_TABLE]
            assert any(torch.equal(table, value) for value in model.parameters())

    def test_tokenizers_keep_their_pad_token(self, long_pipelines: Callable[[str], Path]) -> None:
        pipeline = load(long_pipelines("xl"))
        for tokenizer, pad in ((pipeline.tokenizer, "<|endoftext|>"), (pipeline.tokenizer_2, "!")):
            ids = tokenizer("a dog", padding="max_length", return_tensors="pt").input_ids[0].tolist()
            assert tokenizer.pad_token == pad
            assert len(ids) == 248
            assert set(ids[4:]) == {tokenizer.convert_tokens_to_ids(pad)}
        assert pipeline.tokenizer_2.pad_token_id == 0

    def test_a_tokenizer_of_transformers_5_alone(self, sd: Path, tmp_path: Path) -> None:
        """tokenizer.json with CLIP's 77 in it: 248 come out, and both forms are there."""
        from transformers import CLIPTokenizerFast

        fast = CLIPTokenizerFast.from_pretrained(sd / "tokenizer")
        backend = json.loads(fast.backend_tokenizer.to_str())
        shutil.rmtree(sd / "tokenizer")
        (sd / "tokenizer").mkdir()
        cut = {"direction": "Right", "max_length": 77, "strategy": "LongestFirst", "stride": 0}
        (sd / "tokenizer" / "tokenizer.json").write_text(json.dumps(backend | {"truncation": cut}))
        (sd / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
        convert(str(sd), tmp_path / "long")
        written = json.loads((tmp_path / "long" / "tokenizer" / "tokenizer.json").read_text())
        assert written["truncation"] is None
        for form in (CLIPTokenizer, CLIPTokenizerFast):
            tokenizer = form.from_pretrained(tmp_path / "long" / "tokenizer")
            assert len(tokenizer(prompt_of(WORDS), truncation=True).input_ids) == 248
            assert tokenizer(prompt_of(3)).input_ids == fast(prompt_of(3)).input_ids

    @pytest.mark.parametrize("link", [False, True])
    def test_copied_or_linked(self, link: bool, sd: Path, tmp_path: Path) -> None:
        for extra in ("README.md", "safety_checker/pytorch_model.bin", ".git/HEAD", "unet/.cache/lock"):
            (sd / extra).parent.mkdir(exist_ok=True)
            (sd / extra).write_text("opaque")
        report = convert(str(sd), tmp_path / "long", link=link)
        own = {"text_encoder", "tokenizer"}
        others = {name for name in files_of(sd) if name.split("/")[0] not in own}
        carried = {name for name in others if not {".git", ".cache"} & set(name.split("/"))}
        assert {name for name in files_of(tmp_path / "long") if name.split("/")[0] not in own} == carried
        for name in carried:
            assert (sd / name).samefile(tmp_path / "long" / name) == link
            assert (sd / name).read_bytes() == (tmp_path / "long" / name).read_bytes()
        how = "hard-linked" if link else "copied"
        assert re.fullmatch(
            rf"{len(carried)} files, 0\.\d MB, byte-identical \({len(carried)} {how}\)",
            report.proofs["all other files"],
        )
        assert sorted(report.left_out) == [".git", "unet/.cache"]

    def test_where_no_links_are_it_copies(self, sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: Any) -> None:
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr("os.link", refuse)
        report = convert(str(sd), tmp_path / "long", link=True)
        assert re.search(r"\(\d+ copied\)$", report.proofs["all other files"])

    def test_variants_keep_name_and_dtype(self, sd: Path, tmp_path: Path) -> None:
        """Beside them lies what would no longer fit, and is left out."""
        place = sd / "text_encoder"
        tensors = load_file(place / "model.safetensors")
        half = {name: tensor.half() for name, tensor in tensors.items()}
        save_file(half, place / "model.fp16.safetensors", metadata={"format": "pt"})
        torch.save(tensors, place / "pytorch_model.bin")
        (place / "flax_model.msgpack").write_bytes(b"opaque")
        report = convert(str(sd), tmp_path / "long")
        assert report.left_out == ["text_encoder/flax_model.msgpack", "text_encoder/pytorch_model.bin"]
        assert {name for name in files_of(tmp_path / "long") if name.startswith("text_encoder")} == {
            "text_encoder/config.json", "text_encoder/model.fp16.safetensors", "text_encoder/model.safetensors",
        }  # fmt: skip
        written = load_file(tmp_path / "long" / "text_encoder" / "model.fp16.safetensors")
        assert {tensor.dtype for tensor in written.values()} == {torch.float16}
        (table,) = (tensor for name, tensor in half.items() if "position_embedding" in name)
        assert torch.equal(written[POSITION_TABLE], stretch_positions(table))
        assert {claim.split(": ")[0] for claim in report.proofs if "kept rows" in claim} == {
            "text_encoder", "text_encoder fp16",
        }  # fmt: skip
        encoder = load(tmp_path / "long", variant="fp16").text_encoder  # in float32, as diffusers does by default
        assert any(torch.equal(written[POSITION_TABLE].float(), value) for value in encoder.parameters())

    @pytest.mark.parametrize("form", ["shards", "bin", "variant alone"])
    def test_other_forms_of_the_weights(
        self, form: str, sd: Path, tmp_path: Path, long_pipelines: Callable[[str], Path]
    ) -> None:
        place, name = sd / "text_encoder", "model.safetensors"
        tensors = load_file(place / name)
        (place / name).unlink()
        if form == "shards":
            parts = list(tensors)[::2], list(tensors)[1::2]
            for number, part in enumerate(parts, 1):
                save_file({key: tensors[key] for key in part}, place / f"model-0000{number}-of-00002.safetensors")
            (place / "model.safetensors.index.json").write_text("{}")
        elif form == "bin":
            buffer = {DERIVED_BUFFERS[0]: torch.arange(77)[None]}
            nested = {key if "text_model" in key else f"text_model.{key}": value for key, value in tensors.items()}
            torch.save(nested | buffer, place / "pytorch_model.bin")
        else:
            name = "model.fp16.safetensors"
            save_file(tensors, place / name)
        report = convert(str(sd), tmp_path / "long")
        written = load_file(tmp_path / "long" / "text_encoder" / name)
        expected = load_file(long_pipelines("sd") / "text_encoder" / "model.safetensors")
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[key], expected[key]) for key in expected)
        assert files_of(tmp_path / "long" / "text_encoder") == {"config.json", name}
        assert report.left_out == {
            "shards": ["text_encoder/model.safetensors.index.json"],
            "bin": [f"text_encoder: the tensor {DERIVED_BUFFERS[0]}, which CLIP makes itself"],
        }.get(form, [])

    @pytest.mark.slow
    def test_from_the_hub(self, pipelines: Callable[[str], Path], tmp_path: Path) -> None:
        """diffusers chooses what to download; the cache keeps what it had."""
        source = Path(shutil.copytree(pipelines("sd"), tmp_path / "source"))
        (source / "v1-5-pruned.ckpt").write_bytes(b"opaque")
        with HubServer(tmp_path / "hub", lfs_threshold=10_000) as hub:
            hub.add_repo("user/sd", source)
            call = "main(['user/sd', '--output', 'long', '--link'])"
            code = f"from longclip_hf.conversion.diffusion import main; assert {call} == 0"
            run_python(code, hub.environment(), cwd=tmp_path)
        assert "v1-5-pruned.ckpt" not in files_of(tmp_path / "long")
        prompts = prompt_of(WORDS), prompt_of(WORDS, w199="cat")
        assert np.abs(np.subtract(*(picture(load(tmp_path / "long"), prompt) for prompt in prompts))).max() > 1e-4


@pytest.fixture(scope="module")
def long_clips(pipelines: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Long-CLIPs whose text tower has the size of the pipelines' first encoder, or another."""

    def folder(length: int = 248, layers: int = 3, projection: int = 32, **text: Any) -> Path:
        root = tmp_path_factory.mktemp("long-clip")
        vocab_size = write_tokenizer(root / "clip")
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": layers}
        config = clip_config("tiny", vocab_size, **(sizes | text))
        config.projection_dim = projection
        config.text_config.projection_dim = config.vision_config.projection_dim = projection
        write_image_settings(root / "clip", 32)
        torch.manual_seed(2)
        model = CLIPModel(config)
        make_distinct(model)
        model.save_pretrained(root / "clip")
        stretch(str(root / "clip"), root / "long-clip", length=length, ratio=-(-(length - 20) // 57))
        return root / "long-clip"

    return folder


class TestReplacement:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_first_encoder_is_the_long_clips(
        self, kind: str, pipelines: Callable[[str], Path], long_clips: Callable[..., Path], tmp_path: Path
    ) -> None:
        clip = long_clips()
        report = convert(str(pipelines(kind)), tmp_path / "long", text_encoder=str(clip))
        assert report.encoders["text_encoder"] == f"replaced by {clip}"
        pipeline = load(tmp_path / "long")
        theirs = LongCLIPTextModel.from_pretrained(clip)
        inputs = pipeline.tokenizer(prompt_of(200), padding="max_length", return_tensors="pt").input_ids
        assert inputs.shape == (1, 248)
        with torch.no_grad():
            hidden = theirs(inputs, output_hidden_states=True)
            used = hidden.last_hidden_state if kind == "sd" else hidden.hidden_states[-2]
        given, pooled = states(pipeline, prompt_of(200))
        torch.testing.assert_close(given[:248, :32], used[0], rtol=0, atol=2e-6)
        if kind == "sd3":
            model = CLIPModel.from_pretrained(clip)
            with torch.no_grad():
                projected = model.text_projection(hidden.pooler_output)
            torch.testing.assert_close(pooled[:, :32], projected, rtol=0, atol=2e-6)
        if kind != "sd":
            assert report.encoders["text_encoder_2"] == "77 -> 248 positions"
        prompts = prompt_of(WORDS), prompt_of(WORDS, w199="cat")
        assert np.abs(np.subtract(*(picture(pipeline, prompt) for prompt in prompts))).max() > 1e-4

    def test_dtype_is_the_pipelines(self, sd: Path, long_clips: Callable[..., Path], tmp_path: Path) -> None:
        file = sd / "text_encoder" / "model.safetensors"
        save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
        clip = long_clips()
        convert(str(sd), tmp_path / "long", text_encoder=str(clip))
        theirs = load_file(clip / "model.safetensors")
        ours = load_file(tmp_path / "long" / "text_encoder" / "model.safetensors")
        assert all(name.startswith("text_model.") for name in ours)
        assert all(torch.equal(tensor, theirs[name].half()) for name, tensor in ours.items())

    def test_stable_diffusion_2_has_no_last_layer(
        self, sd: Path, long_clips: Callable[..., Path], tmp_path: Path
    ) -> None:
        """Its encoder is a ViT-H/14 without its last layer: 23 of 24."""
        clip = long_clips(layers=4)
        convert(str(sd), tmp_path / "long", text_encoder=str(clip))
        pipeline = load(tmp_path / "long")
        assert pipeline.text_encoder.config.num_hidden_layers == 3
        theirs = LongCLIPTextModel.from_pretrained(clip)
        inputs = pipeline.tokenizer(prompt_of(200), padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            penultimate = theirs(inputs, output_hidden_states=True).hidden_states[-2]
            expected = theirs.text_model.final_layer_norm(penultimate)
        torch.testing.assert_close(states(pipeline, prompt_of(200))[0], expected[0], rtol=0, atol=2e-6)

    def test_the_other_encoders_get_its_length(
        self, pipelines: Callable[[str], Path], long_clips: Callable[..., Path], tmp_path: Path
    ) -> None:
        report = convert(str(pipelines("xl")), tmp_path / "long", text_encoder=str(long_clips(length=400)))
        assert report.length == 400
        assert report.encoders["text_encoder_2"] == "77 -> 400 positions"
        pipeline = load(tmp_path / "long")
        prompts = prompt_of(450), prompt_of(450, w350="cat")
        assert np.abs(np.subtract(*(picture(pipeline, prompt) for prompt in prompts))).max() > 1e-4

    @pytest.mark.parametrize(
        ("kind", "clip", "message"),
        [
            (
                "sd",
                {"hidden_size": 16},
                r"another than text_encoder of .*/sd: hidden_size 16, not 32\. Name a Long-CLIP",
            ),
            (
                "sd",
                {"hidden_size": 64, "num_attention_heads": 8},
                "hidden_size 64, not 32; num_attention_heads 8, not 4",
            ),
            ("sd", {"layers": 5}, "num_hidden_layers 5, not 3"),
            ("sd", {"layers": 2}, "num_hidden_layers 2, not 3"),
            ("sd", {"hidden_act": "gelu"}, "hidden_act gelu, not quick_gelu"),
            ("sd3", {"whole": False}, "text_projection.weight is missing"),
            ("sd3", {"projection": 24}, r"text_projection.weight has shape \(24, 32\), not \(32, 32\)"),
        ],
    )
    def test_another_tower_is_refused(
        self,
        kind: str,
        clip: dict[str, Any],
        message: str,
        pipelines: Callable[[str], Path],
        long_clips: Callable[..., Path],
        tmp_path: Path,
    ) -> None:
        if clip == {"whole": False}:
            folder = tmp_path / "text-tower"
            CLIPTextModel.from_pretrained(long_clips()).save_pretrained(folder)
        else:
            folder = long_clips(**clip)
        with pytest.raises(ConversionError, match=message):
            convert(str(pipelines(kind)), tmp_path / "long", text_encoder=str(folder))
        assert not (tmp_path / "long").exists()

    def test_a_clip_that_is_not_long_is_refused(
        self, sd: Path, long_clips: Callable[..., Path], tmp_path: Path
    ) -> None:
        clip = long_clips().parent / "clip"
        with pytest.raises(ConversionError, match=r"has 77 positions, so it is no Long-CLIP.*conversion/stretch.py"):
            convert(str(sd), tmp_path / "long", text_encoder=str(clip))


def remove(name: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()

    return change


def index(**values: Any) -> Callable[[Path], Any]:
    return lambda folder: change_json(folder / "model_index.json", **values)


def without_row(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if "final_layer_norm.bias" in name))
    save_file(tensors, file, metadata={"format": "pt"})


class Executes:
    def __init__(self, folder: Path) -> None:
        self.marker = folder / "executed"

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        import os

        return os.mkdir, (str(self.marker),)


def code_in_bin(folder: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").unlink()
    torch.save(Executes(folder), folder / "text_encoder" / "pytorch_model.bin")


BAD_PIPELINES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no index": (remove("model_index.json"), "holds no model_index.json: a folder in diffusers' layout"),
    "index cut": (lambda folder: (folder / "model_index.json").write_text("{"), "model_index.json is no JSON file"),
    "another pipeline": (index(_class_name="KandinskyPipeline"), "is a KandinskyPipeline, which counts 77 tokens"),
    "no text encoder": (index(text_encoder=[None, None]), r"no CLIP text encoder .*text_encoder: \[None, None\]"),
    "T5 alone": (index(text_encoder=["transformers", "T5EncoderModel"]), "no CLIP text encoder .*T5EncoderModel"),
    "folder missing": (remove("text_encoder"), "the folder text_encoder is missing"),
    "tokenizer missing": (remove("tokenizer"), "the folder tokenizer is missing"),
    "no weights": (remove("text_encoder/model.safetensors"), "text_encoder holds no weights"),
    "tensor missing": (without_row, r"final_layer_norm.bias is missing"),
    "code in .bin": (code_in_bin, "Nothing in it was executed"),
    "empty tokenizer": (
        lambda folder: [file.unlink() for file in (folder / "tokenizer").iterdir()],
        "tokenizer holds neither tokenizer.json nor vocab.json and merges.txt",
    ),
    "tokenizer cut": (
        lambda folder: [(folder / "tokenizer" / name).write_text("{") for name in ("vocab.json", "tokenizer.json")],
        "tokenizer.json is no JSON file|tokenizer is no CLIP tokenizer",
    ),
}


class TestRefusals:
    @pytest.mark.parametrize("case", BAD_PIPELINES)
    def test_a_bad_pipeline(self, case: str, sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        change, message = BAD_PIPELINES[case]
        change(sd)
        before = files_of(tmp_path)
        assert main([str(sd), "--output", str(tmp_path / "long")]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        error = err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert re.search(message, error)
        assert files_of(tmp_path) == before
        assert not (sd / "executed").exists()

    @pytest.mark.parametrize("link", ["unet/private.json", "text_encoder/model.safetensors", "tokenizer/vocab.json"])
    def test_what_leads_out_is_not_carried_over(self, link: str, sd: Path, tmp_path: Path) -> None:
        (tmp_path / "private").write_text("{}")
        (sd / link).unlink(missing_ok=True)
        (sd / link).symlink_to(tmp_path / "private")
        with pytest.raises(FileError, match=f"{Path(link).name} leads out of its folder, to {tmp_path}/private"):
            convert(str(sd), tmp_path / "long")
        assert not (tmp_path / "long").exists()

    @pytest.mark.parametrize("target", [".", "/", "../unet"])
    def test_links_to_folders_end(self, target: str, sd: Path, tmp_path: Path) -> None:
        (sd / "unet" / "again").symlink_to(target)
        with pytest.raises(ConversionError, match=r"unet/again is a link to a folder. Replace the link by the folder"):
            convert(str(sd), tmp_path / "long")

    def test_code_of_others_stays_behind(self, sd: Path, tmp_path: Path) -> None:
        (sd / "custom.py").write_text("raise SystemExit")
        change_json(sd / "unet" / "config.json", auto_map={"AutoModel": "a/b--c.D"})
        change_json(sd / "text_encoder" / "config.json", auto_map={"AutoModel": "a/b--c.D"})
        change_json(sd / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["a/b--c.D", None]})
        report = convert(str(sd), tmp_path / "long")
        left_out = ["unet/config.json: auto_map, which would run the code of others", "custom.py, which is code"]
        assert [name for name in report.left_out if "code" in name] == left_out
        assert report.proofs["all other files"].endswith("; 1 without code of others")
        assert not [file for file in (tmp_path / "long").rglob("*.json") if "auto_map" in file.read_text()]
        assert not list((tmp_path / "long").rglob("*.py"))

    def test_a_component_with_code_of_its_own(self, sd: Path, tmp_path: Path) -> None:
        change_json(sd / "model_index.json", unet=["mine", "Mine"])
        (sd / "unet" / "mine.py").write_text("raise SystemExit")
        with pytest.raises(ConversionError, match=r"unet is loaded by code of its own, unet/mine.py"):
            convert(str(sd), tmp_path / "long")

    def test_twice(self, long_pipelines: Callable[[str], Path], tmp_path: Path) -> None:
        with pytest.raises(ConversionError, match=r"text_encoder has 248 positions, and CLIP has 77"):
            convert(str(long_pipelines("sd")), tmp_path / "longer")

    def test_a_vocabulary_that_is_too_large(self, sd: Path, tmp_path: Path) -> None:
        size = vocabulary(sd)
        change_json(sd / "text_encoder" / "config.json", vocab_size=size - 1)
        file = sd / "text_encoder" / "model.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if "token_embedding" in name)
        save_file(tensors | {name: tensors[name][:-1].contiguous()}, file, metadata={"format": "pt"})
        message = f"tokenizer has {size} tokens, and text_encoder has embeddings of {size - 1}"
        with pytest.raises(ConversionError, match=message):
            convert(str(sd), tmp_path / "long")

    @pytest.mark.parametrize(
        ("source", "options", "message"),
        [
            ("SD", {"variant": "fp16"}, "--revision and --variant are for Hub ids"),
            ("SD/model_index.json", {}, "is a file. Name a folder in diffusers' layout"),
            ("./nowhere", {}, "no such folder"),
            ("user/nowhere", {}, "the Hub gave no such pipeline"),
            ("SD", {"output": "SD"}, "is or holds the source"),
            ("SD", {"output": "SD/.."}, "is or holds the source"),
            ("SD", {"output": "TMP/taken"}, "exists already"),
            (
                "SD",
                {"output": "TMP/taken", "overwrite": True},
                r"holds files and no checkpoint \(no model_index.json\)",
            ),
        ],
    )
    def test_a_bad_request(
        self, source: str, options: dict[str, Any], message: str, pipelines: Callable[[str], Path], tmp_path: Path
    ) -> None:
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "thesis.txt").write_text("mine")
        places = {"SD": str(pipelines("sd")), "TMP": str(tmp_path)}

        def filled(text: str) -> str:
            return re.sub("SD|TMP", lambda match: places[match[0]], text)

        arguments = {"output": "TMP/long"} | options
        with pytest.raises(LongCLIPError, match=message):
            convert(filled(source), **(arguments | {"output": filled(arguments["output"])}))
        assert files_of(tmp_path) == {"taken/thesis.txt"}

    def test_what_fails_at_the_end_leaves_nothing(
        self, sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("filecmp.cmp", lambda *args, **kwargs: False)
        before = files_of(tmp_path)
        with pytest.raises(ConversionError, match=r"model_index.json differs from the source after copying"):
            convert(str(sd), tmp_path / "long")
        assert files_of(tmp_path) == before


def test_interrupted(
    sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("filecmp.cmp", interrupt)
    before = files_of(tmp_path)
    assert main([str(sd), "--output", str(tmp_path / "long")]) == 130
    assert capsys.readouterr().err.strip().endswith("Interrupted; nothing was left behind.")
    assert files_of(tmp_path) == before


def test_the_command_says_what_it_did(
    pipelines: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main([str(pipelines("xl")), "--output", str(tmp_path / "[red]long")]) == 0
    out = capsys.readouterr().out
    assert "[red]long" in out  # a name, not markup
    proofs = dict(re.findall(r"│ (\w+(?:: \w+ \w+| \w+ \w+|))\s+│ (.*?)\s+│", out))
    claims = ("kept rows", "stretched rows", "other tensors", "short prompts")
    expected = [f"{name}: {claim}" for name in ENCODERS["xl"] for claim in claims]
    assert sorted(proofs) == sorted([*expected, "tokenizer", "tokenizer_2", "all other files"])
    assert proofs["text_encoder_2: kept rows"] == "rows 0 ... 19 bit-identical"
    assert proofs["text_encoder: short prompts"].startswith("texts of 3, 8, 14, 20 tokens: largest change 0.0")
    assert proofs["tokenizer_2"] == "cuts at 248 tokens, pads with '!' (id 0); ids of short prompts stay"
    assert "text_encoder_2: 77 -> 248 positions" in out
    assert out.endswith("Prompts have up to 248 tokens.\n")
    assert f"StableDiffusionXLPipeline.from_pretrained('{tmp_path / '[red]long'}')" in out


SNIPPETS = re.findall(
    r"```python\n(.*?)```\s+```text\n(.*?)```", (ROOT / "docs" / "diffusion.md").read_text(encoding="utf-8"), re.DOTALL
)


@pytest.mark.parametrize(("code", "printed"), SNIPPETS, ids=range(len(SNIPPETS)))
def test_the_snippets_of_the_document(
    code: str,
    printed: str,
    long_pipelines: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(long_pipelines("sd"), tmp_path / "long-sd")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(code, {})  # in this process: another import of diffusers takes longer than all the rest
    assert capsys.readouterr().out == printed


def test_every_snippet_has_its_printed_result() -> None:
    text = (ROOT / "docs" / "diffusion.md").read_text(encoding="utf-8")
    assert len(SNIPPETS) == text.count("```python") >= 1
