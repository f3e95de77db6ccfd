"""How evaluate.py has a policy read its texts: settings of its own, unless the command line names others."""

from pathlib import Path

import pytest

import evaluate
from src.modules.encoder.export import load_policy
from src.modules.rollouts.hf import HFEngine
from tests.conftest import Compose


class SetUpForPrompts(HFEngine):
    """An engine that must know the longest prompt, as vLLM's."""

    def __init__(self, max_new_tokens: int, max_prompt_tokens: int = 1024) -> None:
        super().__init__(max_new_tokens)
        self.max_prompt_tokens = max_prompt_tokens


def test_prompts_are_the_models_own_or_those_that_are_named(compose: Compose, tiny_policy_folder: Path) -> None:
    policy, own = load_policy(tiny_policy_folder)
    named = ["instruction=Name it.", "max_prompt_tokens=77", "template_kwargs={enable_thinking: false}"]
    cfg = compose(*named, "device=cpu", config_name="evaluate")
    asked = evaluate.make_encoder(cfg, policy, own, rationale=True).settings
    assert (asked.instruction, asked.max_prompt_tokens, asked.template_kwargs) == ("Name it.", 77, {"enable_thinking": False})
    assert type(asked.template_kwargs) is dict
    assert evaluate.make_encoder(compose("device=cpu", config_name="evaluate"), policy, own, rationale=True).settings == own


@pytest.mark.parametrize(("named", "longest"), [([], 96), (["max_prompt_tokens=200"], 200)])
def test_an_engine_is_set_up_for_the_longest_prompt(compose: Compose, tiny_policy_folder: Path, named: list[str], longest: int) -> None:
    engine = "{_target_: tests.test_evaluate_settings.SetUpForPrompts, _partial_: true, max_prompt_tokens: 1024}"
    cfg = compose(*named, "device=cpu", "~engine", f"+engine={engine}", config_name="evaluate")
    encoder = evaluate.make_encoder(cfg, *load_policy(tiny_policy_folder), rationale=True)
    assert isinstance(encoder.engine, SetUpForPrompts)
    assert encoder.engine.max_prompt_tokens == encoder.settings.max_prompt_tokens == longest


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("benchmark=[]", r"^evaluate.py: benchmark names no task"),
        ("max_prompt_tokens=5", r"^evaluate.py: max_prompt_tokens=5 leaves no room for text"),
        ("max_prompt_tokens=0", r"^evaluate.py: encoder settings: max_prompt_tokens=0"),
    ],
)
def test_settings_without_sense_are_one_line(compose: Compose, tiny_policy_folder: Path, override: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message) as caught:
        evaluate.evaluate(compose(f"model={tiny_policy_folder}", override, config_name="evaluate"))
    assert "\n" not in str(caught.value)
