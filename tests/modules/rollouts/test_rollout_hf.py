import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from src.modules.policy import logprobs
from src.modules.policy.model import Policy
from src.modules.policy.pooling import pool_prefixes
from src.modules.prompt.renderer import PromptRenderer, Prompts
from src.modules.rollouts import hf as rollout_hf
from src.modules.rollouts.engine import end_tokens
from src.modules.rollouts.hf import HFEngine, batches, choose
from src.modules.types import join
from tests.builders import SENTENCES, small_policy, small_tokenizer

TEXTS = ["x", *SENTENCES, SENTENCES[0] + " " + SENTENCES[1], ""]
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def policy_of(architecture: str) -> Policy:
    if architecture == "qwen2":
        return small_policy()
    tokenizer = small_tokenizer()
    kind, config = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen3": (Qwen3ForCausalLM, Qwen3Config)}[architecture]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        extra = {"head_dim": 16} if architecture == "qwen3" else {}
        model = kind(config(vocab_size=len(tokenizer), initializer_range=0.2, tie_word_embeddings=True, **SHAPE, **extra))
    return Policy(model.eval(), tokenizer)


def prompts_of(policy: Policy) -> Prompts:
    return PromptRenderer(policy.tokenizer, "Name the terms.", 128)(TEXTS)


def eos_often(policy: Policy) -> None:
    """Makes EOS likely, so that rows finish at different lengths and leave the batch."""
    ids = torch.randperm(len(policy.tokenizer), generator=torch.Generator().manual_seed(0))[:60].tolist()
    policy.model.generation_config.eos_token_id = [policy.tokenizer.eos_token_id, *ids]


def generated(policy: Policy, prompts: Prompts, index: int, limit: int) -> torch.Tensor:
    """transformers' own greedy continuation of one prompt."""
    config = GenerationConfig(max_new_tokens=limit, do_sample=False, eos_token_id=end_tokens(policy).tolist(), pad_token_id=policy.pad_id)
    ids = prompts.ids[index].unsqueeze(0)
    return policy.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, ids.shape[1] :]


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("batch_tokens", [200, 2**18])
def test_greedy_rationales_are_those_of_transformers_generate(architecture, batch_tokens):
    policy = policy_of(architecture)
    eos_often(policy)
    prompts = prompts_of(policy)
    rollouts = HFEngine(16, batch_tokens).generate(policy, prompts, n=1, temperature=0.0)
    assert 0 < rollouts.finished.sum() < len(TEXTS) or rollouts.rationale_lengths.unique().numel() > 2
    for i, ours in enumerate(rollouts.rationales()):
        assert ours.tolist() == generated(policy, prompts, i, 16).tolist()


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize(("n", "temperature"), [(1, 0.0), (4, 1.0), (3, 0.7)])
def test_log_probs_and_embeddings_are_those_of_a_plain_pass(architecture, n, temperature):
    policy = policy_of(architecture)
    eos_often(policy)
    rollouts = HFEngine(16).generate(policy, prompts_of(policy), n=n, temperature=temperature, seed=3)
    assert rollouts.rationale_lengths.unique().numel() > 2  # rows left the batch at different times
    with torch.no_grad():
        hidden = policy.hidden_states(rollouts)
        logprobs, _ = policy.logprobs(rollouts, hidden, temperature or 1.0)
        pooled = policy.embed(rollouts, hidden)
    assert rollouts.logprobs is not None
    assert rollouts.embeddings is not None
    torch.testing.assert_close(rollouts.logprobs, logprobs, atol=1e-4, rtol=0)
    torch.testing.assert_close(rollouts.embeddings, pooled, atol=1e-4, rtol=0)


