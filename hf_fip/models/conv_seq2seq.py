"""A convolutional encoder-decoder with attention in every layer of the decoder, as a transformers model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput

from .seq2seq import DecoderState, Seq2SeqConfig, Seq2SeqModel, attend

_HALF = math.sqrt(0.5)  # keeps the variance of a sum of two


class ConvSeq2SeqConfig(Seq2SeqConfig):
    __doc__ = (
        (Seq2SeqConfig.__doc__ or "").replace("What the configurations of these models share.", "").rstrip()
        + """
        kernel_size: positions that a convolution sees; odd.
        max_position_embeddings: the longest source or target.
    """
    )

    model_type = "conv_seq2seq"

    encoder_layers: int = 2
    decoder_layers: int = 2
    kernel_size: int = 3
    max_position_embeddings: int = 256


@dataclass
class ConvEncoderOutput(ModelOutput):
    """What the encoder gives; both `(batch, source length, width)`.

    Attributes:
        last_hidden_state: z, the keys of attention.
        values: z + e with the embeddings e, what attention adds up.
    """

    last_hidden_state: Tensor | None = None
    values: Tensor | None = None


class GatedConv(nn.Conv1d):
    """A convolution of `(batch, length, width)` to twice the width, halved again by a gated linear unit."""

    def __init__(self, config: ConvSeq2SeqConfig):
        super().__init__(config.hidden_size, 2 * config.hidden_size, config.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(super().forward(x.mT).mT, dim=-1)


class PositionedEmbedding(nn.Module):
    """The sum of the embeddings of a token and of its position."""

    def __init__(self, config: ConvSeq2SeqConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.longest = config.max_position_embeddings

    def forward(self, input_ids: Tensor, first: int = 0) -> Tensor:
        last = first + input_ids.shape[1]
        if last > self.longest:
            raise ValueError(
                f"A sequence of {last} tokens is longer than max_position_embeddings={self.longest}: "
                "cut or leave out such sequences, or make a model with more."
            )
        positions = torch.arange(first, last, device=input_ids.device)
        return self.tokens(input_ids) + self.positions(positions)


class ConvEncoder(nn.Module):
    """Gated convolutions that see both sides of a position; padding is zero for each of them."""

    main_input_name = "input_ids"  # asked for by `generate`

    def __init__(self, config: ConvSeq2SeqConfig):
        super().__init__()
        self.embedding = PositionedEmbedding(config)
        self.layers = nn.ModuleList(GatedConv(config) for _ in range(config.encoder_layers))
        self.dropout = nn.Dropout(config.dropout)
        self.side = config.kernel_size // 2

    @property
    def tokens(self) -> nn.Embedding:
        return self.embedding.tokens

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs):
        x = embedded = self.dropout(self.embedding(input_ids))
        is_token = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        is_token = is_token.to(x.dtype)[..., None]
        for layer in self.layers:
            sides = F.pad(self.dropout(x) * is_token, (0, 0, self.side, self.side))
            x = (layer(sides) + x) * _HALF
        return ConvEncoderOutput(last_hidden_state=x, values=(x + embedded) * _HALF)


class ConvDecoder(nn.Module):
    """Gated convolutions that see the target so far, each followed by attention on the source.

    Its state is what each convolution sees of the past: kernel size − 1 inputs.
    """

    def __init__(self, config: ConvSeq2SeqConfig):
        super().__init__()
        self.embedding = PositionedEmbedding(config)
        self.layers = nn.ModuleList(GatedConv(config) for _ in range(config.decoder_layers))
        self.queries = nn.ModuleList(
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(config.decoder_layers)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.past = config.kernel_size - 1

    def forward(
        self, decoder_input_ids: Tensor, encoder_outputs: ConvEncoderOutput, mask: Tensor, state: DecoderState | None
    ) -> tuple[Tensor, DecoderState]:
        first = 0 if state is None else state.length
        x = embedded = self.dropout(self.embedding(decoder_input_ids, first))
        nothing = x.new_zeros(x.shape[0], self.past, x.shape[2])
        pasts = [nothing] * len(self.layers) if state is None else state.tensors
        kept = []
        source_length = mask.sum(-1).clamp(min=1).to(x.dtype)[:, None, None]
        for layer, query, past in zip(self.layers, self.queries, pasts, strict=True):
            seen = torch.cat([past, self.dropout(x)], dim=1)
            kept.append(seen[:, seen.shape[1] - self.past :])
            h = layer(seen)
            queries = (query(h) + embedded) * _HALF
            context = attend(queries, encoder_outputs.last_hidden_state, encoder_outputs.values, mask)
            # A mean over m positions has 1/m of their variance: √m undoes that.
            h = (h + context * source_length.sqrt()) * _HALF
            x = (h + x) * _HALF
        return self.dropout(x), DecoderState(kept, first + decoder_input_ids.shape[1])


class ConvSeq2SeqForConditionalGeneration(Seq2SeqModel):
    """A convolutional encoder-decoder: gated linear units, residual connections, attention in every decoder layer.

    Source: Gehring et al., *Convolutional Sequence to Sequence Learning*, 2017, with its initialisation and scaling of
    sums. Left out are weight normalisation, which would hide the matrices from Fast FIP, and the scaling of the
    encoder's gradients by the number of attention layers, after which they are no gradients of the loss.

    Raises:
        ValueError: `kernel_size` is even, so that a convolution has no middle.
    """

    config_class = ConvSeq2SeqConfig

    def __init__(self, config: ConvSeq2SeqConfig):
        super().__init__(config)
        if config.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={config.kernel_size} has to be odd: a convolution sees both sides alike.")
        self.encoder = ConvEncoder(config)
        self.decoder = ConvDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GatedConv):  # a gated linear unit quarters the variance
            fan_in = module.in_channels * module.kernel_size[0]
            init.normal_(module.weight, std=math.sqrt(4 * (1 - self.config.dropout) / fan_in))
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=math.sqrt(1 / module.in_features))
            init.zeros_(module.bias)
