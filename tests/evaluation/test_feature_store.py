"""What is stored comes back bit by bit, and nothing else does."""

import hashlib
import logging
import shutil
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from longclip_hf.errors import FileError
from longclip_hf.evaluation.feature_store import FeatureStore

SPACE, OTHER = "a" * 64, "b" * 64


def keys_of(*contents: object) -> list[bytes]:
    return [hashlib.sha256(str(content).encode()).digest() for content in contents]


def rows(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers)[:, None] + torch.tensor([0.0, 0.25])


def fill(store: FeatureStore, space: str = SPACE, **numbers: float) -> None:
    with store.writer(space) as write:
        write(keys_of(*numbers), rows(*numbers.values()))


def shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_was_written_is_read(tmp_path: Path) -> None:
    fill(FeatureStore(tmp_path / "cache"), a=1, b=2)
    fill(FeatureStore(tmp_path / "cache"), c=3)
    found, features = FeatureStore(tmp_path / "cache").read(SPACE, keys_of("c", "x", "a"))
    assert sorted(found) == [0, 2]
    assert features.dtype == torch.float32
    by_position = dict(zip(found, features.tolist(), strict=True))
    assert by_position == {0: [3.0, 3.25], 2: [1.0, 1.25]}


def test_nothing_is_stored(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    with store.writer(SPACE):
        pass
    assert shards(tmp_path) == []
    found, features = store.read(SPACE, keys_of("a"))
    assert (found, features.shape) == ([], (0, 0))


def test_spaces_are_apart(tmp_path: Path) -> None:
    """Also those whose folders would have the same name, and a shard that was carried to another space."""
    store = FeatureStore(tmp_path)
    near = SPACE[:-1] + "b"
    fill(store, a=1)
    fill(store, OTHER, b=2)
    assert store.read(OTHER, keys_of("a"))[0] == []
    assert store.read(near, keys_of("a"))[0] == []
    assert store.read(SPACE, keys_of("a"))[0] == [0]


def test_a_row_that_is_stored_twice_is_read_once(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    fill(store, a=1)
    fill(store, a=1, b=2)
    found, features = store.read(SPACE, keys_of("a", "b"))
    assert sorted(found) == [0, 1] and features.shape == (2, 2)


def test_shards_by_age_and_what_an_exception_leaves(tmp_path: Path) -> None:
    with FeatureStore(tmp_path, shard_seconds=0).writer(SPACE) as write:
        for number in range(3):
            write(keys_of(number), rows(number))
            assert len(shards(tmp_path)) == number + 1
    with pytest.raises(KeyboardInterrupt), FeatureStore(tmp_path).writer(SPACE) as write:
        write(keys_of(3), rows(3))
        write(keys_of(4), rows(4))
        assert len(shards(tmp_path)) == 3
        raise KeyboardInterrupt
    assert len(shards(tmp_path)) == 4
    assert sorted(FeatureStore(tmp_path).read(SPACE, keys_of(*range(5)))[0]) == [0, 1, 2, 3, 4]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip(file: Path) -> None:
    """One bit of a feature: safetensors itself does not notice."""
    content = bytearray(file.read_bytes())
    content[-32 - 3] ^= 1  # the last 32 bytes are a key
    file.write_bytes(content)


def foreign(file: Path) -> None:
    """The same tensors, from somebody who says nothing of where they come from."""
    save_file(load_file(file), file)


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("damage", [cut, empty, flip, foreign, folder])
def test_a_torn_or_foreign_file_is_named_and_not_used(
    damage: Callable[[Path], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = FeatureStore(tmp_path)
    fill(store, a=1)
    (torn,) = shards(tmp_path)
    fill(store, b=2)
    damage(torn)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert store.read(SPACE, keys_of("a", "b"))[0] == [1]
    assert [record.args[0] for record in caplog.records] == [torn]  # once
    assert "is not used" in caplog.text


def test_what_was_never_finished_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = FeatureStore(tmp_path)
    fill(store, a=1)
    (shard,) = shards(tmp_path)
    shard.rename(shard.with_name(f".{shard.name}"))
    assert store.read(SPACE, keys_of("a"))[0] == []
    assert caplog.records == []


def test_a_full_disk_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    fill(FeatureStore(tmp_path), b=2)
    before = shards(tmp_path)
    monkeypatch.setattr("longclip_hf.evaluation.feature_store.save_file", full)
    with pytest.raises(FileError, match=r"cannot be written to .*: No space left.* stays, .* another --cache"):
        fill(FeatureStore(tmp_path), a=1)
    assert shards(tmp_path) == before


def test_many_write_at_once(tmp_path: Path) -> None:
    def work(writer: int) -> None:
        with FeatureStore(tmp_path, shard_seconds=0).writer(SPACE) as write:
            for number in range(writer * 10, writer * 10 + 10):
                write(keys_of(number), rows(number))

    with ThreadPool(4) as pool:
        pool.map(work, range(4))
    found, features = FeatureStore(tmp_path).read(SPACE, keys_of(*range(40)))
    assert features[torch.tensor(found).argsort(), 0].tolist() == list(range(40))


@settings(max_examples=30, deadline=None)
@given(
    written=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=8, unique=True), max_size=5),
    asked=st.lists(st.integers(0, 30), unique=True),
)
def test_exactly_what_was_written_and_asked_for(
    tmp_path_factory: pytest.TempPathFactory, written: list[list[int]], asked: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("store")
    store = FeatureStore(folder)
    for numbers in written:
        with store.writer(SPACE) as write:
            write(keys_of(*numbers), rows(*numbers))
    found, features = store.read(SPACE, keys_of(*asked))
    assert sorted(asked[position] for position in found) == sorted(set(asked) & {n for some in written for n in some})
    assert features[:, 0].tolist() == [asked[position] for position in found] if found else len(features) == 0
    shutil.rmtree(folder)
