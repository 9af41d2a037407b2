"""What each image is, by its content; and how several processes share work, items and errors."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from longclip_hf.errors import EncodingError, ImageError
from longclip_hf.evaluation.data import ImageFile
from longclip_hf.evaluation.loading import some
from longclip_hf.images import is_rescaled


@dataclass(frozen=True)
class Contents:
    """What images are by their bytes.

    Args:
        digests: SHA-256 of each.
        rescaled: how many have more than 8 bits of grey; see `longclip_hf.images.to_rgb`.
    """

    digests: list[bytes]
    rescaled: int


def image_digests(images: Sequence[ImageFile]) -> list[bytes]:
    """The digests of `image_contents`."""
    return image_contents(images).digests


def image_contents(images: Sequence[ImageFile]) -> Contents:
    """Reads every image, undecoded. Of several processes each reads its share, and all get the whole.

    Reading a benchmark takes minutes from a slow disk: a run does it once, and hands the digests to every model.

    Raises:
        EncodingError: naming all images that cannot be read.
    """
    from accelerate import PartialState

    processes = PartialState()
    index, count = processes.process_index, processes.num_processes
    share = images[len(images) * index // count : len(images) * (index + 1) // count]

    def look(image: ImageFile) -> tuple[bytes, bool, str]:
        try:
            content = image.read()
            return hashlib.sha256(content).digest(), is_rescaled(content), ""
        except ImageError as error:
            return b"", False, str(error)
        except Exception as error:  # of file systems, archives, servers
            return b"", False, f"{image.name} cannot be read: {type(error).__name__}: {error}"

    with ThreadPoolExecutor() as pool:
        found = gathered(list(pool.map(look, share)))
    raise_all([problem for _, _, problem in found if problem], f"{len(images)} images")
    return Contents([digest for digest, _, _ in found], sum(deep for _, deep, _ in found))


def gathered(items: list[Any]) -> list[Any]:
    """The items of all processes, in the order of ranks."""
    from accelerate.utils import gather_object

    items_of_all: list[Any] = gather_object(items)
    return items_of_all


def raise_all(problems: Sequence[str], of: str) -> None:
    """Raises one error for all problems, which every process must have gathered before."""
    if problems:
        raise EncodingError(f"{len(problems)} of {of} cannot be encoded: {some(problems, '; ')}")
