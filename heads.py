"""Train a classifier on what the encoder has learnt: a probe, or the whole network, fine-tuned.

The question a probe asks is how much of a diagnosis can be read off the representation h when the
encoder may not change. So the encoder sees each picture once, in eval mode, and only a small head
is trained on those features; seconds, not hours, and few labels are enough. The head is a cosine
classifier: it compares directions, so a class cannot win by having longer weights, which helps
where classes are unequal in size. A score counts only where nothing tested was trained on: the
splits, which come first here, and the second half of this file see to that: for pretraining, for a
probe, for pictures from elsewhere.

    m = two times: Linear -> BatchNorm -> ReLU -> Dropout         (N, E) -> (N, 128)
    logits_k = s * cos(m, w_k),  s learnable, from 10    (Gidaris and Komodakis, 1804.09458, §3.2)

Shape letters: N pictures in a batch · E encoder features · K classes. Here also n pictures in all.

Next: gradcam.py
"""

import copy
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import evaluate
import simclr

SPLIT_SEED = b"simclr-brain-1"  # a constant: --seed never moves a picture between the parts
CHAIN_SHARE = 0.05  # a group above this share of its task may be strangers linked in a chain
KNN_MOST = 1000  # pictures of each part that are looked at during a pretraining
LEAST_STEPS = 10  # in an epoch of fine-tuning: of few pictures, one pass would be a step or two
WARM_UP = 0.05  # of the steps of a fine-tuning, in which the learning rate rises
SCRATCH_LRS = (1e-4, 3e-4, 1e-3)  # tried from random weights; the val part chooses
CHAIN_LEAST = 4  # but no group of so few pictures is suspected

# ---------------------------------------------------------------------------------------------
# The tasks, and their splits: which pictures train, choose and test
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One classification task: parallel arrays over its pictures, and how they were split."""

    name: str
    classes: tuple[str, ...]
    rows: np.ndarray  # (n,) int64, rows of Pictures
    labels: np.ndarray  # (n,) int64 in [0, K)
    groups: np.ndarray  # (n,) int64, group numbers of the whole data folder
    parts: np.ndarray  # (n,) str: the publisher's train, val, test, or ''
    split: np.ndarray  # (n,) str: train, val, test or dropped
    notes: dict  # how the split was made, what was dropped and why

    def part(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One part of the task.

        Args:
            name: 'train', 'val' or 'test'.

        Returns:
            rows, labels, groups: (m,) int64 each.
        """
        chosen = self.split == name
        return self.rows[chosen], self.labels[chosen], self.groups[chosen]


def parts_of(task: Task) -> dict[str, np.ndarray]:
    """Where the pictures of each part stand among those of the task: (m,) int64."""
    return {part: np.flatnonzero(task.split == part) for part in ("train", "val", "test")}


def allot(groups: int, test: float, val: float) -> tuple[int, int]:
    """How many of a class's groups go to test and to val; the rest, at least one, to train.

    A class gives a group to train, then to test, then to val, before proportions apply.

    >>> allot(1, 0.15, 0.15), allot(2, 0.15, 0.15), allot(3, 0.15, 0.15), allot(40, 0.15, 0.15)
    ((0, 0), (1, 0), (1, 1), (6, 6))
    """
    n_test = max(1, int(groups * test + 0.5)) if test and groups > 1 else 0
    n_val = max(1, int(groups * val + 0.5)) if val and groups > 1 + n_test else 0
    return n_test, n_val


def split_by_group(
    labels: np.ndarray, groups: np.ndarray, parts: np.ndarray, keys: np.ndarray, clash: np.ndarray
) -> np.ndarray:
    """Give each picture to train, val or test such that no group stands in two of them.

    A publisher's test (and val) pictures stay what they are, and the rest of their groups is
    dropped. What the publisher did not set aside is taken from his training part: 15 % of the
    groups for val, and for test. Pictures without a publisher's part are split 70/15/15.

    Args:
        labels: (n,) int64.
        groups: (n,) int64.
        parts: (n,) str, the publisher's 'train', 'val', 'test' or ''.
        keys: (n,) bytes, the picture's hash: it alone decides the order in which groups are dealt.
        clash: (n,) bool, True = a twin of it in this task has another label; dropped.

    Returns:
        (n,) str: 'train', 'val', 'test' or 'dropped'.
    """
    split = np.where(clash, "dropped", "train").astype("U7")
    free = ~clash
    for part in ("test", "val"):
        own = free & (parts == part)
        split[own] = part
        touched = free & np.isin(groups, groups[own])
        split[touched & ~own] = "dropped"
        free &= ~touched
    given = set(parts[~clash])
    test_share, val_share = (0.0 if part in given else 0.15 for part in ("test", "val"))
    # Deal the groups out class by class, in an order that only their pixels decide. A group of
    # several labels counts with its commonest.
    _, local = np.unique(groups, return_inverse=True)
    count = local.max(initial=-1) + 1
    published = np.zeros(count, bool)  # (groups,), True = has a publisher's part
    published[local[parts == "train"]] = True
    votes = np.zeros((count, labels.max(initial=0) + 1), np.int64)  # (groups, K)
    np.add.at(votes, (local[free], labels[free]), 1)
    lowest: dict[int, bytes] = {}
    for i in np.flatnonzero(free):
        lowest[local[i]] = min(keys[i], lowest.get(local[i], keys[i]))
    order = sorted(lowest, key=lambda g: hashlib.sha256(SPLIT_SEED + lowest[g]).digest())
    for label in range(votes.shape[1]):
        for kind, shares in ((False, (0.15, 0.15)), (True, (test_share, val_share))):
            mine = [g for g in order if votes[g].argmax() == label and published[g] == kind]
            n_test, n_val = allot(len(mine), *shares)
            split[free & np.isin(local, mine[:n_test])] = "test"
            split[free & np.isin(local, mine[n_test : n_test + n_val])] = "val"
    return split


