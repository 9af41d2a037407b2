"""Publishes a Long-CLIP folder on the Hugging Face Hub, with a card that claims what is known and measured.

    python conversion/publish.py long-clip USER/long-clip                          # shows what would be sent
    python conversion/publish.py long-clip USER/long-clip --yes
    python conversion/publish.py tuned USER/tuned --base-model openai/clip-vit-base-patch16 --license mit \\
        --dataset USER/captions --made-with "python training/train.py --recipe paper ..." \\
        --results evaluation/results.json --yes --private --tag v1

Before anything is sent, the very files are loaded in a fresh process, with their own code and as a plain CLIP, and
must give the same features. Weights in safetensors, code, tokenizers, processor and card go up in one commit;
everything else in the folder stays here and is named. The token is that of `hf auth login` or of HF_TOKEN. An upload
that was interrupted is repeated with the same command: what the Hub has is not sent again.
"""

import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longclip_hf.command import CommandParser, consoles, guarded
from longclip_hf.errors import ConversionError
from longclip_hf.files import read_json
from modeling_longclip.defaults import LENGTH

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
LFS_BYTES = 10 * 2**20  # the Hub's limit for files outside git-LFS, in which safetensors always are
ATTEMPTS = 3
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
REMEDIES = {
    401: "the Hub does not accept the token. Log in again with `hf auth login`, or renew HF_TOKEN.",
    403: "the token may not do that. Make one that may write to {namespace}, in the Hub's settings.",
    404: "there is no such repository or user, or the token may not see it. Check the name.",
    409: "another change came in between, or the name is taken. Look at the repository, then run the command again.",
    412: "another change came in between. Run the command again.",
    413: "a file is too large for the Hub.",
}
# Run in a process of its own, on the files that would be sent and nothing else.
CHECK = """
import sys
sys.modules["modeling_longclip"] = None  # whoever loads it from the Hub has only the code in the folder
try:
    import numpy, torch, transformers
    from PIL import Image
    folder, positions, stock, has_image_tower = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] == "True"
    texts = ["a photo of a dog", "a photo of a dog " * positions]
    call = {"padding": True, "truncation": True, "return_tensors": "pt"}
    if has_image_tower:
        image = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=numpy.uint8))
        inputs = transformers.AutoProcessor.from_pretrained(folder)(text=texts, images=[image], **call)
    else:
        inputs = transformers.AutoTokenizer.from_pretrained(folder)(texts, **call)
    length = inputs["input_ids"].shape[1]
    if length != positions:
        raise ValueError(f"the tokenizer cuts texts at {length} tokens, and the model reads {positions}")
    found = []
    for model_class, trust in ((transformers.AutoModel, True), (getattr(transformers, stock), False)):
        options = {"trust_remote_code": True} if trust else {}
        model = model_class.from_pretrained(folder, dtype=torch.float32, **options).eval()
        if trust and type(model).__name__ != f"Long{stock}":
            raise ValueError(f"AutoModel with its own code gives a {type(model).__name__}, not a Long{stock}")
        with torch.inference_mode():
            output = model(**inputs)
        # Of both towers the logits, which depend on all weights; NaN is equal to nothing.
        found.append(output.logits_per_image if has_image_tower else output[0])
        del model
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
except Exception as error:
    print(type(error).__name__ + ": " + " ".join(str(error).split())[:600], file=sys.stderr)
    sys.exit(1)
"""


@dataclass(frozen=True)
class Publication:
    """A folder as it would be published: `files` of it, without the card, which is `card`."""

    folder: Path
    repo_id: str
    card: str
    files: list[str]
    left_out: list[str]
    unstated: list[str]
    positions: int
    stock_class: str
    has_image_tower: bool

    def size(self, name: str) -> int:
        return len(self.card.encode()) if name == CARD else (self.folder / name).stat().st_size

    def names(self) -> list[str]:
        return sorted([*self.files, CARD])


@dataclass(frozen=True)
class Published:
    """The commit that holds the files, whether it is a new one, and stale files of this kind that it removed."""

    url: str
    commit: str
    is_new: bool
    removed: list[str]


