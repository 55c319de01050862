"""heads.py: the head against its definition, and that nothing tested has a way into training.

All networks are ResNets of depths (1, 1, 1, 1), all images 32 pixels wide.
"""

import io
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import evaluate
import heads
import simclr

CPU, SCALING = torch.device("cpu"), {"mean": 0.5, "std": 0.5}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """An architecture for tests, and short epochs."""
    torch.manual_seed(0)
    blocks = simclr.BasicBlock, (1, 1, 1, 1), 1
    monkeypatch.setitem(simclr.ARCHITECTURES, "tiny", lambda: simclr.ResNet(*blocks))
    monkeypatch.setattr(heads, "ENCODED", 4)
    monkeypatch.setattr(heads, "LEAST_STEPS", 3)


class Spy:
    """An array of images that counts which rows are read, and how many at once."""

    def __init__(self, squares):
        self.squares, self.rows, self.most = squares, set(), 0

    def __getitem__(self, rows):
        self.rows, self.most = self.rows | set(rows.tolist()), max(self.most, len(rows))
        return self.squares[rows]


def make_task(labels, split, groups=None):
    """A task whose images lie backwards in the folder."""
    rows, classes = np.arange(len(labels))[::-1].copy(), tuple("abc"[: labels.max() + 1])
    groups, split = rows if groups is None else groups, split.astype("U7")
    return data.Task("mine", classes, rows, labels, groups, np.full(len(rows), ""), split, {})


def make_setup(n_train=24, n_val=8, n_test=6) -> heads.Setup:
    """Images whose class is the way their stripes run, and thumbnails; two images are dropped."""
    split = np.repeat(["train", "val", "test", "dropped"], [n_train, n_val, n_test, 2])
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:32, :32]
    labels = rng.integers(0, 2, len(split))
    waves = [np.sin((y if label else x) * 0.8 + rng.uniform(0, 6)) for label in labels[::-1]]
    squares = 127 + 90 * np.stack(waves) + rng.normal(0, 30, (len(split), 32, 32))
    squares = squares.clip(0, 255).astype(np.uint8)
    hashes = rng.integers(1, 256, (len(split), 16), dtype=np.uint8)
    images = SimpleNamespace(squares=squares, thumbnails=squares, hashes=hashes)
    encoder = heads.untrained("tiny", 7)
    config = {"arch": "tiny", "image_size": 32, "patient_pattern": None, **SCALING}
    seen = torch.zeros(1, 16, dtype=torch.uint8)
    checkpoint = simclr.encoder_checkpoint(encoder, config, 3, seen)
    return heads.Setup(images, make_task(labels, split), encoder, checkpoint, CPU, bf16=False)


def new_classifier():
    return heads.Classifier(heads.untrained("tiny", 7), heads.new_head("fc", 512, 2, 0))


def tuned(setup, *settings):
    """A fine-tuning to its end: the classifier, its records."""
    classifier = new_classifier()
    epochs = heads.finetune(setup, classifier, heads.FineTuning(*settings))
    return classifier, [record for record, _ in epochs]


