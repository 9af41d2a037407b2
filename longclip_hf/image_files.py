"""Where an image column may lead: to files of the data set, and to nothing else unless it is asked for.

A column is text that somebody else wrote. `/home/me/.ssh`, `../..`, a link that leads out and `http://10.0.0.1/` are
names of images to a reader that does not look, and a pipe never ends.
"""

import os
import stat
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from longclip_hf.errors import ImageError

Access = Literal["root", "local", "any"]
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
# How a source is read; see `longclip_hf.sources`.
Kind = Literal[
    "auto", "datasets", "sharegpt4v", "imagefolder", "json", "csv", "tsv", "parquet", "arrow", "webdataset", "pairs"
]

# No image of MAX_PIXELS needs more, whatever its format; what is named by mistake would fill the memory.
MAX_FILE_BYTES = 1 << 30
# fsspec chains what it looks into: zip://a.jpg::https://host/b.zip
_ARCHIVES = frozenset({"zip", "tar", "gzip", "bz2", "xz", "zstd", "lz4"})
_ASK = {
    "local": "--image_root with the folder that holds it, or --image_access local for any file of this machine, "
    "allows it",
    "any": "--image_root with the URL that holds it, or --image_access any for all addresses, allows it",
}


class ImageFiles:
    """The files that an image column may name, of training and of evaluation.

    Args:
        root: where relative names begin, and what no name may leave, links followed: a folder, or a URL, and then
            everything below it is allowed. None where nothing but bytes is expected.
        also: further folders or URLs that names may lead into.
        access: `"root"`; `"local"`, any file of this machine; or `"any"`, what `fsspec` opens too.
    """

    def __init__(self, root: str | Path | None, *also: str | Path, access: Access = "root") -> None:
        self.root = None if root is None else str(root)
        self.access = access
        homes = [str(home) for home in (root, *also) if home is not None]
        self._addresses = [home for home in homes if "://" in home]
        # With the separator, so that /data is not the beginning of /database.
        folders = (os.path.realpath(home).rstrip(os.sep) for home in homes if "://" not in home)
        self._folders = tuple(folder + os.sep for folder in folders)

    @classmethod
    def of(cls, data: str, root: str | Path | None = None, access: Access = "root") -> "ImageFiles":
        """Those of a source of the library `datasets`, which may also be in its cache.

        Args:
            data: a folder, a file, a pattern of files, an address, or a Hub id.
            root: the user's own. By default names begin in the folder, beside the file, or in the Hub's repository.
            access: see `ImageFiles`.
        """
        import datasets
        from huggingface_hub import constants

        # Archives are unpacked there, and what has an address is copied there.
        caches: list[str | Path] = [datasets.config.EXTRACTED_DATASETS_PATH, datasets.config.DOWNLOADED_DATASETS_PATH]
        path = Path(data).expanduser()
        if "://" in data or path.exists() or any(letter in data for letter in "*?["):
            return cls(home_of(data) if root is None else root, *caches, home_of(data), access=access)
        hub = f"hf://datasets/{data}"
        caches.append(Path(constants.HF_HUB_CACHE, f"datasets--{data.replace('/', '--')}"))
        return cls(hub if root is None else root, *caches, hub, access=access)

    def place(self, name: str) -> str:
        """The path or the URL that `name` stands for.

        Raises:
            ImageError: `"refused"`, where it leads out of the root and that was not asked for.
        """
        *around, inner = name.split("::")  # what is looked into stands last
        if "://" not in inner and self.root is not None and "://" in self.root and not Path(inner).is_absolute():
            inner = f"{self.root.rstrip('/')}/{inner}"
        if "://" in inner:
            allowed = self.access == "any" or self._is_below_address(inner)
        else:
            inner = inner if self.root is None or "://" in self.root else str(Path(self.root, inner))
            allowed = self.access != "root" or os.path.realpath(inner).startswith(self._folders)
        strange = [part for part in around if part.partition("://")[0] not in _ARCHIVES]
        if not allowed or (strange and self.access != "any"):
            needed = "any" if strange or "://" in inner else "local"
            where = "is no file of the data set" if needed == "any" else f"leads out of the image root, {self.root}"
            raise ImageError("refused", f"{name} {where}: {_ASK[needed]}")
        return "::".join([*around, inner])

    def read(self, name: str) -> bytes:
        """The encoded image that `name` stands for.

        Raises:
            ImageError: `"refused"`, `"missing"`, `"unreadable"` or, beyond `MAX_FILE_BYTES`, `"oversized"`.
        """
        try:
            place = self.place(name)
            with _open(place) as file:
                content: bytes = file.read(MAX_FILE_BYTES + 1)
        except ImageError:
            raise
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise ImageError("missing", f"there is no image {place}") from error
        except Exception as error:  # of file systems, archives, servers
            raise ImageError("unreadable", f"{name!r} is unreadable: {type(error).__name__}: {error}") from error
        if len(content) > MAX_FILE_BYTES:
            raise ImageError("oversized", f"{place} is oversized: more than {MAX_FILE_BYTES:,} bytes")
        return content

    def _is_below_address(self, url: str) -> bool:
        if ".." in unquote(url).replace("\\", "/").split("/"):
            return False
        for home in self._addresses:
            # hf://datasets/user/name@revision/file is a file of hf://datasets/user/name.
            ends = ("/", "@") if home.startswith("hf://") else ("/",)
            if url.startswith(tuple(home.rstrip("/") + end for end in ends)):
                return True
        return False


def home_of(data: str) -> str:
    """The folder or address in which the files of a source lie: itself, or what stands before a file or a pattern."""
    if any(letter in data for letter in "*?[") and not Path(data).exists():
        before = data[: min(data.index(letter) for letter in "*?[" if letter in data)]
        return before.rpartition("/")[0] or ("/" if before.startswith("/") else ".")
    if "://" in data:
        return data.rpartition("/")[0] if "." in data.rpartition("/")[2] else data
    path = Path(data).expanduser()
    return str(path.parent if path.is_file() else path)


def _open(place: str) -> Any:
    if "://" in place:
        import fsspec  # of datasets: hf://, s3://, https://, zip://

        return fsspec.open(place, "rb")
    # Asked before it is opened: opening waits for the other end of a pipe, and does things to a device.
    kind = Path(place).stat().st_mode
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(place)
    if not stat.S_ISREG(kind):
        raise OSError("it is no regular file, but a pipe, a socket or a device")
    return Path(place).open("rb")
