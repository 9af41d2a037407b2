"""The files of a run: written as they come, and none of anybody else's deleted or overwritten."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from longclip_hf.errors import FileError, ResultsError
from longclip_hf.evaluation.exports import csv_table, latex_tables
from longclip_hf.evaluation.plots import plots
from longclip_hf.evaluation.tables import markdown_table
from longclip_hf.files import write_atomically
from longclip_hf.results import Results, read_results, write_results

if TYPE_CHECKING:
    from longclip_hf.evaluation.data import LeftOut
    from longclip_hf.evaluation.misses import Misses

RESULTS, PAGE, BAD_ROWS = "results.json", "report.html", "bad_rows.jsonl"
PLOTS = tuple(f"{name}.{kind}" for name in ("effective_length", "recall", "lengths") for kind in ("png", "svg"))
REPORTS = frozenset({"report.md", "report.csv", "report.tex", *PLOTS})


class Outputs:
    """The folder of a run. results.json names the files that were written with it: those are replaced by the next run.

    Args:
        folder: need not exist.
        html: whether report.html is to be written.
        replace_earlier: leave out what `folder` has of earlier runs.
        skips: whether rows may be left out, which bad_rows.jsonl names, with those of earlier runs.

    Attributes:
        earlier: the results that the folder has, or None.
        written: the names of the files, once they are.

    Raises:
        FileError: if something is in the way that no run wrote.
    """

    def __init__(self, folder: Path, html: bool, replace_earlier: bool = False, skips: bool = False) -> None:
        self.folder = folder
        self.written: list[str] = []
        self.earlier: Results | None = None
        self.left_out: LeftOut | None = None
        self._bad_rows: list[str] = []  # lines of earlier runs
        self._stale: frozenset[str] = frozenset()
        self._planned = REPORTS | ({PAGE} if html else set()) | ({BAD_ROWS} if skips else set())
        try:
            self.earlier = read_results(folder / RESULTS)
            # Only names that a run writes: a results.json can come from anywhere.
            self._stale = self._planned.union({PAGE, BAD_ROWS}).intersection(self.earlier.files)
        except ResultsError as error:
            if (folder / RESULTS).exists():
                said = str(error).rstrip(".")
                raise FileError(f"{said}. It would be overwritten: move it away, or name another --output.") from error
        foreign = [name for name in sorted(self._planned - self._stale) if (folder / name).exists()]
        if foreign:
            raise FileError(
                f"No evaluation that results.json of {folder} speaks of wrote {', '.join(foreign)}, and this one "
                "would overwrite it: move it away, or name another --output."
            )
        if replace_earlier:
            self.earlier = None
        elif BAD_ROWS in self._stale and (folder / BAD_ROWS).is_file():
            self._bad_rows = (folder / BAD_ROWS).read_text(encoding="utf-8").splitlines()

    def write_results(self, results: Results) -> None:
        """results.json alone, with what there is so far; reports of an earlier run, which do not fit it, go."""
        self._write(results, ())
        for name in self._stale:
            (self.folder / name).unlink(missing_ok=True)
        self._stale = frozenset()

    def write_all(self, results: Results, misses: "Iterable[Misses]", shown: int) -> None:
        """results.json, the report with its plots, and the page, with so many misses; `written` then names them.

        Raises:
            ImportError: without matplotlib, or for a page without jinja2.
        """
        self._write(results, self._planned)  # before the files: a run that is killed between leaves nothing unknown
        written = write_report(results, self.folder)
        if PAGE in self._planned:
            from longclip_hf.evaluation.page import write_page

            write_page(results, misses, self.folder / PAGE, shown)
            written.append(PAGE)
        bad_rows = dict.fromkeys([*self._bad_rows, *(self.left_out.lines() if self.left_out else ())])
        if bad_rows:
            write_atomically(self.folder / BAD_ROWS, "".join(f"{line}\n" for line in bad_rows).encode())
            written.append(BAD_ROWS)
        self._write(results, written)
        self.written = [RESULTS, *written]

    def _write(self, results: Results, files: Iterable[str]) -> None:
        write_results(replace(results, files=sorted(files)), self.folder / RESULTS)


def write_report(results: Results, folder: Path) -> list[str]:
    """Writes `report.md`, `report.csv`, `report.tex`, and the plots that there is data for.

    Returns:
        The names of the files.

    Raises:
        ImportError: without matplotlib.
    """
    images, drawn = "", plots(results)
    for plot in drawn:
        write_atomically(folder / f"{plot.name}.png", plot.png())
        write_atomically(folder / f"{plot.name}.svg", plot.svg())
        alt = " ".join(plot.facts.replace("[", "(").replace("]", ")").split())
        images += f"\n![{plot.title}. {alt}]({plot.name}.png)\n\n{plot.description}\n"
    texts = {
        "report.md": markdown_table(results) + images,
        "report.csv": csv_table(results),
        "report.tex": latex_tables(results),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text.encode())
    return [*texts, *(f"{plot.name}.{kind}" for plot in drawn for kind in ("png", "svg"))]
