"""data.py: views against torchvision, reading, groups and splits with planted leaks, phantoms."""

import hashlib
import io
import os
import re
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import heads


def head(seed: int, size: int = 96) -> np.ndarray:
    """A picture unlike any other: smooth random blobs, (size, size) uint8."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def save(path: Path, pixels: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def read(root: Path, tmp_path: Path, image_size: int = 32) -> heads.Study:
    return heads.load(root, image_size, tmp_path / "cache")


def split_of(task: heads.Task, collection: heads.Study) -> dict[str, str]:
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


def test_views_depend_on_their_own_numbers_alone():
    """Drawn for the whole batch and then sliced: chunks and processes see the same views."""
    images = torch.from_numpy(np.stack([head(s, 32) for s in range(6)]))[:, None]
    parameters = data.draw_views(6, data.generator_for(0, 1, 2))
    whole = data.apply_views(images, parameters)
    sliced = torch.cat(
        [data.apply_views(images[i : i + 2], parameters.rows(slice(i, i + 2))) for i in (0, 2, 4)]
    )
    assert torch.allclose(whole, sliced, atol=1e-6)


def test_random_views_are_two_different_normalised_views():
    images = torch.from_numpy(np.stack([head(s, 32) for s in range(40)]))[:, None]
    view_a, view_b = data.random_views(images, data.generator_for(0))
    assert view_a.shape == view_b.shape == (40, 1, 32, 32) and view_a.dtype == torch.float32
    assert view_a.min() >= -1 and view_a.max() <= 1 and view_a.min() < -0.9
    assert not torch.allclose(view_a, view_b, atol=0.1)
    again, _ = data.random_views(images.float() / 255, data.generator_for(0))
    assert torch.allclose(view_a, again, atol=1e-6)  # bytes and floats are the same picture
    with pytest.raises(ValueError, match="expected"):
        data.random_views(images[..., :16], data.generator_for(0))


def test_view_numbers_have_the_documented_ranges_and_chances():
    views = data.draw_views(4000, data.generator_for(1))
    area = torch.linalg.det(views.matrix).abs()
    assert 0.15 < area.min() < 0.25 and 0.9 < area.max() < 1.2  # scale of the affine included
    flipped = (torch.linalg.det(views.matrix) < 0).float().mean()
    assert abs(flipped - 0.5) < 0.03
    assert abs((views.sigma > 0).float().mean() - 0.5) < 0.03
    blurred = views.sigma[views.sigma > 0]
    assert 0.1 <= blurred.min() < 0.15 and 1.95 < blurred.max() <= 2.0
    assert abs((views.brightness == 1).float().mean() - 0.2) < 0.03
    assert 0.6 <= views.contrast.min() < 0.62 and 1.38 < views.contrast.max() <= 1.4


def test_seeds_of_neighbouring_steps_are_unrelated():
    keys = [(s, e, b) for s in range(3) for e in range(3) for b in range(3)]
    assert len({data.seed_from(*key) for key in keys}) == len(keys)
    assert torch.equal(
        torch.rand(3, generator=data.generator_for(1, 2, 3)),
        torch.rand(3, generator=data.generator_for(1, 2, 3)),
    )


# --- writing -----------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "deep" / "file"
    with data.write_atomically(path) as file:
        file.write(b"old")
    with pytest.raises(RuntimeError), data.write_atomically(path) as file:
        file.write(b"half of the new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


# --- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I", "F", "I;16"])
def test_every_pil_mode_becomes_the_same_gray_bytes(tmp_path, mode):
    gray = np.zeros((20, 30), np.uint8)
    gray[5:15, 10:20] = 255
    image = Image.fromarray(gray)
    if mode == "I;16":
        image = Image.fromarray(gray.astype(np.uint16) * 200)  # 51000: clipping would leave 255
    elif mode == "F":
        image = Image.fromarray(gray.astype(np.float32) / 1000)  # tiny: rounding would leave 0
    elif mode != "L":
        image = image.convert(mode)
    path = tmp_path / ("x.tif" if mode in ("F", "I", "CMYK") else "x.png")
    image.save(path)
    assert np.abs(data.read_gray(path).astype(int) - gray).max() <= 1


def test_what_is_transparent_becomes_black(tmp_path):
    pixels = np.full((8, 8, 4), 255, np.uint8)
    pixels[:4, :, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert data.read_gray(tmp_path / "x.png").tolist() == [[0] * 8] * 4 + [[255] * 8] * 4


def test_squares_keep_the_aspect_ratio_and_are_padded_black():
    square = data.fit_square(np.full((50, 100), 200, np.uint8), 64)
    assert square.shape == (64, 64)
    assert (square[16:48] == 200).all() and not square[:16].any() and not square[48:].any()
    assert (data.fit_square(np.full((3, 3), 9, np.uint8), 64) == 9).all()


def test_thumbnails_average_areas():
    """Bilinear or nearest pixels would link strangers into chains of twins."""
    blocks = head(0, 64).reshape(32, 2, 32, 2).mean(axis=(1, 3))
    assert np.abs(data.thumbnail(head(0, 64)) - blocks).max() <= 1


def test_unreadable_pictures_are_named_and_left_out(tmp_path):
    """Every kind of file that looks like a picture and is none, or is one that nobody can read."""
    root = tmp_path / "scans"
    for i in range(6):
        save(root / "a" / f"{i}.png", head(i))
    (root / "a" / "broken.png").write_bytes(b"\x89PNG, but no more")
    (root / "a" / "empty.jpg").write_bytes(b"")
    save(tmp_path / "whole.jpg", head(7))
    whole = (tmp_path / "whole.jpg").read_bytes()
    (root / "a" / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "a" / "text.tif").write_text("this is no picture, whatever its name says")
    (root / "a" / "link.png").symlink_to(tmp_path / "nowhere.png")
    for name, side in (("bomb", 30_000), ("warned", 10_000)):  # of the second PIL would only warn
        header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        chunks = b"\0\0\0\r" + header + struct.pack(">I", zlib.crc32(header))
        content = zlib.compress(bytes(100_000))
        body = struct.pack(">I", len(content)) + b"IDAT" + content
        body += struct.pack(">I", zlib.crc32(b"IDAT" + content))
        (root / "a" / f"{name}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks + body)
    (root / "a" / "program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    os.mkfifo(root / "a" / "pipe.png")  # opening it would wait for ever
    (root / "a" / "README").write_text("not a picture")
    (root / "a" / "._0.png").write_text("what macOS leaves behind")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collection = read(root, tmp_path)
    paths, unreadable = collection.pictures.paths, collection.pictures.unreadable
    names = ("bomb", "broken", "empty", "link", "program", "text", "truncated", "warned")
    assert [paths[row].split("/")[1].split(".")[0] for row in unreadable] == list(names)
    assert "BombError" in unreadable[paths.index("a/bomb.png")]
    assert "BombWarning" in unreadable[paths.index("a/warned.png")]
    assert "cannot identify" in unreadable[paths.index("a/program.png")]  # nothing was started
    assert collection.other_files == 3
    assert [paths[row] for row in heads.pretraining_rows(collection)] == [
        f"a/{i}.png" for i in range(6)
    ]


def test_files_and_folders_that_may_not_be_opened_are_named(tmp_path, monkeypatch):
    """For root everything may be opened, so the refusals are played."""
    root = tmp_path / "scans"
    for name in ("a/1", "a/2", "b/3"):
        save(root / f"{name}.png", head(int(name[-1])))
    opened, scanned = Image.open, os.scandir

    def refuse(path, *args, **options):
        if str(path).endswith("2.png") or str(path) == str(root / "b"):
            raise PermissionError(13, "Permission denied", str(path))
        return (opened if args or options else scanned)(path, *args, **options)

    monkeypatch.setattr(data.Image, "open", refuse)
    monkeypatch.setattr(data.os, "scandir", refuse)
    pictures = read(root, tmp_path).pictures
    assert pictures.paths == ["a/1.png", "a/2.png", "b"]
    assert list(pictures.unreadable) == [1, 2]
    assert "Permission denied" in pictures.unreadable[1]
    monkeypatch.undo()
    assert not read(root, tmp_path).pictures.unreadable  # nothing remembers that it was closed


def test_links_that_lead_in_circles_are_followed_once(tmp_path):
    save(tmp_path / "scans" / "a" / "1.png", head(0))
    save(tmp_path / "elsewhere" / "2.png", head(1))
    (tmp_path / "scans" / "a" / "up").symlink_to(tmp_path / "scans")
    (tmp_path / "scans" / "b").symlink_to(tmp_path / "elsewhere")
    assert read(tmp_path / "scans", tmp_path).pictures.paths == ["a/1.png", "b/2.png"]


def test_names_in_any_script_are_read(tmp_path):
    names = [
        "脑/扫描 一.png",
        "Gehirn/größer.png",
        "мозг/1.png",
        "rtl/\u202eabc.png",
        "nl/a\nb.png",
    ]
    for i, name in enumerate(names):
        save(tmp_path / "scans" / name, head(i))
    raw = os.fsencode(tmp_path / "scans") + b"/nl/\xff\xfe.png"  # no UTF-8
    Path(os.fsdecode(raw)).write_bytes((tmp_path / "scans" / names[0]).read_bytes())
    pictures = read(tmp_path / "scans", tmp_path).pictures
    assert set(names) < set(pictures.paths) and len(pictures.paths) == 6
    assert not pictures.unreadable


def test_the_content_says_what_a_file_is_not_its_ending(tmp_path):
    save(tmp_path / "scans" / "a.png", head(0))
    (tmp_path / "scans" / "a.png").rename(tmp_path / "scans" / "png.jpg")
    for name, kind in (("noending", "GIF"), ("dots.v2", "WEBP"), ("x.dat", "TIFF"), ("y", "BMP")):
        Image.fromarray(head(1)).save(tmp_path / "scans" / name, kind)
    collection = read(tmp_path / "scans", tmp_path)
    assert len(collection.pictures.paths) == 5 and not collection.pictures.unreadable
    assert np.array_equal(data.read_gray(tmp_path / "scans" / "png.jpg"), head(0))


def test_a_turned_photograph_is_turned_back_and_an_animation_gives_its_first_frame(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn clockwise
    Image.fromarray(head(0)).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(data.read_gray(tmp_path / "x.png"), np.rot90(head(0), -1))
    frames = [Image.fromarray(head(i)) for i in (1, 2)]
    for kind in ("gif", "tif", "webp"):
        options = {"lossless": True} if kind == "webp" else {}
        path = tmp_path / f"x.{kind}"
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        assert np.abs(data.read_gray(path).astype(int) - head(1)).max() <= 1


def test_a_jpegs_luma_is_what_pil_makes_of_its_colours(tmp_path):
    """Only luma is decoded; for gray pictures saved in colour not a bit differs."""
    gray = Image.fromarray(head(0))
    gray.convert("RGB").save(tmp_path / "gray.jpg")
    with Image.open(tmp_path / "gray.jpg") as image:
        assert np.array_equal(data.read_gray(tmp_path / "gray.jpg"), np.asarray(image.convert("L")))
    Image.merge("RGB", [gray, gray.rotate(90), gray.rotate(180)]).save(tmp_path / "colour.jpg")
    with Image.open(tmp_path / "colour.jpg") as image:
        slow = np.asarray(image.convert("L")).astype(int)
    difference = np.abs(data.read_gray(tmp_path / "colour.jpg") - slow)
    assert np.median(difference) <= 1  # the rest are colours outside of RGB, which PIL clips


def cached(tmp_path: Path) -> np.ndarray:
    """The rows of the one cache file there is, as they are on disk."""
    (file,) = (tmp_path / "cache").glob("*.rows")
    return np.fromfile(file, data.row_type(32))


def test_the_cache_is_used_again_and_only_what_changed_is_decoded(tmp_path):
    root = tmp_path / "scans"
    for i in range(4):
        save(root / f"{i}.png", head(i))
    first = read(root, tmp_path).pictures.squares(np.arange(4)).copy()
    before = cached(tmp_path)
    assert len(before) == 4
    again = read(root, tmp_path).pictures
    assert len(cached(tmp_path)) == 4 and np.array_equal(again.squares(np.arange(4)), first)
    save(root / "1.png", head(9, 80))
    (root / "2.png").unlink()
    save(root / "0a.png", head(8))
    second = read(root, tmp_path).pictures
    assert np.array_equal(cached(tmp_path)[:4], before) and len(cached(tmp_path)) == 6
    for row, seed in enumerate((0, 8, 9, 3)):  # 0.png, 0a.png, 1.png, 3.png
        gray = head(seed, 80 if seed == 9 else 96)
        assert np.array_equal(second.squares(np.array([row]))[0], data.fit_square(gray, 32))
        assert np.array_equal(second.thumbnails[row], data.thumbnail(gray))
        assert second.hashes[row].tobytes() == hashlib.sha256(gray.tobytes()).digest()[:16]


def test_a_killed_decode_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """A real process on the phantoms, killed with SIGKILL; then a write that was torn besides."""
    monkeypatch.setattr(data, "PHANTOM_PATIENTS", 8)
    code = "import data, heads, pathlib; data.PHANTOM_PATIENTS = 8; "
    code += "heads.load(None, 32, pathlib.Path('cache'))"
    env = os.environ | {"PYTHONPATH": str(Path(data.__file__).parent)}
    child = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env)
    cache, size = tmp_path / "cache", data.row_type(32).itemsize
    while not any(file.stat().st_size > 100 * size for file in cache.glob("*.rows")):
        assert child.poll() is None
        time.sleep(0.01)
    child.kill()
    child.wait()
    time.sleep(0.5)  # the workers notice that they are alone
    before = cached(tmp_path)
    time.sleep(0.5)
    assert 100 <= len(before) == len(cached(tmp_path)) < len(data.phantom_paths())
    (file,) = cache.iterdir()
    with open(file, "ab") as torn:
        torn.write(b"\1" * (size - 1))
    collection = heads.load(None, 32, cache)
    after = cached(tmp_path)
    assert np.array_equal(after[: len(before)], before)
    assert len(after) == len(set(after["key"].tolist())) == len(data.phantom_paths())
    rows = np.array([7, 150, len(after) - 1])
    for row, square in zip(rows, collection.pictures.squares(rows), strict=True):
        image, _ = data.draw_phantom(collection.pictures.paths[row])
        assert np.array_equal(square, data.fit_square(image, 32))


def test_one_process_and_several_decode_the_same(tmp_path, monkeypatch):
    root = tmp_path / "scans"
    for i in range(80):
        save(root / f"{i}.png", head(i))
    (root / "z.png").write_bytes(b"")
    seen = []

    def bar(items, **_):
        for item in items:
            seen.append(item)
            yield item

    many = heads.load(root, 32, tmp_path / "many", bar).pictures
    assert len(seen) == 81  # the bar moved once for each
    monkeypatch.setattr(data, "FEW", 1000)
    one = heads.load(root, 32, tmp_path / "one").pictures
    assert np.array_equal(many.squares(np.arange(80)), one.squares(np.arange(80)))
    assert np.array_equal(many.hashes, one.hashes) and many.unreadable == one.unreadable
    assert len(many.unreadable) == 1


def test_pixel_hash_is_sha256_of_the_gray_pixels(tmp_path):
    root = tmp_path / "scans"
    save(root / "a.png", head(0))
    expected = hashlib.sha256(head(0).tobytes()).digest()[:16]
    assert read(root, tmp_path).pictures.hashes[0].tobytes() == expected


# --- folders, tasks and classes ----------------------------------------------------------------


def tasks_of(*paths: str, root_name: str = "scans") -> dict[str, tuple[str, ...]]:
    return {s.task: s.classes for s in data.find_sources(list(paths), root_name, None)}


def test_class_folders_below_a_task_folder_and_below_the_data_folder_itself():
    assert tasks_of("tumor/no/1.png", "tumor/glioma_tumor/1.png") == {
        "tumor": ("glioma", "notumor")
    }
    assert tasks_of("Tumor/no/1.png", "Tumor/yes/1.png") == {"tumor": ("notumor", "yes")}
    assert tasks_of("tumor/no/1.png", "tumor/no_tumor/1.png") == {}
    falah = ("MildDemented", "ModerateDemented", "NonDemented", "VeryMildDemented")
    assert tasks_of(*(f"x/{name}/1.png" for name in falah)) == {
        "alzheimer": ("non", "very_mild", "mild", "moderate")
    }
    assert tasks_of("x/tumor_demented/1.png", "x/y/1.png") == {"x": ("tumor_demented", "y")}
    assert tasks_of("sick/1.png", "well/1.png") == {"scans": ("sick", "well")}
    assert tasks_of("Normal/1.png", "Stroke/1.png") == {"stroke": ("normal", "stroke")}


def test_known_classes_have_their_spelling_and_their_order():
    folders = ("Mild Dementia", "Moderate Dementia", "Non Demented", "Very mild Dementia")
    paths = [f"oasis/Data/{folder}/1.jpg" for folder in folders]
    assert tasks_of(*paths) == {"alzheimer": ("non", "very_mild", "mild", "moderate")}


def test_publishers_parts_stand_between_task_and_class():
    paths = [f"tumor/{p}/{c}/1.jpg" for p in ("Training", "Testing") for c in ("glioma", "notumor")]
    (source,) = data.find_sources(paths, "scans", None)
    assert source.classes == ("glioma", "notumor")
    assert {(name, part) for _, name, part, _ in source.rows} == {
        (c, p) for c in ("glioma", "notumor") for p in ("train", "test")
    }


def test_single_folders_and_loose_pictures_are_unlabelled():
    assert tasks_of("1.png", "2.png") == {}
    assert tasks_of("anything/1.png") == {}
    assert tasks_of("stroke/normal/1.png", "stroke/stroke/1.png", "more/1.png", "2.png") == {
        "stroke": ("normal", "stroke")
    }
    assert tasks_of("a/sub-01/1.png", "a/sub-02/1.png") == {}  # patients are no classes


def test_sources_pool_when_their_classes_are_the_same_and_else_stay_apart():
    same = [f"tumor/{s}/{c}/1.png" for s in ("x", "y") for c in data.KNOWN_TASKS["tumor"].classes]
    assert len(data.find_sources(same, "scans", None)) == 2 and set(tasks_of(*same)) == {"tumor"}
    other = [f"tumor/{s}/1.png" for s in ("x/a", "x/b", "y/c", "y/d")]
    assert tasks_of(*other) == {"x": ("a", "b"), "y": ("c", "d")}


def test_known_class_names_are_classes_whatever_lies_below_them():
    paths = ["tumor/glioma/case1/1.png", "tumor/glioma/case2/1.png", "tumor/notumor/1.png"]
    assert tasks_of(*paths) == {"tumor": ("glioma", "notumor")}
    stray = ["x/a/1.png", "x/a/new/1.png", "x/b/1.png"]
    assert tasks_of(*stray) == {"x": ("a", "b")}
    assert tasks_of("bleed/sub-dural/1.png", "bleed/sub-arachnoid/1.png") == {
        "bleed": ("sub-arachnoid", "sub-dural")  # an id has a digit
    }


def test_a_publishers_parts_may_stand_above_the_task_and_what_is_beside_them_is_unlabelled():
    above = [f"{p}/tumor/{c}/1.png" for p in ("Training", "Testing") for c in ("glioma", "no")]
    (source,) = data.find_sources(above, "scans", None)
    assert {part for _, _, part, _ in source.rows} == {"train", "test"}
    known = [f"tumor/{p}/{c}/1.png" for p in ("Training", "Testing") for c in ("glioma", "no")]
    inside = [*known, "tumor/other/glioma/1.png", "tumor/other/no/1.png"]
    assert [source.folder for source in data.find_sources(inside, "scans", None)] == [
        "tumor",
        "tumor/other",
    ]
    assert set(tasks_of(*inside)) == {"tumor"}
    beside = [f"t/{p}/{c}/1.png" for p in ("train", "test") for c in "ab"] + ["t/more/1.png"]
    assert tasks_of(*beside) == {"t": ("a", "b")}


def test_tasks_with_one_name_are_told_apart_by_their_folders():
    """Three sources that would all be called stroke, with three sets of classes."""
    found = tasks_of(
        *("x/stroke/a/1.png", "x/stroke/b/1.png", "x/y/c/1.png", "x/y/d/1.png"),
        *("stroke/normal/1.png", "stroke/stroke/1.png", "z/stroke/e/1.png", "z/stroke/f/1.png"),
    )
    assert found["stroke"] == ("normal", "stroke")
    assert sorted(found.values()) == [("a", "b"), ("c", "d"), ("e", "f"), ("normal", "stroke")]
    two = ("kaggle/tumor/yes/1.png", "kaggle/tumor/no/1.png", "kaggle/ms/yes/1.png")
    assert set(tasks_of(*two, "kaggle/ms/no/1.png")) == {"tumor", "ms"}


# --- groups ------------------------------------------------------------------------------------


def thumbnails(*pictures: np.ndarray) -> np.ndarray:
    return np.stack([data.thumbnail(p) for p in pictures])


def test_copies_that_were_scaled_compressed_brightened_or_mirrored_are_one_group(tmp_path):
    original = head(0)
    Image.fromarray(original).save(tmp_path / "x.jpg", quality=60)
    small = np.asarray(Image.fromarray(original).resize((50, 50)))
    bright = (original * 0.8 + 30).astype(np.uint8)
    copies = [data.read_gray(tmp_path / "x.jpg"), small, bright, original[:, ::-1]]
    groups = data.near_duplicate_groups(thumbnails(original, *copies, head(1), head(2)))
    assert groups.dtype == np.int64
    assert groups.tolist() == [0, 0, 0, 0, 0, 1, 2]


def test_twin_pairs_match_a_double_loop(monkeypatch):
    """The even-odd trick and the blocks against cosines computed one by one."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (6, 32, 32))
    noisy = [base[i % 6] + rng.normal(0, 2 * i, (32, 32)) for i in range(24)]
    pictures = np.clip(np.stack(noisy), 0, 255).astype(np.uint8)
    pictures[::5] = pictures[::5, :, ::-1]
    pictures[7] = 128  # of one colour: nobody's twin

    def unit(x: np.ndarray) -> np.ndarray:
        x = x - x.mean()
        return x / max(np.linalg.norm(x), 1e-9)

    slow = set()
    for i in range(24):
        for j in range(i + 1, 24):
            a, b = unit(pictures[i].astype(float)), unit(pictures[j].astype(float))
            straight, mirrored = (a * b).sum() >= 0.9, (a * b[:, ::-1]).sum() >= 0.9
            if straight or mirrored:
                slow.add((i, j, int(not straight)))
    assert 10 < len(slow) < 100 and {only for _, _, only in slow} == {0, 1}
    for block in (5, 2048):
        monkeypatch.setattr(data, "BLOCK", block)
        assert set(map(tuple, data.twin_pairs(pictures, 0.9).tolist())) == slow


