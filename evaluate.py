"""Say how good a classifier is: every metric by hand, with the interval that belongs to it.

Labels and probabilities go in; numbers, a report and figures come out. A score beside nothing means
nothing, so each has an interval, and the report sets it beside baselines. The interval comes from
drawing *groups* (patients) again, not images: forty slices of one brain are not forty independent
answers. And the leak meter says what recognising people alone would score, if images of one person
were on both sides of the split.

    C[t, p] = number of images of class t that were predicted p              (confusion matrix)
    precision_k = C[k, k] / sum_t C[t, k]        recall_k = C[k, k] / sum_p C[k, p]
    specificity_k = sum_{t != k, p != k} C[t, p] / sum_{t != k} sum_p C[t, p]
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
NEIGHBOURS = 20  # of Wu et al. 200, see "Departures"
KNN_TEMPERATURE = 0.07  # of Wu et al.
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

    Of two classes it is the log-odds, so that both have the same AUROC even where a probability
    rounds to 1.
    """
    logits = np.log(np.maximum(probs, TINY))
    return logits - logits[:, ::-1] if probs.shape[1] == 2 else logits


def class_scores(labels: Array, probs: Array) -> dict[str, Array]:
    """Support, recall, specificity, precision, f1 and auroc of each class, (K,) each.

    Higher is better; NaN is what these images cannot say, such as the recall of an absent class.
    """
    C = confusion_matrix(labels, probs.argmax(axis=1), probs.shape[1])
    areas = [auroc(ranks, labels == k) for k, ranks in enumerate(class_ranks(probs).T)]
    hits, support, predicted = np.diag(C), C.sum(axis=1), C.sum(axis=0)  # (K,) each
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
        return {
            "support": support,
            "recall": hits / support,
            "specificity": 1 - (predicted - hits) / (len(labels) - support),
            "precision": hits / predicted,
            "f1": 2 * hits / (support + predicted),
            "auroc": np.array(areas),
        }


def scores(labels: Array, probs: Array, count_missing: Array | bool = True) -> dict[str, float]:
    """The scores of some images, over all classes; higher is better.

    Args:
        labels: (N,) int64 in [0, K), N >= 1.
        probs: (N, K) rows sum to 1.
        count_missing: (K,) bool or one for all. A class is missing if no image has it or is
            predicted it. True = in the macro averages it then counts as 0, as in a whole test set.
            False = it is left out: if a resample alone has missed it, a 0 would pull an interval
            down.

    Returns:
        accuracy; balanced_accuracy, the mean recall of the classes that have images (chance 1/K);
        macro_precision, macro_recall and macro_f1, where what is undefined counts as 0; auroc, the
        mean over the classes that have one (chance 0.5), NaN without any.
    """
    each = class_scores(labels, probs)
    counted = ~np.isnan(each["f1"]) | count_missing  # (K,) bool
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
    missing = np.isnan(class_scores(labels, probs)["f1"])  # (K,) bool, in all images
    drawn = [scores(labels[rows], probs[rows], missing) for rows in resamples(groups)]
    intervals = {}
    for name in SCORES:
        intervals[name] = percentile_interval([resample[name] for resample in drawn])
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


