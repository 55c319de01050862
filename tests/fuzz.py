"""Mutate pictures, volumes and shards by the thousand: each must be read, or named and left out.

    python tests/fuzz.py --count 10000

Valid JPEG, PNG, GIF, TIFF, BMP, WebP and NIfTI files are cut, spliced, and changed in single bits,
in header fields and in sizes; gzip bombs are packed. Each is decoded as a command decodes it, in a
process whose memory is limited, so that what takes too much fails here. The suite runs a few.
"""

import argparse
import collections
import gzip
import io
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

import data  # noqa: E402

MEMORY = (
    6 << 30
)  # bytes of address space beyond what is in use: a process of ours may not take more
SECONDS = 30.0  # for one file; the largest volume that is read takes half of it on a slow core
EDGES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def nifti(shape: tuple[int, ...], code: int = 4) -> bytes:
    """A small valid volume."""
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, len(shape), *shape, *[1] * (7 - len(shape)))
    struct.pack_into("<hh", header, 70, code, 16)
    struct.pack_into("<8f", header, 76, *[1.0] * 8)
    struct.pack_into("<fff", header, 108, 352.0, 1.0, 0.0)
    struct.pack_into("<hh", header, 252, 0, 1)
    struct.pack_into("<12f", header, 280, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)
    header[344:348] = b"n+1\0"
    values = np.random.default_rng(0).integers(0, 900, int(np.prod(shape)), dtype="<i2")
    return bytes(header) + values.tobytes()


