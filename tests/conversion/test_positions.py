"""Stretching against the formula written again as a loop, against hand-worked tables, and against half precision."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longclip_hf.conversion.positions import stretch_positions, stretched_length


@st.composite
def stretches(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    """A table, `keep` and `ratio`."""
    rows, width = draw(st.integers(2, 14)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    table = torch.randn(rows, width, generator=generator) * 10.0 ** draw(st.integers(-4, 3))
    return table, draw(st.integers(0, rows)), draw(st.integers(1, 7))


def by_the_formula(table: torch.Tensor, keep: int, ratio: int) -> torch.Tensor:
    """Eq. 2 and the released code's last rows, in float64, as a loop."""
    old = table.double().tolist()
    rows = old[:keep]
    for i in range(keep, len(old)):
        for j in range(ratio):
            if i + 1 < len(old):
                row = [(ratio - j) / ratio * a + j / ratio * b for a, b in zip(old[i], old[i + 1], strict=True)]
            else:
                row = [a + j / ratio * (a - b) for a, b in zip(old[i], old[i - 1], strict=True)]
            rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def numbered(rows: int) -> torch.Tensor:
    """A table whose row i is filled with i: stretched, it shows where each new row stands in the old table."""
    return torch.arange(rows, dtype=torch.float32)[:, None].expand(rows, 2).clone()


def test_clips_table_becomes_248_rows_worked_by_hand() -> None:
    where = [float(row) for row in range(20)] + [20 + quarter / 4 for quarter in range(228)]
    assert where[19:25] == [19, 20, 20.25, 20.5, 20.75, 21] and where[-5:] == [75.75, 76, 76.25, 76.5, 76.75]
    stretched = stretch_positions(numbered(77))
    assert stretched.shape == (248, 2)
    assert stretched[:, 0].tolist() == stretched[:, 1].tolist() == where


def test_linear_stretch_is_231_rows_worked_by_hand() -> None:
    stretched = stretch_positions(numbered(77), keep=0, ratio=3)
    torch.testing.assert_close(stretched[:, 0], torch.arange(231) / 3, rtol=1e-6, atol=0)
    assert stretched[::3, 0].tolist() == list(range(77))


def test_a_crooked_table_worked_by_hand() -> None:
    table = torch.tensor([[7.0, 0.0], [0.0, 8.0], [4.0, 0.0]])
    assert stretch_positions(table, keep=1, ratio=4).tolist() == [
        [7, 0],
        [0, 8], [1, 6], [2, 4], [3, 2],
        [4, 0], [5, -2], [6, -4], [7, -6],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "keep", "ratio", "expected"),
    [(77, 20, 4, 248), (77, 0, 3, 231), (77, 77, 4, 77), (77, 30, 8, 406), (5, 2, 1, 5)],
)
def test_stretched_length(rows: int, keep: int, ratio: int, expected: int) -> None:
    assert stretched_length(rows, keep, ratio) == expected
    assert stretch_positions(numbered(rows), keep, ratio).shape[0] == expected


@given(stretches())
def test_equals_the_loop(stretch: tuple[torch.Tensor, int, int]) -> None:
    table, keep, ratio = stretch
    expected = by_the_formula(table, keep, ratio)
    stretched = stretch_positions(table, keep, ratio)
    assert stretched.shape == expected.shape
    scale = table.abs().max().item()
    torch.testing.assert_close(stretched.double(), expected, rtol=0, atol=4 * torch.finfo(torch.float32).eps * scale)


@given(stretches(), st.sampled_from(["float32", "float16"]), st.integers(0, 2**31))
def test_kept_rows_keep_their_bits(stretch: tuple[torch.Tensor, int, int], arithmetic: str, seed: int) -> None:
    table, keep, ratio = stretch
    anything = torch.randint(
        -(2**31), 2**31, table.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int64
    )
    table[:keep] = anything.to(torch.int32).view(torch.float32)[:keep]  # NaN, infinities, -0.0 and subnormals too
    assert bits(stretch_positions(table, keep, ratio, arithmetic=arithmetic)[:keep]) == bits(table[:keep])


