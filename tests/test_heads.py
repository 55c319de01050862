"""heads.py: the head against its definition, and that nothing tested has a way into training."""

import doctest
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
    """A small architecture, small batches and short epochs."""
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
    """Images whose class is the way their stripes run; two images are dropped."""
    split = np.repeat(["train", "val", "test", "dropped"], [n_train, n_val, n_test, 2])
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:32, :32]
    labels = rng.integers(0, 2, len(split))
    waves = [np.sin((y if label else x) * 0.8 + rng.uniform(0, 6)) for label in labels[::-1]]
    squares = 127 + 90 * np.stack(waves) + rng.normal(0, 30, (len(split), 32, 32))
    squares = squares.clip(0, 255).astype(np.uint8)
    hashes = rng.integers(1, 256, (len(split), 16), dtype=np.uint8)
    images, encoder = (
        SimpleNamespace(squares=Spy(squares), hashes=hashes),
        heads.untrained("tiny", 7),
    )
    config = {"arch": "tiny", "image_size": 32, **SCALING}
    checkpoint = simclr.encoder_checkpoint(encoder, config, 3, torch.zeros(1, 16).byte())
    return heads.Setup(images, make_task(labels, split), encoder, checkpoint, CPU, bf16=False)


def new_classifier():
    return heads.Classifier(heads.untrained("tiny", 7), heads.new_head("fc", 512, 2, 0))


def bits(network):
    """All weights and statistics, to the bit."""
    return {name: value.numpy().tobytes() for name, value in network.state_dict().items()}


def blobs(n, seed=0):
    """Three clouds of features in 16 dimensions, and their labels."""
    labels = np.arange(n) % 3
    noise = torch.randn(n, 16, generator=torch.Generator().manual_seed(seed))
    return torch.eye(3, 16)[labels] * 2 + 0.8 * noise, labels


def test_settings_are_the_published_ones_and_examples_in_docstrings_hold():
    assert heads.Probing() == heads.Probing(150, 256, 5e-4, 1e-3, 0)
    assert heads.FineTuning() == heads.FineTuning(30, 64, (1e-4,), 1e-4, 0)
    assert sum(p.numel() for p in heads.CosineMLP(512, 3).parameters()) == 329_985
    assert doctest.testmod(heads) == (0, 3)  # failed, attempted


def test_cosine_mlp_is_scale_times_cosine_computed_one_by_one():
    head, h = heads.CosineMLP(8, 3, hidden_dims=(16, 12)).double(), torch.randn(4, 8).double()
    assert not torch.equal(head(h), head(h))  # dropout; and the running statistics move
    m = h
    for linear, norm in ((head.mlp[0], head.mlp[1]), (head.mlp[4], head.mlp[5])):
        m = m @ linear.weight.T + linear.bias
        m = (m - norm.running_mean) / (norm.running_var + 1e-5) ** 0.5
        m = (m * norm.weight + norm.bias).clamp(min=0)
    for scale in (10, 3):
        logits = head.eval()(h)
        for n, k in np.ndindex(4, 3):
            w = head.class_weights[k]
            cosine = (m[n] @ w) / (m[n].norm() * w.norm())
            assert logits[n, k].item() == pytest.approx(scale * cosine.item(), abs=1e-9)
        head.scale.data.fill_(3)


