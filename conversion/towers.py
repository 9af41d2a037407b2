"""The two towers of a Long-CLIP as ONNX files in three precisions, and how far they are from torch."""

import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel
from tokenizers import Tokenizer
from torch import nn
from torch.export import Dim

from longclip_hf.errors import ConversionError, ProofError
from modeling_longclip import LongCLIPModel
from modeling_longclip.compat import features

# A protobuf ends at 2 GiB: above it the weights are written beside the graph.
LARGEST_FILE = 2 * 10**9
REPEATS = 5  # of which a time is the median
# What onnxruntime chooses its int8 arithmetic by, as /proc/cpuinfo calls it: of x86-64, then of ARM.
INT8_INSTRUCTIONS = ("avx2", "avx512bw", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
CPU_INFO = Path("/proc/cpuinfo")

# What the features are compared on: texts from two tokens to the whole table, in words that every CLIP knows.
SENTENCES = (
    "A brown dog runs along the beach and shakes the water out of its fur.",
    "Behind it, two people in red jackets carry a wooden boat towards the sea.",
    "The sky is grey, with a bright stripe above the horizon.",
    "On the left stands a white lighthouse whose door is open.",
    "Someone has left a bicycle against the wall, and a basket of fish hangs from its handlebar.",
    "Three gulls sit on the roof; a fourth one is landing.",
    "The sand in front shows the tracks of a tractor, half washed away.",
    "Far out, a ferry with a blue funnel is turning into the harbour.",
)
IMAGES = 4


class Tower(nn.Module):
    """A tower with its projection: one tensor in, features of shape `(batch_size, projection_dim)` out."""

    input_name: ClassVar[str]
    output_name: ClassVar[str]
    file_name: ClassVar[str]  # as transformers.js looks for it

    def __init__(self, model: LongCLIPModel) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def example(self) -> tuple[torch.Tensor, dict[int, Any]]:
        """An input to trace with, and its dimensions that may be of any size."""
        raise NotImplementedError

    def encode(self, rows: Sequence[np.ndarray]) -> torch.Tensor:
        """Torch's features of each of `rows` alone, not normalised."""
        with torch.inference_mode():
            return torch.cat([self(torch.from_numpy(row)[None]) for row in rows])


class TextTower(Tower):
    """`input_ids` of shape `(batch_size, length)` -> `text_embeds`.

    CLIP pools at the first EOT, so what pads a text behind it does not matter and there is no mask. A row without EOT,
    which `LongCLIPModel` refuses with an error, gives NaN.
    """

    input_name, output_name, file_name = "input_ids", "text_embeds", "text_model"

    def example(self) -> tuple[torch.Tensor, dict[int, Any]]:
        longest = self.model.config.text_config.max_position_embeddings
        return torch.zeros(2, 3, dtype=torch.int64), {0: Dim("batch"), 1: Dim("length", max=longest)}

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        embeds = features(self.model.get_text_features(input_ids=input_ids))
        eos_token_id = self.model.text_model.eos_token_id
        if eos_token_id == 2:  # of before 2023: CLIP pools at the highest id, which every text has
            return embeds
        return embeds.masked_fill(~(input_ids == eos_token_id).any(dim=-1, keepdim=True), float("nan"))


class ImageTower(Tower):
    """`pixel_values` of shape `(batch_size, 3, image_size, image_size)` -> `image_embeds`."""

    input_name, output_name, file_name = "pixel_values", "image_embeds", "vision_model"

    def example(self) -> tuple[torch.Tensor, dict[int, Any]]:
        size = self.model.config.vision_config.image_size
        return torch.zeros(2, 3, size, size), {0: Dim("batch")}

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return features(self.model.get_image_features(pixel_values=pixel_values))


@dataclass(frozen=True)
class Drift:
    """How far features are from torch's in float32, at the worst of all inputs.

    Args:
        absolute: the largest difference of a feature's entries.
        normalised: the same, of features of length 1.
        cosine: the smallest cosine.
    """

    absolute: float
    normalised: float
    cosine: float


def sample_texts(tokenizer: Path, length: int) -> list[np.ndarray]:
    """Token ids of texts of growing length, the last of `length` tokens, each `int64` of shape `(tokens,)`.

    Raises:
        ConversionError: if `tokenizer` is no file of a tokenizer.
    """
    try:
        reader = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the library raises nothing else
        raise ConversionError(f"{tokenizer.name} is no tokenizer: {error}. Download it again.") from error
    reader.enable_truncation(length)
    texts = [" ".join(SENTENCES[:count]) for count in range(len(SENTENCES))]
    texts.append(" ".join(SENTENCES * length))
    return [np.array(reader.encode(text).ids, dtype=np.int64) for text in texts]


def sample_images(image_size: int) -> list[np.ndarray]:
    """Normalised pixels of patterns from coarse to fine, each `float32` of shape `(3, image_size, image_size)`."""
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.randn(1, 3, 2 + 4 * index, 2 + 4 * index, generator=generator) for index in range(IMAGES)]
    size = (image_size, image_size)
    return [nn.functional.interpolate(image, size, mode="bilinear")[0].numpy() for image in pixels]


