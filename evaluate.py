"""Say how good a classifier is: every metric by hand, with the interval that belongs to it.

Labels and probabilities go in, numbers, a text and pictures come out. Two decisions make the
numbers mean something. Every figure and its interval come from the same lines of code: a metric is
a function of *weights* on the pictures, all of them 1 for the figure itself. And the interval comes
from resampling *groups* (patients), not pictures: forty slices of one head are not forty
independent answers, and an interval that believes so is far too narrow.

    C[t, p] = weight of the pictures of class t called p                    (confusion matrix)
    precision_k = C[k, k] / sum_t C[t, k]        recall_k = C[k, k] / sum_p C[k, p]
    F1_k = 2 C[k, k] / (sum_t C[t, k] + sum_p C[k, p])
    AUROC_k = P(score of a k > score of another) + P(equal) / 2             (Mann and Whitney 1947)
    ECE = sum over 15 bins of share of pictures * |accuracy - mean top probability|
                                                             (Guo et al., arXiv 1706.04599, Eq. 3)
    NLL = mean of -log(probability of the true class), in nats

Here, too, stands the leak meter: what recognising people alone would score, if pictures of one
person were on both sides of the split.

Shape letters: N pictures here (slices) · K classes · B resamples · G groups.

Next: heads.py
"""

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

RESAMPLES = 2000  # the ends of a 95 % interval then move by 1 to 3 % of its width between seeds
ECE_BINS = 15
PARTS = ("train", "val", "test", "dropped")
KNN_NEIGHBOURS, KNN_TEMPERATURE = 20, 0.07  # 1805.01978 has 200 and 0.07, for ImageNet
LEAK_SPLITS = 5
LEAK_QUERIES = 10_000  # pictures asked for their nearest neighbour; more would only take longer

# ---------------------------------------------------------------------------------------------
# Metrics, as functions of weights
# ---------------------------------------------------------------------------------------------


