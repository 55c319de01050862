"""Mutate images and volumes by the thousand: each must be read, or named and left out.

    python tests/fuzz.py --count 10000

Valid files of every kind are cut, spliced, and changed in single bits and in header fields; some
volumes unpack to a gigabyte. Each is decoded as a command does it, in limited memory.
"""

import argparse
import gzip
import io
import random
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402

MEMORY = 6 << 30  # bytes of address space, beyond what is in use
SECONDS = 30.0  # for one file; the largest volume that is read takes half of it on a slow core
KINDS = "JPEG:RGB JPEG:CMYK PNG:L PNG:RGBA PNG:P PNG:I;16 GIF:P TIFF:L TIFF:F BMP:RGB WEBP:RGB"
EDGES = (0, 1, 7, 0x7F, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
ZEROS = gzip.compress(bytes(1 << 26), 9) * 16  # gzip members follow one another: a gigabyte


def seeds() -> dict[str, bytes]:
    """A valid file of each kind, by the name that it gets."""
    rng, files = np.random.default_rng(0), {}
    gray = Image.fromarray(rng.integers(0, 256, (40, 33), dtype=np.uint8))
    for kind in KINDS.split():
        form, mode = kind.split(":")
        file = io.BytesIO()
        gray.convert(mode).save(file, form)
        files[f"{mode.replace(';', '')}.{form.lower()}"] = file.getvalue()
    header = bytearray(352)
    struct.pack_into("<i36x8h", header, 0, 348, 3, 12, 14, 6, 1, 1, 1, 1)
    struct.pack_into("<hh2x8f3f", header, 70, 4, 16, *[1.0] * 8, 352.0, 1.0, 0.0)
    struct.pack_into("<hh24x12f", header, 252, 0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)
    header[344:348] = b"n+1\0"
    voxels = rng.integers(0, 900, 12 * 14 * 6, dtype="<i2").tobytes()
    return files | {"v.nii": bytes(header) + voxels, "v.nii.gz": bytes(header) + voxels}


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to four changes, most of them near the beginning."""
    for _ in range(rng.randint(1, 4)):
        buffer, way = bytearray(content), rng.randrange(5)
        at = rng.randrange(min(rng.choice((400, len(buffer))), len(buffer)))
        if way == 0:
            buffer[at] ^= 1 << rng.randrange(8)
        elif way == 1:  # a size or another field, in either byte order
            field = struct.pack(rng.choice("<>") + "I", rng.choice(EDGES))
            buffer[at : at + 4] = field if rng.random() < 0.5 else field[:2]
        elif way == 2:
            del buffer[at : rng.choice((at + 40, len(buffer)))]
        elif way == 3:
            buffer[at:at] = rng.randbytes(rng.randint(1, 64))
        else:
            start = rng.randrange(len(buffer))
            buffer[at:at] = buffer[start : start + 256]
        content = bytes(buffer) or b"\0"
    return content


def fuzz(folder: Path, count: int, seed: int) -> Counter:
    """Decode `count` mutated files; how many were read, and how many named.

    Raises:
        AssertionError: one took too long, or gave neither an image nor a reason.
    """
    rng, valid, outcome = random.Random(seed), seeds(), Counter()
    for k in range(count):
        name = list(valid)[k % len(valid)]
        content = mutate(valid[name], rng)
        if name.endswith("gz"):
            content = gzip.compress(content) + (ZEROS if k % 100 > 90 else b"")
        (folder / name).write_bytes(content)
        began = time.perf_counter()
        decoded = data.decode(folder, 32, name)
        assert decoded and time.perf_counter() - began < SECONDS, f"{name}, number {k}"
        assert {len(pixels) for _, pixels, _ in decoded} == {data.row_type(32).itemsize}
        outcome["named" if decoded[0][2] else "read"] += 1
    return outcome


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
    with tempfile.TemporaryDirectory() as place:
        print(dict(fuzz(Path(place), args.count, args.seed)))