def export_tower(tower: Tower, file: Path) -> int:
    """Writes `tower` in float32, in the opset that torch's exporter stands for, and returns that."""
    example, sizes = tower.example()
    with _quiet():
        program = torch.onnx.export(
            tower,
            (example,),
            input_names=[tower.input_name],
            output_names=[tower.output_name],
            dynamic_shapes=(sizes,),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    graph = model.graph
    # The exporter notes the source line of each node, with the paths of this machine.
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]
    # Shapes of what is computed on the way: the quantiser renames weights and then finds them contradictory.
    del graph.value_info[:]
    save_onnx(model, file)
    return next(int(opset.version) for opset in model.opset_import if not opset.domain)


def save_onnx(model: onnx.ModelProto, file: Path) -> None:
    """Writes `model`; where one file cannot hold it, with its weights in `file`_data. `model` is empty afterwards."""
    nbytes = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    weights = file.with_name(f"{file.name}_data")
    onnx.save_model(model, file, save_as_external_data=nbytes > LARGEST_FILE, location=weights.name)
    if weights.exists():
        weights.chmod(file.stat().st_mode)  # written closed to everybody else


def write_fp16(source: Path, file: Path) -> None:
    """`source` with weights and arithmetic in float16; inputs and outputs stay what they are."""
    with _quiet():
        model = OnnxModel(convert_float_to_float16(str(source), keep_io_types=True))
    model.topological_sort()  # the casts of inputs stand last; onnxruntime does not mind, others do
    save_onnx(model.model, file)


def write_int8(source: Path, file: Path) -> None:
    """`source` with the weights of its matrix products and its table of words in int8.

    Weights have a scale per channel; activations are quantised when it runs, by their range in the whole batch. The
    patches' convolution and the tables of positions stay float32: they are small.

    Weights of products have 7 bits, -64 ... 64. Without VNNI, x86-64 adds products of a byte of activations and one of
    weights in pairs, in 16 bits that saturate: 2 * 255 * 64 always fits, 2 * 255 * 127 does not. The table of words
    takes part in no product and has 8.
    """
    graph = onnx.load(source, load_external_data=False).graph
    tables = [node.name for node in graph.node if node.op_type == "Gather" and "position_embedding" in node.input[0]]
    quantised = file.with_suffix(".quantised")
    with _quiet():
        quantize_dynamic(
            source,
            quantised,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            nodes_to_exclude=tables,
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=source.with_name(f"{source.name}_data").exists(),
        )
    save_onnx(onnx.load(quantised), file)
    for left in file.parent.glob(f"{quantised.name}*"):
        left.unlink()


def int8_instructions() -> str:
    """What this processor has of `INT8_INSTRUCTIONS`, or `"unknown"` where the system does not say it."""
    try:
        text = CPU_INFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "unknown"
    lines = (line.partition(":") for line in text.splitlines())
    flags = {flag for name, _, value in lines if name.strip() in ("flags", "Features") for flag in value.split()}
    return ", ".join(name for name in INT8_INSTRUCTIONS if name in flags) or "unknown"


def open_session(file: Path) -> onnxruntime.InferenceSession:
    """`file` on the CPU, with as many threads as torch uses."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def measure_drift(
    session: onnxruntime.InferenceSession, rows: Sequence[np.ndarray], expected: torch.Tensor, padding: int = 0
) -> Drift:
    """Compares with `expected`, of shape `(rows, projection_dim)`: each row alone, half of them and all together.

    Args:
        session: a tower.
        rows: token ids of shape `(tokens,)`, in order of length, or images of shape `(3, image_size, image_size)`.
        expected: what torch makes of each row alone.
        padding: the token that fills up the shorter texts of a batch.

    Raises:
        ProofError: for features that are not finite.
    """
    name = session.get_inputs()[0].name
    everything = list(range(len(rows)))
    found, wanted = [], []
    for group in [*([row] for row in everything), everything[: len(rows) // 2], everything]:
        longest = rows[group[-1]].shape
        batch = [
            np.pad(rows[row], (0, longest[0] - len(rows[row])), constant_values=padding)
            if len(longest) == 1
            else rows[row]
            for row in group
        ]
        found.append(torch.from_numpy(session.run(None, {name: np.stack(batch)})[0]))
        wanted.append(expected[group])
    ours, theirs = torch.cat(found).double(), torch.cat(wanted).double()
    if not ours.isfinite().all():
        raise ProofError(f"{int((~ours.isfinite()).any(dim=1).sum())} of {len(ours)} features are not finite.")
    unit, their_unit = nn.functional.normalize(ours), nn.functional.normalize(theirs)
    return Drift(
        (ours - theirs).abs().max().item(),
        (unit - their_unit).abs().max().item(),
        (unit * their_unit).sum(dim=1).min().item(),
    )


def milliseconds(run: Callable[[], Any]) -> float:
    """The median of some runs, after one to warm up."""
    run()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds)


def load_model(folder: Path) -> LongCLIPModel:
    """The model in `folder`, in float32 and with attention that can be exported.

    Raises:
        ConversionError: if it does not load.
    """
    try:
        model: LongCLIPModel = LongCLIPModel.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )
    except ValueError as error:
        raise ConversionError(str(error)) from error
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' advice to each other: torchvision is missing, a tree is deprecated, pre-process first."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
