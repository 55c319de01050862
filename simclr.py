"""Pretrain an encoder on pictures without labels: SimCLR (Chen et al., arXiv 2002.05709).

Show the network two random views of every slice in a batch. Its encoder turns a view into a
representation h, and a small projection head turns h into a projection z. The loss asks of each
view: among all the other views of this batch, which one is of the same slice? To answer, the
encoder has to keep what survives cropping, turning and blurring (anatomy, lesions) and to drop
what does not (pose, gain, noise). Afterwards the projection head is thrown away and h is kept.

    h = f(x~)                 the encoder, a ResNet without its last layer        (§2.1)
    z = g(h) = W2 relu(W1 h)  the projection head                                 (§2.1)
    l(i, j) = -log( exp(sim(z_i, z_j) / tau) / sum_{k != i} exp(sim(z_i, z_k) / tau) )   (Eq. 1)
    L = mean of l over all 2N (anchor, positive) pairs                            (Algorithm 1)

More negatives make a harder question, so batches are large: `backward_in_chunks` computes the loss
and the gradients of a batch that memory has no room for, and torchrun spreads one over many
processes. A `Run` can stop at any step and go on later, for a step draws its random numbers from
(seed, epoch, step) and from nothing that ran before it.

Shape letters: N slices in a batch (so 2N views) · C channels · H, W pixels · E encoder features ·
D projection dimensions · K classes. Here also n pictures, S = image size, and `share`: the slices
of a batch that one process has (N where it is alone).

Departures from the paper:
  - one input channel: scans are gray;
  - AdamW with a cosine schedule for LARS with warm-up: batches here are 512, not 4096;
  - temperature 0.07 and a 512-wide hidden layer, the published values for brain scans;
  - the learning rate ends at 1/50 of its peak, not at 0.

Next: evaluate.py
"""

import hashlib
import math
import pickle
import re
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import data

RUN_FILES = (
    "checkpoint.pt",
    "encoder.pt",
    "classifier.pt",
    "log.jsonl",
    "curve.png",
    "config.json",
)
PROJECTION = 128  # D
LEAST_PIXELS, MOST_PIXELS = 32, 4096  # a side: of more, a picture's activations take gigabytes
IMAGENET_SCALING = (0.449, 0.226)  # mean and std of ImageNet's pixels, over its three channels
STATISTICS = ("loss", "contrastive_accuracy", "embedding_std")  # that pretraining adds up
RUN_STATE = ("step", "sums", "seconds", "records", "best")  # what a Run counts
CHECKPOINT_SECONDS = 60  # at most one checkpoint a minute,
CHECKPOINT_SHARE = 0.01  # and at most this share of the time is spent on writing them
DEVICE_SHARE = 0.25  # of a GPU's free memory, for the pictures; where they need more, they stream
# What may change between two starts of a run: it moves the speed and the last bits of the result
# (and processes on CPUs, which have a batch norm each, a little more).
FREE = {"data", "device", "processes", "threads", "encoder", "pretraining"}
FREE |= {"typed", "folder", "commit", "versions"}

# ---------------------------------------------------------------------------------------------
# The encoder: a ResNet (He et al., arXiv 1512.03385), with torchvision's parameter names
# ---------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them (1512.03385, Fig. 5 left)."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, channels, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1 to narrow, 3x3, 1x1 to widen fourfold, and a shortcut (1512.03385, Fig. 5 right).

    The stride sits on the 3x3 convolution ("v1.5", as torchvision has it), not on the first.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.downsample = shortcut(in_channels, 4 * channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 4 channels, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """A 1x1 convolution where the shape changes; None where the input itself can be added."""
    if stride == 1 and in_channels == out_channels:
        return None
    conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class ResNet(nn.Module):
    """The encoder f: a ResNet that ends with global average pooling; there is no `fc`.

    Args:
        block: BasicBlock or Bottleneck.
        depths: blocks in each of the four stages.
        in_channels: C, 1 for gray pictures.
    """

    def __init__(self, block: type, depths: tuple[int, int, int, int], in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        width = 64
        for stage, depth in enumerate(depths):
            blocks = []
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(block(width, 64 * 2**stage, stride))
                width = 64 * 2**stage * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.feature_dim = width  # E
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # 1502.01852; norms begin at weight 1, bias 0
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) float, normalised -> h: (N, E), not negative."""
        x = F.relu(self.bn1(self.conv1(x)))  # (N, 64, H/2, W/2)
        x = F.max_pool2d(x, 3, stride=2, padding=1)  # (N, 64, H/4, W/4)
        x = self.layer2(self.layer1(x))  # (N, 2 x 64 x expansion, H/8, W/8)
        x = self.layer4(self.layer3(x))  # (N, E, H/32, W/32)
        return x.mean(dim=(2, 3))  # (N, E)


def resnet18(in_channels: int = 1) -> ResNet:
    """ResNet-18: E = 512; 11.2 million parameters, named as torchvision's (but for its `fc`)."""
    return ResNet(BasicBlock, (2, 2, 2, 2), in_channels)


def resnet50(in_channels: int = 1) -> ResNet:
    """ResNet-50: E = 2048; 23.5 million parameters, named as torchvision's (but for its `fc`)."""
    return ResNet(Bottleneck, (3, 4, 6, 3), in_channels)


ARCHITECTURES = {"resnet18": resnet18, "resnet50": resnet50}
STRIDES = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}  # pixels a place of a stage's map


