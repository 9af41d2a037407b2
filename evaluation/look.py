"""How plots look: colours that colour-blind readers tell apart, on light and on dark ground, and fonts."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

Ground = Literal["light", "dark"]

# A grey for the reference, then Okabe and Ito's colours, which colour-blind readers tell apart, without their yellow,
# which is lost on white.
COLOURS = ("#7F7F7F", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

LINES = ("-", "--", "-.", ":")

MARKERS = "osD^v"

HATCHES = ("", "////", "....")

DPI = 300

STYLE: dict[str, Any] = {
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.0,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid.axis": "y",
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "legend.fontsize": 7.0,
    "legend.frameon": False,
    "text.parse_math": False,  # a name is no formula
    "lines.linewidth": 1.2,
    "lines.markersize": 5.0,
    "lines.markeredgewidth": 0.5,
    "svg.hashsalt": "longclip",  # equal plots make equal files
}

# Ink, and what stands behind it; the page's own colours.
_GROUNDS: dict[Ground, tuple[str, str, str, str]] = {
    "light": ("#000000", "#ffffff", "#dddddd", "#444444"),
    "dark": ("#e8e8e8", "#161616", "#3c3c3c", "#bbbbbb"),
}

# Those of Debian, Windows and macOS that have Chinese, Japanese or Korean; the first that is there is taken.
_CJK = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
    "Droid Sans Fallback", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "PingFang SC", "Hiragino Sans",
    "Arial Unicode MS", "Unifont",
)  # fmt: skip


@contextmanager
def style(ground: Ground = "light") -> Iterator[None]:
    """Whatever the user's own matplotlib settings are, and without changing them."""
    try:
        import matplotlib.style
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "longclip-hf[evaluate]".') from error
    ink, behind, rule, _ = _GROUNDS[ground]
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "hatch.color")
    colours = {**dict.fromkeys(inked, ink), "grid.color": rule, "figure.facecolor": behind, "axes.facecolor": behind}
    fonts = {"font.family": _families()[0]}
    with matplotlib.style.context(["default", STYLE, colours, fonts]):
        yield


def ink() -> str:
    """Of text and bars of intervals, within `style`."""
    from matplotlib import rcParams

    return str(rcParams["text.color"])


def behind() -> str:
    """The colour of the ground, within `style`."""
    from matplotlib import rcParams

    return str(rcParams["figure.facecolor"])


def mark_colour() -> str:
    """Of the lines at 20, 77 and 248 tokens, within `style`."""
    return next(mark for of_ink, _, _, mark in _GROUNDS.values() if of_ink == ink())


def drawable(text: str) -> str:
    """`text` without what no font here has a glyph for: nothing rather than boxes."""
    known = _families()[1]
    return " ".join("".join(letter for letter in text if letter.isspace() or ord(letter) in known).split())


@cache
def _families() -> tuple[list[str], frozenset[int]]:
    """The fonts that are drawn with, and every character that one of them has."""
    from matplotlib.font_manager import FontProperties, fontManager, get_font

    there = set(fontManager.get_font_names())
    families = ["DejaVu Sans", *[name for name in _CJK if name in there][:1]]  # the first comes with matplotlib
    files = [fontManager.findfont(FontProperties(family=[name])) for name in families]
    return families, frozenset(code for file in files for code in get_font(file).get_charmap())
