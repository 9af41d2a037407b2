"""Results for people: `report.md` with its plots."""

from pathlib import Path

from longclip_hf.evaluation.plots import plots
from longclip_hf.evaluation.tables import markdown_table
from longclip_hf.files import write_atomically
from longclip_hf.results import Results


def write_report(results: Results, folder: Path) -> list[str]:
    """Writes `report.md` and its plots, `effective_length.png`, `recall.png` and `lengths.png`, where there is data.

    Returns:
        The names of the files.

    Raises:
        ImportError: without matplotlib.
    """
    images, drawn = "", plots(results)
    for plot in drawn:
        write_atomically(folder / plot.file, plot.png)
        images += f"\n![{plot.description}]({plot.file})\n"
    write_atomically(folder / "report.md", (markdown_table(results) + images).encode())
    return ["report.md", *(plot.file for plot in drawn)]