@given(stretches())
def test_old_rows_reappear_every_ratio_rows(stretch: tuple[torch.Tensor, int, int]) -> None:
    table, keep, ratio = stretch
    assert bits(stretch_positions(table, keep, ratio)[keep::ratio]) == bits(table[keep:])


@given(stretches(), st.integers(-4, 4), st.integers(-4, 4), st.integers(0, 2**31))
def test_is_linear_in_the_table(stretch: tuple[torch.Tensor, int, int], a: int, b: int, seed: int) -> None:
    one, keep, ratio = stretch
    other = torch.randn(one.shape, generator=torch.Generator().manual_seed(seed))
    together = stretch_positions(a * one + b * other, keep, ratio)
    apart = a * stretch_positions(one, keep, ratio) + b * stretch_positions(other, keep, ratio)
    scale = abs(a) * one.abs().max().item() + abs(b) * other.abs().max().item()
    torch.testing.assert_close(together, apart, rtol=0, atol=16 * torch.finfo(torch.float32).eps * scale)


@given(stretches(), st.data())
def test_length_cuts_and_nothing_else(stretch: tuple[torch.Tensor, int, int], data: st.DataObject) -> None:
    table, keep, ratio = stretch
    whole = stretch_positions(table, keep, ratio)
    length = data.draw(st.integers(keep, len(whole)))
    assert bits(stretch_positions(table, keep, ratio, length)) == bits(whole[:length])


@given(stretches())
def test_the_input_is_neither_changed_nor_shared(stretch: tuple[torch.Tensor, int, int]) -> None:
    table, keep, ratio = stretch
    before = bits(table)
    stretch_positions(table, keep, ratio).fill_(3.0)
    assert bits(table) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("arithmetic", ["float32", "float16"])
def test_dtype_is_the_tables(dtype: torch.dtype, arithmetic: str) -> None:
    table = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    stretched = stretch_positions(table, 2, 3, arithmetic=arithmetic)
    assert stretched.dtype == dtype
    assert bits(stretched[:2]) == bits(table[:2])
    # A wider table is not squeezed through float32.
    computed = torch.promote_types(dtype, torch.float32) if arithmetic == "float32" else torch.float16
    eps = max(torch.finfo(dtype).eps, torch.finfo(computed).eps)
    torch.testing.assert_close(stretched.double(), by_the_formula(table, 2, 3), rtol=0, atol=4 * eps * 3)


