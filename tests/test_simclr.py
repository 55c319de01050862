"""simclr.py: the loss against a double loop from the paper, the encoder against torchvision's."""

import io
import math
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from torch import Tensor

import data
import simclr


def slow_nt_xent(z_a: Tensor, z_b: Tensor, temperature: float) -> Tensor:
    """Algorithm 1 of 2002.05709 as it is printed: views interleaved, two loops, float64."""
    z = [view for pair in zip(z_a.double(), z_b.double(), strict=True) for view in pair]
    M = len(z)
    s = [[z[i] @ z[j] / (z[i].norm() * z[j].norm()) for j in range(M)] for i in range(M)]

    def loss(i: int, j: int) -> Tensor:
        others = sum(torch.exp(s[i][k] / temperature) for k in range(M) if k != i)
        return -torch.log(torch.exp(s[i][j] / temperature) / others)

    N = M // 2
    return sum(loss(2 * k, 2 * k + 1) + loss(2 * k + 1, 2 * k) for k in range(N)) / (2 * N)


def random_projections(N: int = 5, D: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(2, N, D, generator=generator, dtype=torch.float64)
    return z[0].requires_grad_(), (0.6 * z[0] + z[1]).detach().requires_grad_()


# --- the loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.07, 0.5, 2.0])
def test_nt_xent_matches_double_loop_from_eq_1(temperature):
    """A random fixture: the closed forms alone miss a shifted positive, among other bugs."""
    z_a, z_b = random_projections()
    ours = simclr.nt_xent(z_a, z_b, temperature)
    slow = slow_nt_xent(z_a, z_b, temperature)
    assert abs(ours.item() - slow.item()) < 1e-10
    gradients = torch.autograd.grad(ours, (z_a, z_b))
    for g, h in zip(gradients, torch.autograd.grad(slow, (z_a, z_b)), strict=True):
        assert torch.allclose(g, h, atol=1e-10, rtol=0)


def test_nt_xent_of_collapsed_projections_is_log_2n_minus_1():
    z = torch.ones(4, 8, dtype=torch.float64)
    assert simclr.nt_xent(z, z, 0.5).item() == pytest.approx(1.945910, abs=1e-6)
    assert simclr.nt_xent(z, z, 0.07).item() == pytest.approx(math.log(7), abs=1e-12)


def test_nt_xent_of_orthogonal_pairs_has_its_closed_form():
    z = torch.eye(4, dtype=torch.float64)
    assert simclr.nt_xent(z, z, 0.5).item() == pytest.approx(0.594438, abs=1e-6)


def test_nt_xent_ignores_projection_scale():
    z_a, z_b = random_projections()
    scaled = simclr.nt_xent(z_a * 100, z_b * 0.01, 0.1)
    assert torch.allclose(simclr.nt_xent(z_a, z_b, 0.1), scaled, atol=1e-10)


def test_nt_xent_stays_float32_under_bf16_autocast():
    """Inside autocast even a product of float32 matrices is bf16, which is good to 1 % only."""
    z_a, z_b = (z.detach().float() for z in random_projections(64, 32))
    with torch.autocast("cpu", torch.bfloat16):
        inside = simclr.nt_xent(z_a, z_b, 0.07)
    assert inside.dtype == torch.float32
    assert inside.item() == pytest.approx(simclr.nt_xent(z_a, z_b, 0.07).item(), abs=1e-6)


def test_nt_xent_rejects_views_of_different_shape():
    z = torch.ones(4, 8)
    for bad in ((z, z[:3], 0.5), (z[:, 0], z[:, 0], 0.5), (z, z, 0.0), (z[:1], z[:1], 0.5)):
        with pytest.raises(ValueError, match="expected two"):
            simclr.nt_xent(*bad)


def test_contrastive_statistics_know_perfect_chance_and_collapse():
    z = torch.eye(8)
    accuracy, std = simclr.contrastive_statistics(z, z)
    assert accuracy == 1 and std > 0.3
    accuracy, _ = simclr.contrastive_statistics(z, z.roll(1, 0))  # all positives are strangers
    assert accuracy == 0
    assert simclr.contrastive_statistics(torch.ones(8, 3), torch.ones(8, 3))[1] == 0


# --- the encoder -------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_resnet_matches_torchvision_with_the_same_weights(arch):
    """Values, gradients and running statistics, in float64, from a strictly loaded state dict."""
    reason = "torchvision is the oracle here, and it does not import"
    models = pytest.importorskip("torchvision.models", reason=reason)
    torch.manual_seed(0)
    theirs = getattr(models, arch)().double()
    theirs.fc = torch.nn.Identity()
    ours = simclr.ARCHITECTURES[arch](in_channels=3).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for training in (True, False):
        ours.train(training)
        theirs.train(training)
        a, b = ours(x), theirs(x)
        assert torch.allclose(a, b, atol=1e-10)
        ours.zero_grad()
        theirs.zero_grad()
        a.square().sum().backward()
        b.square().sum().backward()
        reference = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            scale = reference[name].grad.abs().max()
            assert torch.allclose(parameter.grad, reference[name].grad, atol=1e-9 * scale), name
    for name, value in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], value), name


