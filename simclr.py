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

More negatives make a harder question, so batches are large; `backward_in_chunks` computes the loss
and the gradients of a batch that memory has no room for.

Shape letters: N slices in a batch (so 2N views) · C channels · H, W pixels · E encoder features ·
D projection dimensions · K classes. Here also n pictures, S = image size.

Departures from the paper:
  - one input channel: scans are gray;
  - AdamW with a cosine schedule for LARS with warm-up: batches here are 512, not 4096;
  - temperature 0.07 and a 512-wide hidden layer, the published values for brain scans;
  - the learning rate ends at 1/50 of its peak, not at 0.

Next: evaluate.py
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data

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


class ProjectionHead(nn.Sequential):
    """The projection head g: Linear(E -> 4 D) -> ReLU -> Linear(4 D -> D) (§2.1; appendix B.4).

    Args:
        in_features: E.
        hidden_dim: D, the size of the projection z; the layer before it is 4 D wide.

    Maps h (N, E) to z (N, D), any scale: `nt_xent` looks at directions only.
    """

    def __init__(self, in_features: int, hidden_dim: int = 128) -> None:
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


def adamw(*modules: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101), with weight decay on matrices and filters alone.

    Biases and norms are spared: pulling a norm's scale to 0 regularises nothing, because the next
    layer's weights make up for it, and only slows learning.

    Args:
        modules: what is trained; parameters that need no gradient are left out.
        lr: the first step's learning rate.
        weight_decay: share of a weight taken off at each step, per unit of learning rate.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=lr,
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


def embed(encoder: ResNet, projection_head: ProjectionHead, views: Tensor, bf16: bool) -> Tensor:
    """The projections of views: (V, 1, S, S) float, normalised -> z: (V, D), bf16 if asked for."""
    device = views.device
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        h = encoder(views.contiguous(memory_format=memory_format(device, bf16)))  # (V, E)
        return projection_head(h)  # (V, D)


