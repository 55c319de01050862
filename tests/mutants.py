"""Plant small faults, one by one, and see that each turns a test red.

    python tests/mutants.py [WORD ...]

A test that nothing can fail proves nothing. Each fault in tests/mutants.txt is a change to a copy
of the code, on which the named tests have to fail. Before that they run without any fault, and have
to pass: a fault "found" by a test that is red anyway is not found. `.ci/run` runs this.
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
    """`old`, which stands in a module once, becomes `new`."""

    what: str
    module: str
    named: str  # tests of tests/test_<module>.py, as pytest's -k takes them
    old: str = ""
    new: str = ""


def read_faults() -> list[Fault]:
    """A fault is a paragraph: module, tests, what it is; lines with - that become those with +."""
    faults = []
    for paragraph in (HERE / "tests/mutants.txt").read_text().strip().split("\n\n"):
        title, *changes = paragraph.split("\n")
        module, named, what = title.split(": ")
        old = "\n".join(line[2:] for line in changes if line[0] == "-")
        new = "\n".join(line[2:] for line in changes if line[0] == "+")
        faults.append(Fault(what, module, named, old, new))
    return faults


def in_a_process(work: Callable[..., int], *arguments: object) -> int:
    """Begin some work in a process of its own; its status is what the work returns."""
    pid = os.fork()
    if not pid:
        status = 99
        try:
            status = work(*arguments)
        finally:
            os._exit(status)
    return pid


def status_of(pid: int) -> int:
    """Wait for a process."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test(fault: Fault, place: str, output: str) -> int:
    """Run a fault's tests on a copy of the code that has it; pytest's exit status."""
    for file in [*HERE.glob("*.py"), *HERE.glob("tests/*.py")]:
        copy = Path(place, file.relative_to(HERE))
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(file, copy)
    os.chdir(place)
    module = Path(f"{fault.module}.py")
    if fault.old:
        text = module.read_text()
        if text.count(fault.old) != 1:
            return 98
        module.write_text(text.replace(fault.old, fault.new))
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    names = [f"tests/test_{fault.module}.py", "-k", fault.named]
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *names]))


def plant(faults: list[Fault]) -> int:
    """Test faults one after the other, and print what became of each; how many were not found."""
    missed = 0
    for fault in faults:
        with tempfile.TemporaryDirectory() as place:
            output = Path(place, "output")
            status = status_of(in_a_process(test, fault, place, str(output)))
            expected = 1 if fault.old else 0  # 1: tests failed; all else: passed, or did not run
            missed += status != expected
            verdict = "as it has to be" if status == expected else f"NOT SO: status {status}"
            print(f"{'red' if fault.old else 'green'}, {verdict}: {fault.what}", flush=True)
            if status and not fault.old:
                print(output.read_text())
    return missed


def share(faults: list[Fault]) -> int:
    """Test faults on all cores; how many were not found."""
    cores = os.cpu_count() or 1
    workers = [in_a_process(plant, faults[k::cores]) for k in range(cores)]
    return sum([status_of(pid) for pid in workers])


def main() -> int:
    """Plant all faults, or those whose names hold a given word; status 1 if one was not found."""
    words = sys.argv[1:]
    faults = [f for f in read_faults() if not words or any(word in f.what for word in words)]
    named = {}
    for fault in faults:
        named.setdefault(fault.module, []).append(fault.named)
    unchanged = [Fault(f"{module}.py", module, " or ".join(n)) for module, n in named.items()]
    if share(unchanged):
        sys.exit("tests are red without any fault: they find nothing")
    missed = share(faults)
    print(f"{missed} of {len(faults)} faults were not found")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
