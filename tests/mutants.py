"""How many mistakes do the tests notice?  make mutants [SAMPLE=300] [MUTANTS="losses.*"]

A mutant is a program with one small change in one function, which mutmut makes. Here they all live in one process:
every function is beside its mutants, and a name says which of them is called. The tests run once as they are, so that
it is known which of them call a function and how long they take. Then each mutant gets a fork of this process, where
the tests of its function run, quickest first, until one fails. Mutants come in a random order that is always the same:
those that were tried so far are a fair sample at any time.
"""

import argparse
import difflib
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import time
from collections import defaultdict
from fnmatch import fnmatch
from itertools import zip_longest
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest
from _pytest.runner import runtestprotocol
from mutmut import configuration
from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.mutation.trampoline import set_mutant_under_test
from mutmut.state import state

MUTATED = ("datasets.geometry", "dimaskdino", "losses", "util.weights")  # those that others import first
TESTS = ["test_dimaskdino.py", *(f"tests/test_{name.split('.')[-1]}.py" for name in MUTATED if name != "dimaskdino")]
LEFT_OUT = "not (test_the_model_compiles or test_the_model_exports)"  # mutmut's switch is in the way of graphs
MEMORY = 16 * 2**30  # bytes that a mutant may ask for


def load(name):
    """A module with all its mutants: {name: diff}."""
    path = Path(name.replace(".", "/")).with_suffix(".py")
    mutated = mutate_file_contents(str(path), path.read_text())
    sys.modules[name] = ModuleType(name)
    exec(compile(mutated.code, str(path), "exec"), vars(sys.modules[name]))
    lines, spans = re.sub(r"__mutmut_\w+", "", mutated.code).splitlines(), mutated.line_span_by_function_name
    diffs = {}
    for mutant in mutated.mutant_names:
        function = mutant.partition("__mutmut_")[0]
        a, b = (lines[spans[x].start - 1 : spans[x].end] for x in (f"{function}__mutmut_orig", mutant))
        diffs[f"{name}.{mutant}"] = [x for x in difflib.ndiff(a, b) if x[0] in "-+"]
    return diffs


def plain(mutant):
    """losses.Denoising.to.1 for the first mutant of losses.Denoising.to"""
    return re.sub(r"\.xǁ|\.x_|ǁ|__mutmut_", ".", mutant)


class Mutants:
    """The pytest plugin that runs mutants in place of tests."""

    def __init__(self, diffs, names, out):
        self.diffs, self.names, self.out = diffs, names, out
        self.tests, self.seconds = defaultdict(list), {}
        self.running = multiprocessing.Value("i", lock=False)

    def pytest_runtestloop(self, session):
        self.learn(session.items)
        if test := self.catch("nothing"):
            pytest.exit(f"{test} fails in a fork without any change", 1)
        caught = 0
        for i, name in enumerate(self.names, 1):
            begin = time.perf_counter()
            test = self.catch(name)
            caught += test is not None
            print(f"{i} {time.perf_counter() - begin:.1f} s {plain(name)} {test or 'SURVIVES'}", file=self.out)
            if not test:
                print(*self.diffs[name], sep="\n", file=self.out)
        print(f"{caught} of {len(self.names)} were caught, {caught / len(self.names):.1%}", file=self.out)
        return True

    def learn(self, items):
        """Which tests call a function, and their seconds."""
        set_mutant_under_test("stats")
        for item in items:
            begin = time.perf_counter()
            if any(report.failed for report in runtestprotocol(item, log=False)):
                pytest.exit(f"{item.nodeid} fails without any change", 1)
            self.seconds[item] = time.perf_counter() - begin
            for function in (*state()._stats, "nothing"):
                self.tests[function].append(item)
            state()._stats.clear()
        print(f"{len(self.diffs)} mutants; {len(items)} tests take {sum(self.seconds.values()):.0f} s", file=self.out)

    def catch(self, name):
        """The test that notices a mutant, or None."""
        tests = sorted(self.tests[name.partition("__mutmut_")[0]], key=self.seconds.get)
        if not (child := os.fork()):
            try:
                set_mutant_under_test(name)
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
                for self.running.value, (test, following) in enumerate(zip_longest(tests, tests[1:])):
                    signal.alarm(round(20 + 10 * self.seconds[test]))  # which kills: a mutant may never end
                    if any(report.failed for report in runtestprotocol(test, nextitem=following, log=False)):
                        os._exit(1)
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        killed = f" (killed by signal {-code})" if code < 0 else ""
        return tests[self.running.value].nodeid + killed if code else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("patterns", nargs="*", default=["*"], help='such as "losses.*", default: all')
    parser.add_argument("--sample", type=int, help="how many of them, default: all")
    args = parser.parse_args()
    configuration._guess_source_paths = lambda: ["."]  # mutmut's own program has a file for this setting
    # Without looking for the smallest example, and with the same examples each time.
    generate = hypothesis.Phase.explicit, hypothesis.Phase.generate
    hypothesis.settings.register_profile("mutants", phases=generate, derandomize=True, database=None)
    hypothesis.settings.load_profile("mutants")
    diffs = {name: diff for module in MUTATED for name, diff in load(module).items()}
    names = [name for name in diffs if any(fnmatch(plain(name), pattern) for pattern in args.patterns)]
    if not names:
        parser.error(f"no mutant is called {' or '.join(args.patterns)}, as losses.Denoising.to.1 is")
    random.Random(0).shuffle(names)
    with os.fdopen(os.dup(1), "w", buffering=1) as out:
        plugin = Mutants(diffs, names[: args.sample], out)
        sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--disable-warnings", "-k", LEFT_OUT, *TESTS], [plugin]))


if __name__ == "__main__":
    main()