class ProjectionHead(nn.Sequential):
    """The projection head g: Linear(E -> 4 D) -> ReLU -> Linear(4 D -> D) (§2.1; appendix B.4).

    Args:
        in_features: E.
        hidden_dim: D, the size of the projection z; the layer before it is 4 D wide.

    Maps h (N, E) to z (N, D), any scale: `nt_xent` looks at directions only.
    """

    def __init__(self, in_features: int, hidden_dim: int = PROJECTION) -> None:
        super().__init__(
            nn.Linear(in_features, 4 * hidden_dim),
            nn.ReLU(),
            nn.Linear(4 * hidden_dim, hidden_dim),
        )


# ---------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------


def nt_xent(z_a: Tensor, z_b: Tensor, temperature: float = 0.07) -> Tensor:
    """NT-Xent, the SimCLR loss (arXiv 2002.05709, §2.1, Eq. 1), averaged as in Algorithm 1.

        l(i, j) = -log( exp(sim(z_i, z_j) / tau) / sum_{k != i} exp(sim(z_i, z_k) / tau) )

    Read it as classification: among the 2N - 1 other views, which one is my positive?

    Args:
        z_a, z_b: (N, D) float, any scale, N >= 2; row n of both is a view of slice n.
        temperature: tau > 0, in cosine units; lower concentrates the gradient on the negatives
            that look most like the anchor.

    Returns:
        () mean over 2N anchors, in nats. Collapsed projections score log(2N - 1) for any tau.

    Raises:
        ValueError: the views differ in shape or are fewer than two, or temperature <= 0.
    """
    if z_a.shape != z_b.shape or z_a.ndim != 2 or len(z_a) < 2 or temperature <= 0:
        raise ValueError(
            f"expected two (N, D) views with N >= 2 and temperature > 0, got "
            f"{tuple(z_a.shape)}, {tuple(z_b.shape)}, temperature {temperature}"
        )
    N = len(z_a)
    with torch.autocast(z_a.device.type, enabled=False):  # inside it even a float32 product is bf16
        z = torch.cat([z_a, z_b])  # (2N, D), bf16 perhaps; float64 stays float64
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        z = F.normalize(z, dim=1)  # (2N, D), unit rows
        logits = z @ z.T / temperature  # (2N, 2N), in [-1/tau, 1/tau]
    # A view is its own best match; -inf gives it probability 0, the "k != i" of Eq. 1.
    itself = torch.eye(2 * N, dtype=torch.bool, device=z.device)  # (2N, 2N), True = itself
    logits = logits.masked_fill(itself, -torch.inf)
    # The paper interleaves views; we stack them, so row i's positive is N rows away.
    positive = torch.arange(2 * N, device=z.device).roll(N)  # (2N,), [N..2N-1, 0..N-1]
    return F.cross_entropy(logits, positive)


@torch.no_grad()
def contrastive_statistics(z_a: Tensor, z_b: Tensor) -> tuple[Tensor, Tensor]:
    """How well the positives are found, and whether the projections have collapsed.

    Args:
        z_a, z_b: (N, D) projections.

    Returns:
        accuracy: () share of the 2N anchors whose most similar other view is their positive;
            higher is better, chance is 1 / (2N - 1).
        std: () standard deviation of the unit projections over the batch, averaged over D;
            about 1 / sqrt(D) when they spread over the sphere, 0 when they have collapsed.
    """
    N = len(z_a)
    z = F.normalize(torch.cat([z_a, z_b]).float(), dim=1)  # (2N, D)
    similarity = (z @ z.T).fill_diagonal_(-torch.inf)  # (2N, 2N)
    positive = torch.arange(2 * N, device=z.device).roll(N)  # (2N,)
    return (similarity.argmax(dim=1) == positive).float().mean(), z.std(dim=0).mean()


