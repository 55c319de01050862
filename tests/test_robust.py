"""What must not break it: hostile files, full disks, numbers that burst, names that bite."""

import csv
import io
import json
import os
import pickle
import shutil
import subprocess
import zipfile
from pathlib import Path

import fuzz
import numpy as np
import pytest
import torch
from test_main import plant, refused, rows_of, small_world  # noqa: F401 (a fixture)

import data
import evaluate
import heads
import main
import simclr

TRAIN = ["pretrain", "--data", "scans", "--image-size", "32", "--batch-size", "8", "--epochs"]


# --- checkpoints -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """encoder.pt, checkpoint.pt and classifier.pt of a short run."""
    folder, before = tmp_path_factory.mktemp("good"), Path.cwd()
    plant(folder / "scans")
    os.chdir(folder)
    try:
        assert main.main([*TRAIN, "1"]) == 0
        assert main.main(["probe", "--data", "scans", "--task", "mine", "--epochs", "1"]) == 0
    finally:
        os.chdir(before)
    return folder


class Harm:
    """Pickled, it creates a file when somebody unpickles it."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch harmed",)


def spoil(name: str, good: bytes, harm: type = Harm) -> bytes:
    """A checkpoint, spoilt in one way."""
    if name == "truncated":
        return good[: len(good) * 2 // 3]
    if name == "flipped":  # one bit, in the middle of the weights
        return (
            good[: len(good) // 2] + bytes([good[len(good) // 2] ^ 4]) + good[len(good) // 2 + 1 :]
        )
    if name == "empty":
        return b""
    if name == "text":
        return b"<html>404 not found</html>\n" * 40
    if name.startswith("pickle"):
        return pickle.dumps(harm(), protocol=int(name[-1]))
    file = io.BytesIO()
    if name == "zipped code":  # in torch's own format
        torch.save({"arch": "resnet18", "encoder": harm()}, file)
    elif name == "list":
        torch.save([1, 2, 3], file)
    elif name == "another":
        torch.save({"state_dict": {"weight": torch.zeros(3)}}, file)
    elif name == "bomb":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out:
            out.writestr("archive/data.pkl", bytes(1 << 20))
    return file.getvalue()


SPOILT = [
    "truncated",
    "flipped",
    "empty",
    "text",
    "pickle 2",
    "pickle 4",
    "zipped code",
    "list",
    "another",
    "bomb",
]


@pytest.mark.parametrize("way", SPOILT)
def test_a_spoilt_checkpoint_is_one_clear_line_and_runs_nothing(way, checkpoints, tmp_path, capsys):
    shutil.copytree(checkpoints / "scans", tmp_path / "scans")
    for name in ("pretrain/encoder.pt", "pretrain/checkpoint.pt", "probe-mine/classifier.pt"):
        place = tmp_path / "runs" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(spoil(way, (checkpoints / "runs" / name).read_bytes()))
    commands = {
        "encoder.pt": ["probe", "--data", "scans", "--task", "mine"],
        "checkpoint.pt": [*TRAIN, "1"],
        "classifier.pt": ["predict", "--model", "runs/probe-mine/classifier.pt", "scans"],
    }
    for name, words in commands.items():
        line = refused(capsys, *words)
        assert name in line and "weights_only" not in line
        if way in ("pickle 2", "pickle 4", "zipped code"):
            assert "could run code" in line and ("system" in line or way == "pickle 4")
        if way == "flipped":
            assert "damaged" in line
    assert not Path("harmed").exists()
    assert "harm" not in refused(capsys, "pretrain", "--init", "runs/pretrain/encoder.pt")
    assert not Path("harmed").exists()


def changed(checkpoints: Path, name: str, **values: object) -> Path:
    """A checkpoint with some of its values changed; ... = taken out."""
    checkpoint = torch.load(checkpoints / "runs" / name, weights_only=True)
    checkpoint = {k: v for k, v in (checkpoint | values).items() if v is not ...}
    torch.save(checkpoint, "changed.pt")
    return Path("changed.pt")


@pytest.mark.parametrize(
    "values",
    [
        {"arch": "resnet50"},
        {"arch": "vit"},
        {"arch": ["resnet18"]},
        {"encoder": {"conv1.weight": torch.zeros(64, 1, 7, 7)}},
        {"encoder": ...},
        {"image_size": 10**9},
        {"image_size": "64"},
        {"std": 0.0},
        {"mean": float("nan")},
        {"seen": torch.zeros(3, 16)},
        {"seen": ...},
        {"feature_dim": 2048},
        {"config": None},
    ],
)
def test_an_encoder_is_checked_before_it_is_used(values, checkpoints):
    with pytest.raises(data.UserError, match="changed.pt cannot be used as an encoder.pt"):
        simclr.load_encoder(changed(checkpoints, "pretrain/encoder.pt", **values))


@pytest.mark.parametrize(
    "values",
    [
        {"task": "../../elsewhere"},
        {"task": 3},
        {"classes": ["a", "b", "c"]},
        {"classes": [1, 2]},
        {"classes": ...},
        {"classes": []},
        {"classes": "ab"},
        {"classes": {"a": 1, "b": 2}},
        {"task": "t" * 300},
        {"task": "a\0b"},
        {"task": "\udcff"},
        {"head_type": ["linear"]},
        {"std": 1e-300},
        {"image_size": 4},
        {"head": {}},
        {"head_type": "linear"},
    ],
)
def test_a_classifier_is_checked_before_it_is_used(values, checkpoints):
    """Its task names a folder that will be written."""
    words = "changed.pt cannot be used as a|changed.pt holds no classifier"
    with pytest.raises(data.UserError, match=words):
        heads.load_classifier(changed(checkpoints, "probe-mine/classifier.pt", **values))


def test_weights_that_are_no_numbers_are_not_used(checkpoints):
    weights = torch.load(checkpoints / "runs/pretrain/encoder.pt", weights_only=True)["encoder"]
    weights["layer3.0.conv1.weight"][0, 0, 0, 0] = torch.inf
    with pytest.raises(data.UserError, match="its weights give no finite numbers"):
        simclr.load_encoder(changed(checkpoints, "pretrain/encoder.pt", encoder=weights))
    huge = {name: value * 1e30 for name, value in weights.items()}
    with pytest.raises(data.UserError, match="its weights give no finite numbers"):
        simclr.load_encoder(changed(checkpoints, "pretrain/encoder.pt", encoder=huge))


def test_a_state_that_lacks_something_is_not_resumed(checkpoints, tmp_path, capsys):
    shutil.copytree(checkpoints / "scans", tmp_path / "scans")
    for values in ({"optimizer": ...}, {"projection_head": {}}, {"records": ...}):
        Path("runs/pretrain").mkdir(parents=True, exist_ok=True)
        changed(checkpoints, "pretrain/checkpoint.pt", **values)
        Path("changed.pt").rename("runs/pretrain/checkpoint.pt")
        assert "cannot be resumed" in refused(capsys, *TRAIN, "1")


# --- writing -----------------------------------------------------------------------------------


def small_disk(place: Path) -> None:
    """A disk of 400 MB, where that may be made."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk takes root, and a mount")