def test_features_leave_the_encoder_bitwise_unchanged_and_do_not_depend_on_their_neighbours():
    """Else `predict` on one file would answer in other digits than `probe` on all of them."""
    setup, sizes = replace(make_setup(), checkpoint={"mean": 0.2, "std": 3}), set()
    encoder, spy, rows = setup.encoder, setup.images.squares, setup.task.rows
    encoder(torch.randn(8, 1, 32, 32))  # moves the running statistics
    before = bits(encoder)
    encoder.conv1.register_forward_hook(lambda module, x, out: sizes.add(len(out)))
    h = heads.task_features(setup, encoder)
    assert encoder.training and bits(encoder) == before and spy.most == 4 and sizes == {4}
    assert spy.rows == set(rows[:-2]) and h[-2:].isnan().all()  # dropped ones are never read
    slow = encoder.eval()((torch.tensor(spy.squares[rows])[:, None] / 255 - 0.2) / 3)
    assert torch.allclose(slow[:-2], h[:-2], atol=1e-4)
    for k in range(9):  # in the order of the task's rows
        alone = heads.features_of(encoder, spy, rows[[k]], setup.checkpoint, CPU)
        assert torch.equal(alone, h[[k]])


@pytest.mark.parametrize(("head_type", "size"), [("cosine_mlp", 1), ("linear", 0.02)])
def test_a_probe_learns_and_a_linear_one_from_small_features_too(head_type, size):
    """Those of an untrained encoder are small: one rate would get nowhere with them."""
    h, labels = blobs(90)
    task = make_task(labels, np.repeat(["train", "val"], [60, 30]))
    settings = heads.Probing(30, 16, 1e-2)
    head, records, probs = heads.fit_probe(size * h, task, settings, head_type)
    assert [record["epoch"] for record in records] == list(range(1, 31)) and not head.training
    assert records[-1]["train_loss"] < 0.7 * records[0]["train_loss"]
    score = heads.validate(heads.probabilities(head, size * h[60:]), labels[60:])
    assert score == heads.validate(probs["val"], labels[60:])
    assert score.items() < max(records, key=heads.merit).items() and score["val_accuracy"] > 0.8


def test_an_epoch_steps_batch_by_batch_and_stops_before_a_loss_that_is_not_finite():
    head, (h, labels) = torch.nn.Linear(16, 3), blobs(20)
    optimizer, y = simclr.adamw(head, 0.1), torch.tensor(labels)
    batches = [(0.0, h[:12], y[:12]), (0.0, h[12:], y[12:])]
    losses = [heads.F.cross_entropy(head(x), y) for _, x, y in batches]
    loss = heads.train_epoch(head, optimizer, batches)
    assert loss == pytest.approx((losses[0].item() + losses[1].item()) / 2)
    assert torch.allclose(head.weight.grad, torch.autograd.grad(losses[1], head.weight)[0])
    head.bias.data[0] = torch.inf
    before = bits(head)
    with pytest.raises(data.UserError, match="the loss is nan.*--lr"):
        heads.train_epoch(head, optimizer, [(0.1, h, y)])
    assert bits(head) == before


@pytest.mark.parametrize(
    ("scores", "best"),
    [([(0.5, 0.1), (0.8, 0.6), (0.8, 0.5), (0.8, 0.5), (0.7, 0.2)], 3), ([(None, None)] * 5, 5)],
)
def test_val_chooses_by_accuracy_loss_and_age_or_else_the_last(monkeypatch, scores, best):
    """Val says what stands above; an epoch writes its number into the last bias."""
    decays = []

    def train_epoch(network, optimizer, *_):
        decays.append({group["weight_decay"] for group in optimizer.param_groups})
        list(network.parameters())[-1].data.fill_((len(decays) - 1) % 5 + 1)
        return 0.0

    def validate(*_):
        return dict(zip(("val_accuracy", "val_loss"), scores[(len(decays) - 1) % 5], strict=True))

    monkeypatch.setattr(heads, "train_epoch", train_epoch)
    monkeypatch.setattr(heads, "validate", validate)
    h, labels = blobs(21)
    task, classifier = make_task(labels, np.repeat(["train", "val"], [12, 9])), new_classifier()
    head, _, _ = heads.fit_probe(h, task, heads.Probing(epochs=5), "fc")
    assert len(list(heads.finetune(make_setup(), classifier, heads.FineTuning(5, 8)))) == 5
    assert decays == [{1e-3, 0}] * 5 + [{1e-4, 0}] * 5
    assert head.bias[0] == classifier.head.bias[0] == best


