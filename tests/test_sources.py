"""What publishers ship: NIfTI volumes, parquet shards, and the folders of eight data sets.

The volumes are written byte by byte from the NIfTI-1 standard, so that reader and writer share no
code; where nibabel is installed it is asked as well.
"""

import csv
import gzip
import io
import itertools
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import heads
import main

CODES = {"u1": 2, "i2": 4, "i4": 8, "f4": 16, "f8": 64, "i1": 256, "u2": 512, "u4": 768}
CODES |= {"i8": 1024, "u8": 1280}


def write_nifti(
    path: Path,
    voxels: np.ndarray,
    sform: np.ndarray | None = None,
    quatern: tuple = (),
    pixdim: tuple = (1, 1, 1, 1),
    scale: tuple = (0, 0),
    order: str = "<",
    offset: int = 352,
) -> None:
    """A NIfTI-1 file, field by field; packed where the name ends in .gz."""
    header = bytearray(offset)
    put = lambda at, kind, *values: struct.pack_into(order + kind, header, at, *values)  # noqa: E731
    put(0, "i", 348)
    put(40, "8h", voxels.ndim, *voxels.shape, *[1] * (7 - voxels.ndim))
    put(70, "2h", CODES[voxels.dtype.str[1:]], 8 * voxels.dtype.itemsize)
    put(76, "4f", *pixdim)
    put(108, "3f", offset, *scale)
    put(252, "2h", int(bool(quatern)), int(sform is not None))
    if quatern:
        put(256, "6f", *quatern)
    if sform is not None:
        put(280, "12f", *np.asarray(sform)[:3].ravel())
    header[344:348] = b"n+1\0"
    content = bytes(header) + voxels.astype(voxels.dtype.newbyteorder(order)).tobytes(order="F")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)


def head(seed: int, shape: tuple = (40, 40)) -> np.ndarray:
    """Smooth blobs in an ellipse, unlike those of any other seed; uint8."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(60, 256, (6, 6), dtype=np.uint8))
    blobs = np.asarray(coarse.resize(shape[::-1], Image.Resampling.BICUBIC))
    y, x = np.mgrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j]
    return np.where(x**2 + y**2 < 0.8, blobs, 0).astype(np.uint8)


def brain(seed: int, slices: int = 12) -> np.ndarray:
    """A volume (20, 24, slices) of blobs that drift from slice to slice; float32."""
    ends = head(seed, (20, 24)).astype(float), head(seed + 5000, (20, 24)).astype(float)
    share = np.linspace(0, 1, slices)
    return (ends[0][..., None] * (1 - share) + ends[1][..., None] * share).astype(np.float32)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


# --- reading a volume --------------------------------------------------------------------------


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", CODES)
def test_every_real_type_is_read_in_both_byte_orders(tmp_path, kind, order):
    voxels = np.arange(-30, 30) if kind[0] != "u" else np.arange(60)
    voxels = (voxels * (2 if kind in ("i1", "u1") else 300)).reshape(3, 4, 5).astype(kind)
    for name in ("v.nii", "v.nii.gz"):
        write_nifti(tmp_path / name, voxels, np.eye(4), order=order, offset=400)
        volume, affine = data.read_nifti(tmp_path / name)
        assert volume.dtype == np.float32 and np.array_equal(volume, voxels)
        assert np.array_equal(affine, np.eye(4))


@pytest.mark.parametrize(
    ("scale", "expected"),
    [((2, -3), (-3, 7)), ((0, 5), (0, 5)), ((np.nan, np.nan), (0, 5)), ((2, np.nan), (0, 10))],
)
def test_values_are_scaled_unless_the_slope_is_0_or_no_number(tmp_path, scale, expected):
    write_nifti(tmp_path / "v.nii", np.array([[[0], [5]]], "i2"), np.eye(4), scale=scale)
    assert data.read_nifti(tmp_path / "v.nii")[0].ravel().tolist() == list(expected)


def test_every_orientation_becomes_right_front_up(tmp_path):
    """Each voxel holds a number made of its place in mm, so it tells where it has to end up."""
    index = np.stack(
        [*np.meshgrid(range(3), range(4), range(5), indexing="ij"), np.ones((3, 4, 5))]
    )
    code = np.array([1.0, 100.0, 10000.0])
    orders, signs = itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)
    for order, sign in itertools.product(orders, signs):
        affine = np.eye(4)
        affine[:3, :3] = 0.02 * np.random.default_rng(0).normal(size=(3, 3))  # not quite straight
        affine[order, range(3)] = np.array(sign) * (1.0, 2.0, 3.0)
        affine[:3, 3] = (-7, 11, 5)
        places = np.tensordot(affine[:3], index, 1)  # (3, 3, 4, 5) mm
        write_nifti(tmp_path / "v.nii", np.tensordot(code, places, 1), affine)
        volume, ours = data.read_nifti(tmp_path / "v.nii")
        assert (np.diag(ours)[:3] > 0.5).all()
        for voxel in itertools.product(*map(range, volume.shape)):
            assert volume[voxel] == pytest.approx(code @ (ours @ [*voxel, 1])[:3], abs=0.05)


@pytest.mark.parametrize("flip", [1, -1, 0])
def test_a_quaternion_turns_as_the_standard_says(tmp_path, flip):
    """The nine products of the standard's own comment, and a turn about z that needs no formula."""
    b, c, d = 0.2, -0.3, 0.1
    a = np.sqrt(1 - b * b - c * c - d * d)
    turn = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * b * c - 2 * a * d, 2 * b * d + 2 * a * c],
            [2 * b * c + 2 * a * d, a * a + c * c - b * b - d * d, 2 * c * d - 2 * a * b],
            [2 * b * d - 2 * a * c, 2 * c * d + 2 * a * b, a * a + d * d - c * c - b * b],
        ]
    )
    expected = np.eye(4)
    expected[:3, :3] = turn * (2, 3, 4 * (flip or 1))
    expected[:3, 3] = (9, 8, 7)
    voxels = np.arange(60, dtype="f4").reshape(3, 4, 5)
    write_nifti(tmp_path / "q.nii", voxels, None, (b, c, d, 9, 8, 7), (flip, 2, 3, 4))
    write_nifti(tmp_path / "s.nii", voxels, expected)
    for ours, theirs in zip(*(data.read_nifti(tmp_path / f"{k}.nii") for k in "qs"), strict=True):
        assert np.allclose(ours, theirs, atol=1e-5)
    write_nifti(tmp_path / "z.nii", voxels, None, (0, 0, np.sqrt(0.5), 0, 0, 0))  # by 90 degrees
    volume, affine = data.read_nifti(tmp_path / "z.nii")  # voxels' x ran to the front
    assert volume.shape == (4, 3, 5) and np.array_equal(volume, voxels.transpose(1, 0, 2)[::-1])
    assert np.allclose(affine[:3, 3], (-3, 0, 0), atol=1e-5)


