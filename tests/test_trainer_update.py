"""What one update of the FIPTrainer does to the weights, and what it says about it."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from trainer_cases import (
    SHORT,
    Images,
    PlainNet,
    Recorder,
    Sentences,
    Snapshots,
    distance,
    eager_vit,
    identical,
    image_trainer,
    logged,
    marian,
    resnet,
    text_trainer,
    trained,
    vit,
)
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_fip.fisher import Categorical, TraceEstimator

BOTH_TERMS = {"eta_f": 0.05, "eta_r": 1.0}
# One update is then −lr · gradient, and nothing else.
PLAIN_SGD = {"optim_args": "momentum=0", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.02}
CONSTANT = {**PLAIN_SGD, "eta_f_schedule": "constant"}


# ---- Without penalties it is the Trainer ----

SGD = {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.05, "lr_scheduler_type": "cosine"}
ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3, "lr_scheduler_type": "linear", "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (lambda: vit(0.2), SGD),
        (lambda: vit(0.2), {**ADAMW, "gradient_accumulation_steps": 2}),
        (lambda: vit(0.2), {**SGD, "bf16": True}),
        (resnet, {**SGD, "gradient_accumulation_steps": 2, "num_train_epochs": 1, "max_steps": -1}),
        (lambda: PlainNet(0.2), {**ADAMW, "label_smoothing_factor": 0.0}),
        (lambda: marian(0.2), {**ADAMW, "bf16": True, "gradient_accumulation_steps": 2}),
    ],
    ids=["sgd", "adamw-accumulation", "bf16", "batchnorm-epoch", "plain-module", "seq2seq"],
)
def test_without_penalties_losses_and_weights_are_those_of_the_trainer(model, options, tmp_path):
    options = {**SHORT, **options}
    del options["trace_interval"]
    text = "Marian" in type(model()).__name__
    trainer_class = Seq2SeqTrainer if text else Trainer
    args_class = Seq2SeqTrainingArguments if text else TrainingArguments
    plain = trainer_class(
        model(), args_class(str(tmp_path), **options), train_dataset=Sentences() if text else Images()
    )
    expected = trained(plain)
    fip = (text_trainer if text else image_trainer)(tmp_path, model(), eta_f=0, eta_r=0, **options)
    assert identical(trained(fip), expected)
    assert len(logged(plain, "loss")) == plain.state.max_steps
    for key in ("loss", "grad_norm", "learning_rate"):
        assert logged(plain, key) == logged(fip, key)
    assert logged(fip, "task_loss") == pytest.approx(logged(fip, "loss"))
    assert not logged(fip, "fisher_trace") and not logged(fip, "drift")


@pytest.mark.parametrize(
    ("model", "make"),
    [(vit, image_trainer), (resnet, image_trainer), (marian, text_trainer)],
    ids=lambda x: x.__name__,
)
def test_with_default_settings_the_trace_changes_the_weights(model, make, tmp_path):
    results = []
    for eta_f in ({}, {"eta_f": 0.0}):
        trainer = make(tmp_path, model(), trace_interval=4, **eta_f)
        results.append(trained(trainer))
    assert distance(*results) > 1e-4


# ---- The gradient that is added ----


def task_gradient(model, batches) -> list[torch.Tensor]:
    loss = sum(model(**batch)["loss"] for batch in batches) / len(batches)
    return torch.autograd.grad(loss, list(model.parameters()))


def scores_of(model, batch, create_graph=False) -> list[list[torch.Tensor]]:
    """The score of each sample's clean label, one backward pass a sample."""
    scores = []
    for image, label in zip(batch["pixel_values"], batch["labels"], strict=True):
        log_prob = model(pixel_values=image[None])["logits"].log_softmax(-1)[0, label]
        scores.append(torch.autograd.grad(log_prob, list(model.parameters()), create_graph=create_graph))
    return scores


def trace_by_hand(model, batch) -> tuple[float, list[torch.Tensor]]:
    """(1/B) Σ ‖s_i‖² and its gradient, straight from the definition."""
    per_sample = [sum(s.square().sum() for s in score) for score in scores_of(model, batch, create_graph=True)]
    trace = sum(per_sample) / len(per_sample)
    return trace.item(), list(torch.autograd.grad(trace, list(model.parameters())))


def trace_by_double_backward(estimator, labels, step):
    def compute(model, batch):
        seed = np.random.SeedSequence([42, step, 0]).generate_state(1)
        trace = TraceEstimator(model, estimator=estimator, gradient="double_backward", labels=labels)
        trace.observe(batch, torch.Generator().manual_seed(int(seed[0])))
        value, gradient = trace.estimate()
        return value.item(), gradient

    return compute


