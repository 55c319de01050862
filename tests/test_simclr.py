"""simclr.py: views and encoder against torchvision, the loss against Eq. 1, the loop's claims."""

import doctest
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

import data
import simclr

PLACES = {"CROP_AREA": (1, 1), "CROP_RATIO": (1, 1), "ROTATION": (0, 0), "SHIFT": (0, 0)}
PLACES |= {"SCALE": (1, 1), "SHEAR": (0, 0), "JITTER_CHANCE": 1}
GRAYS = {"BRIGHTNESS": (1, 1), "CONTRAST": (1, 1), "BLUR_SIGMA": (0, 0), "BLUR_CHANCE": 1}


def view(monkeypatch: pytest.MonkeyPatch, images: Tensor, **ranges: object) -> Tensor:
    """A view in [0, 1] that mirrors, in each call the same slices, and else does what is given."""
    for name, value in (PLACES | GRAYS | ranges).items():
        monkeypatch.setattr(simclr, name, value)
    return simclr.one_view(images, simclr.generator_for(1), simclr.ALL, 0.0, 1.0)


def smooth_images(count: int, size: int = 32) -> Tensor:
    """Random blobs, each unlike the others: (count, 1, size, size) uint8."""
    coarse = torch.rand(count, 1, 6, 6, generator=simclr.generator_for(count, size))
    return (255 * F.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)).byte()