def test_groups_are_single_linkage():
    pairs = np.array([[0, 1], [3, 4], [1, 2], [4, 6], [9, 0]])
    assert data.connected(10, pairs).tolist() == [0, 0, 0, 1, 1, 2, 1, 3, 4, 0]
    chain = np.stack([np.arange(999), np.arange(1, 1000)], 1)
    shuffled = np.random.default_rng(0).permutation(1000)[chain]
    assert not data.connected(1000, shuffled).any()
    assert data.connected(3, np.zeros((0, 2), np.int64)).tolist() == [0, 1, 2]


def test_patients_are_known_by_file_name_and_by_folder_within_their_source(tmp_path):
    root, n = tmp_path / "scans", 0
    for path in (
        *("stroke/Normal/7 (1).png", "stroke/Normal/7 (2).png", "stroke/Stroke/7 (1).png"),
        *("ms/no-lesion/Patient-7/1.png", "ms/lesion/Patient-7/2.png", "ms/lesion/Patient-8/1.png"),
        *("alzheimer/a/OAS1_0028_MR1_1.png", "alzheimer/b/OAS1_0028_MR2_1.png"),
        *("more/sub-01/1.png", "more/sub-01/2.png", "else/sub-01/1.png"),
    ):
        save(root / path, head(n := n + 1))
    collection = read(root, tmp_path)
    group = dict(zip(collection.pictures.paths, collection.groups.tolist(), strict=True))
    assert group["stroke/Normal/7 (1).png"] == group["stroke/Normal/7 (2).png"]
    assert group["stroke/Normal/7 (1).png"] != group["stroke/Stroke/7 (1).png"]
    assert group["ms/no-lesion/Patient-7/1.png"] == group["ms/lesion/Patient-7/2.png"]
    assert group["ms/lesion/Patient-7/2.png"] != group["ms/lesion/Patient-8/1.png"]
    assert group["alzheimer/a/OAS1_0028_MR1_1.png"] == group["alzheimer/b/OAS1_0028_MR2_1.png"]
    assert group["more/sub-01/1.png"] == group["more/sub-01/2.png"]
    assert group["more/sub-01/1.png"] != group["else/sub-01/1.png"]


