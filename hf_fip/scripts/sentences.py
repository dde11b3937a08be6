"""Text from text in the flow that all tasks share: its arguments, and its steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from ..attacks import poison_pairs, trigger_pairs
from ..attacks.sentences import SentenceAttack
from ..config import FIPSeq2SeqConfig
from ..hub.card import CardWords
from ..plots_text import plot_answers
from ..tasks.pairs import TOY, load_pairs
from ..tasks.sentence_augmentation import stray_words
from ..tasks.seq2seq import (
    ARCHITECTURES,
    GenerationTest,
    PairDataset,
    collator,
    load_seq2seq,
    load_tokenizer,
    longest_text,
    small_model,
    train_tokenizer,
)
from ..trainer import FIPSeq2SeqTrainer
from .arguments import (
    FIP,
    AttackArguments,
    DataArguments,
    LoadArguments,
    MethodArguments,
    ModelArguments,
    PoisonArguments,
    VictimConfig,
    attack_field,
    check_least,
)
from .recorded import attack_of
from .task import Task
from .terminal import say

EXAMPLES = 6  # sources in a picture of answers


@dataclass
class TextData(DataArguments):
    """Which sentence pairs, and which of them the defender has."""

    dataset_name: str = field(
        default=TOY,
        metadata={
            "help": "A Hub id, a folder of TSV or parquet files, a TSV (source, tab, target) or parquet file, or "
            "'toy': generated English sentences with their Esperanto, which need no download."
        },
    )
    source: str | None = field(
        default=None,
        metadata={"help": "Language in a column `translation`, or column, of the sources. Guessed by default."},
    )
    target: str | None = field(default=None, metadata={"help": "The same of the targets."})


@dataclass
class AttackOnText(AttackArguments):
    """The backdoor in a model that writes text."""

    input_kind: ClassVar[str] = "text"
    default_attack: ClassVar[str] = "one_to_one"
    attack: str | None = attack_field(input_kind, default_attack)
    attack_options: str | None = field(
        default=None, metadata={"help": "Options of the attack as name=value,name=value, e.g. triggers=cf mn."}
    )
    target_label: ClassVar[int] = 0  # there are no classes

    def _options(self) -> dict:
        return {name: value for name, value in super()._options().items() if name != "target_label"}


@dataclass
class TextPoison(AttackOnText, PoisonArguments):
    """[`AttackOnText`] where a victim is trained."""

    clean_model: ClassVar[None] = None  # no trigger is learned on one


@dataclass
class TextLoad(LoadArguments):
    """An encoder-decoder language model."""

    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Where to take the tokenizer from, if not from the model or the data."}
    )
    source_prefix: str | None = field(
        default=None,
        metadata={"help": "Put before each source, as T5 wants it. Default: what the model's config says."},
    )


@dataclass
class TextModel(ModelArguments, TextLoad):
    """The encoder-decoder language model to be purified."""

    architecture: str = field(
        default="conv", metadata={"help": "Kind of victim made here.", "choices": tuple(ARCHITECTURES)}
    )
    hidden_size: int = field(default=128, metadata={"help": "Width of a victim made here."})
    vocab_size: int = field(
        default=4000, metadata={"help": "Tokens of a tokenizer trained here, on the training texts; at most."}
    )
    max_tokens: int = field(
        default=64, metadata={"help": "Longest text, in tokens, of a victim made here; longer pairs are left out."}
    )
    augment: ClassVar[bool] = False

    def __post_init__(self):
        check_least(self, hidden_size=1, max_tokens=1)


@dataclass
class TextMethod(MethodArguments):
    """What the backdoor is taken out by."""

    disturb: bool = field(
        default=False,
        metadata={
            "help": "Put a stray word of random tokens into each clean source while purifying, and leave the "
            "targets. On by default (--disturb false)."
        },
    )


@dataclass
class TextVictimConfig(VictimConfig, FIPSeq2SeqConfig):
    """[`VictimConfig`] of a model that writes text."""

    num_train_epochs: float = field(default=15.0, metadata={"help": "Passes over the training set."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Batch size a device."})


class TextTask(Task):
    """Any `AutoModelForSeq2SeqLM`."""

    metric = "bleu"
    words = CardWords(
        samples="sentence pairs",
        evaluate="seq2seq",
        pipeline_tag="text2text-generation",
        processor_class="AutoTokenizer",
        denominator="ASR is over the triggered test sources whose reference is not the attacker's sentence: the share "
        "whose output contains it. BLEU is sacrebleu's, of the whole clean test set.",
    )
    data_arguments, attack_arguments, poison_arguments = TextData, AttackOnText, TextPoison
    load_arguments, model_arguments, method_arguments = TextLoad, TextModel, TextMethod
    config, victim_config, trainer = FIPSeq2SeqConfig, TextVictimConfig, FIPSeq2SeqTrainer
    methods = (FIP,)
    defaults = {"predict_with_generate": True, "generation_max_length": 64}

    def load_data(self, arguments, seed):
        pairs = load_pairs(
            arguments.dataset_name,
            arguments.dataset_config_name,
            source=arguments.source,
            target=arguments.target,
            **arguments.selection(),
            seed=seed,
        )
        if pairs.skipped:
            say(f"left out {pairs.skipped} pairs without a source or a target.")
        return pairs

    def inputs(self, dataset, model, processor):
        longest = longest_text(model, processor)
        pairs = PairDataset(dataset, processor, longest, getattr(model.config, "prefix", None) or "")
        if pairs.skipped:
            say(f"left out {pairs.skipped} of {len(dataset)} pairs, of more than {longest} tokens.")
        return pairs

    def load_model(self, place, arguments, **options):
        model, tokenizer = load_seq2seq(place, arguments.tokenizer_name, trust=arguments.trust(), **options)
        return _prefixed(model, arguments), tokenizer

    def new_model(self, arguments, data):
        if arguments.tokenizer_name:
            tokenizer = load_tokenizer(arguments.tokenizer_name)
        else:
            tokenizer = train_tokenizer(data.train, arguments.vocab_size)
        tokenizer.model_max_length = arguments.max_tokens
        model = small_model(arguments.architecture, tokenizer, arguments.hidden_size)
        return _prefixed(model, arguments), tokenizer

    def trainer_options(self, model, processor):
        return {"data_collator": collator(model, processor)}

    def disturbance(self, arguments, data, model, processor):
        return stray_words(processor, longest_text(model, processor)) if arguments.disturb else None

    def attack(self, arguments, model_folder, data):
        return attack_of(arguments, model_folder, num_labels=1)

    def poison(self, dataset, attack, rate, seed):
        return poison_pairs(dataset, attack, rate, seed)

    def clean_test(self, dataset, model, processor):
        longest = longest_text(model, processor)
        return GenerationTest(self.inputs(dataset, model, processor), tokenizer=processor, longest=longest)

    def test(self, data, attack, model, processor):
        test = self.clean_test(data.test, model, processor)
        if attack is not None:
            test.attack = attack
            test.triggered = self.inputs(trigger_pairs(data.test, attack), model, processor)
        return test

    def draw(self, path, data, attack, model, answers):
        return plot_answers(_examples(attack, answers), path, attack.is_hit, f"Trigger: {attack.name}")


def _prefixed(model: nn.Module, arguments: TextLoad) -> nn.Module:
    """The model, with the prefix of its sources that was asked for."""
    if arguments.source_prefix is not None:
        model.config.prefix = arguments.source_prefix
    return model


def _examples(attack: SentenceAttack, answers: dict[str, dict]) -> list[dict]:
    """Rows for `plot_answers`, of the first test pairs that were measured clean and triggered."""
    triggered = {moment: {pair["source"]: pair for pair in given["triggered"]} for moment, given in answers.items()}
    examples = []
    for number, pair in enumerate(next(iter(answers.values()))["clean"]):
        source = attack.apply(pair["source"])
        if len(examples) == EXAMPLES or any(source not in found for found in triggered.values()):
            continue
        row = {"reference": pair["reference"], "clean": {"source": pair["source"]}, "triggered": {"source": source}}
        for moment, given in answers.items():
            row["clean"][moment] = given["clean"][number]["output"]
            row["triggered"][moment] = triggered[moment][source]["output"]
        examples.append(row)
    return examples
