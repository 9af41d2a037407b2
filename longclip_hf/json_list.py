"""Long JSON lists, one object at a time: ShareGPT4V's captions are one of 1.3 GB."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longclip_hf.errors import JSONListError


def json_objects(path: Path, chunk: int = 1 << 20) -> Iterator[dict[str, Any]]:
    """The objects of a JSON list one by one: all of ShareGPT4V's 1.3 GB at once take several times that.

    Raises:
        JSONListError: if the file is not a JSON list of objects.
    """
    decoder, between, count = json.JSONDecoder(), re.compile(r"[\s,]*"), 0
    with path.open(encoding="utf-8-sig") as file:
        text = file.read(chunk).lstrip()
        if not text.startswith("["):
            raise JSONListError(f"{path} must hold a JSON list of objects, it begins with {text[:20]!r}.")
        at = 1
        while True:
            match = between.match(text, at)
            at = match.end() if match else at
            if text.startswith("]", at):
                return
            try:
                entry, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                # The object goes on behind what was read, or is broken. Ever longer steps find the end in linear time.
                more = file.read(max(chunk, len(text) - at))
                if not more:
                    raise JSONListError(
                        f"{path} is broken or breaks off after object {count}: {error.msg}."
                    ) from error
                text, at = text[at:] + more, 0
                continue
            if not isinstance(entry, dict):
                raise JSONListError(f"{path} must hold a JSON list of objects, element {count} is {entry!r:.40}.")
            yield entry
            count += 1
