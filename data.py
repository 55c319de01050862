"""Turn a folder of brain scans into pictures, groups, tasks and pairs of augmented views.

Three ideas carry this file. (1) A picture is decoded once, to one gray square of bytes; everything
later reads that array. (2) Pictures that belong together (one patient, or near-identical copies)
form a *group*, and a group is never cut: if one slice of a head is in the test part, no other slice
of it is in training. Most published scores on these data sets come from ignoring this. (3) The same
slice, cropped, turned and blurred twice at random, gives two *views*; learning to recognise which
views share a slice is the whole of SimCLR's supervision.

    twins:    cos(t, t') >= 0.98  or  cos(t, mirror(t')) >= 0.98,   t = 32x32 thumbnail - its mean
    view:     x~ = normalise( blur( jitter( x[ C F R A (u, v, 1) ] ) ) )   (arXiv 2002.05709, §3)
              C crop, F flip, R rotation, A affine: one 3x3 matrix, so one resampling of the pixels

Shape letters: N slices in a batch (so 2N views) · C channels · H, W pixels · E encoder features ·
D projection dimensions · K classes. Here also n pictures in all, V views, S = image size.

Departures from the paper (§3 and appendix A of 2002.05709):
  - grayscale once at load: hue, saturation and random grayscale do nothing to a gray picture;
  - crops are drawn from 20 % of the area up, not 8 %: a lesion should stay in sight of both views;
  - jitter of 0.4 where the paper has 0.8, brightness always before contrast: gray values are half
    of what tells tissues apart;
  - crop sides are clamped to the picture, not redrawn until they fit, so that every view takes
    the same count of random numbers;
  - a small rotation and affine are added: heads lie differently in every scanner.

Next: simclr.py
"""

import fcntl
import gzip
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import threading
import warnings
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, permutations
from pathlib import Path
from re import Pattern
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Generator, Tensor
from torch.utils.data import DataLoader

THUMBNAIL = 32  # pixels a side: enough to know a head again, too few to see the noise
TWIN_COSINE = 0.98  # finds exactly 200 groups, its people, in the Kaggle Alzheimer set
MAX_UNREADABLE = (5, 0.01)  # more than five *and* more than 1 % unreadable pictures stop a run
MAX_BYTES = 1 << 28  # of a picture's file: 89 megapixels of three colours, not compressed
FEW = 64  # so few pictures are decoded before other processes have started
SKETCH = 128  # directions that tell most thumbnails apart, before all 1,024 pixels are compared
BLOCK = 128  # thumbnails compared with all others at once
CACHE_VERSION = 3  # raise it when reading, shrinking or the phantoms change: old caches are left
WINDOW = (1, 99.9)  # percentiles of a volume that become black and white; its air is half of it
NEAR_EMPTY = 0.1  # a slice with less in it than this share of the fullest slice's is left out
LESION_AREA = 7.0  # mm^2 in a slice: a disc of 3 mm, the least that counts as a lesion of MS


class UserError(Exception):
    """Something the user can mend; main.py prints it as one line and exits with status 2."""


# ---------------------------------------------------------------------------------------------
# Writing, and random numbers
# ---------------------------------------------------------------------------------------------


@contextmanager
def write_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing such that a reader sees the old file or the new one, never half.

    The bytes go to a temporary file beside `path`, are flushed to disk, and are renamed at the
    end; after an exception the temporary file is gone and the old file is untouched.

    Args:
        path: where the file shall stand; missing folders are made.

    Yields:
        A binary file, open for reading and writing.

    Raises:
        UserError: it cannot be written: the disk is full, or the folder read-only, or gone.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # a rename can reach the disk before the bytes it names
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        # torch.save turns what its file raised into an error of its own
        why = error if isinstance(error, OSError) else error.__context__
        if not isinstance(why, OSError):
            raise
        raise unwritable(path, why) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def unwritable(path: Path, error: OSError) -> UserError:
    """What to tell the user whose disk is full, or whose folder is read-only, or gone."""
    return UserError(
        f"{path} cannot be written ({error.strerror or error}); what stood there before is as it "
        "was; mend that (make room, say) or give another place, then type the same command"
    )


@contextmanager
def locked(folder: Path, wait: bool) -> Iterator[None]:
    """Hold a folder, which the system lets go when this process ends, in whatever way.

    Args:
        folder: made where it is missing.
        wait: until another process lets go of it; else that is an error.

    Raises:
        UserError: another process holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    except BlockingIOError:
        text = f"another run is writing into {folder}; wait for its end, or give another --out"
        raise UserError(text) from None
    finally:
        os.close(held)


def seed_from(*key: int) -> int:
    """One 63-bit seed from several whole numbers, such as (seed, epoch, step).

    Every step asks for its own seed instead of going on with a running stream. So a resumed run
    needs no generator state, and the step's numbers do not depend on what ran before it. NumPy's
    SeedSequence mixes the numbers, so that neighbouring steps get unrelated streams.

    Args:
        key: whole numbers >= 0, in every call as many: a number that is left out counts as 0.

    Returns:
        In [0, 2^63), what torch.manual_seed takes.
    """
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator_for(*key: int) -> Generator:
    """A CPU generator for one step: its numbers are a function of `key` alone (`seed_from`)."""
    return Generator().manual_seed(seed_from(*key))


# ---------------------------------------------------------------------------------------------
# The tasks, and how a folder is read as tasks and classes
# ---------------------------------------------------------------------------------------------


class KnownTask(NamedTuple):
    """What we know of a task beforehand.

    `patient` is searched in "<class folder>/<file name>"; its first capture group is the patient.
    """

    classes: tuple[str, ...]  # in the order in which they are reported
    called: str = "$^"  # found in the name of a folder that holds this task
    aliases: dict[str, str] = {}
    patient: Pattern | None = None


# "58 (1).jpg" is slice 1 of patient 58, and the numbers begin anew in each class folder.
STROKE_PATIENT = re.compile(r"^([^/]+/\d+) \(\d+\)\.\w+$")
TUMORS = ("glioma", "meningioma", "notumor", "pituitary")
STAGES = ("non", "very_mild", "mild", "moderate")
KNOWN_TASKS = {
    "tumor": KnownTask(TUMORS, "tumor", {"no": "notumor"}),
    "stroke": KnownTask(("normal", "stroke"), "stroke", {"no_stroke": "normal"}, STROKE_PATIENT),
    "alzheimer": KnownTask(STAGES, "alzheimer", {"verymild": "very_mild"}),
    "parkinson": KnownTask(("normal", "parkinson"), "parkinson"),
    "ms": KnownTask(("no-lesion", "lesion"), "^ms$|sclerosis", {"no_lesion": "no-lesion"}),
}
# What publishers append to a class: glioma_tumor, MildDemented, "Very mild Dementia".
CLASS_ENDING = re.compile(r"_?(tumor|demented|dementia)$")
# What names a person in any source. The last, p0012, is a folder of the phantoms.
PATIENT = re.compile(
    r"(?:^|[/_ -])(patient[-_ ]?\d+|sub-(?=[a-z]*\d)[a-z0-9]+|oas1_\d+|p\d{4}(?=/))", re.IGNORECASE
)
# Folders that say nothing: those below a person, as BIDS has them; what publishers put all into.
PLAIN = re.compile(r"(ses-\w+|anat|dwi|func|perf|data|dataset|images)$", re.IGNORECASE)
PARTS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
PARTS |= {"val": "val", "valid": "val", "validation": "val"}
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".parquet")
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")  # Pillow knows more; some start programs
MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"BM", b"GIF8", b"II*\0", b"MM\0*")
VOLUME = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
SLICE = re.compile(r"(.*\.nii(?:\.gz)?)/", re.IGNORECASE)  # the volume that a slice is of
SHARD = re.compile(r"\.parquet$", re.IGNORECASE)
# Volumes that mark something, and show nothing.
MASK = re.compile(r"mask|lesionseg|(?<![a-z])([ad]?seg|aparc|roi|labels?|lesions?)(?![a-z])", re.I)


def is_picture(path: str) -> bool:
    """True where the ending or the first bytes say so: publishers name PNGs .jpg, or nothing.

    So are volumes and shards, which hold many; but a volume that marks lesions is no picture.
    """
    if not os.path.isfile(path) and os.path.exists(path):
        return False  # a pipe or a socket: opening it would wait for ever
    if VOLUME.search(path):
        return not MASK.search(os.path.basename(path))
    if path.lower().endswith(ENDINGS):
        return True
    try:
        with open(path, "rb") as file:
            start = file.read(12)
    except OSError:
        return False
    return start.startswith(MAGIC) or (start[:4] == b"RIFF" and start[8:] == b"WEBP")


def list_pictures(root: Path) -> tuple[list[str], int]:
    """Every picture below `root`, and how many other files lie there.

    A folder that may not be opened is listed as a picture, so that it is named with those that
    cannot be read; passing over it in silence would change the split.

    Returns:
        (paths below root with forward slashes, sorted; the count of other files)
    """
    closed, found, others = [], [], 0
    walk = os.walk(root, onerror=lambda error: closed.append(error.filename), followlinks=True)
    for folder, folders, files in walk:
        above = map(os.path.realpath, Path(folder).parents)  # lazily: only links are compared
        if os.path.islink(folder) and os.path.realpath(folder) in above:
            folders.clear()  # a link to a folder above itself would be walked for ever
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        # macOS leaves a hidden ._name.jpg beside name.jpg, which is none.
        shown = [os.path.join(folder, name) for name in files if not name.startswith(".")]
        pictures = [path for path in shown if is_picture(path)]
        found += pictures
        others += len(files) - len(pictures)
    below = len(os.path.join(root, ""))
    return sorted(path[below:] for path in found + closed), others


class Source(NamedTuple):
    """Class folders that stand side by side: where, as which task, and which picture is which."""

    folder: str  # below --data, without parts and patients; '' is --data itself
    task: str
    classes: tuple[str, ...]
    rows: list[tuple[int, str, str, str]]  # (picture, class, publisher's part or '', "class/file")


def plain_folders(path: str, pattern: Pattern | None) -> tuple[tuple[str, ...], str]:
    """The folders of a path that can name a task or a class, and the publisher's part in it.

    Folders that name a part, a patient or a visit may stand anywhere between: they are taken out;
    so are those that `pattern` knows for a patient's. A volume or shard is a folder of its slices.

    >>> plain_folders("tumor/Training/glioma/sub-01/1.png", None)
    (('tumor', 'glioma'), 'train')
    """
    own = pattern.search(path) if pattern else None
    whose = (own[1], own[0].strip("/")) if own else ()
    folders, part = [], ""
    for name in path.split("/")[:-1]:
        holds = VOLUME.search(name) or SHARD.search(name)  # such as train-00000-of-00001.parquet
        word = re.split(r"[-.]", name)[0].lower() if holds else name.lower()
        part = PARTS.get(word, part)
        known = holds or name in whose or PATIENT.match(name + "/") or PLAIN.match(name)
        folders += [] if known or word in PARTS else [name]
    return tuple(folders), part


def spell(names: Iterable[str], known: KnownTask) -> dict[str, str]:
    """Each folder's name as a class of a known task: lower case, its usual endings taken off."""
    plain = {name: re.sub(r"[ _-]+", "_", name.strip().lower()) for name in names}
    short = {name: CLASS_ENDING.sub("", text) for name, text in plain.items()}
    short = {name: known.aliases.get(text, text) for name, text in short.items()}
    return {n: text if text in known.classes else plain[n] for n, text in short.items()}


