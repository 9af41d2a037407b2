"""What is found is what exact arithmetic finds, with an index and without, and what cannot be found is said."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from caption_files import imagefolder, make_rows, png
from PIL import Image
from torch.nn import functional as F

from longclip_hf.errors import ImageError, SearchError
from longclip_hf.evaluation.retrieval import retrieval_ranks
from longclip_hf.search import embed, index, indexing, search
from longclip_hf.search.contact_sheet import contact_sheet
from longclip_hf.search.lookup import Tuning, checked, nearest, read_indices
from longclip_hf.search.search_index import SearchIndex
from longclip_hf.search.settings import Settings

lancedb = pytest.importorskip("lancedb", reason="the extra `search` is not installed")

ROWS = 13
WORDS = ["dog", "cat", "house", "tree", "street", "man", "woman", "bench", "sky", "taxi", "door", "roof", "phone"]


@pytest.fixture(scope="module")
def folder(longclip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen pictures with different captions and prices, embedded. Read only: copy it to change it."""
    home = tmp_path_factory.mktemp("search")
    (home / "photos").mkdir()
    rows = [row | {"caption": f"a {word} beside a {word}"} for row, word in zip(make_rows(ROWS), WORDS, strict=True)]
    imagefolder(rows, home / "photos")
    lines = [json.loads(line) for line in (home / "photos" / "metadata.jsonl").read_text().splitlines()]
    priced = [json.dumps(line | {"price": number}) for number, line in enumerate(lines)]
    (home / "photos" / "metadata.jsonl").write_text("\n".join(priced))
    words = [home / "photos", "--model", longclip_folder, "--output", home / "table", "--device", "cpu"]
    assert embed.main([*map(str, words), "--quiet"]) == 0
    return home / "table"


@pytest.fixture(scope="module")
def found(folder: Path) -> SearchIndex:
    return SearchIndex(folder, device="cpu")


def test_a_text(found: SearchIndex) -> None:
    """The order and the scores are those of features computed here; the text is read to its end."""
    text = " ".join(["a dog beside a cat"] * 30)
    answer = found.search(text, k=5)
    assert answer.tokens == answer.read == 152 and answer.exact
    rows = found.table.to_arrow().to_pydict()
    query = F.normalize(found.encoder.encode_texts([text]).embeds[0], dim=0)
    scores = torch.tensor(np.array(rows["image_vector"], dtype=np.float32)) @ query
    best = scores.argsort(descending=True)[:5]
    assert [hit.row for hit in answer] == [rows["row"][at] for at in best]
    assert [hit.score for hit in answer] == pytest.approx(scores[best].tolist(), abs=1e-3)
    assert all(hit.columns["price"] == hit.row for hit in answer)


def test_a_caption_finds_itself_among_texts(found: SearchIndex) -> None:
    for number, word in enumerate(WORDS):
        (hit,) = found.search(f"a {word} beside a {word}", k=1, among="texts")
        assert hit.row == number and hit.score == pytest.approx(1, abs=2e-3)


def test_recall_is_the_evaluation_s(folder: Path, longclip_folder: Path, tmp_path: Path) -> None:
    """Of every caption's own image among the first three, from the table and from `retrieval_ranks`."""
    words = [folder.parent / "photos", "--model", longclip_folder, "--output", tmp_path / "table", "--device", "cpu"]
    assert embed.main([*map(str, words), "--quiet", "--precision", "float32"]) == 0
    index = SearchIndex(tmp_path / "table", device="cpu")
    rows = index.table.to_arrow().sort_by("row").to_pydict()
    texts = index.encoder.encode_texts(rows["text"]).embeds
    ranks = retrieval_ranks(torch.tensor(rows["image_vector"]), texts, torch.arange(ROWS))["t2i"]
    hits = [number in [hit.row for hit in index.search(text, k=3)] for number, text in enumerate(rows["text"])]
    assert hits == ranks.hits(3).tolist() and sum(hits) / ROWS == ranks.recall(3) > 0


def test_an_image(found: SearchIndex) -> None:
    """By path and by its bytes; the least different are the nearest."""
    place = found.search("a dog", k=1, where="row = 8").hits[0].location
    for image in (place, png(8)):
        answer = found.search(image=image, k=1)
        assert answer.hits[0].score == pytest.approx(1, abs=2e-3) and answer.tokens == 0


def test_a_condition(found: SearchIndex) -> None:
    answer = found.search("a dog", where="price < 4 and text like '%cat%'")
    assert [hit.row for hit in answer] == [1]
    assert found.search("a dog", where="text = 'a; b'").hits == []


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("prise < 4", "No field named prise"),
        ("price <", "sql parser error"),
        ("price", "does not return a boolean"),
        (" ", "is no condition"),
        ("price < 4; drop table rows", "is no condition"),
    ],
)
def test_no_condition(found: SearchIndex, where: str, expected: str) -> None:
    with pytest.raises(SearchError, match=expected):
        found.search("a dog", where=where)


