"""data.py: views against torchvision, reading, groups and splits with planted leaks, phantoms."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data


def head(seed: int, size: int = 96) -> np.ndarray:
    """A picture unlike any other: smooth random blobs, (size, size) uint8."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def save(path: Path, pixels: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def read(root: Path, tmp_path: Path, image_size: int = 32) -> data.Collection:
    return data.load(root, image_size, tmp_path / "cache")


def split_of(task: data.Task, collection: data.Collection) -> dict[str, str]:
    return {collection.pictures.paths[r]: s for r, s in zip(task.rows, task.split, strict=True)}


# --- the views, operation by operation, against torchvision ------------------------------------


@pytest.fixture
def tv():
    """torchvision's functional transforms; a skip, with the reason, where it does not import."""
    reason = "torchvision is the oracle here, and it does not import"
    return pytest.importorskip("torchvision.transforms.v2.functional", reason=reason)


@pytest.fixture
def pictures() -> torch.Tensor:
    heads = np.stack([head(s, 64) for s in range(4)])
    return torch.from_numpy(heads)[:, None].double() / 255  # (4, 1, 64, 64)


def columns(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([v], dtype=torch.float64) for v in values]


def test_rotation_matches_torchvision(tv, pictures):
    for degrees in (-30.0, 7.0, 90.0):
        ours = data.resample(pictures[:1], data.rotation_matrix(*columns(degrees)))
        theirs = tv.rotate(pictures[:1], degrees, tv.InterpolationMode.BILINEAR)
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_affine_matches_torchvision(tv, pictures):
    shift_x, shift_y, scale, shear = 4 / 64, -3 / 64, 1.1, 6.0
    ours = data.resample(pictures[:1], data.affine_matrix(*columns(shift_x, shift_y, scale, shear)))
    theirs = tv.affine(
        pictures[:1], 0.0, [4, -3], scale, [shear, 0.0], tv.InterpolationMode.BILINEAR
    )
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_flip_matches_torchvision(tv, pictures):
    ours = data.resample(
        pictures, data.flip_matrix(torch.tensor([True, False, True, False])).double()
    )
    assert torch.allclose(ours[::2], tv.horizontal_flip(pictures[::2]), atol=1e-12)
    assert torch.allclose(ours[1::2], pictures[1::2], atol=1e-12)


def test_crop_matches_torchvision(tv, pictures):
    """But for the rim, where we see what lies beside the crop and torchvision repeats its edge."""
    left, top, width, height = 10, 6, 40, 32
    ours = data.resample(
        pictures[:1], data.crop_matrix(*columns(left / 64, top / 64, width / 64, height / 64))
    )
    theirs = tv.resized_crop(
        pictures[:1], top, left, height, width, [64, 64], tv.InterpolationMode.BILINEAR, False
    )
    assert torch.allclose(ours[..., 2:-2, 2:-2], theirs[..., 2:-2, 2:-2], atol=1e-6)


def test_composed_views_are_one_resampling_of_the_operations_in_order(pictures):
    """Nearly: one resampling blurs less than four, so smooth pictures agree to a few percent."""
    smooth = data.gaussian_blur(pictures.float(), torch.full((4,), 3.0)).double()
    parts = [
        data.crop_matrix(*columns(0.1, 0.05, 0.7, 0.8)),
        data.flip_matrix(torch.tensor([True])).double(),
        data.rotation_matrix(*columns(10.0)),
        data.affine_matrix(*columns(0.03, -0.02, 1.04, 4.0)),
    ]
    one_by_one = smooth[:1]
    for part in parts:
        one_by_one = data.resample(one_by_one, part)
    at_once = data.resample(smooth[:1], parts[0] @ parts[1] @ parts[2] @ parts[3])
    error = (one_by_one - at_once).abs()[..., 12:-12, 12:-12]
    assert error.max() < 0.02
    backwards = data.resample(smooth[:1], parts[3] @ parts[2] @ parts[1] @ parts[0])
    assert (one_by_one - backwards).abs()[..., 12:-12, 12:-12].max() > 0.05


def test_jitter_matches_torchvision(tv, pictures):
    factors = [0.6, 0.9, 1.1, 1.4]
    brightness = data.jitter_brightness(pictures, torch.tensor(factors).double())
    contrast = data.jitter_contrast(pictures, torch.tensor(factors).double())
    for i, factor in enumerate(factors):
        # torchvision keeps the factor in float32
        assert torch.allclose(brightness[i], tv.adjust_brightness(pictures[i], factor), atol=1e-7)
        assert torch.allclose(contrast[i], tv.adjust_contrast(pictures[i], factor), atol=1e-7)


def test_blur_matches_torchvision_and_zero_leaves_the_picture(tv, pictures):
    sigma = torch.tensor([0.4, 1.3, 2.0, 0.0])
    ours = data.gaussian_blur(pictures.float(), sigma)
    for i in range(3):
        theirs = tv.gaussian_blur(pictures[i].float(), [7, 7], [float(sigma[i])])
        assert torch.allclose(ours[i], theirs, atol=1e-6)
    assert torch.equal(ours[3], pictures[3].float())
