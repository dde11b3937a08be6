"""PointNet and PointNet++: what they compute, their Fisher information, and that they are models of transformers."""

import copy
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cloud_cases import MODELS, batch, cloud, clouds_of, pointnet
from scipy.spatial.distance import cdist
from test_fisher_models import assert_same_gradient, estimate, looped_scores
from torch import nn
from trainer_cases import QUIET, identical, weights
from transformers import AutoConfig, AutoModel

from hf_fip import FIPConfig, FIPTrainer, SingularValueConfig
from hf_fip.fisher import Categorical, fisher_trace, infer_likelihood
from hf_fip.hub.load import load_model
from hf_fip.models import AutoModelForPointCloudClassification
from hf_fip.models.pointnet2 import ball_query, farthest_points, take
from hf_fip.tasks.point_cloud import CloudDataset, collate_clouds


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


def test_a_cloud_filled_up_with_its_own_points_is_the_same_to_pointnet():
    model, dataset = settled(pointnet()), [{"points": torch.from_numpy(cloud(n, n)), "labels": 0} for n in (5, 9, 16)]
    together = collate_clouds(dataset)
    assert together["points"].shape == (3, 16, 3)
    alone = torch.cat([model(item["points"][None]).logits for item in dataset])
    torch.testing.assert_close(model(together["points"]).logits, alone)


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
    model, data = settled(make()), batch()
    likelihood = infer_likelihood(model)
    assert isinstance(likelihood, Categorical)
    logits = model(data["points"]).logits.double()
    expected = logits[torch.arange(4), data["labels"]] - logits.exp().sum(1).log()
    torch.testing.assert_close(likelihood.log_prob(logits, data["labels"]), expected)


def test_the_trace_is_that_of_per_sample_autograd(make):
    model, data = settled(make()), batch()
    scores = looped_scores(model, data, data["labels"])
    expected = torch.stack([score.square().sum() for score in scores]).mean().item()
    assert expected > 0
    found = fisher_trace(model, data, labels="empirical")
    assert found == pytest.approx(expected, rel=1e-4)


def test_finite_differences_meet_double_backward(make):
    data = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch().items()}
    options = {"estimator": "signed_sum", "labels": "empirical", "epsilon": 1e-7}
    for model in (settled(make()).double(), settled(make()).double().train()):
        (_, found), (_, expected) = (
            estimate(copy.deepcopy(model), [data], gradient=gradient, **options)
            for gradient in ("finite_difference", "double_backward")
        )
        assert_same_gradient(found, expected)


# ---- As models of transformers ----


def trainer(folder, model, **options) -> FIPTrainer:
    peft_config = options.pop("peft_config", None)
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "trace_interval": 1, "learning_rate": 0.01}
    config = FIPConfig(str(folder), **{**settings, **QUIET, **options})
    dataset = CloudDataset(clouds_of(12))
    return FIPTrainer(model, config, data_collator=collate_clouds, train_dataset=dataset, peft_config=peft_config)


def test_a_saved_model_is_the_same_to_every_loader(make, tmp_path):
    model, points = settled(make()), batch()["points"]
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    for load in (type(model).from_pretrained, AutoModelForPointCloudClassification.from_pretrained, load_model):
        again = load(tmp_path).eval()
        assert type(again) is type(model) and torch.equal(again(points).logits, model(points).logits)
    backbone = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(backbone(points).pooler_output, model.backbone(points).pooler_output)


def test_a_model_is_pushed_as_it_is_saved(make, tmp_path, monkeypatch):
    pushed = []
    repo, card = SimpleNamespace(repo_id="a/b"), SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *args, **kwargs: repo)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **kwargs: card)
    model = make()
    monkeypatch.setattr(
        type(model), "_upload_modified_files", lambda self, folder, *args, **kwargs: pushed.extend(os.listdir(folder))
    )
    model.push_to_hub("a/b")
    assert {"config.json", "model.safetensors"} <= set(pushed)


def test_training_runs_with_the_defaults_and_moves_every_weight(make, tmp_path):
    run = trainer(tmp_path, make())
    before = weights(run.model)
    run.train()
    after = weights(run.model)
    frozen = {"backbone.input_transform.matrix.weight"}  # the gradient of the first steps may be zero there
    assert not [name for name in before if torch.equal(before[name], after[name]) and name not in frozen]
    assert all(tensor.isfinite().all() for tensor in after.values())


def test_a_resumed_run_ends_as_one_that_was_not_stopped(make, tmp_path):
    whole = trainer(tmp_path / "whole", make(), save_strategy="steps", save_steps=2)
    whole.train()
    resumed = trainer(tmp_path / "resumed", make())
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert identical(weights(resumed.model), weights(whole.model))


def test_fast_fip_trains_shifts_and_norms_alone_and_can_be_switched_off(make, tmp_path):
    model, points = settled(make()), batch()["points"]
    received = model(points).logits
    run = trainer(tmp_path, model, peft_config=SingularValueConfig(train_norms=True), learning_rate=0.1)
    run.train()
    trained = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    linears = sum(isinstance(module, nn.Linear) for module in make().modules())
    assert sum("singular_delta" in name for name in trained) == linears
    run.model.eval()
    assert not torch.equal(run.model(points).logits, received)
    with run.model.disable_adapter():
        assert torch.equal(run.model(points).logits, received)
