"""Show where a classifier looked, and measure how far that map can be believed.

A convolution's output is a stack of small images, its channels, which still know where in the scan
something was found. Grad-CAM asks how strongly each channel speaks for a class (the gradient of the
class's score, averaged over the cells) and adds the channels up with these weights; what speaks
against the class is cut off. The sum is a coarse map, enlarged to the size of the scan.

    alpha_c = 1 / (h w) sum_ij d y_k / d A_cij                (Selvaraju et al., 1610.02391, Eq. 1)
    map_ij  = ReLU( sum_c alpha_c A_cij )                                                   (Eq. 2)

Every map looks convincing once it is stretched to its own maximum. So each is measured as a sceptic
would: how strong was it before that? Does it lie in the foreground (the head, or the brain of a
skull-stripped scan), and where the lesion is known, in the lesion? Does the confidence fall faster
when the hottest areas are taken away than when random areas of the foreground are? Does the map
change when the weights are shuffled, as it must if it shows what they have learned?

Shape letters: N images in a batch (slices) · C channels of the layer · h, w its cells ·
H, W pixels (S, where the image is a square) · K classes.

Departures from the paper:
  - the gradient is taken by `torch.autograd.grad` at a leaf that the forward hook puts in, not by
    a backward hook: backward() would add to the gradients of every parameter;
  - cell j of a ResNet looks at pixel stride * j, and its value is put there, not half a cell to the
    lower right; and `explain` averages the maps of four slightly shifted images, which makes them
    twice as fine. The hottest point was in a phantom's lesion in 0.28 of the val split as
    published, in 0.47 once cells were placed by stride, in 0.56 with four images as well.

Next: main.py
"""

import copy
from html import escape
from urllib.parse import quote

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor, nn

import evaluate

LAYER = "layer3"  # of the encoder; chosen on the phantoms' val split, matters (docs/gradcam.md)
BRIGHT = 0.25  # of an image's brightest gray values: what is brighter is foreground
STEPS = 10  # of deletion, from the whole image to none of it
ORDERS = 4  # random orders of deletion, averaged: a single one is luck
SIDE = 512  # pixels of a scan in its overlay, shown at half of that: screens are fine
# viridis (S. van der Walt and N. Smith, CC0) in nine steps: even to the eye, and in gray as well.
VIRIDIS = np.array([*bytes.fromhex("440154472d7b3b528b2c728e21918c28ae805ec962addc30fde725")])

# ---------------------------------------------------------------------------------------------
# The map
# ---------------------------------------------------------------------------------------------