def test_torchvision_takes_our_weights_and_gives_the_same_features_on_gray_pictures():
    """The way back: conv1 repeated over three channels and divided by three, all else as it is."""
    reason = "torchvision is the oracle here, and it does not import"
    models = pytest.importorskip("torchvision.models", reason=reason)
    ours, theirs = simclr.resnet18().double().eval(), models.resnet18().double().eval()
    theirs.fc = torch.nn.Identity()
    weights = ours.state_dict()
    weights["conv1.weight"] = weights["conv1.weight"].repeat(1, 3, 1, 1) / 3
    theirs.load_state_dict(weights)
    gray = torch.randn(2, 1, 64, 64, dtype=torch.float64)
    assert torch.allclose(ours(gray), theirs(gray.repeat(1, 3, 1, 1)), atol=1e-10)


def test_encoders_have_the_published_sizes():
    for make, E, count in ((simclr.resnet18, 512, 11_170_240), (simclr.resnet50, 2048, 23_501_760)):
        encoder = make()
        assert encoder.feature_dim == E
        assert encoder.conv1.weight.shape == (64, 1, 7, 7)
        assert sum(p.numel() for p in encoder.parameters()) == count
    z = simclr.ProjectionHead(512)(torch.zeros(3, 512))
    assert z.shape == (3, 128)
    hidden = simclr.ProjectionHead(512)[0]
    assert (hidden.in_features, hidden.out_features) == (512, 512)


# --- optimisation and the loop -----------------------------------------------------------------


