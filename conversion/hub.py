"""The Hub, both ways: what a conversion starts from is fetched, what it made is sent in one commit.

Every command ends: an endpoint that does not answer is given up after `LOOKUP_SECONDS` (or HF_HUB_ETAG_TIMEOUT), one
that asks to wait is asked again after that time, up to `LONGEST_WAIT`. Each failure is one line that says what to do.
"""

import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from longclip_hf.errors import ConversionError, LongCLIPError
from longclip_hf.files import notice

CARD = "README.md"
CARD_RECORD = "longclip"  # the key in a card's metadata of what the card says about how the folder was made
# Of an earlier version, these would be loaded instead of what is sent, or beside it.
WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
LOOKUP_SECONDS = 20.0
LONGEST_WAIT = 120.0
ATTEMPTS = 3
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_REMEDIES = {
    401: "the Hub does not accept the token. Log in again with `hf auth login`, or renew HF_TOKEN.",
    403: "the token may not do that. Make one that may write to {namespace}, in the Hub's settings.",
    404: "there is no such repository or user, or the token may not see it. Check the name.",
    409: "another change came in between, or the name is taken. Look at the repository, then run the command again.",
    412: "another change came in between. Run the command again.",
    413: "a file is too large for the Hub.",
    429: "the Hub asks to wait. Run the command again later.",
}
# Connections fail with requests' exceptions, which are OSErrors, or httpx's, which share a base with the Hub's.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
_CONNECTION = (OSError, _HTTP_ERROR)
T = TypeVar("T")


@dataclass(frozen=True)
class Published:
    """The commit that holds the files, whether it is a new one, and stale files of this kind that it removed."""

    url: str
    commit: str
    is_new: bool
    removed: list[str]


def fetched(source: str, revision: str | None, kind: str, get: Callable[[bool], str]) -> Path:
    """The folder of a Hub id.

    Args:
        source: the Hub id.
        revision: branch, tag or commit.
        kind: what it is, for errors: `"model"` or `"pipeline"`.
        get: downloads it, or (given True) finds what an earlier download left in the cache, which is taken, and said,
            where the Hub gives nothing.

    Raises:
        ConversionError: if there is no such repository, here or there, or it cannot be reached.
    """

    def ask() -> str:
        if not constants.HF_HUB_OFFLINE:
            # With a limit, which the client's own first question has not.
            HfApi().model_info(source, revision=revision, timeout=_limit())
        return get(False)

    try:
        return Path(_patiently(ask, source, passing=(429,), say=notice))
    except HFValidationError as error:
        reason = _one_line(error)
    except _Refused as refusal:
        reason = refusal.reason
        try:
            folder = Path(get(True)) if not isinstance(refusal.error, RevisionNotFoundError) else None
        except (OSError, _HTTP_ERROR, ValueError):
            folder = None
        if folder is not None:
            notice(f"{source} is taken from the cache, {folder}: {reason}")
            return folder
    raise ConversionError(
        f"{source}: no such folder here, and the Hub gave no such {kind} ({reason}). Check the name, the "
        f"connection and, for a gated or private {kind}, `hf auth login`; offline, name a folder that holds it."
    )


def full_name(repo_id: str) -> str:
    """`USER/NAME` of `NAME`, by the token in use.

    Raises:
        ConversionError: if there is no token, or the Hub does not know it.
    """
    if "/" in repo_id:
        return repo_id
    _check_login()
    try:
        name = _patiently(lambda: HfApi().whoami()["name"], repo_id)
    except _Refused as refusal:
        raise ConversionError(f"{repo_id} was not published: {refusal.reason}") from None
    return f"{name}/{repo_id}"


def upload(
    repo_id: str,
    files: Mapping[str, Path | bytes],
    *,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = notice,
) -> Published:
    """Sends the files in one commit. What the Hub has already is not sent again.

    Args:
        repo_id: `USER/NAME`.
        files: name there -> file here, or content.
        private: the repository, new or not, is to be private.
        revision: a branch, made from `main` if it is missing; `main` by default.
        tag: of the commit; it must be new.
        overwrite: replace a card there that this project did not write.
        say: is told what goes wrong and is tried again.

    Raises:
        ConversionError: if the repository is not as it should be, or the Hub refuses or cannot be reached; nothing
            half done is visible there.
    """
    if constants.HF_HUB_OFFLINE:
        raise ConversionError("HF_HUB_OFFLINE is set, so nothing can be sent. Unset it.")
    _check_login()
    try:
        return _patiently(
            lambda: _send(HfApi(), repo_id, files, private, revision, tag, overwrite),
            repo_id, passing=(429, *range(500, 600)), connections=True, say=say,
        )  # fmt: skip
    except _Refused as refusal:
        reason = refusal.reason
        if refusal.is_passing:
            reason += " Run the same command again later: what the Hub has by then is not sent twice."
        raise ConversionError(f"{repo_id} was not published: {reason}") from None


def redact(text: str) -> str:
    """`text` without the access token in use, and without what looks like one."""
    token = get_token()
    return _TOKEN.sub("hf_***", text.replace(token, "hf_***") if token else text)


def holds_token(text: str) -> bool:
    """Whether an access token stands in `text`."""
    return redact(text) != text


def is_own_card(card: Path) -> bool:
    """Whether this project wrote the card, by the record in its metadata."""
    try:
        return CARD_RECORD in ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError):
        return False


