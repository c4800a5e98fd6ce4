"""Targets without coverage guidance: seeded mutations of valid inputs and of what was accepted. The tests run this.

python tests/fuzz/quick.py record=2000 urls=500 [--seed 3]
python tests/fuzz/quick.py record --input FILE
"""

import argparse
import sys
import time
from pathlib import Path
from random import Random

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]

from fuzz.oracle import Finding, Watch, judge, limit_memory, workplace
from fuzz.target import Target
from fuzz.targets import TARGETS

KEEP = 200


def once(target: Target, data: bytes) -> bool:
    """Whether `data` gives a value."""
    with workplace() as folder:
        return judge(target.open(folder), data, Watch(folder))


def run(target: Target, executions: int, seed: int) -> tuple[int, int]:
    """(values, refusals) of seeded executions. Raises Finding with the input that shows it."""
    random = Random(f"{target.name} {seed}")
    values = 0
    with workplace() as folder:
        parse = target.open(folder)
        watch = Watch(folder)
        seeds = target.seeds()
        for data in seeds:  # imports that wait for their first use are no findings
            judge(parse, data[: target.max_bytes], watch)
        pool = list(seeds)
        for number in range(executions):
            data = seeds[number] if number < len(seeds) else target.mutate(random.choice(pool), random)
            data = data[: target.max_bytes]
            try:
                good = judge(parse, data, watch)
            except Exception as error:
                raise Finding(f"{target.name}: {type(error).__name__}: {str(error)[:300]}; input: {data!r}") from error
            values += good
            if good or random.random() < 0.02:
                if len(pool) >= KEEP:
                    pool[random.randrange(KEEP)] = data
                else:
                    pool.append(data)
    return values, executions - values


def main() -> None:
    """Runs each target named, or one input; a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("targets", nargs="+", metavar="NAME[=EXECUTIONS]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--input", type=Path)
    given = parser.parse_args()
    limit_memory()
    for text in given.targets:
        name, _, count = text.partition("=")
        if given.input:
            print(name, "value" if once(TARGETS[name], given.input.read_bytes()) else "refused")  # noqa: T201
            continue
        started = time.process_time()
        values, refusals = run(TARGETS[name], int(count or 2000), given.seed)
        cost = (time.process_time() - started) / (values + refusals) * 1e6
        print(f"{name} {values} {refusals} {cost:.0f}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
