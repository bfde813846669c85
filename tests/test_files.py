"""Files are written whole or not at all, and no symbolic link is followed."""

import os
import stat

import pytest

from seqzoo.files import (
    LinkError,
    append,
    inside,
    lock,
    remove_left,
    replacing,
    replacing_by_name,
    without_links,
    write_bytes,
    write_json,
    write_text,
)


def by_name(path, text):
    """As a library writes that is given a name, and makes the file anew with a mode of its own."""
    with replacing_by_name(path) as temporary:
        temporary.unlink()
        temporary.write_text(text)
        temporary.chmod(0o600)


WRITERS = {
    "write_text": write_text,
    "write_bytes": lambda path, text: write_bytes(path, text.encode()),
    "write_json": lambda path, text: write_json(path, {"text": text}),
    "replacing_by_name": by_name,
}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    return path


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", ["file", "file.tmp"])
def test_a_link_is_replaced_and_not_followed(folder, victim, writer, name):
    (folder / name).symlink_to(victim)
    WRITERS[writer](folder / "file", "new")
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert not (folder / "file").is_symlink()
    assert "new" in (folder / "file").read_text()


@pytest.mark.parametrize("writer", WRITERS)
def test_a_link_to_nothing_makes_no_file_there(folder, tmp_path, writer):
    (folder / "file.tmp").symlink_to(tmp_path / "nothing")
    WRITERS[writer](folder / "file", "new")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("left", ["file", "folder"])
@pytest.mark.parametrize("writer", WRITERS)
def test_what_a_killed_process_left_goes_with_the_next_write(folder, left, writer):
    if left == "file":
        (folder / "file.tmp").write_text("half")
    else:
        (folder / "file.tmp").mkdir()
        (folder / "file.tmp" / "file").write_text("half")
    WRITERS[writer](folder / "file", "new")
    assert [path.name for path in folder.iterdir()] == ["file"]


@pytest.mark.parametrize("writer", WRITERS)
def test_all_files_have_the_mode_that_the_umask_gives(folder, writer):
    before = os.umask(0o027)
    try:
        WRITERS[writer](folder / "file", "new")
        append(folder / "appended", "")
        lock(folder / "lock", pytest.fail).close()
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}


@pytest.mark.parametrize("writing", [replacing, replacing_by_name])
def test_the_old_file_stays_until_the_new_one_is_whole(folder, writing):
    path = folder / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), writing(path):  # noqa: PT012
        assert path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(folder.iterdir()) == [path]


def test_appending_adds_and_follows_no_link(folder, victim):
    append(folder / "file", "one\n")
    append(folder / "file", "two\n")
    assert (folder / "file").read_text() == "one\ntwo\n"
    (folder / "link").symlink_to(victim)
    with pytest.raises(LinkError, match="link is a symbolic link"):
        append(folder / "link", "three\n")


def test_a_lock_keeps_what_the_file_holds_and_follows_no_link(folder, victim):
    (folder / "lock").write_text("held before")
    with lock(folder / "lock", pytest.fail):
        assert (folder / "lock").read_text() == "held before"
        with pytest.raises(RuntimeError, match="busy"):
            lock(folder / "lock", lambda: (_ for _ in ()).throw(RuntimeError("busy")))
    lock(folder / "lock", pytest.fail).close()
    (folder / "link").symlink_to(victim)
    with pytest.raises(LinkError):
        lock(folder / "link", pytest.fail)


def test_folders_that_are_links_are_not_entered(folder, victim):
    (folder / "link").symlink_to(victim.parent)
    (folder / "deep" / "er").mkdir(parents=True)
    assert inside(folder, "deep") == without_links(folder / "deep") == folder / "deep"
    assert inside(folder, "none") == without_links(folder / "none") == folder / "none"
    (folder / "deep" / "er" / "link").symlink_to(victim)
    for refused in (lambda: inside(folder, "link"), lambda: without_links(folder / "link")):
        with pytest.raises(LinkError):
            refused()
    with pytest.raises(LinkError, match="deep/er/link"):
        without_links(folder / "deep")


def test_folders_that_a_user_names_may_be_links(folder, tmp_path):
    (tmp_path / "named").symlink_to(folder)
    write_text(tmp_path / "named" / "file", "new")
    append(tmp_path / "named" / "lines", "new")
    lock(tmp_path / "named" / "lock", pytest.fail).close()
    assert sorted(path.name for path in folder.iterdir()) == ["file", "lines", "lock"]


@pytest.mark.parametrize("write", [lambda path: append(path, "x"), lambda path: lock(path, lambda: None)])
def test_a_pipe_is_neither_waited_for_nor_written_to(folder, write):
    os.mkfifo(folder / "name")
    with pytest.raises(LinkError, match="name is no regular file"):
        write(folder / "name")


def test_what_killed_processes_left_is_removed_and_nothing_else(folder, victim):
    for name in ("a.tmp", "stage/b.tmp", "stage/deep/c.tmp", "other/d.tmp", "stage/e"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "stage" / "folder.tmp").mkdir()
    (folder / "stage" / "link.tmp").symlink_to(victim.parent)
    remove_left(folder, "stage", "none")
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()) == [
        "other/d.tmp",
        "stage/e",
    ]
    assert not (folder / "stage" / "folder.tmp").exists()