class GradCAM:
    """Maps of what speaks for a class, from any network and any convolution of it.

        with GradCAM(model, "layer4") as cam:
            maps = cam(images)  # of the predicted classes

    Inside the `with` the network is in eval mode; after it, whatever happened, its modes and hooks
    are as before. Gradients of parameters are never touched, and frozen parameters are no obstacle.

    Args:
        model: maps images to logits (N, K).
        layer: one of its modules, or that module's name. Where it runs twice, the last run counts.
        stride: pixels from cell to cell, as `enlarge` takes it.

    Attributes:
        raw: (N, h, w), the last call's maps before enlarging and scaling (Eq. 2); 0 everywhere
            means that nothing in this layer spoke for the class.
        logits: (N, K) of the last call.
    """

    def __init__(self, model: nn.Module, layer: nn.Module | str, stride: int | None = None) -> None:
        self.model = model
        self.layer = model.get_submodule(layer) if isinstance(layer, str) else layer
        self.stride = stride

    def __enter__(self) -> "GradCAM":
        """Switch to eval mode and hook the layer."""
        self.modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        self.hook = self.layer.register_forward_hook(self.put_leaf)
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the hook, and put every module back into its mode."""
        self.hook.remove()
        for module, training in self.modes.items():
            module.training = training

    def put_leaf(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        """A forward hook: cut the graph here, and go on from a leaf that asks for its gradient.

        Thus it works where no parameter asks for one, and nothing below the layer is run backwards.
        What goes on is a copy, since the next module may work in place.
        """
        self.activation = output.detach().requires_grad_()  # (N, C, h, w)
        return self.activation.clone()

    def __call__(self, images: Tensor, class_index: int | Tensor | None = None) -> Tensor:
        """Map what speaks for a class.

        Args:
            images: (N, C, H, W) float, scaled as the model takes them.
            class_index: in [0, K), one for all images or (N,) int64; None = the predicted classes.

        Returns:
            (N, H, W) in [0, 1]: `raw`, enlarged and divided by its own maximum.

        Raises:
            ValueError: the layer was not run or has no spatial map; there is no such class.
        """
        self.activation = torch.empty(0)  # until the layer runs
        with torch.enable_grad():
            logits = self.model(images)  # (N, K)
            shape = self.activation.shape
            if len(shape) != 4 or shape[2:].numel() < 2:
                raise ValueError(f"the layer was not run or has no spatial map: {tuple(shape)}")
            classes = logits.argmax(dim=1) if class_index is None else class_index
            classes = torch.as_tensor(classes, device=logits.device).expand(len(images))  # (N,)
            if classes.min() < 0 or classes.max() >= logits.shape[1]:
                raise ValueError(f"expected classes in [0, {logits.shape[1]}), got {class_index}")
            # The sum's gradient at image n is that of its own score: eval mode mixes no images.
            score = logits.gather(1, classes[:, None]).sum()
            (gradient,) = torch.autograd.grad(score, self.activation)  # (N, C, h, w)
        alpha = gradient.mean(dim=(2, 3), keepdim=True)  # (N, C, 1, 1), Eq. 1
        self.raw = (alpha * self.activation.detach()).sum(dim=1).relu()  # (N, h, w), Eq. 2
        self.logits = logits.detach()
        return scaled(enlarge(self.raw, images.shape[-2:], self.stride))


def enlarge(raw: Tensor, shape: tuple, stride: int | None, down: int = 0, right: int = 0) -> Tensor:
    """Maps (N, h, w), enlarged bilinearly to (N, *shape).

    Args:
        stride: pixels from cell to cell, the first of which looks at the first pixel, as in each
            stage of a ResNet, whose convolutions pad alike on both sides and then skip. None =
            cells of equal size fill the image, as is mostly assumed; that moves a ResNet's maps by
            half a cell to the lower right.
        down, right: pixels by which the image had been shifted; the map is shifted back.
    """
    rows = cell_weights(shape[0], raw.shape[1], stride, down).to(raw)  # (H, h)
    columns = cell_weights(shape[1], raw.shape[2], stride, right).to(raw)  # (W, w)
    return rows @ raw @ columns.T  # (N, H, W)


def cell_weights(pixels: int, cells: int, stride: int | None, shift: int) -> Tensor:
    """How much each pixel of a line takes from each cell: (pixels, cells), rows sum to 1.

    >>> cell_weights(4, 2, stride=2, shift=0).tolist()  # pixel 1 lies halfway, 3 beyond the last
    [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [0.0, 1.0]]
    """
    pixel = torch.arange(pixels) + shift
    cell = pixel / stride if stride else (pixel + 0.5) * cells / pixels - 0.5  # (pixels,)
    distance = cell.clamp(0, cells - 1)[:, None] - torch.arange(cells)  # (pixels, cells)
    return (1 - distance.abs()).clamp(min=0)


def scaled(maps: Tensor) -> Tensor:
    """Maps (N, H, W) >= 0, each divided by its own maximum; what is 0 everywhere stays so."""
    return maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


def fine_maps(cam: GradCAM, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Maps twice as fine as the layer's cells, from images shifted by a quarter of a cell.

    Args:
        cam: inside its `with`; without a stride nothing is shifted.
        classes: (N,) int64.

    Returns:
        (N, H, W) in [0, 1]: the mean of four maps, each shifted back, then scaled; and (N,) its
        strength, which is its maximum before it was scaled, in logits. Both on the CPU.
    """
    quarter = (cam.stride or 0) // 4
    corner = images[:, :, :1, :1]  # background: what comes in from outside is like it
    total = torch.zeros(())
    for down in (-quarter, quarter):
        for right in (-quarter, quarter):
            # A padding below 0 cuts off: the image moves down and right.
            cam(F.pad(images - corner, (right, -right, down, -down)) + corner, classes)
            total = total + enlarge(cam.raw, images.shape[-2:], cam.stride, down, right).cpu() / 4
    return scaled(total), total.amax(dim=(1, 2))


# ---------------------------------------------------------------------------------------------
# What it is worth
# ---------------------------------------------------------------------------------------------