@pytest.mark.parametrize("pooling", ["mean", "eos", "max"])
@pytest.mark.parametrize("layer", [-1, -2])
def test_every_pooling_and_layer_is_that_of_a_plain_pass(pooling, layer):
    policy = small_policy()
    eos_often(policy)
    policy.pooling, policy.layer = pooling, layer
    rollouts = HFEngine(16, batch_tokens=300).generate(policy, prompts_of(policy), n=3, temperature=1.0, seed=3, prefixes=True)
    assert rollouts.rationale_lengths.unique().numel() > 2
    assert 0 < rollouts.finished.sum() < len(rollouts)  # some end with EOS, others are cut: eos pools either's last token
    with torch.no_grad():
        torch.testing.assert_close(rollouts.embeddings, policy.embed(rollouts), atol=1e-4, rtol=0)
        groups = torch.arange(len(rollouts)) // 3
        torch.testing.assert_close(rollouts.embeddings, policy.embed(rollouts, None, groups), atol=1e-4, rtol=0)
        prefixes = pool_prefixes(policy.encoder_states(rollouts), rollouts, 16, pooling)
        torch.testing.assert_close(rollouts.prefix_embeddings, prefixes, atol=1e-4, rtol=0)
        logprobs, _ = policy.logprobs(rollouts, policy.hidden_states(rollouts))
    torch.testing.assert_close(rollouts.logprobs, logprobs, atol=1e-4, rtol=0)  # of the last layer, whatever is pooled


def test_under_autocast_keys_and_values_are_held_as_they_are_attended_to(monkeypatch):
    policy, held = small_policy(), []
    cache = rollout_hf.SharedPromptCache
    monkeypatch.setattr(rollout_hf, "SharedPromptCache", lambda *how: held.append(cache(*how)) or held[-1])
    with torch.autocast("cpu", torch.bfloat16):
        rollouts = HFEngine(16).generate(policy, prompts_of(policy), n=3, seed=3)
    assert {buffer.dtype for pair in held[0].prompt + held[0].own for buffer in pair} == {torch.bfloat16}
    with torch.no_grad():
        logprobs, _ = policy.logprobs(rollouts, policy.hidden_states(rollouts))
    assert float((rollouts.logprobs - logprobs).abs().mean()) < 0.05


def test_the_same_seed_gives_the_same_rationales_whatever_is_sampled_together():
    policy = small_policy()
    runs = [HFEngine(10, size).generate(policy, prompts_of(policy), n=2, seed=5).input_ids for size in (1, 200, 2**18)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], HFEngine(10).generate(policy, prompts_of(policy), n=2, seed=6).input_ids)


def test_every_rollout_of_a_prompt_begins_with_it_and_ends_once():
    policy = small_policy()
    eos_often(policy)
    prompts = prompts_of(policy)
    rollouts = HFEngine(12).generate(policy, prompts, n=3, seed=1)
    ends = set(end_tokens(policy).tolist())
    for row, (ids, finished) in enumerate(zip(rollouts.rationales(), rollouts.finished.tolist(), strict=True)):
        prompt = prompts.ids[row // 3]
        assert rollouts.input_ids[row, : len(prompt)].equal(prompt)
        assert not ends & set(ids[:-1].tolist())
        assert (int(ids[-1]) in ends) == finished
        assert finished or len(ids) == 12


def test_sampling_follows_the_distribution():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1, 8, generator=generator), torch.randn(6, 8, generator=generator)
    draws = torch.rand(40_000, generator=generator)
    ids, logprobs = choose(hidden.expand(len(draws), 8), weight, draws, 0.8)
    expected = torch.softmax(hidden @ weight.T / 0.8, dim=-1)[0]
    torch.testing.assert_close(torch.bincount(ids, minlength=6) / len(draws), expected, atol=0.01, rtol=0)
    torch.testing.assert_close(logprobs.exp(), expected[ids])


