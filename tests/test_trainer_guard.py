"""What goes wrong in a long training costs as little as it can: an update that is not finite, a signal."""

import math
import os
import signal
import threading

import pytest
from trainer_cases import (
    Images,
    Snapshots,
    identical,
    image_trainer,
    logged,
    resnet,
    trained,
    vit,
    weights,
)
from transformers import TrainerCallback

from hf_fip import FIPConfig
from hf_fip.checkpoint import last_complete_checkpoint
from hf_fip.fisher import Categorical

CONSTANT = {"lr_scheduler_type": "constant", "eta_f_schedule": "constant", "trace_interval": 1}
MODELS = pytest.mark.parametrize("make", [vit, resnet], ids=["vit", "resnet"])


class Faulty(Categorical):
    """A categorical likelihood that goes wrong at its n-th use, or from then on; an update uses it once a score."""

    def __init__(self, at: int, fault, always: bool = False):
        self.left, self.fault, self.always = at, fault, always

    def log_prob(self, logits, labels):
        self.left -= 1
        wrong = self.left <= 0 if self.always else self.left == 0
        return self.fault(super().log_prob(logits, labels)) if wrong else super().log_prob(logits, labels)


class BadBatch:
    """A `train_transform` under which the n-th batch is one of NaN."""

    def __init__(self, at: int):
        self.left = at

    def __call__(self, batch):
        self.left -= 1
        return {**batch, "pixel_values": batch["pixel_values"] * math.nan} if self.left == 0 else batch


