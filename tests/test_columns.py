import subprocess
import sys

import pyarrow as pa
import pytest

from h2t.pipeline.base.columns import column


@pytest.mark.parametrize(
    "values",
    [[3, -1], [0.5, 2, float("inf")], ["", "ä", "abc"], [True, False], [None, "a"], [[1], [2, 3]], [], (1,), range(3)],
)
def test_columns_are_those_of_arrow(values):
    found = column(values)
    assert found.equals(pa.array(list(values)))
    found.validate(full=True)


def test_pandas_is_not_imported():
    code = "import sys; from h2t.pipeline.base.columns import column; column([1]), column([.5]), column(['a'])"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'pandas' not in sys.modules"], check=True)