@dataclass(frozen=True)
class Study(data.Collection):
    """A data folder with its tasks, each of them split."""

    tasks: dict[str, Task]

    def task(self, name: str) -> Task:
        """The task called `name`.

        Raises:
            UserError: there is none.
        """
        if name not in self.tasks:
            found = ", ".join(sorted(self.tasks)) or "none"
            text = "a task is a folder that holds two or more class folders, each with pictures"
            raise data.UserError(f"no task {name!r} here; found: {found}; {text}")
        return self.tasks[name]


def make_task(collection: data.Collection, name: str, resplit: bool) -> Task:
    """Pool the sources of one task, which have the same classes, and split it (`split_by_group`).

    Twins of two labels contradict each other. Since nobody can say which one is right, both are
    dropped.

    Args:
        resplit: as in `load`.
    """
    pictures, groups, twins = collection.pictures, collection.groups, collection.twins
    sources = [source for source in collection.sources if source.task == name]
    classes = sources[0].classes
    listed = [entry for source in sources for entry in source.rows]
    listed = [entry for entry in listed if entry[0] not in pictures.unreadable]
    rows = np.array([row for row, *_ in listed], np.int64)
    labels = np.array([classes.index(label) for _, label, *_ in listed], np.int64)
    parts = np.array([part for *_, part, _ in listed], "U7")
    label_of = np.full(len(pictures.paths), -1)  # (n,), -1 = not in this task
    label_of[rows] = labels
    a, b = label_of[twins[:, 0]], label_of[twins[:, 1]]
    clash = np.isin(rows, twins[(a >= 0) & (b >= 0) & (a != b), :2])
    keys = np.array([pictures.hashes[row].tobytes().hex().encode() for row in rows])
    kept = np.full_like(parts, "") if resplit else parts
    split = split_by_group(labels, groups[rows], kept, keys, clash)
    largest = int(np.bincount(groups[rows]).max(initial=0))
    dropped = split == "dropped"
    notes = {
        "rule": "publisher's parts kept, cut by group"
        if (kept != "").any()
        else "70/15/15 by group",
        "groups": len(np.unique(groups[rows])),
        "largest_group": largest,
        "largest_group_is_suspect": largest > max(CHAIN_SHARE * len(rows), CHAIN_LEAST),
        "dropped_for_a_twin_with_another_label": int(clash.sum()),
        "dropped_for_a_group_in_test_or_val": int((dropped & ~clash).sum()),
        "dropped_paths": [pictures.paths[row] for row in rows[dropped]],
    }
    return Task(name, classes, rows, labels, groups[rows], parts, split, notes)


def load(*folder: Any, resplit: bool = False, **how: Any) -> Study:
    """Read a data folder, and split its tasks. Every command starts here.

    Args:
        folder, how: as `data.load` takes them.
        resplit: split the publishers' parts anew, as if they had made none.
    """
    collection = data.load(*folder, **how)
    names = sorted({source.task for source in collection.sources})
    tasks = {name: make_task(collection, name, resplit) for name in names}
    return Study(**vars(collection), tasks=tasks)


# ---------------------------------------------------------------------------------------------
# The head
# ---------------------------------------------------------------------------------------------