def _send(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, Path | bytes],
    private: bool,
    revision: str | None,
    tag: str | None,
    overwrite: bool,
) -> Published:
    branch = revision or "main"
    with suppress(RepositoryNotFoundError):
        api.model_info(repo_id, timeout=_limit())  # the first question has a limit; those after it find an answer
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.model_info(repo_id, timeout=_limit()).private:
        raise ConversionError(f"{repo_id} is there already and public. Nothing was sent: make it private on the Hub.")
    if tag is not None:
        taken = next((ref.target_commit for ref in api.list_repo_refs(repo_id).tags if ref.name == tag), None)
        if taken is not None:
            raise ConversionError(f"{repo_id} has a tag {tag} already, of commit {taken[:12]}. Choose another --tag.")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    before = api.model_info(repo_id, revision=branch, timeout=_limit()).sha
    there = api.list_repo_files(repo_id, revision=before)
    if CARD in there and not overwrite and not is_own_card(Path(hf_hub_download(repo_id, CARD, revision=before))):
        raise ConversionError(
            f"{repo_id} has a card (README.md) that is not of this project, and would be replaced. Nothing was sent: "
            "keep a copy of it and give longclip-publish --overwrite."
        )
    stale = [name for name in there if name not in files and any(fnmatch(name, pattern) for pattern in WEIGHTS)]
    commit = api.create_commit(
        repo_id,
        operations=[
            # New ones for every attempt: they remember what was done with them.
            *(CommitOperationAdd(name, str(file) if isinstance(file, Path) else file) for name, file in files.items()),
            *(CommitOperationDelete(name) for name in stale),
        ],
        commit_message="Long-CLIP checkpoint and its card",
        revision=branch,
        parent_commit=before,  # what was looked at above is what is replaced
    )
    if tag is not None:
        api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return Published(f"{api.endpoint}/{repo_id}", commit.oid, commit.oid != before, stale)


class _Refused(Exception):
    """What went wrong in the end, in one line; whether it may pass by itself; the error."""

    def __init__(self, reason: str, is_passing: bool, error: Exception) -> None:
        self.reason, self.is_passing, self.error = reason, is_passing, error


def _patiently(
    action: Callable[[], T],
    repo_id: str,
    passing: tuple[int, ...] = (429,),
    connections: bool = False,
    say: Callable[[str], None] = notice,
) -> T:
    """The result of `action`, which is tried again where the Hub answers with a status that is `passing`, and after
    failing `connections`.

    Raises:
        _Refused: with the last attempt's error, or the first one's that does not pass.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except (LongCLIPError, HFValidationError):  # ValueErrors too, and what they say is said
            raise
        except (OSError, _HTTP_ERROR, ValueError, RuntimeError) as failure:
            error = _cause(failure)
            status = getattr(getattr(error, "response", None), "status_code", None)
            # An error of a file here has a number; one of a connection has none.
            is_connection = status is None and isinstance(error, _CONNECTION) and getattr(error, "errno", None) is None
            reason = _explained(error, status, is_connection, repo_id)
            is_passing = status in passing or (is_connection and connections)
            wait = _retry_after(error) if status == 429 else 2.0**attempt
            if not is_passing or attempt == ATTEMPTS or wait > LONGEST_WAIT:
                raise _Refused(reason, is_passing, error) from None
            say(f"{reason} Trying again in {wait:.0f} s.")
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _cause(error: Exception) -> Exception:
    """What is behind an error that only says that something went wrong: of a file's upload, or of a cache's lookup."""
    has_response = getattr(error, "response", None) is not None
    cause = error.__cause__
    if not has_response and isinstance(error, RuntimeError | OSError) and isinstance(cause, Exception):
        return cause
    return error


def _explained(error: Exception, status: int | None, is_connection: bool, repo_id: str) -> str:
    """What went wrong, in one line and without secrets."""
    said = redact(_one_line(error, getattr(error, "server_message", None)))[:300]
    name = type(error).__name__
    if "Timeout" in name:
        limit = f"{_limit():.0f} s for a look-up, which HF_HUB_ETAG_TIMEOUT sets"
        return f"{constants.ENDPOINT} did not answer in time ({name}; {limit})."
    if status is None:
        return f"the connection failed ({name}: {said})." if is_connection else f"{name}: {said}"
    if status >= 500:
        return f"the Hub failed ({status}: {said})."
    remedy = _REMEDIES.get(status, "the Hub refuses.").format(namespace=repo_id.split("/")[0])
    if status == 429:
        remedy = f"the Hub asks to wait {_retry_after(error):.0f} s before the next request."
    return f"{remedy} ({status}: {said})"


def _one_line(error: Exception, said: str | None = None) -> str:
    return " ".join((said or str(error)).split()) or type(error).__name__


def _retry_after(error: Exception) -> float:
    """Seconds that an answer of 429 asks to wait: given as a number or as a date, or 10 where it does not say."""
    response: Any = getattr(error, "response", None)
    value = str(response.headers.get("Retry-After", "")).strip()
    try:
        seconds = float(value) if value.isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return 10.0
    return max(0.0, seconds)


def _limit() -> float:
    """Seconds that a look-up may take."""
    return float(constants.HF_HUB_ETAG_TIMEOUT) if os.environ.get("HF_HUB_ETAG_TIMEOUT") else LOOKUP_SECONDS


def _check_login() -> None:
    if get_token() is None:
        raise ConversionError("There is no access token: log in with `hf auth login`, or set HF_TOKEN.")