def backward_in_chunks(
    networks: nn.ModuleList, view_a: Tensor, view_b: Tensor, settings: Pretraining, bf16: bool
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
        view_a, view_b: (N, 1, S, S) float.
        settings: chunk_size in [1, N], and the temperature.

    Returns:
        (loss (), z_a (N, D), z_b (N, D)), none with a graph.
    """
    pairs = zip(*(v.split(settings.chunk_size) for v in (view_a, view_b)), strict=True)
    chunks = [torch.cat(pair) for pair in pairs]  # each (2 chunk_size, 1, S, S)
    with torch.no_grad():
        z = [embed(*networks, chunk, bf16).chunk(2) for chunk in chunks]
    z_a, z_b = (torch.cat(parts).requires_grad_() for parts in zip(*z, strict=True))  # (N, D) each
    loss = nt_xent(z_a, z_b, settings.temperature)
    gradients = [g.split(settings.chunk_size) for g in torch.autograd.grad(loss, (z_a, z_b))]
    statistics = [buffer.clone() for buffer in networks.buffers()]
    for chunk, *gradient in zip(chunks, *gradients, strict=True):
        embed(*networks, chunk, bf16).backward(torch.cat(gradient))
    for buffer, kept in zip(networks.buffers(), statistics, strict=True):
        buffer.copy_(kept)
    return loss.detach(), z_a.detach(), z_b.detach()


def pretrain(
    images: Tensor,
    encoder: ResNet,
    projection_head: ProjectionHead,
    optimizer: torch.optim.Optimizer,
    settings: Pretraining,
    bf16: bool = False,
    on_step: Callable[[int, Tensor], None] = lambda step, sums: None,
) -> Iterator[dict[str, float]]:
    """Train encoder and projection head in place; yield one record after each epoch.

    Args:
        images: (n, 1, S, S) uint8, on the device of the networks; n >= batch_size >= 2. The
            n mod batch_size slices left over in an epoch wait for the next one.
        bf16: run the networks under bf16 autocast; the loss is float32 always.
        on_step: called after each step with the steps done in this epoch and the running sums
            (3,) of loss, contrastive accuracy and embedding std, on the device.

    Yields:
        epoch (from 1), loss, lr, contrastive_accuracy, embedding_std: means over the epoch's steps;
        images_per_second (slices, not views) and seconds of training alone.
    """
    device, N = images.device, settings.batch_size
    steps = len(images) // N
    networks = nn.ModuleList([encoder, projection_head]).train()
    for epoch in range(1, settings.epochs + 1):
        began = time.perf_counter()
        # Step 0 of an epoch draws its order, step s >= 1 the views of its batch s.
        order = torch.randperm(len(images), generator=data.generator_for(settings.seed, epoch, 0))
        sums = torch.zeros(3, device=device)
        for step in range(1, steps + 1):
            done = (epoch - 1) * steps + step - 1
            lr = cosine_lr(done, settings.epochs * steps, settings.lr, settings.lr / 50)
            set_lr(optimizer, lr)
            batch = images[order[(step - 1) * N : step * N].to(device)]  # (N, 1, S, S) uint8
            generator = data.generator_for(settings.seed, epoch, step)
            view_a, view_b = data.random_views(batch, generator, settings.mean, settings.std)
            optimizer.zero_grad()
            if settings.chunk_size and settings.chunk_size < N:
                loss, z_a, z_b = backward_in_chunks(networks, view_a, view_b, settings, bf16)
            else:
                # Both views in one pass, so that batch norm sees one population, not two.
                views = torch.cat([view_a, view_b])  # (2N, 1, S, S)
                z_a, z_b = embed(*networks, views, bf16).chunk(2)  # (N, D) each
                loss = nt_xent(z_a, z_b, settings.temperature)
                loss.backward()
            optimizer.step()
            sums += torch.stack([loss.detach(), *contrastive_statistics(z_a, z_b)])
            on_step(step, sums)
        yield epoch_record(epoch, lr, sums / steps, steps * N, began)


def epoch_record(
    epoch: int, lr: float, means: Tensor, pictures: int, began: float
) -> dict[str, float]:
    """What one epoch yields; see `pretrain`.

    Args:
        means: (3,) loss, contrastive accuracy, embedding std.
        began: when the epoch did, on time.perf_counter's clock.

    Raises:
        UserError: the loss is no finite number; what was saved before is as it was.
    """
    loss, accuracy, std = means.tolist()  # waits for the device, so the clock is read after it
    seconds = time.perf_counter() - began
    if not math.isfinite(loss):
        raise data.UserError(
            f"the loss became {loss} in epoch {epoch} at learning rate {lr:.2g}; what was written "
            "before is as it was; start again with a lower --lr"
        )
    return {
        "epoch": epoch,
        "loss": loss,
        "lr": lr,
        "contrastive_accuracy": accuracy,
        "embedding_std": std,
        "images_per_second": pictures / seconds,
        "seconds": seconds,
    }


@torch.inference_mode()
def encode(
    encoder: ResNet,
    images: np.ndarray,
    mean: float,
    std: float,
    device: torch.device,
    bf16: bool = False,
    batch_size: int = 256,
) -> Tensor:
    """The representations of pictures as they are, without augmentation.

    The encoder runs in eval mode, so batch norm uses (and keeps) its running statistics and a
    picture's features do not depend on its neighbours; afterwards its mode is as it was.

    Args:
        images: (n, S, S) uint8.

    Returns:
        h: (n, E) float32 on the CPU.
    """
    was_training = encoder.training
    encoder.eval()
    features = []
    for i in range(0, len(images), batch_size):
        x = torch.from_numpy(np.array(images[i : i + batch_size]))[:, None].to(device)
        x = (data.to_unit(x) - mean) / std  # (N, 1, S, S)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            h = encoder(x.contiguous(memory_format=memory_format(device, bf16)))
        features.append(h.float().cpu())
    encoder.train(was_training)
    return torch.cat(features) if features else torch.zeros(0, encoder.feature_dim)


# ---------------------------------------------------------------------------------------------
# Checkpoints: plain dicts of tensors and plain values, loadable with weights_only=True
# ---------------------------------------------------------------------------------------------


def save(checkpoint: dict, path: Path) -> None:
    """Write a checkpoint such that a reader finds the old one or the new one, whole.

    Args:
        checkpoint: tensors and plain values alone, so that it loads with weights_only=True.
        path: its place; missing folders are made.
    """
    with data.write_atomically(path) as file:
        torch.save(checkpoint, file)


def save_pretraining(
    out: Path,
    encoder: ResNet,
    projection_head: ProjectionHead,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    config: dict,
    seen: Tensor,
) -> None:
    """Write checkpoint.pt, the state of the training, and encoder.pt, all that using it needs.

    Args:
        epoch: the last one that was finished.
        config: of the run; image size, mean and std are copied out of it, to be found at once.
        seen: (n, 16) uint8, the hashes of the pictures pretrained on, so that a probe can refuse
            a test part that holds one of them.
    """
    weights = {name: value.cpu().contiguous() for name, value in encoder.state_dict().items()}
    if not all(value.isfinite().all() for value in weights.values()):
        raise data.UserError(
            f"the weights are no finite numbers after epoch {epoch}; what was written before is as "
            "it was; start again with a lower --lr"
        )
    both = {"encoder": weights, "epoch": epoch, "config": config}
    training = {
        "projection_head": projection_head.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    save(both | training, out / "checkpoint.pt")
    described = {key: config[key] for key in ("arch", "image_size", "mean", "std")}
    described |= {"feature_dim": encoder.feature_dim, "seen": seen}
    save(both | described, out / "encoder.pt")


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
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if "arch" not in checkpoint:
            raise ValueError(f"it holds {', '.join(map(str, checkpoint))}; encoder.pt is beside it")
        encoder = ARCHITECTURES[checkpoint["arch"]]()
        encoder.load_state_dict(checkpoint["encoder"])
    except FileNotFoundError:
        raise data.UserError(
            f"no encoder at {path}; make one with: python main.py pretrain, and the same --data"
        ) from None
    except Exception as error:  # torch.load raises nearly anything on a file that isn't its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise data.UserError(f"{path} cannot be used as an encoder.pt ({reason})") from error
    return encoder, checkpoint