class CosineMLP(nn.Module):
    """The probe's head: a two-layer MLP, then the cosine to one learnt direction for each class.

    With E = 512, 3 classes and the default widths it has 329,985 parameters.

    Args:
        in_features: E.
        num_classes: K.
        hidden_dims: widths of the two hidden layers.
        dropout: chance that a hidden unit is silenced in training; raise it when labels are few.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        hidden_dims: tuple[int, ...] = (512, 128),
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in hidden_dims:
            layers += [nn.Linear(in_features, width), nn.BatchNorm1d(width), nn.ReLU()]
            layers += [nn.Dropout(dropout)]
            in_features = width
        self.mlp = nn.Sequential(*layers)
        self.class_weights = nn.Parameter(torch.empty(num_classes, in_features))  # (K, 128)
        self.scale = nn.Parameter(torch.tensor(10.0))  # s: cosines alone are too flat a softmax
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        nn.init.kaiming_normal_(self.class_weights)

    def forward(self, h: Tensor) -> Tensor:
        """Features (N, E) float -> logits (N, K) in [-s, s]."""
        m = F.normalize(self.mlp(h), dim=1)  # (N, 128), unit rows
        w = F.normalize(self.class_weights, dim=1)  # (K, 128), unit rows
        return self.scale * m @ w.T  # (N, K)


HEADS = {"cosine_mlp": CosineMLP, "linear": nn.Linear}  # by head_type: (in_features, num_classes)


# ---------------------------------------------------------------------------------------------
# Training a head on features that were computed once
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probing:
    """The settings of a probe; the defaults are the published values."""

    epochs: int = 150
    batch_size: int = 256
    lr: float = 5e-4
    weight_decay: float = 1e-3
    seed: int = 0


def milestone_lr(epoch: int, epochs: int, lr: float) -> float:
    """The rate in epoch 1, ..., epochs: a tenth after 60 % of them, a hundredth after 80 %.

    >>> [milestone_lr(e, 10, 1.0) for e in (1, 6, 7, 8, 9, 10)]
    [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    """
    passed = ((epoch - 1) * 10 >= epochs * 6) + ((epoch - 1) * 10 >= epochs * 8)
    return lr / 10**passed


def train_probe(
    head: nn.Module,
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    settings: Probing,
) -> Iterator[dict[str, float]]:
    """Train a head on features computed once; it ends with the weights of its best epoch.

    Best means: highest validation accuracy, then lowest validation loss, then earliest. Without
    validation pictures the last epoch counts. The test part has no way in here.

    Args:
        head: maps (N, E) to (N, K); changed in place, left in eval mode.
        train, val: (features (n, E) float32, labels (n,) int64), on the CPU, as the head.

    Yields:
        After each epoch: epoch, train_loss (nats), val_loss, val_accuracy (None without val), lr.
    """
    (features, labels), n = train, len(train[0])
    optimizer = simclr.adamw(head, settings.weight_decay)
    best: tuple[float, float] | None = None
    best_weights = copy.deepcopy(head.state_dict())
    for epoch in range(1, settings.epochs + 1):
        lr = milestone_lr(epoch, settings.epochs, settings.lr)
        simclr.set_lr(optimizer, lr)
        head.train()
        order = torch.randperm(n, generator=data.generator_for(settings.seed, epoch, 0))
        # Even batches, not a small last one: batch norm needs at least two rows.
        batches = order.tensor_split(-(-n // settings.batch_size))
        total = torch.zeros(())
        for step, rows in enumerate(batches, start=1):
            # Dropout draws from this generator alone; torch.manual_seed would, at every step, also
            # queue a seed for GPUs that nobody has started.
            torch.default_generator.manual_seed(data.seed_from(settings.seed, epoch, step))
            loss = F.cross_entropy(head(features[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(rows)
        record = {"epoch": epoch, "train_loss": float(total) / n, "lr": lr}
        record["val_loss"], record["val_accuracy"] = score(head, *val)
        rank = (record["val_accuracy"] or 0.0, -(record["val_loss"] or 0.0))
        if best is None or rank > best or not len(val[0]):
            best, best_weights = rank, copy.deepcopy(head.state_dict())
        yield record
    head.load_state_dict(best_weights)
    head.eval()


@torch.no_grad()
def score(head: nn.Module, features: Tensor, labels: Tensor) -> tuple[float | None, float | None]:
    """How good a head is on features it was not trained on.

    Args:
        features, labels: (n, E) float32, (n,) int64.

    Returns:
        (mean cross-entropy in nats, accuracy in [0, 1]), the head in eval mode, where dropout is
        off and batch norm uses its running statistics; (None, None) without pictures.
    """
    if not len(labels):
        return None, None
    head.eval()
    logits = head(features)  # (n, K)
    accuracy = (logits.argmax(dim=1) == labels).float().mean()
    return float(F.cross_entropy(logits, labels)), float(accuracy)


@torch.no_grad()
def probabilities(head: nn.Module, features: Tensor) -> Tensor:
    """Class probabilities, the softmax of the logits.

    Args:
        features: (n, E) float32.

    Returns:
        (n, K) float64 on the CPU, rows sum to 1.
    """
    head.eval()
    return head(features).double().softmax(dim=1).cpu()


# ---------------------------------------------------------------------------------------------
# A probe: the same head on the encoder's features, and on two that have learnt nothing
# ---------------------------------------------------------------------------------------------


def scaled(images: np.ndarray, checkpoint: dict, device: torch.device) -> Tensor:
    """Pictures (N, S, S) uint8 as an encoder takes them: (N, 1, S, S) float32, without changes."""
    x = torch.from_numpy(np.array(images))[:, None].to(device)
    return (data.to_unit(x) - checkpoint["mean"]) / checkpoint["std"]


@torch.no_grad()
def features_of(
    encoder: simclr.ResNet,
    checkpoint: dict,
    images: np.ndarray,
    device: torch.device,
    batch_size: int = 256,
) -> Tensor:
    """The representations of pictures as they are, without augmentation, always in float32.

    A copy of the encoder runs in eval mode, so batch norm uses (and keeps) its running statistics
    and a picture's features do not depend on its neighbours. The encoder stays as it is: in its
    mode, and in the memory format that its training chose.

    Args:
        checkpoint: the encoder's; its mean and std scale the pictures.
        images: (n, S, S) uint8.

    Returns:
        h: (n, E) float32 on the CPU.
    """
    layout = simclr.memory_format(device, bf16=False)
    encoder = copy.deepcopy(encoder).to(device, memory_format=layout).eval()
    features = [torch.zeros(0, encoder.feature_dim)]
    for i in range(0, len(images), batch_size):
        x = scaled(images[i : i + batch_size], checkpoint, device)  # (N, 1, S, S)
        features.append(encoder(x.contiguous(memory_format=layout)).cpu())
    return torch.cat(features)


def untrained(arch: str, seed: int) -> simclr.ResNet:
    """An encoder with random weights, which `seed` alone decides."""
    torch.manual_seed(seed)
    return simclr.ARCHITECTURES[arch]()


def fit_probe(
    features: Tensor, task: Task, settings: Probing, head_type: str, progress: Callable
) -> tuple[nn.Module, list[dict], dict[str, np.ndarray]]:
    """Train a head on one representation of a task's pictures; the val part chooses its epoch.

    Args:
        features: (n, E) float32, in the order of `task.rows`.
        head_type: one of HEADS.
        progress: wraps the epochs and shows how far they are, as tqdm does.

    Returns:
        the head, a record for each epoch, probabilities (m, K) of the val part and the test part.
    """
    labels, of = torch.from_numpy(task.labels), parts_of(task)
    torch.manual_seed(settings.seed)  # the head's first weights
    head = HEADS[head_type](features.shape[1], len(task.classes))
    train, val = ((features[of[part]], labels[of[part]]) for part in ("train", "val"))
    records = list(progress(train_probe(head, train, val, settings)))
    return head, records, {p: probabilities(head, features[of[p]]).numpy() for p in ("val", "test")}


def baselines(
    checkpoint: dict,
    pictures: data.Pictures,
    task: Task,
    settings: Probing,
    head_type: str,
    progress: Callable,
    device: torch.device,
) -> dict[str, dict[str, np.ndarray]]:
    """What the same head makes of two representations that have learnt nothing.

    Args:
        checkpoint: of the encoder that they are set beside.

    Returns:
        by name, probabilities (m, K) of the val part and the test part.
    """
    encoder, found = untrained(checkpoint["arch"], settings.seed), {}
    pixels = torch.from_numpy(pictures.thumbnails[task.rows]).flatten(1)  # (n, 1024)
    images = pictures.squares(task.rows)
    features = {"untrained encoder": features_of(encoder, checkpoint, images, device)}
    features["raw 32x32 pixels"] = pixels.float() / 127.5 - 1
    for name, h in features.items():
        shown = partial(progress, desc=f"head, {name}")
        found[name] = fit_probe(h, task, settings, head_type, shown)[2]
    return found


def knn_accuracy(
    encoder: simclr.ResNet,
    scaling: dict,
    pictures: data.Pictures,
    task: Task,
    device: torch.device,
) -> float | None:
    """How many val pictures have nearest training pictures of their class (`nearest_neighbours`).

    Args:
        scaling: the encoder's mean and std.

    Returns:
        A share of at most KNN_MOST of either part; None where one of them is empty.
    """
    chance, of = np.random.default_rng(0), parts_of(task)
    some = [chance.permutation(of[part])[:KNN_MOST] for part in ("train", "val")]
    if not all(map(len, some)):
        return None
    squares = (pictures.squares(task.rows[rows]) for rows in some)
    known, asked = (features_of(encoder, scaling, x, device).numpy() for x in squares)
    labels = [task.labels[rows] for rows in some]
    votes = evaluate.nearest_neighbours(known, labels[0], asked, len(task.classes))
    return float((votes.argmax(axis=1) == labels[1]).mean())


# ---------------------------------------------------------------------------------------------
# Fine-tuning: the encoder and one fully connected layer, end to end
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FineTuning:
    """The settings of a fine-tuning; the defaults are the published values."""

    epochs: int = 30  # for each learning rate
    batch_size: int = 64
    lrs: tuple[float, ...] = (1e-4,)  # after the warm-up; of several, the val part chooses
    weight_decay: float = 1e-4
    seed: int = 0
    mean: float = 0.5
    std: float = 0.5

    def steps(self, n: int) -> int:
        """In an epoch of n pictures; where they are few, they come round more than once."""
        return max(LEAST_STEPS, -(-n // self.batch_size))


def fine_tuning(
    encoder: simclr.ResNet,
    num_classes: int,
    settings: FineTuning,
    n: int,
    device: torch.device,
    bf16: bool,
) -> simclr.Run:
    """A fine-tuning that is about to begin; the head is new.

    Args:
        encoder: on the CPU; trained in place.
        n: training pictures.
    """
    torch.manual_seed(settings.seed)
    networks = {"encoder": encoder, "head": nn.Linear(encoder.feature_dim, num_classes)}
    epochs, batch = settings.epochs * len(settings.lrs), min(settings.batch_size, n)
    run = simclr.Run(networks, settings, epochs, settings.steps(n), batch, device, bf16)
    run.first = copy.deepcopy(run.networks.state_dict())  # with which each learning rate begins
    return run


def finetune(
    run: simclr.Run,
    images: np.ndarray,
    train: tuple[np.ndarray, Tensor],
    val: tuple[np.ndarray, Tensor],
) -> Iterator[dict[str, float] | None]:
    """Train encoder and head to the run's end, from wherever it is; end with the best weights.

    Best means what it means in `train_probe`, over all epochs of all learning rates, each of which
    begins with the same weights. The test part has no way in here.

    Args:
        images: (m, S, S) uint8, an array in memory or on disk.
        train, val: (rows of images (n,) int64, labels (n,) int64).

    Yields:
        After each step None or, after an epoch's last one, its record: epoch, peak_lr, lr,
        train_loss (nats, of augmented pictures), val_loss, val_accuracy (None without val)...
    """
    settings, networks, (rows, labels) = run.settings, run.networks, train
    size, steps = run.batch, settings.epochs * run.steps
    run.since = time.perf_counter()
    while not run.finished:
        epoch = len(run.records) + 1
        trial, before = divmod(epoch - 1, settings.epochs)  # which learning rate, its epochs done
        generator_of = partial(data.generator_for, settings.seed, epoch)
        if run.step == before == 0:
            networks.load_state_dict(run.first)
            run.optimizer = simclr.adamw(networks, settings.weight_decay)
        # Step 0 of an epoch draws its order, step s >= 1 the views of its batch s.
        lots = torch.rand(-(-run.steps * size // len(rows)), len(rows), generator=generator_of(0))
        order = lots.argsort(dim=1).flatten()[: run.steps * size].view(run.steps, size)
        for chosen in order[run.step :].numpy():  # (size,)
            done = before * run.steps + run.step  # with this learning rate
            lr = simclr.cosine_lr(done, steps, settings.lrs[trial], 0.0)
            lr *= min(1.0, (done + 1) / (WARM_UP * steps))
            simclr.set_lr(run.optimizer, lr)
            batch = torch.from_numpy(images[rows[chosen]])[:, None].to(run.device)
            targets = labels[chosen].to(run.device)
            numbers = data.draw_views(size, generator_of(run.step + 1))
            views = data.apply_views(batch, numbers, settings.mean, settings.std)  # (N, 1, S, S)
            logits = simclr.embed(networks, views, run.bf16).float()  # (N, K)
            loss = F.cross_entropy(logits, targets)
            run.optimizer.zero_grad()
            loss.backward()
            run.update(loss, lr)
            right = (logits.argmax(dim=1) == targets).float().mean()
            run.sums += torch.stack([loss.detach(), right, torch.zeros_like(right)])
            run.step += 1
            run.tick()
            yield validate(run, images, val, lr) if run.step == run.steps else None
    if run.best:
        networks.load_state_dict(run.best["networks"])
    networks.eval()


def validate(
    run: simclr.Run, images: np.ndarray, val: tuple[np.ndarray, Tensor], lr: float
) -> dict[str, float]:
    """Record an epoch of `finetune` whose steps are done; keep its weights if it is the best."""
    settings, networks, (rows, labels) = run.settings, run.networks, val
    record = simclr.finish_epoch(run, lr, ("train_loss", "train_accuracy"))
    record["peak_lr"] = settings.lrs[(record["epoch"] - 1) // settings.epochs]
    h = features_of(networks["encoder"], vars(settings), images[rows], run.device)
    h, labels = h.to(run.device), labels.to(run.device)
    record["val_loss"], record["val_accuracy"] = score(networks["head"], h, labels)
    rank = [record["val_accuracy"] or 0.0, -(record["val_loss"] or 0.0)]
    if not run.best or rank > run.best["rank"] or not len(rows):
        weights = copy.deepcopy(networks.state_dict())
        run.best = {"rank": rank, "peak_lr": record["peak_lr"], "networks": weights}
    return record


# ---------------------------------------------------------------------------------------------
# Comparing methods on the same few labels
# ---------------------------------------------------------------------------------------------


def label_subset(task: Task, fraction: float, seed: int) -> Task:
    """A task in which only some of the training groups have kept their labels.

    Of each class the first groups of a random order are taken, at least one. So for one seed the
    groups of a smaller fraction are among those of a larger one.

    Args:
        fraction: of the training groups, in (0, 1].
        seed: of the order.

    Returns:
        the task; the split of what has lost its label is "unlabelled".
    """
    train, split = np.flatnonzero(task.split == "train"), task.split.astype("U10")
    groups, member = np.unique(task.groups[train], return_inverse=True)
    votes = np.zeros((len(groups), len(task.classes)), np.int64)  # (G, K)
    np.add.at(votes, (member, task.labels[train]), 1)
    kept, generator = np.zeros(len(groups), bool), np.random.default_rng(seed)
    for label in range(len(task.classes)):
        # A group of several labels counts with its commonest, unless nobody else has this one.
        mine = np.flatnonzero(votes.argmax(axis=1) == label)
        mine = generator.permutation(mine if len(mine) else np.flatnonzero(votes[:, label]))
        kept[mine[: max(1, round(fraction * len(mine)))]] = True
    split[train[~kept[member]]] = "unlabelled"
    return replace(task, split=split)


@dataclass(frozen=True)
class Comparison:
    """What methods are compared on: the same labelled groups, the same pictures, one encoder."""

    task: Task
    images: np.ndarray  # (n, S, S) uint8, the task's pictures in the order of its rows
    encoder: simclr.ResNet
    checkpoint: dict  # the encoder's
    settings: FineTuning  # from scratch, all of SCRATCH_LRS are tried
    device: torch.device
    bf16: bool  # of fine-tuning's steps

    def fit(self, plan: Sequence[tuple[float, int, str]]) -> Iterator[dict | None]:
        """Fit each method of a plan; the test part is asked once for each fit.

        Args:
            plan: (fraction of the training groups, seed, one of evaluate.METHODS) of each fit.

        Yields:
            None after each step of a fine-tuning, and after each fit: method, fraction, seed;
            groups and pictures with labels; trained parameters; seconds of training (features that
            are computed once count with the share that is used); lr, the chosen one; probs, (N, K)
            as lists, of the test part.
        """
        kept: dict[tuple, tuple[Tensor, float]] = {}
        for fraction, seed, method in plan:
            cut = label_subset(self.task, fraction, seed)
            of = parts_of(cut)
            cell = {"method": method, "fraction": fraction, "seed": seed, "lr": None}
            cell["groups"] = len(np.unique(cut.groups[of["train"]]))
            cell["pictures"] = len(of["train"])
            if method in ("finetune", "scratch"):
                yield cell | (yield from self.fit_network(cut, seed, method == "scratch"))
            else:
                yield cell | self.fit_features(cut, seed, method, kept)

    def count_steps(self, plan: Sequence[tuple[float, int, str]]) -> int:
        """How many steps of fine-tuning `fit` takes for a plan."""
        trials, total = {"finetune": len(self.settings.lrs), "scratch": len(SCRATCH_LRS)}, 0
        for fraction, seed, method in plan:
            n = len(parts_of(label_subset(self.task, fraction, seed))["train"])
            total += trials.get(method, 0) * self.settings.epochs * self.settings.steps(n)
        return total

    def fit_network(self, cut: Task, seed: int, scratch: bool) -> Iterator[None]:
        """Fine-tune a copy of the encoder, or random weights; returns what `fit` says of it."""
        of, labels, began = parts_of(cut), torch.from_numpy(cut.labels), time.perf_counter()
        train, val = ((of[part], labels[of[part]]) for part in ("train", "val"))
        arch = self.checkpoint["arch"]
        encoder = untrained(arch, seed) if scratch else copy.deepcopy(self.encoder)
        lrs = SCRATCH_LRS if scratch else self.settings.lrs
        settings = replace(self.settings, seed=seed, lrs=lrs)
        how = settings, len(train[0]), self.device, self.bf16
        run = fine_tuning(encoder, len(cut.classes), *how)
        yield from (None for _ in finetune(run, self.images, train, val))
        cell = {"seconds": time.perf_counter() - began, "lr": run.best["peak_lr"]}
        cell["parameters"] = sum(p.numel() for p in run.networks.parameters())
        h = features_of(encoder, self.checkpoint, self.images[of["test"]], self.device)
        return cell | {"probs": probabilities(run.networks["head"].cpu(), h).tolist()}

    def fit_features(self, cut: Task, seed: int, method: str, kept: dict) -> dict:
        """Fit a probe or ask for neighbours; what `fit` says of it.

        Args:
            kept: features computed before, and seconds a picture; added to.
        """
        of, began, key = parts_of(cut), time.perf_counter(), seed if method == "untrained" else None
        if key not in kept:
            random = method == "untrained"
            encoder = untrained(self.checkpoint["arch"], seed) if random else self.encoder
            h = features_of(encoder, self.checkpoint, self.images, self.device)
            kept[key] = h, (time.perf_counter() - began) / len(h)
        h, each = kept[key]
        began = time.perf_counter() - each * (len(of["train"]) + len(of["val"]))
        if method == "knn":
            known = h[of["train"]].numpy(), cut.labels[of["train"]]
            asked = h[of["test"]].numpy(), len(cut.classes)
            probs, parameters = evaluate.nearest_neighbours(*known, *asked), 0
        else:
            head, _, found = fit_probe(h, cut, Probing(seed=seed), "cosine_mlp", iter)
            probs, parameters = found["test"], sum(p.numel() for p in head.parameters())
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "parameters": parameters, "probs": probs.tolist()}


# ---------------------------------------------------------------------------------------------
# What may be trained on, and what may be tested
# ---------------------------------------------------------------------------------------------


def left_out(study: Study) -> np.ndarray:
    """Why pretraining leaves a picture out: (n,) str, '' for those that it may see.

    Every picture stays out whose group is in a val or test part of any task, and those that a task
    dropped. This is what keeps an encoder from having seen, without its label, the very picture (or
    patient) it is later tested on.
    """
    held = [task.groups[np.isin(task.split, ("val", "test"))] for task in study.tasks.values()]
    why = np.full(len(study.groups), "", object)
    why[np.isin(study.groups, np.concatenate([*held, []]))] = "of a group that is held out"
    for task in study.tasks.values():
        why[task.rows] = np.where(task.split == "train", why[task.rows], task.split)
    why[why == "dropped"] = "dropped (in a group with those, or twins of two labels)"
    why[list(study.pictures.unreadable)] = "unreadable"
    return why


def pretraining_rows(study: Study) -> np.ndarray:
    """(m,) int64: the pictures that pretraining may see (`left_out`)."""
    return np.flatnonzero(left_out(study) == "")


def usage(study: Study) -> list[str]:
    """A line for each source: how many of its pictures pretraining uses, and why not the others."""
    why, homes, lines = left_out(study), np.array(study.homes), []
    for home in dict.fromkeys(study.homes):
        task = "/".join(source.task for source in study.sources if source.folder == home)
        counts = Counter(why[homes == home])
        used, n = counts.pop("", 0), (homes == home).sum()
        others = ", ".join(f"{counts[name]:,} {name}" for name in sorted(counts, reverse=True))
        text = (
            f"  source {home or '.'} ({task or 'no labels'}): {used:,} of {n:,} pictures are used"
        )
        lines.append(f"{text}; left out: {others}" if others else text)
    return lines


def was_seen(study: Study, seen: np.ndarray) -> np.ndarray:
    """Which pictures somebody has trained on, or on others of their group, found by pixels.

    Args:
        seen: (m, 16) uint8 hashes, as encoder.pt and classifier.pt remember them.

    Returns:
        (n,) bool over all pictures of the folder, True = seen.
    """
    known = np.isin(study.pictures.names(), seen.view("S16")[:, 0])
    return np.isin(study.groups, study.groups[known])


def refuse_leak(study: Study, task: Task, seen: np.ndarray, allowed: bool) -> list[str]:
    """The test pictures whose group the encoder was pretrained on.

    Args:
        seen: (n, 16) uint8, what the encoder's checkpoint remembers.
        allowed: --allow-leak was given.

    Returns:
        Their paths; none for an honest result.

    Raises:
        UserError: there are some, and they are not allowed.
    """
    rows, _, _ = task.part("test")
    leaked = [study.pictures.paths[row] for row in rows[was_seen(study, seen)[rows]]]
    if leaked and not allowed:
        raise data.UserError(
            f"the encoder was pretrained on {len(leaked)} of the {len(rows)} test pictures of "
            f"{task.name} or on others of their groups, the first is {leaked[0]!r}; pretrain with "
            "the same --data, --group-pattern and --resplit (--allow-leak goes on all the same)"
        )
    return leaked


def check_split(task: Task) -> None:
    """See that every class has pictures to train on and others to test with.

    Raises:
        UserError: one has not.
    """
    for label, class_ in enumerate(task.classes):
        for part in ("train", "test"):
            if not (task.labels[task.split == part] == label).any():
                n = len(np.unique(task.groups[task.labels == label]))
                mend = "add other patients' pictures, or take the class out"
                if (task.parts != "").any() and n > 1:
                    mend = "the publisher's parts share them all; --resplit deals them out anew"
                text = f"class {class_!r} of task {task.name} has {n} group(s), and none for the"
                text += f" {part} part; a patient's pictures are never split"
                raise data.UserError(f"{text}, that would test on what was trained on: {mend}")


def test_part(study: Study, task: Task) -> evaluate.TestPart:
    """The test part of a task, as evaluate.py takes it."""
    rows, labels, groups = task.part("test")
    paths = [study.pictures.paths[row] for row in rows]
    return evaluate.TestPart(task.name, task.classes, paths, labels, groups)


def unseen_part(
    study: Study, task: Task, seen: np.ndarray, allowed: bool
) -> tuple[Task, list[str]]:
    """A task as one test part, for a classifier that may have been trained on some of it.

    Args:
        seen: (m, 16) uint8, what the classifier's checkpoint remembers. These pictures are dropped
            with their groups; so is what the task drops anyway: twins with another label, and
            those of a publisher's test picture, which would count twice.
        allowed: --allow-leak was given: what it has seen is tested all the same.

    Returns:
        (the task with its new split; the paths of what was seen and is tested all the same)

    Raises:
        UserError: nothing is left.
    """
    before = task.split == "dropped"
    known = was_seen(study, seen)[task.rows] & ~before
    dropped = before | (known & (not allowed))  # (n,) bool
    paths = [study.pictures.paths[row] for row in task.rows]
    if dropped.all():
        raise data.UserError(
            f"no picture of {task.name} is left to test: the classifier was trained on "
            f"{known.sum()} of {len(paths)} or on others of their groups, {before.sum()} more are "
            f"dropped, the first is {(paths or [None])[0]!r}; give pictures from elsewhere "
            "(--allow-leak goes on all the same)"
        )
    notes = {
        "rule": "everything the classifier has not seen",
        "dropped_for_a_group_it_has_seen": 0 if allowed else int(known.sum()),
        "dropped_by_the_split": int(before.sum()),
        "dropped_paths": [path for path, out in zip(paths, dropped, strict=True) if out],
    }
    leaked = [path for path, out in zip(paths, known & allowed, strict=True) if out]
    return replace(task, split=np.where(dropped, "dropped", "test"), notes=notes), leaked


# ---------------------------------------------------------------------------------------------
# What a task holds, as tables and in words
# ---------------------------------------------------------------------------------------------


def fingerprint(study: Study) -> str:
    """A digest of every path and every pixel: two runs with equal ones saw the same data."""
    digest = hashlib.sha256("\n".join(study.pictures.paths).encode("utf8", "surrogateescape"))
    digest.update(np.ascontiguousarray(study.pictures.hashes))
    return digest.hexdigest()


def split_table(study: Study, task: Task) -> list[tuple]:
    """splits.csv, header first: path, label, group, split, pixel_hash (hexadecimal)."""
    paths, hashes = study.pictures.paths, study.pictures.hashes
    lines = zip(task.rows, task.labels, task.groups, task.split, strict=True)
    rows = [(paths[r], task.classes[k], g, p, hashes[r].tobytes().hex()) for r, k, g, p in lines]
    return [("path", "label", "group", "split", "pixel_hash"), *rows]


def survey(study: Study, task: Task, meter: dict) -> str:
    """A task as a table, and in the sentences a person needs: what leaks, and what that is worth.

    Args:
        meter: as `evaluate.leak_meter` returns it.
    """
    N, pixels = len(task.rows), study.pictures.names()[task.rows]
    copy = np.ones(N, bool)  # (N,) bool, True = seen before
    copy[np.unique(pixels, return_index=True)[1]] = False
    place = np.full(len(study.pictures.paths), -1)  # in this task; -1 = of another one
    place[task.rows] = np.arange(N)
    twins = np.column_stack([place[study.twins[:, :2]], study.twins[:, 2]])
    twins = twins[twins.min(axis=1) >= 0]
    has_twin = np.isin(np.arange(N), twins[:, :2])
    header = ("class", "pictures", "groups", "duplicates", "have twins", *evaluate.PARTS)
    lines = [f"task {task.name}, split: {task.notes['rule']}"]
    lines.append("".join(f"{name:>12}" for name in header))
    for k, name in (*enumerate(task.classes), (None, "all")):
        of = np.ones(N, bool) if k is None else task.labels == k
        counts = [of.sum(), len(np.unique(task.groups[of])), copy[of].sum(), has_twin[of].sum()]
        counts += [(task.split[of] == name).sum() for name in evaluate.PARTS]
        name = name if len(name) <= 12 else name[:11] + "…"
        lines.append(f"{name:>12}" + "".join(f"{count:12,}" for count in counts))
    lines += evaluate.publishers_leak(task.parts, task.split, task.groups, pixels, twins)
    means = {name: f"{np.mean(v):.3f}" if v else "n/a" for name, v in meter.items()}
    lines += [
        f"Split by picture, {meter['recognised'][0]:.1%} of the tested pictures would have one of "
        "their own group in training.",
        "Leak meter, the nearest neighbour on 32x32 pixels, mean of "
        f"{evaluate.LEAK_SPLITS} splits: {means['by picture']} by picture, {means['by group']} by "
        f"group; always answering the commonest class: {means['commonest']}.",
    ]
    known = np.isin(task.rows, study.patients[:, 1]).sum()
    hint = "." if known else "; --group-pattern says how names tell him."
    lines.append(f"The patient is known of {known:,} of {N:,} pictures{hint}")
    clash = task.notes["dropped_for_a_twin_with_another_label"]
    lines += [f"{clash:,} pictures are left out: a twin has another label."] if clash else []
    try:
        check_split(task)
    except data.UserError as error:
        lines.append(f"It cannot be probed: {error}")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------
# Classifiers, from one place to another
# ---------------------------------------------------------------------------------------------


def save_classifier(
    path: Path,
    checkpoint: dict,
    head: nn.Module,
    head_type: str,
    study: Study,
    task: Task,
    **values: Any,
) -> None:
    """Write classifier.pt: the encoder, the head, and what both were trained on.

    Args:
        checkpoint: `simclr.encoder_checkpoint` of the encoder that the head belongs to.
        head_type: one of HEADS.
        values: what else it shall say: the config of its run, its temperature.
    """
    used = task.rows[np.isin(task.split, ("train", "val"))]
    seen = torch.cat([checkpoint["seen"], torch.from_numpy(study.pictures.hashes[used])])
    described = {"task": task.name, "classes": list(task.classes), **values}
    weights = {name: value.cpu() for name, value in head.state_dict().items()}
    trained = {"head": weights, "head_type": head_type, "seen": seen.unique(dim=0)}
    simclr.save(checkpoint | described | trained, path)


def load_classifier(path: Path) -> tuple[simclr.ResNet, nn.Module, dict]:
    """Read classifier.pt: an encoder, the head that was trained on it, and the whole checkpoint.

    Raises:
        UserError: the file is missing, or is no classifier.
    """
    if not path.is_file():
        raise data.UserError(f"no classifier at {path}; make one with: python main.py probe")
    encoder, checkpoint = simclr.load_encoder(path)
    if checkpoint.get("head_type") not in [*HEADS]:
        text = f"{path} holds no classifier (head_type {checkpoint.get('head_type')!r})"
        raise data.UserError(f"{text}; python main.py probe writes a classifier.pt")
    try:
        task, classes = checkpoint["task"], checkpoint["classes"]
        named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
        if not named or len(set(classes)) < max(2, len(classes)):
            raise ValueError("its classes are no list of two or more names")
        if Path(task).name != task or not (task.isprintable() and 0 < len(task) <= 100):
            raise ValueError(f"its task {task!r:.40} is no folder's name")
        head = HEADS[checkpoint["head_type"]](checkpoint["feature_dim"], len(classes))
        head.load_state_dict(checkpoint["head"])
        simclr.check_answer(Classifier(encoder, head))
    except Exception as error:  # a file that is not ours may lack or break anything
        text = f"{path} cannot be used as a classifier.pt ({simclr.reason(error)})"
        raise data.UserError(text) from error
    return encoder, head.eval(), checkpoint


class Classifier(nn.Module):
    """Encoder and head as one network, pictures (N, 1, S, S) -> logits (N, K)."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor) -> Tensor:
        """(N, 1, S, S) float32, normalised -> (N, K)."""
        return self.head(self.encoder(images))


def untrained_classifier(checkpoint: dict) -> Classifier:
    """A network like a classifier's, with random weights, always the same ones."""
    encoder = untrained(checkpoint["arch"], 0)
    head = HEADS[checkpoint["head_type"]](encoder.feature_dim, len(checkpoint["classes"]))
    return Classifier(encoder, head)


def classify(
    encoder: simclr.ResNet,
    head: nn.Module,
    checkpoint: dict,
    images: np.ndarray,
    classes: Sequence[str],
    device: torch.device,
) -> np.ndarray:
    """Class probabilities of pictures, from a classifier as `load_classifier` returns it.

    Args:
        images: (n, S, S) uint8, S = checkpoint["image_size"].
        classes: the columns' order; the classifier's own in any order.

    Returns:
        (n, K) float64, rows sum to 1.

    Raises:
        UserError: the classifier has other classes.
    """
    columns = columns_of(classes, checkpoint)
    h = features_of(encoder, checkpoint, images, device)
    return probabilities(head, h).numpy()[:, columns]


def columns_of(classes: Sequence[str], checkpoint: dict) -> list[int]:
    """Where a classifier has each of the classes that the data has.

    Raises:
        UserError: the classifier has other classes.
    """
    if set(classes) != set(checkpoint["classes"]):
        text = f"the data has the classes {', '.join(classes)}, and the classifier tells apart "
        text += ", ".join(checkpoint["classes"])
        raise data.UserError(f"{text}; rename the folders of what is the same")
    return [checkpoint["classes"].index(name) for name in classes]
