"""Publishes a Long-CLIP folder on the Hugging Face Hub, with a card that claims what is known and measured.

    python conversion/publish.py long-clip USER/long-clip                          # shows what would be sent
    python conversion/publish.py long-clip USER/long-clip --yes
    python conversion/publish.py tuned USER/tuned --base-model openai/clip-vit-base-patch16 --license mit \\
        --dataset USER/captions --made-with "python training/train.py --recipe paper ..." \\
        --results evaluation/results.json --yes --private --tag v1

Before anything is sent, the very files are loaded in a fresh process, with their own code and as a plain CLIP, and
must give the same features. That code is this project's, to the last byte, or the folder is refused. Weights in
safetensors, code, tokenizers, processor and card go up in one commit; everything else in the folder stays here and is
named. The token is that of `hf auth login` or of HF_TOKEN. An upload
that was interrupted is repeated with the same command: what the Hub has is not sent again.
"""

import os
import site
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longclip_hf.command import CommandParser, consoles, guarded
from longclip_hf.errors import ConversionError
from longclip_hf.files import inside, read_json, write_atomically
from modeling_longclip.defaults import LENGTH

CARD = "README.md"
LFS_BYTES = 10 * 2**20  # the Hub's limit for files outside git-LFS, in which safetensors always are
LOAD_CHECK = Path(__file__).with_name("load_check.py")
# Of the environment, what the process that runs a folder's code needs. It has no use for any secret.
_PASSED_ON = (
    "PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "SYSTEMROOT", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip


@dataclass(frozen=True)
class Publication:
    """A folder as it would be published: `files` of it, without the card, which is `card`.

    Its code is this project's own, whether the folder has it to the last byte or an earlier version (`updates_code`).
    """

    folder: Path
    repo_id: str
    card: str
    files: list[str]
    left_out: list[str]
    unstated: list[str]
    positions: int
    stock_class: str
    has_image_tower: bool
    updates_code: bool = False

    def names(self) -> list[str]:
        return sorted([*self.files, CARD])

    def contents(self) -> dict[str, Path | bytes]:
        """What is sent: name there -> file here, or content."""
        from longclip_hf.conversion.folder import CODE_FILES

        code = {file.name: file for file in CODE_FILES}
        files: dict[str, Path | bytes] = {name: code.get(name, self.folder / name) for name in self.files}
        return files | {CARD: self.card.encode()}


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
    update_code: bool = False,
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
        update_code: send this version's code in the place of the folder's, which is then neither run nor sent.

    Raises:
        ConversionError: for a folder that lacks a file, names or holds the code of others, or holds an access token;
            for results that do not fit, or a card that would be lost.
        FileError: if a file leads out of the folder.
    """
    from longclip_hf.conversion import card

    folder = Path(folder).expanduser()
    card.check_hub_id(repo_id)
    if "/" not in repo_id:
        raise ConversionError(f"{repo_id} names no user or organisation: write USER/{repo_id}.")
    config = read_json(inside(folder, "config.json"))
    if config.get("model_type") not in ("clip", "clip_text_model") or not config.get("auto_map"):
        raise ConversionError(
            f"{folder} holds no Long-CLIP: config.json names the model_type {config.get('model_type')!r} and "
            f"{'its' if config.get('auto_map') else 'no'} code. Make one with conversion/stretch.py, or with "
            f"longclip-convert {folder} --output DIR if its table of positions is long already."
        )
    if results_model is not None and not results:
        raise ConversionError("--results-model is for --results FILE, which is missing.")
    has_image_tower = "vision_config" in config
    text = config.get("text_config") or config
    positions = text.get("max_position_embeddings", LENGTH) if isinstance(text, dict) else None
    if not isinstance(positions, int) or positions < 1:
        raise ConversionError(f"{folder / 'config.json'} names {positions!r} positions, and no number of them.")
    files, left_out = choose_files(folder, has_image_tower, update_code)
    _check_code(folder, files, update_code)
    inside(folder, CARD)
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
        has_image_tower, update_code,
    )  # fmt: skip
    _check_secrets(publication)
    return publication


def choose_files(folder: Path, has_image_tower: bool, update_code: bool = False) -> tuple[list[str], list[str]]:
    """The names of files to send, the card aside, and what else is in the folder (`name/` is a folder).

    Raises:
        ConversionError: if one is missing that a model needs.
        FileError: if one leads out of the folder.
    """
    from longclip_hf.conversion.checkpoint import PROCESSOR_FILES
    from longclip_hf.conversion.folder import CODE_FILES
    from longclip_hf.conversion.weight_files import shards_of

    code = [file.name for file in CODE_FILES]
    tokenizer = ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"]
    index = inside(folder, "model.safetensors.index.json")
    has_shards = not (folder / "model.safetensors").is_file() and index.is_file()
    weights = [index.name, *sorted(shards_of(index))] if has_shards else ["model.safetensors"]
    needed = ["config.json", *weights, *tokenizer, *(["preprocessor_config.json"] if has_image_tower else [])]
    needed += [] if update_code else code
    if missing := [name for name in needed if "/" in name or not inside(folder, name).is_file()]:
        raise ConversionError(
            f"{folder} lacks {', '.join(missing)}. Weights are published as safetensors, and the tokenizer in both of "
            "its formats: make the folder with conversion/ or training/, which write all of them."
        )
    allowed = {*needed, *code, *PROCESSOR_FILES, "LICENSE"}
    there = {path.name: path.is_dir() for path in folder.iterdir()}
    files = {name for name, is_folder in there.items() if name in allowed and not is_folder}
    for name in files:
        inside(folder, name)
    left_out = [f"{name}/" if is_folder else name for name, is_folder in there.items() if name not in files]
    return sorted(files.union(code)), sorted(name for name in left_out if name != CARD)


def _check_code(folder: Path, files: Sequence[str], update_code: bool) -> None:
    """Whether the folder holds and names no code but this project's: loading it runs both."""
    from longclip_hf.conversion.folder import CODE_FILES
    from longclip_hf.conversion.settings import VOCABULARIES, without_foreign_code

    differing = [
        file.name for file in CODE_FILES if not update_code and (folder / file.name).read_bytes() != file.read_bytes()
    ]
    if differing:
        raise ConversionError(
            f"{folder} has code that is not this version's, which is neither run nor sent: {', '.join(differing)}. If "
            "an earlier version wrote it, --update-code sends this version's instead; code of your own is published "
            "with `hf upload`."
        )
    for name in files:
        if name.endswith(".json") and name not in VOCABULARIES:
            _, foreign = without_foreign_code(read_json(folder / name))
            if foreign:
                raise ConversionError(
                    f"{folder / name} names the code of others: {', '.join(foreign)}. Whoever trusts {folder.name} "
                    "would run it. Take it out."
                )


def check_loads(publication: Publication) -> None:
    """Loads what would be sent in a fresh process: its own code and stock CLIP agree on features, offline.

    That process has a home of its own and no secret of this one's environment.

    Raises:
        ConversionError: if it does not load, or the two differ.
    """
    from longclip_hf.conversion.hub import redact

    with tempfile.TemporaryDirectory() as work:
        staged = Path(work) / "staged"
        staged.mkdir()
        for name, content in publication.contents().items():
            if isinstance(content, Path):
                (staged / name).symlink_to(content.resolve())
        arguments = [staged, publication.positions, publication.stock_class, publication.has_image_tower]
        done = subprocess.run(
            [sys.executable, "-P", "-W", "ignore", str(LOAD_CHECK), *map(str, arguments)],
            capture_output=True, text=True, errors="replace", cwd=work, env=_environment(work), check=False,
        )  # fmt: skip
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1].replace(str(staged), "it")
        raise ConversionError(
            f"{publication.folder} does not load in a fresh process, so nothing is sent: {redact(reason)}"
        )


