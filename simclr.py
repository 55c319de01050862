"""Pretrain an encoder on images without labels: SimCLR (Chen et al., arXiv 2002.05709).

Show the network two random views of every slice in a batch. Its encoder turns a view into a
representation h, and a small projection head turns h into a projection z. The loss asks of each
view: among all the other views of this batch, which one is of the same slice? To answer, the
encoder has to keep what survives cropping, turning and blurring (anatomy, lesions) and to drop
what does not (pose, gain, noise). Afterwards the projection head is thrown away and h is kept.

    h = f(x~)                 the encoder, a ResNet without its last layer        (§2.1)
    z = g(h) = W2 relu(W1 h)  the projection head                                 (§2.1)
    l(i, j) = -log( exp(sim(z_i, z_j) / tau) / sum_{k != i} exp(sim(z_i, z_k) / tau) )   (Eq. 1)
    L = mean of l over all 2N (anchor, positive) pairs                            (Algorithm 1)

Shape letters: N slices in a batch (so 2N views) · C channels · H, W pixels, S where both are
equal · E encoder features · D projection dimensions. Here also V views and n images to train on.

Departures from the paper (docs/results.md has what was measured):
  - one channel, no change of colour: scans are gray; half of their jitter in brightness;
  - rotation and affine besides crop and flip: heads lie a little askew; not measured;
  - AdamW for LARS: batches here are 512, not 4096; ResNet-18 by default, a narrower projection
    head, and weight decay 1e-4 for 1e-6;
  - temperature 0.07 for 0.1 to 0.5, and the learning rate ends at 1/50 of its peak, not at 0.

What the defaults reproduce, with hardware, minutes and intervals, stands in docs/results.md.

Next: evaluate.py
"""

import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

import data

# ---------------------------------------------------------------------------------------------
# Two views of a slice (§3): one 3x3 matrix, one resampling, then the gray values
# ---------------------------------------------------------------------------------------------

# Crops from 8 to 60 % of the area scored alike at equal compute; nothing else here was measured.
CROP_AREA = (0.2, 1.0)  # share of the image's area; Chen et al. begin at 0.08
CROP_RATIO = (3 / 4, 4 / 3)  # width / height; Chen et al., appendix A
ROTATION = (-15.0, 15.0)  # degrees; ours, as are shift, scale and shear
SHIFT = (-0.05, 0.05)  # share of the side
SCALE = (0.95, 1.05)  # factor
SHEAR = (-5.0, 5.0)  # degrees
JITTER_CHANCE = 0.8  # Chen et al., appendix A; they draw factors from 0.2 to 1.8
BRIGHTNESS = CONTRAST = (0.6, 1.4)  # factors
BLUR_CHANCE = 0.5  # Chen et al., appendix A
BLUR_SIGMA = (0.1, 2.0)  # pixels; Chen et al., appendix A
ALL = slice(None)  # the share of a process that is alone: every slice of the batch


def matrices(top: Sequence, middle: Sequence) -> Tensor:
    """V matrices (V, 3, 3) from their upper rows, of numbers or (V,) tensors; below is 0, 0, 1."""
    entries = [torch.as_tensor(entry) for entry in (*top, *middle, 0.0, 0.0, 1.0)]
    return torch.stack(torch.broadcast_tensors(*entries), dim=1).view(-1, 3, 3)  # from 9 x (V,)


