"""Sealed test sets: measured, never read to choose anything.

A defender has clean data only. What is chosen by ASR (a learning rate, a stopping point, a checkpoint) would make a
purifier look better than it can be for anyone who does not know the attack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from torch.utils.data import Dataset, SequentialSampler, Subset
from transformers import EvalPrediction, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, has_length


class SealedDataset(Dataset):
    """A test set that a trainer measures and by which it chooses nothing.

    In a trainer's `eval_dataset`, what is measured on it while the trainer trains or searches hyper-parameters goes to
    `log_history` and nowhere else: no callback, scheduler, checkpoint or objective gets it. Before and after training
    `evaluate()` returns it as ever.

    Args:
        dataset: model inputs with true labels, with a length.
        attack_labels: `(len(dataset),)`, what the attacker wants of each input; None for clean test data.

    Raises:
        ValueError: there are not as many attack labels as inputs, or the data set has no length.

    Example:

    ```python
    trainer = FIPTrainer(
        model="someone/model",
        args=FIPConfig("out", eval_strategy="steps", metric_for_best_model="held_out_loss"),
        train_dataset=clean,
        eval_dataset={"held_out": held_out, "triggered": SealedDataset(triggered, attack_labels)},
        compute_metrics=backdoor_metrics,
    )
    ```
    """

    def __init__(self, dataset, attack_labels: np.ndarray | None = None):
        if not has_length(dataset):
            raise ValueError("A data set without a length (a stream?) cannot be sealed: load it first.")
        self.dataset = dataset
        self.attack_labels = None if attack_labels is None else np.asarray(attack_labels)
        if self.attack_labels is not None and len(self.attack_labels) != len(dataset):
            raise ValueError(f"There are {len(dataset)} inputs and {len(self.attack_labels)} attack labels.")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int):
        return self.dataset[row]

    def select(self, rows) -> SealedDataset:
        """These rows, sealed."""
        rows = list(rows)
        return SealedDataset(
            Subset(self.dataset, rows), None if self.attack_labels is None else self.attack_labels[rows]
        )


class TriggeredPrediction(EvalPrediction):
    """What `compute_metrics` gets for triggered inputs: an `EvalPrediction` with `attack_labels`, `(n,)`."""

    def __init__(self, prediction: EvalPrediction, attack_labels: np.ndarray):
        super().__init__(prediction.predictions, prediction.label_ids, prediction.inputs, prediction.losses)
        self.attack_labels = attack_labels


class SealedEvaluation:
    """Makes a Hugging Face trainer keep the seal of a [`SealedDataset`]: `class MyTrainer(SealedEvaluation, Trainer)`.

    `FIPTrainer` and `FIPSeq2SeqTrainer` do.

    Raises:
        ValueError: (when built) for `metric_for_best_model` of a sealed set, and for a sealed `train_dataset`.
    """

    _is_choosing = False  # while something might be chosen by what is measured

    def __init__(
        self, model=None, args=None, data_collator=None, train_dataset=None, eval_dataset=None, *positional, **kwargs
    ):
        check_seals(args, train_dataset, eval_dataset)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, *positional, **kwargs)

    def train(self, *positional, **kwargs):
        with self._choosing():
            return super().train(*positional, **kwargs)

    def hyperparameter_search(self, *positional, **kwargs):
        with self._choosing():
            return super().hyperparameter_search(*positional, **kwargs)

    def evaluation_loop(self, dataloader, description: str, *positional, **kwargs) -> EvalLoopOutput:
        # Here all metrics of `evaluate` and `predict` come from: what is taken out reaches neither the logs and
        # callbacks nor what `evaluate` returns to scheduler, choice of checkpoint and hyper-parameter search.
        sealed = as_sealed(dataloader.dataset)
        if sealed is None:
            return super().evaluation_loop(dataloader, description, *positional, **kwargs)
        compute_metrics, shown = self.compute_metrics, self.callback_handler.eval_dataloader
        if compute_metrics is not None and sealed.attack_labels is not None:
            self.compute_metrics = _with_attack_labels(compute_metrics, sealed.attack_labels)
        try:
            output = super().evaluation_loop(dataloader, description, *positional, **kwargs)
        finally:
            self.compute_metrics, self.callback_handler.eval_dataloader = compute_metrics, shown
        if not self._is_choosing:
            return output
        if description == "Evaluation":
            self.state.log_history.append(
                {**output.metrics, "epoch": self.state.epoch, "step": self.state.global_step}
            )
        return output._replace(metrics={})

    def _get_dataloader(self, dataset, *positional, **kwargs):
        if as_sealed(dataset) is None:
            return super()._get_dataloader(dataset, *positional, **kwargs)
        # All inputs are measured: without the last ones, the attack labels would be too many.
        dropped, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super()._get_dataloader(dataset, *positional, **kwargs)
        finally:
            self.args.dataloader_drop_last = dropped

    def _get_eval_sampler(self, eval_dataset):
        if as_sealed(eval_dataset) is None:
            return super()._get_eval_sampler(eval_dataset)
        return SequentialSampler(eval_dataset)  # as the attack labels are; the Trainer may group by length

    @contextmanager
    def _choosing(self) -> Iterator[None]:
        before, self._is_choosing = self._is_choosing, True
        try:
            yield
        finally:
            self._is_choosing = before


def as_sealed(dataset) -> SealedDataset | None:
    """A sealed data set, or the part of one that a `Subset` of it is; None for any other."""
    if isinstance(dataset, Subset):
        whole = as_sealed(dataset.dataset)
        return None if whole is None else whole.select(dataset.indices)
    return dataset if isinstance(dataset, SealedDataset) else None


def check_seals(args: TrainingArguments | None, train_dataset, eval_dataset) -> None:
    """Raise a ValueError when a trainer is to train on, or to choose by, a sealed data set."""
    if as_sealed(train_dataset) is not None:
        raise ValueError("train_dataset is a SealedDataset, which is there to be measured on: train on clean data.")
    if args is None or eval_dataset is None:
        return
    several = isinstance(eval_dataset, dict)
    sets = {f"eval_{name}_": part for name, part in eval_dataset.items()} if several else {"eval_": eval_dataset}
    sealed = {prefix for prefix, part in sets.items() if as_sealed(part) is not None}
    if args.batch_eval_metrics and any(as_sealed(sets[prefix]).attack_labels is not None for prefix in sealed):
        raise ValueError("batch_eval_metrics cannot tell which attack labels belong to a batch: set it to False.")
    metric = args.metric_for_best_model
    if metric is None:
        return
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    prefix = max((prefix for prefix in sets if name.startswith(prefix)), key=len, default=None)
    if prefix in sealed:
        raise ValueError(
            f"metric_for_best_model={metric!r} is of a sealed data set, by which nothing may be chosen: hold some "
            "clean data out, eval_dataset={'held_out': ..., ...}, and choose by 'held_out_loss', for example."
        )


def _with_attack_labels(compute_metrics: Callable, attack_labels: np.ndarray) -> Callable:
    return lambda prediction: compute_metrics(TriggeredPrediction(prediction, attack_labels))