def copied(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def blobs(n, seed=0):
    """Three clouds of features in 16 dimensions, and their labels."""
    labels = np.arange(n) % 3
    noise = torch.randn(n, 16, generator=torch.Generator().manual_seed(seed))
    return torch.eye(3, 16)[labels] * 2 + 0.8 * noise, labels


# --- the head ----------------------------------------------------------------------------------


def test_cosine_mlp_has_the_published_size_and_the_settings_are_the_published_ones():
    assert sum(p.numel() for p in heads.CosineMLP(512, 3).parameters()) == 329_985
    assert heads.Probing() == heads.Probing(150, 256, 5e-4, 1e-3, 0)
    assert heads.FineTuning() == heads.FineTuning(30, 64, (1e-4,), 1e-4, 0)
    rates = [heads.milestone_lr(epoch, 150, 1.0) for epoch in (1, 90, 91, 120, 121, 150)]
    assert rates == [1, 1, 0.1, 0.1, 0.01, 0.01]


def test_cosine_mlp_is_scale_times_cosine_computed_one_by_one():
    head = heads.CosineMLP(8, 3, hidden_dims=(16, 12)).double()
    m = h = torch.randn(4, 8, dtype=torch.float64)
    head(3 * h + 1)  # moves the running statistics
    head.eval()
    for linear, norm in ((head.mlp[0], head.mlp[1]), (head.mlp[4], head.mlp[5])):
        m = m @ linear.weight.T + linear.bias
        m = (m - norm.running_mean) / (norm.running_var + 1e-5) ** 0.5
        m = (m * norm.weight + norm.bias).clamp(min=0)
    for n in range(4):
        for k, w in enumerate(head.class_weights):
            cosine = (m[n] @ w) / (m[n].norm() * w.norm())
            assert head(h)[n, k].item() == pytest.approx(10 * cosine.item(), abs=1e-9)


def test_logits_stay_within_the_scale_and_ignore_the_length_of_class_weights():
    head, h = heads.CosineMLP(8, 3).eval(), 100 * torch.randn(50, 8)
    with torch.no_grad():
        before = head(h)
        assert before.abs().max() <= 10 + 1e-5 and head.scale.requires_grad
        head.class_weights *= torch.tensor([[0.1], [1.0], [50.0]])
        assert torch.allclose(head(h), before, atol=1e-5)
        head.scale.fill_(3.0)
        assert torch.allclose(head(h), before * 0.3, atol=1e-5)


def test_dropout_is_silent_in_eval_mode_only():
    head, h = heads.CosineMLP(8, 3), torch.randn(20, 8)
    assert not torch.equal(head.train()(h), head(h)) and torch.equal(head.eval()(h), head(h))


# --- features ----------------------------------------------------------------------------------


def test_features_come_from_running_statistics_and_leave_the_encoder_as_it_was():
    encoder = heads.untrained("tiny", 0).to(memory_format=torch.channels_last)
    encoder(torch.randn(8, 1, 32, 32))  # moves the running statistics
    before, squares, scaling = copied(encoder), make_setup().images.squares, {"mean": 0.2, "std": 3}
    h = heads.features_of(encoder, squares, np.array([4, 0]), scaling, CPU)
    assert encoder.training and same(copied(encoder), before)
    assert encoder.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    slow = encoder.eval()((torch.tensor(squares[[4, 0]])[:, None] / 255 - 0.2) / 3)
    assert torch.allclose(slow, h, atol=1e-4) and h.dtype == torch.float32
    assert heads.features_of(encoder, squares, np.arange(0), scaling, CPU).shape == (0, 512)


def test_features_do_not_depend_on_their_neighbours_to_the_bit(monkeypatch):
    """Else `predict` on one file would answer in other digits than `probe` on all of them."""
    encoder, squares, sizes = heads.untrained("tiny", 0), make_setup().images.squares, set()
    encoder.conv1.register_forward_hook(lambda module, x, out: sizes.add(len(out)))
    together = heads.features_of(encoder, squares, np.arange(9), SCALING, CPU)
    alone = [heads.features_of(encoder, squares, np.array([i]), SCALING, CPU) for i in range(9)]
    assert torch.equal(torch.cat(alone), together) and sizes == {4}
    monkeypatch.setattr(heads, "ENCODED", 16)
    large = heads.features_of(encoder, squares, np.arange(9), SCALING, CPU)
    assert torch.allclose(large, together, atol=1e-4)


def test_images_are_read_a_batch_at_a_time_and_dropped_ones_never():
    setup = make_setup()
    setup.images.squares = spy = Spy(setup.images.squares)
    h = heads.task_features(setup, setup.encoder)
    assert spy.most == 4 and spy.rows == set(setup.task.rows[:-2])
    assert h[-2:].isnan().all() and not h[:-2].isnan().any()
    own = heads.features_of(setup.encoder, spy, setup.task.rows[[3]], SCALING, CPU)
    assert torch.equal(h[[3]], own)  # in the order of the task's rows


# --- a probe -----------------------------------------------------------------------------------


def test_a_probe_learns_and_ends_with_its_best_epoch():
    head, val = heads.new_head("cosine_mlp", 16, 3, 0), blobs(60, 1)
    records = heads.train_head(head, blobs(60), val, heads.Probing(epochs=30, batch_size=16))
    assert [record["epoch"] for record in records] == list(range(1, 31))
    assert records[-1]["train_loss"] < 0.7 * records[0]["train_loss"]
    score = heads.validate(heads.probabilities(head, val[0]), val[1])
    assert score.items() < max(records, key=heads.merit).items() and score["val_accuracy"] > 0.8


def test_an_epochs_loss_is_the_mean_of_its_batches_and_gradients_do_not_add_up():
    head, (h, labels) = torch.nn.Linear(16, 3), blobs(20)
    batches = [(0.0, h[:12], torch.tensor(labels[:12])), (0.0, h[12:], torch.tensor(labels[12:]))]
    losses = [heads.F.cross_entropy(head(x), y) for _, x, y in batches]
    loss = heads.train_epoch(head, simclr.adamw(head, 0.0), batches)
    assert loss == pytest.approx((losses[0].item() + losses[1].item()) / 2)
    assert torch.allclose(head.weight.grad, torch.autograd.grad(losses[1], head.weight)[0])


def test_val_chooses_by_accuracy_then_loss_then_the_earliest(monkeypatch):
    """It says what is written here; of both, the third epoch's weights have to be there."""
    scores = [(0.5, 0.1), (0.8, 0.6), (0.8, 0.5), (0.8, 0.5), (0.7, 0.2)]
    weights, answer = [], heads.probabilities

    def spy(head, features):
        weights.append(copied(head))
        return answer(head, features)

    def scripted(probs, labels):
        accuracy, loss = scores[len(weights) - 1]
        return {"val_accuracy": accuracy, "val_loss": loss}

    monkeypatch.setattr(heads, "probabilities", spy)
    monkeypatch.setattr(heads, "validate", scripted)
    head = heads.new_head("fc", 16, 3, 0)
    heads.train_head(head, blobs(12), blobs(9, 1), heads.Probing(epochs=5))
    assert same(copied(head), weights[2]) and not same(weights[2], weights[3])
    weights.clear()
    classifier, _ = tuned(make_setup(), 5, 8)
    assert len(weights) == 5 and same(copied(classifier.head), weights[2])


def test_without_val_the_last_epoch_counts(monkeypatch):
    monkeypatch.setattr(heads, "milestone_lr", lambda *_: 1e-2)
    trained, empty = [], (torch.zeros(0, 16), np.zeros(0, np.int64))
    for epochs in (2, 3):  # at a constant rate, the first two epochs of three are those of two
        trained.append(heads.new_head("fc", 16, 3, 0))
        records = heads.train_head(trained[-1], blobs(9), empty, heads.Probing(epochs))
        assert [record["val_loss"] for record in records] == [None] * epochs
    assert not torch.equal(trained[0].weight, trained[1].weight)


def test_a_probe_repeats_to_the_bit_and_leaves_torchs_generator_as_it_was():
    features, labels = blobs(40)
    task, weights = make_task(labels, np.repeat(["train", "val", "test"], [24, 8, 8])), []
    for noise, seed in ((0, 0), (7, 0), (0, 1)):
        torch.rand(noise)
        state, settings = torch.get_rng_state(), heads.Probing(3, 16, seed=seed)
        weights.append(copied(heads.fit_probe(features, task, settings, "cosine_mlp")[0]))
        weights[-1]["conv1"] = heads.untrained("tiny", seed).conv1.weight
        assert torch.equal(torch.get_rng_state(), state)
    assert same(weights[0], weights[1])
    assert not torch.equal(weights[0]["conv1"], weights[2]["conv1"])
    for seed in (0, 1):  # from the same weights, in another order
        head = heads.new_head("fc", 16, 3, 0)
        heads.train_head(head, (features, labels), blobs(9), heads.Probing(1, 16, seed=seed))
        weights.append(head.weight)
    assert not torch.equal(weights[3], weights[4])


def test_a_linear_probe_does_not_mind_the_size_of_features():
    """Untrained features are small: as they are, the same learning rate gets nowhere with them."""
    (features, labels), settings = blobs(60), heads.Probing(epochs=20, batch_size=16)
    answers = []
    for scale in (1.0, 0.05):
        head = heads.new_head("linear", 16, 3, 0)
        train = (features * scale, labels)
        heads.train_head(head, train, (train[0][:9], labels[:9]), settings)
        answers.append(heads.probabilities(head, features * scale))
    assert np.allclose(*answers, atol=0.05)


def test_test_images_have_no_way_into_a_probe():
    """Their features and labels are replaced, and not a bit of the head changes."""
    features, labels = blobs(40)
    task = make_task(labels, np.repeat(["train", "val", "test", "dropped"], [20, 8, 8, 4]))
    settings = heads.Probing(epochs=3, batch_size=8)
    head, records, probs = heads.fit_probe(features, task, settings, "cosine_mlp")
    other, swapped = features.clone(), np.where(task.split == "test", 0, labels)
    other[28:36], other[36:], task = 5.0, torch.nan, replace(task, labels=swapped)
    again, same_records, others = heads.fit_probe(other, task, settings, "cosine_mlp")
    assert same(copied(head), copied(again)) and records == same_records
    assert np.array_equal(probs["val"], others["val"])
    assert probs["test"].shape == (8, 3) and not np.allclose(probs["test"], others["test"])


def test_weight_decay_reaches_the_optimiser(monkeypatch):
    decays, adamw = [], simclr.adamw
    monkeypatch.setattr(simclr, "adamw", lambda net, d: decays.append(d) or adamw(net, d))
    heads.train_head(heads.new_head("fc", 16, 3, 0), blobs(9), blobs(9), heads.Probing(1))
    tuned(make_setup(), 1, 8)
    assert decays[0] == 1e-3 and set(decays[1:]) == {1e-4}


def test_labels_planted_at_random_are_learned_by_image_and_not_by_group():
    """Every patient has a random diagnosis, so nothing can be known of a new one."""
    rng, patients = np.random.default_rng(0), np.repeat(np.arange(200), 3)
    looks = rng.normal(size=(200, 64))[patients] + 0.2 * rng.normal(size=(600, 64))
    features, labels = torch.tensor(looks, dtype=torch.float32), patients % 2
    by_group = np.array(["train", "train", "train", "val", "test"])[patients // 2 % 5]
    scores = []
    for split in (by_group, rng.permutation(by_group)):
        task = make_task(labels, split, patients)
        probs = heads.fit_probe(features, task, heads.Probing(epochs=40), "cosine_mlp")[2]
        scores.append((probs["test"].argmax(axis=1) == labels[task.part("test")]).mean())
    assert scores[1] > 0.8 and abs(scores[0] - 0.5) < 0.2  # of 40 patients: twice .08 is chance


def test_baselines_are_the_same_head_on_an_untrained_encoder_and_on_pixels():
    """Here the thumbnails alone show the class, and the images are noise."""
    setup, rng = make_setup(60, 20, 20), np.random.default_rng(0)
    setup.images.squares = rng.integers(0, 256, (102, 32, 32), dtype=np.uint8)
    lit = 90 + 60 * setup.task.labels[::-1, None, None]
    setup.images.thumbnails = np.broadcast_to(lit, (102, 32, 32)).astype(np.uint8)
    setup.encoder.conv1.register_forward_hook(lambda *_: 1 / 0)  # nobody may ask it
    found = heads.baselines(setup, heads.Probing(20, 16), "linear")
    truth = setup.task.labels[setup.task.part("test")]
    correct = {name: (p["test"].argmax(axis=1) == truth).mean() for name, p in found.items()}
    assert correct["raw 32x32 pixels, linear"] == 1.0 > correct["untrained encoder, linear"]


def test_the_look_during_pretraining_asks_val_images_for_training_neighbours(monkeypatch):
    """In val the labels are swapped, so that whoever is asked, his neighbours are wrong."""
    monkeypatch.setattr(heads, "KNN_MOST", 30)
    setup = make_setup(40, 20)
    task, spy = setup.task, Spy(setup.images.squares)
    swapped = np.where(task.split == "val", 1 - task.labels, task.labels)
    images, task = SimpleNamespace(squares=spy), replace(task, labels=swapped)
    assert heads.knn_accuracy(setup.encoder, images, task, SCALING, CPU) < 0.3
    assert spy.rows < set(task.rows[:60]) and len(spy.rows) == 50  # neither test nor dropped
    task.split[:] = "train"
    assert heads.knn_accuracy(setup.encoder, images, task, SCALING, CPU) is None


# --- fine-tuning -------------------------------------------------------------------------------


def test_fine_tuning_learns_and_ends_with_the_weights_of_its_best_epoch(monkeypatch):
    monkeypatch.setattr(heads, "LEAST_STEPS", 10)
    setup = make_setup(24, 20)
    classifier, records = tuned(setup, 2, 8, (1e-4, 1e-3))
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    assert [record["peak_lr"] for record in records] == [1e-4, 1e-4, 1e-3, 1e-3]
    val = setup.task.part("val")
    score = heads.validate(heads.part_probs(setup, classifier, "val"), setup.task.labels[val])
    assert score.items() < max(records, key=heads.merit).items() and score["val_accuracy"] > 0.8
    assert not torch.equal(classifier.encoder.conv1.weight, setup.encoder.conv1.weight)


def test_each_peak_begins_anew_with_its_own_warm_up_and_no_view_comes_twice(monkeypatch):
    """Else the second peak would go on where the first one ended, and look better than it is."""
    rates, seeds, moved = [], [], []
    one_view, set_lr = simclr.one_view, simclr.set_lr

    def spy(images, generator, *how):
        assert how == (simclr.ALL, 0.4, 0.3)
        seeds.append(generator.initial_seed())
        return one_view(images, generator, *how)

    def note(optimizer, lr):
        rates.append(lr)
        set_lr(optimizer, lr)

    monkeypatch.setattr(simclr, "one_view", spy)
    monkeypatch.setattr(simclr, "set_lr", note)
    setup = replace(make_setup(8), checkpoint={"mean": 0.4, "std": 0.3})
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, 4))
    encoder.feature_dim = 4
    classifier = heads.Classifier(encoder, torch.nn.Linear(4, 2))
    first = classifier.head.weight.detach().clone()
    for _, state in heads.finetune(setup, classifier, heads.FineTuning(20, 4, (1e-4, 1e-4))):
        assert state["optimizer"]["state"][0]["step"] == 3 * ((state["epoch"] - 1) % 20 + 1)
        moved.append((classifier.head.weight - first).abs().max())
    assert rates == 2 * [simclr.warmup_cosine(step, 60, 1e-4, 0.0) for step in range(60)]
    assert moved[20] < 3 * 1e-4 < moved[19]  # AdamW moves a weight by the rate at most
    assert len(set(seeds)) == 120


