"""simclr.py: views and encoder against torchvision, the loss against Eq. 1, the loop's claims."""

import doctest
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import simclr

CPU, ALL = torch.device("cpu"), slice(None)
CONFIG = {"arch": "resnet18", "image_size": 32, "mean": 0.5, "std": 0.5, "epochs": 3, "lr": 0.1}
PLACES = {"CROP_AREA": (1, 1), "CROP_RATIO": (1, 1), "ROTATION": (0, 0), "SHIFT": (0, 0)}
PLACES |= {"SCALE": (1, 1), "SHEAR": (0, 0)}
GRAYS = {"BRIGHTNESS": (1, 1), "CONTRAST": (1, 1), "BLUR_SIGMA": (0, 0)}
GRAYS |= {"JITTER_CHANCE": 1, "BLUR_CHANCE": 1}  # of doing nothing


@pytest.fixture
def tv():
    pytest.importorskip("torchvision.transforms.v2.functional", reason="the oracle: torchvision")
    return pytest.importorskip("torchvision")


@pytest.fixture
def view(monkeypatch):
    """One view in [0, 1] that flips, in each call the same slices, and does what is given."""

    def make(images: Tensor, **ranges: object) -> Tensor:
        for name, value in (PLACES | GRAYS | ranges).items():
            monkeypatch.setattr(simclr, name, value)
        return simclr.one_view(images, simclr.generator_for(1), ALL, 0.0, 1.0)

    return make


def smooth_images(count: int, size: int = 32) -> Tensor:
    """Random blobs, each unlike the others: (count, 1, size, size) uint8."""
    coarse = torch.rand(count, 1, 6, 6, generator=simclr.generator_for(count, size))
    return (255 * F.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)).byte()


