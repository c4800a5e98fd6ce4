import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))  # `import builders` under --import-mode=importlib

settings.register_profile("quick", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("quick")


@pytest.fixture
def cache_dir(tmp_path):
    """A place for a cache that does not exist yet."""
    return tmp_path / "cache"
