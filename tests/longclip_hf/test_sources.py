"""Every form of a source, through training's and evaluation's readers: the right rows, and one bad row costs one."""

import itertools
import json
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import fork_server
import pytest
from caption_files import (
    imagefolder,
    make_rows,
    number_of,
    parquet_of_images,
    parquet_of_paths,
    png,
    write_images,
)
from hub_server import HubServer
from PIL import Image
from source_files import NAMED, OBVIOUS, Row, add, jsonl

from longclip_hf.errors import BenchmarkError, DataError, JSONListError
from longclip_hf.evaluation.benchmarks import BENCHMARKS, Columns, LeftOut, load_benchmark
from longclip_hf.images import decode_image
from longclip_hf.rows import BAD_ROW_CAUSES, RowLog, texts_of
from longclip_hf.training.captions import CaptionRows
from longclip_hf.training.settings import DataArguments
from longclip_hf.training.sources import load_rows
from longclip_hf.training.streams import CaptionStream

# `datasets` 5.0 leaves the files of tables open, which pandas 3 says.
pytestmark = pytest.mark.filterwarnings(r"ignore:Exception ignored .*\.[ct]sv:pytest.PytestUnraisableExceptionWarning")

# What captions may look like without being wrong: "NA" is a word, and a surrogate pair one character.
WORDS = [
    "A dog. It runs.",
    "NA",
    "Zwei Züge, “alt”.",
    "一只狗。",
    'A "quoted, comma"',
    "null",
    "\U0001f415 barks.",
    *(f"Plain {n}." for n in range(3)),
]


def corpus() -> list[Row]:
    rows = make_rows(len(WORDS))
    for row, caption in zip(rows, WORDS, strict=True):
        row["caption"] = caption
    return rows


def trained(source: str, count: int, **settings: Any) -> list[tuple[int, str]]:
    """The picture's number and the caption of every row that training gives, in order."""
    train, _ = load_rows(DataArguments(data=source, heldout_rows=0, **settings))
    rows = [train[i] for i in range(len(train))] if isinstance(train, CaptionRows) else itertools.islice(train, count)
    return sorted((number_of(row), row["caption"]) for row in rows)


def evaluated(source: str, columns: Columns | None = None, left_out: LeftOut | None = None) -> list[tuple[int, str]]:
    """The picture's number and the caption of every pair that evaluation gives."""
    found: Any = load_benchmark(source, columns=columns, left_out=left_out)
    images = [number_of({"image": decode_image(image.read(), image.name)}) for image in found.images]
    return sorted((images[image], text) for image, text in zip(found.image_of, found.captions, strict=True))


@pytest.mark.parametrize("form", OBVIOUS)
def test_every_form_is_read_by_both(form: str, tmp_path: Path) -> None:
    source = OBVIOUS[form](corpus(), tmp_path)
    settings = {"image_root": str(tmp_path)} if form == "arrow" else {}
    expected = list(enumerate(WORDS))
    assert trained(source, len(WORDS), **settings) == expected
    assert evaluated(source) == expected


@pytest.mark.parametrize("form", NAMED)
def test_forms_whose_columns_are_named(form: str, tmp_path: Path) -> None:
    write, image, caption = NAMED[form]
    source = write(corpus(), tmp_path)
    expected = list(enumerate(WORDS))
    assert trained(source, len(WORDS), image_column=image, long_column=caption) == expected
    assert evaluated(source, Columns(image, (caption,))) == expected


@pytest.mark.parametrize("form", ["jsonl", "jsonl.zst", "sharegpt4v", "tars"])
def test_forms_as_streams(form: str, tmp_path: Path) -> None:
    source = OBVIOUS[form](corpus(), tmp_path)
    train, heldout = load_rows(DataArguments(data=source, streaming=True, heldout_rows=2))
    assert isinstance(train, CaptionStream) and heldout is not None
    rows = [*(heldout[i] for i in range(2)), *itertools.islice(train, len(WORDS) - 2)]
    assert sorted((number_of(row), row["caption"]) for row in rows) == list(enumerate(WORDS))


