"""Plant small faults, one by one, and see that each turns a test red.

    python tests/mutants.py

A test that nothing can fail proves nothing. Each fault below is a change of a line or two to a copy
of the code, on which the named tests have to fail. First they run on the code as it is: what is red
there anyway can find nothing, and is a failure. `.ci/run` runs this after the suite.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# Imported before the processes part, so that each of them starts in no time.
import numpy  # noqa: F401
import pytest
import torch  # noqa: F401

HERE = Path(__file__).parent.parent


class Fault(NamedTuple):
    """One planted fault."""

    what: str
    file: str
    old: str  # stands in the file once
    new: str
    test: str  # tests/test_<test>.py
    named: str  # tests of that file, as pytest's -k takes them


FAULTS = [
    Fault(
        "self-mask dropped",
        "simclr.py",
        "logits = logits.masked_fill(itself, -torch.inf)",
        "pass",
        "simclr",
        "xent",
    ),
    Fault(
        "positives shifted by one",
        "simclr.py",
        "device=z.device).roll(N)  # (2N,), [N..2N-1, 0..N-1]",
        "device=z.device).roll(N + 1)",
        "simclr",
        "xent",
    ),
    Fault(
        "temperature forgotten",
        "simclr.py",
        "logits = z @ z.T / temperature",
        "logits = z @ z.T",
        "simclr",
        "xent",
    ),
    Fault(
        "bf16 logits",
        "simclr.py",
        "with torch.autocast(z_a.device.type, enabled=False):  # inside",
        "with torch.autocast(z_a.device.type, torch.bfloat16):  # inside",
        "simclr",
        "xent",
    ),
    Fault(
        "a group cut in two",
        "heads.py",
        'split[free & np.isin(local, mine[:n_test])] = "test"',
        'split[np.flatnonzero(free & np.isin(local, mine[:n_test]))[1:]] = "test"',
        "data",
        "split or group",
    ),
    Fault(
        "mirrors ignored",
        "data.py",
        "torch.maximum(straight, mirror) >= least",
        "straight >= least",
        "data",
        "twin or mirror",
    ),
    Fault(
        "the probed encoder left in train mode",
        "heads.py",
        ".to(device, memory_format=layout).eval()",
        ".to(device, memory_format=layout).train()",
        "heads",
        "features or probe",
    ),
    Fault(
        "ReLU skipped in Grad-CAM",
        "gradcam.py",
        "self.raw = raw.relu()",
        "self.raw = raw",
        "gradcam",
        "cam or alpha",
    ),
    Fault(
        "a map half a place to the lower right",
        "gradcam.py",
        "(p / stride).clamp(0, n - 1)",
        "((p + 0.5) / stride - 0.5).clamp(0, n - 1)",
        "gradcam",
        "enlarging",
    ),
    Fault(
        "fine maps moved back the wrong way",
        "gradcam.py",
        "cam.stride, (down, right)) / 4",
        "cam.stride, (-down, -right)) / 4",
        "gradcam",
        "fine_maps",
    ),
    Fault(
        "a random order taken for the map's",
        "gradcam.py",
        "hottest = deletion(cam.model, images, maps, classes)",
        "hottest = deletion(cam.model, images, chance[0], classes)",
        "gradcam",
        "explain_measures",
    ),
    Fault(
        "confusion matrix transposed",
        "evaluate.py",
        "np.bincount(labels * num_classes + preds,",
        "np.bincount(preds * num_classes + labels,",
        "evaluate",
        "confusion",
    ),
    Fault(
        "intervals resampled by picture",
        "evaluate.py",
        "_, member = np.unique(groups, return_inverse=True)",
        "member = np.arange(len(groups))",
        "evaluate",
        "interval",
    ),
    Fault(
        "learning-rate milestone off by one",
        "heads.py",
        "((epoch - 1) * 10 >= epochs * 6)",
        "(epoch * 10 >= epochs * 6)",
        "heads",
        "milestones",
    ),
    Fault(
        "resume without the optimiser",
        "simclr.py",
        '            self.optimizer.load_state_dict(state["optimizer"])\n',
        "",
        "simclr",
        "restored",
    ),
    Fault(
        "a no-grad gather",
        "simclr.py",
        "    parts[rank] = z\n",
        "",
        "simclr",
        "two_processes",
    ),
    Fault(
        "the best epoch chosen on the test part",
        "main.py",
        'for part in ("train", "val")]',
        'for part in ("train", "test")]',
        "main",
        "finetune_writes",
    ),
    Fault(
        "a spoilt step taken",
        "simclr.py",
        "if not numbers.isfinite().all():",
        "if False:",
        "robust",
        "bursts and pretrain",
    ),
    Fault(
        "a checkpoint's sums not checked",
        "simclr.py",
        "if damaged := parts.testzip():",
        "if damaged := None:",
        "robust",
        "flipped",
    ),
    Fault(
        "a checkpoint unpickled",
        "simclr.py",
        'torch.load(path, map_location="cpu", weights_only=True)',
        'torch.load(path, map_location="cpu", weights_only=False)',
        "robust",
        "spoilt and code",
    ),
    Fault(
        "a file written in its place",
        "data.py",
        'beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")',
        "beside = path",
        "robust",
        "failing_write",
    ),
    Fault(
        "a carriage return ends a row of a table",
        "evaluate.py",
        'quoted if "\\r" in',
        'quoted if "\\0" in',
        "robust",
        "names_that",
    ),
    Fault(
        "a name not escaped in the page",
        "gradcam.py",
        "path, name = escape(shown.paths[i]),",
        "path, name = shown.paths[i],",
        "gradcam",
        "escapes",
    ),
]


def run(fault: Fault, planted: bool) -> int:
    """Run a fault's tests in a process of its own, on a copy of the code; pytest's exit status.

    Args:
        planted: the copy has the fault; else it is like the code.
    """
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 99
    try:
        with tempfile.TemporaryDirectory() as place, open(os.devnull, "w") as nothing:
            copy = Path(place) / "copy"
            shutil.copytree(HERE / "tests", copy / "tests")
            for module in HERE.glob("*.py"):
                shutil.copy(module, copy)
            text = (copy / fault.file).read_text()
            if planted and text.count(fault.old) != 1:
                status = 98
            else:
                if planted:
                    (copy / fault.file).write_text(text.replace(fault.old, fault.new))
                os.chdir(copy)
                os.dup2(nothing.fileno(), 1)
                os.dup2(nothing.fileno(), 2)
                asked = [f"tests/test_{fault.test}.py", "-k", fault.named]
                status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *asked])
    finally:
        os._exit(int(status))


def plant(faults: list[Fault]) -> int:
    """Plant faults one after the other, and print what became of each; how many were not found."""
    missed = 0
    for fault in faults:
        status = run(fault, planted=True)
        missed += status != 1  # 1: tests failed; all else: they passed, or did not even run
        verdict = "found" if status == 1 else f"NOT FOUND (pytest's status {status})"
        print(f"{fault.what:42} {verdict}", flush=True)
    return missed


def try_without(faults: list[Fault]) -> int:
    """Run the faults' tests on the code as it is, and print which are red; how many are."""
    red = 0
    for fault in faults:
        if status := run(fault, planted=False):
            red += 1
            tests = f"tests/test_{fault.test}.py -k {fault.named!r}"
            print(f"{tests}: RED WITHOUT A FAULT (pytest's status {status})", flush=True)
    return red


def on_every_core(work: Callable[[list[Fault]], int], faults: list[Fault]) -> int:
    """Share faults out to processes; the sum of what they count."""
    cores, workers = os.cpu_count() or 1, []
    for k in range(cores):
        workers.append(os.fork())
        if not workers[-1]:
            os._exit(work(faults[k::cores]))
    return sum(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers)


def main() -> int:
    """Plant all faults, or those whose names hold a given word; status 1 if one was not found."""
    words = sys.argv[1:]
    chosen = [f for f in FAULTS if not words or any(word in f.what for word in words)]
    if red := on_every_core(try_without, list({(f.test, f.named): f for f in chosen}.values())):
        print(f"{red} of the tests that should find faults are red without any")
        return 1
    missed = on_every_core(plant, chosen)
    print(f"{missed} of {len(chosen)} faults were not found")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