def test_the_matrix_comes_before_the_quaternion_and_without_both_voxels_run_left(tmp_path):
    voxels = np.arange(60, dtype="f4").reshape(3, 4, 5)
    quatern = (0, 0, np.sqrt(0.5), 0, 0, 0)
    write_nifti(tmp_path / "both.nii", voxels, np.diag((2, 2, 2, 1)), quatern)
    assert np.array_equal(data.read_nifti(tmp_path / "both.nii")[0], voxels)
    write_nifti(tmp_path / "none.nii", voxels, pixdim=(1, 2, 2, 2))
    volume, affine = data.read_nifti(tmp_path / "none.nii")
    assert np.array_equal(volume, voxels[::-1]) and np.allclose(affine[:3, 3], (-2, -3, -4))


def test_of_a_series_the_first_volume_is_read(tmp_path):
    voxels = np.arange(120, dtype="i2").reshape(3, 4, 5, 2)
    write_nifti(tmp_path / "v.nii.gz", voxels, np.eye(4))
    assert np.array_equal(data.read_nifti(tmp_path / "v.nii.gz")[0], voxels[..., 0])
    write_nifti(tmp_path / "flat.nii", voxels[..., 0, 0], np.eye(4))
    content = bytearray((tmp_path / "flat.nii").read_bytes())
    content[46:56] = bytes(10)  # what lengths unused axes have is nobody's concern
    (tmp_path / "flat.nii").write_bytes(content)
    assert np.array_equal(data.read_nifti(tmp_path / "flat.nii")[0][..., 0], voxels[..., 0, 0])


def test_nibabel_reads_the_same(tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="nibabel is the oracle here; not installed")
    rng = np.random.default_rng(0)
    for i, kind in enumerate(("i2", "f4", "u1", "f8")):
        voxels = (rng.random((5, 6, 7, 2)[: 3 + i % 2]) * 90).astype(kind)
        turned = np.linalg.qr(rng.normal(size=(3, 3)))[0] * (0.9, 1.1, 3.0)
        sform = np.vstack([np.column_stack([turned, rng.normal(size=3)]), [0, 0, 0, 1]])
        quatern, pixdim = (*rng.uniform(-0.5, 0.5, 3), 4, 5, 6), (-1, 1.5, 2, 2.5)
        for j, given in enumerate(({"sform": sform}, {"quatern": quatern, "pixdim": pixdim}, {})):
            path = tmp_path / f"{i}{j}.nii.gz"
            write_nifti(path, voxels, **given, scale=(1.5, -2), order="<>"[i % 2])
            theirs = nibabel.as_closest_canonical(nibabel.load(path))
            volume, affine = data.read_nifti(path)
            first = theirs.get_fdata()[..., 0] if voxels.ndim == 4 else theirs.get_fdata()
            assert np.allclose(volume, first, rtol=1e-6) and np.allclose(affine, theirs.affine)
            nibabel.save(nibabel.load(path), tmp_path / "theirs.nii")  # and what nibabel writes
            again = nibabel.as_closest_canonical(nibabel.load(tmp_path / "theirs.nii")).get_fdata()
            first = again[..., 0] if again.ndim == 4 else again
            assert np.allclose(data.read_nifti(tmp_path / "theirs.nii")[0], first, rtol=1e-6)


