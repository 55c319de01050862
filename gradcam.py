"""Show where a classifier looked, and measure how far that picture can be believed.

A convolution's output is a stack of small pictures, its channels, that still know where in the scan
something was found. Grad-CAM asks by how much each channel speaks for a class (the gradient of the
class's score, averaged over the places) and adds the channels up with these weights; what speaks
against the class is cut off. The sum is a coarse map, enlarged to the scan.

    alpha_c = 1 / (h w) sum_ij d y_k / d A_cij                (Selvaraju et al., 1610.02391, Eq. 1)
    map_ij  = ReLU( sum_c alpha_c A_cij )                                                   (Eq. 2)

Every map looks convincing once it is stretched to its own maximum. So each comes with its strength
before that, and with what a sceptic asks: does the score fall faster when the hottest pixels are
taken away than when random ones are? Does the map stay with the head when the head is moved? Does
it change when the weights are drawn anew, as it must if it shows what they have learnt? Where the
lesion is known, a map can simply be wrong or right.

Shape letters: N pictures in a batch (slices) · C channels of the layer · h, w its places ·
H, W pixels (S where they are squares) · K classes.

Departures from the paper:
  - the gradient is asked for by `torch.autograd.grad`, at a leaf that the forward hook puts in,
    instead of by a backward hook: backward() would add to the gradients of every parameter;
  - a place of a ResNet looks at the pixel stride x place, and its map is put there, not half a
    place to the lower right; and `explain` averages the maps of four slightly moved pictures, which
    makes them twice as fine. The hottest point was in a phantom's lesion in 0.28 of the val part
    as published, 0.47 in its place, 0.56 with both (README).

Next: main.py
"""

import base64
import copy
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import evaluate

LAYER = "layer3"  # of the encoder
HOT = 0.5  # Activation Area counts the pixels above this share of the maximum
HEAD = 0.25  # of a picture's brightest gray values: what is brighter belongs to the head
DELETIONS = 10  # steps from the whole picture to none of it
RANDOM_ORDERS = 2  # of deletion, to compare with
SHIFT = 32  # a shift is the side divided by this: 2 pixels of 64, 4 of 128
CHECKED = 32  # pictures whose maps are made again with randomised weights
SHOWN = 24  # pictures of one class on the page, right and wrong apart; the table has all
SIDE = 192  # of a picture on the page, in pixels
# viridis (S. van der Walt and N. Smith, CC0) in ten steps: even to the eye, and in gray as well.
COLOURS = "440154 482878 3e4a89 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725"
CAUTION = (
    "For research. Not a medical device, not for diagnosis. A heat map shows which places raised "
    "the score of one class in this network. It does not show that they are diseased, where a "
    "disease ends, or that the answer is right; and what it leaves dark may have mattered, too."
)

# ---------------------------------------------------------------------------------------------
# Grad-CAM
# ---------------------------------------------------------------------------------------------