def confusion_matrix(labels: np.ndarray, preds: np.ndarray, num_classes: int) -> np.ndarray:
    """Count the pictures of each true class (row) that were called each class (column).

    Args:
        labels, preds: (N,) whole numbers in [0, num_classes).

    Returns:
        (K, K) int64; rows sum to the classes' supports.

    Raises:
        ValueError: lengths differ, or a class is outside [0, num_classes).

    >>> confusion_matrix([0, 0, 1], [0, 1, 1], 2).tolist()
    [[1, 1], [0, 1]]
    """
    labels, preds = np.asarray(labels, np.int64), np.asarray(preds, np.int64)
    both = np.concatenate([labels, preds])
    if labels.shape != preds.shape or (
        both.size and not 0 <= both.min() <= both.max() < num_classes
    ):
        raise ValueError(
            f"expected two rows of classes below {num_classes}, got {labels.shape} and "
            f"{preds.shape}, from {both.min(initial=0)} to {both.max(initial=0)}"
        )
    counts = np.bincount(labels * num_classes + preds, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def ratio(numerator: np.ndarray, denominator: np.ndarray, undefined: float) -> np.ndarray:
    """Divide, but for 0 / 0.

    Args:
        numerator, denominator: of shapes that broadcast, >= 0.
        undefined: the result where the denominator is 0.
    """
    safe = np.where(denominator > 0, denominator, 1)
    return np.where(denominator > 0, numerator / safe, undefined)


def auroc(
    scores: np.ndarray, positive: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Area under the ROC curve: the chance that a positive scores above a negative; ties are half.

    Args:
        scores: (N,) any scale; higher means "positive".
        positive: (N,) bool.
        weights: (B, N), one row for each resample; None = one row of ones.

    Returns:
        (B,) in [0, 1]; 0.5 is chance; NaN where there are no positives or no negatives.

    >>> float(auroc(np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, True, False, True]))[0])
    0.875
    """
    weights = np.ones((1, len(scores))) if weights is None else weights
    if not len(scores):
        return np.full(len(weights), np.nan)
    order = np.argsort(scores, kind="stable")
    ranked, w = scores[order], weights[:, order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])  # first of each tied score
    up = np.add.reduceat(w * positive[order], starts, axis=1)  # (B, scores), weight of positives
    down = np.add.reduceat(w, starts, axis=1) - up
    below = np.cumsum(down, axis=1) - down  # (B, scores), negatives that score strictly less
    won = (up * (below + down / 2)).sum(axis=1)
    return ratio(won, up.sum(axis=1) * down.sum(axis=1), np.nan)


def weighted_metrics(
    labels: np.ndarray, probs: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """The metrics for which we give intervals, once for each row of weights.

    Args:
        labels: (N,) int64 in [0, K).
        probs: (N, K) rows sum to 1.
        weights: (B, N) how often each picture counts.

    Returns:
        Per class, (B, K): precision, recall, f1 (undefined = 0), class_auroc (undefined = NaN).
        Over classes, (B,): accuracy; macro_precision, macro_recall, macro_f1, where a class that no
        picture has and none is called counts as 0, but one that only this resample has missed is
        left out (as 0 it would pull the interval down); balanced_accuracy over the classes that
        have pictures; auroc over those that also have others to be told from. NaN where nothing
        can be scored.
    """
    K = probs.shape[1]
    cell = np.eye(K * K)[labels * K + probs.argmax(axis=1)]  # (N, K^2), one 1 a row
    C = (weights @ cell).reshape(-1, K, K)  # (B, K, K), weighted confusion matrices
    hit, support, called = np.einsum("bkk->bk", C), C.sum(axis=2), C.sum(axis=1)  # (B, K)
    recall = ratio(hit, support, 0.0)
    precision, f1 = ratio(hit, called, 0.0), ratio(2 * hit, called + support, 0.0)
    areas = np.stack([auroc(probs[:, k], labels == k, weights) for k in range(K)], axis=1)
    scored = ~np.isnan(areas)
    there = support + called > 0  # (B, K), True = the class has an F1 in this resample
    whole = cell.sum(axis=0).reshape(K, K)  # (K, K), every picture once
    counted = there | ((whole + whole.T).sum(axis=1) == 0)  # (B, K), True = goes into the average
    macro = partial(np.average, axis=1, weights=counted)
    return {
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "class_auroc": areas,
        "accuracy": ratio(hit.sum(axis=1), support.sum(axis=1), np.nan),
        "balanced_accuracy": ratio(recall.sum(axis=1), (support > 0).sum(axis=1), np.nan),
        "macro_precision": macro(precision),
        "macro_recall": macro(recall),
        "macro_f1": macro(f1),
        "auroc": ratio(np.where(scored, areas, 0).sum(axis=1), scored.sum(axis=1), np.nan),
    }


def reliability(labels: np.ndarray, probs: np.ndarray) -> tuple[np.ndarray, ...]:
    """Confidence and accuracy in each of 15 equal bins (low, high] of the top probability.

    Returns:
        count, mean top probability, accuracy: (15,) each; an empty bin has 0 in all.
    """
    top, right = probs.max(axis=1), probs.argmax(axis=1) == labels  # (N,), (N,) bool
    which = np.clip(np.ceil(top * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    count, tops, rights = (np.bincount(which, w, ECE_BINS) for w in (np.ones(len(top)), top, right))
    return count, ratio(tops, count, 0.0), ratio(rights, count, 0.0)


def expected_calibration_error(labels: np.ndarray, probs: np.ndarray) -> float:
    """How far confidence is from accuracy (1706.04599, Eq. 3), in 15 bins of top probability.

    Returns:
        In [0, 1]; 0 is best. 100 pictures, all called rightly with probability 0.8, score 0.2.
    """
    count, confidence, accuracy = reliability(labels, probs)
    return float((count * np.abs(accuracy - confidence)).sum() / len(labels))


def negative_log_likelihood(labels: np.ndarray, probs: np.ndarray) -> float:
    """Mean -log p(true class) in nats; 0 is best, log K is a uniform guess."""
    true = probs[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(true, np.finfo(np.float64).tiny)).mean())


def with_temperature(probs: np.ndarray, temperature: float) -> np.ndarray:
    """(N, K) softmax(logits / temperature): above 1 it is less sure of the same answers."""
    logits = np.log(np.maximum(probs, np.finfo(np.float64).tiny)) / temperature
    scaled = np.exp(logits - logits.max(axis=1, keepdims=True))
    return scaled / scaled.sum(axis=1, keepdims=True)


def fit_temperature(labels: np.ndarray, probs: np.ndarray) -> float:
    """The temperature at which probabilities say best how sure they may be (1706.04599, §4.2).

    Args:
        labels, probs: of the val part, never of the test part; without pictures it is 1.

    Returns:
        That of the least negative log-likelihood, in [0.05, 20], to 1 %.
    """
    if not len(labels):
        return 1.0
    candidates = np.append(np.geomspace(0.05, 20, 600), 1.0)
    losses = [negative_log_likelihood(labels, with_temperature(probs, t)) for t in candidates]
    return float(candidates[np.argmin(losses)])


def plain(value: float) -> float | None:
    """A number that JSON can hold: NaN (nothing to score) becomes None."""
    return None if np.isnan(value) else float(value)


def classification_metrics(
    labels: np.ndarray, probs: np.ndarray, classes: Sequence[str] | None = None
) -> dict:
    """Every metric of one set of predictions; the definitions stand at the top of this file.

    Args:
        labels: (N,) int64 in [0, K), N >= 1.
        probs: (N, K) float, rows sum to 1.
        classes: K names for `per_class`; None = "0", "1", ...

    Returns:
        n, accuracy, balanced_accuracy, macro_precision, macro_recall, macro_f1, auroc, ece, nll;
        majority_accuracy: of always answering the commonest class;
        per_class {name: precision, recall, f1, auroc, support}; confusion_matrix (rows = truth).
        None stands for what cannot be scored, such as the AUROC where one class alone is present.

    Raises:
        ValueError: shapes do not fit, a row is no distribution, or a label is outside [0, K).

    Equal probabilities for K classes have AUROC 0.5 and NLL log K, and call everything class 0.
    """
    labels, probs = np.asarray(labels, np.int64), np.asarray(probs, np.float64)
    fits = probs.ndim == 2 and labels.shape == probs.shape[:1] and len(labels) > 0
    if not fits or not np.allclose(probs.sum(axis=1), 1, atol=1e-3) or probs.min() < 0:
        raise ValueError(
            f"expected labels (N,) and probabilities (N, K) whose rows sum to 1, got "
            f"{labels.shape} and {probs.shape}"
        )
    K = probs.shape[1]
    matrix = confusion_matrix(labels, probs.argmax(axis=1), K)
    once = weighted_metrics(labels, probs, np.ones((1, len(labels))))
    per_class = {
        str(k) if classes is None else classes[k]: {
            **{name: plain(once[name][0, k]) for name in ("precision", "recall", "f1")},
            "auroc": plain(once["class_auroc"][0, k]),
            "support": int(matrix[k].sum()),
        }
        for k in range(K)
    }
    return {
        "n": len(labels),
        "majority_accuracy": int(matrix.sum(axis=1).max()) / len(labels),
        **{name: plain(values[0]) for name, values in once.items() if values.ndim == 1},
        "ece": expected_calibration_error(labels, probs),
        "nll": negative_log_likelihood(labels, probs),
        "per_class": per_class,
        "confusion_matrix": matrix.tolist(),
    }


def resample(groups: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """How often each of G groups is drawn in each of 2,000 resamples, G with replacement each time.

    Returns:
        (drawn (B, G), member (N,) in [0, G): the group of each picture)
    """
    _, member = np.unique(groups, return_inverse=True)
    G = member.max() + 1
    drawn = np.random.default_rng(seed).multinomial(G, np.full(G, 1 / G), size=RESAMPLES)
    return drawn, member


def mean_interval(values: np.ndarray, groups: np.ndarray) -> list[float]:
    """95 % interval of the mean of `values` (N,), one for each picture, over resampled groups.

    For a paired difference, `values` are the differences picture by picture. A single group has no
    spread to show: NaN.
    """
    drawn, member = resample(groups)
    if drawn.shape[1] < 2:
        return [np.nan, np.nan]
    sums, sizes = np.bincount(member, values), np.bincount(member)  # (G,)
    return np.quantile(drawn @ sums / (drawn @ sizes), [0.025, 0.975]).tolist()


def group_bootstrap(
    labels: np.ndarray, probs: np.ndarray, groups: np.ndarray, seed: int = 0
) -> dict[str, list[float] | None]:
    """95 % percentile intervals from resampling whole groups (Efron 1979; Field and Welsh 2007).

    Each of 2,000 resamples draws G groups with replacement; a picture counts as often as its group
    was drawn. A resample in which a metric cannot be scored is left out of that metric.

    Args:
        labels, probs: as in `classification_metrics`.
        groups: (N,) int, what is independent: the patient.

    Returns:
        {accuracy, balanced_accuracy, macro_f1, auroc: [low, high]}, or None for a metric that
        cannot be scored, and for all where there is a single group: it has no spread to show.
    """
    labels, probs = np.asarray(labels, np.int64), np.asarray(probs, np.float64)
    drawn, member = resample(groups, seed)
    block = max(1, 4_000_000 // len(labels))  # resamples at once: 32 MB an array
    rounds = [
        weighted_metrics(labels, probs, drawn[i : i + block, member].astype(np.float64))
        for i in range(0, RESAMPLES, block)
    ]
    intervals: dict[str, list[float] | None] = {}
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "auroc"):
        values = np.concatenate([r[name] for r in rounds])
        values = values[~np.isnan(values)]
        enough = drawn.shape[1] > 1 and len(values) > 0
        intervals[name] = np.quantile(values, [0.025, 0.975]).tolist() if enough else None
    return intervals


@dataclass(frozen=True)
class TestPart:
    """What a classifier is tested on: parallel arrays over N pictures of K classes."""

    task: str
    classes: Sequence[str]
    paths: Sequence[str]
    labels: np.ndarray  # (N,) int64 in [0, K)
    groups: np.ndarray  # (N,) int

    def measure(self, probs: np.ndarray) -> dict:
        """All that is reported of probabilities (N, K): the metrics, n_groups and ci95."""
        metrics = classification_metrics(self.labels, probs, self.classes)
        intervals = group_bootstrap(self.labels, probs, self.groups)
        return {"n_groups": len(np.unique(self.groups)), **metrics, "ci95": intervals}

    def shares(self) -> np.ndarray:
        """(N, K) what knows the classes' shares here, and nothing of the pictures, would answer."""
        shares = np.bincount(self.labels, minlength=len(self.classes)) / len(self.labels)
        return np.tile(shares, (len(self.labels), 1))


