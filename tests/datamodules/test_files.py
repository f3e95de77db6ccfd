import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from src.datamodules.files import DataFile, find_files


def test_a_file_is_itself_whatever_its_suffix(tmp_path):
    (tmp_path / "mine.data").write_text("x")
    (found,) = find_files(str(tmp_path / "mine.data"), ["*.jsonl"])
    assert (found.path, found.name, found.stem) == (tmp_path / "mine.data", "mine.data", "mine")


def test_a_folder_is_its_matching_files_sorted_and_hidden_ones_are_left_out(tmp_path):
    for name in ("b.jsonl", "sub/a.jsonl", "c.parquet", "notes.txt", ".cache/x.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_files(str(tmp_path), ["*.jsonl", "*.parquet"])
    assert [file.name for file in found] == ["b.jsonl", "c.parquet", "sub/a.jsonl"]
    assert found[2].stem == "sub/a"
    assert all(file.path.is_file() for file in found)


def test_links_to_folders_are_told_unless_they_are_read_in_their_own_place(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    for folder in (data / "sub", other):
        folder.mkdir(parents=True)
        (folder / "a.jsonl").write_text("x")
    (data / "inner").symlink_to(data / "sub")
    (data / "empty").symlink_to(tmp_path / "nowhere")
    (data / ".hidden").symlink_to(other)
    assert [file.name for file in find_files(str(data), ["*.jsonl"])] == ["sub/a.jsonl"]
    (data / "sub" / "link").symlink_to(other)
    with pytest.raises(ValueError, match=r"has links to folders that lie elsewhere \(sub/link\): copy them there"):
        find_files(str(data), ["*.jsonl"])


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
def test_the_shards_of_a_set_have_one_stem(tmp_path, name, stem):
    assert DataFile(tmp_path / name, name).stem == stem


def folder_of(folder, *names):
    for name in names:
        (folder / name).write_text("x")
    return str(folder)


@pytest.mark.parametrize("packed", ["b.jsonl.gz", "b.jsonl.zst", "b.parquet.xz"])
def test_files_that_match_but_for_their_packing_are_not_passed_over(tmp_path, packed):
    with pytest.raises(ValueError, match=rf"holds {packed}, which \*\.jsonl or \*\.parquet leaves out: unpack them") as caught:
        find_files(folder_of(tmp_path, "a.jsonl", packed), ["*.jsonl", "*.parquet"])
    assert "\n" not in str(caught.value)


def test_gz_files_are_found_where_they_are_named_and_not_beside_what_was_packed(tmp_path):
    found = find_files(folder_of(tmp_path, "a.jsonl", "b.jsonl.gz"), ["*.jsonl", "*.jsonl.gz"])
    assert [file.name for file in found] == ["a.jsonl", "b.jsonl.gz"]
    with pytest.raises(ValueError, match=r"holds a\.jsonl both as they are and packed"):
        find_files(folder_of(tmp_path, "a.jsonl.gz"), ["*.jsonl", "*.jsonl.gz"])


def test_what_was_unpacked_is_read_and_its_origin_left_out(tmp_path):
    assert [file.name for file in find_files(folder_of(tmp_path, "a.txt", "a.txt.gz", "b.txt"), ["a.txt"])] == ["a.txt"]


def test_a_named_file_that_is_packed_otherwise_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst' is packed in a way that is not read here"):
        find_files(f"{folder_of(tmp_path, 'a.jsonl.zst')}/a.jsonl.zst", ["*.jsonl"])


def test_json_files_beside_json_lines_are_told(tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match=r"matches \*\.jsonl \(there is b\.json\): give datamodule"):
        find_files(folder_of(tmp_path, "b.json"), ["*.jsonl"])
    assert len(find_files(folder_of(tmp_path, "a.jsonl"), ["*.jsonl"])) == 1  # they may be about the records
    assert "b.json are not read" in caplog.text


def test_a_folder_without_such_files_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"matches \*\.jsonl or \*\.parquet: give datamodule\.path=<local file>"):
        find_files(str(tmp_path), ["*.jsonl", "*.parquet"])


@pytest.mark.parametrize("path", ["/no/such/data.jsonl", "no_such.jsonl", "../data/none", "a/b/c"])
def test_what_is_no_hub_name_is_not_looked_for_there(path, monkeypatch):
    monkeypatch.setattr("src.datamodules.files.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match="no such file or folder; give datamodule"):
        find_files(path, ["*.jsonl"])


def test_a_hub_out_of_reach_is_one_line_that_says_what_to_do():
    with pytest.raises(FileNotFoundError) as caught:  # the tests run with HF_HUB_OFFLINE=1
        find_files("nobody/nothing-of-this-name", ["*.txt"])
    message = str(caught.value)
    assert message.startswith("no data at 'nobody/nothing-of-this-name'")
    assert message.endswith("give datamodule.path=<local file or folder>")
    assert "\n" not in message
    assert isinstance(caught.value.__cause__, LocalEntryNotFoundError)


def test_a_data_set_on_the_hub_is_a_folder(tmp_path, monkeypatch):
    asked = {}

    def download(name, **settings):
        asked.update(settings, name=name)
        (tmp_path / "text.txt").write_text("x")
        return str(tmp_path)

    monkeypatch.setattr("src.datamodules.files.snapshot_download", download)
    (found,) = find_files("someone/texts", ["text.txt"], revision="abc")
    assert found.path == tmp_path / "text.txt"
    assert asked == {"name": "someone/texts", "repo_type": "dataset", "revision": "abc", "allow_patterns": ["text.txt"]}
