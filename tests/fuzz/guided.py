"""One target under Atheris: libFuzzer chooses what to mutate by the lines of `cache/` and `pipeline/` that it reached.

    python tests/fuzz/guided.py NAME [libFuzzer's options] [corpus]

Ends at the first finding, and says the input. Atheris is in the dependency group `fuzz`; `campaign.py` calls this.
"""

import sys
from pathlib import Path
from random import Random

import atheris

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
BYTES_SHARE = 0.05  # of the mutations are libFuzzer's own


def main() -> None:
    """Fuzzes; does not return."""
    name = sys.argv.pop(1)
    with atheris.instrument_imports(include=["cache", "pipeline"], enable_loader_override=False):
        from fuzz.oracle import Watch, judge, limit_memory, workplace
        from fuzz.targets import TARGETS

    target = TARGETS[name]
    with workplace() as folder:
        parse = target.open(folder)
        watch = Watch(folder)
        for seed in target.seeds():  # imports that wait for their first use are no findings
            judge(parse, seed[: target.max_bytes], watch)
        limit_memory()

        def mutated(data: bytes, max_size: int, seed: int) -> bytes:
            random = Random(seed)
            if random.random() < BYTES_SHARE:
                return bytes(atheris.Mutate(data, max_size))
            return target.mutate(data, random)[:max_size]

        # Absolute: the process works elsewhere.
        options = [a if a.startswith("-") else str(Path(a)) for a in sys.argv[1:]]
        atheris.Setup(
            [sys.argv[0], f"-max_len={target.max_bytes}", *options],
            lambda data: judge(parse, data, watch) and 0,
            custom_mutator=mutated,
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
