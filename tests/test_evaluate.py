"""evaluate.py: every number against its definition, counted slowly, and against closed forms."""

import csv
import doctest
import io
import itertools
import json
import math

import numpy as np
import pytest
from PIL import Image, ImageColor

import evaluate

UGLY = ["脑膜瘤" * 8, "W" * 24, "Доброкачественная опухол", "<b>a|b</b>\n**ä** `x` [y](z)"]


def random_answers(N: int = 60, K: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and probabilities with many ties (rounded to a tenth before they are normalised)."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, K, N)
    scores = np.round(rng.random((N, K)) + 0.5 * np.eye(K)[labels], 1) + 0.1
    return labels, scores / scores.sum(axis=1, keepdims=True)


def a_test(classes, labels, groups=None) -> evaluate.TestSet:
    groups = np.arange(len(labels)) if groups is None else groups
    return evaluate.TestSet("mine", classes, [""] * len(labels), np.asarray(labels), groups)


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(evaluate, "RESAMPLES", 100)


def test_metrics_match_their_definitions_counted_one_by_one():
    labels, probs = random_answers()
    pairs, rows = list(zip(labels, probs.argmax(axis=1), strict=True)), []
    got = evaluate.classification_metrics(labels, probs, ["a", "b", "c"])
    for k, name in enumerate("abc"):
        support, predicted = sum(t == k for t, _ in pairs), sum(p == k for _, p in pairs)
        hits, refused = pairs.count((k, k)), sum(t != k and p != k for t, p in pairs)
        row = {"support": support, "recall": hits / support, "precision": hits / predicted}
        row["specificity"] = refused / (60 - support)
        row["f1"] = 2 / (1 / row["recall"] + 1 / row["precision"])
        ill, well = probs[labels == k, k], probs[labels != k, k]
        row["auroc"] = np.mean([(p > q) + 0.5 * (p == q) for p in ill for q in well])
        x, y = evaluate.roc_curve(probs[:, k], labels == k)[::-1].T
        assert np.diff(x) @ (y[1:] + y[:-1]) / 2 == pytest.approx(row["auroc"])  # the drawn area
        assert got["per_class"][name] == pytest.approx(row, abs=1e-12)
        rows.append(row)
    mean = {name: sum(row[name] for row in rows) / 3 for name in rows[0]}
    expected = {f"macro_{name}": mean[name] for name in ("precision", "recall", "f1")}
    expected |= {"balanced_accuracy": mean["recall"], "auroc": mean["auroc"], "n": 60}
    expected["accuracy"] = sum(t == p for t, p in pairs) / 60
    expected["nll"] = -sum(math.log(probs[i, labels[i]]) for i in range(60)) / 60
    assert {name: got[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert got["confusion_matrix"] == [[pairs.count((t, p)) for p in range(3)] for t in range(3)]


def test_closed_forms_of_perfect_uniform_and_saturated_answers_and_the_commonest_class():
    labels = np.array([0, 1, 2, 3] * 5)
    perfect = evaluate.classification_metrics(labels, np.eye(4)[labels])
    assert perfect["accuracy"] == perfect["macro_f1"] == perfect["auroc"] == 1
    assert perfect["ece"] == perfect["nll"] == 0
    uniform = evaluate.classification_metrics(labels, np.full((20, 4), 0.25))
    assert uniform["nll"] == pytest.approx(math.log(4)) and uniform["auroc"] == 0.5
    sure = np.tile([0.8, 0.2], (10, 1))
    assert evaluate.calibration_error(np.zeros(10, int), sure) == pytest.approx(0.2)
    edge = np.array([[0.6, 0.4], [0.65, 0.35]])  # 0.6 belongs to the bin that ends there
    assert evaluate.calibration_error(np.array([0, 1]), edge) == pytest.approx(0.525)
    # p_1 ties at 1.0 where p_0 still tells 1e-17 from 1e-18: the classes scored .75 and 1.
    tiny = np.array([1e-18, 1e-17, 0.5, 1e-17])
    two = evaluate.classification_metrics([1, 0, 0, 1], np.stack([tiny, 1 - tiny], 1))["per_class"]
    assert two["0"]["auroc"] == two["1"]["auroc"] == 0.875
    always = evaluate.classification_metrics([0] * 7 + [1] * 3, np.tile([0.1, 0.9], (10, 1)))
    assert always["majority_accuracy"] == 0.7  # of the truth; by prediction it would be 0.3


def test_absent_classes_count_as_documented(few_resamples):
    """Macro averages go over all K with undefined = 0; what cannot be scored is None."""
    labels = np.array([0, 0, 1, 1])
    probs = np.array([[0.8, 0.1, 0.1], [0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1]])
    got = evaluate.classification_metrics(labels, probs)
    assert (got["balanced_accuracy"], got["macro_recall"]) == (0.75, 0.5)  # of two, of three
    absent = {"precision": None, "recall": None, "specificity": 1.0, "f1": None, "auroc": None}
    assert got["per_class"]["2"] == absent | {"support": 0}
    alone = a_test(["a", "b", "c"], labels[:2]).measure(probs[:2])
    assert alone["auroc"] is alone["ci95"]["auroc"] is None and "NaN" not in json.dumps(alone)
    # A class that a resample has missed is no 0: macro F1 had an interval down to 0.75.
    labels = np.repeat([0, 1, 2, 3], [30, 30, 5, 3])
    perfect = a_test("abcd", labels).measure(np.eye(4)[labels])
    assert all(interval == [1.0, 1.0] for interval in perfect["ci95"].values())


def test_what_is_no_distribution_or_no_class_is_refused():
    bad = ([[0.5, 0.4]], [[1.5, -0.5]], [[np.nan, 1]], [[1.0, 0.0]] * 2, np.zeros((0, 2)), [1.0])
    for label, probs in [*itertools.product([0], bad), (2, [[1.0, 0.0]]), (-1, [[1.0, 0.0]])]:
        with pytest.raises(ValueError):
            evaluate.classification_metrics([label], probs)


def test_intervals_resample_groups_and_are_those_of_resampled_images_scored_slowly():
    """Resampled by image, ten slices of a patient would count as ten patients."""
    labels, probs = random_answers(40)
    groups, drawn = np.repeat(np.arange(10), 4), []
    for rows in evaluate.resamples(groups):
        assert len(rows) == 40 and (np.bincount(groups[rows]) % 4 == 0).all()
        drawn.append(evaluate.classification_metrics(labels[rows], probs[rows]))
    for name, interval in evaluate.group_bootstrap(labels, probs, groups).items():
        values = [metrics[name] for metrics in drawn]
        assert interval == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=1e-9)


def test_intervals_are_as_wide_as_binomial_ones_and_hold_as_often_as_the_report_says():
    """Of G patients whose accuracies differ, eight images each, they hold less often than 95 %."""
    low, high = evaluate.mean_interval((np.arange(400) < 320).astype(float), np.arange(400))
    assert (high - low) / (2 * 1.96 * math.sqrt(0.8 * 0.2 / 400)) == pytest.approx(1, abs=0.07)
    rng = np.random.default_rng(0)
    truth = (1 / (1 + np.exp(-rng.normal(1, 1.5, 100_000)))).mean()
    for G, stated in {2: 0.50, 3: 0.73, 5: 0.82, 8: 0.88, 13: 0.91}.items():
        held = 0
        for _ in range(600):
            hits = rng.binomial(8, 1 / (1 + np.exp(-rng.normal(1, 1.5, G))))
            drawn = rng.multinomial(G, np.full(G, 1 / G), size=500) @ hits / (8 * G)
            low, high = evaluate.percentile_interval(drawn)
            held += low <= truth <= high
        assert held / 600 == pytest.approx(stated, abs=0.045)
        assert f"{100 * stated:.0f}" in evaluate.FEW_GROUPS


def test_temperature_scaling_finds_how_much_too_confident_a_classifier_is(few_resamples):
    """Its scaled calibration error was once computed from the probabilities as they were."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (4000, 3))
    true, probs = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (logits, 3 * logits))
    labels = (true.cumsum(axis=1) < rng.random((4000, 1))).sum(axis=1)
    assert evaluate.fit_temperature(labels, probs) == pytest.approx(3.0, rel=0.1)
    assert np.allclose(evaluate.with_temperature(probs, 3), true, atol=1e-12)
    metrics = a_test("abc", labels).measure(probs, 3)
    assert metrics["ece_scaled"] < 0.03 and metrics["temperature"] == 3
    assert metrics["nll_scaled"] == pytest.approx(-np.log(true[np.arange(4000), labels]).mean())
    top, correct = probs.max(axis=1), probs.argmax(axis=1) == labels
    bins = [(b / 15 < top) & (top <= (b + 1) / 15) for b in range(15)]
    slow = sum(abs((correct - top)[inside].sum()) for inside in bins) / 4000
    assert metrics["ece"] == pytest.approx(slow, abs=1e-12) and slow > 0.1
    # With 120 val images the test NLL worsened in 21 of 100 draws.
    assert evaluate.fit_temperature(labels[:199], probs[:199]) == 1.0
    assert evaluate.fit_temperature(labels[:200], probs[:200]) > 1.5
    assert evaluate.with_temperature(np.array([[1.0, 0.0]]), 5.0)[0, 0] > 0.99  # and no NaN


def test_a_group_answers_with_the_mean_of_its_images_if_they_share_one_label(few_resamples):
    labels, groups = np.array([0, 0, 1, 1, 0, 1]), np.array([5, 5, 9, 9, 7, 7])  # 7 has both
    probs = np.array([[0.9, 0.1], [0.4, 0.6], [0.6, 0.4], [0.1, 0.9], [1, 0], [1, 0]])
    group_labels, means = evaluate.group_answers(labels, probs, groups)
    assert group_labels.tolist() == [0, 1] and np.allclose(means, [[0.65, 0.35], [0.35, 0.65]])
    metrics = a_test(["a", "b"], labels, groups).measure(probs)
    assert (metrics["n_groups"], metrics["per_group"]["n"]) == (3, 2)
    assert metrics["per_group"]["accuracy"] == 1 and metrics["per_group"]["ci95"]["accuracy"]
    assert a_test(["a", "b"], labels, np.zeros(6)).measure(probs)["per_group"] is None


def test_neighbours_vote_as_a_slow_loop_says(monkeypatch):
    rng = np.random.default_rng(2)
    train, queries = rng.normal(size=(50, 8)), rng.normal(size=(9, 8))
    labels = rng.integers(0, 3, 50)
    monkeypatch.setattr(evaluate, "BLOCK", 100)  # two queries at a time
    ours = evaluate.nearest_neighbours(train, labels, queries, 4)
    for n in range(9):
        lengths = np.sqrt((train**2).sum(axis=1) * (queries[n] ** 2).sum())
        cosine, votes = train @ queries[n] / lengths, np.zeros(4)
        for i in sorted(range(50), key=lambda i: -cosine[i])[:20]:
            votes[labels[i]] += np.exp(cosine[i] / 0.07)
        assert np.allclose(ours[n], votes / votes.sum(), atol=1e-9)
    assert evaluate.nearest_neighbours(train[:3], labels[:3], queries, 4).shape == (9, 4)


def test_the_leak_meter_recognises_people_by_image_and_nobody_by_group(monkeypatch):
    """Slices look like their person and nothing like his diagnosis, which is drawn by lot."""
    rng, groups = np.random.default_rng(0), np.repeat(np.arange(60), 6)
    labels = rng.integers(0, 2, 60)[groups]
    noisy = rng.integers(0, 256, (60, 32, 32))[groups] + rng.normal(0, 40, (360, 32, 32))
    thumbnails = noisy.clip(0, 255).astype(np.uint8)
    monkeypatch.setattr(evaluate, "BLOCK", 10_000)  # 27 images at a time
    meter = evaluate.leak_meter(thumbnails, labels, groups)
    assert meter["by image"] == 1 and abs(meter["by group"] - 0.5) < 0.15
    assert meter["ci95"]["by image"] == [1, 1] and 0.1 < np.ptp(meter["ci95"]["by group"]) < 0.4
    assert meter["commonest"] == max(labels.mean(), 1 - labels.mean())
    cosine, correct = np.corrcoef(thumbnails.reshape(360, -1)), 0  # of what has mean zero
    for i in range(360):
        others = [j for j in range(360) if groups[j] != groups[i]]
        correct += labels[max(others, key=lambda j: cosine[i, j])] == labels[i]
    assert meter["by group"] == pytest.approx(correct / 360, abs=1e-12)
    monkeypatch.setattr(evaluate, "LEAK_QUERIES", 7)  # where images are many, a sample is asked
    asked = 7 * evaluate.leak_meter(thumbnails, labels, groups)["by group"]
    assert asked == pytest.approx(round(asked)) and 0 < asked < 7
    # One image alone was its own neighbour, and scored 1.0.
    one, person = (evaluate.leak_meter(thumbnails[:n], labels[:n], groups[:n]) for n in (1, 6))
    assert one["by image"] is one["by group"] is person["by group"] is None
    assert person["by image"] == 1 and evaluate.leak_figure(one).width == 900


def a_report(groups: np.ndarray, val_size: int | None = 300) -> tuple[dict, str]:
    """Of 60 images in three classes with hostile names."""
    labels, probs = random_answers()
    test = a_test([UGLY[3], "a|b", "c\x1b[31m"], labels, groups)
    results = {"cosine MLP": test.measure(probs, 1.7), "raw pixels": test.measure(probs[::-1])}
    notes = {"rule": "70/15/15 by group", "groups": 82, "dropped": 15, "dropped_copies": 12}
    notes["dropped_for_two_labels"] = 3
    return results, evaluate.report("mine, ours, 2026-01-02", results, val_size, notes, ["roc.png"])


def table_rows(text: str, first: str) -> list[list[str]]:
    """The cells of the table whose first column has this title."""
    (table,) = [block for block in text.split("\n\n") if block.startswith(f"| {first} ")]
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1 and set(lines[1]) == set("|-: ")  # aligned
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_report_is_a_model_card_and_names_are_text_in_it(few_resamples):
    results, text = a_report(groups=np.arange(60) // 2)
    metrics = results["cosine MLP"]
    assert text.startswith("# mine, ours, 2026-01-02\n") and "![roc.png](roc.png)" in text
    assert "60 test images of 30 groups" in text and "rule: 70/15/15 by group." in text
    assert "\n15 were dropped, among them 12 copies and 3 for two labels." in text
    ece, scaled = f"{metrics['ece']:.3f} away", f"{metrics['ece_scaled']:.3f}\nafter temperature"
    assert ece in text and scaled in text and "scaling by 1.70" in text
    for first, found in (("per image", metrics), ("per patient or group", metrics["per_group"])):
        header, _, row, other = table_rows(text, first)
        assert header[1:] == ["accuracy", "balanced accuracy", "macro f1", "auroc"]
        assert row[0] == "cosine MLP" and other[0] == "raw pixels"
        for name, cell in zip(evaluate.SCORES, row[1:], strict=True):  # each its own interval
            low, high = found["ci95"][name]
            assert cell == f"{found[name]:.3f} [{low:.3f}, {high:.3f}]"
    header, _, *rows = table_rows(text, "class (test images)")
    assert header[1:3] == ["sensitivity", "specificity"]
    for found, row in zip(metrics["per_class"].values(), rows, strict=True):
        assert row[0].endswith(f" ({found['support']})")
        assert row[1:3] == [f"{found['recall']:.3f}", f"{found['specificity']:.3f}"]
    assert not any(bad in text for bad in ("<b>", "a|b", "**", "`", "[y]", "\x1b"))


def test_the_report_says_what_cannot_be_concluded(few_resamples):
    own, one = np.arange(60), np.zeros(60, int)
    text = a_report(own)[1]
    assert "not for diagnosis" in text and "in val:" not in text and "too narrow" not in text
    assert "No image was in val" in a_report(own, 0)[1] and "in val:" not in a_report(own, None)[1]
    assert "too narrow" in a_report(own % 8)[1]
    text = a_report(one)[1]
    assert "From one group nothing follows" in text and "nan" not in text and "None" not in text
    assert table_rows(text, "per image")[2][1] == "0.833"  # and no interval


def spots(image: Image.Image, color: str, below: int = 0) -> np.ndarray:
    """(m, 2): x and y of the pixels of a colour, `below` the legend."""
    y, x = (np.asarray(image) == ImageColor.getrgb(color)).all(axis=2).nonzero()
    return np.column_stack([x, y])[y > below]


def test_a_table_is_aligned_and_its_numbers_stand_at_the_right():
    assert doctest.testmod(evaluate) == (0, 3)  # failed, attempted
    lines = evaluate.table([["a", "b"], ["long name", "1.5"], ["c", "10,000"]]).splitlines()
    assert lines[1] == "| --------- | -----: |" and lines[2] == "| long name |    1.5 |"


def test_a_chart_has_its_origin_at_the_lower_left_and_curves_mark_the_chosen_epoch():
    a, b = evaluate.COLORS[:2]
    lines, dots = [("up", a, 4, [(0, 0), (1, 1)])], [(0.9, 0.1, b, 9)]
    image = evaluate.chart("title", "x", "y", lines, dots, texts=[(0.1, 0.9, "###")])
    line, dot, text = (spots(image, color, 130) for color in (a, b, evaluate.INK))
    line = line[line[:, 1] < 900]  # and its name below
    assert np.corrcoef(line.T)[0, 1] < -0.99  # y runs down in an image
    assert (dot.mean(axis=0) > np.quantile(line, 0.8, axis=0)).all()
    assert (text.mean(axis=0) < np.quantile(line, 0.2, axis=0)).all()
    records = [{"epoch": e, "loss": 5 - e, "val": None if e == 1 else 0.5} for e in (1, 2, 3, 4)]
    names = {"loss": "loss", "val": "val"}
    plain, marked = (evaluate.curve_figure("t", records, names, c) for c in (None, 3))
    assert len(spots(marked, a)) - len(spots(plain, a)) > 200
    assert evaluate.curve_figure("t", [], names).width == 900


def test_reliability_has_two_curves_dots_by_size_and_small_bins_faint():
    probs = np.repeat([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4]], [80, 15, 5], axis=0)
    scaled = evaluate.with_temperature(probs, 3)
    image = evaluate.reliability_figure(np.arange(100) % 2, {"before": probs, "after": scaled})
    before, after = (spots(image, color) for color in evaluate.COLORS[:2])
    before, after = (dots[dots[:, 1] < 900] for dots in (before, after))  # the legend is below
    large, small = before[:, 0] > 750, before[:, 0] < 750  # 80 and 15 images
    assert 3 < large.sum() / small.sum() < 6 and len(after) > 3000
    assert abs(after[:, 0].mean() - before[:, 0].mean()) > 80  # less confident
    faint = spots(image, evaluate.FAINT)
    assert 150 < np.ptp(faint[np.abs(faint[:, 0] - 560) < 12][:, 1])  # of 5


def test_confusion_shades_are_shares_of_the_true_class_and_contrast_with_the_text():
    image = evaluate.confusion_figure([[10, 0], [30, 10]], ["a", "b"])
    cells = [color for count, color in image.getcolors(10_000) if count > 8000]
    c = np.array([ImageColor.getrgb(evaluate.INK), *cells]) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    ink, *luminance = linear @ (0.2126, 0.7152, 0.0722) + 0.05  # WCAG's
    assert min(luminance) / ink > 4.5
    shades = sorted(set(cells) - {(255, 255, 255)})  # the darkest first
    at = [spots(image, f"rgb{color}").mean(axis=0) for color in shades]
    assert len(at) == 3 and shades[0] == (96, 165, 250)
    assert at[0][1] < at[1][1] - 50 and at[0][0] == pytest.approx(at[1][0], abs=9)  # b called a
    assert at[2][0] > at[1][0] + 50 and at[2][1] == pytest.approx(at[1][1], abs=9)


def test_nothing_is_cut_whatever_the_classes_are_called_and_two_have_one_roc_curve():
    """What is cut touches the border; a letter that the font lacks would be a box."""
    for K, curves in ((2, 1), (4, 4), (12, 10)):
        names, (labels, probs) = (UGLY * 3)[:K], random_answers(200, K)
        matrix = evaluate.classification_metrics(labels, probs)["confusion_matrix"]
        roc = evaluate.roc_figure(a_test(names, labels), probs)
        for image in (evaluate.confusion_figure(matrix, names), roc):
            pixels = np.asarray(image)
            assert (pixels[[0, -1]] == 255).all() and (pixels[:, [0, -1]] == 255).all()
        assert sum(len(spots(roc, color)) > 0 for color in evaluate.COLORS) == curves
    for line in map(evaluate.drawable, UGLY):
        assert line.isascii() and line.isprintable()
    assert evaluate.drawable("Ödème 脑") == "Odeme \\u8111"


def test_predictions_come_back_from_their_table():
    """A lone carriage return ended a row."""
    labels, probs = random_answers(4)
    paths, classes = ["=1+1.png", 'b,"\n', "\udc80", "d"], ["a", "b\rc", "=d"]
    test = evaluate.TestSet("mine", classes, paths, labels, labels + 5)
    table = evaluate.as_bytes("x.csv", evaluate.prediction_table(paths, probs, classes, test))
    text = table.decode("utf8", "surrogateescape")
    header, *rows = csv.reader(io.StringIO(text, newline=""))
    assert header == ["path", "group", "label", "prediction", "p_a", "p_b\rc", "p_=d"]
    assert [row[0] for row in rows] == ["./=1+1.png", 'b,"\n', "\udc80", "d"]
    written = ["a", "b\rc", "./=d"]
    for row, label, p in zip(rows, labels, probs, strict=True):
        assert row[1:4] == [str(label + 5), written[label], written[p.argmax()]]
        assert [float(cell) for cell in row[4:]] == pytest.approx(p, rel=1e-8)


def test_files_hold_what_their_names_say_and_no_cell_is_a_formula():
    assert json.loads(evaluate.as_bytes("m.json", {"a": None})) == {"a": None}
    assert evaluate.as_bytes("m.jsonl", [{"a": 1}, {"b": 2}]) == b'{"a": 1}\n{"b": 2}\n'
    assert evaluate.as_bytes("report.md", "ä\udc80") == b"\xc3\xa4\x80"
    assert np.load(io.BytesIO(evaluate.as_bytes("f.npz", {"x": [7]})))["x"] == [7]
    for cell in ("-0.5", "-1e-05", "a=b", 3, -2.5, ""):
        assert evaluate.harmless(cell) == cell
    for cell in ("=1+1", "+x", "-x", "@a", "\tx", "\rx"):
        assert evaluate.harmless(cell) == f"./{cell}"


def compared(winner: str, groups: np.ndarray | None = None) -> dict:
    """Two seeds: one method is correct about 24 and 32 of 40 images, the others about 20."""
    labels, fits = np.array([0, 1] * 20), []
    for fraction, seed, method in itertools.product((0.1, 1.0), (0, 1), evaluate.METHODS):
        right = np.arange(40) < (24 + 8 * seed if method == winner else 20)
        probs = np.eye(2)[np.where(right, labels, 1 - labels)] * 0.8 + 0.1
        fit = dict.fromkeys(evaluate.COLUMNS, 3) | {"method": method, "fraction": fraction}
        fits.append(fit | {"seed": seed, "probs": probs.tolist()})
    return evaluate.compare_files(fits, a_test("ab", labels, groups), "mine", "About it.")


def test_a_comparison_says_who_wins_by_how_much_and_nothing_of_one_patient(few_resamples):
    files = compared("probe")
    text, (header, *table) = files["table.md"], files["table.csv"]
    rows = {row[0]: row[1:] for row in table_rows(text, "10 % of the labels")}
    full = {row[0]: row[1:] for row in table_rows(text, "100 % of the labels")}
    accuracy, gain = rows["probe"]
    low, high = (float(end.strip("[,]")) for end in gain.split()[1:])
    assert accuracy.startswith("0.700 [") and gain.startswith("0.200 [") and len(rows) == 8
    assert 0 < low < 0.2 < high < 0.4 and full["scratch"][1] == "0.000 [0.000, 0.000]"
    best = f"With 10 % of the labels probe scores highest, +{gain} over scratch; the interval"
    assert f"{best} excludes 0." in text and "About it." in text
    assert evaluate.FEW_GROUPS not in text
    assert "labels scratch scores highest." in compared("scratch")["table.md"]
    two = compared("probe", np.arange(40) // 20)["table.md"]  # [0, 0.4]
    assert "no measurable difference" in two and "excludes 0" not in two
    accuracies = [row[header.index("accuracy")] for row in table]
    assert len(table) == 24 and (accuracies[0], accuracies[6]) == (0.6, 0.8)
    own = [spots(files["label_efficiency.png"], c)[:, 1] for c in evaluate.COLORS[:2]]
    own = [y[y < 900] for y in own]  # above the legend
    assert own[0].mean() < own[1].mean() - 50 and np.ptp(own[0]) > 60  # higher, with its interval
    text = compared("probe", np.zeros(40, int))["table.md"]  # printed [nan, nan]
    assert "nan" not in text and "0.700 " in text and "no measurable difference" in text
    assert evaluate.FEW_GROUPS in text
