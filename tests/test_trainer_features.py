"""The Trainer's own features keep working with both penalties on."""

import math
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig
from torch import nn
from torch.utils.data import IterableDataset
from trainer_cases import (
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
    uncompiled,  # noqa: F401
    vit,
    weights,
)
from transformers import TrainerCallback, default_data_collator
from transformers.trainer_utils import HPSearchBackend

from hf_fip import FIPConfig, FIPSeq2SeqConfig, FIPSeq2SeqTrainer, FIPTrainer
from hf_fip.fisher import Categorical, fisher_diagonal, fisher_trace

BOTH = {"eta_f": 0.05, "eta_r": 1.0, "eta_f_schedule": "constant"}
PLAIN_SGD = {"optim_args": "momentum=0", "lr_scheduler_type": "constant"}
EXACT = {"trace_estimator": "exact", "trace_gradient": "double_backward"}


# ---- The update ----


def test_clipping_bounds_the_task_and_the_penalties_together(tmp_path):
    options = {"eta_f": 50.0, "eta_r": 1.0, "max_steps": 1, "learning_rate": 0.1, "max_grad_norm": 0.01}
    model = vit()
    before = weights(model)
    after = trained(image_trainer(tmp_path, model, **options, **PLAIN_SGD))
    moved = torch.cat([(after[name] - before[name]).flatten() for name in before]).norm()
    assert moved.item() == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_the_learning_rate_follows_its_schedule(tmp_path):
    trainer = image_trainer(tmp_path, vit(), **BOTH, lr_scheduler_type="linear", learning_rate=0.03)
    trainer.train()
    assert logged(trainer, "learning_rate") == pytest.approx([0.03, 0.02, 0.01])


@pytest.mark.parametrize("model", [vit, eager_vit, resnet], ids=lambda model: model.__name__)
def test_mixed_precision_gives_nearly_the_same_trace_and_drift(model, tmp_path):
    runs = []
    for bf16 in (False, True):
        trainer = image_trainer(tmp_path, model(), **BOTH, bf16=bf16, max_steps=2)
        trainer.train()
        assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
        runs.append(trainer)
    for key in ("fisher_trace", "drift"):
        assert logged(runs[0], key) != logged(runs[1], key)  # or nothing ran in bfloat16
        assert logged(runs[1], key) == pytest.approx(logged(runs[0], key), rel=0.1)


def with_loss_scale(trainer, scale):
    """A trainer with the gradient scaler that `fp16=True` would give it on an accelerator."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return trainer


def test_a_loss_scale_cancels(tmp_path):
    options = {**BOTH, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    plain = trained(image_trainer(tmp_path, vit(0.1), **options))
    scaled = with_loss_scale(image_trainer(tmp_path, vit(0.1), **options), 2.0**12)
    assert distance(trained(scaled), plain) < 1e-6
    assert scaled.accelerator.scaler.get_scale() == 2.0**12


def test_an_overflow_of_the_loss_scale_skips_the_update_and_lowers_the_scale(tmp_path):
    snapshots, model = Snapshots(), vit()
    before = weights(model)
    likelihood = Overflowing()
    options = {"eta_f": 0.05, "max_grad_norm": 0.0, "callbacks": [snapshots], "likelihood": likelihood}
    trainer = with_loss_scale(image_trainer(tmp_path, model, **options), 2.0**12)
    trainer.train()
    assert identical(snapshots.weights[0], before)
    assert not identical(snapshots.weights[1], before)
    assert trainer.accelerator.scaler.get_scale() == 2.0**11
    assert len(logged(trainer, "fisher_trace")) == 2


class Overflowing(Categorical):
    """Overflows in the score of the first update, as float16 does under too large a loss scale."""

    def __init__(self):
        self.uses = 0

    def log_prob(self, logits, labels):
        self.uses += 1
        return super().log_prob(logits, labels) * (math.inf if self.uses == 1 else 1.0)


@pytest.mark.parametrize(
    ("model", "options"),
    [(lambda: vit(0.2), {}), (lambda: eager_vit(0.2), {"trace_gradient": "double_backward"})],
    ids=["first-order", "double-backward"],
)
def test_activation_checkpointing_changes_no_update(model, options, tmp_path):
    runs = []
    for on in (False, True):
        trainer = image_trainer(tmp_path, model(), **BOTH, **options, activation_checkpointing=on)
        runs.append(trained(trainer))
        assert trainer.model.is_activation_checkpointing is on
    assert distance(*runs) < 1e-6


class CheckpointedNet(PlainNet):
    """BatchNorm in a checkpointed block, which runs forward again in each backward pass."""

    def forward(self, pixel_values, labels=None):
        if not self.training:
            return super().forward(pixel_values, labels)

        def block(x):
            return self.norm(self.conv(x)).relu()

        hidden = torch.utils.checkpoint.checkpoint(block, pixel_values, use_reentrant=False)
        logits = self.head(hidden.flatten(1))
        return {"logits": logits} | ({} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)})


def test_a_checkpointed_batchnorm_moves_no_further_than_in_plain_training(tmp_path):
    runs = [
        trained(image_trainer(tmp_path, CheckpointedNet(), eta_f=eta_f, max_steps=1, trace_interval=1))
        for eta_f in (0.0, 0.05)
    ]
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert torch.equal(runs[0][name], runs[1][name])


@pytest.mark.usefixtures("uncompiled")
def test_compilation_changes_no_update(tmp_path):
    plain = trained(image_trainer(tmp_path, PlainNet(0.2), **BOTH))
    compiled = image_trainer(tmp_path, PlainNet(0.2), **BOTH, torch_compile=True, torch_compile_backend="aot_eager")
    assert distance(trained(compiled), plain) < 1e-6
    assert hasattr(compiled.model_wrapped, "_orig_mod")


class OtherMasks(nn.Module):
    """What compiled code does: the same function, with other dropout masks."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model

    def forward(self, *args, **kwargs):
        torch.rand(1)
        return self._orig_mod(*args, **kwargs)


