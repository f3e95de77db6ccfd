import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from src.datamodules.files import find_files


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
