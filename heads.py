"""Train a classifier on what the encoder has learned: a probe, or the whole network, fine-tuned.

A probe asks how much of a diagnosis can be read off the representation h while the encoder may not
change. So the encoder sees each image once, in eval mode, and only a small head is trained on those
features: seconds, not hours, and few labels are enough. The head is a cosine classifier. It
compares directions, so a class cannot win by having longer weights, which helps where classes are
unequal in size. Fine-tuning trains everything, and pays where labels are many. Either is worth only
what it adds to the same head on features that were never trained, so those are fitted here too.

    m = two times: Linear -> BatchNorm -> ReLU -> Dropout        (N, E) -> (N, 128)
    logits_k = s cos(m, w_k),  s learnable, from 10     (Gidaris and Komodakis, 1804.09458, §3.2)
    best epoch = highest accuracy on val, then lowest loss on val, then earliest

Shape letters: N images in a batch · S their side · E encoder features · K classes. Here also
n images in a folder, m of one task, k of one split.

Departures:
  - 1804.09458 leaves out the ReLU before the cosine, so that features may be negative; this head,
    that of faroukb11/Brain_MRI_Classification, keeps it; not measured;
  - fine-tuning takes AdamW with a warm-up, not SGD without (2002.05709, B.5), and keeps its best
    epoch on val, not its last; not measured;
  - from random weights three learning rates are tried: the one that suits a pretrained network
    would make this baseline look worse than it is.

What the defaults reproduce, with hardware, minutes and intervals, stands in docs/results.md.

Next: gradcam.py
"""

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torch import device as Device

import data
import evaluate
import simclr

ENCODED = 64  # images that are encoded at once; makes no difference to any digit
KNN_MOST = 1000  # images of train, and of val, that are looked at during pretraining
LEAST_STEPS = 10  # in an epoch of fine-tuning: on few images one pass is a step or two; matters
SCRATCH_LRS = (1e-4, 3e-4, 1e-3)  # peaks tried from random weights; val chooses; ours

# ---------------------------------------------------------------------------------------------
# The head
# ---------------------------------------------------------------------------------------------


class CosineMLP(nn.Module):
    """The probe's head: a two-layer MLP, then the cosine to one learned direction for each class.

    With E = 512, 3 classes and the default widths it has 329,985 parameters.

    Args:
        in_features: E.
        num_classes: K.
        hidden_dims: widths of the hidden layers.
        dropout: chance that a hidden unit is silenced in training; raise it when labels are few.
    """

    def __init__(self, in_features: int, num_classes: int, hidden_dims=(512, 128), dropout=0.3):
        super().__init__()
        layers = []
        width = in_features
        for next_width in hidden_dims:
            linear = nn.Linear(width, next_width)
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.BatchNorm1d(next_width), nn.ReLU(), nn.Dropout(dropout)]
            width = next_width
        self.mlp = nn.Sequential(*layers)
        self.class_weights = nn.Parameter(torch.empty(num_classes, width))  # (K, 128)
        nn.init.kaiming_normal_(self.class_weights)
        self.scale = nn.Parameter(torch.tensor(10.0))  # s: cosines alone make too flat a softmax

    def forward(self, h: Tensor) -> Tensor:
        """Features (N, E) float -> logits (N, K) in [-s, s]."""
        m = F.normalize(self.mlp(h), dim=1)  # (N, 128), unit rows
        w = F.normalize(self.class_weights, dim=1)  # (K, 128), unit rows
        return self.scale * (m @ w.T)  # (N, K)


def linear_probe(in_features: int, num_classes: int) -> nn.Sequential:
    """The usual linear probe, on standardised features (He et al., 2111.06377, A.1).

    Without that, one learning rate cannot serve features of every size: on the tumor set those of
    an untrained encoder scored .40 instead of .70 (docs/results.md).
    """
    norm = nn.BatchNorm1d(in_features, affine=False)
    return nn.Sequential(norm, nn.Linear(in_features, num_classes))


# By head_type: (E, K) -> a head. "fc" is what fine-tuning trains.
HEADS = {"cosine_mlp": CosineMLP, "linear": linear_probe, "fc": nn.Linear}


class Classifier(nn.Module):
    """Encoder and head as one network."""

    def __init__(self, encoder: simclr.ResNet, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor) -> Tensor:
        """(N, 1, S, S) float, normalised -> logits (N, K)."""
        return self.head(self.encoder(images))