def tiny(seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    encoder = simclr.ResNet(simclr.BasicBlock, (1, 1, 1, 1), 1)
    return nn.ModuleDict({"encoder": encoder, "projection_head": simclr.ProjectionHead(512)})


def step(networks: nn.ModuleDict, images: Tensor, settings: simclr.Pretraining) -> list[Tensor]:
    """Loss, projections and gradients of one training step."""
    outputs = simclr.training_step(networks, images, simclr.generator_for(7), settings, bf16=False)
    return [*outputs, *(p.grad.clone() for p in networks.parameters())]


def train(networks, images, bf16=False, resume=None, **settings) -> list[tuple]:
    """All (record, state) of a run, by default of two epochs in batches of four."""
    settings = simclr.Pretraining(**{"batch_size": 4, "epochs": 2} | settings)
    how = settings, torch.device("cpu"), bf16, resume
    return list(simclr.pretrain(networks, images[:, 0].numpy(), np.arange(len(images)), *how))


def assert_close(ours: list[Tensor], theirs: list[Tensor], share: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= share * b.norm() + 1e-12


def test_examples_in_docstrings_hold_and_settings_are_the_published_ones():
    assert doctest.testmod(simclr) == (0, 2)  # failed, attempted
    assert simclr.Pretraining() == simclr.Pretraining(200, 512, 5e-4, 1e-4, 0.07, None, 0, 0.5, 0.5)
    assert (simclr.ROTATION, simclr.SHEAR, simclr.SHIFT) == ((-15, 15), (-5, 5), (-0.05, 0.05))
    assert (simclr.SCALE, simclr.CONTRAST) == ((0.95, 1.05), (0.6, 1.4))
    assert (simclr.BLUR_SIGMA, simclr.BLUR_CHANCE, simclr.JITTER_CHANCE) == ((0.1, 2), 0.5, 0.8)


def test_one_resampling_and_gray_values_match_torchvisions_many(monkeypatch):
    """Nearly, where theirs are two resamplings of a crop; at the rim ours is another blur."""
    images = smooth_images(4, 64) / 255
    expected = tv.adjust_brightness(view(monkeypatch, images), 1.4)
    expected = tv.gaussian_blur(tv.adjust_contrast(expected, 0.6), 7, [1.3])
    grays = {"BRIGHTNESS": (1.4, 1.4), "CONTRAST": (0.6, 0.6), "BLUR_SIGMA": (1.3, 1.3)}
    assert (view(monkeypatch, images, **grays) - expected)[..., 3:61, 3:61].abs().max() < 1e-4
    places = {"CROP_AREA": (0.6, 0.6)}
    expected = tv.rotate(view(monkeypatch, images, **places), 30.0, "bilinear")
    expected = tv.affine(expected, 0.0, [6, 6], 1.1, [9.0, 0.0], "bilinear")
    places |= {"ROTATION": (30, 30), "SHIFT": (0.09375,) * 2, "SCALE": (1.1, 1.1), "SHEAR": (9, 9)}
    error = (view(monkeypatch, images, **places) - expected)[..., 20:44, 20:44].abs().max()
    assert error < 0.02  # in another order it is above 0.1


def test_crops_are_the_documented_boxes_half_mirrored_and_grays_change_by_chance(monkeypatch):
    """A ramp shows which box was cut: its crop is the ramp between the box's sides."""
    crop = {"CROP_AREA": simclr.CROP_AREA, "CROP_RATIO": simclr.CROP_RATIO}
    ramp = ((torch.arange(16) + 0.5) / 16).expand(4000, 1, 16, 16)
    x = view(monkeypatch, ramp, **crop)[:, 0, 8]  # (4000, 16)
    y = view(monkeypatch, ramp.mT, **crop)[:, 0, :, 8]
    assert abs((x[:, 9] < x[:, 6]).float().mean() - 0.5) < 0.03  # left-right alone
    width, height = (x[:, 9] - x[:, 6]).abs() * 16 / 3, (y[:, 9] - y[:, 6]) * 16 / 3
    area, ratio = width * height, (width / height).log()
    assert 0.19 < area.min() < 0.22 and 0.9 < area.max() < 1.001
    assert -0.288 < ratio.min() < -0.26 and 0.26 < ratio.max() < 0.288 and abs(ratio.mean()) < 0.01
    for middle, side in ((x[:, 7:9].mean(1), width), (y[:, 7:9].mean(1), height)):
        assert -1e-4 < (middle - side / 2).min() < 0.02
        assert 0.98 < (middle + side / 2).max() < 1 + 1e-4
    bright, dot = torch.full((2000, 1, 8, 8), 0.5), F.pad(torch.ones(2000, 1, 1, 1), [10] * 4)
    bright = view(monkeypatch, bright, JITTER_CHANCE=0.8, BRIGHTNESS=(0.6, 1.4))
    dots = view(monkeypatch, dot, BLUR_CHANCE=0.5, BLUR_SIGMA=(1, 2))
    assert abs(((bright[:, 0, 4, 4] - 0.5).abs() < 1e-6).float().mean() - 0.2) < 0.03
    assert abs((dots[:, 0, 10, 10] == 1).float().mean() - 0.5) < 0.04


def test_views_are_two_normalised_and_unlike_for_every_slice(monkeypatch):
    same, key = smooth_images(1).expand(12, -1, -1, -1), (0, 1, 2)
    views = torch.stack(simclr.random_views(same, simclr.generator_for(*key)))
    assert views.shape == (2, 12, 1, 32, 32) and -1 <= views.min() < -0.9 and 0.5 < views.max() <= 1
    part = torch.stack(simclr.random_views(same, simclr.generator_for(*key), slice(2, 5)))
    assert torch.allclose(part, views[:, 2:5], atol=1e-6)  # whatever share a process has
    for off in (GRAYS, PLACES):  # places, then gray values, differ alone
        with monkeypatch.context() as patch:
            for name, value in off.items():
                patch.setattr(simclr, name, value)
            views = torch.cat(simclr.random_views(same, simclr.generator_for(*key))).flatten(1)
        assert (torch.cdist(views, views) + 100 * torch.eye(24)).min() > 0.05


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_resnet_matches_torchvision_with_the_same_weights(arch):
    """Values, gradients and running statistics, in float64, from a strictly loaded state dict."""
    theirs = getattr(torchvision.models, arch)().double()
    theirs.fc = nn.Identity()
    ours = simclr.ARCHITECTURES[arch](in_channels=3).double()
    drawn = [[p.std().item() for p in n.parameters() if p.ndim == 4] for n in (ours, theirs)]
    assert drawn[0] == pytest.approx(drawn[1], rel=0.1)  # the first weights: 1502.01852
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    for training in (True, False):
        for network in (ours, theirs):
            network.zero_grad()
            network.train(training)(x).square().sum().backward()
        assert torch.allclose(ours(x), theirs(x), atol=1e-10)
        grads = [[p.grad for p in network.parameters()] for network in (ours, theirs)]
        assert_close(*grads, 1e-9)
    assert ours.feature_dim == theirs(x).shape[1]


def test_gray_images_see_no_difference_to_torchvisions_weights(tmp_path, monkeypatch):
    """There, a file of theirs with its `fc` and its colours; and back, conv1 / 3 thrice."""
    theirs, gray = torchvision.models.resnet18().eval(), torch.randn(2, 1, 64, 64)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # where torchvision leaves its downloads
    path = tmp_path / "hub/checkpoints/resnet18-f37072fd.pth"
    path.parent.mkdir(parents=True)
    torch.save(theirs.state_dict(), path)
    theirs.fc = nn.Identity()
    scalings = {str(path): [0.449, 0.226], "imagenet": [0.449, 0.226], "random": [0.5, 0.5]}
    for init, expected in scalings.items():
        ours, *scaling = simclr.init_encoder("resnet18", init)
        if init == "random":
            weights = ours.state_dict()
            weights["conv1.weight"] = weights["conv1.weight"].repeat(1, 3, 1, 1) / 3
            theirs.load_state_dict(weights)
        assert_close([ours.eval()(gray)], [theirs(gray.expand(-1, 3, -1, -1))], 1e-4)
        assert scaling == pytest.approx(expected)
    with pytest.raises(data.UserError, match="no weights of a resnet50"):
        simclr.init_encoder("resnet50", str(path))


def slow_nt_xent(z_a: Tensor, z_b: Tensor, temperature: float) -> Tensor:
    """Algorithm 1 of 2002.05709 as it is printed: views interleaved, two loops, float64."""
    z = torch.stack([z_a, z_b], dim=1).flatten(0, 1).double()
    M, total = len(z), 0
    for i in range(M):
        s = [z[i] @ z[k] / (z[i].norm() * z[k].norm()) for k in range(M)]
        others = sum(torch.exp(s[k] / temperature) for k in range(M) if k != i)
        j = i + 1 if i % 2 == 0 else i - 1
        total = total - torch.log(torch.exp(s[j] / temperature) / others)
    return total / M


def test_nt_xent_matches_double_loop_from_eq_1_and_its_closed_forms_in_float32_or_better():
    """The closed forms alone miss a shifted positive. Autocast multiplies even float32 in bf16."""
    z = torch.randn(2, 8, 12, generator=simclr.generator_for(3), dtype=torch.float64)
    z_a, z_b = z[0].requires_grad_(), (0.6 * z[0] + z[1]).detach().requires_grad_()
    for temperature in (0.07, 0.5, 2.0):
        ours, slow = simclr.nt_xent(z_a, z_b, temperature), slow_nt_xent(z_a, z_b, temperature)
        scaled = simclr.nt_xent(100 * z_a, 0.01 * z_b, temperature)
        assert abs(ours.item() - slow.item()) < 1e-10 and abs(scaled.item() - slow.item()) < 1e-10
        assert_close(*[torch.autograd.grad(loss, (z_a, z_b)) for loss in (ours, slow)], 1e-10)
    for z, closed in ((torch.ones(4, 8), 7), (torch.eye(4), 1 + 6 * math.exp(-1 / 0.5))):
        assert abs(simclr.nt_xent(z.double(), z.double(), 0.5).item() - math.log(closed)) < 1e-12
    for bad in ((z_a, z_b[:3]), (z_a[:, 0], z_b[:, 0]), (z_a, z_b, 0.0), (z_a[:1], z_b[:1])):
        with pytest.raises(ValueError, match="got views"):
            simclr.nt_xent(*bad)
    z_a, z_b = z_a.detach().bfloat16(), z_b.detach().bfloat16()
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
    """By hand: one pass over both views, the projection head of §2.1, Eq. 1, its gradients."""
    images, networks = smooth_images(4), tiny()
    ours = step(networks, images, simclr.Pretraining(temperature=0.3, mean=0.4, std=0.2))
    networks.zero_grad()
    views = torch.cat(simclr.random_views(images, simclr.generator_for(7), mean=0.4, std=0.2))
    W1, b1, W2, b2 = networks["projection_head"].parameters()
    assert [len(p) for p in (W1, b1, W2, b2)] == [512, 512, 128, 128]
    z = (networks["encoder"](views) @ W1.T + b1).clamp(min=0) @ W2.T + b2
    slow = slow_nt_xent(z[:4], z[4:], 0.3)
    slow.backward()
    assert_close(ours, [slow, z[:4], z[4:], *(p.grad for p in networks.parameters())], 1e-4)


def test_the_loop_has_new_orders_and_views_in_each_epoch_and_its_rates_and_decay(monkeypatch):
    """With steps that compute nothing: losses 1, 2, 3..., gradients 0, so that decay alone acts."""
    noted, images = [], torch.arange(14).byte().view(-1, 1, 1, 1).expand(-1, 1, 32, 32)

    def fake(networks, images, generator, settings, bf16):
        for p in networks.parameters():
            p.grad = torch.zeros_like(p)
        noted.append((images[:, 0, 0, 0], generator.initial_seed()))
        return torch.tensor(float(len(noted))), torch.eye(4), torch.eye(4)

    monkeypatch.setattr(simclr, "training_step", fake)
    networks, first = tiny(), tiny()
    epochs = train(networks, images, epochs=20, lr=0.1, weight_decay=0.5)
    rates = [simclr.warmup_cosine(now, 60, 0.1, 0.002) for now in range(60)]
    assert [r["lr"] for r, _ in epochs] == pytest.approx(rates[2::3])
    assert [(r["epoch"], r["loss"]) for r, _ in epochs] == [(e, 3 * e - 1) for e in range(1, 21)]
    shrunk = math.prod(1 - 0.5 * rate for rate in rates)
    for p, before in zip(networks.parameters(), first.parameters(), strict=True):
        assert torch.allclose(p, before * (shrunk if p.ndim > 1 else 1))
    for seed in (0, 1, 0):
        train(networks, images, epochs=3, seed=seed)  # three steps of four, two slices wait
    orders = torch.stack([batch for batch, _ in noted[60:]]).view(9, 12).tolist()
    assert all(len(set(order)) == 12 for order in orders) and orders[0] != sorted(orders[0])
    assert len(set(map(tuple, orders))) == 6 and orders[:3] == orders[6:]
    seeds = [seed for _, seed in noted[60:]]  # of the views
    assert len(set(seeds)) == 18 and seeds[:9] == seeds[18:]


def test_pretraining_lowers_loss_and_stops_before_a_step_whose_loss_is_no_number(monkeypatch):
    """Sixteen gratings are distinguished in 20 steps; before, a view is one of 31 others."""
    waves, pixel = torch.randn(16, 2, 1, 1, generator=simclr.generator_for(0)), torch.arange(32)
    waves = (waves[:, 0] * pixel + waves[:, 1] * pixel[:, None]).sin()  # (16, 32, 32)
    images, networks, first = (127 + 100 * waves).byte()[:, None], tiny(), tiny()
    how = {"epochs": 20, "batch_size": 16, "lr": 1e-3, "temperature": 0.2}
    with monkeypatch.context() as patch:
        patch.setattr(simclr, "nt_xent", lambda z_a, *_: z_a.square().sum() * math.inf)
        with pytest.raises(data.UserError, match=r"in epoch 1; .*--lr 0.0005$"):
            train(networks, images, **how)
    assert_close(list(networks.parameters()), list(first.parameters()), 0)
    losses = [record["loss"] for record, _ in train(networks, images, **how)]
    assert abs(losses[0] - math.log(31)) < 0.5 and sum(losses[-5:]) / 5 < losses[0] - 0.5


@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_resumed_from_its_state_ends_as_if_it_had_never_stopped(tmp_path, bf16):
    """To the bit, by way of a file, whatever others draw or lay between the images meanwhile."""
    images, networks, seen = smooth_images(9), tiny(), set()
    for part in (networks["encoder"].conv1, networks["projection_head"]):
        part.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    spread, rows = np.zeros((20, 32, 32), np.uint8), np.random.default_rng(0).permutation(20)[:9]
    spread[rows] = images[:, 0]
    how = simclr.Pretraining(3, 4), torch.device("cpu"), bf16
    for record, state in simclr.pretrain(networks, spread, rows, *how):
        torch.save(state, tmp_path / f"{record['epoch']}.pt")
        torch.rand(5)
        networks.eval()
    assert seen == {torch.bfloat16 if bf16 else torch.float32}  # and of the weights never
    assert {p.dtype for p in networks.parameters()} == {torch.float32}
    for done in (1, 2):
        state, other = torch.load(tmp_path / f"{done}.pt", weights_only=True), tiny(seed=1)
        later = [r["epoch"] for r, _ in train(other, images, bf16, epochs=3, resume=state)]
        assert later == [2, 3][done - 1 :]
        torch.testing.assert_close(networks.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_encoder_pt_survives_the_round_trip_and_what_is_none_is_one_line(tmp_path, monkeypatch):
    """A file is never run. A full disk is an OSError: nobody catches torch.save's RuntimeError."""
    monkeypatch.chdir(tmp_path)
    encoder, seen = simclr.resnet18().to(memory_format=torch.channels_last), torch.ones(2, 16)
    config = {"arch": "resnet18", "image_size": 32, "mean": 0.5, "std": 0.5}
    whole, written = Path("whole.pt"), simclr.encoder_checkpoint(encoder, config, 3, seen)
    simclr.save(written, whole)
    loaded, read = simclr.load_encoder(whole)
    torch.testing.assert_close(loaded.state_dict(), encoder.state_dict(), rtol=0, atol=0)
    assert torch.equal(read.pop("seen"), seen)
    assert all(value.is_contiguous() for value in read.pop("encoder").values())
    assert read == config | {"feature_dim": 512, "epoch": 3, "config": config}
    part = {k: v for k, v in written["encoder"].items() if k != "layer4.1.bn2.bias"}
    without = {key: value for key, value in written.items() if key != "seen"}
    for bad in (written | {"encoder": part}, written | {"arch": "vit"}, without):
        simclr.save(bad, whole)
        with pytest.raises(data.UserError, match=r"is no encoder.pt.*\)$"):  # . is no line break
            simclr.load_encoder(whole)
    Path("half.pt").write_bytes(whole.read_bytes()[:300])
    Path("harm.pt").write_bytes(b"cos\nsystem\n(S'touch harmed'\ntR.")  # once it is unpickled
    for name in ("half.pt", "harm.pt", "missing.pt"):
        with pytest.raises(data.UserError, match=rf"^{name} .*`pretrain` makes it.*\)$"):
            simclr.load_encoder(Path(name))
        with pytest.raises(data.UserError, match=rf"{name} has no weights of a resnet18.*\)$"):
            simclr.init_encoder("resnet18", name)
    assert not Path("harmed").exists()
    monkeypatch.setattr(data, "write_atomically", lambda _: open("/dev/full", "wb", buffering=0))
    with pytest.raises(OSError, match="No space left"):
        simclr.save({"a": torch.zeros(10**6)}, whole)


def test_chunks_are_even_keep_no_activations_and_have_their_own_batch_norm():
    """9 slices in chunks of at most 4: three times 6 views, each encoded twice."""
    views, sizes = torch.randn(18, 1, 32, 32).double(), []
    ours, slow = tiny()["encoder"].double(), tiny()["encoder"].double()
    ours.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    h = simclr.encode(ours, views, chunk_size=4)
    expected = torch.cat([slow(chunk) for chunk in views.split(6)])
    assert torch.allclose(h, expected, atol=1e-12) and sizes == [6, 6, 6]
    (h.square().sum() + expected.square().sum()).backward()
    assert_close([p.grad for p in ours.parameters()], [p.grad for p in slow.parameters()], 1e-10)
    assert sizes == [6] * 6


def share_of_the_work(chunk_size: int | None) -> list[Tensor]:
    """What a process finds: of a step; of a run of three epochs. Slices meet in the loss alone."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(1024, 16), nn.ReLU())
    networks = nn.ModuleDict({"encoder": encoder, "projection_head": simclr.ProjectionHead(16)})
    images = smooth_images(13)
    images[7:] //= 4  # what the second process sees is unlike what the first one sees
    found = step(networks, images[4:10], simclr.Pretraining(chunk_size=chunk_size))
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
    for found in [*torch.load(tmp_path / "0.pt"), *torch.load(tmp_path / "1.pt")]:
        assert_close(found, alone, 1e-5)  # at once, and in chunks