@pytest.mark.parametrize("form", ["jsonl.gz", "csv", "tars"])
def test_an_address(form: str, tmp_path: Path) -> None:
    source = OBVIOUS[form](corpus(), tmp_path)
    source = f"file://{source}/00000.tar" if form == "tars" else f"file://{source}"
    count = 4 if form == "tars" else len(WORDS)
    expected = list(enumerate(WORDS))[:count]
    assert trained(source, count, image_access="any") == expected
    if form != "tars":
        assert evaluated(source, Columns(image_access="any")) == expected


HUB = """
import itertools, json
from caption_files import number_of
from test_sources import Columns, evaluated, trained
for name, image, caption in (("images", "photo", "text"), ("folder", None, None), ("paths", None, None)):
    columns = {"image_column": image, "long_column": caption}
    found = [trained("user/" + name, 10, streaming=name == "images", **columns)]
    found.append(evaluated("user/" + name, Columns(image, (caption,)) if caption else None))
    print(json.dumps(found))
"""


def test_an_id_of_the_hub(tmp_path: Path) -> None:
    """Of a data set with images, read as a stream, of a folder of images, and of rows that name images beside them."""
    rows = make_rows(10)
    with HubServer(tmp_path / "hub") as hub:
        for name, write in (("images", parquet_of_images), ("folder", imagefolder), ("paths", parquet_of_paths)):
            (tmp_path / name).mkdir()
            write(rows if name == "images" else rows[:3], tmp_path / name)
            hub.add_repo(f"user/{name}", tmp_path / name)
        paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
        environment = hub.environment() | {"PYTHONPATH": paths}
        done = fork_server.run([sys.executable, "-c", HUB], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    expected = [[number, row["caption"]] for number, row in enumerate(rows)]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[expected] * 2, *[[expected[:3]] * 2] * 2]


# One bad row costs one row


