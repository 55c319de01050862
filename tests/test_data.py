"""data.py: reading, the cache, layouts, groups, splits and gates, each against something slow."""

import csv
import doctest
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data

FOUR = ("glioma", "meningioma", "notumor", "pituitary")


def brain(seed: int, size: int = 40) -> np.ndarray:
    """An image unlike that of any other seed: smooth random blobs, (size, size) uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def save(path: Path, pixels: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def fill(root: Path, *names: str, seed: int = 0) -> None:
    """A file of its own pixels for each name; a volume for names that end so."""
    for i, name in enumerate(names):
        if ".nii" in name:
            write_nifti(root / name, volume(seed + i), np.eye(4))
        else:
            save(root / name, brain(seed + i))


def read(root: Path, size: int = 32, **how: object) -> data.Study:
    return data.load(root, size, root.parent / "cache", **how)


def classes_of(study: data.Study) -> dict[str, tuple[str, ...]]:
    return {name: task.classes for name, task in study.tasks.items()}


def split_of(study: data.Study, name: str) -> dict[str, str]:
    """Name of an image -> its split."""
    task = study.tasks[name]
    names = [study.images.names[row] for row in task.rows]
    return dict(zip(names, task.split.tolist(), strict=True))


CODES = {"u1": 2, "i2": 4, "i4": 8, "f4": 16, "f8": 64, "i1": 256, "u2": 512, "u4": 768}
CODES |= {"i8": 1024, "u8": 1280}


def write_nifti(path: Path, voxels: np.ndarray, sform: np.ndarray | None = None, **how) -> None:
    """A NIfTI-1 file, field by field, so that writer and reader share no code."""
    header, order = bytearray(352), how.get("order", "<")
    fields = [(0, "i", [348]), (40, "8h", [voxels.ndim, *voxels.shape, 1, 1, 1, 1][:8])]
    fields += [(70, "2h", [CODES[voxels.dtype.str[1:]], 8 * voxels.dtype.itemsize])]
    fields += [(76, "4f", how.get("zoom", (1, 1, 1, 1))), (108, "f", [352])]
    fields += [(112, "2f", how.get("scale", (0, 0)))]
    fields += [(252, "2h", [int("quatern" in how), int(sform is not None)])]
    fields += [(256, "6f", how.get("quatern", [0] * 6))]
    fields += [(280, "12f", np.eye(4)[:3].ravel() if sform is None else sform[:3].ravel())]
    for at, kind, values in fields:
        count = struct.calcsize(kind) // struct.calcsize(kind[-1])
        struct.pack_into(order + kind, header, at, *[*values, 1, 1, 1, 1][:count])
    header[344:348] = b"n+1\0"
    content = bytes(header) + voxels.astype(voxels.dtype.newbyteorder(order)).tobytes(order="F")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)


def volume(seed: int, slices: int = 6) -> np.ndarray:
    """Blobs in an ellipse that drift from slice to slice, (20, 24, slices) float32."""
    y, x = np.mgrid[-1:1:20j, -1:1:24j]
    inside = (x**2 + y**2 < 0.8)[..., None]
    ends = [np.asarray(Image.fromarray(brain(seed + k)).resize((24, 20))) for k in (0, 5000)]
    share = np.linspace(0, 0.3, slices)
    return (inside * (ends[0][..., None] * (1 - share) + ends[1][..., None] * share)).astype("f4")


def test_doctests_hold():
    assert doctest.testmod(data).failed == 0


# --- writing -----------------------------------------------------------------------------------


def test_a_write_is_whole_or_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file"
    with data.write_atomically(path) as file:
        file.write(b"old")
    with pytest.raises(RuntimeError), data.write_atomically(path) as file:
        file.write(b"half of the new")
        file.flush()
        assert path.read_bytes() == b"old"
        raise RuntimeError

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"), data.write_atomically(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]


def test_a_locked_folder_is_one_line_for_others_and_free_again_afterwards(tmp_path):
    with data.lock_folder(tmp_path / "run"):
        with pytest.raises(data.UserError, match="another run"), data.lock_folder(tmp_path / "run"):
            raise AssertionError
    with data.lock_folder(tmp_path / "run"):
        pass


# --- reading an image --------------------------------------------------------------------------


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


def test_transparent_becomes_black_turned_is_turned_back_and_contents_say_the_kind(tmp_path):
    pixels = np.full((8, 8, 4), 255, np.uint8)
    pixels[:4, :, 3] = 0
    save(tmp_path / "x.png", pixels)
    assert data.read_gray(tmp_path / "x.png").tolist() == [[0] * 8] * 4 + [[255] * 8] * 4
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn clockwise
    save(tmp_path / "png.jpg", brain(0), format="PNG", exif=exif)
    assert np.array_equal(data.read_gray(tmp_path / "png.jpg"), np.rot90(brain(0), -1))
    more = [Image.fromarray(brain(2))]
    save(tmp_path / "x.gif", brain(1), save_all=True, append_images=more)
    assert np.abs(data.read_gray(tmp_path / "x.gif").astype(int) - brain(1)).max() <= 1
    Image.fromarray(brain(0)).convert("RGB").save(tmp_path / "gray.jpg")
    with Image.open(tmp_path / "gray.jpg") as image:
        assert np.array_equal(data.read_gray(tmp_path / "gray.jpg"), np.asarray(image.convert("L")))


def test_squares_keep_the_aspect_ratio_and_thumbnails_average_areas():
    square = data.fit_square(np.full((50, 100), 200, np.uint8), 64)
    assert square.shape == (64, 64)
    assert (square[16:48] == 200).all() and not square[:16].any() and not square[48:].any()
    blocks = brain(0, 64).reshape(32, 2, 32, 2).mean(axis=(1, 3))
    assert np.abs(data.thumbnail(brain(0, 64)) - blocks).max() <= 1


def test_what_cannot_be_read_is_named_and_what_is_none_is_passed_over(tmp_path, monkeypatch):
    root = tmp_path / "scans"
    fill(root, *(f"a/{i}.png" for i in range(3)))
    whole = (root / "a" / "0.png").read_bytes()
    bad = {"broken.png": b"\x89PNG, but no more", "empty.jpg": b"", "torn.png": whole[:500]}
    bad |= {"program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}
    bad |= {"bomb.png": whole[:16] + struct.pack(">II", 30_000, 30_000) + whole[24:]}
    for name, content in bad.items():
        (root / "a" / name).write_bytes(content)
    save(root / "a" / "large.png", np.zeros((60, 60), np.uint8))
    monkeypatch.setattr(data, "MAX_PIXELS", 3000)
    with open(root / "a" / "bytes.png", "wb") as file:
        file.truncate(data.MAX_BYTES + 1)  # a hole: it takes no room on the disk
    (root / "a" / "link.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(root / "a" / "pipe.png")  # opening it would wait for ever
    fill(root, "a/._0.png", ".hidden/1.png", "a/x_mask.tif", "a/y_seg.png", "a/masks/1.png")
    fill(root, "labels/1.png", "a/1-LesionSeg-Flair.nii", "a/aseg.nii.gz")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study = read(root)
    names, why = study.images.names, study.images.unreadable
    odd = {f"a/{name}" for name in (*bad, "large.png", "bytes.png", "link.png", "pipe.png")}
    assert {names[row] for row in why} == odd
    assert "3,000" in why[names.index("a/large.png")]
    assert "cannot identify" in why[names.index("a/program.png")]  # nothing was started
    assert [names[row] for row in data.pretraining_rows(study)] == [f"a/{i}.png" for i in range(3)]
    assert Counter(data.left_out(study)) == {"": 3, "unreadable": len(odd)}

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(OSError, match="Permission denied"):  # passing over it would move the split
        read(root)


# --- volumes -----------------------------------------------------------------------------------


def test_nibabel_reads_the_same(tmp_path):
    """All types, sform, qform and neither, 3 and 4 axes, both byte orders, scaled values."""
    nibabel = pytest.importorskip("nibabel", reason="nibabel is the oracle here; not installed")
    rng = np.random.default_rng(0)
    signs = [*itertools.product((1, -1), repeat=3)] * 6
    for i, order in enumerate([*itertools.permutations(range(3))] * 8):  # each of 48 orientations
        kind = list(CODES)[i % 10]
        voxels = (rng.random((5, 6, 7, 2)[: 3 + i % 2]) * 90).astype(kind)
        sform = np.eye(4)
        sform[:3, :3] = rng.normal(0, 0.05, (3, 3))  # not quite straight
        sform[order, range(3)] = np.array(signs[i // 6 % 8]) * (0.9, 1.1, 3.0)
        sform[:3, 3] = (-7, 11, 5)
        how = {"scale": (1.5, -2) if i % 3 else (0, 5), "order": "<>"[i % 2]}
        quatern, zoom = (*rng.uniform(-0.5, 0.5, 3), 4, 5, 6), ((-1) ** (i // 2), 1.5, 2, 2.5)
        asked = {"quatern": quatern, "zoom": zoom}
        for given in ({"sform": sform, **asked}, asked, {"zoom": zoom})[: 1 if i > 8 else 3]:
            path = tmp_path / ("v.nii.gz" if i % 5 else "v.nii")
            write_nifti(path, voxels, **given, **how)
            theirs = nibabel.as_closest_canonical(nibabel.load(path))
            ours, affine = data.read_nifti(path)
            first = theirs.get_fdata().reshape(*ours.shape, -1)[..., 0]
            assert ours.dtype == np.float32 and np.allclose(ours, first, rtol=1e-5, atol=1e-4)
            assert np.allclose(affine, theirs.affine, atol=1e-5) and (np.diag(affine) > 0).all()
        nibabel.save(nibabel.Nifti1Image(voxels.astype("f4"), sform), tmp_path / "theirs.nii")
        theirs = nibabel.as_closest_canonical(nibabel.load(tmp_path / "theirs.nii")).get_fdata()
        ours = data.read_nifti(tmp_path / "theirs.nii")[0]
        assert np.allclose(ours, theirs.reshape(*ours.shape, -1)[..., 0])


def test_what_is_no_volume_of_real_numbers_is_named_and_left_out(tmp_path):
    """Among them a gzip whose voxels would begin after gigabytes, and one of too many voxels."""
    root = tmp_path / "in"
    write_nifti(root / "good.nii", volume(0), np.eye(4), scale=(np.nan, np.nan))
    whole = (root / "good.nii").read_bytes()

    def patched(at: int, kind: str, *values: object) -> bytes:
        packed = struct.pack(f"<{kind}", *values)
        return whole[:at] + packed + whole[at + len(packed) :]

    broken = {"short": whole[:200], "torn": whole[:-1], "pair": patched(344, "4s", b"ni1\0")}
    broken |= {"nifti2": patched(0, "i", 540), "complex": patched(70, "h", 32)}
    broken |= {"negative": patched(42, "h", -3), "huge": patched(42, "3h", 32767, 32767, 32767)}
    for k, offset in enumerate((2e10, -1, np.inf, np.nan)):
        broken[f"offset{k}"] = patched(108, "f", offset)
    broken |= {"flat": patched(280, "12f", *[0] * 12), "nowhere": patched(280, "f", np.nan)}
    broken |= {"nothing": whole[:352] + bytes(len(whole) - 352)}
    for name, content in broken.items():
        (root / f"{name}.nii").write_bytes(content)
        (root / f"{name}.nii.gz").write_bytes(gzip.compress(content))
    (root / "torn_gzip.nii.gz").write_bytes(gzip.compress(whole)[:-900])
    images = read(root).images
    expected = {f"{name}.nii{end}" for name in broken for end in ("", ".gz")}
    assert {images.names[row] for row in images.unreadable} == expected | {"torn_gzip.nii.gz"}
    assert sum(name.startswith("good.nii/") for name in images.names) == 6


def slices(path: Path) -> dict[str, np.ndarray]:
    return dict(data.images_in(path.parent, path.name))


def test_slices_are_seen_front_up_with_the_patients_left_on_the_right(tmp_path):
    """However the voxels are stored: a bright spot in the left front of the head, high up."""
    for signs in itertools.product((1, -1), repeat=3):
        voxels = np.zeros((20, 24, 10), "i2")
        voxels[1:-1, 1:-1] = 50
        voxels[2:5, 18:22, 7] = 100  # in RAS order: x low = left, y high = front
        stored = voxels[:: signs[0], :: signs[1], :: signs[2]]
        write_nifti(tmp_path / "v.nii", stored, np.diag((*signs, 1)).astype(float))
        seen = slices(tmp_path / "v.nii")
        assert seen["7"].shape == (24, 20) and list(seen) == [str(z) for z in range(10)]
        rows, columns = np.nonzero(seen["7"] == 255)
        assert rows.max() < 12 and columns.min() >= 10  # up is front, right is left


def test_a_window_is_the_volumes_and_ignores_hot_voxels_air_and_no_numbers(tmp_path):
    voxels = np.zeros((20, 20, 40), np.float32)
    voxels[4:16, 4:16, :20], voxels[4:16, 4:16, 20:36] = 100, 200
    voxels[0, 0, 0], voxels[0, 1, 0], voxels[0, 2, 0] = 1e6, np.inf, np.nan
    voxels[0, 3, 1] = -50  # bias correction leaves such
    voxels[10, 10, 37] = 200  # next to nothing in it
    write_nifti(tmp_path / "v.nii", voxels, np.diag((1, 3, 5, 1)))
    seen = slices(tmp_path / "v.nii")
    assert list(seen) == [str(z) for z in range(36)]
    assert seen["5"].shape == (60, 20)  # pixels that are no squares become squares
    assert abs(int(seen["5"][30, 10]) - 128) <= 1 and seen["30"][30, 10] == 255
    assert seen["5"][0, 0] == 0


def test_a_slices_class_comes_from_the_mask_of_its_own_sequence_and_changes_with_it(tmp_path):
    lesions, grid = np.zeros((20, 24, 6), "u1"), np.diag((1, 2, 4, 1))
    lesions[5:9, 5, 3] = 1  # 4 voxels of 2 mm^2: a lesion
    lesions[5:8, 5, 5] = 1  # 6 mm^2: too little
    folder = tmp_path / "in" / "Patient-1"
    for sequence in ("Flair", "T1"):
        write_nifti(folder / f"1-{sequence}.nii", volume(3), grid)
    write_nifti(folder / "1-LesionSeg-Flair.nii.gz", lesions, grid)
    assert list(slices(folder / "1-Flair.nii")) == [
        f"{'no-' * (z != 3)}lesion/{z}" for z in range(6)
    ]
    assert list(slices(folder / "1-T1.nii")) == [str(z) for z in range(6)]
    assert read(tmp_path / "in").tasks["ms"].labels.sum() == 1
    lesions[5:15, 5:15, 4:] = 1
    write_nifti(folder / "1-LesionSeg-Flair.nii.gz", lesions, grid)
    study = read(tmp_path / "in")
    assert study.tasks["ms"].classes == ("no-lesion", "lesion")
    assert study.tasks["ms"].labels.sum() == 3 and len(study.groups) == 12
    grid[0, 3] = 3
    write_nifti(folder / "1-LesionSeg-Flair.nii.gz", lesions, grid)
    (why,) = read(tmp_path / "in").images.unreadable.values()
    assert "1-LesionSeg-Flair.nii.gz" in why


def test_a_lesion_is_marked_where_the_image_shows_it(tmp_path):
    """The volume is its own mask, stored in another order, with pixels that are no squares."""
    lesions = np.zeros((20, 24, 6), "u1")
    lesions[3:9, 14:20, 2:5] = 1
    lesions[12, 3:9, 3] = 1
    stored, affine, root = lesions[::-1, :, ::-1], np.diag((-1.0, 1.5, -3.0, 1.0)), tmp_path / "in"
    write_nifti(root / "ms" / "1-Flair.nii", stored, affine)
    write_nifti(root / "ms" / "1-LesionSeg-Flair.nii.gz", stored, affine)
    images = read(root, 48).images
    assert len(images.names) == 3
    for name, square in zip(images.names, images.squares, strict=True):
        marked = data.lesion_of(root, name, 48)
        assert marked.any() and np.array_equal(marked, square > 127)
    assert not data.lesion_of(root, "somewhere/else.png", 48).any()


# --- shards ------------------------------------------------------------------------------------


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(brain(seed)).save(file, "PNG")
    return file.getvalue()


def write_shard(path: Path, images: list, labels: list | None, names: list | None = None) -> None:
    """As the datasets library writes it: struct<bytes, path>, row groups, its features as JSON."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow reads shards; not installed")
    from pyarrow import parquet

    entries = [{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)]
    table = pyarrow.table({"image": entries} | ({"label": labels} if labels else {}))
    label = {"names": names, "_type": "ClassLabel"} if names else {"_type": "Value"}
    info = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=5)


