"""Turn a folder of brain scans into images, groups and splits in which nobody is on two sides.

Three ideas carry this file. (1) An image is decoded once, to a small gray square of bytes;
everything later reads that array. (2) Images that belong together (one patient, or near-duplicates)
form a *group*, and a group is never cut: if one slice of a brain is in test, no other slice of it
is in training. Most published scores on these data sets come from ignoring this. (3) A folder is
read by its names alone: what names a publisher's split, a patient or packaging is taken out of a
path, and what is left is .../<task>/<class>.

    near-duplicates:  cos(t, t') >= 0.98  or  cos(t, mirror(t')) >= 0.98,
                      t = the image squashed to 32x32 - its mean
    one group:        equal pixels · one patient · near-duplicates, unless both patients are known ·
                      neighbours in a numbered series · a copy (aug_x_3) and its original (x)

Shape letters: N slices in a batch (so 2N views) · C channels · H, W pixels · E encoder features ·
D projection dimensions · K classes. Here also n images in all, m of one task, S = image size.

Next: simclr.py
"""

import csv
import fcntl
import gzip
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import shutil
import statistics
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import permutations
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

# What decides who belongs to whom: each of these matters (docs/results.md).
THUMBNAIL = 32  # pixels a side: enough to recognise a brain, too few to see the noise
NEAR_DUPLICATE = 0.98  # finds exactly 200 groups, its people, in the Kaggle Alzheimer set
NEIGHBOUR = 0.90  # cosine of two consecutive files that may be slices of one brain
NEIGHBOUR_RATIO = 10  # tumor sets have ratios above 14, brains on one atlas 2 to 4
LEAST_SERIES = 50  # files of a series, for its ratio to mean anything
RANDOM_PAIRS = 20_000  # of a series, to compare its consecutive files with
SPLIT_SEED = b"simclr-brain-1"  # a constant: --seed never moves an image to another split
HELD_OUT = 0.15  # share of the groups that go to val, and to test

# Limits before anything is decoded; no real scan comes near them.
MAX_BYTES = 1 << 30  # of a file that is no shard
MAX_PIXELS = 89_000_000  # of an image, as Pillow has it
MAX_VOXELS = 1 << 27  # 512^3: half a GiB of float32
MAX_OFFSET = 1 << 20  # bytes between a volume's header and its voxels

# How a volume becomes slices; not varied.
WINDOW = (1, 99.9)  # percentiles of a volume that become black and white; half of it is air
NEAR_EMPTY = 0.1  # a slice with less in it than this share of the fullest slice's is left out
LESION_AREA = 7.0  # mm^2 in a slice: a disc of 3 mm, the least that counts as a lesion of MS

CACHE_VERSION = 11  # raise it when reading or the phantoms change: old caches are left alone
FEW = 64  # so few files are decoded before other processes have started
BLOCK = 256  # thumbnails compared with all others at once: 0.3 GB for 100,000


class UserError(Exception):
    """Something the user can fix; main.py prints it as one line and exits with status 2."""


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


