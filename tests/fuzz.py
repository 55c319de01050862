"""Mutate images and volumes by the thousand: each must be read, or named and left out.

    python tests/fuzz.py --count 10000

Valid files of every kind are cut, spliced, and changed in single bits and in header fields; some
volumes unpack to a gigabyte. Each is decoded as a command does it, in limited memory.
"""

import argparse
import gzip
import random
import resource
import struct
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from test_data import write_nifti  # noqa: E402

import data  # noqa: E402

MEMORY = 6 << 30  # bytes of address space, beyond what is in use
SECONDS = 30.0  # for one file; the largest volume that is read takes half of it on a slow core
NAMES = "RGB.jpeg CMYK.jpeg L.png RGBA.png P.png I;16.png P.gif L.tiff F.tiff RGB.bmp RGB.webp"
EDGES = (0, 1, 7, 0x7F, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
ZEROS = gzip.compress(bytes(1 << 26), 9) * 16  # gzip members follow one another: a gigabyte


def valid_files(folder: Path) -> list[tuple[str, bytes]]:
    """A valid file of each kind: its name, and what it holds (of v.nii.gz, unpacked)."""
    rng = np.random.default_rng(0)
    gray = Image.fromarray(rng.integers(0, 256, (40, 33), dtype=np.uint8))
    for name in NAMES.split():
        gray.convert(name.split(".")[0]).save(folder / name)
    write_nifti(folder / "v.nii", rng.integers(0, 900, (12, 14, 6), dtype=np.int16))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files["v.nii.gz"] = files["v.nii"]
    return sorted(files.items())


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    count = parser.parse_args().count
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    rng, named = random.Random(0), 0
    with tempfile.TemporaryDirectory() as place:
        files = valid_files(Path(place))
        for k in range(count):
            name, valid = files[k % len(files)]
            content = mutate(valid, rng)
            if name.endswith("gz"):
                content = gzip.compress(content) + (ZEROS if k % 100 > 90 else b"")
            Path(place, name).write_bytes(content)
            began = time.perf_counter()
            decoded = data.decode(Path(place), 32, name)
            assert decoded and time.perf_counter() - began < SECONDS, f"{name}, number {k}"
            assert {len(pixels) for _, pixels, _ in decoded} == {data.row_type(32).itemsize}
            named += decoded[0][2] != ""
    print(f"{count - named} files were read, {named} named and left out")