def plain(values: dict[str, np.generic]) -> dict[str, float | None]:
    """Numbers that JSON can hold: NaN (nothing to score) becomes None."""
    return {name: None if np.isnan(value) else value.item() for name, value in values.items()}


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
    preds = probs.argmax(axis=1)  # (N,)
    metrics = {"n": len(labels), "majority_accuracy": np.bincount(labels).max() / len(labels)}
    metrics |= plain(scores(labels, probs))
    metrics["ece"] = calibration_error(labels, probs)
    metrics["nll"] = negative_log_likelihood(labels, probs)
    metrics["confusion_matrix"] = confusion_matrix(labels, preds, probs.shape[1]).tolist()
    metrics["per_class"] = {}
    each = class_scores(labels, probs)
    for k, name in enumerate(classes or range(probs.shape[1])):
        metrics["per_class"][str(name)] = plain({key: values[k] for key, values in each.items()})
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
    images = np.zeros((len(sizes), probs.shape[1]))  # (G, K)
    np.add.at(images, (member, labels), 1)  # how many images of a group have which label
    means = np.zeros_like(images)  # (G, K)
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
    k = min(NEIGHBOURS, len(train))
    votes = np.zeros((len(queries), num_classes))
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
        correct = []
        for rows in np.array_split(queries, 1 + len(queries) * N // BLOCK):
            cosine = pixels[rows] @ pixels.T  # (block, N)
            cosine[own[rows, None] == own] = -np.inf  # these may not answer
            correct.extend(labels[cosine.argmax(axis=1)] == labels[rows])
        meter[name] = np.mean(correct) if len(np.unique(own)) > 1 else None  # nobody else
        meter["ci95"][name] = mean_interval(np.array(correct), groups[queries])
    return meter


# ---------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------

FEW_GROUPS = """Below 20 groups these intervals are too narrow: of 2, 3, 5, 8 and 13 groups, 50, 73,
82, 88 and 91 % held the truth in simulations. From one group nothing follows for other patients."""


def markdown(text: str) -> str:
    """Text as GitHub shows it, whatever it holds: |, <b> or a line break becomes an entity."""
    return "".join(c if c.isalnum() or c in " -_.,:;/()%+='" else f"&#{ord(c)};" for c in text)


def number(value: float | None, interval: list[float] | None = None) -> str:
    """A score as the report prints it: 0.828 [0.802, 0.855], 0.828, or n/a."""
    ends = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    return "n/a" if value is None else f"{value:.3f}{ends}"


def table(rows: list[list[str]]) -> str:
    """A markdown table that is aligned on a terminal, too: the first column left, others right.

    Args:
        rows: cells as they are printed; the first row holds the headings.

    >>> print(table([["split", "images"], ["train", "1,200"]]))
    | split | images |
    | ----- | -----: |
    | train |  1,200 |
    """
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for first, *others in [rows[0], rule, *rows[1:]]:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def score_table(what: str, results: dict[str, dict], columns: Sequence[str]) -> str:
    """Scores with their intervals, as `table` prints them.

    Args:
        what: heading of the first column, the names of the rows.
        results: the scores of each row and, where there are any, their "ci95".
        columns: keys of the scores.
    """
    headings = [key.replace("_", " ").replace("recall", "sensitivity") for key in columns]
    rows = [[what, *headings]]
    for name, row in results.items():
        intervals = row.get("ci95", {})
        rows.append([markdown(name), *(number(row[key], intervals.get(key)) for key in columns)])
    return table(rows)


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
    reasons = [f"{n:,} {key[8:]}" for key, n in notes.items() if key.startswith("dropped_")]
    no_val = "No image was in val: nothing has chosen the epoch. " if val_size == 0 else ""
    few = FEW_GROUPS if metrics["n_groups"] < 20 else ""
    return f"""# {markdown(title)}

{metrics["n"]:,} test images of {metrics["n_groups"]:,} groups; 95 % intervals by resampling groups.
Always answering the commonest class would score an accuracy of {metrics["majority_accuracy"]:.3f}.

{score_table("per image", results, SCORES)}

By patient, or by group where the patient is unknown: the mean probability of a group's images,
where they share one label.

{score_table("per patient or group", patients, SCORES)}

{score_table("class (test images)", classes, ["recall", "specificity", "precision", "f1", "auroc"])}

Confidence is {metrics["ece"]:.3f} away from accuracy on average, and {metrics["ece_scaled"]:.3f}
after temperature scaling by {metrics["temperature"]:.2f} (1 = not scaled, below 200 val images).

{" ".join(f"![{name}]({name})" for name in figures)}

The test images were held out by this rule: {markdown(notes["rule"])}. Of the task's images
{notes["dropped"]:,} were dropped, among them {" and ".join(reasons).replace("_", " ")}.

For research, not for diagnosis.
{no_val}{few}
"""


# ---------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------

WIDTH = 900  # pixels of a figure; at two pixels a point, 450 points
FONT = ImageFont.load_default(22)  # 11 points
INK, MUTED, FAINT = "#1f2937", "#6b7280", "#d1d5db"
BLUE = (96, 165, 250)  # of cells and bars; INK is readable on it
# The dashed line of `chart` that curves are compared with.
DASHES = [("", MUTED, 2, [(x, x), (x + 0.025, x + 0.025)]) for x in np.arange(0, 1, 0.05)]
COLORS = "#1d4ed8 #c2410c #047857 #7e22ce #b91c1c #0e7490 #a16207 #be185d #4d7c0f #475569".split()


def drawable(name: str) -> str:
    """A name in letters that Pillow's own font has.

    Accents are taken off, and what is no letter of ours then is escaped: 脑 becomes \\u8111.
    """
    letters = [c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c)]
    return "".join(letters).encode("unicode_escape").decode()


