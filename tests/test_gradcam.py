"""gradcam.py: maps against closed forms and others' code, measures by slow loops, the page."""

import contextlib
import html
import re
import shutil
import subprocess
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import evaluate
import gradcam
import simclr
from gradcam import GradCAM


def net(seed: int = 0) -> nn.Sequential:
    """A ResNet-18 with one linear layer on top, its batch norm statistics those of some noise."""
    torch.manual_seed(seed)
    model = nn.Sequential(OrderedDict(encoder=simclr.resnet18(), head=nn.Linear(512, 3)))
    model(torch.randn(8, 1, 64, 64))
    return model.eval()


def noise(n: int = 3, size: int = 64) -> torch.Tensor:
    return torch.randn(n, 1, size, size, generator=torch.Generator().manual_seed(1))


def test_with_average_pooling_and_one_linear_layer_the_map_is_cam():
    """CAM (Zhou et al., 1512.04150): the class's weights times the last activations, over h w."""
    model, images = net(), noise()
    with torch.no_grad():
        model.head.weight[2].abs_().neg_()  # activations are >= 0: nothing speaks for class 2
    with GradCAM(model, "encoder.layer4") as cam:
        for k in range(3):
            maps = cam(images, k)
            closed = torch.einsum("c,nchw->nhw", model.head.weight[k], cam.activation).detach() / 4
            assert torch.allclose(cam.raw, closed.clamp(min=0), atol=1e-6)
            assert (maps.amax(dim=(1, 2)) == (closed.amax(dim=(1, 2)) > 0).float()).all()  # no NaN


