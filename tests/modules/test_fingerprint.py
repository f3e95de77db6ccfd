from dataclasses import replace

import torch

from src.modules.encoder import RationaleEncoder
from src.modules.fingerprint import revision
from src.modules.policy import Policy
from src.modules.rollout_hf import HFRollouts
from src.modules.settings import EncoderSettings

SETTINGS = EncoderSettings(instruction="Name the terms.", max_prompt_tokens=96, max_new_tokens=4)


def encoder(policy: Policy, settings: EncoderSettings = SETTINGS, new_tokens: int = 4, **options: object) -> RationaleEncoder:
    return RationaleEncoder(policy, settings, HFRollouts(new_tokens), **options)  # type: ignore[arg-type]


def test_whatever_moves_an_embedding_has_a_revision_of_its_own(tiny_policy: Policy) -> None:
    revisions = [
        revision(encoder(tiny_policy)),
        revision(encoder(tiny_policy, rationale=False)),
        revision(encoder(tiny_policy, temperature=0.5)),
        revision(encoder(tiny_policy, temperature=0.5, seed=1)),
        revision(encoder(tiny_policy, replace(SETTINGS, instruction="Other."))),
        revision(encoder(tiny_policy, replace(SETTINGS, query_instruction="Other."))),
        revision(encoder(tiny_policy, new_tokens=5)),
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        revisions.append(revision(encoder(tiny_policy)))
    with torch.no_grad():
        tiny_policy.model.base_model.norm.weight[0] += 1e-4
    revisions.append(revision(encoder(tiny_policy)))
    assert len(set(revisions)) == len(revisions)


def test_what_moves_none_has_not(tiny_policy: Policy) -> None:
    assert revision(encoder(tiny_policy)) == revision(encoder(tiny_policy, batch_size=2, seed=5))
    assert revision(encoder(tiny_policy, temperature=1.0)) == revision(encoder(tiny_policy, temperature=1.0, batch_size=2))
    assert revision(encoder(tiny_policy, rationale=False)) == revision(encoder(tiny_policy, new_tokens=9, rationale=False))