def test_test_images_have_no_way_into_a_probe_and_it_repeats_to_the_bit():
    """Their features and labels are replaced, others draw numbers: no bit of the head changes."""
    features, labels = blobs(40)
    task = make_task(labels, np.repeat(["train", "val", "test", "dropped"], [20, 8, 8, 4]))
    settings = heads.Probing(epochs=3, batch_size=8)
    head, records, probs = heads.fit_probe(features, task, settings, "cosine_mlp")
    other, swapped = features.clone(), np.where(task.split == "test", 0, labels)
    other[28:36], other[36:], task = 5.0, torch.nan, replace(task, labels=swapped)
    torch.rand(7)
    again, same_records, others = heads.fit_probe(other, task, settings, "cosine_mlp")
    assert bits(head) == bits(again) and records == same_records
    assert probs["test"].shape == (8, 3) and not np.allclose(probs["test"], others["test"])


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
    task, spy = setup.task, setup.images.squares
    task.labels[40:60] = 1 - task.labels[40:60]
    assert heads.knn_accuracy(setup.encoder, setup.images, task, SCALING, CPU) < 0.3
    assert spy.rows < set(task.rows[:60]) and len(spy.rows) == 50  # neither test nor dropped


def test_fine_tuning_learns_and_reads_train_and_val_alone_and_steps_alone_are_in_bf16(monkeypatch):
    monkeypatch.setattr(heads, "LEAST_STEPS", 10)
    setup, classifier, dtypes = replace(make_setup(24, 20), bf16=True), new_classifier(), set()
    last = classifier.encoder.layer4[0].conv2
    last.register_forward_hook(lambda conv, _, out: dtypes.add((conv.training, out.dtype)))
    epochs = heads.finetune(setup, classifier, heads.FineTuning(2, 8, (1e-4, 1e-3)))
    records = [record for record, _ in epochs]
    assert dtypes == {(True, torch.bfloat16), (False, torch.float32)}
    assert setup.images.squares.rows == set(setup.task.rows[:44])
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    assert [record["peak_lr"] for record in records] == [1e-4, 1e-4, 1e-3, 1e-3]
    score = heads.validate(heads.part_probs(setup, classifier, "val"), setup.task.labels[24:44])
    assert score.items() < max(records, key=heads.merit).items() and score["val_accuracy"] > 0.8
    assert not torch.equal(classifier.encoder.conv1.weight, setup.encoder.conv1.weight)


def test_each_peak_begins_anew_with_its_own_warm_up_and_no_view_comes_twice(monkeypatch):
    """Else the second peak would go on where the first one ended, and look better than it is."""
    rates, drawn, moved, one_view, set_lr = [], [], [], simclr.one_view, simclr.set_lr
    monkeypatch.setattr(simclr, "set_lr", lambda o, lr: rates.append(lr) or set_lr(o, lr))
    monkeypatch.setattr(simclr, "one_view", lambda *a: drawn.append(a[1:]) or one_view(*a))
    classifier, setup = new_classifier(), replace(make_setup(8), checkpoint={"mean": 0.4, "std": 3})
    first = classifier.head.weight.detach().clone()
    for _, state in heads.finetune(setup, classifier, heads.FineTuning(9, 4, (1e-4, 1e-4))):
        assert state["optimizer"]["state"][0]["step"] == 3 * ((state["epoch"] - 1) % 9 + 1)
        moved.append((classifier.head.weight - first).abs().max())
    assert rates == 2 * [simclr.warmup_cosine(step, 27, 1e-4, 0.0) for step in range(27)]
    assert moved[9] < 3 * 1e-4 < moved[8]  # AdamW moves a weight by the rate at most
    assert len({generator.initial_seed() for generator, *_ in drawn}) == 54
    assert all(how == [simclr.ALL, 0.4, 3] for _, *how in drawn)


