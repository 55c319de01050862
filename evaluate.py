"""Say how good a classifier is: every metric by hand, with the interval that belongs to it.

Labels and probabilities go in; numbers, a report and figures come out. A score beside nothing means
nothing, so each has an interval, and the report sets it beside baselines. The interval comes from
drawing *groups* (patients) again, not images: forty slices of one brain are not forty independent
answers. And the leak meter says what recognising people alone would score, if images of one person
were on both sides of the split.

    C[t, p] = number of images of class t that were predicted p              (confusion matrix)
    precision_k = C[k, k] / sum_t C[t, k]        recall_k = C[k, k] / sum_p C[k, p]
    specificity_k = sum_{t, p != k} C[t, p] / sum_{t != k, p} C[t, p]
    F1_k = 2 C[k, k] / (sum_t C[t, k] + sum_p C[k, p])
    AUROC_k = P(score of a k > score of another) + P(equal) / 2              (Mann and Whitney 1947)
    ECE = sum over 15 bins of share of images * |accuracy - mean top probability|
                                                              (Guo et al., arXiv 1706.04599, Eq. 3)
    NLL = mean of -log(probability of the true class), in nats

Recall is what physicians call sensitivity; the report says so.

Shape letters: N images here · K classes · E features · G groups · n training images, m queries.

Departures: the temperature (1706.04599, §4.2) is fitted from 200 val images on; fitted on 30, it
made the test NLL worse by over .01 in almost half of the draws. kNN (1805.01978, §3.4) has 20
neighbours, not 200: our sets hold thousands of images, not a million.

Next: heads.py
"""

import csv
import io
import json
import re
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array
from PIL import Image, ImageDraw, ImageFont

SCORES = ("accuracy", "balanced_accuracy", "macro_f1", "auroc")  # those with intervals
RESAMPLES = 2000  # the ends of an interval then move by 1 to 3 % of its width between seeds
ECE_BINS = 15  # of Guo et al.
MIN_VAL = 200  # images that a temperature is fitted on (matters, see "Departures")
NEIGHBOURS, KNN_TEMPERATURE = 20, 0.07  # of Wu et al. 200 and 0.07, see "Departures"
LEAK_QUERIES = 10_000  # of the leak meter; more would move it by less than .01
BLOCK = 5_000_000  # cosines at once: 20 MB in float32
TINY = np.finfo(np.float64).tiny  # in place of 0, which has no logarithm

# ---------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------


def confusion_matrix(labels: Array, preds: Array, num_classes: int) -> Array:
    """Count the images of each true class (row) that were predicted each class (column).

    Args:
        labels, preds: (N,) int64 in [0, num_classes).

    Returns:
        (K, K) int64; rows sum to the classes' supports.

    Raises:
        ValueError: lengths differ, or a class is outside [0, num_classes).

    >>> confusion_matrix([0, 0, 1], [0, 1, 1], 2).tolist()
    [[1, 1], [0, 1]]
    """
    cells = np.ravel_multi_index((labels, preds), (num_classes, num_classes))  # (N,)
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def auroc(ranks: Array, positive: Array) -> float:
    """Area under the ROC curve: the chance that a positive ranks above a negative; ties are half.

    Args:
        ranks: (N,) any scale; higher means "positive".
        positive: (N,) bool.

    Returns:
        In [0, 1]; 0.5 is chance; NaN where there are no positives or no negatives.

    >>> float(auroc(np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, True, False, True])))
    0.875
    """
    negatives, positives = np.sort(ranks[~positive]), np.sort(ranks[positive])
    below = np.searchsorted(negatives, positives, side="left")  # negatives below each positive
    not_above = np.searchsorted(negatives, positives, side="right")  # and those equal to it
    pairs = len(negatives) * len(positives)
    return (below + not_above).sum() / (2 * pairs) if pairs else np.nan


def class_ranks(probs: Array) -> Array:
    """(N, K): what images are ranked by for each class; the logarithm of its probability.

    Of two classes it is the log-odds: one column is minus the other, and both have one AUROC. By
    probability, 1 and 1 - 1e-17 would tie for one class, and 0 and 1e-17 not for the other.
    """
    logits = np.log(np.maximum(probs, TINY))
    return logits - logits[:, ::-1] if probs.shape[1] == 2 else logits