def name_task(folder: tuple[str, ...], root_name: str, names: set[str]) -> str:
    """The task of the class folders `names` in `folder`.

    Where they are all of a known task's classes, that; else the one that the innermost folder
    around them is called after; else the topmost folder.
    """
    for task, known in KNOWN_TASKS.items():
        if set(spell(names, known).values()) == set(known.classes):
            return task
    # A data folder's own name counts where it is the task's, or where nothing else is there.
    root = (root_name,) * (not folder or root_name.lower() in KNOWN_TASKS)
    tasks = [(name, *task) for name in (*root, *folder) for task in KNOWN_TASKS.items()]
    called = [task for name, task, known in tasks if re.search(known.called, name.lower())]
    return called[-1] if called else (*folder, root_name)[0]


def find_sources(paths: list[str], root_name: str, pattern: Pattern | None) -> list[Source]:
    """Read a tree of folders as tasks and classes.

    Two or more folders side by side are classes, unless classes stand side by side in one of
    them; a known task's own class names are classes whatever lies below them. (So a folder for each
    patient below a class has to be known as a patient's, or the patients are taken for classes.)

    Args:
        paths: pictures below the data folder, with forward slashes.
        root_name: the data folder's own name, for a task that is the data folder itself.
        pattern: as in `patient_pairs`; a folder that it knows for a patient's is no class.

    Returns:
        The sources; a picture in none of them is unlabelled.
    """
    tree: dict[tuple[str, ...], dict[str, list[int]]] = {}  # folder -> name in it -> rows below
    plain = [plain_folders(path, pattern) for path in paths]
    for row, (folders, _) in enumerate(plain):
        for depth, name in enumerate(folders):
            tree.setdefault(folders[:depth], {}).setdefault(name, []).append(row)

    def visit(folder: tuple[str, ...]) -> list[Source]:
        """The sources in a folder and below it."""
        kids = tree.get(folder, {})
        spelled = [(spell(kids, known), known.classes) for known in KNOWN_TASKS.values()]
        named = max(([n for n in kids if s[n] in classes] for s, classes in spelled), key=len)
        named = named if len(named) > 1 else []
        below = [s for name in kids if name not in named for s in visit((*folder, name))]
        names = named if below else list(kids)
        # Where a publisher made parts, a folder that has none of them is beside the classes.
        names = [n for n in names if any(plain[r][1] for r in kids[n])] or names
        if len(names) < 2:
            return below
        task = name_task(folder, root_name, set(names))
        known = KNOWN_TASKS.get(task, KnownTask(()))
        spelling = spell(names, known) if known.classes else {name: name for name in names}
        # Labels that a shard has no names for are numbers; Hugging Face deals them out by alphabet.
        numbers = dict(zip("0123456789", sorted(known.classes), strict=False))
        spelling = numbers if set(names) == set(numbers) else spelling
        files = [(r, name, os.path.basename(paths[r])) for name in names for r in kids[name]]
        # A training part alone (Hugging Face calls a whole data set "train") is no split.
        split = {plain[r][1] for r, *_ in files} & {"val", "test"}
        rows = [(r, spelling[n], plain[r][1] if split else "", f"{n}/{f}") for r, n, f in files]
        found = set(spelling.values())
        if len(found) < 2:  # one class in two spellings
            return below
        order = [class_ for class_ in known.classes if class_ in found]
        return [Source("/".join(folder), task, (*order, *sorted(found - set(order))), rows), *below]

    return tell_apart(visit(()), root_name)


def tell_apart(sources: list[Source], root_name: str) -> list[Source]:
    """Rename sources that share a task's name but not its classes.

    Sources pool when their classes are the same; else each is a task named by its own folder, and
    where two folders have one name, by its path, and else by its classes. A known task's full set
    of classes keeps its name.
    """
    full = {(task, known.classes) for task, known in KNOWN_TASKS.items()}
    for k in range(3):  # as long as names are shared: by folder, by path, by classes
        kinds = {(s.task, s.classes) for s in sources}
        names = [task for task, _ in kinds]
        for i, s in enumerate(sources):
            if names.count(s.task) > 1 and (s.task, s.classes) not in full:
                folders = s.folder.split("/")
                name = (folders[-1], "-".join(folders), "-".join((s.task, *s.classes)))[k]
                sources[i] = s._replace(task=name or root_name)
    return sources


# ---------------------------------------------------------------------------------------------
# Reading a picture
# ---------------------------------------------------------------------------------------------


def read_gray(path: str | Path) -> np.ndarray:
    """Decode one picture, of any PIL mode, as gray bytes at its own size.

    Its content, not its ending, says how. Colour becomes luma (ITU-R 601, as PIL's "L"), what is
    transparent becomes black, and pixels of 16 bits or of floating point are scaled by their own
    range (clipping would leave white). An animation gives its first frame.

    Returns:
        (H, W) uint8 in [0, 255].

    Raises:
        OSError, ValueError, SyntaxError: PIL could not read it.
    """
    with Image.open(path, formats=FORMATS) as image:
        # A colour JPEG stores luma apart, and the decoder can leave the colours packed: twice as
        # fast at 512 px. It could shrink, too, but hash and thumbnail have to see every pixel.
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
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
        return np.asarray(image.convert("L"))


