"""Turn a folder of brain scans into images, groups and splits: no patient is in two splits.

Three ideas carry this file. (1) An image is decoded once, to a small gray square of bytes;
everything later reads that array. (2) Images that belong together (one patient, or near-duplicates)
form a *group*, and a group is never cut: if one slice of a brain is in test, no other slice of it
is in training. Most published scores on these data sets come from ignoring this. (3) A folder is
read by its names alone: what names a publisher's split, a patient or packaging is taken out of a
path, and what is left is .../<task>/<class>.

    near-duplicates:  cos(t, t') >= 0.98  or  cos(t, mirror(t')) >= 0.98,
                      t = the image squashed to 32x32, its mean subtracted
    one group:        equal pixels · one patient · near-duplicates, unless both patients are known ·
                      neighbours in a numbered series · a copy (aug_x_3) and its original (x)

Shape letters: N slices in a batch (so 2N views) · C channels · H, W pixels · E encoder features ·
D projection dimensions · K classes. Here also n images in all, m of one task, S = image size.

Departures from common practice, each measured in docs/results.md:
- A publisher's training image whose group has a test image is dropped: most of the 3,187 images
  that the tumor set loses of its 7,023. Kept, they make the score false.
- File order tells who belongs together where files are numbered patient by patient (tumor): a probe
  scored .911 on val and .828 on test without this rule, .853 and .819 with it.
- Near-duplicates that carry two labels are dropped: nobody can say which label is right.

In this order: reading one image, a volume, a shard; the cache; names become tasks, classes and
patients; groups; splits, and who may be trained on; phantoms; the whole folder.

Next: simclr.py
"""

import csv
import fcntl
import gzip
import hashlib
import io
import json
import os
import re
import struct
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

# What decides who belongs to whom: each of these matters (docs/results.md).
THUMBNAIL = 32  # pixels a side: enough to recognise a brain, too few to see the noise
NEAR_DUPLICATE = 0.98  # finds exactly 200 groups, its people, in the Kaggle Alzheimer set
NEIGHBOUR = 0.90  # cosine of two consecutive files that may be slices of one brain
NEIGHBOUR_RATIO = 10  # tumor series reach 46 and more, or 6 at most; brains on one atlas 2 to 4
LEAST_SERIES = 50  # files of a series, for its ratio to mean anything
RANDOM_PAIRS = 20_000  # of a series, to compare its consecutive files with
SPLIT_SEED = b"simclr-brain-1"  # a constant: --seed never moves an image to another split
HELD_OUT = 0.15  # share of the groups that go to val, and to test

# Limits before anything is decoded; no real scan comes near them. (Pillow has one for pixels.)
MAX_BYTES = 1 << 30  # of a file that is no shard, and before the voxels of a volume
MAX_VOXELS = 1 << 27  # 512^3: half a GiB of float32

# How a volume becomes slices; not varied.
WINDOW = (1, 99.9)  # percentiles of a volume that become black and white; half of it is air
NEAR_EMPTY = 0.1  # a slice with less in it than this share of the fullest slice's is left out
LESION_AREA = 7.0  # mm^2 in a slice: a disc of 3 mm, the least that counts as a lesion of MS

# These weigh speed alone.
CACHE_VERSION = 15  # raise it when reading or the phantoms change: old caches are left alone
FEW = 64  # so few files are decoded before other processes have started
BLOCK = 256  # thumbnails compared with all others at once: 0.3 GB for 100,000


class UserError(Exception):
    """Something the user can fix; main.py prints it as one line and exits with status 2.

    Its text says what was found, what was expected, and what to type.
    """


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


@contextmanager
def write_atomically(path: Path) -> Iterator[io.BufferedRandom]:
    """Open a file for writing such that a reader sees the old file or the new one, never half.

    Args:
        path: where the file shall stand; missing folders are made.

    Yields:
        A binary file beside `path`; it is flushed to disk and renamed at the end, and removed
        after an exception.

    Raises:
        OSError: it cannot be written; what stood there before is as it was.
    """
    # In the same folder, because a rename cannot cross from one disk to another.
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

    Two runs that write into one folder would spoil each other's files. Nobody waits: a second
    command that stands still without a word looks broken.

    Args:
        folder: what to hold; its files may still be read by all.

    Raises:
        UserError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"another run is writing into {folder}; wait for its end") from None
    finally:
        os.close(held)


# ---------------------------------------------------------------------------------------------
# Reading one image, a volume, a shard
# ---------------------------------------------------------------------------------------------

SCAN = re.compile(r"\.(png|jpe?g|bmp|gif|tiff?|webp|nii|nii\.gz|parquet)$", re.IGNORECASE)
VOLUME = re.compile(r"(?is).*\.nii(\.gz)?(?=/|$)")  # in a path, the volume's part of it
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")  # Pillow knows more; some start programs
# Files and folders that mark something, and show nothing.
MASK = re.compile(r"(?i)(?<![a-z])(masks?|(lesion|[ad])?seg(mentations?)?|roi|labels?)(?![a-z])")


