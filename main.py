"""The commands: `pretrain` learns an encoder from pictures alone, `probe` reads a diagnosis off it.

This file only wires: it parses, seeds, chooses the device and the paths, and prints. What is
computed stands in data.py (pictures, groups, splits, views), simclr.py (encoder, loss, pretraining),
evaluate.py (the numbers) and heads.py (the classifiers), to be read in this order.

    pretrain:  pictures of no val or test group --two views--> simclr.pretrain --> encoder.pt
    probe:     encoder.pt, frozen --features--> heads.train_probe --> classifier.pt, metrics.json

Next: nothing; this is the last.
"""

import argparse
import csv
import io
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import data
import evaluate
import heads
import simclr

RUNS = Path("runs")
IMAGE_SIZE = 128  # pixels a side, the published value
# On the phantoms a command takes minutes on a laptop; these settings, and no others, differ there.
PHANTOM_DEFAULTS = {"image_size": 64, "batch_size": 128, "epochs": 12}
CHECKPOINT_SECONDS = 60  # at most one checkpoint a minute, so that writing costs next to nothing


# ---------------------------------------------------------------------------------------------
# What the commands share
# ---------------------------------------------------------------------------------------------


def choose_device(name: str, precision: str) -> tuple[torch.device, bool, str]:
    """The device, whether to compute in bf16 on it, and a phrase that says which and why."""
    here = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, there in here.items() if there)
    if not here[name]:
        raise data.UserError(f"this machine has no {name} device; give --device auto or cpu")
    device = torch.device(name)
    native, why = simclr.native_bf16(device)
    if precision != "auto":
        native, why = precision == "bf16", "as asked"
    return device, native, f"{name}, {'bf16' if native else 'float32'} ({why})"


def base_folder(args: argparse.Namespace) -> Path:
    """Where the runs lie; phantoms and scans never mix."""
    return RUNS if args.data else RUNS / "phantoms"


def pretraining_setting(args: argparse.Namespace, name: str, published: int) -> int:
    """A flag's value or, where it was not given, the phantoms' default or the published one."""
    given = getattr(args, name)
    default = published if args.data else PHANTOM_DEFAULTS[name]
    return default if given is None else given


def load_data(args: argparse.Namespace, image_size: int) -> data.Collection:
    """Read --data or the phantoms; say what is there, what cannot be read, and what is suspect."""
    if args.data and RUNS.resolve().is_relative_to(args.data.resolve()):
        raise data.UserError(
            f"results go to {RUNS.resolve()}, which lies inside --data {args.data}, and would be read "
            "as scans next time; start the command from another folder"
        )
    collection = data.load(args.data, image_size, RUNS / "cache", partial(tqdm, leave=False))
    pictures, n = collection.pictures, len(collection.pictures.paths)
    where = args.data or "phantoms, drawn by code (--data takes your own scans)"
    others = f", {collection.other_files:,} other files" if collection.other_files else ""
    print(f"{where}: {n:,} pictures in {collection.groups.max() + 1:,} groups{others}")
    for row, why in pictures.unreadable.items():
        print(f"  left out, unreadable: {pictures.paths[row]!r} ({why})")
    for task in collection.tasks.values():
        if task.notes["largest_group_is_a_chain"]:
            print(
                f"  warning: one group holds {task.notes['largest_group']} of the {len(task.rows):,} "
                f"pictures of {task.name}: near-twins may have linked strangers into a chain"
            )
    return collection


def run_config(args: argparse.Namespace, collection: data.Collection, **values: object) -> dict:
    """config.json: every value that shaped the run, in plain types; checkpoints hold it too."""
    return {
        "command": args.command,
        "data": str(args.data.resolve()) if args.data else None,
        "phantoms": args.data is None,
        "fingerprint": collection.fingerprint(),
        "seed": args.seed,
        **values,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
    }


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with data.write_atomically(path) as file:
        file.write(text.encode("utf8", "surrogateescape"))