def foreground_mask(gray: Tensor) -> Tensor:
    """What is no background: each row of an image, from its first bright pixel to its last.

    Of a skull-stripped scan that is the brain; of any other the whole head, with skull and skin.

    Args:
        gray: (N, S, S) float >= 0, 0 = black.

    Returns:
        (N, S, S) float, 1 = foreground, 0 = outside. The dark ventricles are inside.
    """
    brightest = gray.flatten(1).quantile(0.99, dim=1)  # (N,)
    bright = (gray > BRIGHT * brightest[:, None, None]).float()  # (N, S, S), 1 = bright
    to_the_left = bright.cummax(dim=2).values  # 1 = something bright lies here or to the left
    return to_the_left * bright.flip(2).cummax(dim=2).values.flip(2)  # and here or to the right


def share_within(maps: Tensor, masks: Tensor) -> Tensor:
    """How much of each map (N, S, S) >= 0 lies in its mask (N, S, S), 1 = inside: (N,) in [0, 1].

    NaN where the map is 0 everywhere.
    """
    return (maps * masks).sum(dim=(1, 2)) / maps.sum(dim=(1, 2))


def pointing_game(maps: Tensor, lesions: Tensor) -> Tensor:
    """Whether the hottest point lies in the lesion (Zhang et al., 1608.00507): (N,) 0 or 1.

    Of several hottest points the share that does, so a map spread evenly over the foreground scores
    like a random point of it. NaN where the map is 0 everywhere.
    """
    hottest = (maps == maps.amax(dim=(1, 2), keepdim=True)) & (maps > 0)  # (N, S, S) bool
    return share_within(hottest.float(), lesions)


@torch.no_grad()
def deletion(model: nn.Module, images: Tensor, order: Tensor, classes: Tensor) -> Tensor:
    """How confident a network stays while the image is taken away (Petsiuk et al., 1806.07421).

    Args:
        model: in eval mode.
        images: (N, 1, S, S); what is taken away becomes background, like their first pixel.
        order: (N, S, S) >= 0, the highest go first; equal ones go from the top left.
        classes: (N,) int64, whose probability is followed.

    Returns:
        (N,) float64 in [0, 1], area under the probability over the share taken away (trapezoids),
        on the CPU: low where what went first mattered. NaN where `order` is 0 everywhere.
    """
    descending = order.flatten(1).argsort(dim=1, descending=True, stable=True)
    # The argsort of an order is the turn of each pixel: 0 = goes first.
    rank = descending.argsort(dim=1).view(images.shape).to(images.device)  # (N, 1, S, S)
    curve = []
    for step in range(STEPS + 1):
        gone = rank < rank[0].numel() * step // STEPS  # (N, 1, S, S) bool, True = taken away
        probs = model(torch.where(gone, images[:, :, :1, :1], images)).softmax(dim=1)  # (N, K)
        curve.append(probs.gather(1, classes[:, None])[:, 0].cpu().double())
    area = torch.trapezoid(torch.stack(curve), dx=1 / STEPS, dim=0)  # (N,)
    return area.where(order.amax(dim=(1, 2)) > 0, torch.nan)


def random_order(foregrounds: Tensor, cells: tuple[int, int], generator: Generator) -> Tensor:
    """An order of deletion that knows the foreground and nothing else: random areas, then outside.

    Random areas of the whole image would be spent on background, and any map that prefers the
    foreground would win: on phantoms .375, against .300 within the foreground and .278 by the maps
    (docs/gradcam.md).

    Args:
        foregrounds: (N, S, S) float, 1 = foreground.
        cells: (h, w) of the layer; the areas are as fine as `fine_maps`, half a cell.
    """
    noise = torch.rand(len(foregrounds), 2 * cells[0], 2 * cells[1], generator=generator)
    # In [0, 1) outside, in [1, 2) inside.
    return enlarge(noise, foregrounds.shape[1:], None) + foregrounds


def centred(maps: Tensor) -> Tensor:
    """Maps (N, S, S) as rows (N, S S) of mean 0: the cosine of two is Pearson's r of their maps."""
    return maps.flatten(1) - maps.mean(dim=(1, 2))[:, None]