# ---------------------------------------------------------------------------------------------
# Two ways to look at features without training anything
# ---------------------------------------------------------------------------------------------


def nearest_neighbours(
    known: np.ndarray, labels: np.ndarray, asked: np.ndarray, num_classes: int
) -> np.ndarray:
    """What the 20 nearest known pictures say of each that is asked (Wu et al., 1805.01978, §3.4).

    A neighbour's vote weighs exp(cosine / 0.07).

    Args:
        known, labels: (n, E) features and (n,) int64 in [0, K) of pictures whose class is told.
        asked: (N, E).

    Returns:
        (N, K) shares of the vote, rows sum to 1.
    """
    known, asked = (
        x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12) for x in (known, asked)
    )
    k, shares = min(KNN_NEIGHBOURS, len(known)), [np.zeros((0, num_classes))]
    for some in np.array_split(asked, 1 + len(asked) * len(known) // 20_000_000):  # 160 MB at once
        cosine = some @ known.T  # (m, n)
        nearest = np.argpartition(-cosine, k - 1, axis=1)[:, :k]  # (m, k)
        weights = np.exp((np.take_along_axis(cosine, nearest, axis=1) - 1) / KNN_TEMPERATURE)
        votes = np.einsum("mk,mkc->mc", weights, np.eye(num_classes)[labels[nearest]])  # (m, K)
        shares.append(votes / votes.sum(axis=1, keepdims=True))
    return np.concatenate(shares)


def principal_components(features: np.ndarray) -> np.ndarray:
    """The two directions in which features differ most: (n, E) -> (n, 2), mean zero.

    The sign of a direction means nothing; its largest entry is made positive, so that it is fixed.
    """
    x = features.astype(np.float64) - features.mean(axis=0)
    axes = np.linalg.eigh(x.T @ x)[1][:, :-3:-1]  # (E, 2), unit columns, of the largest variances
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0)  # (1, 2)
    return x @ (axes * np.sign(largest))