def random_matrices(between: Callable[[float, float], Tensor]) -> Tensor:
    """Where a view's pixels are taken from: matrices (V, 3, 3) from points of the view to points
    of the image, both in [-1, 1].

    They run backwards, from the view to the image. So each one undoes its operation (to move an
    image right, look further left), and the product begins with the first operation, the crop.

    Args:
        between: gives (V,) uniform numbers between two limits.
    """
    area = between(*CROP_AREA)
    ratio = between(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])).exp()
    width = (area * ratio).sqrt().clamp(max=1)  # of the box, in sides of the image
    height = (area / ratio).sqrt().clamp(max=1)
    left = between(0, 1) * (1 - width)
    top = between(0, 1) * (1 - height)
    mirror = torch.where(between(0, 1) < 0.5, -1.0, 1.0)  # left-right: no scan is upside down
    # The last column is the middle of the box, left + width / 2, moved from [0, 1] to [-1, 1].
    crop = matrices((mirror * width, 0, 2 * left + width - 1), (0, height, 2 * top + height - 1))
    angle = torch.deg2rad(between(*ROTATION))
    rotation = matrices((angle.cos(), -angle.sin(), 0), (angle.sin(), angle.cos(), 0))
    shift = matrices((1, 0, -2 * between(*SHIFT)), (0, 1, -2 * between(*SHIFT)))  # 2 = a side
    scale = between(*SCALE)
    zoom = matrices((1 / scale, 0, 0), (0, 1 / scale, 0))
    shear = matrices((1, torch.deg2rad(between(*SHEAR)).tan(), 0), (0, 1, 0))
    return crop @ rotation @ shear @ zoom @ shift


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur (V, 1, S, S) images, each with its own sigma (V,) in pixels; 0 leaves it as it is.

    A Gaussian is separable, and along one axis it is a matrix B: x~ = B x B'. Its window is a
    tenth of the side (appendix A); at the border it is cut, and still adds up to 1.
    """
    pixel = torch.arange(images.shape[-1], device=images.device)
    distance = pixel[:, None] - pixel  # (S, S)
    B = torch.exp(-0.5 * (distance / sigma.clamp(min=1e-3)[:, None, None]) ** 2)  # (V, S, S)
    B = B * (distance.abs() <= max(1, len(pixel) // 20))  # half of the window on each side
    B = (B / B.sum(dim=2, keepdim=True))[:, None]  # (V, 1, S, S), rows add up to 1
    return B @ images @ B.mT  # (V, 1, S, S)


def one_view(images: Tensor, generator: Generator, share: slice, mean: float, std: float) -> Tensor:
    """One random view of each slice of a share; the arguments are those of `random_views`."""

    def between(low: float, high: float) -> Tensor:
        """Draw a uniform number for each slice of the batch; return those of the share, (V,)."""
        return low + (high - low) * torch.rand(len(images), generator=generator)[share]

    matrix = random_matrices(between).to(images.device)  # (V, 3, 3)
    jittered = between(0, 1) < JITTER_CHANCE  # (V,) bool, as is the next one
    blurred = between(0, 1) < BLUR_CHANCE
    brightness = torch.where(jittered, between(*BRIGHTNESS), 1.0).to(images.device)
    contrast = torch.where(jittered, between(*CONTRAST), 1.0).to(images.device)
    sigma = torch.where(blurred, between(*BLUR_SIGMA), 0.0).to(images.device)

    x = images[share] / (255 if images.dtype == torch.uint8 else 1)  # (V, 1, S, S), in [0, 1]
    grid = F.affine_grid(matrix[:, :2], x.shape, align_corners=False)  # (V, S, S, 2)
    x = F.grid_sample(x, grid, align_corners=False)  # (V, 1, S, S), bilinear, black outside
    x = (x * brightness[:, None, None, None]).clamp(0, 1)
    gray = x.mean(dim=(1, 2, 3), keepdim=True)  # (V, 1, 1, 1)
    x = (gray + (x - gray) * contrast[:, None, None, None]).clamp(0, 1)
    return (gaussian_blur(x, sigma) - mean) / std


def random_views(
    images: Tensor, generator: Generator, share: slice = ALL, mean: float = 0.5, std: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Two independent random views of each slice (§2.1: t, t' ~ T).

    Args:
        images: (N, 1, S, S), uint8, or float32 in [0, 1]: the whole batch.
        generator: on the CPU; it alone decides what the views look like.
        share: the slices to make views of. Numbers are drawn for all, so that a slice's views do
            not depend on how many processes share the batch.
        mean, std: of the normalisation, which comes last; 0.5 and 0.5 give [-1, 1].

    Returns:
        view_a, view_b: (V, 1, S, S) float32, of the V slices of the share.

    Raises:
        ValueError: the images are not gray squares.
    """
    if images.ndim != 4 or images.shape[1] != 1 or images.shape[2] != images.shape[3]:
        raise ValueError(f"expected (N, 1, S, S) images, got {tuple(images.shape)}")
    view_a = one_view(images, generator, share, mean, std)
    view_b = one_view(images, generator, share, mean, std)  # from the numbers that come next
    return view_a, view_b