def randomisation_check(model: nn.Module, layer: str, images: Tensor, stages: list[str]) -> dict:
    """Whether maps change when the weights are shuffled, one stage after the other.

    From the top down (Adebayo et al., 1810.03292, §3.1) the entries of each of a stage's weights,
    and of its batch norms' statistics, are shuffled: they keep their size and lose what they have
    learned; what is above stays shuffled. A map that stays as it was shows the image's edges, not
    the network's reasons. The maps are those of `GradCAM` without a stride, not of `fine_maps`: a
    quarter of the time, and both sides of a correlation are placed alike.

    Args:
        model: left as it is; a copy is shuffled.
        images: (N, 1, S, S), on its device.
        stages: names of its parts, the topmost first.

    Returns:
        by stage, the mean correlation (Pearson's r) of the maps with those of the intact network,
        for the class that it predicts, once this stage and all above it are shuffled: 1 =
        unchanged. It is of the same images for every stage, those whose map was not empty at first;
        a map that becomes empty counts 0. NaN where all were empty.
    """
    shuffled = copy.deepcopy(model)
    generator = Generator().manual_seed(0)
    correlations = {}
    with GradCAM(shuffled, layer) as cam:
        intact = centred(cam(images))  # (N, S S)
        drawn = cam.raw.flatten(1).any(dim=1)  # (N,) bool, False = the map is empty
        classes = cam.logits.argmax(dim=1)
        for stage in stages:
            for value in shuffled.get_submodule(stage).state_dict().values():
                order = torch.randperm(value.numel(), generator=generator).to(value.device)
                value.copy_(value.flatten()[order].view_as(value))
            r = F.cosine_similarity(intact, centred(cam(images, classes)))  # (N,)
            correlations[stage] = float(r[drawn].mean())
    return correlations


@torch.no_grad()
def explain(
    cam: GradCAM, untrained: GradCAM, images: Tensor, lesions: Tensor, generator: Generator
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Map what spoke for the predicted classes of a batch, and measure the maps.

    Args:
        cam: inside its `with`.
        untrained: the same, of the same network with random weights.
        images: (N, 1, S, S), scaled as the model takes them, on its device.
        lesions: (N, S, S) bool, True = known to be diseased; all False where nothing is known.
        generator: of the random orders, on the CPU.

    Returns:
        maps (N, S, S) float32 in [0, 1], and measures by name, (N,) float64 each, NaN = undefined:
        - activation_intensity, mean of the map; activation_area, share of it above 0.5;
          class_confidence, before calibration: as they are published;
        - strength, as `fine_maps` has it; 0 = an empty map, of which what follows is NaN;
        - inside_foreground, the share of the map there; deletion, as the function of that name;
        - where a lesion is known: pointing, as `pointing_game`; enrichment, the lesion's share of
          the map over its share of the foreground; 1 = spread evenly over the foreground.
        deletion_by_untrained and the like say the same of what stands beside the map: the untrained
        network's map of the same class, the brightness of the scan, or what is random.
    """
    confidence, classes = cam.model(images).softmax(dim=1).max(dim=1)  # (N,), (N,)
    maps, strength = fine_maps(cam, images, classes)  # (N, S, S), (N,)
    blind, _ = fine_maps(untrained, images, classes)
    gray = scaled((images - images.amin(dim=(2, 3), keepdim=True)).cpu()[:, 0])  # (N, S, S)
    foregrounds = foreground_mask(gray)  # (N, S, S), 1 = foreground
    # All NaN (0 / 0) where no lesion is known; so is then what is computed from it.
    lesions = lesions / lesions.amax(dim=(1, 2), keepdim=True)
    area = share_within(torch.maximum(foregrounds, lesions), lesions)  # (N,), of the foreground
    orders = [random_order(foregrounds, cam.raw.shape[1:], generator) for _ in range(ORDERS)]
    by_chance = [deletion(cam.model, images, order, classes) for order in orders]
    measures = {"strength": strength, "deletion_by_random": torch.stack(by_chance).mean(dim=0)}
    sources = {"": maps, "_by_untrained": blind, "_by_brightness": gray}
    for beside, source in sources.items():
        measures["deletion" + beside] = deletion(cam.model, images, source, classes)
        measures["inside_foreground" + beside] = share_within(source, foregrounds)
        measures["pointing" + beside] = pointing_game(source, lesions)
        measures["enrichment" + beside] = share_within(source, lesions) / area
    # Random points of the image lie in the foreground, and of the foreground in the lesion, for:
    measures["inside_foreground_by_random"] = foregrounds.mean(dim=(1, 2))
    measures["pointing_by_random"] = area
    measures |= {"class_confidence": confidence, "activation_intensity": maps.mean(dim=(1, 2))}
    measures["activation_area"] = (maps > 0.5).double().mean(dim=(1, 2))
    return maps.numpy(), {name: values.cpu().double().numpy() for name, values in measures.items()}


# ---------------------------------------------------------------------------------------------
# Overlay, report and page
#
# `columns` is explain.csv, an array (N,) for each column by its name: path, group, label ("" where
# none is known), prediction, p_<class> of each class (calibrated), the measures of `explain`, and
# overlay, the PNG's file name beside index.html. A float column that is no p_ is a measure.
# `shuffled` is what `randomisation_check` returned.
# ---------------------------------------------------------------------------------------------

CAUTION = """For research, not for diagnosis. Yellow areas raised one class's score most; a red line
is a known lesion. Yellow need not be diseased, and the answer can be wrong wherever it lies."""
READING = """Deletion, the confidence left as a map's hottest areas are taken away: lower is better.
Inside foreground, pointing (at the lesion) and enrichment: higher is better. "By" untrained,
brightness or random is what a map is compared with, "minus" the difference. The rest describes."""
STYLE = """body { font: 16px/1.5 system-ui; max-width: 60rem; margin: auto; padding: 1rem }
figure { margin: 3rem 0; overflow-wrap: anywhere } figcaption { font-weight: 600 }
.wrong, .caution { color: #b91c1c } pre { overflow-x: auto } img + img { object-position: right }
a { display: grid; gap: .5rem; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)) }
img { width: 100%; aspect-ratio: 1; object-fit: cover; object-position: left }"""


def colour(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] of any shape -> (..., 3) in [0, 255], along viridis."""
    steps = np.linspace(0, 1, 9)
    return np.stack([np.interp(values, steps, VIRIDIS[k::3]) for k in range(3)], axis=-1)