def untrained(arch: str, seed: int) -> simclr.ResNet:
    """An encoder with random weights, which `seed` alone decides."""
    with torch.random.fork_rng(devices=[]):  # layers draw from torch's own generator: give it back
        torch.manual_seed(seed)
        return simclr.ARCHITECTURES[arch]()


def new_head(head_type: str, in_features: int, num_classes: int, seed: int) -> nn.Module:
    """A head with random weights, which `seed` alone decides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HEADS[head_type](in_features, num_classes)


# ---------------------------------------------------------------------------------------------
# Features, what a head makes of them, and an epoch of training
# ---------------------------------------------------------------------------------------------


def normalised(images: np.ndarray, scaling: dict, device: Device) -> Tensor:
    """Images (N, S, S) uint8 as an encoder takes them: (N, 1, S, S) float32, not augmented."""
    x = torch.from_numpy(np.array(images))[:, None].to(device) / 255  # in [0, 1]
    return (x - scaling["mean"]) / scaling["std"]


@torch.no_grad()
def features_of(
    encoder: simclr.ResNet, images: np.ndarray, rows: np.ndarray, scaling: dict, device: Device
) -> Tensor:
    """The representations of images as they are: without augmentation, in float32.

    A copy of the encoder runs in eval mode, so that batch norm uses (and keeps) its running
    statistics. The encoder itself stays as it is: its mode, its memory format, its device. An
    image's features do not depend on those beside it, not even in the last digit.

    Args:
        images: (n, S, S) uint8, perhaps memory-mapped; read a batch at a time.
        rows: (k,) int64, the images to take.
        scaling: "mean" and "std" that the encoder expects, in units of [0, 1]; a checkpoint is one.

    Returns:
        h: (k, E) float32 on the CPU.
    """
    layout = simclr.memory_format(device, bf16=False)
    encoder = copy.deepcopy(encoder).to(device, memory_format=layout).eval()
    features = torch.zeros(len(rows), encoder.feature_dim)
    for start in range(0, len(rows), ENCODED):
        batch = images[rows[start : start + ENCODED]]  # (N, S, S)
        # Black images fill the last batch up: of another size, it may be computed in another order.
        full = np.pad(batch, ((0, ENCODED - len(batch)), (0, 0), (0, 0)))
        h = encoder(normalised(full, scaling, device))  # (ENCODED, E)
        features[start : start + ENCODED] = h[: len(batch)].cpu()
    return features


@torch.no_grad()
def probabilities(head: nn.Module, features: Tensor) -> np.ndarray:
    """Class probabilities, the softmax of the logits; not calibrated.

    A float64 copy of the head computes them, in eval mode: in float32 the last digits would depend
    on how many images are asked about at once.

    Args:
        features: (k, E) float32 on the CPU.

    Returns:
        (k, K) float64, rows sum to 1.
    """
    exact = copy.deepcopy(head).cpu().double().eval()
    return exact(features.double()).softmax(dim=1).numpy()


def predict_probs(
    classifier: Classifier, images: np.ndarray, rows: np.ndarray, scaling: dict, device: Device
) -> np.ndarray:
    """Class probabilities of images, the arguments being those of `features_of`; not calibrated.

    Every predictions.csv holds `evaluate.with_temperature` of them, at the checkpoint's
    temperature. A probe's, which come from features, are the same to the last digit.

    Returns:
        (k, K) float64, rows sum to 1.
    """
    features = features_of(classifier.encoder, images, rows, scaling, device)
    return probabilities(classifier.head, features)


def validate(probs: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """How good probabilities (k, K) of the val images are.

    Returns:
        val_loss, in nats, lower is better, log K for a uniform guess; val_accuracy, in [0, 1],
        higher is better. Both None without images.
    """
    if len(labels) == 0:
        return {"val_loss": None, "val_accuracy": None}
    accuracy = float((probs.argmax(axis=1) == labels).mean())
    return {"val_loss": evaluate.negative_log_likelihood(labels, probs), "val_accuracy": accuracy}


def merit(record: dict) -> tuple[float, float]:
    """What the best epoch has most of.

    >>> merit({"epoch": 3, "val_loss": 0.5, "val_accuracy": 0.9})
    (0.9, -0.5)
    >>> merit({"epoch": 3, "val_loss": None, "val_accuracy": None})  # no val: the last epoch wins
    (3, 0.0)
    """
    if record["val_accuracy"] is None:
        return record["epoch"], 0.0
    return record["val_accuracy"], -record["val_loss"]


def train_epoch(network: nn.Module, optimizer: optim.Optimizer, batches, bf16=False) -> float:
    """Take one step for each batch; a probe and a fine-tuning differ in their batches alone.

    Args:
        batches: an iterable of (learning rate, the network's inputs, labels (N,) int64).
        bf16: in the network; the loss is float32 always.

    Returns:
        The mean loss of the batches, in nats.

    Raises:
        UserError: a loss is not finite; the weights are those before the step.
    """
    network.train()
    losses = []
    for lr, inputs, labels in batches:
        simclr.set_lr(optimizer, lr)
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
            logits = network(inputs)  # (N, K)
        loss = F.cross_entropy(logits.float(), labels)
        if not loss.isfinite():
            raise data.UserError(f"the loss is {loss:.3g} at rate {lr:.2g}; try a smaller --lr")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


# ---------------------------------------------------------------------------------------------
# A probe: a head on frozen features, and the same on features that were never trained
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """What classifiers are trained on, and where."""

    images: data.Images
    task: data.Task
    encoder: simclr.ResNet
    checkpoint: dict  # of the encoder: its arch, mean and std
    device: Device
    bf16: bool  # in the training steps of fine-tuning; all else is float32


def task_features(setup: Setup, encoder: simclr.ResNet) -> Tensor:
    """(m, E) float32: features in the order of `task.rows`; nan where an image has no part."""
    used = np.flatnonzero(np.isin(setup.task.split, ("train", "val", "test")))  # (k,)
    rows = setup.task.rows[used]
    h = features_of(encoder, setup.images.squares, rows, setup.checkpoint, setup.device)
    features = torch.full((len(setup.task.rows), encoder.feature_dim), torch.nan)
    features[used] = h
    return features


def part_probs(setup: Setup, classifier: Classifier, part: str) -> np.ndarray:
    """(k, K) float64: `predict_probs` of the task's train, val or test images."""
    rows = setup.task.rows[setup.task.part(part)]
    return predict_probs(classifier, setup.images.squares, rows, setup.checkpoint, setup.device)


@dataclass(frozen=True)
class Probing:
    """The settings of a probe; the values are faroukb11's, and none was varied here."""

    epochs: int = 150  # at least 1
    batch_size: int = 256
    lr: float = 5e-4
    weight_decay: float = 1e-3
    seed: int = 0


def milestone_lr(epoch: int, epochs: int, lr: float) -> float:
    """The rate in epoch 1, ..., epochs: a tenth after 60 % of them, a hundredth after 80 %.

    >>> [milestone_lr(epoch, 10, 1.0) for epoch in (1, 6, 7, 8, 9, 10)]
    [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    """
    done = (epoch - 1) / epochs
    milestones = (done >= 0.6) + (done >= 0.8)  # 0, 1 or 2 lie behind
    return lr / 10**milestones


def fit_probe(
    features: Tensor, task: data.Task, settings: Probing, head_type: str, progress=iter
) -> tuple[nn.Module, list[dict], dict[str, np.ndarray]]:
    """Train a new head on the features of a task's train images, on the CPU.

    It ends with the weights of its best epoch on val; without val the last epoch counts. What
    belongs to test is looked at once training is over.

    Args:
        features: (m, E) float32 in the order of `task.rows`; at least 2 of them are of train.
        head_type: one of HEADS.
        progress: wraps the range of epochs and shows how far it is, as tqdm does.

    Returns:
        the head, in eval mode; a record of each epoch (epoch, train_loss in nats with dropout,
        val_loss, val_accuracy); {"val": (k, K), "test": (k, K)}, as `probabilities`.

    Raises:
        UserError: the loss is not finite.
    """
    train, val = task.part("train"), task.part("val")
    head = new_head(head_type, features.shape[1], len(task.classes), settings.seed)
    optimizer = simclr.adamw(head, settings.weight_decay)
    labels = torch.from_numpy(task.labels)  # (m,)
    steps = math.ceil(len(train) / settings.batch_size)
    records, best = [], None
    with torch.random.fork_rng(devices=[]):  # order and dropout draw from torch's own generator
        torch.manual_seed(simclr.seed_from(settings.seed, 1))  # other numbers than the weights'
        for epoch in progress(range(1, settings.epochs + 1)):
            lr = milestone_lr(epoch, settings.epochs, settings.lr)
            # Even batches, no small last one: batch norm would see next to nothing in it.
            rows = torch.from_numpy(train)[torch.randperm(len(train))].tensor_split(steps)
            batches = ((lr, features[batch], labels[batch]) for batch in rows)
            record = {"epoch": epoch, "train_loss": train_epoch(head, optimizer, batches)}
            record |= validate(probabilities(head, features[val]), task.labels[val])
            if best is None or merit(record) > merit(best["record"]):
                best = {"record": record, "weights": copy.deepcopy(head.state_dict())}
            records.append(record)
    head.eval().load_state_dict(best["weights"])
    probs = {part: probabilities(head, features[task.part(part)]) for part in ("val", "test")}
    return head, records, probs


def baselines(setup: Setup, settings: Probing, head_type: str, progress=iter) -> dict[str, dict]:
    """What the same head makes of two representations that were never trained.

    Returns:
        name -> the probabilities of val and of test, as `fit_probe` returns them.
    """
    encoder = untrained(setup.checkpoint["arch"], settings.seed)
    pixels = torch.from_numpy(setup.images.thumbnails[setup.task.rows])  # (m, 32, 32) uint8
    features = {"untrained encoder": task_features(setup, encoder)}  # (m, E)
    features["raw 32x32 pixels"] = pixels.flatten(1) / 127.5 - 1  # (m, 1024)
    probs = {}
    for name, h in features.items():
        probs[f"{name}, {head_type}"] = fit_probe(h, setup.task, settings, head_type, progress)[2]
    return probs


def knn_accuracy(
    encoder: simclr.ResNet, images: data.Images, task: data.Task, scaling: dict, device: Device
) -> float | None:
    """How many val images have nearest training images of their class: pretraining's log shows it.

    Returns:
        A share of at most KNN_MOST images, in [0, 1], higher is better; None without train or val.
    """
    generator = np.random.default_rng(0)
    train = generator.permutation(task.part("train"))[:KNN_MOST]
    val = generator.permutation(task.part("val"))[:KNN_MOST]
    if len(train) == 0 or len(val) == 0:
        return None
    rows = task.rows[np.append(train, val)]
    h = features_of(encoder, images.squares, rows, scaling, device).numpy()
    h_train, h_val = np.split(h, [len(train)])
    votes = evaluate.nearest_neighbours(h_train, task.labels[train], h_val, len(task.classes))
    return float((votes.argmax(axis=1) == task.labels[val]).mean())


# ---------------------------------------------------------------------------------------------
# Fine-tuning: the encoder and one fully connected layer, end to end
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FineTuning:
    """The settings of a fine-tuning; ours. Of them only the learning rate was varied."""

    epochs: int = 30  # for each learning rate; at least 1
    batch_size: int = 64
    lrs: tuple[float, ...] = (1e-4,)  # peaks; of several val chooses; matters
    weight_decay: float = 1e-4
    seed: int = 0


def augmented_batches(setup: Setup, settings: FineTuning, number: int, progress) -> Iterator[tuple]:
    """The training images of an epoch, in random order, for `train_epoch`.

    Every batch is full: where images are few, they come round more than once. Step 0 of an epoch
    draws its order, step s >= 1 the views of its batch s.

    Args:
        number: of the epoch, from 0, through all learning rates.

    Yields:
        learning rate; views (N, 1, S, S) float32; labels (N,).
    """
    task, train = setup.task, setup.task.part("train")
    size = min(settings.batch_size, len(train))
    steps = max(LEAST_STEPS, math.ceil(len(train) / size))
    passes = math.ceil(steps * size / len(train))
    peak = settings.lrs[number // settings.epochs]
    epoch = number % settings.epochs  # with this learning rate
    generator = simclr.generator_for(settings.seed, number, 0)
    order = torch.rand(passes, len(train), generator=generator).argsort(dim=1).flatten().numpy()
    for step in progress(range(steps)):
        lr = simclr.warmup_cosine(epoch * steps + step, settings.epochs * steps, peak, 0.0)
        batch = train[order[step * size : (step + 1) * size]]  # (N,)
        images = torch.as_tensor(setup.images.squares[task.rows[batch]])[:, None].to(setup.device)
        generator = simclr.generator_for(settings.seed, number, step + 1)
        mean, std = setup.checkpoint["mean"], setup.checkpoint["std"]
        views = simclr.one_view(images, generator, simclr.ALL, mean, std)
        yield lr, views, torch.from_numpy(task.labels[batch]).to(setup.device)


def finetune(
    setup: Setup, classifier: Classifier, settings: FineTuning, resume: dict = None, progress=iter
) -> Iterator[tuple[dict, dict]]:
    """Train encoder and head, in place; they end with the weights of their best epoch on val.

    With several learning rates, each begins with the same weights, and the best epoch is that of
    all. Test images are never read.

    Args:
        classifier: as it begins, also where it then goes on.
        resume: the state to go on from.
        progress: wraps the range of an epoch's steps.

    Yields:
        After each epoch its record (epoch, counted through all rates; train_loss, val_loss,
        val_accuracy, peak_lr) and the state, all that going on needs; it refers to the classifier
        and copies only its best epoch.

    Raises:
        UserError: the loss is not finite; the weights are those before the step.
    """
    labels = setup.task.labels[setup.task.part("val")]
    first = copy.deepcopy(classifier.state_dict())
    optimizer = simclr.prepare(classifier, settings, setup.device, setup.bf16, resume)
    state = resume or {"epoch": 0, "best": None}
    best = state["best"]
    for number in range(state["epoch"], len(settings.lrs) * settings.epochs):
        if number % settings.epochs == 0:  # here begins the next learning rate
            classifier.load_state_dict(first)
            optimizer = simclr.adamw(classifier, settings.weight_decay)
        record = {"epoch": number + 1, "peak_lr": settings.lrs[number // settings.epochs]}
        batches = augmented_batches(setup, settings, number, progress)
        record["train_loss"] = train_epoch(classifier, optimizer, batches, setup.bf16)
        record |= validate(part_probs(setup, classifier, "val"), labels)
        if best is None or merit(record) > merit(best["record"]):
            best = {"record": record, "weights": copy.deepcopy(classifier.state_dict())}
        state = {"weights": classifier.state_dict(), "optimizer": optimizer.state_dict()}
        yield record, state | {"epoch": number + 1, "best": best}
    classifier.eval().load_state_dict(best["weights"])


# ---------------------------------------------------------------------------------------------
# Comparing methods on the same few labels
# ---------------------------------------------------------------------------------------------


def label_subset(task: data.Task, fraction: float, seed: int) -> data.Task:
    """A task in which only some of the training groups have kept their labels.

    All groups are put in one random order, and of those with images of a class the first ones are
    taken, at least one. So for one seed the groups of a smaller fraction are among those of a
    larger one. Val and test stay whole.

    Args:
        fraction: of each class's training groups, in (0, 1].
        seed: of the order.

    Returns:
        The task; the split of what has lost its label is "unlabelled".
    """
    train = task.part("train")
    groups, labels = task.groups[train], task.labels[train]  # (k,) each
    order = np.random.default_rng(seed).permutation(np.unique(groups))
    labelled = []
    for label in range(len(task.classes)):
        of_class = order[np.isin(order, groups[labels == label])]
        labelled.extend(of_class[: max(1, round(fraction * len(of_class)))])
    split = task.split.astype("U10")
    split[train[~np.isin(groups, labelled)]] = "unlabelled"
    return replace(task, split=split)


def fit(
    setup: Setup, method: str, fraction: float, seed: int, settings: FineTuning, progress=iter
) -> dict:
    """Fit one method to one draw of labels: a line of fits.jsonl.

    Args:
        method: one of evaluate.METHODS. "probe", "linear" and "knn" leave the pretrained encoder
            as it is and read its features with a cosine MLP, a linear layer, the nearest
            neighbours; "untrained" is a probe of random weights, "scratch" fine-tunes such.
        fraction: of the training groups that keep their labels.
        seed: of the draw, and of all that a method draws.
        settings: of fine-tuning; from scratch SCRATCH_LRS are tried.

    Returns:
        method, fraction, seed; groups and images with labels; parameters that were trained;
        seconds, from images to answers; lr, the chosen peak (None where none is chosen);
        probs, of test, (k, K) as lists.
    """
    began = time.perf_counter()
    task = label_subset(setup.task, fraction, seed)
    setup = replace(setup, task=task)
    train, test = task.part("train"), task.part("test")
    K = len(task.classes)
    encoder, lr = setup.encoder, None
    if method in ("scratch", "untrained"):
        encoder = untrained(setup.checkpoint["arch"], seed)
    if method in ("finetune", "scratch"):
        lrs = SCRATCH_LRS if method == "scratch" else settings.lrs
        settings = replace(settings, lrs=lrs, seed=seed)
        head = new_head("fc", encoder.feature_dim, K, seed)
        trained = Classifier(copy.deepcopy(encoder), head)
        epochs = finetune(setup, trained, settings, progress=progress)
        lr = max([record for record, _ in epochs], key=merit)["peak_lr"]
        probs = part_probs(setup, trained, "test")
    elif method == "knn":
        h = task_features(setup, encoder).numpy()
        trained = nn.Identity()  # nothing is
        probs = evaluate.nearest_neighbours(h[train], task.labels[train], h[test], K)
    else:
        h = task_features(setup, encoder)
        head_type = "linear" if method == "linear" else "cosine_mlp"
        trained, _, answers = fit_probe(h, task, Probing(seed=seed), head_type, progress)
        probs = answers["test"]
    line = {"method": method, "fraction": fraction, "seed": seed, "lr": lr}
    line |= {"groups": len(np.unique(task.groups[train])), "images": len(train)}
    line["parameters"] = sum(parameter.numel() for parameter in trained.parameters())
    return line | {"seconds": time.perf_counter() - began, "probs": probs.tolist()}


# ---------------------------------------------------------------------------------------------
# classifier.pt, and images from elsewhere
# ---------------------------------------------------------------------------------------------


def save_classifier(
    path: Path, classifier: Classifier, setup: Setup, head_type: str, temperature: float, config
) -> None:
    """Write classifier.pt: encoder and head, what both were trained on, and how.

    Args:
        setup: of its training; says what the encoder had seen before.
        head_type: one of HEADS.
        temperature: as `evaluate.fit_temperature` returns it; 1 = probabilities as they are.
        config: of the run; says by which patient_pattern, labels and resplit the task was split.
    """
    task = setup.task
    trained_on = setup.images.hashes[task.rows[np.isin(task.split, ("train", "val"))]]
    seen = torch.cat([setup.checkpoint["seen"], torch.from_numpy(trained_on)])  # (n, 16) uint8
    plain = copy.deepcopy(classifier).to("cpu", memory_format=torch.contiguous_format)
    weights = {"encoder": plain.encoder.state_dict(), "head": plain.head.state_dict()}
    described = {"task": task.name, "classes": list(task.classes), "head_type": head_type}
    described |= {"temperature": temperature, "config": config, "seen": seen.unique(dim=0)}
    simclr.save(setup.checkpoint | weights | described, path)


def load_classifier(path: Path) -> tuple[Classifier, dict]:
    """Read classifier.pt.

    Returns:
        (the classifier on the CPU, in eval mode; the whole checkpoint)

    Raises:
        UserError: the file is missing, or is no classifier.
    """
    encoder, checkpoint = simclr.load_encoder(path, "head")
    with simclr.one_line(f"{path} is no classifier.pt of this program"):
        head = HEADS[checkpoint["head_type"]](encoder.feature_dim, len(checkpoint["classes"]))
        head.load_state_dict(checkpoint["head"])
        if Path(checkpoint["task"]).name != checkpoint["task"] or not checkpoint["temperature"] > 0:
            raise ValueError("its task is no folder's name, or its temperature not above 0")
    return Classifier(encoder, head).eval(), checkpoint


def unseen_task(study: data.Study, task: data.Task, checkpoint: dict) -> data.Task:
    """A task as one test set, for a classifier from elsewhere that may have seen some of it.

    What it has seen is dropped with the groups, and so is what the split drops: near-duplicates of
    two labels, and those of a published test image, which would count twice.

    Args:
        checkpoint: of the classifier: its classes, and what it has seen.

    Returns:
        The task with the classifier's classes, of which it may have some only; its split is test or
        dropped.

    Raises:
        UserError: nothing is left, or a class is none of the classifier's.
    """
    classes = checkpoint["classes"]
    if not set(task.classes) <= set(classes):
        raise data.UserError(f"{task.name} has {list(task.classes)}, the classifier {classes}")
    dropped = task.split == "dropped"  # (m,) bool
    seen = data.was_seen(study, checkpoint["seen"].numpy())[task.rows] & ~dropped  # (m,) bool
    split = np.where(seen | dropped, "dropped", "test")
    if "test" not in split:
        why = f"the classifier was trained on {seen.sum()}, or on others of their groups"
        raise data.UserError(f"no image of {task.name} is left to test: {why}; give other images")
    notes = {"rule": "all that the classifier has not seen", "dropped": int((seen | dropped).sum())}
    notes |= {"dropped_as_seen": int(seen.sum()), "dropped_by_the_split": int(dropped.sum())}
    labels = np.array([classes.index(name) for name in task.classes])[task.labels]  # (m,)
    return replace(task, classes=tuple(classes), labels=labels, split=split, notes=notes)
