"""Which files a path stands for, and which are refused."""

import os

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from src.datamodules.files import DataFile, find_files, inside


def folder_of(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return str(folder)


def names_in(path, *patterns):
    return [file.name for file in find_files(str(path), patterns or ["*.jsonl"])]


def test_named_file_needs_no_suffix(tmp_path):
    (found,) = find_files(f"{folder_of(tmp_path, 'mine.data')}/mine.data", ["*.jsonl"])
    assert (found.path, found.name, found.stem) == (tmp_path / "mine.data", "mine.data", "mine")


def test_folder_is_searched(tmp_path):
    folder = folder_of(tmp_path, "b.jsonl", "sub/a.jsonl", "c.parquet", "notes.txt", ".cache/x.jsonl")
    found = find_files(folder, ["*.jsonl", "*.parquet"])
    assert [file.name for file in found] == ["b.jsonl", "c.parquet", "sub/a.jsonl"]
    assert found[2].stem == "sub/a"
    assert all(file.path.is_file() for file in found)


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("data/train-00003-of-00005.parquet", "data/train"),
        ("train_00003-of-00005.jsonl.gz", "train"),
        ("data/00003-of-00005.parquet", "data"),
        ("00003-of-00005.parquet", "00003-of-00005"),
        ("hotpot.v2.jsonl.gz", "hotpot.v2"),
        ("one-of-a-kind.jsonl", "one-of-a-kind"),
    ],
)
def test_shards_share_a_stem(tmp_path, name, stem):
    assert DataFile(tmp_path / name, name).stem == stem


# ---- compressed files, JSON files