def write_json(path: Path, value: dict) -> None:
    """Write JSON that people can read, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_log(path: Path, records: list[dict]) -> None:
    """Write one JSON line for each epoch."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def write_csv(path: Path, header: list[str], rows: list[tuple]) -> None:
    """Write a CSV file, whole or not at all."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_text(path, text.getvalue())


def write_picture(path: Path, image: Image.Image) -> None:
    """Write a PNG, whole or not at all."""
    with data.write_atomically(path) as file:
        image.save(file, "PNG")


# ---------------------------------------------------------------------------------------------
# pretrain
# ---------------------------------------------------------------------------------------------


def pretrain(args: argparse.Namespace) -> None:
    """Learn an encoder from pictures without labels; leaves encoder.pt."""
    out = args.out or base_folder(args) / "pretrain"
    device, bf16, device_text = choose_device(args.device, args.precision)
    image_size = pretraining_setting(args, "image_size", IMAGE_SIZE)
    collection = load_data(args, image_size)
    rows = collection.pretraining_rows()
    settings = pretraining_settings(args, collection, len(rows))
    config = run_config(
        args, collection, arch=args.arch, image_size=image_size, device=device.type,
        precision="bf16" if bf16 else "fp32", pictures=len(rows), leaked=False, **asdict(settings),
    )  # fmt: skip
    torch.manual_seed(args.seed)  # the networks' first weights
    encoder = simclr.ARCHITECTURES[args.arch]()
    projection_head = simclr.ProjectionHead(encoder.feature_dim)
    for network in (encoder, projection_head):
        network.to(device, memory_format=simclr.memory_format(device, bf16))
    optimizer = simclr.adamw(
        encoder, projection_head, lr=settings.lr, weight_decay=settings.weight_decay
    )
    images = torch.from_numpy(collection.pictures.images[rows])[:, None].to(device)  # (n, 1, S, S)
    steps = len(rows) // settings.batch_size
    print(
        f"pretrain {args.arch} on {len(rows):,} pictures at {image_size} px: {settings.epochs} epochs "
        f"of {steps} steps of {settings.batch_size}, on {device_text}"
    )
    write_json(out / "config.json", config)

    def save(epoch: int) -> None:
        seen = torch.from_numpy(collection.pictures.hashes[rows])
        save_pretraining(out, encoder, projection_head, optimizer, epoch, config, seen)

    records, saved = [], time.monotonic()
    with tqdm(total=settings.epochs * steps, unit="step", desc="pretrain") as bar:
        for record in simclr.pretrain(
            images, encoder, projection_head, optimizer, settings, bf16, step_bar(bar, settings)
        ):
            records.append(record)
            write_log(out / "log.jsonl", records)
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                save(record["epoch"])
                saved = time.monotonic()
    save(settings.epochs)
    finish_pretraining(args, out, records, collection)


def pretraining_settings(
    args: argparse.Namespace, collection: data.Collection, n: int
) -> simclr.Pretraining:
    """The settings for n pictures; says what is held out, and when the batch has to shrink."""
    held = len(collection.pictures.paths) - len(collection.pictures.unreadable) - n
    tasks = ", ".join(collection.tasks) or "no task: all of it is unlabelled"
    print(f"  held out of pretraining: {held:,} pictures (the val and test groups of {tasks})")
    if n < 2:
        raise data.UserError(f"{n} pictures are left to pretrain on; contrasting takes at least 2")
    batch_size = pretraining_setting(args, "batch_size", simclr.Pretraining.batch_size)
    if batch_size > n:
        print(f"  the batch shrinks from {batch_size} to the {n} pictures there are")
    return simclr.Pretraining(
        epochs=pretraining_setting(args, "epochs", simclr.Pretraining.epochs),
        batch_size=min(batch_size, n),
        lr=args.lr,
        temperature=args.temperature,
        seed=args.seed,
    )


def step_bar(bar: tqdm, settings: simclr.Pretraining) -> Callable[[int, Tensor], None]:
    """A callback that moves the progress bar by a step and, when it is redrawn, its figures."""

    def on_step(step: int, sums: Tensor) -> None:
        if bar.update():  # True = redrawn; reading the sums makes the device wait, so only then
            loss, accuracy, _ = (sums / step).tolist()
            speed = (bar.format_dict["rate"] or 0) * settings.batch_size
            text = f"loss {loss:.3f}, contrastive accuracy {accuracy:.2f}, {speed:.0f} images/s"
            bar.set_postfix_str(text)

    return on_step


def save_pretraining(
    out: Path,
    encoder: simclr.ResNet,
    projection_head: simclr.ProjectionHead,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    config: dict,
    seen: Tensor,
) -> None:
    """Write checkpoint.pt, all that going on needs, and encoder.pt, all that using it needs."""
    weights = {name: value.cpu().contiguous() for name, value in encoder.state_dict().items()}
    checkpoint = {
        "encoder": weights,
        "projection_head": projection_head.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": epoch,
        "config": config,
    }
    simclr.save(checkpoint, out / "checkpoint.pt")
    exported = {
        "arch": config["arch"],
        "encoder": weights,
        "feature_dim": encoder.feature_dim,
        "image_size": config["image_size"],
        "mean": config["mean"],
        "std": config["std"],
        "epoch": epoch,
        "config": config,
        "seen": seen,
    }
    simclr.save(exported, out / "encoder.pt")


def finish_pretraining(
    args: argparse.Namespace, out: Path, records: list[dict], collection: data.Collection
) -> None:
    """Draw the curve; say what was reached, what was written, and what to type next."""
    panels = {
        "NT-Xent (nats)": {"loss": [r["loss"] for r in records]},
        "contrastive accuracy": {"accuracy": [r["contrastive_accuracy"] for r in records]},
    }
    write_picture(out / "curve.png", evaluate.curve_picture(panels, "Pretraining"))
    if records:
        last = records[-1]
        seconds = sum(r["seconds"] for r in records)
        print(
            f"epoch {last['epoch']}: loss {last['loss']:.3f}, contrastive accuracy "
            f"{last['contrastive_accuracy']:.3f}, {last['images_per_second']:.0f} images/s; "
            f"{seconds / 60:.1f} minutes of training"
        )
    print(f"wrote {out}/: encoder.pt, checkpoint.pt, log.jsonl, curve.png, config.json")
    if collection.tasks:
        task = "tumor" if "tumor" in collection.tasks else min(collection.tasks)
        words = ["python main.py probe", f"--data {args.data}" if args.data else ""]
        words += [f"--task {task}", f"--encoder {out / 'encoder.pt'}" if args.out else ""]
        print("next:", " ".join(word for word in words if word))


# ---------------------------------------------------------------------------------------------
# probe
# ---------------------------------------------------------------------------------------------


def probe(args: argparse.Namespace) -> None:
    """Train the cosine MLP on the frozen encoder, and on the baselines; leaves classifier.pt."""
    out = args.out or base_folder(args) / f"probe-{args.task}"
    device, bf16, device_text = choose_device(args.device, args.precision)
    encoder, checkpoint = simclr.load_encoder(
        args.encoder or base_folder(args) / "pretrain/encoder.pt"
    )
    collection = load_data(args, checkpoint["image_size"])
    task = collection.task(args.task)
    leaked = seen_in_test(checkpoint["seen"], collection, task, args.allow_leak)
    settings = heads.Probing(epochs=args.epochs, seed=args.seed)
    config = run_config(
        args, collection, task=task.name, encoder=str(args.encoder or "pretrain/encoder.pt"),
        pretraining=checkpoint["config"], device=device.type, precision="bf16" if bf16 else "fp32",
        leaked=bool(leaked), **asdict(settings),
    )  # fmt: skip
    counts = ", ".join(f"{len(task.part(p)[0]):,} {p}" for p in ("train", "val", "test"))
    print(f"probe {task.name} ({', '.join(task.classes)}): {counts} pictures, on {device_text}")

    torch.manual_seed(args.seed)
    untrained = simclr.ARCHITECTURES[checkpoint["arch"]]()
    rows, mean, std = task.rows, checkpoint["mean"], checkpoint["std"]
    images = collection.pictures.images[rows]
    pixels = torch.from_numpy(collection.pictures.thumbnails[rows]).flatten(1).float() / 127.5 - 1
    features = {
        "pretrained encoder": simclr.encode(encoder.to(device), images, mean, std, device, bf16),
        "untrained encoder": simclr.encode(untrained.to(device), images, mean, std, device, bf16),
        "raw 32x32 pixels": pixels,
    }
    fits = {name: fit_probe(h, task, settings, name) for name, h in features.items()}
    results = {name: measure(task, probs) for name, (_, _, probs) in fits.items()}
    head, records, probs = fits["pretrained encoder"]
    metrics = {
        "task": task.name,
        "classes": list(task.classes),
        **results["pretrained encoder"],
        "baseline": results["untrained encoder"],
        "raw_pixels": results["raw 32x32 pixels"],
        "split": task.notes,
        "leaked": bool(leaked),
    }
    classifier = checkpoint | {
        "task": task.name,
        "classes": list(task.classes),
        "head": {name: value.cpu() for name, value in head.state_dict().items()},
        "head_type": "cosine_mlp",
        "config": config,
        "seen": torch.cat([checkpoint["seen"], seen_by_head(collection, task)]).unique(dim=0),
    }
    simclr.save(classifier, out / "classifier.pt")
    write_json(out / "config.json", config)
    write_log(out / "log.jsonl", records)
    report = results_text(results, leaked)
    write_results(out, collection, task, metrics, probs, records, report)
    print(report, end="")
    print(f"wrote {out}/: " + ", ".join(sorted(p.name for p in out.iterdir() if p.is_file())))
    others = [name for name in collection.tasks if name != task.name]
    if others:
        data_flag = f"--data {args.data} " if args.data else ""
        print(f"next: python main.py probe {data_flag}--task {others[0]}")


def seen_in_test(
    seen: Tensor, collection: data.Collection, task: data.Task, allowed: bool
) -> list[str]:
    """The test pictures that the encoder was pretrained on, found by hash; must be none.

    Raises:
        UserError: there are some, and --allow-leak was not given.
    """
    known = {row.numpy().tobytes() for row in seen}
    rows, _, _ = task.part("test")
    hashes = collection.pictures.hashes
    leaked = [collection.pictures.paths[r] for r in rows if hashes[r].tobytes() in known]
    if leaked and not allowed:
        raise data.UserError(
            f"the encoder was pretrained on {len(leaked)} of the {len(rows)} test pictures of {task.name}, "
            f"the first {leaked[0]!r}; pretrain on this --data folder as a whole, which holds them out, "
            "or give --allow-leak to see the number that is not to be believed"
        )
    return leaked


def seen_by_head(collection: data.Collection, task: data.Task) -> Tensor:
    """(n, 16) uint8 hashes of the pictures the head was trained and chosen on."""
    used = np.isin(task.split, ("train", "val"))
    return torch.from_numpy(collection.pictures.hashes[task.rows[used]])


def fit_probe(
    h: Tensor, task: data.Task, settings: heads.Probing, name: str
) -> tuple[heads.CosineMLP, list[dict], np.ndarray]:
    """Train one head on features h (n, E) of the task's pictures.

    Returns:
        (the head, one record an epoch, the test part's probabilities (N, K) float64)
    """
    labels = torch.from_numpy(task.labels)
    part = {p: torch.from_numpy(task.split == p) for p in ("train", "val", "test")}
    torch.manual_seed(settings.seed)
    head = heads.CosineMLP(h.shape[1], len(task.classes))
    train, val = ((h[part[p]], labels[part[p]]) for p in ("train", "val"))
    epochs = heads.train_probe(head, train, val, settings)
    records = list(tqdm(epochs, f"head on {name}", settings.epochs, unit="epoch", leave=False))
    return head, records, heads.probabilities(head, h[part["test"]]).numpy()


def measure(task: data.Task, probs: np.ndarray) -> dict:
    """The metrics of the test part's probabilities (N, K), with their intervals."""
    _, labels, groups = task.part("test")
    return {
        **evaluate.classification_metrics(labels, probs, task.classes),
        "n_groups": len(np.unique(groups)),
        "ci95": evaluate.group_bootstrap(labels, probs, groups),
    }


def results_text(results: dict[str, dict], leaked: list[str]) -> str:
    """report.txt: the classification report, and a row with intervals for each representation."""
    first = next(iter(results.values()))
    lines = [evaluate.classification_report(first)]
    columns = ("accuracy", "balanced_accuracy", "macro_f1", "auroc")
    lines.append(f"{'':20}" + "".join(f"{c.replace('_', ' '):>21}" for c in columns))
    for name, result in results.items():
        cells = []
        for c in columns:
            value, interval = result[c], result["ci95"][c]
            text = "n/a" if value is None else f"{value:.3f}"
            text += f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
            cells.append(f"{text:>21}")
        lines.append(f"{name:20}" + "".join(cells))
    lines.append(
        f"test part: {first['n']:,} pictures of {first['n_groups']:,} groups; "
        "95 % intervals from resampling groups"
    )
    if leaked:
        lines.append(leak_caption(leaked))
    return "\n".join(lines) + "\n"


def leak_caption(leaked: list[str]) -> str:
    """The warning that every output of a leaked result carries; '' for an honest one."""
    return f"LEAKED: the encoder has seen {len(leaked)} of the test pictures" if leaked else ""


def write_results(
    out: Path,
    collection: data.Collection,
    task: data.Task,
    metrics: dict,
    probs: np.ndarray,
    records: list[dict],
    report: str,
) -> None:
    """Write metrics.json, report.txt, splits.csv, predictions.csv, confusion.png and curve.png."""
    write_json(out / "metrics.json", metrics)
    write_text(out / "report.txt", report)
    header = ["path", "label", "group", "split", "pixel_hash"]
    write_csv(out / "splits.csv", header, collection.split_table(task))
    rows, labels, groups = task.part("test")
    predictions = [
        (collection.pictures.paths[r], g, task.classes[k], task.classes[p.argmax()])
        + tuple(f"{value:.9g}" for value in p)
        for r, k, g, p in zip(rows, labels, groups, probs, strict=True)
    ]
    header = ["path", "group", "label", "prediction", *(f"p_{c}" for c in task.classes)]
    write_csv(out / "predictions.csv", header, predictions)
    caption = report.splitlines()[-1] if metrics["leaked"] else ""
    title = f"{task.name}, test part: accuracy {metrics['accuracy']:.3f}"
    picture = evaluate.confusion_picture(metrics["confusion_matrix"], task.classes, title, caption)
    write_picture(out / "confusion.png", picture)
    panels = {
        "cross-entropy (nats)": {
            "train": [r["train_loss"] for r in records],
            "val": [r["val_loss"] for r in records if r["val_loss"] is not None],
        },
        "val accuracy": {"val": [r["val_accuracy"] for r in records if r["val_loss"] is not None]},
    }
    write_picture(out / "curve.png", evaluate.curve_picture(panels, f"Probe, {task.name}", caption))


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Reports a mistyped command as every other mistake is reported: one line, exit status 2."""

    def error(self, message: str) -> None:
        """Raise instead of printing the usage."""
        raise data.UserError(f"{message}; see python {self.prog} --help")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Prints the default behind each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def at_least(low: int) -> Callable[[str], int]:
    """An argparse type: a whole number not below `low`."""

    def whole_number(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is too small, the least is {low}")
        return int(text)

    return whole_number


def positive(text: str) -> float:
    """An argparse type: a number above 0."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)


def build_parser() -> Parser:
    """One parser, one subcommand a stage; flags that commands share are declared once."""
    parser = Parser(
        prog="main.py", description="SimCLR for brain scans, by hand, in plain PyTorch."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    shared = Parser(add_help=False)
    group = shared.add_argument_group("data and output")
    group.add_argument(
        "--data", type=Path, help="folder of scans, <task>/<class>/… below it; without it, phantoms"
    )
    group.add_argument("--out", type=Path, help="folder of this run; default: below runs/")
    group = shared.add_argument_group("machine")
    group.add_argument(
        "--seed", type=at_least(0), default=0,
        help="moves first weights, order, views and dropout, never the split",
    )  # fmt: skip
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
        help="auto takes CUDA, then Apple's MPS, then the CPU",
    )  # fmt: skip
    group.add_argument(
        "--precision", choices=("auto", "bf16", "fp32"), default="auto",
        help="auto takes bf16 where the machine computes it natively; the loss is float32 always",
    )  # fmt: skip

    def command(run: Callable, held_out: str) -> Parser:
        summary = run.__doc__.splitlines()[0]
        sub = commands.add_parser(
            run.__name__, parents=[shared], help=summary, formatter_class=HelpFormatter,
            description=f"{summary} Held out: {held_out}",
        )  # fmt: skip
        sub.set_defaults(run=run)
        return sub

    sub = command(pretrain, "the val and test groups of every task below --data.")
    group = sub.add_argument_group("model and optimisation")

    def sized(flag: str, published: int, low: int, text: str) -> None:
        phantoms = PHANTOM_DEFAULTS[flag[2:].replace("-", "_")]
        text += f" (default: {published}; on phantoms {phantoms})"
        group.add_argument(flag, type=at_least(low), help=text)

    group.add_argument(
        "--arch", choices=tuple(simclr.ARCHITECTURES), default="resnet18",
        help="encoder; resnet50 costs about three times as much a step",
    )  # fmt: skip
    sized("--image-size", IMAGE_SIZE, 32, "side of the square pictures, in pixels")
    sized("--batch-size", simclr.Pretraining.batch_size, 2,
          "slices a step; more give more negatives and take more memory")  # fmt: skip
    sized("--epochs", simclr.Pretraining.epochs, 0,
          "passes over the pictures; 0 leaves the untrained network")  # fmt: skip
    group.add_argument(
        "--lr", type=positive, default=simclr.Pretraining.lr,
        help="learning rate at the start; halve it if the loss turns NaN",
    )  # fmt: skip
    group.add_argument(
        "--temperature", type=positive, default=simclr.Pretraining.temperature,
        help="softmax scale of NT-Xent in cosine units; lower stresses the hardest negatives",
    )  # fmt: skip

    sub = command(probe, "the test part of the task, opened once; val chooses the epoch.")
    group = sub.add_argument_group("model and optimisation")
    group.add_argument("--task", required=True, help="folder below --data, such as tumor")
    group.add_argument("--encoder", type=Path, help="default: pretrain/encoder.pt among the runs")
    group.add_argument(
        "--epochs", type=at_least(0), default=heads.Probing.epochs,
        help="passes of the head over the features",
    )  # fmt: skip
    group.add_argument(
        "--allow-leak", action="store_true",
        help="go on although the encoder has seen test pictures; every output then says so",
    )  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status is 0, or 2 for a mistake that one line on stderr explains."""
    try:
        args = build_parser().parse_args(argv)
        args.run(args)
    except data.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
