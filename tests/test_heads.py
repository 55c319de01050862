"""heads.py: the cosine MLP against its definition, the schedule against torch's, the training."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import data
import heads
import simclr

CPU, SCALING = torch.device("cpu"), {"mean": 0.5, "std": 0.5}


def blobs(n: int, seed: int, spread: float = 0.8) -> tuple[torch.Tensor, torch.Tensor]:
    """Three clouds of features in 16 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    centres = torch.eye(3, 16) * 2
    return centres[labels] + spread * torch.randn(n, 16, generator=generator), labels


def test_cosine_mlp_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in heads.CosineMLP(512, 3).parameters()) == 329_985


def test_cosine_mlp_is_scale_times_cosine_computed_one_by_one():
    torch.manual_seed(0)
    head = heads.CosineMLP(8, 3, hidden_dims=(6, 5)).double().eval()
    h = torch.randn(4, 8, dtype=torch.float64)
    m = h
    for linear, norm in ((head.mlp[0], head.mlp[1]), (head.mlp[4], head.mlp[5])):
        m = (m @ linear.weight.T + linear.bias - norm.running_mean) / (
            norm.running_var + 1e-5
        ) ** 0.5
        m = (m * norm.weight + norm.bias).clamp(min=0)
    for n in range(4):
        for k in range(3):
            w = head.class_weights[k]
            cosine = (m[n] @ w) / (m[n].norm() * w.norm())
            assert head(h)[n, k].item() == pytest.approx(10 * cosine.item(), abs=1e-9)


def test_logits_ignore_the_length_of_class_weights():
    head = heads.CosineMLP(8, 3).eval()
    h = torch.randn(4, 8)
    before = head(h)
    with torch.no_grad():
        head.class_weights *= torch.tensor([[0.1], [1.0], [50.0]])
    assert torch.allclose(head(h), before, atol=1e-5)


def test_milestones_match_torchs_scheduler():
    for epochs in (150, 10, 7):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        passed = [-(-epochs * 6 // 10), -(-epochs * 8 // 10)]
        theirs = torch.optim.lr_scheduler.MultiStepLR(optimizer, passed, 0.1)
        for epoch in range(1, epochs + 1):
            ours = heads.milestone_lr(epoch, epochs, 1.0)
            assert ours == pytest.approx(theirs.get_last_lr()[0])
            optimizer.step()
            theirs.step()
    assert heads.milestone_lr(90, 150, 1.0) == 1.0 and heads.milestone_lr(91, 150, 1.0) == 0.1


def test_a_probe_learns_and_ends_with_its_best_epoch():
    train, val = blobs(60, 0), blobs(60, 1)
    torch.manual_seed(0)
    head = heads.CosineMLP(16, 3)
    records = list(heads.train_probe(head, train, val, heads.Probing(epochs=30, batch_size=16)))
    best = max((r["val_accuracy"], -r["val_loss"]) for r in records)
    assert best[0] > 0.8
    assert heads.score(head, *val) == pytest.approx((-best[1], best[0]), abs=1e-6)
    probs = heads.probabilities(head, val[0])
    assert probs.shape == (60, 3) and torch.allclose(probs.sum(dim=1), torch.ones(60).double())


def test_a_probe_repeats_to_the_bit_whatever_was_drawn_before():
    """Dropout takes no generator: it is seeded at each step from (seed, epoch, step)."""
    weights = []
    for noise in (0, 7):
        torch.manual_seed(0)
        head = heads.CosineMLP(16, 3)
        torch.rand(noise)
        epochs = heads.train_probe(head, blobs(40, 0), blobs(9, 1), heads.Probing(3, 16))
        for _ in epochs:
            torch.rand(noise)
        weights.append(head.class_weights.detach().clone())
    assert torch.equal(*weights)


def test_no_epochs_leave_the_head_as_it_was_and_no_validation_part_means_the_last_epoch():
    torch.manual_seed(0)
    head = heads.CosineMLP(16, 3)
    before = head.class_weights.detach().clone()
    assert list(heads.train_probe(head, blobs(9, 0), blobs(9, 1), heads.Probing(epochs=0))) == []
    assert torch.equal(head.class_weights, before)
    empty = (torch.zeros(0, 16), torch.zeros(0, dtype=torch.long))
    records = list(heads.train_probe(head, blobs(9, 0), empty, heads.Probing(epochs=2)))
    assert [r["val_loss"] for r in records] == [None, None]
    assert not torch.equal(head.class_weights, before)


def test_features_come_from_running_statistics_and_the_mode_is_restored():
    """In train mode a picture's features would depend on its neighbours in the batch."""
    encoder = simclr.resnet18()
    encoder(torch.randn(8, 1, 32, 32))  # moves the running statistics
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32), dtype=np.uint8)
    alone = heads.features_of(encoder, SCALING, images[:1], CPU)
    together = heads.features_of(encoder, SCALING, images, CPU, batch_size=2)
    assert encoder.training
    assert together.shape == (5, 512) and together.dtype == torch.float32
    assert torch.allclose(alone[0], together[0], atol=1e-5)
    assert heads.features_of(encoder, SCALING, images[:0], CPU).shape == (0, 512)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_dropout_silences_a_share_and_keeps_the_mean():
    drop, x = heads.Dropout(0.3), torch.rand(400, 500) + 1
    torch.manual_seed(0)
    y = drop(x)
    silent = y == 0
    assert silent.float().mean().item() == pytest.approx(0.3, abs=0.005)  # 5 standard errors
    assert torch.allclose(y[~silent], x[~silent] / 0.7)
    assert silent.float().mean(dim=0).std().item() == pytest.approx(0.0229, abs=0.003)  # binomial
    assert silent.float().mean(dim=1).std().item() == pytest.approx(0.0205, abs=0.003)
    assert not torch.equal(silent, drop(x) == 0)
    torch.manual_seed(0)
    assert torch.equal(drop(x), y)
    assert drop.eval()(x) is x
    odd = heads.Dropout(0.5)(torch.ones(3, 3, dtype=torch.float64, requires_grad=True))
    odd.sum().backward()
    assert odd.dtype == torch.float64 and set(odd.flatten().tolist()) <= {0.0, 2.0}


