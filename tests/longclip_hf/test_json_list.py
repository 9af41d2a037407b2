"""Objects of a JSON list, read in pieces."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longclip_hf.errors import JSONListError
from longclip_hf.json_list import json_objects


@pytest.mark.parametrize("chunk", [2, 7, 64, 1 << 20])
def test_json_is_read_in_pieces(chunk: int, tmp_path: Path) -> None:
    entries = [{"id": i, "text": 'é"]},{[' * i, "more": [{"a": []}, 1.5, None]} for i in range(9)]
    for indent in (None, 2):
        (tmp_path / "list.json").write_text(json.dumps(entries, ensure_ascii=False, indent=indent), encoding="utf-8")
        assert list(json_objects(tmp_path / "list.json", chunk)) == entries
    (tmp_path / "list.json").write_text(" [] ")
    assert list(json_objects(tmp_path / "list.json", chunk)) == []


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20)), max_size=12),
    chunk=st.integers(1, 40),
    count=st.integers(0, 14),
    indent=st.sampled_from([None, 1]),
)
def test_the_first_objects_are_those_of_json(
    rows: list[dict[str, str]], chunk: int, count: int, indent: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("json") / "rows.json"
    file.write_text(json.dumps(rows, indent=indent))
    assert list(itertools.islice(json_objects(file, chunk), count)) == rows[:count]


def test_what_follows_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text('[{"a": 1}, {"a": ')
    objects = json_objects(file, 5)
    assert next(objects) == {"a": 1}
    with pytest.raises(JSONListError, match="breaks off after object 1"):
        next(objects)