class Momentum(TrainerCallback):
    """The momentum after each update."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        held = (value["momentum_buffer"] for value in optimizer.state.values() if "momentum_buffer" in value)
        self.seen.append({str(number): tensor.clone() for number, tensor in enumerate(held)})


def interrupt(log_prob):
    raise KeyboardInterrupt


# ---- Updates that are not finite ----

FAULTS = {
    "trace-nan": (3, lambda value: value * math.nan),  # Tr F of the second update
    "trace-inf": (3, lambda value: value * math.inf),
    "gradient-nan": (4, lambda value: value * math.nan),  # its gradient
}
EACH_FAULT = pytest.mark.parametrize(("at", "fault"), FAULTS.values(), ids=FAULTS)


@EACH_FAULT
def test_an_update_whose_trace_is_not_finite_is_dropped_and_counted(at, fault, tmp_path):
    snapshots = Snapshots()
    options = {**CONSTANT, "max_steps": 3, "callbacks": [snapshots]}
    trainer = image_trainer(tmp_path, vit(), **options, likelihood=Faulty(at, fault))
    trainer.train()
    first, second, third = snapshots.weights
    assert identical(first, second) and not identical(second, third)
    assert logged(trainer, "dropped_updates")[-1] == 1
    assert all(math.isfinite(value) for value in logged(trainer, "task_loss"))


@EACH_FAULT
@pytest.mark.parametrize("allowed", [0, 2])
def test_too_many_in_a_row_end_the_run_with_the_weights_of_the_last_good_one(at, fault, allowed, tmp_path):
    snapshots, model = Snapshots(), vit()
    options = {**CONSTANT, "max_steps": 9, "max_dropped_updates": allowed, "callbacks": [snapshots]}
    trainer = image_trainer(tmp_path, model, **options, likelihood=Faulty(at, fault, always=True))
    with pytest.raises(FloatingPointError, match=rf"^Tr F is .* at step {1 + allowed}.*: lower [^\n]*$"):
        trainer.train()
    assert identical(snapshots.weights[0], weights(model)) and len(snapshots.weights) == 1 + allowed


@MODELS
@pytest.mark.parametrize("options", [{}, {"eta_f": 0.0}], ids=["fip", "plain"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_never_a_number_ends_the_run_before_anything_changes(make, value, options, tmp_path):
    data, model = Images(), make()
    data.pixels[:] = value
    before = weights(model)
    trainer = image_trainer(tmp_path, model, train_dataset=data, gradient_accumulation_steps=2, max_steps=9, **options)
    with pytest.raises(FloatingPointError, match=r"^The loss is (nan|inf) at step 5, as in the 5 updates [^\n]*$"):
        trainer.train()
    assert identical(before, weights(model))


@MODELS
@pytest.mark.parametrize(
    "options",
    [{}, {"eta_f": 0.0}, {"max_grad_norm": 0.0}, {"gradient_accumulation_steps": 2}],
    ids=["fip", "plain", "unclipped", "accumulated"],
)
def test_one_bad_batch_costs_one_update(make, options, tmp_path):
    """Nothing of it stays behind: neither in weights and momentum nor in running statistics."""
    snapshots, momentum = Snapshots(), Momentum()
    bad = BadBatch(1 + options.get("gradient_accumulation_steps", 1))
    options = {**CONSTANT, "max_steps": 3, "train_transform": bad, "callbacks": [snapshots, momentum], **options}
    trainer = image_trainer(tmp_path, make(), **options)
    trainer.train()
    first, second, third = snapshots.weights
    assert identical(first, second) and not identical(second, third)
    assert identical(*momentum.seen[:2]) and not identical(*momentum.seen[1:])
    assert all(tensor.isfinite().all() for tensor in third.values())
    assert logged(trainer, "dropped_updates")[-1] == 1


def test_faults_that_are_not_in_a_row_do_not_end_a_run(tmp_path):
    class EveryOther(BadBatch):
        def __call__(self, batch):
            self.left = 1 if self.left == -1 else self.left
            return super().__call__(batch)

    options = {**CONSTANT, "max_steps": 8, "max_dropped_updates": 1, "train_transform": EveryOther(2)}
    trainer = image_trainer(tmp_path, vit(), **options)
    trainer.train()
    assert logged(trainer, "dropped_updates")[-1] == 4


def test_a_negative_number_of_dropped_updates_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_dropped_updates=-1"):
        FIPConfig(str(tmp_path), max_dropped_updates=-1)


@pytest.mark.parametrize("at", [3, 4], ids=["score", "second-pass"])
def test_an_update_that_is_broken_off_leaves_the_weights_of_the_last_one(at, tmp_path):
    snapshots, model = Snapshots(), vit()
    storage = [parameter.data_ptr() for parameter in model.parameters()]
    options = {**CONSTANT, "likelihood": Faulty(at, interrupt), "callbacks": [snapshots]}
    with pytest.raises(KeyboardInterrupt):
        image_trainer(tmp_path, model, **options).train()
    assert len(snapshots.weights) == 1 and identical(snapshots.weights[0], weights(model))
    assert storage == [parameter.data_ptr() for parameter in model.parameters()]


# ---- Signals ----


class Terminated(BaseException):
    """What the handler of these tests raises on SIGTERM."""


class Signal(TrainerCallback):
    """Sends a signal to this very process in the middle of an update, so many times."""

    def __init__(self, number: int, step: int = 2, times: int = 1):
        self.number, self.step, self.times = number, step, times

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


@pytest.fixture
def handler():
    """SIGTERM raises `Terminated`, SIGINT `KeyboardInterrupt`; gives the handlers there are."""

    def terminate(number, frame):
        raise Terminated

    handlers = {signal.SIGTERM: terminate, signal.SIGINT: signal.default_int_handler}
    found = {number: signal.signal(number, own) for number, own in handlers.items()}
    yield lambda: (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    for number, earlier in found.items():
        signal.signal(number, earlier)


SENT = pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])


@SENT
@pytest.mark.parametrize("make", [lambda: vit(0.2), resnet], ids=["vit", "resnet"])
def test_a_signal_ends_the_run_at_a_checkpoint_and_it_goes_on_to_the_same_weights(
    make, number, error, handler, tmp_path
):
    options = {"max_steps": 6, "eta_r": 0.5, "save_strategy": "no"}
    expected = trained(image_trainer(tmp_path / "whole", make(), **options))
    handlers = handler()
    with pytest.raises(error):
        image_trainer(tmp_path / "stopped", make(), callbacks=[Signal(number)], **options).train()
    assert handler() == handlers
    assert last_complete_checkpoint(str(tmp_path / "stopped")).endswith("checkpoint-3")
    resumed = image_trainer(tmp_path / "stopped", make(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert identical(weights(resumed.model), expected) and resumed.state.global_step == 6


@SENT
def test_a_second_signal_ends_the_run_at_once(number, error, handler, tmp_path):
    snapshots, handlers = Snapshots(), handler()
    with pytest.raises(error):
        image_trainer(tmp_path, vit(), callbacks=[Signal(number, times=2), snapshots], max_steps=6).train()
    assert len(snapshots.weights) == 2 and last_complete_checkpoint(str(tmp_path)) is None
    assert handler() == handlers


def test_a_signal_at_the_last_update_leaves_nothing_to_do(handler, tmp_path):
    trainer = image_trainer(tmp_path, vit(), callbacks=[Signal(signal.SIGTERM, step=2)], max_steps=3)
    with pytest.raises(Terminated):
        trainer.train()
    done = weights(trainer.model)
    resumed = image_trainer(tmp_path, vit(), max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert identical(weights(resumed.model), done)


def test_handlers_come_back_after_a_run_and_after_an_error(handler, tmp_path):
    handlers = handler()
    image_trainer(tmp_path, vit(), max_steps=1).train()
    assert handler() == handlers
    with pytest.raises(KeyboardInterrupt):
        image_trainer(tmp_path, vit(), likelihood=Faulty(3, interrupt), max_steps=3).train()
    assert handler() == handlers


def test_a_signal_that_is_ignored_stays_ignored(handler, tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = image_trainer(tmp_path, vit(), callbacks=[Signal(signal.SIGINT)], max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4 and handler()[0] == signal.SIG_IGN


def test_a_trainer_in_another_thread_does_not_listen(tmp_path):
    trainer, failures = image_trainer(tmp_path, vit(), max_steps=1), []

    def train():
        try:
            trainer.train()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert not failures and trainer.state.global_step == 1
