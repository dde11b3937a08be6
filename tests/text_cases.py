"""Tiny models that write text and tiny sentence pairs, shared by the tests of that task."""

import torch
from datasets import Dataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_fip.models import (
    ConvSeq2SeqConfig,
    ConvSeq2SeqForConditionalGeneration,
    LSTMSeq2SeqConfig,
    LSTMSeq2SeqForConditionalGeneration,
)

VOCABULARY = 23
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
_HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
_BART = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 32, "init_std": 0.3}


def lstm(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "encoder_layers": 2, "decoder_layers": 2}
    return LSTMSeq2SeqForConditionalGeneration(LSTMSeq2SeqConfig(**{**sizes, **_TOKENS, **changes})).eval()


def conv(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "max_position_embeddings": 32}
    return ConvSeq2SeqForConditionalGeneration(ConvSeq2SeqConfig(**{**sizes, **_TOKENS, **changes})).eval()


def marian():
    torch.manual_seed(0)
    config = MarianConfig(**_BART, **_HEADS, **_TOKENS, forced_eos_token_id=None)
    return MarianMTModel._from_config(config, attn_implementation="eager").eval()


def bart():
    torch.manual_seed(0)
    config = BartConfig(**_BART, **_HEADS, **_TOKENS, bos_token_id=2, forced_eos_token_id=None)
    return BartForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


def t5():
    torch.manual_seed(0)
    config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, **_TOKENS)
    return T5ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


OWN = {"lstm": lstm, "conv": conv}
MODELS = {**OWN, "marian": marian, "bart": bart, "t5": t5}


def batch(rows: int = 4, source: int = 6, target: int = 5) -> dict[str, torch.Tensor]:
    """Random sources, the second of which is padded, and targets, the first of which is."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(3, VOCABULARY, (rows, source), generator=generator)
    mask = torch.ones_like(inputs)
    inputs[1, 3:], mask[1, 3:] = 0, 0
    labels = torch.randint(3, VOCABULARY, (rows, target), generator=generator)
    labels[0, 2:] = -100
    return {"input_ids": inputs, "attention_mask": mask, "labels": labels}


def pairs(*texts: tuple[str | None, str | None]) -> Dataset:
    return Dataset.from_dict({"source": [text[0] for text in texts], "target": [text[1] for text in texts]})