def test_an_epoch_shows_every_image_equally_often_in_full_batches(monkeypatch):
    monkeypatch.setattr(heads, "LEAST_STEPS", 10)
    for n, steps, times in ((6, 10, {6, 7}), (50, 13, {1, 2})):
        setup = make_setup(n)
        setup.task.labels[:n] = np.arange(n)  # so that an image is known by its label
        setup.images.squares[:] = setup.images.squares[0]  # and a view by its generator
        batches = list(heads.augmented_batches(setup, heads.FineTuning(2, 4), 0, iter))
        shown = torch.cat([labels for _, _, labels in batches])
        assert len(batches) == steps and len(shown) == 4 * steps
        assert set(np.bincount(shown, minlength=n)) == times
        for number, seed in ((1, 0), (0, 1)):  # each epoch and each seed has its own numbers
            settings = heads.FineTuning(2, 4, seed=seed)
            _, views, labels = next(heads.augmented_batches(setup, settings, number, iter))
            assert not torch.equal(views, batches[0][1]) and not torch.equal(labels, batches[0][2])


def test_an_interrupted_fine_tuning_goes_on_to_the_same_bits():
    """From the file of any epoch, and over the border between two learning rates."""
    setup, settings, files, results = make_setup(), heads.FineTuning(2, 8, (1e-4, 1e-3)), [], []
    for done in range(5):
        classifier, resume, later = new_classifier(), None, []
        if done:
            resume = torch.load(io.BytesIO(files[done - 1].getvalue()), weights_only=True)
        for record, state in heads.finetune(setup, classifier, settings, resume):
            later.append(record)
            files.append(io.BytesIO())
            torch.save(state, files[-1])
        results.append((later, copied(classifier)))
        assert later == results[0][0][done:] and same(copied(classifier), results[0][1])