@pytest.mark.parametrize(
    ("names", "path", "patterns", "message"),
    [
        (["a.jsonl", "b.jsonl.gz"], "", ["*.jsonl"], r"holds b\.jsonl\.gz, .*datamodule\.files"),
        (["a.jsonl", "b.jsonl.zst"], "", ["*.jsonl"], r"holds b\.jsonl\.zst, .*datamodule\.files"),
        (["a.jsonl", "b.parquet.xz"], "", ["*.jsonl", "*.parquet"], r"holds b\.parquet\.xz, .*datamodule\.files"),
        (["a.jsonl", "a.jsonl.gz"], "", ["*.jsonl", "*.jsonl.gz"], r"holds a\.jsonl both plain and compressed"),
        (["a.jsonl", "a.jsonl.gz"], "*.jsonl*", ["*.jsonl"], r"holds a\.jsonl both plain and compressed"),
        (["a.jsonl.zst"], "a.jsonl.zst", ["*.jsonl"], r"a\.jsonl\.zst' is compressed"),
        (["b.json"], "", ["*.jsonl"], r"matches \*\.jsonl \(there is b\.json\)"),
        ([], "", ["*.jsonl", "*.parquet"], r"matches \*\.jsonl or \*\.parquet: give datamodule\.path"),
    ],
)
def test_unreadable_folder_is_named(tmp_path, names, path, patterns, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        names_in(f"{folder_of(tmp_path, *names)}/{path}", *patterns)


def test_compressed_and_json_files_beside_others(tmp_path, caplog):
    assert names_in(folder_of(tmp_path / "gz", "a.jsonl", "b.jsonl.gz"), "*.jsonl", "*.jsonl.gz") == ["a.jsonl", "b.jsonl.gz"]
    assert names_in(folder_of(tmp_path / "txt", "a.txt", "a.txt.gz", "b.txt"), "a.txt") == ["a.txt"]
    assert names_in(folder_of(tmp_path / "json", "a.jsonl", "b.json")) == ["a.jsonl"]  # b.json may be about the records
    assert "b.json are not read" in caplog.text


# ---- links, and names that lead elsewhere


def test_linked_folders(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    folder_of(tmp_path, "data/sub/a.jsonl", "other/a.jsonl")
    (data / "inner").symlink_to(data / "sub")
    (data / "empty").symlink_to(tmp_path / "nowhere")
    (data / ".hidden").symlink_to(other)
    assert names_in(data) == ["sub/a.jsonl"]
    (data / "sub" / "link").symlink_to(other)
    with pytest.raises(ValueError, match=r"link to a folder outside of it \(sub/link\)"):
        names_in(data)


def test_linked_file(tmp_path):
    folder_of(tmp_path, "key", "data/other.txt")
    (tmp_path / "data" / "notes.txt").symlink_to(tmp_path / "key")
    with pytest.raises(ValueError, match=r"'notes\.txt' leads out of"):
        names_in(tmp_path / "data", "*.txt")
    assert names_in(tmp_path / "key", "*.txt") == ["key"]


@pytest.mark.parametrize("name", ["../secret.jsonl", "/etc/passwd", "a/../../secret.jsonl", "link.jsonl", "folder/secret.jsonl"])
def test_inside_refuses_outer_names(tmp_path, name):
    folder_of(tmp_path, "secret.jsonl", "data/own.jsonl")
    (tmp_path / "data" / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (tmp_path / "data" / "folder").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"leads out of"):
        inside(tmp_path / "data", name)


def test_inside_follows_links_of_the_hub_cache(tmp_path):
    root, blob = tmp_path / "datasets--a--b" / "snapshots" / "abc", tmp_path / "datasets--a--b" / "blobs" / "123"
    folder_of(tmp_path / "datasets--a--b", "blobs/123", "snapshots/abc/sub/two.jsonl")
    (root / "one.jsonl").symlink_to(os.path.relpath(blob, root))
    (root / "three.jsonl").symlink_to("sub/two.jsonl")
    assert names_in(root) == ["one.jsonl", "sub/two.jsonl", "three.jsonl"]
    assert inside(root, "sub/../sub/two.jsonl").read_text() == "x"


# ---- the hub


@pytest.mark.parametrize("path", ["/no/such/data.jsonl", "no_such.jsonl", "../data/none", "a/b/c"])
def test_hub_is_not_asked_for_paths(path, monkeypatch):
    monkeypatch.setattr("src.datamodules.files.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match=r"no such file or folder; give datamodule\.path"):
        names_in(path)


def test_hub_out_of_reach():
    with pytest.raises(FileNotFoundError, match=r"^no data at 'nobody/nothing'.*give datamodule\.path=<local file or folder>$") as caught:
        names_in("nobody/nothing")  # the tests run with HF_HUB_OFFLINE=1
    assert isinstance(caught.value.__cause__, LocalEntryNotFoundError)


def test_hub_data_set_is_a_folder(tmp_path, monkeypatch):
    asked = {}

    def download(name, **settings):
        asked.update(settings, name=name)
        return folder_of(tmp_path, "text.txt")

    monkeypatch.setattr("src.datamodules.files.snapshot_download", download)
    (found,) = find_files("someone/texts", ["text.txt"], revision="abc")
    assert found.path == tmp_path / "text.txt"
    assert asked == {"name": "someone/texts", "repo_type": "dataset", "revision": "abc", "allow_patterns": ["text.txt"]}


def test_part_of_a_hub_data_set(tmp_path, monkeypatch):
    asked = {}

    def download(name, **settings):
        asked.update(settings, name=name)
        return folder_of(tmp_path, "triplet/train-00000-of-00001.parquet", "triplet/test-00000-of-00001.parquet", "pair/train.parquet")

    monkeypatch.setattr("src.datamodules.files.snapshot_download", download)
    (found,) = find_files("hf://datasets/someone/texts@v2/triplet", ["*.parquet"])
    assert found.path == tmp_path / "triplet" / "train-00000-of-00001.parquet"
    assert (asked["name"], asked["revision"], asked["allow_patterns"]) == ("someone/texts", "v2", ["triplet", "triplet/*.parquet"])
    (found,) = find_files("hf://datasets/someone/texts/pair/train.parquet", ["*.jsonl"])
    assert (found.name, asked["revision"]) == ("pair/train.parquet", None)
    assert names_in("hf://datasets/someone/texts/triplet/t*.parquet") == ["triplet/train-00000-of-00001.parquet"]


def test_what_to_download_is_said():
    with pytest.raises(FileNotFoundError, match=r"`hf download a/b --repo-type dataset --include 'c\*' --local-dir b`, copy"):
        names_in("hf://datasets/a/b/c")


# ---- patterns, lists, splits


def test_patterns_and_lists(tmp_path):
    folder_of(tmp_path, "a/x.jsonl", "a/deep/y.jsonl", "b/x.jsonl", "b/notes.txt")
    assert names_in(tmp_path / "*" / "*.jsonl") == ["a/x.jsonl", "b/x.jsonl"]
    assert names_in(tmp_path / "**" / "*.jsonl") == ["a/deep/y.jsonl", "a/x.jsonl", "b/x.jsonl"]
    both = find_files([str(tmp_path / "a" / "x.jsonl"), str(tmp_path / "b" / "x.jsonl"), str(tmp_path / "a" / "*.jsonl")], ["*.jsonl"])
    assert [file.name for file in both] == [f"{tmp_path}/a/x.jsonl", f"{tmp_path}/b/x.jsonl"]  # told apart, and each once
    with pytest.raises(FileNotFoundError, match=r"no file matches datamodule\.path='.*/\*\.csv'"):
        names_in(tmp_path / "*.csv")
    (tmp_path / "a" / "key.jsonl").symlink_to(tmp_path / "b" / "notes.txt")
    with pytest.raises(ValueError, match="leads out of"):
        names_in(tmp_path / "a" / "*.jsonl")


def test_other_splits_are_left_out(tmp_path, caplog):
    names = ["nli/dev.jsonl", "nli/train.jsonl", "test-0.jsonl", "trainer_notes.jsonl"]
    assert names_in(folder_of(tmp_path / "splits", *names)) == ["nli/train.jsonl", "trainer_notes.jsonl"]
    assert "nli/dev.jsonl, test-0.jsonl are not trained on" in caplog.text
    assert names_in(tmp_path / "splits", "*.jsonl", "dev.jsonl") == names  # asked for
    assert names_in(folder_of(tmp_path / "none", "test.jsonl", "latest.jsonl")) == ["latest.jsonl", "test.jsonl"]
