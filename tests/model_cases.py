"""What the tests of models of images, clips and point clouds ask of each, shared by them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_fisher_models import assert_same_gradient, estimate, looped_scores
from torch import Tensor, nn
from torch.utils.data import Dataset
from trainer_cases import QUIET, identical, weights
from transformers import AutoConfig, AutoModel, PreTrainedModel

from hf_fip import FIPConfig, FIPTrainer, SingularValueConfig
from hf_fip.fisher import Categorical, fisher_trace, infer_likelihood
from hf_fip.hub.load import load_model

# ---- Their Fisher information ----


def assert_likelihood_is_softmax(model: nn.Module, inputs: Tensor, labels: Tensor) -> None:
    likelihood = infer_likelihood(model)
    assert isinstance(likelihood, Categorical)
    logits = model(inputs).logits.double()
    expected = logits[torch.arange(len(labels)), labels] - logits.exp().sum(1).log()
    torch.testing.assert_close(likelihood.log_prob(logits, labels), expected)


def assert_trace_is_that_of_autograd(model: nn.Module, batch: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """Of one autograd call a sample."""
    scores = looped_scores(model, batch, batch["labels"])
    expected = torch.stack([score.square().sum() for score in scores]).mean().item()
    assert expected > 0
    assert fisher_trace(model, batch, labels="empirical") == pytest.approx(expected, rel=tolerance)


def assert_finite_differences_meet_double_backward(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """In double precision."""
    model = model.double()
    batch = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    options = {"estimator": "signed_sum", "labels": "empirical", "epsilon": 1e-7}
    (_, found), (_, expected) = (
        estimate(copy.deepcopy(model), [batch], gradient=gradient, **options)
        for gradient in ("finite_difference", "double_backward")
    )
    assert_same_gradient(found, expected)


# ---- As models of transformers ----


def assert_same_to_every_loader(model: PreTrainedModel, folder: Path, auto_class: type, inputs: Tensor) -> None:
    model.save_pretrained(folder)
    assert type(AutoConfig.from_pretrained(folder)) is type(model.config)
    for load in (type(model).from_pretrained, auto_class.from_pretrained, load_model):
        again = load(folder).eval()
        assert type(again) is type(model) and torch.equal(again(inputs).logits, model(inputs).logits)
    backbone = AutoModel.from_pretrained(folder).eval()
    assert torch.equal(backbone(inputs).pooler_output, model.backbone(inputs).pooler_output)


def assert_pushed_as_saved(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = []
    repo, card = SimpleNamespace(repo_id="a/b"), SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *args, **kwargs: repo)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **kwargs: card)
    monkeypatch.setattr(
        type(model), "_upload_modified_files", lambda self, folder, *args, **kwargs: pushed.extend(os.listdir(folder))
    )
    model.push_to_hub("a/b")
    assert {"config.json", "model.safetensors"} <= set(pushed)


# ---- As models to purify ----


def short_run(
    folder, model: nn.Module, dataset: Dataset, collate: Callable, peft_config=None, train_transform=None, **options
) -> FIPTrainer:
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "trace_interval": 1, "learning_rate": 0.01}
    config = FIPConfig(str(folder), **{**settings, **QUIET, **options})
    own = {"peft_config": peft_config, "train_transform": train_transform}
    return FIPTrainer(model, config, data_collator=collate, train_dataset=dataset, **own)


def assert_training_moves_every_weight(run: FIPTrainer, but: frozenset[str] = frozenset()) -> None:
    before = weights(run.model)
    run.train()
    after = weights(run.model)
    assert not [name for name in before if torch.equal(before[name], after[name]) and name not in but]
    assert all(tensor.isfinite().all() for tensor in after.values())


def assert_resumes_to_the_same(make_run: Callable[..., FIPTrainer], folder: Path) -> None:
    """`make_run(folder, **options)` makes the trainer of a fresh model."""
    whole = make_run(folder / "whole", save_strategy="steps", save_steps=2)
    whole.train()
    resumed = make_run(folder / "resumed")
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    assert identical(weights(resumed.model), weights(whole.model))


def assert_fast_fip_shifts_every_layer(
    make_run: Callable[..., FIPTrainer], model: nn.Module, inputs: Tensor, kinds: type | tuple[type, ...]
) -> None:
    """Layers of these kinds; `make_run(model, **options)` makes its trainer. The adapter can be switched off."""
    received = model(inputs).logits
    layers = sum(isinstance(module, kinds) for module in model.modules())
    run = make_run(model, peft_config=SingularValueConfig(train_norms=True), learning_rate=0.1)
    run.train()
    trained = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    assert sum("singular_delta" in name for name in trained) == layers
    assert_can_be_switched_off(run.model, inputs, received)


def assert_can_be_switched_off(adapted: nn.Module, inputs: Tensor, received: Tensor) -> None:
    """The adapter has changed the received logits, and without it the model gives them again."""
    adapted.eval()
    assert not torch.equal(adapted(inputs).logits, received)
    with adapted.disable_adapter():
        assert torch.equal(adapted(inputs).logits, received)