def test_fine_tuning_never_reads_an_image_that_is_neither_train_nor_val():
    setup, weights = make_setup(), []
    setup.images.squares = spy = Spy(setup.images.squares)
    for label in (0, 1):
        setup.task.labels[setup.task.part("test")] = label
        weights.append(copied(tuned(setup, 1, 8)[0]))
    assert spy.rows == set(setup.task.rows[:32]) and same(*weights)


def test_bf16_is_in_training_steps_alone_and_the_loss_is_float32(monkeypatch):
    setup, seen, losses, entropy = make_setup(), set(), set(), heads.F.cross_entropy
    monkeypatch.setattr(heads.F, "cross_entropy", lambda x, y: losses.add(x.dtype) or entropy(x, y))
    classifier = new_classifier()
    last = classifier.encoder.layer4[0].conv2
    last.register_forward_hook(lambda conv, _, out: seen.add((conv.training, out.dtype)))
    next(heads.finetune(replace(setup, bf16=True), classifier, heads.FineTuning(1, 8)))
    assert seen == {(True, torch.bfloat16), (False, torch.float32)} and losses == {torch.float32}


def test_a_loss_that_is_not_finite_stops_before_the_step():
    head = heads.new_head("fc", 16, 3, 0)
    head.bias.data[0] = torch.inf
    before = copied(head)
    with pytest.raises(data.UserError, match="the loss is nan.*--lr"):
        heads.train_head(head, blobs(9), blobs(9), heads.Probing(1))
    assert same(copied(head), before)