def five_numbers(end: float) -> dict[float, str]:
    """What stands beside an axis from 0 to its end."""
    return {place: f"{place:.3g}" for place in np.linspace(0, end, 5)}


def chart(title, x_label, y_label, lines, dots=(), texts=(), x_names=None, y_names=None):
    """Draw between two axes, which begin at 0 and end at 1 or above; the legend stands below.

    Args:
        lines: (name, color, width in pixels, points); a wide one is a bar, one without points
            stands in the legend alone, and one whose name is '' does not.
        dots: (x, y, color, radius in pixels).
        texts: (x, y, text), centered.
        x_names, y_names: {place: name} beside an axis; None = five numbers.
    """
    spots = [(1, 1), *(dot[:2] for dot in dots)]
    for _, _, _, points in lines:
        spots.extend(points)
    x_max, y_max = np.ceil(np.max(spots, axis=0))

    def spot(x: float, y: float) -> tuple[float, float]:
        """Where a point lies on the page, in pixels; there y runs down."""
        return 110 + 750 * x / x_max, 810 - 690 * y / y_max

    page = Image.new("RGB", (WIDTH, 4000), "white")
    draw = ImageDraw.Draw(page)
    draw.text((40, 28), drawable(title), INK, FONT)
    draw.text((110, 76), y_label, MUTED, FONT)
    draw.text((860, 880), x_label, MUTED, FONT, "ra")
    for y, name in (y_names or five_numbers(y_max)).items():
        draw.line([spot(0, y), spot(x_max, y)], FAINT, 2)
        draw.text(spot(-0.02 * x_max, y), name, MUTED, FONT, "rm")
    for x, name in (x_names or five_numbers(x_max)).items():
        draw.text(spot(x, -0.02 * y_max), name, MUTED, FONT, "ma", align="center")
    bottom = 930  # of what is drawn so far
    for name, color, width, points in lines:
        draw.line([spot(x, y) for x, y in points], color, width, "curve")
        for row in textwrap.wrap(drawable(name), 60):
            draw.text((110, bottom), row, color, FONT)
            bottom += 30
    for x, y, color, radius in dots:
        left, top = np.subtract(spot(x, y), radius)
        draw.ellipse((left, top, left + 2 * radius, top + 2 * radius), color, "white")
    for x, y, text in texts:
        draw.text(spot(x, y), text, INK, FONT, "mm", align="center")
    return page.crop((0, 0, WIDTH, bottom + 20))


def interval_line(x: float, interval: list[float] | None, color: str) -> tuple:
    """An upright line from end to end of an interval, as `chart` takes it."""
    return "", color, 4, [(x, end) for end in interval or []]