def tiny(seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    encoder = simclr.ResNet(simclr.BasicBlock, (1, 1, 1, 1), 1)
    return nn.ModuleDict({"encoder": encoder, "projection_head": simclr.ProjectionHead(512)})


def linear() -> nn.ModuleDict:
    """An encoder without batch norm: slices meet in the loss alone."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(1024, 16), nn.ReLU())
    return nn.ModuleDict({"encoder": encoder, "projection_head": simclr.ProjectionHead(16)})


def step(networks: nn.ModuleDict, images: Tensor, bf16: bool = False, **settings) -> list[Tensor]:
    """Loss, projections and gradients of one training step."""
    how = simclr.generator_for(7), simclr.Pretraining(**settings), bf16
    outputs = simclr.training_step(networks, images, *how)
    return [*outputs, *(p.grad.clone() for p in networks.parameters())]


def train(networks, images, bf16=False, resume=None, **settings) -> list[tuple]:
    """All (record, state) of a run, by default of two epochs in batches of four."""
    how = simclr.Pretraining(**{"batch_size": 4, "epochs": 2} | settings), CPU, bf16, resume
    return list(simclr.pretrain(networks, images[:, 0].numpy(), np.arange(len(images)), *how))


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def assert_close(ours: list[Tensor], theirs: list[Tensor], share: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= share * b.norm() + 1e-12


def test_examples_in_docstrings_hold_and_settings_are_the_published_ones():
    assert doctest.testmod(simclr) == (0, 2)  # failed, attempted
    assert simclr.Pretraining() == simclr.Pretraining(200, 512, 5e-4, 1e-4, 0.07, None, 0, 0.5, 0.5)
    assert (simclr.ROTATION, simclr.SHEAR, simclr.SHIFT) == ((-15, 15), (-5, 5), (-0.05, 0.05))
    assert (simclr.SCALE, simclr.CONTRAST) == ((0.95, 1.05), (0.6, 1.4))
    assert (simclr.BLUR_SIGMA, simclr.BLUR_CHANCE, simclr.JITTER_CHANCE) == ((0.1, 2), 0.5, 0.8)


@pytest.mark.parametrize(
    ("ranges", "theirs", "rim"),
    [
        ({"SHIFT": 1 / 16}, {"affine": (0.0, [4, 4], 1.0, [0.0], "bilinear")}, 0),
        ({"CONTRAST": 0.6}, {"adjust_contrast": (0.6,)}, 0),
        ({"BRIGHTNESS": 1.4}, {"adjust_brightness": (1.4,)}, 0),
        ({"BLUR_SIGMA": 1.3}, {"gaussian_blur": (7, [1.3])}, 3),
        (
            {"ROTATION": 30, "SHIFT": 6 / 64, "SCALE": 1.1, "SHEAR": 9},
            {"rotate": (30.0, "bilinear"), "affine": (0.0, [6, 6], 1.1, [9.0, 0.0], "bilinear")},
            20,
        ),
    ],
)
def test_one_resampling_and_gray_values_match_torchvision(view, tv, ranges, theirs, rim):
    """Nearly, where theirs are many resamplings, of a crop first; at a rim ours is another blur."""
    images, crop = smooth_images(4, 64) / 255, {"CROP_AREA": (0.6, 0.6)} if rim == 20 else {}
    expected = view(images, **crop)
    for operation, arguments in theirs.items():
        expected = getattr(tv.transforms.v2.functional, operation)(expected, *arguments)
    ours = view(images, **crop, **{name: (value, value) for name, value in ranges.items()})
    error = (ours - expected)[..., rim : 64 - rim, rim : 64 - rim].abs().max()
    assert error < (0.02 if rim == 20 else 1e-4)  # in the other order it is above 0.1


def test_crops_are_boxes_inside_the_image_of_the_documented_sizes_and_half_are_mirrored(view):
    """A ramp shows which box was cut: its crop is the ramp between the box's sides."""
    crop = {"CROP_AREA": simclr.CROP_AREA, "CROP_RATIO": simclr.CROP_RATIO}
    ramp = ((torch.arange(16) + 0.5) / 16).expand(4000, 1, 16, 16)
    x, y = view(ramp, **crop)[:, 0, 8], view(ramp.mT, **crop)[:, 0, :, 8]  # (4000, 16)
    assert abs((x[:, 9] < x[:, 6]).float().mean() - 0.5) < 0.03  # left-right alone
    width, height = (x[:, 9] - x[:, 6]).abs() * 16 / 3, (y[:, 9] - y[:, 6]) * 16 / 3
    area, ratio = width * height, (width / height).log()
    assert 0.19 < area.min() < 0.22 and 0.9 < area.max() < 1.001
    assert -0.288 < ratio.min() < -0.26 and 0.26 < ratio.max() < 0.288 and abs(ratio.mean()) < 0.01
    for middle, side in ((x[:, 7:9].mean(1), width), (y[:, 7:9].mean(1), height)):
        assert -1e-4 < (middle - side / 2).min() < 0.02
        assert 0.98 < (middle + side / 2).max() < 1 + 1e-4


def test_jitter_and_blur_happen_by_chance(view):
    bright = view(torch.full((2000, 1, 8, 8), 0.5), JITTER_CHANCE=0.8, BRIGHTNESS=(0.6, 1.4))
    dots = view(F.pad(torch.ones(2000, 1, 1, 1), [10] * 4), BLUR_CHANCE=0.5, BLUR_SIGMA=(1, 2))
    assert abs(((bright[:, 0, 4, 4] - 0.5).abs() < 1e-6).float().mean() - 0.2) < 0.03
    assert abs((dots[:, 0, 10, 10] == 1).float().mean() - 0.5) < 0.04


def test_views_are_two_normalised_and_unlike_for_every_slice(monkeypatch):
    same, key = smooth_images(1).expand(12, -1, -1, -1), (0, 1, 2)
    views = torch.stack(simclr.random_views(same, simclr.generator_for(*key)))
    assert views.shape == (2, 12, 1, 32, 32) and -1 <= views.min() < -0.9 and 0.5 < views.max() <= 1
    part = torch.stack(simclr.random_views(same, simclr.generator_for(*key), slice(2, 5)))
    assert torch.allclose(part, views[:, 2:5], atol=1e-6)  # whatever share a process has
    for off in (GRAYS, PLACES | {"JITTER_CHANCE": 1}):  # places, then gray values, differ alone
        with monkeypatch.context() as patch:
            for name, value in off.items():
                patch.setattr(simclr, name, value)
            views = torch.cat(simclr.random_views(same, simclr.generator_for(*key))).flatten(1)
        assert (torch.cdist(views, views) + 100 * torch.eye(24)).min() > 0.05


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_resnet_matches_torchvision_with_the_same_weights(tv, arch):
    """Values, gradients and running statistics, in float64, from a strictly loaded state dict."""
    theirs = getattr(tv.models, arch)().double()
    theirs.fc = nn.Identity()
    ours = simclr.ARCHITECTURES[arch](in_channels=3).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    for training in (True, False):
        for network in (ours, theirs):
            network.zero_grad()
            network.train(training)(x).square().sum().backward()
        assert torch.allclose(ours(x), theirs(x), atol=1e-10)
        grads = [{k: p.grad for k, p in n.named_parameters()} for n in (ours, theirs)]
        assert_close([grads[0][name] for name in grads[1]], list(grads[1].values()), 1e-9)


def test_gray_images_see_no_difference_to_torchvisions_weights(tv, tmp_path, monkeypatch):
    """There, a file of theirs with its `fc` and its colours; and back, conv1 / 3 thrice."""
    theirs, gray = tv.models.resnet18().eval(), torch.randn(2, 1, 64, 64)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # where torchvision leaves its downloads
    path = tmp_path / "hub/checkpoints" / Path(tv.models.ResNet18_Weights.DEFAULT.url).name
    path.parent.mkdir(parents=True)
    torch.save(theirs.state_dict(), path)
    theirs.fc = nn.Identity()
    for init in (str(path), "imagenet"):
        ours, *scaling = simclr.init_encoder("resnet18", init)
        assert_close([ours.eval()(gray)], [theirs(gray.expand(-1, 3, -1, -1))], 1e-4)
        assert scaling == pytest.approx([0.449, 0.226])  # of ImageNet, over its colours
    ours, *_ = simclr.init_encoder("resnet18", "random")
    weights = ours.state_dict()
    weights["conv1.weight"] = weights["conv1.weight"].repeat(1, 3, 1, 1) / 3
    theirs.load_state_dict(weights)
    assert_close([ours.eval()(gray)], [theirs(gray.expand(-1, 3, -1, -1))], 1e-4)
    with pytest.raises(data.UserError, match="no weights of a resnet50"):
        simclr.init_encoder("resnet50", str(path))


def test_encoders_and_projection_head_have_the_published_sizes_first_weights_and_relu():
    for make, E, count in ((simclr.resnet18, 512, 11_170_240), (simclr.resnet50, 2048, 23_501_760)):
        encoder = make()
        assert encoder.feature_dim == E and sum(p.numel() for p in encoder.parameters()) == count
        for conv in (m for m in encoder.modules() if isinstance(m, nn.Conv2d)):
            he = (2 / (conv.out_channels * conv.kernel_size[0] ** 2)) ** 0.5  # 1502.01852
            assert conv.weight.std().item() == pytest.approx(he, rel=0.1)
    head, h = simclr.ProjectionHead(64), torch.randn(4, 64)
    hidden = (h @ head[0].weight.T + head[0].bias).clamp(min=0)
    assert_close([head(h)], [hidden @ head[2].weight.T + head[2].bias], 1e-6)
    assert [len(p) for p in head.parameters()] == [512, 512, 128, 128]


def slow_nt_xent(z_a: Tensor, z_b: Tensor, temperature: float) -> Tensor:
    """Algorithm 1 of 2002.05709 as it is printed: views interleaved, two loops, float64."""
    z = [view for pair in zip(z_a.double(), z_b.double(), strict=True) for view in pair]
    M = len(z)
    s = [[z[i] @ z[j] / (z[i].norm() * z[j].norm()) for j in range(M)] for i in range(M)]

    def loss(i: int, j: int) -> Tensor:
        others = sum(torch.exp(s[i][k] / temperature) for k in range(M) if k != i)
        return -torch.log(torch.exp(s[i][j] / temperature) / others)

    return sum(loss(k, k + 1) + loss(k + 1, k) for k in range(0, M, 2)) / M


def projections(N: int = 5, D: int = 7) -> tuple[Tensor, Tensor]:
    z = torch.randn(2, N, D, generator=simclr.generator_for(3), dtype=torch.float64)
    return z[0].requires_grad_(), (0.6 * z[0] + z[1]).detach().requires_grad_()


@pytest.mark.parametrize("temperature", [0.07, 0.5, 2.0])
def test_nt_xent_matches_double_loop_from_eq_1(temperature):
    """A random fixture: the closed forms alone miss a shifted positive, among other bugs."""
    z = projections()
    ours, slow = simclr.nt_xent(*z, temperature), slow_nt_xent(*z, temperature)
    assert abs(ours.item() - slow.item()) < 1e-10
    assert_close(torch.autograd.grad(ours, z), torch.autograd.grad(slow, z), 1e-10)


def test_nt_xent_has_its_closed_forms_and_ignores_scale():
    one, eye, (z_a, z_b) = torch.ones(4, 8).double(), torch.eye(4).double(), projections()
    assert simclr.nt_xent(one, one, 0.07).item() == pytest.approx(math.log(7), abs=1e-12)
    assert simclr.nt_xent(eye, eye, 0.5).item() == pytest.approx(0.594438, abs=1e-6)
    assert torch.allclose(simclr.nt_xent(z_a, z_b), simclr.nt_xent(100 * z_a, 0.01 * z_b))
    for bad in ((z_a, z_b[:3]), (z_a[:, 0], z_b[:, 0]), (z_a, z_b, 0.0), (z_a[:1], z_b[:1])):
        with pytest.raises(ValueError, match="got views"):
            simclr.nt_xent(*bad)


def test_nt_xent_is_float32_under_bf16_autocast_and_of_bf16_projections():
    """Inside autocast even a product of float32 matrices is bf16, which is good to 1 % only."""
    z_a, z_b = (z.detach().bfloat16() for z in projections(64, 32))
    with torch.autocast("cpu", torch.bfloat16):
        losses = simclr.nt_xent(z_a, z_b), simclr.nt_xent(z_a.float(), z_b.float())
    for loss in losses:
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(simclr.nt_xent(z_a.double(), z_b.double()).item(), 1e-5)


def test_contrastive_statistics_know_perfect_half_none_and_collapse():
    z, one = torch.eye(8), torch.ones(8, 3)
    near = F.normalize(z + 0.5 * z.roll(1, 0), dim=1)  # nearest to itself, then to its positive
    accuracy, std = simclr.contrastive_statistics(z, 3 * near)
    assert accuracy == 1 and torch.isclose(std, torch.cat([z, near]).std(dim=0).mean())
    assert simclr.contrastive_statistics(z, torch.cat([z[:4], z[4:].roll(1, 0)]))[0] == 0.5
    assert simclr.contrastive_statistics(z, z.roll(1, 0))[0] == 0  # all positives are strangers
    assert simclr.contrastive_statistics(one, one)[1] == 0


def test_training_step_contrasts_two_views_of_each_slice_at_its_temperature():
    """By hand: one pass over both views, the loss of Eq. 1, its gradients."""
    images, networks, scaling = smooth_images(4), tiny(), {"mean": 0.4, "std": 0.2}
    ours = step(networks, images, temperature=0.3, **scaling)
    networks.zero_grad()
    views = torch.cat(simclr.random_views(images, simclr.generator_for(7), **scaling))
    z = networks["projection_head"](networks["encoder"](views))
    slow = slow_nt_xent(z[:4], z[4:], 0.3)
    slow.backward()
    assert_close(ours, [slow, z[:4], z[4:], *(p.grad for p in networks.parameters())], 1e-4)


@pytest.mark.parametrize("bf16", [False, True])
def test_networks_run_in_bf16_where_it_is_asked_for_and_the_loss_never(bf16):
    networks, seen = tiny(), []
    for part in (networks["encoder"].conv1, networks["projection_head"]):
        part.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    train(networks, smooth_images(4), bf16, epochs=1)
    assert seen == [torch.bfloat16 if bf16 else torch.float32] * 2
    assert {p.dtype for p in networks.parameters()} == {torch.float32}


@pytest.fixture
def steps(monkeypatch):
    """A step that computes nothing: zero gradients, losses 1, 2, 3...; notes what it was given."""
    noted = []

    def fake(networks, images, generator, settings, bf16):
        for p in networks.parameters():
            p.grad = torch.zeros_like(p)
        noted.append((images, generator))
        return torch.tensor(float(len(noted))), torch.eye(4), torch.eye(4)

    monkeypatch.setattr(simclr, "training_step", fake)
    return noted


def test_no_two_epochs_have_one_order_or_draw_the_same_views_and_the_seed_moves_both(steps):
    images = torch.arange(14, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 32, 32)
    for seed in (0, 1, 0):
        train(linear(), images, epochs=3, seed=seed)  # three steps of four, two slices wait
    order = torch.stack([batch[:, 0, 0, 0] for batch, _ in steps]).view(9, 12).tolist()
    assert all(len(set(epoch)) == 12 for epoch in order) and order[0] != sorted(order[0])
    assert len(set(map(tuple, order))) == 6 and order[:3] == order[6:]
    seeds = [generator.initial_seed() for _, generator in steps]  # of the views
    assert len(set(seeds)) == 18 and seeds[:9] == seeds[18:]


def test_learning_rate_rises_then_falls_to_a_fiftieth_and_records_hold_means(steps, monkeypatch):
    """Half a cosine over the run; the first 5 % of the steps are on a line to it, from 0."""
    cosine = [(1 + math.cos(math.pi * now / 100)) / 2 for now in range(100)]
    expected = [(1e-5 + 49e-5 * cosine[now]) * min(1, (now + 1) / 5) for now in range(100)]
    rates, set_lr = [], simclr.set_lr
    monkeypatch.setattr(simclr, "set_lr", lambda o, lr: (set_lr(o, lr), rates.append(lr)))
    records = [record for record, _ in train(linear(), smooth_images(20), epochs=20)]
    assert rates == pytest.approx(expected) and [record["lr"] for record in records] == rates[4::5]
    assert [(r["epoch"], r["loss"]) for r in records] == [(e, 5 * e - 2) for e in range(1, 21)]


def test_weight_decay_shrinks_matrices_and_spares_biases_and_norms(steps):
    """The gradients are 0 here, so that decay alone moves a weight."""
    networks = tiny()
    before = {name: p.detach().clone() for name, p in networks.named_parameters()}
    train(networks, smooth_images(4), epochs=1, lr=0.1, weight_decay=0.5)
    for name, p in networks.named_parameters():
        assert torch.allclose(p, before[name] * (0.95 if p.ndim > 1 else 1)), name


def test_a_loss_that_is_no_number_stops_before_the_step(monkeypatch):
    networks, first = linear(), linear()
    monkeypatch.setattr(simclr, "nt_xent", lambda z_a, *_: z_a.square().sum() * math.inf)
    with pytest.raises(data.UserError, match=r"in epoch 1; .*--lr 0.0002$"):
        train(networks, smooth_images(4), lr=4e-4, epochs=200)
    assert same_weights(networks, first)


def test_pretraining_lowers_loss_on_a_tiny_batch():
    """Sixteen gratings are distinguished in 20 steps; before, a view is one of 31 others."""
    waves, pixel = torch.randn(16, 2, 1, 1, generator=simclr.generator_for(0)), torch.arange(32)
    waves = (waves[:, 0] * pixel + waves[:, 1] * pixel[:, None]).sin()  # (16, 32, 32)
    how = {"epochs": 20, "batch_size": 16, "lr": 1e-3, "temperature": 0.2}
    losses = [r["loss"] for r, _ in train(tiny(), (127 + 100 * waves).byte()[:, None], **how)]
    assert abs(losses[0] - math.log(31)) < 0.5 and sum(losses[-5:]) / 5 < losses[0] - 0.5


@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_resumed_from_its_state_ends_as_if_it_had_never_stopped(bf16):
    """To the bit, by way of a file, whatever others draw or lay between the images meanwhile."""
    images, networks, files = smooth_images(9), tiny(), []
    spread, rows = np.zeros((20, 32, 32), np.uint8), np.random.default_rng(0).permutation(20)[:9]
    spread[rows] = images[:, 0]
    how = simclr.Pretraining(3, 4), CPU, bf16
    for _, state in simclr.pretrain(networks, spread, rows, *how):
        files.append(io.BytesIO())
        torch.save(state, files[-1])
        torch.rand(5)
        networks.eval()
    for done, file in enumerate(files[:-1], start=1):
        state, other = torch.load(io.BytesIO(file.getvalue()), weights_only=True), tiny(seed=1)
        later = [r["epoch"] for r, _ in train(other, images, bf16, epochs=3, resume=state)]
        assert later == [2, 3][done - 1 :] and same_weights(networks, other)


def test_encoder_checkpoint_survives_the_round_trip(tmp_path):
    encoder, seen = simclr.resnet18(), torch.ones(2, 16).byte()
    encoder.to(memory_format=torch.channels_last)
    simclr.save(simclr.encoder_checkpoint(encoder, CONFIG, 3, seen), tmp_path / "encoder.pt")
    loaded, checkpoint = simclr.load_encoder(tmp_path / "encoder.pt")
    assert same_weights(loaded, encoder) and torch.equal(checkpoint.pop("seen"), seen)
    assert all(value.is_contiguous() for value in checkpoint.pop("encoder").values())
    described = {"arch": "resnet18", "feature_dim": 512, "image_size": 32, "mean": 0.5, "std": 0.5}
    assert checkpoint == described | {"epoch": 3, "config": CONFIG}


def test_a_file_that_is_no_encoder_is_one_line_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = simclr.encoder_checkpoint(simclr.resnet18(), CONFIG, 3, torch.ones(2, 16).byte())
    part = {k: v for k, v in checkpoint["encoder"].items() if k != "layer4.1.bn2.bias"}
    for change in ({"encoder": part}, {"arch": "vit"}, {"image_size": "32"}, {"image_size": 31}):
        simclr.save(checkpoint | change, Path("whole.pt"))
        with pytest.raises(data.UserError, match=r"is no encoder.pt.*\)$"):  # . is no line break
            simclr.load_encoder(Path("whole.pt"))
    Path("half.pt").write_bytes(Path("whole.pt").read_bytes()[:300])
    Path("harm.pt").write_bytes(b"cos\nsystem\n(S'touch harmed'\ntR.")  # once it is unpickled
    for name in ("half.pt", "harm.pt", "missing.pt"):
        with pytest.raises(data.UserError, match=rf"^{name} .*main.py pretrain.*\)$"):
            simclr.load_encoder(Path(name))
        with pytest.raises(data.UserError, match=rf"{name} has no weights of a resnet18.*\)$"):
            simclr.init_encoder("resnet18", name)
    assert not Path("harmed").exists()


def test_chunks_are_even_keep_no_activations_and_have_their_own_batch_norm():
    """9 slices in chunks of at most 4: three times 6 views, each encoded twice."""
    views, sizes = torch.randn(18, 1, 32, 32).double(), []
    ours, slow = tiny()["encoder"].double(), tiny()["encoder"].double()
    ours.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    h = simclr.encode(ours, views, chunk_size=4)
    expected = torch.cat([slow(chunk) for chunk in views.split(6)])
    assert torch.allclose(h, expected, atol=1e-12) and sizes == [6, 6, 6]
    h.square().sum().backward()
    expected.square().sum().backward()
    assert_close([p.grad for p in ours.parameters()], [p.grad for p in slow.parameters()], 1e-10)
    assert sizes == [6] * 6


def share_of_the_work(chunk_size: int | None) -> list[Tensor]:
    """What a process finds: of a step; of a run of three epochs."""
    images, networks = smooth_images(13), linear()
    images[7:] //= 4  # what the second process sees is unlike what the first one sees
    found = step(networks, images[4:10], chunk_size=chunk_size)
    train(networks, images, epochs=3, batch_size=6, chunk_size=chunk_size)
    return [*found, *(p.detach() for p in networks.parameters())]


def one_process(rank: int, place: Path) -> None:
    """What each of two does; runs in a process of its own."""
    torch.distributed.init_process_group("gloo", f"file://{place}/meet", rank=rank, world_size=2)
    torch.save([share_of_the_work(None), share_of_the_work(2)], place / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_find_the_gradients_and_weights_of_one(tmp_path):
    """A gather that drops the graph, or a mean where a sum belongs, points nearly the same way."""
    torch.multiprocessing.spawn(one_process, (tmp_path,), nprocs=2)
    alone = share_of_the_work(None)
    for rank in (0, 1):
        for found in torch.load(tmp_path / f"{rank}.pt"):  # at once, and in chunks
            assert_close(found, alone, 1e-5)


def test_a_full_disk_is_an_oserror(monkeypatch):
    """torch.save makes a RuntimeError of it, which nobody catches."""
    monkeypatch.setattr(data, "write_atomically", lambda _: open("/dev/full", "wb", buffering=0))
    with pytest.raises(OSError, match="No space left"):
        simclr.save({"a": torch.zeros(10**6)}, Path("a.pt"))