# --- a comparison ------------------------------------------------------------------------------


def many_people():
    """60 people of two to four slices; person 8 has slices of both classes, person 7 one of c."""
    groups = np.repeat(np.arange(60), np.random.default_rng(0).integers(2, 5, 60))
    labels = groups % 2
    labels[np.flatnonzero(groups == 7)[0]], labels[np.flatnonzero(groups == 8)[0]] = 2, 1
    split = np.select([groups % 10 == 0, groups % 10 == 1], ["test", "val"], "train")
    return make_task(labels, split, groups)


def test_labelled_groups_are_nested_stratified_and_never_cut():
    task, labelled = many_people(), {}
    train = task.split == "train"
    for fraction in (0.01, 0.1, 0.5, 1.0):
        cut = heads.label_subset(task, fraction, seed=3)
        kept = cut.split == "train"
        labelled[fraction] = set(cut.groups[kept])
        assert (cut.split[~train] == task.split[~train]).all()
        assert not labelled[fraction] & set(cut.groups[cut.split == "unlabelled"])
        for label, group_count in ((0, 24), (1, 25), (2, 1)):  # person 8 is one of both
            least = max(1, round(fraction * group_count))
            assert least <= len(set(cut.groups[kept & (task.labels == label)])) <= least + 2
    assert labelled[0.01] < labelled[0.1] < labelled[0.5] < labelled[1.0]
    assert labelled[1.0] == set(task.groups[train])
    other = heads.label_subset(task, 0.1, seed=4)
    assert set(other.groups[other.split == "train"]) != labelled[0.1]
    # Where every patient has images of both classes, 10 % of the patients are still 10 %.
    both = make_task(np.arange(100) % 2, np.full(100, "train"), np.repeat(np.arange(50), 2))
    assert len(heads.label_subset(both, 0.1, seed=0).part("train")) == 10