def _environment(work: str) -> dict[str, str]:
    """Of a process that runs a folder's code: no token, no key, no `~/.netrc`."""
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    caches = {"HF_HUB_OFFLINE": "1", "HF_HOME": work, "HF_MODULES_CACHE": f"{work}/modules"}
    homes = {"HOME": work, "USERPROFILE": work, "TMPDIR": work, "TEMP": work, "TMP": work}
    if site.ENABLE_USER_SITE:  # found by the home of before, and transformers may be there
        homes["PYTHONUSERBASE"] = site.getuserbase()
    return passed_on | caches | homes


def _check_secrets(publication: Publication) -> None:
    from longclip_hf.conversion.hub import holds_token

    for name, content in publication.contents().items():
        if name.endswith(".safetensors"):
            continue
        text = content.decode() if isinstance(content, bytes) else content.read_text("utf-8", errors="replace")
        if holds_token(text):
            raise ConversionError(
                f"{name} would hold an access token (hf_...). Take it out, and revoke it on the Hub."
            )


def write_card(publication: Publication) -> None:
    """The card that is sent, as the folder's own `README.md`, and the code where it is updated."""
    from longclip_hf.conversion.folder import CODE_FILES

    try:
        write_atomically(publication.folder / CARD, publication.card.encode())
        for file in CODE_FILES if publication.updates_code else ():
            write_atomically(publication.folder / file.name, file.read_bytes())
    except OSError as error:
        raise ConversionError(f"{publication.folder / CARD} could not be written: {error}.") from error


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
    card.add_argument(
        "--overwrite", action="store_true", help="replace a README.md that is not of this project, here and there"
    )
    parser.add_argument(
        "--update-code", action="store_true",
        help="send this version's code, not that of the earlier version which wrote the folder",
    )  # fmt: skip
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
            overwrite=options.overwrite, update_code=options.update_code,
        )  # fmt: skip
        _print_plan(console, publication, with_card=not options.yes)
        with errors.status("Loading it in a fresh process"):
            check_loads(publication)
        console.print("It loads in a fresh process, with its own code and as plain CLIP, with equal features.")
        if not options.yes:
            console.print(f"Nothing was sent. Send it to {options.repo} with --yes.", soft_wrap=True)
            return
        from longclip_hf.conversion.hub import upload

        write_card(publication)
        published = upload(
            options.repo, publication.contents(), private=options.private, revision=options.revision,
            tag=options.tag, overwrite=options.overwrite, say=lambda text: errors.print(text, soft_wrap=True),
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
    contents = publication.contents()
    sizes = {
        name: len(content) if isinstance(content, bytes) else content.stat().st_size
        for name, content in sorted(contents.items())
    }
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