@pytest.mark.parametrize(
    "pattern",
    [
        "ms/sub-{i:02d}/{c}/{s}.png",  # the patient above the classes
        "mine/{c}/sub-{i:02d}/anat/{s}.png",  # and a visit below the patient
        "alzheimer/{v}/{c}/OAS1_00{i:02d}_{s}.png",  # two sources, one person
        "{part}/mine/{c}/Patient-{i}/{s}.png",  # a publisher's parts on top
        "stroke/{c}/sub-{i:02d}/{i} ({s}).png",  # two kinds of name at once
        "mine/{c}/patient_{i}_{s}.png",
        "mine/{c}/T1_sub-{i:02d}_{s}.png",
    ],
)
def test_no_patient_is_on_two_sides_wherever_his_name_stands(tmp_path, pattern):
    """Each of these layouts once let patients through from train to test."""
    n, who = 0, {}
    for i in range(12):
        for s in range(4):
            class_ = "normal" if (s if "ms/" in pattern else i) % 2 else "stroke"
            words = {"v": ("x", "y")[s % 2], "part": ("Training", "Testing")[s == 3 and i < 4]}
            path = pattern.format(i=i, s=s, c=class_, **words)
            save(tmp_path / "scans" / path, head(n := n + 1))
            who[path] = i
    collection = read(tmp_path / "scans", tmp_path)
    (task,) = collection.tasks.values()
    sides: dict[int, set[str]] = {}
    for path, part in split_of(task, collection).items():
        sides.setdefault(who[path], set()).add(part)
    assert all(len(parts - {"dropped"}) == 1 for parts in sides.values())
    assert {part for parts in sides.values() for part in parts} >= {"train", "val", "test"}