def test_every_method_gets_the_same_labels_and_says_what_it_trained(monkeypatch):
    monkeypatch.setattr(heads, "LEAST_STEPS", 1)
    task, settings = many_people(), heads.FineTuning(1, 16)
    setup = replace(make_setup(len(task.rows)), task=task)
    setup.images.squares = spy = Spy(setup.images.squares)
    before, fits = copied(setup.encoder), {}
    for method in evaluate.METHODS:
        fits[method] = heads.fit(setup, method, 0.1, 0, settings)
    cut = heads.label_subset(task, 0.1, 0)
    assert spy.rows == set(cut.rows[cut.split != "unlabelled"])
    network = sum(p.numel() for p in setup.encoder.parameters()) + 3 * 512 + 3
    sizes = {"probe": 329_985, "untrained": 329_985, "finetune": network, "scratch": network}
    sizes |= {"linear": 3 * 512 + 3, "knn": 0}
    for method, fit in fits.items():
        assert fit == json.loads(json.dumps(fit)) and fit["method"] == method
        assert (fit["fraction"], fit["seed"], fit["parameters"]) == (0.1, 0, sizes[method])
        assert fit["images"] == len(cut.part("train")) and fit["seconds"] > 0
        assert fit["groups"] == len(set(cut.groups[cut.part("train")]))
        assert np.shape(fit["probs"]) == (len(task.part("test")), 3)
        assert np.allclose(np.sum(fit["probs"], axis=1), 1)
    assert len({json.dumps(fit["probs"]) for fit in fits.values()}) == 6  # each its own answer
    assert fits["probe"]["lr"] is None and fits["finetune"]["lr"] == 1e-4
    assert same(copied(setup.encoder), before)
    other = replace(setup, encoder=heads.untrained("tiny", 9))
    for method, depends in (("scratch", False), ("untrained", False), ("finetune", True)):
        again = heads.fit(other, method, 0.1, 0, settings)
        assert (again["probs"] != fits[method]["probs"]) == depends
    for method in ("finetune", "probe"):  # on all labels, from another head, in another order
        seeds = [heads.fit(setup, method, 1.0, seed, settings)["probs"] for seed in (0, 1)]
        assert seeds[0] != seeds[1]


