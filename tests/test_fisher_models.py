"""The models that the Fisher tests share, each tiny, fresh and seeded, and the likelihood inferred for each."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hf_fip.fisher import Categorical, TokenSequence, TraceEstimator, infer_likelihood
from hf_fip.fisher.likelihood import get_logits

CLASSES, VOCABULARY = 3, 11


class LinearSoftmax(nn.Module):
    """logits = W x + b, of which every Fisher quantity has a closed form."""

    def __init__(self, bare: bool = False):
        super().__init__()
        self.linear = nn.Linear(5, CLASSES)
        self.bare = bare

    def forward(self, x):
        logits = self.linear(x)
        return logits if self.bare else SimpleNamespace(logits=logits)


def linear(bare: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return LinearSoftmax(bare).eval()


def vit(attention: str = "eager", **changes) -> nn.Module:
    torch.manual_seed(0)
    settings = {
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 1,
        "hidden_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 6,
        "num_labels": CLASSES,
        "initializer_range": 0.3,
    }
    config = ViTConfig(**settings | changes)
    return ViTForImageClassification._from_config(config, attn_implementation=attention).eval()


def resnet(smooth: bool = False) -> nn.Module:
    """A ResNet with BatchNorm statistics that are not the fresh 0 and 1. `smooth`: without any kink."""
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=1, embedding_size=3, hidden_sizes=[4], depths=[1], layer_type="basic", num_labels=CLASSES
    )
    model = ResNetForImageClassification(config)
    for module in list(model.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
        for name, child in list(module.named_children()) if smooth else []:
            if isinstance(child, nn.ReLU):  # `hidden_act` does not reach all of them
                setattr(module, name, nn.GELU())
            if isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
    return model.eval()


_TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_BART = {
    "d_model": 4,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 6,
    "decoder_ffn_dim": 6,
    "max_position_embeddings": 8,
    "decoder_start_token_id": 0,
    "init_std": 0.3,
} | _TEXT


def marian(attention: str = "eager", **changes) -> nn.Module:
    torch.manual_seed(0)
    return MarianMTModel._from_config(MarianConfig(**_BART | changes), attn_implementation=attention).eval()


def bart(attention: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    return BartForConditionalGeneration._from_config(BartConfig(**_BART), attn_implementation=attention).eval()


def m2m100(attention: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    return M2M100ForConditionalGeneration._from_config(M2M100Config(**_BART), attn_implementation=attention).eval()


def t5(attention: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    config = T5Config(d_model=4, d_kv=2, d_ff=6, num_layers=1, num_heads=2, decoder_start_token_id=0, **_TEXT)
    return T5ForConditionalGeneration._from_config(config, attn_implementation=attention).eval()


def gpt2(attention: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=4, n_layer=1, n_head=2, n_positions=8, initializer_range=0.3, **_TEXT)
    return GPT2LMHeadModel._from_config(config, attn_implementation=attention).eval()


def bert(
    problem_type: str | None = "multi_label_classification",
    labels: int = CLASSES,
    head: type = BertForSequenceClassification,
) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=6,
        max_position_embeddings=8,
        num_labels=labels,
        problem_type=problem_type,
        initializer_range=0.3,
        **_TEXT,
    )
    return head(config).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": linear,
    "vit": vit,
    "resnet": resnet,
    "bert": bert,
    "marian": marian,
    "t5": t5,
    "bart": bart,
    "m2m100": m2m100,
    "gpt2": gpt2,
}
TEXT_MODELS = [name for name in MODELS if name not in ("linear", "vit", "resnet")]


def make_batch(name: str, rows: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch that fits MODELS[name]; token sequences have padded sources and masked targets."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, CLASSES, (rows,), generator=generator)
    if name == "linear":
        return {"x": torch.randn(rows, 5, generator=generator), "labels": classes}
    if name in ("vit", "resnet"):
        return {"pixel_values": torch.randn(rows, 1, 8, 8, generator=generator), "labels": classes}
    source = torch.randint(3, VOCABULARY, (rows, 5), generator=generator)
    kept = torch.ones_like(source)
    kept[0, 3:] = 0
    batch = {"input_ids": source, "attention_mask": kept}
    if name == "bert":
        return batch | {"labels": torch.randint(0, 2, (rows, CLASSES), generator=generator).float()}
    if name == "gpt2":
        return batch | {"labels": torch.where(kept.bool(), source, -100)}
    target = torch.randint(3, VOCABULARY, (rows, 4), generator=generator)
    target[1, 2:] = -100
    return batch | {"labels": target}


def select(batch: dict[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
    return {name: tensor[rows] for name, tensor in batch.items()}


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])


class Scripted(Categorical):
    """Hands out the labels it was given, one after the other, where others draw."""

    def __init__(self, labels: torch.Tensor):
        self.labels, self.used = labels, 0

    def sample(self, logits, labels=None, generator=None):
        start, self.used = self.used, self.used + len(logits)
        return self.labels[start : self.used]


def script_signs(monkeypatch, signs: torch.Tensor) -> None:
    """Make the coins of `signed_sum` fall as `signs`, one after the other, then over again."""
    remaining = itertools.cycle((signs > 0).long().tolist())
    monkeypatch.setattr(
        torch, "randint", lambda low, high, size, **_: torch.tensor([next(remaining) for _ in range(*size)])
    )


def estimate(model, batches, seed: int = 0, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Tr F and its gradient, flat, over micro-batches."""
    estimator = TraceEstimator(model, **options)
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        estimator.observe(batch, generator)
    value, gradient = estimator.estimate()
    return value, None if gradient is None else flat(gradient)