# ---------------------------------------------------------------------------------------------
# Optimisation: what is decayed, how the learning rate falls, in which precision we compute
# ---------------------------------------------------------------------------------------------


def adamw(network: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101), with weight decay on matrices and filters alone.

    Biases and norms are spared: pulling a norm's scale to 0 regularises nothing, because the next
    layer's weights make up for it, and only slows learning.

    Args:
        network: what is trained; its learning rate is set before each step (`set_lr`).
        weight_decay: share of a weight taken off at each step, per unit of learning rate.
    """
    parameters = list(network.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        fused=True,  # one pass over the weights, not ten
    )


def cosine_lr(step: int, steps: int, peak: float, floor: float) -> float:
    """The learning rate of a step: half a cosine from `peak` towards `floor` (arXiv 1608.03983).

    Args:
        step: 0, ..., steps - 1, counted over the whole run.
        steps: of the whole run.

    >>> [round(cosine_lr(s, 4, 1.0, 0.0), 3) for s in range(5)]
    [1.0, 0.854, 0.5, 0.146, 0.0]
    """
    return floor + (peak - floor) * (1 + math.cos(math.pi * step / steps)) / 2


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate of the step to come."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def native_bf16(device: torch.device) -> tuple[bool, str]:
    """Whether `device` computes bf16 in hardware; where it emulates it, float32 is faster.

    Returns:
        (True or False, how we know)
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major >= 8, f"CUDA capability {major}.{minor}"
    if device.type == "cpu":
        try:
            flags = set(Path("/proc/cpuinfo").read_text().split())
        except OSError:
            flags = set()
        found = sorted(flags & {"avx512_bf16", "amx_bf16"})
        return bool(found), f"this CPU has {found[0] if found else 'no AVX-512 bf16 and no AMX'}"
    return False, f"bf16 on {device.type} is not used"


def memory_format(device: torch.device, bf16: bool) -> torch.memory_format:
    """channels_last where it is faster: everywhere, except for float32 on a CPU with AVX-512.

    Measured with ResNet-18 on two cores with AVX2 alone: channels_last gains 10 to 40 % in float32.
    With AVX-512 it was reported to lose badly in float32 and to gain in bf16.
    """
    wide = "AVX512" in torch.backends.cpu.get_cpu_capability()
    slower = device.type == "cpu" and not bf16 and wide
    return torch.contiguous_format if slower else torch.channels_last


# ---------------------------------------------------------------------------------------------
# Many processes: torchrun starts them, and each takes its share of every batch
# ---------------------------------------------------------------------------------------------


@contextmanager
def many_processes(count: int, device: torch.device) -> Iterator[None]:
    """Meet the other processes that torchrun has started; alone, do nothing.

    Args:
        count: of all processes.
        device: CUDA's tensors go by NCCL, the CPU's by gloo.
    """
    if count > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))  # rank 0 may decode for long
    yield
    if count > 1:
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """Which process this is, and of how many; (0, 1) when it is alone."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def gather(z: Tensor) -> Tensor:
    """The projections of all ranks; those of this one keep their graph.

    Every rank then computes the loss of the whole batch, and its backward pass gives the exact
    gradient of that loss with respect to its own projections: as positives, and as negatives of
    everybody else's. What the ranks find adds up to the gradient (`add_up_gradients`).

    Args:
        z: (share, D), on every rank as many.

    Returns:
        (N, D) float32 or better, in the order of the ranks.
    """
    rank, world = rank_and_world()
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if world == 1:
        return z
    parts = [torch.empty_like(z) for _ in range(world)]
    dist.all_gather(parts, z.detach())
    parts[rank] = z
    return torch.cat(parts)


def add_up_gradients(networks: nn.Module) -> None:
    """Give every rank the sum of all ranks' gradients: each found the part that is due to its z."""
    if rank_and_world()[1] == 1:
        return
    gradients = [p.grad for p in networks.parameters()]
    message = torch.cat([g.flatten() for g in gradients])  # one message, not sixty
    dist.all_reduce(message)
    for g, part in zip(gradients, message.split([g.numel() for g in gradients]), strict=True):
        g.copy_(part.view_as(g))


def on_every_rank(make: Callable[[], object]) -> object:
    """What `make` returns or raises (a UserError) on rank 0, on every rank."""
    rank, world = rank_and_world()
    found: list = [None, None]
    if rank == 0:
        try:
            found[0] = make()
        except data.UserError as error:
            found[1] = str(error)
    if world > 1:
        dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
    if found[1]:
        raise data.UserError(found[1])
    return found[0]


def on_any_rank(flag: int) -> int:
    """The largest of all ranks' flags, which are equal afterwards."""
    if rank_and_world()[1] == 1:
        return flag
    flags = torch.tensor(int(flag))  # on the CPU, so that no rank waits for its GPU
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return int(flags)


