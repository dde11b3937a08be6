"""Nothing is lost: whatever befalls a run, it goes on from its last whole checkpoint and ends as if nothing had been.

Each trial does one thing to a run: it is killed, its disk is full or cannot be written to, a file of its last
checkpoint is spoilt, a worker of its data loader dies, a number in it is not finite. Then the received model is as it
was, the last whole checkpoint is found, and a run that goes on from there ends with the same weights, bit for bit.
"""

import json
import math
import random
import shutil
import signal

import pytest
from fault_cases import (
    ERRORS,
    FINAL,
    OUT,
    RECEIVED,
    STEPS,
    WRITES,
    BadBatch,
    Faulty,
    die_after,
    die_at_micro_batch,
    die_at_rotation,
    die_at_write,
    full_at_write,
    in_child,
    interrupt,
    last_whole,
    may_mount,
    on_read_only_disk,
    on_small_disk,
    receive,
    train,
    trainer,
    worker_fails_at,
)
from safetensors import safe_open
from trainer_cases import Images, Snapshots, identical, image_trainer, logged, resnet, vit, weights
from transformers import TrainerCallback

from hf_fip import FIPConfig
from hf_fip.checkpoint import CHECKSUMS_NAME

CONSTANT = {"lr_scheduler_type": "constant", "eta_f_schedule": "constant", "trace_interval": 1}
MODELS = pytest.mark.parametrize("make", [vit, resnet], ids=["vit", "resnet"])


def end_of(place) -> tuple[dict, list]:
    """The weights that a run ended with, and its log."""
    with safe_open(place / FINAL, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["log"])  # noqa: SIM118


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that nothing befell, with all its checkpoints."""
    place = tmp_path_factory.mktemp("undisturbed")
    receive(place)
    received = content(place / RECEIVED)
    assert in_child(place, save_total_limit=None) == 0, (place / ERRORS).read_text()
    assert content(place / RECEIVED) == received
    return place


class Trial:
    """A place with a received model, in which children train."""

    def __init__(self, place, undisturbed):
        self.place, self.undisturbed = place, undisturbed
        shutil.copytree(undisturbed / RECEIVED, place / RECEIVED)

    def run(self, fault=None, *arguments, **options) -> int:
        return in_child(self.place, fault, *arguments, **options)

    @property
    def errors(self) -> str:
        return (self.place / ERRORS).read_text()

    @property
    def last_words(self) -> str:
        return self.errors.splitlines()[-1]

    @property
    def last(self) -> int:
        return last_whole(self.place)

    def nothing_is_lost(self, at_least: int) -> None:
        """The checkpoint of that step, or a later one, is there, and a run that goes on ends as it should."""
        assert self.last >= at_least
        train(self.place)
        self.has_ended_the_same()
        assert self.last == STEPS

    def has_ended_the_same(self) -> None:
        assert content(self.place / RECEIVED) == content(self.undisturbed / RECEIVED)
        (found, found_log), (expected, expected_log) = end_of(self.place), end_of(self.undisturbed)
        assert identical(found, expected) and found_log == expected_log


@pytest.fixture
def trial(tmp_path, undisturbed):
    return Trial(tmp_path, undisturbed)


def test_the_files_of_a_checkpoint_are_those_of_the_trials(undisturbed):
    for step in (2, 4, 6):
        assert {path.name for path in (undisturbed / OUT / f"checkpoint-{step}").iterdir()} == {*WRITES}


# ---- Killed ----


@pytest.mark.parametrize("number", range(0, 2 * STEPS, 2))
def test_killed_at_a_micro_batch(number, trial):
    assert trial.run(die_at_micro_batch, number + number // 2 % 2) == -signal.SIGKILL
    trial.nothing_is_lost(at_least=number // 4 * 2)


@pytest.mark.parametrize(
    ("checkpoint", "name", "half"),
    [(4, name, half) for name in WRITES for half in (True, False)]
    + [(2, name, True) for name in ("model.safetensors", "trainer_state.json")],  # there is nothing to go back to
)
def test_killed_while_a_checkpoint_is_written(checkpoint, name, half, trial):
    assert trial.run(die_at_write, name, checkpoint, half) == -signal.SIGKILL
    is_whole = name == CHECKSUMS_NAME or (name == "trainer_state.json" and not half)
    assert trial.last == (checkpoint if is_whole else checkpoint - 2)
    trial.nothing_is_lost(at_least=checkpoint - 2)


def test_killed_while_an_old_checkpoint_is_removed(trial):
    assert trial.run(die_at_rotation) == -signal.SIGKILL
    trial.nothing_is_lost(at_least=4)


@pytest.mark.parametrize("number", range(4))
def test_killed_at_a_random_moment(number, trial):
    seconds = random.Random(number).uniform(0.02, 0.4)
    assert trial.run(die_after, seconds) in (-signal.SIGKILL, 0)  # 0: it was faster
    trial.nothing_is_lost(at_least=0)


def test_killed_again_and_again(trial):
    for fault in ((die_at_micro_batch, 6), (die_at_micro_batch, 0), (die_at_write, "optimizer.pt", 4, True)):
        assert trial.run(*fault) == -signal.SIGKILL
        assert trial.last == 2
    assert trial.run(die_at_micro_batch, 5) == -signal.SIGKILL
    trial.nothing_is_lost(at_least=4)


# ---- Disks ----


@pytest.mark.parametrize("name", WRITES)
def test_the_system_writes_no_further(name, trial):
    assert trial.run(full_at_write, name, 4) == 1
    assert "File too large" in trial.last_words or "could not be written: is the disk full?" in trial.last_words
    trial.nothing_is_lost(at_least=2)


@pytest.fixture(scope="module")
def mounts():
    if not may_mount():
        pytest.skip("the system lets nobody mount a disk")


@pytest.mark.usefixtures("mounts")
@pytest.mark.parametrize(("size", "whole"), [(40, 0), (100, 0), (200, 2), (300, 2)])  # kB; a checkpoint takes 150
def test_the_disk_is_full(size, whole, trial):
    assert trial.run(on_small_disk, trial.place, size * 1024, whole) == 0, trial.errors
    assert "No space left" in trial.errors or "could not be written: is the disk full?" in trial.errors
    trial.has_ended_the_same()


@pytest.mark.usefixtures("mounts")
@pytest.mark.parametrize("step", [0, 2, 4])
def test_the_disk_can_only_be_read(step, trial):
    assert trial.run(on_read_only_disk, trial.place, step, step) == 0, trial.errors
    assert "Read-only file system" in trial.errors
    trial.has_ended_the_same()


@pytest.mark.parametrize("name", [OUT, f"{OUT}/checkpoint-2", f"{OUT}/checkpoint-4"])
def test_a_file_is_where_a_folder_is_to_be(name, trial):
    (trial.place / name).parent.mkdir(exist_ok=True)
    (trial.place / name).write_text("mine")
    assert trial.run() == 1
    assert f"{trial.place / name}" in trial.last_words
    assert (trial.place / name).read_text() == "mine"
    (trial.place / name).unlink()
    trial.nothing_is_lost(at_least=2 if name.endswith("4") else 0)


# ---- Spoilt checkpoints ----


def flip(path):
    """One bit, in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


