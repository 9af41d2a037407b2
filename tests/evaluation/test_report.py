"""Tables and plots of made-up results."""

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
from PIL import Image
from sample_results import histogram, sample_results

from longclip_hf.evaluation import look
from longclip_hf.evaluation.outputs import write_report
from longclip_hf.evaluation.plots import plots
from longclip_hf.evaluation.tables import markdown_table
from longclip_hf.results import Results, Value


def row_of(text: str, section: str, label: str, nth: int = 0) -> list[str]:
    """The cells of a row of the Markdown, as a reader of the source sees them."""
    lines = text.split(f"## {section}\n")[1].split("\n## ")[0].splitlines()
    rows = [line for line in lines if line.startswith(f"| {label} ")]
    return [cell.strip() for cell in rows[nth].strip("|").split("|")][1:]


class TestTable:
    text = markdown_table(sample_results())

    def test_scores_stand_side_by_side(self) -> None:
        # 0.681 +- 1.96 sqrt(0.681 * 0.319 / 1000) = 0.681 +- 0.0289
        expected = ["68.1 [65.2, 71.0]", "67.4 [64.5, 70.3]", "78.9 [76.4, 81.4]"]
        assert row_of(self.text, "Urban1k", "Image to text, R@1") == expected
        assert row_of(self.text, "Urban1k", "Text to image, median rank")[0] == "3.0 [1.0, 4.0]"
        assert row_of(self.text, "CIFAR-10", "Top-1 accuracy")[2] == "90.0 [89.4, 90.6]"

    def test_a_difference_is_bold_where_its_test_says_so(self) -> None:
        assert row_of(self.text, "Urban1k", "Image to text, R@1", 1) == [
            "−0.7 [−1.9, +0.5]",
            "**+10.8 [+9.6, +12.0]**",
        ]
        scores = self.text.split("## Urban1k")[1].split("Differences")[0]
        assert "**" not in scores

    def test_a_loss_is_bold_too(self) -> None:
        first = replace(sample_results().differences[0], value=Value(-0.02, -0.03, -0.01), p=0.03)
        text = markdown_table(replace(sample_results(), differences=[first]))
        assert row_of(text, "Urban1k", "Image to text, R@1", 1) == ["**−2.0 [−3.0, −1.0]**"]

    def test_it_begins_with_models_by_benchmarks(self) -> None:
        rows = [line.strip("|").split("|") for line in self.text.split("## Urban1k")[0].splitlines()[8:]]
        rows = [[cell.strip() for cell in row] for row in rows if len(row) == 6]
        assert rows[0][:3] == ["", "Urban1k, image to text R@1", "Urban1k, text to image R@1"]
        assert rows[2] == ["`openai/clip-vit-base-patch16`", "68.1", "53.6", "52.4", "32.7", "**90.8**"]
        assert rows[3][1:3] == ["67.4 (−0.7)", "54.9 (+1.3\\*)"] and rows[3][5] == "**90.8** (+0.0)"
        assert rows[4][1:] == [
            "**78.9** (+10.8\\*)",
            "**79.5** (+25.9\\*)",
            "**57.6** (+5.2\\*)",
            "**40.4** (+7.7\\*)",
            "90.0 (−0.8)",
        ]

    def test_tests_are_corrected_for_their_number(self) -> None:
        """Of two, p of 0.03 and 0.02 are 0.04 after Holm's correction, of three with 0.5 they are 0.06."""
        first = replace(sample_results().differences[0], p=0.03)
        two = [first, replace(first, metric="t2i_r1", p=0.02)]
        for more, bold in (([], 2), ([replace(first, metric="i2t_r5", p=0.5)], 0)):
            text = markdown_table(replace(sample_results(), differences=[*two, *more]))
            assert text.split("Differences")[1].split("## ")[0].count("**") == 2 * bold
            assert f"Holm's correction for all {len(two + more)} differences of this report." in text
        text = markdown_table(replace(sample_results(), differences=[*two, replace(first, metric="i2t_r5", p=None)]))
        assert "for all 2 differences of this report. 1 were not tested." in text

    def test_counts(self) -> None:
        beyond = sum(histogram(128.0, 24.0, 1000)[78:])
        assert row_of(self.text, "Urban1k", "Captions cut") == [f"{beyond} ({beyond / 10:.1f} %)", *["0 (0.0 %)"] * 2]
        assert row_of(self.text, "Urban1k", "Ties") == ["0", "3", "0"]
        untied = [replace(score, ties=0) for score in sample_results().scores]
        assert "| Ties" not in markdown_table(replace(sample_results(), scores=untied))

    def test_effective_length(self) -> None:
        label = "Text to image, effective length (tokens)"
        assert row_of(self.text, "Urban1k", label) == ["24 [19, 30]", "27 [22, 34]", "150 [120, 190]"]
        score = sample_results().scores[2]
        assert score.effective_length
        growing = replace(score.effective_length, effective={"t2i": Value(248, 200, 248)})
        text = markdown_table(replace(sample_results(), scores=[replace(score, effective_length=growing)]))
        assert row_of(text, "Urban1k", label) == ["≥ 248 [200, 248]"]

    def test_what_the_numbers_are_of(self) -> None:
        for fact in ("9c1e77aa02b4", "0f3a9c0d41b2", "57c216476eef", "transformers 5.23.0", "2025-03-01",
                     "2 captions occur twice.", "licence CC BY 4.0", "5,000 images, 25,010 captions", "**R@k**",
                     "    longclip-evaluate openai"):  # fmt: skip
            assert fact in self.text

    def test_a_model_without_a_score_leaves_a_gap(self) -> None:
        results = sample_results()
        text = markdown_table(replace(results, scores=results.scores[:2], differences=[]))
        assert len(row_of(text, "Urban1k", "Image to text, R@1")) == 2
        few = replace(results.scores[1], metrics={"i2t_r5": Value(0.5, 0.4, 0.6)})
        text = markdown_table(replace(results, scores=[results.scores[0], few], differences=[]))
        assert row_of(text, "Urban1k", "Image to text, R@1") == ["68.1 [65.2, 71.0]", "–"]

    def test_the_source_is_aligned_and_no_name_breaks_it(self) -> None:
        results = sample_results()
        name = "a|b\nc"
        models = [replace(results.models[0], name=name)]
        text = markdown_table(replace(results, models=models, scores=[replace(results.scores[0], model=name)]))
        assert "`a\\|b c`" in text
        for table in self.text.split("\n\n"):
            if table.startswith("|"):
                assert len({len(line) for line in table.splitlines()}) == 1