NIFTI_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8"}  # a NIfTI-1 header's data types
NIFTI_TYPES |= {256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
MAX_VOXELS = 1 << 27  # 512^3: half a GiB of float32


def read_nifti(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a NIfTI-1 volume, .nii or .nii.gz, and turn it so that its axes are a patient's.

    A file is a header of 348 bytes and then, from `offset` on, the voxels, the first axis fastest.
    Of a series of volumes the first is read. https://nifti.nimh.nih.gov/nifti-1 lists the fields.

    Returns:
        (volume (X, Y, Z) float32, its axes running to the patient's right, front and top (RAS+);
        the affine (4, 4) float64 from its voxel indices to mm)

    Raises:
        OSError, ValueError, EOFError, zlib.error: it cannot be read, or is no such volume of real
            numbers.
    """
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with (gzip.open if packed else open)(path, "rb") as file:
        header = file.read(348)
        if len(header) < 348 or header[344:348] != b"n+1\0":
            raise ValueError("no NIfTI-1 volume in one file: it would have a header with n+1 in it")
        order = "<" if header[:4] == (348).to_bytes(4, "little") else ">"  # the header's own size

        def field(at: int, kind: str, count: int) -> list:
            """Numbers that begin at byte `at` of the header."""
            return np.frombuffer(header, order + kind, count, at).tolist()

        (axes, *dim), (code,) = field(40, "i2", 8), field(70, "i2", 1)
        shape = [length if axis < axes else 1 for axis, length in enumerate(dim[:3])]
        count = math.prod(shape)
        if code not in NIFTI_TYPES or min(shape) < 1 or not 0 < axes < 8 or count > MAX_VOXELS:
            raise ValueError(f"data type {code}, {axes} axes of {dim}: no volume of real numbers")
        offset, slope, inter = field(108, "f4", 3)
        kind = np.dtype(order + NIFTI_TYPES[code])
        file.seek(int(offset))
        voxels = file.read(count * kind.itemsize)  # no more, whatever else would unpack
    volume = np.frombuffer(voxels, kind, count).reshape(shape, order="F")
    inter = inter if math.isfinite(inter) else 0.0
    if slope and math.isfinite(slope) and (slope, inter) != (1, 0):  # 0, nan: they are the values
        volume = volume * slope + inter
    affine, pixdim = np.eye(4), np.array(field(76, "f4", 8))
    qform, sform = field(252, "i2", 2)
    if sform > 0:  # a matrix
        affine[:3] = np.reshape(field(280, "f4", 12), (3, 4))
    elif qform > 0:  # a turn by the unit quaternion a + ib + jc + kd, then a shift
        b, c, d, *shift = field(256, "f4", 6)
        a = math.sqrt(max(0, 1 - b * b - c * c - d * d))
        cross = np.array([[0, -d, c], [d, 0, -b], [-c, b, 0]])
        turn = np.eye(3) + 2 * a * cross + 2 * cross @ cross  # Rodrigues, in half angles
        affine[:3, :3] = turn * pixdim[1:4] * (1, 1, -1 if pixdim[0] < 0 else 1)
        affine[:3, 3] = shift
    else:  # as in ANALYZE, the format before: voxels run to the left
        affine[:3, :3] = np.diag(pixdim[1:4] * (-1, 1, 1))
        affine[:3, 3] = affine[:3, :3] @ (1 - np.array(shape)) / 2
    return to_ras(volume.astype(np.float32), affine)


def to_ras(volume: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exchange and mirror a volume's axes until they run to the patient's right, front and top.

    Nothing is resampled: each axis goes to the direction that is nearest to it.

    Raises:
        ValueError: the affine has no inverse.
    """
    if not abs(np.linalg.det(affine)) > 0:  # nan is not, either
        raise ValueError("its affine, voxels to millimetres, has no inverse")
    cosines = np.abs(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))
    best = max(permutations(range(3)), key=lambda axes: cosines[range(3), axes].sum())
    volume, affine = volume.transpose(best), affine[:, [*best, 3]]
    for axis in range(3):
        if affine[axis, axis] < 0:
            volume = np.flip(volume, axis)
            affine[:, 3] += affine[:, axis] * (volume.shape[axis] - 1)
            affine[:, axis] *= -1
    return volume, affine


def lesion_mask(path: str | Path) -> Path | None:
    """Where the lesions of a volume are marked: for 7-Flair.nii, 7-LesionSeg-Flair.nii beside it.

    A mask counts for the sequence in its name alone: what shines on FLAIR may not be seen on T1.
    """
    before, dash, sequence = VOLUME.sub("", Path(path).name).rpartition("-")
    stem = f"{before}{dash}LesionSeg-{sequence}"
    found = (Path(path).with_name(stem + ending) for ending in (".nii", ".nii.gz"))
    return next((mask for mask in found if mask.is_file()), None)


def volume_slices(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """The axial slices of a volume, front up, the patient's left on the picture's right.

    Gray values are cut off at percentiles of the whole volume, so that slices can be compared.
    Slices with next to nothing in them are left out.

    Yields:
        (name, (H, W) uint8), from the feet up; the name is the slice's number and, where there is a
        lesion mask, its class before it: "lesion/101" has at least LESION_AREA of lesion.

    Raises:
        UserError: the mask is on another grid than the volume.
        OSError, ValueError, EOFError, zlib.error: as in `read_nifti`.
    """
    (volume, affine), mask = read_nifti(path), lesion_mask(path)
    classes = [""] * volume.shape[2]
    if mask:
        lesions, grid = read_nifti(mask)
        if lesions.shape != volume.shape or not np.allclose(grid, affine, atol=0.01):
            grids = f"the lesion mask {mask} {lesions.shape} and its volume {path} {volume.shape}"
            raise UserError(f"{grids} are on two grids; resample one, or take the mask away")
        area = (lesions > 0.5).sum(axis=(0, 1)) * abs(np.linalg.det(affine[:2, :2]))  # (Z,) mm^2
        classes = np.where(area >= LESION_AREA, "lesion/", "no-lesion/")
    finite = np.isfinite(volume)
    if not finite.any():
        raise ValueError("no voxel of it has a number")
    low, high = map(
        float, np.percentile(volume[finite], WINDOW)
    )  # numpy's would make float64 of all
    if low == high:
        raise ValueError("there is nothing in it: its gray values are the same nearly everywhere")
    gray = ((np.where(finite, volume, low) - low) / (high - low)).clip(0, 1)
    full = (gray > 0.1).sum(axis=(0, 1))  # (Z,) pixels with something in them
    for z in np.flatnonzero(full > NEAR_EMPTY * full.max()):
        yield f"{classes[z]}{z}", axial((gray[..., z] * 255).round().astype(np.uint8), affine)


def axial(values: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """One level (X, Y) uint8 of a volume in RAS+, front up, left on the right, pixels square."""
    side = np.linalg.norm(affine[:3, :2], axis=0)  # of a voxel, in mm
    size = np.round(side / side.min() * values.shape).astype(int)
    slice_ = Image.fromarray(values[::-1, ::-1].T)
    return np.asarray(slice_.resize(size, Image.Resampling.BILINEAR))


read_once = lru_cache(maxsize=1)(read_nifti)  # a volume's slices ask for its mask one by one


def lesion_of(root: Path | None, path: str, size: int) -> np.ndarray:
    """Where a picture is known to be diseased: on phantoms, and where a mask lies by the volume.

    Args:
        root: the data folder; None for the phantoms.
        path: of the picture, below it.
        size: S, of the square that the picture became.

    Returns:
        (S, S) bool, True = diseased; all False where nothing is known.
    """
    match = SLICE.match(path) if root else None
    mask = lesion_mask(root / match[1]) if match and (root / match[1]).is_file() else None
    if root and not mask:
        return np.zeros((size, size), bool)
    if root:
        lesions, affine = read_once(mask)
        there = axial((lesions[..., int(path.split("/")[-1])] > 0.5) * np.uint8(255), affine)
    else:
        there = draw_phantom(path)[1] * np.uint8(255)
    return fit_square(there, size) > 127


def open_shard(path: str | Path) -> Any:
    """A parquet file, opened with pyarrow, which is no package of ours and imported here alone.

    Raises:
        UserError: pyarrow is not installed.
        OSError, ValueError: it cannot be read.
    """
    try:
        from pyarrow import parquet
    except ImportError:
        text = f"{path} is a parquet shard, and pyarrow, which reads it, is not installed"
        raise UserError(f"{text}; type: pip install pyarrow") from None
    return parquet.ParquetFile(path, memory_map=True)


def shard_pictures(path: str | Path, group: int) -> Iterator[tuple[str, np.ndarray | Exception]]:
    """The pictures of one row group of a Hugging Face data set: `image` {bytes, path} and `label`.

    Yields:
        (name, (H, W) uint8, or why it cannot be read); the name is the row's number and, where it
        has a label, before it the class as the schema's metadata calls it, or else its number.
    """
    with open_shard(path) as shard:
        about = json.loads((shard.schema_arrow.metadata or {}).get(b"huggingface", "{}"))
        names = about.get("info", {}).get("features", {}).get("label", {}).get("names")
        names = dict(enumerate(names or ())) | {None: "", -1: ""}  # -1 = not labelled
        first = sum(shard.metadata.row_group(before).num_rows for before in range(group))
        columns = [name for name in ("image", "label") if name in shard.schema_arrow.names]
        if "image" not in columns:
            raise ValueError(f"no column called image, only {shard.schema_arrow.names}")
        batches = shard.iter_batches(64, row_groups=[group], columns=columns, use_threads=False)
        entries = (entry for batch in batches for entry in batch.to_pylist())
        for row, entry in enumerate(entries, first):
            label = entry.get("label")
            class_ = str(names.get(label, label)).replace("/", "_")[:40]
            try:
                image = entry["image"]
                gray = read_gray(io.BytesIO(image["bytes"] if isinstance(image, dict) else image))
            except Exception as error:
                gray = error
            yield f"{class_}/{row}".lstrip("/"), gray


def fit_square(gray: np.ndarray, size: int) -> np.ndarray:
    """Resize a picture so that its long side is `size`, and pad it black to a square.

    The aspect ratio is kept: a head squashed to a square would teach the encoder the scanner's
    picture format.

    Args:
        gray: (H, W) uint8.
        size: S > 0, pixels.

    Returns:
        (S, S) uint8; black columns or rows lie evenly on both sides.
    """
    # PIL's bilinear widens its window when it shrinks, so fine structure is averaged, not skipped.
    shape, method = (size, size), Image.Resampling.BILINEAR
    return np.asarray(ImageOps.pad(Image.fromarray(gray), shape, method))


def thumbnail(gray: np.ndarray) -> np.ndarray:
    """The whole decoded picture, squashed to 32x32 by area averaging.

    It is made from the original, so that groups and splits do not depend on --image-size. Area
    averaging matters: bilinear interpolation blurs strangers into chains of "twins".

    Args:
        gray: (H, W) uint8.

    Returns:
        (32, 32) uint8, the aspect ratio not kept: padding would look alike in strangers.
    """
    return np.asarray(Image.fromarray(gray).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))


@dataclass(frozen=True)
class Pictures:
    """Every picture of a folder, decoded once. Row r of each array is the picture `paths[r]`."""

    paths: list[str]
    thumbnails: np.ndarray  # (n, 32, 32) uint8
    hashes: np.ndarray  # (n, 16) uint8, the first half of the SHA-256 of the gray pixels
    unreadable: dict[int, str]  # row -> why; its row of the arrays means nothing
    cached: np.ndarray  # memory-mapped rows of the cache, in the order they were decoded in
    place: np.ndarray  # (n,) int64, the row of `cached` that holds a picture

    def squares(self, rows: np.ndarray) -> np.ndarray:
        """The pictures of `rows` (m,), shrunk and padded to squares: (m, S, S) uint8."""
        return self.cached["square"][self.place[rows]]

    def names(self) -> np.ndarray:
        """(n,) bytes: the hashes in a form that can be compared at once."""
        return self.hashes.view("S16")[:, 0]


def row_type(size: int) -> np.dtype:
    """A row of the cache: one picture, or why it cannot be read.

    The rows of a file are written at once, and the last has the key. So rows after the last key are
    of a write that was cut short.
    """
    fields = [("key", "S16"), ("name", "S192"), ("why", "S96"), ("hash", "u1", 16)]
    fields += [("thumbnail", "u1", (THUMBNAIL, THUMBNAIL)), ("square", "u1", (size, size))]
    return np.dtype(fields)


def map_rows(file: Path, size: int) -> tuple[np.ndarray, dict[bytes, range]]:
    """The rows of a cache file, memory-mapped (one empty row if none), and those of each key.

    What a write that was cut short has left is taken off.
    """
    kind = row_type(size)
    file.touch()
    count = file.stat().st_size // kind.itemsize
    rows = np.memmap(file, kind, "r", shape=count) if count else np.zeros(1, kind)
    ends = np.flatnonzero(rows["key"] != b"") + 1
    os.truncate(file, ends.max(initial=0) * kind.itemsize)
    ranges = map(range, np.append(0, ends).tolist(), ends.tolist())  # each from the end before it
    found = dict(zip(rows["key"][ends - 1].tolist(), ranges, strict=True))
    return rows[: ends.max(initial=1)], found


def row_groups(path: str) -> range:
    """The parts that a file can be decoded in: a shard has many."""
    try:
        return range(open_shard(path).num_row_groups or 1 if SHARD.search(path) else 1)
    except (OSError, ValueError):
        return range(1)  # decoding will say why


def decode_part(job: tuple[Path | None, str, int, bytes, int]) -> bytes | Exception:
    """Decode a picture, a volume, or a row group of a shard.

    Args:
        job: (data folder or None for phantoms, path below it, row group, key, pixels a side).

    Returns:
        its rows for the cache, or why it cannot be read.
    """
    root, path, group, key, size = job
    rows = []
    try:
        limit = MAX_BYTES + 8 * MAX_VOXELS * bool(VOLUME.search(path))
        if root and not SHARD.search(path) and (count := os.stat(root / path).st_size) > limit:
            raise ValueError(f"{count:,} bytes, where at most {limit:,} are read")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata is nobody's concern, but a picture of
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # > 89 megapixels is out
            if VOLUME.search(path):
                slices = volume_slices(root / path)
            elif SHARD.search(path):
                slices = shard_pictures(root / path, group)
            else:
                slices = [("", read_gray(root / path) if root else draw_phantom(path)[0])]
            for name, gray in slices:
                row = np.zeros((), row_type(size))
                row["name"] = os.fsencode(name)
                if isinstance(gray, Exception):
                    row["why"] = os.fsencode(f"{type(gray).__name__}: {gray}")
                else:
                    digest = hashlib.sha256(np.ascontiguousarray(gray)).digest()
                    row["hash"] = np.frombuffer(digest, np.uint8, 16)
                    row["thumbnail"], row["square"] = thumbnail(gray), fit_square(gray, size)
                rows.append(row)
        if not rows:
            raise ValueError("there is nothing in it")
        rows[-1]["key"] = key
        return b"".join(row.tobytes() for row in rows)
    except Exception as error:  # a broken file can make PIL raise nearly anything
        return error


def follow_parent(_: int) -> None:
    """End this process when the command does: one that outlives a kill would keep the lock."""
    ended = multiprocessing.parent_process().join
    threading.Thread(target=lambda: (ended(), os._exit(1)), daemon=True).start()


def decode_parts(jobs: list[tuple]) -> list[bytes | Exception]:
    """`decode_part`, several times: what a process is given at once."""
    return [decode_part(job) for job in jobs]


def decode(
    root: Path | None, parts: dict[tuple[str, int], str], size: int, cache: Path, progress: Callable
) -> Pictures:
    """Decode the files that are not in the cache yet, on every core, and map all their pictures.

    The cache of a folder is one file of equal rows, found by a digest of a file's path and stamp.
    Rows are only ever appended; a file that changed has a new stamp and gets new rows.

    Args:
        root: the data folder; None for the phantoms.
        parts: for each file's path and each of its row groups, a text that changes when it does.
        size: S > 0, pixels a side.
        progress: wraps an iterable and shows how far it is, as tqdm does.
    """
    folder = os.fsencode(f"{CACHE_VERSION} {root.resolve() if root else 'phantoms'}")
    file = cache / f"{hashlib.sha256(folder).hexdigest()[:12]}-{size}.rows"
    texts = (os.fsencode(f"{path}\0{text}\0{group}") for (path, group), text in parts.items())
    # Without zeros, which numpy takes off the end of a string.
    keys = (hashlib.sha256(text).digest()[:16].replace(b"\0", b"\1") for text in texts)
    parts_of = dict(zip(keys, parts, strict=True))  # {key: (path, row group)}
    known = map_rows(file, size)[1]
    jobs = [(root, *part, key, size) for key, part in parts_of.items() if key not in known]
    # Processes, not threads: half of the work on a small picture holds the interpreter's lock.
    many = len(jobs) >= FEW or any(VOLUME.search(j[1]) or SHARD.search(j[1]) for j in jobs)
    cores, failed = (os.cpu_count() or 1) * many, {}
    workers = {"num_workers": cores, "worker_init_fn": follow_parent, "generator": Generator()}
    batch = max(1, min(16, len(jobs) // (4 * cores + 1)))
    results = chain.from_iterable(DataLoader(jobs, batch, collate_fn=decode_parts, **workers))
    results = progress(results, total=len(jobs), desc="decode", unit="file")
    try:
        with open(file, "ab") as out:
            for (*_, key, _), rows in zip(jobs, results, strict=True):
                if isinstance(rows, UserError):
                    raise rows
                if isinstance(rows, Exception):
                    failed[key] = f"{type(rows).__name__}: {rows}"
                else:
                    out.write(rows)
                    out.flush()
    except OSError as error:  # what is written stays, and the next start goes on behind it
        raise unwritable(file, error) from error
    cached, known = map_rows(file, size)
    names, whys = ([*cached[field].tolist(), b""] for field in ("name", "why"))  # b"" for row -1
    paths, place, bad = [], [], {}
    for key, (path, _) in parts_of.items():
        for row in known.get(key, (-1,)):  # -1: it could not be decoded
            if why := failed.get(key) or os.fsdecode(whys[row]):
                bad[len(paths)] = why
            paths.append(f"{path}/{os.fsdecode(names[row])}".rstrip("/"))
            place.append(row)
    thumbnails, hashes = cached["thumbnail"][place], cached["hash"][place]
    thumbnails[list(bad)] = hashes[list(bad)] = 0
    return Pictures(paths, thumbnails, hashes, bad, cached, np.array(place, np.int64))


# ---------------------------------------------------------------------------------------------
# Groups: what must never be cut
# ---------------------------------------------------------------------------------------------


def sketch(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Shorten vectors to the directions in which they differ most (their principal ones).

    Returns:
        (the coordinates (n, 128) along these, the length (n,) of what they leave over)
    """
    gram = (vectors.T @ vectors).double()  # of one picture alone, LAPACK fails in single precision
    short = vectors @ torch.linalg.eigh(gram).eigenvectors[:, -SKETCH:].float()  # (n, 128)
    return short, (vectors.square().sum(dim=1) - short.square().sum(dim=1)).clamp(min=0).sqrt()


def twin_pairs(thumbnails: np.ndarray, threshold: float = TWIN_COSINE) -> np.ndarray:
    """Pairs of pictures that show the same thing, straight or mirrored left to right.

    A thumbnail is the sum of an even part e (equal to its own mirror) and an odd part o (its
    mirror's negative). The two are orthogonal, so with unit thumbnails

        cos(t, t') = e.e' + o.o'     cos(t, mirror(t')) = e.e' - o.o'     larger = e.e' + |o.o'|

    Two matrix products, made block by block, compare all pairs; and they need not be long ones.
    With s the sketch of a vector and r the length it leaves over, v.v' <= s.s' + r r' (Cauchy and
    Schwarz), so only the pairs that pass in the sketches are compared in full. None is missed, and
    a pair is decided in whole numbers: the same on every machine.

    Args:
        thumbnails: (n, 32, 32) uint8.
        threshold: cosine of the mean-free thumbnails, in [0, 1]; lower joins more.

    Returns:
        (m, 3) int64: rows i < j, each pair once, and 1 where only the mirror passes, else 0. A
        thumbnail of one colour is nobody's twin.

    Raises:
        ValueError: the thumbnails are not (n, 32, 32).
    """
    if thumbnails.ndim != 3 or thumbnails.shape[1:] != (THUMBNAIL, THUMBNAIL):
        raise ValueError(f"thumbnails must be (n, 32, 32), got {thumbnails.shape}")
    # The left half of t + mirror and of t - mirror tells all of each, the right half repeats it.
    t, half = torch.from_numpy(np.ascontiguousarray(thumbnails)), THUMBNAIL // 2
    left, right = t[:, :, :half].flatten(1).float(), t[:, :, half:].flip(2).flatten(1).float()
    even, odd = left + right, left.sub_(right)  # (n, 512) each
    even -= even.mean(dim=1, keepdim=True)
    length = torch.hypot(even.norm(dim=1), odd.norm(dim=1)).clamp(min=1e-3)[:, None]  # (n, 1)
    even, odd = even.div_(length), odd.div_(length)  # together unit, or zero
    (short_even, rest_even), (short_odd, rest_odd) = sketch(even), sketch(odd)
    short_even = torch.column_stack([short_even, rest_even, rest_odd])  # (n, 130): s.s' + r r'
    pairs = [torch.zeros(0, 3, dtype=torch.int64)]
    for i in range(0, len(even), BLOCK):
        bound = (short_odd[i : i + BLOCK] @ short_odd[i:].T).abs_()  # (BLOCK, n - i)
        bound = bound.addmm_(short_even[i : i + BLOCK], short_even[i:].T)
        passed = (bound > threshold - 1e-4).nonzero() + i
        for some in passed[passed[:, 0] < passed[:, 1]].split(1 << 12):
            a, b = (t[some[:, k]].double() for k in (0, 1))  # (m, 32, 32)
            # Whole numbers, whose sums are exact in any order: no machine decides otherwise.
            a, b = (x * THUMBNAIL**2 - x.sum(dim=(1, 2), keepdim=True) for x in (a, b))
            straight, mirror = (a * b).sum(dim=(1, 2)), (a * b.flip(2)).sum(dim=(1, 2))
            least = threshold * ((a * a).sum(dim=(1, 2)) * (b * b).sum(dim=(1, 2))).sqrt()
            found = torch.column_stack([some, straight < least])  # (m, 3)
            pairs.append(found[torch.maximum(straight, mirror) >= least])
    return torch.cat(pairs).numpy()


def cached_twins(thumbnails: np.ndarray, cache: Path) -> np.ndarray:
    """`twin_pairs`, computed once for the same thumbnails and kept in a file."""
    digest = hashlib.sha256(f"{CACHE_VERSION} {TWIN_COSINE}".encode())
    digest.update(np.ascontiguousarray(thumbnails))
    file = cache / f"{digest.hexdigest()[:12]}-twins.npy"
    if not file.exists():
        with write_atomically(file) as out:
            np.save(out, twin_pairs(thumbnails))
    return np.load(file)


def connected(n: int, pairs: np.ndarray) -> np.ndarray:
    """Connected components of n things joined by `pairs` (single linkage), without a Python loop.

    Every thing points at a smaller member of its component; each round hooks roots onto smaller
    roots and then halves the length of every chain of pointers. Pointers only ever fall, so it
    ends; when nothing changed, both ends of every pair point at the same root.

    Returns:
        (n,) int64 component numbers 0, 1, ... in order of first appearance.
    """
    label = np.arange(n)
    while True:
        a, b = label[pairs[:, 0]], label[pairs[:, 1]]
        hooked = label.copy()
        np.minimum.at(hooked, a, b)
        np.minimum.at(hooked, b, a)
        hooked = hooked[hooked]
        if np.array_equal(hooked, label):
            return np.unique(label, return_inverse=True)[1]
        label = hooked


def near_duplicate_groups(thumbnails: np.ndarray, threshold: float = TWIN_COSINE) -> np.ndarray:
    """Group near-identical pictures, mirrors included, by single linkage (see `twin_pairs`).

    Args:
        thumbnails: (N, 32, 32) uint8.
        threshold: cosine from which two pictures are twins.

    Returns:
        (N,) int64 group numbers 0, 1, ... in order of first appearance.
    """
    return connected(len(thumbnails), twin_pairs(thumbnails, threshold))


def same(keys: list[Hashable | None]) -> np.ndarray:
    """Join what has the same key: (m, 2) int64 rows, its first and each; none where it is None."""
    first: dict[Hashable, int] = {}
    pairs = [(first.setdefault(key, row), row) for row, key in enumerate(keys) if key is not None]
    return np.array(pairs, np.int64).reshape(-1, 2)


def homes_of(paths: list[str], sources: list[Source], pattern: Pattern | None) -> list[str]:
    """The folder that each picture belongs to, below the data folder.

    That is its source's, the one that holds the class folders. Unlabelled pictures belong to the
    source they lie in or, in none, to the topmost folder above them.
    """
    homes = {row: source.folder for source in sources for row, *_ in source.rows}
    for row in set(range(len(paths))) - set(homes):
        inside = "/".join((*plain_folders(paths[row], pattern)[0], ""))
        around = [s.folder for s in sources if inside.startswith(f"{s.folder}/".lstrip("/"))]
        homes[row] = max(around, key=len, default=inside.split("/")[0])
    return [homes[row] for row in range(len(paths))]


def patient_pairs(
    paths: list[str], sources: list[Source], homes: list[str], pattern: Pattern | None
) -> np.ndarray:
    """Join the pictures that folder names or file names give to one patient.

    An id counts within its home: patient 7 of one hospital is not patient 7 of another. An OASIS
    number, or an id that `pattern` finds, means the same person wherever it stands. Patient-07,
    patient_7 and patient7 are one.

    Args:
        paths: below the data folder, with forward slashes.
        homes: as `homes_of` gives them.
        pattern: asked first, of the whole path; its first capture group is the patient.

    Returns:
        (m, 2) int64 rows: each picture whose patient is known, and the patient's first one.

    Raises:
        UserError: no path matches the pattern.
    """
    if pattern and not any(match[1] for match in map(pattern.search, paths) if match):
        where = f"in none of the {len(paths)} paths, such as {paths[0]!r}"
        raise UserError(f"--group-pattern {pattern.pattern!r} finds a patient {where}; mend it")
    asked = [[(pattern, path), (PATIENT, path)] for path in paths]
    for source in sources:
        known = KNOWN_TASKS.get(source.task, KnownTask(())).patient
        for row, _, _, name in source.rows:
            asked[row].append((known, name))
    keys: list[tuple[str, str] | None] = []
    for home, questions in zip(homes, asked, strict=True):
        found = (match for ask, text in questions if ask and (match := ask.search(text)))
        match = next((match for match in found if match[1]), None)
        patient = re.sub(r"[-_ ]|(?<!\d)0+(?=\d)", "", match[1].lower()) if match else ""
        everywhere = match and (match.re is pattern or patient.startswith("oas1"))
        keys.append(("" if everywhere else home, patient) if match else None)
    return same(keys)


def mere_resemblance(
    twins: np.ndarray,
    volumes: np.ndarray,
    patients: np.ndarray,
    homes: list[str],
    names: np.ndarray,
) -> np.ndarray:
    """Which twins mean nothing: slices of volumes that look alike.

    Neighbours in a volume do, with and without a lesion, and so do strangers whose brains lie on
    one atlas. So within a volume, and between volumes of one source whose patients are known, only
    equal pixels count.

    Args:
        twins, patients: as `twin_pairs` and `patient_pairs` give them.
        volumes: (m, 2) int64, each slice of a volume, and that volume's first one before it.
        homes: as `homes_of` gives them.
        names: (n,) equal where the pixels are.

    Returns:
        (m,) bool for the rows of `twins`, True = to be taken out.
    """
    volume, home = np.full(len(names), -1), np.array(homes)
    volume[volumes[:, 1]] = volumes[:, 0]
    told = np.isin(np.arange(len(names)), patients[:, 1])
    a, b, _ = twins.T
    apart = (home[a] == home[b]) & told[a] & told[b] | (volume[a] == volume[b])
    return (volume[a] >= 0) & (volume[b] >= 0) & apart & (names[a] != names[b])


# ---------------------------------------------------------------------------------------------
# Phantoms: head slices drawn by code, so that everything runs, and is tested, without any data
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
# A disease's lesions: how many, how far from the middle, their radius (both in half lengths of the
# head), and how much brighter than white matter they are.
PHANTOM_LESIONS = {
    "glioma": ((1, 2), (0.38, 0.52), (0.13, 0.21), 0.30),
    "meningioma": ((1, 2), (0.74, 0.78), (0.11, 0.19), 0.28),  # on the inside of the skull
    "pituitary": ((1, 2), (0.00, 0.12), (0.07, 0.13), 0.24),
    "stroke": ((1, 2), (0.45, 0.60), (0.20, 0.32), -0.20),
    "lesion": ((3, 8), (0.16, 0.42), (0.025, 0.06), 0.35),  # multiple sclerosis
}


def phantom_paths() -> list[str]:
    """The paths of all phantoms, such as tumor/glioma/p0012/3: task, class, patient, slice."""
    return [
        f"{task}/{class_}/p{k * PHANTOM_PATIENTS + patient:04d}/{slice_}"
        for task, known in sorted(KNOWN_TASKS.items())
        for k, class_ in enumerate(sorted(known.classes))
        for patient in range(PHANTOM_PATIENTS)
        for slice_ in range(PHANTOM_SLICES)
    ]


class Head:
    """A slice being drawn: whose it is, where each pixel lies in the head, the gray values so far.

    u runs to the viewer's right, v down, r from 0 in the middle to 1 on the scalp; each is
    (128, 128). `person` draws what belongs to the patient and is the same in all his slices,
    `moment` what belongs to the slice. `atrophy` is 0 in health, 1 when severe.
    """

    def __init__(self, path: str) -> None:
        self.task, self.class_, _, slice_ = path.split("/")
        self.stage = KNOWN_TASKS[self.task].classes.index(self.class_)  # 0 = the first class
        self.person = person = np.random.default_rng(zlib.crc32(os.path.dirname(path).encode()))
        self.moment = moment = np.random.default_rng(zlib.crc32(path.encode()))
        # The slice's height: -1 low in the head, 1 high.
        self.level = (int(slice_) + 0.5) / PHANTOM_SLICES * 2 - 1 + moment.normal(0, 0.08)
        self.atrophy = max(0.0, person.normal(self.stage / 3 * (self.task == "alzheimer"), 0.12))
        self.tissues = person.normal(1, 0.08, 5) * PHANTOM_TISSUES[self.task]
        tilt = person.normal(0, 0.10) + moment.normal(0, 0.02)  # radians
        shift = person.normal(0, 0.04, 2) + moment.normal(0, 0.01, 2)
        scale = person.uniform(0.72, 0.94) * (1 - 0.05 * self.level**2)
        self.y, self.x = np.mgrid[-1 : 1 : PHANTOM_SIZE * 1j, -1 : 1 : PHANTOM_SIZE * 1j]
        place = (self.x - shift[0] + 1j * (self.y - shift[1])) * np.exp(-1j * tilt) / scale
        self.u = place.real / person.uniform(0.74, 0.88)
        self.v = place.imag / person.uniform(0.92, 1.04)
        self.angle = np.arctan2(self.v, self.u)
        swing, start = person.normal(0, 0.015, 3), person.uniform(0, 2 * np.pi, 3)
        bumps = swing @ np.cos(np.arange(2, 5)[:, None] * self.angle.ravel() + start[:, None])
        self.r = np.hypot(self.u, self.v) * (1 + bumps.reshape(self.u.shape))
        self.gray, self.lesion = np.zeros_like(self.r), np.zeros(self.r.shape, bool)

    def ellipse(self, cu: float, cv: float, ru: float, rv: float, turn: float = 0) -> np.ndarray:
        """Signed depth inside an ellipse: positive inside, 0 on the rim, in units of r."""
        place = ((self.u - cu) + 1j * (self.v - cv)) * np.exp(-1j * turn)
        return (1 - np.hypot(place.real / ru, place.imag / rv)) * min(ru, rv)

    def paint(
        self, depth: np.ndarray, value: float, soft: float = 0.012, ill: bool = False
    ) -> None:
        """Lay `value` where `depth` > 0, with a rim `soft` wide; count it as diseased or not."""
        share = np.clip(0.5 + depth / (4 * soft), 0, 1)
        self.gray += share * (value - self.gray)
        self.lesion |= ill & (share > 0.5)


def draw_phantom(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw the phantom called `path`; the same path always gives the same pixels.

    Head shape, folding, contrast, gain and the lesion belong to the patient; level in the head,
    pose and noise to the slice. The picture is axial, front up.

    Returns:
        (image (128, 128) uint8, lesion (128, 128) bool, True = diseased). In Alzheimer's disease
        nothing is added; the mask is what changes size, the ventricles and hippocampi.
    """
    head = Head(path)
    draw_brain(head)
    draw_deep_structures(head)
    draw_lesions(head)
    # The scanner: gain that drifts across the head, contrast, and Rician noise, as MRI has it.
    person, moment = head.person, head.moment
    drift = person.normal(0, 0.12, 3)
    gain = 1 + drift[0] * head.x + drift[1] * head.y + drift[2] * head.x * head.y
    gray = np.clip(head.gray * gain, 0, 1.2) ** person.uniform(0.8, 1.25)
    noise = moment.normal(0, person.uniform(0.015, 0.05), (2, *gray.shape))
    gray = np.hypot(gray * person.uniform(0.8, 1.05) + noise[0], noise[1])
    return (np.clip(gray, 0, 1) * 255).astype(np.uint8), head.lesion


def draw_brain(head: Head) -> None:
    """Scalp, skull, fluid, folded cortex, white matter and the cleft between the halves.

    Atrophy thins the cortex from outside and widens the furrows.
    """
    fat, bone, fluid, gray_matter, white_matter = head.tissues
    person, atrophy = head.person, head.atrophy
    r, angle, rim, cortex = head.r, head.angle, 0.86 - 0.03 * atrophy, 0.13 - 0.04 * atrophy
    for edge, value in ((1.0, fat), (0.95, bone), (0.89, fluid), (rim, gray_matter)):
        head.paint(edge - r, value)
    phase = person.uniform(0, 2 * np.pi, 3)
    bent = person.integers(17, 24) * (angle + 0.12 * np.sin(14 * r + 4 * angle + phase[0]))
    folds = np.sin(bent + phase[1] + 3 * np.sin(3 * angle + phase[2]))
    head.paint(rim - cortex * (1 - 0.35 * folds) - r, white_matter, 0.02)
    furrow = np.minimum(-folds - 0.75 + 0.25 * atrophy, (r - rim + 1.2 * cortex) * 6)
    head.paint(np.minimum(furrow, (rim + 0.01 - r) * 6), fluid, 0.08)
    cleft = np.minimum(0.014 + 0.01 * atrophy - np.abs(head.u), np.abs(head.v) - 0.42)
    head.paint(np.minimum(cleft, rim - r), fluid, 0.008)


def draw_deep_structures(head: Head) -> None:
    """Deep nuclei and ventricles; for Alzheimer's the hippocampi, for Parkinson's the midbrain."""
    _, _, fluid, gray_matter, white_matter = head.tissues
    size = head.person.uniform(0.75, 1.25) * (1 + 0.55 * head.atrophy) * (1 - 0.25 * head.level)
    long, glow = math.sqrt(size), head.person.uniform(0.15, 0.25)
    ill = head.stage > 0 and head.task in ("alzheimer", "parkinson")
    shapes = [(0.24, 0.02, 0.10, 0.17, -0.2, gray_matter, False)]
    if head.task == "parkinson":  # this low in the head the midbrain stands where ventricles end
        nigra = white_matter + 0.2 * glow if ill else gray_matter + glow  # dark once its cells die
        shapes.append((0.12, 0.02, 0.13, 0.17, 0.5, white_matter, False))
        shapes.append((0.13, 0.03, 0.035, 0.11, 0.7, nigra, ill))
    else:  # the ventricles' front and back horns
        shapes.append((0.10, -0.16, 0.05 * size, 0.17 * long, -0.25, fluid, ill))
        shapes.append((0.10, 0.20, 0.05 * size, 0.16 * long, 0.45, fluid, ill))
    if head.task == "alzheimer":  # the hippocampus shrinks, and fluid takes its place
        left = 0.085 * (1 - 0.5 * head.atrophy)
        shapes.append((0.42, 0.30, 0.10, 0.13, 0.4, fluid, False))
        shapes.append((0.42, 0.32, left, 1.3 * left, 0.4, gray_matter, ill))
    for cu, cv, ru, rv, turn, value, diseased in shapes:
        for side in (-1, 1):
            head.paint(head.ellipse(side * cu, cv, ru, rv, side * turn), value, ill=diseased)


def draw_lesions(head: Head) -> None:
    """What a disease adds: a tumour, an infarct, plaques of multiple sclerosis; else nothing."""
    if head.class_ not in PHANTOM_LESIONS:
        return
    count, distances, radii, bright = PHANTOM_LESIONS[head.class_]
    _, _, fluid, _, white_matter = head.tissues
    person, inside = head.person, 0.885 - head.r
    near = math.sqrt(max(0.3, 1 - (0.5 * head.level) ** 2))  # widest in the lesion's middle slice
    value, soft = white_matter + bright * person.uniform(0.6, 1.0), 0.05 if bright < 0 else 0.015
    for _ in range(person.integers(*count)):
        where, far = person.uniform(-1.3, 1.3), person.uniform(*distances)
        cu, cv = person.choice([-1, 1]) * far * math.cos(where), far * math.sin(where)
        radius, turn = person.uniform(*radii) * near, person.uniform(-1, 1)
        mass = head.ellipse(cu, cv, radius, radius * person.uniform(1, 1.4), turn)
        if head.class_ == "glioma":  # ragged, and the brain around it is swollen
            mass += 0.03 * np.sin(9 * head.u + person.uniform(0, 6.3)) * np.sin(11 * head.v)
            swollen = np.minimum(mass + 0.5 * radius, inside)
            head.paint(swollen, 0.75 * white_matter, 0.05, ill=True)
        head.paint(np.minimum(mass, inside), value, soft, ill=True)
        if head.class_ == "glioma":  # its core is dead
            head.paint(mass - 0.4 * radius, fluid * 1.4, 0.03)


# ---------------------------------------------------------------------------------------------
# The whole folder
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collection:
    """A data folder, read: its pictures, which of them belong together, and its sources."""

    pictures: Pictures
    twins: np.ndarray  # (m, 3) int64, as `twin_pairs` gives them
    patients: np.ndarray  # (m, 2) int64, as `patient_pairs` gives them
    groups: np.ndarray  # (n,) int64
    sources: list[Source]
    homes: list[str]  # as `homes_of` gives them
    other_files: int


def stamp(path: str) -> str:
    """A text that changes when a file, or its lesion mask, does; '' where there is none to ask."""
    mask = lesion_mask(path) if VOLUME.search(path) else None
    try:
        found = [os.stat(file) for file in (path, mask) if file]
    except OSError:  # a link to nowhere, a folder that may not be opened
        return ""
    return " ".join(f"{s.st_size} {s.st_mtime_ns} {s.st_ino}" for s in found)  # ino: names swapped


def list_folder(root: Path) -> tuple[dict[tuple[str, int], str], int]:
    """The parts of a folder's files, as `decode` takes them, and the count of its other files.

    Raises:
        UserError: no such folder, or no pictures in it.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; --data takes the folder that holds the scans")
    paths, others = list_pictures(root)
    if not paths:
        layout = f"{root}/<task>/<class>/*.png, or loose pictures for pretraining alone"
        raise UserError(f"no pictures below {root} ({others} other files); expected {layout}")
    files = {path: os.path.join(root, path) for path in paths}
    return {(path, k): stamp(f) for path, f in files.items() for k in row_groups(f)}, others


def load(
    root: Path | None,
    image_size: int,
    cache: Path,
    progress: Callable[..., Iterable] = lambda items, **_: items,
    pattern: Pattern | None = None,
) -> Collection:
    """Read a data folder, or the phantoms, into one Collection; `heads.load` splits its tasks.

    Args:
        root: the folder; None for the phantoms.
        image_size: S > 0, pixels a side of the cached squares.
        cache: folder of the decoded pictures; must not lie inside `root`.
        progress: as in `decode`.
        pattern: as in `patient_pairs`.

    Raises:
        UserError: no such folder, no pictures in it, or a pattern that matches none.
    """
    parts, others = list_folder(root) if root else ({(p, 0): "" for p in phantom_paths()}, 0)
    with locked(cache, wait=True):  # so that commands that start together decode once
        pictures = decode(root, parts, image_size, cache, progress)
        twins = cached_twins(pictures.thumbnails, cache)
    paths = pictures.paths
    sources = find_sources(paths, root.resolve().name if root else "", pattern)
    homes = homes_of(paths, sources, pattern)
    patients = patient_pairs(paths, sources, homes, pattern)
    volumes = same([match[1] if (match := SLICE.match(path)) else None for path in paths])
    twins = twins[~mere_resemblance(twins, volumes, patients, homes, pictures.names())]
    groups = connected(len(paths), np.concatenate([twins[:, :2], patients, volumes]))
    return Collection(pictures, twins, patients, groups, sources, homes, others)


def load_files(
    paths: Iterable[Path], image_size: int, cache: Path, progress: Callable[..., Iterable]
) -> Pictures:
    """Read files and folders for their pictures alone: no tasks, no groups.

    Raises:
        UserError: one is not there, or a folder has no pictures.
    """
    parts: dict[tuple[str, int], str] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} is not there; give pictures, volumes, shards or folders")
        if path.is_file():
            parts |= {(str(path), k): stamp(str(path)) for k in row_groups(str(path))}
        else:
            found, _ = list_folder(path)
            parts |= {(os.path.join(path, name), k): text for (name, k), text in found.items()}
    with locked(cache, wait=True):
        return decode(Path(), parts, image_size, cache, progress)


# ---------------------------------------------------------------------------------------------
# Two views of a slice
# ---------------------------------------------------------------------------------------------

CROP_AREA = (0.2, 1.0)  # share of the picture's area
CROP_RATIO = (3 / 4, 4 / 3)  # width / height
ROTATION = 15.0  # degrees either way
SHIFT, SCALE, SHEAR = 0.05, (0.95, 1.05), 5.0  # share of the side; factor; degrees either way
BRIGHTNESS = CONTRAST = 0.4  # factors in [1 - 0.4, 1 + 0.4]
JITTER_CHANCE = 0.8  # 2002.05709, appendix A
BLUR_SIGMA, BLUR_CHANCE = (0.1, 2.0), 0.5  # pixels; appendix A


class ViewParameters(NamedTuple):
    """The random numbers of V views, one row each; drawn for a whole batch, then sliced."""

    matrix: Tensor  # (V, 3, 3) from output to input coordinates, both in [-1, 1] across the picture
    brightness: Tensor  # (V,) factor
    contrast: Tensor  # (V,) factor
    sigma: Tensor  # (V,) of the blur, in pixels; 0 = none

    def rows(self, chosen: slice | Tensor) -> "ViewParameters":
        """The parameters of some of the views, by a slice, indices or a bool mask."""
        return ViewParameters(*(values[chosen] for values in self))


def matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor, f: Tensor) -> Tensor:
    """(V, 3, 3) matrices [[a, b, c], [d, e, f], [0, 0, 1]] from six (V,) columns."""
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    return torch.stack([a, b, c, d, e, f, zero, zero, one], dim=1).view(-1, 3, 3)


def crop_matrix(left: Tensor, top: Tensor, width: Tensor, height: Tensor) -> Tensor:
    """Stretch a box, in shares of the picture's sides, over the whole output: (V, 3, 3)."""
    zero = torch.zeros_like(left)
    return matrix(width, zero, 2 * left + width - 1, zero, height, 2 * top + height - 1)


def flip_matrix(flip: Tensor) -> Tensor:
    """Mirror left to right where `flip` (V,) bool is True: (V, 3, 3)."""
    one, zero = torch.ones(len(flip)), torch.zeros(len(flip))
    return matrix(torch.where(flip, -one, one), zero, zero, zero, one, zero)


def rotation_matrix(degrees: Tensor) -> Tensor:
    """Turn the picture counter-clockwise about its middle: (V, 3, 3)."""
    cos, sin = torch.cos(torch.deg2rad(degrees)), torch.sin(torch.deg2rad(degrees))
    zero = torch.zeros_like(cos)
    return matrix(cos, -sin, zero, sin, cos, zero)


def affine_matrix(shift_x: Tensor, shift_y: Tensor, scale: Tensor, shear: Tensor) -> Tensor:
    """Shear along x (degrees), enlarge by `scale`, then shift by shares of the side: (V, 3, 3).

    Written backwards, as all of these are, because resampling asks where an output pixel is from.
    """
    one, zero = torch.ones_like(scale), torch.zeros_like(scale)
    unshift = matrix(one, zero, -2 * shift_x, zero, one, -2 * shift_y)
    unscale = matrix(1 / scale, zero, zero, zero, 1 / scale, zero)
    unshear = matrix(one, torch.tan(torch.deg2rad(shear)), zero, zero, one, zero)
    return unshear @ unscale @ unshift


def draw_views(V: int, generator: Generator) -> ViewParameters:
    """Draw the parameters of V views.

    A view takes one row of 14 uniform numbers, whatever happens to it, and all rows are drawn at
    once. So view v is the same whether the batch is then made whole, in chunks or on many
    processes.

    Args:
        V: views, that is 2N for a batch of N slices.
        generator: on the CPU.

    Returns:
        Parameters on the CPU, V rows.
    """
    u = torch.rand(V, 14, generator=generator)  # (V, 14) in [0, 1)

    def between(column: int, low: float, high: float) -> Tensor:
        """A column of u, stretched from [0, 1) to [low, high)."""
        return low + (high - low) * u[:, column]  # (V,)

    area = between(0, *CROP_AREA)
    ratio = between(1, math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    shift_x, shift_y = (between(column, -SHIFT, SHIFT) for column in (6, 7))
    affine = affine_matrix(shift_x, shift_y, between(8, *SCALE), between(9, -SHEAR, SHEAR))
    jitter, blur = u[:, 10] < JITTER_CHANCE, u[:, 11] < BLUR_CHANCE  # (V,) bool, True = do it
    # The chance of a blur leaves its number uniform in [0, BLUR_CHANCE): rescaled, it is sigma.
    sigma = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * u[:, 11] / BLUR_CHANCE  # (V,)
    return ViewParameters(
        # Right to left: an output pixel is carried back through affine, rotation, flip and crop.
        matrix=crop_matrix(u[:, 2] * (1 - width), u[:, 3] * (1 - height), width, height)
        @ flip_matrix(u[:, 4] < 0.5)  # left-right only: heads are never scanned upside down
        @ rotation_matrix(between(5, -ROTATION, ROTATION))
        @ affine,
        brightness=torch.where(jitter, between(12, 1 - BRIGHTNESS, 1 + BRIGHTNESS), 1.0),
        contrast=torch.where(jitter, between(13, 1 - CONTRAST, 1 + CONTRAST), 1.0),
        sigma=torch.where(blur, sigma, 0.0),
    )


def resample(images: Tensor, matrices: Tensor) -> Tensor:
    """Carry (V, 1, S, S) pictures through (V, 3, 3) matrices: bilinear, black outside."""
    S = images.shape[-1]
    middle = (2 * torch.arange(S, device=images.device) + 1) / S - 1  # (S,), of each pixel
    column, row, one = matrices[:, None, None, :2].unbind(dim=-1)  # (V, 1, 1, 2) each
    # F.affine_grid, without its product of an S x S x 3 by a 3 x 2 matrix: half of the time here
    grid = middle[:, None] * column + (middle[:, None, None] * row + one)  # (V, S, S, 2): x, y
    return F.grid_sample(images, grid, "bilinear", "zeros", align_corners=False)  # (V, 1, S, S)


def jitter_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply (V, 1, S, S) in [0, 1] by (V,) factors, and clip."""
    return (images * factor.view(-1, 1, 1, 1)).clamp(0, 1)


def jitter_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Stretch (V, 1, S, S) in [0, 1] about each picture's own mean by (V,) factors, and clip."""
    mean = images.mean(dim=(1, 2, 3), keepdim=True)  # (V, 1, 1, 1)
    return (mean + (images - mean) * factor.view(-1, 1, 1, 1)).clamp(0, 1)


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur (V, 1, S, S) pictures, each with its own sigma (V,) in pixels; 0 leaves it as it is.

    A Gaussian is separable, and along one axis any linear filter is a matrix: x~ = B x B'. So one
    batch of S x S products does every row and one every column. The window is a tenth of the
    side (2002.05709, appendix A); at the border the picture is continued by reflection.
    """
    S = images.shape[-1]
    radius = max(1, S // 20)
    offset = torch.arange(-radius, radius + 1, device=images.device)  # (k,), k = 2 radius + 1
    weight = torch.exp(-0.5 * (offset / sigma.clamp(min=1e-3)[:, None]) ** 2)  # (V, k)
    weight = weight / weight.sum(dim=1, keepdim=True)
    source = torch.arange(S, device=images.device)[:, None] + offset  # (S, k), runs past the edge
    source = (S - 1) - ((S - 1) - source.abs()).abs()  # (S, k), reflected back inside
    band = torch.zeros(len(images), S, S, device=images.device)
    band.scatter_add_(2, source.expand(len(images), -1, -1), weight[:, None].expand(-1, S, -1))
    return (band @ images[:, 0] @ band.mT)[:, None]  # (V, 1, S, S)


def to_unit(images: Tensor) -> Tensor:
    """Bytes to float32 in [0, 1]; floats are taken to be there already."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def apply_views(
    images: Tensor, views: ViewParameters, mean: float = 0.5, std: float = 0.5
) -> Tensor:
    """Make one view of each picture.

    Args:
        images: (V, 1, S, S), uint8, or float32 in [0, 1]; on any device.
        views: V rows of parameters.
        mean, std: applied last; 0.5 and 0.5 give [-1, 1].

    Returns:
        (V, 1, S, S) float32.

    Raises:
        ValueError: the pictures are not gray squares, one for each row.
    """
    V, S = len(views.sigma), images.shape[-1]
    if images.shape != (V, 1, S, S):
        raise ValueError(f"expected ({V}, 1, S, S) pictures, got {tuple(images.shape)}")
    views = ViewParameters(*(values.to(images.device) for values in views))
    x = resample(to_unit(images), views.matrix)
    x = jitter_brightness(x, views.brightness)
    x = jitter_contrast(x, views.contrast)
    x = gaussian_blur(x, views.sigma)
    return (x - mean) / std


def random_views(
    images: Tensor, generator: Generator, mean: float = 0.5, std: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Two independent random views of each slice (arXiv 2002.05709, §2.1: t, t' ~ T).

    Args:
        images: (N, 1, S, S), uint8, or float32 in [0, 1].
        generator: a CPU generator; it alone decides what the views look like.
        mean, std: of the normalisation, in units of [0, 1].

    Returns:
        view_a, view_b: (N, 1, S, S) float32, [-1, 1] with the default mean and std.
    """
    views = draw_views(2 * len(images), generator)
    return apply_views(torch.cat([images, images]), views, mean, std).chunk(2)