def test_a_shards_images_lie_below_their_classes_and_numbers_stay_numbers(tmp_path):
    root, labels = tmp_path / "in", [i % 3 - 1 for i in range(12)]
    file = "data/train-00000-of-00001.parquet"
    write_shard(root / file, [png(i) for i in range(12)], labels, ["x/y", "b"])
    study = read(root)
    inner = [("", "x_y/", "b/")[i % 3] for i in range(12)]  # -1 = not labelled
    assert study.images.names == [f"{file}/{name}{i}" for i, name in enumerate(inner)]
    for i in range(12):
        assert np.array_equal(study.images.thumbnails[i], data.thumbnail(brain(i)))
    assert classes_of(study) == {"in": ("b", "x_y")}
    assert set(study.tasks["in"].published) == {""}  # "train" alone is how they call the whole
    for place in ("Alzheimer_MRI/data/train-0.parquet", "brain-stroke-set/train-0.parquet"):
        write_shard(tmp_path / "two" / place, [png(i) for i in range(8)], [i % 4 for i in range(8)])
    numbers = ("0", "1", "2", "3")
    assert classes_of(read(tmp_path / "two")) == {"alzheimer": numbers, "stroke": numbers}


def test_published_splits_stand_in_shards_names_and_bad_rows_are_left_out(tmp_path, monkeypatch):
    for seed, part in enumerate(("train", "validation", "test")):
        images = [png(100 * seed + i) for i in range(6)]
        write_shard(tmp_path / "in" / "data" / f"{part}-0.parquet", images, [0, 1] * 3, ["a", "b"])
    write_shard(tmp_path / "in" / "z.parquet", [png(500), b"no image", None], None)
    (tmp_path / "in" / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    for _ in range(2):  # decoded, and from the cache
        study = read(tmp_path / "in")
        bad = [study.images.names[row] for row in study.images.unreadable]
        assert bad == ["broken.parquet", "z.parquet/1", "z.parquet/2"]
    for name, split in split_of(study, "in").items():
        assert split == {"tr": "train", "va": "val", "te": "test"}[name.split("/")[1][:2]]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(data.UserError, match="pip install pyarrow"):
        read(tmp_path / "in")


# --- the cache ---------------------------------------------------------------------------------


def test_what_is_unchanged_is_not_decoded_again_and_what_has_changed_is(tmp_path, monkeypatch):
    """Files that swap names are noticed though size and time of change are equal, as unpacked."""
    root, decoded, original = tmp_path / "scans", [], data.decode
    fill(root, "0.png", "1.png", "2.png", "3.bmp", "4.bmp")
    for name in ("3.bmp", "4.bmp"):
        os.utime(root / name, (1e9, 1e9))
    monkeypatch.setattr(data, "decode", lambda *how: decoded.append(how) or original(*how))
    first = read(root).images
    assert len(decoded) == 5
    again = read(root).images
    assert len(decoded) == 5 and np.array_equal(first.squares, again.squares)
    assert again.squares.shape == (5, 32, 32) and again.hashes.dtype == np.uint8
    for old, new in (("3.bmp", "x"), ("4.bmp", "3.bmp"), ("x", "4.bmp")):
        (root / old).rename(root / new)
    assert np.array_equal(read(root).images.squares[3], data.fit_square(brain(4), 32))
    save(root / "1.png", brain(9, 80))
    images = read(root).images
    for row, gray in enumerate((brain(0), brain(9, 80), brain(2), brain(4), brain(3))):
        assert np.array_equal(images.squares[row], data.fit_square(gray, 32))
        assert np.array_equal(images.thumbnails[row], data.thumbnail(gray))
        assert images.hashes[row].tobytes() == hashlib.sha256(gray.tobytes()).digest()[:16]


def test_one_process_and_several_decode_the_same_and_leave_torchs_randomness(tmp_path, monkeypatch):
    root, seen = tmp_path / "scans", []
    fill(root, *(f"{i}.png" for i in range(70)))
    (root / "z.png").write_bytes(b"")

    def bar(items, **_):
        for item in items:
            seen.append(item)
            yield item

    before = torch.get_rng_state()
    many = data.load(root, 32, tmp_path / "many", bar).images
    assert len(seen) == 71 and torch.equal(before, torch.get_rng_state())
    monkeypatch.setattr(data, "FEW", 1000)
    one = data.load(root, 32, tmp_path / "one").images
    assert np.array_equal(many.squares, one.squares) and np.array_equal(many.hashes, one.hashes)
    assert many.unreadable == one.unreadable and list(one.unreadable) == [70]


def kill_itself(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line_and_leaves_no_cache(tmp_path, monkeypatch):
    """As the system does where memory runs short."""
    fill(tmp_path / "scans", *(f"{i}.png" for i in range(3)))
    monkeypatch.setattr(data, "FEW", 0)
    monkeypatch.setattr(data, "images_in", kill_itself)
    with pytest.raises(data.UserError, match="memory"):
        read(tmp_path / "scans")
    monkeypatch.undo()
    assert len(read(tmp_path / "scans").images.names) == 3


def test_a_killed_decode_leaves_no_cache_and_a_second_one_is_refused_meanwhile(tmp_path):
    """A real process, killed with SIGKILL after some images."""
    root = tmp_path / "scans"
    fill(root, *(f"{i}.png" for i in range(40)))
    code = "import data, sys, time; from pathlib import Path\n"
    code += "def slow(items, **_):\n    for i, item in enumerate(items):\n        yield item\n"
    code += "        if i == 20: print(i, flush=True); time.sleep(60)\n"
    code += f"data.load(Path({str(root)!r}), 32, Path({str(tmp_path / 'cache')!r}), slow)"
    env = os.environ | {"PYTHONPATH": str(Path(data.__file__).parent)}
    child = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"20\n"
    with pytest.raises(data.UserError, match="another run"):
        read(root)
    child.kill()
    child.wait()
    assert not list((tmp_path / "cache").rglob("index.json"))
    images = read(root).images
    for i, name in enumerate(images.names):
        assert np.array_equal(images.squares[i], data.fit_square(brain(int(name[:-4])), 32))


def test_a_cache_that_cannot_be_used_is_one_line(tmp_path):
    fill(tmp_path / "scans", "1.png", "2.png")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file"):
        data.load(tmp_path / "scans", 32, tmp_path / "file")
    read(tmp_path / "scans")
    (folder,) = (tmp_path / "cache").iterdir()
    for name in ("images.bin", "index.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(data.UserError, match=f"{folder}.*delete"):
            read(tmp_path / "scans")
        (folder / name).write_bytes(content)
    assert len(read(tmp_path / "scans").images.names) == 2


# --- folders and names -------------------------------------------------------------------------


def test_names_in_any_script_links_in_circles_and_runs_of_ours(tmp_path):
    root = tmp_path / "scans"
    odd = ["脑/扫描 一.png", "Gehirn/größer.png", "rtl/\u202eabc.png", "nl/a\nb.png", "-rf/'\".png"]
    odd += [os.fsdecode(b"nl/\xff\xfe.png")]  # no UTF-8
    fill(root, *odd, "tumor/glioma/1.png", "tumor/notumor/1.png")
    fill(tmp_path, "elsewhere/9.png", seed=50)
    (root / "nl" / "up").symlink_to(root)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "favourites").symlink_to(root / "tumor")  # sorts before it, and takes nothing away
    fill(root, "runs/explain/overlays/1.png", seed=60)
    (root / "runs" / "explain" / "config.json").write_text('{"command": "explain"}')
    study = read(root)
    expected = {*odd, "tumor/glioma/1.png", "tumor/notumor/1.png", "linked/9.png"}
    expected |= {"favourites/glioma/1.png", "favourites/notumor/1.png"}
    assert set(study.images.names) == expected and not study.images.unreadable
    assert study.tasks["tumor"].classes == ("glioma", "notumor")


def test_typed_files_and_folders_are_read_and_missing_ones_are_one_line(tmp_path):
    names = ["3.png", os.fsdecode(b"\xff.png"), "v.nii.gz"]
    fill(tmp_path, "a/1.png", "a/deep/2.png", *names, seed=3)
    how = (32, tmp_path / "cache", lambda items, **_: items)
    images = data.load_files([tmp_path / name for name in ("a", *names)], *how)
    ends = [Path(name).relative_to(tmp_path).as_posix() for name in images.names]
    assert ends == ["a/1.png", "a/deep/2.png", *names[:2], *(f"v.nii.gz/{z}" for z in range(6))]
    with pytest.raises(data.UserError, match="nowhere"):
        data.load_files([tmp_path / "nowhere"], *how)
    (tmp_path / "empty").mkdir()
    for root in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(data.UserError, match=root.name):
            read(root)


NAMES = {"t": FOUR, "a": data.KNOWN_TASKS["alzheimer"], "s": ("normal", "stroke")}
LAYOUTS = [  # files below --data (* = a blank) -> tasks and their classes
    ("tumor/no/1.png tumor/glioma_tumor/1.png", {"tumor": ("glioma", "no")}),
    ("Tumor/no/1.png Tumor/yes/1.png", {"tumor": ("no", "yes")}),
    ("x/tumor_demented/1.png x/y/1.png", {"x": ("tumor_demented", "y")}),
    ("sick/1.png well/1.png", {"scans": ("sick", "well")}),
    ("Normal/1.png Stroke/1.png", {"stroke": NAMES["s"]}),
    ("o/Data/Mild*Dementia/1.png o/Data/Non*Demented/1.png o/Data/Very*mild*Dementia/1.png "
     "o/Data/ModerateDemented/1.png", {"alzheimer": NAMES["a"]}),
    ("1.png 2.png", {}),
    ("anything/1.png 2.png", {}),
    ("stroke/normal/1.png stroke/stroke/1.png more/1.png", {"stroke": NAMES["s"]}),
    ("mine/sick/1.png mine/well/1.png loose/1.png", {"mine": ("sick", "well")}),
    ("a/sub-01/1.png a/sub-02/1.png a/0001/1.png a/case_h49/1.png", {}),
    ("x/0/1.png x/1/1.png x/12/1.png", {"x": ("0", "1", "12")}),
    ("tumor/glioma/center/scanner/1.png tumor/glioma/case2/1.png tumor/notumor/1.png",
     {"tumor": ("glioma", "notumor")}),
    ("stroke/healthy/TCGA-02-0049/1.png stroke/healthy/BraTS20_Training_001/1.png "
     "stroke/ill/subject01/1.png", {"stroke": ("healthy", "ill")}),
    ("x/a/1.png x/a/new/1.png x/b/1.png", {"x": ("a", "b")}),
    ("x/sub-dural/1.png x/sub-arachnoid/1.png", {"x": ("sub-arachnoid", "sub-dural")}),
    ("yes/1.png no/1.png augmented*data/yes/2.png augmented*data/no/2.png",
     {"scans": ("no", "yes")}),
    ("ill/batch1/1.png ill/batch2/1.png fit/batch3/1.png", {"scans": ("fit", "ill")}),
    ("fold1/a/1.png fold1/b/1.png fold2/a/2.png fold2/b/2.png",
     {"fold1": ("a", "b"), "fold2": ("a", "b")}),
    ("tumor/x/a/1.png tumor/x/b/1.png tumor/y/c/1.png tumor/y/d/1.png",
     {"tumor": ("a", "b"), "y": ("c", "d")}),
    ("k/tumor/yes/1.png k/tumor/no/1.png k/ms/yes/1.png k/ms/no/1.png",
     {"tumor": ("no", "yes"), "ms": ("no", "yes")}),
    ("x/brain-stroke-set/no_stroke/1.png x/brain-stroke-set/stroke/2.png", {"stroke": NAMES["s"]}),
    ("x/stroke/a/1.png x/stroke/b/1.png", {"stroke": ("a", "b")}),
    (" ".join(f"elsewhere/{name}/1.png" for name in FOUR) + " tumor/no/2.png tumor/yes/2.png",
     {"tumor": FOUR, "tumor-no-yes": ("no", "yes")}),
    ("a/1-T1.nii/1-T1.nii a/preview.png", {}),
]  # fmt: skip


@pytest.mark.parametrize(("files", "tasks"), LAYOUTS)
def test_folders_are_read_as_tasks_and_classes(tmp_path, files, tasks):
    fill(tmp_path / "scans", *(name.replace("*", " ") for name in files.split(" ")))
    assert classes_of(read(tmp_path / "scans")) == tasks


def test_the_eight_sources_are_read_as_they_come_side_by_side(tmp_path):
    root, ms = tmp_path / "scans", "multiple-sclerosis-brain-mri-lesion-segmentation"
    falah = ["Mild_Demented", "Moderate_Demented", "Non_Demented", "Very_Mild_Demented"]
    oasis = ("Mild Dementia", "Moderate Dementia", "Non Demented", "Very mild Dementia")
    for part, c in itertools.product(("Training", "Testing"), FOUR):
        fill(root, f"brain-tumor-mri-dataset/{part}/{c}/{part[:2]}-{c[:2]}_0001.jpg")
    for k, c in enumerate(oasis):
        fill(root, *(f"imagesoasis/Data/{c}/OAS1_{k}{i}28_MR1_mpr-1_100.jpg" for i in range(3)))
    fill(root, "brain-tumor-MRI-dataset/no/1 no.jpeg", "brain-tumor-MRI-dataset/yes/Y1.jpg")
    fill(root, *(f"parkinsons-brain-mri-dataset/parkinsons_dataset/{c}/T2W_TSE_001.png"
                 for c in ("normal", "parkinson")))  # fmt: skip
    lesions = np.zeros((20, 24, 6), "u1")
    lesions[5:12, 5:12, :3] = 1
    for sequence, i in itertools.product(("Flair", "T1", "T2"), range(1, 4)):
        fill(root, f"{ms}/Patient-{i}/{i}-{sequence}.nii", seed=i)
        write_nifti(root / f"{ms}/Patient-{i}/{i}-LesionSeg-{sequence}.nii", lesions, np.eye(4))
    four, numbers = [png(i) for i in range(4)], [0, 1, 2, 3]
    for part in ("train", "test"):
        write_shard(root / f"Alzheimer_MRI/data/{part}-00000-of-1-c0.parquet", four, numbers, falah)
    write_shard(root / "BrainMRI/data/train-0.parquet", four, [0, 1, 0, 1])
    write_shard(root / "tekno21-brain-stroke-dataset-binary/train-0.parquet", four, [0, 1, 0, 1])
    study = read(root)
    assert classes_of(study) == {
        **{name: data.KNOWN_TASKS[name] for name in ("tumor", "alzheimer", "parkinson", "ms")},
        **{"brain-tumor-MRI-dataset": ("no", "yes"), "BrainMRI": ("0", "1"), "stroke": ("0", "1")},
    }
    sources = {name.split("/")[0] for name in study.images.names}
    assert len(sources) == 8 and len(study.tasks["ms"].rows) == 54


def test_publishers_splits_stand_anywhere_above_the_class(tmp_path):
    for above in ("tumor/{}/", "{}/tumor/"):
        root = tmp_path / above[:1] / "scans"
        for k, part in enumerate(("Training", "Testing", "valid")):
            fill(root, *(f"{above.format(part)}{c}/{k}.png" for c in ("glioma", "no")), seed=10 * k)
        parts = {"0": "train", "1": "test", "2": "val"}
        for name, split in split_of(read(root), "tumor").items():
            assert split == parts[name[-5]]


PATIENTS = {
    "tumor/glioma/P012_3.png": "p12",
    "x/sub01-slice2.png": "sub1",
    "x/sub-01/anat/1.png": "sub1",
    "x/sub-control07/1.png": "subcontrol7",
    "x/subject-01/1.png": "subject1",
    "x/T1_sub-03_1.png": "sub3",
    "x/Patient (12)/1.png": "patient12",
    "x/patient_012_a.png": "patient12",
    "ms/Patient-7/7-Flair.nii.gz/lesion/101": "patient7",
    "a/OAS1_0028_MR1_mpr-1_100.jpg": "oas10028",
    "a/OAS2_0028_MR1.jpg": "oas20028",
    "a/002_S_1002_x.png": "2s1002",
    "stroke/healthy/TCGA-02-0049/1.png": "tcga20049",
    "stroke/healthy/BraTS20_Training_001/1.png": "brats20training1",
    "x/BraTS-GLI-00001-000/1.png": "bratsgli1",
    "x/case_h49/1.png": "caseh49",
    "x/0001/3.png": "1",
    "stroke/Normal/58 (1).jpg": "normal/58",
    "mine/IXI012-Guys.nii.gz/7": "mine/IXI012-Guys.nii.gz",
    "tumor/Training/glioma/Tr-gl_0012.jpg": "",
    "x/up12_3.png": "",
    "x/bleed/sub-dural/1.png": "",
}


def test_patients_are_known_by_name():
    assert {name: data.read_patient(name, None) for name in PATIENTS} == PATIENTS


def test_a_patterns_captures_are_compared_as_they_are(tmp_path):
    """Without their separators, H1_23 and H12_3 were one. The pattern goes before known names."""
    names = [
        "a/H1_23_1.png",
        "a/sub-9/H1_23_2.png",
        "a/H12_3_1.png",
        "b/H1_23_3.png",
        "b/other.png",
    ]
    fill(tmp_path / "scans", *names)
    patients = read(tmp_path / "scans", pattern=re.compile(r"(H\d+_\d+)_\d\.png")).patients
    assert patients.tolist() == ["H12_3", "H1_23", "H1_23", "H1_23", ""]
    for pattern in (r"scan(\d+)", r"H|(never)", r"H\d+"):
        with pytest.raises(data.UserError, match="in none of 5"):
            read(tmp_path / "scans", pattern=re.compile(pattern))


def test_folders_of_patients_where_classes_are_expected_stop_with_a_proposal(tmp_path):
    root, many = tmp_path / "scans", tmp_path / "many"
    fill(root, *(f"stroke/{name}/{k}.png" for name in "abcdefghijklm" for k in range(2)))
    with pytest.raises(data.UserError, match="--patient-pattern.*--labels"):
        read(root)
    study = read(root, pattern=re.compile(r"stroke/(\w)/"))
    assert not study.tasks and len(set(study.groups)) == 13
    fill(many, *(f"x/class{c}/{k}.png" for c in range(11) for k in range(8)))
    assert len(read(many).tasks["x"].classes) == 11


PEOPLE = [  # layouts; {i} a person, {c} his class, {s} one of three images, {part} a publisher's
    ["tumor/T1/{c}/sub-{i:02d}_{s}.png", "tumor/T2/{c}/sub-{i:02d}_{s}.png"],
    ["tumor/{c}/sub-{i:02d}_{s}.png", "raw/sub-{i:02d}/anat/{s}.nii.gz"],
    ["tumor/{c}/Patient-{i}/{s}.png", "volumes/Patient-{i}/{i}-T1.nii"],
    ["tumor/{c}/P{i:03d}_{s}.png", "stroke/{d}/P{i:03d}_{s}.png", "loose/P{i:03d}_9.png"],
    ["{part}/mine/{c}/Patient-{i}/{s}.png", "extra/patient_{i:03d}_{s}.png"],
    ["alzheimer/v1/{c}/OAS1_{i:04d}_{s}.png", "alzheimer/v2/{c}/OAS1_{i:04d}_{s}.png"],
    ["ms/sub-{i:02d}/{c}/{s}.png"],
    ["train/{c}/sub-{i:02d}_{s}.png", "extra/sub-{i:02d}_9.png"],
]


@pytest.mark.parametrize("layout", PEOPLE, ids=lambda layout: layout[0])
def test_no_person_is_on_two_sides_wherever_the_name_stands(tmp_path, layout):
    """Over all tasks of --data, pretraining included; each layout once let people through."""
    root = tmp_path / "scans"
    for i, (k, pattern), s in itertools.product(range(24), enumerate(layout), range(3)):
        words = {"c": ("normal", "lesion")[i % 2], "d": ("left", "right")[i % 2]}
        words |= {"c": FOUR[i % 2]} if "tumor" in layout[0] else {}
        words |= {"part": ("Training", "Testing")[s == 2 and i < 6]}
        fill(root, pattern.format(i=i, s=s, **words), seed=1000 * k + 10 * i + s)
    study = read(root)
    person = [int(re.search(r"(?:-|_|P)0*(\d+)", name)[1]) for name in study.images.names]
    assert len(set(person)) == 24
    sides, held = defaultdict(set), set()  # of a task and a person; people held out anywhere
    for task in study.tasks.values():
        for row, split in zip(task.rows, task.split, strict=True):
            sides[task.name, person[row]].add(str(split))
            if split in ("val", "test"):
                held.add(person[row])
    assert study.tasks and all(len(parts - {"dropped"}) == 1 for parts in sides.values())
    assert set().union(*sides.values()) >= {"train", "val", "test"}
    assert not held & {person[row] for row in data.pretraining_rows(study)}


# --- groups ------------------------------------------------------------------------------------


def test_near_duplicate_pairs_match_a_double_loop(monkeypatch):
    """The even-odd trick, the blocks and the whole numbers against cosines one by one."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (6, 32, 32))
    noisy = [base[i % 6] + rng.normal(0, 2 * i, (32, 32)) for i in range(24)]
    thumbnails = np.clip(np.stack(noisy), 0, 255).astype(np.uint8)
    thumbnails[::5] = thumbnails[::5, :, ::-1]
    thumbnails[7] = thumbnails[8] = 128  # of one colour: nobody's near-duplicate

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a - a.mean(), b - b.mean()
        return (a * b).sum() / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-9)

    slow, only_mirrored = set(), 0
    for i, j in itertools.combinations(range(24), 2):
        straight = cosine(thumbnails[i], thumbnails[j])
        mirrored = cosine(thumbnails[i], thumbnails[j][:, ::-1])
        if max(straight, mirrored) >= 0.9:
            slow.add((i, j))
            only_mirrored += straight < 0.9
    assert 10 < len(slow) < 100 and only_mirrored > 3
    for block in (5, 2048):
        monkeypatch.setattr(data, "BLOCK", block)
        found = data.near_duplicate_pairs(thumbnails, 0.9).tolist()
        assert set(map(tuple, found)) == slow and len(found) == len(slow)


def test_the_threshold_is_met_exactly_and_copies_of_all_kinds_are_one_group(tmp_path):
    a, b = np.full((2, 32, 32), 100, np.uint8)
    a[0, :4], b[0, :4] = (107, 93, 101, 99), (107, 93, 99, 101)  # (49 + 49 - 1 - 1) / 100 = 0.96
    for threshold, groups in ((0.96, [0, 0]), (0.9600001, [0, 1]), (0.98, [0, 1])):
        assert data.near_duplicate_groups(np.stack([a, b]), threshold).tolist() == groups
    original = brain(0)
    save(tmp_path / "x.jpg", original, quality=60)
    small = np.asarray(Image.fromarray(original).resize((33, 33)))
    bright = (original * 0.8 + 30).astype(np.uint8)
    images = [original, data.read_gray(tmp_path / "x.jpg"), small, bright, original[:, ::-1]]
    groups = data.near_duplicate_groups(np.stack([*map(data.thumbnail, (*images, brain(1)))]))
    assert groups.dtype == np.int64 and groups.tolist() == [0, 0, 0, 0, 0, 1]


def test_groups_are_single_linkage():
    pairs = np.array([[0, 1], [3, 4], [1, 2], [4, 6], [9, 0]])
    assert data.connected(10, pairs).tolist() == [0, 0, 0, 1, 1, 2, 1, 3, 4, 0]
    chain = np.stack([np.arange(999), np.arange(1, 1000)], 1)
    shuffled = np.random.default_rng(0).permutation(1000)[chain]
    assert not data.connected(1000, shuffled).any() and data.connected(2, []).tolist() == [0, 1]


def test_near_duplicates_join_only_where_a_patient_is_unknown_and_equal_pixels_always(tmp_path):
    """Slices of strangers on one atlas look alike, and must not chain them; blank join none."""
    noise, root = np.random.default_rng(0), tmp_path / "scans"

    def alike() -> np.ndarray:
        return np.clip(brain(4) + noise.normal(0, 2, (40, 40)), 0, 255).astype(np.uint8)

    for i in range(5):
        save(root / f"a/sub-{i}/1.png", alike())
        save(root / f"a/sub-{i}/black.png", np.full((40 + i, 40), 7, np.uint8))
    save(root / "b/unknown.png", brain(99))
    study = read(root)
    assert len(data.near_duplicate_pairs(study.images.thumbnails)) == 10
    assert len(set(study.groups)) == 6
    save(root / "c/sub-9/copied.png", data.read_gray(root / "a/sub-3/1.png"))
    study = read(root)
    group = dict(zip(study.images.names, study.groups, strict=True))
    assert group["c/sub-9/copied.png"] == group["a/sub-3/1.png"] and len(set(study.groups)) == 6
    save(root / "b/unknown2.png", alike())
    assert len(set(read(root).groups)) == 2


def test_the_same_slices_as_png_and_as_volume_split_alike(tmp_path):
    root = tmp_path / "scans"
    for i in range(12):
        name = f"tumor/{FOUR[i % 2]}/v{i}x.nii.gz"
        fill(root, name, seed=100 * i)
        for z, gray in data.images_in(root, name):
            save(root / f"tumor/{FOUR[i % 2]}/{i}_{z}x.png", gray)
    study = read(root)
    assert len(set(study.groups)) == 12
    parts = defaultdict(set)
    for name, split in split_of(study, "tumor").items():
        parts[re.search(r"/v?(\d+)", name)[1]].add(split)
    assert max(map(len, parts.values())) == 1 and len(parts) == 12


def series(kind: str) -> list[np.ndarray]:
    """60 images: three of each of 20 heads, too unlike (0.94) for near-duplicates; or an atlas."""
    noise, images = np.random.default_rng(0), []
    for i in range(60):
        head = brain(0 if kind == "atlas" else i // 3, 32).astype(float)
        head = (head - head.mean()) / head.std() + noise.normal(0, 0.25, (32, 32))
        head = brain(i // 2, 32) / 35.0 - 3 if kind == "repeated" else head
        images.append((head * 35 + 128).clip(0, 255).astype(np.uint8))
    order = np.random.default_rng(1).permutation(60) if kind == "shuffled" else range(60)
    return [images[i] for i in order]


@pytest.mark.parametrize(
    ("kind", "count", "name", "groups"),
    [
        ("planted", 60, "Tr-a_{}.png", 20),
        ("shuffled", 60, "Tr-a_{}.png", 60),
        ("atlas", 60, "Tr-a_{}.png", 60),
        ("repeated", 60, "Tr-a_{}.png", 30),  # neighbours that are near-duplicates prove nothing
        ("planted", 48, "Tr-a_{}.png", 48),  # too short to know
        ("planted", 60, "P{0:03d}_{0}.png", 60),  # patients are known
    ],
)
def test_neighbours_in_a_numbered_series_are_one_patients_where_random_files_differ(
    tmp_path, kind, count, name, groups
):
    for i, pixels in enumerate(series(kind)[:count]):
        save(tmp_path / "scans" / "mine" / "a" / name.format(i + 95), pixels)  # 95 comes before 100
        save(tmp_path / "scans" / "mine" / "b" / f"{i:04d}.png", brain(1000 + i))
    study = read(tmp_path / "scans")
    assert len(set(study.groups)) == groups + count
    told = [notice for notice in study.notices if "file order" in notice]
    assert len(told) == (groups == 20) and all("40 pairs" in notice for notice in told)


def test_augmented_copies_belong_to_their_original_and_are_no_test_images(tmp_path):
    root, copies = tmp_path / "scans", {}
    for i in range(12):
        folder = f"{'yes' if i % 2 else 'no'}"
        fill(root, f"{folder}/Y{i}.jpg", seed=i)
        names = [f"aug_Y{i}_0_4528", f"Y{i}_rot90", f"Y{i}_flip", f"Y{i}-copy", f"Y{i}_aug_3"]
        names += [f"Y{i} (flipped)", f"y{i}_noise", f"bright_Y{i}_7", f"Y{i}_crop_mirror"]
        for k, name in enumerate(names):
            copy = f"augmented data/{folder}/{name}.png" if k % 2 else f"{folder}/{name}.png"
            fill(root, copy, seed=1000 + 20 * i + k)
            copies[copy] = f"{folder}/Y{i}.jpg"
    study = read(root)
    (task,) = study.tasks
    group, split = dict(zip(study.images.names, study.groups, strict=True)), split_of(study, task)
    assert len(set(group.values())) == 12
    for copy, original in copies.items():
        assert group[copy] == group[original]
        assert split[copy] == ("train" if split[original] == "train" else "dropped")
    assert set(split.values()) == {"train", "val", "test", "dropped"}
    assert study.tasks[task].notes["dropped_copies"] == [*split.values()].count("dropped")


def test_a_copys_number_is_no_originals_name(tmp_path):
    """2_aug_1 is of 2, not of 1: else all copies numbered 1 would chain the whole set."""
    names = [f"{'ab'[i % 2]}/{i}{end}.png" for i in range(8) for end in ("", "_aug_1", "_rot_2")]
    fill(tmp_path / "scans", *names)
    assert len(set(read(tmp_path / "scans").groups)) == 8


# --- tables ------------------------------------------------------------------------------------


def test_a_table_says_what_names_cannot_and_what_it_lacks_is_said(tmp_path):
    root, labels = tmp_path / "scans", tmp_path / "t.csv"
    fill(root, *(f"{i}.png" for i in range(12)), "tumor/glioma/1.png", "tumor/notumor/1.png")
    (root / "labels.csv").write_text("path,label")
    (root / "1.dcm").write_bytes(b"")
    told = " ".join(read(root).notices)
    assert "--labels" in told and "dcm2niix" in told and "1 DICOM" in told
    lines = ["path,label,task,patient,split,hospital"]
    for i in range(12):
        lines.append(f"./{i}.png,{'ab'[i % 2]},m/x,{i // 2},{'Testing' if i > 9 else 'train'},x")
    labels.write_text("\n".join([*lines, "no.png,a", "tumor/glioma/1.png"]))
    study = read(root, labels=labels)
    assert classes_of(study) == {"m_x": ("a", "b")}  # what has no label in it has none
    assert study.patients.tolist()[:3] == ["0", "0", "5"]
    split = split_of(study, "m_x")
    assert {split["10.png"], split["11.png"]} == {"test"}
    told = [notice for notice in study.notices if "t.csv" in notice]
    assert "hospital" in told[0] and "no.png" in told[1] and "tumor/notumor/1.png" in told[2]


TABLES = [
    ("file,label\n0.png,a", "path and label"),
    ("path,task\n0.png,a", "path and label"),
    ("", "path and label"),
    ("path,label,patient,split\n0.png,a,X,train\n1.png,b,X,test", "'X'.*train.*test"),
    ("path,label,split\n0.png,a,tets", "tets"),
    ("path,label\nnothing.png,a", "none of"),
]


@pytest.mark.parametrize(("text", "message"), TABLES)
def test_a_table_that_cannot_be_right_is_one_line(tmp_path, text, message):
    fill(tmp_path / "scans", "0.png", "1.png")
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(data.UserError, match=message) as error:
        read(tmp_path / "scans", labels=tmp_path / "t.csv")
    assert "t.csv" in str(error.value) and "\n" not in str(error.value)


def write_splits(study: data.Study, task: data.Task, path: Path) -> None:
    """splits.csv as `data` writes it."""
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        out = csv.writer(file)
        out.writerow(("path", "label", "group", "split", "pixel_hash"))
        for i, row in enumerate(task.rows):
            label, digest = task.classes[task.labels[i]], study.images.hashes[row].tobytes().hex()
            out.writerow((study.images.names[row], label, task.groups[i], task.split[i], digest))


@pytest.mark.parametrize("people", [2, 3, 9])
@pytest.mark.parametrize("part", ["", "Testing"])
def test_a_splits_csv_given_back_gives_the_same_split(tmp_path, people, part):
    root, names = tmp_path / "scans", []
    for c, i, s in itertools.product("ab", range(people), range(3)):
        names.append(f"mine/{part if i == 1 else ''}/{c}/P{i}{'12'[c == 'b']}_{s}\n,.png")
    fill(root, *names, os.fsdecode(b"mine/a/\xff.png"))
    save(root / "mine/b/contradicts.png", data.read_gray(root / names[0]))
    study = read(root)
    write_splits(study, study.tasks["mine"], tmp_path / "splits.csv")
    again = read(root, labels=tmp_path / "splits.csv")
    assert split_of(again, "mine") == split_of(study, "mine")
    assert "dropped" in split_of(again, "mine").values()
    assert classes_of(again) == classes_of(study)
    assert np.array_equal(data.pretraining_rows(again), data.pretraining_rows(study))


def test_a_pattern_is_proposed_where_names_repeat_but_not_for_a_numbered_series():
    """Once it took Tr-gl, with 1,311 files, for a patient."""
    pattern = data.propose_pattern([f"a/H{i // 4}_{i}.png" for i in range(100)])
    assert re.search(pattern, "a/H12_3.png")[1] == "H12"
    prefixes = [f"{part}-{c}" for part in ("Tr", "Te") for c in ("gl", "me", "no", "pi", "a", "b")]
    assert not data.propose_pattern([f"a/{p}_{i}.jpg" for p in prefixes for i in range(50)])
    assert not data.propose_pattern([f"a/{i}.jpg" for i in range(100)])


# --- splits ------------------------------------------------------------------------------------


def plant(root: Path, people: int = 20) -> None:
    """Two classes; each person has an image and its mirror."""
    for k, i in itertools.product(range(2), range(people)):
        pixels = brain(1000 * k + i)
        save(root / "mine" / ("sick", "well")[k] / f"{i:02d}x.png", pixels)
        save(root / "mine" / ("sick", "well")[k] / f"{i:02d}y.png", pixels[:, ::-1])


def test_no_group_is_in_two_splits_and_pixels_alone_decide_them(tmp_path):
    """70 / 15 / 15 of each class; other names, order, folder, size, random numbers: the same."""
    plant(tmp_path / "scans")
    study = read(tmp_path / "scans")
    task = study.tasks["mine"]
    for group in np.unique(task.groups):
        assert len(set(task.split[task.groups == group])) == 1
    assert len(np.unique(task.groups)) == 40 and task.notes["largest_group"] == 2
    for label in (0, 1):
        counts = Counter(task.split[task.labels == label].tolist())
        assert counts == {"train": 28, "val": 6, "test": 6}
    for name in study.images.names:
        place, stem = name.rsplit("/", 1)
        target = tmp_path / "renamed" / place / f"{hashlib.md5(stem.encode()).hexdigest()}q.png"
        save(target, data.read_gray(tmp_path / "scans" / name))
    torch.manual_seed(5)
    np.random.seed(5)

    def by_hash(study: data.Study) -> dict[str, str]:
        hashes = [bytes(row).hex() for row in study.images.hashes[study.tasks["mine"].rows]]
        return dict(zip(hashes, study.tasks["mine"].split.tolist(), strict=True))

    assert by_hash(read(tmp_path / "renamed", 48)) == by_hash(study)
    tests = sorted(digest for digest, split in by_hash(study).items() if split == "test")
    assert tests[0] == "067a603f55100daf34ecba7831acfbe9"  # on every machine, for ever


def split(labels: list, groups: list, published: list | None = None) -> list[str]:
    """`split_by_group` on plain lists, keys by position."""
    keys = [hashlib.md5(str(i).encode()).hexdigest().encode() for i in range(len(labels))]
    published = np.array(published or [""] * len(labels), "U7")
    return data.split_by_group(np.array(labels), np.array(groups), published, keys).tolist()


def test_each_class_gives_a_group_to_train_then_test_then_val():
    for n, counts in ((1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1)), (20, (14, 3, 3))):
        parts = Counter(split([0] * n, list(range(n))))
        assert (parts["train"], parts["val"], parts["test"]) == counts
    rare = split([0] * 20 + [1] * 2, list(range(22)))
    assert sorted(rare[20:]) == ["test", "train"]
    published = Counter(split([0] * 21, list(range(21)), ["train"] * 20 + ["test"]))
    assert published == {"train": 17, "val": 3, "test": 1}
    mixed = split([0, 0, 1] * 10, [i // 3 for i in range(30)])  # counts once, and is not cut
    assert Counter(mixed) == {"train": 18, "val": 6, "test": 6}
    assert all(len(set(mixed[i : i + 3])) == 1 for i in range(0, 30, 3))


def test_published_tests_stay_and_the_rest_of_their_groups_is_dropped():
    published = ["train", "test", "val", "train", "val", "", "train", "dropped", "test"]
    parts = split([0] * 9, [0, 0, 0, 1, 1, 1, 2, 3, 3], published)
    assert parts == "dropped test dropped dropped val dropped train dropped test".split()


def test_publishers_parts_lose_planted_leaks_and_resplit_pools_them(tmp_path):
    root = tmp_path / "scans"
    for k, c in enumerate("ab"):
        fill(root, *(f"t/Training/{c}/{i}x.png" for i in range(20)), seed=100 * k)
        fill(root, *(f"t/Testing/{c}/{i}x.png" for i in range(5)), seed=500 + 100 * k)
    leaks = {"copied": brain(500), "mirror2": brain(501)[:, ::-1], "small3": brain(502, 36)}
    for name, pixels in leaks.items():
        save(root / f"t/Training/a/{name}.png", pixels)
    study = read(root)
    parts = split_of(study, "t")
    assert all(("Testing" in name) == (part == "test") for name, part in parts.items())
    dropped = {name for name, part in parts.items() if part == "dropped"}
    assert dropped == {f"t/Training/a/{name}.png" for name in leaks}
    assert study.tasks["t"].notes["dropped"] == 3
    assert Counter(parts.values()) == {"train": 34, "val": 6, "test": 10, "dropped": 3}
    parts = split_of(read(root, resplit=True), "t")
    tests = [name for name, part in parts.items() if part == "test"]
    assert "dropped" not in parts.values() and 0 < sum("Testing" in name for name in tests) < 10


def test_near_duplicates_of_two_labels_are_dropped_unless_one_known_patient_has_both(tmp_path):
    root = tmp_path / "scans"
    plant(root)
    save(root / "mine/sick/odd.png", brain(5))
    save(root / "mine/well/odd.png", brain(5)[:, ::-1])  # also near sick/05x and 05y
    study = read(root)
    lost = {name for name, part in split_of(study, "mine").items() if part == "dropped"}
    assert lost == {f"mine/{name}.png" for name in ("sick/odd", "well/odd", "sick/05x", "sick/05y")}
    assert study.tasks["mine"].notes["dropped_for_two_labels"] == 4
    assert Counter(data.left_out(study))["dropped"] == 4
    lesions = np.zeros((20, 24, 6), "u1")
    lesions[5:12, 5:12, ::2] = 1
    same = np.repeat(volume(4)[..., :1], 6, axis=2)
    write_nifti(tmp_path / "ms" / "Patient-7" / "7-Flair.nii", same, np.eye(4))
    write_nifti(tmp_path / "ms" / "Patient-7" / "7-LesionSeg-Flair.nii", lesions, np.eye(4))
    task = read(tmp_path / "ms").tasks["ms"]
    assert len(task.rows) == 6 and "dropped" not in task.split


def test_20000_images_in_1000_classes_are_split_in_linear_time():
    """It took 38 s."""
    n, rng = 20_000, np.random.default_rng(0)
    labels, groups = np.arange(n) // 20, rng.permutation(n) // 2
    keys = [bytes(row).hex().encode() for row in rng.integers(0, 256, (n, 16), np.uint8)]
    begin = time.monotonic()
    parts = data.split_by_group(labels, groups, np.full(n, ""), keys)
    assert time.monotonic() - begin < 5 and 0.5 < (parts == "train").mean() < 0.9


def test_a_class_without_images_to_train_or_test_on_is_one_line(tmp_path):
    fill(tmp_path / "scans", *(f"mine/sick/sub-01/{i}.png" for i in range(8)))
    fill(tmp_path / "scans", *(f"mine/well/sub-{i}/1.png" for i in range(3, 9)), seed=50)
    with pytest.raises(data.UserError, match="'sick' of task mine.*its 1 group.*none is in test"):
        data.check_split(read(tmp_path / "scans").tasks["mine"])
    for part, c, k in itertools.product(("train", "test"), "ab", range(2)):
        fill(tmp_path / "p", f"{part}/{c}/sub-{k}_{part}.png", seed=90 + k)
    with pytest.raises(data.UserError, match="--resplit"):
        data.check_split(read(tmp_path / "p").tasks["p"])


# --- gates -------------------------------------------------------------------------------------


def test_pretraining_never_sees_a_held_out_group_of_any_task_and_a_leak_is_refused(tmp_path):
    """The same head stands in a task's test part, in another task, and among loose images."""
    root = tmp_path / "scans"
    plant(root)
    study = read(root)
    task = study.tasks["mine"]
    leak = study.images.names[task.rows[task.part("test")[0]]]
    pixels = data.read_gray(root / leak)
    fill(root, *(f"tumor/{'xy'[i % 2]}/{i}.png" for i in range(12)), seed=5000)
    save(root / "loose" / "leak.png", pixels[:, ::-1])
    save(root / "tumor" / "x" / "leak.png", pixels)
    study = read(root)
    held = set()
    for task in study.tasks.values():
        held |= set(task.groups[np.isin(task.split, ("val", "test"))])
    rows = data.pretraining_rows(study)
    assert len(study.tasks) == 2 and held and not held & set(study.groups[rows])
    why = dict(zip(study.images.names, data.left_out(study), strict=True))
    assert why["loose/leak.png"] == why["tumor/x/leak.png"] == why[leak] == "held out"
    assert Counter(why.values())[""] == len(rows)

    task, seen = study.tasks["mine"], study.images.hashes[rows]
    assert set(np.flatnonzero(data.was_seen(study, seen))) == set(rows)
    data.refuse_leak(study, task, seen)
    data.refuse_leak(study, task, seen[:0])
    loose = study.images.hashes[study.images.names.index("loose/leak.png")]
    assert data.was_seen(study, loose[None]).sum() == 4  # all of the group, wherever it lies
    with pytest.raises(data.UserError, match=r"2 of the 12 test images of mine"):
        data.refuse_leak(study, task, np.concatenate([seen, loose[None]]))


# --- phantoms ----------------------------------------------------------------------------------


def test_phantoms_are_repeatable_and_a_study_of_five_tasks_with_a_class_per_patient(
    tmp_path, monkeypatch
):
    names = data.phantom_names()
    assert "tumor/glioma/p0012/2" in names and len(set(names)) == len(names)
    assert names == sorted(names)
    image, _ = data.draw_phantom("tumor/glioma/p0012/2")
    assert image.shape == (128, 128) and image.dtype == np.uint8
    assert np.array_equal(image, data.draw_phantom("tumor/glioma/p0012/2")[0])
    others = [data.draw_phantom(f"tumor/glioma/p00{i}/0")[0] for i in range(20, 50)]
    groups = data.near_duplicate_groups(np.stack([*map(data.thumbnail, others)]))
    assert len(set(groups)) == len(others)  # no two patients are near-duplicates
    monkeypatch.setattr(data, "PHANTOM_PATIENTS", 4)
    study = data.load(None, 32, tmp_path)
    assert study.root is None and list(study.tasks) == sorted(data.KNOWN_TASKS)
    assert classes_of(study) == data.KNOWN_TASKS
    for task in study.tasks.values():
        data.check_split(task)
        for group in np.unique(task.groups):
            assert len(set(task.labels[task.groups == group])) == 1
    assert len(set(study.groups)) == 4 * sum(map(len, data.KNOWN_TASKS.values()))


@pytest.mark.parametrize("task", data.KNOWN_TASKS)
def test_a_lesion_is_marked_where_the_disease_changes_the_image(monkeypatch, task):
    for c, i in itertools.product(data.KNOWN_TASKS[task], range(3)):
        name = f"{task}/{c}/p{i:04d}/1"
        image, lesion = data.draw_phantom(name)
        assert lesion.dtype == bool and lesion.mean() < 0.2
        assert lesion.any() == (c not in ("notumor", "normal", "non", "no-lesion"))
        assert np.array_equal(data.lesion_of(None, name, 128), lesion)
        if c not in data.PHANTOM_LESIONS:
            continue
        with monkeypatch.context() as patch:
            patch.setattr(data, "PHANTOM_LESIONS", {})
            healthy, nothing = data.draw_phantom(name)
        changed = np.abs(image.astype(int) - healthy) > 8
        assert not nothing.any() and changed[lesion].mean() > 0.5
        near = lesion.copy()  # soft rims reach a pixel or two further
        for shift, axis in itertools.product((-1, 1, -2, 2), (0, 1)):
            near |= np.roll(lesion, shift, axis)
        assert changed[~near].mean() < 0.01