@pytest.mark.usefixtures("uncompiled")
def test_all_passes_of_a_compiled_model_see_the_same_dropout_mask(tmp_path, monkeypatch):
    traces = []
    for options in ({}, {"torch_compile": True}):
        trainer = image_trainer(tmp_path, PlainNet(0.5), **BOTH, **options, max_steps=1)
        monkeypatch.setattr(torch, "compile", lambda model, **options: OtherMasks(model))
        trainer.train()
        traces.append(logged(trainer, "fisher_trace"))
    assert isinstance(trainer.model_wrapped, OtherMasks)
    assert traces[0] == traces[1]  # both from the mask of the uncompiled model


def test_label_smoothing_changes_the_loss_and_not_the_trace(tmp_path):
    runs = []
    for smoothing in (0.0, 0.3):
        trainer = image_trainer(tmp_path, vit(), **BOTH, max_steps=1, label_smoothing_factor=smoothing)
        trainer.train()
        runs.append(trainer)
    assert logged(runs[0], "fisher_trace") == logged(runs[1], "fisher_trace")
    assert logged(runs[0], "task_loss") != pytest.approx(logged(runs[1], "task_loss"), rel=1e-3)


def test_an_own_loss_function_changes_the_loss_and_not_the_trace(tmp_path):
    def twice(outputs, labels, num_items_in_batch=None):
        return 2 * nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    runs = []
    for function in (None, twice):
        options = {"max_steps": 1, "gradient_accumulation_steps": 2, "compute_loss_func": function}
        trainer = image_trainer(tmp_path, vit(), **BOTH, **options)
        trainer.train()
        runs.append(trainer)
    assert logged(runs[0], "fisher_trace") == logged(runs[1], "fisher_trace")
    assert logged(runs[1], "task_loss") == pytest.approx([2 * logged(runs[0], "task_loss")[0]], rel=1e-5)


# ---- Models ----


def test_frozen_layers_stay_and_are_left_out_of_the_trace(tmp_path):
    model = vit()
    model.vit.requires_grad_(False)
    before, recorder = weights(model), Recorder()
    options = {"fisher_labels": "empirical", "train_transform": recorder, "max_steps": 1}
    trainer = image_trainer(tmp_path, model, **BOTH, **EXACT, **options)
    after = trained(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"classifier.weight", "classifier.bias"} == set(trainer._anchor.diagonal)
    model.load_state_dict(before)
    of_head = fisher_trace(model, recorder.batches[0], labels="empirical")
    assert logged(trainer, "fisher_trace")[0] == pytest.approx(of_head, rel=1e-5)
    model.requires_grad_(True)
    assert fisher_trace(model, recorder.batches[0], labels="empirical") > 1.01 * of_head