def check_equal(value: str) -> None:
    """See that every rank has the same, such as the fingerprint of its data.

    Raises:
        UserError: one has not; raised on all of them.
    """
    if on_any_rank(on_every_rank(lambda: value) != value):
        raise data.UserError("the processes have read different pictures; give all the same --data")


# ---------------------------------------------------------------------------------------------
# Pretraining
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pretraining:
    """The settings of a pretraining run; the defaults are the published values."""

    epochs: int = 200
    batch_size: int = 512  # slices, so twice as many views; more negatives, a harder question
    lr: float = 5e-4  # at the start
    weight_decay: float = 1e-4
    temperature: float = 0.07
    chunk_size: int | None = None  # slices whose activations are held at once; None = all
    seed: int = 0
    mean: float = 0.5
    std: float = 0.5


class Run:
    """A training under way, of any networks: what they have learnt and how far it is.

    The next step depends on nothing else but the settings: its random numbers come from (seed,
    epoch, step). So a run that is restored from its `state` goes on as if it had never stopped.

    Args:
        networks: by name, what is trained; the encoder comes first.
        settings: `Pretraining`, or `heads.FineTuning`.
        epochs, steps, batch: how many epochs there are, steps in each, and slices in a step.
        device: of the networks.
        bf16: run the networks under bf16 autocast; the loss is float32 always.
    """

    def __init__(
        self,
        networks: dict[str, nn.Module],
        settings: Any,
        epochs: int,
        steps: int,
        batch: int,
        device: torch.device,
        bf16: bool,
    ) -> None:
        self.networks = nn.ModuleDict(networks).train()
        self.networks.to(device, memory_format=memory_format(device, bf16))
        self.optimizer = adamw(self.networks, weight_decay=settings.weight_decay)
        self.settings, self.device, self.bf16 = settings, device, bf16
        self.epochs, self.steps, self.batch = epochs, steps, batch
        self.records: list[dict[str, float]] = []  # one for each finished epoch
        self.step = 0  # steps done in the epoch after these
        self.sums = torch.zeros(3, device=device)  # of loss, accuracy, std over these steps
        self.seconds, self.since = 0.0, time.perf_counter()  # of training, in these steps
        self.best: dict = {}  # where validation chooses: the weights of the best epoch so far
        self.first: dict = {}  # where training begins more than once: the weights it begins with

    def tick(self) -> None:
        """Count the seconds since the last tick."""
        now = time.perf_counter()
        self.seconds, self.since = self.seconds + now - self.since, now

    def update(self, loss: Tensor, lr: float) -> None:
        """Let the optimiser take its step, if loss and gradients are numbers.

        Args:
            loss: (), of the batch whose gradients are in place.
            lr: to tell.

        Raises:
            UserError: they are not; the weights are as they were before the step.
        """
        norm = nn.utils.get_total_norm([p.grad for p in self.networks.parameters()])
        numbers = torch.stack([loss.detach(), norm])
        if not numbers.isfinite().all():  # waits for the device; the optimiser waits for this
            low = f"a lower --lr ({lr / 2:.2g}, say)" + " or --precision fp32" * self.bf16
            raise data.UserError(
                f"the loss is {numbers[0]:.4g} and its gradients' norm {norm:.4g} in step "
                f"{self.step + 1} of epoch {len(self.records) + 1} at learning rate {lr:.2g}; "
                "the weights were not changed, and what was saved before is as it was; try "
                f"{low}, with --restart or another --out"
            )
        self.optimizer.step()

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return len(self.records) >= self.epochs

    def state(self) -> dict:
        """All of it, as tensors and plain values; shared with the run, not copied."""
        return {
            **{name: network.state_dict() for name, network in self.networks.items()},
            "optimizer": self.optimizer.state_dict(),
            "epoch": len(self.records),
            **{name: getattr(self, name) for name in RUN_STATE},
        }

    def restore(self, state: dict) -> None:
        """Go back to where `state` was taken.

        Raises:
            UserError: it is of another run, in part or as a whole.
        """
        try:
            for name, network in self.networks.items():
                network.load_state_dict(state[name])
            self.optimizer.load_state_dict(state["optimizer"])
            for name in RUN_STATE:
                setattr(self, name, state[name])
            self.sums = self.sums.to(self.device, copy=True)
        except Exception as error:  # a state that is not ours may lack or break anything
            text = f"checkpoint.pt cannot be resumed ({reason(error)}); --restart begins anew"
            raise data.UserError(text) from error