class Largest(TorchDispatchMode):
    """Elements of the largest result of any operation."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_choosing_rows_at_a_time_changes_nothing_and_never_holds_all_logits(monkeypatch, temperature):
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(200, 8, generator=generator), torch.randn(50, 8, generator=generator)
    draws = torch.rand(200, generator=generator)
    whole = choose(hidden, weight, draws, temperature)
    monkeypatch.setitem(logprobs._CHUNK_LOGITS, "cpu", 0)
    with Largest() as largest:
        parts = choose(hidden, weight, draws, temperature)
    assert largest.elements == 64 * len(weight)
    assert torch.equal(whole[0], parts[0])
    torch.testing.assert_close(whole[1], parts[1])


@pytest.mark.parametrize("draw", [0.0, 1.0 - 2**-24])
def test_the_outermost_draws_stay_within_the_vocabulary_and_never_take_an_impossible_token(draw):
    weight = torch.tensor([[-torch.inf], [0.0], [0.0], [-torch.inf]])
    ids, _ = choose(torch.ones(1, 1), weight, torch.tensor([draw]), 1.0)
    assert ids.item() in (1, 2)


def test_an_engine_leaves_mode_attention_and_global_random_state_alone():
    policy = small_policy().train()
    state, attention = torch.get_rng_state(), policy.model.config._attn_implementation
    HFEngine(3).generate(policy, prompts_of(policy))
    assert policy.training
    assert torch.equal(torch.get_rng_state(), state)
    assert policy.model.config._attn_implementation == attention


def test_a_frozen_encoder_leaves_the_embedding_to_an_encode_pass():
    policy = small_policy("frozen")
    assert HFEngine(3).generate(policy, prompts_of(policy)).embeddings is None


def test_embeddings_after_every_token_are_those_of_rationales_cut_there():
    policy = small_policy()
    eos_often(policy)
    prompts = prompts_of(policy)
    rollouts = HFEngine(8).generate(policy, prompts, n=2, temperature=1.0, prefixes=True)
    assert rollouts.prefix_embeddings.shape[1] == 9
    assert rollouts.rationale_lengths.unique().numel() > 1
    rationales = rollouts.rationales()
    repeated = prompts.repeat(2)
    for t in range(9):
        cut = join(repeated, [ids[:t] for ids in rationales], rollouts.finished, policy.pad_id)
        torch.testing.assert_close(rollouts.prefix_embeddings[:, t], policy.embed(cut).detach(), atol=1e-4, rtol=1e-4)
    # and an encode pass gives the same where an engine does not
    with torch.no_grad():
        encoded = pool_prefixes(policy.hidden_states(rollouts), rollouts, 8)
    torch.testing.assert_close(encoded, rollouts.prefix_embeddings, atol=1e-4, rtol=1e-4)
    assert HFEngine(8).generate(policy, prompts).prefix_embeddings is None


def test_a_window_in_the_attention_is_refused():
    policy = small_policy()
    policy.model.base_model.layers[1].self_attn.sliding_window = 4
    with pytest.raises(ValueError, match="sliding_window"):
        HFEngine(3).generate(policy, prompts_of(policy))


def test_prompts_of_like_lengths_are_sampled_together_within_a_budget_of_tokens():
    lengths = torch.tensor([5, 40, 8, 30, 31])
    assert [part.tolist() for part in batches(lengths, more=10, budget=100)] == [[1, 4], [3, 2], [0]]
    assert [part.tolist() for part in batches(lengths, more=10, budget=1)] == [[1], [4], [3], [2], [0]]
    assert [part.tolist() for part in batches(lengths, more=10, budget=10**6)] == [[1, 4, 3, 2, 0]]


@pytest.mark.parametrize("settings", [{"max_new_tokens": 0}, {"max_new_tokens": 4, "batch_tokens": 0}])
def test_settings_without_sense_are_refused(settings):
    with pytest.raises(ValueError, match="at least"):
        HFEngine(**settings)


def test_with_a_seed_of_its_own_a_prompt_draws_the_same_in_any_company(tiny_policy: Policy) -> None:
    prompts = PromptRenderer(tiny_policy.tokenizer, "Name the terms.", 96)(["a graph", "the table", "a graph"])
    written = HFEngine(8).generate(tiny_policy, prompts, n=2, temperature=1.0, seed=torch.tensor([7, 8, 9])).rationales()
    alone = HFEngine(8).generate(tiny_policy, prompts.select(torch.tensor([1])), n=2, temperature=1.0, seed=torch.tensor([8])).rationales()
    assert [ids.tolist() for ids in written[2:4]] == [ids.tolist() for ids in alone]
    assert [ids.tolist() for ids in written[:2]] != [ids.tolist() for ids in written[4:]]
