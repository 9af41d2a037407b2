"""The proofs that a conversion runs on what it wrote, before it says that it is done."""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn
from transformers import CLIPTextConfig, PreTrainedTokenizerBase

from longclip_hf.conversion.positions import arithmetic_dtype
from longclip_hf.conversion.tensors import StoredTensor, target_dtype
from longclip_hf.errors import ProofError
from modeling_longclip.compat import text_transformer

_CHUNK = 8 * 2**20  # bytes compared at a time
# What tokenizers differ in: nothing at all, capitals, contractions, digits, accents, other scripts, entities, quotes,
# space, and a text that CLIP would cut.
_TEXTS = (
    "",
    "A brown dog runs along the beach, and SHAKES the water out of its fur.",
    "It's 42 o'clock -- isn't it?!",
    "Ünïcödé cafe\u0301, 日本語, Ελλάδα and 🐕",
    "Fish &amp; chips, \u201cfresh\u201d\u2026",
    "  tabs\tand\n\nline\u00a0breaks  ",
    "Behind it, two people in red jackets carry a wooden boat towards the sea. " * 25,
)


def prove_same_tensors(
    written: Mapping[str, StoredTensor],
    source: Mapping[str, StoredTensor],
    dtype: torch.dtype | None = None,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> str:
    """Every tensor of `source` stands in `written` under its name with the same bits (those of `source` as `dtype`).

    Returns:
        The proof in words.

    Raises:
        ProofError: naming the tensors that differ.
    """

    def differs(name: str) -> str | None:
        theirs = source[name]
        ours = written.get(name)
        meant = dtype if dtype is not None and theirs.dtype.is_floating_point else theirs.dtype
        if ours is None or (ours.shape, ours.dtype) != (theirs.shape, meant):
            return name
        if ours.mapped is None and theirs.mapped is None and ours.dtype == theirs.dtype:
            same = _same_bytes(ours, theirs)
        else:
            same = torch.equal(_bits(ours.load()), _bits(theirs.load().to(ours.dtype)))
        on_bytes(ours.nbytes)
        return None if same else name

    with ThreadPoolExecutor(2) as pool:  # reading and comparing release the interpreter's lock
        different = [name for name in pool.map(differs, source) if name is not None]
    if different:
        raise ProofError(
            f"{len(different)} tensors differ from the source after writing: {', '.join(different[:10])}."
        )
    nbytes = sum(tensor.nbytes for tensor in source.values())
    return f"{len(source)} tensors, {nbytes / 1e6:,.1f} MB, {_identical(dtype)}"


def prove_same_ids(written: PreTrainedTokenizerBase, source: PreTrainedTokenizerBase) -> str:
    """The `written` tokenizer gives the ids of the `source` for a set of texts, among them one with each added token.

    Returns:
        The proof in words.

    Raises:
        ProofError: naming the first text that gets other ids.
    """
    added = sorted({*source.get_added_vocab(), *written.get_added_vocab()})
    texts = [*_TEXTS, *(f"A photo of {token} beside another{token}s" for token in added)]
    ours, theirs = (tokenizer(texts, verbose=False)["input_ids"] for tokenizer in (written, source))
    different = [text for text, one, other in zip(texts, ours, theirs, strict=True) if one != other]
    if different:
        raise ProofError(
            f"The tokenizer that was written gives {len(different)} of {len(texts)} texts other ids than its source, "
            f"the first of them {different[0]!r:.120}."
        )
    return f"equal ids to the source's for {len(texts)} texts, with each of {len(added)} added tokens"


def prove_kept_rows(written: torch.Tensor, source: torch.Tensor, keep: int, dtype: torch.dtype | None = None) -> str:
    """The first `keep` rows of the `written` table are the `source` table's (as `dtype`), bit by bit.

    Raises:
        ProofError: if a row differs.
    """
    if not torch.equal(_bits(written[:keep]), _bits(source[:keep].to(written.dtype))):
        raise ProofError(f"One of the {keep} rows to keep differs from the source.")
    return f"rows 0 ... {keep - 1} {_identical(dtype)}" if keep else "no row is kept"


def prove_merged_tables(written: torch.Tensor, frozen: torch.Tensor, trained: torch.Tensor, keep: int) -> str:
    """The `written` table has rows below `keep` of Long-CLIP's `frozen` table and the others of the `trained` one.

    Raises:
        ProofError: if a bit differs (of the tables in `written`'s dtype).
    """
    for rows, source in ((slice(keep), frozen), (slice(keep, None), trained)):
        if written.shape != source.shape or not torch.equal(
            _bits(written[rows]), _bits(source[rows].to(written.dtype))
        ):
            raise ProofError("The written table of positions differs from the two that it was made of.")
    kept = f"rows 0 ... {keep - 1} of the first, " if keep else ""
    return f"{kept}rows {keep} ... {written.shape[0] - 1} of the trained one, bit-identical"


def prove_formula(written: torch.Tensor, source: torch.Tensor, keep: int, ratio: int, arithmetic: str) -> str:
    """The stretched rows are those of the paper's eq. 2, evaluated here row by row in float64.

    Raises:
        ProofError: if a row is further off than the rounding of `arithmetic` and of the table's dtype explains.
    """
    old = source.double()
    differences = [old.new_zeros(())]
    for position in range(keep, written.shape[0]):
        i, j = divmod(position - keep, ratio)
        i += keep
        step = old[i + 1] - old[i] if i + 1 < old.shape[0] else old[i] - old[i - 1]
        differences.append((written[position].double() - (old[i] + j / ratio * step)).abs().max())
    worst = torch.stack(differences).max().item()  # unlike Python's max, it lets no NaN slip through
    coarsest = max(torch.finfo(dtype).eps for dtype in (written.dtype, arithmetic_dtype(arithmetic, source.dtype)))
    allowed = 4 * coarsest * old.abs().max().item()
    if not worst <= allowed:
        raise ProofError(f"The stretched rows differ from eq. 2 by {worst:.2e}, and rounding explains {allowed:.2e}.")
    return f"{written.shape[0] - keep} rows within {worst:.1e} of eq. 2 in float64 (rounding explains {allowed:.1e})"


def prove_short_features(
    tensors: Mapping[str, StoredTensor],
    before: tuple[torch.Tensor, CLIPTextConfig],
    after: tuple[torch.Tensor, CLIPTextConfig],
    keep: int,
    dtype: torch.dtype | None = None,
) -> str:
    """Texts of up to `keep` tokens have the features that they had, to the last bit.

    Both are computed by CLIP's stock text transformer, with the table of positions and the configuration of each.

    Args:
        tensors: a text tower; `prove_same_tensors` says that all but the table are the same before and after.
        before: the table, of shape `(rows, hidden_size)`, and configuration of the source.
        after: those that were written.
        keep: leading rows that stayed.
        dtype: what floating-point tensors were cast to, if they were.

    Raises:
        ProofError: if a feature differs.
    """
    if keep < 3:
        return f"not claimed: keep {keep} leaves no text (BOS, a token, EOT) on kept rows only"
    lengths = sorted({max(3, math.ceil(keep * part)) for part in (0.1, 0.4, 0.7, 1.0)})
    eos_token_id = after[1].eos_token_id
    generator = torch.Generator().manual_seed(0)
    # Below EOT: old configurations pool at the highest id.
    input_ids = torch.randint(0, max(eos_token_id, 1), (len(lengths), keep), generator=generator)
    for row, length in enumerate(lengths):
        input_ids[row, length - 1 :] = eos_token_id
    dtypes = {target_dtype(tensor.dtype, dtype) for tensor in tensors.values() if tensor.dtype.is_floating_point}
    # One dtype for all; not float64, in which CLIP of transformers 4.57 cannot make its causal mask.
    common = dtypes.pop() if len(dtypes) == 1 and torch.float64 not in dtypes else torch.float32
    prefix = "text_model."
    loaded = {
        name: tensor.load().to(common)
        for name, tensor in tensors.items()
        if name.startswith((prefix, "text_projection."))
    }
    projection = loaded.pop("text_projection.weight", None)

    def features(table: torch.Tensor, config: CLIPTextConfig) -> torch.Tensor:
        with torch.device("meta"):
            model = text_transformer(config).eval()
        state_dict = {name.removeprefix(prefix): tensor for name, tensor in loaded.items()}
        state_dict["embeddings.position_embedding.weight"] = table.to(common)
        model.load_state_dict(state_dict, assign=True)
        model.embeddings.position_ids = torch.arange(config.max_position_embeddings)[None]
        with torch.inference_mode():
            pooled = model(input_ids=input_ids).pooler_output
            return pooled if projection is None else nn.functional.linear(pooled, projection)

    # A few short texts are too little work for threads, which wait for each other where another program is busy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        old, new = features(*before).double(), features(*after).double()
    finally:
        torch.set_num_threads(threads)
    difference = (old - new).abs().max().item()
    if not difference == 0.0:
        raise ProofError(f"The features of texts of {lengths} tokens changed by up to {difference:.2e}.")
    counts = ", ".join(map(str, lengths))
    return f"texts of {counts} tokens: largest change {difference:.1f} (mean norm {old.norm(dim=-1).mean():.2f})"


def _same_bytes(first: StoredTensor, second: StoredTensor) -> bool:
    if first.nbytes != second.nbytes:
        return False
    with first.file.open("rb", buffering=0) as one, second.file.open("rb", buffering=0) as other:
        one.seek(first.offset)
        other.seek(second.offset)
        for start in range(0, first.nbytes, _CHUNK):
            count = min(_CHUNK, first.nbytes - start)
            ours = one.read(count)
            if len(ours) != count or ours != other.read(count):
                return False
    return True


def _identical(dtype: torch.dtype | None) -> str:
    return "bit-identical" + (f" to the source as {str(dtype).removeprefix('torch.')}" if dtype else "")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