def test_from_scratch_val_chooses_among_three_rates(monkeypatch):
    peaks, accuracies, warmup = [], iter([0.5, 0.9, 0.8]), simclr.warmup_cosine
    score = {"val_loss": 1.0}
    monkeypatch.setattr(heads, "validate", lambda *_: score | {"val_accuracy": next(accuracies)})
    monkeypatch.setattr(simclr, "warmup_cosine", lambda *a: peaks.append(a[2]) or warmup(*a))
    fit = heads.fit(make_setup(), "scratch", 1.0, 0, heads.FineTuning(1, 64))
    assert peaks == [1e-4] * 3 + [3e-4] * 3 + [1e-3] * 3 and fit["lr"] == 3e-4


# --- classifier.pt -----------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A probe's classifier.pt: the file, what it was made from, the probe's own probabilities."""
    setup, encoder = make_setup(), heads.untrained("tiny", 8)  # not the one before
    features = heads.task_features(setup, encoder)
    head, _, probs = heads.fit_probe(features, setup.task, heads.Probing(epochs=2), "cosine_mlp")
    path, classifier = tmp_path / "classifier.pt", heads.Classifier(encoder, head)
    heads.save_classifier(path, classifier, setup, "cosine_mlp", 1.5, setup.checkpoint["config"])
    return path, setup, probs