BAD_LINES = {
    "null": (b'{"image": "0001.png", "caption": null}', "empty_caption"),
    "no caption": (b'{"image": "0001.png"}', "empty_caption"),
    "broken": (b'{"image": "0001.png", "capt', "unreadable"),
    "no object": (b"[1, 2]", "unreadable"),
    "no image": (b'{"image": null, "caption": "a"}', "missing"),
    "missing image": (b'{"image": "none.png", "caption": "a"}', "missing"),
    "refused image": (b'{"image": "/etc/passwd", "caption": "a"}', "refused"),
    "no value": (b'{"image": "0001.png", "caption": [{"from": "gpt"}]}', "empty_caption"),
    "null value": (b'{"image": "0001.png", "caption": [{"from": "gpt", "value": null}]}', "empty_caption"),
    "question only": (b'{"image": "0001.png", "caption": [{"from": "human", "value": "a"}]}', "empty_caption"),
    "empty list": (b'{"image": "0001.png", "caption": []}', "empty_caption"),
    "unreadable": (b'{"image": "bad.png", "caption": "a"}', "unreadable"),
    "oversized": (b'{"image": "thin.png", "caption": "a"}', "oversized"),
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line(bad: str, tmp_path: Path) -> None:
    """Training and evaluation skip it, count it by cause, name it; asked for, both end with an error."""
    line, cause = BAD_LINES[bad]
    write_images(make_rows(3), tmp_path)
    (tmp_path / "bad.png").write_bytes(png(1)[:60])
    Image.new("RGB", (2, 402)).save(tmp_path / "thin.png")
    good = b'{"image": "0000.png", "caption": "Good."}\n'
    (tmp_path / "rows.jsonl").write_bytes(good + line + b"\n" + good.replace(b"0000", b"0002"))
    source, log = str(tmp_path / "rows.jsonl"), tmp_path / "out" / "bad_rows.jsonl"

    train, _ = load_rows(DataArguments(data=source, heldout_rows=0), log=log)
    for _ in range(2):  # two encounters of one row
        row: Any = train[1]  # type: ignore[index, unused-ignore]
        assert row["caption"] == "Good." and sum(row["bad_rows"]) == row["bad_rows"][BAD_ROW_CAUSES.index(cause)] == 1
    assert RowLog(log).distinct() == {cause: 1}
    (written,) = map(json.loads, log.read_text().splitlines())
    assert written["cause"] == cause and written["row"] == f"line 2 of {source}"

    strict, _ = load_rows(DataArguments(data=source, heldout_rows=0, on_bad_row="error"))
    with pytest.raises(DataError, match=rf"Line 2 of {source} cannot be trained on: {cause} \("):
        strict[1]  # type: ignore[index, unused-ignore]

    left_out = LeftOut(skip=True)
    assert evaluated(source, None, left_out) == [(0, "Good."), (2, "Good.")]
    assert [found for _, found, _ in left_out.rows] == [cause]
    if bad not in ("oversized", "unreadable"):  # images are decoded when they are encoded
        with pytest.raises(BenchmarkError, match=rf"ine 2 of {source} cannot be read: {cause} \(.* --on_bad_row skip"):
            load_benchmark(source)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (b'"bad \xff bytes"', "bad \ufffd bytes"),
        (b'"half \\ud83d of a pair"', "half \ufffd of a pair"),
        (b'"a pair \\ud83d\\udc15"', "a pair \U0001f415"),
        ('"a line\u2028separator"'.encode(), "a line\u2028separator"),
        (b'"Windows.\\r\\nLines."', "Windows.\r\nLines."),
    ],
)
def test_odd_texts(written: bytes, read: str, tmp_path: Path) -> None:
    write_images(make_rows(2), tmp_path)
    lines = [b'{"file_name": "%04d.png", "caption": %s}\n' % (number, written) for number in range(2)]
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + b"".join(lines))
    assert trained(str(tmp_path), 2) == evaluated(str(tmp_path)) == [(0, read), (1, read)]


def test_bad_bytes_in_a_tar_and_in_a_table(tmp_path: Path) -> None:
    rows = corpus()
    rows[2]["caption"] = b"bad \xff bytes"
    rows[3]["bytes"] = None
    source = OBVIOUS["tars"](rows, tmp_path)
    left_out = LeftOut(skip=True)
    expected = [(n, "bad \ufffd bytes" if n == 2 else text) for n, text in enumerate(WORDS) if n != 3]
    assert trained(source, len(WORDS) - 1) == evaluated(source, None, left_out) == expected
    assert [cause for _, cause, _ in left_out.rows] == ["missing"]
    table = tmp_path / "table"
    table.mkdir()
    write_images(make_rows(2), table)
    (table / "rows.csv").write_bytes(b"image,caption\n0000.png,bad \xff bytes\n0001.png,\n")
    assert evaluated(str(table / "rows.csv"), None, LeftOut(skip=True)) == [(0, "bad \ufffd bytes")]