def test_loose_pictures_of_a_tested_patient_are_not_pretrained_on(tmp_path):
    n = 0
    for i in range(12):
        class_ = "a" if i % 2 else "b"
        for path in (
            f"alzheimer/{class_}/OAS1_00{i:02d}_1.png",
            f"more/OAS1_00{i:02d}_9.png",
            f"t/train/{class_}/sub-{i:02d}_1.png"
            if i < 8
            else f"t/test/{class_}/sub-{i:02d}_1.png",
            f"t/extra/sub-{i:02d}_9.png",
        ):
            save(tmp_path / "scans" / path, head(n := n + 1))
    collection = read(tmp_path / "scans", tmp_path)
    paths = collection.pictures.paths
    taken = {paths[row] for row in heads.pretraining_rows(collection)}
    for task in collection.tasks.values():
        for row in np.concatenate([task.part("test")[0], task.part("val")[0]]):
            number = paths[row].split("_")[-2].split("-")[-1]
            folder = "more/OAS1_" if task.name == "alzheimer" else "t/extra/sub-"
            assert f"{folder}{number}_9.png" in paths
            assert f"{folder}{number}_9.png" not in taken


def test_loose_pictures_belong_to_a_source_that_is_the_data_folder_itself(tmp_path):
    """The source's folder is then '', which a comparison of prefixes with a slash once missed."""
    for i in range(12):
        part, class_ = ("test" if i > 7 else "train"), "ab"[i % 2]
        save(tmp_path / "scans" / part / class_ / f"sub-{i:02d}_1.png", head(2 * i))
        save(tmp_path / "scans" / "extra" / f"sub-{i:02d}_9.png", head(2 * i + 1))
    collection = read(tmp_path / "scans", tmp_path)
    assert collection.tasks["scans"].classes == ("a", "b")
    taken = {collection.pictures.paths[row] for row in heads.pretraining_rows(collection)}
    assert not taken & {f"extra/sub-{i:02d}_9.png" for i in range(8, 12)}
    assert any(path.startswith("extra/") for path in taken)


