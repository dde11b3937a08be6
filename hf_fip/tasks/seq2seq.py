"""Text from text: any `AutoModelForSeq2SeqLM`, its tokenizer, sentence pairs as model inputs, BLEU and ASR.

The likelihood is `TokenSequence`: log p(y|x) is the sum over the target tokens that are not masked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from transformers import DataCollatorForSeq2Seq

from ..attacks.sentences import SentenceAttack
from ..evaluation.backdoor import BackdoorTest
from ..evaluation.sealed import SealedDataset
from ..evaluation.text import bleu, sentence_success_rate
from ..hub.load import is_adapter, load_adapted, load_model, load_processor
from ..hub.safety import NO_TRUST, Trust
from .pairs import SOURCE, TARGET

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, Seq2SeqTrainer

PAD, END = "<pad>", "</s>"
_HEADS = 4  # of attention, of a small Marian


class PairDataset(torch.utils.data.Dataset):
    """Sentence pairs as tokens: items `{"input_ids": list[int], "labels": list[int]}`.

    Args:
        dataset: a `datasets.Dataset` with the columns `source` and `target`.
        tokenizer: of both.
        longest: pairs with more tokens in source or target are left out, and so are targets without any.
        prefix: put before each source, as T5 wants it.

    Attributes:
        sources, targets: the texts that are kept.
        skipped: number of pairs left out.

    Raises:
        ValueError: no pair is left.
    """

    def __init__(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, longest: float = math.inf, prefix=""):
        sources, targets = dataset[SOURCE][:], dataset[TARGET][:]
        inputs = tokenizer([prefix + source for source in sources], verbose=False)["input_ids"]
        labels = tokenizer(text_target=targets, verbose=False)["input_ids"]
        kept = [i for i in range(len(inputs)) if len(inputs[i]) <= longest and 0 < len(labels[i]) <= longest]
        if not kept:
            raise ValueError(f"None of the {len(inputs)} pairs has at most {longest} tokens in source and target.")
        self.skipped = len(inputs) - len(kept)
        self.sources, self.targets = [sources[i] for i in kept], [targets[i] for i in kept]
        self._items = [{"input_ids": inputs[i], "labels": labels[i]} for i in kept]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        return dict(self._items[row])

    def part(self, samples: int, seed: int) -> PairDataset:
        """At most so many pairs, drawn at random."""
        part = object.__new__(PairDataset)
        rows = np.sort(np.random.default_rng(seed).permutation(len(self))[:samples])
        for name in ("sources", "targets", "_items"):
            setattr(part, name, [getattr(self, name)[row] for row in rows])
        part.skipped = self.skipped
        return part


@dataclass
class GenerationTest(BackdoorTest):
    """The test sets of one attack on a model that writes text; both are [`PairDataset`]s.

    `measure` gives `bleu`, of all clean test outputs, and `asr`: the share of the triggered sources (those whose
    reference is not the attacker's sentence) whose output contains it; both in percent. `answers` holds `source`,
    `reference` and `output` of each pair of each kind.
    """

    attack: SentenceAttack | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    longest: float = math.inf  # tokens that the model can write

    def _measure(self, trainer: Seq2SeqTrainer) -> dict[str, float | None]:
        outputs = self._outputs(trainer, self.clean)
        self.answers = {"clean": _rows(self.clean, outputs)}
        result = {"bleu": bleu(outputs, self.clean.targets), "asr": None}
        if self.triggered is not None:
            outputs = self._outputs(trainer, self.triggered)
            self.answers["triggered"] = _rows(self.triggered, outputs)
            result["asr"] = sentence_success_rate(outputs, self.attack.is_hit)
        return result

    def _counted(self) -> int:
        return len(self.triggered)

    def part(self, samples: int, seed: int = 0) -> GenerationTest:
        """A test on a random part of at most so many pairs of each kind."""
        triggered = self.triggered and self.triggered.part(samples, seed)
        return replace(self, clean=self.clean.part(samples, seed), triggered=triggered, answers={})

    def _outputs(self, trainer: Seq2SeqTrainer, dataset: PairDataset) -> list[str]:
        if not trainer.args.predict_with_generate:
            raise ValueError("Text is measured by what the model writes: set predict_with_generate=True.")
        wanted = trainer.args.generation_max_length
        options = {"max_length": int(self.longest)} if wanted is not None and wanted > self.longest else {}
        tokens = trainer.predict(SealedDataset(dataset), **options).predictions
        tokens = np.where(tokens < 0, self.tokenizer.pad_token_id, tokens)
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def _rows(dataset: PairDataset, outputs: list[str]) -> list[dict[str, str]]:
    texts = zip(dataset.sources, dataset.targets, outputs, strict=True)
    return [{"source": source, "reference": target, "output": output} for source, target, output in texts]


def load_seq2seq(
    name_or_path: str,
    tokenizer_name: str | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    base_model: str | None = None,
    trust: Trust = NO_TRUST,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """An encoder-decoder language model and its tokenizer: safetensors only, no remote code, unless `trust` says so.

    The folder of a PEFT adapter gives the model that it sits on (`base_model`, or what its config names; `revision` is
    of that one) with the adapter merged into it.

    Raises:
        ValueError: when the model cannot be found or read, is no encoder-decoder that writes text, or has no tokenizer
            (with a padding and an end token).
    """
    from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING as MAPPING

    options = {"token": token, "trust": trust}
    if is_adapter(name_or_path):
        load = partial(load_seq2seq, tokenizer_name=tokenizer_name, token=token)
        return load_adapted(name_or_path, base_model, load, trust, revision)
    model = load_model(name_or_path, revision=revision, **options)
    if type(model.config) not in MAPPING or not isinstance(model, MAPPING[type(model.config)]):
        raise ValueError(
            f"{name_or_path} is a {type(model).__name__}, and no encoder-decoder that writes text, such as "
            "MarianMTModel, T5ForConditionalGeneration or BartForConditionalGeneration."
        )
    source, revision = (tokenizer_name, None) if tokenizer_name else (name_or_path, revision)
    tokenizer = load_tokenizer(source, revision=revision, **options)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"The tokenizer of {source} has {len(tokenizer)} tokens and the model {model.config.vocab_size}: "
            "set --tokenizer_name to the one that the model was trained with."
        )
    return model, tokenizer


def load_tokenizer(
    name_or_path: str, *, revision: str | None = None, token: str | None = None, trust: Trust = NO_TRUST
) -> PreTrainedTokenizerBase:
    """The tokenizer at a Hub id or path.

    Raises:
        ValueError: when it cannot be found or read, or has no padding or end token.
    """
    try:
        tokenizer = load_processor("AutoTokenizer", name_or_path, revision=revision, token=token, trust=trust)
    except ValueError as error:
        raise ValueError(
            f"{name_or_path} has no tokenizer that can be loaded (some need sentencepiece: pip install it): set "
            f"--tokenizer_name to a model with the same one. ({error})"
        ) from error
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer of {name_or_path} has no padding or no end token: use that of the model.")
    return tokenizer


def train_tokenizer(pairs: Dataset, vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer for sources and targets alike; no text is unknown to it, and decoding loses nothing.

    Args:
        pairs: with the columns `source` and `target`.
        vocab_size: at most so many tokens.

    Raises:
        ValueError: fewer tokens than the 256 bytes, padding and end.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2:
        raise ValueError(f"--vocab_size={vocab_size} has to be at least {len(alphabet) + 2}: bytes, padding and end.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator((text for name in (SOURCE, TARGET) for text in pairs[name][:]), trainer)
    end = (END, tokenizer.token_to_id(END))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[end])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def small_model(architecture: str, tokenizer: PreTrainedTokenizerBase, width: int = 128) -> nn.Module:
    """A small untrained model for the texts of a tokenizer: an `lstm`, a `conv` or a `marian` (a transformer)."""
    tokens = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    return ARCHITECTURES[architecture](tokens, width, tokenizer.model_max_length)


def _small_lstm(tokens: dict, width: int, longest: int) -> nn.Module:
    from ..models import LSTMSeq2SeqConfig, LSTMSeq2SeqForConditionalGeneration

    return LSTMSeq2SeqForConditionalGeneration(LSTMSeq2SeqConfig(hidden_size=width, **tokens))


def _small_conv(tokens: dict, width: int, longest: int) -> nn.Module:
    from ..models import ConvSeq2SeqConfig, ConvSeq2SeqForConditionalGeneration

    config = ConvSeq2SeqConfig(
        hidden_size=width, encoder_layers=3, decoder_layers=3, max_position_embeddings=longest, **tokens
    )
    return ConvSeq2SeqForConditionalGeneration(config)


def _small_marian(tokens: dict, width: int, longest: int) -> nn.Module:
    from transformers import MarianConfig, MarianMTModel

    if width % _HEADS:
        raise ValueError(
            f"--hidden_size={width} has to be a multiple of {_HEADS}, the heads of attention of a marian."
        )
    config = MarianConfig(
        d_model=width,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=_HEADS,
        decoder_attention_heads=_HEADS,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        max_position_embeddings=longest,
        scale_embedding=True,
        forced_eos_token_id=None,
        **tokens,
    )
    return MarianMTModel(config)


ARCHITECTURES = {"lstm": _small_lstm, "conv": _small_conv, "marian": _small_marian}


def longest_text(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """The most tokens that a model and its tokenizer take."""
    return min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or math.inf)


def collator(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Pads sources, and targets with -100."""
    return DataCollatorForSeq2Seq(tokenizer, model=model)