def test_a_broken_description_in_a_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, text in enumerate([b'{"caption": "Good."}', b'{"caption": "Ba', b'{"caption": "Good too."}']):
            add(tar, f"{number}.png", png(number))
            add(tar, f"{number}.json", text)
    columns = Columns("png", ("json.caption",))
    left_out = LeftOut(skip=True)
    expected = [(0, "Good."), (2, "Good too.")]
    assert evaluated(str(tmp_path / "a.tar"), columns, left_out) == expected
    assert trained(str(tmp_path / "a.tar"), 2, image_column="png", long_column="json.caption") == expected
    with pytest.raises(BenchmarkError, match=r"1 in .*a\.tar cannot be read: unreadable \(1\.json in .*a\.tar is not"):
        load_benchmark(str(tmp_path / "a.tar"), columns=columns)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"image": "a"}] [{"image": "b"}]', r"goes on with '\[' behind its list of 1 objects"),
        ('[{"image": "a"}] x', "goes on with 'x' behind its list of 1 objects"),
        ('[{"image": "a"} {"image": "b"}]', r"after object 1: '\{' where a comma was expected"),
        ('[{"image": "a"},]', "after object 1: Expecting value"),
        ('[,{"image": "a"}]', "after object 0: Expecting value"),
    ],
)
def test_a_list_is_one_list(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(text)
    for settings in ({}, {"data_format": "sharegpt4v", "image_root": str(tmp_path)}):
        with pytest.raises(JSONListError, match=message):
            load_rows(DataArguments(data=str(tmp_path / "list.json"), **settings))  # type: ignore[arg-type]


# Columns and layouts


def test_columns_are_guessed_where_one_is_obvious(tmp_path: Path) -> None:
    write_images(make_rows(1), tmp_path)

    def source(**row: Any) -> str:
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        return str(tmp_path / "rows.jsonl")

    place = source(jpg="0000.png", txt="A dog.", width=3)
    assert trained(place, 1) == evaluated(place) == [(0, "A dog.")]
    found = load_rows(DataArguments(place, heldout_rows=0))[0].read
    assert str(found) == "images from 'jpg', captions from 'txt', short ones: their first sentences"
    assert load_benchmark(place).notes == ["images from column 'jpg', captions from 'txt'"]
    assert trained(source(image="0000.png", jpg="x", caption="A dog.", text="x"), 1) == [(0, "A dog.")]
    for row, message in (
        (
            {"jpg": "a", "png": "b", "caption": "c"},
            "its images in jpg or png; its columns are jpg, png, caption",
        ),
        ({"image": "a", "text": "b", "txt": "c"}, "may have its captions in text or txt"),
        (
            {"photo": "a", "caption": "b"},
            "no obvious column of images; its .* are photo, caption: .*--image_column",
        ),
        ({"image": "a", "title": "b"}, "no obvious column of captions"),
    ):
        with pytest.raises(DataError, match=message):
            load_rows(DataArguments(data=source(**row)))
        with pytest.raises(BenchmarkError, match=message):
            load_benchmark(source(**row))


def both_refuse(source: Path, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(DataArguments(data=str(source)))
    with pytest.raises(BenchmarkError, match=message):
        load_benchmark(str(source))


def test_layouts_that_say_too_little(tmp_path: Path) -> None:
    for folder in ("classes/cat", "classes/dog", "photos", "both/train", "both/test"):
        (tmp_path / folder).mkdir(parents=True)
        write_images(make_rows(1), tmp_path / folder)
    (tmp_path / "both" / "metadata.jsonl").write_text('{"file_name": "train/0000.png", "caption": "a"}')
    both_refuse(tmp_path / "classes", r"2 images in 2 folders, such as classes, and no captions\. Write a")
    both_refuse(tmp_path / "photos", r'holds 1 images and no captions. Write .*\{"file_name": "0000.png", "caption"')
    both_refuse(tmp_path / "both", r"stands above the folders test, train: .*Put a metadata\.jsonl into each")
    both_refuse(tmp_path / "photos" / "0000.png", r"none of the files that are read here: \.json")


def test_splits_of_folders(tmp_path: Path) -> None:
    rows = make_rows(4)
    for name, part in (("train", rows[:2]), ("val", rows[2:])):
        (tmp_path / name).mkdir()
        imagefolder(part, tmp_path / name)
    train, heldout = load_rows(DataArguments(data=str(tmp_path), heldout_split="validation", heldout_rows=1))
    assert heldout is not None and number_of(heldout[0]) == 2
    assert [number_of(row) for row in (train[0], train[1])] == [0, 1]  # type: ignore[index, unused-ignore]
    assert [n for n, _ in evaluated(str(tmp_path), Columns(split="val"))] == [2, 3]
    with pytest.raises(BenchmarkError, match="no split None: name one of train, validation"):
        load_benchmark(str(tmp_path))


# Captions that are lists


def test_one_caption_is_drawn_for_each_epoch_and_evaluation_takes_all(tmp_path: Path) -> None:
    rows = make_rows(20)
    for row in rows:
        row["caption"] = [f"Caption {n}. Long." for n in range(3)] + [None, ""]
    source = jsonl("rows.jsonl")(rows, tmp_path)
    assert len(evaluated(source)) == 60

    def captions(seed: int, epoch: int) -> list[str]:
        train, _ = load_rows(DataArguments(data=source, heldout_rows=0), seed=seed)
        assert isinstance(train, CaptionRows)
        train.set_epoch(epoch)
        found = [train[i] for i in range(20)]
        assert all(row["short_caption"] == row["caption"].partition(".")[0] for row in found)
        return [row["caption"] for row in found]

    assert captions(0, 0) == captions(0, 0)
    assert len({tuple(captions(*drawn)) for drawn in ((0, 0), (0, 1), (1, 0), (1, 1))}) == 4
    assert set(captions(0, 0)) == {f"Caption {n}. Long." for n in range(3)}

    train, _ = load_rows(DataArguments(data=source, heldout_rows=0, streaming=True))
    passes = [sorted((number_of(row), row["caption"]) for row in itertools.islice(train, 20)) for _ in range(2)]
    assert passes[0] == passes[1]  # from the beginning again
    assert len({text for _, text in passes[0]}) == 3


# Held-out rows and several sources


@pytest.mark.parametrize("form", ["jsonl", "saved", "parquet of paths", "tars"])
def test_rows_of_one_image_are_on_one_side(form: str, tmp_path: Path) -> None:
    rows = make_rows(8)
    for number in (3, 5):  # the first picture's second and third caption
        rows[number] |= {"bytes": rows[0]["bytes"]} if form in ("saved", "tars") else {"key": rows[0]["key"]}
    if form in ("jsonl", "parquet of paths"):
        rows[3]["bytes"] = rows[5]["bytes"] = rows[0]["bytes"]
    source = OBVIOUS[form](rows, tmp_path)
    train, heldout = load_rows(DataArguments(data=source, heldout_rows=2, shuffle_buffer=1))
    assert heldout is not None and [number_of(heldout[i]) for i in range(2)] == [0, 1]
    found = [train[i] for i in range(len(train))] if isinstance(train, CaptionRows) else itertools.islice(train, 4)
    assert sorted(number_of(row) for row in found) == [2, 4, 6, 7]


def test_held_out_rows_can_be_drawn(tmp_path: Path) -> None:
    source = jsonl("rows.jsonl")(make_rows(30), tmp_path)

    def drawn(seed: int) -> list[int]:
        data = DataArguments(data=source, heldout_rows=10, heldout_shuffle=True)
        train, heldout = load_rows(data, seed=seed)
        assert isinstance(train, CaptionRows) and heldout is not None
        held = [number_of(heldout[i]) for i in range(10)]
        assert sorted([*held, *(number_of(train[i]) for i in range(20))]) == list(range(30))
        return held

    assert drawn(0) == drawn(0) != drawn(1)
    assert drawn(0) != list(range(10))
    with pytest.raises(DataError, match="Of a stream the first rows are held out"):
        load_rows(DataArguments(data=source, heldout_shuffle=True, streaming=True))


@pytest.mark.parametrize("streaming", [False, True])
def test_several_sources_with_other_columns(streaming: bool, tmp_path: Path) -> None:
    rows = make_rows(9)
    places = []
    other = "tars" if streaming else "csv"
    for form, part in (("jsonl", rows[:3]), (other, rows[3:5]), ("llava", rows[5:])):
        (tmp_path / form).mkdir()
        places.append(OBVIOUS[form](part, tmp_path / form))
    data = DataArguments(places[0], more_data=places[1:], heldout_rows=1, streaming=streaming)
    train, heldout = load_rows(data)
    assert heldout is not None and number_of(heldout[0]) == 0
    found = [train[i] for i in range(8)] if isinstance(train, CaptionRows) else itertools.islice(train, 8)
    assert sorted((number_of(row), row["caption"]) for row in found) == [
        (n, f"Picture {n} is plain. It shows one colour.") for n in range(1, 9)
    ]
    if isinstance(train, CaptionRows):
        assert train.place(7) == f"line 4 of {tmp_path}/llava/metadata.jsonl"


def test_a_table_and_a_stream(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    source = OBVIOUS["jsonl"](make_rows(2), tmp_path)
    with pytest.raises(DataError, match=r"rows\.jsonl is a table and \S*tars a stream: --streaming reads all"):
        load_rows(DataArguments(source, more_data=[OBVIOUS["tars"](make_rows(2), tmp_path / "tars")]))


def test_sharegpt4v_without_a_part_of_its_images(tmp_path: Path) -> None:
    """Its SAM images are a download of their own. Training counts and names them, evaluation when asked."""
    rows = make_rows(6)
    rows[1]["bytes"] = rows[4]["bytes"] = None
    OBVIOUS["sharegpt4v"](rows, tmp_path)
    (tmp_path / "captions.json").rename(tmp_path / "share-captioner_coco_lcs_sam_1246k_1107.json")
    with pytest.raises(BenchmarkError, match=r"2 of 6 images are missing, the first is .*0001\.png"):
        load_benchmark("sharegpt4v-1k", tmp_path)
    left_out = LeftOut(skip=True)
    found: Any = load_benchmark("sharegpt4v-1k", tmp_path, left_out=left_out)
    assert len(found.images) == len(found.captions) == 4
    assert "rows left out, missing (bad_rows.jsonl): 2" in found.notes
    assert BENCHMARKS["sharegpt4v-1k"].title in found.name

    source, log = str(tmp_path / "share-captioner_coco_lcs_sam_1246k_1107.json"), tmp_path / "out" / "bad_rows.jsonl"
    train, heldout = load_rows(DataArguments(source, image_root=str(tmp_path), heldout_rows=3), log=log)
    assert isinstance(train, CaptionRows) and heldout is not None
    assert [number_of(heldout[i]) for i in range(len(heldout))] == [0, 2]
    assert [number_of(train[i]) for i in (0, 2)] == [3, 5] and number_of(train[1]) in (3, 5)
    assert RowLog(log).distinct() == {"missing": 2}
    named = [json.loads(line)["row"] for line in log.read_text().splitlines()]
    assert named == [f"object 2 of {source}", f"object 5 of {source}"]


def test_texts_of_a_cell() -> None:
    assert texts_of(["a", None, "b"], "c") == ["a", "", "b"]
    assert texts_of(b"a\xff", "c") == ["a\ufffd"]
    assert texts_of([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "c") == ["a"]
    assert texts_of({"from": ["human", "gpt"], "value": ["q", "a"]}, "c") == ["a"]
    with pytest.raises(DataError, match="Column 'c' must hold texts or lists of texts, found int: 3"):
        texts_of(3, "c")


def test_images_of_more_than_8_bits_are_written_down(tmp_path: Path) -> None:
    source = OBVIOUS["imagefolder"](make_rows(3), tmp_path)
    Image.new("I;16", (40, 32), 3000).save(tmp_path / "0001.png")
    log = tmp_path / "out" / "bad_rows.jsonl"
    train, _ = load_rows(DataArguments(source, heldout_rows=0), log=log)
    assert isinstance(train, CaptionRows)
    assert [train[i]["image"].getpixel((3, 3)) for i in (1, 1)] == [(187, 187, 187)] * 2
    assert not log.exists()
    written = log.with_name("rescaled_images.jsonl")
    assert RowLog(written).distinct() == {"rescaled": 1}
    row = json.loads(written.read_text())
    assert row == {"row": "0001.png", "cause": "rescaled", "detail": "3000 ... 3000 of I;16"}