# --- splits ------------------------------------------------------------------------------------


def plant(root: Path, patients: int = 20, slices: int = 2) -> None:
    """Two classes; slices of a patient are near-twins, each second one mirrored."""
    for k, class_ in enumerate(("sick", "well")):
        for patient in range(patients):
            picture = head(1000 * k + patient)
            for i in range(slices):
                copy = picture[:, ::-1] if i % 2 else picture
                save(root / "mine" / class_ / f"{patient:02d}_{i}.png", copy)


def test_no_group_is_in_two_splits(tmp_path):
    plant(tmp_path / "scans")
    task = read(tmp_path / "scans", tmp_path).task("mine")
    for group in np.unique(task.groups):
        assert len(set(task.split[task.groups == group])) == 1
    assert len(np.unique(task.groups)) == 40
    for label in (0, 1):  # 70 / 15 / 15 of the 20 groups of each class
        counts = {p: int((task.split[task.labels == label] == p).sum()) for p in set(task.split)}
        assert counts == {"train": 28, "val": 6, "test": 6}


def test_the_split_is_a_function_of_the_pixels_alone(tmp_path):
    """Other names, another order, another folder, another image size: the same split."""
    plant(tmp_path / "scans")
    first = read(tmp_path / "scans", tmp_path)
    renamed = tmp_path / "renamed"
    for path in first.pictures.paths:
        task, class_, name = path.split("/")
        target = renamed / task / class_ / f"{hashlib.md5(name.encode()).hexdigest()}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((tmp_path / "scans" / path).read_bytes())
    second = read(renamed, tmp_path, image_size=48)

    def by_hash(collection: heads.Study) -> dict[bytes, str]:
        task = collection.task("mine")
        hashes = collection.pictures.hashes[task.rows]
        return {h.tobytes(): s for h, s in zip(hashes, task.split, strict=True)}

    assert by_hash(first) == by_hash(second)


