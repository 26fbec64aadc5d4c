"""Files on this machine and in a bucket behave the same, and are written completely or not at all."""

import os

import fake_bucket
import pytest

from ivideo import files
from ivideo.errors import UserError


@pytest.fixture(params=["machine", "bucket"])
def folder(request, tmp_path):
    if request.param == "machine":
        yield str(tmp_path)
    else:
        with fake_bucket.bucket():
            yield "gs://bucket/a/folder"


def test_small_what_is_written_is_read(folder):
    path = f"{folder}/some file.txt"
    assert not files.exists(path) and files.list_names(folder) == []
    files.write_text(path, "0123456789")
    files.write_text(f"{folder}/some file.txt2", "")
    assert files.exists(path) and not files.exists(path[:-1])
    assert files.list_names(folder) == ["some file.txt", "some file.txt2"]
    assert files.read_bytes(path) == b"0123456789"
    assert files.read_bytes(path, 2, 5) == b"234" and files.read_bytes(path, 7) == b"789"
    assert files.read_bytes(f"{folder}/some file.txt2") == b""
    with files.open_read(path) as f:
        assert f.read(3) == b"012"


def test_small_json(folder):
    path = f"{folder}/a.json"
    files.write_json(path, {"a": [1, None]})
    assert files.read_json(path) == {"a": [1, None]}
    files.write_text(path, '{"a": ')
    with pytest.raises(UserError, match=r"a\.json cannot be read .*: copy it again"):
        files.read_json(path)
    with pytest.raises(UserError, match=r"none\.json cannot be read .*[Nn]o such file"):
        files.read_json(f"{folder}/none.json")


def test_small_what_fails_leaves_what_was_there(folder):
    path = f"{folder}/kept"
    files.write_text(path, "old")

    def fail():
        with files.atomic_write(path) as temporary, open(temporary, "w") as f:
            f.write("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert files.read_bytes(path) == b"old" and files.list_names(folder) == ["kept"]


def test_small_a_file_that_is_not_there(folder):
    with pytest.raises(FileNotFoundError, match="none"):
        files.read_bytes(f"{folder}/none")


def test_small_parts_of_a_file_are_read_and_folders_removed(folder):
    files.prepare_folders([f"{folder}/b/x"]) if not files.in_bucket(folder) else None
    for name in ("a", "b/x", "ba"):
        files.write_text(f"{folder}/{name}", "0123")
    path = f"{folder}/a"
    assert [files.read_bytes(path, *part) for part in ((1, 3), (2, 2), (3, None))] == [b"12", b"", b"3"]
    files.remove(f"{folder}/b")
    assert files.list_names(folder) == ["a", "ba"]
    files.remove(path)
    assert files.list_names(folder) == ["ba"]


def test_small_folders_of_a_bucket_are_told_apart():
    with fake_bucket.bucket() as objects:
        objects.update({"ab/c": b"1", "a/b/c": b"2", "a.txt": b"3"})
        assert files.list_names("gs://bucket/a") == files.list_names("gs://bucket/a/") == ["b"]
        assert files.list_names("gs://bucket") == ["a", "a.txt", "ab"]
        assert not files.exists("gs://bucket/a") and files.exists("gs://bucket/a.txt")


def test_small_paths_become_tensorstores():
    assert files.kvstore("gs://bucket/t5/step_7") == {"driver": "gcs", "bucket": "bucket", "path": "t5/step_7/"}
    assert files.kvstore("gs://bucket/") == {"driver": "gcs", "bucket": "bucket", "path": ""}
    assert files.kvstore("a/") == {"driver": "file", "path": f"{os.getcwd()}/a/"}