def overlay(square: np.ndarray, map_: np.ndarray, lesion: np.ndarray) -> Image.Image:
    """The scan, and beside it the map over the scan, yellow at its maximum.

    Args:
        square: (S, S) uint8.
        map_: (S, S) in [0, 1]; where it is cold, the scan stays clear.
        lesion: (S, S) bool, outlined in both.
    """
    layers = torch.from_numpy(np.stack([square, map_, lesion])).float()[None]  # (1, 3, S, S)
    gray, heat, diseased = F.interpolate(layers, (SIDE, SIDE), mode="bilinear")[0].numpy()
    scan = np.stack([gray, gray, gray], axis=-1)  # (SIDE, SIDE, 3) in [0, 255]
    both = scan + 0.65 * heat[..., None] * (colour(heat) - scan)
    wider = F.max_pool2d(torch.from_numpy(diseased)[None], 7, stride=1, padding=3)[0].numpy()
    outline = (wider > 0.5) & (diseased <= 0.5)  # (SIDE, SIDE) bool, 3 pixels around the lesion
    scan[outline] = both[outline] = (255, 60, 60)
    panels = np.concatenate([scan, both], axis=1)  # (SIDE, 2 SIDE, 3)
    return Image.fromarray(panels.round().astype(np.uint8))


def summary(columns: dict[str, np.ndarray], shuffled: dict[str, float]) -> str:
    """What the maps are worth, in three sentences.

    A verdict on deletion is drawn only where the 95 % interval of the difference excludes 0. The
    difference is paired, image by image, and leaves out empty maps, which have no order, on both
    sides. A single group has no interval and gets no verdict.
    """
    drawn = columns["strength"] > 0  # (N,) bool, False = the map is empty
    blank = np.isnan(columns["inside_foreground_by_untrained"])  # (N,) bool, of the untrained ones
    if not drawn.any():
        return "All maps are empty: nothing in this layer spoke for the predicted classes."
    gain = (columns["deletion_by_random"] - columns["deletion"])[drawn]
    low, high = evaluate.mean_interval(gain, columns["group"][drawn]) or (0, 0)  # one group
    verdict = "not measurably faster than random areas of the foreground: do not rely on them"
    if low > 0:
        verdict = "faster than random areas of the foreground: they show what the network needs"
    if high < 0:
        verdict = "more slowly than random areas of the foreground: do not believe them"
    unchanged = ", ".join(f"{r:.2f} ({stage})" for stage, r in shuffled.items())
    inside = columns["inside_foreground"][drawn].mean()
    filled = columns["inside_foreground_by_random"][drawn].mean()
    return f"""The foreground (the head, or the brain of a skull-stripped scan) holds {inside:.0%}
of the maps and fills {filled:.0%} of the image. Taking the hottest areas away lowers confidence
{verdict}. {(~drawn).sum()} of {len(drawn)} maps are empty ({blank.sum()} of the untrained
network's); when weights are shuffled from the top down, the others correlate with what they were by
{unchanged}."""