def pretraining(
    encoder: ResNet, settings: Pretraining, n: int, device: torch.device, bf16: bool
) -> Run:
    """A pretraining that is about to begin; the projection head is new.

    Args:
        encoder: on the CPU; trained in place.
        n: pictures; the n mod batch_size of them left over in an epoch wait for the next one.
        device, bf16: as `Run` takes them.
    """
    networks = {"encoder": encoder, "projection_head": ProjectionHead(encoder.feature_dim)}
    if device.type == "cuda" and rank_and_world()[1] > 1:  # on CPUs each has its own statistics
        networks = {k: nn.SyncBatchNorm.convert_sync_batchnorm(v) for k, v in networks.items()}
    steps = n // settings.batch_size
    return Run(networks, settings, settings.epochs, steps, settings.batch_size, device, bf16)


def embed(networks: nn.ModuleDict, views: Tensor, bf16: bool) -> Tensor:
    """What a run's two networks make of views: projections z or, of a classifier, logits.

    Args:
        networks: the encoder, then what takes its representations.
        views: (V, 1, S, S) float, normalised.

    Returns:
        (V, D), bf16 if asked for.
    """
    encoder, head = networks.values()
    with torch.autocast(views.device.type, torch.bfloat16, enabled=bf16):
        h = encoder(views.contiguous(memory_format=memory_format(views.device, bf16)))  # (V, E)
        return head(h)  # (V, D)


