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
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import main

FOUR = ("glioma", "meningioma", "notumor", "pituitary")
GRID = np.eye(4)  # the affine of a volume whose voxels are 1 mm wide and in RAS order


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
            write_nifti(root / name, volume(seed + i))
        else:
            save(root / name, brain(seed + i))


def read(root: Path, size: int = 32, **how: object) -> data.Study:
    return data.load(root, size, root.parent / "cache", **how)


def classes_of(study: data.Study) -> dict[str, tuple[str, ...]]:
    return {name: task.classes for name, task in study.tasks.items()}


def by_name(study: data.Study, values: np.ndarray) -> dict[str, object]:
    """Name of an image -> its value."""
    return dict(zip(study.images.names, values.tolist(), strict=True))


def split_of(study: data.Study, name: str) -> dict[str, str]:
    """Name of an image of a task -> its split."""
    task = study.tasks[name]
    names = [study.images.names[row] for row in task.rows]
    return dict(zip(names, task.split.tolist(), strict=True))


CODES = {"u1": 2, "i2": 4, "i4": 8, "f4": 16, "f8": 64, "i1": 256, "u2": 512, "u4": 768}
CODES |= {"i8": 1024, "u8": 1280}


def write_nifti(path: Path, voxels: np.ndarray, sform: np.ndarray | None = GRID, **how) -> None:
    """A NIfTI-1 file in one struct, so that writer and reader share no code."""
    order = how.get("order", "<")
    content = voxels.astype(voxels.dtype.newbyteorder(order)).tobytes(order="F")
    shape = [voxels.ndim, *voxels.shape, 1, 1, 1, 1][:8]
    kind = CODES[voxels.dtype.str[1:]], 8 * voxels.dtype.itemsize
    floats = *how.get("zoom", (1, 1, 1, 1)), 352, *how.get("scale", (0, 0))
    forms = "quatern" in how, sform is not None, *how.get("quatern", [0] * 6)
    layout = order + "i 36x 8h 14x 2h 2x 4f 16x 3f 132x 2h 6f 12f 16x 4s 4x"
    matrix = (GRID if sform is None else sform)[:3].ravel()
    header = struct.pack(layout, 348, *shape, *kind, *floats, *forms, *matrix, b"n+1\0")
    path.parent.mkdir(parents=True, exist_ok=True)
    pack = gzip.compress if path.suffix == ".gz" else bytes
    path.write_bytes(pack(header + content))


def volume(seed: int) -> np.ndarray:
    """Blobs in an ellipse that drift from slice to slice, (20, 24, 6) float32."""
    y, x = np.mgrid[-1:1:20j, -1:1:24j]
    first, last = (brain(k)[::2, :24, None].astype("f4") for k in (seed, seed + 5000))
    drift = np.linspace(0, 0.3, 6, dtype="f4") * (last - first)
    return (x**2 + y**2 < 0.8)[..., None] * (first + drift)


def test_doctests_hold():
    assert doctest.testmod(data).failed == 0


def test_a_write_is_whole_or_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "deep" / "file"
    with data.write_atomically(path) as file:
        file.write(b"old")
    with pytest.raises(RuntimeError), data.write_atomically(path) as file:
        file.write(b"half of the new")
        file.flush()
        assert path.read_bytes() == b"old"
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]


def test_every_kind_of_image_becomes_the_same_gray_bytes(tmp_path):
    gray, exif = np.zeros((20, 30), np.uint8), Image.Exif()
    gray[5:15, 10:20] = 255
    images = {"I;16.png": Image.fromarray(gray.astype(np.uint16) * 200)}  # clipped it would be 255
    images["F.tif"] = Image.fromarray(gray.astype(np.float32) / 1000)  # rounded it would be 0
    for name in ("1.png", "L.png", "P.png", "LA.png", "RGB.png", "RGBA.png", "CMYK.tif", "I.tif"):
        images[name] = Image.fromarray(gray).convert(name[:-4])
    images["LA.png"].putalpha(Image.fromarray(gray))  # what is transparent becomes black
    for name, image in images.items():
        image.save(tmp_path / name)
        assert np.abs(data.read_gray(tmp_path / name).astype(int) - gray).max() <= 1
    exif[0x0112] = 6  # shown a quarter turn clockwise
    save(tmp_path / "png.jpg", gray, format="PNG", exif=exif)  # contents say the kind
    assert np.array_equal(data.read_gray(tmp_path / "png.jpg"), np.rot90(gray, -1))


