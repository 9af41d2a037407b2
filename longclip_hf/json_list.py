"""Long JSON lists, one object at a time: ShareGPT4V's captions are one of 1.3 GB."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longclip_hf.errors import JSONListError

_WHITE = re.compile(r"[ \t\r\n]*")


def json_objects(path: Path | str, chunk: int = 1 << 20) -> Iterator[dict[str, Any]]:
    """The objects of a JSON list one by one: all of ShareGPT4V's 1.3 GB at once take several times that.

    Args:
        path: of the file.
        chunk: characters that are read at a time.

    Raises:
        JSONListError: if the file is not one JSON list of objects, and nothing else. What stands behind an object is
            looked at when the next one is asked for.
    """
    with Path(path).open(encoding="utf-8-sig") as file:
        for entry, _ in json_entries(file, path, chunk):
            yield entry


def json_entries(file: io.TextIOBase, path: Path | str, chunk: int = 1 << 20) -> Iterator[tuple[dict[str, Any], str]]:
    """See `json_objects`: each object, and how it is written. The file is open; `path` is for errors."""
    decoder = json.JSONDecoder()
    text, at, count = file.read(chunk).lstrip(), 0, 0

    def to_next() -> str:
        """The next character that is not white space, at `text[at]`; empty at the end of the file."""
        nonlocal text, at
        while True:
            found = _WHITE.match(text, at)
            at = found.end() if found else at
            if at < len(text):
                return text[at]
            text, at = file.read(chunk), 0
            if not text:
                return ""

    if not text.startswith("["):
        raise JSONListError(f"{path} must hold a JSON list of objects, it begins with {text[:20]!r}.")
    at = 1
    while (mark := to_next()) != "]" or count:
        if count:
            if mark == "]":
                break
            if mark != ",":
                found = f"{mark!r} where a comma was expected" if mark else "the file ends"
                raise JSONListError(f"{path} is broken or breaks off after object {count}: {found}.")
            at += 1
            to_next()
        while True:
            try:
                entry, end = decoder.raw_decode(text, at)
                break
            except json.JSONDecodeError as error:
                # The object goes on behind what was read, or is broken. Ever longer steps find the end in linear time.
                more = file.read(max(chunk, len(text) - at))
                if not more:
                    raise JSONListError(
                        f"{path} is broken or breaks off after object {count}: {error.msg}."
                    ) from error
                text, at = text[at:] + more, 0
        if not isinstance(entry, dict):
            raise JSONListError(f"{path} must hold a JSON list of objects, element {count} is {entry!r:.40}.")
        yield entry, text[at:end]
        at = end
        count += 1
    at += 1
    if more := to_next():
        raise JSONListError(f"{path} goes on with {more!r} behind its list of {count} objects.")
