"""The likelihood of detected objects and of multi-label answers, and Tr F of every family of detectors."""

import math

import pytest
import torch
from detection_cases import CLASSES, CLASSIFIERS, DETECTORS, QUERIES, SIDE, detection_batch, detr, rt_detr
from torch import nn

from hf_fip.fisher import MatchedQueries, MultiLabel, TraceEstimator, fisher_diagonal, fisher_trace, infer_likelihood
from hf_fip.fisher.likelihood import IGNORE_INDEX

LIKELIHOOD = MatchedQueries(CLASSES, 2, class_cost=1, bbox_cost=5, giou_cost=2)


def outputs_of(logits: list, boxes: list) -> dict:
    return {"logits": torch.tensor(logits), "pred_boxes": torch.tensor(boxes)}


OBJECT = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}]
HERE, ELSEWHERE = [0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]


def test_the_softmax_likelihood_is_that_of_the_class_of_the_matched_query():
    outputs = outputs_of([[[9.0, 0, 0, 0], [0.0, 1.0, 2.0, 3.0]]], [[ELSEWHERE, HERE]])
    labels = LIKELIHOOD.targets(outputs, OBJECT)
    assert labels.tolist() == [[IGNORE_INDEX, 1]]
    expected = 1.0 - math.log(sum(math.exp(x) for x in (0, 1, 2, 3)))
    assert LIKELIHOOD.log_prob(outputs["logits"], labels).tolist() == pytest.approx([expected])


def test_the_sigmoid_likelihood_sums_the_classes_of_the_matched_query():
    outputs = outputs_of([[[9.0, 0, 0], [0.5, -1.0, 2.0]]], [[ELSEWHERE, HERE]])
    labels = LIKELIHOOD.targets(outputs, OBJECT)
    assert labels.tolist() == [[[IGNORE_INDEX] * 3, [0, 1, 0]]]
    sigmoid = [1 / (1 + math.exp(-x)) for x in (0.5, -1.0, 2.0)]
    expected = math.log(1 - sigmoid[0]) + math.log(sigmoid[1]) + math.log(1 - sigmoid[2])
    assert LIKELIHOOD.log_prob(outputs["logits"], labels).tolist() == pytest.approx([expected])


@pytest.mark.parametrize("width", [CLASSES, CLASSES + 1])
def test_drawn_labels_follow_the_model_where_a_query_is_matched_and_nowhere_else(width):
    logits = torch.randn(1, 2, width).repeat(4000, 1, 1)
    shape = logits.shape[:2] if width > CLASSES else logits.shape
    labels = torch.zeros(shape, dtype=torch.long)
    labels[:, 0] = IGNORE_INDEX
    drawn = LIKELIHOOD.sample(logits, labels, torch.Generator().manual_seed(0))
    assert (drawn[:, 0] == IGNORE_INDEX).all() and drawn[:, 1].min() == 0
    if width > CLASSES:
        found, wanted = torch.bincount(drawn[:, 1], minlength=width) / 4000, torch.softmax(logits[0, 1], -1)
    else:
        found, wanted = drawn[:, 1].float().mean(0), torch.sigmoid(logits[0, 1])
    assert torch.allclose(found, wanted, atol=0.03)


def test_an_image_without_objects_has_no_score():
    model, batch = detr(), detection_batch((0, 0))
    labels = infer_likelihood(model).targets(model(batch["pixel_values"]), batch["labels"])
    assert (labels == IGNORE_INDEX).all()
    assert fisher_trace(model, batch) == 0


@pytest.mark.parametrize("family", DETECTORS)
def test_the_matching_is_that_of_the_models_own_loss(family, monkeypatch):
    from transformers.loss.loss_for_object_detection import HungarianMatcher
    from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher

    seen = []
    for matcher in (HungarianMatcher, RTDetrHungarianMatcher):
        original = matcher.forward
        monkeypatch.setattr(matcher, "forward", lambda *args, of=original: seen.append(of(*args)) or seen[-1])
    model, batch = DETECTORS[family](), detection_batch()
    outputs = model(**batch)
    ours = infer_likelihood(model).targets(outputs, batch["labels"])
    kept = (ours != IGNORE_INDEX) if ours.ndim == 2 else (ours != IGNORE_INDEX).any(-1)
    for row, (queries, objects) in enumerate(seen[0]):
        assert kept[row].nonzero().flatten().tolist() == sorted(queries.tolist())
        classes = batch["labels"][row]["class_labels"][objects]
        found = ours[row, queries] if ours.ndim == 2 else ours[row, queries].argmax(-1)
        assert found.tolist() == classes.tolist()