class GradCAM:
    """Maps of what spoke for a class, from any network and any layer of it.

        with GradCAM(model, "layer4") as cam:
            maps = cam(images)  # of the predicted classes

    Within the `with` the network is in eval mode; after it, whatever happened, its mode and hooks
    are as before. Gradients of parameters are never touched, and it does not matter whether any
    parameter asks for one.

    Args:
        model: maps images to logits (N, K).
        layer: one of its modules, or its name as `named_modules` has it. Of a module that runs more
            than once, the last run counts.
        stride: as `enlarge` takes it.

    Attributes:
        raw: (N, h, w) float32, the last call's maps before they were enlarged and scaled (Eq. 2);
            a map that is 0 everywhere says that nothing here spoke for the class.
        logits: (N, K) float32 of the last call.

    Raises:
        ValueError: no such layer.
    """

    def __init__(self, model: nn.Module, layer: nn.Module | str, stride: int | None = None) -> None:
        modules = dict(model.named_modules())
        found = modules.get(layer) if isinstance(layer, str) else layer
        if not any(module is found for module in modules.values()):
            names = ", ".join(name for name in modules if name.count(".") < 2 and name)
            raise ValueError(f"the model has no layer {layer!r}; it has {names}, ...")
        self.model, self.layer, self.stride, self.modes, self.hook = model, found, stride, [], None
        self.activation: Tensor | None = None  # (N, C, h, w), a leaf
        self.raw: Tensor | None = None
        self.logits: Tensor | None = None

    def __enter__(self) -> "GradCAM":
        """Switch to eval mode and hook the layer."""
        self.modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        self.hook = self.layer.register_forward_hook(self.put_leaf)
        return self

    def __exit__(self, *_: object) -> None:
        """Take the hook out, and put every module back into its mode."""
        self.hook.remove()
        self.hook = self.activation = None
        for module, training in self.modes:
            module.training = training

    def put_leaf(self, _: nn.Module, __: tuple, output: object) -> Tensor:
        """A forward hook: cut the graph here, and go on from a leaf that asks for its gradient.

        So it works where no parameter asks for one (a frozen encoder), and nothing below the layer
        is gone through backwards. What goes on is a copy, since the next module may work in place.
        """
        if not isinstance(output, Tensor) or output.ndim != 4 or output[0, 0].numel() < 2:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"the layer's output has no spatial map: expected (N, C, h, w) with h w > 1, got "
                f"{got}; take an earlier layer, or larger pictures"
            )
        self.activation = output.detach().requires_grad_()
        return self.activation.clone()

    def __call__(self, images: Tensor, class_index: int | Tensor | None = None) -> Tensor:
        """Map what speaks for a class.

        Args:
            images: (N, C, H, W), scaled as the model takes them.
            class_index: in [0, K), one for all pictures or (N,) int64; None = the predicted ones.

        Returns:
            (N, H, W) float32 in [0, 1]: `raw`, enlarged and scaled to its own maximum.

        Raises:
            RuntimeError: called outside the `with`.
            ValueError: the layer was not run, has no spatial map or does not reach the logits; the
                logits are not (N, K) or not finite; there is no such class.
        """
        if self.hook is None:
            raise RuntimeError("a GradCAM works inside its with: with GradCAM(model, layer) as cam")
        self.activation = None
        with torch.inference_mode(False), torch.enable_grad():
            logits = self.model(images.clone())  # (N, K); a clone, as inference mode has none
            N = len(images)
            if self.activation is None:
                raise ValueError("the layer was not run when the model was")
            if logits.ndim != 2 or len(logits) != N:
                raise ValueError(f"expected logits ({N}, K), got {tuple(logits.shape)}")
            if not logits.isfinite().all():
                raise ValueError("the logits are no finite numbers")
            chosen = logits.argmax(dim=1) if class_index is None else class_index
            chosen = torch.as_tensor(chosen, device=logits.device).expand(N)  # (N,)
            if not ((chosen >= 0) & (chosen < logits.shape[1])).all():
                raise ValueError(f"expected classes in [0, {logits.shape[1]}), got {class_index}")
            score = logits[torch.arange(N, device=logits.device), chosen].sum()
            # The sum's gradient at picture n is that of its own score: eval mode mixes no pictures.
            (gradient,) = torch.autograd.grad(score, self.activation, allow_unused=True)
        if gradient is None:
            raise ValueError("the layer's output does not reach the logits")
        alpha = gradient.float().mean(dim=(2, 3))  # (N, C), Eq. 1
        with torch.autocast(images.device.type, enabled=False):  # inside it, a product is bf16
            raw = torch.einsum("nc,nchw->nhw", alpha, self.activation.detach().float())
        self.raw = raw.relu()  # Eq. 2
        self.logits = logits.detach().float()
        return scaled(enlarge(self.raw, images.shape[-2:], self.stride))