def test_cosine_lr_matches_torch_scheduler():
    """An oracle for the schedule: torch's own, stepped once a step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5e-4)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30, 5e-4 / 50)
    for step in range(30):
        ours = simclr.cosine_lr(step, 30, 5e-4, 5e-4 / 50)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()


def test_weight_decay_spares_biases_and_norms():
    optimizer = simclr.adamw(simclr.resnet18(), weight_decay=0.1)
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim == 4 for p in decayed["params"])
    assert all(p.ndim == 1 for p in spared["params"])
    assert len(decayed["params"]) == 20 and len(spared["params"]) == 40


CPU = torch.device("cpu")


def drawn(count: int) -> np.ndarray:
    """Phantoms of as many patients, (count, 32, 32) uint8."""
    paths = data.phantom_paths()[:: 3 * 11][:count]
    return np.stack([data.fit_square(data.draw_phantom(path)[0], 32) for path in paths])


def start(images: np.ndarray, **settings: object) -> simclr.Run:
    """A run that has not begun; as many slices a batch as there are images, unless it is said."""
    settings = simclr.Pretraining(**{"batch_size": len(images), "epochs": 2} | settings)
    torch.manual_seed(settings.seed)
    return simclr.pretraining(simclr.resnet18(), settings, len(images), CPU, bf16=False)


def finish(run: simclr.Run, images: np.ndarray) -> list[dict]:
    """Train it to its end."""
    for _ in simclr.pretrain(run, images, np.arange(len(images))):
        pass
    return run.records


def tiny_run(seed: int = 0, noise: int = 0) -> simclr.Run:
    """A few steps on 16 phantoms; somebody else draws `noise` numbers at each."""
    images = drawn(16)
    run = start(images, batch_size=8, seed=seed)
    for _ in simclr.pretrain(run, images, np.arange(16)):
        torch.rand(noise)
    return run


def test_pretraining_lowers_loss_on_a_tiny_batch():
    """Sixteen gratings, told apart by angle and pitch, are learnt in 20 steps."""
    y, x = np.mgrid[:32, :32]
    angles, pitches = np.linspace(0, np.pi, 16, endpoint=False), np.tile([0.3, 0.6, 1.2, 2.2], 4)
    waves = [
        np.sin((x * np.cos(a) + y * np.sin(a)) * p) for a, p in zip(angles, pitches, strict=True)
    ]
    images = (127 + 100 * np.stack(waves)).astype(np.uint8)
    records = finish(start(images, epochs=20, lr=1e-3, temperature=0.2), images)
    losses = [record["loss"] for record in records]
    assert abs(losses[0] - math.log(31)) < 0.3  # before learning: one of the 31 other views
    assert sum(losses[-5:]) / 5 < losses[0] - 0.5
    assert [record["epoch"] for record in records] == list(range(1, 21))


def test_pretraining_repeats_to_the_bit_and_listens_to_the_seed():
    # a step draws from its own generator, whatever others draw
    runs = tiny_run(), tiny_run(noise=5), tiny_run(seed=1)
    first, again, other = (run.networks["encoder"].conv1.weight for run in runs)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_encoder_checkpoint_survives_the_round_trip_and_names_what_is_wrong(tmp_path):
    encoder = simclr.resnet18()
    path = tmp_path / "encoder.pt"
    simclr.save(simclr.encoder_checkpoint(encoder, CONFIG, 3, torch.zeros(0, 16).byte()), path)
    loaded, checkpoint = simclr.load_encoder(path)
    assert checkpoint["epoch"] == 3
    assert torch.equal(loaded.layer4[1].conv2.weight, encoder.layer4[1].conv2.weight)
    with pytest.raises(data.UserError, match="main.py pretrain"):
        simclr.load_encoder(tmp_path / "missing.pt")
    path.write_bytes(b"no checkpoint")
    with pytest.raises(data.UserError, match="cannot be used as an encoder"):
        simclr.load_encoder(path)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_torchvisions_weights_begin_a_run_and_gray_pictures_feel_no_difference(arch, tmp_path):
    """A file of theirs, with its `fc` and its three colours: --init takes it as it is."""
    reason = "torchvision is the oracle here, and it does not import"
    models = pytest.importorskip("torchvision.models", reason=reason)
    torch.manual_seed(0)
    theirs = getattr(models, arch)().eval()
    path = tmp_path / "theirs.pth"
    torch.save(theirs.state_dict(), path)
    ours, *scaling = simclr.init_encoder(arch, str(path))
    theirs.fc = torch.nn.Identity()
    gray = torch.randn(2, 1, 64, 64)
    expected = theirs(gray.expand(-1, 3, -1, -1))
    assert torch.allclose(ours.eval()(gray), expected, atol=1e-4 * expected.abs().max().item())
    # the mean over torchvision's three, as gray pictures have no colour
    mean, std = (np.mean(x) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert scaling == pytest.approx([mean, std], abs=1e-3)


def test_imagenet_weights_come_from_where_torchvision_keeps_them(tmp_path, monkeypatch):
    """Its download is its own: a stand-in lies where it would leave the file."""
    reason = "torchvision fetches these weights, and it does not import"
    models = pytest.importorskip("torchvision.models", reason=reason)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub/checkpoints" / models.ResNet18_Weights.DEFAULT.url.split("/")[-1]
    place.parent.mkdir(parents=True)
    torch.save(models.resnet18().state_dict(), place)
    encoder, _, _ = simclr.init_encoder("resnet18", "imagenet")
    expected = torch.load(place)["conv1.weight"].sum(dim=1, keepdim=True)
    assert torch.equal(encoder.conv1.weight, expected)


def test_first_weights_that_do_not_fit_are_refused(tmp_path):
    """One of our own encoders has seen pictures, which would be forgotten: --encoder takes it."""
    path = tmp_path / "a.pth"
    torch.save({"encoder": simclr.resnet18().state_dict(), "arch": "resnet18"}, path)
    with pytest.raises(data.UserError, match="take as --encoder"):
        simclr.init_encoder("resnet18", str(path))
    torch.save(simclr.resnet18(in_channels=3).state_dict(), path)
    with pytest.raises(data.UserError, match="no weights of a resnet50"):
        simclr.init_encoder("resnet50", str(path))
    with pytest.raises(data.UserError, match="nowhere"):
        simclr.init_encoder("resnet18", "nowhere.pth")


CONFIG = {"arch": "resnet18", "image_size": 32, "mean": 0.5, "std": 0.5}


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    """The loss of the last step is checked before the weights that it makes."""
    run = start(drawn(2))
    with torch.no_grad():
        run.networks["encoder"].conv1.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(data.UserError, match="no finite numbers after step 0 of epoch 1"):
        simclr.save_run(run, tmp_path, CONFIG, torch.zeros(0, 16))
    assert not list(tmp_path.iterdir())


# --- chunks ------------------------------------------------------------------------------------


def small_networks() -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    networks = {"encoder": simclr.resnet18(), "projection_head": simclr.ProjectionHead(512)}
    return torch.nn.ModuleDict(networks).double()


def gradients(networks: torch.nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in networks.parameters()]


@pytest.mark.parametrize("chunk", [1, 3, 4, 6])
def test_chunks_add_up_to_the_gradients_of_the_plain_step(chunk):
    """In eval mode batch norm does not mix pictures, so the two must be one and the same."""
    view_a, view_b = torch.randn(2, 6, 1, 32, 32, dtype=torch.float64)
    settings = simclr.Pretraining(chunk_size=chunk, temperature=0.2)
    plain, chunked = small_networks().eval(), small_networks().eval()
    views = torch.cat([view_a, view_b])
    z_a, z_b = simclr.embed(plain, views, False).chunk(2)
    loss = simclr.nt_xent(z_a, z_b, 0.2)
    loss.backward()
    ours, ours_a, ours_b = simclr.backward_in_chunks(chunked, views, settings, False)
    assert ours.item() == pytest.approx(loss.item(), abs=1e-12) and not ours.requires_grad
    assert torch.allclose(ours_a, z_a, atol=1e-12) and torch.allclose(ours_b, z_b, atol=1e-12)
    for theirs, mine in zip(gradients(plain), gradients(chunked), strict=True):
        assert (theirs - mine).abs().max() < 1e-12 * max(1, theirs.abs().max())


def test_chunks_are_even(monkeypatch):
    """A small last one would have a batch norm of its own over next to nothing."""
    seen, embed = [], simclr.embed

    def note(networks: torch.nn.ModuleList, views: Tensor, bf16: bool) -> Tensor:
        seen.append(len(views) // 2)
        return embed(networks, views, bf16)

    monkeypatch.setattr(simclr, "embed", note)
    views = torch.randn(18, 1, 32, 32, dtype=torch.float64)
    settings = simclr.Pretraining(chunk_size=4)
    simclr.backward_in_chunks(small_networks(), views, settings, False)
    assert seen == [3, 3, 3] * 2


def test_in_training_chunks_have_their_own_batch_norm_and_move_its_statistics_once():
    """Against all chunks in one graph, slowly; and against a single pass for the statistics."""
    view_a, view_b = torch.randn(2, 6, 1, 32, 32, dtype=torch.float64)
    settings = simclr.Pretraining(chunk_size=2, temperature=0.2)
    slow, chunked = small_networks().train(), small_networks().train()
    z = [
        simclr.embed(slow, torch.cat([view_a[i : i + 2], view_b[i : i + 2]]), False).chunk(2)
        for i in (0, 2, 4)
    ]
    z_a, z_b = (torch.cat(parts) for parts in zip(*z, strict=True))
    simclr.nt_xent(z_a, z_b, 0.2).backward()
    views = torch.cat([view_a, view_b])
    simclr.backward_in_chunks(chunked, views, settings, False)
    for theirs, mine in zip(gradients(slow), gradients(chunked), strict=True):
        assert (theirs - mine).abs().max() < 1e-12 * max(1, theirs.abs().max())
    for theirs, mine in zip(slow.buffers(), chunked.buffers(), strict=True):
        assert torch.equal(theirs, mine)
    assert int(chunked["encoder"].bn1.num_batches_tracked) == 3


def test_a_run_in_chunks_sees_the_same_views_and_learns():
    """Seed, order and views do not know of chunks; of one step, only batch norm does."""
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32), np.uint8)
    losses = []
    for chunk in (None, 8, 4):
        records = finish(start(images, epochs=3, chunk_size=chunk), images)
        losses.append([record["loss"] for record in records])
    assert losses[0] == losses[1]
    assert losses[2] != losses[0] and losses[2][0] == pytest.approx(losses[0][0], abs=1.0)


# --- stopping and going on ---------------------------------------------------------------------


def same_weights(one: simclr.Run, other: simclr.Run) -> bool:
    states = one.networks.state_dict(), other.networks.state_dict()
    return all(torch.equal(*pair) for pair in zip(*(s.values() for s in states), strict=True))


def untimed(records: list[dict]) -> list[dict]:
    """Records without what a clock says."""
    return [{k: v for k, v in r.items() if "second" not in k} for r in records]


def test_a_run_restored_after_any_step_ends_as_if_it_had_never_stopped():
    """To the bit: weights, statistics, and the means of an epoch that was cut in two."""
    images = drawn(13)  # of three steps of four, one slice is left over in each epoch
    first, files = start(images, batch_size=4), []
    for _ in simclr.pretrain(first, images, np.arange(13)):
        files.append(io.BytesIO())
        torch.save(first.state(), files[-1])
    rates = [simclr.cosine_lr(step, 6, 5e-4, 1e-5) for step in (2, 5)]  # one schedule, two epochs
    assert [record["lr"] for record in first.records] == pytest.approx(rates)
    for done, file in enumerate(files[:-1], start=1):
        file.seek(0)
        second = start(images, batch_size=4, lr=1.0)
        with torch.no_grad():
            for p in second.networks.parameters():
                p.fill_(torch.nan)
        second.settings = first.settings
        second.restore(torch.load(file, weights_only=True))
        assert (len(second.records), second.step) == divmod(done, 3)
        finish(second, images)
        assert same_weights(first, second)
        assert untimed(first.records) == untimed(second.records)
        assert all(record["seconds"] > 0 for record in second.records)


def test_pictures_read_as_they_are_needed_train_as_those_that_lie_on_the_device(tmp_path):
    images = drawn(16)
    spread = np.lib.format.open_memmap(tmp_path / "rows.npy", "w+", np.uint8, (40, 32, 32))
    rows = np.random.default_rng(0).permutation(40)[:16]
    spread[rows] = images
    runs = [start(images, batch_size=8) for _ in range(2)]
    for _ in simclr.pretrain(runs[0], spread, rows):
        pass
    for _ in simclr.pretrain(runs[1], torch.from_numpy(images), np.arange(16)):
        pass
    assert same_weights(*runs) and untimed(runs[0].records) == untimed(runs[1].records)


def test_a_checkpoint_of_other_settings_or_of_something_else_is_refused(tmp_path):
    path, config = tmp_path / "checkpoint.pt", CONFIG | {"epochs": 2, "threads": 1}
    assert simclr.read_checkpoint(tmp_path, config) is None
    run = start(drawn(4))
    simclr.save_run(run, tmp_path, config, torch.zeros(0, 16))
    assert simclr.read_checkpoint(tmp_path, config | {"threads": 9})["step"] == 0
    with pytest.raises(data.UserError, match="epochs 2 there, 3 here; lr None there, 1 here"):
        simclr.read_checkpoint(tmp_path, config | {"epochs": 3, "lr": 1})
    with pytest.raises(data.UserError, match="settings: other pictures;"):
        simclr.read_checkpoint(tmp_path, config | {"fingerprint": "0"})
    for content in (b"", b"no checkpoint", path.read_bytes()[:9999]):
        path.write_bytes(content)
        with pytest.raises(data.UserError, match="--restart begins anew"):
            simclr.read_checkpoint(tmp_path, config)
    simclr.save({"config": config}, path)  # as an earlier version might have written it
    with pytest.raises(data.UserError, match="cannot be resumed"):
        simclr.read_checkpoint(tmp_path, config)
    path.unlink()
    assert simclr.read_checkpoint(tmp_path, config) is None  # encoder.pt alone: of the same run,
    with pytest.raises(data.UserError, match="epochs 2 there, 3 here"):  # or of another
        simclr.read_checkpoint(tmp_path, config | {"epochs": 3})


# --- many processes ----------------------------------------------------------------------------


def projections(chunk_size: int | None) -> tuple[Tensor, list[Tensor]]:
    """The loss of a batch of six slices and its gradients, in float64; a rank takes its share."""
    rank, world = simclr.rank_and_world()
    views = torch.randn(2, 6, 1, 32, 32, generator=data.generator_for(5), dtype=torch.float64)
    views[:, 3:] *= 3  # what the second rank sees is unlike what the first one sees
    views[1] += 0.3 * views[0]
    views = torch.cat(list(views[:, rank * 6 // world : (rank + 1) * 6 // world]))
    networks = small_networks().eval()
    if chunk_size:
        settings = simclr.Pretraining(chunk_size=chunk_size, temperature=0.2)
        loss, _, _ = simclr.backward_in_chunks(networks, views, settings, False)
    else:
        z_a, z_b = (simclr.gather(z) for z in simclr.embed(networks, views, False).chunk(2))
        loss = simclr.nt_xent(z_a, z_b, 0.2)
        loss.backward()
    simclr.add_up_gradients(networks)
    return loss.detach(), gradients(networks)


def a_step() -> list[Tensor]:
    """The gradients of one step of the loop itself, without batch norm."""
    images = drawn(8)
    run = start(images, epochs=1, chunk_size=None)
    run.networks.eval()
    finish(run, images)
    return gradients(run.networks)


def refuse() -> None:
    raise data.UserError("said by the first rank")


def one_rank(rank: int, port: int, out: Path) -> None:
    """What each of two processes does; runs in a process of its own."""
    torch.set_num_threads(1)
    rendezvous = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", rendezvous, rank=rank, world_size=2)
    found = {"plain": projections(None), "chunks": projections(2), "loop": a_step()}
    found["told"] = simclr.on_every_rank(lambda: simclr.rank_and_world()[0])
    found["flag"] = simclr.on_any_rank(15 * rank)
    simclr.check_equal("the same")
    with pytest.raises(data.UserError, match="different pictures"):
        simclr.check_equal(f"of rank {rank}")
    with pytest.raises(data.UserError, match="said by the first rank"):
        simclr.on_every_rank(refuse)
    torch.save(found, out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_find_the_gradients_of_one(tmp_path):
    """A gather that drops the graph, or a mean where a sum belongs, points nearly the same way."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_rank, (port, tmp_path), nprocs=2)
    alone = {"plain": projections(None), "chunks": projections(2)}
    loop = a_step()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, (loss, theirs) in alone.items():
            assert found[name][0].item() == pytest.approx(loss.item(), abs=1e-12)
            for ours, g in zip(found[name][1], theirs, strict=True):
                assert (ours - g).norm() <= 1e-10 * g.norm(), name
        for ours, g in zip(found["loop"], loop, strict=True):
            assert (ours - g).norm() <= 1e-5 * g.norm()
        assert found["told"] == 0 and found["flag"] == 15
