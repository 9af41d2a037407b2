"""Serves a page that searches a table of embeddings: a long text or an image, conditions, pictures.

    longclip-serve DIR                    # http://127.0.0.1:7860
    longclip-serve DIR --host 0.0.0.0     # for others too: whoever reaches it may search, and see what is found

The page counts tokens while you type, and marks what a stock CLIP of 77 tokens would not have read. It shows images of
rows that were found, and serves no other file.
"""

import sys
from pathlib import Path
from typing import Any

from longclip_hf.command import CommandParser, consoles, guarded
from longclip_hf.errors import SearchError


def main(args: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for a table, model or address that the user can mend."""
    parser = CommandParser(prog="longclip-serve", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="what longclip-embed wrote")
    parser.add_argument("--host", default="127.0.0.1", help="address that is listened at, %(default)s")
    parser.add_argument("--port", type=int, default=7860, help="%(default)s")
    parser.add_argument("--model", help="where the model is now; it must be the one of the embeddings")
    parser.add_argument("--device", help="default: an accelerator, if there is one")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the code that comes with a checkpoint, as AutoModel does"
    )
    options = parser.parse_args(args)
    return guarded(lambda: run(options), lambda: "the page is closed")


def run(options: Any) -> None:
    """Serves until it is interrupted.

    Raises:
        ValueError: for a table, model or address that is not as it must be.
        ImportError: without the extras `search` and `serve`.
    """
    try:
        from longclip_hf.search.page import make_page
    except ImportError as error:
        raise ImportError('The page needs gradio: pip install "longclip-hf[search,serve]"') from error
    from longclip_hf.search.search_index import SearchIndex

    out, _ = consoles(options.quiet)
    index = SearchIndex(
        options.folder, options.model, device=options.device, trust_remote_code=options.trust_remote_code
    )
    page = make_page(index)
    try:
        _, url, _ = page.launch(
            server_name=options.host, server_port=options.port, quiet=True, prevent_thread_lock=True, show_error=True,
            max_file_size="50mb",
        )  # fmt: skip
    except OSError as error:
        raise SearchError(
            f"{options.host}:{options.port} cannot be listened at: {error}. Try another --port."
        ) from error
    out.print(f"Searching {options.folder} at {url} (Ctrl-C ends it).", soft_wrap=True)
    page.block_thread()


if __name__ == "__main__":
    sys.exit(main())