def grown(results: Results, count: int) -> Results:
    """The same with `count` models."""
    models = [replace(results.models[i % 3], name=f"model-{i}") for i in range(count)]
    urban = [score for score in results.scores if score.benchmark == "Urban1k"]
    scores = [replace(urban[i % 3], model=f"model-{i}") for i in range(count)]
    return replace(results, models=models, scores=scores, benchmarks=results.benchmarks[:1], differences=[])


def renamed(name: str) -> Results:
    """One model on one benchmark, both of that name."""
    results = sample_results()
    info, score = replace(results.benchmarks[0], name=name), results.scores[0]
    models, scores = [replace(results.models[0], name=name)], [replace(score, model=name, benchmark=name)]
    return replace(results, models=models, benchmarks=[info], scores=scores, differences=[])


class TestPlots:
    def test_files(self, tmp_path: Path) -> None:
        written = write_report(sample_results(), tmp_path)
        names = {f"{name}.{kind}" for name in ("effective_length", "recall", "lengths") for kind in ("png", "svg")}
        assert {file.name for file in tmp_path.iterdir()} == {"report.md", "report.csv", "report.tex", *names}
        assert set(written) == {file.name for file in tmp_path.iterdir()}
        text = (tmp_path / "report.md").read_text(encoding="utf-8")
        assert text.startswith(markdown_table(sample_results()))
        assert all(f"]({name})" in text for name in names if name.endswith("png"))
        assert "![Length of the captions. Urban1k: " in text

    def test_one_column_of_a_paper(self) -> None:
        """On white, on dark, and as SVG without a ground and without text that a font could change."""
        one = replace(sample_results(), benchmarks=sample_results().benchmarks[:1])
        for light, dark in zip(plots(one), plots(one, "dark"), strict=True):
            for plot, ground in ((light, (255, 255, 255)), (dark, (22, 22, 22))):
                with Image.open(io.BytesIO(plot.png())) as image:
                    assert image.width == 1020  # 3.4 inches at 300 dpi
                    assert image.convert("RGB").getpixel((0, 0)) == ground
            root = ElementTree.fromstring(dark.svg())
            assert root.attrib["width"] == "244.8pt"  # 3.4 inches
            assert b"<text" not in dark.svg() and b"#161616" not in dark.svg().split(b"<defs>")[0]
            assert dark.svg() != light.svg()

    def test_what_is_drawn(self) -> None:
        """Curves, bars and marks hold the numbers of the results, and so do the words for who cannot see them."""
        made = plots(replace(sample_results(), benchmarks=sample_results().benchmarks[:1]))
        curves, bars, lengths = (plot.figure for plot in made)
        upper, lower = curves.axes
        first = upper.lines[0]
        assert first.get_xdata()[-1] == 248 and first.get_ydata()[-1] == pytest.approx(68.1)
        assert lower.lines[0].get_ydata()[-1] == pytest.approx(53.6)
        drawn = {line.get_xdata()[0] for line in upper.lines if len(set(line.get_xdata())) == 1}
        assert {20, 77, 248} <= drawn and {24, 27, 150} <= drawn, "marks and effective lengths"
        heights = [patch.get_height() for patch in bars.axes[0].patches]
        assert heights[:6] == pytest.approx([68.1, 87.2, 92.8, 53.6, 75.7, 83.1])
        counts = histogram(128.0, 24.0, 1000)
        assert [patch.get_height() for patch in lengths.axes[0].patches] == [
            sum(counts[start : start + 5]) for start in range(0, 197, 5)
        ][: len(lengths.axes[0].patches)]
        assert sum(patch.get_height() for patch in lengths.axes[0].patches) == 1000
        assert f"{sum(counts[78:]) / 10:.1f} % beyond 77, 0.0 % beyond 248" in made[2].facts
        assert "runs/urban/checkpoint-600: Image to text, R@1 78.9, Image to text, R@5 94.6" in made[1].facts
        assert "68.1 % at 248 tokens, effective length 24" in made[0].facts

    def test_the_legend_covers_no_data(self) -> None:
        for plot in plots(grown(sample_results(), 9))[:2]:
            figure = plot.figure
            figure.draw_without_rendering()
            legend = figure.legends[0].get_window_extent()
            assert not any(legend.overlaps(axis.get_tightbbox()) for axis in figure.axes)
            assert legend.x0 >= 0 and legend.x1 <= figure.bbox.width
        lines = plots(grown(sample_results(), 9))[0].figure.axes[0].lines[::2]
        assert len({(line.get_color(), line.get_linestyle()) for line in lines}) >= 9

    @pytest.mark.parametrize("name", ["$x^{", "_hidden", "a\\b%"])
    def test_any_name_is_drawn_as_it_is(self, name: str) -> None:
        made = plots(renamed(name))
        assert [text.get_text() for text in made[0].figure.legends[0].get_texts()] == [name]
        assert all(plot.figure.axes[0].get_title(loc="left") == name for plot in made)
        assert made[0].png() and made[0].svg()

    def test_a_name_that_no_font_has_is_no_row_of_boxes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its place stands for it, and the words beside the plot say what the place is."""
        known = look._families()[0][:1], frozenset(range(32, 127))
        monkeypatch.setattr(look, "_families", lambda: known)
        name = "\u6a21\u578b-v2"
        made = plots(renamed(name))
        assert [text.get_text() for text in made[0].figure.legends[0].get_texts()] == ["-v2 (model 1)"]
        assert made[0].figure.axes[0].get_title(loc="left") == "-v2 (benchmark 1)"
        assert f"-v2 (model 1) is {name}." in made[0].facts
        assert plots(renamed("\u6a21\u578b"))[0].figure.axes[0].get_title(loc="left") == "benchmark 1"
        assert made[0].png() and made[0].svg()  # without a warning of glyphs that are missing

    def test_only_what_there_is_data_for(self) -> None:
        results = sample_results()
        assert [plot.name for plot in plots(replace(results, benchmarks=results.benchmarks[2:]))] == ["recall"]
        assert plots(replace(results, scores=[], benchmarks=results.benchmarks[2:])) == []

    def test_the_callers_settings_neither_matter_nor_change(self) -> None:
        one = replace(sample_results(), benchmarks=sample_results().benchmarks[:1])
        plain = [plot.svg() for plot in plots(one)]
        with matplotlib.rc_context({"figure.facecolor": "black", "font.size": 30}):
            before = dict(matplotlib.rcParams)
            assert [plot.svg() for plot in plots(one)] == plain
            assert dict(matplotlib.rcParams) == before

    def test_pyplot_is_not_touched_and_the_extra_is_named(self) -> None:
        code = """
import sys
from sample_results import sample_results
from longclip_hf.evaluation.outputs import write_report
from longclip_hf.evaluation.plots import plots
from longclip_hf.evaluation.tables import markdown_table
markdown_table(sample_results())
assert "matplotlib" not in sys.modules
plots(sample_results())
assert "matplotlib.pyplot" not in sys.modules
for name in [name for name in sys.modules if name.startswith("matplotlib")]:
    sys.modules[name] = None
try:
    plots(sample_results())
except ImportError as error:
    print(error)
"""
        root = Path(__file__).parents[2]
        done = subprocess.run([sys.executable, "-W", "error", "-c", f"import sys; sys.path[:0] = [{str(root)!r}, "
                               f"{str(root / 'tests')!r}]\n{code}"], capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert 'pip install "longclip-hf[evaluate]"' in done.stdout
