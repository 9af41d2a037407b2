"""Folders that appear whole or not at all, what killed runs leave, and files that lie where they belong."""

import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import longclip_hf.files as files_module
from longclip_hf.errors import FileError
from longclip_hf.files import DEEPEST, inside, new_file, new_folder, read_json, write_atomically


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden or not."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def checkpoint(folder: Path) -> Path:
    """What `overwrite` may replace: a folder with a config.json."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "file").write_text("old")
    return folder


class TestNewFolder:
    def test_appears_at_the_end_and_whole(self, tmp_path: Path) -> None:
        with new_folder(tmp_path / "deep" / "out", 0) as work:
            (work / "file").write_text("new")
            assert not (tmp_path / "deep" / "out").exists()
            assert work.parent == tmp_path / "deep"
            assert work.name.startswith(".out.") and work.name.endswith(".incomplete")
        assert tree(tmp_path) == {"deep": None, "deep/out": None, "deep/out/file": b"new"}

    @pytest.mark.parametrize("error", [ValueError, FileError, KeyboardInterrupt, SystemExit])
    @pytest.mark.parametrize("replaces", [True, False])
    def test_an_error_leaves_what_was_there(self, error: type[BaseException], replaces: bool, tmp_path: Path) -> None:
        if replaces:
            checkpoint(tmp_path / "out")
        before = tree(tmp_path)
        with pytest.raises(error, match="half-way"), new_folder(tmp_path / "out", 0, overwrite=True) as work:
            (work / "file").write_text("new")
            raise error("half-way")
        assert tree(tmp_path) == before

    def test_a_full_disk_half_way_is_named_and_leaves_nothing(self, tmp_path: Path) -> None:
        with (
            pytest.raises(FileError) as caught,
            new_folder(tmp_path / "out", 0) as work,
        ):
            (work / "file").write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(work / "file"))
        reason = f"[Errno {errno.ENOSPC}] No space left on device: '{work}/file'"
        assert str(caught.value) == f"{tmp_path}/out could not be written: {reason}."
        assert tree(tmp_path) == {}

    @pytest.mark.parametrize("full", [True, False])
    def test_is_refused_where_something_is(self, full: bool, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        if full:
            (tmp_path / "out" / "file").write_text("old")
        before = tree(tmp_path)
        with pytest.raises(FileError, match="out exists already"), new_folder(tmp_path / "out", 0):
            pass
        assert tree(tmp_path) == before

    def test_overwrite_replaces_all_of_it(self, tmp_path: Path) -> None:
        checkpoint(tmp_path / "out")
        (tmp_path / "out" / "below").mkdir()
        (tmp_path / "out" / "below" / "stale").write_text("old")
        with new_folder(tmp_path / "out", 0, overwrite=True) as work:
            (work / "file").write_text("new")
            assert (tmp_path / "out" / "below" / "stale").exists()
        assert tree(tmp_path) == {"out": None, "out/file": b"new"}

    def test_overwrite_fills_an_empty_folder(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with new_folder(tmp_path / "out", 0, overwrite=True) as work:
            (work / "file").write_text("new")
        assert tree(tmp_path) == {"out": None, "out/file": b"new"}

    @pytest.mark.parametrize("linked", [True, False])
    @pytest.mark.parametrize("name", ["photo.jpg", ".hidden", "below/config.json", "config.json/file", "config.json5"])
    def test_overwrite_replaces_checkpoints_only(self, name: str, linked: bool, tmp_path: Path) -> None:
        file = tmp_path / "mine" / name
        file.parent.mkdir(parents=True)
        file.write_text("mine")
        (tmp_path / "link").symlink_to("mine")
        before = tree(tmp_path)
        message = r"mine holds files and no checkpoint \(no config\.json\): --overwrite replaces checkpoints only"
        with (
            pytest.raises(FileError, match=message),
            new_folder(tmp_path / ("link" if linked else "mine"), 0, overwrite=True),
        ):
            pytest.fail("nothing is written")
        assert tree(tmp_path) == before and (tmp_path / "link").is_symlink()

    def test_overwrite_through_a_link(self, tmp_path: Path) -> None:
        checkpoint(tmp_path / "real")
        (tmp_path / "link").symlink_to("real")
        with new_folder(tmp_path / "link", 0, overwrite=True) as work:
            (work / "file").write_text("new")
        assert (tmp_path / "link").is_symlink()
        assert tree(tmp_path / "real") == tree(tmp_path / "link") == {"file": b"new"}
        assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}

    def test_a_failing_rename_restores_what_was_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        checkpoint(tmp_path / "out")
        before, rename = tree(tmp_path), Path.rename

        def failing(self: Path, target: Path) -> Path:
            if self.suffix == ".incomplete":
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(self), None, str(target))
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", failing)
        with (
            pytest.raises(FileError) as caught,
            new_folder(tmp_path / "out", 0, overwrite=True) as work,
        ):
            (work / "file").write_text("new")
        reason = f"[Errno {errno.EIO}] Input/output error: '{work}' -> '{tmp_path}/out'"
        assert str(caught.value) == f"{tmp_path}/out could not be written: {reason}."
        assert tree(tmp_path) == before

    def test_two_at_once_do_not_mix(self, tmp_path: Path) -> None:
        with (
            pytest.raises(FileError) as caught,
            new_folder(tmp_path / "out", 0) as slow,
        ):
            (slow / "file").write_text("slow")
            with new_folder(tmp_path / "out", 0) as quick:
                (quick / "file").write_text("quick")
        reason = f"[Errno {errno.ENOTEMPTY}] Directory not empty: '{slow}' -> '{tmp_path}/out'"
        assert str(caught.value) == f"{tmp_path}/out could not be written: {reason}."
        assert tree(tmp_path) == {"out": None, "out/file": b"quick"}

    @pytest.mark.parametrize("overwrite", [True, False])
    def test_a_file_is_never_replaced(self, overwrite: bool, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("mine")
        with (
            pytest.raises(FileError, match=r"is a file, and a folder is to be written|exists already"),
            new_folder(tmp_path / "out", 0, overwrite),
        ):
            pass
        assert tree(tmp_path) == {"out": b"mine"}

    def test_a_parent_that_is_a_file_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        with (
            pytest.raises(
                FileError,
                match=r"file/out could not be written: \[Errno \d+\] (Not a directory|File exists): '.*/file'\.$",
            ),
            new_folder(tmp_path / "file" / "out", 0),
        ):
            pass
        assert tree(tmp_path) == {"file": b"mine"}

    def test_no_space_is_said_before_writing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1_500_000, 1_500_000))
        with (
            pytest.raises(FileError, match="has 2 MB free and 600 MB are needed"),
            new_folder(tmp_path / "out", 6 * 10**8),
        ):
            pass
        assert tree(tmp_path) == {}
        with new_folder(tmp_path / "out", 1_500_000):
            pass
        assert tree(tmp_path) == {"out": None}

    def test_no_permission_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tmp_path.chmod(0o555)
        if os.geteuid() == 0:  # whom no mode keeps out

            def refuse(*args: Any, **kwargs: Any) -> str:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / ".out"))

            monkeypatch.setattr(files_module.tempfile, "mkdtemp", refuse)
        try:
            with (
                pytest.raises(
                    FileError,
                    match=r"out could not be written: \[Errno 13\] Permission denied: '.*/\.out.*'\.$",
                ),
                new_folder(tmp_path / "out", 0),
            ):
                pass
        finally:
            tmp_path.chmod(0o755)
        assert tree(tmp_path) == {}

    @pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o027, 0o750), (0o002, 0o775)])
    def test_is_as_open_as_any_new_folder(self, umask: int, mode: int, tmp_path: Path) -> None:
        before = os.umask(umask)
        try:
            with new_folder(tmp_path / "out", 0):
                pass
            assert os.umask(umask) == umask, "and the umask stays"
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == mode


# Writes half of `out`, says so, and waits to be killed; with `between`, after what it replaces was moved away.
HALF_WAY = """
import sys, time
from pathlib import Path
from longclip_hf.files import new_folder