@contextmanager
def write_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing such that a reader sees the old file or the new one, never half.

    Args:
        path: where the file shall stand; missing folders are made.

    Yields:
        A binary file beside `path`; it is flushed to disk and renamed at the end, and removed
        after an exception.

    Raises:
        OSError: it cannot be written; what stood there before is as it was.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(beside, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # a rename can reach the disk before the bytes it names
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a folder, made where missing; the system lets go of it however this process ends.

    Raises:
        UserError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        message = f"another run is writing into {folder}; wait for its end, or give another --out"
        raise UserError(message) from None
    finally:
        os.close(held)


# ---------------------------------------------------------------------------------------------
# Reading one image, a volume, a shard
# ---------------------------------------------------------------------------------------------

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")  # Pillow knows more; some start programs
VOLUME = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
SHARD = re.compile(r"\.parquet$", re.IGNORECASE)
# Files and folders that mark something, and show nothing.
MASK = re.compile(
    r"lesionseg|(?<![a-z])(masks?|[ad]?seg|segmentations?|aparc|roi|labels?)(?![a-z])", re.I
)


def read_gray(source: str | Path | BinaryIO) -> np.ndarray:
    """Decode one image, of any mode Pillow reads, as gray bytes at its own size.

    The contents, not the ending, say how. Colour becomes luma (ITU-R 601), transparency becomes
    black, and 16-bit or floating-point pixels are scaled by their own range (clipping would leave
    white). An animation gives its first frame.

    Returns:
        (H, W) uint8.

    Raises:
        OSError, ValueError, SyntaxError: Pillow cannot read it, or it is too large.
    """
    with Image.open(source, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels; at most {MAX_PIXELS:,}")
        # A colour JPEG stores luma apart: asking for it alone is twice as fast.
        image.draft("L", image.size)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            pixels = np.asarray(image, dtype=np.float64)
            finite = np.isfinite(pixels)
            low, high = pixels[finite].min(), pixels[finite].max()
            pixels = np.where(finite, pixels, low)
            return np.round((pixels - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)
        if "A" in image.mode or "transparency" in image.info:
            image = image.convert("RGBA")
            black = Image.new("RGBA", image.size, (0, 0, 0, 255))
            image = Image.alpha_composite(black, image)
        return np.asarray(image.convert("L"))


NIFTI_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8"}  # a header's codes
NIFTI_TYPES |= {256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
NIFTI_HEADER = np.dtype(  # the fields that are read; nifti.nimh.nih.gov/nifti-1 lists all
    {
        "names": "size dim type pixdim offset slope inter qform sform quat shift rows magic".split(),
        "formats": "i4 8i2 i2 8f4 f4 f4 f4 i2 i2 3f4 3f4 (3,4)f4 S4".split(),
        "offsets": [0, 40, 70, 76, 108, 112, 116, 252, 254, 256, 268, 280, 344],
        "itemsize": 348,
    }
)


def read_nifti(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a NIfTI-1 volume, .nii or .nii.gz, and turn it so that its axes are a patient's.

    A file is a header of 348 bytes and, from `offset` on, the voxels, the first axis fastest.
    Of a series of volumes the first is read.

    Returns:
        (volume (X, Y, Z) float32, its axes running to the patient's right, front and top (RAS+);
        the affine (4, 4) float64 from its voxel indices to mm)

    Raises:
        OSError, ValueError, EOFError, zlib.error: it cannot be read, or is no such volume.
    """
    packed = str(path).lower().endswith(".gz")
    with (gzip.open if packed else open)(path, "rb") as file:
        raw = file.read(348)
        kind = NIFTI_HEADER
        if raw[:4] != (348).to_bytes(4, "little"):  # the first field is the header's own size
            kind = NIFTI_HEADER.newbyteorder()
        header = np.frombuffer(raw, kind, 1)[0]
        axes, *shape = header["dim"][:4].tolist()
        shape[axes:] = [1] * (3 - len(shape[:axes]))
        count = math.prod(shape)
        code = int(header["type"])
        if header["magic"] != b"n+1" or code not in NIFTI_TYPES or min(shape) < 1 or axes > 7:
            raise ValueError(f"type {code}, {axes} axes, shape {shape}: no NIfTI-1 volume")
        if count > MAX_VOXELS or not 0 <= header["offset"] <= MAX_OFFSET:
            raise ValueError(f"{count:,} voxels from byte {header['offset']:.4g} on: not read")
        voxel = np.dtype(NIFTI_TYPES[code]).newbyteorder("=" if kind is NIFTI_HEADER else ">")
        file.seek(int(header["offset"]))
        voxels = file.read(count * voxel.itemsize)  # no more, whatever else would unpack
    volume = np.frombuffer(voxels, voxel, count).reshape(shape, order="F").astype(np.float32)
    if header["slope"] and np.isfinite([header["slope"], header["inter"]]).all():
        volume = volume * header["slope"] + header["inter"]  # 0 or nan: they are the values
    return to_ras(volume, nifti_affine(header, shape))


def nifti_affine(header: np.void, shape: list[int]) -> np.ndarray:
    """The affine (4, 4) from voxel indices to mm: the sform, else the qform, else as in ANALYZE."""
    affine = np.eye(4)
    if header["sform"] > 0:  # a matrix
        affine[:3] = header["rows"]
    elif header["qform"] > 0:  # a turn by the unit quaternion a + ib + jc + kd, then a shift
        b, c, d = header["quat"].tolist()
        a = math.sqrt(max(0, 1 - b * b - c * c - d * d))
        cross = np.array([[0, -d, c], [d, 0, -b], [-c, b, 0]])
        turn = np.eye(3) + 2 * a * cross + 2 * cross @ cross  # Rodrigues, in half angles
        handedness = -1 if header["pixdim"][0] < 0 else 1
        affine[:3, :3] = turn * header["pixdim"][1:4] * (1, 1, handedness)
        affine[:3, 3] = header["shift"]
    else:  # the format before NIfTI: voxels run to the left
        affine[:3, :3] = np.diag(header["pixdim"][1:4] * (-1, 1, 1))
        affine[:3, 3] = affine[:3, :3] @ (1 - np.array(shape)) / 2
    return affine


def to_ras(volume: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exchange and mirror a volume's axes until they run to the patient's right, front and top.

    Nothing is resampled: each axis goes to the direction that is nearest to it.

    Raises:
        ValueError: the affine has no inverse.
    """
    if not abs(np.linalg.det(affine)) > 0:  # nan is not, either
        raise ValueError("its affine, voxels to millimetres, has no inverse")
    cosines = np.abs(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))
    axes = max(permutations(range(3)), key=lambda order: cosines[range(3), order].sum())
    volume, affine = volume.transpose(axes), affine[:, [*axes, 3]]
    for axis in range(3):
        if affine[axis, axis] < 0:
            volume = np.flip(volume, axis)
            affine[:, 3] += affine[:, axis] * (volume.shape[axis] - 1)
            affine[:, axis] *= -1
    return volume, affine


def lesion_mask(path: str | Path) -> Path | None:
    """The file that marks a volume's lesions: for 7-Flair.nii, 7-LesionSeg-Flair.nii beside it.

    A mask counts for the sequence in its name alone: what shines on FLAIR may be dark on T1.
    """
    before, dash, sequence = VOLUME.sub("", Path(path).name).rpartition("-")
    for ending in (".nii", ".nii.gz"):
        mask = Path(path).with_name(f"{before}{dash}LesionSeg-{sequence}{ending}")
        if mask.is_file():
            return mask
    return None


def volume_slices(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """The axial slices of a volume, front up, the patient's left on the image's right.

    Gray values are cut off at percentiles of the whole volume, so that slices can be compared.
    Slices with next to nothing in them are left out.

    Yields:
        (name, (H, W) uint8), from the feet up. The name is the slice's number and, where a lesion
        mask lies beside, its class before it: "lesion/101" has at least LESION_AREA of lesion.

    Raises:
        OSError, ValueError, EOFError, zlib.error: as in `read_nifti`, or the mask does not fit.
    """
    volume, affine = read_nifti(path)
    classes = [""] * volume.shape[2]
    mask = lesion_mask(path)
    if mask:
        lesions, grid = read_nifti(mask)
        if lesions.shape != volume.shape or not np.allclose(grid, affine, atol=0.01):
            raise ValueError(f"its lesion mask {mask.name} is on another grid; resample one")
        area = (lesions > 0.5).sum(axis=(0, 1)) * abs(np.linalg.det(affine[:2, :2]))  # (Z,) mm^2
        classes = np.where(area >= LESION_AREA, "lesion/", "no-lesion/")
    finite = np.isfinite(volume)
    if not finite.any():
        raise ValueError("no voxel of it has a number")
    low, high = (float(value) for value in np.percentile(volume[finite], WINDOW))
    if low == high:
        raise ValueError("there is nothing in it: its gray values are the same nearly everywhere")
    gray = ((np.where(finite, volume, low) - low) / (high - low)).clip(0, 1)
    filled = (gray > 0.1).sum(axis=(0, 1))  # (Z,) pixels with something in them
    for z in np.flatnonzero(filled > NEAR_EMPTY * filled.max()):
        yield f"{classes[z]}{z}", axial((gray[..., z] * 255).round().astype(np.uint8), affine)


def axial(values: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """One level (X, Y) uint8 of a volume in RAS+, front up, left on the right, pixels square."""
    side = np.linalg.norm(affine[:3, :2], axis=0)  # of a voxel, in mm
    size = np.round(side / side.min() * values.shape).astype(int)
    slice_ = Image.fromarray(values[::-1, ::-1].T)
    return np.asarray(slice_.resize(size, Image.Resampling.BILINEAR))


def shard_images(path: str | Path) -> Iterator[tuple[str, np.ndarray | Exception]]:
    """The images of a Hugging Face shard: columns `image` {bytes, path} and perhaps `label`.

    Yields:
        (name, (H, W) uint8, or why it cannot be read); the name is the row's number and, where it
        has a label, before it the class as the schema calls it, or else its number.

    Raises:
        OSError, ValueError: it is no such shard.
    """
    from pyarrow import parquet  # no package of ours: `load` says so where it is missing

    with parquet.ParquetFile(path, memory_map=True) as shard:
        columns = [name for name in ("image", "label") if name in shard.schema_arrow.names]
        if "image" not in columns:
            raise ValueError(f"no column called image, only {shard.schema_arrow.names}")
        about = json.loads((shard.schema_arrow.metadata or {}).get(b"huggingface", "{}"))
        names = about.get("info", {}).get("features", {}).get("label", {}).get("names") or []
        row = 0
        for batch in shard.iter_batches(64, columns=columns, use_threads=False):
            for entry in batch.to_pylist():
                label = entry.get("label")
                if isinstance(label, int) and 0 <= label < len(names):
                    label = names[label]
                name = f"{row}"
                if label not in (None, -1):  # -1 = not labelled
                    name = f"{str(label).replace('/', '_')[:40]}/{row}"
                try:
                    image = entry["image"]
                    yield name, read_gray(io.BytesIO(image["bytes"]))
                except Exception as error:  # broken bytes can make Pillow raise nearly anything
                    yield name, error
                row += 1


def images_in(path: str | Path) -> Iterator[tuple[str, np.ndarray | Exception]]:
    """Every image of a file: the one of a PNG, each slice of a volume, each row of a shard.

    Yields:
        (name within the file, '' where it has one image; (H, W) uint8, or why it cannot be read)
    """
    volume, shard = VOLUME.search(str(path)), SHARD.search(str(path))
    size = os.stat(path).st_size
    if not os.path.isfile(path) or size > MAX_BYTES and not shard:
        raise ValueError(f"it is no file of at most {MAX_BYTES:,} bytes")
    if volume:
        yield from volume_slices(path)
    elif shard:
        yield from shard_images(path)
    else:
        yield "", read_gray(path)


def fit_square(gray: np.ndarray, size: int) -> np.ndarray:
    """Resize (H, W) uint8 until its long side is `size`, and pad it black to (size, size).

    The aspect ratio is kept: a brain squashed to a square would teach the encoder the scanner's
    image format.
    """
    # PIL's bilinear widens its window when it shrinks, so fine structure is averaged, not skipped.
    return np.asarray(ImageOps.pad(Image.fromarray(gray), (size, size), Image.Resampling.BILINEAR))


def thumbnail(gray: np.ndarray) -> np.ndarray:
    """The whole decoded image (H, W) uint8, squashed to (32, 32) by area averaging.

    From the original, so that splits do not depend on --image-size. Area averaging matters:
    bilinear interpolation blurs 68 strangers of the Alzheimer set into one chain.
    """
    return np.asarray(Image.fromarray(gray).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))


# ---------------------------------------------------------------------------------------------
# The cache: every image of a folder, decoded once
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Every image of a folder, decoded; row r of each array is the image `names[r]`."""

    folder: Path  # of the cache
    names: list[str]  # below the data folder; a slice is "volume.nii.gz/lesion/101"
    squares: np.ndarray  # (n, S, S) uint8, memory-mapped
    thumbnails: np.ndarray  # (n, 32, 32) uint8
    hashes: np.ndarray  # (n, 16) uint8, half of the SHA-256 of the gray pixels
    unreadable: dict[int, str]  # row -> why; its row of the arrays means nothing


def row_type(size: int) -> np.dtype:
    """One image in the cache's file."""
    shape = (THUMBNAIL, THUMBNAIL)
    return np.dtype([("square", "u1", (size, size)), ("small", "u1", shape), ("hash", "u1", 16)])


def decode(read: Callable, size: int, file: str) -> list[tuple[str, str, bytes]]:
    """Decode one file, as the worker processes do.

    Args:
        read: name of a file -> its images, as `images_in` yields them.

    Returns:
        Of each image its name, why it cannot be read or '', and its `row_type` as bytes.
    """
    decoded = []
    empty = np.zeros((), row_type(size)).tobytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata is nobody's concern
            for inner, gray in read(file):
                name = f"{file}/{inner}".rstrip("/")
                if isinstance(gray, Exception):
                    decoded.append((name, f"{type(gray).__name__}: {gray}", empty))
                    continue
                digest = hashlib.sha256(np.ascontiguousarray(gray)).digest()[:16]
                row = fit_square(gray, size).tobytes() + thumbnail(gray).tobytes() + digest
                decoded.append((name, "", row))
            if not decoded:
                raise ValueError("there is nothing in it")
    except Exception as error:  # a broken file can make Pillow raise nearly anything
        decoded.append((file, f"{type(error).__name__}: {error}", empty))
    return decoded


def decode_files(
    read: Callable, files: list[str], size: int, folder: Path, progress: Callable
) -> None:
    """Decode files on every core, and append their images to one plain file.

    index.json is written last and the folder renamed into place, so there is a whole cache or none.

    Raises:
        UserError: a worker process was killed; OSError: the cache cannot be written.
    """
    # A DataLoader collates in its worker processes: that is where the files are decoded.
    loader = DataLoader(
        files,
        batch_size=None,
        collate_fn=partial(decode, read, size),
        num_workers=torch.get_num_threads() if len(files) >= FEW else 0,
        generator=torch.Generator(),  # its own: the default one belongs to the networks
    )
    scratch = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    scratch.mkdir(parents=True, exist_ok=True)
    names, unreadable = [], {}
    try:
        with open(scratch / "images.bin", "wb") as out:
            for decoded in progress(loader, total=len(files), desc="decode", unit="file"):
                for name, why, row in decoded:
                    if why:
                        unreadable[len(names)] = why
                    names.append(name)
                    out.write(row)
        (scratch / "index.json").write_text(json.dumps([names, unreadable]))
        if not folder.exists():  # else another process was first, with the same
            os.replace(scratch, folder)
    except RuntimeError as error:  # how the DataLoader says that a worker is gone
        raise UserError(f"decoding has ended ({error}); is memory short? Try again") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load_images(
    read: Callable, stamps: dict[str, str], size: int, cache: Path, progress: Callable
) -> Images:
    """Every image of the files, from the cache or, the first time, decoded into it.

    The cache's folder is named by a digest of everything that shapes it. Where a file has changed,
    all are decoded again: a minute for 100,000 images. Any folder of the cache may be deleted.

    Args:
        read: as `decode` takes it.
        stamps: file name -> a text that changes when the file does.
        progress: wraps an iterable and shows how far it is, as tqdm does.
    """
    digest = hashlib.sha256(f"{CACHE_VERSION} {size}".encode())
    for file, stamp in stamps.items():
        digest.update(os.fsencode(f"{file}\0{stamp}\n"))
    folder = cache / digest.hexdigest()[:16]
    if not (folder / "index.json").exists():
        decode_files(read, list(stamps), size, folder, progress)
    names, unreadable = json.loads((folder / "index.json").read_text())
    rows = np.memmap(folder / "images.bin", row_type(size), "r", shape=len(names))
    unreadable = {int(row): why for row, why in unreadable.items()}
    small, hashes = np.array(rows["small"]), np.array(rows["hash"])
    return Images(folder, names, rows["square"], small, hashes, unreadable)


def open_root(root: Path) -> tuple[dict[str, str], Counter]:
    """The files of a folder that hold images, and what else lies there.

    Left out are hidden files, masks, and folders with a config.json: those are runs of ours.

    Returns:
        ({path below root with forward slashes: its stamp}, sorted; how many files of each other
        ending)

    Raises:
        OSError: a folder may not be opened. (Passing over it would change the split in silence.)
    """

    def refuse(error: OSError) -> None:
        raise error

    stamps, others, visited = {}, Counter(), set()
    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited or "config.json" in files:  # a link to a folder above would never end
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if name[0] != "." and not MASK.search(name))
        for name in sorted(files):
            path = Path(folder, name)
            is_image = name.lower().endswith(IMAGE_ENDINGS) or VOLUME.search(name)
            is_image = (is_image and not MASK.search(name)) or SHARD.search(name)
            if name[0] != "." and is_image:
                stamps[path.relative_to(root).as_posix()] = stamp(path)
            else:
                others[path.suffix.lower()] += 1
    return dict(sorted(stamps.items())), others


def stamp(path: Path) -> str:
    """A text that changes when a file, or the lesion mask beside it, does."""
    mask = lesion_mask(path) if VOLUME.search(path.name) else None
    text = ""
    for file in (path, mask):
        if file and file.is_file():  # no link to nowhere
            status = file.stat()
            text += f"{status.st_size} {status.st_mtime_ns} "
    return text


# ---------------------------------------------------------------------------------------------
# From names to tasks, classes and patients
# ---------------------------------------------------------------------------------------------

KNOWN_TASKS = {  # classes in the order in which they are reported
    "tumor": ("glioma", "meningioma", "notumor", "pituitary"),
    "stroke": ("normal", "stroke"),
    "alzheimer": ("non", "very_mild", "mild", "moderate"),
    "parkinson": ("normal", "parkinson"),
    "ms": ("no-lesion", "lesion"),
}
KNOWN_CLASSES = set().union(*KNOWN_TASKS.values())
TASK_IN_NAME = re.compile(r"tumor|stroke|alzheimer|parkinson|^ms$|sclerosis")
# What publishers append to a class (MildDemented), and their other names.
CLASS_ENDING = re.compile(r"_?(tumor|demented|dementia)$")
SPELLINGS = {"no_tumor": "notumor", "no_stroke": "normal", "verymild": "very_mild"}
SPELLINGS |= {"no_lesion": "no-lesion"}
PUBLISHED = {"train": "train", "training": "train", "test": "test", "testing": "test"}
PUBLISHED |= {"val": "val", "valid": "val", "validation": "val"}
PACKAGING = re.compile(r"(ses-\w+|anat|dwi|func|perf|data|dataset|images|augment.*)$", re.I)
PATIENT = re.compile(
    r"""(?<![a-z0-9])(?:
      patient[-_ ]?\(?\d+          # Patient-7, patient_007, Patient (12)
    | sub-[a-z]*\d[a-z0-9]*        # BIDS: sub-01, sub-control07
    | sub(?:ject)?[-_ ]?\d+        # sub01, subject-01
    | case[-_ ]?[a-z]?\d+          # case_h49
    | p\d+(?![a-z0-9])             # P012_3.png; a phantom's p0012
    | oas[12]_\d+                  # OASIS: OAS1_0028_MR1
    | \d{3}_s_\d{4}                # ADNI: 002_S_1002
    | tcga-\w{2}-\w{4}             # TCGA-02-0049
    | brats\d*(?:[-_][a-z]+)?[-_]\d+  # BraTS20_Training_001, BraTS-GLI-00001-000
    | \d{3,}(?=/)                  # a folder called 0001
    | [^/]+/\d+(?=\ \(\d+\)\.\w+$)  # Normal/58 (1).jpg: numbers begin anew in each class
    )""",
    re.IGNORECASE | re.VERBOSE,
)
MANY, SMALL = 10, 8  # more classes than this, with fewer images each, are patients' folders


def read_patient(path: str, pattern: re.Pattern | None) -> str:
    """The patient that a path names, '' where it names none.

    One id means one person everywhere below --data: joining two strangers costs a little data,
    cutting one person makes the score false.

    Args:
        pattern: asked first; its first capture group is the patient, compared as it is.

    >>> read_patient("tumor/glioma/Patient-07/3.png", None), read_patient("x/patient7.nii", None)
    ('patient7', 'patient7')
    """
    match = pattern.search(path) if pattern else None
    if match and match[1]:
        return match[1]
    match = PATIENT.search(path)
    if match:
        plain = re.sub(r"[-_ (]", "", match[0].lower())
        return re.sub(r"(?<!\d)0+(?=\d)", "", plain)
    volume = re.match(r".*\.nii(\.gz)?(?=/)", path, re.IGNORECASE)
    return volume[0] if volume else ""  # a volume is somebody's


def read_folders(path: str, pattern: re.Pattern | None) -> tuple[tuple[str, ...], str]:
    """The folders of a path that can name a task or a class, and the published split in it.

    >>> read_folders("tumor/Training/glioma/sub-01/1.png", None)
    (('tumor', 'glioma'), 'train')
    """
    match = pattern.search(path) if pattern else None
    own = (match[1], match[0].strip("/")) if match else ()  # a patient's folder by the pattern
    kept, published = [], ""
    for name in path.split("/")[:-1]:
        holds_many = VOLUME.search(name) or SHARD.search(name)  # such as train-00000-of-1.parquet
        word = re.split(r"[-.]", name)[0] if holds_many else name
        if word.lower() in PUBLISHED:
            published = PUBLISHED[word.lower()]
        elif not (holds_many or name in own or PACKAGING.match(name) or PATIENT.match(name + "/")):
            kept.append(name)
    return tuple(kept), published


def spell(name: str) -> str:
    """A class folder's name as the known tasks have it, or as it is.

    >>> spell("glioma_tumor"), spell("Very mild Dementia"), spell("my class")
    ('glioma', 'very_mild', 'my class')
    """
    plain = re.sub(r"[ _-]+", "_", name.strip().lower())
    for spelling in (plain, CLASS_ENDING.sub("", plain)):
        spelling = SPELLINGS.get(spelling, spelling)
        if spelling in KNOWN_CLASSES:
            return spelling
    return name


def class_depth(folders: tuple[str, ...], tree: dict[tuple[str, ...], set[str]]) -> int:
    """Which of an image's folders is its class: the last, or the one above it.

    It is the one above where that is a known class, or where unfamiliar folders stand below
    several unfamiliar ones, such as batches below classes.

    Args:
        tree: folder -> names of the folders in it.
    """
    last = len(folders) - 1
    if (
        last < 1
        or spell(folders[last]) in KNOWN_CLASSES
        or TASK_IN_NAME.search(folders[-2].lower())
    ):
        return last
    if spell(folders[-2]) in KNOWN_CLASSES:
        return last - 1
    outer = folders[:-2]
    inside = [tree[*outer, name] for name in tree[outer] if (*outer, name) in tree]
    familiar = any(spell(name) in KNOWN_CLASSES for name in set().union(*inside))
    called = any(TASK_IN_NAME.search(name.lower()) for name in (*outer, *tree[outer]))
    if familiar or called or all(names == inside[0] for names in inside):
        return last
    return last - 1


@dataclass
class Layout:
    """What the names of n images say: parallel arrays of texts, '' where they say nothing."""

    task: np.ndarray  # (n,)
    label: np.ndarray  # (n,) class
    published: np.ndarray  # (n,) train, val or test, as the publisher split them
    patient: np.ndarray  # (n,)


def read_layout(names: list[str], root_name: str, pattern: re.Pattern | None) -> Layout:
    """Read the names of images as tasks, classes, published splits and patients.

    Two or more folders side by side are the classes of a task; a single one is unlabelled.

    Args:
        names: below the data folder, with forward slashes.
        root_name: the data folder's own name, for a task that is the data folder itself.

    Raises:
        UserError: what stands where classes are expected looks like patients.
    """
    layout = Layout(*np.full((4, len(names)), "", object))
    tree, kept = defaultdict(set), []
    for row, name in enumerate(names):
        layout.patient[row] = read_patient(name, pattern)
        folders, layout.published[row] = read_folders(name, pattern)
        kept.append(folders)
        for depth, folder in enumerate(folders):
            tree[folders[:depth]].add(folder)
    sources = defaultdict(lambda: defaultdict(list))  # folder of the classes -> class -> rows
    for row, folders in enumerate(kept):
        if folders:
            depth = class_depth(folders, tree)
            sources[folders[:depth]][folders[depth]].append(row)
    taken = {}  # name of a task -> its classes
    # Most classes first: a known task's full set keeps the known name.
    for home, rows_of in sorted(sources.items(), key=lambda source: (-len(source[1]), source[0])):
        if len(rows_of) > MANY and statistics.median(map(len, rows_of.values())) < SMALL:
            raise UserError(
                f"{'/'.join((root_name, *home))} holds {len(rows_of)} folders of few images, such "
                f"as {min(rows_of)!r}, that look like patients, not classes: say which they are "
                "with --patient-pattern 'REGEX with (the patient)' or --labels table.csv"
            )
        classes = {spell(label) for label in rows_of}
        if len(classes) > 1:
            task = name_task(home, root_name, classes, taken)
            for label, rows in rows_of.items():
                layout.task[rows], layout.label[rows] = task, spell(label)
    return layout


def name_task(home: tuple[str, ...], root_name: str, classes: set[str], taken: dict) -> str:
    """A name for the task whose class folders stand in `home`: the known task's, or a folder's.

    Sources pool where name and classes are the same; else the next name is tried.

    Args:
        taken: name of a task -> its classes; added to.
    """
    folders = (root_name, *home) if not home or root_name.lower() in KNOWN_TASKS else home
    names = [task for task, known in KNOWN_TASKS.items() if classes == set(known)]
    for folder in reversed(folders):  # the innermost that is called after a known task
        match = TASK_IN_NAME.search(folder.lower())
        if match:
            names.append(match[0].replace("sclerosis", "ms"))
    names += [folders[0], folders[-1], "-".join((*folders, *sorted(classes)))]
    return next(name for name in names if taken.setdefault(name, classes) == classes)


def read_table(path: Path, names: list[str], root_name: str, layout: Layout) -> list[str]:
    """Let a table say what names cannot: columns path, label, perhaps task, patient, split.

    Explicit beats guessed: an image without a row has no label. A splits.csv of ours can be edited
    and given back.

    Args:
        layout: changed in place.

    Returns:
        Notices for the user.

    Raises:
        UserError: a column is missing, or a patient is in two splits.
    """
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        table = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        lines, columns = list(table), set(table.fieldnames or ())
    if not {"path", "label"} <= columns:
        raise UserError(f"{path} has the columns {sorted(columns)}; it needs path and label")
    row_of = {name: row for row, name in enumerate(names)}
    guessed = layout.task.copy()
    layout.task[:] = layout.label[:] = layout.published[:] = ""
    missing, split_of = [], {}
    for line in lines:
        row = row_of.get(line["path"].removeprefix("./"))
        if row is None:
            missing.append(line["path"])
            continue
        layout.task[row] = line.get("task") or guessed[row] or root_name
        layout.label[row] = line["label"]
        layout.published[row] = split = line.get("split") or ""
        layout.patient[row] = patient = line.get("patient") or layout.patient[row]
        if patient and split in ("train", "val", "test"):
            if split_of.setdefault(patient, split) != split:
                raise UserError(
                    f"{path}: patient {patient!r} is in {split_of[patient]} and {split}"
                )
    unlisted = [name for name, label in zip(names, layout.label, strict=True) if not label]
    unknown = columns - {"path", "label", "task", "patient", "split", "group", "pixel_hash"}
    notices = []
    for found, what in (
        (sorted(unknown), "columns are not used"),
        (missing, "rows have no image"),
        (unlisted, "images have no row, so no label"),
    ):
        if found:
            notices.append(f"{path}: {len(found)} {what}, the first is {found[0]!r}")
    return notices


NUMBERED = r"([^/]*\w)[-_ .]\(?\d+\)?\.\w+$"  # H12_3.png: who, then a number


def propose_pattern(names: list[str]) -> str:
    """A --patient-pattern for file names whose beginnings repeat (H12_3.png), '' if none do."""
    matches = [re.search(NUMBERED, name) for name in names]
    beginnings = Counter(match[1] for match in matches if match)
    repeated = [count for count in beginnings.values() if count > 1]
    return NUMBERED if len(repeated) > MANY and sum(repeated) > 0.8 * len(names) else ""


# ---------------------------------------------------------------------------------------------
# Groups: what must never be cut
# ---------------------------------------------------------------------------------------------


def exact_cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines of mean-free thumbnails (k, 32, 32) uint8, pair by pair: (k,) float64.

    Sums of whole numbers below 2^53 are exact in any order, so every machine splits alike. A
    thumbnail of one colour has the cosine 0 with everything.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    a = a * THUMBNAIL**2 - a.sum(axis=(1, 2), keepdims=True)  # 1024 times what it is above its mean
    b = b * THUMBNAIL**2 - b.sum(axis=(1, 2), keepdims=True)
    squares = (a * a).sum(axis=(1, 2)) * (b * b).sum(axis=(1, 2))
    return (a * b).sum(axis=(1, 2)) / np.sqrt(np.maximum(squares, 1))


def near_duplicate_pairs(thumbnails: np.ndarray, threshold: float = NEAR_DUPLICATE) -> np.ndarray:
    """Pairs of images that show the same thing, straight or mirrored left to right.

    A thumbnail is the sum of an even part e (equal to its own mirror) and an odd part o (its
    mirror's negative), which are orthogonal. So cos(t, t') = e.e' + o.o', the cosine to the mirror
    is e.e' - o.o', and the larger of the two e.e' + |o.o'|. What passes in float32 is decided again
    by `exact_cosines`.

    Args:
        thumbnails: (n, 32, 32) uint8.
        threshold: in [0, 1]; lower joins more.

    Returns:
        (k, 2) int64 rows i < j, each pair once.

    Raises:
        ValueError: the thumbnails are not (n, 32, 32).
    """
    if thumbnails.shape[1:] != (THUMBNAIL, THUMBNAIL):
        raise ValueError(f"thumbnails must be (n, 32, 32), got {thumbnails.shape}")
    x = torch.from_numpy(thumbnails).float()
    x = F.normalize((x - x.mean(dim=(1, 2), keepdim=True)).flatten(1), dim=1).view(x.shape)
    left, right = x[:, :, : THUMBNAIL // 2], x.flip(2)[:, :, : THUMBNAIL // 2]
    # Half of each part tells all of it: the other half repeats it, up to the sign.
    even, odd = ((left + right) / 2**0.5).flatten(1), ((left - right) / 2**0.5).flatten(1)
    pairs = [np.zeros((0, 2), np.int64)]
    for start in range(0, len(x), BLOCK):
        cosines = (odd[start : start + BLOCK] @ odd[start:].T).abs_()  # (BLOCK, n - start)
        cosines += even[start : start + BLOCK] @ even[start:].T
        near = (cosines > threshold - 1e-4).nonzero().numpy() + start
        near = near[near[:, 0] < near[:, 1]]
        for some in np.array_split(near, len(near) // 4096 + 1):
            a, b = thumbnails[some[:, 0]], thumbnails[some[:, 1]]
            larger = np.maximum(exact_cosines(a, b), exact_cosines(a, b[:, :, ::-1]))
            pairs.append(some[larger >= threshold])
    return np.concatenate(pairs)


def connected(n: int, pairs: Iterable[tuple[int, int]]) -> np.ndarray:
    """Number the groups of n things that pairs join, by single linkage (union-find).

    Returns:
        (n,) int64 group numbers 0, 1, ... in order of first appearance.

    >>> connected(4, [(3, 1)]).tolist()
    [0, 1, 2, 1]
    """
    parent = list(range(n))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, j in pairs:
        i, j = root(i), root(j)
        parent[max(i, j)] = min(i, j)
    return np.unique([root(i) for i in range(n)], return_inverse=True)[1]


def near_duplicate_groups(thumbnails: np.ndarray, threshold: float = NEAR_DUPLICATE) -> np.ndarray:
    """Group near-duplicate images (N, 32, 32) uint8, mirrors included: (N,) int64 numbers."""
    return connected(len(thumbnails), near_duplicate_pairs(thumbnails, threshold).tolist())


def neighbours_in_series(
    images: Images, layout: Layout, groups: np.ndarray
) -> tuple[list[list[int]], list[str]]:
    """Consecutive files of a numbered series that are slices of one brain.

    Some publishers number the files patient by patient. In a series (one folder, one prefix, at
    least 50 files, patients unknown) whose consecutive files resemble each other (cosine >= 0.90)
    ten times as often as random ones, those that do are joined. Where all brains lie on one atlas
    random files resemble each other as well, and nothing is joined. Near-duplicates, which are
    joined anyway, count on neither side.

    Args:
        groups: (n,) int64, of near-duplicates.

    Returns:
        (pairs of rows, a notice for each series that the rule holds for)
    """
    series = defaultdict(list)  # folder and prefix -> (number, row)
    for row, name in enumerate(images.names):
        match = re.match(r"(.*?)(\d+)\D*\.\w+$", name)
        if match and layout.label[row] and not layout.patient[row]:
            series[match[1]].append((int(match[2]), row))
    pairs, notices = [], []
    for prefix, numbered in sorted(series.items()):
        if len(numbered) < LEAST_SERIES:
            continue
        rows = np.array([row for _, row in sorted(numbered)])
        drawn = np.random.default_rng(0).choice(rows, (RANDOM_PAIRS, 2))
        shares, alike = [], []
        for both in (np.column_stack([rows[:-1], rows[1:]]), drawn):
            both = both[groups[both[:, 0]] != groups[both[:, 1]]]
            a, b = images.thumbnails[both[:, 0]], images.thumbnails[both[:, 1]]
            alike.append(both[exact_cosines(a, b) >= NEIGHBOUR])
            shares.append(len(alike[-1]) / max(1, len(both)))
        if len(alike[0]) and shares[0] >= NEIGHBOUR_RATIO * shares[1]:
            pairs.extend(alike[0].tolist())
            notices.append(
                f"{prefix}*: files are numbered patient by patient (consecutive ones are alike in "
                f"{shares[0]:.1%}, random ones in {shares[1]:.2%}): {len(alike[0])} pairs joined"
            )
    return pairs, notices


COPY_WORD = re.compile(
    r"(?<![a-z0-9])(?:aug|rot|flip|mirror|copy|nois|crop|bright|blur|shift)[a-z]*\d*(?![a-z0-9])"
)


def find_originals(names: list[str], labels: np.ndarray) -> list[tuple[int, int]]:
    """Augmented copies by name: (row of a copy, row of an image it was made from).

    A copy's stem has a word such as aug, rot or flip and, beside it, the original's whole stem:
    aug_Y1_0_4528 and Y1, x_rot90 and x. An original of the same class goes before others. (A
    rotated copy cannot be found by a cosine.)
    """
    rows_of, copies = defaultdict(list), []
    for row, name in enumerate(names):
        stem = Path(name).stem.lower()
        if COPY_WORD.search(stem):
            copies.append((row, stem))
        else:
            rows_of[" ".join(re.findall(r"[a-z0-9]+", stem))].append(row)
    found = []
    for row, stem in copies:
        for piece in COPY_WORD.split(stem):
            words = re.findall(r"[a-z0-9]+", piece)
            while words and " ".join(words) not in rows_of:
                words.pop()  # numbers that the augmentation has appended
            originals = rows_of[" ".join(words)] if words else []
            same_class = [original for original in originals if labels[original] == labels[row]]
            for original in same_class or originals:
                found.append((row, original))
    return found


@dataclass(frozen=True)
class Groups:
    """What belongs together among n images, and how that is known."""

    numbers: np.ndarray  # (n,) int64
    duplicates: np.ndarray  # (k, 2) int64, rows of the near-duplicates that count
    copies: np.ndarray  # rows of augmented copies
    notices: list[str]


def group_images(images: Images, layout: Layout) -> Groups:
    """Join equal pixels, patients, near-duplicates, copies, and neighbours in a series.

    Slices of two known patients may look alike on one atlas: between them only equal pixels count.
    """
    file = images.folder / "near_duplicates.npy"
    if not file.exists():
        with write_atomically(file) as out:
            np.save(out, near_duplicate_pairs(images.thumbnails))
    pairs = np.load(file)
    patient_a, patient_b = layout.patient[pairs[:, 0]], layout.patient[pairs[:, 1]]
    both_known = (patient_a != "") & (patient_b != "")
    equal = (images.hashes[pairs[:, 0]] == images.hashes[pairs[:, 1]]).all(axis=1)
    duplicates = pairs[~both_known | equal]
    joined, first = duplicates.tolist(), {}
    for row, patient in enumerate(layout.patient):
        if patient:
            joined.append((first.setdefault(patient, row), row))
    originals = find_originals(images.names, layout.label)
    joined += originals
    neighbours, notices = neighbours_in_series(images, layout, connected(len(layout.label), joined))
    numbers = connected(len(layout.label), joined + neighbours)
    return Groups(numbers, duplicates, np.array([row for row, _ in originals]), notices)


# ---------------------------------------------------------------------------------------------
# Splits: which images train, choose and test; who may be trained on
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One classification task: parallel arrays over its m readable images, and their split."""

    name: str
    classes: tuple[str, ...]
    rows: np.ndarray  # (m,) int64, rows of Images
    labels: np.ndarray  # (m,) int64 in [0, K)
    groups: np.ndarray  # (m,) int64, numbers of the whole folder's groups
    published: np.ndarray  # (m,) str, the publisher's train, val, test, or ''
    split: np.ndarray  # (m,) str: train, val, test or dropped
    notes: dict  # how the split was made, and what was dropped

    def part(self, name: str) -> np.ndarray:
        """Where the images of one split stand among those of the task: (k,) int64."""
        return np.flatnonzero(self.split == name)


def allot(groups: int, test: float, val: float) -> tuple[int, int]:
    """How many of a class's groups go to test and to val; the rest, at least one, to train.

    >>> allot(1, 0.15, 0.15), allot(2, 0.15, 0.15), allot(3, 0.15, 0.15), allot(40, 0.15, 0.15)
    ((0, 0), (1, 0), (1, 1), (6, 6))
    """
    n_test = max(1, int(groups * test + 0.5)) if test and groups > 1 else 0
    n_val = max(1, int(groups * val + 0.5)) if val and groups > 1 + n_test else 0
    return n_test, n_val


def split_by_group(
    labels: np.ndarray,
    groups: np.ndarray,
    published: np.ndarray,
    keys: list[bytes],
    dropped: np.ndarray,
) -> np.ndarray:
    """Give each image to train, val or test such that no group stands in two of them.

    A publisher's test (and val) images stay what they are, and the rest of their groups is
    dropped. What the publisher did not set aside is taken from his training images: 15 % of the
    groups for val, and for test. Images without a published split are split 70/15/15.

    Args:
        labels, groups: (m,) int64.
        published: (m,) str, the publisher's train, val, test or ''.
        keys: m hashes of the images; they alone decide the order in which groups are dealt.
        dropped: (m,) bool, True = left out beforehand.

    Returns:
        (m,) str: train, val, test or dropped.
    """
    split = np.where(dropped, "dropped", "train").astype("U7")
    for part in ("test", "val"):
        own = (published == part) & (split == "train")
        split[np.isin(groups, groups[own]) & (split == "train")] = "dropped"
        split[own] = part
    free = np.flatnonzero(split == "train")
    smallest, labels_in, from_publisher = {}, defaultdict(Counter), set()
    for i in free:
        group = groups[i]
        smallest[group] = min(keys[i], smallest.get(group, keys[i]))
        labels_in[group][labels[i]] += 1
        if published[i] == "train":
            from_publisher.add(group)
    # Groups are dealt out class by class, in an order that only their pixels decide. A group of
    # several labels counts with its commonest, the first of them where two are.
    queues = defaultdict(list)
    for group in sorted(smallest, key=lambda g: hashlib.sha256(SPLIT_SEED + smallest[g]).digest()):
        label = max(sorted(labels_in[group]), key=labels_in[group].get)
        queues[label, group in from_publisher].append(group)
    split_of = {}
    for (_, is_published), queue in queues.items():
        set_aside = set(published[~dropped]) if is_published else set()
        shares = [0.0 if part in set_aside else HELD_OUT for part in ("test", "val")]
        n_test, n_val = allot(len(queue), *shares)
        split_of.update(dict.fromkeys(queue[:n_test], "test"))
        split_of.update(dict.fromkeys(queue[n_test : n_test + n_val], "val"))
    for i in free:
        split[i] = split_of.get(groups[i], "train")
    return split


def make_task(name: str, images: Images, layout: Layout, groups: Groups, resplit: bool) -> Task:
    """Gather the images of one task, and split them (`split_by_group`).

    Near-duplicates of two labels contradict each other: nobody can say which is right, so both are
    dropped. Copies never count as test images of their own.

    Args:
        resplit: pool the published splits, and split anew.
    """
    of_task = layout.task == name
    found = set(layout.label[of_task])
    known = [label for label in KNOWN_TASKS.get(name, ()) if label in found]
    classes = (*known, *sorted(found - set(known)))
    of_task[list(images.unreadable)] = False
    rows = np.flatnonzero(of_task)
    labels = np.array([classes.index(label) for label in layout.label[rows]], np.int64)
    published = layout.published[rows].astype("U7")
    if resplit or not np.isin(published, ("val", "test")).any():
        published[published != "dropped"] = ""  # a training part alone is no split
    a, b = groups.duplicates[:, 0], groups.duplicates[:, 1]
    contradict = of_task[a] & of_task[b] & (layout.label[a] != layout.label[b])
    contradict &= (layout.patient[a] == "") | (layout.patient[a] != layout.patient[b])
    clash = np.isin(rows, groups.duplicates[contradict])
    keys = [images.hashes[row].tobytes().hex().encode() for row in rows]
    dropped = clash | (published == "dropped")
    split = split_by_group(labels, groups.numbers[rows], published, keys, dropped)
    copies = np.isin(rows, groups.copies) & np.isin(split, ("val", "test"))
    split[copies] = "dropped"
    notes = {
        "rule": "as published, cut by group" if (published != "").any() else "70/15/15 by group",
        "groups": len(np.unique(groups.numbers[rows])),
        "largest_group": int(np.bincount(groups.numbers[rows]).max(initial=0)),
        "dropped_for_two_labels": int(clash.sum()),
        "dropped_copies": int(copies.sum()),
        "dropped_with_test_or_val": int((split == "dropped").sum() - (dropped | copies).sum()),
    }
    return Task(name, classes, rows, labels, groups.numbers[rows], published, split, notes)


def check_split(task: Task) -> None:
    """See that every class has images to train on and others to test with.

    Raises:
        UserError: one has not.
    """
    for label, name in enumerate(task.classes):
        for part in ("train", "test"):
            if not (task.labels[task.part(part)] == label).any():
                n = len(np.unique(task.groups[task.labels == label]))
                fix = "add other patients' images, or take the class out"
                if (task.published != "").any():
                    fix = "where published splits share patients, --resplit deals them out anew"
                raise UserError(
                    f"class {name!r} of task {task.name} has {n} group(s) and none for {part}; "
                    f"a patient is never in train and test: {fix}"
                )


@dataclass(frozen=True)
class Study:
    """A data folder, read: its images, which of them belong together, its tasks and splits."""

    root: Path | None  # None = phantoms
    images: Images
    patients: np.ndarray  # (n,) str, '' = unknown
    groups: np.ndarray  # (n,) int64
    tasks: dict[str, Task]
    notices: list[str]  # for the user


def left_out(study: Study) -> np.ndarray:
    """Why pretraining leaves an image out: (n,) str, '' for those that it may see.

    Every image stays out whose group is in val or test of any task, so that an encoder has never
    seen, not even without its label, the patient on whom it is later tested.
    """
    why = np.full(len(study.groups), "", object)
    for task in study.tasks.values():
        held = task.groups[np.isin(task.split, ("val", "test"))]
        why[np.isin(study.groups, held)] = "held out"
    for task in study.tasks.values():
        why[task.rows[task.part("dropped")]] = "dropped"
    why[list(study.images.unreadable)] = "unreadable"
    return why


def pretraining_rows(study: Study) -> np.ndarray:
    """(k,) int64: the images that pretraining may see (`left_out`)."""
    return np.flatnonzero(left_out(study) == "")


def was_seen(study: Study, seen: np.ndarray) -> np.ndarray:
    """(n,) bool: images whose group has one that somebody has trained on, found by its pixels.

    Args:
        seen: (k, 16) uint8 hashes, as encoder.pt and classifier.pt remember them.
    """
    known = set(map(bytes, np.ascontiguousarray(seen)))
    same_pixels = np.array([bytes(digest) in known for digest in study.images.hashes])
    return np.isin(study.groups, study.groups[same_pixels])


def refuse_leak(study: Study, task: Task, seen: np.ndarray) -> None:
    """See that the encoder was not pretrained on test images, nor on others of their groups.

    Raises:
        UserError: it was.
    """
    rows = task.rows[task.part("test")]
    leaked = rows[was_seen(study, seen)[rows]]
    if len(leaked):
        raise UserError(
            f"the encoder was pretrained on {len(leaked)} of the {len(rows)} test images of "
            f"{task.name}, or on others of their groups, such as "
            f"{study.images.names[leaked[0]]!r}; pretrain with the same --data, "
            "--patient-pattern, --labels and --resplit"
        )


# ---------------------------------------------------------------------------------------------
# Phantoms: brain slices drawn by code, so that everything runs, and is tested, without any data
# ---------------------------------------------------------------------------------------------

PHANTOM_SIZE = 128
PHANTOM_PATIENTS, PHANTOM_SLICES = 64, 3  # per class, per patient

# Gray values of (scalp, skull, fluid, gray matter, white matter): contrast-enhanced T1; CT, where
# bone is white and the brain nearly flat; T1; a nigra-sensitive sequence; FLAIR, fluid nulled.
PHANTOM_TISSUES = {
    "tumor": (0.75, 0.08, 0.14, 0.42, 0.58),
    "stroke": (0.35, 0.95, 0.16, 0.47, 0.41),
    "alzheimer": (0.75, 0.08, 0.14, 0.45, 0.66),
    "parkinson": (0.60, 0.08, 0.20, 0.50, 0.38),
    "ms": (0.60, 0.10, 0.12, 0.50, 0.40),
}
# A disease's lesions: at most how many, how far from the middle, their radius (both in half lengths
# of the head), and how much brighter than white matter they are.
PHANTOM_LESIONS = {
    "glioma": (1, (0.38, 0.52), (0.13, 0.21), 0.30),
    "meningioma": (1, (0.74, 0.78), (0.11, 0.19), 0.28),  # on the inside of the skull
    "pituitary": (1, (0.00, 0.12), (0.07, 0.13), 0.24),
    "stroke": (1, (0.45, 0.60), (0.20, 0.32), -0.20),
    "parkinson": (2, (0.10, 0.16), (0.05, 0.08), -0.30),  # the nigra loses its brightness
    "lesion": (7, (0.16, 0.42), (0.025, 0.06), 0.35),  # multiple sclerosis
}


def phantom_names() -> list[str]:
    """The names of all phantoms, such as tumor/glioma/p0012/3: task, class, patient, slice."""
    names, patient = [], 0
    for task, classes in KNOWN_TASKS.items():
        for label in classes:
            for _ in range(PHANTOM_PATIENTS):
                for slice_ in range(PHANTOM_SLICES):
                    names.append(f"{task}/{label}/p{patient:04d}/{slice_}")
                patient += 1
    return sorted(names)


class Canvas:
    """A slice being drawn: the gray values so far, the lesion, and where each pixel lies.

    u runs to the viewer's right, v down, r from 0 in the middle of the head to 1 on the scalp;
    each is (128, 128).
    """

    def __init__(self, u: np.ndarray, v: np.ndarray) -> None:
        self.u, self.v, self.r = u, v, np.hypot(u, v)
        self.gray, self.lesion = np.zeros_like(u), np.zeros(u.shape, bool)

    def ellipse(self, cu: float, cv: float, ru: float, rv: float, turn: float) -> np.ndarray:
        """Signed depth inside an ellipse: positive inside, 0 on the rim, in units of r."""
        turned = ((self.u - cu) + 1j * (self.v - cv)) * np.exp(-1j * turn)
        return (1 - np.hypot(turned.real / ru, turned.imag / rv)) * min(ru, rv)

    def paint(self, depth: np.ndarray, value: float, soft: float = 0.012, ill: bool = False):
        """Lay `value` where `depth` > 0, with a rim `soft` wide; count it as diseased or not."""
        share = np.clip(0.5 + depth / (4 * soft), 0, 1)
        self.gray += share * (value - self.gray)
        if ill:
            self.lesion |= share > 0.5


def draw_phantom(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw the phantom called `name`; the same name always gives the same pixels.

    Head shape, folding, contrast, gain and the lesion belong to the patient; level in the head,
    pose and noise to the slice. The image is axial, front up.

    Returns:
        (image (128, 128) uint8, lesion (128, 128) bool, True = diseased). In Alzheimer's disease
        nothing is added; the mask is what changes size, the ventricles.
    """
    task, label, patient, slice_ = name.split("/")
    person = np.random.default_rng(zlib.crc32(patient.encode()))
    moment = np.random.default_rng(zlib.crc32(name.encode()))
    level = (int(slice_) + 0.5) / PHANTOM_SLICES * 2 - 1 + moment.normal(0, 0.08)  # -1 low, 1 high
    stage = KNOWN_TASKS[task].index(label) if task == "alzheimer" else 0
    atrophy = max(0.0, person.normal(stage / 3, 0.12))  # 0 in health, 1 severe
    fat, bone, fluid, gray_matter, white_matter = person.normal(1, 0.08, 5) * PHANTOM_TISSUES[task]

    y, x = np.mgrid[-1 : 1 : PHANTOM_SIZE * 1j, -1 : 1 : PHANTOM_SIZE * 1j]
    turn = person.normal(0, 0.10) + moment.normal(0, 0.02)  # radians
    size = person.uniform(0.72, 0.94) * (1 - 0.05 * level**2)
    moved = (x - person.normal(0, 0.04)) + 1j * (y - person.normal(0, 0.04))
    moved = moved * np.exp(-1j * turn) / size
    canvas = Canvas(
        moved.real / person.uniform(0.74, 0.88), moved.imag / person.uniform(0.92, 1.04)
    )
    r, angle = canvas.r, np.arctan2(canvas.v, canvas.u)
    # Scalp, skull, fluid, folded cortex, white matter; atrophy thins the cortex.
    rim, cortex = 0.86 - 0.03 * atrophy, 0.13 - 0.04 * atrophy
    for edge, value in ((1.0, fat), (0.95, bone), (0.89, fluid), (rim, gray_matter)):
        canvas.paint(edge - r, value)
    waves, phase = person.integers(17, 24), person.uniform(0, 2 * np.pi)
    folds = np.sin(waves * (angle + 0.12 * np.sin(14 * r)) + phase + 3 * np.sin(3 * angle))
    canvas.paint(rim - cortex * (1 - 0.35 * folds) - r, white_matter, soft=0.02)
    wide = person.uniform(0.75, 1.25) * (1 + 0.55 * atrophy) * (1 - 0.25 * level)
    for side in (-1, 1):  # the ventricles' front and back horns
        for cv, lean in ((-0.16, -0.25), (0.20, 0.45)):
            horn = canvas.ellipse(side * 0.10, cv, 0.05 * wide, 0.17 * wide**0.5, side * lean)
            canvas.paint(horn, fluid, ill=stage > 0)
    if label in PHANTOM_LESIONS:
        draw_lesions(canvas, person, level, label, white_matter)
    # The scanner: gain that drifts across the head, contrast, and Rician noise, as MRI has it.
    gain = 1 + person.normal(0, 0.12) * x + person.normal(0, 0.12) * y
    gray = np.clip(canvas.gray * gain, 0, 1.2) ** person.uniform(0.8, 1.25)
    noise = moment.normal(0, person.uniform(0.015, 0.05), (2, *gray.shape))
    gray = np.hypot(gray * person.uniform(0.8, 1.05) + noise[0], noise[1])
    return (np.clip(gray, 0, 1) * 255).astype(np.uint8), canvas.lesion


def draw_lesions(
    canvas: Canvas, person: np.random.Generator, level: float, label: str, white_matter: float
) -> None:
    """What a disease adds: a tumour, an infarct, plaques of multiple sclerosis."""
    most, distances, radii, bright = PHANTOM_LESIONS[label]
    near = math.sqrt(max(0.3, 1 - (0.5 * level) ** 2))  # widest in the lesion's middle slice
    value = white_matter + bright * person.uniform(0.6, 1.0)
    for _ in range(person.integers((most + 1) // 2, most + 1)):
        where, far = person.uniform(-1.3, 1.3), person.uniform(*distances)
        cu, cv = person.choice([-1, 1]) * far * math.cos(where), far * math.sin(where)
        radius = person.uniform(*radii) * near
        mass = canvas.ellipse(cu, cv, radius, radius * person.uniform(1, 1.4), where)
        if label == "glioma":  # the brain around it is swollen
            swollen = np.minimum(mass + 0.5 * radius, 0.885 - canvas.r)
            canvas.paint(swollen, 0.75 * white_matter, soft=0.05, ill=True)
        canvas.paint(np.minimum(mass, 0.885 - canvas.r), value, soft=0.02, ill=True)


def phantom_images(name: str) -> Iterator[tuple[str, np.ndarray]]:
    """A phantom, as `images_in` yields a file's images."""
    yield "", draw_phantom(name)[0]


# ---------------------------------------------------------------------------------------------
# The whole folder
# ---------------------------------------------------------------------------------------------


def images_below(root: Path, name: str) -> Iterator[tuple[str, np.ndarray | Exception]]:
    """The images of the file `name` below `root`, as `images_in` yields them."""
    return images_in(root / name)


def open_folder(root: Path, labels: Path | None) -> tuple[dict[str, str], list[str]]:
    """The files of --data ({name: stamp}), and notices on what lies there unread.

    Raises:
        UserError: no such folder, no images in it, or shards and no pyarrow.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; --data takes the folder that holds the scans")
    stamps, others = open_root(root)
    if not stamps:
        raise UserError(
            f"no images below {root} ({others.total()} other files); expected "
            f"{root}/<task>/<class>/*.png, or loose images for pretraining alone"
        )
    if any(map(SHARD.search, stamps)) and not importlib.util.find_spec("pyarrow"):
        raise UserError(f"{root} holds parquet shards; to read them: pip install pyarrow")
    notices = []
    if others[".dcm"]:
        notices.append(f"{others['.dcm']} DICOM files are not read; dcm2niix makes volumes of them")
    if not labels and others[".csv"] + others[".tsv"]:
        notices.append("tables (.csv, .tsv) lie there unread; --labels FILE reads one")
    return stamps, notices


def load(
    root: Path | None,
    image_size: int,
    cache: Path,
    progress: Callable[..., Iterable] = lambda items, **_: items,
    pattern: re.Pattern | None = None,
    labels: Path | None = None,
    resplit: bool = False,
) -> Study:
    """Read a data folder, or the phantoms: what is there, what belongs together, how it splits.

    Args:
        root: the folder; None for the phantoms.
        image_size: S > 0, pixels a side of the cached squares; no split depends on it.
        cache: folder of the decoded images.
        progress: as in `load_images`.
        pattern: as in `read_patient`.
        labels: as in `read_table`.
        resplit: pool the published splits, and split anew.

    Raises:
        UserError: as `open_folder`, `read_layout` and `read_table`, or the pattern finds nobody.
    """
    if root is None:
        read, stamps, notices = phantom_images, dict.fromkeys(phantom_names(), ""), []
    else:
        read, (stamps, notices) = partial(images_below, root), open_folder(root, labels)
    images = load_images(read, stamps, image_size, cache, progress)
    names, root_name = images.names, root.resolve().name if root else ""
    if pattern and not any(map(pattern.search, names)):
        where = f"in none of {len(names)} names, such as {names[0]!r}"
        raise UserError(f"--patient-pattern {pattern.pattern!r} finds a patient {where}")
    layout = read_layout(names, root_name, pattern)
    if labels:
        notices += read_table(labels, names, root_name, layout)
    groups = group_images(images, layout)
    notices += groups.notices
    if not (layout.patient != "").any() and propose_pattern(names):
        notices.append(f"names repeat; are they patients? --patient-pattern '{NUMBERED}'")
    tasks = {}
    for name in sorted(set(layout.task) - {""}):
        tasks[name] = make_task(name, images, layout, groups, resplit)
    return Study(root, images, layout.patient, groups.numbers, tasks, notices)


def load_files(
    paths: Iterable[Path], image_size: int, cache: Path, progress: Callable[..., Iterable]
) -> Images:
    """Read files and folders that were typed for their images alone: no tasks, no groups.

    Raises:
        UserError: one is not there, or a folder has no images.
    """
    stamps = {}
    for path in paths:
        if path.is_dir():
            for name, text in open_folder(path, None)[0].items():
                stamps[(path / name).as_posix()] = text
        elif path.is_file():
            stamps[path.as_posix()] = stamp(path)
        else:
            raise UserError(f"{path} is not there; give images, volumes, shards or folders")
    return load_images(partial(images_below, Path()), stamps, image_size, cache, progress)


def lesion_of(root: Path | None, name: str, size: int) -> np.ndarray:
    """Where an image is known to be diseased: on phantoms, and where a mask lies by the volume.

    Args:
        root: the data folder; None for the phantoms.
        size: S, of the square that the image became.

    Returns:
        (S, S) bool, True = diseased; all False where nothing is known.
    """
    there = np.zeros((size, size), np.uint8)
    if root is None:
        there = draw_phantom(name)[1] * np.uint8(255)
    else:
        volume = re.match(r"(.*\.nii(\.gz)?)/", name, re.IGNORECASE)
        mask = lesion_mask(root / volume[1]) if volume else None
        if mask:
            lesions, affine = read_mask(mask)
            there = axial((lesions[..., int(name.split("/")[-1])] > 0.5) * np.uint8(255), affine)
    return fit_square(there, size) > 127


read_mask = lru_cache(maxsize=1)(read_nifti)  # a volume's slices ask for its mask one by one
