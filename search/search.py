"""Searches a table of embeddings with a text of any length, or with an image.

    longclip-search DIR "A red bicycle leans against a white wall, next to a wooden door ..."
    longclip-search DIR --file description.txt --where "price < 20" --k 20 --sheet found.png
    longclip-search DIR --image photo.jpg --json
    cat paragraph.txt | longclip-search DIR -

It says how many tokens of the text the model read, and the score of every row that it found: the cosine of the two.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longclip_hf.command import CommandParser, consoles, guarded
from longclip_hf.errors import SearchError

if TYPE_CHECKING:
    from longclip_hf.search.search_index import Answer


def main(args: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for a table, question or condition that the user can mend."""
    parser = CommandParser(prog="longclip-search", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="what longclip-embed wrote")
    parser.add_argument("text", nargs="?", metavar="TEXT", help='the question; "-" reads it from standard input')
    parser.add_argument("--file", type=Path, metavar="FILE", help="that holds the question")
    parser.add_argument("--image", type=Path, metavar="FILE", help="ask with an image")
    parser.add_argument("--k", type=int, default=10, metavar="N", help="rows that are shown, %(default)s")
    parser.add_argument("--where", metavar="SQL", help="""such as "price < 20 and title like '%%shoe%%'\"""")
    parser.add_argument(
        "--among", choices=("images", "texts"), help="what is searched; default: images, where there are any"
    )
    parser.add_argument("--exact", action="store_true", help="compare every row, though there is an index")
    parser.add_argument("--json", action="store_true", help="print all columns, as JSON")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="write the images that were found as one PNG")
    parser.add_argument("--model", help="where the model is now; it must be the one of the embeddings")
    parser.add_argument("--device", help="default: an accelerator, if there is one")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the code that comes with a checkpoint, as AutoModel does"
    )
    options = parser.parse_args(args)
    return guarded(lambda: run(options))


def run(options: Any) -> "Answer":
    """Searches, prints and writes.

    Raises:
        ValueError: for a table, model, question or condition that is not as it must be.
        ImportError: without the extra `search`.
    """
    text = _question(options)
    import transformers

    from longclip_hf.search.search_index import SearchIndex

    transformers.utils.logging.disable_progress_bar()
    index = SearchIndex(
        options.folder, options.model, device=options.device, trust_remote_code=options.trust_remote_code
    )
    answer = index.search(
        text, image=options.image, k=options.k, where=options.where, among=options.among, exact=options.exact
    )
    _, err = consoles(options.quiet)
    if options.json:
        print(json.dumps(_as_json(text, options, answer), indent=2, ensure_ascii=False, default=_said))
    else:
        for number, hit in enumerate(answer, 1):
            place = hit.location or f"row {hit.row} of {hit.source}"
            print(f"{number:3}  {hit.score:.4f}  {place}" + (f"  {' '.join(hit.text.split())}" if hit.text else ""))
    if text is not None:
        cut = f" of {answer.tokens:,}; the rest is beyond the model's length" if answer.read < answer.tokens else ""
        line = f"{answer.read:,} tokens were read{cut}."
        (err if not cut else consoles()[1]).print(line, soft_wrap=True)
    if not answer.hits:
        err.print("No row meets the condition." if options.where else "There is no row to find.", soft_wrap=True)
    if moved := sum(hit.is_moved for hit in answer):
        print(f"{moved} of these images are not where they were embedded from.", file=sys.stderr)
    if options.sheet is not None:
        from longclip_hf.search.contact_sheet import write_sheet

        write_sheet(answer.hits, options.sheet)
        err.print(f"Wrote {options.sheet}.", soft_wrap=True)
    return answer


def _question(options: Any) -> str | None:
    """The text, or None for an image."""
    given = [name for name in ("text", "file", "image") if getattr(options, name) is not None]
    if len(given) != 1:
        raise SearchError('Ask with one of: a text, "-" for standard input, --file, --image.')
    if options.image is not None:
        return None
    if options.file is not None:
        return str(options.file.read_text(encoding="utf-8", errors="replace"))
    return sys.stdin.read() if options.text == "-" else str(options.text)


def _as_json(text: str | None, options: Any, answer: "Answer") -> dict[str, Any]:
    hits = [
        {
            "score": hit.score, "source": hit.source, "row": hit.row, "location": hit.location, "text": hit.text,
            "columns": hit.columns,
        }
        for hit in answer
    ]  # fmt: skip
    question = {"text": text} if text is not None else {"image": str(options.image)}
    return {
        **question, "where": options.where, "tokens": answer.tokens, "read": answer.read, "exact": answer.exact,
        "hits": hits,
    }  # fmt: skip


def _said(value: Any) -> str:
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)


if __name__ == "__main__":
    sys.exit(main())
