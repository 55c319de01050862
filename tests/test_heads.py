"""heads.py: the cosine MLP against its definition, the schedule against torch's, the training."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
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
    turned = simclr.resnet18().to(memory_format=torch.channels_last).eval()
    heads.features_of(turned, SCALING, images, CPU)
    assert not turned.training  # nor is a training's memory format changed under it
    assert turned.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert together.shape == (5, 512) and together.dtype == torch.float32
    assert torch.allclose(alone[0], together[0], atol=1e-5)
    assert heads.features_of(encoder, SCALING, images[:0], CPU).shape == (0, 512)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name


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
    features = pixels.float() / 127.5 - 1
    settings = heads.Probing(epochs=40)
    by_picture = dataclasses.replace(task, split=rng.permutation(task.split))
    scores = {}
    for name, cut in (("picture", by_picture), ("group", task)):
        _, _, probs = heads.fit_probe(features, cut, settings, "cosine_mlp", iter)
        scores[name] = float((probs["test"].argmax(axis=1) == cut.part("test")[1]).mean())
    assert scores["picture"] > 0.9
    assert abs(scores["group"] - 0.5) < 0.2  # 24 patients are tested: a standard error of 0.1


def test_a_classifiers_columns_are_matched_by_the_names_of_the_classes():
    torch.manual_seed(0)
    encoder, head = simclr.resnet18(), heads.CosineMLP(512, 3)
    checkpoint = {"classes": ["a", "b", "c"], "mean": 0.5, "std": 0.5}
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32), dtype=np.uint8)
    device = torch.device("cpu")
    known = heads.classify(encoder, head, checkpoint, images, ("a", "b", "c"), device)
    turned = heads.classify(encoder, head, checkpoint, images, ("c", "a", "b"), device)
    assert known.shape == (4, 3) and np.allclose(known.sum(axis=1), 1)
    assert np.array_equal(turned, known[:, [2, 0, 1]]) and not np.allclose(turned, known)
    with pytest.raises(data.UserError, match="classes a, b, and .* a, b, c"):
        heads.classify(encoder, head, checkpoint, images, ("a", "b"), device)


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


# --- fine-tuning -------------------------------------------------------------------------------


@pytest.fixture
def short_epochs(monkeypatch):
    monkeypatch.setattr(heads, "LEAST_STEPS", 4)


def stripes(n: int, seed: int = 0) -> tuple[np.ndarray, torch.Tensor]:
    """Pictures of 32 px whose class is the way their stripes run."""
    rng, y, x = np.random.default_rng(seed), *np.mgrid[:32, :32]
    labels = np.arange(n) % 2
    waves = [np.sin((y if k else x) * 0.8 + rng.uniform(0, 6)) for k in labels]
    noise = rng.normal(0, 30, (n, 32, 32))
    return (127 + 90 * np.stack(waves) + noise).clip(0, 255).astype(np.uint8), torch.tensor(labels)


def tuning(settings: heads.FineTuning, n: int = 24) -> simclr.Run:
    encoder = heads.untrained("resnet18", settings.seed)
    return heads.fine_tuning(encoder, 2, settings, n, CPU, bf16=False)


def parts(n: int = 24, n_val: int = 8) -> tuple[np.ndarray, tuple, tuple]:
    """Pictures; rows and labels of a train part and a val part; the last picture is in neither."""
    images, labels = stripes(n + n_val + 1)
    rows = np.arange(n + n_val)
    return images, (rows[:n], labels[:n]), (rows[n:], labels[n : n + n_val])


def test_fine_tuning_learns_and_ends_with_the_weights_of_its_best_epoch(short_epochs):
    images, train, val = parts()
    run = tuning(heads.FineTuning(epochs=3, batch_size=8, lrs=(1e-4, 1e-3)))
    first = {name: value.clone() for name, value in run.networks.state_dict().items()}
    steps = list(heads.finetune(run, images, train, val))
    assert len(steps) == 2 * 3 * 4  # of 24 pictures, three steps would be a pass
    records = [record for record in steps if record]
    assert records == run.records and [r["epoch"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert [r["peak_lr"] for r in records] == [1e-4] * 3 + [1e-3] * 3
    best = max((r["val_accuracy"], -r["val_loss"]) for r in records)
    h = heads.features_of(run.networks["encoder"], SCALING, images[val[0]], CPU)
    score = heads.score(run.networks["head"], h, val[1])
    assert score == pytest.approx((-best[1], best[0]), abs=1e-5) and best[0] > 0.8
    chosen = next(r["peak_lr"] for r in records if -r["val_loss"] == best[1])
    assert run.best["peak_lr"] == chosen
    assert not torch.equal(run.networks["encoder"].conv1.weight, first["encoder.conv1.weight"])


def test_each_learning_rate_begins_with_the_same_weights_and_its_own_schedule(
    short_epochs, monkeypatch
):
    """Else the second would go on where the first one ended, and look better than it is."""
    images, train, val = parts()
    run = tuning(heads.FineTuning(epochs=2, batch_size=8, lrs=(1e-3, 1e-3)))
    seen, rates, seeds, draw = [], [], [], data.draw_views
    monkeypatch.setattr(simclr, "set_lr", lambda optimizer, lr: rates.append(lr))
    monkeypatch.setattr(
        data, "draw_views", lambda V, g: seeds.append(g.initial_seed()) or draw(V, g)
    )
    for i, _ in enumerate(heads.finetune(run, images, train, val)):
        if i % 8 == 0:
            moved = run.networks["head"].weight - run.first["head.weight"]
            assert 0 < moved.abs().max() < 1.1e-3  # AdamW's first step: the learning rate
            seen.append(run.optimizer.state_dict()["state"][0]["step"].item())
    assert seen == [1, 1]  # AdamW counts anew
    assert rates[:8] == rates[8:] and len(rates) == 16
    assert len(set(seeds)) == 16  # no step sees the views of another
    assert rates[0] == max(rates) == pytest.approx(1e-3)  # 5 % of 8 steps: up at once
    assert rates[7] < 0.05 * rates[0] and sorted(rates[:8], reverse=True) == rates[:8]
    long = tuning(heads.FineTuning(epochs=10, batch_size=2))  # 120 steps, of which 6 warm up
    rates.clear()
    steps = heads.finetune(long, images, (train[0][:8], train[1][:8]), val)
    for _ in range(8):
        next(steps)
    assert np.diff(rates)[:5] == pytest.approx([1e-4 / 6] * 5, rel=0.1) and rates[7] < rates[6]


def test_a_fine_tuning_restored_after_any_step_ends_as_if_it_had_never_stopped(short_epochs):
    """To the bit, and over the border between two learning rates."""
    images, train, val = parts()
    settings = heads.FineTuning(epochs=1, batch_size=8, lrs=(1e-4, 1e-3))
    first, files = tuning(settings), []
    for _ in heads.finetune(first, images, train, val):
        files.append(io.BytesIO())
        torch.save(first.state(), files[-1])
    for done in (1, 3, 4, 5, 7):
        files[done - 1].seek(0)
        second = tuning(settings)
        second.restore(torch.load(files[done - 1], weights_only=True))
        assert (len(second.records), second.step) == divmod(done, 4)
        torch.rand(7)
        list(heads.finetune(second, images, train, val))
        states = first.networks.state_dict(), second.networks.state_dict()
        assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))
        losses = [[r["train_loss"] for r in run.records] for run in (first, second)]
        assert losses[0] == losses[1]


def test_fine_tuning_has_no_way_to_the_pictures_it_is_not_given(short_epochs):
    """The row that belongs to neither part is replaced, and not a bit changes."""
    weights = []
    for other in (0, 255):
        images, train, val = parts()
        images[-1] = other
        run = tuning(heads.FineTuning(epochs=1, batch_size=8))
        list(heads.finetune(run, images, train, val))
        weights.append(run.networks["head"].weight.detach().clone())
    assert torch.equal(*weights)


def test_without_a_val_part_the_last_epoch_counts(short_epochs):
    images, train, _ = parts()
    run = tuning(heads.FineTuning(epochs=2, batch_size=8))
    list(heads.finetune(run, images, train, (np.zeros(0, int), torch.zeros(0).long())))
    assert [r["val_loss"] for r in run.records] == [None, None]
    last = run.best["networks"]["head.weight"]
    assert torch.equal(last, run.networks["head"].weight) and run.finished


# --- a comparison ------------------------------------------------------------------------------


def many_people(people: int = 60) -> heads.Task:
    """Two to four slices a person; the last class is one slice, the least of its person's."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(people), rng.integers(2, 5, people))
    labels = groups % 2
    labels[np.flatnonzero(groups == 7)[0]] = 2
    labels[np.flatnonzero(groups == 8)[0]] = 1  # a person of two labels, mostly 0
    split = np.select([groups % 10 == 0, groups % 10 == 1], ["test", "val"], "train")
    n = np.arange(len(groups))
    return heads.Task("mine", ("a", "b", "c"), n, labels, groups, np.full(len(n), ""), split, {})