def test_what_is_no_volume_of_real_numbers_is_named_and_left_out(tmp_path):
    good = brain(0)
    write_nifti(tmp_path / "in" / "good.nii", good, np.eye(4))
    whole = (tmp_path / "in" / "good.nii").read_bytes()
    broken = {
        "short": whole[:200],
        "torn": whole[:-1],
        "pair": whole[:344] + b"ni1\0" + whole[348:],
        "nifti2": struct.pack("<i", 540) + whole[4:],
        "complex": whole[:70] + struct.pack("<h", 32) + whole[72:],
        "negative": whole[:42] + struct.pack("<h", -3) + whole[44:],
        "huge": whole[:42] + struct.pack("<3h", 32767, 32767, 32767) + whole[48:],
        "flat": whole[:280] + bytes(48) + whole[328:],
        "nowhere": whole[:280] + struct.pack("<f", np.nan) + whole[284:],
        "nothing": whole[:352] + bytes(len(whole) - 352),
    }
    for name, content in broken.items():
        (tmp_path / "in" / f"{name}.nii").write_bytes(content)
        (tmp_path / "in" / f"{name}.nii.gz").write_bytes(gzip.compress(content))
    (tmp_path / "in" / "torn_gzip.nii.gz").write_bytes(gzip.compress(whole)[:-900])
    study = heads.load(tmp_path / "in", 32, tmp_path / "cache")
    bad = {study.pictures.paths[row]: why for row, why in study.pictures.unreadable.items()}
    expected = {f"{name}.nii{end}" for name in broken for end in ("", ".gz")}
    assert set(bad) == expected | {"torn_gzip.nii.gz"}
    assert "n+1" in bad["pair.nii"] and "data type 32" in bad["complex.nii"]
    assert "no inverse" in bad["flat.nii"] and "no inverse" in bad["nowhere.nii"]
    assert sum(path.startswith("good.nii/") for path in study.pictures.paths) == 12


# --- slices ------------------------------------------------------------------------------------


def slices(path: Path) -> dict[str, np.ndarray]:
    return dict(data.volume_slices(path))


def test_slices_are_seen_front_up_with_the_patients_left_on_the_right(tmp_path):
    """However the voxels are stored: a bright spot in the left front of the head, high up."""
    for signs in itertools.product((1, -1), repeat=3):
        volume = np.zeros((20, 24, 10), "i2")
        volume[1:-1, 1:-1] = 50
        volume[2:5, 18:22, 7] = 100  # in RAS order: x low = left, y high = front
        affine = np.diag((*signs, 1)).astype(float)
        stored = volume[:: signs[0], :: signs[1], :: signs[2]]
        write_nifti(tmp_path / "v.nii", stored, affine)
        seen = slices(tmp_path / "v.nii")
        assert seen["7"].shape == (24, 20) and list(seen) == [str(z) for z in range(10)]
        rows, columns = np.nonzero(seen["7"] == 255)
        assert rows.max() < 12 and columns.min() >= 10  # up is front, right is left


def test_a_window_is_the_volumes_and_ignores_hot_voxels(tmp_path):
    volume = np.zeros((20, 20, 40), np.float32)
    volume[4:16, 4:16, :20], volume[4:16, 4:16, 20:] = 100, 200
    volume[0, 0, 0], volume[0, 1, 0], volume[0, 2, 0] = 1e6, np.inf, np.nan
    volume[0, 3, 1] = -50  # bias correction leaves such
    write_nifti(tmp_path / "v.nii", volume, np.eye(4))
    seen = slices(tmp_path / "v.nii")
    assert abs(int(seen["5"][10, 10]) - 128) <= 1 and seen["30"][10, 10] == 255
    assert seen["5"][0, 0] == 0


def test_slices_with_next_to_nothing_in_them_are_left_out(tmp_path):
    volume = brain(1, 30)
    volume[..., :4], volume[..., 25:] = 0, 0
    volume[10, 10, 3] = 200
    write_nifti(tmp_path / "v.nii", volume, np.eye(4))
    assert [int(name) for name in slices(tmp_path / "v.nii")] == list(range(4, 25))


def test_pixels_that_are_no_squares_become_squares(tmp_path):
    write_nifti(tmp_path / "v.nii", brain(2), np.diag((1, 3, 5, 1)))
    assert next(iter(slices(tmp_path / "v.nii").values())).shape == (72, 20)