def backward_in_chunks(
    networks: nn.ModuleDict, views: Tensor, settings: Pretraining, bf16: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a whole batch and its gradients, in the memory of one chunk (2101.06983, §3.1).

    The loss sees the networks through z alone, and z is small. So (1) embed every chunk without
    keeping activations; (2) take dL/dz of the loss over the whole batch, all its negatives
    included; (3) embed every chunk again, with activations, and hand its rows of dL/dz back through
    it. The gradients add up to those of the plain step; the price is one more forward pass.

    A chunk holds both views of its slices. Batch norm sees a chunk where it would see the batch;
    its running statistics move in (1), and (3) leaves them as they are.

    Args:
        networks: encoder and projection head; gradients are added to their parameters'.
        views: (2 share, 1, S, S) float, the second views below the first.
        settings: chunk_size in [1, share], and the temperature.

    Returns:
        (loss (), z_a (N, D), z_b (N, D)), none with a graph.
    """
    # Even chunks: in a small last one, batch norm would see next to nothing, and gradients burst.
    count = -(-len(views) // (2 * settings.chunk_size))
    pairs = zip(*(v.tensor_split(count) for v in views.chunk(2)), strict=True)
    chunks = [torch.cat(pair) for pair in pairs]  # each (at most 2 chunk_size, 1, S, S)
    with torch.no_grad():
        z = [embed(networks, chunk, bf16).chunk(2) for chunk in chunks]
    own = [torch.cat(parts).requires_grad_() for parts in zip(*z, strict=True)]  # (share, D)
    z_a, z_b = (gather(z) for z in own)  # (N, D) each
    loss = nt_xent(z_a, z_b, settings.temperature)
    gradients = [g.tensor_split(count) for g in torch.autograd.grad(loss, own)]
    statistics = [buffer.clone() for buffer in networks.buffers()]
    for chunk, *gradient in zip(chunks, *gradients, strict=True):
        embed(networks, chunk, bf16).backward(torch.cat(gradient))
    for buffer, kept in zip(networks.buffers(), statistics, strict=True):
        buffer.copy_(kept)
    return loss.detach(), z_a.detach(), z_b.detach()


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that nobody waits for: CUDA fetches it from pinned memory."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def batches(images: Tensor | np.ndarray, order: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Each batch's pictures on the device: (share, 1, S, S) uint8.

    Args:
        images: (m, S, S) uint8: a tensor on the device, or a memory-mapped array.
        order: (steps, share) int64 on the CPU, rows of `images`.
    """
    if isinstance(images, Tensor):
        for rows in to_device(order, device):
            yield images[rows][:, None]
    else:
        for rows in order.numpy():
            yield to_device(torch.from_numpy(images[rows])[:, None], device)


def pretrain(
    run: Run, images: Tensor | np.ndarray, rows: np.ndarray
) -> Iterator[dict[str, float] | None]:
    """Train a run to its end, from wherever it is.

    Under torchrun every rank calls this with the same arguments, and takes its share of each batch.

    Args:
        images: (m, S, S) uint8, as in `batches`. An array moves to a GPU that has room for it.
        rows: (n,) int64, which of the images to train on; n >= batch_size >= 2. The n mod
            batch_size slices left over in an epoch wait for the next one.

    Yields:
        After each step None or, after an epoch's last one, its record: epoch (from 1), loss, lr,
        contrastive_accuracy, embedding_std: means over the epoch's steps; images_per_second
        (slices, not views) and seconds of training alone.
    """
    settings, networks, device = run.settings, run.networks, run.device
    steps, (rank, world) = run.steps, rank_and_world()
    share = settings.batch_size // world
    mine = torch.arange(rank * share, (rank + 1) * share)  # (share,), which of the N slices
    both = torch.cat([mine, settings.batch_size + mine])  # (2 share,), which of their 2N views
    room = torch.cuda.mem_get_info(device)[0] * DEVICE_SHARE if device.type == "cuda" else 0
    if isinstance(images, np.ndarray) and len(rows) * images[:1].nbytes <= room:
        images, rows = torch.from_numpy(images[rows]).to(device), np.arange(len(rows))
    run.since = time.perf_counter()
    while not run.finished:
        epoch = len(run.records) + 1
        # Step 0 of an epoch draws its order, step s >= 1 the views of its batch s.
        order = torch.randperm(len(rows), generator=data.generator_for(settings.seed, epoch, 0))
        order = torch.from_numpy(rows)[order[: steps * settings.batch_size]].view(steps, -1)
        for batch in batches(images, order[run.step :, mine], device):  # (share, 1, S, S) uint8
            done = (epoch - 1) * steps + run.step
            lr = cosine_lr(done, settings.epochs * steps, settings.lr, settings.lr / 50)
            set_lr(run.optimizer, lr)
            generator = data.generator_for(settings.seed, epoch, run.step + 1)
            numbers = data.draw_views(2 * settings.batch_size, generator).rows(both)
            numbers = data.ViewParameters(*(to_device(column, device) for column in numbers))
            # Both views in one pass, so that batch norm sees one population, not two.
            pairs = torch.cat([batch, batch])  # (2 share, 1, S, S)
            views = data.apply_views(pairs, numbers, settings.mean, settings.std)
            run.optimizer.zero_grad()
            if settings.chunk_size and settings.chunk_size < share:
                loss, z_a, z_b = backward_in_chunks(networks, views, settings, run.bf16)
            else:
                z_a, z_b = (gather(z) for z in embed(networks, views, run.bf16).chunk(2))  # (N, D)
                loss = nt_xent(z_a, z_b, settings.temperature)
                loss.backward()
            add_up_gradients(networks)
            run.update(loss, lr)
            run.sums += torch.stack([loss.detach(), *contrastive_statistics(z_a, z_b)])
            run.step += 1
            run.tick()
            yield finish_epoch(run, lr, STATISTICS) if run.step == steps else None


def finish_epoch(run: Run, lr: float, names: Sequence[str]) -> dict[str, float]:
    """Record an epoch whose steps are done, and begin the next.

    Args:
        lr: of the last step.
        names: of what the run's sums add up.
    """
    means = (run.sums / run.steps).tolist()  # waits for the device; the clock comes after
    run.tick()
    record = {"epoch": len(run.records) + 1, "lr": lr, **dict(zip(names, means, strict=False))}
    speed = run.steps * run.batch / run.seconds
    record |= {"images_per_second": speed, "seconds": run.seconds}
    run.records, run.step, run.seconds = [*run.records, record], 0, 0.0
    run.sums.zero_()
    return record


# ---------------------------------------------------------------------------------------------
# Checkpoints: plain dicts of tensors and plain values, loadable with weights_only=True
# ---------------------------------------------------------------------------------------------


def reason(error: Exception) -> str:
    """The first line of what an exception says."""
    if isinstance(error, KeyError):  # it says the key alone
        return f"it has no {error}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def load_plain(path: str | Path) -> dict:
    """Read a checkpoint of tensors and plain values; nothing else in it is ever unpickled.

    Raises:
        OSError, ValueError, RuntimeError, zipfile.BadZipFile...: it is damaged (the sums of a zip
            file's parts tell), would unpack to more than it is, or holds anything else.
    """
    if zipfile.is_zipfile(path):  # torch.save's format; it compresses nothing
        with zipfile.ZipFile(path) as parts:
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
                raise ValueError("it is compressed, which no checkpoint is")
            if damaged := parts.testzip():
                raise ValueError(f"{damaged} in it is damaged")
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles that are none of torch's
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own text says how to run it all the same
        found = re.search(r"GLOBAL (\S+)|(operand)", str(error))  # operand: of other pickles
        if not found:
            raise ValueError("it is damaged, or no file of torch's") from error
        what = f"it holds {found[1] or 'a pickle of another program'}, which could run code"
        raise ValueError(f"{what}, and was not unpickled") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"it holds a {type(checkpoint).__name__}, no dict")
    return checkpoint


