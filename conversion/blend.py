"""Interpolates the weights of two checkpoints of one model, such as a Long-CLIP before and after it was fine-tuned.

    python conversion/blend.py long-clip tuned --alpha 0.5 --output blended
    python conversion/blend.py USER/long-clip tuned --alpha 0.3 --output blended

Every weight is (1 - alpha) of the first and alpha of the second checkpoint's (WiSE-FT, arXiv 2109.01903): where
fine-tuning gains on long captions and loses elsewhere, a blend can keep most of both. Which alpha does is found by
measuring: evaluation/run.py takes several folders at once, on short texts and on long ones. The arithmetic is float32,
every weight keeps the first one's dtype, and 0 and 1 are the two themselves. Tokenizer, image settings and code are
those of the first.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longclip_hf.command import CommandParser, consoles, guarded, print_proofs
from longclip_hf.errors import ConversionError
from longclip_hf.files import new_folder
from modeling_longclip.defaults import CLIP_LENGTH

if TYPE_CHECKING:
    import torch

    from longclip_hf.conversion.checkpoint import Checkpoint

# Of a configuration, what does not decide what the weights compute.
_BESIDE = {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "stretch_arithmetic"}
_MOST_NAMED = 5  # differences in an error


@dataclass(frozen=True)
class BlendReport:
    """What was blended, and proven about it.

    Attributes:
        output: the new folder.
        alpha: the share of the second checkpoint.
        tensors: how many there are.
        different: how many of them differ between the two checkpoints.
        proofs: in words, by claim.
    """

    output: Path
    alpha: float
    tensors: int
    different: int
    proofs: dict[str, str]


def blend(
    first: str,
    second: str,
    alpha: float,
    output: Path | str,
    *,
    revisions: tuple[str | None, str | None] = (None, None),
    overwrite: bool = False,
) -> BlendReport:
    """Writes `(1 - alpha) * first + alpha * second`, weight by weight, to the folder `output`.

    References:
        Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (arXiv 2109.01903).

    Args:
        first: a Hub id or folder of a Long-CLIP, such as the one that training began with.
        second: the same model with other weights, such as what training made of it.
        alpha: within 0 ... 1. At the ends the weights are those of one of the two, to the last bit in `first`'s dtype.
        output: the new folder. It appears at the end, whole, or not at all.
        revisions: branch, tag or commit of each, where it is a Hub id.
        overwrite: replace an existing `output`.

    Raises:
        ConversionError: if the two are not the same model, or for whatever else a user can mend; nothing is left.
        ProofError: if what was written is not what was meant; nothing is left behind.
    """
    from longclip_hf.conversion import folder, parity
    from longclip_hf.conversion.checkpoint import long_config, read_checkpoint
    from longclip_hf.conversion.tensors import as_stored, read_safetensors, write_safetensors

    if not 0 <= alpha <= 1:
        raise ConversionError(f"alpha must be within 0 ... 1, from the first to the second checkpoint, got {alpha}.")
    output = Path(output)
    one, other = (
        read_checkpoint(source, revision, stretched=True)
        for source, revision in zip((first, second), revisions, strict=True)
    )
    for checkpoint in (one, other):
        read = checkpoint.folder.resolve()
        if output.resolve() in (read, *read.parents):
            raise ConversionError(
                f"{output} is or holds the source {checkpoint.source}, which stays. Name another --output."
            )
    _check_same_model(one, other)
    with new_folder(output, one.nbytes() + 20_000_000, overwrite) as work:
        _, same_ids = folder.write_tokenizer(work, one.folder, first, one.text_config.max_position_embeddings)
        if one.has_image_tower:
            folder.write_image_processor(work, one.folder, first)
        blended, different = {}, 0
        for name, stored in one.tensors.items():
            before, after = stored.load(), other.tensors[name].load()
            blended[name] = _blend(before, after, alpha)
            different += not bool((before == after).all())
        config = long_config(one)
        config.dtype = str(next(iter(blended.values())).dtype).removeprefix("torch.")
        long_class = one.model_class.__name__
        folder.write_config(work, config, long_class.removeprefix("Long"), folder.auto_map_of(long_class))
        folder.write_code(work)
        weights = work / "model.safetensors"
        write_safetensors(weights, blended)
        proof = parity.prove_same_tensors(read_safetensors(weights), as_stored(weights, blended))
        read_checkpoint(str(work), stretched=True)  # strict
        proofs = {"weights": f"{proof} to the blend in memory", "token ids": same_ids}
        _write_card(work, one, other, alpha, proofs)
    return BlendReport(output, alpha, len(blended), different, proofs)


def _blend(before: "torch.Tensor", after: "torch.Tensor", alpha: float) -> "torch.Tensor":
    import torch

    if alpha in (0.0, 1.0):  # exactly: -0.0 + 0.0 is 0.0
        return (before, after)[int(alpha)].to(before.dtype)
    arithmetic = torch.promote_types(before.dtype, torch.float32)
    return torch.lerp(before.to(arithmetic), after.to(arithmetic), alpha).to(before.dtype)


def _check_same_model(one: "Checkpoint", other: "Checkpoint") -> None:
    """Weights of two models have a mean, and it is no model.

    Raises:
        ConversionError: naming what differs, the shapes of tensors, settings or normalisation of images.
    """
    for checkpoint in (one, other):
        length = checkpoint.text_config.max_position_embeddings
        if length <= CLIP_LENGTH:
            raise ConversionError(
                f"{checkpoint.source} reads {length} tokens and is no Long-CLIP. Stretch it first: "
                f"python conversion/stretch.py {checkpoint.source}"
            )
    shapes = [{name: tensor.shape for name, tensor in checkpoint.tensors.items()} for checkpoint in (one, other)]
    settings = [_flat(checkpoint.config.to_dict()) for checkpoint in (one, other)]
    pixels = [_normalisation(checkpoint) for checkpoint in (one, other)]
    found = [
        f"{name} is {left.get(name, 'missing')} and {right.get(name, 'missing')}"
        for left, right in (settings, shapes, *[pixels] * all(pixels))
        for name in dict.fromkeys([*left, *right])
        if left.get(name) != right.get(name)
    ]
    if found:
        more = f" ... and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
        raise ConversionError(
            f"{one.source} and {other.source} are not the same model: {'; '.join(found[:_MOST_NAMED])}{more}. A blend "
            "is for a model before and after its training."
        )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        elif name not in _BESIDE:
            flat[f"{prefix}{name}"] = value
    return flat


def _normalisation(checkpoint: "Checkpoint") -> dict[str, Any]:
    """Of images: the settings that every version of transformers writes alike. A model alone has none."""
    from longclip_hf.conversion.settings import read_settings

    settings = read_settings(checkpoint.folder, "preprocessor_config.json", say=False)
    return {name: settings[name] for name in ("image_mean", "image_std") if name in settings}


def _write_card(work: Path, one: "Checkpoint", other: "Checkpoint", alpha: float, proofs: dict[str, str]) -> None:
    """A card as of a trained model, which a blend is, with the command."""
    from huggingface_hub import ModelCardData

    from longclip_hf.conversion.folder import write_card

    places = [Path(checkpoint.source).expanduser() for checkpoint in (one, other)]
    names = [
        place.resolve().name if place.exists() else checkpoint.source
        for place, checkpoint in zip(places, (one, other), strict=True)
    ]
    data = ModelCardData(
        base_model=None if places[0].exists() else one.source,
        library_name="transformers",
        license=one.license(),
        pipeline_tag="zero-shot-image-classification" if one.has_image_tower else "feature-extraction",
        tags=["clip", "long-clip"],
    )
    text = one.text_config
    write_card(
        work,
        data,
        trained=True,
        long_class=one.model_class.__name__,
        has_image_tower=one.has_image_tower,
        rows=CLIP_LENGTH,
        length=text.max_position_embeddings,
        keep=getattr(text, "keep", None),
        made_with=shlex.join(["python", "conversion/blend.py", *names, f"--alpha={alpha:g}", "--output", "DIR"]),
        proofs=proofs,
    )


def _parser() -> CommandParser:
    parser = CommandParser(prog="longclip-blend", description=__doc__)
    parser.add_argument("first", help="Hub id or folder of the Long-CLIP that training began with")
    parser.add_argument("second", help="Hub id or folder of what training made of it")
    parser.add_argument(
        "--alpha", type=float, default=0.5, help="share of the second, within 0 ... 1 (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, required=True, help="the new folder")
    parser.add_argument("--revision", help="branch, tag or commit of the first, where it is a Hub id")
    parser.add_argument("--second-revision", help="likewise of the second")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser


def main(args: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for an error that the user can mend."""
    options = _parser().parse_args(args)

    def work() -> None:
        console, _ = consoles(options.quiet)
        report = blend(
            options.first, options.second, options.alpha, options.output,
            revisions=(options.revision, options.second_revision), overwrite=options.overwrite,
        )  # fmt: skip
        print_proofs(console, report.proofs)
        console.print(
            f"{report.output} is {1 - report.alpha:g} of {options.first} and {report.alpha:g} of {options.second}, "
            f"which differ in {report.different} of {report.tensors} tensors.\nMeasure it beside both: python "
            f"evaluation/run.py {options.first} {options.second} {report.output} ...",
            highlight=False,
            soft_wrap=True,
        )

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main())