def prepare(
    folder: Path | str,
    repo_id: str,
    *,
    results: Sequence[Path] = (),
    results_model: str | None = None,
    base_model: str | None = None,
    relation: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    made_with: str | None = None,
    fine_tuned: bool = False,
    overwrite: bool = False,
) -> Publication:
    """Chooses the files and renders the card. Sends and writes nothing.

    Args:
        folder: a Long-CLIP that this project made, or that was trained from one.
        repo_id: `USER/NAME`.
        results: results files of `evaluation/run.py`, the only source of figures.
        results_model: the model's name or fingerprint in them, where it is not the folder's or the repository's.
        base_model, relation, license, datasets, made_with: of the card, see `longclip_hf.conversion.card.make_card`.
        fine_tuned: the weights were trained, also where the folder does not show it.
        overwrite: replace a card in the folder that this project did not write.

    Raises:
        ConversionError: for a folder that lacks a file or holds an access token, results that do not fit, or a card
            that would be lost.
    """
    from longclip_hf.conversion import card

    folder = Path(folder).expanduser()
    card.check_hub_id(repo_id)
    if "/" not in repo_id:
        raise ConversionError(f"{repo_id} names no user or organisation: write USER/{repo_id}.")
    config = read_json(folder / "config.json")
    if config.get("model_type") not in ("clip", "clip_text_model") or not config.get("auto_map"):
        raise ConversionError(
            f"{folder} holds no Long-CLIP: config.json names the model_type {config.get('model_type')!r} and "
            f"{'its' if config.get('auto_map') else 'no'} code. Make one with conversion/stretch.py."
        )
    if results_model is not None and not results:
        raise ConversionError("--results-model is for --results FILE, which is missing.")
    has_image_tower = "vision_config" in config
    positions = (config.get("text_config") or config).get("max_position_embeddings", LENGTH)
    files, left_out = choose_files(folder, has_image_tower)
    origin = card.read_origin(folder, fine_tuned)
    if (folder / CARD).is_file() and not origin.own_card and not overwrite:
        raise ConversionError(
            f"{folder / CARD} is not of this project, and would be replaced. Keep a copy of it and give --overwrite."
        )
    called = list(dict.fromkeys([str(folder), str(folder.resolve()), folder.resolve().name, repo_id]))
    evaluations = card.read_evaluations([Path(file) for file in results], called, positions, results_model)
    made = card.make_card(
        folder, repo_id, origin, evaluations, base_model=base_model, relation=relation, license=license,
        datasets=datasets, made_with=made_with,
    )  # fmt: skip
    publication = Publication(
        folder, repo_id, made.text, files, left_out, made.unstated, positions, card.stock_class(config),
        has_image_tower,
    )  # fmt: skip
    _check_secrets(publication)
    return publication


def choose_files(folder: Path, has_image_tower: bool) -> tuple[list[str], list[str]]:
    """The names of files to send, the card aside, and what else is in the folder (`name/` is a folder).

    Raises:
        ConversionError: if one is missing that a model needs.
    """
    from longclip_hf.conversion.checkpoint import PROCESSOR_FILES
    from longclip_hf.conversion.folder import CODE_FILES

    code = [file.name for file in CODE_FILES]
    tokenizer = ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"]
    index = read_json(folder / "model.safetensors.index.json") if not (folder / "model.safetensors").is_file() else {}
    shards = sorted(set(index.get("weight_map", {}).values()))
    weights = ["model.safetensors.index.json", *shards] if shards else ["model.safetensors"]
    needed = ["config.json", *weights, *code, *tokenizer, *(["preprocessor_config.json"] if has_image_tower else [])]
    if missing := [name for name in needed if not (folder / name).is_file() or "/" in name]:
        raise ConversionError(
            f"{folder} lacks {', '.join(missing)}. Weights are published as safetensors, and the tokenizer in both of "
            "its formats: make the folder with conversion/ or training/, which write all of them."
        )
    allowed = {*needed, *PROCESSOR_FILES, "LICENSE"}
    there = {path.name: path.is_dir() for path in folder.iterdir()}
    files = sorted(name for name, is_folder in there.items() if name in allowed and not is_folder)
    left_out = [f"{name}/" if is_folder else name for name, is_folder in there.items() if name not in files]
    return files, sorted(name for name in left_out if name != CARD)


def check_loads(publication: Publication) -> None:
    """Loads what would be sent in a fresh process: its own code and stock CLIP agree on features, offline.

    Raises:
        ConversionError: if it does not load, or the two differ.
    """
    import os
    import subprocess
    import tempfile

    with tempfile.TemporaryDirectory() as work:
        staged = Path(work) / "staged"
        staged.mkdir()
        for name in publication.files:
            (staged / name).symlink_to((publication.folder / name).resolve())
        # The folder's code is run, and has no use for the token.
        env = {name: value for name, value in os.environ.items() if "TOKEN" not in name and name != "HF_HOME"}
        env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": work, "HF_MODULES_CACHE": f"{work}/modules"}
        arguments = [staged, publication.positions, publication.stock_class, publication.has_image_tower]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", CHECK, *map(str, arguments)],
            capture_output=True, text=True, errors="replace", cwd=work, env=env, check=False,
        )  # fmt: skip
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1].replace(str(staged), "it")
        raise ConversionError(
            f"{publication.folder} does not load in a fresh process, so nothing is sent: {_redact(reason)}"
        )


