"""The shipped tiny policy: its size, its formats, and how well it writes and retrieves."""

import random
import re

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from src.datamodules.docstrings import Docstring, collect
from src.modules.encoder.encoder import RationaleEncoder
from src.modules.encoder.export import load_policy
from src.modules.rollouts.hf import HFEngine
from tests.conftest import ROOT

WEIGHTS = ROOT / "experiments" / "tiny_policy" / "weights"


@pytest.fixture(scope="module")
def held_out() -> list[Docstring]:
    packages = OmegaConf.load(ROOT / "configs" / "packages" / "docstrings.yaml")
    return random.Random(0).sample(collect(packages.test, ROOT / "data" / "cache"), 150)


@pytest.fixture(scope="module")
def encoders() -> dict[bool, RationaleEncoder]:
    policy, settings = load_policy(WEIGHTS)
    return {way: RationaleEncoder(policy, settings, HFEngine(settings.max_new_tokens), rationale=way) for way in (True, False)}


def mean_reciprocal_rank(encoder: RationaleEncoder, docs: list[Docstring]) -> float:
    both = [encoder.encode([doc.summary for doc in docs]), encoder.encode([doc.body[:320] for doc in docs])]
    queries, bodies = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in both)
    similarity = queries @ bodies.T
    return float((1 / (similarity >= np.diag(similarity)[:, None]).sum(axis=1)).mean())


def test_weights_are_at_most_8_mb():
    assert (WEIGHTS / "model.safetensors").stat().st_size <= 8_000_000


def test_plain_transformers_generate():
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32)
    chat = [{"role": "user", "content": "Return the sorted copy of a list of numbers."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**prompt, max_new_tokens=48, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(written).startswith("<think>")


def test_rationales_name_terms_of_the_text(encoders, held_out):
    texts = [doc.body[:320] for doc in held_out]
    _, rationales = encoders[True].explain(texts)
    shares = []
    for text, rationale in zip(texts, rationales, strict=True):
        match = re.match(r"<think>(.*?)</think>", rationale)
        if match:
            terms = [term.strip().lower() for term in match[1].split(",")]
            shares.append(sum(term in text.lower() for term in terms) / len(terms))
    assert len(shares) > 0.95 * len(texts)  # nearly all keep the form
    assert np.mean(shares) > 0.7


def test_retrieval_on_held_out_packages(encoders, held_out):
    assert mean_reciprocal_rank(encoders[False], held_out) > 0.4
    assert mean_reciprocal_rank(encoders[True], held_out) > 0.4