def test_a_full_disk_is_one_line_and_the_last_checkpoint_goes_on(tmp_path, monkeypatch, capsys):
    """Really full: the run's second checkpoint does not fit; with room it ends as undisturbed."""
    plant(tmp_path / "scans")
    small_disk(tmp_path / "disk")
    monkeypatch.setattr(simclr, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(simclr, "CHECKPOINT_SHARE", 1e9)  # a checkpoint after every step
    try:
        out, filler = tmp_path / "disk/run", tmp_path / "disk/filler"
        saved, save_run = [], simclr.save_run

        def fill(*how: object) -> float:
            """After the first checkpoint, leave no room for the next."""
            due = save_run(*how)
            if not saved:
                free = shutil.disk_usage(out).free
                filler.write_bytes(bytes(free - (20 << 20)))
            saved.append((out / "checkpoint.pt").read_bytes())
            return due

        monkeypatch.setattr(simclr, "save_run", fill)
        line = refused(capsys, *TRAIN, "2", "--out", str(out))
        assert "No space left" in line and "encoder.pt" in line and "make room" in line
        assert len(saved) == 1 and (out / "checkpoint.pt").read_bytes() == saved[0]
        assert not list(out.glob(".*.tmp"))
        filler.unlink()
        monkeypatch.setattr(simclr, "save_run", save_run)
        assert main.main([*TRAIN, "2", "--out", str(out)]) == 0
        assert "goes on after step" in capsys.readouterr().out
        assert main.main([*TRAIN, "2", "--out", "undisturbed"]) == 0
        ends = [simclr.load_encoder(Path(run) / "encoder.pt")[0] for run in (out, "undisturbed")]
        assert simclr.digest(ends[0]) == simclr.digest(ends[1])
    finally:
        subprocess.run(["umount", str(tmp_path / "disk")], check=True)


@pytest.mark.parametrize("number", ["ENOSPC", "EROFS", "EIO", "ENOENT"])
def test_a_failing_write_leaves_the_old_file_and_says_what_to_do(number, tmp_path, monkeypatch):
    """A vanished mount, a folder that has become read-only: whatever fsync says."""
    import errno

    file = tmp_path / "file"
    file.write_text("old")

    def fail(_: int) -> None:
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(data.UserError, match="file cannot be written.*make room"):
        with data.write_atomically(file) as out:
            out.write(b"new")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_place_that_cannot_be_is_said_in_one_line(tmp_path, capsys):
    plant(tmp_path / "scans")
    line = refused(capsys, *TRAIN, "0", "--out", "/proc/nowhere/run")
    assert "/proc/nowhere" in line and "cannot be written" in line


def test_an_error_of_the_code_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="a bug"), data.write_atomically(tmp_path / "x"):
        raise RuntimeError("a bug")
    assert not list(tmp_path.iterdir())


