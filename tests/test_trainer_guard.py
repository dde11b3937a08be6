"""Ctrl-C and SIGTERM end a training at a checkpoint. What else may befall it is in test_faults."""

import os
import signal
import threading

import pytest
from fault_cases import Faulty, interrupt
from trainer_cases import Snapshots, identical, image_trainer, resnet, trained, vit, weights
from training_cases import trainer_of
from transformers import TrainerCallback

from hf_fip.checkpoint import last_complete_checkpoint


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


@SENT
def test_a_training_within_another_one_is_finished_and_the_outer_one_stops(number, error, handler, tmp_path):
    class Within(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                inner.train()

    inner = image_trainer(tmp_path / "inner", vit(), callbacks=[Signal(number)], max_steps=4)
    outer, handlers = image_trainer(tmp_path / "outer", vit(), callbacks=[Within()], max_steps=4), handler()
    with pytest.raises(error):
        outer.train()
    assert inner.state.global_step == 4 and outer.state.global_step == 2
    assert last_complete_checkpoint(str(tmp_path / "inner")) is None
    assert last_complete_checkpoint(str(tmp_path / "outer")).endswith("checkpoint-2")
    assert handler() == handlers


@SENT
@pytest.mark.parametrize("update", [1, 3, 6])  # of six
def test_a_signal_while_the_teacher_of_nad_trains_changes_nothing(update, number, error, handler, tmp_path):
    def interrupt(batch):
        seen.append(batch)
        if len(seen) == update:
            os.kill(os.getpid(), number)
        return batch

    seen = []
    expected = trained(trainer_of("nad", tmp_path / "whole", resnet()))
    with pytest.raises(error):
        trainer_of("nad", tmp_path / "stopped", resnet(), train_transform=interrupt).train()
    assert os.listdir(tmp_path / "stopped") == ["checkpoint-1"] and len(seen) == 6 + 1
    resumed = trainer_of("nad", tmp_path / "stopped", resnet())
    resumed.train(resume_from_checkpoint=True)
    assert identical(weights(resumed.model), expected)


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