def test_probe_leaves_encoder_bitwise_unchanged():
    encoder = simclr.resnet18().train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    drawn = [data.fit_square(data.draw_phantom(p)[0], 32) for p in data.phantom_paths()[:12]]
    h = heads.features_of(encoder, SCALING, np.stack(drawn), CPU)
    labels = torch.arange(12) % 2
    head = heads.CosineMLP(512, 2)
    list(heads.train_probe(head, (h, labels), (h, labels), heads.Probing(epochs=2)))
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_labels_planted_at_random_are_learnt_by_picture_and_not_by_group(tmp_path):
    """Every patient has a random diagnosis, so nothing can be known of a new one.

    Split by picture the probe recognises the patients and seems to be good at it; split by group,
    as data.py does it, the same probe on the same pictures is at chance.
    """
    rng = np.random.default_rng(0)
    for patient in range(80):
        coarse = rng.integers(0, 256, (6, 6))
        for slice_ in range(6):
            noisy = np.clip(coarse + rng.normal(0, 12, (6, 6)), 0, 255).astype(np.uint8)
            path = tmp_path / "scans/mine" / f"class{patient % 2}" / f"sub-{patient}_{slice_}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noisy).resize((64, 64), Image.Resampling.BICUBIC).save(path)
    collection = heads.load(tmp_path / "scans", 32, tmp_path / "cache")
    task = collection.task("mine")
    pixels = torch.from_numpy(collection.pictures.thumbnails[task.rows]).flatten(1)
    features = {"pixels": pixels.float() / 127.5 - 1}
    settings = heads.Probing(epochs=40)
    by_picture = dataclasses.replace(task, split=rng.permutation(task.split))
    scores = {}
    for name, cut in (("picture", by_picture), ("group", task)):
        ((_, _, probs),) = heads.fit_probes(features, cut, settings, lambda e, **_: e).values()
        scores[name] = float((probs.argmax(axis=1) == cut.part("test")[1]).mean())
    assert scores["picture"] > 0.9
    assert abs(scores["group"] - 0.5) < 0.2  # 24 patients are tested: a standard error of 0.1


def test_a_classifiers_columns_are_matched_by_the_names_of_the_classes():
    torch.manual_seed(0)
    encoder, head = simclr.resnet18(), heads.CosineMLP(512, 3)
    checkpoint = {"classes": ["a", "b", "c"], "mean": 0.5, "std": 0.5}
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32), dtype=np.uint8)
    device = torch.device("cpu")
    known = heads.classify(encoder, head, checkpoint, images, ("a", "b", "c"), device, False)
    turned = heads.classify(encoder, head, checkpoint, images, ("c", "a", "b"), device, False)
    assert known.shape == (4, 3) and np.allclose(known.sum(axis=1), 1)
    assert np.array_equal(turned, known[:, [2, 0, 1]]) and not np.allclose(turned, known)
    with pytest.raises(data.UserError, match="classes a, b, and .* a, b, c"):
        heads.classify(encoder, head, checkpoint, images, ("a", "b"), device, False)


def test_the_survey_counts_what_a_person_would_count():
    """Six pictures: 0 and 3 are one picture, 1 and 4 mirror twins, across the publisher's parts."""
    rows, hashes = np.arange(10, 16), np.zeros((16, 16), np.uint8)
    hashes[:, 0] = [*range(100, 110), *b"abcade"]
    nothing = np.zeros((0, 2), np.int64)
    pictures = data.Pictures([""] * 16, None, hashes, {}, None, None)
    # row 2 is of another task
    twins = np.array([[10, 13, 0], [11, 14, 1], [12, 15, 1], [2, 15, 0]])
    task = heads.Task(
        name="mine",
        classes=("sick", "well"),
        rows=rows,
        labels=np.array([0, 0, 1, 0, 0, 1]),
        groups=np.array([0, 1, 2, 0, 1, 5]),
        parts=np.array(["test", "test", "test", "train", "train", "train"]),
        split=np.array(["test", "test", "test", "dropped", "dropped", "train"]),
        notes={"rule": "by hand", "dropped_for_a_twin_with_another_label": 2},
    )
    collection = heads.Study(pictures, twins, nothing, np.zeros(16), [], [], 0, {"mine": task})
    meter = {"by picture": [1.0], "by group": [], "recognised": [0.5], "commonest": [0.75]}
    text = heads.survey(collection, task, meter)
    sick, well, both = (line.split() for line in text.splitlines()[2:5])
    assert sick == ["sick", "4", "2", "1", "4", "0", "0", "2", "2"]
    assert well == ["well", "2", "2", "0", "2", "1", "0", "1", "0"]
    assert both == ["all", "6", "4", "1", "6", "1", "0", "3", "2"]
    assert "3 of the 3 Testing pictures have a twin in Training: 1 pixel for pixel, 2 mirr" in text
    assert "2 Training pictures share a group with one of Testing; all of them are left out" in text
    assert "50.0% of the tested" in text and "1.000 by picture, n/a by group" in text
    assert "known of 0 of 6 pictures; --group-pattern says" in text
    assert "2 pictures are left out: a twin has another label" in text
    assert "It cannot be probed: class 'sick'" in text
