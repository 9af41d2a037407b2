"""Every proof holds for what was written well, and fails when one value of it is another."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig

from longclip_hf.conversion.checkpoint import POSITION_TABLE
from longclip_hf.conversion.parity import prove_formula, prove_kept_rows, prove_same_tensors, prove_short_features
from longclip_hf.conversion.positions import stretch_positions
from longclip_hf.conversion.tensors import StoredTensor, read_safetensors, read_torch
from longclip_hf.errors import ProofError
from modeling_longclip import LongCLIPConfig

Edit = Callable[..., None]


def table_of(rows: int = 77, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(0)).mul(0.01).to(dtype)


def flip(file: Path, tensor: StoredTensor, byte: int = 0, bit: int = 0) -> None:
    """Changes one bit of a tensor on disk."""
    with file.open("r+b") as stream:
        stream.seek(tensor.offset + byte)
        (value,) = stream.read(1)
        stream.seek(tensor.offset + byte)
        stream.write(bytes([value ^ 1 << bit]))


class TestSameTensors:
    def test_the_same_file_is_the_same(self, clip_folder: Path) -> None:
        tensors = read_safetensors(clip_folder / "model.safetensors")
        counts: list[int] = []
        proof = prove_same_tensors(tensors, tensors, on_bytes=counts.append)
        nbytes = sum(tensor.nbytes for tensor in load_file(clip_folder / "model.safetensors").values())
        assert sum(counts) == nbytes
        assert proof == f"78 tensors, {nbytes / 1e6:,.1f} MB, bit-identical"

    def test_one_bit_anywhere_is_found_and_named(self, clip_folder: Path, copy_of: Callable[[Path], Path]) -> None:
        source = read_safetensors(clip_folder / "model.safetensors")
        file = copy_of(clip_folder) / "model.safetensors"
        for number, (name, tensor) in enumerate(source.items()):
            place = (number * 37 % tensor.nbytes, number % 8)
            flip(file, tensor, *place)
            message = rf"^1 tensors differ from the source after writing: {re.escape(name)}\.$"
            with pytest.raises(ProofError, match=message):
                prove_same_tensors(read_safetensors(file), source)
            flip(file, tensor, *place)
        prove_same_tensors(read_safetensors(file), source)

    def test_a_large_tensor_is_read_to_its_last_byte(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("longclip_hf.conversion.parity._CHUNK", 1000)
        for name in ("ours", "theirs"):
            save_file({"weight": torch.zeros(1001)}, tmp_path / name)
        source = read_safetensors(tmp_path / "theirs")
        prove_same_tensors(read_safetensors(tmp_path / "ours"), source)
        flip(tmp_path / "ours", source["weight"], 4003, 7)  # -0.0 equals 0.0, and is another
        with pytest.raises(ProofError, match="weight"):
            prove_same_tensors(read_safetensors(tmp_path / "ours"), source)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_cast_is_the_sources_cast(
        self, dtype: torch.dtype, clip_folder: Path, tmp_path: Path, copy_of: Callable[[Path], Path]
    ) -> None:
        source = read_safetensors(clip_folder / "model.safetensors")
        cast = {name: tensor.load().to(dtype) for name, tensor in source.items()}
        save_file(cast, tmp_path / "cast.safetensors")
        written = read_safetensors(tmp_path / "cast.safetensors")
        name = str(dtype).removeprefix("torch.")
        assert prove_same_tensors(written, source, dtype).endswith(f"bit-identical to the source as {name}")
        with pytest.raises(ProofError, match="78 tensors differ"):
            prove_same_tensors(written, source)
        flip(tmp_path / "cast.safetensors", written["logit_scale"])
        with pytest.raises(ProofError, match="1 tensors differ from the source after writing: logit_scale"):
            prove_same_tensors(written, source, dtype)

    def test_a_bin_is_compared_too(self, clip_folder: Path, tmp_path: Path, copy_of: Callable[[Path], Path]) -> None:
        file = copy_of(clip_folder) / "model.safetensors"
        torch.save(load_file(file), tmp_path / "model.bin")
        source, written = read_torch(tmp_path / "model.bin"), read_safetensors(file)
        prove_same_tensors(written, source)
        flip(file, written["text_projection.weight"])
        with pytest.raises(ProofError, match=r"text_projection\.weight"):
            prove_same_tensors(written, source)

    @pytest.mark.parametrize(
        "wrong",
        [{}, {"w": torch.zeros(3, 2)}, {"w": torch.zeros(2, 3, dtype=torch.int32)}, {"w": torch.zeros(2, 2)}],
        ids=["missing", "shape", "dtype", "shorter"],
    )
    def test_another_form_of_the_same_bits_differs(self, wrong: dict[str, torch.Tensor], tmp_path: Path) -> None:
        save_file({"w": torch.zeros(2, 3)}, tmp_path / "theirs")
        save_file(wrong | {"more": torch.zeros(1)}, tmp_path / "ours")
        with pytest.raises(ProofError, match="1 tensors differ from the source after writing: w"):
            prove_same_tensors(read_safetensors(tmp_path / "ours"), read_safetensors(tmp_path / "theirs"))


class TestKeptRows:
    @pytest.mark.parametrize(("keep", "proof"), [(20, "rows 0 ... 19 bit-identical"), (0, "no row is kept")])
    def test_holds_for_a_stretch(self, keep: int, proof: str) -> None:
        table = table_of()
        assert prove_kept_rows(stretch_positions(table, keep), table, keep) == proof

    @pytest.mark.parametrize("row", [0, 7, 19])
    def test_fails_for_one_bit_in_a_kept_row(self, row: int) -> None:
        table = table_of()
        table[row, 3] = 0.0
        written = stretch_positions(table)
        written[row, 3] = -0.0
        with pytest.raises(ProofError, match="One of the 20 rows to keep differs from the source"):
            prove_kept_rows(written, table, 20)
        written[row, 3] = 0.0
        written[20, 0] += 1
        assert prove_kept_rows(written, table, 20)


class TestFormula:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("arithmetic", ["float32", "float16"])
    @pytest.mark.parametrize(
        ("keep", "ratio", "count"), [(20, 4, 228), (0, 3, 231), (30, 8, 376), (76, 5, 5), (77, 4, 0)]
    )
    def test_holds_for_every_stretch(
        self, dtype: torch.dtype, arithmetic: str, keep: int, ratio: int, count: int
    ) -> None:
        table = table_of(dtype=dtype)
        written = stretch_positions(table, keep, ratio, arithmetic=arithmetic)
        assert prove_formula(written, table, keep, ratio, arithmetic).startswith(f"{count} rows within")

    @given(st.integers(20, 247), st.integers(0, 7), st.sampled_from([1e-3, -1e-3, float("nan"), float("inf")]))
    def test_fails_for_one_value_of_one_stretched_row(self, row: int, column: int, error: float) -> None:
        table = table_of()
        written = stretch_positions(table)
        written[row, column] += error
        with pytest.raises(ProofError, match=r"The stretched rows differ from eq\. 2 by .*, and rounding explains"):
            prove_formula(written, table, 20, 4, "float32")

    def test_names_the_difference(self) -> None:
        table = table_of()
        written = stretch_positions(table)
        written[100, 2] += 0.25
        with pytest.raises(ProofError, match=r"differ from eq\. 2 by 2\.50e-01"):
            prove_formula(written, table, 20, 4, "float32")

    @pytest.mark.parametrize(("keep", "ratio"), [(21, 4), (19, 4), (20, 3)])
    def test_fails_for_another_stretch(self, keep: int, ratio: int) -> None:
        table = table_of()
        with pytest.raises(ProofError, match="differ from eq"):
            prove_formula(stretch_positions(table, keep, ratio)[:231], table, 20, 4, "float32")

    def test_half_precision_is_not_taken_for_float32(self) -> None:
        table = table_of()
        with pytest.raises(ProofError, match="differ from eq"):
            prove_formula(stretch_positions(table, arithmetic="float16"), table, 20, 4, "float32")


class TestShortFeatures:
    @pytest.fixture
    def towers(
        self, longclip_folder: Path, clip_folder: Path
    ) -> tuple[dict[str, StoredTensor], tuple[torch.Tensor, CLIPTextConfig], tuple[torch.Tensor, CLIPTextConfig]]:
        written = read_safetensors(longclip_folder / "model.safetensors")
        old = read_safetensors(clip_folder / "model.safetensors")[POSITION_TABLE].load()
        config = LongCLIPConfig.from_pretrained(longclip_folder).text_config
        before = CLIPTextConfig.from_dict(config.to_dict() | {"max_position_embeddings": 77})
        return written, (old, before), (written[POSITION_TABLE].load(), config)

    def test_holds_for_a_stretch(self, towers: tuple) -> None:
        proof = prove_short_features(*towers, keep=20)
        assert re.match(r"texts of 3, 8, 14, 20 tokens: largest change 0\.0 \(mean norm \d+\.\d+\)", proof)
        assert prove_short_features(*towers, keep=3).startswith("texts of 3 tokens")

    @pytest.mark.parametrize("row", [0, 1, 2, 7, 13, 19])
    def test_fails_for_one_value_of_a_kept_row(self, row: int, towers: tuple) -> None:
        tensors, before, (table, config) = towers
        table = table.clone()
        table[row, 5] += 0.01
        with pytest.raises(ProofError, match=r"The features of texts of \[3, 8, 14, 20\] tokens changed by up to"):
            prove_short_features(tensors, before, (table, config), 20)

    @pytest.mark.parametrize("row", [20, 100, 247])
    def test_says_nothing_of_later_rows(self, row: int, towers: tuple) -> None:
        tensors, before, (table, config) = towers
        table = table.clone()
        table[row] += 1
        assert prove_short_features(tensors, before, (table, config), 20)

    def test_fails_for_a_value_that_is_none(self, towers: tuple) -> None:
        tensors, before, (table, config) = towers
        table = table.clone()
        table[2, 5] = float("nan")
        with pytest.raises(ProofError, match="changed by up to nan"):
            prove_short_features(tensors, before, (table, config), 20)

    @pytest.mark.parametrize(
        "changes", [{"eos_token_id": 5}, {"hidden_act": "gelu"}, {"layer_norm_eps": 1e-3}, {"num_attention_heads": 8}]
    )
    def test_fails_for_another_configuration(self, changes: dict[str, object], towers: tuple) -> None:
        tensors, before, (table, config) = towers
        other = CLIPTextConfig.from_dict(config.to_dict() | changes)
        with pytest.raises(ProofError, match="The features of texts of"):
            prove_short_features(tensors, before, (table, other), 20)

    def test_old_configurations_pool_at_the_same_token(self, towers: tuple) -> None:
        tensors, (old, config), after = towers
        legacy = CLIPTextConfig.from_dict(config.to_dict() | {"eos_token_id": 2})
        assert "largest change 0.0" in prove_short_features(tensors, (old, legacy), after, 20)

    @pytest.mark.parametrize("keep", [0, 1, 2])
    def test_is_not_claimed_where_no_text_is_short_enough(self, keep: int, towers: tuple) -> None:
        assert prove_short_features(*towers, keep=keep).startswith(f"not claimed: keep {keep} leaves no text")