def test_alpha_is_the_slope_of_each_images_own_score_along_a_channel():
    """Eq. 1 without autograd. Frozen weights and an in-place ReLU on top are no obstacles."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 3), nn.Tanh()
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(108, 3)).double().requires_grad_(False)
    images, classes, each = noise(3, 10).double(), torch.tensor([2, 0, 1]), torch.arange(3)
    activation, expected = model[0](images), torch.zeros(3, 8, 8).double()
    for c in range(4):
        lift = torch.zeros(1, 4, 1, 1)
        lift[:, c] = 1e-6
        slope = (model[1:](activation + lift) - model[1:](activation - lift)) / 2e-6  # (3, 3)
        expected += slope[each, classes][:, None, None] / 64 * activation[:, c]
    with GradCAM(model, "0") as cam, torch.no_grad():
        cam(images, classes)
    assert torch.allclose(cam.raw, expected.clamp(min=0), atol=1e-6) and cam.raw.max() > 1e-3


@pytest.mark.parametrize("stage", ["layer2", "layer3", "layer4"])
def test_the_map_is_that_of_pytorch_grad_cam_before_scaling(stage):
    other = pytest.importorskip("pytorch_grad_cam", reason="pip install grad-cam")
    model, images, target = net(), noise(), other.utils.model_targets.ClassifierOutputTarget
    layer = getattr(model.encoder, stage)
    with GradCAM(model, layer) as cam, other.GradCAM(model, [layer]) as kept:
        for k in (0, 1, None):  # None = the predicted classes
            cam(images, k)
            kept(images, None if k is None else [target(k)] * len(images))
            store = kept.activations_and_grads
            found = (values[0].numpy() for values in (store.activations, store.gradients))
            theirs = kept.get_cam_image(None, None, None, *found)
            assert np.abs(np.maximum(theirs, 0) - cam.raw.numpy()).max() < 1e-5


@pytest.mark.parametrize("layer, k", [("layer2", 0), ("layer2", 3), ("layer2", -1), ("layer4", 0)])
def test_modes_gradients_and_hooks_are_as_before_on_every_way_out(layer, k):
    model = net().train()
    model.encoder.bn1.eval()  # a network may be in both modes
    model.head.bias.grad = torch.tensor([3.0, 0.0, 0.0])
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    wrong = pytest.raises(ValueError, match="classes in .0, 3|no spatial map: .3, 512, 1, 1")
    way_out = contextlib.nullcontext() if (layer, k) == ("layer2", 0) else wrong
    with way_out, GradCAM(model, f"encoder.{layer}") as cam:
        assert not any(module.training for module in model.modules())
        cam(noise(size=32), k)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    grads = {name: p.grad.tolist() for name, p in model.named_parameters() if p.grad is not None}
    assert grads == {"head.bias": [3, 0, 0]}


def test_a_resnets_cell_is_put_on_the_pixel_that_it_looks_at():
    """By the gradient of a cell in the middle: its centroid is at stride * cell, not half on."""
    encoder, stride, kept = simclr.resnet18().eval(), simclr.STRIDES["layer2"], []
    images = noise(2, 192).requires_grad_()
    encoder.layer2.register_forward_hook(lambda m, i, output: kept.append(output))
    encoder(images)
    (slope,) = torch.autograd.grad(kept[0][:, :, 96 // stride, 96 // stride].sum(), images)
    centre = np.average(np.arange(192), weights=slope.abs().sum(dim=(0, 1, 2)))
    assert abs(centre - 96) < (stride - 1) / 4  # (stride - 1) / 2 is the other rule
    raw = torch.rand(2, 4, 5)
    maps = gradcam.enlarge(raw, (32, 40), 8)
    assert torch.allclose(maps[:, ::8, ::8], raw, atol=1e-6)
    assert torch.allclose(maps[:, 4, 8], (raw[:, 0, 1] + raw[:, 1, 1]) / 2, atol=1e-6)


def test_fine_maps_are_the_mean_of_four_each_shifted_back_by_hand():
    model, images, ones = net(), F.pad(noise(2, 48), (8, 8, 8, 8)), torch.ones(2).long()
    expected = torch.zeros(2, 64, 64)
    with GradCAM(model, "encoder.layer3", 16) as cam:
        for down, right in ((-4, -4), (4, -4), (-4, 4), (4, 4)):
            cam(torch.roll(images, (down, right), dims=(2, 3)), ones)  # the rim is background
            large = gradcam.enlarge(cam.raw, (64, 64), 16)
            expected += torch.roll(large, (-down, -right), dims=(1, 2)) / 4
        maps, strength = gradcam.fine_maps(cam, images, ones)
    ours = maps * strength[:, None, None]
    assert torch.allclose(ours[:, 4:-4, 4:-4], expected[:, 4:-4, 4:-4], atol=1e-5)  # rims differ
    assert torch.allclose(maps.amax(dim=(1, 2)), torch.ones(2)) and (strength > 1e-3).all()


def scans(n: int = 6, size: int = 32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gray ellipses with dark ventricles and, in two of three, a bright disc; masks of the two."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    brains = np.repeat(((x / 0.36) ** 2 + (y / 0.44) ** 2 < 1)[None], n, axis=0)
    images, lesions = 100.0 * brains, np.zeros_like(brains)
    images[:, (np.abs(x) < 0.06) & (np.abs(y) < 0.12)] = 5
    for i in range(n):
        lesions[i] = (x - 0.18 * (-1) ** i) ** 2 + (y - 0.02 * i) ** 2 < 0.01 * (i % 3 > 0)
    images = np.where(lesions, 220, images) + np.random.default_rng(0).normal(0, 4, images.shape)
    return images.clip(0, 255).astype(np.uint8), brains, lesions


@torch.no_grad()
def test_shares_pointing_game_and_deletion_are_those_of_slow_loops():
    model, images, classes = net(), noise(2, 32), torch.tensor([2, 0])
    masks, maps = torch.rand(2, 32, 32) < 0.3, torch.rand(2, 32, 32).round(decimals=1)  # with ties
    shares, pointing = gradcam.share_within(maps, masks), gradcam.pointing_game(maps, masks)
    areas = gradcam.deletion(model, images, maps, classes)
    for n in range(2):
        # The hottest go first, and equal ones from the top left.
        pixels = sorted((-float(maps[n, i, j]), i, j) for i in range(32) for j in range(32))
        inside = sum(value for value, i, j in pixels if masks[n, i, j])
        hits = [bool(masks[n, i, j]) for value, i, j in pixels if value == pixels[0][0]]
        left, curve = images[n].clone(), []
        for k in range(11):
            for _, i, j in pixels[: 1024 * k // 10]:
                left[0, i, j] = images[n, 0, 0, 0]
            curve.append(float(model(left[None]).softmax(dim=1)[0, classes[n]]))
        slow = sum((a + b) / 2 / 10 for a, b in zip(curve[:-1], curve[1:], strict=True))
        expected = inside / sum(value for value, _, _ in pixels), sum(hits) / len(hits), slow
        assert (shares[n], pointing[n], areas[n]) == pytest.approx(expected, abs=1e-5)
    assert gradcam.deletion(model, images, 0 * maps, classes).isnan().all()  # it has no order
    assert gradcam.share_within(0 * maps, masks).isnan().all()  # and is nowhere
    assert gradcam.pointing_game(0 * maps, masks).isnan().all()


def test_the_random_order_takes_areas_of_the_foreground_first_and_then_the_rest():
    """Over the whole image it would be spent on background, and any map of the head would win."""
    squares, brains = (torch.from_numpy(array).float() for array in scans(4, 128)[:2])
    mask = gradcam.foreground_mask(squares)  # with its dark ventricles
    assert (mask * brains).sum() > 0.98 * torch.maximum(mask, brains).sum() and mask[0, 64, 64] == 1
    order = gradcam.random_order(mask, (4, 4), torch.Generator().manual_seed(0))
    assert order[mask == 1].min() >= order[mask == 0].max() and len(order.unique()) > 1000
    step = (order[:, 64, 41:87] - order[:, 64, 40:86]).abs().mean()
    assert step < 0.5 * order[mask == 1].std()  # areas, not pixels


def test_explain_measures_what_its_names_say():
    squares, _, lesions = (torch.from_numpy(array) for array in scans())
    x, seed = squares[:, None].float() / 127.5 - 1, torch.Generator().manual_seed
    model, other = net(), net(3)
    confidence, classes = model(x).detach().softmax(dim=1).max(dim=1)
    with GradCAM(model, "encoder.layer2", 8) as cam, GradCAM(other, "encoder.layer2", 8) as blind:
        maps, measures = gradcam.explain(cam, blind, x, lesions, seed(0))
        ours, strength = gradcam.fine_maps(cam, x, classes)
        untrained, _ = gradcam.fine_maps(blind, x, classes)  # of the classes that ours predicts
    gray, generator = x[:, 0] + 1, seed(0)  # of x, explain takes the minimum off
    mask, known = gradcam.foreground_mask(gray), lesions.flatten(1).any(dim=1)
    expected = {"class_confidence": confidence, "strength": strength}
    expected["inside_foreground_by_random"] = mask.mean(dim=(1, 2))
    area = lesions.sum(dim=(1, 2)) / mask.sum(dim=(1, 2))
    for beside, order in {"": ours, "_by_untrained": untrained, "_by_brightness": gray}.items():
        expected["deletion" + beside] = gradcam.deletion(model, x, order, classes)
        expected["inside_foreground" + beside] = gradcam.share_within(order, mask)
        expected["pointing" + beside] = gradcam.pointing_game(order, lesions).where(known, np.nan)
        expected["enrichment" + beside] = gradcam.share_within(order, lesions) / area
    orders = [gradcam.random_order(mask, (4, 4), generator) for _ in range(4)]  # one is luck
    expected["deletion_by_random"] = sum(gradcam.deletion(model, x, o, classes) for o in orders) / 4
    for name, values in expected.items():
        assert np.allclose(measures[name], values, atol=1e-5, equal_nan=True), name
    assert np.array_equal(maps, ours) and known.sum() == 4


def test_shuffling_goes_from_the_top_down_and_what_is_above_stays_shuffled():
    model, images = net(), noise(4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check = gradcam.randomisation_check(model, "encoder.layer3", images, ["head", "encoder.layer4"])
    assert list(check) == ["head", "encoder.layer4"] and max(check.values()) < 0.9
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # Where a stage's values are all equal, shuffling it does nothing: what is above decides alone.
    model.encoder.layer4[1].bn2.reset_parameters()
    equal = "encoder.layer4.1.bn2"
    check = gradcam.randomisation_check(model, "encoder.layer3", images, ["head", equal])
    assert check[equal] == pytest.approx(check["head"], abs=1e-5) and check["head"] < 0.9


def test_an_overlay_shows_scan_and_map_large_with_the_lesion_in_both():
    map_, lesion = np.linspace(np.zeros(64), np.ones(64), 64), np.zeros((64, 64), bool)
    lesion[20:30, 20:30] = True
    image = np.asarray(gradcam.overlay(np.full((64, 64), 90, np.uint8), map_, lesion)).astype(int)
    assert image.shape == (512, 2 * 512, 3)  # the page shows the halves
    for panel in np.split(image, 2, axis=1):
        outline = (panel == (255, 60, 60)).all(axis=2)
        assert outline.any() and not outline[165:235, 165:235].any() and not outline[:150].any()
    assert image[5, 5].tolist() == image[2, 517].tolist() == [90] * 3  # cold: the scan
    assert np.abs(image[-1, 517] - [196, 182, 56]).max() < 3  # hot: 65 % is viridis's yellow


SHUFFLED, EMPTY = {"head": 0.31, "layer4": 0.12}, np.arange(40) < 5


def columns(gain: float = 0.1) -> dict[str, np.ndarray]:
    """40 images with hostile names; maps leave less confidence than random areas, by gain +- .1."""
    rng, classes = np.random.default_rng(0), np.array(["<ill>", "well", "deletion_by_random & co"])
    probs, chance = rng.dirichlet([1, 1, 1], 40), np.where(EMPTY, 0.9, 0.5)  # .9 moves the mean
    table = {"path": np.array([f'p{i}/<b>scan & "{i}"</b>\n.png' for i in range(40)])}
    table |= {"group": np.arange(40) // 2, "label": classes[rng.integers(0, 3, 40)]}
    table |= {"prediction": classes[probs.argmax(axis=1)], "class_confidence": probs.max(axis=1)}
    table |= {f"p_{name}": probs[:, k] for k, name in enumerate(classes)}
    table |= {"strength": np.where(EMPTY, 0, 0.7), "deletion_by_random": chance}
    table["deletion"] = np.where(EMPTY, np.nan, chance - gain + np.tile([-0.1, -0.1, 0.1, 0.1], 10))
    table["inside_foreground"] = np.where(EMPTY, np.nan, np.linspace(0.4, 0.7, 40))
    table["inside_foreground_by_untrained"] = np.where(np.arange(40) % 2, np.nan, 0.3)
    table |= {"inside_foreground_by_random": np.full(40, 0.45), "pointing": np.full(40, np.nan)}
    return table | {"overlay": np.array([f"{i}#.png" for i in range(40)])}


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_the_summary_draws_a_verdict_only_where_the_paired_interval_excludes_zero():
    verdicts = {0.1: "faster than .*: they show", -0.1: "more slowly than .*: do not believe"}
    verdicts |= {0.02: "not measurably faster than .*: do not rely"}
    for gain, verdict in verdicts.items():
        assert re.search(
            f"confidence {verdict}", one_line(gradcam.summary(columns(gain), SHUFFLED))
        )
        alone = columns(gain) | {"group": np.zeros(40, int)}  # a patient says nothing about others
        assert "not measurably" in gradcam.summary(alone, SHUFFLED)
    sentences = one_line(gradcam.summary(columns(), SHUFFLED))
    assert "holds 57% of the maps and fills 45% of the image." in sentences
    assert "5 of 40 maps are empty (20 of the untrained network's)" in sentences
    assert "0.31 (head), 0.12 (layer4)" in sentences
    assert "All maps are empty" in gradcam.summary(columns() | {"strength": 0 * EMPTY}, SHUFFLED)


def test_the_report_compares_on_the_same_images_and_sets_correct_and_wrong_apart():
    table = columns()
    text = gradcam.report("mine\n# <b>", table, SHUFFLED)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows, correct = {row[0]: row[1:] for row in cells}, table["label"] == table["prediction"]
    parts = {"all images": correct | True, "correct": correct, "wrong": ~correct}
    assert gradcam.READING in text
    assert rows["mean of"] == [f"{name} ({part.sum()})" for name, part in parts.items()]
    for name in ("deletion", "deletion minus random", "inside foreground minus untrained"):
        own, _, beside = name.replace(" ", "_").partition("_minus_")
        values = table[own] - (table[f"{own}_by_{beside}"] if beside else 0)  # NaN on either side
        for cell, part in zip(rows[name], parts.values(), strict=True):
            there = part & np.isfinite(values)
            low, high = evaluate.mean_interval(values[there], table["group"][there])
            assert cell == f"{values[there].mean():.3f} [{low:.3f}, {high:.3f}]"
    assert len({len(line) for line in lines}) == 1 and text.startswith("# mine # <b>\n")
    assert not re.search(r"\bright\b|nan|deletion by random", text)
    assert "pointing" not in rows and "pointing minus random" not in rows  # no lesion is known


def test_the_page_puts_wrong_answers_first_needs_nothing_and_escapes_every_name():
    table = columns()
    text = gradcam.page("mine <b>", table, SHUFFLED)
    known = "html meta title style h1 p details summary pre figure figcaption a img".split()
    assert set(re.findall(r"<(\w+)", text)) == set(known) and "<details open" not in text
    shown, summary = html.unescape(text), gradcam.summary(table, SHUFFLED) + "</p>"
    assert not re.search(r"https?:|url\(|@import|\bright\b(?! \})|\bnan\b", shown)
    assert all(path in shown for path in table["path"]) and "<h1>mine &lt;b&gt;</h1>" in text
    for words in (gradcam.CAUTION, gradcam.READING, summary):
        assert words in shown.split("<pre>")[0]
    figures = re.findall("<figure>(.*?)</figure>", text, re.DOTALL)
    order = [int(re.search(r'src="(\d+)%23.png"', figure)[1]) for figure in figures]
    correct = table["label"] == table["prediction"]
    keys = [(correct[i], -table["class_confidence"][i]) for i in order]
    assert sorted(order) == list(range(40)) and keys == sorted(keys)  # and surest first
    for i, figure in zip(order, figures, strict=True):
        answer = re.search("True class (.*?)</figcaption>", figure, re.DOTALL)[1]
        answer = html.unescape(answer).replace("\n", " ")
        assert answer.startswith(f"{table['label'][i]}, predicted {table['prediction'][i]} ")
        shares = [float(share) for share in re.findall(r"([\d.]+)%", answer)]
        assert shares == sorted(shares, reverse=True) and len(shares) == 3
        assert ('class="wrong"' in figure) != correct[i]
    assert 'class="wrong"' not in gradcam.page("", table | {"label": np.full(40, "")}, SHUFFLED)


def test_a_browser_shows_the_page_on_a_phone_without_running_over(tmp_path):
    """In a frame 390 pixels wide, since headless Chromium makes no window narrower than 500."""
    chromium = shutil.which("chromium") or pytest.skip("no chromium here")
    table = {name: values[:4] for name, values in columns().items()}
    table["path"], table["label"] = np.array(["x" * 300] * 4), np.array(["y" * 100] * 4)
    for file in table["overlay"]:
        gradcam.overlay(np.zeros((64, 64)), np.eye(64), np.eye(64) > 0).save(tmp_path / file)
    text = gradcam.page("mine", table, SHUFFLED).replace("<details>", "<details open>")
    script = """onload = () => {
        const page = document.querySelector("iframe").contentDocument
        const large = [...page.images].every(i => i.naturalWidth > 0 && i.clientWidth >= 256)
        document.title = [page.body.scrollWidth, page.images.length, large].join(" ") }"""
    frame = f'<iframe srcdoc="{html.escape(text)}" style="width: 390px; height: 99px; border: 0">'
    (tmp_path / "frame.html").write_text(f"<script>{script}</script>{frame}")
    words = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --dump-dom"
    words += " --disable-background-networking --disable-component-update --disable-sync"
    words += f" --user-data-dir={tmp_path / 'profile'} file://{tmp_path / 'frame.html'}"
    done = subprocess.run([chromium, *words.split()], capture_output=True, text=True, timeout=120)
    width, images, large = re.search(r"<title>(\d+) (\d+) (\w+)</title>", done.stdout).groups()
    assert int(width) <= 390 and (images, large) == ("8", "true")
