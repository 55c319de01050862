"""Measure how much of what the hardware allows a pretraining uses, and where the rest goes.

    python tests/benchmark.py                                           # this machine's table
    python tests/benchmark.py --cases resnet18:64 resnet50:512:16 --rounds 9

A case is architecture:batch[:chunk]. Its *step limit* is the rate of the bare step: the same
network, precision and batch, loss and optimiser included, fed one constant batch. *Achieved* is the
rate of `simclr.pretrain` itself, which also reads pictures, makes views and keeps its statistics.
The two alternate, so that a machine that is busy at times is busy for both. Each case runs in a
process of its own, which tells its peak memory; the first round warms up and is not counted.

Where `lightly` can be imported, its own SimCLR example runs on the same pictures.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import heads  # noqa: E402
import main  # noqa: E402
import simclr  # noqa: E402

CASES = ("resnet18:64", "resnet18:256", "resnet50:64", "resnet50:64:16")
PICTURES = 1024


def pictures(image_size: int) -> np.ndarray:
    """Phantoms, as a memory-mapped array like the cache's: (1024, S, S) uint8."""
    paths = data.phantom_paths()
    drawn = [data.draw_phantom(paths[i % len(paths)])[0] for i in range(64)]
    squares = np.stack([data.fit_square(gray, image_size) for gray in drawn])
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        shape = (PICTURES, image_size, image_size)
        images = np.lib.format.open_memmap(file.name, "w+", np.uint8, shape)
        images[:] = np.tile(squares, (PICTURES // 64, 1, 1))
        return images


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes, the device's part included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def quartiles(values: list[float], digits: int) -> str:
    """The median and, behind it, the quartiles."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def stages(run: simclr.Run, images: Tensor | np.ndarray, constant: Tensor) -> dict[str, Callable]:
    """The parts of a step, each to be timed alone."""
    settings, device, N = run.settings, run.device, run.settings.batch_size
    order = torch.randperm(len(images), generator=data.generator_for(9))[:N][None]
    z_a, z_b = torch.randn(2, N, 128, device=device, requires_grad=True)
    gradient = torch.randn(2 * N, 128, device=device)

    def views() -> None:
        """Draw the numbers, and make the views."""
        batch = torch.zeros(N, 1, *images.shape[1:], dtype=torch.uint8, device=device)
        data.random_views(batch, data.generator_for(1, 2, 3))

    def forward_and_backward() -> None:
        """Through encoder and projection head alone."""
        if settings.chunk_size:
            simclr.backward_in_chunks(run.networks, constant, settings, run.bf16)
        else:
            z = simclr.embed(run.networks, constant, run.bf16)
            z.backward(gradient.to(z.dtype))

    def loss() -> None:
        """NT-Xent there and back, and the statistics beside it."""
        simclr.nt_xent(z_a, z_b).backward()
        simclr.contrastive_statistics(z_a, z_b)

    return {
        "load": lambda: next(simclr.batches(images, order, device)),
        "views": views,
        "forward and backward": forward_and_backward,
        "loss": loss,
        "optimiser": run.optimizer.step,
    }


def bare_step(run: simclr.Run, constant: Tensor) -> None:
    """What every implementation has to do: forward, loss, backward, optimiser."""
    run.optimizer.zero_grad()
    if run.settings.chunk_size:
        simclr.backward_in_chunks(run.networks, constant, run.settings, run.bf16)
    else:
        z_a, z_b = simclr.embed(run.networks, constant, run.bf16).chunk(2)
        simclr.nt_xent(z_a, z_b, run.settings.temperature).backward()
    run.optimizer.step()


def measure(case: str, args: argparse.Namespace) -> dict[str, str]:
    """One row of the table."""
    arch, batch, *chunk = case.split(":")
    machine = main.choose_machine(args)
    N, chunk_size = int(batch), int(chunk[0]) if chunk else None
    settings = simclr.Pretraining(epochs=10**6, batch_size=N, chunk_size=chunk_size)
    images = pictures(args.image_size)
    encoder = simclr.ARCHITECTURES[arch]()
    run = simclr.pretraining(encoder, settings, len(images), *machine[:2])
    steps = simclr.pretrain(run, images, np.arange(len(images)))
    batch = torch.from_numpy(images[:N])[:, None].to(machine.device)
    constant = torch.cat(data.random_views(batch, data.generator_for(0)))
    whole = {"limit": lambda: bare_step(run, constant), "achieved": lambda: next(steps)}
    parts = stages(run, images, constant)
    took: dict[str, list[float]] = {name: [] for name in whole | parts}
    for turn in range(args.rounds + 1):
        # Whichever is first in a round may find the memory colder: they take turns in that, too.
        for name in list(whole)[:: 1 if turn % 2 else -1]:
            took[name].append(timed(whole[name], machine.device))
    for _ in range(args.rounds + 1):
        for name, part in parts.items():
            took[name].append(timed(part, machine.device))
    took = {name: seconds[1:] for name, seconds in took.items()}  # the first one warms up
    ratio = np.median(took["limit"]) / np.median(took["achieved"])
    rates = {name: [N / s for s in took[name]] for name in ("limit", "achieved")}
    if machine.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    row = {"case": f"{arch}, batch {N}" + f", in chunks of {chunk_size}" * bool(chunk_size)}
    row |= {f"{name}, images/s": quartiles(rate, 1) for name, rate in rates.items()}
    row |= {"ratio": f"{ratio:.3f}", "peak GiB": f"{peak:.1f}"}
    return row | {f"{name}, ms": quartiles([1e3 * s for s in took[name]], 1) for name in parts}


def lightly(args: argparse.Namespace) -> dict[str, str]:
    """The rate of lightly's SimCLR example (docs.lightly.ai/examples/simclr.html), images/s.

    As it stands there, but for the pictures, their size, the batch, and a worker for each core.
    """
    import torchvision
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    backbone = nn.Sequential(*list(torchvision.models.resnet18().children())[:-1], nn.Flatten())
    device = main.choose_machine(args).device
    model = nn.Sequential(backbone, SimCLRProjectionHead(512, 512, 128)).to(device)
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.06), NTXentLoss()
    row = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, square in enumerate(pictures(args.image_size)):
            Image.fromarray(square).convert("RGB").save(f"{folder}/{i}.png")
        dataset = LightlyDataset(folder, transform=SimCLRTransform(input_size=args.image_size))
        for N in (64, 256):
            loader = torch.utils.data.DataLoader(
                dataset, N, shuffle=True, drop_last=True, num_workers=os.cpu_count() or 1
            )
            ends = []
            while len(ends) < args.rounds + 1:
                for (x0, x1), *_ in loader:
                    loss = criterion(model(x0.to(device)), model(x1.to(device)))
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    ends.append(time.perf_counter())
            row[f"batch {N}"] = quartiles(list(N / np.diff(ends)), 1)
    return row


def probing(args: argparse.Namespace) -> dict[str, str]:
    """The heads: 150 epochs on 5,300 cached features; features against the bare forward pass."""
    machine, checkpoint = main.choose_machine(args), {"mean": 0.5, "std": 0.5}
    images = pictures(args.image_size)[:256]
    encoder = simclr.resnet18().eval().to(machine.device)
    x = torch.randn(len(images), 1, *images.shape[1:], device=machine.device)
    x = x.contiguous(memory_format=simclr.memory_format(machine.device, bf16=False))

    def bare() -> None:
        """The forward pass alone."""
        with torch.inference_mode():
            encoder(x)

    took: dict[str, list[float]] = {"bare": [], "ours": []}
    for _ in range(args.rounds + 1):
        ours = timed(lambda: heads.features_of(encoder, checkpoint, images, x.device), x.device)
        took["ours"].append(len(images) / ours)
        took["bare"].append(len(images) / timed(bare, x.device))
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(5300) % 4
    features = torch.rand(5300, 512, generator=generator) + nn.functional.one_hot(labels, 512)
    head, part = heads.CosineMLP(512, 4), slice(0, 900)
    val = features[part], labels[part]
    epochs = heads.train_probe(head, (features, labels), val, heads.Probing())
    a, b = (torch.rand(1024, 1024, generator=generator) for _ in range(2))
    rate = max(2 * 1024**3 / timed(lambda: a @ b, torch.device("cpu")) for _ in range(20))
    row = {name: quartiles(rates[1:], 0) for name, rates in took.items()}
    row["150 epochs, s"] = f"{timed(lambda: list(epochs), torch.device('cpu')):.1f}"
    # of each step's 256 rows: both layers forward, their weights' gradients, one input's gradient
    products = 2 * 256 * (2 * 512 * 512 + 3 * 512 * 128) * 21 * 150
    return row | {"its matrix products alone, s": f"{products / rate:.1f}"}


def table(rows: list[dict[str, str]]) -> str:
    """Rows with the same keys, as Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def alone(work: str) -> dict[str, str]:
    """Run this file for one row, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", work]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def processor() -> str:
    """Its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{os.cpu_count()} cores of {name}, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=CASES, help="architecture:batch[:chunk]")
    parser.add_argument("--rounds", type=int, default=5, help="of each, after one to warm up")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        others = {"lightly": lightly, "probing": probing}
        found = others[args.only](args) if args.only in others else measure(args.only, args)
        print(json.dumps(found))
        sys.exit()
    machine = main.choose_machine(args)
    name = torch.cuda.get_device_name() if machine.device.type == "cuda" else processor()
    print(f"{name}; {machine.text}; torch {torch.__version__}; {args.image_size} px\n")
    rows = [alone(case) for case in args.cases]
    print(table(rows))
    try:
        import lightly as _  # noqa: F401
    except ImportError:
        print("\nlightly is not installed; nothing to compare with")
    else:
        print("\nlightly's SimCLR example, resnet18, images/s:", alone("lightly"))
    print("\nheads:", alone("probing"))
