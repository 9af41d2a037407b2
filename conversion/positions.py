"""Stretching a table of positions (paper section 3.2): pure functions of tensors."""

import torch

from modeling_longclip.defaults import KEEP, RATIO

ARITHMETICS = {"float32": torch.float32, "float16": torch.float16}
LONGEST = 2**16  # rows: attention to more is out of reach, and a mistyped ratio must not fill the memory first


def stretched_length(rows: int, keep: int = KEEP, ratio: int = RATIO) -> int:
    """How many rows a table of `rows` becomes when each row after the first `keep` becomes `ratio`: 77 -> 248."""
    return keep + ratio * (rows - keep)


def arithmetic_dtype(arithmetic: str, table: torch.dtype) -> torch.dtype:
    """What a table of dtype `table` is computed in: float32 at least, or float16 where that is asked for."""
    dtype = ARITHMETICS[arithmetic]
    return torch.promote_types(dtype, table) if dtype == torch.float32 else dtype


def stretch_positions(
    table: torch.Tensor,
    keep: int = KEEP,
    ratio: int = RATIO,
    length: int | None = None,
    arithmetic: str = "float32",
) -> torch.Tensor:
    """Knowledge-preserved stretching of a positional table (paper section 3.2, eq. 2; eq. 1 is `keep=0`).

    Row `i < keep` stays. Between the old rows `i` and `i + 1` from `keep` on stand `ratio` new ones,

        new[keep + ratio * (i - keep) + j] = (ratio - j) / ratio * old[i] + j / ratio * old[i + 1],  0 <= j < ratio,

    so that the old row reappears at `j = 0`. The last old row has no right neighbour: its `ratio` rows go on in the
    direction of the last step, `old[-1] + j / ratio * (old[-1] - old[-2])`, as in the released code.

    Args:
        table: of shape `(rows, hidden_size)`, floating point. It is not changed.
        keep: leading rows that stay, within `0 ... rows`.
        ratio: how many rows each later row becomes, at least 1.
        length: how many rows to return, at most 65536, and to compute; by default all, `stretched_length(...)`.
        arithmetic: `"float32"`, or `table`'s own dtype where that is wider; or `"float16"`, which rounds after every
            operation in the released code's order (multiply, divide, add) and reproduces its tables bit for bit. Kept
            rows are exact in both.

    Returns:
        `torch.Tensor` of shape `(length, hidden_size)` and `table`'s dtype.

    Raises:
        ValueError: for a table that is no matrix of floats or has a single row to go by, or for a `keep`, `ratio`,
            `length` or `arithmetic` that does not fit it.
    """
    if table.ndim != 2 or not table.is_floating_point():
        raise ValueError(
            f"table must be of shape (rows, hidden_size) and floating, got {tuple(table.shape)} {table.dtype}."
        )
    rows = table.shape[0]
    if not 0 <= keep <= rows:
        raise ValueError(f"keep must be within 0 ... {rows}, the rows of the table, got {keep}.")
    if ratio < 1:
        raise ValueError(f"ratio must be at least 1, got {ratio}.")
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"arithmetic must be one of {', '.join(ARITHMETICS)}, got {arithmetic!r}.")
    if rows < 2 and keep < rows and ratio > 1:
        raise ValueError(f"A table of {rows} row gives no direction to stretch it in.")
    longest = stretched_length(rows, keep, ratio)
    length = longest if length is None else length
    if not keep <= length <= longest:
        needed = -(-(length - keep) // max(rows - keep, 1))
        remedy = f"ratio {needed} would reach it" if length > longest and keep < rows else f"keep is {keep}"
        raise ValueError(f"{rows} rows with keep {keep} and ratio {ratio} make {longest}, not {length} ({remedy}).")
    if length > LONGEST:
        raise ValueError(
            f"{rows} rows with keep {keep} and ratio {ratio} would make {length}, and {LONGEST} are the most. "
            "Lower the ratio, or give the length that you need."
        )
    if keep == rows or length == keep:
        return table[:length].clone()

    dtype = arithmetic_dtype(arithmetic, table.dtype)
    old = table[keep:].to(dtype)
    needed = length - keep
    pairs = -(-needed // ratio)  # of neighbours between which a needed row stands
    left, right = old[:-1][:pairs], old[1:][:pairs]
    parts = range(1, min(ratio, needed))
    step = old[-1] - table[-2].to(dtype) if rows > 1 else torch.zeros_like(old[-1])
    # For j = 0 the row is copied, not computed: ratio * x / ratio need not be x.
    between = [left, *((ratio - j) * left / ratio + j * right / ratio for j in parts)]
    stretched = torch.stack(between, dim=1).flatten(0, 1)
    if stretched.shape[0] < needed:
        beyond = [old[-1], *(old[-1] + j * step / ratio for j in parts)]
        stretched = torch.cat([stretched, torch.stack(beyond)])
    return torch.cat([table[:keep], stretched.to(table.dtype)])[:length]