# --- numbers and memory ------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_bursts_stops_before_the_weights_are_spoiled(
    command, what, tmp_path, monkeypatch, capsys
):
    plant(tmp_path / "scans")
    update, runs, weights = simclr.Run.update, [], []

    def burst(run: simclr.Run, loss: torch.Tensor, lr: float) -> None:
        """In the third step."""
        runs.append(run)
        weights.append(simclr.digest(run.networks["encoder"].conv1))
        if len(runs) == 3:
            loss = loss * torch.nan if what == "loss" else loss
            if what == "gradient":
                run.networks["encoder"].conv1.weight.grad[0, 0, 0, 0] = torch.inf
        update(run, loss, lr)

    monkeypatch.setattr(simclr.Run, "update", burst)
    words = [*TRAIN, "2"]
    if command == "finetune":
        words = ["finetune", "--data", "scans", "--task", "mine", "--from-scratch", "--image-size"]
        words += ["32", "--lr", "0.001", "--epochs", "2"]
    line = refused(capsys, *words)
    assert "step 3 of epoch 1 at learning rate" in line and "--lr" in line and "--restart" in line
    assert len(weights) == 3 and simclr.digest(runs[0].networks["encoder"].conv1) == weights[2]
    assert weights[2] != weights[1]


def test_looking_at_the_gradients_changes_no_bit_of_them():
    torch.manual_seed(0)
    run = simclr.pretraining(
        simclr.resnet18(), simclr.Pretraining(), 512, torch.device("cpu"), False
    )
    for p in run.networks.parameters():
        p.grad = torch.randn_like(p)
    before = [p.grad.clone() for p in run.networks.parameters()]
    run.update(torch.tensor(1.0), 1e-3)
    for p, grad in zip(run.networks.parameters(), before, strict=True):
        assert torch.equal(p.grad, grad)


