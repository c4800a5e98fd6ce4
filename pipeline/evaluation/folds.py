"""Cross-validation on the cached training samples: how well settings do on samples that they were not trained on.

The training samples are split into folds of nearly equal size, each class spread evenly over them. The classifiers are
trained once for each fold, on the samples of all others, from cached rows; no image is decoded. Each sample is scored
by the classifiers that were not trained on it, and all samples together give one accuracy for a setting.

The folds depend on the training samples and their labels alone, so all hosts share them. The only sample of a class is
never held out, and its class is left out of the accuracy. A smaller class than there are folds is missing among the
held-out samples of some folds, but never from the training samples.

Training rows are cached under the statistics that training reads. A held-out sample is scored under the same ones, by
the mean of its logits if there are several, as with `branchwise`: its test images see a mixture of them.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from h2t.cache.reader import Cache
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.seeds import stream
from h2t.pipeline.evaluation import temperature
from h2t.pipeline.evaluation.metrics import per_class_accuracy
from h2t.pipeline.evaluation.scoring import head_logits
from h2t.pipeline.heads.batches import SampleRows, sample_rows
from h2t.pipeline.heads.stored import Heads

FOLDS = "folds.parquet"
BLOCK = 2**24  # most logits that are computed at once


@dataclass(frozen=True)
class Folds:
    """What `cross_validate` found: accuracy (percent) and temperature by the number of a head; `folds` and `left_out`
    as in the metadata of its table.
    """

    folds: int
    left_out: list[int]
    accuracy: dict[int, float]
    temperature: dict[int, float]

    def of(self, heads: Heads, numbers: Sequence[int]) -> list[float]:
        """The temperatures of the heads `numbers`: those of heads of the same settings, whatever their seed."""
        settings = [tuple(v for k, v in h.items() if k not in ("number", "seed")) for h in heads.table.to_pylist()]
        known = {settings[number]: t for number, t in self.temperature.items()}
        return [known[settings[number]] for number in numbers]


def load_folds(folder: Path) -> Folds | None:
    """What train-classifier found in cross-validation and wrote into `folder`; None if it made none.

    Raises UserError for a file that cannot be read.
    """
    path = folder / FOLDS
    if not path.exists():
        return None
    try:
        table = pq.ParquetFile(path).read()
        about = json.loads(table.schema.metadata[b"h2t"])
        number, accuracy, found = (table[k].to_pylist() for k in ("number", "accuracy", "temperature"))
        by_number = (dict(zip(number, values, strict=True)) for values in (accuracy, found))
        return Folds(int(about["folds"]), list(about["left_out"]), *by_number)
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: unreadable ({error}); run h2t train-classifier again") from None


TrainOn = Callable[[pa.Table, int], Heads]


def folds_of(samples: SampleRows, folds: int) -> np.ndarray:
    """The fold of each sample, int64 (n,); -1 for the only sample of its class, which is never held out."""
    shuffled = stream(0, "folds").permutation(len(samples.labels))
    # Dealt out like cards, class by class: the folds of a class, and of all samples, differ by one sample at most.
    order = np.lexsort((shuffled, samples.labels))
    fold = np.empty(len(order), np.int64)
    fold[order] = np.arange(len(order)) % folds
    return np.where(np.bincount(samples.labels)[samples.labels] > 1, fold, -1)


def cross_validate(
    cache: Cache,
    statistics: Sequence[str],
    folds: int,
    numbers: Sequence[int],
    train_on: TrainOn,
    device: torch.device,
) -> pa.Table:
    """The table `folds.parquet`: a line for each of `numbers`, the heads whose settings are tried.

    `train_on(rows, fold)` trains heads with these settings, in this order, on the training samples in `rows`. Held-out
    samples are read under each of `statistics`. Columns: `number`; `accuracy`, the mean over classes of the accuracy
    on held-out samples, in percent; `temperature`, which minimises their cross-entropy, where classes have equal
    weight. The metadata has `folds`, and `left_out`, the classes with one sample. Raises UserError if every class has
    one sample.
    """
    under = [sample_rows(cache.index, "train", kind) for kind in statistics]
    samples, labels = under[0].samples, under[0].labels
    fold = folds_of(under[0], folds)
    counts = np.bincount(labels)
    if not (fold >= 0).any():
        raise UserError(
            f"{cache.files}: cross-validation needs a class with two training samples; every class has one; "
            "remove the key folds"
        )
    guesses = np.full((len(numbers), len(labels)), -1, np.int64)
    fitted_on = temperature.spread(np.flatnonzero(fold >= 0), len(numbers) * len(counts))
    kept = torch.empty(len(numbers), len(fitted_on), len(counts))
    for number in range(folds):
        held = np.flatnonzero(fold == number)
        if not len(held):
            continue
        rows = cache.rows.filter(pa.array(~np.isin(cache.rows["sample"].to_numpy(), samples[held])))
        heads = train_on(rows, number)
        size = max(1, BLOCK // (len(numbers) * len(counts)))
        for part in (held[first : first + size] for first in range(0, len(held), size)):
            each = [head_logits(cache, heads, table.first[part], device) for table in under]
            logits = torch.stack(each).mean(0)  # (heads, n, K)
            guesses[:, part] = logits.argmax(-1).numpy()
            here = np.isin(part, fitted_on)
            kept[:, np.searchsorted(fitted_on, part[here])] = logits[:, here]
    scored = fold >= 0
    accuracy = [np.nanmean(per_class_accuracy(labels[scored], g[scored], len(counts))) for g in guesses]
    weights = 1 / counts[labels[fitted_on]]
    table = pa.table(
        {
            "number": pa.array(numbers, pa.int64()),
            "accuracy": pa.array(accuracy, pa.float64()),
            "temperature": [temperature.fit(k, labels[fitted_on], weights) for k in kept],
        }
    )
    about = {"folds": folds, "left_out": np.flatnonzero(counts == 1).tolist()}
    return table.replace_schema_metadata({"h2t": json.dumps(about)})