# ---------------------------------------------------------------------------------------------
# The leak meter
# ---------------------------------------------------------------------------------------------


def publishers_leak(
    part: np.ndarray, split: np.ndarray, groups: np.ndarray, pixels: np.ndarray, twins: np.ndarray
) -> list[str]:
    """The sentence about twins between a publisher's Training and Testing; [] without Testing.

    Args:
        part, split: (N,) str, the publisher's train, val or test, and ours or "dropped".
        groups: (N,) int64.
        pixels: (N,) equal where the pixels are.
        twins: (m, 3) int64, two of the N pictures, and 1 where one is the other's mirror.
    """
    ends = part[twins[:, :2]]  # (m, 2)
    across = twins[(ends == "test").any(axis=1) & (ends == "train").any(axis=1)]
    if not len(across):
        none = "As published, no Testing picture has a twin in Training."
        return [none] if (part == "test").any() else []
    swapped = part[across[:, 0]] == "train"
    tested = np.where(swapped, across[:, 1], across[:, 0])
    trained = np.where(swapped, across[:, 0], across[:, 1])
    same = np.unique(tested[pixels[tested] == pixels[trained]])
    found, straight = np.unique(tested), np.unique(tested[across[:, 2] == 0])
    sharing = (part == "train") & np.isin(groups, groups[part == "test"])  # (N,) bool
    left_out = (sharing & (split == "dropped")).sum()
    left_out = "all" if left_out == sharing.sum() else f"{left_out:,}"
    return [
        f"As published, {len(found):,} of the {(part == 'test').sum():,} Testing pictures have a "
        f"twin in Training: {len(same):,} pixel for pixel, {len(found) - len(straight):,} mirrored."
        f" {sharing.sum():,} Training pictures share a group with one of Testing; {left_out} of "
        "them are left out."
    ]