def digest(network: nn.Module) -> str:
    """SHA-256 of a network's weights and statistics, hexadecimal."""
    found = hashlib.sha256()
    for value in network.state_dict().values():
        found.update(np.ascontiguousarray(value.cpu().numpy()))
    return found.hexdigest()


def save(checkpoint: dict, path: Path) -> None:
    """Write a checkpoint such that a reader finds the old one or the new one, whole.

    Args:
        checkpoint: tensors and plain values alone, so that it loads with weights_only=True.
        path: its place; missing folders are made.
    """
    with data.write_atomically(path) as file:
        torch.save(checkpoint, file)


def encoder_checkpoint(encoder: ResNet, config: dict, epoch: int, seen: Tensor) -> dict:
    """encoder.pt: all that using an encoder needs.

    Args:
        config: of the run; what describes the encoder is copied out of it, to be found at once.
        epoch: how many it was trained for.
        seen: (n, 16) uint8, the hashes of the pictures pretrained on, so that a probe can refuse
            a test part that holds one of them.
    """
    weights = {name: value.cpu().contiguous() for name, value in encoder.state_dict().items()}
    described = {key: config[key] for key in ("arch", "image_size", "mean", "std")}
    described |= {"encoder": weights, "feature_dim": encoder.feature_dim}
    return described | {"epoch": epoch, "config": config, "seen": seen}


def save_run(run: Run, out: Path, config: dict, seen: Tensor | None = None) -> float:
    """Write checkpoint.pt, all that going on needs, and of a pretraining encoder.pt before it.

    Only rank 0 does. Saving is not training: its seconds are taken off the run's.

    Args:
        seen: as `encoder_checkpoint` takes it; None = this is no pretraining.

    Returns:
        When to save again at the earliest, on time.monotonic's clock.

    Raises:
        UserError: a weight is no finite number.
    """
    began = time.monotonic()
    if not all(value.isfinite().all() for value in run.networks.state_dict().values()):
        raise data.UserError(
            f"the weights are no finite numbers after step {run.step} of epoch "
            f"{len(run.records) + 1}; what was saved before is as it was; start again with "
            "--restart and a lower --lr"
        )
    if rank_and_world()[0] == 0:
        if seen is not None:
            encoder = run.networks["encoder"]
            save(encoder_checkpoint(encoder, config, len(run.records), seen), out / "encoder.pt")
        # last: when it says finished, all else is there
        save(run.state() | {"config": config}, out / "checkpoint.pt")
    took = time.monotonic() - began
    run.seconds -= took
    return time.monotonic() + max(CHECKPOINT_SECONDS, took / CHECKPOINT_SHARE)


def read_checkpoint(out: Path, config: dict) -> dict | None:
    """The state of the run whose checkpoint.pt is in a folder; None where there is none.

    What it led to, encoder.pt or classifier.pt, still says of which run it is where it was deleted.

    Args:
        config: of the run that shall go on from it.

    Raises:
        UserError: it cannot be read, or is of a run with other settings.
    """
    path = next((out / name for name in RUN_FILES[:3] if (out / name).exists()), None)
    if path is None:
        return None
    try:
        state = load_plain(path)
        before = state["config"]
        if not state.keys() & {"sums", "cells", "seen"}:
            raise ValueError("it holds a config alone")
    except Exception as error:  # torch.load raises nearly anything on a file that isn't its own
        raise data.UserError(
            f"{path} cannot be resumed ({reason(error)}); --restart begins anew and replaces it"
        ) from error
    changed = [key for key in config if key not in FREE and before.get(key) != config[key]]
    values = {key: f"{before.get(key)!s:.30} there, {config[key]!s:.30} here" for key in changed}
    known = {"fingerprint": "other pictures", "weights": "another encoder"}
    differ = [known.get(key, f"{key} {values[key]}") for key in changed]
    if differ:
        raise data.UserError(
            f"{path} is of a run with other settings: {'; '.join(differ)}; give those to go on, "
            "another --out for a second run, or --restart to begin anew and replace it"
        )
    return state if path.name == "checkpoint.pt" else None


def open_run(held: ExitStack, out: Path, config: dict, restart: bool) -> dict | None:
    """Hold a run's folder, and see how far the run in it has come (`read_checkpoint`).

    Args:
        held: lets go of the folder when it is closed.
        restart: delete the run.
    """
    held.enter_context(data.locked(out, wait=False))
    for name in RUN_FILES:
        for leftover in out.glob(f".{name}.*.tmp"):  # of a write that was killed
            leftover.unlink()
        if restart:
            (out / name).unlink(missing_ok=True)
    return read_checkpoint(out, config)