def test_a_slices_class_comes_from_the_mask_of_its_own_sequence(tmp_path):
    lesions = np.zeros((20, 24, 12), "u1")
    lesions[5:9, 5, 3] = 1  # 4 voxels of 2 mm^2: a lesion
    lesions[5:8, 5, 8] = 1  # 6 mm^2: too little
    grid = np.diag((1, 2, 4, 1))
    for sequence in ("Flair", "T1"):
        write_nifti(tmp_path / "Patient-1" / f"1-{sequence}.nii", brain(3), grid)
    write_nifti(tmp_path / "Patient-1" / "1-LesionSeg-Flair.nii.gz", lesions, grid)
    flair = slices(tmp_path / "Patient-1" / "1-Flair.nii")
    assert [name for name in flair if name.startswith("lesion")] == ["lesion/3"]
    assert sum(name.startswith("no-lesion/") for name in flair) == 11
    assert all("/" not in name for name in slices(tmp_path / "Patient-1" / "1-T1.nii"))


def test_a_lesion_is_marked_where_the_picture_shows_it(tmp_path):
    """The volume is its own mask, stored in another order, with pixels that are no squares."""
    lesions = np.zeros((20, 24, 6), "u1")
    lesions[3:9, 14:20, 2:5] = 1
    lesions[12, 3:9, 3] = 1
    stored, affine = lesions[::-1, :, ::-1], np.diag((-1.0, 1.5, -3.0, 1.0))
    write_nifti(tmp_path / "ms" / "1-Flair.nii", stored, affine)
    write_nifti(tmp_path / "ms" / "1-LesionSeg-Flair.nii.gz", stored, affine)
    pictures = heads.load(tmp_path, 48, tmp_path.parent / "cache").pictures
    assert len(pictures.paths) == 3
    for row, path in enumerate(pictures.paths):
        marked = data.lesion_of(tmp_path, path, 48)
        assert np.array_equal(marked, pictures.squares(np.array([row]))[0] > 127) and marked.any()
    assert not data.lesion_of(tmp_path, "somewhere/else.png", 48).any()


def test_a_folder_may_be_called_like_a_volume(tmp_path):
    """Kaggle unpacks 1-T1.nii into a folder 1-T1.nii."""
    write_nifti(tmp_path / "in" / "1-T1.nii" / "1-T1.nii", brain(0, 3), np.eye(4))
    save(tmp_path / "in" / "1-T1.nii" / "preview.png", head(0))
    (tmp_path / "in" / "1-T1.nii" / "readme.txt").write_text("no picture")
    pictures = heads.load(tmp_path / "in", 32, tmp_path / "cache").pictures
    volume = [f"1-T1.nii/1-T1.nii/{z}" for z in range(3)]
    assert pictures.paths == [*volume, "1-T1.nii/preview.png"] and not pictures.unreadable