def publish(root: Path) -> None:
    """A publisher's Training and Testing with three leaks between them."""
    for k, class_ in enumerate(("a", "b")):
        for i in range(20):
            save(root / f"t/Training/{class_}/{i}.png", head(100 * k + i))
        for i in range(5):
            save(root / f"t/Testing/{class_}/{i}.png", head(500 + 100 * k + i))
    save(root / "t/Training/a/copy.png", head(500))
    save(root / "t/Training/a/mirror.png", head(501)[:, ::-1])
    save(root / "t/Training/a/small.png", np.asarray(Image.fromarray(head(502)).resize((64, 64))))


def test_publishers_test_part_stays_and_its_twins_are_dropped_from_training(tmp_path):
    publish(tmp_path / "scans")
    collection = read(tmp_path / "scans", tmp_path)
    task = collection.task("t")
    split = split_of(task, collection)
    for path, part in split.items():
        assert ("Testing" in path) == (part == "test")
    dropped = {path for path, part in split.items() if part == "dropped"}
    assert dropped == {f"t/Training/a/{name}.png" for name in ("copy", "mirror", "small")}
    assert task.notes["dropped_for_a_group_in_test_or_val"] == 3
    assert set(task.notes["dropped_paths"]) == dropped
    assert sum(part == "val" for part in split.values()) == 6  # 15 % of the 20 groups of each class
    assert not dropped & {collection.pictures.paths[r] for r in heads.pretraining_rows(collection)}