def test_what_cannot_be_read_is_named_and_what_is_none_is_passed_over(tmp_path, monkeypatch):
    root, good = tmp_path / "scans", ["a/0.png", "a/1.png", "a/2.png"]
    fill(root, *good)
    whole = (root / "a/0.png").read_bytes()
    bad = {"broken.png": b"\x89PNG, but no more", "empty.jpg": b"", "torn.png": whole[:500]}
    bad |= {"program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}
    bad |= {"bomb.png": whole[:16] + struct.pack(">II", 30_000, 30_000) + whole[24:]}
    for name, content in bad.items():
        (root / name).write_bytes(content)
    save(root / "large.png", np.zeros((60, 60), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1700)  # Pillow refuses twice as many
    with open(root / "bytes.png", "wb") as file:
        file.truncate(data.MAX_BYTES + 1)  # a hole: it takes no room on the disk
    (root / "link.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(root / "pipe.png")  # opening it would wait for ever
    fill(root, "a/._0.png", ".hidden/1.png", "a/x_mask.tif", "a/y_seg.png", "a/masks/1.png")
    fill(root, "labels/1.png", "a/1-LesionSeg-Flair.nii", "a/aseg.nii.gz")
    study = read(root)
    why = {study.images.names[row]: text for row, text in study.images.unreadable.items()}
    assert set(why) == {*bad, "large.png", "bytes.png", "link.png", "pipe.png"}
    assert "3400 pixels" in why["large.png"] and "cannot identify" in why["program.png"]
    assert [study.images.names[row] for row in data.pretraining_rows(study)] == good
    monkeypatch.setattr(Path, "iterdir", lambda _: os.listdir("/proc/refused"))
    with pytest.raises(OSError, match="refused"):  # passing over it would move the split
        read(root)


def test_nibabel_reads_the_same(tmp_path):
    """All types, sform and qform, 3 and 4 axes, both byte orders, scaled values."""
    nibabel = pytest.importorskip("nibabel", reason="nibabel is the oracle here; not installed")
    rng, path = np.random.default_rng(0), tmp_path / "v.nii.gz"
    signs = itertools.product((1, -1), repeat=3)
    for i, (sign, axes) in enumerate(itertools.product(signs, itertools.permutations(range(3)))):
        voxels = (rng.random((5, 6, 7, 2)[: 3 + i % 2]) * 90).astype(list(CODES)[i % 10])
        sform = np.eye(4) + rng.normal(0, 0.05, (4, 4))  # not quite straight
        sform[axes, range(3)] = np.array(sign) * (0.9, 1.1, 3.0)
        sform[:, 3] = (-7, 11, 5, 1)
        quatern = {"quatern": (*rng.uniform(-0.3, 0.3, 3), 4, 5, 6)}
        for asked in ({"sform": sform, **quatern}, {"sform": None, **quatern}):
            how = {"scale": (1.5, -2) if i % 3 else (0, 5), "order": "<>"[i // 2 % 2]}
            write_nifti(path, voxels, zoom=((-1) ** (i // 2), 1.5, 2, 2.5), **asked, **how)
            theirs = nibabel.as_closest_canonical(nibabel.load(path))
            ours, affine = data.read_nifti(path)
            first = theirs.get_fdata().reshape(*ours.shape, -1)[..., 0]
            assert ours.dtype == np.float32 and np.allclose(ours, first, rtol=1e-5, atol=1e-4)
            assert np.allclose(affine, theirs.affine, atol=1e-5) and (np.diag(affine) > 0).all()


def test_what_is_no_volume_of_real_numbers_is_named_and_left_out(tmp_path):
    write_nifti(tmp_path / "in/good.nii", volume(0), scale=(np.nan, np.nan))
    whole = (tmp_path / "in/good.nii").read_bytes()
    contents = [whole[:200], whole[:-1], whole[:352] + bytes(len(whole) - 352)]
    faults = [(344, "4s", b"ni1\0"), (0, "i", 540), (70, "h", 32), (42, "h", -3)]
    faults += [(42, "3h", 32767, 32767, 32767), (280, "12f", *[0] * 12), (280, "f", np.nan)]
    faults += [(108, "f", offset) for offset in (2e10, -1, np.inf, np.nan)]  # 2e10: gigabytes
    for at, kind, *values in faults:
        contents.append(bytearray(whole))
        struct.pack_into(f"<{kind}", contents[-1], at, *values)
    for i, content in enumerate(contents):
        (tmp_path / f"in/{i}.nii").write_bytes(content)
        (tmp_path / f"in/{i}.nii.gz").write_bytes(gzip.compress(content))
    (tmp_path / "in/torn.nii.gz").write_bytes(gzip.compress(whole)[:-900])
    write_nifti(tmp_path / "in/nowhere.nii", volume(0), sform=None)  # neither sform nor qform
    images = read(tmp_path / "in").images
    assert len(images.unreadable) == 2 * len(contents) + 2 == len(images.names) - 6


def test_slices_and_lesion_masks_are_seen_front_up_with_the_patients_left_on_the_right(tmp_path):
    """However the voxels are stored; the window ignores air, no numbers and a hot voxel."""
    for signs in itertools.product((1, -1), repeat=3):
        voxels = np.zeros((20, 24, 10), np.float32)
        voxels[1:-1, 1:-1, :9] = 50
        voxels[2:5, 18:22, 7] = 100  # in RAS order: x low = left, y high = front
        voxels[0, :4, 0] = 1e6, np.inf, np.nan, -50  # bias correction leaves such
        voxels[10, 10, 9] = 90  # next to nothing in it: this slice is left out
        stored = voxels[:: signs[0], :: signs[1], :: signs[2]]
        affine = np.diag((*signs, 1)) * (1, 2, 5, 1)
        write_nifti(tmp_path / "1-Flair.nii", stored, affine)
        write_nifti(tmp_path / "1-LesionSeg-Flair.nii", (stored == 100).astype("u1"), affine)
        seen = dict(data.images_in(tmp_path, "1-Flair.nii"))
        assert list(seen) == [f"{'lesion' if z == 7 else 'no-lesion'}/{z}" for z in range(9)]
        gray = seen["lesion/7"]
        assert gray.shape == (48, 20) and not gray[0, 0]  # its pixels have become squares
        assert 126 <= seen["no-lesion/5"][24, 10] <= 129
        rows, columns = np.nonzero(gray > 250)
        assert rows.max() < 24 and columns.min() >= 10  # up is front, right is left
        lesion = data.lesion_of(tmp_path, "1-Flair.nii/lesion/7", 48)
        assert np.array_equal(lesion, data.fit_square(gray, 48) > 191)


def test_a_slices_class_comes_from_the_mask_of_its_own_sequence_and_changes_with_it(tmp_path):
    lesions, grid = np.zeros((20, 24, 6), "u1"), np.diag((1, 2, 4, 1))
    lesions[5:9, 5, 3] = 1  # 4 voxels of 2 mm^2: a lesion
    lesions[5:8, 5, 5] = 1  # 6 mm^2: too little
    folder = tmp_path / "in" / "Patient-1"
    for name in ("1-Flair.nii", "1-T1.nii"):
        write_nifti(folder / name, volume(3), grid)
    write_nifti(folder / "1-LesionSeg-Flair.nii", lesions, grid)
    task = read(tmp_path / "in").tasks["ms"]
    assert task.classes == ("no-lesion", "lesion") and task.labels.sum() == 1
    lesions[5:15, 5:15, 4:] = 1
    write_nifti(folder / "1-LesionSeg-Flair.nii", lesions, grid)
    task = read(tmp_path / "in").tasks["ms"]
    assert len(task.labels) == 6 and task.labels.sum() == 3  # of T1 nothing is known
    grid[0, 3] = 3
    write_nifti(folder / "1-LesionSeg-Flair.nii", lesions, grid)
    (why,) = read(tmp_path / "in").images.unreadable.values()
    assert "1-LesionSeg-Flair.nii" in why


def png(seed: int) -> bytes:
    Image.fromarray(brain(seed)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def write_shard(path: Path, images: list, labels: list, names: list | None = None) -> None:
    """As the datasets library writes it: struct<bytes, path>, row groups, its features as JSON."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow reads shards; not installed")
    from pyarrow import parquet

    entries = [{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)]
    table = pyarrow.table({"image": entries, "label": labels})
    label = {"names": names, "_type": "ClassLabel"} if names else {"_type": "Value"}
    info = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
    path.parent.mkdir(parents=True, exist_ok=True)
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    parquet.write_table(table, path, row_group_size=5)


def test_a_shards_images_lie_below_their_classes_and_bad_rows_are_left_out(tmp_path, monkeypatch):
    """Numbers stay numbers; a part's name is its split, but "train" alone is the whole set."""
    root, file = tmp_path / "in", "x/data/train-00000-of-1.parquet"
    inner = ["", "x_y/", "b/"] * 4  # -1 = not labelled
    write_shard(root / file, [png(i) for i in range(12)], [-1, 0, 1] * 4, ["x/y", "b"])
    for seed, part in enumerate(("train", "validation", "test")):
        place = root / f"brain-stroke-set/{part}-0.parquet"
        write_shard(place, [png(100 + 6 * seed + i) for i in range(6)], [0, 1] * 3)
    write_shard(root / "z.parquet", [png(500), b"no image", None], [None] * 3)
    (root / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    study = read(root)
    names = study.images.names
    bad = {"broken.parquet", "z.parquet/1", "z.parquet/2"}
    assert {names[row] for row in study.images.unreadable} == bad
    assert classes_of(study) == {"x": ("b", "x_y"), "stroke": ("0", "1")}
    assert set(study.tasks["x"].published) == {""}
    splits = split_of(study, "stroke").items()
    assert len(splits) == 18 and all(name.split("/")[1].startswith(part) for name, part in splits)
    for i, name in enumerate(inner):
        row = names.index(f"{file}/{name}{i}")
        assert np.array_equal(study.images.thumbnails[row], data.thumbnail(brain(i)))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(data.UserError, match="pip install pyarrow"):
        read(root)


def test_what_is_unchanged_is_not_decoded_again_and_what_has_changed_is(tmp_path, monkeypatch):
    """Files that swap names are noticed though size and time of change are equal, as unpacked."""
    root, decoded, original = tmp_path / "scans", [], data.decode
    fill(root, "0.png", "1.png", "2.png", "3.bmp", "4.bmp")
    for name in ("3.bmp", "4.bmp"):
        os.utime(root / name, (1e9, 1e9))
    monkeypatch.setattr(data, "decode", lambda *how: decoded.append(how) or original(*how))
    first, again = read(root).images, read(root).images
    assert len(decoded) == 5 and np.array_equal(first.squares, again.squares)
    for old, new in (("3.bmp", "x"), ("4.bmp", "3.bmp"), ("x", "4.bmp")):
        (root / old).rename(root / new)
    save(root / "1.png", brain(9, 80))
    images = read(root).images
    for row, gray in enumerate((brain(0), brain(9, 80), brain(2), brain(4), brain(3))):
        assert np.array_equal(images.squares[row], data.fit_square(gray, 32))
        assert np.array_equal(images.thumbnails[row], data.thumbnail(gray))
        assert images.hashes[row].tobytes() == hashlib.sha256(gray.tobytes()).digest()[:16]
    for name in ("images.bin", "index.json"):  # a damaged cache is one line
        (images.folder / name).write_bytes((images.folder / name).read_bytes()[:-9])
        with pytest.raises(data.UserError, match=f"{images.folder}.*delete"):
            read(root)


def test_a_killed_decode_leaves_no_cache_and_another_is_refused_meanwhile(tmp_path, monkeypatch):
    """Killed with SIGKILL, as where memory runs short: one of its own, then one that helps us."""
    root, before = tmp_path / "scans", torch.get_rng_state()
    fill(root, *(f"{i}.png" for i in range(10, 50)))

    def until_killed(items, **_):
        yield from itertools.islice(items, 20)
        with pytest.raises(data.UserError, match="another run"):
            read(root)
        os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if not pid:
        try:
            data.load(root, 32, tmp_path / "cache", until_killed)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    monkeypatch.setattr(data, "FEW", 0)
    with monkeypatch.context() as patch:
        patch.setattr(data, "images_in", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(data.UserError, match="memory"):
            read(root)
    assert not list((tmp_path / "cache").rglob("index.json"))
    expected = [data.fit_square(brain(i), 32) for i in range(40)]
    assert np.array_equal(read(root).images.squares, expected)  # of several processes
    assert torch.equal(before, torch.get_rng_state())


def test_names_in_any_script_links_in_circles_and_runs_of_ours(tmp_path):
    root = tmp_path / "scans"
    odd = ["脑/扫描 一.png", "rtl/\u202eabc.png", "nl/a\nb.png", os.fsdecode(b"nl/\xff\xfe.png")]
    odd += ["tumor/glioma/1.png", "tumor/notumor/1.png"]
    fill(root, *odd)
    (root / "nl" / "up").symlink_to(root)
    (root / "favourites").symlink_to(root / "tumor")  # sorts before it, and takes nothing away
    for k, folder in enumerate(("run", "no run")):
        fill(root, f"{folder}/1.png", seed=60 + k)
        (root / folder / "config.json").write_text("{}" if k else '{"command": "explain"}')
    study = read(root)
    odd += ["favourites/glioma/1.png", "favourites/notumor/1.png", "no run/1.png"]
    assert sorted(study.images.names) == sorted(odd) and not study.images.unreadable
    assert study.tasks["tumor"].classes == ("glioma", "notumor")


LAYOUTS = {  # folders with an image each, and files (* = a blank) -> tasks and their classes
    "tumor/no tumor/glioma_tumor": {"tumor": ("glioma", "no")},
    "1.png 2.png anything": {},
    "a/sub-01 a/subject-02 a/0001 a/BraTS20_Training_001": {},
    "x/0 x/1 x/12": {"x": ("0", "1", "12")},
    "tumor/glioma/center/scanner tumor/glioma/case2 tumor/notumor": {"tumor": FOUR[::2]},
    "stroke/a/TCGA-02-0049 stroke/a/case_h49 stroke/b/P001": {"stroke": ("a", "b")},
    "yes no augmented*data/yes augmented*data/no": {"scans": ("no", "yes")},
    "ill/batch1 ill/batch2 fit/batch3": {"scans": ("fit", "ill")},
    "ill/series_001 fit/series_001": {"scans": ("fit", "ill")},
    "heart/ill/t1 heart/fit/t1": {"heart": ("fit", "ill")},
    "fold1/a fold1/b fold2/a fold2/b": {"fold1": ("a", "b"), "fold2": ("a", "b")},
    "b/Training/glioma b/Testing/meningioma b/Training/notumor b/Testing/pituitary "
    "brain-tumor-mri/no brain-tumor-mri/yes": {"tumor": FOUR, "brain-tumor-mri": ("no", "yes")},
    "oasis/Data/Mild*Dementia oasis/Data/Moderate*Dementia oasis/Data/Non*Demented "
    "oasis/Data/Very*mild*Dementia": {"alzheimer": data.KNOWN_TASKS["alzheimer"]},
    "x/brain-stroke-set/no_stroke x/brain-stroke-set/stroke": {"stroke": ("normal", "stroke")},
}


@pytest.mark.parametrize("folders", LAYOUTS)
def test_folders_are_read_as_tasks_and_classes(tmp_path, folders):
    names = [name if "." in name else f"{name}/1.png" for name in folders.split(" ")]
    fill(tmp_path / "scans", *(name.replace("*", " ") for name in names))
    assert classes_of(read(tmp_path / "scans")) == LAYOUTS[folders]


PATIENTS = {  # patient: names of his
    "p12": "tumor/glioma/P012_3.png",
    "sub1": "x/sub01-slice2.png x/sub-01/anat/1.png x/T1_sub-01_1.png",
    "patient12": "x/Patient*(12)/1.png x/patient_012_a.png ms/Patient-12/1-T1.nii.gz/lesion/101",
    "oas10028": "a/OAS1_0028_MR1_mpr-1_100.jpg",
    "2s1002": "a/002_S_1002_x.png",
    "normal/58": "stroke/Normal/58*(1).jpg",
    "mine/IXI012-Guys.nii.gz": "mine/IXI012-Guys.nii.gz/7",
    "": "tumor/Training/glioma/Tr-gl_0012.jpg x/up12_3.png x/bleed/sub-dural/1.png",
}


def test_patients_are_known_by_name_and_a_patterns_captures_are_compared_as_they_are(tmp_path):
    """Without their separators, H1_23 and H12_3 were one. The pattern goes before known names."""
    for patient, names in PATIENTS.items():
        known = {data.read_patient(name.replace("*", " "), None) for name in names.split(" ")}
        assert known == {patient}
    fill(tmp_path / "in", "a/H12_3_1.png", "a/sub-9/H1_23_2.png", "b/H1_23_3.png", "b/x.png")
    patients = read(tmp_path / "in", pattern=re.compile(r"(H\d+_\d+)_\d\.png")).patients
    assert patients.tolist() == ["H12_3", "H1_23", "H1_23", ""]
    for pattern in (r"scan(\d+)", r"H|(never)", r"H\d+"):
        with pytest.raises(data.UserError, match="in none of 4"):
            read(tmp_path / "in", pattern=re.compile(pattern))


def test_a_pattern_is_proposed_where_patients_are_folders_or_names_repeat(tmp_path):
    """Once it took Tr-gl, the prefix of a numbered series of 1,311 files, for a patient."""
    fill(tmp_path / "in", *(f"x/{name}/{k}.png" for name in "abcdefghijklm" for k in range(2)))
    with pytest.raises(data.UserError, match="--patient-pattern.*--labels"):
        read(tmp_path / "in")
    assert len(set(read(tmp_path / "in", pattern=re.compile(r"x/(\w)/")).groups)) == 13
    assert data.numbered_by_patient([f"a/H{i // 4}_{i}.png" for i in range(100)])
    assert re.search(data.NUMBERED, "a/H12_3.png")[1] == "H12"
    assert not data.numbered_by_patient(
        [f"a/Tr-{c}_{i}.png" for c in "abcdefghijkl" for i in range(50)]
    )


PEOPLE = [  # {i} a person, {c} and {d} his classes, {s} one of three images, {part} a publisher's
    "tumor/T1/{c}/sub-{i:02d}_{s}.png tumor/T2/{c}/sub-{i:02d}_{s}.png",
    "tumor/{c}/sub-{i:02d}_{s}.png raw/sub-{i:02d}/anat/{s}.nii.gz",
    "tumor/{c}/Patient-{i}/{s}.png volumes/Patient-{i}/{i}-T1.nii",
    "tumor/{c}/P{i:03d}_{s}.png stroke/{d}/P{i:03d}_{s}.png loose/P{i:03d}_9.png",
    "{part}/mine/{d}/Patient-{i}/{s}.png extra/patient_{i:03d}_{s}.png",
    "ms/sub-{i:02d}/{d}/{s}.png",
    "train/{d}/sub-{i:02d}_{s}.png extra/sub-{i:02d}_9.png",
]


@pytest.mark.parametrize("layout", PEOPLE)
def test_no_person_is_on_two_sides_wherever_the_name_stands(tmp_path, layout):
    """Over all tasks of --data, pretraining included; each layout once let people through."""
    for i, (k, name), s in itertools.product(range(24), enumerate(layout.split(" ")), range(3)):
        words = {"c": FOUR[i % 2], "d": ("normal", "lesion")[i % 2]}
        words["part"] = ("Training", "Testing")[s == 2 and i < 6]
        fill(tmp_path / "scans", name.format(i=i, s=s, **words), seed=1000 * k + 10 * i + s)
    study = read(tmp_path / "scans")
    person = [int(re.search(r"(?:-|_|P)0*(\d+)", name)[1]) for name in study.images.names]
    sides, held = defaultdict(set), set()  # of a task and a person; people held out anywhere
    for task in study.tasks.values():
        for row, split in zip(task.rows, task.split.tolist(), strict=True):
            sides[task.name, person[row]].add(split)
        held |= {person[row] for row in task.rows[np.isin(task.split, ("val", "test"))]}
    assert len(set(person)) == 24 and all(len(parts - {"dropped"}) == 1 for parts in sides.values())
    assert set().union(*sides.values()) >= {"train", "val", "test"}
    assert not held & {person[row] for row in data.pretraining_rows(study)}


def test_near_duplicate_pairs_match_a_double_loop(monkeypatch):
    """The even-odd trick, the blocks and the whole numbers against cosines one by one."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (6, 32, 32))
    noisy = [base[i % 6] + rng.normal(0, 2 * i, (32, 32)) for i in range(24)]
    thumbnails = np.clip(np.stack(noisy), 0, 255).astype(np.uint8)
    thumbnails[::5] = thumbnails[::5, :, ::-1]
    thumbnails[7] = thumbnails[8] = 128  # of one colour: nobody's near-duplicate
    slow, only_mirrored = set(), 0
    for (i, a), (j, b) in itertools.combinations(enumerate(thumbnails), 2):
        with np.errstate(invalid="ignore"):  # a Pearson correlation is a cosine without means
            both = np.corrcoef([a.ravel(), b.ravel(), b[:, ::-1].ravel()])[0, 1:]
        if (both >= 0.9).any():
            slow.add((i, j))
            only_mirrored += both[0] < 0.9
    assert 10 < len(slow) < 100 and only_mirrored > 3
    for block in (5, 2048):
        monkeypatch.setattr(data, "BLOCK", block)
        found = data.near_duplicate_pairs(thumbnails, 0.9).tolist()
        assert set(map(tuple, found)) == slow and len(found) == len(slow)


def test_near_duplicate_copies_of_all_kinds_are_one_group(tmp_path):
    save(tmp_path / "x.jpg", brain(0), quality=60)
    small = np.asarray(Image.fromarray(brain(0)).resize((33, 33)))
    bright = (brain(0) * 0.8 + 30).astype(np.uint8)
    images = [brain(0), data.read_gray(tmp_path / "x.jpg"), small, bright, brain(0)[:, ::-1]]
    groups = data.near_duplicate_groups(np.stack([*map(data.thumbnail, (*images, brain(1)))]))
    assert groups.tolist() == [0, 0, 0, 0, 0, 1]


def test_near_duplicates_join_only_where_a_patient_is_unknown_and_equal_pixels_always(tmp_path):
    """Slices of strangers on one atlas look alike, and must not chain them; blank join none."""
    noise, root = np.random.default_rng(0).normal(0, 2, (6, 40, 40)), tmp_path / "scans"
    alike = np.clip(brain(4) + noise, 0, 255).astype(np.uint8)
    for i in range(5):
        save(root / f"a/sub-{i}/1.png", alike[i])
        save(root / f"a/sub-{i}/black.png", np.full((40 + i, 40), 7, np.uint8))
    study = read(root)
    assert len(data.near_duplicate_pairs(study.images.thumbnails)) == 10
    assert len(set(study.groups)) == 5
    save(root / "c/sub-9/copied.png", alike[3])
    assert len(set(read(root).groups)) == 5
    save(root / "b/unknown.png", alike[5])
    assert len(set(read(root).groups)) == 1
    for i in range(12):  # the same slices as a volume and as PNG
        fill(tmp_path / "in", f"a/v{i}x.nii.gz", seed=100 * i)
        for z, gray in data.images_in(tmp_path / "in", f"a/v{i}x.nii.gz"):
            save(tmp_path / f"in/b/{i}_{z}x.png", gray)
    groups = read(tmp_path / "in").groups
    assert [*Counter(groups.tolist()).values()] == [12] * 12


SERIES = [  # order, files, their names, groups among them
    ("planted", 60, "Tr-a_{}.png", 20),
    ("shuffled", 60, "Tr-a_{}.png", 60),
    ("atlas", 60, "Tr-a_{}.png", 60),
    ("repeated", 60, "Tr-a_{}.png", 30),  # neighbours that are near-duplicates prove nothing
    ("planted", 48, "Tr-a_{}.png", 48),  # too short to know
    ("planted", 60, "P{0:03d}_{0}.png", 60),  # patients are known
]


@pytest.mark.parametrize(("kind", "count", "name", "groups"), SERIES)
def test_neighbours_in_a_numbered_series_are_of_one_patient(tmp_path, kind, count, name, groups):
    """Three images each of 20 heads, too unlike (0.94) for near-duplicates; or one atlas."""
    noise = np.random.default_rng(0).normal(0, 9, (60, 32, 32))
    order = np.random.default_rng(1).permutation(60) if kind == "shuffled" else range(60)
    for i, k in enumerate(order[:count]):
        head = brain({"atlas": 0, "repeated": k // 2}.get(kind, k // 3), 32) / 1.0
        head = (head - head.mean()) / head.std() * 35 + 128 + noise[k] * (kind != "repeated")
        save(tmp_path / "in/a" / name.format(i + 95), head.clip(0, 255).astype("u1"))  # 95 < 100
    fill(tmp_path / "in", "b/other.png", seed=1000)
    study = read(tmp_path / "in")
    assert len(set(study.groups)) == groups + 1
    told = ["40 pairs" in notice for notice in study.notices if "file order" in notice]
    assert told == [True] * (groups == 20)


def test_augmented_copies_belong_to_their_original_and_are_no_test_images(tmp_path):
    root, original = tmp_path / "scans", {}
    words = "aug_{0}_0_4528 {0}_rot90 {0}_flip {0}-copy {0}_aug_1 {0}*(flipped) bright_{0}_7"
    for i in range(12):
        folder, name = ("no", "yes")[i % 2], f"{'Y' * (i < 6)}{i}"
        fill(root, f"{folder}/{name}.jpg", seed=i)
        for k, word in enumerate(words.format(name).split(" ")):
            copy = f"{('augmented data/', '')[k % 2]}{folder}/{word.replace('*', ' ')}.png"
            fill(root, copy, seed=1000 + 20 * i + k)
            original[copy] = f"{folder}/{name}.jpg"
    study = read(root)
    group, split = by_name(study, study.groups), split_of(study, "scans")
    assert len(set(group.values())) == 12  # 8_aug_1 is of 8, not of 1
    for copy, name in original.items():
        assert group[copy] == group[name]
        assert split[copy] == ("train" if split[name] == "train" else "dropped")
    assert set(split.values()) == {"train", "val", "test", "dropped"}


def test_a_table_says_what_names_cannot_and_what_it_lacks_is_said(tmp_path):
    root, labels = tmp_path / "scans", tmp_path / "t.csv"
    fill(root, *(f"{i}.png" for i in range(12)), "tumor/glioma/1.png", "tumor/notumor/1.png")
    (root / "labels.csv").write_text("path,label")
    (root / "1.dcm").write_bytes(b"")
    (root / "label_1.png").write_bytes(b"")
    told = " ".join(read(root).notices)
    assert "not read: 1 files" in told
    assert "--labels" in told and "dcm2niix" in told and "1 DICOM" in told
    lines = ["path,label,task,patient,split,hospital"]
    for i in range(12):
        lines.append(f"./{i}.png,{'ab'[i % 2]},m/x,{i // 2},{'Testing' if i > 9 else 'Training'},x")
    labels.write_text("\n".join([*lines, "no.png,a", "tumor/glioma/1.png"]))
    study = read(root, labels=labels)
    assert classes_of(study) == {"m_x": ("a", "b")}  # what has no label in it has none
    assert by_name(study, study.patients)["10.png"] == "5"
    assert split_of(study, "m_x")["10.png"] == "test"
    told = [notice for notice in study.notices if "t.csv" in notice]
    assert "hospital" in told[0] and "no.png" in told[1] and "tumor/notumor/1.png" in told[2]
    for text, message in (  # these cannot be right
        ("file,label\n0.png,a", "path and label"),
        ("path,label,patient,split\n0.png,a,X,train\n1.png,b,X,test", "'X'.*train.*test"),
        ("path,label,split\n0.png,a,tets", "tets"),
        ("path,label\n0.png,a\n./0.png,b", "two rows.*0.png"),
        ("path,label\nnothing.png,a", "none of"),
    ):
        labels.write_text(text)
        with pytest.raises(data.UserError, match=f"t.csv.*{message}|{message}.*t.csv"):
            read(root, labels=labels)


@pytest.mark.parametrize(("people", "part"), [(2, ""), (3, "Testing"), (9, ""), (9, "Testing")])
def test_a_splits_csv_given_back_gives_the_same_split(tmp_path, people, part):
    root = tmp_path / "scans"
    for (k, c), i, s in itertools.product(enumerate("ab"), range(people), range(3)):
        name = f"mine/{part if i == 1 else ''}/{c}/P{i}{k}_{s}\n,.png"
        fill(root, name, seed=100 * k + 10 * i + s)
    fill(root, os.fsdecode(b"mine/a/\xff.png"), seed=999)
    save(root / "mine/b/contradicts.png", brain(0))
    study, table = read(root), tmp_path / "splits.csv"
    with open(table, "w", newline="", errors="surrogateescape") as file:
        csv.writer(file).writerows(main.split_table(study, study.tasks["mine"]))
    again = read(root, labels=table)
    assert split_of(again, "mine") == split_of(study, "mine")
    assert "dropped" in split_of(again, "mine").values()
    assert np.array_equal(data.pretraining_rows(again), data.pretraining_rows(study))


def plant(root: Path) -> None:
    """Two classes of 20 people; each person has an image and its mirror."""
    for (k, c), i in itertools.product(enumerate(("sick", "well")), range(20)):
        save(root / "mine" / c / f"{i:02d}x.png", brain(1000 * k + i))
        save(root / "mine" / c / f"{i:02d}y.png", brain(1000 * k + i)[:, ::-1])


def test_no_group_is_in_two_splits_and_pixels_alone_decide_them(tmp_path):
    """70 / 15 / 15 of each class; other names, order, folder, size, random numbers: the same."""
    plant(tmp_path / "scans")
    study = read(tmp_path / "scans")
    task, old = study.tasks["mine"], {}
    assert len(set(task.groups)) == len({*zip(task.groups, task.split, strict=True)}) == 40
    counts = Counter(zip(task.labels.tolist(), task.split.tolist(), strict=True))
    assert [counts[k, p] for k in (0, 1) for p in ("train", "val", "test")] == [28, 6, 6] * 2
    for name in study.images.names:
        new = f"{name[:10]}{hashlib.md5(name.encode()).hexdigest()}q.png"
        save(tmp_path / "new" / new, data.read_gray(tmp_path / "scans" / name))
        old[new] = name
    torch.manual_seed(5)
    again = split_of(read(tmp_path / "new", 48), "mine")
    assert {old[name]: part for name, part in again.items()} == split_of(study, "mine")
    tests = study.images.hashes[task.rows[task.part("test")]]
    assert min(bytes(row).hex() for row in tests) == "067a603f55100daf34ecba7831acfbe9"  # for ever


def split(labels: list, groups: list, published: list | None = None) -> list[str]:
    """`split_by_group` on plain lists, keys by position."""
    keys = [hashlib.md5(str(i).encode()).hexdigest().encode() for i in range(len(labels))]
    published = np.array(published or [""] * len(labels), "U7")
    return data.split_by_group(np.array(labels), np.array(groups), published, keys).tolist()


def test_each_class_gives_a_group_to_train_then_test_then_val_or_is_one_line(tmp_path):
    for n, counts in ((1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1)), (20, (14, 3, 3))):
        parts = Counter(split([0] * n, list(range(n))))
        assert (parts["train"], parts["val"], parts["test"]) == counts
    assert sorted(split([0] * 20 + [1] * 2, list(range(22)))[20:]) == ["test", "train"]
    published = Counter(split([0] * 21, list(range(21)), ["train"] * 20 + ["test"]))
    assert published == {"train": 17, "val": 3, "test": 1}
    mixed = split([0, 0, 1] * 10, [i // 3 for i in range(30)])  # counts once, and is not cut
    assert Counter(mixed) == {"train": 18, "val": 6, "test": 6}
    assert all(len(set(mixed[i : i + 3])) == 1 for i in range(0, 30, 3))
    fill(tmp_path / "in", *(f"mine/sick/sub-01/{i}.png" for i in range(8)))
    fill(tmp_path / "in", *(f"mine/well/sub-{i}/1.png" for i in range(3, 9)), seed=50)
    with pytest.raises(data.UserError, match="'sick' of task mine.*its 1 group.*none is in test"):
        data.check_split(read(tmp_path / "in").tasks["mine"])


def test_publishers_parts_lose_planted_leaks_and_resplit_pools_them(tmp_path):
    root = tmp_path / "scans"
    for k, c in enumerate("ab"):
        fill(root, *(f"t/Training/{c}/{i}x.png" for i in range(20)), seed=100 * k)
        fill(root, *(f"t/Testing/{c}/{i}x.png" for i in range(5)), seed=500 + 100 * k)
    save(root / "t/Training/a/copied.png", brain(500))
    save(root / "t/Training/a/mirrored.png", brain(501)[:, ::-1])
    save(root / "t/Training/a/small.png", brain(502, 36))
    parts = split_of(read(root), "t")
    assert all(("Testing" in name) == (part == "test") for name, part in parts.items())
    dropped = {Path(name).stem for name, part in parts.items() if part == "dropped"}
    assert dropped == {"copied", "mirrored", "small"}
    assert Counter(parts.values()) == {"train": 34, "val": 6, "test": 10, "dropped": 3}
    parts = split_of(read(root, resplit=True), "t")
    tests = ["Testing" in name for name, part in parts.items() if part == "test"]
    assert "dropped" not in parts.values() and 0 < sum(tests) < 10
    published = ["train", "test", "val", "train", "val", "", "train", "dropped", "test"]
    mixed = split([0] * 9, [0, 0, 0, 1, 1, 1, 2, 3, 3], published)
    assert mixed == "dropped test dropped dropped val dropped train dropped test".split()


def test_near_duplicates_of_two_labels_are_dropped_unless_one_known_patient_has_both(tmp_path):
    root = tmp_path / "scans"
    plant(root)
    save(root / "mine/sick/odd.png", brain(5))
    save(root / "mine/well/odd.png", brain(5)[:, ::-1])  # also near sick/05x and 05y
    study = read(root)
    lost = {name for name, why in by_name(study, data.left_out(study)).items() if why == "dropped"}
    assert lost == {f"mine/{name}.png" for name in ("sick/odd", "well/odd", "sick/05x", "sick/05y")}
    lesions = np.tile(np.array([1, 0], "u1"), (20, 24, 3))
    write_nifti(tmp_path / "ms/Patient-7/7-Flair.nii", np.repeat(volume(4)[..., :1], 6, axis=2))
    write_nifti(tmp_path / "ms/Patient-7/7-LesionSeg-Flair.nii", lesions)
    task = read(tmp_path / "ms").tasks["ms"]
    assert len(task.rows) == 6 and "dropped" not in task.split


def test_pretraining_never_sees_a_held_out_group_of_any_task_and_a_leak_is_refused(tmp_path):
    """The same head stands in a task's test part, in another task, and among loose images."""
    root = tmp_path / "scans"
    plant(root)
    leak = next(n for n, part in split_of(read(root), "mine").items() if part == "test")
    pixels = data.read_gray(root / leak)
    fill(root, *(f"tumor/{'xy'[i % 2]}/{i}.png" for i in range(12)), seed=5000)
    save(root / "loose" / "leak.png", pixels[:, ::-1])
    save(root / "tumor" / "x" / "leak.png", pixels)
    study, held = read(root), set()
    for task in study.tasks.values():
        held |= set(task.groups[np.isin(task.split, ("val", "test"))])
    rows, why = data.pretraining_rows(study), by_name(study, data.left_out(study))
    assert len(study.tasks) == 2 and held and not held & set(study.groups[rows])
    assert why["loose/leak.png"] == why["tumor/x/leak.png"] == why[leak] == "held out"
    task, seen = study.tasks["mine"], study.images.hashes[rows]
    assert set(np.flatnonzero(data.was_seen(study, seen))) == set(rows)
    data.refuse_leak(study, task, seen)
    loose = study.images.hashes[[study.images.names.index("loose/leak.png")]]
    assert data.was_seen(study, loose).sum() == 4  # all of the group, wherever it lies
    with pytest.raises(data.UserError, match=r"2 of the 12 test images of mine"):
        data.refuse_leak(study, task, np.concatenate([seen, loose]))


def test_phantoms_are_a_study_of_five_tasks_with_a_class_per_patient(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PHANTOM_PATIENTS", 4)
    study, again = data.load(None, 32, tmp_path / "a"), data.load(None, 32, tmp_path / "b")
    assert np.array_equal(study.images.hashes, again.images.hashes)
    assert study.root is None and classes_of(study) == data.KNOWN_TASKS
    for task in study.tasks.values():
        data.check_split(task)
        assert len({*zip(task.groups, task.labels, strict=True)}) == len(set(task.groups))
    assert len(set(study.groups)) == 4 * sum(map(len, data.KNOWN_TASKS.values()))


@pytest.mark.parametrize("task", data.KNOWN_TASKS)
def test_a_lesion_is_marked_where_the_disease_changes_the_image(monkeypatch, task):
    for c, i in itertools.product(data.KNOWN_TASKS[task], range(3)):
        name = f"{task}/{c}/p{i:04d}/1"
        image, lesion = data.draw_phantom(name)
        assert lesion.mean() < 0.2 and np.array_equal(data.lesion_of(None, name, 128), lesion)
        assert lesion.any() == (c not in ("notumor", "normal", "non", "no-lesion"))
        with monkeypatch.context() as patch:
            patch.setattr(data, "PHANTOM_LESIONS", {})
            healthy, nothing = data.draw_phantom(name)
        if c in data.PHANTOM_LESIONS:
            changed = np.abs(image.astype(int) - healthy) > 8
            assert not nothing.any() and changed[lesion].mean() > 0.5


def test_a_table_without_splits_keeps_the_publishers_and_black_images_are_nobodys(tmp_path):
    root = tmp_path / "scans"
    fill(root, *[f"tumor/Training/{label}/{i}.png" for label in "ab" for i in range(8)])
    fill(root, *[f"tumor/Testing/{label}/t{i}.png" for label in "ab" for i in range(2)], seed=70)
    for part in ("Training", "Testing"):
        Image.new("L", (40, 40)).save(root / "tumor" / part / "a" / "black.png")
    names = read(root).images.names
    rows = "\n".join(f"{name},{name.split('/')[2]}" for name in names)
    (tmp_path / "labels.csv").write_text(f"path,label\n{rows}\n")
    study = read(root, labels=tmp_path / "labels.csv")
    task = study.tasks["tumor"]
    tested = {study.images.names[row].split("/")[1] for row in task.rows[task.part("test")]}
    assert tested == {"Testing"}
    data.refuse_leak(study, task, study.images.hashes[task.rows[task.part("train")]])
