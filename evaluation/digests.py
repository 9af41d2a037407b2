"""What each image is, by its content; and how several processes share work, items and errors."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from longclip_hf.errors import EncodingError, ImageError
from longclip_hf.evaluation.data import ImageFile
from longclip_hf.evaluation.loading import some


def image_digests(images: Sequence[ImageFile]) -> list[bytes]:
    """SHA-256 of every image's content. Of several processes each reads its share, and all get the whole.

    Reading a benchmark takes minutes from a slow disk: a run does it once, and hands the digests to every model.

    Raises:
        EncodingError: naming all images that cannot be read.
    """
    from accelerate import PartialState

    processes = PartialState()
    index, count = processes.process_index, processes.num_processes
    share = images[len(images) * index // count : len(images) * (index + 1) // count]

    def digest(image: ImageFile) -> tuple[bytes, str]:
        try:
            return hashlib.sha256(image.read()).digest(), ""
        except ImageError as error:
            return b"", str(error)
        except Exception as error:  # of file systems, archives, servers
            return b"", f"{image.name} cannot be read: {type(error).__name__}: {error}"

    with ThreadPoolExecutor() as pool:
        digests = gathered(list(pool.map(digest, share)))
    raise_all([problem for _, problem in digests if problem], f"{len(images)} images")
    return [digest for digest, _ in digests]


def gathered(items: list[Any]) -> list[Any]:
    """The items of all processes, in the order of ranks."""
    from accelerate.utils import gather_object

    items_of_all: list[Any] = gather_object(items)
    return items_of_all


def raise_all(problems: Sequence[str], of: str) -> None:
    """Raises one error for all problems, which every process must have gathered before."""
    if problems:
        raise EncodingError(f"{len(problems)} of {of} cannot be encoded: {some(problems, '; ')}")
