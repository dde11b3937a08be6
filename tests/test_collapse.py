"""A classifier that collapses to one class is taken back, and no other model ever is."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from torch import nn
from trainer_cases import (
    Images,
    PlainNet,
    identical,
    image_trainer,
    logged,
    marian,
    resnet,
    text_trainer,
    trained,
    vit,
    weights,
)

import hf_fip.collapse
from hf_fip import SingularValueConfig
from hf_fip.collapse import BETWEEN_COPIES, COLLAPSE_NAME, OTHERS, WINDOW, CollapseGuard

CLASSES = 10
BALANCED = torch.arange(WINDOW) % CLASSES
RARE = (torch.arange(33 * OTHERS) % 33 == 32).long()  # 97 % are class 0


# ---- What a window says ----


class Run:
    """A guard that is shown predictions in place of a training; each update adds 1 to running mean and frozen bias."""

    def __init__(self, batch: int = 32):
        self.guard, self.model, self.batch = CollapseGuard(), nn.BatchNorm1d(1), batch
        self.guard.watching = True
        self.model.bias.requires_grad_(False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), momentum=0.9, lr=1.0)
        self.state = SimpleNamespace(global_step=0, is_world_process_zero=True)

    def see(self, predicted, labels) -> "Run":
        """One update for each `batch` samples."""
        for some, of in zip(torch.as_tensor(predicted).split(self.batch), labels.split(self.batch), strict=True):
            self.guard.begin_update(self.model, self.state.global_step)
            self.guard.see(nn.functional.one_hot(some, CLASSES).float(), of)
            self.model.weight.grad = -torch.ones(1)
            self.optimizer.step()
            with torch.no_grad():
                self.model.bias += 1
                self.model.running_mean += 1
            self.state.global_step += 1
            self.guard.on_step_end(None, self.state, None, model=self.model, optimizer=self.optimizer)
        return self


def right(labels):
    return labels


def constant(labels, name: int = 3):
    return torch.full_like(labels, name)


def noise(labels):
    return torch.randint(CLASSES, labels.shape)


def half(labels):
    """Half of the others are named class 0."""
    return torch.where(torch.arange(len(labels)) // 2 % 2 == 0, labels, 0)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("labels", [BALANCED, BALANCED % 2, RARE], ids=["ten classes", "two classes", "97 % one"])
@pytest.mark.parametrize("name", [0, 1, 3], ids="all are {}".format)
@pytest.mark.parametrize("before", [right, half], ids=["all right", "half right"])
def test_a_collapse_is_taken_back_to_where_the_last_healthy_window_began(labels, name, before, caplog):
    run = Run().see(before(labels), labels)
    momentum = run.optimizer.state[run.model.weight]["momentum_buffer"]
    assert momentum < -1 and run.guard.factor == 1
    steps = run.state.global_step
    run.see(constant(labels, name), labels)
    assert run.guard.collapses == 1 and run.guard.factor == pytest.approx(0.1)
    assert run.model.weight.item() == 1.0 and run.model.running_mean.item() == 0.0  # as at the beginning
    assert run.model.bias.item() == 2 * steps  # frozen: it is none of the guard's business
    assert not run.optimizer.state
    (warning,) = caplog.messages
    assert f"Step {2 * steps}" in warning and "100%" in warning and "step 0, with 0.1 of eta_f" in warning


NEVER = {
    "97 % one class, rightly named": [(right, RARE)] * 4,
    "nearly all one class, rightly named": [(right, torch.arange(50 * OTHERS) % 50 == 0)] * 4,
    "one class, rightly named": [(right, BALANCED), *[(right, BALANCED * 0)] * 4],
    "sorted by class, rightly named": [(right, torch.arange(CLASSES).repeat_interleave(WINDOW))] * 4,
    "begins as a constant": [(constant, BALANCED)] * 4,
    "begins as a constant that is mostly right": [(lambda labels: constant(labels, 0), RARE)] * 4,
    "begins as noise, goes on as a constant": [*[(noise, BALANCED)] * 4, *[(constant, BALANCED)] * 4],
    "knows nothing, and names all classes": [(right, BALANCED), *[(noise, BALANCED)] * 4],
    "a constant for less than a window": [*[(right, BALANCED), (constant, BALANCED[:64]), (right, BALANCED)] * 2],
    "nothing but a constant's labels": [(right, BALANCED), *[(constant, BALANCED * 0 + 3)] * 4],
}


@pytest.mark.parametrize("name", NEVER)
def test_no_other_model_is_touched(name):
    run = Run()
    for predict, labels in NEVER[name]:
        run.see(predict(labels.long()), labels.long())
    assert run.guard.collapses == 0 and run.model.weight.item() > run.state.global_step


def test_each_collapse_takes_eta_f_further_down():
    run = Run()
    for collapses in (1, 2, 3):
        run.see(right(BALANCED), BALANCED).see(constant(BALANCED), BALANCED)
        assert run.guard.factor == pytest.approx(0.1**collapses)
    run.see(constant(BALANCED), BALANCED)
    assert run.guard.collapses == 4  # it did not get away from there


@pytest.mark.parametrize("batch", [8, 32, WINDOW, 2 * WINDOW])
def test_the_copy_is_never_much_older_than_that(batch):
    run = Run(batch)
    for _ in range(3 * BETWEEN_COPIES):
        run.see(right(BALANCED), BALANCED)
    healthy = run.state.global_step
    run.see(constant(BALANCED), BALANCED).see(constant(BALANCED), BALANCED)
    window = max(1, WINDOW // batch)
    assert run.guard.collapses > 0
    assert healthy - 2 * window - BETWEEN_COPIES <= run.model.running_mean.item() < healthy


def test_a_model_on_its_way_down_is_not_kept():
    run = Run(WINDOW)
    third = torch.where(torch.arange(WINDOW) % 3 == 0, BALANCED, (BALANCED + 1) % CLASSES)
    run.see(right(BALANCED), BALANCED)
    for _ in range(2 * BETWEEN_COPIES):
        run.see(third, BALANCED)
    run.see(constant(BALANCED), BALANCED)
    assert run.guard.collapses == 1 and run.model.running_mean.item() == 0


@pytest.mark.parametrize("fault", ["a label that is left out", "logits that are no numbers"])
def test_what_says_nothing_does_not_count(fault):
    run = Run(WINDOW).see(right(BALANCED), BALANCED)
    logits, labels = nn.functional.one_hot(constant(BALANCED), CLASSES).float(), BALANCED.clone()
    if fault == "a label that is left out":
        labels[: WINDOW // 2] = -100
    else:
        logits[: WINDOW // 2] *= torch.nan
    for collapses in (0, 1):  # half a window each
        run.guard.begin_update(run.model, run.state.global_step)
        run.guard.see(logits, labels)
        run.guard.on_step_end(None, run.state, None, model=run.model, optimizer=run.optimizer)
        assert run.guard.collapses == collapses


def test_the_predictions_of_all_processes_make_a_window(monkeypatch):
    monkeypatch.setattr(hf_fip.collapse, "sum_over_processes", lambda counts: 2 * counts)
    run = Run().see(right(BALANCED[:64]), BALANCED[:64]).see(constant(BALANCED[:64]), BALANCED[:64])
    assert run.guard.collapses == 1


# ---- A real collapse ----

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
STRONG = {"eta_f": 50.0, "max_steps": 64, "train_dataset": Images(256), "per_device_train_batch_size": 32}
STRONG |= {"logging_steps": 4}
CASES = {
    "vit": (vit, {}),
    "resnet": (resnet, {}),
    "plain-module": (PlainNet, {}),
    "micro-batches": (PlainNet, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 16}),
    "trace-form": (PlainNet, {"trace_form": "trace"}),
    "both-terms": (PlainNet, {"eta_r": 0.1}),
    "adamw": (vit, {"optim": "adamw_torch", "optim_args": None, "learning_rate": 0.01}),
    "adapter": (vit, {"peft_config": LORA, "learning_rate": 0.25, "eta_f": 30.0}),
    "singular": (vit, {"peft_config": SingularValueConfig(train_norms=True), "learning_rate": 0.3}),
    "loss-scale": (vit, {"max_grad_norm": 0.0, "eta_f": 1.0}),
}


@pytest.fixture(scope="module")
def received(tmp_path_factory):
    """Classifiers that have learned `Images`."""
    place, options = tmp_path_factory.mktemp("received"), {**STRONG, "eta_f": 0.0}
    return {make: trained(image_trainer(place, make(), **options)) for make in (vit, resnet, PlainNet)}


def purifier(name, folder, received, **options):
    make, own = CASES[name]
    model = make()
    model.load_state_dict(received[make])
    trainer = image_trainer(folder, model, **{**STRONG, **own, **options})
    if name == "loss-scale":  # as with fp16 on an accelerator
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    return trainer


def answers(trainer) -> tuple[float, float]:
    """Which share of the images the class named most is named for, and which share is named rightly."""
    data, model = Images(256), trainer.model.eval()
    with torch.no_grad():
        predicted = model(pixel_values=data.pixels)["logits"].argmax(-1)
    return predicted.bincount().max().item() / 256, (predicted == data.labels).float().mean().item()


@pytest.mark.parametrize("name", CASES)
def test_a_model_that_would_end_as_a_constant_does_not(name, received, tmp_path, monkeypatch, caplog):
    unguarded = purifier(name, tmp_path, received)
    with monkeypatch.context() as patch:
        patch.setattr(CollapseGuard, "_take_back", lambda *args: None)
        unguarded.train()
    named_most, found = answers(unguarded)
    assert named_most > 0.95 and found < 0.4
    trainer = purifier(name, tmp_path, received)
    trainer.train()
    named_most, found = answers(trainer)
    assert named_most < 0.8 and found > 0.55
    collapses = logged(trainer, "collapses")
    assert collapses[-1] == trainer._collapse.collapses == len(caplog.messages) > 0
    trainer.state.global_step = 0
    assert trainer.current_eta_f() == pytest.approx(trainer.args.eta_f * 0.1 ** collapses[-1])


def test_training_again_starts_with_the_whole_eta_f(received, tmp_path):
    trainer = purifier("plain-module", tmp_path, received)
    trainer.train()
    assert trainer._collapse.collapses == 1
    trainer.args.max_steps = 1
    trainer.train()
    assert trainer._collapse.collapses == 0 and not logged(trainer, "collapses")


def test_the_card_says_so(received, tmp_path):
    trainer, said = purifier("plain-module", tmp_path, received), "In training it collapsed to one class (1×)"
    trainer.train()
    trainer.create_model_card()
    assert said in (tmp_path / "README.md").read_text()
    trainer.state.log_history = [row for row in trainer.state.log_history if "collapses" not in row]
    trainer.create_model_card()
    assert "collapsed" not in (tmp_path / "README.md").read_text()


# ---- What it costs nothing ----


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"label_smoothing_factor": 0.1}])
def test_a_model_that_does_not_collapse_is_trained_as_if_it_were_not_watched(options, tmp_path, monkeypatch):
    options = {**STRONG, "eta_f": 0.01, "max_steps": 12, "trace_interval": 3, **options}
    watched = image_trainer(tmp_path, vit(0.2), **options)
    expected = trained(watched)
    assert watched._collapse._healthy is not None
    never = property(lambda self: False, lambda self, value: None)
    monkeypatch.setattr(CollapseGuard, "watching", never, raising=False)
    unwatched = image_trainer(tmp_path, vit(0.2), **options)
    assert identical(trained(unwatched), expected)
    assert unwatched._collapse._healthy is None


class Many(Images):
    def __getitem__(self, row):
        return {"pixel_values": self.pixels[row], "labels": nn.functional.one_hot(self.labels[row], 3).float()}


def multi_label(folder, **options):
    model = vit(problem_type="multi_label_classification")
    return image_trainer(folder, model, eta_f=0.01, train_dataset=Many(), **options)


UNWATCHED = {
    "eta_f=0": lambda folder, **options: image_trainer(folder, vit(), eta_f=0.0, eta_r=1.0, **options),
    "seq2seq": lambda folder, **options: text_trainer(folder, marian(), eta_f=0.01, **options),
    "multi-label": multi_label,
}


@pytest.mark.parametrize("name", UNWATCHED)
def test_nothing_else_is_watched(name, tmp_path, monkeypatch):
    monkeypatch.setattr(CollapseGuard, "see", lambda *args: pytest.fail("it is watched"))
    trainer = UNWATCHED[name](tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    assert (tmp_path / "checkpoint-2").is_dir() and not (tmp_path / "checkpoint-2" / COLLAPSE_NAME).exists()


class SmallMemory(PlainNet):
    """Runs out of memory in the second micro-batch of more than 16 samples."""

    large = 0

    def forward(self, pixel_values, labels=None):
        self.large += self.training and len(pixel_values) > 16
        if self.large == 2:
            self.large += 1
            raise RuntimeError("CUDA out of memory.")
        return super().forward(pixel_values, labels)


def test_an_update_that_ran_out_of_memory_does_not_count(tmp_path):
    options = {**STRONG, "eta_f": 0.01, "max_steps": 2, "gradient_accumulation_steps": 2, "auto_find_batch_size": True}
    trainer = image_trainer(tmp_path, SmallMemory(), **options)
    trainer.train()
    smaller = trainer.state.train_batch_size
    assert smaller < 32
    assert trainer._collapse._window[1].sum() == 2 * 2 * smaller


# ---- Killed and resumed ----

SAVING = {"save_strategy": "steps", "save_steps": 6}  # amid windows of 4 updates, and between them


RESUMED = {"plain-module": (6, 12, 30, 48), "micro-batches": (6,), "singular": (12,), "adamw": (12,)}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_collapses_where_the_whole_one_did(name, received, tmp_path):
    whole = purifier(name, tmp_path, received, **SAVING)
    expected = trained(whole)
    collapses = logged(whole, "collapses")
    for step in RESUMED[name]:
        resumed = purifier(name, tmp_path / str(step), received)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert identical(weights(resumed.model), expected)
        assert logged(resumed, "collapses") == collapses
    assert collapses[-1] > 0


def test_a_checkpoint_without_what_was_kept_is_resumed_and_watched_anew(received, tmp_path):
    options = {**SAVING, "save_only_model": True, "eta_f": 0.01}
    purifier("vit", tmp_path, received, **options).train()
    assert not (tmp_path / "checkpoint-60" / COLLAPSE_NAME).exists()
    shutil.rmtree(tmp_path / "checkpoint-64")
    resumed = purifier("vit", tmp_path, received, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed._collapse._healthy.step == 60
