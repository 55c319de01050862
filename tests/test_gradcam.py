"""gradcam.py: the maps against closed forms and others' code, the measures by hand, the page."""

import base64
import html.parser
import io
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import evaluate
import gradcam
import heads
import simclr
from gradcam import GradCAM


def classifier(head: str = "linear", classes: int = 3, seed: int = 0) -> nn.Module:
    """A ResNet-18 with a head, its batch norm statistics those of some noise."""
    torch.manual_seed(seed)
    model = heads.Classifier(simclr.resnet18(), heads.HEADS[head](512, classes))
    model.train()(torch.randn(8, 1, 64, 64))
    return model.eval()


def noise(n: int = 3, size: int = 64, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, 1, size, size, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------
# The map
# ---------------------------------------------------------------------------------------------


def test_with_average_pooling_and_one_linear_layer_the_map_is_cam():
    """CAM (Zhou et al., 1512.04150): the class's weights times the last activations, over h w."""
    model, images = classifier(), noise()
    inner = nn.Sequential(*list(model.encoder.children()))  # the same modules, to run by hand
    with torch.no_grad():
        x = F.max_pool2d(F.relu(inner[1](inner[0](images))), 3, 2, 1)
        for stage in (model.encoder.layer1, model.encoder.layer2, model.encoder.layer3):
            x = stage(x)
        last = model.encoder.layer4(x)  # (N, 512, 2, 2)
    highest = []
    with GradCAM(model, "encoder.layer4") as cam:
        for k in range(3):
            cam(images, k)
            closed = torch.einsum("c,nchw->nhw", model.head.weight[k].detach(), last) / 4
            assert torch.allclose(cam.raw, closed.clamp(min=0), atol=1e-6)
            highest.append(float(cam.raw.max()))
    assert max(highest) > 0.01


def test_alpha_is_the_slope_of_the_score_along_a_channel():
    """Eq. 1 without autograd: lift a whole channel a little, and see the score move."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.Tanh(),
        nn.Conv2d(4, 3, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(108, 2),
    ).double()
    images, lift = noise(2, 10).double(), 1e-6
    activation = model[1](model[0](images)).detach()  # (2, 4, 8, 8)
    alpha = torch.zeros(2, 4, dtype=torch.float64)
    for c in range(4):
        moved = [activation.clone() for _ in range(2)]
        moved[0][:, c] += lift
        moved[1][:, c] -= lift
        up, down = (model[2:](x)[:, 1] for x in moved)
        alpha[:, c] = (up - down).detach() / (2 * lift) / 64
    expected = torch.einsum("nc,nchw->nhw", alpha, activation).clamp(min=0)
    with GradCAM(model, model[1]) as cam:
        maps = cam(images, 1)
    assert torch.allclose(cam.raw.double(), expected, atol=1e-6) and expected.max() > 1e-3
    large = F.interpolate(expected[:, None], (10, 10), mode="bilinear")[:, 0]
    large /= large.amax(dim=(1, 2), keepdim=True)
    assert torch.allclose(maps.double(), large, atol=1e-5)


@pytest.mark.parametrize("head", ["linear", "cosine_mlp"])
@pytest.mark.parametrize("stage", ["layer1", "layer2", "layer3", "layer4"])
def test_the_map_is_that_of_pytorch_grad_cam_before_scaling(head, stage):
    other = pytest.importorskip("pytorch_grad_cam", reason="pip install grad-cam")
    model, images = classifier(head), noise()
    layer = getattr(model.encoder, stage)
    theirs = []

    class Kept(other.GradCAM):
        """Theirs, keeping the map before it is scaled."""

        def get_cam_image(self, *args: object) -> np.ndarray:
            theirs.append(super().get_cam_image(*args))
            return theirs[-1]

    target = other.utils.model_targets.ClassifierOutputTarget
    with GradCAM(model, layer) as cam, Kept(model, [layer]) as kept:
        for k in range(3):
            cam(images, k)
            kept(images, [target(k)] * len(images))
            assert np.abs(np.maximum(theirs[-1], 0) - cam.raw.numpy()).max() < 1e-5
        cam(images)
        kept(images, None)  # of the predicted classes
        assert np.abs(np.maximum(theirs[-1], 0) - cam.raw.numpy()).max() < 1e-5


def test_a_model_of_others_works_although_it_works_in_place():
    """torchvision's blocks add to bn2's output in place; their ReLU runs twice, the last counts."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model, images = models.resnet18(num_classes=5).eval(), torch.randn(2, 3, 64, 64)
    kept = []
    hook = model.layer3[1].bn2.register_forward_hook(lambda m, i, o: kept.append(o.clone()))
    model(images)
    hook.remove()
    with GradCAM(model, "layer3.1.bn2") as cam:
        first = cam(images, 2)
        assert torch.equal(cam.activation, kept[0])
        assert torch.equal(cam(images, 2), first)
    with GradCAM(model, model.layer4[0].relu) as cam:
        assert cam(images).shape == (2, 64, 64)


def test_a_frozen_network_gives_the_same_map():
    model, images = classifier("cosine_mlp"), noise()
    with GradCAM(model, "encoder.layer3") as cam:
        free = cam(images)
    with GradCAM(model.requires_grad_(False), "encoder.layer3") as cam:
        assert torch.equal(cam(images), free)
        with torch.no_grad():
            assert torch.equal(cam(images), free)
        with torch.inference_mode():
            assert torch.equal(cam(noise()), free)


def test_pictures_of_a_batch_do_not_meet_and_each_may_have_its_class():
    model, images = classifier(), noise(4)
    with GradCAM(model, "encoder.layer3") as cam:
        maps = cam(images, torch.tensor([2, 0, 1, 2]))
        for i, k in enumerate([2, 0, 1, 2]):
            assert torch.allclose(cam(images[i : i + 1], k)[0], maps[i], atol=1e-5)
        predicted = cam(images)
        assert torch.equal(cam(images, cam.logits.argmax(dim=1)), predicted)
    there = cam.raw.amax(dim=(1, 2)) > 0
    assert predicted.min() >= 0 and there.any()
    assert torch.equal(predicted.amax(dim=(1, 2)), there.float())  # its own maximum, or nothing


@pytest.mark.parametrize("fails", [False, True])
def test_modes_gradients_and_hooks_are_as_before_on_every_way_out(fails):
    model = classifier("cosine_mlp").train()
    model.encoder.bn1.eval()  # a network may be in both modes
    model.head.scale.grad = torch.tensor(3.0)
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        with GradCAM(model, "encoder.layer2") as cam:
            assert not any(module.training for module in model.modules())
            cam(noise())
            cam(noise(), 7 if fails else 0)
    except ValueError:
        assert fails
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert list(grads) == ["head.scale"] and float(grads["head.scale"]) == 3.0
    assert all(p.requires_grad for p in model.parameters())


def test_what_cannot_be_mapped_is_said_clearly():
    model, images = classifier(), noise()
    for layer, size, words in (
        ("head", 64, "no spatial map.*got \\(3, 3\\)"),
        ("encoder", 64, "no spatial map.*got \\(3, 512\\)"),
        ("encoder.layer4", 32, "h w > 1, got \\(3, 512, 1, 1\\)"),
    ):
        with GradCAM(model, layer) as cam, pytest.raises(ValueError, match=words):
            cam(noise(size=size))
    with pytest.raises(ValueError, match="no layer 'layer9'; it has encoder"):
        GradCAM(model, "layer9")
    with pytest.raises(ValueError, match="no layer"):
        GradCAM(model, nn.Conv2d(1, 1, 1))  # a module of nobody
    outside = GradCAM(model, "encoder.layer3")
    with pytest.raises(RuntimeError, match="inside its with"):
        outside(images)
    with GradCAM(model, "encoder.layer3") as cam:
        for wrong in (3, -1, torch.tensor([0, 1, 3])):
            with pytest.raises(ValueError, match="classes in \\[0, 3\\)"):
                cam(images, wrong)
        with pytest.raises(ValueError, match="finite"):
            cam(images * torch.nan)

    class Aside(nn.Module):
        """Its conv is run, and what comes out is not used; `unused` is not even run."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.unused, self.fc = (
                nn.Conv2d(1, 2, 3),
                nn.Conv2d(1, 2, 3),
                nn.Linear(9, 2),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.conv(x)
            return self.fc(x.flatten(1)[:, :9])

    with GradCAM(Aside(), "conv") as cam, pytest.raises(ValueError, match="does not reach"):
        cam(images)
    with GradCAM(Aside(), "unused") as cam, pytest.raises(ValueError, match="was not run"):
        cam(images)


def test_where_nothing_speaks_for_the_class_the_map_is_zero_and_not_nan():
    model = classifier()
    nn.init.constant_(model.head.weight, -1.0)  # activations are >= 0, so all speak against
    with GradCAM(model, "encoder.layer4") as cam:
        maps = cam(noise(), 0)
    assert (cam.raw == 0).all() and (maps == 0).all()


@pytest.mark.parametrize("stage", ["layer1", "layer2"])
def test_a_resnets_place_looks_at_the_pixel_its_stride_says(stage):
    """By the gradient of a place in the middle: its centroid is at stride x place, not half on."""
    encoder, stride, images = simclr.resnet18().eval(), simclr.STRIDES[stage], noise(4, 192)
    kept = []
    encoder.get_submodule(stage).register_forward_hook(lambda m, i, o: kept.append(o))
    encoder(images.requires_grad_())
    place = 96 // stride
    (slope,) = torch.autograd.grad(kept[0][:, :, place, place].sum(), images)
    seen = slope.abs().mean(dim=(0, 1))
    centre = [
        float((seen.sum(dim=axis) * torch.arange(192.0)).sum() / seen.sum()) for axis in (0, 1)
    ]
    assert max(abs(c - 96) for c in centre) < (stride - 1) / 4  # (stride - 1) / 2 is the other rule


def test_enlarging_by_a_stride_puts_places_on_their_pixels():
    raw = torch.rand(2, 4, 5)
    maps = gradcam.enlarge(raw, (32, 40), 8)
    assert torch.allclose(maps[:, ::8, ::8], raw, atol=1e-6)
    assert torch.allclose(maps[:, 4, 8], (raw[:, 0, 1] + raw[:, 1, 1]) / 2, atol=1e-6)
    assert torch.allclose(maps[:, 31, 39], raw[:, 3, 4], atol=1e-6)  # behind the last: like it
    back = gradcam.enlarge(raw, (32, 40), 8, (2, -3))  # of a picture moved 2 down and 3 left
    assert torch.allclose(back[:, :-2, 3:], maps[:, 2:, :-3], atol=1e-6)
    assert torch.allclose(back[:, :, :3], back[:, :, 3:4], atol=1e-6)  # no frame at the rim
    plain = F.interpolate(raw[:, None], (32, 40), mode="bilinear", align_corners=False)[:, 0]
    assert torch.equal(gradcam.enlarge(raw, (32, 40)), plain)


def test_moving_is_whole_pixels_and_fills_with_the_corner():
    x = torch.arange(1.0, 13).view(1, 3, 4)
    assert gradcam.move(x, 1, 0)[0].tolist() == [[1, 1, 2, 3], [1, 5, 6, 7], [1, 9, 10, 11]]
    assert gradcam.move(x, 0, -1)[0].tolist() == [[5, 6, 7, 8], [9, 10, 11, 12], [1, 1, 1, 1]]
    assert torch.equal(gradcam.move(gradcam.move(x, 1, 1), -1, -1)[:, :2, :3], x[:, :2, :3])


def test_fine_maps_point_between_the_places():
    """A dot, and a network that sees it in squares of 8 pixels: fine maps halve the error."""

    class Coarse(nn.Module):
        """Class 1 is how bright the brightest pixel around each place is."""

        def __init__(self) -> None:
            super().__init__()
            self.look = nn.MaxPool2d(9, stride=8, padding=4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen = self.look(x).mean(dim=(1, 2, 3))
            return torch.stack([-seen, seen], dim=1)

    errors, ones = {"plain": [], "fine": []}, torch.ones(1, dtype=torch.int64)
    with GradCAM(Coarse(), "look", stride=8) as cam:
        for at in range(20, 44):
            images = torch.zeros(1, 1, 64, 64)
            images[0, 0, at, 60 - at] = 1
            both = {"plain": cam(images, 1), "fine": gradcam.fine_maps(cam, images, ones)[0]}
            for name, maps in both.items():
                spot = (maps[0] == maps[0].max()).nonzero().float().mean(dim=0)
                errors[name].append(float((spot - torch.tensor([at, 60.0 - at])).abs().max()))
    assert max(errors["plain"]) <= 4 and max(errors["fine"]) <= 2


def test_fine_maps_are_the_mean_of_four_each_moved_back_by_hand():
    model, images = classifier(), noise(2)
    ones, expected, strength = torch.ones(2, dtype=torch.int64), 0, 0
    with GradCAM(model, "encoder.layer3", 16) as cam:
        for right, down in ((-4, -4), (4, -4), (-4, 4), (4, 4)):
            moved = torch.roll(images, (down, right), dims=(2, 3))
            corner = images[:, :, :1, :1]
            rows, columns = (slice(d, None) if d > 0 else slice(None, d) for d in (down, right))
            framed = corner.expand(-1, -1, 64, 64).clone()  # what comes in is like the corner
            framed[:, :, rows, columns] = moved[:, :, rows, columns]
            cam(framed, ones)
            large = gradcam.enlarge(cam.raw, (64, 64), 16)
            expected = expected + torch.roll(large, (-down, -right), dims=(1, 2)) / 4
            strength = strength + cam.raw.sum(dim=(1, 2)) / 4
        maps, told = gradcam.fine_maps(cam, images, ones)
    assert torch.allclose(told, strength, atol=1e-5) and (told > 0).all()
    inner = expected[:, 4:-4, 4:-4] / expected[:, 4:-4, 4:-4].amax(dim=(1, 2), keepdim=True)
    ours = maps[:, 4:-4, 4:-4] / maps[:, 4:-4, 4:-4].amax(dim=(1, 2), keepdim=True)
    assert torch.allclose(ours, inner, atol=1e-4)


def test_under_bf16_the_map_is_float32_and_shuffled_weights_are_seen():
    """autocast keeps bf16 copies of weights, and turns every product into bf16."""
    model, images = classifier(), noise(4)
    plain = gradcam.randomisation_check(model, "encoder.layer3", images, ("head", "encoder.layer4"))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        with GradCAM(model, "encoder.layer3") as cam:
            cam(images)
        stages = "head", "encoder.layer4"
        check = gradcam.randomisation_check(model, "encoder.layer3", images, stages)
    assert cam.raw.dtype == torch.float32 and cam.logits.dtype == torch.float32
    assert len(cam.raw.unique()) > 0.9 * (cam.raw > 0).sum()  # eight bits would be equal often
    assert all(abs(check[stage] - plain[stage]) < 0.3 for stage in stages)


# ---------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------


def test_the_head_is_found_in_phantoms():
    """Against the outline that the phantom was drawn with."""
    paths = data.phantom_paths()[::97]
    pictures = np.stack([data.draw_phantom(path)[0] for path in paths])
    found = gradcam.head_mask(pictures)
    for path, mask in zip(paths, found, strict=True):
        true = data.Head(path).r <= 1
        assert (mask & true).sum() / (mask | true).sum() > 0.9, path


def test_shares_hits_and_enrichment_by_hand():
    maps = np.zeros((5, 4, 4))
    maps[0, 0, 0], maps[0, 3, 3] = 1.0, 0.25  # hottest in the lesion, 0.8 of the map there
    maps[1, 3, 3] = 1.0  # outside
    maps[2, :2, :2] = 1.0  # four hottest points, one of them in the lesion
    lesions = np.zeros((5, 4, 4), bool)
    lesions[:4, 0, 0] = True  # picture 3 has an empty map, picture 4 no lesion
    maps[4] = 1.0
    inside = np.zeros((5, 4, 4), bool)
    inside[:, :2] = True  # the head is 8 pixels, the lesion an eighth of it
    beside = np.zeros((1, 4, 4), bool)
    beside[0, 1:3, 0] = True  # half of the lesion lies outside the head: 2 of 9 pixels
    half = gradcam.against_lesions(maps[4:], beside, inside[4:])
    assert np.allclose(half["enrichment"], (2 / 16) / (2 / 9))
    told = gradcam.against_lesions(maps, lesions, inside)
    assert np.allclose(told["pointing"], [1, 0, 0.25, 0, np.nan], equal_nan=True)
    assert np.allclose(told["enrichment"], [0.8 * 8, 0, 2, np.nan, np.nan], equal_nan=True)
    shares = gradcam.share_within(maps, inside)
    assert np.allclose(shares, [0.8, 0, 1, np.nan, 0.5], equal_nan=True)


def test_correlation_is_numpys():
    a, b = torch.rand(2, 3, 5, 5)
    b[2] = 0.5
    ours = gradcam.correlation(a, b)
    for i in range(2):
        assert float(ours[i]) == pytest.approx(np.corrcoef(a[i].ravel(), b[i].ravel())[0, 1])
    assert ours[2].isnan()


class Corner(nn.Module):
    """Class 1 is the brightness of one quarter of the picture, class 0 is nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.ones_(self.look.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bright = self.look(x)[:, 0, :16, :16].mean(dim=(1, 2))
        return torch.stack([torch.zeros_like(bright), 8 * bright], dim=1)


def test_deletion_is_the_area_under_the_falling_probability():
    """A quarter of the picture carries all: gone after 25 %, the probability is 1/2 from there."""
    model, images = Corner(), torch.ones(2, 1, 32, 32)
    images[:, :, 0, 0] = -0.25  # the first pixel is background
    order = torch.zeros(2, 32, 32)
    order[:, :16, :16] = 1 + torch.rand(2, 16, 16)
    ones = torch.ones(2, dtype=torch.int64)
    with torch.no_grad():
        ours = gradcam.deletion(model, images, order, ones)
        p = []
        for k in range(11):  # k tenths of 1,024 pixels, all of them of the quarter's 256
            left = max(0, 256 - 1024 * k // 10)
            p.append(torch.tensor(8 * (left - 0.25 * (256 - left)) / 256).sigmoid().item())
        slow = sum((a + b) / 2 for a, b in zip(p[:-1], p[1:], strict=True)) / 10
    assert ours.tolist() == pytest.approx([slow] * 2, abs=3e-3)  # the first pixel is dark anyway
    opposite = gradcam.deletion(model, images, -order, ones)
    assert (opposite > ours + 0.3).all()


def test_a_map_that_moves_with_the_picture_agrees_and_one_that_does_not_does_not():
    torch.manual_seed(0)
    images = torch.zeros(2, 1, 32, 32)
    images[:, :, 10:20, 10:22] = torch.rand(2, 1, 10, 12)

    class Stuck(nn.Module):
        """Its map is the same wherever the picture is: noise, times how bright the picture is."""

        def __init__(self) -> None:
            super().__init__()
            self.look, self.noise = nn.Identity(), torch.rand(1, 1, 32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bright = self.look(x.mean(dim=(2, 3), keepdim=True) * self.noise).mean(dim=(1, 2, 3))
            return torch.stack([-bright, bright], dim=1)

    class Moving(nn.Module):
        """Its map is the picture."""

        def __init__(self) -> None:
            super().__init__()
            self.look = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bright = self.look(x).mean(dim=(1, 2, 3))
            return torch.stack([-bright, bright], dim=1)

    ones, found = torch.ones(2, dtype=torch.int64), {}
    for kind in (Moving, Stuck):
        with GradCAM(kind(), "look") as cam:
            maps, _ = gradcam.fine_maps(cam, images, ones)
            found[kind] = gradcam.shift_agreement(cam, images, maps, ones)
    assert torch.allclose(found[Moving], torch.ones(2, dtype=torch.float64), atol=1e-6)
    assert (found[Stuck].abs() < 0.2).all()


def test_randomising_changes_the_map_of_learnt_weights_and_not_of_equal_ones():
    model, images = classifier(), noise(6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stages = ("head", "encoder.layer4", "encoder.conv1")
    check = gradcam.randomisation_check(model, "encoder.layer3", images, stages)
    assert list(check) == list(stages) and all(value < 0.9 for value in check.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert check == gradcam.randomisation_check(model, "encoder.layer3", images, stages)
    # Where all of a stage's weights are equal, shuffling does nothing: the map has to stay.
    with torch.no_grad():
        for value in model.head.parameters():
            value.fill_(0.1)
    stay = gradcam.randomisation_check(model, "encoder.layer3", images, ("head",))
    assert stay["head"] == pytest.approx(1)


def explained(lesions: bool = True) -> tuple[gradcam.Explained, np.ndarray]:
    model, other = classifier(), classifier(seed=5)
    paths = [path for path in data.phantom_paths() if path.startswith("tumor/glioma")][:6]
    drawn = [data.draw_phantom(path) for path in paths]
    pictures = np.stack([data.fit_square(picture, 64) for picture, _ in drawn])
    marks = np.stack([data.lesion_of(None, path, 64) for path in paths])
    x = heads.scaled(pictures, {"mean": 0.5, "std": 0.5}, torch.device("cpu"))
    with (
        GradCAM(model, "encoder.layer3", 16) as cam,
        GradCAM(other, "encoder.layer3", 16) as untrained,
    ):
        how = x, marks & lesions, torch.Generator().manual_seed(0)
        return gradcam.explain(cam, untrained, pictures, *how), pictures


def test_explain_measures_what_its_names_say():
    found, pictures = explained()
    maps, measures = found.maps, found.measures
    model, x = classifier(), heads.scaled(pictures, {"mean": 0.5, "std": 0.5}, torch.device("cpu"))
    classes = torch.from_numpy(found.probs.argmax(axis=1))
    own = gradcam.deletion(model, x, torch.from_numpy(maps), classes).numpy()
    with GradCAM(model, "encoder.layer3", 16) as cam:
        strength = gradcam.fine_maps(cam, x, classes)[1].numpy()
        shifts = gradcam.shift_agreement(cam, x, torch.from_numpy(maps), classes).numpy()
    assert np.allclose(measures["strength"], strength, atol=1e-5)
    assert np.allclose(measures["deletion"], np.where(strength > 0, own, np.nan), equal_nan=True)
    assert not np.allclose(measures["deletion_random"], own, atol=1e-4)
    assert np.allclose(measures["shift_agreement"], shifts, atol=1e-5, equal_nan=True)
    inside = gradcam.share_within(maps, gradcam.head_mask(pictures))
    assert np.allclose(measures["inside_head"], inside, equal_nan=True)
    assert np.allclose(measures["activation_intensity"], maps.mean(axis=(1, 2)))
    hot = (maps > 0.5).reshape(6, -1).sum(axis=1) / 64**2
    assert np.allclose(measures["activation_area"], 100 * hot)
    assert np.allclose(measures["class_confidence"], found.probs.max(axis=1))
    for name in ("pointing", "enrichment"):
        three = [measures[name + kind] for kind in ("", "_untrained", "_random")]
        assert not any(np.isnan(values).any() for values in three)
        assert not np.allclose(three[0], three[1]) or name == "pointing"
    unknown, _ = explained(lesions=False)
    assert np.isnan(unknown.measures["pointing"]).all()
    assert np.array_equal(unknown.maps, maps)


# ---------------------------------------------------------------------------------------------
# Pictures, table and page
# ---------------------------------------------------------------------------------------------


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB (CIE 15:2004, D65) of sRGB in [0, 255]: where equal steps look equal."""
    c = rgb / 255
    c = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    xyz = c @ np.array(
        [[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]]
    )
    f = np.cbrt(xyz / [0.9505, 1.0, 1.089])
    return np.stack(
        [116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1
    )


def test_the_colours_are_even_to_the_eye_and_rise_in_lightness():
    seen = lab(gradcam.colour(np.linspace(0, 1, 41)))
    lightness = np.diff(seen[:, 0])
    assert (lightness > 0).all() and lightness.max() / lightness.min() < 2
    assert gradcam.colour(np.array([0.0, 1.0])).tolist() == [[68, 1, 84], [253, 231, 37]]


def shown(labels: bool = True, n: int = 60) -> gradcam.Shown:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet([1, 1], n)
    paths = [f'p{i}/<b>scan & "{i}"</b>.png' for i in range(n)]
    paths[0] = "a\n<script>alert(1)</script>.png"
    measures = {key: rng.random(n) for key in (*gradcam.MEASURES, "deletion_random")}
    measures["pointing"][: n // 2] = np.nan
    measures["strength"][1] = 0.0
    told = rng.integers(0, 2, n) if labels else None
    names = [f"{i}.png" for i in range(n)]
    classes = ["<ill>", "well"]
    return gradcam.Shown("mine", classes, paths, names, told, np.arange(n) // 2, probs, measures)


def overlay() -> bytes:
    map_, picture = np.linspace(0, 1, 64 * 64).reshape(64, 64), np.full((64, 64), 90, np.uint8)
    lesion = np.zeros((64, 64), bool)
    lesion[20:30, 20:30] = True
    return evaluate.as_bytes(".png", gradcam.overlay_picture(picture, map_, lesion))


def test_an_overlay_shows_scan_map_and_both_with_a_legend():
    image = np.asarray(Image.open(io.BytesIO(overlay())).convert("RGB")).astype(int)
    side, step = gradcam.SIDE, gradcam.SIDE + 16
    scan, map_, both = (image[16 : 16 + side, x : x + side] for x in (16, 16 + step, 16 + 2 * step))
    assert scan[5, 5].tolist() == [90] * 3  # gray
    outline = (scan == (255, 90, 60)).all(axis=2)
    assert outline.any() and not outline[80:85, 70:75].any()  # the rim alone
    assert np.abs(map_[0, 0] - [68, 1, 84]).max() < 3  # cold is violet, hot is yellow
    assert np.abs(map_[-1, -1] - [253, 231, 37]).max() < 3
    assert np.abs(both[0, 0] - 90).max() < 3  # what is cold leaves the scan as it is
    legend = image[16 : 16 + side, 16 + 3 * step + 4]
    assert (
        np.abs(legend[0] - [253, 231, 37]).max() < 6 and np.abs(legend[-1] - [68, 1, 84]).max() < 6
    )


class Page(html.parser.HTMLParser):
    """Collects a page's tags, attributes and text, and sees that what opens is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        self.text.append(text)


def test_the_page_needs_nothing_from_elsewhere_and_escapes_every_name():
    some = shown()
    page = gradcam.gallery(some, "a <report>", lambda file: overlay())
    parsed = Page(page)
    assert not parsed.open and "script" not in parsed.tags and "b" not in parsed.tags
    assert not re.search(r"https?:|url\(|@import", page)
    assert {name for name, _ in parsed.attributes} <= {
        "lang", "charset", "name", "content", "class", "src", "alt", "value", "open"
    }  # fmt: skip
    text = "".join(parsed.text)
    for path in some.paths:
        assert path in text
    assert "a <report>" in text and "in truth <ill>" in text and gradcam.CAUTION in text
    assert text.count("The map is 0 everywhere.") == 1
    sources = [value for name, value in parsed.attributes if name == "src"]
    assert len(sources) == len(some.paths)
    start = "data:image/png;base64,"
    assert all(base64.b64decode(s.removeprefix(start)) == overlay() for s in sources)


@pytest.mark.parametrize("labels", [True, False])
def test_the_page_goes_by_right_or_wrong_then_class_then_confidence(labels):
    some = shown(labels, n=40)  # so few that all are on the page
    text = gradcam.gallery(some, "", lambda file: b"")
    order = [int(n) for n in re.findall(r"<figcaption>p(\d+)/", text)]  # all but picture 0
    preds = some.probs.argmax(axis=1)
    truth = some.labels if labels else preds
    keys = [(preds[i] != truth[i], truth[i], -some.probs[i].max()) for i in order]
    assert keys == sorted(keys) and sorted(order) == list(range(1, 40))
    heads_ = re.findall(r"<h2>([^<]+)</h2>", text)
    right = int((preds == truth).sum())
    expected = [f"Right predictions: {right}", f"Wrong predictions: {40 - right}"]
    assert heads_ == (expected if labels else ["Predictions: 40"])


def test_a_page_of_many_pictures_says_how_many_it_shows():
    some = shown(labels=False, n=200)
    text = gradcam.gallery(some, "", lambda file: b"")
    assert text.count("<figure>") == 2 * gradcam.SHOWN
    assert f"the surest {gradcam.SHOWN} of them here" in text


def test_the_table_has_a_row_for_each_picture_and_empty_cells_for_what_is_unknown():
    some = shown()
    header, *rows = some.table()
    assert header[:5] == ("path", "label", "prediction", "p_<ill>", "p_well")
    assert len(rows) == 60 and all(len(row) == len(header) for row in rows)
    where = header.index("pointing")
    assert all(row[where] == "" for row in rows[:30]) and all(row[where] for row in rows[30:])
    assert shown(labels=False).table()[1][1] == ""


def test_the_report_has_intervals_and_says_what_is_empty():
    some = shown()
    text = gradcam.report(some, "maps of layer3", {"head": 0.25, "encoder.layer4": float("nan")})
    assert "60 pictures of 30 groups" in text and "1 maps are 0 everywhere" in text
    assert "head 0.25" in text and "(right)" in text and "(wrong)" in text
    falls = some.measures["deletion_random"].mean() > some.measures["deletion"].mean()
    assert f"confidence falls {'faster' if falls else 'NO faster'}" in text
    values = some.measures["inside_head"]
    low, high = evaluate.mean_interval(values, some.groups)
    assert f"{values.mean():.3f} [{low:.2f}, {high:.2f}]" in text


def chromium(*words: str) -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if not found:
        pytest.skip("no chromium here")
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
    done = subprocess.run([found, *quiet, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_browser_shows_the_page_on_a_phone_without_a_network(tmp_path):
    """In Chromium, 390 pixels wide: all pictures load, and nothing runs out of the screen."""
    page = gradcam.gallery(shown(n=8), "a report\n" + "wide " * 60, lambda file: overlay())
    asked = "document.title = [...document.images].every(i => i.naturalWidth > 0) + ' ' + "
    asked += "document.images.length + ' ' + document.documentElement.scrollWidth"
    script = f"<script>addEventListener('load', () => {{ {asked} }})</script></html>"
    file = tmp_path / "page.html"
    file.write_text(page.replace("</html>", script))  # of the test's: the page has none
    where = f"--user-data-dir={tmp_path}/browser", "--window-size=390,800", "--hide-scrollbars"
    told = re.search(
        r"<title>(\w+) (\d+) (\d+)</title>", chromium(*where, "--dump-dom", f"file://{file}")
    )
    assert told[1] == "true" and told[2] == "8"
    assert int(told[3]) <= 500  # headless Chromium makes no window narrower than 500