@pytest.mark.parametrize("wrong", ["shape", "place"])
def test_a_mask_on_another_grid_is_an_error_that_names_both(tmp_path, monkeypatch, capsys, wrong):
    monkeypatch.chdir(tmp_path)
    grid = np.eye(4)
    write_nifti(tmp_path / "ms" / "Patient-1" / "1-Flair.nii", brain(3), grid)
    grid[0, 3] = 3 * (wrong == "place")
    lesions = np.zeros((20, 24, 12 - (wrong == "shape")), "u1")
    write_nifti(tmp_path / "ms" / "Patient-1" / "1-LesionSeg-Flair.nii", lesions, grid)
    assert main.main(["data", "--data", "ms"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "1-Flair.nii" in error and "1-LesionSeg-Flair.nii" in error and "two grids" in error


def test_the_patient_is_the_group_even_where_strangers_look_alike(tmp_path):
    """Brains moved onto one atlas pass for twins; but equal pixels under two names are one scan."""
    noise = np.random.default_rng(0)
    for patient in range(1, 6):
        volume = brain(4) + noise.normal(0, 1, (20, 24, 12)).astype("f4")
        write_nifti(
            tmp_path / "in" / f"Patient-{patient}" / f"{patient}-Flair.nii", volume, np.eye(4)
        )
    study = heads.load(tmp_path / "in", 32, tmp_path / "cache")
    assert len(data.twin_pairs(study.pictures.thumbnails)) > 100
    assert np.unique(study.groups).tolist() == [0, 1, 2, 3, 4] and not len(study.twins)
    write_nifti(tmp_path / "in" / "Patient-9" / "9-Flair.nii", volume, np.eye(4))
    assert len(np.unique(heads.load(tmp_path / "in", 32, tmp_path / "cache").groups)) == 5


def test_volumes_of_two_sources_are_compared(tmp_path):
    """Patient-1 of one hospital is not Patient-1 of another, but may be Patient-8."""
    lesions = np.zeros((20, 24, 12), "u1")
    lesions[5:12, 5:12, :6] = 1
    for place, number in (("a", 1), ("b", 8)):
        folder = tmp_path / "in" / place / f"Patient-{number}"
        noise = np.random.default_rng(number).normal(0, 1, (20, 24, 12)).astype("f4")
        write_nifti(folder / f"{number}-Flair.nii", brain(4) + noise, np.eye(4))
        write_nifti(folder / f"{number}-LesionSeg-Flair.nii", lesions, np.eye(4))
    study = heads.load(tmp_path / "in", 32, tmp_path / "cache")
    assert set(study.homes) == {"a", "b"} and set(study.groups.tolist()) == {0}


def test_neighbours_in_a_volume_with_and_without_a_lesion_contradict_nobody(tmp_path):
    lesions = np.zeros((20, 24, 12), "u1")
    lesions[5:12, 5:12, ::2] = 1
    same = np.repeat(brain(4)[..., :1], 12, axis=2) + np.random.default_rng(0).normal(
        0, 1, (20, 24, 12)
    )
    write_nifti(tmp_path / "ms" / "7-Flair.nii", same, np.eye(4))
    write_nifti(tmp_path / "ms" / "7-LesionSeg-Flair.nii", lesions, np.eye(4))
    task = heads.load(tmp_path / "ms", 32, tmp_path / "cache").task("ms")
    assert len(task.rows) == 12 and "dropped" not in task.split


def test_a_volume_is_never_cut_even_if_nobody_is_named(tmp_path):
    """Its slices drift from one picture to another, so that no twin would hold them together."""
    for patient in range(6):
        folder = tmp_path / "in" / "mine" / ("ill", "healthy")[patient % 2]
        write_nifti(folder / f"IXI{patient:03d}-Guys-T1.nii.gz", brain(patient), np.eye(4))
    study = heads.load(tmp_path / "in", 32, tmp_path / "cache")
    volumes = np.array([path.rsplit("/", 1)[0] for path in study.pictures.paths])
    assert len(set(volumes)) == len(set(study.groups.tolist())) == 6
    assert len({*zip(volumes.tolist(), study.groups.tolist(), strict=True)}) == 6
    assert (
        not len(study.patients) and len(data.near_duplicate_groups(study.pictures.thumbnails)) > 6
    )


def test_what_a_cut_write_left_of_a_volume_goes_to_no_other_file(tmp_path):
    """Killed after any row of three: else they would stand below the next file's name."""
    write_nifti(tmp_path / "in" / "Patient-1" / "1-T1.nii", brain(0, 3), np.eye(4))
    heads.load(tmp_path / "in", 32, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*.rows")
    whole, size = file.read_bytes(), data.row_type(32).itemsize
    (tmp_path / "in" / "Patient-1").rename(tmp_path / "away")
    save(tmp_path / "in" / "Patient-2" / "new.png", head(7))
    for left in range(3):
        file.write_bytes(whole[: left * size + left])
        pictures = heads.load(tmp_path / "in", 32, tmp_path / "cache").pictures
        assert pictures.paths == ["Patient-2/new.png"]
        assert np.array_equal(pictures.thumbnails[0], data.thumbnail(head(7)))
        assert file.stat().st_size == size


def test_what_surrounds_a_head_may_be_no_number_and_air_may_be_negative(tmp_path):
    """As in CT: outside nan, air -1000, the head above."""
    volume = np.full((20, 24, 9), np.nan, "f4")
    volume[2:-2, 2:-2, :7], volume[5:-5, 5:-5, :7] = -1000, -200
    write_nifti(tmp_path / "v.nii", volume, np.eye(4))
    seen = slices(tmp_path / "v.nii")
    assert list(seen) == [str(z) for z in range(7)]
    assert seen["3"][0, 0] == 0 and seen["3"][12, 10] == 255


def test_a_changed_mask_changes_the_classes_and_a_mask_is_no_picture(tmp_path):
    lesions, folder = np.zeros((20, 24, 12), "u1"), tmp_path / "in" / "Patient-1"
    write_nifti(folder / "1-Flair.nii", brain(3), np.eye(4))
    write_nifti(folder / "1-LesionSeg-Flair.nii", lesions, np.eye(4))
    write_nifti(folder / "1-LesionSeg-T1.nii", lesions, np.eye(4))
    for name in (
        "anat_seg",
        "brainmask",
        "sub-1_desc-brain_mask",
        "aseg",
        "lesion",
        "x_label-L_roi",
    ):
        write_nifti(folder / f"{name}.nii.gz", lesions, np.eye(4))
    first = heads.load(tmp_path / "in", 32, tmp_path / "cache")
    assert len(first.pictures.paths) == 12 and first.other_files == 8 and not first.tasks
    lesions[5:15, 5:15, 6:] = 1
    write_nifti(folder / "1-LesionSeg-Flair.nii", lesions, np.eye(4))
    task = heads.load(tmp_path / "in", 32, tmp_path / "cache").task("ms")
    assert task.classes == ("no-lesion", "lesion") and task.labels.sum() == 6


# --- shards ------------------------------------------------------------------------------------


@pytest.fixture
def parquet():
    return pytest.importorskip("pyarrow.parquet", reason="pyarrow reads shards; not installed")


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_shard(path: Path, images: list, labels: list | None, names: list | None = None) -> None:
    """As the datasets library writes it: struct<bytes, path>, row groups, its features as JSON."""
    import pyarrow
    from pyarrow import parquet

    struct_ = [{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)]
    table = pyarrow.table({"image": struct_} | ({"label": labels} if labels else {}))
    label = (
        {"names": names, "_type": "ClassLabel"} if names else {"dtype": "int64", "_type": "Value"}
    )
    info = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=5)


def paths_of(root: Path, tmp_path: Path) -> list[str]:
    return heads.load(root, 32, tmp_path / "cache").pictures.paths


def test_a_shards_pictures_lie_below_their_classes(parquet, tmp_path):
    shard = tmp_path / "in" / "data" / "train-00000-of-00001.parquet"
    write_shard(
        shard, [png(head(i)) for i in range(12)], [i % 3 - 1 for i in range(12)], ["x/y", "b"]
    )
    study = heads.load(tmp_path / "in", 32, tmp_path / "cache")
    place = "data/train-00000-of-00001.parquet"
    names = [("", "x_y/", "b/")[i % 3] for i in range(12)]  # -1 = not labelled
    assert study.pictures.paths == [f"{place}/{name}{i}" for i, name in enumerate(names)]
    for i in range(12):
        assert study.pictures.squares(np.array([i])).shape == (1, 32, 32)
        assert np.array_equal(study.pictures.thumbnails[i], data.thumbnail(head(i)))
    task = study.task("in")
    assert task.classes == ("b", "x_y") and len(task.rows) == 8
    assert set(task.parts) == {""}  # "train" alone is how Hugging Face calls the whole


def test_classes_without_names_are_those_of_the_known_task_else_numbers(parquet, tmp_path):
    """Hugging Face numbers the folders of a data set by alphabet: 0 is Mild_Demented."""
    four = [png(head(i)) for i in range(12)], [i % 4 for i in range(12)]
    two = [png(head(20 + i)) for i in range(12)], [i % 2 for i in range(12)]
    write_shard(tmp_path / "in" / "Alzheimer_MRI" / "data" / "train-0.parquet", *four)
    write_shard(tmp_path / "in" / "some-brain-stroke-set" / "train-0.parquet", *two)
    write_shard(tmp_path / "in" / "scans" / "train-0.parquet", *two)
    tasks = heads.load(tmp_path / "in", 32, tmp_path / "cache").tasks
    assert {name: task.classes for name, task in tasks.items()} == {
        "alzheimer": ("non", "very_mild", "mild", "moderate"),
        "stroke": ("normal", "stroke"),
        "scans": ("0", "1"),
    }
    assert [tasks["alzheimer"].classes[k] for k in tasks["alzheimer"].labels[::3]] == [
        "mild", "moderate", "non", "very_mild"
    ]  # fmt: skip


def test_images_may_be_plain_bytes_and_a_shard_empty(parquet, tmp_path):
    import pyarrow

    (tmp_path / "in").mkdir()
    table = pyarrow.table({"image": [png(head(0))], "label": ["a very long name " * 9]})
    parquet.write_table(table, tmp_path / "in" / "a.parquet")
    parquet.write_table(table.slice(0, 0), tmp_path / "in" / "b.parquet")
    with parquet.ParquetWriter(tmp_path / "in" / "c.parquet", table.schema):
        pass  # not a single row group
    pictures = heads.load(tmp_path / "in", 32, tmp_path / "cache").pictures
    assert pictures.paths[0] == f"a.parquet/{('a very long name ' * 9)[:40]}/0"
    assert pictures.paths[1:] == ["b.parquet", "c.parquet"] and list(pictures.unreadable) == [1, 2]


def test_the_parts_of_a_data_set_stand_in_its_shards_names(parquet, tmp_path):
    for seed, part in enumerate(("train", "validation", "test")):
        images = [png(head(100 * seed + i)) for i in range(6)]
        write_shard(tmp_path / "in" / "data" / f"{part}-0.parquet", images, [0, 1] * 3, ["a", "b"])
    study = heads.load(tmp_path / "in", 32, tmp_path / "cache")
    task = study.task("in")
    for row, part, split in zip(task.rows, task.parts, task.split, strict=True):
        name = study.pictures.paths[row].split("/")[1]
        assert part == split == {"tr": "train", "va": "val", "te": "test"}[name[:2]]


def test_a_bad_row_and_a_bad_shard_are_named_and_left_out(parquet, tmp_path):
    images = [png(head(0)), b"no picture", None, png(head(1))]
    write_shard(tmp_path / "in" / "a.parquet", images, None)
    (tmp_path / "in" / "b.parquet").write_bytes(b"PAR1 and nothing else")
    import pyarrow

    parquet.write_table(pyarrow.table({"text": ["no image here"]}), tmp_path / "in" / "c.parquet")
    for _ in range(2):  # decoded, and from the cache
        pictures = heads.load(tmp_path / "in", 32, tmp_path / "cache").pictures
        bad = {pictures.paths[row]: why for row, why in pictures.unreadable.items()}
        assert list(bad) == ["a.parquet/1", "a.parquet/2", "b.parquet", "c.parquet"]
        assert "cannot identify" in bad["a.parquet/1"] and "image" in bad["c.parquet"]
        assert [p for p in pictures.paths if p not in bad] == ["a.parquet/0", "a.parquet/3"]


def test_without_pyarrow_one_line_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.parquet").write_bytes(b"PAR1")
    assert main.main(["data", "--data", "in"]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert "in/a.parquet" in error and "pip install pyarrow" in error


# --- the eight data sets, in miniature ---------------------------------------------------------


def masoudnickparvar(root: Path, seed: int) -> None:
    for k, class_ in enumerate(("glioma", "meningioma", "notumor", "pituitary")):
        for i in range(7):
            part, short = ("Training", "Tr") if i < 5 else ("Testing", "Te")
            place = root / part / class_ / f"{short}-{class_[:2]}_{i:04d}.jpg"
            save(place, head(seed + 10 * k + i))


def youngp5(root: Path, seed: int) -> None:
    images = [png(head(seed + i)) for i in range(20)]
    write_shard(root / "data" / "train-00000-of-00001.parquet", images, [i % 2 for i in range(20)])


def mahadih534(root: Path, seed: int) -> None:
    for i in range(12):
        save(root / "no" / f"{i} no.jpeg", head(seed + i))
        save(root / "yes" / f"Y{i}.jpg", head(seed + 20 + i))


def falah(root: Path, seed: int) -> None:
    """Four people of each class, slices of each in both parts, as in the real one."""
    names = ["Mild_Demented", "Moderate_Demented", "Non_Demented", "Very_Mild_Demented"]
    people, labels = [head(seed + i) for i in range(16)], [i % 4 for i in range(16)]
    brighter = [np.minimum(picture * 1.02, 255).astype(np.uint8) for picture in people]
    for part, pictures in (("train", people), ("test", brighter)):
        shard = root / "data" / f"{part}-00000-of-00001-c08a401c53fe5312.parquet"
        write_shard(shard, [png(picture) for picture in pictures], labels, names)


def ninadaithal(root: Path, seed: int) -> None:
    folders = ("Mild Dementia", "Moderate Dementia", "Non Demented", "Very mild Dementia")
    for k, folder in enumerate(folders):
        for i in range(9):
            person = 28 + 3 * k + i // 3
            name = f"OAS1_{person:04d}_MR1_mpr-{1 + i % 3}_100.jpg"
            save(root / "Data" / folder / name, head(seed + 10 * k + i))


def btx24(root: Path, seed: int) -> None:
    for shard in range(2):
        images = [png(head(seed + 20 * shard + i)) for i in range(10)]
        name = f"train-{shard:05d}-of-00002.parquet"
        write_shard(root / "data" / name, images, [i % 2 for i in range(10)])


def irfansheriff(root: Path, seed: int) -> None:
    for i in range(12):
        save(root / "parkinsons_dataset" / "normal" / f"Mag_Images_{i:03d}.png", head(seed + i))
        save(
            root / "parkinsons_dataset" / "parkinson" / f"T2W_TSE_{i:03d}.png", head(seed + 20 + i)
        )


def orvile(root: Path, seed: int) -> None:
    for patient in range(1, 6):
        folder = root / f"Patient-{patient}"
        lesions = np.zeros((20, 24, 12), "u1")
        lesions[5:12, 5:12, : 6 + patient % 2] = 1
        for sequence in ("Flair", "T1", "T2"):
            write_nifti(folder / f"{patient}-{sequence}.nii", brain(seed + patient), np.eye(4))
            write_nifti(folder / f"{patient}-LesionSeg-{sequence}.nii", lesions, np.eye(4))


# publisher's folder -> (what makes it, the task it holds, its classes, flags that it needs)
SOURCES = {
    "brain-tumor-mri-dataset": (
        masoudnickparvar, "tumor", ("glioma", "meningioma", "notumor", "pituitary"), []),
    "BrainMRI": (youngp5, "BrainMRI", ("0", "1"), []),
    "brain-tumor-MRI-dataset": (mahadih534, "tumor", ("notumor", "yes"), []),
    "Alzheimer_MRI": (
        falah, "alzheimer", ("non", "very_mild", "mild", "moderate"), ["--resplit"]),
    "imagesoasis": (ninadaithal, "alzheimer", ("non", "very_mild", "mild", "moderate"), []),
    "tekno21-brain-stroke-dataset-binary": (btx24, "stroke", ("normal", "stroke"), []),
    "parkinsons-brain-mri-dataset": (irfansheriff, "parkinson", ("normal", "parkinson"), []),
    "multiple-sclerosis-brain-mri-lesion-segmentation": (
        orvile, "ms", ("no-lesion", "lesion"), []),
}  # fmt: skip


def build(name: str, root: Path) -> None:
    make = SOURCES[name][0]
    if make in (youngp5, falah, btx24):
        pytest.importorskip("pyarrow.parquet", reason="pyarrow reads shards; not installed")
    make(root, 1000 * (1 + list(SOURCES).index(name)))


def rows_of(path: str | Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", SOURCES)
def test_a_publishers_folder_works_as_it_is_unpacked(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    build(name, tmp_path / name)
    _, task, classes, flags = SOURCES[name]
    assert main.main(["data", "--data", name, *flags]) == 0
    splits = rows_of(f"runs/data-{task}/splits.csv")
    assert {row["label"] for row in splits} == set(classes)
    parts: dict[str, set] = {}
    for row in splits:
        parts.setdefault(row["group"], set()).add(row["split"])
    assert all(len(part - {"dropped"}) <= 1 for part in parts.values())
    small = ["--image-size", "32", "--batch-size", "16"]
    assert main.main(["pretrain", "--data", name, *flags, *small, "--epochs", "1"]) == 0
    assert f"({task}): " in capsys.readouterr().out
    probe = ["probe", "--data", name, "--task", task, "--epochs", "2", *flags]
    assert main.main(probe) == 0
    metrics = json.loads(Path(f"runs/probe-{task}/metrics.json").read_text())
    assert metrics["classes"] == list(classes) and metrics["leaked"] is False
    assert metrics["n"] == sum(row["split"] == "test" for row in splits) > 0


def test_a_publishers_split_through_people_leaves_nothing_to_train_on(parquet, tmp_path, capsys):
    """Falah/Alzheimer_MRI has slices of everybody in its test part: the refusal says what helps."""
    build("Alzheimer_MRI", tmp_path / "Alzheimer_MRI")
    study = heads.load(tmp_path / "Alzheimer_MRI", 32, tmp_path / "cache")
    task = study.task("alzheimer")
    assert sorted(task.split) == ["dropped"] * 16 + ["test"] * 16
    with pytest.raises(data.UserError, match="--resplit"):
        heads.check_split(task)


def test_all_eight_pretrain_together_without_a_test_picture(parquet, tmp_path, monkeypatch, capsys):
    """And with a picture of one tumor set's Testing part that stands in another set, too."""
    monkeypatch.chdir(tmp_path)
    for name in SOURCES:
        build(name, tmp_path / "scans" / name)
    shared = np.asarray(Image.open(next(Path("scans/brain-tumor-mri-dataset/Testing").glob("*/*"))))
    save(Path("scans/brain-tumor-MRI-dataset/yes/Y99.jpg"), shared)
    save(Path("scans/unlabelled/1.png"), shared[:, ::-1])  # its mirror
    save(Path("scans/unlabelled/2.png"), head(99999))
    assert main.main(["data", "--data", "scans"]) == 0
    small = ["--image-size", "32", "--batch-size", "64", "--epochs", "1"]
    capsys.readouterr()
    assert main.main(["pretrain", "--data", "scans", *small]) == 0
    out = capsys.readouterr().out
    assert (
        "unlabelled (no labels): 1 of 2 pictures are used; left out: 1 of a group that is held out"
        in out
    )
    for name, task in (("imagesoasis", "alzheimer"), ("BrainMRI", "BrainMRI")):
        assert f"source {name} ({task}): " in out
    tasks = {path.parent.name[5:] for path in Path("runs").glob("data-*/splits.csv")}
    assert tasks == {
        "tumor", "brain-tumor-MRI-dataset", "BrainMRI", "alzheimer", "stroke", "parkinson", "ms"
    }  # fmt: skip
    encoder = torch.load("runs/pretrain/encoder.pt", weights_only=True)
    seen = {row.numpy().tobytes().hex() for row in encoder["seen"]}
    used, held, test = set(), set(), set()
    for task in tasks:
        for row in rows_of(f"runs/data-{task}/splits.csv"):
            train = row["split"] == "train" and row["pixel_hash"] in seen
            (used if train else held).add((row["pixel_hash"], row["group"]))
            if row["split"] in ("val", "test"):
                test.add((row["pixel_hash"], row["group"]))
    assert used and len(test) > 50
    for i in (0, 1):  # by pixels, and by group
        assert not {key[i] for key in used} & {key[i] for key in test}
    assert not seen & {key[0] for key in held}
    metrics = ["probe", "--data", "scans", "--task", "tumor", "--epochs", "2"]
    assert main.main(metrics) == 0
