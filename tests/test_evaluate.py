"""evaluate.py: every metric against its definition, counted slowly, and against closed forms."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate


def random_predictions(N: int = 60, K: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and probabilities with many ties (rounded to a tenth before they are normalised)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, K, N)
    scores = np.round(rng.random((N, K)) + 0.5 * np.eye(K)[labels], 1) + 0.1
    return labels, scores / scores.sum(axis=1, keepdims=True)


def slow_auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Every pair of a positive and a negative, one by one."""
    wins = [(p > q) + 0.5 * (p == q) for p in scores[positive] for q in scores[~positive]]
    return sum(wins) / len(wins)


# --- the metrics -------------------------------------------------------------------------------


def test_confusion_matrix_has_the_truth_in_its_rows():
    matrix = evaluate.confusion_matrix([0, 0, 0, 1, 2], [0, 1, 1, 1, 0], 4)
    assert matrix.tolist() == [[1, 2, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    with pytest.raises(ValueError, match="below 2"):
        evaluate.confusion_matrix([0, 2], [0, 1], 2)


def test_metrics_match_their_definitions_counted_one_by_one():
    labels, probs = random_predictions()
    preds = probs.argmax(axis=1)
    got = evaluate.classification_metrics(labels, probs, ["a", "b", "c"])
    recalls, precisions, f1s, areas = [], [], [], []
    for k, name in enumerate("abc"):
        hit = sum(1 for t, p in zip(labels, preds, strict=True) if t == p == k)
        support, called = sum(labels == k), sum(preds == k)
        recalls.append(hit / support)
        precisions.append(hit / called)
        f1s.append(2 * recalls[-1] * precisions[-1] / (recalls[-1] + precisions[-1]))
        areas.append(slow_auroc(probs[:, k], labels == k))
        row = got["per_class"][name]
        expected = (precisions[-1], recalls[-1], f1s[-1], areas[-1], support)
        values = tuple(row[c] for c in ("precision", "recall", "f1", "auroc", "support"))
        assert values == pytest.approx(expected, abs=1e-12)
    assert got["n"] == 60
    assert got["accuracy"] == pytest.approx(sum(labels == preds) / 60, abs=1e-12)
    assert got["balanced_accuracy"] == pytest.approx(sum(recalls) / 3, abs=1e-12)
    assert got["macro_precision"] == pytest.approx(sum(precisions) / 3, abs=1e-12)
    assert got["macro_f1"] == pytest.approx(sum(f1s) / 3, abs=1e-12)
    assert got["auroc"] == pytest.approx(sum(areas) / 3, abs=1e-12)
    nll = -sum(math.log(probs[i, labels[i]]) for i in range(60)) / 60
    assert got["nll"] == pytest.approx(nll, abs=1e-12)


def test_calibration_error_matches_its_bins_counted_one_by_one():
    labels, probs = random_predictions(200, 4, seed=2)
    top, right = probs.max(axis=1), probs.argmax(axis=1) == labels
    slow = 0.0
    for b in range(15):
        inside = [i for i in range(200) if b / 15 < top[i] <= (b + 1) / 15]
        if inside:
            accuracy = sum(right[i] for i in inside) / len(inside)
            confidence = sum(top[i] for i in inside) / len(inside)
            slow += len(inside) / 200 * abs(accuracy - confidence)
    got = evaluate.expected_calibration_error(labels, probs)
    assert got == pytest.approx(slow, abs=1e-12) and got > 0.02


def test_closed_forms_of_perfect_uniform_and_overconfident_predictions():
    labels = np.array([0, 1, 2, 3] * 5)
    perfect = evaluate.classification_metrics(labels, np.eye(4)[labels])
    assert perfect["accuracy"] == perfect["macro_f1"] == perfect["auroc"] == 1
    assert perfect["ece"] == perfect["nll"] == 0
    uniform = evaluate.classification_metrics(labels, np.full((20, 4), 0.25))
    assert uniform["nll"] == pytest.approx(math.log(4)) and uniform["auroc"] == 0.5
    edge = np.array([[0.6, 0.4], [0.65, 0.35]])  # 0.6 belongs to the bin that ends there
    assert evaluate.expected_calibration_error(np.array([0, 1]), edge) == pytest.approx(0.525)
    sure = np.tile([0.8, 0.2], (10, 1))
    assert evaluate.expected_calibration_error(np.zeros(10, int), sure) == pytest.approx(0.2)


def test_absent_classes_count_as_documented():
    """Macro averages go over all K with undefined = 0; what cannot be scored is None."""
    labels = np.array([0, 0, 1, 1])
    probs = np.array([[0.8, 0.1, 0.1], [0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1]])
    got = evaluate.classification_metrics(labels, probs)
    assert got["balanced_accuracy"] == 0.75  # over the two classes that are there
    assert got["macro_recall"] == pytest.approx(0.5)  # over three
    assert got["per_class"]["2"] == {
        "precision": 0.0, "recall": 0.0, "f1": 0.0, "auroc": None, "support": 0
    }  # fmt: skip
    alone = evaluate.classification_metrics(labels[:2], probs[:2])
    assert alone["auroc"] is None and alone["accuracy"] == 1


def test_metrics_reject_what_is_no_distribution():
    for labels, probs in (([0], [[0.5, 0.4]]), ([0, 1], [[1.0, 0.0]]), ([], np.zeros((0, 2)))):
        with pytest.raises(ValueError, match="rows sum to 1"):
            evaluate.classification_metrics(labels, probs)


def test_report_reads_as_scikit_learns_does():
    """The example of scikit-learn's own documentation, to the letter."""
    labels, preds = np.array([0, 1, 2, 2, 2]), np.array([0, 0, 2, 2, 1])
    names = ["class 0", "class 1", "class 2"]
    metrics = evaluate.classification_metrics(labels, np.eye(3)[preds], names)
    assert evaluate.classification_report(metrics) == (
        "              precision    recall  f1-score   support\n"
        "\n"
        "     class 0       0.50      1.00      0.67         1\n"
        "     class 1       0.00      0.00      0.00         1\n"
        "     class 2       1.00      0.67      0.80         3\n"
        "\n"
        "    accuracy                           0.60         5\n"
        "   macro avg       0.50      0.56      0.49         5\n"
        "weighted avg       0.70      0.60      0.61         5\n"
    )


# --- the intervals -----------------------------------------------------------------------------


def test_weights_count_a_picture_as_often_as_copies_would():
    """The resampled metrics are those of the pictures written out: one code for both."""
    labels, probs = random_predictions()
    times = np.random.default_rng(1).integers(0, 4, 60)
    weighted = evaluate.weighted_metrics(labels, probs, times[None].astype(float))
    copied = evaluate.classification_metrics(np.repeat(labels, times), np.repeat(probs, times, 0))
    for name in ("accuracy", "balanced_accuracy", "macro_precision", "macro_f1", "auroc"):
        assert weighted[name][0] == pytest.approx(copied[name], abs=1e-12), name


def test_intervals_resample_groups_not_pictures():
    """Ten copies of each picture carry no more evidence than one: the interval must not shrink."""
    labels, probs = random_predictions(80)
    once = evaluate.group_bootstrap(labels, probs, np.arange(80))
    tenfold = evaluate.group_bootstrap(
        np.repeat(labels, 10), np.repeat(probs, 10, 0), np.repeat(np.arange(80), 10)
    )
    by_picture = evaluate.group_bootstrap(
        np.repeat(labels, 10), np.repeat(probs, 10, 0), np.arange(800)
    )
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "auroc"):
        assert tenfold[name] == pytest.approx(once[name], abs=1e-9)
        width = once[name][1] - once[name][0]
        assert (by_picture[name][1] - by_picture[name][0]) < 0.5 * width


def test_accuracy_interval_matches_the_binomial_one():
    rng = np.random.default_rng(0)
    right = rng.random(400) < 0.8
    probs = np.stack([right, ~right], axis=1).astype(float)
    low, high = evaluate.group_bootstrap(np.zeros(400, int), probs, np.arange(400))["accuracy"]
    p = right.mean()
    half = 1.96 * math.sqrt(p * (1 - p) / 400)
    assert (low, high) == pytest.approx((p - half, p + half), abs=0.01)


def test_a_perfect_classifier_has_perfect_intervals_though_resamples_miss_a_class():
    """Scoring a class that was not drawn as 0 would give macro F1 an interval down to 0.75."""
    labels = np.repeat([0, 1, 2, 3], [30, 30, 5, 3])
    intervals = evaluate.group_bootstrap(labels, np.eye(4)[labels], np.arange(68))
    assert all(interval == [1.0, 1.0] for interval in intervals.values())


def test_a_single_group_and_a_single_class_have_no_interval():
    labels, probs = random_predictions(12)
    assert set(evaluate.group_bootstrap(labels, probs, np.zeros(12)).values()) == {None}
    ones = evaluate.group_bootstrap(np.zeros(12, int), probs, np.arange(12))
    assert ones["auroc"] is None and ones["accuracy"] is not None


def test_2000_resamples_of_1300_predictions_take_well_under_a_second():
    """Vectorised; the bound here is loose, because test machines are slow and shared."""
    import time

    labels, probs = random_predictions(1300, 4)
    began = time.perf_counter()
    evaluate.group_bootstrap(labels, probs, np.arange(1300) // 3)
    assert time.perf_counter() - began < 5


# --- calibration -------------------------------------------------------------------------------


def overconfident(n: int = 4000, factor: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from probabilities, which are then stated `factor` times too sharply."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (n, 3))
    true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (true.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
    sharp = np.exp(factor * logits)
    return labels, sharp / sharp.sum(axis=1, keepdims=True)


def test_temperature_scaling_finds_how_much_too_sure_a_classifier_is():
    labels, probs = overconfident()
    temperature = evaluate.fit_temperature(labels, probs)
    assert temperature == pytest.approx(3.0, rel=0.1)
    cooled = evaluate.with_temperature(probs, temperature)
    assert (cooled.argmax(axis=1) == probs.argmax(axis=1)).all()
    before, after = (evaluate.expected_calibration_error(labels, p) for p in (probs, cooled))
    assert after < 0.03 < 0.1 < before
    assert evaluate.fit_temperature(labels[:0], probs[:0]) == 1.0


def test_a_temperature_divides_the_logits():
    logits = torch.randn(20, 4, dtype=torch.float64) * 5
    ours = evaluate.with_temperature(logits.softmax(dim=1).numpy(), 2.5)
    assert np.allclose(ours, (logits / 2.5).softmax(dim=1).numpy(), atol=1e-12)
    certain = evaluate.with_temperature(np.array([[1.0, 0.0]]), 5.0)
    assert np.isfinite(certain).all() and certain[0, 0] > 0.99


def test_the_fitted_temperature_is_the_one_that_torch_finds():
    labels, probs = overconfident(800, 2.0)
    logits, log_t = torch.from_numpy(np.log(probs)), torch.zeros((), dtype=torch.float64)
    log_t.requires_grad_()
    optimizer = torch.optim.LBFGS([log_t], max_iter=100, tolerance_grad=1e-9)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits / log_t.exp(), torch.from_numpy(labels))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert evaluate.fit_temperature(labels, probs) == pytest.approx(log_t.exp().item(), rel=0.01)


def test_bins_of_reliability_add_up_to_the_whole():
    labels, probs = overconfident(500)
    count, confidence, accuracy = evaluate.reliability(labels, probs)
    assert count.sum() == 500 and len(count) == 15
    assert (count * accuracy).sum() == (probs.argmax(axis=1) == labels).sum()
    assert (count * confidence).sum() == pytest.approx(probs.max(axis=1).sum())


def test_the_area_under_the_drawn_roc_curve_is_the_auroc():
    rng = np.random.default_rng(1)
    for scores in (rng.random(200), rng.integers(0, 5, 200)):  # the second is full of ties
        positive = rng.random(200) < 0.3
        x, y = evaluate.roc_curve(scores, positive).T
        area = ((x[1:] - x[:-1]) * (y[1:] + y[:-1]) / 2).sum()
        assert area == pytest.approx(evaluate.auroc(scores, positive)[0])
        assert (x[0], y[0]) == (0, 0) and (x[-1], y[-1]) == (1, 1)


# --- neighbours, and the map -------------------------------------------------------------------


def test_neighbours_vote_as_a_slow_loop_says():
    rng = np.random.default_rng(2)
    known, labels, asked = rng.normal(size=(50, 8)), rng.integers(0, 3, 50), rng.normal(size=(9, 8))
    ours = evaluate.nearest_neighbours(known, labels, asked, 4)
    for n in range(9):
        cosine = [k @ asked[n] / np.sqrt((k @ k) * (asked[n] @ asked[n])) for k in known]
        votes = np.zeros(4)
        for i in sorted(range(50), key=lambda i: -cosine[i])[:20]:
            votes[labels[i]] += np.exp(cosine[i] / 0.07)
        assert np.allclose(ours[n], votes / votes.sum(), atol=1e-9)
    assert evaluate.nearest_neighbours(known[:3], labels[:3], asked, 4).shape == (9, 4)
    assert evaluate.nearest_neighbours(known, labels, asked[:0], 4).shape == (0, 4)


def test_principal_components_are_those_of_a_singular_value_decomposition():
    for seed in range(5):
        x = np.random.default_rng(seed).normal(size=(40, 6)) * [9, 5, 1, 1, 1, 1] + 100
        u, s, axes = np.linalg.svd(x - x.mean(axis=0))
        ours = evaluate.principal_components(x)
        assert np.allclose(np.abs(ours), np.abs(u[:, :2] * s[:2]), atol=1e-8)
        # a direction has no sign of its own: ours has its largest entry above zero
        for axis, place in zip(axes[:2], ours.T, strict=True):
            axis = axis * np.sign(axis[np.abs(axis).argmax()])
            assert np.allclose((x - x.mean(axis=0)) @ axis, place, atol=1e-8)


# --- a comparison ------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_the_one_that_accuracy_has():
    rng = np.random.default_rng(4)
    groups, labels = np.arange(90) // 3, rng.integers(0, 2, 90)
    probs = np.eye(2)[rng.integers(0, 2, 90)]
    right = (probs.argmax(axis=1) == labels).astype(float)
    expected = evaluate.group_bootstrap(labels, probs, groups)["accuracy"]
    assert evaluate.mean_interval(right, groups) == pytest.approx(expected)
    assert np.isnan(evaluate.mean_interval(right, np.zeros(90))).all()  # as there is no spread


def test_the_table_of_a_comparison_says_what_can_be_counted():
    """Two seeds; the probe is right about 6 and 8 of 8 pictures, the others about 4 and 4."""
    labels, groups = np.array([0, 1] * 4), np.arange(8) // 2
    test = evaluate.TestPart("mine", ("a", "b"), [str(i) for i in range(8)], labels, groups)

    def answers(right: int) -> list:
        called = np.where(np.arange(8) < right, labels, 1 - labels)
        return (np.eye(2)[called] * 0.8 + 0.1).tolist()

    cells = [
        {"method": m, "fraction": f, "seed": s, "groups": 3, "pictures": 9, "parameters": 1234,
         "seconds": 1.0 + 2 * s, "lr": None, "probs": answers(6 + 2 * s if m == "probe" else 4)}
        for m in evaluate.METHODS for f in (0.1, 1.0) for s in (0, 1)
    ]  # fmt: skip
    files = evaluate.compare_files(cells, test, "about it", "LEAKED: 3")
    assert files["table.md"].splitlines()[:3] == ["about it", "", "LEAKED: 3"]
    assert {row[-1] for row in files["table.csv"][1:]} == {"LEAKED: 3"}
    rows = [line.split(" | ") for line in files["table.md"].splitlines() if line.startswith("| 1")]
    assert len(rows) == 2 * len(evaluate.METHODS)
    by = {(row[0].strip("| "), row[1]): row[2:] for row in rows}
    probe = by["10 %: 3 groups, 9 pictures", "probe, pretrained encoder"]
    assert probe[0].startswith("0.875 ± 0.177 [") and probe[1].startswith("+0.375 [")
    assert probe[2:] == ["1,234", "2.0 |"]
    low, high = map(float, probe[1].split("[")[1].rstrip("]").split(","))
    assert 0 <= low < 0.375 < high <= 0.75
    scratch = by["100 %: 3 groups, 9 pictures", "supervised from scratch"]
    assert scratch[1] == "+0.000 [+0.000, +0.000]"
    header, *table = files["table.csv"]
    assert len(table) == len(cells) and header[0] == "method" and "accuracy" in header
    assert table[1][header.index("accuracy")] == 1.0
    assert files["label_efficiency.png"].size[0] > 300


# --- the pictures ------------------------------------------------------------------------------


def test_pictures_are_drawn_for_any_number_of_classes_and_epochs():
    for K in (2, 7):
        matrix = np.arange(K * K).reshape(K, K)
        names = [f"a very long class name {k}" for k in range(K)]
        image = evaluate.confusion_picture(matrix, names, "title", "LEAKED")
        assert isinstance(image, Image.Image) and np.asarray(image).std() > 5
    for values in ([], [0.5], [3.0, 2.0, 1.0], [0.5] * 4):
        lines = {name: evaluate.over_epochs(values) for name in ("train", "val")}
        image = evaluate.chart([evaluate.Panel("loss", "epoch", lines)], "title")
        assert image.size[0] > 100


def test_ticks_are_round_and_enclose_the_values():
    for low, high in ((0.0, 1.0), (0.31, 0.34), (5.5, 1234.0), (2.0, 2.0), (-3.0, 4.0)):
        marks = evaluate.ticks(low, high)
        assert marks[0] <= low + 1e-9 and marks[-1] >= high - 1e-9 and 1 <= len(marks) <= 9


# --- the leak meter ----------------------------------------------------------------------------


def people(count: int, slices: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slices that look like their person and nothing like his diagnosis, which is drawn by lot."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(count), slices)
    labels = rng.integers(0, 2, count)[groups]
    base = rng.integers(0, 256, (count, 32, 32))[groups]
    noisy = np.clip(base + rng.normal(0, 40, base.shape), 0, 255).astype(np.uint8)
    return noisy, labels, groups


def test_recognising_people_scores_by_picture_and_is_chance_by_group():
    meter = evaluate.leak_meter(*people(60, 6))
    assert len(meter["by picture"]) == len(meter["by group"]) == 5
    assert np.mean(meter["by picture"]) > 0.98 and meter["recognised"][0] > 0.98
    assert abs(np.mean(meter["by group"]) - 0.5) < 0.15
    thumbnails, labels, groups = people(60, 6)
    assert meter["commonest"] == [max(labels.mean(), 1 - labels.mean())]


def test_the_meter_asks_only_for_neighbours_outside_of_the_tested_part():
    """Each picture once, and its mirror image in grays: the nearest is its twin, where allowed."""
    thumbnails, _, groups = people(40, 2)
    labels = groups % 2
    alone = evaluate.leak_meter(thumbnails, labels, np.arange(80))
    assert np.mean(alone["by group"]) == pytest.approx(np.mean(alone["recognised"]) + 0.7, abs=0.3)
    together = evaluate.leak_meter(thumbnails, labels, groups)
    assert np.mean(together["by group"]) < 0.7 < np.mean(together["by picture"])
    assert sum(alone["recognised"]) == 0


def test_one_group_cannot_be_tested_by_group():
    meter = evaluate.leak_meter(*people(1, 9))
    assert meter["by group"] == [] and meter["by picture"] == [1.0] * 5
    assert evaluate.leak_picture(meter, "one").size[0] > 100


def test_a_sample_is_asked_where_pictures_are_many(monkeypatch):
    monkeypatch.setattr(evaluate, "LEAK_QUERIES", 50)
    meter = evaluate.leak_meter(*people(60, 6))
    assert np.mean(meter["by picture"]) > 0.95
    counted = [round(v * 50) for v in meter["by picture"]]
    assert len(counted) == 5