def enlarge(
    raw: Tensor, shape: Sequence[int], stride: int | None = None, moved: tuple[int, int] = (0, 0)
) -> Tensor:
    """Maps (N, h, w), enlarged bilinearly to (N, *shape).

    Args:
        stride: pixels from place to place, the first of which looks at the first pixel, as in each
            stage of a ResNet, whose convolutions pad alike on both sides and then skip. None =
            places of equal size fill the picture, as is mostly assumed; that moves a ResNet's maps
            by half a place to the lower right.
        moved: by how many pixels, down and right, the picture had been moved; the map is moved
            back. Beyond the outer places it goes on as it ends.
    """
    if not stride:
        return F.interpolate(raw[:, None], tuple(shape), mode="bilinear")[:, 0]
    pixels = (torch.arange(n, device=raw.device) + m for n, m in zip(shape, moved, strict=True))
    # Pixel x is at place x / stride; grid_sample has -1 and 1 at the outer rims of h and w places.
    places = [(p / stride).clamp(0, n - 1) for p, n in zip(pixels, raw.shape[1:], strict=True)]
    y, x = ((2 * p + 1) / n - 1 for p, n in zip(places, raw.shape[1:], strict=True))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (H, W, 2)
    grid = grid.expand(len(raw), -1, -1, -1)
    return F.grid_sample(raw[:, None], grid, "bilinear", align_corners=False)[:, 0]


def scaled(maps: Tensor) -> Tensor:
    """Maps (N, H, W) >= 0, each divided by its own maximum; what is 0 everywhere stays so."""
    highest = maps.amax(dim=(1, 2), keepdim=True)  # (N, 1, 1)
    return maps / torch.where(highest > 0, highest, 1)


def move(images: Tensor, right: int, down: int) -> Tensor:
    """Pictures (..., H, W), moved by whole pixels; what comes in from outside is like the corner.

    The first pixel of a scan is background.
    """
    corner = images[..., :1, :1]
    return F.pad(images - corner, (right, -right, down, -down)) + corner  # < 0 cuts off