@pytest.mark.parametrize(("n", "steps", "times"), [(6, 10, {6, 7}), (50, 13, {1, 2})])
def test_an_epoch_shows_every_image_equally_often_in_full_batches(monkeypatch, n, steps, times):
    monkeypatch.setattr(heads, "LEAST_STEPS", 10)
    setup, shown = make_setup(n), []
    setup.task.labels[:n] = np.arange(n)  # so that an image is known by its label
    for number, seed in ((0, 0), (1, 0), (0, 1)):
        batches = heads.augmented_batches(setup, heads.FineTuning(2, 4, seed=seed), number, iter)
        shown.append(torch.stack([labels for _, _, labels in batches]))
        assert shown[-1].shape == (steps, 4)
        assert set(np.bincount(shown[-1].flatten(), minlength=n)) == times
    assert not torch.equal(shown[0], shown[1]) and not torch.equal(shown[0], shown[2])


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
        results.append((later, bits(classifier)))
        assert later == results[0][0][done:] and bits(classifier) == results[0][1]


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
    for fraction, seed in ((0.01, 3), (0.1, 3), (0.5, 3), (1.0, 3), (0.1, 4)):
        cut = heads.label_subset(task, fraction, seed)
        kept = cut.split == "train"
        labelled[fraction, seed] = set(cut.groups[kept])
        assert (cut.split[~train] == task.split[~train]).all()
        assert not set(cut.groups[kept]) & set(cut.groups[cut.split == "unlabelled"])
        for label, group_count in ((0, 24), (1, 25), (2, 1)):  # person 8 is one of both
            least = max(1, round(fraction * group_count))
            assert least <= len(set(cut.groups[kept & (task.labels == label)])) <= least + 2
    assert labelled[0.01, 3] < labelled[0.1, 3] < labelled[0.5, 3] < labelled[1.0, 3]
    assert labelled[1.0, 3] == set(task.groups[train]) and labelled[0.1, 3] != labelled[0.1, 4]
    # Where every patient has images of both classes, 10 % of the patients are still 10 %.
    both = make_task(np.arange(100) % 2, np.full(100, "train"), np.repeat(np.arange(50), 2))
    assert len(heads.label_subset(both, 0.1, seed=0).part("train")) == 10


def test_every_method_gets_the_same_labels_and_says_what_it_trained(monkeypatch):
    monkeypatch.setattr(heads, "LEAST_STEPS", 1)
    task, settings = many_people(), heads.FineTuning(1, 16)
    setup = replace(make_setup(len(task.rows)), task=task)
    before, cut = bits(setup.encoder), heads.label_subset(task, 0.1, 0)
    fits = {method: heads.fit(setup, method, 0.1, 0, settings) for method in evaluate.METHODS}
    assert setup.images.squares.rows == set(cut.rows[cut.split != "unlabelled"])
    assert bits(setup.encoder) == before
    train, linear = cut.part("train"), 3 * 512 + 3
    network = sum(p.numel() for p in setup.encoder.parameters()) + linear
    sizes = {"probe": 329_985, "untrained": 329_985, "linear": linear, "knn": 0}
    for method, fit in fits.items():
        assert fit == json.loads(json.dumps(fit)) and fit["method"] == method
        assert fit["parameters"] == sizes.get(method, network) and fit["seconds"] > 0
        assert (fit["images"], fit["groups"]) == (len(train), len(set(cut.groups[train])))
        assert np.allclose(np.sum(fit["probs"], axis=1), np.ones(len(task.part("test"))))
    assert len({json.dumps(fit["probs"]) for fit in fits.values()}) == 6  # each its own answer
    assert fits["probe"]["lr"] is None and fits["finetune"]["lr"] == 1e-4
    other = replace(setup, encoder=heads.untrained("tiny", 9))
    for method, depends in (("scratch", False), ("untrained", False), ("finetune", True)):
        again = heads.fit(other, method, 0.1, 0, settings)
        assert (again["probs"] != fits[method]["probs"]) == depends
    for method in ("finetune", "probe"):  # on all labels, from another head, in another order
        seeds = [heads.fit(setup, method, 1.0, seed, settings)["probs"] for seed in (0, 1)]
        assert seeds[0] != seeds[1]