def test_a_semicolon_in_quotes() -> None:
    assert checked("a = 'b; c' and \"d;\" = 'it''s;'")


def test_questions_that_are_none(found: SearchIndex, tmp_path: Path) -> None:
    for question, expected in (({}, "text or with an image"), ({"text": "a", "image": b""}, "text or with an image")):
        with pytest.raises(SearchError, match=expected):
            found.search(**question)
    with pytest.raises(SearchError, match="0 rows"):
        found.search("a", k=0)
    with pytest.raises(ValueError, match="are empty"):
        found.search(" ")
    with pytest.raises(ImageError, match="there is no image"):
        found.search(image=tmp_path / "gone.png")


class TestCommand:
    def ask(self, *words: str | Path) -> int:
        return search.main([*map(str, words), "--device", "cpu"])

    def test_it_prints(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.ask(folder, "a dog on the beach", "--k", "3", "--where", "price > 2") == 0
        printed, errors = capsys.readouterr()
        assert len(printed.splitlines()) == 3 and ".png  a " in printed
        assert errors.strip() == "7 tokens were read."

    def test_it_says_what_is_not_read(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "long.txt").write_text("a dog " * 200)
        assert self.ask(folder, "--file", tmp_path / "long.txt", "--quiet") == 0
        assert "248 tokens were read of 402; the rest is beyond the model's length." in capsys.readouterr().err

    def test_json(self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO("a cat"))
        assert self.ask(folder, "-", "--json", "--k", "2") == 0
        said = json.loads(capsys.readouterr().out)
        assert said["text"] == "a cat" and said["tokens"] == said["read"] == 4 and said["exact"]
        assert [set(hit) for hit in said["hits"]] == [{"score", "source", "row", "location", "text", "columns"}] * 2

    def test_a_sheet_of_images_some_of_which_are_gone(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        home = Path(shutil.copytree(folder.parent, tmp_path / "home"))
        moved = tmp_path / "moved.lance"
        shutil.copytree(home / "table", moved)
        table = lancedb.connect(str(moved)).open_table("rows")
        table.update(where="row = 3", values={"location": str(home / "gone.png")})
        assert self.ask(moved, "a dog", "--k", str(ROWS), "--sheet", tmp_path / "sheet.png") == 0
        assert "1 of these images are not where they were embedded from" in capsys.readouterr().err
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert sheet.size == (5 * 256, 3 * 320)

    @pytest.mark.parametrize("words", [[], ["a", "--image", "b.png"]])
    def test_one_question(self, folder: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert self.ask(folder, *words) == 2
        assert "Ask with one of" in capsys.readouterr().err

    def test_another_model(
        self, folder: Path, clip_folder: Path, copy_of: Callable[[Path], Path], longclip_folder: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        """Of another length, and of the same with other weights; the same one elsewhere is welcome."""
        assert self.ask(folder, "a dog", "--model", clip_folder) == 2
        assert "made with a model of 248 tokens, and" in capsys.readouterr().err
        other = copy_of(longclip_folder)
        assert self.ask(folder, "a dog", "--model", other) == 0
        from safetensors.torch import load_file, save_file

        weights = load_file(other / "model.safetensors")
        weights["logit_scale"] += 1
        save_file(weights, other / "model.safetensors", {"format": "pt"})
        assert self.ask(folder, "a dog", "--model", other) == 2
        assert "their vectors cannot be compared" in capsys.readouterr().err

    def test_no_table(self, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.ask(tmp_path, "a dog") == 2
        assert "holds no embeddings" in capsys.readouterr().err
        shutil.copy(folder / "longclip.json", tmp_path)
        assert self.ask(tmp_path, "a dog") == 2
        assert "holds no rows yet" in capsys.readouterr().err

    def test_a_table_without_vectors(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        shutil.copytree(folder, tmp_path / "table")
        lancedb.connect(str(tmp_path / "table")).open_table("rows").drop_columns(["image_vector"])
        assert self.ask(tmp_path / "table", "a dog") == 2
        assert "has no column image_vector of 24 numbers" in capsys.readouterr().err

    def test_a_corrupt_fragment(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        shutil.copytree(folder, tmp_path / "table")
        for file in (tmp_path / "table" / "rows.lance" / "data").iterdir():
            file.write_bytes(file.read_bytes()[:200])
        assert self.ask(tmp_path / "table", "a dog") == 2
        # Some releases of transformers say something of the image processor before it.
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        assert "cannot be read" in line


def test_a_sheet_of_nothing() -> None:
    assert contact_sheet([]).size[0] > 0


# Indices, of vectors that nobody computed


def many(folder: Path, rows: int, dim: int = 32, begin: int = 0) -> Any:
    """A table of clustered vectors, added to the one that is there."""
    rng = np.random.default_rng(begin)
    centres = np.random.default_rng(9).standard_normal((40, dim))
    vectors = centres[rng.integers(0, 40, rows)] + 0.5 * rng.standard_normal((rows, dim))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    numbers = np.arange(begin, begin + rows)
    content = pa.table(
        {
            "source": ["s"] * rows, "row": numbers, "price": numbers % 100,
            "image_vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim),
        }
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    Settings("m", None, "f", 248, dim, "float32", "float16", ("image_vector",), 256).write(folder)
    database = lancedb.connect(str(folder))
    if begin:
        database.open_table("rows").add(content)
        return database.open_table("rows")
    return database.create_table("rows", content)


def ids(rows: Any) -> set[int]:
    return set(rows["row"].to_pylist())


def test_an_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It reaches the recall it was asked for, under a filter too; what is added later is found; then it is indexed."""
    table = many(tmp_path / "table", 4000)
    assert index.main([str(tmp_path / "table")]) == 0
    assert "4,000 rows need no index" in capsys.readouterr().out and not table.list_indices()

    words = [str(tmp_path / "table"), "--force", "--partitions", "16", "--sample", "10"]
    assert index.main(words) == 0
    printed = capsys.readouterr().out
    made = read_indices(tmp_path / "table")["image_vector"]
    assert made.rows == 4000 and made.partitions == 16 and made.sub_vectors == 4 and made.bits == 4
    assert made.recall >= 0.95 and made.filtered_recall >= 0.95 and f"recall@10 {made.recall:.3f}" in printed

    table = lancedb.connect(str(tmp_path / "table")).open_table("rows")
    query = np.array(table.search().where("row = 77").limit(1).to_arrow()["image_vector"].to_pylist()[0], np.float32)
    exact = nearest(table, "image_vector", query, 10, "price = 77")
    assert ids(nearest(table, "image_vector", query, 10, "price = 77", made.tuning)) == ids(exact)

    table = many(tmp_path / "table", 300, begin=4000)
    assert indexing.unindexed(table, "image_vector") == 300
    new = np.array(table.search().where("row = 4123").limit(1).to_arrow()["image_vector"].to_pylist()[0], np.float32)
    assert 4123 in ids(nearest(table, "image_vector", new, 1, None, made.tuning))
    assert index.main([str(tmp_path / "table"), "--compact", "--sample", "10"]) == 0
    assert "2 files of rows are 1 now" in capsys.readouterr().out
    table = lancedb.connect(str(tmp_path / "table")).open_table("rows")
    assert indexing.unindexed(table, "image_vector") == 0 and table.count_rows() == 4300
    assert 4123 in ids(nearest(table, "image_vector", new, 1, None, made.tuning))


def test_recall_is_measured_and_not_said(tmp_path: Path) -> None:
    """Of codes of 2 bytes, one probe and no comparison it is bad, and that is what is measured."""
    table = many(tmp_path / "table", 2000)
    plan = indexing.plan(2000, 32).tuned(partitions=8, sub_vectors=2)
    indexing.build(table, "image_vector", plan)
    queries, own = indexing._queries(table, "image_vector", 20, 0)
    exact, filtered = indexing._exact(table, "image_vector", queries, own)
    bad = indexing._recall(table, "image_vector", queries, own, exact, None, Tuning(1, 1))
    by_hand = [
        len(
            (ids(nearest(table, "image_vector", query, 11)) - {itself})
            & (ids(nearest(table, "image_vector", query, 11, None, Tuning(1, 1))) - {itself})
        )
        for query, itself in zip(queries, own, strict=True)
    ]
    assert bad == pytest.approx(sum(by_hand) / 200, abs=0.06) and bad < 0.7, "its own row does not count"
    assert indexing._recall(table, "image_vector", queries, own, exact, None, Tuning(8, 200)) == 1
    assert indexing._recall(table, "image_vector", queries, own, filtered, "row % 10 = 3", Tuning(8, 200)) == 1


def test_plans() -> None:
    """By size: partitions of 4,096 rows, a byte for 8 numbers, and above ten million rows for 16."""
    plans = [
        indexing.plan(rows, dim) for rows, dim in ((50_000, 512), (1_000_000, 768), (20_000_000, 512), (3000, 24))
    ]
    found = [(plan.partitions, plan.sub_vectors, plan.bits) for plan in plans]
    assert found == [(12, 64, 8), (244, 96, 8), (4882, 32, 8), (1, 3, 8)]


def test_a_damaged_note_of_an_index(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"image_vector": {"rows": 1}}')
    with pytest.raises(SearchError, match="Run longclip-index again"):
        read_indices(tmp_path)