# ---------------------------------------------------------------------------------------------
# The encoder f: a ResNet (He et al., arXiv 1512.03385), with torchvision's parameter names
# ---------------------------------------------------------------------------------------------


def stage(block: type, in_channels: int, channels: int, depth: int, stride: int) -> nn.Sequential:
    """`depth` blocks, of which the first one takes the stride and widens."""
    later = [block(channels * block.expansion, channels, 1) for _ in range(depth - 1)]
    return nn.Sequential(block(in_channels, channels, stride), *later)


class ResNet(nn.Module):
    """The encoder: four stages of blocks, global average pooling, no last layer (`fc`).

    Args:
        block: BasicBlock or Bottleneck (both below); it puts out `block.expansion` times the
            channels that it is named by.
        depths: how many blocks each stage has.
    """

    def __init__(self, block: type, depths: tuple[int, int, int, int], in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = stage(block, 64, 64, depths[0], stride=1)
        self.layer2 = stage(block, 64 * block.expansion, 128, depths[1], stride=2)
        self.layer3 = stage(block, 128 * block.expansion, 256, depths[2], stride=2)
        self.layer4 = stage(block, 256 * block.expansion, 512, depths[3], stride=2)
        self.feature_dim = 512 * block.expansion  # E
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al., arXiv 1502.01852
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) float, normalised -> h: (N, E), not negative."""
        x = F.relu(self.bn1(self.conv1(x)))  # (N, 64, H/2, W/2)
        x = F.max_pool2d(x, 3, stride=2, padding=1)  # (N, 64, H/4, W/4)
        x = self.layer2(self.layer1(x))  # (N, 128 x expansion, H/8, W/8)
        x = self.layer4(self.layer3(x))  # (N, E = 512 x expansion, H/32, W/32)
        return x.mean(dim=(2, 3))  # (N, E)


def resnet18(in_channels: int = 1) -> ResNet:
    """ResNet-18: E = 512, 11.2 million parameters."""
    return ResNet(BasicBlock, (2, 2, 2, 2), in_channels)


def resnet50(in_channels: int = 1) -> ResNet:
    """ResNet-50: E = 2048, 23.5 million parameters."""
    return ResNet(Bottleneck, (3, 4, 6, 3), in_channels)


ARCHITECTURES = {"resnet18": resnet18, "resnet50": resnet50}
STRIDES = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}  # pixels a cell of a stage's map

# ---------------------------------------------------------------------------------------------
# The projection head g
# ---------------------------------------------------------------------------------------------


class ProjectionHead(nn.Sequential):
    """Linear(E -> 512) -> ReLU -> Linear(512 -> D = 128): h (N, E) to z (N, D), of any scale.

    Without the ReLU it is one matrix, and h keeps less (§4.2). The widths are Lippe's.
    """

    def __init__(self, in_features: int, hidden_dim: int = 512, out_dim: int = 128) -> None:
        super().__init__(
            nn.Linear(in_features, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, out_dim)
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

    >>> round(float(nt_xent(torch.ones(4, 3), torch.ones(4, 3))), 4)  # log 7: nothing distinguished
    1.9459
    """
    if z_a.shape != z_b.shape or z_a.ndim != 2 or len(z_a) < 2 or temperature <= 0:
        raise ValueError(f"got views {tuple(z_a.shape)}, {tuple(z_b.shape)}, tau={temperature}")
    N = len(z_a)
    with torch.autocast(z_a.device.type, enabled=False):  # inside it even a float32 product is bf16
        z = torch.cat([z_a, z_b])
        z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)  # (2N, D), unit
        logits = z @ z.T / temperature  # (2N, 2N), in [-1/tau, 1/tau]
    # A view is its own best match; -inf gives it probability 0, the "k != i" of Eq. 1.
    itself = torch.eye(2 * N, dtype=torch.bool, device=z.device)  # (2N, 2N), True = itself
    logits = logits.masked_fill(itself, -torch.inf)
    # The paper interleaves views; we stack them, so row i's positive is N rows away.
    positive = torch.arange(2 * N, device=z.device).roll(N)  # (2N,), [N..2N-1, 0..N-1]
    return F.cross_entropy(logits, positive)