def test_from_scratch_val_chooses_among_three_rates(monkeypatch):
    peaks, found, warmup = [], iter([0.5, 0.9, 0.8]), simclr.warmup_cosine
    monkeypatch.setattr(heads, "validate", lambda *_: dict(val_loss=1, val_accuracy=next(found)))
    monkeypatch.setattr(simclr, "warmup_cosine", lambda *a: peaks.append(a[2]) or warmup(*a))
    fit = heads.fit(make_setup(), "scratch", 1.0, 0, heads.FineTuning(1, 64))
    assert peaks == [1e-4] * 3 + [3e-4] * 3 + [1e-3] * 3 and fit["lr"] == 3e-4


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
    told = {"task": "mine", "classes": ["a", "b"], "temperature": 1.5, "epoch": 3}
    assert checkpoint.items() >= told.items()
    used = setup.images.hashes[setup.task.rows[:32]]  # train and val; bytes(16): the encoder's own
    assert set(map(bytes, checkpoint["seen"].numpy())) == {bytes(16), *map(bytes, used)}
    squares, rows = setup.images.squares, setup.task.rows[setup.task.part("test")]
    for k, row in enumerate(rows):  # one file at a time, as `predict` may be asked
        alone = heads.predict_probs(classifier, squares, np.array([row]), checkpoint, CPU)
        assert np.allclose(alone[0], probs["test"][k], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "change",
    [{"head": None}, {"head_type": "forest"}, {"classes": ["a"]}]
    + [{"task": "../mine"}, {"temperature": 0.0}, {"seen": None}],
)
def test_a_spoilt_classifier_is_one_clear_line(saved, change):
    changed = torch.load(saved[0], weights_only=True) | change
    torch.save({key: value for key, value in changed.items() if value is not None}, saved[0])
    with pytest.raises(data.UserError, match="^[^\n]*classifier.pt[^\n]{,300}$"):
        heads.load_classifier(saved[0])


def test_elsewhere_everything_is_tested_but_what_was_seen_or_dropped():
    """Image 0 was trained on, image 1 is of its patient, image 5 contradicts a near-duplicate."""
    hashes = np.arange(8, dtype=np.uint8)[:, None].repeat(16, 1)
    groups = np.array([0, 0, 2, 3, 4, 5, 6, 7])
    images = SimpleNamespace(hashes=hashes, thumbnails=np.arange(32).reshape(8, 2, 2))
    study = SimpleNamespace(images=images, groups=groups)
    split = np.array(["train", "val", "test", "train", "train", "dropped", "test", "val"])
    task = make_task(np.arange(8) % 2, split, groups)
    task = replace(task, rows=np.arange(8), classes=("c", "b"))
    checkpoint = {"classes": ["a", "b", "c"], "seen": torch.from_numpy(hashes[:1])}
    own = heads.unseen_task(study, task, checkpoint)
    assert own.part("test").tolist() == [2, 3, 4, 6, 7]
    assert own.classes == ("a", "b", "c") and own.labels.tolist() == [2, 1] * 4
    notes = {"dropped": 3, "dropped_as_seen": 2, "dropped_by_the_split": 1}
    assert own.notes.items() > notes.items()
    with pytest.raises(data.UserError, match="'c', 'b'.*'b', 'd'"):
        heads.unseen_task(study, task, checkpoint | {"classes": ["b", "d"]})
    with pytest.raises(data.UserError, match="no image of mine is left"):
        heads.unseen_task(study, task, checkpoint | {"seen": torch.from_numpy(hashes)})


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