def seeds() -> dict[str, list[bytes]]:
    """Valid files of each kind, of several modes."""
    rng, found = np.random.default_rng(0), collections.defaultdict(list)
    gray = Image.fromarray(rng.integers(0, 256, (40, 33), dtype=np.uint8))
    frames = {"append_images": [gray.rotate(90)], "save_all": True}
    ways = [("jpg", "JPEG", "L", {}), ("jpg", "JPEG", "RGB", {"progressive": True})]
    ways += [("jpg", "JPEG", "CMYK", {}), ("png", "PNG", "L", {}), ("png", "PNG", "RGBA", {})]
    ways += [("png", "PNG", "P", {}), ("png", "PNG", "I;16", {}), ("gif", "GIF", "P", frames)]
    ways += [("tif", "TIFF", "L", {}), ("tif", "TIFF", "F", {}), ("bmp", "BMP", "RGB", {})]
    ways += [("tif", "TIFF", "RGB", {"compression": "tiff_lzw"}), ("bmp", "BMP", "1", {})]
    ways += [
        ("tif", "TIFF", "L", {"compression": "tiff_adobe_deflate"}),
        ("webp", "WEBP", "RGB", {}),
    ]
    ways += [("webp", "WEBP", "RGBA", {"lossless": True})]
    for ending, kind, mode, how in ways:
        file = io.BytesIO()
        gray.convert(mode).save(file, kind, **how)
        found[ending].append(file.getvalue())
    found["nii"] = [nifti((12, 14, 6)), nifti((12, 14, 6, 2)), nifti((12, 14))]
    found["nii.gz"] = [gzip.compress(volume) for volume in found["nii"]]
    return found


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to four changes to a file."""
    for _ in range(rng.randint(1, 4)):
        buffer, way = bytearray(content), rng.randrange(7)
        at = (
            rng.randrange(len(buffer))
            if rng.random() < 0.4
            else rng.randrange(min(400, len(buffer)))
        )
        if way == 0:
            buffer[at] ^= 1 << rng.randrange(8)
        elif way == 1:  # a size or another field, in either byte order
            kind = rng.choice(("<H", ">H", "<I", ">I"))
            value = rng.choice(EDGES) & (0xFFFF if kind[1] == "H" else 0xFFFFFFFF)
            if at + struct.calcsize(kind) <= len(buffer):
                struct.pack_into(kind, buffer, at, value)
        elif way == 2:
            del buffer[at:]
        elif way == 3:
            del buffer[at : at + rng.randint(1, 64)]
        elif way == 4:
            buffer[at:at] = rng.randbytes(rng.randint(1, 64))
        elif way == 5:
            buffer[at : at + 16] = rng.randbytes(16)
        else:
            start = rng.randrange(len(buffer))
            buffer[at:at] = buffer[start : start + rng.randint(1, 256)]
        content = bytes(buffer) or b"\0"
    return content


def volume_field(content: bytes, rng: random.Random) -> bytes:
    """A volume with a strange header: huge or negative axes, other types, no numbers."""
    header, kind = bytearray(content), rng.choice(("h", "f"))
    at = rng.choice(
        (40, 42, 44, 46, 48, 70, 72, 252, 254) if kind == "h" else (80, 108, 112, 116, 280)
    )
    value = rng.choice(
        (-1, 0, 2, 7, 16, 64, 255, 1024, 32767) if kind == "h" else (0.0, -1.0, 1e30)
    )
    value = rng.choice((value, float("nan"), float("inf"))) if kind == "f" else value
    struct.pack_into(f"<{kind}", header, at, value)
    return bytes(header)


def bomb(rng: random.Random) -> bytes:
    """A small file that unpacks to a gigabyte, under a header that says so, or that says less."""
    sides = rng.choice(((512, 512, 500), (32767, 32767, 1), (12, 14, 6), (1024, 1024, 400)))
    head = nifti((2, 2, 2))[:352]
    return gzip.compress(head[:40] + struct.pack("<4h", 3, *sides) + head[48:]) + ZEROS


ZEROS = gzip.compress(bytes(1 << 26), 9) * 16  # gzip members follow one another


def fuzz(folder: Path, count: int, seed: int) -> dict:
    """Decode `count` mutated files.

    Returns:
        {"read", "named": by kind, how many; "errors": how often each, "slowest": seconds}

    Raises:
        AssertionError: one took too long, or what it gave is no rows and no error.
    """
    rng, valid = random.Random(seed), seeds()
    report = {"read": collections.Counter(), "named": collections.Counter(), "slowest": 0.0}
    report["errors"] = collections.Counter()
    kinds, size = [*valid, "bomb"], 32
    for k in range(count):
        kind = "bomb" if k % 100 == 99 else kinds[k % len(valid)]
        ending = {"bomb": "nii.gz"}.get(kind, kind)
        if kind == "bomb":
            content = bomb(rng)
        else:
            content = rng.choice(valid[kind])
            if ending.startswith("nii") and rng.random() < 0.5:
                plain = volume_field(rng.choice(valid["nii"]), rng)
                content = gzip.compress(plain) if ending.endswith("gz") else plain
            else:
                content = mutate(content, rng)
        path = folder / f"file.{ending}"
        path.write_bytes(content)
        began = time.perf_counter()
        found = data.decode_part((folder, path.name, 0, b"k" * 16, size))
        took = time.perf_counter() - began
        report["slowest"] = max(report["slowest"], took)
        bad = took > SECONDS or not isinstance(found, bytes | Exception)
        if bad:
            keep = folder / f"bad{k}.{ending}"
            path.rename(keep)
            raise AssertionError(f"{keep}: {took:.1f} s, {type(found)}")
        report["named" if isinstance(found, Exception) else "read"][ending] += 1
        if isinstance(found, Exception):
            report["errors"][type(found).__name__] += 1
        else:
            rows = np.frombuffer(found, data.row_type(size))
            assert len(rows) and rows["key"][-1] == b"k" * 16
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
    with tempfile.TemporaryDirectory() as place:
        began = time.perf_counter()
        told = fuzz(Path(place), args.count, args.seed)
    print(f"{args.count:,} files in {time.perf_counter() - began:.0f} s; none crashed")
    for outcome in ("read", "named"):
        counts = ", ".join(f"{kind} {n:,}" for kind, n in sorted(told[outcome].items()))
        print(f"{outcome} {sum(told[outcome].values()):,}: {counts}")
    print("errors:", ", ".join(f"{name} {n:,}" for name, n in told["errors"].most_common()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    print(f"slowest {told['slowest']:.2f} s; peak memory {peak:.1f} GiB")