def test_an_adapter_alone_is_trained_and_the_trace_is_that_of_the_adapter(tmp_path):
    recorder = Recorder()
    lora = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"], init_lora_weights=False
    )
    options = {"fisher_labels": "empirical", "train_transform": recorder, "save_strategy": "steps", "save_steps": 2}
    trainer = image_trainer(tmp_path, eager_vit(), peft_config=lora, **BOTH, **EXACT, **options)
    before = weights(trainer.model)
    after = trained(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("lora_" in name or "modules_to_save" in name for name in changed)
    trainer.model.load_state_dict(before)
    expected = fisher_trace(trainer.model, recorder.batches[0], labels="empirical")
    assert logged(trainer, "fisher_trace")[0] == pytest.approx(expected, rel=1e-5)
    assert max(logged(trainer, "drift")) > 0

    trainer.train(resume_from_checkpoint=True)
    assert identical(weights(trainer.model), after)


def test_a_sequence_model_is_trained_and_evaluated_with_generation(tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions)
        return {"padding": float((prediction.predictions == 20).mean())}

    trainer = text_trainer(
        tmp_path,
        marian(0.1),
        **BOTH,
        predict_with_generate=True,
        generation_max_length=5,
        eval_dataset=Sentences(4, seed=1),
        eval_strategy="steps",
        eval_steps=3,
        compute_metrics=compute_metrics,
    )
    before = weights(trainer.model)
    assert distance(trained(trainer), before) > 1e-4
    assert len(logged(trainer, "fisher_trace")) == 3 and max(logged(trainer, "drift")) > 0
    assert len(logged(trainer, "eval_padding")) == 1
    assert seen[0].dtype.kind == "i" and seen[0].shape == (4, 20)
    assert (seen[0][:, 5:] == 20).all() and (seen[0][:, 1:5] != 20).any()  # five tokens, then padding


def test_a_module_that_transformers_does_not_know_is_trained(tmp_path):
    before = weights(PlainNet())
    trainer = image_trainer(tmp_path, PlainNet(0.1), **BOTH)
    assert distance(trained(trainer), before) > 1e-4
    assert set(trainer._anchor.received) == {name for name, _ in PlainNet().named_parameters()}


# ---- Data ----


class Stream(IterableDataset):
    def __iter__(self):
        yield from Images(16)


def test_a_stream_is_trained_on(tmp_path):
    before = weights(vit())
    trainer = image_trainer(tmp_path, vit(), eta_f=0.05, train_dataset=Stream(), max_steps=6)
    assert distance(trained(trainer), before) > 1e-4
    assert len(logged(trainer, "fisher_trace")) == 6  # four batches of four, then again from the start


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, range(11)),
        ({"dataloader_drop_last": True, "per_device_eval_batch_size": 8}, range(11)),
        ({"diagonal_samples": 50}, range(11)),
        ({"diagonal_samples": 5}, np.random.default_rng(42).permutation(11)[:5].tolist()),
        ({"train_transform": lambda batch: {**batch, "pixel_values": batch["pixel_values"] * 0.0}}, range(11)),
    ],
    ids=["all", "drop-last", "more-than-all", "some", "without-augmentation"],
)
def test_the_diagonal_is_over_each_training_sample_once(options, rows, tmp_path):
    model, data = vit(0.5), Images(11)
    options = {"fisher_labels": "empirical", "trace_estimator": "signed_sum", "train_dataset": data, **options}
    trainer = image_trainer(tmp_path, model, **BOTH, **options)
    trainer.train()
    rows = list(rows)
    batch = {"pixel_values": data.pixels[rows], "labels": data.labels[rows]}
    expected = fisher_diagonal(vit(0.5), [batch], labels="empirical")
    for name, diagonal in trainer._anchor.diagonal.items():
        if "k_proj.bias" not in name:  # exactly zero, up to rounding
            torch.testing.assert_close(diagonal, expected[name], rtol=1e-4, atol=1e-8)
    assert identical(trainer._anchor.received, dict(vit(0.5).named_parameters()))


