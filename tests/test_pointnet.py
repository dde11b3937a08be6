"""PointNet and PointNet++: what they compute, their Fisher information, and that they are models of transformers."""

from functools import partial

import numpy as np
import pytest
import torch
from cloud_cases import MODELS, batch, cloud, clouds_of, pointnet
from model_cases import (
    assert_fast_fip_shifts_every_layer,
    assert_finite_differences_meet_double_backward,
    assert_likelihood_is_softmax,
    assert_pushed_as_saved,
    assert_resumes_to_the_same,
    assert_same_to_every_loader,
    assert_trace_is_that_of_autograd,
    assert_training_moves_every_weight,
    short_run,
)
from scipy.spatial.distance import cdist
from torch import nn

from hf_fip import FIPTrainer
from hf_fip.fisher import fisher_diagonal, fisher_trace
from hf_fip.models import AutoModelForPointCloudClassification
from hf_fip.models.pointnet2 import ball_query, farthest_points, take
from hf_fip.tasks.point_cloud import CloudDataset, collate_clouds, scale_and_jitter


@pytest.fixture(params=MODELS)
def make(request):
    return MODELS[request.param]


def settled(model: nn.Module) -> nn.Module:
    """In eval mode, with BatchNorm statistics and matrices that are not the fresh ones."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5)
    return model.eval()


# ---- What they compute ----


def test_farthest_points_are_those_of_a_plain_loop():
    points = batch(rows=2, points=20)["points"]
    for found, one in zip(farthest_points(points, 6).tolist(), points.numpy(), strict=True):
        wanted = [int(np.argmax(np.linalg.norm(one, axis=1)))]
        while len(wanted) < 6:
            wanted.append(int(np.argmax(cdist(one, one[wanted]).min(axis=1))))
        assert found == wanted


def test_a_ball_query_gives_the_nearest_points_within_the_radius():
    points = batch(rows=2, points=20)["points"]
    centres, radius = points[:, :5], 0.6
    found = ball_query(points, centres, radius, 4)
    for row, one in enumerate(points.numpy()):
        distances = cdist(one[:5], one)
        for centre in range(5):
            near = [int(p) for p in np.argsort(distances[centre])[:4] if distances[centre, p] <= radius]
            assert set(found[row, centre].tolist()) == set(near) and centre in near
    assert any(len(set(group.tolist())) < 4 for group in found.flatten(0, 1))  # or nothing was filled up


def test_take_gives_the_values_at_the_places():
    values, places = torch.randn(2, 5, 3), torch.tensor([[[0, 1], [4, 4]], [[2, 3], [0, 0]]])
    expected = torch.stack([values[row][places[row]] for row in range(2)])
    assert torch.equal(take(values, places), expected)


def test_the_order_of_the_points_does_not_matter(make):
    model, points = settled(make()), batch()["points"]
    shuffled = points[:, torch.randperm(points.shape[1], generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(model(shuffled).logits, model(points).logits)


def ragged(*sizes: int) -> list[dict]:
    return [{"points": torch.from_numpy(cloud(size, size)), "labels": size % 3} for size in sizes]


def test_a_cloud_is_answered_alone_as_in_any_batch(make):
    model, items = settled(make()), ragged(5, 9, 16, 40)
    together = model(**collate_clouds(items)).logits
    alone = torch.cat([model(item["points"][None]).logits for item in items])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_what_fills_clouds_up_reaches_no_answer_no_gradient_and_no_statistic(make, training):
    found, made = [], collate_clouds(ragged(5, 9, 16))
    for more in (0, 30):
        model = settled(make()).train(training)
        points = torch.cat([made["points"], torch.full((3, more, 3), 0.1)], dim=1)
        mask = torch.cat([made["points_mask"], torch.zeros(3, more, dtype=torch.bool)], dim=1)
        points[~mask] *= 1 + more
        logits = model(points, points_mask=mask).logits
        logits.logsumexp(1).sum().backward()
        found.append([logits, *(p.grad for p in model.parameters()), *model.buffers()])
    torch.testing.assert_close(*found)


def test_statistics_are_of_the_points_that_clouds_have():
    model, items = pointnet(input_transform=False).train(), ragged(5, 9, 16)
    model(**collate_clouds(items))
    linear, norm, *_ = model.backbone.local_layers
    points = linear(torch.cat([item["points"] for item in items]))
    torch.testing.assert_close(norm.running_mean, norm.momentum * points.mean(0))
    torch.testing.assert_close(norm.running_var, 1 - norm.momentum + norm.momentum * points.var(0))


def test_what_fills_a_cloud_up_is_no_centre_and_no_neighbour():
    points, mask = batch(rows=1, points=6)["points"].repeat(1, 2, 1), torch.arange(12)[None] < 6
    points[~mask] *= 2  # they would be the farthest
    chosen = farthest_points(points, 9, mask)
    assert torch.equal(chosen, farthest_points(points[:, :6], 9)) and set(chosen[0].tolist()) == set(range(6))
    assert ball_query(points, points[:, :6], 5.0, 9, mask).max() == 5


@pytest.mark.parametrize("points", [2, 3])
def test_a_cloud_of_fewer_points_than_a_neighbourhood_goes_through(make, points):
    assert settled(make())(batch(points=points)["points"]).logits.isfinite().all()


def test_pointnet_starts_without_turning_anything_and_is_kept_close_to_a_rotation():
    model, data = pointnet(), batch()
    found = model.backbone(data["points"])
    assert torch.equal(found.feature_transform, torch.eye(5).expand(4, 5, 5))
    assert model.penalty(found) == 0
    assert torch.equal(model(**data).loss, nn.functional.cross_entropy(model(data["points"]).logits, data["labels"]))
    found.feature_transform = 2 * found.feature_transform  # ‖I − 4I‖² = 9 · 5
    torch.testing.assert_close(model.penalty(found), torch.tensor(0.001 * 45))
    plain = pointnet(input_transform=False, feature_transform=False)
    assert plain.penalty(plain.backbone(data["points"])) == 0


def test_a_batch_of_one_cloud_can_be_trained_on(make):
    model = make().train()
    model(**batch(rows=1)).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


# ---- Their Fisher information ----


def test_the_likelihood_is_softmax(make):
    data = batch()
    assert_likelihood_is_softmax(settled(make()), data["points"], data["labels"])


def test_the_trace_is_that_of_per_sample_autograd(make):
    assert_trace_is_that_of_autograd(settled(make()), batch())


def test_the_trace_and_the_diagonal_of_a_ragged_batch_are_those_of_its_clouds(make):
    model, items = settled(make()), ragged(5, 9, 16)
    alone = [{"points": item["points"][None], "labels": torch.tensor([item["labels"]])} for item in items]
    expected = np.mean([fisher_trace(model, one, labels="empirical") for one in alone])
    assert fisher_trace(model, collate_clouds(items), labels="empirical") == pytest.approx(expected, rel=1e-4)
    diagonals = (fisher_diagonal(model, batches, labels="empirical") for batches in ([collate_clouds(items)], alone))
    torch.testing.assert_close(*diagonals)


def test_finite_differences_meet_double_backward(make):
    for model in (settled(make()), settled(make()).train()):
        for data in (batch(), collate_clouds(ragged(5, 9, 16))):
            assert_finite_differences_meet_double_backward(model, data)


# ---- As models of transformers ----


def trainer(folder, model, **options) -> FIPTrainer:
    return short_run(folder, model, CloudDataset(clouds_of(12)), collate_clouds, **options)


def test_a_saved_model_is_the_same_to_every_loader(make, tmp_path):
    assert_same_to_every_loader(settled(make()), tmp_path, AutoModelForPointCloudClassification, batch()["points"])


def test_a_model_is_pushed_as_it_is_saved(make, monkeypatch):
    assert_pushed_as_saved(make(), monkeypatch)


def test_training_runs_with_the_defaults_and_moves_every_weight(make, tmp_path):
    may_stay = frozenset({"backbone.input_transform.matrix.weight"})  # the gradient of the first steps may be zero
    assert_training_moves_every_weight(trainer(tmp_path, make()), but=may_stay)


def test_clouds_of_many_sizes_are_trained_on_and_answered_alike_in_batches_of_any_size(make, tmp_path):
    items = ragged(5, 9, 16, 7, 30, 12, 8, 21, 10)
    run = partial(short_run, dataset=items, collate=collate_clouds, eta_f=0.05, eta_r=1.0)
    trained = run(tmp_path, make(), train_transform=scale_and_jitter)
    trained.train()
    answers = [
        run(tmp_path, trained.model, per_device_eval_batch_size=size).predict(items).predictions for size in (1, 4)
    ]
    np.testing.assert_allclose(*answers, atol=1e-5)


def test_a_resumed_run_ends_as_one_that_was_not_stopped(make, tmp_path):
    assert_resumes_to_the_same(lambda folder, **options: trainer(folder, make(), **options), tmp_path)


def test_fast_fip_trains_shifts_and_norms_alone_and_can_be_switched_off(make, tmp_path):
    assert_fast_fip_shifts_every_layer(partial(trainer, tmp_path), settled(make()), batch()["points"], nn.Linear)