def test_out_of_memory_says_which_flag_to_lower(tmp_path, monkeypatch, capsys):
    plant(tmp_path / "scans")
    monkeypatch.setattr(simclr, "embed", lambda *how: torch.empty(1 << 46))  # really asked for
    line = refused(capsys, *TRAIN, "1")
    assert "out of memory" in line and "--chunk-size" in line
    words = [
        "finetune",
        "--data",
        "scans",
        "--task",
        "mine",
        "--from-scratch",
        "--image-size",
        "32",
    ]
    assert "--image-size" in refused(capsys, *words)

    def bug(*how: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(simclr, "embed", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        main.main([*TRAIN, "1", "--restart"])


# --- hostile pictures and names ----------------------------------------------------------------


def test_mutated_pictures_are_read_or_named(tmp_path):
    """`python tests/fuzz.py --count 10000` does more of the same."""
    report = fuzz.fuzz(tmp_path, count=300, seed=0)
    assert sum(report["read"].values()) + sum(report["named"].values()) == 300
    assert min(report["named"].values()) > 0 and report["slowest"] < fuzz.SECONDS


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is large, and has next to nothing in it."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_limits_are_applied_before_anything_is_decoded(tmp_path, monkeypatch):
    plant(tmp_path / "scans", patients=3)
    folder = tmp_path / "scans/mine/sick"
    (folder / "many_pixels.png").write_bytes(png_header(60000, 60000))
    with open(folder / "many_bytes.png", "wb") as file:
        file.truncate(data.MAX_BYTES + 1)  # a hole: it takes no room on the disk
    with open(folder / "many_bytes.nii", "wb") as file:
        file.truncate((data.MAX_VOXELS << 3) + data.MAX_BYTES + 1)
    pictures = heads.load(tmp_path / "scans", 32, tmp_path / "cache").pictures
    bad = {Path(pictures.paths[row]).name: why for row, why in pictures.unreadable.items()}
    assert set(bad) == {"many_pixels.png", "many_bytes.png", "many_bytes.nii"}
    assert "pixels" in bad["many_pixels.png"] and "bytes" in bad["many_bytes.png"]


NAMES = [
    "=1+1.png",
    "@sum.png",
    "+x.png",
    "-rf.png",
    "<b>&.png",
    "two\nlines.png",
    "\x1b[31mred.png",
]
NAMES += [
    "a\r=1+1.png",
    "tab\t.png",
    "'\";--.png",
    "%s{0}.png",
    "\u202egnp.exe.png",
    os.fsdecode(b"\xff\xfe.png"),
]


def test_names_that_bite_reach_every_output_safely(tmp_path, capsys):
    """No cell that a spreadsheet computes, no control character on the screen, no tag in a page."""
    plant(tmp_path / "scans", patients=12)
    for k, path in enumerate(sorted(Path("scans").rglob("*.png"))):
        path.rename(path.with_name(f"{NAMES[k % len(NAMES)]}"[:-4] + f"{k}.png"))
    assert main.main([*TRAIN, "0"]) == 0
    assert main.main(["probe", "--data", "scans", "--task", "mine", "--epochs", "1"]) == 0
    plant(Path("others"), patients=8, seed=1)
    loose = Path("loose")
    loose.mkdir()
    for name, path in zip(NAMES, sorted(Path("others").rglob("*.png")), strict=False):
        shutil.copy(path, loose / name)
    (loose / "broken\n\x1b[31m.png").write_bytes(b"none")
    model = ["--model", "runs/probe-mine/classifier.pt"]
    assert main.main(["predict", *model, "loose"]) == 0
    assert main.main(["explain", *model, "--data", "loose", "--layer", "layer2"]) == 0
    assert main.main(["embed", "--data", "scans"]) == 0
    told = capsys.readouterr()
    assert not [c for c in told.out if not c.isprintable() and c not in "\n\r"]
    for table in Path("runs").rglob("*.csv"):
        file = io.StringIO(os.fsdecode(table.read_bytes()), newline="")
        header, *rows = csv.reader(file)
        for row in rows:
            assert len(row) == len(header)
            for cell in row:
                assert not cell.startswith(("=", "@", "+", "\t")), (table, cell)
                assert not cell.startswith("-") or float(cell) <= 0, (table, cell)
    explained = rows_of_bytes("runs/explain-mine/explain.csv")
    assert {path.removeprefix("./") for path in explained} == set(NAMES)
    page = Path("runs/explain-mine/index.html").read_text(errors="replace")
    assert "<b>" not in page and "&lt;b&gt;&amp;.png" in page
    line = refused(capsys, "predict", *model, "loose/broken\n\x1b[31m.png")
    assert "\x1b" not in line


def rows_of_bytes(path: str) -> list[str]:
    with open(path, newline="", errors="surrogateescape") as file:
        return [row["path"] for row in csv.DictReader(file)]


def test_a_number_is_no_formula_and_a_formula_gets_a_folder():
    cells = ["-0.5", "-1e-05", "=1+1", "+x", "-x", "@a", "a=b", 3, -2.5, "", "\tx"]
    safe = [evaluate.harmless(cell) for cell in cells]
    assert safe == ["-0.5", "-1e-05", "./=1+1", "./+x", "./-x", "./@a", "a=b", 3, -2.5, "", "./\tx"]


# --- repeating ---------------------------------------------------------------------------------


def test_a_run_is_repeated_from_its_config_alone(tmp_path):
    plant(tmp_path / "scans")
    assert main.main([*TRAIN, "1", "--seed", "3", "--temperature", "0.2"]) == 0
    config = json.loads(Path("runs/pretrain/config.json").read_text())
    assert config["folder"] == str(tmp_path) and config["versions"]["torch"] == torch.__version__
    commit = subprocess.run(
        ["git", "-C", Path(main.__file__).parent, "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
    ).stdout.strip()
    assert (config["commit"] or "").startswith(commit)
    assert main.main([*config["typed"], "--out", "again"]) == 0
    first, again = (
        simclr.load_encoder(Path(run) / "encoder.pt")[0] for run in ("runs/pretrain", "again")
    )
    assert simclr.digest(first) == simclr.digest(again)
    shutil.rmtree("runs/pretrain")  # another commit, another folder: the same run goes on
    Path("again").rename("runs/pretrain")
    assert main.main(config["typed"]) == 0


def test_the_number_of_decoding_processes_changes_no_bit(tmp_path, monkeypatch):
    plant(tmp_path / "scans", patients=40)
    found = []
    for cores in (1, 3):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        pictures = data.load(tmp_path / "scans", 32, tmp_path / f"cache{cores}").pictures
        found.append((pictures.squares(np.arange(len(pictures.paths))), pictures.hashes))
    assert len(found[0][0]) >= data.FEW
    for one, other in zip(*found, strict=True):
        assert np.array_equal(one, other)