@pytest.mark.parametrize("form", ["trace", "log_trace"])
@pytest.mark.parametrize(
    ("estimator", "gradient", "labels", "tolerance"),
    [
        ("exact", "double_backward", "empirical", 1e-5),
        ("sampled_sum", "double_backward", "sampled", 1e-5),
        ("sampled_sum", "finite_difference", "sampled", 2e-2),
        ("signed_sum", "finite_difference", "empirical", 2e-2),
    ],
)
def test_an_update_adds_both_gradients(estimator, gradient, labels, tolerance, form, tmp_path):
    eta_f, eta_r, lr = 0.01 if form == "trace" else 0.1, 0.5, 0.5
    recorder, snapshots = Recorder(), Snapshots()
    model, received = eager_vit(), eager_vit()
    trainer = image_trainer(
        tmp_path,
        model,
        **{**CONSTANT, "learning_rate": lr},
        **{"trace_estimator": estimator, "trace_gradient": gradient, "fisher_labels": labels, "trace_form": form},
        eta_f=eta_f,
        eta_r=eta_r,
        max_steps=2,
        trace_epsilon=1e-3,
        train_transform=recorder,
        callbacks=[snapshots],
    )
    trainer.train()

    for step, batch in enumerate(recorder.batches):
        before = eager_vit().eval()
        if step:
            before.load_state_dict(snapshots.weights[step - 1])
        by_hand = trace_by_hand if estimator == "exact" else trace_by_double_backward(estimator, labels, step)
        value, trace_gradient = by_hand(before, batch)
        assert logged(trainer, "fisher_trace")[step] == pytest.approx(value, rel=1e-4)
        weight = eta_f if form == "trace" else eta_f / value
        task = task_gradient(before, [batch])
        after = snapshots.weights[step]
        if labels == "empirical":
            everything = {"pixel_values": Images().pixels, "labels": Images().labels}
            scores = scores_of(received.eval(), everything)
            diagonal = [torch.stack(column).square().mean(0) for column in zip(*scores, strict=True)]
        else:
            anchor = trainer._anchor.diagonal
            diagonal = [anchor[name] for name, _ in before.named_parameters()]
        added, expected, drift = [], [], 0.0
        for index, (name, parameter) in enumerate(before.named_parameters()):
            moved = parameter - received.get_parameter(name)
            drift += (eta_r / 2 * diagonal[index] * moved.square()).sum().item()
            expected.append((weight * trace_gradient[index] + eta_r * diagonal[index] * moved).flatten())
            added.append(((parameter - after[name]) / lr - task[index]).flatten())
        added, expected = torch.cat(added), torch.cat(expected)
        assert (added - expected).norm() <= tolerance * expected.norm()
        assert logged(trainer, "drift")[step] == pytest.approx(drift, rel=1e-4, abs=1e-12)


def test_the_trace_is_applied_at_every_nth_update_n_times_as_strongly(tmp_path):
    def run(**options):
        snapshots = Snapshots()
        options = {"callbacks": [snapshots], "trace_gradient": "double_backward", "trace_form": "trace", **options}
        trainer = image_trainer(tmp_path, eager_vit(), **CONSTANT, max_steps=2, **options)
        trainer.train()
        return snapshots.weights, logged(trainer, "fisher_trace")

    every_second, traces = run(eta_f=0.01, trace_interval=2)
    every, _ = run(eta_f=0.02, trace_interval=1)
    assert len(traces) == 1
    assert distance(every_second[0], every[0]) < 1e-7
    assert distance(every_second[1], every[1]) > 1e-5


@pytest.mark.parametrize(
    ("schedule", "expected"), [("linear", [0.8, 0.4, 0.08]), ("constant", [0.8] * 3), ("cosine", [0.8, 0.4, 0.0196])]
)
def test_eta_f_follows_its_schedule(schedule, expected, tmp_path):
    trainer = image_trainer(tmp_path, vit(), eta_f=0.8, eta_f_schedule=schedule)
    trainer.state.max_steps = 10
    found = []
    for trainer.state.global_step in (0, 5, 9):
        found.append(trainer.current_eta_f())
    assert found == pytest.approx(expected, rel=2e-3)


# ---- How the batch is split does not matter ----