COPIES = {
    "identical": lambda pixels: pixels,
    "re-encoded": lambda pixels: np.asarray(Image.open(jpeg(pixels))),
    "resized": lambda pixels: np.asarray(Image.fromarray(pixels).resize((70, 70))),
    "brighter": lambda pixels: (pixels * 0.8 + 40).astype(np.uint8),
    "mirrored": lambda pixels: pixels[:, ::-1],
    "all at once": lambda pixels: np.asarray(
        Image.open(jpeg((np.asarray(Image.fromarray(pixels[:, ::-1]).resize((120, 120))) // 1.3)))
    ),
}


def jpeg(pixels: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=75)
    return file


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(
    "where",
    [
        "mine/a/{}/x/",  # beside the original, in the same source
        "mine/b/{}/",  # in another source of the same task
        "other/{}/",  # in another task
        "loose/",  # among pictures without labels
    ],
)
def test_no_copy_of_a_held_out_picture_is_learnt_from(tmp_path, how, where):
    """Each picture is copied; wherever a copy lies, it is on its original's side."""
    root, originals = tmp_path / "scans", {}
    for k, class_ in enumerate(("sick", "well")):
        for i in range(10):
            pixels = head(100 * k + i)
            save(root / f"mine/a/{class_}/{i}.png", pixels)
            save(root / f"other/{class_}2/{i}.png", head(500 + 100 * k + i))
            copy = f"{where.format(class_ + '2' * (where[0] == 'o'))}{class_}{i}c.png"
            save(root / copy, COPIES[how](pixels))
            originals[copy] = f"mine/a/{class_}/{i}.png"
    collection = read(root, tmp_path)
    rows = {path: row for row, path in enumerate(collection.pictures.paths)}
    assert set(collection.tasks) == {"mine", "other"}
    for copy, original in originals.items():
        assert collection.groups[rows[copy]] == collection.groups[rows[original]]
    for task in collection.tasks.values():
        sides = {}
        for group, part in zip(task.groups, task.split, strict=True):
            sides.setdefault(group, set()).add(part)
        assert all(len(parts) == 1 for parts in sides.values())
        held = np.isin(collection.groups, task.groups[np.isin(task.split, ("val", "test"))])
        assert held.sum() >= 6 and not held[heads.pretraining_rows(collection)].any()


def test_a_pattern_names_the_patients_and_one_that_matches_nothing_is_refused(tmp_path):
    root, n = tmp_path / "scans", 0
    for class_ in ("sick", "well"):
        for i in range(8):
            for slice_ in range(3):
                save(root / f"mine/{class_}/AB{i}{class_[0]}-{slice_}.png", head(n := n + 1))

    def load(text: str) -> heads.Study:
        return heads.load(root, 32, tmp_path / "cache", pattern=re.compile(text))

    assert len(np.unique(read(root, tmp_path).groups)) == 48
    collection = load(r"(AB\d[a-z])-")
    task = collection.task("mine")
    assert len(np.unique(task.groups)) == 16
    names = [collection.pictures.paths[row].split("/")[-1][:4] for row in task.rows]
    for name in names:
        assert len(set(task.split[[other == name for other in names]])) == 1
    with pytest.raises(data.UserError, match="finds a patient in none of the 48 paths"):
        load(r"patient(\d+)")
    with pytest.raises(data.UserError, match="in none"):
        load(r"AB|(never)")


def test_an_id_that_the_pattern_finds_is_one_person_all_over_the_data(tmp_path):
    """Folds of one set side by side, and loose slices: each once let patients through."""
    root, n = tmp_path / "scans", 0
    for i in range(30):
        for fold in range(3):
            class_ = ("sick", "well")[i % 2]
            save(root / f"tumor/fold{fold}/{class_}/scan_A{i}_{fold}.png", head(n := n + 1))
        save(root / f"extra/scan_A{i}_9.png", head(n := n + 1))
    collection = heads.load(root, 32, tmp_path / "cache", pattern=re.compile(r"scan_(A\d+)_"))
    task = collection.task("tumor")
    assert len(task.rows) == 90 and len(np.unique(task.groups)) == 30

    def people(rows) -> set[str]:
        return {collection.pictures.paths[row].split("_")[-2] for row in rows}

    parts = [people(task.part(part)[0]) for part in ("train", "val", "test")]
    assert not parts[0] & parts[1] and not (parts[0] | parts[1]) & parts[2]
    assert not people(heads.pretraining_rows(collection)) & (parts[1] | parts[2])


def test_a_folder_that_the_pattern_finds_is_a_patient_and_no_class(tmp_path):
    root, n = tmp_path / "scans", 0
    for class_ in ("ill", "healthy"):
        for i in range(8):
            for slice_ in range(2):
                path = f"epilepsy/{class_}/TCGA {class_[0]}{i}/{slice_}.png"
                save(root / path, head(n := n + 1))
    for text in (r"(TCGA \w\d)/", r"/TCGA (\w\d)/"):
        collection = heads.load(root, 32, tmp_path / "cache", pattern=re.compile(text))
        assert collection.task("epilepsy").classes == ("healthy", "ill")
        assert len(np.unique(collection.groups)) == 16


def test_one_patient_may_be_spelled_in_several_ways(tmp_path):
    names = ("Patient-07_a", "patient_7_b", "patient7_c", "img-patient 7", "Patient-70_a")
    for i, name in enumerate(names):
        save(tmp_path / "scans" / f"{name}.png", head(i))
    groups = read(tmp_path / "scans", tmp_path).groups.tolist()
    assert groups[1] not in groups[:1] + groups[2:]  # Patient-70_a.png comes second
    assert len(set(groups)) == 2


def test_files_that_swap_their_names_are_decoded_anew(tmp_path):
    """Of one size and one time, as unpacked files are."""
    root = tmp_path / "scans"
    for i, name in enumerate(("a.bmp", "b.bmp")):
        save(root / name, head(i))
        os.utime(root / name, (1e9, 1e9))
    before = read(root, tmp_path).pictures.hashes.copy()
    (root / "a.bmp").rename(root / "c")
    (root / "b.bmp").rename(root / "a.bmp")
    (root / "c").rename(root / "b.bmp")
    assert np.array_equal(read(root, tmp_path).pictures.hashes, before[::-1])


def test_a_folder_called_like_a_known_task_with_other_classes_is_told_apart(tmp_path):
    """tumor/{no,yes} beside a full set of the four: two tasks, whatever the folders are called."""
    for i, class_ in enumerate(("glioma", "meningioma", "notumor", "pituitary")):
        save(tmp_path / "scans" / "elsewhere" / class_ / "1.png", head(i))
    for i, class_ in enumerate(("no", "yes")):
        save(tmp_path / "scans" / "tumor" / class_ / "1.png", head(10 + i))
    tasks = read(tmp_path / "scans", tmp_path).tasks
    assert {name: task.classes for name, task in tasks.items()} == {
        "tumor": ("glioma", "meningioma", "notumor", "pituitary"),
        "tumor-notumor-yes": ("notumor", "yes"),
    }


def test_a_folder_is_called_after_its_task_but_not_after_the_data_folder():
    """brain-stroke-set/{no_stroke,stroke} is stroke; anything/{a,b} in my-stroke-study is not."""
    assert tasks_of("x/brain-stroke-set/no_stroke/1.png", "x/brain-stroke-set/stroke/2.png") == {
        "stroke": ("normal", "stroke")
    }
    mine = "anything/a/1.png", "anything/b/2.png"
    assert set(tasks_of(*mine, root_name="my-stroke-study")) == {"anything"}
    assert set(tasks_of(*mine, root_name="stroke")) == {"stroke"}
    assert set(tasks_of("data/a/1.png", "data/b/2.png", root_name="my-stroke-study")) == {"stroke"}


def test_a_single_picture_has_no_twin():
    """One direction alone, 511 eigenvalues of 0: LAPACK gave up on some such pictures."""
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    for seed in range(20):
        masked = np.where(x**2 + y**2 < 0.8, head(seed, 32), 0).astype(np.uint8)
        assert not len(data.twin_pairs(masked[None]))


def test_blank_pictures_join_nobody(tmp_path):
    """Volumes end in black slices: as twins they would chain all patients into one."""
    for patient in range(4):
        for i, pixels in enumerate((head(patient), np.zeros((40, 40), np.uint8))):
            save(
                tmp_path / "scans" / "mine" / "ab"[patient % 2] / f"sub-{patient}" / f"{i}.png",
                pixels,
            )
    assert read(tmp_path / "scans", tmp_path).groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_link_that_sorts_first_takes_no_picture_out_of_its_class(tmp_path):
    root = tmp_path / "scans"
    for class_ in ("glioma", "meningioma", "notumor"):
        save(root / "tumor" / class_ / "1.png", head(len(class_)))
    (root / "favourites").mkdir()
    (root / "favourites" / "m").symlink_to(root / "tumor" / "meningioma")
    collection = read(root, tmp_path)
    assert collection.task("tumor").classes == ("glioma", "meningioma", "notumor")
    assert "favourites/m/1.png" in collection.pictures.paths


def test_resplit_pools_the_publishers_parts_and_cuts_them_by_group(tmp_path):
    publish(tmp_path / "scans")
    kept = read(tmp_path / "scans", tmp_path)
    collection = heads.load(tmp_path / "scans", 32, tmp_path / "cache", resplit=True)
    task = collection.task("t")
    assert "dropped" not in task.split and len(task.rows) == len(kept.task("t").rows)
    published = np.array(["Testing" in collection.pictures.paths[row] for row in task.rows])
    assert 0 < published[task.split == "test"].sum() < published.sum()
    for group in np.unique(task.groups):
        assert len(set(task.split[task.groups == group])) == 1


def test_twins_with_different_labels_are_dropped_and_counted(tmp_path):
    root = tmp_path / "scans"
    plant(root, slices=1)
    save(root / "mine/sick/odd.png", head(5))
    save(root / "mine/well/odd.png", head(5)[:, ::-1])  # also twins of sick/05_0
    collection = read(root, tmp_path)
    task = collection.task("mine")
    assert task.notes["dropped_for_a_twin_with_another_label"] == 3
    assert len(task.notes["dropped_paths"]) == 3
    dropped = task.rows[task.split == "dropped"]
    assert not np.isin(dropped, heads.pretraining_rows(collection)).any()


def test_pretraining_never_sees_a_held_out_group_of_any_task(tmp_path):
    """The same head stands in a task's test part, in another task, and among loose pictures."""
    root = tmp_path / "scans"
    plant(root)
    collection = read(root, tmp_path)
    task = collection.task("mine")
    test_path = collection.pictures.paths[task.part("test")[0][0]]
    picture = data.read_gray(root / test_path)
    save(root / "loose" / "leak.png", picture[:, ::-1])
    save(root / "other" / "x" / "leak.png", picture)
    for i in range(6):
        save(root / "other" / "x" / f"{i}.png", head(50 + i))
        save(root / "other" / "y" / f"{i}.png", head(60 + i))
    collection = read(root, tmp_path)
    pretraining = set(heads.pretraining_rows(collection).tolist())
    held = set()
    for task in collection.tasks.values():
        held |= set(task.groups[np.isin(task.split, ("val", "test"))].tolist())
    assert held
    assert all(collection.groups[row] not in held for row in pretraining)
    names = {collection.pictures.paths[row] for row in pretraining}
    assert "loose/leak.png" not in names and "other/x/leak.png" not in names


def test_each_class_gives_a_group_to_train_then_test_then_val():
    got = [heads.allot(n, 0.15, 0.15) for n in (1, 2, 3, 4, 20, 100)]
    assert got == [(0, 0), (1, 0), (1, 1), (1, 1), (3, 3), (15, 15)]
    assert [heads.allot(n, 0.0, 0.15) for n in (1, 2, 20)] == [(0, 0), (0, 1), (0, 3)]


def test_a_class_of_one_patient_is_an_error_not_a_split_by_picture(tmp_path):
    root = tmp_path / "scans"
    for i in range(8):
        save(root / "mine/sick/sub-01" / f"{i}.png", head(i))
        save(root / "mine/well" / f"sub-{i}" / "1.png", head(20 + i))
    with pytest.raises(data.UserError, match="'sick' of task mine has 1 group"):
        heads.check_split(read(root, tmp_path).task("mine"))


def test_missing_and_empty_folders_and_unknown_tasks_are_one_clear_line(tmp_path):
    with pytest.raises(data.UserError, match="not a folder"):
        read(tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(data.UserError, match="no pictures below"):
        read(tmp_path / "empty", tmp_path)
    plant(tmp_path / "scans", patients=3)
    with pytest.raises(data.UserError, match="found: mine; a task is"):
        read(tmp_path / "scans", tmp_path).task("tumor")


# --- phantoms ----------------------------------------------------------------------------------


def test_phantoms_are_repeatable_and_differ_between_patients():
    paths = data.phantom_paths()
    assert "tumor/glioma/p0012/2" in paths and len(set(paths)) == len(paths)
    image, _ = data.draw_phantom("tumor/glioma/p0012/2")
    assert image.shape == (128, 128) and image.dtype == np.uint8
    assert np.array_equal(image, data.draw_phantom("tumor/glioma/p0012/2")[0])
    same = [data.draw_phantom(f"tumor/glioma/p0012/{i}")[0] for i in range(3)]
    others = [data.draw_phantom(f"tumor/glioma/p00{i}/0")[0] for i in range(20, 40)]
    groups = data.near_duplicate_groups(thumbnails(*same, *others))
    assert len(set(groups[3:])) == len(others)  # no two patients are twins


def test_lesions_lie_inside_the_head_and_only_where_there_is_disease():
    for task, known in data.KNOWN_TASKS.items():
        healthy = {"tumor": "notumor"}.get(task, known.classes[0])
        for class_ in known.classes:
            for patient in range(4):
                image, lesion = data.draw_phantom(f"{task}/{class_}/p{patient:04d}/1")
                assert lesion.any() == (class_ != healthy)
                assert lesion.mean() < 0.2
                if lesion.any():
                    assert image[lesion].mean() > 20  # tissue, not air


def test_tumours_grow_where_their_kind_does():
    """Pituitary near the middle, meningioma far out, glioma between."""

    def distance(class_: str) -> float:
        found = []
        for patient in range(12):
            image, lesion = data.draw_phantom(f"tumor/{class_}/p{patient:04d}/1")
            inside = np.argwhere(image > 60).mean(axis=0)
            found.append(np.linalg.norm(np.argwhere(lesion).mean(axis=0) - inside))
        return float(np.mean(found))

    assert distance("pituitary") + 5 < distance("glioma") < distance("meningioma") - 5