def mean_cell(values: np.ndarray, groups: np.ndarray) -> str:
    """The mean of what is defined, with its 95 % interval over groups; '' where nothing is."""
    defined = np.isfinite(values)
    if not defined.any():
        return ""
    interval = evaluate.mean_interval(values[defined], groups[defined])
    return evaluate.number(values[defined].mean(), interval)


def report(title: str, columns: dict[str, np.ndarray], shuffled: dict[str, float]) -> str:
    """report.md: the summary, and a table of each measure's mean with its 95 % interval.

    "deletion minus random" is the difference to what stands beside the map, taken image by image,
    so both sides are of the same images. Correct and wrong answers stand apart; a measure that is
    defined for no image has no row.
    """
    known, correct = columns["label"] != "", columns["label"] == columns["prediction"]  # (N,) bool
    parts = {"all images": np.ones_like(known), "correct": correct, "wrong": known & ~correct}
    rows = [["mean of", *(f"{name} ({part.sum()})" for name, part in parts.items())]]
    for name in sorted(columns):
        own, _, beside = name.partition("_by_")
        if columns[name].dtype == float and not name.startswith("p_"):
            values = columns[own] - columns[name] if beside else columns[own]
            cells = [mean_cell(values[part], columns["group"][part]) for part in parts.values()]
            if cells[0]:
                rows.append([name.replace("_by_", " minus ").replace("_", " "), *cells])
    texts = [f"# {' '.join(title.split())}", CAUTION, summary(columns, shuffled), READING]
    return "\n\n".join([*texts, evaluate.table(rows)]) + "\n"


def figure(row: dict) -> str:
    """One image of the page, from its row of `columns`: the answer, the images, the measures.

    Scan and overlay are the halves of one PNG, side by side or, on a phone, one below the other.
    """
    ranked = sorted((name for name in row if name.startswith("p_")), key=row.get, reverse=True)
    answer = ", ".join(f"{name[2:]} {row[name]:.1%}" for name in ranked)
    mark = "answer" if row["label"] in ("", row["prediction"]) else "wrong"
    numbers = [name for name in row if isinstance(row[name], float) and np.isfinite(row[name])]
    measured = [f"{name.replace('_', ' ')} {row[name]:.2f}" for name in numbers if name[:2] != "p_"]
    source = quote(row["overlay"])
    return f"""<figure><figcaption class="{mark}">True class {escape(row["label"] or "unknown")},
predicted {escape(answer)}</figcaption><a href="{source}"><img src="{source}" alt="scan">
<img src="{source}" alt="map over scan"></a>{" · ".join(measured[:4])}<details><summary>more
</summary>{escape(row["path"])} · {" · ".join(measured[4:])}</details></figure>"""


def page(title: str, columns: dict[str, np.ndarray], shuffled: dict[str, float]) -> str:
    """index.html, for a reader of scans: no script, nothing from a network, every name escaped."""
    figures = ""
    # Wrong answers first, and of them the most confident.
    for i in np.lexsort((-columns["class_confidence"], columns["label"] == columns["prediction"])):
        figures += figure({name: column[i] for name, column in columns.items()})
    heading = escape(title)
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport"
content="width=device-width, initial-scale=1"><title>{heading}</title><style>{STYLE}</style>
<h1>{heading}</h1><p class="caution">{CAUTION}</p><p>{escape(summary(columns, shuffled))}</p>
<p>{escape(READING)}</p><details><summary>all measures</summary>
<pre>{escape(report(title, columns, shuffled))}</pre></details>{figures}</html>
"""