# ---------------------------------------------------------------------------------------------
# Optimisation
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pretraining:
    """The settings of a run.

    The values are those of faroukb11/Brain_MRI_Classification, which are those of Lippe's SimCLR
    tutorial (Amsterdam, tutorial 17) but for epochs and batch size, there 500 and 256.
    """

    epochs: int = 200  # matters: at equal compute the number of steps decides
    batch_size: int = 512  # slices; matters only as it changes the number of steps
    lr: float = 5e-4  # peak; not measured
    weight_decay: float = 1e-4  # not measured
    temperature: float = 0.07  # 0.07 to 0.5 made no clear difference in 257 steps
    chunk_size: int | None = None  # slices whose activations are held at once; None = all
    seed: int = 0
    mean: float = 0.5  # of the normalisation, in units of [0, 1]
    std: float = 0.5


def adamw(network: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101), with weight decay on matrices and filters alone.

    Biases and norms are spared: shrinking a norm's scale regularises nothing, as the next layer's
    weights make up for it. The learning rate is set before each step (`set_lr`).
    """
    decayed = {"params": [p for p in network.parameters() if p.ndim > 1]}
    spared = {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0.0}
    return torch.optim.AdamW([decayed, spared], weight_decay=weight_decay, fused=True)


def warmup_cosine(step: int, steps: int, peak: float, floor: float) -> float:
    """The learning rate of a step: half a cosine from `peak` to `floor`, times a ramp.

    The rise takes the first 5 % of the steps (Chen et al.: 10 epochs of 100 to 1000; not measured).

    >>> [round(warmup_cosine(step, 40, 1.0, 0.02), 3) for step in (0, 1, 20, 40)]
    [0.5, 0.998, 0.51, 0.02]
    """
    cosine = floor + (peak - floor) * (1 + math.cos(math.pi * step / steps)) / 2
    return cosine * min(1.0, (step + 1) / (0.05 * steps))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate of the step to come."""
    for group in optimizer.param_groups:
        group["lr"] = lr


# ---------------------------------------------------------------------------------------------
# The plain step: views -> encoder -> projection head -> loss
# ---------------------------------------------------------------------------------------------