SIGNED = {"trace_estimator": "signed_sum", "fisher_labels": "empirical"}


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({"trace_estimator": "exact", "trace_gradient": "double_backward"}, eager_vit),
        ({"trace_estimator": "exact", "trace_gradient": "double_backward"}, vit),  # sdpa
        ({"trace_estimator": "signed_sum", "fisher_labels": "empirical"}, vit),
        (
            {"trace_estimator": "signed_sum", "fisher_labels": "empirical", "trace_gradient": "double_backward"},
            eager_vit,
        ),
    ],
    ids=["exact", "exact-sdpa", "signed-first-order", "signed-double-backward"],
)
def test_an_update_does_not_depend_on_the_split_into_micro_batches(options, model, tmp_path, monkeypatch):
    if options["trace_estimator"] == "exact":  # the labels drawn would depend on the split
        monkeypatch.setattr(Categorical, "sample", lambda self, logits, labels, generator=None: labels)
    results = []
    for size, steps in ((8, 1), (4, 2), (2, 4)):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = image_trainer(tmp_path, model(), **CONSTANT, **split, **options, eta_f=0.1, eta_r=1.0, max_steps=2)
        results.append((trained(trainer), logged(trainer, "fisher_trace"), logged(trainer, "loss")))
    for moved, traces, losses in results[1:]:
        assert distance(moved, results[0][0]) < 1e-5
        assert traces == pytest.approx(results[0][1], rel=1e-4)
        assert losses == pytest.approx(results[0][2], rel=1e-4)


# ---- What is logged ----


def test_the_log_splits_the_loss_into_its_terms(tmp_path):
    for form, of_trace in (("trace", lambda trace: trace), ("log_trace", math.log)):
        options = {**BOTH_TERMS, "eta_f_schedule": "constant", "gradient_accumulation_steps": 2, "trace_form": form}
        trainer = image_trainer(tmp_path, vit(0.1), **options, max_steps=4)
        trainer.train()
        terms = zip(*(logged(trainer, key) for key in ("loss", "task_loss", "fisher_trace", "drift")), strict=True)
        for loss, task_loss, trace, drift in terms:
            assert loss == pytest.approx(task_loss + 0.05 * of_trace(trace) + drift, rel=1e-5)
        assert logged(trainer, "drift")[0] == 0 < min(logged(trainer, "drift")[1:])


def test_each_term_is_averaged_over_the_updates_since_the_last_log(tmp_path):
    def run(logging_steps):
        trainer = image_trainer(
            tmp_path, vit(), **BOTH_TERMS, max_steps=6, trace_interval=2, logging_steps=logging_steps
        )
        trainer.train()
        return trainer

    each, windows = run(1), run(3)
    for key in ("loss", "task_loss", "drift"):
        values = logged(each, key)
        assert logged(windows, key) == pytest.approx([np.mean(values[:3]), np.mean(values[3:])], rel=1e-5)
    traces = logged(each, "fisher_trace")  # at updates 0, 2 and 4
    assert logged(windows, "fisher_trace") == pytest.approx([np.mean(traces[:2]), traces[2]], rel=1e-5)


# ---- Seeds ----


def test_two_runs_with_one_seed_are_identical(tmp_path):
    runs = [
        trained(image_trainer(tmp_path, vit(0.2), **BOTH_TERMS, gradient_accumulation_steps=2, seed=seed))
        for seed in (3, 3, 4)
    ]
    assert identical(runs[0], runs[1])
    assert not identical(runs[0], runs[2])


@pytest.mark.parametrize(
    "options",
    [{}, {"trace_estimator": "signed_sum"}, {"trace_estimator": "exact", "trace_gradient": "double_backward"}],
    ids=["sampled", "signed", "exact"],
)
def test_the_penalties_leave_the_dropout_masks_as_they_were(options, tmp_path):
    def run(**more):
        snapshots = Snapshots()
        trainer = image_trainer(
            tmp_path, vit(0.3), gradient_accumulation_steps=2, callbacks=[snapshots], **more, **options
        )
        trainer.train()
        return logged(trainer, "task_loss")[0], snapshots.random_states

    plain_loss, plain_states = run(eta_f=0)
    loss, states = run(**BOTH_TERMS)
    assert loss == plain_loss
    assert all(torch.equal(state, plain) for state, plain in zip(states, plain_states, strict=True))


def test_the_extra_passes_move_batchnorm_statistics_no_further(tmp_path):
    statistics = []
    for terms in ({"eta_f": 0.0}, BOTH_TERMS):
        trainer = image_trainer(tmp_path, resnet(), **terms, max_steps=1, gradient_accumulation_steps=2)
        trained(trainer)
        statistics.append({name: buffer.clone() for name, buffer in trainer.model.named_buffers()})
    assert statistics[0] and identical(*statistics)


# ---- Interrupted and impossible updates ----


def test_an_overridden_loss_that_hides_the_batch_from_the_trace_is_refused(tmp_path):
    from hf_fip import FIPTrainer

    class Own(FIPTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return nn.functional.cross_entropy(model(inputs["pixel_values"]).logits, inputs["labels"])

    with pytest.raises(ValueError, match="super.*compute_loss_func"):
        image_trainer(tmp_path, vit(), trainer_class=Own).train()