def check_encoder(checkpoint: dict) -> None:
    """See that what `encoder_checkpoint` describes is there, of its type, and possible.

    Raises:
        ValueError: something is not; KeyError: something is missing.
    """
    kinds = {"arch": str, "encoder": dict, "feature_dim": int, "image_size": int, "mean": float}
    kinds |= {"std": float, "epoch": int, "config": dict, "seen": Tensor}
    for key, kind in kinds.items():
        if not isinstance(checkpoint[key], kind):
            raise ValueError(f"its {key} is a {type(checkpoint[key]).__name__}, no {kind.__name__}")
    seen, (mean, std) = checkpoint["seen"], (checkpoint[key] for key in ("mean", "std"))
    possible = {
        "arch": checkpoint["arch"] in ARCHITECTURES,
        "image_size": LEAST_PIXELS <= checkpoint["image_size"] <= MOST_PIXELS,
        "mean or std": abs(mean) < 1e6 and 1e-6 < std < 1e6,
        "seen": seen.dtype == torch.uint8 and seen.shape[1:] == (16,),
    }
    if wrong := [key for key, fine in possible.items() if not fine]:
        raise ValueError(f"its {wrong[0]} cannot be: {str(checkpoint.get(wrong[0]))[:40]!r}")


@torch.no_grad()
def check_answer(network: nn.Module) -> None:
    """See that a network that was read answers with numbers, whatever its weights are.

    Raises:
        ValueError: it does not.
    """
    was_training = network.training
    answer = network.eval()(torch.zeros(1, 1, LEAST_PIXELS, LEAST_PIXELS))
    network.train(was_training)
    if not answer.isfinite().all():
        raise ValueError("its weights give no finite numbers")


def load_encoder(path: Path) -> tuple[ResNet, dict]:
    """Read encoder.pt (or classifier.pt, which holds one) into a ResNet on the CPU.

    Nothing is unpickled but tensors and plain values, and every parameter has to be there, with
    its own name and shape: an encoder loaded in part would run, and be wrong.

    Returns:
        (the encoder, the whole checkpoint)

    Raises:
        UserError: the file is missing, or is not such a checkpoint.
    """
    try:
        checkpoint = load_plain(path)
        if "arch" not in checkpoint:
            raise ValueError(f"it holds {', '.join(map(str, checkpoint))}; encoder.pt is beside it")
        check_encoder(checkpoint)
        encoder = ARCHITECTURES[checkpoint["arch"]]()
        encoder.load_state_dict(checkpoint["encoder"])
        if checkpoint["feature_dim"] != encoder.feature_dim:
            raise ValueError(f"its feature_dim is {checkpoint['feature_dim']}")
        check_answer(encoder)
    except FileNotFoundError:
        raise data.UserError(
            f"no encoder at {path}; make one with: python main.py pretrain, and the same --data"
        ) from None
    except Exception as error:  # torch.load raises nearly anything on a file that isn't its own
        raise data.UserError(f"{path} cannot be used as an encoder.pt ({reason(error)})") from error
    return encoder, checkpoint


def init_encoder(arch: str, init: str) -> tuple[ResNet, float, float]:
    """An encoder before its training: random, with ImageNet's weights, or with those of a file.

    torchvision's first layer takes red, green and blue; where all three are the same, it does what
    the sum of its three filters does.

    Args:
        init: "random" (torch's own generator), "imagenet" (torchvision fetches them once), or a
            file that holds a state_dict of torchvision's.

    Returns:
        (the encoder on the CPU; mean and std of the pictures it expects, in units of [0, 1])

    Raises:
        UserError: they cannot be had, or are of another architecture.
    """
    encoder = ARCHITECTURES[arch]()
    if init == "random":
        return encoder, 0.5, 0.5
    try:
        if init == "imagenet":
            from torchvision.models import get_model_weights  # here alone: all else runs without

            weights = get_model_weights(arch).DEFAULT.get_state_dict(check_hash=True)
        else:
            weights = load_plain(init)
        if "encoder" in weights:  # what it has seen would be forgotten
            raise ValueError(
                "it is one of ours, which probe, finetune and compare take as --encoder"
            )
        weights = {name: w for name, w in weights.items() if not name.startswith("fc.")}
        weights["conv1.weight"] = weights["conv1.weight"].sum(dim=1, keepdim=True)  # (64, 1, 7, 7)
        encoder.load_state_dict(weights)
    except Exception as error:  # torch.load and a download raise nearly anything
        raise data.UserError(f"--init {init}: no weights of a {arch} ({reason(error)})") from error
    return encoder, *IMAGENET_SCALING