class Numbered(Images):
    """Images with a column that no model takes."""

    def __getitem__(self, row):
        return {**super().__getitem__(row), "number": row}


def as_table(data):
    columns = {"pixel_values": data.pixels.tolist(), "labels": data.labels.tolist(), "number": [*range(len(data))]}
    return datasets.Dataset.from_dict(columns).with_format("torch")


@pytest.mark.parametrize("dataset", [Numbered(), as_table(Images())], ids=["torch", "datasets"])
def test_columns_that_the_model_does_not_take_are_left_out(dataset, tmp_path):
    plain = trained(image_trainer(tmp_path, PlainNet(), **BOTH))
    assert identical(trained(image_trainer(tmp_path, PlainNet(), **BOTH, train_dataset=dataset)), plain)


def test_the_transform_sees_every_training_batch_and_no_other(tmp_path):
    recorder = Recorder()
    options = {"gradient_accumulation_steps": 2, "eval_dataset": Images(8), "eval_strategy": "steps", "eval_steps": 1}
    trainer = image_trainer(tmp_path, vit(), **BOTH, **options, train_transform=recorder)
    trainer.train()
    assert len(recorder.batches) == 3 * 2

    def negative(batch):
        return {**batch, "pixel_values": -batch["pixel_values"]}

    turned = image_trainer(tmp_path, vit(), eta_f=0.05, train_transform=negative)
    data = Images()
    data.pixels = -data.pixels
    assert identical(trained(turned), trained(image_trainer(tmp_path, vit(), eta_f=0.05, train_dataset=data)))


def test_arguments_are_taken_in_the_order_of_the_trainer(tmp_path, monkeypatch):
    data = [Images(4), Images(8)]
    trainer = FIPTrainer(vit(), FIPConfig(str(tmp_path), use_cpu=True), default_data_collator, *data)
    assert (trainer.data_collator, trainer.train_dataset, trainer.eval_dataset) == (default_data_collator, *data)
    monkeypatch.chdir(tmp_path)
    assert FIPTrainer(vit()).args.output_dir == "fip_output"
    assert isinstance(FIPSeq2SeqTrainer(marian()).args, FIPSeq2SeqConfig)


# ---- Around the updates ----


