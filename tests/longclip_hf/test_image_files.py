"""What image columns may lead to, and what they are refused."""

import os
import pickle
import socket
import zipfile
from pathlib import Path

import fsspec
import pytest

from longclip_hf import image_files
from longclip_hf.errors import ImageError
from longclip_hf.image_files import ImageFiles, home_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set with an image, and beside it what is none of its files."""
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    (data / "sub" / "a.png").write_bytes(b"inside")
    for outside in ("private.png", "data-of-others.png"):
        (tmp_path / outside).write_bytes(b"outside")
    (data / "out.png").symlink_to(tmp_path / "private.png")
    (data / "up").symlink_to(tmp_path)
    (data / "link.png").symlink_to("sub/a.png")
    return data


def cause_of(files: ImageFiles, name: str) -> str:
    with pytest.raises(ImageError) as caught:
        files.read(name)
    assert name.split("::")[-1] in str(caught.value)
    return caught.value.cause


@pytest.mark.parametrize("name", ["sub/a.png", "sub/../link.png", "./sub//a.png", "{data}/sub/a.png"])
def test_files_of_the_data_set_are_read(name: str, folder: Path) -> None:
    assert ImageFiles(folder).read(name.format(data=folder)) == b"inside"


OUTSIDE = ["../private.png", "../data-of-others.png", "{data}/../private.png", "out.png", "up/private.png"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_leaves_the_root_is_refused_unless_asked_for(name: str, folder: Path) -> None:
    name = name.format(data=folder)
    with pytest.raises(ImageError, match=r"leads out of the image root, \S*data: --image_root .*access local"):
        ImageFiles(folder).read(name)
    for files in (
        ImageFiles(folder, access="local"),
        ImageFiles(folder, access="any"),
        ImageFiles(folder, folder.parent),
    ):
        assert files.read(name) == b"outside"


@pytest.mark.parametrize(
    "name",
    ["http://127.0.0.1:9/a.png", "https://host/a.png", "file://{data}/sub/a.png", "local://{data}/sub/a.png",
     "memory://a.png", "s3://bucket/a.png", "hf://datasets/other/data/a.png", "hf://datasets/user/data-2/a.png",
     "zip://a.png::http://127.0.0.1:9/b.zip", "zip://a.png::../b.zip", "simplecache::sub/a.png"],
)  # fmt: skip
def test_addresses_are_refused(name: str, folder: Path) -> None:
    for files in (ImageFiles(folder), ImageFiles(None), ImageFiles("hf://datasets/user/data")):
        assert cause_of(files, name.format(data=folder)) == "refused"
    if "::.." not in name:
        assert cause_of(ImageFiles(folder, access="local"), name.format(data=folder)) == "refused"


def test_addresses_that_are_asked_for() -> None:
    with fsspec.open("memory://home/a.png", "wb") as file:
        file.write(b"there")
    for files, name in (
        (ImageFiles("/x", access="any"), "memory://home/a.png"),
        (ImageFiles("memory://home"), "a.png"),
        (ImageFiles("memory://home/"), "memory://home/a.png"),
    ):
        assert files.read(name) == b"there"
    assert cause_of(ImageFiles("memory://home"), "b.png") == "missing"
    for name in ("../a.png", "%2e%2e/a.png", "memory://home-2/a.png", "memory://home@x/a.png", "/etc/passwd"):
        assert cause_of(ImageFiles("memory://home"), name) == "refused"
    hub = "hf://datasets/user/data@main/a.png"
    assert ImageFiles("hf://datasets/user/data").place(hub) == hub


def test_archives_of_the_data_set_are_looked_into(folder: Path) -> None:
    with zipfile.ZipFile(folder / "b.zip", "w") as archive:
        archive.writestr("in.png", b"zipped")
    assert ImageFiles(folder).read("zip://in.png::b.zip") == b"zipped"


def test_without_a_root_there_are_no_names(folder: Path) -> None:
    assert cause_of(ImageFiles(None), "sub/a.png") == "refused"
    assert ImageFiles(None, access="local").read(str(folder / "sub" / "a.png")) == b"inside"


def test_what_is_no_regular_file_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "socket.png"))  # absolute, it can be longer than sockets' names may be
        for name in ("pipe.png", "socket.png"):
            with pytest.raises(ImageError, match=f"'{name}' is unreadable: OSError: it is no regular file"):
                ImageFiles(folder).read(name)
    with pytest.raises(ImageError, match="no regular file"):
        ImageFiles("/dev").read("zero")
    assert cause_of(ImageFiles(folder), "sub") == cause_of(ImageFiles(folder), "none.png") == "missing"
    assert cause_of(ImageFiles(folder), "sub/a.png/b.png") == "missing"


def test_names_that_no_file_has(folder: Path) -> None:
    (folder / "loop.png").symlink_to("loop.png")
    for name in ("loop.png", "a" * 300):
        assert cause_of(ImageFiles(folder), name) == "unreadable"
    for name in ("a\0.png", "\ud800.png"):
        with pytest.raises(ImageError, match=r"unreadable: (ValueError|UnicodeEncodeError)"):
            ImageFiles(folder).read(name)


def test_the_size_of_a_file_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MAX_FILE_BYTES", 5)
    with pytest.raises(ImageError, match=r"a\.png is oversized: more than 5 bytes"):
        ImageFiles(folder).read("sub/a.png")


def test_it_travels_to_other_processes(folder: Path) -> None:
    files = pickle.loads(pickle.dumps(ImageFiles(folder)))
    assert files.read("link.png") == b"inside"
    assert cause_of(files, "out.png") == "refused"


def test_where_a_source_lies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "rows.csv").touch()
    homes = {
        str(folder): str(folder), "sub": "sub", f"{folder}/rows.csv": str(folder), "rows.csv": ".",
        "sub/*.tar": "sub", "sub/part-*/x-[0-9].tar": "sub", "*.tar": ".", "/*.tar": "/",
        "https://host/a/rows.csv": "https://host/a", "hf://datasets/user/name": "hf://datasets/user/name",
    }  # fmt: skip
    assert {data: home_of(data) for data in homes} == homes
    assert ImageFiles.of("sub/*.png").read("a.png") == b"inside"
    assert ImageFiles.of("rows.csv").read("sub/a.png") == b"inside"
    assert ImageFiles.of("rows.csv", "sub").read("a.png") == b"inside"
    assert ImageFiles.of("rows.csv", "sub").read(str(folder / "link.png")) == b"inside"
    assert cause_of(ImageFiles.of("rows.csv"), "../private.png") == "refused"
    assert ImageFiles.of("user/name").place("a.png") == "hf://datasets/user/name/a.png"
    assert cause_of(ImageFiles.of("user/name"), str(folder / "link.png")) == "refused"


def test_what_datasets_fetched_and_unpacked_is_of_the_data_set(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from huggingface_hub import constants

    hub, unpacked = tmp_path / "hub", tmp_path / "unpacked"
    for place in (hub / "datasets--user--name" / "a.png", hub / "datasets--user--other" / "a.png", unpacked / "a.png"):
        place.parent.mkdir(parents=True)
        place.write_bytes(b"cached")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", unpacked)
    for name in (hub / "datasets--user--name" / "a.png", unpacked / "a.png"):
        assert ImageFiles.of("user/name").read(str(name)) == b"cached"
    assert cause_of(ImageFiles.of("user/name"), str(hub / "datasets--user--other" / "a.png")) == "refused"