def fine_maps(cam: GradCAM, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Maps twice as fine as the layer's places: of the picture, moved by a quarter of a place.

    Args:
        cam: inside its `with`; with a stride, else nothing is moved.
        classes: (N,) int64.

    Returns:
        (N, H, W) float32 in [0, 1], scaled: the mean of four maps, each moved back; and their
        strength (N,): the map before it was enlarged and scaled, summed over the layer's places.
    """
    quarter, total, strength = (cam.stride or 0) // 4, 0, 0
    for right in (-quarter, quarter):
        for down in (-quarter, quarter):
            cam(move(images, right, down), classes)
            total = total + enlarge(cam.raw, images.shape[-2:], cam.stride, (down, right)) / 4
            strength = strength + cam.raw.sum(dim=(1, 2)) / 4
    return scaled(total), strength


# ---------------------------------------------------------------------------------------------
# Measures of a map
# ---------------------------------------------------------------------------------------------


def head_mask(pictures: np.ndarray) -> np.ndarray:
    """Where the head is: what is bright, and what lies between bright pixels both ways.

    Args:
        pictures: (N, S, S) uint8.

    Returns:
        (N, S, S) bool, True = head. A pixel belongs to it if there is something bright to its left
        and its right, above it and below it; so dark ventricles are inside.
    """
    x = torch.from_numpy(np.array(pictures))[:, None].float()  # (N, 1, S, S)
    x = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)[:, 0]  # no single specks
    bright = x > HEAD * x.flatten(1).quantile(0.99, dim=1)[:, None, None]  # (N, S, S) bool

    def seen(axis: int) -> Tensor:
        """Whether something bright lies on both sides along an axis."""
        before = bright.cummax(dim=axis).values
        return before & bright.flip(axis).cummax(dim=axis).values.flip(axis)

    return (seen(1) & seen(2)).numpy()


def share_within(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """How much of each map (N, S, S) lies in its mask (N, S, S) bool: (N,) in [0, 1].

    NaN where the map is 0 everywhere.
    """
    return evaluate.ratio((maps * masks).sum(axis=(1, 2)), maps.sum(axis=(1, 2)), np.nan)


def hits(maps: np.ndarray, lesions: np.ndarray) -> np.ndarray:
    """The pointing game: whether the hottest point lies in the lesion (Zhang et al., 1608.00507).

    Args:
        maps: (N, S, S) >= 0.
        lesions: (N, S, S) bool.

    Returns:
        (N,) in [0, 1]; of several hottest points the mean, so a map without a hottest point scores
        the lesion's share of the picture, and one that is 0 everywhere scores 0.
    """
    hottest = (maps == maps.max(axis=(1, 2), keepdims=True)) & (maps > 0)  # (N, S, S) bool
    return evaluate.ratio((hottest & lesions).sum(axis=(1, 2)), hottest.sum(axis=(1, 2)), 0.0)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's r of each map with the other: (N, H, W) twice -> (N,) in [-1, 1].

    NaN where one of the two is constant.
    """
    a, b = (x.cpu().double() for x in (a, b))  # Apple's GPUs have no float64
    a, b = (x - x.mean(dim=(1, 2), keepdim=True) for x in (a, b))
    scale = (a.square().sum(dim=(1, 2)) * b.square().sum(dim=(1, 2))).sqrt()  # (N,)
    return torch.where(scale > 0, (a * b).sum(dim=(1, 2)) / scale, torch.nan)


def shift_agreement(cam: GradCAM, images: Tensor, maps: Tensor, classes: Tensor) -> Tensor:
    """How well maps stay with the head when the head is moved by 1/32 of the side.

    Args:
        images: (N, 1, S, S).
        maps: (N, S, S), their `fine_maps` of `classes` (N,).

    Returns:
        (N,) mean correlation with the maps of the picture moved to the right and moved down, moved
        back; 1 is best, 0 chance.
    """
    step, found = max(1, images.shape[-1] // SHIFT), []
    for right, down in ((step, 0), (0, step)):
        back = move(fine_maps(cam, move(images, right, down), classes)[0], -right, -down)
        found.append(correlation(maps[:, :-step, :-step], back[:, :-step, :-step]))
    return torch.stack(found).nanmean(dim=0)


@torch.no_grad()
def deletion(model: nn.Module, images: Tensor, order: Tensor, classes: Tensor) -> Tensor:
    """How sure a network stays while the picture is taken away (Petsiuk et al., 1806.07421, §3.4).

    Args:
        model: in eval mode.
        images: (N, 1, S, S); what is taken away becomes like their first pixel, background.
        order: (N, S, S), the highest are taken away first.
        classes: (N,) whose probability is followed.

    Returns:
        (N,) area under the probability over the share taken away, by the trapezoid rule: in [0, 1],
        low where the first pixels mattered.
    """
    N, background = len(images), images[:, :, :1, :1]
    falling = order.flatten(1).argsort(dim=1, descending=True, stable=True)
    rank, total = falling.argsort(dim=1).view_as(order), torch.zeros(N, dtype=torch.float64)
    for k in range(DELETIONS + 1):
        gone = (rank < order[0].numel() * k // DELETIONS)[:, None]  # (N, 1, S, S) bool
        logits = model(torch.where(gone, background, images)).cpu().double()
        p = logits.softmax(dim=1).gather(1, classes.cpu()[:, None])[:, 0]  # (N,)
        total += p / (2 if k in (0, DELETIONS) else 1)
    return total / DELETIONS


def random_maps(raw: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Maps of nothing, as fine as `fine_maps`: uniform noise on twice the places of (N, h, w)."""
    N, h, w = raw.shape
    noise = torch.rand(N, 2 * h, 2 * w, generator=generator).to(raw.device)
    return scaled(enlarge(noise, shape))


class Explained(NamedTuple):
    """What is known of N pictures: parallel arrays, and one array for each measure."""

    probs: np.ndarray  # (N, K)
    maps: np.ndarray  # (N, S, S) float32, scaled
    measures: dict[str, np.ndarray]  # by name, (N,); NaN = cannot be said


def explain(
    cam: GradCAM,
    untrained: GradCAM,
    pictures: np.ndarray,
    images: Tensor,
    lesions: np.ndarray,
    generator: torch.Generator,
) -> Explained:
    """Map the predicted classes of pictures, and measure the maps.

    Args:
        cam: inside its `with`.
        untrained: the same, of the same network with random weights.
        pictures: (N, S, S) uint8.
        images: (N, 1, S, S) the same, scaled as the model takes them, on its device.
        lesions: (N, S, S) bool, True = known to be diseased; all False where nothing is known.
        generator: of the random orders, on the CPU.

    Returns:
        the maps and, by name: activation_intensity, the mean of the scaled map; activation_area,
        the per cent of its pixels above 0.5; class_confidence, the predicted class's probability;
        strength, as `fine_maps` has it, in units of the logit (of the last layer, with average
        pooling and one linear layer on top: all that spoke for the class);
        inside_head, the map's share there; deletion and deletion_random, the area under the
        probability when the hottest pixels, or random places, are taken away first;
        shift_agreement; and what `against_lesions` says of the map and, under the same names with
        _untrained and _random behind them, of maps that know nothing.
    """
    with torch.no_grad():
        probs = cam.model(images).cpu().double().softmax(dim=1)  # (N, K)
    classes, shape = probs.argmax(dim=1).to(images.device), images.shape[-2:]
    maps, strength = fine_maps(cam, images, classes)  # (N, S, S), (N,)
    chance = [random_maps(cam.raw, shape, generator) for _ in range(RANDOM_ORDERS)]
    by_chance = [deletion(cam.model, images, order, classes) for order in chance]
    hottest = deletion(cam.model, images, maps, classes)
    found = {
        "activation_intensity": maps.mean(dim=(1, 2)),
        "activation_area": 100 * (maps > HOT).float().mean(dim=(1, 2)),
        "class_confidence": probs.amax(dim=1),
        "strength": strength,
        "deletion": hottest.where(strength.cpu() > 0, torch.nan),  # an empty map has no order
        "deletion_random": torch.stack(by_chance).mean(dim=0),
        "shift_agreement": shift_agreement(cam, images, maps, classes),
    }
    measures = {name: values.cpu().double().numpy() for name, values in found.items()}
    heads = head_mask(pictures)
    measures["inside_head"] = share_within(maps.cpu().numpy(), heads)
    blind, _ = fine_maps(untrained, images, classes)
    compared = {"": maps, "_untrained": blind, "_random": chance[0]}
    for name, some in compared.items():
        told = against_lesions(some.cpu().numpy(), lesions, heads)
        measures |= {key + name: values for key, values in told.items()}
    return Explained(probs.numpy(), maps.cpu().numpy(), measures)


def against_lesions(
    maps: np.ndarray, lesions: np.ndarray, heads: np.ndarray
) -> dict[str, np.ndarray]:
    """Set maps beside the truth.

    Args:
        maps: (N, S, S) >= 0.
        lesions, heads: (N, S, S) bool.

    Returns:
        (N,) each, NaN without a lesion: pointing, as `hits` says; enrichment, the map's share in
        the lesion over the lesion's share of the head: 1 is a map spread evenly over the head,
        less one that lies beside it.
    """
    area = lesions.sum(axis=(1, 2)) / np.maximum((heads | lesions).sum(axis=(1, 2)), 1)  # (N,)
    there = np.where(area > 0, 1, np.nan)
    enrichment = evaluate.ratio(share_within(maps, lesions), area, np.nan)
    return {"pointing": hits(maps, lesions) * there, "enrichment": enrichment}


def randomisation_check(
    model: nn.Module, layer: str, images: Tensor, stages: Sequence[str], seed: int = 0
) -> dict[str, float]:
    """Whether a map changes when the weights are randomised, one stage after the other.

    From the top down (Adebayo et al., 1810.03292, §3.1) the entries of each of a stage's weights,
    and of its batch norms' statistics, are shuffled: they keep their size and lose what they have
    learnt. A map that stays what it was shows the picture's edges, not the network's reasons.

    Args:
        model: left as it is; a copy is shuffled.
        images: (N, 1, S, S), on its device.
        stages: names of its parts, the topmost first.

    Returns:
        by stage, the mean correlation of the maps with those of the unspoilt network, for the class
        that it predicts, once this stage and all above it are shuffled: 1 = nothing changed. NaN
        where all maps have become 0.
    """
    model, generator, found = copy.deepcopy(model), torch.Generator().manual_seed(seed), {}
    with GradCAM(model, layer) as cam:
        before = cam(images)
        classes = cam.logits.argmax(dim=1)
        for stage in stages:
            for value in model.get_submodule(stage).state_dict().values():
                shuffled = torch.randperm(value.numel(), generator=generator).to(value.device)
                value.copy_(value.flatten()[shuffled].view_as(value))
            found[stage] = float(correlation(before, cam(images, classes)).nanmean())
    return found


# ---------------------------------------------------------------------------------------------
# Pictures, table and page
# ---------------------------------------------------------------------------------------------

PALETTE = np.array([list(bytes.fromhex(code)) for code in COLOURS.split()])  # (10, 3)


def colour(maps: np.ndarray) -> np.ndarray:
    """Values in [0, 1] of any shape -> (..., 3) in [0, 255], along viridis."""
    steps = np.linspace(0, 1, len(PALETTE))
    return np.stack([np.interp(maps, steps, PALETTE[:, k]) for k in range(3)], axis=-1)


def overlay_picture(picture: np.ndarray, map_: np.ndarray, lesion: np.ndarray) -> Image.Image:
    """The scan, the map in colours with its scale, and the map over the scan.

    Args:
        picture: (S, S) uint8.
        map_: (S, S) in [0, 1].
        lesion: (S, S) bool, outlined in the scan.
    """
    gray = np.repeat(picture[..., None], 3, axis=2).astype(float)  # (S, S, 3)
    inner = lesion[1:-1, 1:-1] & lesion[2:, 1:-1] & lesion[:-2, 1:-1]
    scan = gray.copy()
    scan[lesion & ~np.pad(inner & lesion[1:-1, 2:] & lesion[1:-1, :-2], 1)] = (255, 90, 60)
    cover = 0.65 * map_[..., None]  # what is cold stays clear
    panels = {"scan": scan, "map": colour(map_)}
    panels["map over scan"] = (1 - cover) * gray + cover * colour(map_)
    gap, wide = 8, SIDE // evaluate.SCALE
    image, draw = evaluate.page(3 * (wide + gap) + 40, wide + 28, "", "")
    for i, (name, pixels) in enumerate(panels.items()):
        small = Image.fromarray(pixels.round().astype(np.uint8))
        spot = gap + i * (wide + gap)
        big = small.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        image.paste(big, (spot * evaluate.SCALE, gap * evaluate.SCALE))
        evaluate.write(draw, (spot, wide + gap + 2), name, 10, evaluate.MUTED)
    scale = colour(np.linspace(1, 0, SIDE))[:, None].repeat(16, axis=1)
    left = gap + 3 * (wide + gap)
    place = (left * evaluate.SCALE, gap * evaluate.SCALE)
    image.paste(Image.fromarray(scale.round().astype(np.uint8)), place)
    for value, y in (("1", gap + 5), ("0", gap + wide - 5)):  # of the map's own maximum
        evaluate.write(draw, (left + 12, y), value, 10, evaluate.MUTED, "lm")
    return image


class Shown(NamedTuple):
    """The pictures of one command: parallel arrays, as the table and the page tell them."""

    task: str
    classes: Sequence[str]
    paths: Sequence[str]
    files: Sequence[str]  # of the overlays
    labels: np.ndarray | None  # (n,) int64; None = unknown
    groups: np.ndarray  # (n,) int
    probs: np.ndarray  # (n, K)
    measures: dict[str, np.ndarray]  # by name, (n,)

    def right(self) -> np.ndarray:
        """(n,) bool, True = the prediction is the label; all True where no label is known."""
        preds = self.probs.argmax(axis=1)
        return preds == (preds if self.labels is None else self.labels)

    def table(self) -> list[tuple]:
        """explain.csv, header first; what cannot be said is an empty cell."""
        numbers = [*self.probs.T, *self.measures.values()]
        preds = self.probs.argmax(axis=1)
        rows = []
        for i, path in enumerate(self.paths):
            label = "" if self.labels is None else self.classes[self.labels[i]]
            cells = ["" if np.isnan(values[i]) else f"{values[i]:.9g}" for values in numbers]
            rows.append((path, label, self.classes[preds[i]], *cells, self.files[i]))
        names = (*(f"p_{name}" for name in self.classes), *self.measures)
        return [("path", "label", "prediction", *names, "overlay"), *rows]


MEASURES = {  # as the report calls them
    "pointing": "hottest point in the lesion",
    "enrichment": "lesion's share of map / of head",
    "inside_head": "share of the map inside the head",
    "strength": "strength before scaling (logit)",
    "activation_intensity": "activation intensity",
    "activation_area": "activation area, %",
    "class_confidence": "class confidence",
    "deletion": "confidence left by deletion",
    "shift_agreement": "agreement under small shifts",
}


def report(shown: Shown, about: str, check: dict[str, float]) -> str:
    """report.txt: each measure's mean with its interval, beside what knows nothing.

    Args:
        about: the layer and the network.
        check: as `randomisation_check` returns it.
    """
    n, right = len(shown.paths), shown.right()
    lines = [f"{shown.task}: {n:,} pictures of {len(set(shown.groups)):,} groups; {about}"]
    lines.append(" " * 42 + f"{'this network':>22}{'untrained':>22}{'random':>22}")
    for name, text in MEASURES.items():
        subsets = {"": np.ones(n, bool)}
        if name in ("pointing", "enrichment") and shown.labels is not None:
            subsets = {" (right)": right, " (wrong)": ~right}
        for which, of in subsets.items():
            cells = [
                mean_cell(shown.measures.get(name + other), of, shown.groups)
                for other in ("", "_untrained", "_random")
            ]
            lines.append(f"{text + which:42}" + "".join(f"{cell:>22}" for cell in cells))
    falls = shown.measures["deletion_random"] - shown.measures["deletion"]
    if not np.isnan(falls).all():
        verdict = "faster" if np.nanmean(falls) > 0 else "NO faster"
        lines.append(f"without its hottest places confidence falls {verdict} than without others")
    empty = int((shown.measures["strength"] == 0).sum())
    lines.append(f"{empty:,} maps are 0 everywhere: nothing in this layer spoke for the class")
    lines.append("maps left the same, weights shuffled from the top down (1 = all, 0 = none):")
    lines.append("  " + ", ".join(f"{name} {value:.2f}" for name, value in check.items()))
    return "\n".join(lines) + "\n"


def mean_cell(values: np.ndarray | None, of: np.ndarray, groups: np.ndarray) -> str:
    """A mean with its 95 % interval over groups, of what can be said; '' where nothing can."""
    if values is None or not (of := of & ~np.isnan(values)).any():
        return ""
    low, high = evaluate.mean_interval(values[of], groups[of])
    ends = "" if np.isnan(low) else f" [{low:.2f}, {high:.2f}]"
    return f"{values[of].mean():.3f}{ends}"


ABOUT = (
    "Each map is scaled to its own maximum, so look at the strength first: it is in units of the "
    "class's score (logit), before scaling. Hottest point in the lesion: how often; a map of "
    "nothing scores the lesion's share of the picture. Lesion's share of the map over its share "
    "of the head: 1 is a map spread evenly over the head. Confidence left by deletion: the mean "
    "probability of the class while the picture is taken away, hottest places first; beside it, "
    "random places first: no lower means that the map does not show what the network needs. "
    "Agreement under small shifts: how well the map stays with the head (1 is best). Intensity is "
    "the mean of the scaled map, area the per cent of it above 0.5. Brackets: 95 % intervals over "
    "groups. A known lesion is outlined in the scan."
)
STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; color: #1f2937; max-width: 72rem; margin: 0 auto;
  padding: 1rem }
h1 { font-size: 1.5rem } h2 { margin-top: 2.5rem; border-bottom: 2px solid #e5e7eb }
.caution { border-left: 4px solid #b91c1c; padding: .5rem .8rem; background: #fef2f2 }
pre { overflow-x: auto; font-size: .8rem; background: #f9fafb; padding: .8rem }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)) }
figure { margin: 0; padding: .8rem; border: 1px solid #e5e7eb; border-radius: 8px;
  break-inside: avoid }
img { width: 100%; height: auto } figcaption { font-size: .85rem; overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
td:last-child { text-align: right } td.bar { width: 45% } meter { width: 100% }
.called { font-weight: 600 } .wrong { color: #b91c1c }
h2, h3 { break-after: avoid }
@media print { body { font-size: 10pt; max-width: none } .grid { grid-template-columns: 1fr 1fr }
  pre { font-size: 7pt; overflow: visible } }
"""


def card(shown: Shown, i: int, overlay: bytes) -> str:
    """One picture of the page, in HTML."""
    called, probs = shown.probs[i].argmax(), shown.probs[i]
    path, name = escape(shown.paths[i]), escape(shown.classes[called])
    verdict = f'<span class="called">{name}</span>'
    if shown.labels is not None and shown.labels[i] != called:
        verdict += f' <span class="wrong">in truth {escape(shown.classes[shown.labels[i]])}</span>'
    bars = "".join(
        f'<tr><td>{escape(shown.classes[k])}</td><td class="bar"><meter value="{probs[k]:.4f}">'
        f"</meter></td><td>{probs[k]:.3f}</td></tr>"
        for k in np.argsort(-probs, kind="stable")
    )
    told = {text: shown.measures[key][i] for key, text in MEASURES.items()}
    rows = "".join(
        f"<tr><td>{text}</td><td>{value:.3g}</td></tr>"
        for text, value in told.items()
        if not np.isnan(value)
    )
    empty = "<p>The map is 0 everywhere.</p>" if shown.measures["strength"][i] == 0 else ""
    source = f"data:image/png;base64,{base64.b64encode(overlay).decode()}"
    return (
        f'<figure><img src="{source}" alt="scan, heat map, and both together"><figcaption>{path}'
        f"<br>{verdict}{empty}<table>{bars}</table><details open><summary>measures</summary>"
        f"<table>{rows}</table></details></figcaption></figure>"
    )


def gallery(shown: Shown, text: str, read: Callable[[str], bytes]) -> str:
    """index.html: one page that needs no network and no script.

    Args:
        text: the report.
        read: gives the bytes of an overlay, by its file's name.
    """
    right, title = shown.right(), f"{shown.task}: where the classifier looked"
    parts = {"Predictions": right}
    if shown.labels is not None:
        parts = {"Right predictions": right, "Wrong predictions": ~right}
    classes = shown.probs.argmax(axis=1) if shown.labels is None else shown.labels
    body = []
    for heading, of in parts.items():
        body.append(f"<h2>{heading}: {of.sum():,}</h2>")
        for k, name in enumerate(shown.classes):
            mine = np.flatnonzero(of & (classes == k))
            mine = mine[np.argsort(-shown.probs[mine].max(axis=1), kind="stable")]
            some = f", the surest {SHOWN} of them here" if len(mine) > SHOWN else ""
            if len(mine):
                cards = "".join(card(shown, i, read(shown.files[i])) for i in mine[:SHOWN])
                body.append(f"<h3>{escape(name)}: {len(mine):,}{some}</h3>")
                body.append(f'<div class="grid">{cards}</div>')
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f'<style>{STYLE}</style><h1>{escape(title)}</h1><p class="caution">{CAUTION}</p>'
        f"<pre>{escape(text)}</pre><p>{ABOUT}</p>{''.join(body)}</html>\n"
    )