def test_labelled_groups_are_nested_stratified_and_never_cut():
    task = many_people()
    kept = {}
    for fraction in (0.01, 0.1, 0.5, 1.0):
        cut = heads.label_subset(task, fraction, seed=3)
        assert (cut.split[task.split != "train"] == task.split[task.split != "train"]).all()
        labelled = set(cut.groups[cut.split == "train"])
        assert not labelled & set(cut.groups[cut.split == "unlabelled"])
        assert set(cut.labels[cut.split == "train"]) == {0, 1, 2}  # the class of one slice, too
        sizes = [len({g for g in labelled if g % 2 == k}) for k in (0, 1)]
        whole = [len({g for g in task.groups[task.split == "train"] if g % 2 == k}) for k in (0, 1)]
        few, many = (max(1, round(fraction * n)) for n in whole)
        assert 7 in labelled and sizes[0] == few and sizes[1] in (many, many + 1)
        kept[fraction] = labelled
    assert kept[0.01] < kept[0.1] < kept[0.5] < kept[1.0]
    other = heads.label_subset(task, 0.1, seed=4)
    assert set(other.groups[other.split == "train"]) != kept[0.1]


def test_a_comparison_gives_all_methods_the_same_labels_and_counts_what_they_train(short_epochs):
    task = many_people()
    images, _ = stripes(len(task.rows))
    encoder = simclr.resnet18()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    checkpoint = {"arch": "resnet18", **SCALING}
    settings = heads.FineTuning(epochs=1, batch_size=16)
    on = heads.Comparison(task, images, encoder, checkpoint, settings, CPU, False)
    plan = [(0.1, 0, m) for m in evaluate.METHODS] + [(0.1, 1, "knn"), (0.3, 0, "untrained")]
    steps, cells = 0, []
    for cell in on.fit(plan):
        cells += [cell] if cell else []
        steps += cell is None
    assert steps == on.count_steps(plan) == 4 * (1 + len(heads.SCRATCH_LRS))
    assert [(c["fraction"], c["seed"], c["method"]) for c in cells] == plan
    assert len({(c["groups"], c["pictures"]) for c in cells[:5]}) == 1
    assert cells[0]["groups"] in (4, 5)  # two of each class, and who has the slice of the third
    trained = {c["method"]: c["parameters"] for c in cells[:5]}
    network = sum(p.numel() for p in encoder.parameters()) + 3 * 512 + 3
    head = sum(p.numel() for p in heads.CosineMLP(512, 3).parameters())
    assert trained == {"probe": head, "finetune": network, "scratch": network, "untrained": head,
                       "knn": 0}  # fmt: skip
    assert all(np.shape(c["probs"]) == ((task.split == "test").sum(), 3) for c in cells)
    assert all(np.allclose(np.sum(c["probs"], axis=1), 1) for c in cells)
    assert cells[2]["lr"] in heads.SCRATCH_LRS and cells[1]["lr"] == 1e-4
    assert len({json.dumps(c["probs"]) for c in cells}) == len(cells)  # each its own answer
    assert all(torch.equal(value, before[k]) for k, value in encoder.state_dict().items())
    other = dataclasses.replace(on, encoder=simclr.resnet18())  # from scratch it plays no part
    *_, again = other.fit([(0.1, 0, "scratch")])
    assert again["probs"] == cells[2]["probs"]
    fits = [cell for cell in on.fit([(1.0, seed, "finetune") for seed in (0, 1)]) if cell]
    assert fits[0]["probs"] != fits[1]["probs"]  # on the same labels, from another head


def test_the_look_during_pretraining_asks_val_pictures_for_training_neighbours():
    """In the val part the labels are swapped, so whoever is asked, his neighbours are wrong."""
    images, labels = stripes(60)
    split = np.array(["train"] * 40 + ["val"] * 20)
    swapped = np.where(split == "val", 1 - labels.numpy(), labels.numpy())
    rows = np.arange(60)
    task = heads.Task("mine", ("a", "b"), rows, swapped, rows, split, split, {})
    pictures = data.Pictures([], None, None, {}, {"square": images}, rows)
    encoder = heads.untrained("resnet18", 0)
    accuracy = heads.knn_accuracy(encoder, SCALING, pictures, task, CPU)
    assert accuracy < 0.3
    nobody = dataclasses.replace(task, split=np.full(60, "train"))
    assert heads.knn_accuracy(encoder, SCALING, pictures, nobody, CPU) is None
