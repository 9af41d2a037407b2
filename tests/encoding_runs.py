"""Runs of `evaluation/encoding.py` in processes of their own, for `test_encoding`.

    python tests/encoding_runs.py CHECKPOINT FOLDER

One process, two, and three at once; and one that kills itself and is started again. Each encodes captions and pictures
with a store, once more from it, tries some that cannot be encoded, and writes what it got. A script: every process is
a fork of it, and what costs seconds to import is imported once.
"""

import io
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  imported once for all
import numpy as np
import torch
from PIL import Image

from examples.random_clip import SENTENCES
from longclip_hf.errors import EncodingError
from longclip_hf.evaluation.benchmarks import ImageFile
from longclip_hf.evaluation.encoding import Encoder
from longclip_hf.evaluation.feature_store import FeatureStore

TEXTS, IMAGES, BATCH_TOKENS, BATCH_IMAGES = 29, 11, 600, 2
KILL_AT = 3  # batches are finished before it


def make_captions(count: int = TEXTS, longest: int = 200) -> list[str]:
    """Of 1 to `longest` words; the first is the longest, and the last is the second again."""
    rng = random.Random(0)
    words = [word for sentence in SENTENCES for word in sentence.split()]
    lengths = [longest, *(rng.randint(1, longest) for _ in range(count - 2))]
    captions = [" ".join(rng.choices(words, k=length)) for length in lengths]
    return [*captions, captions[1]]


def encoded(picture: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind)
    return file.getvalue()


def make_images(count: int = IMAGES) -> list[ImageFile]:
    """Noise; the last is the first again under another name."""
    rng = np.random.default_rng(0)
    contents = [encoded(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)) for _ in range(count - 1)]
    # A partial of a function that everybody has: for dataloader workers, whatever starts them.
    return [ImageFile(f"{i}.png", partial(bytes, content)) for i, content in enumerate([*contents, contents[0]])]


def make_encoder(checkpoint: Path, **options: Any) -> Encoder:
    defaults = {"device": "cpu", "batch_tokens": BATCH_TOKENS, "batch_images": BATCH_IMAGES}
    return Encoder(checkpoint, **(defaults | options))


def missing_file() -> bytes:
    raise FileNotFoundError("no such file")


def refusals(encoder: Encoder, images: list[ImageFile]) -> list[str]:
    """What is said of files that are missing, of files that are no pictures, and of features that are not finite."""
    said = []
    last = encoder.processes.num_processes - 1
    attempts = [
        lambda: encoder.encode_images([*images, ImageFile("gone.png", missing_file)]),
        lambda: encoder.encode_images(
            [*(ImageFile(f"{i}.txt", partial(bytes, f"text {i}".encode())) for i in range(3)), *images]
        ),
        # On one process only, as where memory is at fault: the others must not wait for it.
        lambda: spoil(encoder, last).encode_texts([f"dog {caption}" for caption in make_captions()]),
    ]
    for attempt in attempts:
        try:
            attempt()
        except EncodingError as error:
            said.append(str(error))
    return said


def spoil(encoder: Encoder, index: int) -> Encoder:
    if encoder.processes.process_index == index:
        with torch.no_grad():
            encoder.model.text_projection.weight[0] = torch.nan
    return encoder


def watch(encoder: Encoder, kill: int | None) -> list[list[list[int]]]:
    """The ids of every batch of captions; before the batch `kill`, the process kills itself."""
    original, batches = encoder.model.get_text_features, []

    def patched(**inputs: torch.Tensor) -> Any:
        if len(batches) == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        batches.append(inputs["input_ids"].tolist())
        return original(**inputs)

    encoder.model.get_text_features = patched
    return batches


def run(checkpoint: str, store: Path, output: Path, kill: int | None = None) -> None:
    encoder = make_encoder(Path(checkpoint), store=FeatureStore(store, shard_seconds=0))
    watched = watch(encoder, kill)
    captions, images = make_captions(), make_images()
    texts, pictures = encoder.encode_texts(captions), encoder.encode_images(images)
    batches = [*watched]
    first = (dict(encoder.encoded), dict(encoder.stored))
    # With more and fewer rows than before, in another order.
    again = encoder.encode_texts([*captions[::-1], "a dog"]), encoder.encode_images(images[::-2])
    second = (dict(encoder.encoded), dict(encoder.stored))
    said = refusals(encoder, images)
    torch.save(
        {
            "texts": texts.embeds, "images": pictures, "first": first, "second": second, "said": said,
            "again": (again[0].embeds, again[1]), "lengths": texts.lengths, "truncated": texts.truncated,
            "batches": batches,
        },
        output,
    )  # fmt: skip


def one_of_many(checkpoint: str, folder: Path, index: int, count: int, port: int) -> None:
    if count > 1:
        os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    run(checkpoint, folder / f"store-{count}", folder / f"{index}-of-{count}.pt")
    if count > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
        return port


def main(checkpoint: str, output: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    folder, process = Path(output), multiprocessing.get_context("fork").Process
    started = []
    for count in (1, 2, 3):
        port = free_port()
        started += [process(target=one_of_many, args=(checkpoint, folder, i, count, port)) for i in range(count)]
    for one in started:
        one.start()
    for one in started:
        one.join()
    assert [one.exitcode for one in started] == [0] * len(started)
    store = folder / "store-killed"
    for kill, expected in ((KILL_AT, -signal.SIGKILL), (None, 0)):
        one = process(target=run, args=(checkpoint, store, folder / "resumed.pt", kill))
        one.start()
        one.join()
        assert one.exitcode == expected
        if kill is not None:
            shutil.copytree(store, folder / "store-as-killed")


if __name__ == "__main__":
    main(*sys.argv[1:])