def to_bytes(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Scale gray values of any type to bytes, so that the window's ends are 0 and 255.

    Args:
        values: any shape, float; what is no number becomes black.
        window: two percentiles in [0, 100]; what lies beyond them is cut off.

    Returns:
        uint8 of the same shape.

    Raises:
        ValueError: none of the values is a number.

    >>> to_bytes(np.array([-1.0, 0.0, 1.0, np.nan]), (0, 100)).tolist()
    [0, 128, 255, 0]
    """
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("no pixel of it has a number")
    low, high = np.percentile(values[finite], window).tolist()
    share = (np.where(finite, values, low) - low) / max(high - low, 1e-12)
    return (share.clip(0, 1) * 255).round().astype(np.uint8)


def read_gray(source: Path | io.BytesIO) -> np.ndarray:
    """Decode one image, of any mode Pillow reads, as gray bytes at its own size.

    The contents, not the ending, say how. Colour becomes luma (ITU-R 601), transparency becomes
    black, and 16-bit or floating-point pixels are scaled by their own range (clipping would leave
    white). An animation gives its first frame.

    Returns:
        (H, W) uint8.

    Raises:
        OSError, ValueError, SyntaxError, Image.DecompressionBombError: Pillow cannot read it, or it
            has more than 179 million pixels.
    """
    with Image.open(source, formats=FORMATS) as image:
        # A colour JPEG stores luma apart: asking for it alone is twice as fast.
        image.draft("L", image.size)
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):
            return to_bytes(np.asarray(image, dtype=np.float64), (0, 100))
        if "A" in image.mode or "transparency" in image.info:
            image = image.convert("RGBA")
            black = Image.new("RGBA", image.size, (0, 0, 0, 255))
            image = Image.alpha_composite(black, image)
        return np.asarray(image.convert("L"))


NIFTI_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8"}  # a header's codes
NIFTI_TYPES |= {256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}


def read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a NIfTI-1 volume, .nii or .nii.gz, and turn it so that its axes are a patient's.

    A file is a header of 348 bytes and, from `offset` on, the voxels, the first axis fastest. Of a
    file with four axes the first volume is read. (The header's fields: nifti.nimh.nih.gov/nifti-1.)

    Returns:
        (volume (X, Y, Z) float32, its axes running to the patient's right, front and top (RAS+);
        the affine (4, 4) float64 from its voxel indices to mm)

    Raises:
        OSError, ValueError, EOFError, struct.error, zlib.error: it cannot be read, is no such
            volume, or is too large.
    """
    open_file = gzip.open if path.suffix.lower() == ".gz" else open
    with open_file(path, "rb") as file:
        header = file.read(348)
        # The first field is the header's own size: it tells the order of the bytes.
        order = "<" if header.startswith(struct.pack("<i", 348)) else ">"
        shape = struct.unpack_from(f"{order}3h", header, 42)  # voxels along each axis
        count = int(np.prod(shape))
        (code,) = struct.unpack_from(f"{order}h", header, 70)
        offset, slope, intercept = struct.unpack_from(f"{order}3f", header, 108)
        if header[344:] != b"n+1\0" or code not in NIFTI_TYPES or min(shape) < 1:
            raise ValueError(f"type {code}, shape {shape}: no NIfTI-1 volume")
        if count > MAX_VOXELS or not 0 <= offset <= MAX_BYTES:
            raise ValueError(f"{shape} voxels from byte {offset:.4g} on: not read")
        voxel = np.dtype(NIFTI_TYPES[code]).newbyteorder(order)
        file.seek(int(offset))
        voxels = file.read(count * voxel.itemsize)  # no more, whatever would unpack
    volume = np.frombuffer(voxels, voxel).reshape(shape, order="F").astype(np.float32)
    if slope and np.isfinite(slope):  # else they are the values
        volume = volume * slope + intercept
    return to_ras(volume, nifti_affine(header, order))


def nifti_affine(header: bytes, order: str) -> np.ndarray:
    """The affine (4, 4) from voxel indices to mm: a header's sform, else its qform.

    Args:
        header: its 348 bytes.
        order: of their bytes, < or >.

    Raises:
        ValueError: it has neither, so nobody can say which side is the patient's left.
    """
    affine = np.eye(4)
    zoom = struct.unpack_from(f"{order}4f", header, 76)  # handedness, then mm along each axis
    qform, sform, b, c, d, *shift = struct.unpack_from(f"{order}2h6f", header, 252)
    if sform > 0:  # a matrix
        affine[:3] = np.reshape(struct.unpack_from(f"{order}12f", header, 280), (3, 4))
    elif qform > 0:  # a turn by the unit quaternion a + ib + jc + kd, then a shift
        a = max(0, 1 - b * b - c * c - d * d) ** 0.5
        cross = np.array([[0, -d, c], [d, 0, -b], [-c, b, 0]])
        turn = np.eye(3) + 2 * a * cross + 2 * cross @ cross  # Rodrigues, in half angles
        affine[:3, :3] = turn * zoom[1:] * (1, 1, np.copysign(1, zoom[0]))
        affine[:3, 3] = shift
    else:
        raise ValueError("it has neither sform nor qform, so left and right are unknown")
    return affine


def to_ras(volume: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exchange and mirror a volume's axes until they run to the patient's right, front and top.

    Nothing is resampled: each axis goes to the direction that is nearest to it. Of the six orders
    of three axes that one is taken whose cosines to the directions have the largest sum. (nibabel's
    as_closest_canonical decides otherwise where it is close: for 27 of 300 volumes turned at
    random. Scans are hardly ever that oblique.)

    Args:
        volume: (X, Y, Z), any type.
        affine: (4, 4), voxel indices to mm.

    Returns:
        Both, turned: the affine's diagonal is positive.

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


def lesion_mask(path: Path) -> Path:
    """Where the mask of a volume's lesions would lie: of 7-Flair.nii it is 7-LesionSeg-Flair.nii.

    A mask counts for the sequence in its name alone: what shines on FLAIR may be dark on T1.
    """
    before, dash, sequence = path.name.rpartition("-")
    return path.with_name(f"{before}{dash}LesionSeg-{sequence}")


def volume_slices(path: Path) -> Iterator[tuple[str, np.ndarray]]:
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
    if mask.is_file():
        lesions, grid = read_nifti(mask)
        if lesions.shape != volume.shape or not np.allclose(grid, affine, atol=0.01):
            raise ValueError(f"its lesion mask {mask.name} is on another grid; resample one")
        area = (lesions > 0.5).sum(axis=(0, 1)) * abs(np.linalg.det(affine[:2, :2]))  # (Z,) mm^2
        classes = np.where(area >= LESION_AREA, "lesion/", "no-lesion/")
    gray = to_bytes(volume, WINDOW)  # (X, Y, Z)
    filled = (gray > 25).sum(axis=(0, 1))  # (Z,) pixels brighter than a tenth of white
    for z in np.flatnonzero(filled > NEAR_EMPTY * filled.max()):
        yield f"{classes[z]}{z}", axial(gray[..., z], affine)


def axial(values: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """One level of a volume in RAS+ as radiologists see it: front up, left on the right.

    Args:
        values: (X, Y) uint8.
        affine: (4, 4) of the volume; scanners' voxels are often no cubes.

    Returns:
        (H, W) uint8, its pixels square, as wide as the smaller of the two sides of a voxel.
    """
    side = np.linalg.norm(affine[:3, :2], axis=0)  # of a voxel, in mm
    size = np.round(side / side.min() * values.shape).astype(int)
    slice_ = Image.fromarray(values[::-1, ::-1].T)
    return np.asarray(slice_.resize(size, Image.Resampling.BILINEAR))


def shard_images(path: Path) -> Iterator[tuple[str, np.ndarray | Exception]]:
    """The images of a Hugging Face shard: columns `image` {bytes, path} and perhaps `label`.

    Yields:
        (name, (H, W) uint8, or why it cannot be read); the name is the row's number and, where it
        has a label, before it the class as the schema calls it, or else its number.

    Raises:
        OSError, ValueError: it is no such shard.
    """
    from pyarrow import parquet  # no package of ours: `open_folder` says where it is missing

    with parquet.ParquetFile(path) as shard:
        about = json.loads((shard.schema_arrow.metadata or {}).get(b"huggingface", "{}"))
        classes = about.get("info", {}).get("features", {}).get("label", {}).get("names")
        batches = shard.iter_batches(64, columns=["image", "label"], use_threads=False)
        entries = (entry for batch in batches for entry in batch.to_pylist())
        for row, entry in enumerate(entries):
            name, label = f"{row}", entry.get("label")
            if label not in (None, -1):  # -1 = not labelled
                folder = str(classes[label] if classes else label).replace("/", "_")
                name = f"{folder}/{row}"
            try:
                yield name, read_gray(io.BytesIO(entry["image"]["bytes"]))
            except Exception as error:  # broken bytes can make Pillow raise nearly anything
                yield name, error


def images_in(root: Path | None, file: str) -> Iterator[tuple[str, np.ndarray | Exception]]:
    """Every image of a file: the one of a PNG, each slice of a volume, each row of a shard.

    Args:
        root: folder of the file; None for a phantom, which is drawn (at the end of this file).

    Yields:
        (name within the file, '' where it has one image; (H, W) uint8, or why it cannot be read)
    """
    path = Path(root or "", file)
    if root is None:
        yield "", draw_phantom(file)[0]
    elif file.lower().endswith(".parquet"):
        yield from shard_images(path)
    elif path.stat().st_size > MAX_BYTES or not path.is_file():  # reading a pipe would wait
        raise ValueError(f"it is no file of at most {MAX_BYTES:,} bytes")
    elif VOLUME.fullmatch(file):
        yield from volume_slices(path)
    else:
        yield "", read_gray(path)


def fit_square(gray: np.ndarray, size: int) -> np.ndarray:
    """Resize (H, W) uint8 until its long side is `size`, and pad it black to (size, size).

    The aspect ratio is kept: a brain squashed to a square would teach the encoder the scanner's
    image format.

    >>> fit_square(np.full((2, 4), 9, np.uint8), 4).tolist()
    [[0, 0, 0, 0], [9, 9, 9, 9], [9, 9, 9, 9], [0, 0, 0, 0]]
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
    thumbnails: np.ndarray  # (n, 32, 32) uint8, of the images as decoded: groups come from them
    hashes: np.ndarray  # (n, 16) uint8, half of the SHA-256 of the gray pixels as decoded
    unreadable: dict[int, str]  # row -> why; its row of the arrays means nothing

    def readable(self, rows: np.ndarray) -> np.ndarray:
        """Those of the rows (k,) int64 that can be read, sorted."""
        return np.setdiff1d(rows, list(self.unreadable))


def row_type(size: int) -> np.dtype:
    """One image in the cache's file: the three arrays, one after the other."""
    shape = (THUMBNAIL, THUMBNAIL)
    return np.dtype([("square", "u1", (size, size)), ("small", "u1", shape), ("hash", "u1", 16)])


def decode(root: Path | None, size: int, file: str) -> list[tuple[str, bytes, str]]:
    """Decode one file, as the worker processes do. Nothing that a file holds can raise.

    Args:
        root, file: as `images_in` takes them.
        size: S, pixels a side of the square.

    Returns:
        Of each image its name, its `row_type` as bytes, and why it cannot be read or ''.
    """
    decoded = []
    empty = bytes(row_type(size).itemsize)
    try:
        with warnings.catch_warnings(action="ignore"):  # odd metadata is nobody's concern
            for inner, gray in images_in(root, file):
                name = f"{file}/{inner}".rstrip("/")
                if isinstance(gray, Exception):
                    decoded.append((name, empty, repr(gray)))
                    continue
                digest = hashlib.sha256(np.ascontiguousarray(gray)).digest()[:16]
                row = fit_square(gray, size).tobytes() + thumbnail(gray).tobytes() + digest
                decoded.append((name, row, ""))
        if not decoded:
            raise ValueError("there is nothing in it")
    except Exception as error:  # a broken file can make Pillow raise nearly anything
        decoded.append((file, empty, repr(error)))
    return decoded


def decode_files(files: list[str], work: Callable, folder: Path, progress: Callable) -> None:
    """Decode files on every core, and append their images to one plain file.

    index.json is written last: without it there is no cache, and all is decoded again. So a decode
    that was killed at any moment leaves nothing that could be mistaken for a whole one.

    Args:
        files: a volume and a shard become several images each.
        work: `decode` for a file of this list.
        folder: of the cache, held by the caller.
        progress: as in `load_images`.

    Raises:
        UserError: a worker process was killed; OSError: the cache cannot be written.
    """
    # A DataLoader collates in its worker processes: that is where the files are decoded. With its
    # own generator it leaves the default one, which belongs to the networks, as it is.
    workers = torch.get_num_threads() if len(files) >= FEW else 0
    own = torch.Generator()
    loader = DataLoader(files, None, collate_fn=work, num_workers=workers, generator=own)
    index = []
    try:
        with open(folder / "images.bin", "wb") as out:  # what a killed decode left is overwritten
            for decoded in progress(loader, total=len(files), desc="decode", unit="file"):
                for name, row, why in decoded:
                    index.append((name, why))
                    out.write(row)
    except RuntimeError as error:  # how the DataLoader says that a worker is gone
        raise UserError(f"decoding has ended ({error}); is memory short? Try again") from error
    with write_atomically(folder / "index.json") as out:
        out.write(json.dumps(index).encode())


def load_images(
    root: Path | None, files: list[str], size: int, cache: Path, progress: Callable
) -> Images:
    """Every image of the files, from the cache or, the first time, decoded into it.

    The cache's folder is named by a digest of everything that shapes it. Where a file has changed,
    all are decoded again: a minute for 100,000 images. Any folder of the cache may be deleted.

    Args:
        root: folder of the files; None for phantoms.
        files: their paths below it.
        size: S, pixels a side of the squares.
        cache: the folder of all caches.
        progress: wraps an iterable and shows how far it is, as tqdm does.

    Raises:
        UserError: as `decode_files`; another process is decoding the same, or the cache is damaged.
        OSError: a file is gone, or the cache cannot be written.
    """
    digest = hashlib.sha256(f"{CACHE_VERSION} {size}".encode())
    for file in files:
        changes = stamp(root / file) if root else ""
        digest.update(os.fsencode(f"{file}\0{changes}\n"))
    folder = cache / digest.hexdigest()[:16]
    if not (folder / "index.json").exists():
        with lock_folder(folder):
            if not (folder / "index.json").exists():  # still: another process may just have ended
                decode_files(files, partial(decode, root, size), folder, progress)
    try:
        names, reasons = zip(*json.loads((folder / "index.json").read_text()), strict=True)
        rows = np.memmap(folder / "images.bin", row_type(size), "r", shape=len(names))
    except ValueError as error:
        raise UserError(f"{folder} is damaged ({error}); delete it") from error
    unreadable = {row: why for row, why in enumerate(reasons) if why}
    thumbnails, hashes = np.array(rows["small"]), np.array(rows["hash"])
    return Images(folder, list(names), rows["square"], thumbnails, hashes, unreadable)


def files_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Every file of a folder and its folders, in order, but for hidden ones and folders of masks.

    A folder whose config.json names a command is a run of ours and is passed over.

    Args:
        above: the folders it lies in; a link to one of them would never end.

    Raises:
        OSError: a folder may not be opened. (Passing over it would change the split in silence.)
    """
    paths = sorted(folder.iterdir())
    real = folder.resolve()
    config = folder / "config.json"
    if real in above or (config in paths and b'"command"' in config.read_bytes()):
        return
    for path in paths:
        if path.name[0] == "." or MASK.fullmatch(path.name):
            continue
        if path.is_dir():
            yield from files_below(path, (*above, real))
        else:
            yield path


def stamp(path: Path) -> str:
    """A text that changes when a file, or the lesion mask beside it, does.

    The mask belongs to it because the classes of a volume's slices come from there.
    """
    # exists: links may be broken. ctime: unpacking sets mtime, and nobody can set ctime.
    files = [file.stat() for file in (path, lesion_mask(path)) if file.exists()]
    return " ".join(f"{status.st_size} {status.st_ctime_ns}" for status in files)


def open_folder(root: Path, labels: Path | None) -> tuple[list[str], list[str]]:
    """The files of a folder that hold images, and notices on what lies there unread.

    Args:
        labels: the table that is read, if any.

    Returns:
        (paths below root with forward slashes, sorted; the notices)

    Raises:
        UserError: no such folder, no images in it, or shards and no pyarrow.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; --data takes the folder that holds the scans")
    files, endings, notices, masks = [], Counter(), [], 0
    for path in files_below(root):
        endings[path.suffix.lower()] += 1
        if SCAN.search(path.name) and MASK.search(path.name):
            masks += 1
        elif SCAN.search(path.name):
            files.append(path.relative_to(root).as_posix())
    if not files:
        raise UserError(f"no images below {root}; expected {root}/<task>/<class>/*.png, or others")
    if endings[".parquet"] and not find_spec("pyarrow"):
        raise UserError(f"{root} holds parquet shards; to read them: pip install pyarrow")
    if masks:
        notices.append(f"masks by their names (mask, seg, roi, label) are not read: {masks} files")
    if endings[".dcm"]:
        notices.append(f"{endings['.dcm']} DICOM files are not read; dcm2niix makes volumes")
    if not labels and endings[".csv"] + endings[".tsv"]:
        notices.append("tables (.csv, .tsv) lie there unread; --labels FILE reads one")
    return sorted(files), notices


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
TASK_IN_NAME = re.compile(r"tumor|stroke|alzheimer|parkinson|(?<![a-z])ms(?![a-z])")
# What publishers append to a class (MildDemented; but "no tumor" is no class "no"), and their other
# names. One flat dictionary for all tasks: no two of them call different things by one name.
CLASS_ENDING = re.compile(r"(?<!no)(tumor|demented|dementia)$")
SPELLINGS = {"nostroke": "normal", "nolesion": "no-lesion", "verymild": "very_mild"}
# How folders, shards (train-00000-of-1.parquet) and tables name a publisher's splits.
PUBLISHED = re.compile(r"(train|test|val)(ing|idation|id)?((-.*)?\.parquet)?", re.I | re.S)
# Folders that name neither task nor class, such as those of BIDS and of Hugging Face.
PACKAGING = re.compile(r"(?i)ses-\w+|anat|dwi|func|perf|data|dataset|images|augment.*")
# Patients as public sets name them; what a pattern cannot know, --patient-pattern or --labels says.
PATIENT = re.compile(
    r"""(?ix)(?<![a-z0-9])(?:
      patient[-_ ]?\(?\d+          # Patient-7, patient_007, Patient (12)
    | sub-[a-z]*\d[a-z0-9]*        # BIDS: sub-01, sub-control07
    | sub(?:ject)?[-_ ]?\d+        # sub01, subject-01
    | case[-_ ]?[a-z]?\d+          # case_h49
    | p\d+(?![a-z0-9])             # P012_3.png; a phantom's p0012
    | oas[12]_\d+                  # OASIS: OAS1_0028_MR1
    | \d{3}_s_\d{4}                # ADNI: 002_S_1002
    | tcga-\w{2}-\w{4}             # TCGA-02-0049
    | brats\d*(?:[-_][a-z]+)?[-_]\d+  # BraTS20_Training_001, BraTS-GLI-00001-000
    | (?<![^/])\d{3,}(?=/)         # a folder called 0001, not one called series_001
    | [^/]+/\d+(?=\ \(\d+\)\.\w+$)  # Normal/58 (1).jpg: numbers begin anew in each class
    )"""
)
# More classes than this, with a median of fewer images than that, are the folders of patients.
MANY, SMALL = 10, 8


@dataclass
class Study:
    """A data folder, read: arrays over its n images, which `load` fills from top to bottom."""

    root: Path | None  # None = phantoms
    images: Images
    notices: list[str]  # for the user
    task: np.ndarray  # (n,) str, '' = unlabelled
    label: np.ndarray  # (n,) str, its class, '' = unlabelled
    published: np.ndarray  # (n,) str: train, val or test as the publisher split them, or ''
    patients: np.ndarray  # (n,) str, '' = unknown
    groups: np.ndarray  # (n,) int64
    doubts: np.ndarray  # (n,) str: "two labels", "copy" of another image, or ''
    tasks: dict[str, "Task"]


def find_capture(path: str, pattern: re.Pattern | None) -> re.Match | None:
    """Where a --patient-pattern finds a patient in a path: its first capture group.

    >>> find_capture("a/H12_3.png", re.compile("(H[0-9]+)_"))[1]
    'H12'
    """
    match = pattern.search(path) if pattern and pattern.groups else None
    return match if match and match[1] else None


def read_patient(path: str, pattern: re.Pattern | None) -> str:
    """The patient that a path names, '' where it names none.

    One id means one person everywhere below --data: joining two strangers costs a little data,
    cutting one person makes the score false.

    Args:
        pattern: asked first; its first capture group is the patient, compared as it is.

    >>> read_patient("tumor/glioma/Patient-07/3.png", None), read_patient("x/patient7.nii", None)
    ('patient7', 'patient7')
    """
    capture = find_capture(path, pattern)
    if capture:
        return capture[1]
    match = PATIENT.search(path)
    if match:
        plain = re.sub(r"[-_ (]", "", match[0].lower())
        return re.sub(r"(?<!\d)0+(?=\d)", "", plain)
    volume = VOLUME.match(path)
    return volume[0] if volume else ""  # a volume is somebody's


def spell(name: str) -> str:
    """A folder's name as the known tasks have it where it is one of their classes, or as it is.

    >>> spell("glioma_tumor"), spell("Very mild Dementia"), spell("my class")
    ('glioma', 'very_mild', 'my class')
    """
    plain = CLASS_ENDING.sub("", re.sub(r"[ _-]", "", name.lower()))
    plain = SPELLINGS.get(plain, plain)
    return plain if plain in KNOWN_CLASSES else name


def read_folders(path: str, pattern: re.Pattern | None) -> tuple[tuple[str, ...], str]:
    """The folders of a path that can name a task or a class, and the published split in it.

    Taken out are folders that name a split, a patient or packaging, and files of many images.

    >>> read_folders("tumor/Training/glioma_tumor/sub-01/1.png", None)
    (('tumor', 'glioma'), 'train')
    """
    capture = find_capture(path, pattern)
    patient_depth = path.count("/", 0, capture.start(1)) if capture else None
    kept, published = [], ""
    for depth, name in enumerate(path.split("/")[:-1]):
        split = PUBLISHED.fullmatch(name)
        is_patient = depth == patient_depth or PATIENT.match(f"{name}/")
        if split:
            published = split[1].lower()
        elif not is_patient and not PACKAGING.fullmatch(name) and not SCAN.search(name):
            kept.append(spell(name))
    return tuple(kept), published


def holds_classes(folder: tuple[str, ...], tree: dict[tuple[str, ...], set[str]]) -> bool:
    """Whether the folders in a folder are classes, whatever folders they hold in turn.

    They are, if two of them are classes of one known task. Where no name is known, the folders in
    them decide: two folds of a task hold the same ones, its classes; two classes hold different
    ones, such as batches.

    Args:
        folder: as `read_folders` gives it.
        tree: folder -> names of the folders in it.

    >>> holds_classes((), {(): {"ill", "fit"}, ("ill",): {"batch1"}, ("fit",): {"batch2"}})
    True
    """
    beside = tree[folder]
    if any(len(beside.intersection(classes)) > 1 for classes in KNOWN_TASKS.values()):
        return True
    inside = [tree[*folder, name] for name in beside if (*folder, name) in tree]
    names = beside.union(folder, *inside)
    if names & KNOWN_CLASSES or TASK_IN_NAME.search(" ".join(names).lower()):
        return False
    folds = inside and all(inner == inside[0] for inner in inside) and len(inside[0]) > 1
    return bool(inside) and not folds


def read_names(study: Study, root_name: str, pattern: re.Pattern | None) -> None:
    """Read the names of images as tasks, classes, published splits and patients.

    Of tumor/glioma/center2/3.png the class is glioma where glioma's siblings are classes, too: the
    folder in the innermost one that `holds_classes`. Where none does, it is the last folder. Two or
    more classes side by side are a task; a single one is unlabelled.

    Args:
        study: task, label, published and patients are filled.
        root_name: the data folder's own name, for a task that is the data folder itself.

    Raises:
        UserError: what stands where classes are expected looks like patients.
    """
    rows_in = defaultdict(list)  # folders of an image -> rows
    tree = defaultdict(set)  # folder -> names of the folders in it
    for row, name in enumerate(study.images.names):
        study.patients[row] = read_patient(name, pattern)
        folders, study.published[row] = read_folders(name, pattern)
        rows_in[folders].append(row)
        for depth, folder in enumerate(folders):
            tree[folders[:depth]].add(folder)
    homes = {folder for folder in tree if holds_classes(folder, tree)}
    sources = defaultdict(lambda: defaultdict(list))  # folder of the classes -> class -> rows
    for folders, rows in rows_in.items():
        if folders:
            # Its class is the folder right in the innermost home of classes.
            depths = [depth for depth in range(len(folders)) if folders[:depth] in homes]
            depth = depths[-1] if depths else len(folders) - 1
            sources[folders[:depth]][folders[depth]] += rows
    taken = {}  # name of a task -> its classes
    # Most classes first: a known task's full set keeps the known name.
    # Then by name, so that the order of the files changes nothing.
    for home, rows_of in sorted(sources.items(), key=lambda source: (-len(source[1]), source[0])):
        if len(rows_of) > MANY and np.median([len(rows) for rows in rows_of.values()]) < SMALL:
            which = f"{min(rows_of)!r} and {len(rows_of) - 1} more folders"
            raise UserError(f"{which} look like patients; give --patient-pattern or --labels")
        if len(rows_of) > 1:
            name = name_task(home or (root_name,), set(rows_of), taken)
            for class_, rows in rows_of.items():
                study.task[rows], study.label[rows] = name, class_


def name_task(folders: tuple[str, ...], classes: set[str], taken: dict[str, set[str]]) -> str:
    """A name for the task whose class folders stand in `folders`: the known task's, or a folder's.

    These are tried in turn: the task with exactly these classes; the innermost folder called after
    a known task; the outermost folder; all of them with the classes. Sources pool where name and
    classes are the same; else the next name is tried.

    Args:
        folders: one in the other.
        taken: name of a task -> its classes; added to.
    """
    names = [task for task, known in KNOWN_TASKS.items() if classes == set(known)]
    names += TASK_IN_NAME.findall("/".join(folders).lower())[-1:]
    names += [folders[0], "-".join((*folders, *sorted(classes)))]
    for name in names:
        if taken.setdefault(name, classes) == classes:
            return name


TABLE_COLUMNS = {"path", "label", "task", "patient", "split", "group", "pixel_hash"}


def read_table(path: Path, study: Study, root_name: str) -> None:
    """Let a table say what names cannot: columns path, label, perhaps task, patient, split.

    Explicit beats guessed: an image without a row has no label. A splits.csv of ours can be edited
    and given back. Columns, rows and images that have no counterpart become notices.

    Args:
        path: a .csv, or a .tsv with tabs between its columns; its column path has the names of
            images below the data folder.
        study: with what the names say; changed in place.
        root_name: the task of images that neither the table nor a folder gives one.

    Raises:
        UserError: a column is missing, no row has an image, a split is none, or a patient has two.
    """
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        table = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", restval="")
        columns = set(table.fieldnames or ())
        if not {"path", "label"} <= columns:
            raise UserError(f"{path} has the columns {sorted(columns)}; it needs path and label")
        lines = {}
        for line in table:
            name = line["path"].removeprefix("./")
            if lines.setdefault(name, line) != line:
                raise UserError(f"{path} has two rows for {name!r}; which is right?")
    names = study.images.names
    split_of = {}  # patient -> the split that the table gives him
    if not set(lines) & set(names):
        raise UserError(f"{path} has a row for none of {len(names)} images, such as {names[0]!r}")
    for row, name in enumerate(names):
        line = lines.get(name, {})
        study.label[row] = line.get("label", "").strip()
        task = line.get("task") or study.task[row] or root_name
        study.task[row] = task.replace("/", "_") if study.label[row] else ""
        study.patients[row] = patient = line.get("patient") or study.patients[row]
        if "split" in columns:
            split = PUBLISHED.sub(r"\1", line.get("split", "").strip().lower())  # Testing -> test
            if split not in ("", "train", "val", "test", "dropped"):
                raise UserError(f"{path}: {name!r} has the split {split!r}, not train, val or test")
            study.published[row] = split
            is_given = patient and split in ("train", "val", "test")
            if is_given and split_of.setdefault(patient, split) != split:
                splits = f"{split_of[patient]} and in {split}"
                raise UserError(f"{path}: patient {patient!r} is in {splits}")
    for what, which in (
        ("columns are not used", columns - TABLE_COLUMNS),
        ("rows have no image", set(lines) - set(names)),
        ("images have no row, and no label", set(names) - set(lines)),
    ):
        if which:
            study.notices.append(f"{path}: {len(which)} {what}, such as {min(which)!r}")


NUMBERED = r"([^/]*\w)[-_ .]\(?\d+\)?\.\w+$"  # H12_3.png: who, then a number


def numbered_by_patient(names: list[str]) -> bool:
    """Whether NUMBERED may be the --patient-pattern: beginnings of names repeat (H12_3.png).

    A beginning that many names share (Tr-gl) is a series, not a patient: none may hold a
    twentieth of all names. It is proposed and not used, because nobody but the user can know.
    """
    matches = [re.search(NUMBERED, name) for name in names]
    beginnings = Counter(match[1] for match in matches if match)
    repeated = [count for count in beginnings.values() if count > 1]
    return sum(repeated) > 0.8 * len(names) and max(repeated) < 0.05 * len(names)


# ---------------------------------------------------------------------------------------------
# Groups: what must never be cut
# ---------------------------------------------------------------------------------------------


def exact_cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines of mean-free thumbnails (k, 32, 32) uint8, pair by pair: (k,) float64.

    A mean is a sum / 1024. So everything summed here is a whole number below 2^47, divided by 2^20:
    exact in float64 and in any order, and every machine splits alike.

    A thumbnail of one colour has the cosine 0 with everything: volumes end in black slices, which
    would chain all patients into one group.

    >>> flat, half = np.zeros((2, 1, 32, 32), np.uint8)
    >>> half[:, :16] = 200
    >>> float(exact_cosines(half, half)[0]), float(exact_cosines(half, flat)[0])
    (1.0, 0.0)
    """
    a = a - a.mean(axis=(1, 2), keepdims=True)
    b = b - b.mean(axis=(1, 2), keepdims=True)
    lengths = np.einsum("kij,kij->k", a, a) * np.einsum("kij,kij->k", b, b)
    return np.einsum("kij,kij->k", a, b) / np.sqrt(np.maximum(lengths, 1e-9))


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
    """
    x = torch.from_numpy(thumbnails).float()  # (n, 32, 32)
    x -= x.mean(dim=(1, 2), keepdim=True)
    x /= x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    # The left half of a part, scaled, is enough: the right half repeats it up to the sign. So two
    # products of (n, 512) do what two of (n, 1024) would, in half the time.
    even = (x + x.flip(2))[..., : THUMBNAIL // 2].flatten(1) / 2**0.5  # (n, 512)
    odd = (x - x.flip(2))[..., : THUMBNAIL // 2].flatten(1) / 2**0.5  # (n, 512)
    pairs = [np.zeros((0, 2), np.int64)]
    for start in range(0, len(thumbnails), BLOCK):
        cosines = (odd[start : start + BLOCK] @ odd[start:].T).abs_()  # (BLOCK, n - start)
        cosines += even[start : start + BLOCK] @ even[start:].T
        likely = (cosines > threshold - 1e-4).triu(1)  # each pair once; float32 is exact to 1e-6
        near = likely.nonzero().numpy() + start
        for chunk in np.array_split(near, len(near) // 4096 + 1):
            a, b = thumbnails[chunk[:, 0]], thumbnails[chunk[:, 1]]
            larger = np.maximum(exact_cosines(a, b), exact_cosines(a, b[:, :, ::-1]))
            pairs.append(chunk[larger >= threshold])
    return np.concatenate(pairs)


def connected(n: int, pairs: list[tuple[int, int]]) -> np.ndarray:
    """Number the groups of n things that pairs join, by single linkage.

    Single linkage, because being the same person is transitive. Each thing begins as a group of its
    own, numbered by itself. As long as a pair has two numbers, both groups take the smaller one.

    Args:
        pairs: of positions in [0, n).

    Returns:
        (n,) int64 group numbers 0, 1, ... in order of first appearance.

    >>> connected(4, [(3, 1)]).tolist()
    [0, 1, 2, 1]
    """
    groups = np.arange(n)
    a, b = np.array(pairs, np.int64).reshape(-1, 2).T
    while (groups[a] != groups[b]).any():
        smaller = np.minimum(groups[a], groups[b])
        np.minimum.at(groups, groups[a], smaller)  # what a group is numbered by takes it first, ...
        np.minimum.at(groups, groups[b], smaller)
        groups = groups[groups]  # ... and tells all that are numbered by it
    return np.unique(groups, return_inverse=True)[1]


def near_duplicate_groups(thumbnails: np.ndarray, threshold: float = NEAR_DUPLICATE) -> np.ndarray:
    """Group near-duplicate images (N, 32, 32) uint8, mirrors included: (N,) int64 numbers."""
    return connected(len(thumbnails), near_duplicate_pairs(thumbnails, threshold).tolist())


def neighbours_in_series(study: Study, groups: np.ndarray) -> list[list[int]]:
    """Consecutive files of a numbered series that are slices of one brain: pairs of rows.

    Some publishers number the files patient by patient. In a series (one folder, one prefix, at
    least 50 files, patients unknown) whose consecutive files resemble each other (cosine >= 0.90)
    ten times as often as random ones, those that do are joined. Where all brains lie on one atlas
    random files resemble each other as well, and nothing is joined. Near-duplicates, which are
    joined anyway, count on neither side. A notice tells where the rule holds.

    Args:
        groups: (n,) int64, of what the other rules have joined.
    """

    def alike(pairs: np.ndarray) -> tuple[np.ndarray, float]:
        """Those of the pairs (k, 2) that resemble each other, and their share."""
        pairs = pairs[groups[pairs[:, 0]] != groups[pairs[:, 1]]]
        a, b = study.images.thumbnails[pairs].swapaxes(0, 1)  # (k, 32, 32) each
        resembling = pairs[exact_cosines(a, b) >= NEIGHBOUR]
        return resembling, len(resembling) / max(1, len(pairs))

    series = defaultdict(list)  # folder and prefix -> (number, row)
    for row, name in enumerate(study.images.names):
        match = re.match(r"(.*?)(\d+)\D*\.\w+$", name, re.DOTALL)
        if match and study.label[row] and not study.patients[row]:
            series[match[1]].append((int(match[2]), row))
    joined = []
    for prefix, numbered in sorted(series.items()):
        rows = np.array([row for _, row in sorted(numbered)])
        if len(rows) < LEAST_SERIES:
            continue
        neighbours, share = alike(np.column_stack([rows[:-1], rows[1:]]))
        _, by_chance = alike(np.random.default_rng(0).choice(rows, (RANDOM_PAIRS, 2)))
        if len(neighbours) and share >= NEIGHBOUR_RATIO * by_chance:
            joined += neighbours.tolist()
            shares = f"{share:.1%} of neighbours are alike, {by_chance:.2%} of random pairs"
            joins = f"{prefix}*: file order joins {len(neighbours)} pairs"
            study.notices.append(f"{joins} ({shares})")
    return joined


# Words by which publishers name copies they have made to have more images. One of them is enough.
COPY_WORD = re.compile(
    r" ?\b(?:aug(?:mented)?|rot(?:ated?|ation)?|flip(?:ped)?|mirror(?:ed)?|copy|nois[ey]"
    r"|crop(?:ped)?|bright(?:er|ness)?)\d*\b ?"  # rot90, but not rotterdam
)


def find_originals(names: list[str], labels: np.ndarray) -> list[tuple[int, int]]:
    """Augmented copies by name: (row of a copy, row of an image it was made from).

    A copy's stem has a word such as aug, rot or flip and, before it or else after it, the
    original's whole stem: aug_Y1_0_4528 and Y1, x_rot90 and x. An original of the same class goes
    before others. (A rotated copy cannot be found by a cosine.)

    Args:
        labels: (n,) classes, '' = unknown.

    >>> find_originals(["a/Y1.jpg", "a/aug_Y1_0.jpg", "b/2.jpg"], np.array(["a", "a", "b"]))
    [(1, 0)]
    """
    rows_of = defaultdict(list)  # stem -> rows
    for row, name in enumerate(names):
        if SCAN.search(name):  # the slices of a volume are no files: their names are numbers
            stem = re.findall(r"[^\W_]+", Path(name).stem.lower())
            rows_of[" ".join(stem)].append(row)  # x_rot90 -> "x rot90"
    found = []
    for stem, copies in rows_of.items():
        pieces = [piece for piece in COPY_WORD.split(stem) if piece]
        original = pieces[0] if pieces else ""
        while original and original not in rows_of:
            original = original.rpartition(" ")[0]  # without a number that was appended
        if original in ("", stem):
            continue
        for row in copies:
            same_class = [other for other in rows_of[original] if labels[other] == labels[row]]
            for other in same_class or rows_of[original]:
                found.append((row, other))
    return found


def group_images(study: Study) -> None:
    """Join equal pixels, patients, near-duplicates, copies, and neighbours in a series.

    Slices of two known patients may look alike on one atlas: between them only equal pixels count.
    Near-duplicates of two labels contradict each other, but not two slices of one known patient:
    where a lesion ends, neighbouring slices differ in label and hardly in pixels.

    Args:
        study: with its tasks, labels and patients; groups and doubts are filled.

    Raises:
        OSError: the near-duplicates cannot be written into the cache.
    """
    # Found once: pixels decide them, so they lie in the cache. What counts of them, names decide.
    images, patients = study.images, study.patients
    file = images.folder / f"near_duplicates_{NEAR_DUPLICATE}.npy"
    if not file.exists():
        with write_atomically(file) as out:
            np.save(out, near_duplicate_pairs(images.thumbnails))
    a, b = np.load(file).T  # (k,) each
    equal = (images.hashes[a] == images.hashes[b]).all(axis=1)
    counts = equal | (patients[a] == "") | (patients[b] == "")
    a, b = a[counts], b[counts]
    joined = np.column_stack([a, b]).tolist()
    first = {}  # patient -> his first image
    for row, patient in enumerate(patients):
        if patient:
            joined.append((first.setdefault(patient, row), row))
    # Names come before neighbours: the order rule looks at images that nothing else has joined.
    originals = find_originals(images.names, study.label)
    joined += originals
    n = len(images.names)
    joined += neighbours_in_series(study, connected(n, joined))
    study.groups = connected(n, joined)
    study.doubts[[copy for copy, _ in originals]] = "copy"
    two_labels = (study.task[a] == study.task[b]) & (study.label[a] != study.label[b])
    two_labels &= (patients[a] == "") | (patients[a] != patients[b])
    study.doubts[a[two_labels]] = study.doubts[b[two_labels]] = "two labels"


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


def split_by_group(
    labels: np.ndarray, groups: np.ndarray, published: np.ndarray, keys: list[bytes]
) -> np.ndarray:
    """Give each image to train, val or test such that no group stands in two of them.

    A publisher's test (and val) images stay what they are, and the rest of their groups is
    dropped. What the publisher did not set aside is taken from his training images: 15 % of the
    groups for val, and for test. Images without a published split are split 70/15/15. Each class
    gives a group to train first, then to test, then to val.

    Args:
        labels, groups: (m,) int64.
        published: (m,) str: the publisher's train, val, test or ''; dropped = left out beforehand.
        keys: m hashes of the images; they alone decide the order in which groups are dealt.

    Returns:
        (m,) str: train, val, test or dropped.
    """
    split = np.where(published == "dropped", "dropped", "train").astype("U7")
    # A published test image takes its group out of training: that image is test, the others are
    # dropped. Then the same for val.
    for part in ("test", "val"):
        own = (published == part) & (split == "train")
        split[np.isin(groups, groups[own]) & (split == "train")] = "dropped"
        split[own] = part
    members = defaultdict(list)  # group -> positions of its images; dictionaries keep this linear
    for i in np.flatnonzero(split == "train"):
        members[groups[i]].append(i)

    def rank(group: list[int]) -> bytes:
        """Where a group stands in an order that pixels alone decide, the same everywhere."""
        return hashlib.sha256(SPLIT_SEED + min(keys[i] for i in group)).digest()

    queues = defaultdict(list)  # label, by a publisher or not -> groups, each a list of positions
    for group in sorted(members.values(), key=rank):
        label = np.bincount(labels[group]).argmax()  # of several labels the commonest, else first
        queues[label, "train" in published[group]].append(group)
    for (_, by_publisher), queue in queues.items():
        count = max(1, int(len(queue) * HELD_OUT + 0.5))
        for part in ("test", "val"):
            if len(queue) > 1 and not (by_publisher and part in published):
                split[np.concatenate(queue[:count])] = part
                queue = queue[count:]
    return split


def make_task(study: Study, name: str, resplit: bool) -> Task:
    """Gather the images of one task, and split them (`split_by_group`).

    Near-duplicates of two labels contradict each other: nobody can say which is right, so both are
    dropped. Copies never count as test images of their own.

    Args:
        study: with its groups.
        name: as it stands in study.task.
        resplit: pool the published splits, and split anew.

    Returns:
        The task; its classes are in the known task's order, and unknown ones by alphabet.
    """
    rows = np.flatnonzero(study.task == name)
    found = set(study.label[rows])
    known = [label for label in KNOWN_TASKS.get(name, ()) if label in found]
    classes = (*known, *sorted(found - set(known)))
    rows = study.images.readable(rows)
    labels = np.array([classes.index(label) for label in study.label[rows]], np.int64)
    groups, doubts = study.groups[rows], study.doubts[rows]
    published = study.published[rows].astype("U7")
    if resplit or not np.isin(published, ("val", "test")).any():
        published[published != "dropped"] = ""  # a training part alone is no split
    keys = [study.images.hashes[row].tobytes().hex().encode() for row in rows]
    usable = np.where(doubts == "two labels", "dropped", published)
    split = split_by_group(labels, groups, usable, keys)
    # Only now: a copy may be trained on beside its original, but would count it twice in a test.
    copies = (doubts == "copy") & np.isin(split, ("val", "test"))
    split[copies] = "dropped"
    notes = {
        "rule": "as published, cut by group" if (published != "").any() else "70/15/15 by group",
        "groups": len(np.unique(groups)),
        "largest_group": int(np.bincount(groups).max(initial=0)),
        "dropped": int((split == "dropped").sum()),  # most are of a group in val or test
        "dropped_for_two_labels": int((doubts == "two labels").sum()),
        "dropped_copies": int(copies.sum()),
    }
    return Task(name, classes, rows, labels, groups, published, split, notes)


def check_split(task: Task) -> None:
    """See that every class has images to train on and others to test with.

    A class of one patient cannot be measured, and is not split by image for the sake of a number.

    Raises:
        UserError: one has not.
    """
    for label, name in enumerate(task.classes):
        for part in ("train", "test"):
            if label not in task.labels[task.part(part)]:
                n = len(np.unique(task.groups[task.labels == label]))
                why = f"of its {n} group(s) none is in {part}; add patients, or try --resplit"
                raise UserError(f"class {name!r} of task {task.name}: {why}")


def left_out(study: Study) -> np.ndarray:
    """Why pretraining leaves an image out: (n,) str, '' for those that it may see.

    Every image stays out whose group is in val or test of any task, so that an encoder has never
    seen, not even without its label, the patient on whom it is later tested. So one encoder serves
    all tasks of a folder.

    Returns:
        (n,) str: "", "held out", "dropped" or "unreadable".
    """
    why = np.full(len(study.groups), "", object)
    for task in study.tasks.values():
        why[task.rows[task.part("dropped")]] = "dropped"
        held = task.groups[np.isin(task.split, ("val", "test"))]
        why[np.isin(study.groups, held)] = "held out"
    why[list(study.images.unreadable)] = "unreadable"
    return why


def pretraining_rows(study: Study) -> np.ndarray:
    """(k,) int64: the images that pretraining may see (`left_out`)."""
    return np.flatnonzero(left_out(study) == "")


def was_seen(study: Study, seen: np.ndarray) -> np.ndarray:
    """Images whose group has one that a network was trained on, found by its pixels.

    Args:
        seen: (k, 16) uint8 hashes, as encoder.pt and classifier.pt remember them.

    Returns:
        (n,) bool, True = it, or another of its group, was trained on.
    """
    digests = {bytes(digest) for digest in seen}
    same_pixels = np.array([bytes(digest) in digests for digest in study.images.hashes], bool)
    small = study.images.thumbnails
    same_pixels &= (small != small[:, :1, :1]).any(axis=(1, 2))  # black images are nobody's
    return np.isin(study.groups, study.groups[same_pixels])


def refuse_leak(study: Study, task: Task, seen: np.ndarray) -> None:
    """See that the encoder was not pretrained on test images, nor on others of their groups.

    By pixels, so that other names, folders and flags than at pretraining hide nothing.

    Args:
        seen: as `was_seen` takes it.

    Raises:
        UserError: it was.
    """
    rows = task.rows[task.part("test")]
    leaked = rows[was_seen(study, seen)[rows]]
    if len(leaked):
        found = f"the encoder has seen {len(leaked)} of the {len(rows)} test images of {task.name}"
        fix = "pretrain with the same --data, --patient-pattern, --labels and --resplit"
        raise UserError(f"{found}, such as {study.images.names[leaked[0]]!r}; {fix}")


# ---------------------------------------------------------------------------------------------
# Phantoms: brain slices drawn by code, so that everything runs, and is tested, without any data
# ---------------------------------------------------------------------------------------------

# More of them cost minutes; three slices make a patient a group.
PHANTOM_SIZE = 128  # pixels a side
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
    """The names of all phantoms, such as tumor/glioma/p0012/2: task, class, patient, slice."""
    kinds = [f"{task}/{label}" for task, classes in KNOWN_TASKS.items() for label in classes]
    names = []
    for patient in range(len(kinds) * PHANTOM_PATIENTS):
        kind = kinds[patient // PHANTOM_PATIENTS]
        names += [f"{kind}/p{patient:04d}/{k}" for k in range(PHANTOM_SLICES)]
    return sorted(names)


def ellipse(u: np.ndarray, v: np.ndarray, width: float, height: float) -> np.ndarray:
    """Depth inside an ellipse around u = v = 0: positive inside, 0 on its rim, in units of u.

    Args:
        u, v: coordinates of the pixels, of one shape.
        width, height: half axes.
    """
    return (1 - np.hypot(u / width, v / height)) * min(width, height)


def paint(image: np.ndarray, depth: np.ndarray, value: float) -> None:
    """Lay `value` onto `image`, in place, where `depth` is positive.

    The rim is soft, a twentieth of the head's half length wide: scanners average what lies in a
    voxel.
    """
    share = np.clip(0.5 + depth / 0.05, 0, 1)
    image += share * (value - image)


def draw_phantom(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw the phantom called `name`; the same name always gives the same pixels.

    Head shape, folding, place, contrast, gain and the lesion belong to the patient; level in the
    head, noise and a little of the turn to the slice. The image is axial, front up.

    Returns:
        (image (128, 128) uint8, lesion (128, 128) bool, True = diseased). In Alzheimer's disease
        nothing is added; the mask is what changes size, the ventricles.
    """
    task, label, patient, slice_ = name.split("/")
    person = np.random.default_rng(list(patient.encode()))
    moment = np.random.default_rng(list(name.encode()))
    level = int(slice_) - 1 + moment.normal(0, 0.1)  # -1 low in the head, 1 high
    stage = KNOWN_TASKS[task].index(label) if task == "alzheimer" else 0
    atrophy = max(0.0, person.normal(stage / 3, 0.12))  # 0 in health, 1 severe
    scalp, bone, fluid, cortex, white = person.normal(1, 0.08, 5) * PHANTOM_TISSUES[task]
    # u runs to the viewer's right, v down, r from 0 in the middle of the head to 1 on the scalp.
    y, x = np.mgrid[-1 : 1 : PHANTOM_SIZE * 1j, -1 : 1 : PHANTOM_SIZE * 1j]
    x, y = x - person.normal(0, 0.06), y - person.normal(0, 0.06)
    turn = person.normal(0, 0.18) + moment.normal(0, 0.04)  # radians
    size = person.uniform(0.62, 0.90) * (1 - 0.05 * level**2)
    # Outlines vary this much so that no patient is a near-duplicate of another.
    u = (x * np.cos(turn) + y * np.sin(turn)) / (size * person.uniform(0.72, 0.90))
    v = (y * np.cos(turn) - x * np.sin(turn)) / (size * person.uniform(0.92, 1.04))
    r, image = np.hypot(u, v), np.zeros_like(u)
    folds = np.sin(person.integers(17, 24) * np.arctan2(v, u) + person.uniform(0, 6) + 9 * r)
    inner = 0.73 + 0.02 * atrophy + 0.045 * folds  # where white matter begins
    for edge, value in ((1, scalp), (0.95, bone), (0.89, fluid), (0.86, cortex), (inner, white)):
        paint(image, edge - r, value)
    lesion = np.zeros(u.shape, bool)
    wide = person.uniform(0.75, 1.25) * (1 + 0.55 * atrophy) * (1 - 0.25 * level)
    for side in (-0.11, 0.11):  # the ventricles
        horn = ellipse(u - side, v, 0.06 * wide, 0.26 * wide**0.5)
        paint(image, horn, fluid)
        lesion |= (horn > 0) & (stage > 0)
    drift_x, drift_y = person.normal(0, 0.12, 2)
    contrast, gain, noise = person.uniform((0.7, 0.5, 0.015), (1.4, 1.05, 0.05))
    if label in PHANTOM_LESIONS:
        most, distances, radii, brighter = PHANTOM_LESIONS[label]
        for _ in range(person.integers((most + 1) // 2, most + 1)):
            angle, side = person.uniform(-1.3, 1.3), person.choice((-1, 1))
            far, radius = person.uniform(*distances), person.uniform(*radii)
            across, down = side * far * np.cos(angle), far * np.sin(angle)
            mass = ellipse(u - across, v - down, radius, 1.2 * radius)
            mass = np.minimum(mass, 0.885 - r)  # no further than the skull
            paint(image, mass, white + brighter)
            lesion |= mass > 0
    # The scanner: gain that drifts across the head, contrast, and Rician noise, as MRI has it.
    image = gain * np.clip(image * (1 + drift_x * x + drift_y * y), 0, 1.2) ** contrast
    image = np.hypot(image + moment.normal(0, noise, u.shape), moment.normal(0, noise, u.shape))
    return (np.clip(image, 0, 1) * 255).astype(np.uint8), lesion


# ---------------------------------------------------------------------------------------------
# The whole folder
# ---------------------------------------------------------------------------------------------


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
        UserError: as `open_folder`, `load_images`, `read_names` and `read_table`, or the pattern
            finds nobody.
        OSError: a folder or a file cannot be opened, or the cache not written.
    """
    root_name = root.resolve().name if root else ""
    files, notices = open_folder(root, labels) if root else (phantom_names(), [])
    # From here on nothing reads the files again: names, thumbnails and hashes decide everything.
    images = load_images(root, files, image_size, cache, progress)
    names = images.names
    if pattern and not any(find_capture(name, pattern) for name in names):
        found = f"finds a patient in none of {len(names)} names, such as {names[0]!r}"
        raise UserError(f"--patient-pattern {pattern.pattern!r} {found}")
    task, label, published, patients, doubts = np.full((5, len(names)), "", object)
    groups = np.arange(len(names))
    study = Study(root, images, notices, task, label, published, patients, groups, doubts, {})
    read_names(study, root_name, pattern)
    if labels:
        read_table(labels, study, root_name)
    group_images(study)
    if not study.patients.any() and numbered_by_patient(names):
        notices.append(f"names repeat; are they patients? --patient-pattern '{NUMBERED}'")
    # The groups are the whole folder's, the splits each task's: one person may stand in two tasks.
    for name in sorted(set(study.task) - {""}):
        study.tasks[name] = make_task(study, name, resplit)
    return study


def load_files(paths: list[Path], image_size: int, cache: Path, progress: Callable) -> Images:
    """Read files and folders that were typed for their images alone: no tasks, no groups.

    Raises:
        UserError: one is not there, or a folder has no images.
    """
    files = []
    for path in paths:
        if path.is_dir():
            files += [(path / name).as_posix() for name in open_folder(path, None)[0]]
        elif path.is_file():
            files.append(path.as_posix())
        else:
            raise UserError(f"{path} is not there; give images, volumes, shards or folders")
    return load_images(Path(), list(dict.fromkeys(files)), image_size, cache, progress)


def lesion_of(root: Path | None, name: str, size: int) -> np.ndarray:
    """Where an image is known to be diseased: on phantoms, and where a mask lies by the volume.

    Args:
        root: the data folder; None for the phantoms.
        name: as in `Images.names`.
        size: S, of the square that the image became.

    Returns:
        (S, S) bool, True = diseased; all False where nothing is known.
    """
    white = np.uint8(255)  # what the image went through, resizing included, its lesion does too
    lesion = np.zeros((size, size), np.uint8)
    volume = VOLUME.match(name)
    if root is None:
        lesion = draw_phantom(name)[1] * white
    elif volume and lesion_mask(root / volume[0]).is_file():
        lesions, affine = read_nifti(lesion_mask(root / volume[0]))
        level = lesions[..., int(name.split("/")[-1])]
        lesion = axial((level > 0.5) * white, affine)
    return fit_square(lesion, size) > 127
