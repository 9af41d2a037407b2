"""What the ablation compares: its rows, the tables they stand in, and the paper's claims about them."""

from dataclasses import dataclass

TESTS = ("short", "long", "hard")
COMPONENTS = 16  # as in recipe.yaml
# Column -> benchmark, the last part of its name, and metric.
COLUMNS = {
    "zero-shot": ("Image folder", "top1"),
    "short I2T": ("short", "i2t_r1"),
    "short T2I": ("short", "t2i_r1"),
    "long I2T": ("long", "i2t_r1"),
    "long T2I": ("long", "t2i_r1"),
    "hard I2T": ("hard", "i2t_r1"),
    "hard T2I": ("hard", "t2i_r1"),
}


@dataclass(frozen=True)
class Row:
    """A model of the ablation: what it is called, how its table of positions is made, how it is trained.

    Args:
        stretch: words for conversion/stretch.py; None leaves the base as it is.
        train: words for training/train.py; None leaves the model untrained.
        part: of the ablation, "tables" or "sweeps".
    """

    name: str
    stretch: tuple[str, ...] | None = ()
    train: tuple[str, ...] | None = ()
    part: str = "tables"

    @property
    def slug(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.name.lower())

    @property
    def start(self) -> str:
        """The folder of the model that training begins with."""
        return "-".join(["stretched", *(word.strip("-") for word in self.stretch or ())])


LINEAR = ("--method", "linear")
LONG_ONLY = ("--strategy", "long-only")
OURS = Row("stretching and PCM")
ORIGINAL = Row("original, 77 tokens", None, None)
STRETCHED = Row("stretched, not trained", (), None)
INTERPOLATED = Row("all rows interpolated, not trained", LINEAR, None)
DIRECT = Row("neither (direct fine-tuning)", LINEAR, LONG_ONLY)
PCM_ONLY = Row("PCM without stretching", LINEAR)
STRETCHING_ONLY = Row("stretching without PCM", (), LONG_ONLY)
UNDISTINGUISHED = Row("undistinguished", (), ("--strategy", "undistinguished"))
MIXED_LENGTH = Row("mixed-length", (), ("--strategy", "mixed-length"))
BOUNDED = Row("bounded", (), ("--strategy", "bounded"))
KEEP = {n: Row(f"keep {n}", ("--keep", str(n)), (), "sweeps") for n in (0, 10, 30)}
RATIO = {n: Row(f"ratio {n}", ("--ratio", str(n)), (), "sweeps") for n in (2, 8)}
COMPONENTS_KEPT = {n: Row(f"{n} components", (), ("--num_components", str(n)), "sweeps") for n in (8, 32, 64)}

TABLES: dict[str, list[tuple[str, Row]]] = {
    "Not trained": [(row.name, row) for row in (ORIGINAL, STRETCHED, INTERPOLATED)],
    "Table 4: knowledge-preserved stretching and primary component matching": [
        (row.name, row) for row in (DIRECT, PCM_ONLY, STRETCHING_ONLY, OURS)
    ],
    "Table 5: strategies to keep the short-text ability, all stretched": [
        *((row.name, row) for row in (UNDISTINGUISHED, MIXED_LENGTH, BOUNDED)),
        ("primary component matching", OURS),
    ],
    "Rows kept as they are": [(f"{n} ({n + 4 * (77 - n)} positions)", KEEP.get(n, OURS)) for n in (0, 10, 20, 30)],
    "Ratio": [(f"{n} ({20 + n * 57} positions)", RATIO.get(n, OURS)) for n in (2, 4, 8)],
    "Components": [(str(n), OURS if n == COMPONENTS else COMPONENTS_KEPT[n]) for n in (8, 16, 32, 64)],
}
ROWS = list(dict.fromkeys(row for rows in TABLES.values() for _, row in rows))
# What the paper claims, as a difference that ought to be above 0: (claim, column, greater, smaller).
CLAIMS = (
    ("Direct fine-tuning loses short-text ability", "zero-shot", ORIGINAL, DIRECT),
    ("", "short T2I", ORIGINAL, DIRECT),
    ("Stretching keeps more of it than interpolating all rows", "zero-shot", STRETCHING_ONLY, DIRECT),
    ("PCM keeps more than training on long captions only", "zero-shot", OURS, STRETCHING_ONLY),
    ("", "short T2I", OURS, STRETCHING_ONLY),
    ("Long retrieval rises above the original", "long I2T", OURS, ORIGINAL),
    ("", "long T2I", OURS, ORIGINAL),
    ("Hard retrieval rises above the original", "hard I2T", OURS, ORIGINAL),
    ("", "hard T2I", OURS, ORIGINAL),
    ("PCM reads long text better than undistinguished", "hard I2T", OURS, UNDISTINGUISHED),
    ("", "hard T2I", OURS, UNDISTINGUISHED),
    ("PCM reads long text better than mixed-length", "hard I2T", OURS, MIXED_LENGTH),
    ("", "hard T2I", OURS, MIXED_LENGTH),
    ("PCM reads long text better than bounded", "hard I2T", OURS, BOUNDED),
    ("", "hard T2I", OURS, BOUNDED),
    ("PCM keeps more short-text ability than mixed-length", "zero-shot", OURS, MIXED_LENGTH),
    ("PCM keeps more short-text ability than bounded", "zero-shot", OURS, BOUNDED),
    ("PCM reads long text no worse than training on long captions only", "long I2T", OURS, STRETCHING_ONLY),
    ("", "long T2I", OURS, STRETCHING_ONLY),
    ("", "hard I2T", OURS, STRETCHING_ONLY),
    ("", "hard T2I", OURS, STRETCHING_ONLY),
)
