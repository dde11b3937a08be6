"""An LSTM encoder-decoder with attention, as a transformers model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput

from .seq2seq import DecoderState, Seq2SeqConfig, Seq2SeqModel, attend


class LSTMSeq2SeqConfig(Seq2SeqConfig):
    __doc__ = (
        "Configuration of [`LSTMSeq2SeqForConditionalGeneration`]: `hidden_size` is even."
        + (Seq2SeqConfig.__doc__ or "").partition(".")[2]
    )

    model_type = "lstm_seq2seq"


class LSTM(nn.Module):
    """One layer of long short-term memory (Hochreiter and Schmidhuber, 1997) with a forget gate, in one direction.

    The gates are made by two `nn.Linear`, where `nn.LSTM` has one fused kernel.
    """

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.from_input = nn.Linear(input_size, 4 * hidden_size)
        self.from_hidden = nn.Linear(hidden_size, 4 * hidden_size, bias=False)

    def forward(
        self, x: Tensor, hidden: Tensor, cell: Tensor, mask: Tensor | None = None, reverse: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The outputs at each position, and the last hidden and cell state.

        Args:
            x: `(batch, length, input size)`.
            hidden, cell: `(batch, hidden size)`, the states to begin with.
            mask: `(batch, length)`; where it is 0 the states stay as they are.
            reverse: read from the last position to the first.
        """
        from_input, outputs = self.from_input(x), []
        positions = range(x.shape[1])
        for position in reversed(positions) if reverse else positions:
            gates = from_input[:, position] + self.from_hidden(hidden)
            enter, forget, value, leave = gates.chunk(4, dim=-1)
            new_cell = forget.sigmoid() * cell + enter.sigmoid() * value.tanh()
            new_hidden = leave.sigmoid() * new_cell.tanh()
            if mask is not None:
                is_token = mask[:, position, None] != 0
                new_cell, new_hidden = torch.where(is_token, new_cell, cell), torch.where(is_token, new_hidden, hidden)
            hidden, cell = new_hidden, new_cell
            outputs.append(hidden)
        return torch.stack(outputs[::-1] if reverse else outputs, dim=1), hidden, cell


class LSTMEncoder(nn.Module):
    """Layers of LSTMs in both directions, each of half the width, with residual connections."""

    main_input_name = "input_ids"  # asked for by `generate`

    def __init__(self, config: LSTMSeq2SeqConfig):
        super().__init__()
        width = config.hidden_size
        self.tokens = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.forwards = nn.ModuleList(LSTM(width, width // 2) for _ in range(config.encoder_layers))
        self.backwards = nn.ModuleList(LSTM(width, width // 2) for _ in range(config.encoder_layers))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs):
        x = self.tokens(input_ids)
        start = x.new_zeros(x.shape[0], x.shape[2] // 2)
        for forwards, backwards in zip(self.forwards, self.backwards, strict=True):
            below = self.dropout(x)
            ahead, *_ = forwards(below, start, start, attention_mask)
            back, *_ = backwards(below, start, start, attention_mask, reverse=True)
            x = x + torch.cat([ahead, back], dim=-1)
        return BaseModelOutput(last_hidden_state=x)


class LSTMDecoder(nn.Module):
    """Layers of LSTMs with residual connections, and attention on the encoder's outputs above the last."""

    def __init__(self, config: LSTMSeq2SeqConfig):
        super().__init__()
        width, layers = config.hidden_size, config.decoder_layers
        self.tokens = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.first_states = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(layers))
        self.layers = nn.ModuleList(LSTM(width, width) for _ in range(layers))
        self.query = nn.Linear(width, width, bias=False)
        self.combine = nn.Linear(2 * width, width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, decoder_input_ids: Tensor, encoder_outputs: BaseModelOutput, mask: Tensor, state: DecoderState | None
    ) -> tuple[Tensor, DecoderState]:
        memory = encoder_outputs.last_hidden_state
        state = state or self._first_state(memory, mask)
        x, states = self.tokens(decoder_input_ids), []
        for layer, hidden, cell in zip(self.layers, state.tensors[::2], state.tensors[1::2], strict=True):
            above, hidden, cell = layer(self.dropout(x), hidden, cell)
            x = x + above
            states += [hidden, cell]
        context = attend(self.query(x), memory, memory, mask)
        x = torch.tanh(self.combine(torch.cat([context, x], dim=-1)))
        return self.dropout(x), DecoderState(states, state.length + decoder_input_ids.shape[1])

    def _first_state(self, memory: Tensor, mask: Tensor) -> DecoderState:
        weights = mask.to(memory.dtype)[..., None]
        mean = (weights * memory).sum(1) / weights.sum(1).clamp(min=1)
        pairs = [torch.tanh(first(mean)).chunk(2, dim=-1) for first in self.first_states]
        return DecoderState([tensor for pair in pairs for tensor in pair], 0)


class LSTMSeq2SeqForConditionalGeneration(Seq2SeqModel):
    """An LSTM encoder-decoder with global attention, its score q · W k, on top of the decoder.

    Sources: Luong et al., *Effective Approaches to Attention-based Neural Machine Translation*, 2015, without its
    input feeding; Wu et al., *Google's Neural Machine Translation System*, 2016 (residual connections); Sennrich et
    al., *Nematus*, 2017 (the decoder begins from the mean of the encoder's outputs).

    Raises:
        ValueError: `hidden_size` is odd, and both directions of the encoder get half of it.
    """

    config_class = LSTMSeq2SeqConfig
    embedding_std = 0.3

    def __init__(self, config: LSTMSeq2SeqConfig):
        super().__init__(config)
        if config.hidden_size % 2:
            raise ValueError(f"hidden_size={config.hidden_size} has to be even: each direction gets half of it.")
        self.encoder = LSTMEncoder(config)
        self.decoder = LSTMDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, LSTM):
            bias = torch.zeros(4, module.from_input.out_features // 4)
            bias[1] = 1.0  # of the forget gate, so that cells remember at first (Gers et al., 2000)
            init.copy_(module.from_input.bias, bias.flatten())