def class_scores(labels: Array, probs: Array) -> dict[str, Array]:
    """Support, recall, specificity, precision, f1 and auroc of each class, (K,) each.

    Higher is better; NaN is what these images cannot say, such as the recall of an absent class.
    """
    K, ranks = probs.shape[1], class_ranks(probs)
    C = confusion_matrix(labels, probs.argmax(axis=1), K)
    hits, support, predicted = np.diag(C), C.sum(axis=1), C.sum(axis=0)  # (K,) each
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
        return {
            "support": support,
            "recall": hits / support,
            "specificity": 1 - (predicted - hits) / (len(labels) - support),
            "precision": hits / predicted,
            "f1": 2 * hits / (support + predicted),
            "auroc": np.array([auroc(ranks[:, k], labels == k) for k in range(K)]),
        }


def scores(labels: Array, probs: Array, absent: Array | bool = True) -> dict[str, float]:
    """The scores of some images, over all classes; higher is better.

    Args:
        labels: (N,) int64 in [0, K), N >= 1.
        probs: (N, K) rows sum to 1.
        absent: (K,) bool, True = a class that here nobody has or is predicted counts as 0 in the
            macro averages. That is so for a whole test set. A class that only a resample has
            missed is left out: as 0 it would pull the interval down.

    Returns:
        accuracy; balanced_accuracy, the mean recall of the classes that have images (chance 1/K);
        macro_precision, macro_recall and macro_f1, where what is undefined counts as 0; auroc, the
        mean over the classes that have one (chance 0.5), NaN without any.
    """
    each = class_scores(labels, probs)
    counted = ~np.isnan(each["f1"]) | absent  # (K,) bool
    overall = {"accuracy": np.mean(probs.argmax(axis=1) == labels)}
    overall["balanced_accuracy"] = each["recall"][each["support"] > 0].mean()
    for name in ("precision", "recall", "f1"):
        overall[f"macro_{name}"] = np.nan_to_num(each[name])[counted].mean()
    areas = each["auroc"][~np.isnan(each["auroc"])]
    overall["auroc"] = areas.mean() if len(areas) else np.nan
    return overall


# ---------------------------------------------------------------------------------------------
# Intervals
# ---------------------------------------------------------------------------------------------


def resamples(groups: Array) -> Iterator[Array]:
    """Draw G of the G groups with replacement, 2,000 times (Field and Welsh 2007).

    Yields:
        The rows of a resample; an image is in it as often as its group was drawn. Of a single group
        there is no resample: it has no spread to show.
    """
    names, member = np.unique(groups, return_inverse=True)  # member: (N,) in [0, G)
    rng, G = np.random.default_rng(0), len(names)
    for _ in range(RESAMPLES if G > 1 else 0):
        drawn = np.bincount(rng.integers(G, size=G), minlength=G)  # (G,), how often each
        yield np.repeat(np.arange(len(groups)), drawn[member])


def percentile_interval(values: Sequence[float]) -> list[float] | None:
    """The middle 95 % of what resamples scored (Efron 1979); None where none could be scored."""
    scored = np.array(values)[~np.isnan(values)]
    return np.quantile(scored, [0.025, 0.975]).tolist() if len(scored) else None


def mean_interval(values: Array, groups: Array) -> list[float] | None:
    """95 % interval of the mean of `values` (N,), over resampled groups; None for a single group.

    For a paired difference, `values` are the differences image by image.
    """
    return percentile_interval([values[rows].mean() for rows in resamples(groups)])


def group_bootstrap(labels: Array, probs: Array, groups: Array) -> dict[str, list[float] | None]:
    """95 % intervals of SCORES, by name: [low, high], or None for what cannot be scored.

    Args:
        labels, probs: as in `scores`.
        groups: (N,) int, what is independent: the patient. Of a single one all are None.
    """
    absent = ~np.isin(np.arange(probs.shape[1]), np.append(labels, probs.argmax(axis=1)))  # (K,)
    drawn = [scores(labels[rows], probs[rows], absent) for rows in resamples(groups)]
    intervals = {}
    for name in SCORES:
        intervals[name] = percentile_interval([one[name] for one in drawn])
    return intervals


# ---------------------------------------------------------------------------------------------
# Calibration
# ---------------------------------------------------------------------------------------------