@given(stretches(), st.integers(0, 2**31))
def test_rows_of_float64_reappear_to_the_last_bit(stretch: tuple[torch.Tensor, int, int], seed: int) -> None:
    table, keep, ratio = stretch
    table = torch.randn(table.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    stretched = stretch_positions(table, keep, ratio)
    assert bits(stretched[keep::ratio]) == bits(table[keep:]) and bits(stretched[:keep]) == bits(table[:keep])
    atol = 4 * torch.finfo(torch.float64).eps * table.abs().max().item()
    torch.testing.assert_close(stretched, by_the_formula(table, keep, ratio), rtol=0, atol=atol)


def in_half_precision(table: np.ndarray, keep: int, ratio: int) -> np.ndarray:
    """The released code's loop: every product, quotient, sum and difference is rounded to float16 by itself."""
    half, old = np.float16, table.astype(np.float16)
    rows = []
    for i in range(keep, len(old) - 1):
        rows.append(old[i])
        for j in range(1, ratio):
            rows.append(half(ratio - j) * old[i] / half(ratio) + half(j) * old[i + 1] / half(ratio))
    rows.append(old[-1])
    for j in range(1, ratio):
        rows.append(old[-1] + half(j) * (old[-1] - old[-2]) / half(ratio))
    stretched = np.stack(rows)
    assert stretched.dtype == np.float16
    return stretched


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("ratio", [4, 3, 7])
@pytest.mark.parametrize("keep", [20, 0])
def test_float16_arithmetic_has_the_bits_of_a_half_precision_loop(dtype: torch.dtype, keep: int, ratio: int) -> None:
    table = torch.randn(77, 8, generator=torch.Generator().manual_seed(0)).mul(0.01).to(dtype)
    stretched = stretch_positions(table, keep, ratio, arithmetic="float16")
    loop = torch.from_numpy(in_half_precision(table.numpy(), keep, ratio))
    assert bits(stretched[keep:]) == bits(loop.to(dtype))
    assert bits(stretched[:keep]) == bits(table[:keep])
    assert not torch.equal(stretched, stretch_positions(table, keep, ratio))


NO_MATRIX = "table must be of shape (rows, hidden_size) and floating, got"


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (torch.zeros(4), {}, f"{NO_MATRIX} (4,) torch.float32."),
        (torch.zeros(1, 77, 4), {}, f"{NO_MATRIX} (1, 77, 4) torch.float32."),
        (torch.zeros(4, 2, dtype=torch.int64), {}, f"{NO_MATRIX} (4, 2) torch.int64."),
        (numbered(77), {"keep": -1}, "keep must be within 0 ... 77, the rows of the table, got -1."),
        (numbered(77), {"keep": 78}, "keep must be within 0 ... 77, the rows of the table, got 78."),
        (numbered(16), {}, "keep must be within 0 ... 16, the rows of the table, got 20."),
        (numbered(77), {"ratio": 0}, "ratio must be at least 1, got 0."),
        (numbered(77), {"arithmetic": "int8"}, "arithmetic must be one of float32, float16, got 'int8'."),
        (numbered(1), {"keep": 0}, "A table of 1 row gives no direction to stretch it in."),
        (numbered(77), {"length": 249}, "keep 20 and ratio 4 make 248, not 249 (ratio 5 would reach it)."),
        (numbered(77), {"length": 2000}, "77 rows with keep 20 and ratio 4 make 248, not 2000 (ratio 35"),
        (numbered(77), {"length": 19}, "77 rows with keep 20 and ratio 4 make 248, not 19 (keep is 20)."),
        (numbered(77), {"keep": 77, "length": 78}, "77 rows with keep 77 and ratio 4 make 77, not 78 (keep is 77)."),
    ],
)  # fmt: skip
def test_errors_carry_the_values(table: torch.Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        stretch_positions(table, **options)


@given(st.integers(2, 30), st.integers(1, 6), st.data())
def test_the_ratio_that_an_error_names_reaches_the_length(rows: int, ratio: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, rows - 1))
    length = data.draw(st.integers(stretched_length(rows, keep, ratio) + 1, 400))
    with pytest.raises(ValueError, match="would reach it") as caught:
        stretch_positions(numbered(rows), keep, ratio, length)
    named = int(re.search(r"ratio (\d+) would reach", str(caught.value))[1])
    assert stretch_positions(numbered(rows), keep, named, length).shape[0] == length
    assert named == math.ceil((length - keep) / (rows - keep))


def test_one_row_that_need_not_grow_stays() -> None:
    assert stretch_positions(numbered(1) + 5, keep=0, ratio=1).tolist() == [[5, 5]]
    assert stretch_positions(numbered(1) + 5, keep=1, ratio=4).tolist() == [[5, 5]]


class TestAbsurdRatios:
    def test_only_the_rows_that_are_asked_for_are_computed(self) -> None:
        """Rows of a table 0, 1, ... 76 at ratio 10^9: the last of 248 is 227 billionths behind row 20."""
        table = torch.arange(77, dtype=torch.float64)[:, None]
        made = stretch_positions(table, 20, 10**9, 248)
        assert made.shape == (248, 1)
        assert (made[20:, 0] - (20 + torch.arange(228, dtype=torch.float64) / 10**9)).abs().max() < 1e-12

    @pytest.mark.parametrize("length", [None, 10**7])
    def test_a_table_that_no_model_reads_is_refused_before_it_is_made(self, length: int | None) -> None:
        made = 20 + 10**6 * 57 if length is None else length
        with pytest.raises(ValueError, match=f"ratio 1000000 would make {made}, and 65536 are the most"):
            stretch_positions(torch.zeros(77, 4), 20, 10**6, length)

    def test_the_longest(self) -> None:
        assert stretch_positions(torch.zeros(77, 1), 20, 2**16, 2**16).shape == (2**16, 1)