def by_hand(model: nn.Module, batch: dict, labels: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """Tr F and its diagonal by one backward pass a sample; DETR freezes the first layers of its backbone."""
    likelihood = infer_likelihood(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    diagonal = {name: torch.zeros_like(p) for name, p in trained.items()}
    for row in range(len(labels)):
        logits = likelihood.logits(model(batch["pixel_values"][row : row + 1]))
        model.zero_grad()
        likelihood.log_prob(logits, labels[row : row + 1]).sum().backward()
        for name, parameter in trained.items():
            if parameter.grad is not None:
                diagonal[name] += parameter.grad.square() / len(labels)
    model.zero_grad()
    return sum(float(part.sum()) for part in diagonal.values()), diagonal


@pytest.mark.parametrize("family", DETECTORS)
def test_the_trace_and_the_diagonal_of_a_detector_are_those_of_one_sample_at_a_time(family):
    model, batch = DETECTORS[family](), detection_batch()
    labels = infer_likelihood(model).targets(model(batch["pixel_values"]), batch["labels"])
    trace, diagonal = by_hand(model, batch, labels)
    assert trace > 0
    assert fisher_trace(model, batch, labels="empirical") == pytest.approx(trace, rel=1e-4)
    found = fisher_diagonal(model, [batch], labels="empirical")
    for name, part in diagonal.items():
        assert torch.allclose(found[name], part, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_the_trace_of_a_multi_label_head_is_that_of_one_sample_at_a_time(family):
    model = CLASSIFIERS[family]()
    batch = {
        "pixel_values": torch.randn(3, 3, SIDE, SIDE),
        "labels": torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]]),
    }
    assert isinstance(infer_likelihood(model), MultiLabel)
    trace, _ = by_hand(model, batch, batch["labels"])
    assert fisher_trace(model, batch, labels="empirical") == pytest.approx(trace, rel=1e-4)


def test_the_sum_over_drawn_labels_estimates_the_same_trace_as_the_exact_scores():
    model, batch = DETECTORS["yolos"](), detection_batch((2, 3))
    generator = torch.Generator().manual_seed(0)

    def mean(estimator: str, rounds: int) -> float:
        values = [fisher_trace(model, batch, estimator=estimator, generator=generator) for _ in range(rounds)]
        return sum(values) / rounds

    assert mean("sampled_sum", 40) == pytest.approx(mean("exact", 8), rel=0.4)


@pytest.mark.parametrize("family", {**DETECTORS, **CLASSIFIERS})
def test_the_default_gradient_of_the_trace_needs_no_second_derivative(family):
    model = {**DETECTORS, **CLASSIFIERS}[family]().train()
    batch = detection_batch((2, 0, 3, 1))
    if family in CLASSIFIERS:
        batch["labels"] = torch.randint(0, 2, (4, CLASSES)).float()
    likelihood = infer_likelihood(model)
    estimator = TraceEstimator(model, likelihood)
    estimator.observe(batch, torch.Generator().manual_seed(0))
    value, gradient = estimator.estimate()
    norm = torch.stack([part.square().sum() for part in gradient]).sum().sqrt()
    assert value > 0 and torch.isfinite(norm) and norm > 0


def test_the_two_gradients_agree_on_a_smooth_detector():
    model, batch = DETECTORS["yolos"]().double(), detection_batch()
    batch["pixel_values"] = batch["pixel_values"].double()
    batch["labels"] = [{**image, "boxes": image["boxes"].double()} for image in batch["labels"]]
    model.set_attn_implementation("eager")
    with torch.no_grad():  # its tokens start at zero, where LayerNorm is anything but smooth
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    found = {}
    for gradient in ("finite_difference", "double_backward"):
        estimator = TraceEstimator(model, gradient=gradient, epsilon=1e-6)
        estimator.observe(batch, torch.Generator().manual_seed(0))
        found[gradient] = torch.cat([part.flatten() for part in estimator.estimate()[1]])
    assert torch.cosine_similarity(*found.values(), dim=0) > 0.999


def test_queries_that_are_there_to_denoise_are_left_out():
    model, batch = rt_detr(num_denoising=4).train(), detection_batch()
    likelihood, outputs = infer_likelihood(model), model(**batch)
    assert outputs.logits.shape[1] > QUERIES
    assert likelihood.logits(outputs).shape[1] == QUERIES
    with torch.no_grad():
        alone = likelihood.logits(model.eval()(batch["pixel_values"]))
        model.train()
        again = likelihood.logits(model(**batch))
    assert alone.shape == again.shape
    assert likelihood.targets(outputs, batch["labels"]).shape == (3, QUERIES, CLASSES)


def test_a_detector_of_another_kind_needs_a_likelihood_of_its_own():
    class Config:
        num_labels = 3

    with pytest.raises(ValueError, match="Config has no .*pass `likelihood=`"):
        MatchedQueries.of(Config())


@pytest.mark.parametrize(
    ("logits", "labels"),
    [((1, 2, CLASSES + 2), (1, 2)), ((1, CLASSES), (1,)), ((1, 2, CLASSES), (1, 2)), ((1, 2, CLASSES + 1), (1, 3))],
)
def test_shapes_that_do_not_fit_are_refused(logits, labels):
    with pytest.raises(ValueError, match="expects"):
        LIKELIHOOD.log_prob(torch.zeros(logits), torch.zeros(labels, dtype=torch.long))