def leak_meter(
    thumbnails: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed: int = 0
) -> dict[str, list[float]]:
    """What a classifier that has learnt nothing scores by recognising whom it has seen.

    It answers with the label of the nearest neighbour, by cosine on 32x32 pixels. A picture of the
    same head is mostly nearer than any other with the same disease; so where training holds one, it
    is right without knowing what the disease looks like. The pictures are dealt to five
    parts, each tested once against the other four; first picture by picture, then group by group.

    Args:
        thumbnails: (N, 32, 32) uint8.
        labels, groups: (N,) int.

    Returns:
        "by picture", "by group": the accuracies of the five parts (none by group where all is one
        group); "recognised": [share of the pictures whose group is in training, too, when they are
        tested by picture]; "commonest": [share of the commonest class, what always answering it
        scores].
    """
    rng = np.random.default_rng(seed)
    N, x = len(labels), thumbnails.reshape(len(labels), -1).astype(np.float32)
    x -= x.mean(axis=1, keepdims=True)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)  # (N, 1024), unit rows or zero
    _, first, member = np.unique(groups, return_index=True, return_inverse=True)
    dealt = rng.permutation(len(first))
    dealt = dealt[np.argsort(labels[first[dealt]], kind="stable")]  # groups, class after class
    part_of = np.argsort(dealt) % LEAK_SPLITS  # (groups,), the place in the dealing, in turn
    parts = {"by picture": rng.permutation(N) % LEAK_SPLITS, "by group": part_of[member]}
    asked = rng.permutation(N)[:LEAK_QUERIES]
    right = {name: np.zeros(N, bool) for name in parts}
    for some in np.array_split(asked, -(-len(asked) * N // 20_000_000)):  # 80 MB at once
        cosine = x[some] @ x.T  # (m, N)
        for name, part in parts.items():
            others = np.where(part[some, None] == part, -np.inf, cosine)  # its own part is tested
            right[name][some] = labels[others.argmax(axis=1)] == labels[some]
    meter = {
        name: [float(right[name][asked][part[asked] == k].mean()) for k in np.unique(part[asked])]
        for name, part in parts.items()
    }
    there = np.zeros((len(first), LEAK_SPLITS), int)  # pictures of a group in a part
    np.add.at(there, (member, parts["by picture"]), 1)
    elsewhere = there.sum(axis=1)[member] - there[member, parts["by picture"]]  # (N,)
    meter["recognised"] = [float((elsewhere > 0).mean())]
    meter["commonest"] = [float(np.bincount(labels).max() / N)]
    return meter | ({"by group": []} if len(first) < 2 else {})


def leak_picture(meter: dict[str, list[float]], task: str) -> Image.Image:
    """Draw the leak meter: a bar for each way to split, with the range of its five splits.

    Args:
        meter: as `leak_meter` returns it.
        task: its name.
    """
    bars = (("split by picture", "by picture", LINES[1]), ("split by group", "by group", LINES[0]))
    bars += (("always the commonest class", "commonest", MUTED),)
    left, wide = 180, 200
    title = f"{task}: the nearest neighbour on 32x32 pixels"
    image, draw = page(left + wide + 70, 46 + 34 * len(bars) + 10, title, "")
    for i, (label, key, color) in enumerate(bars):
        y, values = 52 + 34 * i, meter[key]
        write(draw, (left - 10, y + 10), label, 12, INK, "rm")
        if not values:
            write(draw, (left, y + 10), "n/a", 12, MUTED, "lm")
            continue
        mean = sum(values) / len(values)
        ends = [(left + wide * v) * SCALE for v in (0, mean, min(values), max(values))]
        draw.rectangle((ends[0], y * SCALE, ends[1], (y + 20) * SCALE), fill=color)
        draw.line((ends[2], (y + 10) * SCALE, ends[3], (y + 10) * SCALE), INK, SCALE)
        write(draw, (left + wide * max(values) + 6, y + 10), f"{mean:.3f}", 12, INK, "lm")
    return image


def classification_report(metrics: dict) -> str:
    """The table of `classification_metrics`, set as scikit-learn sets its own."""
    per_class = metrics["per_class"]
    width = max(len("weighted avg"), *(len(name) for name in per_class))
    columns = ("precision", "recall", "f1")
    lines = [" " * width + " precision    recall  f1-score   support".rjust(41), ""]

    def line(name: str, values: Sequence[float], support: int) -> str:
        """A row: name, precision, recall, F1, support."""
        return f"{name:>{width}} " + "".join(f"{v:10.2f}" for v in values) + f"{support:10d}"

    for name, row in per_class.items():
        lines.append(line(name, [row[c] for c in columns], row["support"]))
    n, rows = metrics["n"], per_class.values()
    lines += ["", f"{'accuracy':>{width}} {'':20}{metrics['accuracy']:10.2f}{n:10d}"]
    macro = [metrics[f"macro_{c}"] for c in columns]
    weighted = [sum(row[c] * row["support"] for row in rows) / n for c in columns]
    lines += [line("macro avg", macro, n), line("weighted avg", weighted, n)]
    return "\n".join(lines) + "\n"


def comparison_table(results: dict[str, dict]) -> str:
    """A line for each result (metrics with their "ci95"): four metrics, each with its interval."""
    columns = ("accuracy", "balanced_accuracy", "macro_f1", "auroc")
    lines = [f"{'':20}" + "".join(f"{c.replace('_', ' '):>21}" for c in columns)]
    for name, result in results.items():
        cells = []
        for column in columns:
            value, interval = result[column], result["ci95"][column]
            cell = "n/a" if value is None else f"{value:.3f}"
            cell += f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
            cells.append(f"{cell:>21}")
        lines.append(f"{name:20}" + "".join(cells))
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------
# Pictures, drawn with Pillow
# ---------------------------------------------------------------------------------------------

INK, MUTED, GRID, PAPER = (31, 41, 55), (107, 114, 128), (229, 231, 235), (255, 255, 255)
LINES = ((37, 99, 235), (234, 88, 12), (5, 150, 105), (147, 51, 234))  # told apart in gray, too
SCALE = 2  # everything is drawn at twice the size, for screens that show it


def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's built-in typeface, so that no font has to be found on the machine."""
    return ImageFont.load_default(size=size * SCALE)


def page(
    width: int, height: int, title: str, caption: str
) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A white page with a title at the top and, where there is one, a caption at the bottom."""
    image = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
    draw = ImageDraw.Draw(image)
    write(draw, (20, 14), title, 15)
    write(draw, (20, height - 24), caption, 11, (185, 28, 28))
    return image, draw


def write(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: int,
    color: tuple[int, int, int] = INK,
    anchor: str = "la",
) -> None:
    """Set a line of text.

    Args:
        at: (x, y) in page units.
        size: in page units.
        anchor: what of the text stands at `at`, in Pillow's letters: l, m or r, then a, m or s.
    """
    draw.text((at[0] * SCALE, at[1] * SCALE), text, color, font(size), anchor)


def confusion_picture(
    matrix: Sequence[Sequence[int]], classes: Sequence[str], title: str, caption: str = ""
) -> Image.Image:
    """Draw a confusion matrix: counts, and each row's shares as the depth of the blue.

    Args:
        matrix: (K, K), rows = true class.
        caption: a warning printed in red below, such as that the result is leaked.
    """
    counts = np.asarray(matrix)
    shares = ratio(counts, counts.sum(axis=1, keepdims=True), 0.0)  # (K, K), rows sum to 1
    K, cell = len(classes), 76
    names = [name if len(name) <= 14 else name[:13] + "…" for name in classes]
    left, top = 140, 84
    wide = max(left + K * cell + 30, 40 + 9 * len(title), 40 + 7 * len(caption))
    image, draw = page(wide, top + K * cell + 60, title, caption)
    write(draw, (left + K * cell / 2, top - 28), "predicted", 12, MUTED, "mm")
    write(draw, (20, top - 28), "true class", 12, MUTED, "lm")
    for t in range(K):
        write(draw, (left - 10, top + (t + 0.5) * cell), names[t], 12, INK, "rm")
        write(draw, (left + (t + 0.5) * cell, top - 10), names[t], 10, INK, "mm")
        for p in range(K):
            depth = shares[t, p] ** 0.7
            blue = tuple(round(255 + (c - 255) * depth) for c in (30, 64, 175))
            x, y = left + p * cell, top + t * cell
            box = (x * SCALE, y * SCALE, (x + cell - 2) * SCALE, (y + cell - 2) * SCALE)
            draw.rectangle(box, fill=blue, outline=GRID)
            ink = PAPER if depth > 0.55 else INK
            write(draw, (x + cell / 2 - 1, y + cell / 2 - 8), str(counts[t, p]), 16, ink, "mm")
            write(draw, (x + cell / 2 - 1, y + cell / 2 + 13), f"{shares[t, p]:.0%}", 10, ink, "mm")
    return image


def ticks(low: float, high: float) -> np.ndarray:
    """About five round numbers (1, 2 or 5 times a power of ten), from `low` or less to `high`."""
    span = max(high - low, 1e-3 * abs(high), 1e-9)
    rough = span / 4
    power = 10.0 ** np.floor(np.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda s: abs(np.log(s * power / rough)))
    first, last = np.floor(low / step + 1e-9), np.ceil(high / step - 1e-9)
    return np.arange(first, last + 1) * step


class Panel(NamedTuple):
    """One pair of axes, and what is drawn between them."""

    quantity: str  # what runs up
    across: str  # what runs to the right
    lines: dict[str, Sequence[Sequence[tuple[float, float]]]]  # by name: lines of points (x, y)
    names: dict[float, str] | None = None  # marks on the x axis that are no numbers


def chart(panels: Sequence[Panel], title: str, caption: str = "") -> Image.Image:
    """Draw panels side by side; a line of a single point is a dot.

    Args:
        caption: a warning printed in red below.
    """
    wide, high, aside, top = 300, 220, 170, 74
    image, draw = page(70 + len(panels) * (wide + aside), high + 130, title, caption)
    for i, panel in enumerate(panels):
        left, bottom = 60 + i * (wide + aside), top + high
        found = [point for lines in panel.lines.values() for line in lines for point in line]
        points = np.array(found or [(0, 0), (1, 1)], float)  # (m, 2)
        low, end = points.min(axis=0), points.max(axis=0)  # (2,) each: x, y
        whole = not (points[:, 0] % 1).any()  # such as epochs
        marks = ticks(low[1], end[1])
        across = [mark for mark in ticks(low[0], end[0]) if not (whole and mark % 1)]
        names = panel.names or {mark: f"{mark:.4g}" for mark in across}
        margin = 0.03 * (end[0] - low[0]) or 0.5
        low, end = np.array([(low[0] - margin, marks[0]), (end[0] + margin, marks[-1])])
        unit = (wide, -high) / np.maximum(end - low, 1e-9)  # (2,) on the page; y runs down there
        write(draw, (left, top - 26), panel.quantity, 12, MUTED)
        write(draw, (left + wide / 2, bottom + 30), panel.across, 10, MUTED, "mm")
        for mark in marks:
            y = bottom + (mark - low[1]) * unit[1]
            draw.line((left * SCALE, y * SCALE, (left + wide) * SCALE, y * SCALE), GRID, SCALE)
            write(draw, (left - 6, y), f"{mark:.4g}", 10, MUTED, "rm")
        for mark in [mark for mark in names if low[0] <= mark <= end[0]]:
            write(
                draw, (left + (mark - low[0]) * unit[0], bottom + 12), names[mark], 10, MUTED, "mm"
            )
        for k, (name, lines) in enumerate(panel.lines.items()):
            color = LINES[k] if k < len(LINES) else f"hsl({k * 137 % 360}, 65%, 45%)"
            for line in lines:
                spots = ((left, bottom) + (np.reshape(line, (-1, 2)) - low) * unit) * SCALE
                draw.line([tuple(spot) for spot in spots], color, 2 * SCALE, joint="curve")
                if len(spots) == 1:
                    draw.ellipse((*(spots[0] - 4), *(spots[0] + 4)), fill=color)
            if len(panel.lines) > 1:
                write(draw, (left + wide + 10, top + 15 * k), name[:28], 11, color)
    return image


def over_epochs(values: Sequence[float]) -> list[list[tuple[float, float]]]:
    """A line over the epochs 1, 2, ..., as `Panel` takes it."""
    return [list(enumerate(values, 1))] if values else []


def pretraining_picture(records: list[dict]) -> Image.Image:
    """curve.png of a pretraining, from the records of its epochs."""
    loss, found = ([r[key] for r in records] for key in ("loss", "contrastive_accuracy"))
    panels = [Panel("NT-Xent (nats)", "epoch", {"loss": over_epochs(loss)})]
    panels += [Panel("contrastive accuracy", "epoch", {"accuracy": over_epochs(found)})]
    knn = [(r["epoch"], r["knn_accuracy"]) for r in records if "knn_accuracy" in r]
    panels += [Panel("kNN accuracy, val part", "epoch", {"kNN": [knn]})] if knn else []
    return chart(panels, "Pretraining")


def training_picture(records: list[dict], title: str, caption: str) -> Image.Image:
    """curve.png of a classifier's training, from the records of its epochs."""
    losses, accuracy = {}, {}
    rates = list(dict.fromkeys(r.get("peak_lr") for r in records))  # that were tried, or None
    for rate in rates:
        some = [r for r in records if r.get("peak_lr") == rate]
        name = f" {rate:g}" if len(rates) > 1 else ""
        losses[f"train{name}"] = [[(r["epoch"], r["train_loss"]) for r in some]]
        scored = [r for r in some if r["val_loss"] is not None]
        losses[f"val{name}"] = [[(r["epoch"], r["val_loss"]) for r in scored]]
        accuracy[f"val{name}"] = [[(r["epoch"], r["val_accuracy"]) for r in scored]]
    panels = [Panel("cross-entropy (nats)", "epoch", losses)]
    return chart([*panels, Panel("val accuracy", "epoch", accuracy)], title, caption)


def roc_curve(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """The curve whose area is the AUROC: (m, 2), the share of negatives and of positives passed.

    Args:
        scores, positive: as in `auroc`; both kinds are there. Tied scores are passed together.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.diff(scores[order], append=np.inf))  # the last of each tied score
    passed = [np.append(0, np.cumsum(x[order])[ends]) / x.sum() for x in (~positive, positive)]
    return np.column_stack(passed)


def roc_picture(test: TestPart, probs: np.ndarray, caption: str) -> Image.Image:
    """roc.png: for each class, how many of it are found against how many others with them."""
    lines = {"chance 0.500": [[(0, 0), (1, 1)]]}
    for k, name in enumerate(test.classes):
        there = test.labels == k
        if 0 < there.sum() < len(there):
            area = auroc(probs[:, k], there)[0]
            lines[f"{name} {area:.3f}"] = [roc_curve(probs[:, k], there).tolist()]
    panel = Panel("share of the class found", "share of the others called it, too", lines)
    return chart([panel], f"{test.task}: ROC, each class against the rest (area)", caption)


def reliability_picture(
    test: TestPart, probs: np.ndarray, cooled: np.ndarray, caption: str
) -> Image.Image:
    """reliability.png: accuracy against confidence, before and after temperature scaling."""
    lines = {"as sure as right": [[(0.0, 0.0), (1.0, 1.0)]]}
    for name, p in (("before", probs), ("after scaling", cooled)):
        count, confidence, accuracy = reliability(test.labels, p)
        there = count > 0
        error = expected_calibration_error(test.labels, p)
        lines[f"{name}: ECE {error:.3f}"] = [
            list(zip(confidence[there], accuracy[there], strict=True))
        ]
    panel = Panel("accuracy", "mean top probability of a bin", lines)
    return chart([panel], f"{test.task}: is it right as often as it is sure?", caption)


def map_picture(features: np.ndarray, labels: Sequence[str]) -> Image.Image:
    """The map of `embed`: a dot for each picture, along the two principal components."""
    spots, names = principal_components(features), np.array(labels)
    lines = {
        name or "no label": spots[names == name][:, None].tolist() for name in sorted(set(labels))
    }
    panel = Panel("second principal component", "first principal component", lines)
    return chart([panel], f"{len(names):,} pictures, as the encoder sees them")


# ---------------------------------------------------------------------------------------------
# What a result leaves behind
# ---------------------------------------------------------------------------------------------


def leak_caption(leaked: Sequence[str]) -> str:
    """The warning that every output of a leaked result carries; '' for an honest one.

    Args:
        leaked: the test pictures that the classifier, or others of their groups, was trained on.
    """
    return f"LEAKED: {len(leaked)} test pictures or their groups were trained on" if leaked else ""


def harmless(cell: object) -> object:
    """A cell of a table; in front of a text that a spreadsheet would compute, such as =1+1.png, ./.

    The path means the same then. Numbers may begin with a sign.
    """
    formula = isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"./{cell}" if formula and not re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", cell) else cell


def as_bytes(name: str, value: object) -> bytes:
    """The contents of a file.

    Args:
        name: its ending says what `value` is: .json a plain value, .jsonl records, .csv rows, .png
            a picture, .npz arrays by name; a text else.
    """
    if name.endswith((".png", ".npz")):
        file = io.BytesIO()
        np.savez(file, **value) if name.endswith(".npz") else value.save(file, "PNG")
        return file.getvalue()
    if name.endswith(".csv"):
        table = io.StringIO()
        plain, quoted = (
            csv.writer(table, lineterminator="\n", quoting=q)
            for q in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
        )
        for row in value:  # a lone carriage return ends a row, too, and csv knows it from 3.13 on
            writer = quoted if "\r" in "".join(map(str, row)) else plain
            writer.writerow([*map(harmless, row)])
        value = table.getvalue()
    elif name.endswith(".json"):
        value = json.dumps(value, indent=2) + "\n"
    elif name.endswith(".jsonl"):
        value = "".join(json.dumps(record) + "\n" for record in value)
    return value.encode("utf8", "surrogateescape")


def result_files(
    test: TestPart,
    probs: np.ndarray,
    results: dict[str, dict],
    split: dict,
    temperature: float,
    caption: str,
) -> dict[str, object]:
    """The files of a result, by name: metrics.json, report.txt, predictions.csv and the pictures.

    Args:
        probs: (N, K) of the first of `results`.
        results: by name, `TestPart.measure`; the first is what was asked for, the others its
            baselines: one that has learnt nothing and, for a probe, raw pixels.
        split: how the split was made, in plain types.
        temperature: `fit_temperature` of the val part.
        caption: `leak_caption`; it goes into the report and the pictures, and as "leaked" into the
            metrics.
    """
    measured, *baselines = results.values()
    cooled = with_temperature(probs, temperature)
    metrics = {"task": test.task, "classes": list(test.classes), **measured}
    metrics |= {
        "temperature": temperature,
        "nll_scaled": negative_log_likelihood(test.labels, cooled),
    }
    metrics |= {"ece_scaled": expected_calibration_error(test.labels, cooled)}
    metrics |= dict(zip(("baseline", "raw_pixels"), baselines, strict=False))
    counts = f"{measured['n']:,} test pictures of {measured['n_groups']:,} groups"
    report = (
        f"{classification_report(measured)}\n{comparison_table(results)}"
        f"{counts}; 95 % intervals from resampling groups\n"
        f"always answering the commonest class: accuracy {measured['majority_accuracy']:.3f}\n"
        f"calibration error {metrics['ece']:.3f}; {metrics['ece_scaled']:.3f} after dividing the "
        f"logits by {temperature:.2f}, the temperature of the val part\n"
        + f"{caption}\n"
        * bool(caption)
    )
    title = f"{test.task}: accuracy {metrics['accuracy']:.3f} on {metrics['n']:,} pictures"
    return {
        "metrics.json": metrics | {"split": split, "leaked": bool(caption)},
        "report.txt": report,
        "predictions.csv": prediction_table(test.paths, probs, test.classes, test),
        "confusion.png": confusion_picture(
            metrics["confusion_matrix"], test.classes, title, caption
        ),
        "roc.png": roc_picture(test, probs, caption),
        "reliability.png": reliability_picture(test, probs, cooled, caption),
    }


def prediction_table(
    paths: Sequence[str], probs: np.ndarray, classes: Sequence[str], test: TestPart | None = None
) -> list[tuple]:
    """predictions.csv, header first: path, (group, label,) prediction, p_<class>...

    Args:
        probs: (N, K), written with 9 significant digits.
        test: whose groups and labels are told beside the path.
    """
    told = [(g, classes[k]) for g, k in zip(test.groups, test.labels, strict=True)] if test else []
    rows = [
        (path, *known, classes[p.argmax()], *(f"{x:.9g}" for x in p))
        for path, known, p in zip(paths, told or [()] * len(paths), probs, strict=True)
    ]
    names = ("path", *(("group", "label") if test else ()), "prediction")
    return [(*names, *(f"p_{name}" for name in classes)), *rows]


# ---------------------------------------------------------------------------------------------
# What a comparison leaves behind
# ---------------------------------------------------------------------------------------------

METHODS = {  # of `compare`, as its table calls them
    "probe": "probe, pretrained encoder",
    "finetune": "fine-tuned, pretrained",
    "scratch": "supervised from scratch",
    "untrained": "probe, untrained encoder",
    "knn": "kNN, pretrained encoder",
}
COLUMNS = ("method", "fraction", "seed", "groups", "pictures", "parameters", "seconds", "lr")
SCORES = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece")


ROW = (
    "| {share:g} %: {groups:.0f} groups, {pictures:.0f} pictures | {name} "
    "| {mean:.3f}{sd} [{low:.3f}, {high:.3f}] | {gain:+.3f} [{worst:+.3f}, {best:+.3f}] "
    "| {parameters:,} | {seconds:.1f} |"
)


def summarise(cells: list[dict], scratch: list[dict], test: TestPart) -> dict:
    """What ROW says of one method's fits on one share of the labels, one for each seed.

    Args:
        scratch: the fits from scratch on the same labels. The difference is taken picture by
            picture, and its interval, like that of the mean, from resampling test groups.
    """
    right, theirs = (
        np.array([np.argmax(c["probs"], axis=1) == test.labels for c in some], float)
        for some in (cells, scratch)
    )  # (seeds, N) each, 1 = right
    gain = right.mean(axis=0) - theirs.mean(axis=0)  # (N,)
    sd = f" ± {right.mean(axis=1).std(ddof=1):.3f}" if len(right) > 1 else ""
    (low, high), (worst, best) = (mean_interval(x, test.groups) for x in (right.mean(axis=0), gain))
    row = {key: np.mean([c[key] for c in cells]) for key in ("groups", "pictures", "seconds")}
    row |= {"mean": right.mean(), "sd": sd, "low": low, "high": high, "gain": gain.mean()}
    row |= {"worst": worst, "best": best, "parameters": cells[0]["parameters"]}
    return row | {"share": 100 * cells[0]["fraction"], "name": METHODS[cells[0]["method"]]}


def compare_files(cells: list[dict], test: TestPart, about: str, caption: str) -> dict[str, object]:
    """The files of a comparison: table.csv, a row for each fit; table.md; label_efficiency.png.

    Args:
        cells: as `heads.Comparison.fit` yields them, of all METHODS.
        about: on the data, the split and the settings; it stands above the table.
        caption: `leak_caption`, for all three.
    """
    found = [(c, classification_metrics(test.labels, np.array(c["probs"]))) for c in cells]
    rows = [(*(c[k] for k in COLUMNS), *(m[k] for k in SCORES), caption) for c, m in found]
    header = "labels | method | accuracy | minus scratch | trained parameters | seconds"
    lines = [about, *["", caption][: 2 * bool(caption)], "", f"| {header} |", "|---" * 6 + "|"]
    drawn: dict[str, list] = {name: [[]] for name in METHODS.values()}
    names = {}
    for x, fraction in enumerate(sorted({cell["fraction"] for cell in cells})):
        of = {
            m: [c for c in cells if (c["fraction"], c["method"]) == (fraction, m)] for m in METHODS
        }
        for k, fits in enumerate(of.values()):
            row = summarise(fits, of["scratch"], test)
            lines.append(ROW.format(**row))
            names[x] = f"{row['share']:g} % ({row['groups']:.0f})"
            beside = x + 0.04 * (k - len(of) // 2)  # so that no interval hides another
            drawn[row["name"]][0].append((beside, row["mean"]))
            ends = [(beside, end) for end in (row["low"], row["high"]) if not np.isnan(end)]
            drawn[row["name"]] += [[(beside, row["mean"])], ends or [(beside, row["mean"])]]
    panel = Panel("test accuracy, 95 % interval", "labelled groups in training", drawn, names)
    return {
        "table.csv": [(*COLUMNS, *SCORES, "leaked"), *rows],
        "table.md": "\n".join(lines) + "\n",
        "label_efficiency.png": chart([panel], f"{test.task}: what labels are worth", caption),
    }