def reliability(labels: Array, probs: Array) -> tuple[Array, Array, Array]:
    """Confidence and accuracy in each of 15 equal bins (low, high] of the top probability.

    Returns:
        count, mean top probability, accuracy: (15,) each; an empty bin has 0 in all.
    """
    top, correct = probs.max(axis=1), probs.argmax(axis=1) == labels  # (N,), (N,) bool
    bins = np.clip(np.ceil(top * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)  # (N,)
    count = np.bincount(bins, minlength=ECE_BINS)
    confidence = np.bincount(bins, top, ECE_BINS) / np.maximum(count, 1)
    accuracy = np.bincount(bins, correct, ECE_BINS) / np.maximum(count, 1)
    return count, confidence, accuracy


def calibration_error(labels: Array, probs: Array) -> float:
    """How far confidence is from accuracy (1706.04599, Eq. 3).

    Returns:
        In [0, 1]; 0 is best. 100 images, all predicted correctly at probability 0.8, score 0.2.
    """
    count, confidence, accuracy = reliability(labels, probs)
    return float(np.average(np.abs(accuracy - confidence), weights=count))


def negative_log_likelihood(labels: Array, probs: Array) -> float:
    """Mean -log p(true class) in nats; 0 is best, log K is a uniform guess."""
    true_class = probs[np.arange(len(labels)), labels]  # (N,)
    return float(-np.log(np.maximum(true_class, TINY)).mean())


def with_temperature(probs: Array, temperature: float) -> Array:
    """(N, K) softmax(logits / temperature): above 1 it is less confident in the same answers."""
    powers = np.maximum(probs, TINY) ** (1 / temperature)  # (N, K)
    return powers / powers.sum(axis=1, keepdims=True)


def fit_temperature(labels: Array, probs: Array) -> float:
    """The temperature at which confidence fits accuracy best (1706.04599, §4.2).

    Args:
        labels, probs: of the val images, never of the test images.

    Returns:
        That of the least negative log-likelihood, in [0.05, 20], to 1 %; 1.0 below 200 images.
    """
    if len(labels) < MIN_VAL:
        return 1.0
    candidates = np.geomspace(0.05, 20, 600)
    losses = [negative_log_likelihood(labels, with_temperature(probs, t)) for t in candidates]
    return float(candidates[np.argmin(losses)])


# ---------------------------------------------------------------------------------------------
# All that is measured on one test set
# ---------------------------------------------------------------------------------------------


def plain(value: np.generic) -> float | None:
    """A number that JSON can hold: NaN (nothing to score) becomes None."""
    return None if np.isnan(value) else value.item()


def classification_metrics(labels: Array, probs: Array, classes=None, groups=None) -> dict:
    """Every metric of one set of predictions; the definitions stand at the top of this file.

    Args:
        labels: (N,) int64 in [0, K), N >= 1.
        probs: (N, K) float, rows sum to 1.
        classes: K names for `per_class`; None = "0", "1", ...
        groups: (N,) int, for n_groups and ci95 (what `group_bootstrap` returns); None = without.

    Returns:
        n; majority_accuracy, of always answering the commonest class; what `scores` returns; ece,
        nll; confusion_matrix (rows = true class); per_class {name: what `class_scores` returns}.
        None stands for what cannot be scored, such as the AUROC where one class alone is present.

    Raises:
        ValueError: shapes do not fit, a row is no distribution, or a label is outside [0, K).

    Equal probabilities for K classes have AUROC 0.5 and NLL log K, and predict class 0 for all.
    """
    labels, probs = np.asarray(labels, np.int64), np.asarray(probs, np.float64)
    fits = probs.ndim == 2 and labels.shape == probs.shape[:1] and len(labels) > 0
    if not fits or probs.min() < 0 or not np.allclose(probs.sum(axis=1), 1, atol=1e-3):
        raise ValueError(f"expected probs (N, K), rows sum to 1; got {labels.shape}, {probs.shape}")
    each, K = class_scores(labels, probs), probs.shape[1]
    metrics = {"n": len(labels), "majority_accuracy": plain(each["support"].max() / len(labels))}
    for name, value in scores(labels, probs).items():
        metrics[name] = plain(value)
    metrics["ece"] = calibration_error(labels, probs)
    metrics["nll"] = negative_log_likelihood(labels, probs)
    metrics["confusion_matrix"] = confusion_matrix(labels, probs.argmax(axis=1), K).tolist()
    metrics["per_class"] = {}
    for k, name in enumerate(classes or range(K)):
        metrics["per_class"][str(name)] = {key: plain(values[k]) for key, values in each.items()}
    if groups is not None:
        metrics["n_groups"] = len(np.unique(groups))
        metrics["ci95"] = group_bootstrap(labels, probs, groups)
    return metrics


def group_answers(labels: Array, probs: Array, groups: Array) -> tuple[Array, Array]:
    """One answer for each group: the mean probability of its images.

    Returns:
        labels (g,) and probabilities (g, K) of the groups whose images share one label. The others
        have no answer: a patient with multiple sclerosis has slices with and without a lesion.
    """
    _, member, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    images, means = np.zeros((2, len(sizes), probs.shape[1]))  # (G, K) each
    np.add.at(images, (member, labels), 1)  # how many images of a group have which label
    np.add.at(means, member, probs / sizes[member, None])
    agreed = np.count_nonzero(images, axis=1) == 1  # (G,) bool, True = one label
    return images[agreed].argmax(axis=1), means[agreed]


@dataclass(frozen=True)
class TestSet:
    """What a classifier is tested on: parallel arrays over N images of K classes."""

    task: str
    classes: Sequence[str]
    paths: Sequence[str]
    labels: Array  # (N,) int64 in [0, K)
    groups: Array  # (N,) int, the patient where he is known

    def measure(self, probs: Array, temperature: float = 1.0) -> dict:
        """All that is reported of probabilities (N, K), as metrics.json has it.

        Returns:
            task, classes; what `classification_metrics` returns; per_group, the same of
            `group_answers`, None without any; temperature, and ece_scaled and nll_scaled at it.
        """
        metrics = {"task": self.task, "classes": list(self.classes), "per_group": None}
        metrics |= classification_metrics(self.labels, probs, self.classes, self.groups)
        labels, means = group_answers(self.labels, probs, self.groups)
        if len(labels):
            own = np.arange(len(labels))  # (g,), each answer is a group of its own
            metrics["per_group"] = classification_metrics(labels, means, self.classes, own)
        scaled = with_temperature(probs, temperature)
        metrics["temperature"] = temperature
        metrics["ece_scaled"] = calibration_error(self.labels, scaled)
        metrics["nll_scaled"] = negative_log_likelihood(self.labels, scaled)
        return metrics


# ---------------------------------------------------------------------------------------------
# Nearest neighbours: two ways to score without training
# ---------------------------------------------------------------------------------------------


def unit_rows(features: Array) -> Array:
    """(n, E) scaled to length 1; a row of zeros stays."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def nearest_neighbours(train: Array, labels: Array, queries: Array, num_classes: int) -> Array:
    """What the 20 nearest training images say of each query (Wu et al., 1805.01978, §3.4).

    A neighbour's vote weighs exp(cosine / 0.07). Memory: at most two copies of both and 120 MB.

    Args:
        train, labels: (n, E) float features and (n,) int64 in [0, K).
        queries: (m, E) float features.

    Returns:
        (m, K) shares of the vote, rows sum to 1.
    """
    train, queries = unit_rows(train), unit_rows(queries)
    votes, k = np.zeros((len(queries), num_classes)), min(NEIGHBOURS, len(train))
    for rows in np.array_split(np.arange(len(queries)), 1 + len(queries) * len(train) // BLOCK):
        cosine = queries[rows] @ train.T  # (block, n)
        nearest = np.argpartition(-cosine, k - 1, axis=1)[:, :k]  # (block, k)
        weights = np.exp((np.take_along_axis(cosine, nearest, axis=1) - 1) / KNN_TEMPERATURE)
        np.add.at(votes, (rows[:, None], labels[nearest]), weights)
    return votes / votes.sum(axis=1, keepdims=True)


def leak_meter(thumbnails: Array, labels: Array, groups: Array) -> dict:
    """What a classifier that has learned nothing scores by recognising whom it has seen.

    It answers with the label of the nearest neighbour, by cosine on 32x32 pixels: once among all
    other images, and once among those of other groups. A slice of the same brain is mostly nearer
    than any other with the same disease; so among all others it is correct without knowing what
    the disease looks like.

    Args:
        thumbnails: (N, 32, 32) uint8.
        labels, groups: (N,) int64.

    Returns:
        "by image", "by group": accuracies, of at most 10,000 images, None where nobody else could
        answer; "commonest": that of always answering the commonest class; "ci95": their intervals.
        Memory: at most 12 KB an image and 60 MB.
    """
    N = len(labels)
    pixels = thumbnails.reshape(N, -1).astype(np.float32)
    pixels = unit_rows(pixels - pixels.mean(axis=1, keepdims=True))  # (N, 1024)
    queries = np.random.default_rng(0).permutation(N)[:LEAK_QUERIES]
    meter = {"commonest": np.bincount(labels).max() / N, "ci95": {"commonest": None}}
    for name, own in {"by image": np.arange(N), "by group": groups}.items():
        correct = np.full(N, np.nan)
        for rows in np.array_split(queries, 1 + len(queries) * N // BLOCK):
            others = own[rows, None] != own  # (block, N) bool, True = may answer
            nearest = np.where(others, pixels[rows] @ pixels.T, -np.inf).argmax(axis=1)
            correct[rows] = np.where(others.any(axis=1), labels[nearest] == labels[rows], np.nan)
        scored = ~np.isnan(correct)
        meter[name] = correct[scored].mean() if scored.any() else None
        meter["ci95"][name] = mean_interval(correct[scored], groups[scored])
    return meter


# ---------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------

FEW_GROUPS = """Below 20 groups these intervals are too narrow: of 2, 3, 5, 8 and 13 groups, 50, 73,
82, 88 and 91 % held the truth in simulations. From one group nothing follows for other patients."""


def markdown(text: str) -> str:
    """Text as GitHub shows it, whatever it holds: |, <b> or a line break becomes an entity."""
    return "".join(c if c.isalnum() or c in " -_.,:;/()%+=" else f"&#{ord(c)};" for c in text)


def number(value: float | None, interval: list[float] | None = None) -> str:
    """A score as the report prints it: 0.828 [0.802, 0.855], 0.828, or n/a."""
    ends = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    return "n/a" if value is None else f"{value:.3f}{ends}"


def score_table(what: str, results: dict[str, dict], columns: Sequence[str]) -> str:
    """A markdown table that is aligned on a terminal, too.

    Args:
        what: title of the first column, the names of the rows.
        results: the scores of each row and, where there are any, their "ci95".
        columns: keys of the scores.
    """
    titles = [key.replace("_", " ").replace("recall", "sensitivity") for key in columns]
    rows = [[what, *titles], ["---" for _ in [what, *titles]]]
    for name, row in results.items():
        intervals = row.get("ci95", {})
        rows.append([markdown(name), *(number(row[key], intervals.get(key)) for key in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(map(str.ljust, row, widths)) for row in rows]
    return "| " + " |\n| ".join(lines) + " |"


def table(rows: list[list[str]]) -> str:
    """Cells as a markdown table, which is aligned on a terminal, too.

    Args:
        rows: of equally many cells each; the first has the headings. The first column is set left,
            the others right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in [rows[0], *rows]:
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        lines.append("| " + " | ".join(cells) + " |")
    rules = ["-" * (widths[0] + 2), *["-" * (width + 1) + ":" for width in widths[1:]]]
    lines[1] = "|" + "|".join(rules) + "|"
    return "\n".join(lines)


def report(title: str, results: dict, val_size: int | None, notes: dict, figures: list) -> str:
    """report.md, the one text of a run: its scores, its model card, and what the terminal prints.

    Args:
        title: task, encoder and date.
        results: `TestSet.measure` by name of its row; the result first, then its baselines.
        val_size: how many images chose the epoch and the temperature; None = it was done elsewhere.
        notes: how the split was made and what was dropped (Task.notes).
        figures: names of the image files beside it.
    """
    metrics = next(iter(results.values()))
    patients = {name: row["per_group"] for name, row in results.items() if row["per_group"]}
    classes = {f"{name} ({row['support']})": row for name, row in metrics["per_class"].items()}
    split = "; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in notes.items())
    no_val = "No image was in val: nothing has chosen the epoch. " if val_size == 0 else ""
    few = FEW_GROUPS if metrics["n_groups"] < 20 else ""
    scaled = (
        f"{metrics['ece_scaled']:.3f} after temperature scaling by {metrics['temperature']:.2f}"
    )
    if metrics["temperature"] == 1:
        scaled = "it is not scaled, for want of 200 val images"
    return f"""# {markdown(title)}

{metrics["n"]:,} test images of {metrics["n_groups"]:,} groups; 95 % intervals by resampling groups.
Always answering the commonest class would score an accuracy of {metrics["majority_accuracy"]:.3f}.

{score_table("per image", results, SCORES)}

By patient, or by group where the patient is unknown: the mean probability of a group's images,
where they share one label.

{score_table("per patient", patients, SCORES)}

{score_table("class (test images)", classes, ["recall", "specificity", "precision", "f1", "auroc"])}

Confidence is {metrics["ece"]:.3f} away from accuracy on average; {scaled}.

{" ".join(f"![{name}]({name})" for name in figures)}

Held out and dropped: {markdown(split)}.

For research, not for diagnosis.
{no_val}{few}
"""


# ---------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------

WIDTH, TEXT = 900, 22  # pixels; at two pixels a point, 450 and 11 points
INK, MUTED, FAINT, PAPER = "#1f2937", "#6b7280", "#d1d5db", "#ffffff"
COLORS = "#1d4ed8 #c2410c #047857 #7e22ce #b91c1c #0e7490 #a16207 #be185d #4d7c0f #475569".split()
DASHES = [("", points, MUTED, 2) for points in np.linspace((0, 0), (1, 1), 42).reshape(21, 2, 2)]


def drawable(name: str, columns: int = 30) -> str:
    """A name in letters that Pillow's own font has, at most `columns` to a line.

    Accents are taken off, and what is no letter of ours then is escaped: 脑 becomes \\u8111.
    """
    letters = [c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c)]
    return textwrap.fill("".join(letters).encode("unicode_escape").decode(), columns)