rename = Path.rename
def stall(self, target):
    result = rename(self, target)
    if Path(target).suffix == ".replaced":
        print("half-way", flush=True)
        time.sleep(100)
    return result

if sys.argv[2] == "between":
    Path.rename = stall
with new_folder(Path(sys.argv[1]), 0, overwrite=True) as work:
    (work / "file").write_text("half")
    if sys.argv[2] != "between":
        print("half-way", flush=True)
        time.sleep(100)
"""


@contextmanager
def half_way(output: Path, where: str = "") -> Iterator[subprocess.Popen[str]]:
    """Another run for `output` that is half-way through; it is killed at the end."""
    child = subprocess.Popen([sys.executable, "-c", HALF_WAY, output, where], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "half-way\n"
        yield child
    finally:
        child.kill()
        child.communicate()


class TestLeftOver:
    def test_a_killed_runs_folder_is_named_and_removed(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with half_way(tmp_path / "out") as other:
            (left,) = tmp_path.iterdir()
            other.kill()
            other.wait()
            with new_folder(tmp_path / "out", 0):
                assert not left.exists()
        assert capsys.readouterr().err == f"Removed {left}, left by a run that was killed.\n"
        assert tree(tmp_path) == {"out": None}

    @pytest.mark.parametrize("name", ["out", "a*b", "[x]"])
    def test_a_live_runs_folder_stays(self, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with half_way(tmp_path / name):
            (live,) = tmp_path.iterdir()
            with new_folder(tmp_path / name, 0):
                pass
            assert (live / "file").read_text() == "half"
        assert capsys.readouterr().err == ""

    def test_what_a_killed_run_was_replacing_is_put_back(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = tree(checkpoint(tmp_path / "out"))
        with half_way(tmp_path / "out", "between"):
            assert not (tmp_path / "out").exists()
        with pytest.raises(FileError, match="out exists already"), new_folder(tmp_path / "out", 0):
            pass
        assert f"Put {tmp_path / 'out'} back, which a run that was killed had moved" in capsys.readouterr().err
        assert tree(tmp_path / "out") == before
        with new_folder(tmp_path / "out", 0, overwrite=True) as work:
            (work / "file").write_text("new")
        assert tree(tmp_path) == {"out": None, "out/file": b"new"}

    def test_a_live_run_keeps_what_it_replaces(self, tmp_path: Path) -> None:
        """Another run comes between its two renames: it takes nothing for left over."""
        checkpoint(tmp_path / "out")
        with half_way(tmp_path / "out", "between"):
            with new_folder(tmp_path / "out", 0, overwrite=True) as work:
                (work / "file").write_text("quick")
            assert (tmp_path / "out" / "file").read_text() == "quick"
            assert [(folder / "file").read_text() for folder in tmp_path.glob(".out.*.replaced")] == ["old"]

    def test_what_was_replaced_already_is_removed(self, tmp_path: Path) -> None:
        checkpoint(tmp_path / "out")
        checkpoint(tmp_path / ".out.1234.replaced")
        with new_folder(tmp_path / "out", 0, overwrite=True) as work:
            (work / "file").write_text("new")
        assert tree(tmp_path) == {"out": None, "out/file": b"new"}

    def test_links_and_files_of_that_name_stay(self, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / ".out.link.incomplete").symlink_to("mine")
        (tmp_path / ".out.file.incomplete").write_text("mine")
        before = tree(tmp_path)
        with new_file(tmp_path / "out", 0) as work:
            work.write_text("new")
        assert tree(tmp_path) == before | {"out": b"new"}


class TestInside:
    @pytest.mark.parametrize("name", ["../other/file", "link", "linked/file", "{tmp}/other/file", "loop", "nul\0"])
    def test_what_leads_out_is_refused(self, name: str, tmp_path: Path) -> None:
        for folder in ("home", "other"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "file").write_text(folder)
        (tmp_path / "home" / "link").symlink_to(tmp_path / "other" / "file")
        (tmp_path / "home" / "linked").symlink_to(tmp_path / "other")
        (tmp_path / "home" / "loop").symlink_to("loop")
        with pytest.raises(FileError, match=r"leads (out of its folder|nowhere)"):
            inside(tmp_path / "home", name.format(tmp=tmp_path))

    def test_what_stays_in_is_given(self, tmp_path: Path) -> None:
        (tmp_path / "real" / "sub").mkdir(parents=True)
        (tmp_path / "real" / "sub" / "file").write_text("it")
        (tmp_path / "real" / "link").symlink_to("sub/file")
        (tmp_path / "home").symlink_to("real")
        for name in ("link", "sub/file", "sub/../link", "new"):
            assert inside(tmp_path / "home", name) == tmp_path / "home" / name

    def test_a_snapshot_of_any_cache_is_read(self, tmp_path: Path) -> None:
        blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1234"
        for folder in (blobs, snapshot):
            folder.mkdir(parents=True)
        (blobs / "abc").write_text("{}")
        (snapshot / "config.json").symlink_to("../../blobs/abc")
        (tmp_path / "private").write_text("{}")
        (snapshot / "LICENSE").symlink_to("../../../private")
        assert read_json(inside(snapshot, "config.json")) == {}
        with pytest.raises(FileError, match="leads out of its folder"):
            inside(snapshot, "LICENSE")


def test_a_file_is_written_through_no_link_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "file").symlink_to("mine")
    (tmp_path / ".file.incomplete").symlink_to("mine")
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new" and not (tmp_path / "file").is_symlink()
    assert (tmp_path / "mine").read_text() == "mine"
    before = tree(tmp_path)

    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file", b"newer")
    assert tree(tmp_path) == before


def test_what_a_killed_process_left_of_a_file_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".file.0a_b1c2d.incomplete", ".file.mine.incomplete", ".other.0a_b1c2d.incomplete"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".file.linklink.incomplete").symlink_to(".file.mine.incomplete")
    with (tmp_path / ".file.inuse000.incomplete").open("w") as held:  # another process is writing
        fcntl.flock(held, fcntl.LOCK_EX)
        before = set(tree(tmp_path))
        write_atomically(tmp_path / "file", b"new")
        assert set(tree(tmp_path)) == before - {".file.0a_b1c2d.incomplete"} | {"file"}


@pytest.mark.parametrize("depth", [DEEPEST + 1, 100_000])
def test_deep_json_is_one_error(depth: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_text('{"a":' * depth + "1" + "}" * depth)
    with pytest.raises(FileError, match=r"is (no JSON file: .*recursion|nested more than 100 levels deep)"):
        read_json(tmp_path / "file")


def test_json_that_is_not_deep(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(json.dumps({"a": [[{"b": 1}]]}))
    assert read_json(tmp_path / "file") == {"a": [[{"b": 1}]]}