def confusion_figure(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Image.Image:
    """confusion.png: counts, and each row's shares as the depth of the blue."""
    K, counts = len(classes), np.array(matrix)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # (K, K), rows sum to 1
    lines = [(f"{k}: {name}", INK, 0, []) for k, name in enumerate(classes, 1)]
    texts = []
    for t, p in np.ndindex(K, K):
        y = K - t - 0.5  # the first class stands on top
        blue = tuple(int(255 - shares[t, p] * (255 - full)) for full in BLUE)
        lines.append(("", blue, 680 // K, [(p + 0.01, y), (p + 0.99, y)]))
        texts.append((p + 0.5, y, f"{counts[t, p]}\n{shares[t, p]:.0%}"))
    x_names = {k + 0.5: str(k + 1) for k in range(K)}
    y_names = {K - x: name for x, name in x_names.items()}
    return chart("Confusion", "predicted class", "true class", lines, (), texts, x_names, y_names)


def roc_curve(ranks: Array, positive: Array) -> Array:
    """The curve whose area is the AUROC: (m, 2), 1 - specificity and sensitivity by threshold."""
    thresholds = np.append(np.unique(ranks), np.inf)  # (m,)
    below = np.searchsorted(np.sort(ranks[~positive]), thresholds) / np.sum(~positive)
    missed = np.searchsorted(np.sort(ranks[positive]), thresholds) / np.sum(positive)
    return np.column_stack([1 - below, 1 - missed])


def roc_figure(test: TestSet, probs: Array) -> Image.Image:
    """roc.png: each class against the others; of two classes one curve says all."""
    ranks = class_ranks(probs)  # (N, K)
    lines = [("dashed: chance", MUTED, 2, []), *DASHES]
    for k, name in enumerate(test.classes):
        positive = test.labels == k  # (N,) bool
        area = auroc(ranks[:, k], positive)  # NaN = not to be scored
        if not np.isnan(area) and (k or len(test.classes) > 2):
            curve = roc_curve(ranks[:, k], positive)
            lines.append((f"{name}: AUROC {area:.3f}", COLORS[k % len(COLORS)], 4, curve))
    return chart("ROC, each class against the others", "1 - specificity", "sensitivity", lines)


def reliability_figure(labels: Array, answers: dict[str, Array]) -> Image.Image:
    """reliability.png: a dot for each bin, its area by the images in it, faint below 10.

    Args:
        answers: (N, K) probabilities by name, such as before and after temperature scaling.
    """
    dots = []
    lines = [("dashed: as accurate as confident", MUTED, 2, []), *DASHES]
    for color, (name, probs) in zip(COLORS, answers.items(), strict=False):
        error = calibration_error(labels, probs)
        lines.append((f"{name}: calibration error {error:.3f}", color, 2, []))
        for count, confidence, accuracy in zip(*reliability(labels, probs), strict=True):
            if count:
                radius = 4 + 40 * np.sqrt(count / len(labels))
                dots.append((confidence, accuracy, color if count >= 10 else FAINT, radius))
    return chart("As accurate as confident?", "confidence", "accuracy", lines, dots)


def curve_figure(title: str, records: list[dict], names: dict, chosen=None) -> Image.Image:
    """curve.png: what was recorded over the epochs.

    Args:
        records: a dict for each epoch, with "epoch"; what one lacks, or is None, is not drawn.
        names: {key of a record: its name in the legend}; values are 0 or above.
        chosen: the epoch whose network was kept, marked by dots.
    """
    lines, dots = [], []
    for color, (key, name) in zip(COLORS, names.items(), strict=False):
        points = [(r["epoch"], r[key]) for r in records if r.get(key) is not None]
        lines.append((name, color, 4, points))
        dots += [(x, y, color, 12) for x, y in points if x == chosen or len(points) == 1]
    if chosen:
        lines.append(("dots: the chosen epoch", MUTED, 2, []))
    epochs = {epoch: f"{epoch:.0f}" for epoch in np.linspace(0, len(records), 5).round()}
    return chart(title, "epoch", "", lines, dots, x_names=epochs)


def leak_figure(meter: dict) -> Image.Image:
    """leak.png: a bar for each row of the leak meter, with its interval."""
    lines, x_names = [], {}
    for x, name in ((0.5, "by image"), (1.5, "by group"), (2.5, "commonest")):
        interval = meter["ci95"][name]
        x_names[x] = f"{name}\n{number(meter[name], interval)}"
        lines.append(("", BLUE, 120, [(x, 0), (x, meter[name] or 0)]))
        lines.append(interval_line(x, interval, INK))
    return chart("The nearest neighbour on 32x32 pixels", "", "accuracy", lines, x_names=x_names)


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
    file = io.BytesIO()
    text = io.StringIO()  # one of the two stays empty
    if name.endswith(".png"):
        value.save(file, "PNG")
    elif name.endswith(".npz"):
        np.savez(file, **value)
    elif name.endswith(".csv"):  # every text quoted, or a carriage return would end its row
        writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writerows(map(harmless, row) for row in value)
    elif name.endswith(".jsonl"):
        text.writelines(json.dumps(record) + "\n" for record in value)
    elif name.endswith(".json"):
        text.write(json.dumps(value, indent=2) + "\n")
    else:
        text.write(value)
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
        preds = [np.argmax(fit["probs"], axis=1) for fit in fits if fit["method"] == method]
        correct[method] = np.equal(preds, test.labels).mean(axis=0)  # (N,), mean over seeds
    for method, own in correct.items():
        gain = own - correct["scratch"]  # (N,)
        rows[method] = {"accuracy": own.mean(), "minus scratch": gain.mean(), "ci95": {}}
        rows[method]["ci95"]["accuracy"] = mean_interval(own, test.groups)
        rows[method]["ci95"]["minus scratch"] = mean_interval(gain, test.groups)
    return rows


def verdict(rows: dict[str, dict]) -> str:
    """Which method scores highest, and whether its difference to scratch can be measured."""
    best = max(rows, key=lambda method: rows[method]["accuracy"])
    gain, interval = rows[best]["minus scratch"], rows[best]["ci95"]["minus scratch"]
    if best == "scratch":
        return "scratch scores highest."
    doubt = (
        "the interval excludes 0" if interval and interval[0] > 0 else "no measurable difference"
    )
    return f"{best} scores highest, +{number(gain, interval)} over scratch; {doubt}."


def compare_files(fits: list[dict], test: TestSet, title: str, about: str) -> dict[str, object]:
    """The files of a comparison: table.csv, a row for each fit; table.md; label_efficiency.png.

    Args:
        fits: COLUMNS and probs, (N, K) of the test images; of all METHODS at each fraction.
        about: sentences on data, split and settings; they stand below the tables.
    """
    by_fit = [[*COLUMNS, *SCORES]]
    for fit in fits:
        metrics = classification_metrics(test.labels, fit["probs"])
        by_fit.append([fit[key] for key in COLUMNS] + [metrics[key] for key in SCORES])
    text = f"# {markdown(title)}\n\n"
    lines = [(method, color, 4, []) for method, color in zip(METHODS, COLORS, strict=False)]
    dots, x_names = [], {}
    for x, fraction in enumerate(sorted({fit["fraction"] for fit in fits})):
        of_share = [fit for fit in fits if fit["fraction"] == fraction]
        rows = compare_methods(of_share, test)
        share = f"{100 * fraction:g} %"
        text += score_table(f"{share} of the labels", rows, ["accuracy", "minus scratch"])
        text += f"\n\nWith {share} of the labels {verdict(rows)}\n\n"
        x_names[x + 0.5] = f"{share}\n{np.mean([fit['images'] for fit in of_share]):.0f} images"
        for k, row in enumerate(rows.values()):
            place = x + 0.25 + 0.1 * k  # beside each other, so that no interval hides another
            dots.append((place, row["accuracy"], COLORS[k], 8))
            lines.append(interval_line(place, row["ci95"]["accuracy"], COLORS[k]))
    few = FEW_GROUPS if len(np.unique(test.groups)) < 20 else ""
    text += f"{about} {few}\n\n![label_efficiency.png](label_efficiency.png)\n"
    figure = chart("What labels are worth", "training images", "accuracy", lines, dots, (), x_names)
    return {"table.csv": by_fit, "table.md": text, "label_efficiency.png": figure}
