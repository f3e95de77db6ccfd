import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from src.utils.atomic import make_folder_once, write_atomic


def test_folder_is_made_once(tmp_path):
    def write(partial):
        (partial / "file").write_text("x")
        time.sleep(0.2)
        made.append(partial)

    made = []
    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(lambda _: make_folder_once(tmp_path / "new" / "folder", write), range(3)))
    assert folders == [tmp_path / "new" / "folder"] * 3
    assert len(made) == 1
    assert [path.name for path in folders[0].iterdir()] == ["file"]


def test_failure_leaves_no_folder(tmp_path):
    def broken(partial):
        (partial / "file").write_text("x")
        raise OSError("disk full")

    (tmp_path / "folder.tmp" / "old").mkdir(parents=True)  # of a process that was killed
    with pytest.raises(OSError, match="disk full"):
        make_folder_once(tmp_path / "folder", broken)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_file_is_replaced(tmp_path):
    for text in ("one", "zwölf"):
        write_atomic(tmp_path / "new" / "file.txt", text)
    assert [path.read_text(encoding="utf-8") for path in (tmp_path / "new").iterdir()] == ["zwölf"]
