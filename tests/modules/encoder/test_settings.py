import json
from pathlib import Path

import pytest

from src.modules.encoder.settings import EncoderSettings
from src.modules.prompt.renderer import GRACE_INSTRUCTION


def test_save_and_load(tmp_path: Path) -> None:
    settings = EncoderSettings(
        "Résumez.", max_prompt_tokens=77, max_new_tokens=5, pooling="eos", layer=-2, template_kwargs={"enable_thinking": False}
    )
    settings.save(tmp_path)
    assert EncoderSettings.load(tmp_path) == settings


def test_settings_of_earlier_exports(tmp_path: Path) -> None:
    for before, now in ((True, "both"), (False, "none")):
        (tmp_path / "grace.json").write_text(json.dumps({"rationale": before}))
        assert EncoderSettings.load(tmp_path).rationale == now


def test_folder_without_settings_has_the_papers(tmp_path: Path) -> None:
    settings = EncoderSettings.load(tmp_path)
    assert (settings.instruction, settings.max_prompt_tokens) == (GRACE_INSTRUCTION, 1024)
    assert (settings.pooling, settings.layer) == ("mean", -1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"instruction": "a", "colour": 1}', r"grace.json has settings that are not known here: colour"),
        ("{", r"grace.json is not JSON"),
        ("[1]", r"grace.json is not a JSON object"),
        (json.dumps({"max_new_tokens": 0}), r"max_new_tokens=0, it must be at least 1"),
        (json.dumps({"pooling": "cls"}), r"pooling='cls' does not exist; it is mean, eos, max"),
        (json.dumps({"rationale": "answer"}), "rationale='answer': it is both, query, document or none"),
        (json.dumps({"layer": -3}), r"layer=-3; it is -1 \(the last\) or -2"),
    ],
)
def test_bad_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "grace.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        EncoderSettings.load(tmp_path)