def upload(
    publication: Publication,
    *,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Published:
    """Sends the files in one commit. What the Hub has already is not sent again.

    Args:
        private: the repository, new or not, is to be private.
        revision: a branch, made from `main` if it is missing; `main` by default.
        tag: of the commit; it must be new.
        say: is told what goes wrong and is tried again.

    Raises:
        ConversionError: if the Hub refuses or cannot be reached; nothing half done is visible there.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        raise ConversionError("HF_HUB_OFFLINE is set, so nothing can be sent. Unset it.")
    if get_token() is None:
        raise ConversionError("There is no access token: log in with `hf auth login`, or set HF_TOKEN.")
    # Connections fail with requests' exceptions, which are OSErrors, or httpx's, which share a base with the Hub's.
    failures: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, HfHubHTTPError.__bases__[0])
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _send(HfApi(), publication, private, revision, tag)
        except failures as error:
            reason, is_passing = _explain(error, publication.repo_id)
            if is_passing and attempt == ATTEMPTS:
                reason += " Run the same command again later: what the Hub has by then is not sent twice."
            if not is_passing or attempt == ATTEMPTS:
                raise ConversionError(f"{publication.repo_id} was not published: {reason}") from None
            say(f"{reason} Trying again in {2**attempt} s.")
            time.sleep(2**attempt)
    raise AssertionError("the last attempt returns or raises")


def _send(api: "HfApi", publication: Publication, private: bool, revision: str | None, tag: str | None) -> Published:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo_id, branch = publication.repo_id, revision or "main"
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise ConversionError(f"{repo_id} is there already and public. Nothing was sent: make it private on the Hub.")
    if tag is not None:
        taken = next((ref.target_commit for ref in api.list_repo_refs(repo_id).tags if ref.name == tag), None)
        if taken is not None:
            raise ConversionError(f"{repo_id} has a tag {tag} already, of commit {taken[:12]}. Choose another --tag.")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    before = api.model_info(repo_id, revision=branch).sha
    stale = [name for name in api.list_repo_files(repo_id, revision=branch) if _is_stale(name, publication)]
    commit = api.create_commit(
        repo_id,
        operations=[
            # New ones for every attempt: they remember what was done with them.
            *(CommitOperationAdd(name, str(publication.folder / name)) for name in publication.files),
            CommitOperationAdd(CARD, publication.card.encode()),
            *(CommitOperationDelete(name) for name in stale),
        ],
        commit_message="Long-CLIP checkpoint and its card",
        revision=branch,
    )
    if tag is not None:
        api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return Published(f"{api.endpoint}/{repo_id}", commit.oid, commit.oid != before, stale)


def _is_stale(name: str, publication: Publication) -> bool:
    """Weights of an earlier version would be loaded instead of these, or beside them."""
    weights = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
    return name not in publication.files and any(fnmatch(name, pattern) for pattern in weights)


def _explain(error: Exception, repo_id: str) -> tuple[str, bool]:
    """What went wrong, in one line and without secrets, and whether it may pass by itself."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # of a file's upload
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = getattr(error, "server_message", None) or str(error)
    said = _redact(" ".join(said.split()))[:300]
    if status is None:
        # An error of a file here has a number; one of a connection has none.
        is_passing = not isinstance(error, ValueError | RuntimeError) and getattr(error, "errno", None) is None
        name = type(error).__name__
        return f"the connection failed ({name}: {said})." if is_passing else f"{name}: {said}", is_passing
    if status >= 500:
        return f"the Hub failed ({status}: {said}).", True
    remedy = REMEDIES.get(status, "the Hub refuses.").format(namespace=repo_id.split("/")[0])
    return f"{remedy} ({status}: {said})", False


def _redact(text: str) -> str:
    from huggingface_hub import get_token

    token = get_token()
    return TOKEN.sub("hf_***", text.replace(token, "hf_***") if token else text)


def _check_secrets(publication: Publication) -> None:
    from huggingface_hub import get_token

    token = get_token()
    for name in publication.names():
        if name.endswith(".safetensors"):
            continue
        text = publication.card if name == CARD else (publication.folder / name).read_text("utf-8", errors="replace")
        if TOKEN.search(text) or (token and token in text):
            raise ConversionError(
                f"{name} would hold an access token (hf_...). Take it out, and revoke it on the Hub."
            )


def write_card(publication: Publication) -> None:
    """The card that is sent, as the folder's own `README.md`."""

    work = publication.folder / f".{CARD}.incomplete"
    try:
        work.write_text(publication.card, encoding="utf-8")
        work.replace(publication.folder / CARD)
    except OSError as error:
        raise ConversionError(f"{publication.folder / CARD} could not be written: {error}.") from error
    finally:
        work.unlink(missing_ok=True)


def _parser() -> CommandParser:
    parser = CommandParser(prog="longclip-publish", description=__doc__)
    parser.add_argument("folder", type=Path, help="the checkpoint: stretched, converted or fine-tuned")
    parser.add_argument("repo", help="USER/NAME on the Hub")
    parser.add_argument("--yes", action="store_true", help="send it (default: show what would be sent, and its card)")
    card = parser.add_argument_group("the card")
    card.add_argument(
        "--results", type=Path, nargs="+", default=[], metavar="FILE",
        help="results.json of evaluation/run.py: no other figure gets into the card",
    )  # fmt: skip
    card.add_argument(
        "--results-model", metavar="NAME", help="its name or fingerprint in there, where it is not the folder's"
    )
    card.add_argument("--base-model", metavar="ID", help="the Hub id it was made from (default: as the folder says)")
    card.add_argument(
        "--relation", choices=("finetune", "merge", "quantized"),
        help="to the base model, in the Hub's words (default: finetune, also if stretched; quantized if converted)",
    )  # fmt: skip
    card.add_argument("--license", metavar="NAME", help="such as mit or apache-2.0 (default: as the folder says)")
    card.add_argument(
        "--dataset", action="append", default=[], metavar="ID", help="trained on; more than once for more"
    )
    card.add_argument("--made-with", metavar="COMMAND", help="the command that made the weights")
    card.add_argument("--fine-tuned", action="store_true", help="it was, though nothing in the folder shows it")
    card.add_argument("--overwrite", action="store_true", help="replace a README.md that is not of this project")
    there = parser.add_argument_group("on the Hub")
    there.add_argument("--private", action="store_true", help="only into a private repository; a new one will be")
    there.add_argument("--revision", metavar="BRANCH", help="the branch, made if it is missing (default: main)")
    there.add_argument("--tag", help="name the commit so; the tag must be new")
    return parser


def main(args: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for an error that the user can mend."""
    options = _parser().parse_args(args)

    def work() -> None:
        console, errors = consoles(options.quiet)
        publication = prepare(
            options.folder, options.repo, results=options.results, results_model=options.results_model,
            base_model=options.base_model, relation=options.relation, license=options.license,
            datasets=options.dataset, made_with=options.made_with, fine_tuned=options.fine_tuned,
            overwrite=options.overwrite,
        )  # fmt: skip
        _print_plan(console, publication, with_card=not options.yes)
        with errors.status("Loading it in a fresh process"):
            check_loads(publication)
        console.print("It loads in a fresh process, with its own code and as plain CLIP, with equal features.")
        if not options.yes:
            console.print(f"Nothing was sent. Send it to {options.repo} with --yes.", soft_wrap=True)
            return
        write_card(publication)
        published = upload(
            publication, private=options.private, revision=options.revision, tag=options.tag,
            say=lambda text: errors.print(text, markup=False, soft_wrap=True),
        )  # fmt: skip
        for name in published.removed:
            console.print(f"Removed there: {name}, weights of an earlier version.", soft_wrap=True)
        done = "Published in one commit" if published.is_new else "The Hub has exactly these files already"
        console.print(f"{done}: {published.url}", soft_wrap=True)
        console.print(
            f'Pinned: AutoModel.from_pretrained("{options.repo}", revision="{published.commit}", '
            "trust_remote_code=True)",
            soft_wrap=True,
            highlight=False,
        )

    return guarded(work, lambda: "the same command goes on, and what the Hub has is not sent again")


def _print_plan(console: Any, publication: Publication, with_card: bool) -> None:
    from rich.table import Table

    table = Table(
        "file", "size", "goes as", title=f"{publication.folder} -> {publication.repo_id}", title_justify="left"
    )
    table.columns[1].justify = "right"
    sizes = {name: publication.size(name) for name in publication.names()}
    for name, size in sizes.items():
        goes_as = "LFS" if name.endswith(".safetensors") or size > LFS_BYTES else "regular"
        table.add_row(name, f"{size:,}", goes_as)
    table.add_row(f"{len(sizes)} files", f"{sum(sizes.values()):,}", "one commit")
    console.print(table)
    if publication.left_out:
        console.print(f"Left out: {', '.join(publication.left_out)}.", soft_wrap=True)
    if publication.unstated:
        console.print(f"The card does not state {', '.join(publication.unstated)}.", soft_wrap=True)
    if with_card:
        console.rule(CARD)
        console.print(publication.card, soft_wrap=True)
        console.rule()


if __name__ == "__main__":
    sys.exit(main())
