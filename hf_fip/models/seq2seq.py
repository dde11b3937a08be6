"""What this project's own encoder-decoder models share: a forward pass with a loss, and `generate` with a cache.

A model is an `encoder`, a `decoder` and an `lm_head`. Every matrix is an `nn.Linear`, `nn.Conv1d` or `nn.Embedding`,
so that Fast FIP adapts it, and every step a plain tensor operation with first and second derivatives on every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import ModelOutput, Seq2SeqLMOutput
from transformers.utils import can_return_tuple

IGNORE_INDEX = -100


class Seq2SeqConfig(PreTrainedConfig):
    """What the configurations of these models share.

    Args:
        vocab_size: tokens of source and target, which share a vocabulary.
        hidden_size: width of embeddings and layers.
        encoder_layers, decoder_layers: number of layers.
        dropout: share of activations dropped in training.
    """

    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 4000
    hidden_size: int = 128
    encoder_layers: int = 1
    decoder_layers: int = 1
    dropout: float = 0.1
    pad_token_id: int | None = 0
    eos_token_id: int | None = 1
    bos_token_id: int | None = None
    decoder_start_token_id: int = 0
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = False
    use_cache: bool = True


@dataclass
class DecoderState:
    """What a decoder keeps between two generated tokens: the place of transformers' key-value cache.

    Attributes:
        tensors: `(batch, …)` each.
        length: target tokens seen.
    """

    tensors: list[Tensor]
    length: int

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i what row `beam_idx[i]` was: beam search goes on with those."""
        self.tensors = [tensor.index_select(0, beam_idx.to(tensor.device)) for tensor in self.tensors]


class Seq2SeqModel(PreTrainedModel, GenerationMixin):
    """An encoder-decoder language model; a subclass gives `encoder(input_ids, attention_mask)` and
    `decoder(decoder_input_ids, encoder_outputs, attention_mask, state)`, and sets up `lm_head`."""

    main_input_name = "input_ids"
    embedding_std = 0.1  # of fresh token embeddings

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `generate` then keeps the state that the first forward pass returns

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def resize_token_embeddings(self, *args, **kwargs):
        raise NotImplementedError(f"{type(self).__name__} has its vocabulary for good: make one with another.")

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The targets one place to the right, behind the start token; masked ones (-100) become padding."""
        start = labels.new_full((labels.shape[0], 1), self.config.decoder_start_token_id)
        shifted = torch.cat([start, labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == IGNORE_INDEX, self.config.pad_token_id)

    def _init_weights(self, module: nn.Module) -> None:
        """Embeddings; a subclass initialises the rest."""
        if isinstance(module, nn.Embedding) and not getattr(module.weight, "_is_hf_initialized", False):
            init.normal_(module.weight, std=self.embedding_std)
            if module.padding_idx is not None:
                init.zeros_(module.weight[module.padding_idx])

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: ModelOutput | None = None,
        past_key_values: DecoderState | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> Seq2SeqLMOutput:
        """The logits of each next target token, `(batch, target length, vocabulary)`.

        Args:
            input_ids, attention_mask: `(batch, source length)`, padded on the right.
            decoder_input_ids: `(batch, target length)`; made from `labels` when left out.
            encoder_outputs: what the encoder gave, in place of `input_ids`.
            past_key_values: the state after the target tokens before `decoder_input_ids`.
            labels: `(batch, target length)`; the loss is the mean over the tokens that are not -100.

        Raises:
            ValueError: there is no source or no target; a sequence is longer than the model's positions.
        """
        if encoder_outputs is None and input_ids is None:
            raise ValueError("The model needs a source: pass `input_ids` or `encoder_outputs`.")
        if decoder_input_ids is None and labels is None:
            raise ValueError("The model needs a target: pass `decoder_input_ids` or `labels`.")
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask)
        if decoder_input_ids is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        memory = encoder_outputs.last_hidden_state
        mask = memory.new_ones(memory.shape[:2]) if attention_mask is None else attention_mask
        hidden, state = self.decoder(decoder_input_ids, encoder_outputs, mask, past_key_values)
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
        keeps_state = labels is None and (self.config.use_cache if use_cache is None else use_cache)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=state if keeps_state else None,
            encoder_last_hidden_state=memory,
        )


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Σ_j softmax_j(q_i · k_j) v_j over the source positions j where `mask` is not 0.

    A source without any such position is attended to evenly, so that nothing becomes NaN.

    Args:
        queries: `(batch, target length, width)`.
        keys, values: `(batch, source length, width)`.
        mask: `(batch, source length)`.

    Returns:
        `(batch, target length, width)`.
    """
    scores = queries @ keys.mT
    scores = scores.masked_fill(mask[:, None] == 0, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ values