SPOIL = {
    "a bit flipped": flip,
    "the last byte cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("how", SPOIL)
@pytest.mark.parametrize("name", WRITES)
def test_a_file_of_the_last_checkpoint_is_spoilt(name, how, trial, caplog):
    shutil.copytree(trial.undisturbed / OUT, trial.place / OUT)
    SPOIL[how](trial.place / OUT / "checkpoint-6" / name)
    is_whole = (name, how) == (CHECKSUMS_NAME, "gone")  # as after a kill, or of the plain Trainer
    assert trial.last == (6 if is_whole else 4)
    trial.nothing_is_lost(at_least=4)
    said = f"checkpoint-6 in {trial.place / OUT} is half-written or damaged: going on from checkpoint-4."
    assert (said in caplog.messages) == (not is_whole)


def test_no_checkpoint_is_whole(trial):
    shutil.copytree(trial.undisturbed / OUT, trial.place / OUT)
    for step in (2, 4, 6):
        flip(trial.place / OUT / f"checkpoint-{step}" / "optimizer.pt")
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        trainer(trial.place).train(resume_from_checkpoint=True)
    trial.nothing_is_lost(at_least=0)


# ---- Workers ----


WORKERS = {"is killed": "DataLoader worker", "exits": "DataLoader worker", "cannot read": "'/not/there'"}


@pytest.mark.parametrize("how", WORKERS)
@pytest.mark.parametrize(("sample", "whole"), [(1, 0), (30, 2)], ids=["first epoch", "second epoch"])
def test_a_worker_of_the_data_loader_dies(sample, whole, how, trial):
    assert trial.run(worker_fails_at, sample, how, dataloader_num_workers=1) == 1
    assert WORKERS[how] in trial.errors
    trial.nothing_is_lost(at_least=whole)


# ---- Numbers that are not finite ----


class Momentum(TrainerCallback):
    """The momentum after each update."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        held = (value["momentum_buffer"] for value in optimizer.state.values() if "momentum_buffer" in value)
        self.seen.append({str(number): tensor.clone() for number, tensor in enumerate(held)})


FAULTS = {
    "trace-nan": (3, lambda value: value * math.nan),  # Tr F of the second update
    "trace-inf": (3, lambda value: value * math.inf),
    "gradient-nan": (4, lambda value: value * math.nan),  # its gradient
    "gradient-inf": (4, lambda value: value * math.inf),
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
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_one_bad_batch_costs_one_update(make, value, options, tmp_path):
    """Nothing of it stays behind: neither in weights and momentum nor in running statistics."""
    snapshots, momentum = Snapshots(), Momentum()
    bad = BadBatch(1 + options.get("gradient_accumulation_steps", 1), value)
    options = {**CONSTANT, "max_steps": 3, "train_transform": bad, "callbacks": [snapshots, momentum], **options}
    trainer = image_trainer(tmp_path, make(), **options)
    trainer.train()
    first, second, third = snapshots.weights
    assert identical(first, second) and not identical(second, third)
    assert identical(*momentum.seen[:2]) and not identical(*momentum.seen[1:])
    assert all(tensor.isfinite().all() for tensor in third.values())
    assert logged(trainer, "dropped_updates")[-1] == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_gradient_of_a_finite_loss_costs_one_update(value, tmp_path):
    snapshots, model, seen = Snapshots(), vit(), []
    model.classifier.bias.register_hook(lambda grad: seen.append(1) or (grad * value if len(seen) == 2 else grad))
    options = {**CONSTANT, "eta_f": 0.0, "max_steps": 3, "callbacks": [snapshots]}
    trainer = image_trainer(tmp_path, model, **options)
    trainer.train()
    first, second, third = snapshots.weights
    assert identical(first, second) and not identical(second, third)
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