def test_a_classifier_comes_back_with_its_memory_and_answers_in_the_same_digits(saved):
    path, setup, probs = saved
    classifier, checkpoint = heads.load_classifier(path)
    assert setup.checkpoint.keys() < checkpoint.keys() and not classifier.training
    assert (checkpoint["task"], checkpoint["classes"]) == ("mine", ["a", "b"])
    assert (checkpoint["temperature"], checkpoint["epoch"]) == (1.5, 3)
    used = setup.images.hashes[setup.task.rows[:32]]  # train and val; bytes(16): the encoder's own
    assert set(map(bytes, checkpoint["seen"].numpy())) == {bytes(16), *map(bytes, used)}
    squares, rows = setup.images.squares, setup.task.rows[setup.task.part("test")]
    for k, row in enumerate(rows):  # one file at a time, as `predict` may be asked
        alone = heads.predict_probs(classifier, squares, np.array([row]), checkpoint, CPU)
        assert np.allclose(alone[0], probs["test"][k], rtol=0, atol=1e-12)
    logits = classifier((torch.tensor(squares[rows])[:, None] / 255 - 0.5) / 0.5)
    assert np.allclose(logits.detach().softmax(dim=1), probs["test"], atol=1e-5)


SPOILT = {
    "no head": lambda c: c.pop("head"),
    "an unknown head": lambda c: c.update(head_type="forest"),
    "a class too few": lambda c: c["classes"].pop(),
    "a path for a task": lambda c: c.update(task="../mine"),
    "temperature 0": lambda c: c.update(temperature=0.0),
    "nothing on what it saw": lambda c: c.pop("seen"),
}


@pytest.mark.parametrize("how", [*SPOILT, "not there", "no checkpoint", "half a file"])
def test_a_spoilt_classifier_is_one_clear_line(saved, how):
    path = saved[0]
    if how in SPOILT:
        checkpoint = torch.load(path, weights_only=True)
        SPOILT[how](checkpoint)
        torch.save(checkpoint, path)
    elif how == "not there":
        path.unlink()
    else:
        path.write_bytes(b"scan" if how == "no checkpoint" else path.read_bytes()[:50_000])
    with pytest.raises(data.UserError, match="classifier.pt") as caught:
        heads.load_classifier(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_elsewhere_everything_is_tested_but_what_was_seen_or_dropped():
    """Image 0 was trained on, image 1 is of its patient, image 5 contradicts a near-duplicate."""
    hashes = np.arange(8, dtype=np.uint8)[:, None].repeat(16, 1)
    groups = np.array([0, 0, 2, 3, 4, 5, 6, 7])
    study = SimpleNamespace(images=SimpleNamespace(hashes=hashes), groups=groups)
    split = np.array(["train", "val", "test", "train", "train", "dropped", "test", "val"])
    task = make_task(np.arange(8) % 2, split, groups)
    task = replace(task, rows=np.arange(8), classes=("c", "b"))
    checkpoint = {"classes": ["a", "b", "c"], "seen": torch.from_numpy(hashes[:1])}
    own = heads.unseen_task(study, task, checkpoint)
    assert own.part("test").tolist() == [2, 3, 4, 6, 7]
    assert own.classes == ("a", "b", "c") and own.labels.tolist() == [2, 1] * 4
    assert (own.notes["dropped_as_seen"], own.notes["dropped_by_the_split"]) == (2, 1)
    with pytest.raises(data.UserError, match="'c', 'b'.*'b', 'd'"):
        heads.unseen_task(study, task, checkpoint | {"classes": ["b", "d"]})
    with pytest.raises(data.UserError, match="no image of mine is left"):
        heads.unseen_task(study, task, checkpoint | {"seen": torch.from_numpy(hashes)})