def training_step(
    networks: nn.ModuleDict, images: Tensor, generator: Generator, settings: Pretraining, bf16: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The method: find the gradients of one batch, for the optimiser to take.

    Where one process trains with the whole batch in memory, the four helpers do nothing: the share
    is all, encode(f, x) is f(x), gather(z) is z. They stand at the end of this file.

    Args:
        networks: "encoder" and "projection_head".
        images: (N, 1, S, S) uint8.
        generator: decides what the views look like.
        bf16: run the networks under bf16 autocast.

    Returns:
        loss () float32; z_a, z_b (N, D); none with a graph.
    """
    networks.train()
    share = own_share(len(images))  # of many processes, the slices of this one
    view_a, view_b = random_views(images, generator, share, settings.mean, settings.std)
    # In one pass, so that batch norm sees both views alike (where there are chunks, a chunk's).
    views = torch.cat([view_a, view_b])  # (2N, 1, S, S)
    with torch.autocast(views.device.type, torch.bfloat16, enabled=bf16):
        h = encode(networks["encoder"], views, settings.chunk_size)  # (2N, E)
        z = networks["projection_head"](h)  # (2N, D)
    z_a, z_b = z.chunk(2)  # (N, D) each
    z_a, z_b = gather(z_a), gather(z_b)  # of all processes
    loss = nt_xent(z_a, z_b, settings.temperature)
    loss.backward()
    add_up_gradients(networks)  # of all processes
    return loss.detach(), z_a.detach(), z_b.detach()


# ---------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------


def seed_from(*key: int) -> int:
    """One seed in [0, 2^63) from whole numbers >= 0; neighbouring keys give unrelated seeds."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1  # 64 to 63 bits


def generator_for(*key: int) -> Generator:
    """A CPU generator for one step; what was drawn before it makes no difference."""
    return Generator().manual_seed(seed_from(*key))


def pretrain(
    networks: nn.ModuleDict,
    images: np.ndarray,
    rows: np.ndarray,
    settings: Pretraining,
    device: torch.device,
    bf16: bool,
    resume: dict | None = None,
    progress: Callable[[range], Iterable[int]] = iter,
) -> Iterator[tuple[dict, dict]]:
    """Train encoder and projection head, in place.

    Args:
        networks: as in `training_step`; they move, learn, and are in train mode.
        images: (m, S, S) uint8, perhaps memory-mapped.
        rows: (n,) int64, those to train on, n >= batch_size; an epoch leaves n mod batch_size out.
        resume: the state to go on from.
        progress: wraps the range of an epoch's steps, as tqdm does.

    Yields:
        After each epoch (record, state). record: epoch (from 1), loss, contrastive_accuracy and
        embedding_std (means over the steps), lr (of the last step), images_per_second (slices, not
        views), seconds. state: all that going on needs; references, no copies.

    Raises:
        UserError: the loss is not finite; the weights are those before the step.
    """
    size = settings.batch_size
    steps = len(rows) // size
    total = settings.epochs * steps
    optimizer = prepare(networks, settings, device, bf16, resume)
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
        images = torch.tensor(images, device=device)  # else copied batch by batch
    finished = resume["epoch"] if resume else 0
    for epoch in range(finished + 1, settings.epochs + 1):
        began = time.perf_counter()
        sums = torch.zeros(3, device=device)  # of loss, contrastive accuracy, embedding std
        # Step 0 of an epoch draws its order, step s >= 1 the views of its batch s.
        order = torch.randperm(len(rows), generator=generator_for(settings.seed, epoch, 0)).numpy()
        for step in progress(range(steps)):
            lr = warmup_cosine((epoch - 1) * steps + step, total, settings.lr, settings.lr / 50)
            set_lr(optimizer, lr)
            chosen = rows[order[step * size : (step + 1) * size]]  # (N,)
            batch = torch.as_tensor(images[chosen])[:, None].to(device)  # (N, 1, S, S) uint8
            generator = generator_for(settings.seed, epoch, step + 1)
            optimizer.zero_grad()
            loss, z_a, z_b = training_step(networks, batch, generator, settings, bf16)
            if not loss.isfinite():
                tip = f"try --restart --lr {settings.lr / 2:.2g}"
                raise data.UserError(f"the loss is {loss:.3g} in epoch {epoch}; {tip}")
            optimizer.step()
            sums += torch.stack([loss, *contrastive_statistics(z_a, z_b)])
        mean_loss, accuracy, std = (sums / steps).tolist()
        record = {"epoch": epoch, "loss": mean_loss, "lr": lr, "contrastive_accuracy": accuracy}
        record |= {"embedding_std": std, "seconds": time.perf_counter() - began}
        record["images_per_second"] = steps * size / record["seconds"]
        weights = networks.state_dict()
        yield record, {"epoch": epoch, "weights": weights, "optimizer": optimizer.state_dict()}


# ---------------------------------------------------------------------------------------------
# What the log says of a step, besides the loss
# ---------------------------------------------------------------------------------------------


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
    z = F.normalize(torch.cat([z_a, z_b]).float(), dim=1)  # (2N, D), unit rows
    similarity = (z @ z.T).fill_diagonal_(-torch.inf)  # (2N, 2N), no view is its own match
    positive = torch.arange(len(z), device=z.device).roll(len(z_a))  # (2N,)
    accuracy = (similarity.argmax(dim=1) == positive).float().mean()
    return accuracy, z.std(dim=0).mean()


# ---------------------------------------------------------------------------------------------
# Where it runs: device, precision, memory format
# ---------------------------------------------------------------------------------------------


def prepare(
    networks: nn.Module, settings: Pretraining, device: torch.device, bf16: bool, state: dict | None
) -> torch.optim.AdamW:
    """Move the networks to the device and, where there is one, to a former state.

    On many GPUs batch norm takes its statistics over all of them, as over one batch; on CPUs,
    where torch has no such norm, each process has its own.

    Returns:
        Their optimiser.
    """
    if device.type == "cuda" and rank_and_world()[1] > 1:
        nn.SyncBatchNorm.convert_sync_batchnorm(networks)  # in place
    networks.to(device, memory_format=memory_format(device, bf16))
    optimizer = adamw(networks, settings.weight_decay)
    if state:
        networks.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
    return optimizer


def native_bf16(device: torch.device) -> tuple[bool, str]:
    """Whether a device computes bf16 in hardware (else float32 is faster), and how we know."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major >= 8, f"CUDA capability {major}.{minor}"
    cpuinfo = Path("/proc/cpuinfo")
    native = device.type == "cpu" and cpuinfo.exists() and "_bf16" in cpuinfo.read_text()
    return native, f"bf16 instructions on this {device.type}: {'yes' if native else 'no'}"


def memory_format(device: torch.device, bf16: bool) -> torch.memory_format:
    """channels_last where it is faster: everywhere, except for float32 on a CPU with AVX-512.

    Measured with ResNet-18: with AVX-512 it costs 11 % in float32 and gains 17 % in bf16; with
    AVX2 alone it gains 10 to 40 % in float32.
    """
    avx512 = device.type == "cpu" and "AVX512" in torch.backends.cpu.get_cpu_capability()
    return torch.contiguous_format if avx512 and not bf16 else torch.channels_last


# ---------------------------------------------------------------------------------------------
# The blocks of a ResNet
# ---------------------------------------------------------------------------------------------


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The input itself or, where the shape changes, a 1x1 convolution of it."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


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
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


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
        return F.relu(self.bn3(self.conv3(out)) + self.downsample(x))


# ---------------------------------------------------------------------------------------------
# encoder.pt and checkpoint.pt: plain dicts of tensors and plain values
# ---------------------------------------------------------------------------------------------


def save(checkpoint: dict, path: Path) -> None:
    """Write a checkpoint such that a reader sees the old one or the new one, whole.

    torch.save makes a RuntimeError of a full disk, write_atomically the OSError that it is.
    """
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with data.write_atomically(path) as file:
        file.write(buffer.getbuffer())


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into one clear line.

    Raises:
        UserError: `what`, and the reason. torch.load raises nearly anything on a foreign file.
    """
    try:
        yield
    except Exception as error:
        raise data.UserError(f"{what} ({error!r:.50})") from error


# Our checkpoints, by a key that those below it lack.
KINDS = {
    "head": "a classifier.pt, as `probe` and `finetune` make it",
    "encoder": "an encoder.pt, as `pretrain` makes it",
    "optimizer": "a checkpoint.pt of a run, which --restart replaces",
}


def load_checkpoint(path: Path, wanted: str) -> dict:
    """Read a checkpoint; nothing but tensors and plain values is ever unpickled.

    Args:
        wanted: a key of KINDS. A classifier is no encoder: it would know the labels beforehand.

    Raises:
        UserError: it cannot be read, or is another kind.
    """
    with one_line(f"{path} cannot be read; expected {KINDS[wanted]}"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        kinds = [key for key in KINDS if key in checkpoint]
    if kinds[:1] != [wanted]:
        found = KINDS[kinds[0]] if kinds else "no file of this program"
        raise data.UserError(f"{path} is {found}; expected {KINDS[wanted]}")
    return checkpoint


def encoder_checkpoint(encoder: ResNet, config: dict, epoch: int, seen: Tensor) -> dict:
    """encoder.pt: all that using an encoder needs.

    Args:
        config: of the run; what describes the encoder is copied out of it.
        epoch: how many it was trained for.
        seen: (n, 16) uint8, hashes of the images it was trained on, so that a probe can refuse to
            be tested on one of them.
    """
    weights = {name: value.cpu().contiguous() for name, value in encoder.state_dict().items()}
    checkpoint = {key: config[key] for key in ("arch", "image_size", "mean", "std")}
    checkpoint |= {"encoder": weights, "feature_dim": encoder.feature_dim, "epoch": epoch}
    return checkpoint | {"config": config, "seen": seen}


def load_encoder(path: Path, wanted: str = "encoder") -> tuple[ResNet, dict]:
    """Read encoder.pt (or classifier.pt, which holds one too) into a ResNet on the CPU.

    Every parameter has to be there, of its own name and shape: an encoder loaded in part would
    run, and be wrong.

    Returns:
        (the encoder, the whole checkpoint)

    Raises:
        UserError: the file is missing, or is no such checkpoint.
    """
    checkpoint = load_checkpoint(path, wanted)
    with one_line(f"{path} is no encoder.pt of this program"):
        encoder = ARCHITECTURES[checkpoint["arch"]]()
        encoder.load_state_dict(checkpoint["encoder"])
        for key in ("image_size", "mean", "std", "epoch", "config", "seen"):
            checkpoint[key]  # a KeyError names what is missing
    return encoder, checkpoint


def init_encoder(arch: str, init: str) -> tuple[ResNet, float, float]:
    """An encoder before its training: random, with ImageNet's weights, or with those of a file.

    torchvision's first layer takes red, green and blue; where all three are the same, it does what
    the sum of its three filters does.

    Args:
        init: "random" (torch's own generator), "imagenet" (torchvision fetches them once), or a
            file that holds a state_dict of torchvision's.

    Returns:
        (the encoder on the CPU; mean and std of the images it expects, in units of [0, 1])

    Raises:
        UserError: they cannot be had, or are of another architecture.
    """
    encoder = ARCHITECTURES[arch]()
    if init == "random":
        return encoder, 0.5, 0.5
    with one_line(f"--init {init} has no weights of a {arch}"):
        if init == "imagenet":
            from torchvision.models import get_model_weights  # here alone: all else runs without

            weights = get_model_weights(arch).DEFAULT.get_state_dict(check_hash=True)
        else:
            weights = torch.load(init, map_location="cpu", weights_only=True)
        weights = {name: w for name, w in weights.items() if not name.startswith("fc.")}
        weights["conv1.weight"] = weights["conv1.weight"].sum(dim=1, keepdim=True)  # (64, 1, 7, 7)
        encoder.load_state_dict(weights)
    return encoder, 0.449, 0.226  # of ImageNet's pixels, over the three colours


# ---------------------------------------------------------------------------------------------
# Large batches, in chunks: one batch, in the memory of a part of it
# ---------------------------------------------------------------------------------------------


def encode(encoder: ResNet, views: Tensor, chunk_size: int | None) -> Tensor:
    """The representations of a batch, (2N, E), in the memory of one chunk (1604.06174; 2101.06983).

    The loss sees the encoder through h alone, and h is small. So `recomputed` (torch's checkpoint)
    encodes each chunk without keeping its activations; the loss is that of the whole batch, all its
    negatives included; and on the way back each chunk is encoded once more, with activations, to
    carry its rows of dL/dh to the weights. The price is one more forward pass.

    But for batch norm the gradients are those of the plain step. Batch norm sees a chunk where it
    would see the batch, and its running statistics move twice.

    Args:
        views: (2N, 1, S, S) float.
        chunk_size: in slices, of two views each; None = all at once.
    """
    if chunk_size is None:
        return encoder(views)
    # Even chunks: in a small last one batch norm would see next to nothing, and gradients burst.
    chunks = views.tensor_split(math.ceil(len(views) / (2 * chunk_size)))
    return torch.cat([recomputed(encoder, chunk, use_reentrant=False) for chunk in chunks])


# ---------------------------------------------------------------------------------------------
# Large batches, on many processes: torchrun starts them, main.py joins them, each has its share
# ---------------------------------------------------------------------------------------------


def rank_and_world() -> tuple[int, int]:
    """Which process this is, and of how many; (0, 1) where it is alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def own_share(N: int) -> slice:
    """Which of a batch's N slices are this process's."""
    rank, world = rank_and_world()
    return slice(rank * N // world, (rank + 1) * N // world)


def gather(z: Tensor) -> Tensor:
    """The projections of all processes, (N, D); those of this one keep their graph.

    Every process then computes the loss of the whole batch, and its backward pass gives the exact
    gradient of that loss with respect to its own projections: as positives, and as negatives of
    everybody else's. What they find adds up to the gradient (`add_up_gradients`).
    """
    rank, world = rank_and_world()
    if world == 1:
        return z
    parts = [torch.empty_like(z) for _ in range(world)]
    dist.all_gather(parts, z.detach())
    parts[rank] = z  # of the parts this one alone has a graph
    return torch.cat(parts)


def add_up_gradients(networks: nn.Module) -> None:
    """Give every process the sum of all gradients: each found the part that is due to its z."""
    if rank_and_world()[1] > 1:
        for parameter in networks.parameters():
            dist.all_reduce(parameter.grad)