def write(draw: ImageDraw.ImageDraw, at, text: str, color=INK, anchor="la", size=TEXT) -> None:
    """Set text at (x, y).

    Args:
        anchor: which point of the text that is, in Pillow's letters: l, m or r, then a, m or s.
    """
    align = {"l": "left", "m": "center", "r": "right"}[anchor[0]]
    draw.text(at, text, color, ImageFont.load_default(size), anchor, align=align)


def canvas(width: float, height: float, title: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A white page with its title."""
    image = Image.new("RGB", (int(width), int(height)), PAPER)
    write(ImageDraw.Draw(image), (40, 28), drawable(title, 200), size=30)
    return image, ImageDraw.Draw(image)


def confusion_figure(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Image.Image:
    """confusion.png: counts, and each row's shares as the depth of the blue.

    A column that is narrower than the names has the number that its class has in the rows.
    """
    counts, K = np.array(matrix), len(classes)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # (K, K), rows sum to 1
    names = [f"{k}  {drawable(name)}" for k, name in enumerate(classes, 1)]
    left = 70 + max(map(ImageFont.load_default(TEXT).getlength, "\n".join(names).splitlines()))
    wide = max(76, (WIDTH - 30 - left) / K)
    tall = max(76, *(30 * len(name.splitlines()) for name in names))
    image, draw = canvas(left + wide * K + 30, 190 + tall * K, "Confusion matrix")
    write(draw, (left + wide * K, 86), "predicted class (rows: true class)", MUTED, "ra")
    for k, name in enumerate(names):
        write(draw, (left - 16, 160 + tall * (k + 0.5)), name, anchor="rm")
        column = name if left < wide + 70 else str(k + 1)
        write(draw, (left + wide * (k + 0.5), 138), column, anchor="mm")
    for t, p in np.ndindex(K, K):
        x, y = left + wide * p, 160 + tall * t
        blue = tuple(int(255 - shares[t, p] * (255 - full)) for full in (96, 165, 250))
        draw.rectangle((x, y, x + wide - 4, y + tall - 4), blue)
        middle = (x + wide / 2, y + tall / 2)
        write(draw, middle, f"{counts[t, p]}\n{shares[t, p]:.0%}", anchor="mm")
    return image


def chart(title: str, marks: list[tuple], x_label: str, y_label: str, x_names=None) -> Image.Image:
    """Draw marks between two axes, with a legend above them.

    Args:
        marks: (name in the legend or '', points, color, size): a line through the points, `size`
            wide; of one point, a dot of that radius. A wide line from 0 is a bar.
        x_names: {x: name}, in place of numbers on the x axis.
    """
    points = np.concatenate([np.reshape(values, (-1, 2)) for _, values, _, _ in marks])
    low, high = np.floor(points.min(axis=0, initial=0)), np.ceil(points.max(axis=0, initial=1))
    image, draw = canvas(WIDTH, 4000, title)
    top = 84
    for name, _, color, _ in marks:
        write(draw, (110, top), drawable(name, 60), color)
        top += 30 * len(drawable(name, 60).splitlines())
    write(draw, (110, top + 10), y_label, MUTED)
    corner, size = np.array((110, top + 580)), np.array((750, -530))  # y runs down on the page
    for y in np.linspace(low[1], high[1], 5):
        spot = corner + (0, (y - low[1]) / (high[1] - low[1]) * size[1])
        draw.line((*spot, spot[0] + size[0], spot[1]), FAINT, 2)
        write(draw, spot - (14, 0), f"{y:.3g}", MUTED, "rm")
    for x, name in (x_names or {x: f"{x:.3g}" for x in np.linspace(low[0], high[0], 5)}).items():
        spot = corner + ((x - low[0]) / (high[0] - low[0]) * size[0], 14)
        write(draw, spot, name, MUTED, "ma")
    write(draw, corner + (750, 80), x_label, MUTED, "ra")
    for _, values, color, width in marks:
        spots = corner + (np.reshape(values, (-1, 2)) - low) / (high - low) * size  # (m, 2) pixels
        if len(spots) == 1:
            draw.ellipse((*(spots[0] - width), *(spots[0] + width)), color, PAPER)
        elif len(spots):
            draw.line([tuple(spot) for spot in spots], color, width, joint="curve")
    return image.crop((0, 0, WIDTH, int(corner[1]) + 124))


def roc_curve(ranks: Array, positive: Array) -> Array:
    """The curve whose area is the AUROC: (m, 2), 1 - specificity and sensitivity by threshold."""
    thresholds, shares = np.append(np.unique(ranks), np.inf), []
    for side in (ranks[~positive], ranks[positive]):
        shares.append(1 - np.searchsorted(np.sort(side), thresholds) / len(side))
    return np.column_stack(shares)


def roc_figure(test: TestSet, probs: Array) -> Image.Image:
    """roc.png: each class against the others; of two classes one curve says all."""
    marks, ranks = [("dashed: chance", [], MUTED, 2), *DASHES], class_ranks(probs)
    for k in range(1 if len(test.classes) == 2 else 0, len(test.classes)):
        positive = test.labels == k
        if 0 < positive.sum() < len(positive):
            name = f"{test.classes[k]}: AUROC {auroc(ranks[:, k], positive):.3f}"
            marks.append((name, roc_curve(ranks[:, k], positive), COLORS[k % len(COLORS)], 4))
    return chart("ROC, each class against the others", marks, "1 - specificity", "sensitivity")


def reliability_figure(labels: Array, answers: dict[str, Array]) -> Image.Image:
    """reliability.png: a dot for each bin, its area by the images in it, faint below 10.

    Args:
        answers: (N, K) probabilities by name, such as before and after temperature scaling.
    """
    marks = [("dashed: as accurate as confident", [], MUTED, 2), *DASHES]
    for color, (name, probs) in zip(COLORS, answers.items(), strict=False):
        error = calibration_error(labels, probs)
        marks.append((f"{name}: calibration error {error:.3f}", [], color, 2))
        for count, confidence, accuracy in zip(*reliability(labels, probs), strict=True):
            if count:
                radius = 4 + 40 * np.sqrt(count / len(labels))
                shade = color if count >= 10 else FAINT
                marks.append(("", [(confidence, accuracy)], shade, radius))
    return chart("Is it as accurate as it is confident?", marks, "confidence", "accuracy")


def curve_figure(title: str, records: list[dict], names: dict, chosen=None) -> Image.Image:
    """curve.png: what was recorded over the epochs.

    Args:
        records: a dict for each epoch, with "epoch"; what one lacks, or is None, is not drawn.
        names: {key of a record: its name in the legend}.
        chosen: the epoch whose network was kept, marked by dots.
    """
    marks = [("dots: the chosen epoch" if chosen else "", [], MUTED, 0)]
    for color, (key, name) in zip(COLORS, names.items(), strict=False):
        points = [(r["epoch"], r[key]) for r in records if r.get(key) is not None]
        marks.append((name, points, color, 4))
        marks.append(("", [point for point in points if point[0] == chosen], color, 12))
    epochs = np.linspace(1, len(records), 5).round()
    return chart(title, marks, "epoch", "", {epoch: f"{epoch:.0f}" for epoch in epochs})


def leak_figure(meter: dict) -> Image.Image:
    """leak.png: a bar for each row of the leak meter, with its interval."""
    marks, names = [], {}
    for x, name in zip((0.5, 1.5, 2.5), ("by image", "by group", "commonest"), strict=True):
        names[x] = f"{name}\n{number(meter[name], meter['ci95'][name])}"
        marks.append(("", [(x, 0), (x, meter[name] or 0)], COLORS[int(x)], 120))
        marks.append(("", [(x, end) for end in meter["ci95"][name] or []], INK, 4))
    return chart("The nearest neighbour on 32x32 pixels", marks, "", "accuracy", names)


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def harmless(cell: object) -> object:
    """A cell of a table; ./ before a text that a spreadsheet would compute, such as =1+1.png."""
    if not isinstance(cell, str) or re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", cell):
        return cell
    return f"./{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def as_bytes(name: str, value: object) -> bytes:
    """The contents of a file.

    Args:
        name: its ending says what `value` is: .png an image, .npz arrays by name, .csv rows, .jsonl
            records, .json a plain value; a text else.
    """
    file, text = io.BytesIO(), io.StringIO()
    if name.endswith(".png"):
        value.save(file, "PNG")
    elif name.endswith(".npz"):
        np.savez(file, **value)
    elif name.endswith(".csv"):  # every text quoted, or a carriage return would end its row
        table = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        for row in value:
            table.writerow([harmless(cell) for cell in row])
    elif name.endswith(".jsonl"):
        text.writelines(json.dumps(record) + "\n" for record in value)
    else:
        text.write(json.dumps(value, indent=2) + "\n" if name.endswith(".json") else value)
    return file.getvalue() + text.getvalue().encode("utf8", "surrogateescape")


def prediction_table(paths, probs: Array, classes: Sequence[str], test: TestSet | None = None):
    """predictions.csv, header first: path, (of a test: group, label,) prediction, p_<class>...

    Args:
        probs: (N, K), written with 9 significant digits.
        test: whose groups and labels stand beside the paths; None = they are unknown.
    """
    columns = {"path": paths}
    if test:
        columns |= {"group": test.groups, "label": [classes[k] for k in test.labels]}
    columns["prediction"] = [classes[k] for k in probs.argmax(axis=1)]
    for k, name in enumerate(classes):
        columns[f"p_{name}"] = [float(f"{p:.9g}") for p in probs[:, k]]
    return [list(columns), *zip(*columns.values(), strict=True)]


# ---------------------------------------------------------------------------------------------
# A comparison
# ---------------------------------------------------------------------------------------------

# probe: the cosine MLP; untrained: the same on an untrained encoder; scratch: from random weights.
METHODS = ("probe", "linear", "finetune", "scratch", "untrained", "knn")
COLUMNS = ("method", "fraction", "seed", "groups", "images", "parameters", "seconds", "lr")


def compare_methods(fits: list[dict], test: TestSet) -> dict[str, dict]:
    """The accuracy of each method on one share of the labels, as `score_table` takes it.

    Args:
        fits: those of one share; several of a method, one for each seed, are averaged.

    Returns:
        {method: {"accuracy", "minus scratch", "ci95"}}. The difference is taken image by image: its
        interval is narrower than those of the two accuracies.
    """
    correct, rows = {}, {}
    for method in METHODS:
        probs = [fit["probs"] for fit in fits if fit["method"] == method]  # (seeds, N, K)
        correct[method] = (np.argmax(probs, axis=2) == test.labels).mean(axis=0)  # (N,)
    for method in METHODS:
        rows[method] = {"ci95": {}}
        gain = correct[method] - correct["scratch"]  # (N,)
        for key, values in {"accuracy": correct[method], "minus scratch": gain}.items():
            rows[method][key] = values.mean()
            rows[method]["ci95"][key] = mean_interval(values, test.groups)
    return rows


def verdict(share: str, rows: dict[str, dict]) -> str:
    """Which method wins on a share of the labels, and whether that can be chance."""
    best = max(rows, key=lambda method: rows[method]["accuracy"])
    gain, interval = rows[best]["minus scratch"], rows[best]["ci95"]["minus scratch"]
    doubt = "the interval excludes 0" if interval and interval[0] > 0 else "it may be chance"
    if best == "scratch":
        return f"With {share} of the labels scratch wins."
    return (
        f"With {share} of the labels {best} wins, {number(gain, interval)} over scratch: {doubt}."
    )


def compare_files(fits: list[dict], test: TestSet, title: str, about: str) -> dict[str, object]:
    """The files of a comparison: table.csv, a row for each fit; table.md; label_efficiency.png.

    Args:
        fits: COLUMNS and probs, (N, K) of the test images; of all METHODS at each fraction.
        about: sentences on data, split and settings; they stand below the table.
    """
    table = [[*COLUMNS, *SCORES]]
    for fit in fits:
        metrics = classification_metrics(test.labels, fit["probs"])
        table.append([fit[key] for key in COLUMNS] + [metrics[key] for key in SCORES])
    rows, x_names, sentences, marks = {}, {}, [], []
    for x, fraction in enumerate(sorted({fit["fraction"] for fit in fits})):
        mine = [fit for fit in fits if fit["fraction"] == fraction]
        share, found = f"{100 * fraction:g} %", compare_methods(mine, test)
        sentences.append(verdict(share, found))
        x_names[x + 0.5] = f"{share}\n{np.mean([fit['images'] for fit in mine]):.0f} images"
        for k, (method, row) in enumerate(found.items()):
            rows[f"{share}, {method}"] = row
            spot = x + 0.25 + 0.1 * k  # beside each other, so that no interval hides another
            marks.append(("" if x else method, [(spot, row["accuracy"])], COLORS[k], 8))
            marks.append(("", [(spot, end) for end in row["ci95"]["accuracy"] or []], COLORS[k], 4))
    few = FEW_GROUPS if len(np.unique(test.groups)) < 20 else ""
    text = f"""# {markdown(title)}

{score_table("labels, method", rows, ["accuracy", "minus scratch"])}

{" ".join(sentences)} {about} {few}

![label_efficiency.png](label_efficiency.png)
"""
    figure = chart("What labels are worth", marks, "labelled training images", "accuracy", x_names)
    return {"table.csv": table, "table.md": text, "label_efficiency.png": figure}