def looped_scores(model, batch, labels, create_graph=False) -> list[torch.Tensor]:
    """s_i by one autograd call a sample: flat tensors, without any of the library's code."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    scores = []
    for row, label in enumerate(labels):
        outputs = model(**select(inputs, slice(row, row + 1)))
        log_prob = F.log_softmax(outputs.logits, dim=-1)[0, label]
        score = torch.autograd.grad(log_prob, list(model.parameters()), create_graph=create_graph, allow_unused=True)
        scores.append(torch.cat([s.flatten() for s in score if s is not None]))
    return scores


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a / a.norm() @ (b / b.norm())).item()


def assert_same_gradient(found: torch.Tensor, expected: torch.Tensor) -> None:
    direction, length = cosine(found, expected), (found.norm() / expected.norm()).item()
    assert direction >= 0.999 and abs(length - 1) <= 0.01, f"cosine {direction}, ratio of norms {length}"


LIKELIHOODS = {
    "plain module": (linear, "Categorical()"),
    "ViT": (vit, "Categorical()"),
    "ResNet": (resnet, "Categorical()"),
    "BERT, one class of three": (lambda: bert("single_label_classification"), "Categorical()"),
    "BERT, three labels": (bert, "MultiLabel()"),
    "Marian": (marian, "TokenSequence(shift=False)"),
    "T5": (t5, "TokenSequence(shift=False)"),
    "BART": (bart, "TokenSequence(shift=False)"),
    "M2M100": (m2m100, "TokenSequence(shift=False)"),
    "GPT-2": (gpt2, "TokenSequence(shift=True)"),
    "BERT, a class a token": (lambda: bert(None, head=BertForTokenClassification), "TokenSequence(shift=False)"),
    "BERT, masked words": (lambda: bert(None, head=BertForMaskedLM), "TokenSequence(shift=False)"),
}


@pytest.mark.parametrize("case", LIKELIHOODS)
def test_each_model_gets_the_likelihood_of_its_output(case):
    make, expected = LIKELIHOODS[case]
    assert repr(infer_likelihood(make())) == expected


def test_an_adapter_gets_the_likelihood_of_the_model_inside_it():
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(t5(), LoraConfig(target_modules=["q"], r=1))
    assert isinstance(infer_likelihood(adapted), TokenSequence)


@pytest.mark.parametrize(("problem_type", "labels"), [("regression", 3), ("regression", 1), (None, 1)])
def test_a_regression_head_is_refused_instead_of_having_a_fisher_of_zero(problem_type, labels):
    with pytest.raises(ValueError, match="regression head.*pass `likelihood=`"):
        infer_likelihood(bert(problem_type, labels))


def test_logits_are_found_in_every_kind_of_output():
    logits = torch.zeros(2, CLASSES)
    for outputs in (logits, SimpleNamespace(logits=logits), {"loss": None, "logits": logits}):
        assert get_logits(outputs) is logits


@pytest.mark.parametrize("outputs", [(torch.zeros(2, CLASSES),), {"last_hidden_state": torch.zeros(2, CLASSES)}])
def test_an_output_without_logits_is_refused_by_name(outputs):
    with pytest.raises(ValueError, match="returned no `logits`.*(tuple|last_hidden_state).*task head, or let"):
        get_logits(outputs)


def test_a_model_without_a_head_is_refused():
    headless = ViTModel(vit().config)
    with pytest.raises(ValueError, match="last_hidden_state.*load it with a task head"):
        get_logits(headless(pixel_values=torch.zeros(1, 1, 8, 8)))
