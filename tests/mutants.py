"""Plant small faults, one by one, and see that each turns a test red.

    python tests/mutants.py [WORD ...]    # those alone whose module or description holds a word

A test that nothing can fail proves nothing. Each fault in tests/mutants.txt is a change to a copy
of the code, on which the named tests have to fail. Before that they run without any fault, and have
to pass: a fault "found" by a test that is red anyway is not found. `.ci/run` runs this.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent.parent


class Fault(NamedTuple):
    """`old`, which stands in a module once, becomes `new`."""

    module: str
    named: str  # tests of tests/test_<module>.py, as pytest's -k takes them
    what: str
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
        assert (HERE / f"{module}.py").read_text().count(old) == 1, f"not there once: {what}"
        faults.append(Fault(module, named, what, old, new))
    return faults


def run_tests(fault: Fault) -> tuple[int, str]:
    """Run a fault's tests on a copy of the code that has it; pytest's status, and its output."""
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(HERE / "tests", f"{place}/tests", ignore=shutil.ignore_patterns("__py*"))
        for file in HERE.glob("*.py"):
            shutil.copy(file, place)
        module = Path(place, f"{fault.module}.py")
        module.write_text(module.read_text().replace(fault.old, fault.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += [f"tests/test_{fault.module}.py", "-k", fault.named]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr


def main() -> None:
    """Plant the faults; status 1 if one was not found."""
    faults, named = [], {}
    for fault in read_faults():
        if not sys.argv[1:] or any(word in f"{fault.module} {fault.what}" for word in sys.argv[1:]):
            faults.append(fault)
            named.setdefault(fault.module, []).append(fault.named)
    unchanged = [Fault(module, " or ".join(names), "") for module, names in named.items()]
    missed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for status, output in pool.map(run_tests, unchanged):
            if status:
                sys.exit(f"{output}\ntests are red without any fault: they find nothing")
        for fault, (status, output) in zip(faults, pool.map(run_tests, faults), strict=True):
            found = status == 1  # tests failed; all else: they passed, or did not run
            missed += not found
            print(f"{'red' if found else f'NOT RED, {output}'}: {fault.what}", flush=True)
    sys.exit(f"{missed} of {len(faults)} faults were not found" if missed else 0)


if __name__ == "__main__":
    main()
