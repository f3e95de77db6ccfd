import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import date
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, normalizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from src.evaluation import fingerprint
from src.evaluation.fingerprint import revision
from src.modules.encoder.encoder import RationaleEncoder
from src.modules.policy.model import Policy
from tests.conftest import ROOT
from tests.evaluation.builders import SETTINGS, encoder


def test_settings_and_weights_change_the_fingerprint(tiny_policy, monkeypatch):
    revisions = [
        revision(encoder(tiny_policy)),
        revision(encoder(tiny_policy, rationale=False)),
        revision(encoder(tiny_policy, temperature=0.5)),
        revision(encoder(tiny_policy, temperature=0.5, seed=1)),
        revision(encoder(tiny_policy, replace(SETTINGS, instruction="Other."))),
        revision(encoder(tiny_policy, replace(SETTINGS, query_instruction="Other."))),
        revision(encoder(tiny_policy, new_tokens=5)),
    ]
    revisions.append(revision(encoder(tiny_policy, bf16=True)))
    revisions += [revision(encoder(tiny_policy, rationale=side)) for side in ("query", "document")]
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "EMBEDDING_VERSION", fingerprint.EMBEDDING_VERSION + 1)
        revisions.append(revision(encoder(tiny_policy)))
    with torch.no_grad():
        tiny_policy.model.base_model.norm.weight[0] += 1e-4
    revisions.append(revision(encoder(tiny_policy)))
    assert len(set(revisions)) == len(revisions)


def test_harmless_settings_keep_the_fingerprint(tiny_policy):
    assert revision(encoder(tiny_policy)) == revision(encoder(tiny_policy, batch_tokens=2, seed=5, bf16=False))
    assert revision(encoder(tiny_policy, temperature=1.0)) == revision(encoder(tiny_policy, temperature=1.0, batch_tokens=2))
    assert revision(encoder(tiny_policy, rationale=False)) == revision(encoder(tiny_policy, new_tokens=9, rationale=False))


def remove_a_merge(policy: Policy) -> None:
    backend = json.loads(policy.tokenizer.backend_tokenizer.to_str())
    backend["model"]["merges"].pop()
    template, eos, pad = policy.tokenizer.chat_template, policy.tokenizer.eos_token, policy.tokenizer.pad_token
    backend = Tokenizer.from_str(json.dumps(backend))
    policy.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=pad)
    policy.tokenizer.chat_template = template


CHANGES = {
    "epsilon": lambda policy: setattr(policy.model.config, "rms_norm_eps", 1e-5),
    "rotation": lambda policy: policy.model.config.rope_parameters.update(rope_theta=1e6),
    "scaled rotation": lambda policy: policy.model.config.rope_parameters.update(rope_type="linear", factor=2.0),
    "end tokens": lambda policy: setattr(policy.model, "generation_config", GenerationConfig(eos_token_id=[1, 2])),
    "a merge": remove_a_merge,
    "lower case": lambda policy: setattr(policy.tokenizer.backend_tokenizer, "normalizer", normalizers.Lowercase()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_configs_and_tokenizers_change_it(tiny_policy, change):
    before, template = revision(encoder(tiny_policy)), tiny_policy.tokenizer.chat_template
    vocabulary = tiny_policy.tokenizer.get_vocab()
    change(tiny_policy)
    assert (tiny_policy.tokenizer.chat_template, tiny_policy.tokenizer.get_vocab()) == (template, vocabulary)
    assert revision(encoder(tiny_policy)) != before


def test_frozen_encoders_config_changes_it(tiny_policy_folder):
    policy = Policy.load(str(tiny_policy_folder), encoder="frozen")
    before = revision(encoder(policy))
    policy.frozen_encoder.config = copy.deepcopy(policy.model.config)
    assert revision(encoder(policy)) == before
    policy.frozen_encoder.config.rms_norm_eps = 1e-5
    assert revision(encoder(policy)) != before


def test_dated_template_changes_it_daily(tiny_policy, monkeypatch):
    def set_date(day):
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", SimpleNamespace(now=lambda: date(2026, 5, day)))

    tiny_policy.tokenizer.chat_template = "{{ strftime_now('%d %B') }}" + str(tiny_policy.tokenizer.chat_template)
    set_date(1)
    yesterdays = encoder(tiny_policy)
    before = revision(yesterdays)
    set_date(2)
    assert revision(encoder(tiny_policy)) != before
    assert revision(yesterdays) == before  # its prompts stay those that it was made with


ANOTHER = """
import sys
from src.modules.encoder.encoder import RationaleEncoder
from src.evaluation.fingerprint import revision
print(revision(RationaleEncoder.from_pretrained(sys.argv[1], device="cpu")))
"""


@pytest.mark.slow
def test_another_process_and_folder_give_the_same(tiny_policy_folder, tmp_path):
    own = RationaleEncoder.from_pretrained(tiny_policy_folder, device="cpu")
    own.policy.model.save_pretrained(tmp_path)
    own.policy.tokenizer.save_pretrained(tmp_path)
    own.settings.save(tmp_path)
    own.policy.tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=2)  # leaves traces in the tokenizer
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", ANOTHER, str(tmp_path)]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == revision(own)
