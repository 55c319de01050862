"""Measure how much of what the hardware allows a pretraining uses.

    python tests/benchmark.py                                           # this machine's table
    python tests/benchmark.py --cases resnet18:64 resnet50:512:16 --rounds 9

A case is architecture:batch[:chunk]. Its *limit* is the rate of the bare step: the same network,
precision and batch, loss and optimiser included, fed one constant batch. *Achieved* is the rate of
`simclr.pretrain` itself, which also reads images, makes views and keeps its statistics. The two
alternate, so that a machine that is busy at times is busy for both; the first round warms up. Each
case runs in a process of its own, which tells its peak memory.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import simclr  # noqa: E402

STEPS = 4  # of each kind, a round


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long some work takes, the device's part included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def measure(case: str, rounds: int, size: int) -> str:
    """One row of the table."""
    arch, batch, *chunk = case.split(":")
    N = int(batch)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16, _ = simclr.native_bf16(device)
    names = data.phantom_names()[:: STEPS * 8]
    drawn = np.stack([data.fit_square(data.draw_phantom(name)[0], size) for name in names])
    images = np.resize(drawn, (STEPS * N, size, size))
    encoder = simclr.ARCHITECTURES[arch]()
    head = simclr.ProjectionHead(encoder.feature_dim)
    networks = nn.ModuleDict({"encoder": encoder, "projection_head": head})
    chunk_size = int(chunk[0]) if chunk else None
    settings = simclr.Pretraining(epochs=10**6, batch_size=N, chunk_size=chunk_size)
    epochs = simclr.pretrain(networks, images, np.arange(len(images)), settings, device, bf16)
    next(epochs)
    optimizer = simclr.adamw(networks, settings.weight_decay)
    batch = torch.from_numpy(images[:N])[:, None].to(device)
    views = torch.cat(simclr.random_views(batch, simclr.generator_for(0)))

    def bare_steps() -> None:
        """What every implementation has to do."""
        for _ in range(STEPS):
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                z = networks["projection_head"](simclr.encode(encoder, views, chunk_size))
            simclr.nt_xent(*z.chunk(2), settings.temperature).backward()
            optimizer.step()

    took = {"limit": [], "achieved": []}
    for _ in range(rounds + 1):
        took["limit"].append(seconds(bare_steps, device))
        took["achieved"].append(seconds(lambda: next(epochs), device))
    low, middle, high = {}, {}, {}
    for name, times in took.items():
        rates = STEPS * N / np.array(times[1:])
        low[name], middle[name], high[name] = np.percentile(rates, (25, 50, 75))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    cells = [f"{middle[name]:.1f} [{low[name]:.1f}, {high[name]:.1f}]" for name in took]
    ratio = middle["achieved"] / middle["limit"]
    return f"| {case} | {cells[0]} | {cells[1]} | {ratio:.3f} | {peak:.1f} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=["resnet18:64", "resnet18:256"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--image-size", type=int, default=128)
    args = parser.parse_args()
    if len(args.cases) == 1:
        print(measure(args.cases[0], args.rounds, args.image_size))
        sys.exit()
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else torch.backends.cpu.get_cpu_capability()
    )
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| case | limit, images/s | achieved | ratio | peak GiB |\n|---|---|---|---|---|")
    sys.stdout.flush()
    for case in args.cases:
        how = ["--cases", case, "--rounds", str(args.rounds), "--image-size", str(args.image_size)]
        subprocess.run([sys.executable, __file__, *how], check=True)
