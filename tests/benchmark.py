"""Measure how much of what the hardware allows a pretraining uses.

    python tests/benchmark.py                                           # this machine's table
    python tests/benchmark.py --cases resnet18:64 resnet50:512:16 --rounds 9

A case is architecture:batch[:chunk]. Its *limit* is the rate of the bare step: the same network,
precision and batch, loss and optimiser included, fed one constant batch. *Achieved* is the rate of
`simclr.pretrain` itself, which also reads images, makes views and keeps its statistics. The two
alternate, so that a machine that is busy at times is busy for both; the first round warms up. Each
case runs in a process of its own, which tells its peak memory.

    python tests/benchmark.py --race DIR --task tumor --minutes 30      # pip install lightly

The race gives this program and lightly equal minutes on the same images of a folder, with the same
network, batch, temperature, optimiser and precision, an epoch of one after an epoch of the other;
then a linear probe reads both encoders. Lightly gets its own views, loss and head, and two worker
processes; the images are decoded and of their final size for both.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import heads  # noqa: E402
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


class GrayEncoder(nn.Module):
    """torchvision's ResNet-18 for gray images: what lightly's users train."""

    def __init__(self) -> None:
        from torchvision.models import resnet18

        super().__init__()
        self.network, self.feature_dim = resnet18(), 512
        self.network.fc = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 1 or 3, S, S) -> (N, 512)."""
        return self.network(x.expand(-1, 3, -1, -1))


def lightly_epochs(
    encoder: GrayEncoder, images: np.ndarray, settings: simclr.Pretraining, device, bf16: bool
) -> Iterator[None]:
    """SimCLR as lightly's tutorial has it; yields after each epoch."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    S = images.shape[1]
    normalize = {"mean": [settings.mean] * 3, "std": [settings.std] * 3}
    transform = SimCLRTransform(
        S, cj_strength=0.5, min_scale=0.2, random_gray_scale=0, normalize=normalize
    )

    class Views(torch.utils.data.Dataset):
        """The two views of each image."""

        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, i: int) -> list:
            return transform(Image.fromarray(images[i]).convert("RGB"))

    size = settings.batch_size
    loader = torch.utils.data.DataLoader(
        Views(), size, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
    )
    head = SimCLRProjectionHead(512, 512, 128).to(device)
    encoder.to(device, memory_format=torch.channels_last).train()
    networks = nn.ModuleList([encoder, head])
    optimizer = simclr.adamw(networks, settings.weight_decay)
    loss_of, total = NTXentLoss(settings.temperature), settings.epochs * len(loader)
    for epoch in range(settings.epochs):
        for step, (view_a, view_b) in enumerate(loader):
            lr = simclr.warmup_cosine(epoch * len(loader) + step, total, settings.lr, 0)
            simclr.set_lr(optimizer, lr)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                z_a, z_b = [head(encoder(view.to(device))) for view in (view_a, view_b)]
            loss = loss_of(z_a.float(), z_b.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield


def race(folder: Path, task_name: str, minutes: float, size: int, batch: int) -> None:
    """Train both for equal minutes, in turns; print what a linear probe makes of each on val."""
    study = data.load(folder, size, Path("runs/cache"))
    task, rows = study.tasks[task_name], data.pretraining_rows(study)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16, _ = simclr.native_bf16(device)

    def begin(name: str, epochs: int) -> tuple[nn.Module, Iterator]:
        """A new encoder, and its epochs."""
        settings = simclr.Pretraining(epochs, batch, lr=1e-3, temperature=0.2)
        torch.manual_seed(0)
        if name == "lightly":
            encoder = GrayEncoder()
            images = np.array(study.images.squares[rows])
            return encoder, lightly_epochs(encoder, images, settings, device, bf16)
        encoder = simclr.resnet18()
        head = simclr.ProjectionHead(encoder.feature_dim)
        networks = nn.ModuleDict({"encoder": encoder, "projection_head": head})
        images = study.images.squares
        return encoder, simclr.pretrain(networks, images, rows, settings, device, bf16)

    runs = {}
    for name in ("ours", "lightly"):
        _, trial = begin(name, 3)
        next(trial)  # workers start, memory is taken
        took = seconds(lambda trial=trial: next(trial), device)
        epochs = max(1, round(minutes * 60 / took))
        print(f"{name}: {took:.1f} s an epoch, {epochs} epochs", flush=True)
        runs[name] = (*begin(name, epochs), epochs)
    spent = dict.fromkeys(runs, 0.0)
    for turn in range(max(epochs for _, _, epochs in runs.values())):
        for name, (_, steps, epochs) in runs.items():
            if turn < epochs:
                spent[name] += seconds(lambda steps=steps: next(steps), device)
    for name, (encoder, _, epochs) in runs.items():
        checkpoint = {"arch": "resnet18", "mean": 0.5, "std": 0.5}
        setup = heads.Setup(study.images, task, encoder, checkpoint, device, bf16)
        features = heads.task_features(setup, encoder)
        _, records, _ = heads.fit_probe(features, task, heads.Probing(), "linear")
        accuracy = max(record["val_accuracy"] for record in records)
        print(f"{name}: {epochs} epochs in {spent[name] / 60:.1f} min, val {accuracy:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=["resnet18:64", "resnet18:256"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--race", type=Path, help="folder of scans: ours against lightly")
    parser.add_argument("--task", default="tumor")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    args = parser.parse_args()
    if args.race:
        race(args.race, args.task, args.minutes, args.image_size, args.batch_size)
        sys.exit()
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