def test_callbacks_see_every_event(tmp_path):
    events = []

    class Listener(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            events.append("step begins")

        def on_substep_end(self, *args, **kwargs):
            events.append("micro-batch")

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            events.append("gradients" if all(p.grad is not None for p in model.parameters()) else "none")

        def on_log(self, args, state, control, logs=None, **kwargs):
            events.append("log" if {"loss", "task_loss", "fisher_trace", "drift"} <= logs.keys() else "end")

    image_trainer(tmp_path, vit(), **BOTH, max_steps=2, gradient_accumulation_steps=2, callbacks=[Listener()]).train()
    assert events == ["step begins", "micro-batch", "gradients", "log"] * 2 + ["end"]


def test_nothing_is_reported_elsewhere_by_default(tmp_path):
    trainer = image_trainer(tmp_path, vit(), **BOTH)
    assert trainer.args.report_to == []
    names = {type(callback).__name__ for callback in trainer.callback_handler.callbacks}
    assert names == {"DefaultFlowCallback", "PrinterCallback", "CollapseGuard", "StopAtCheckpoint", "_LiftShifts"}


def test_evaluation_of_several_sets_measures_the_plain_loss_and_changes_nothing(tmp_path):
    sets = {"clean": Images(8, seed=1), "triggered": Images(8, seed=2)}
    options = {"eval_dataset": sets, "eval_strategy": "steps", "eval_steps": 1}
    trainer = image_trainer(tmp_path, resnet(), **BOTH, **options)
    after = trained(trainer)
    assert identical(after, trained(image_trainer(tmp_path, resnet(), **BOTH)))
    metrics = trainer.evaluate()
    for name, data in sets.items():
        with torch.no_grad():
            loss = trainer.model(pixel_values=data.pixels, labels=data.labels).loss.item()
        assert metrics[f"eval_{name}_loss"] == pytest.approx(loss, rel=1e-5)
        assert logged(trainer, f"eval_{name}_loss")[-1] == pytest.approx(loss, rel=1e-5)
        assert len(logged(trainer, f"eval_{name}_loss")) == 4


def test_an_evaluation_amid_an_update_changes_nothing(tmp_path):
    class Impatient(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            trainer.evaluate(Images(5, seed=1))

    options = {**BOTH, "gradient_accumulation_steps": 2}
    expected = trained(image_trainer(tmp_path, vit(), **options))
    trainer = image_trainer(tmp_path, vit(), **options, callbacks=[Impatient()])
    assert identical(trained(trainer), expected)
    assert len(logged(trainer, "eval_loss")) == 3


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    snapshots = Snapshots()
    trainer = image_trainer(
        tmp_path,
        vit(),
        **BOTH,
        max_steps=4,
        learning_rate=0.5,
        callbacks=[snapshots],
        eval_dataset=Images(8, seed=1),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
    )
    after = trained(trainer)
    best = int(np.argmin(logged(trainer, "eval_loss")))
    assert best < 3  # or loading it would prove nothing
    assert identical(after, snapshots.weights[best])


class Counted(Categorical):
    """Keeps the sizes of the micro-batches that labels are drawn for."""

    def __init__(self):
        self.sizes = []

    def sample(self, logits, labels=None, generator=None):
        self.sizes.append(len(logits))
        return super().sample(logits, labels, generator)


class SmallMemory(PlainNet):
    """Runs out of memory in the second micro-batch of more than four samples."""

    large = 0

    def forward(self, pixel_values, labels=None):
        if self.training and len(pixel_values) > 4:
            self.large += 1
            if self.large == 2:
                raise RuntimeError("CUDA out of memory.")
        return super().forward(pixel_values, labels)


def test_a_smaller_batch_after_running_out_of_memory_starts_with_a_whole_update(tmp_path):
    likelihood = Counted()
    trainer = image_trainer(
        tmp_path,
        SmallMemory(),
        eta_f=0.05,
        trace_interval=2,
        likelihood=likelihood,
        auto_find_batch_size=True,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_steps=2,
    )
    expected = []
    add = trainer._add_trace
    trainer._add_trace = lambda: expected.append([len(seen.labels) for seen in trainer._trace._seen]) or add()
    trainer.train()
    smaller = trainer.state.train_batch_size
    assert smaller < 8
    assert likelihood.sizes == [8, smaller, smaller]
    assert expected == [[smaller, smaller]]


# ---- Several trainings ----


def test_training_again_starts_from_the_present_weights(tmp_path):
    trainer = image_trainer(tmp_path, vit(), **BOTH, max_steps=2)
    first = trained(trainer)
    trainer.train()
    names = dict(trainer.model.named_parameters())
    assert identical(trainer._anchor.received, {name: first[name] for name in names})
    assert logged(trainer, "drift")[0] == 0


def test_a_hyperparameter_search_builds_the_terms_anew_for_each_trial(tmp_path, monkeypatch):
    trials = [{"eta_f": 0.0, "eta_r": 2.0}, {"eta_f": 0.3, "eta_r": 0.0}, {"eta_f": 0.01, "eta_r": 1.0}]
    found = []

    class Backend:
        """Tries the list above; no search library is installed."""

        def ensure_available(self):
            pass

        def run(self, trainer, n_trials, direction):
            for number, params in enumerate(trials):
                trainer.train(trial=SimpleNamespace(number=number, params=params))
                found.append((weights(trainer.model), logged(trainer, "fisher_trace"), logged(trainer, "drift")))

    backends = transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS
    monkeypatch.setitem(backends, HPSearchBackend.OPTUNA, Backend)
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    trainer = image_trainer(tmp_path, None, model_init=lambda: vit(0.1))
    trainer.hyperparameter_search(lambda trial: trial.params, n_trials=3, backend="optuna")

    for params, (after, traces, drifts) in zip(trials, found, strict=True):
        alone = image_trainer(tmp_path, None, model_init=lambda: vit(0.1), **params)
        assert identical(trained(alone), after)
        assert bool(traces) == (params["eta_f"] > 0) and bool(drifts) == (params["eta_r"] > 0)
        assert not any(map(math.isnan, traces + drifts))


def test_a_card_can_be_written_between_two_trainings(tmp_path):
    trainer = image_trainer(tmp_path, vit())
    trainer.train()
    trainer.create_model_card()
    trainer.train()
    assert len(logged(trainer, "loss")) == 3
