"""Resume of stage II: interrupted at any step, training ends in the same weights."""

import threading

import pytest
import torch
from pipeline_builders import make_optimiser, make_stack, make_stage2_cache, trained

from h2t.pipeline.training.resume import Checkpoint

HEADS = [{"ratio": 0.0}, {"ratio": 0.5}]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_stage2_cache(tmp_path_factory.mktemp("stage2") / "c")


class Interrupted(Exception):
    pass


class StopsAfter(Checkpoint):
    """Saves at every step, and is killed after `steps` of them."""

    def __init__(self, out, token, steps):
        super().__init__(out, token, seconds=0)
        self.left = steps

    def offer(self, *arguments):
        super().offer(*arguments)
        self.left -= 1
        if not self.left:
            raise Interrupted


def train(cache, save):
    stack = make_stack(cache, HEADS)
    losses = []
    stack.train(make_optimiser(), "test", lambda epoch, found: losses.append(found.clone()), save)
    return {k: t.detach() for k, t in stack.state.items()}, losses


@pytest.mark.parametrize("step", [1, 3, 4, 7])
def test_interrupted_training_ends_in_the_same_weights(cache, tmp_path, step):
    expected, losses = trained(make_stack(cache, HEADS))
    with pytest.raises(Interrupted):
        train(cache, StopsAfter(tmp_path / "out", "t", step))
    found, again = train(cache, Checkpoint(tmp_path / "out", "t"))
    for name in expected:
        assert torch.equal(found[name], expected[name])
    for a, b in zip(losses, again, strict=True):
        assert torch.equal(a, b)


def test_another_token_starts_anew(cache, tmp_path):
    with pytest.raises(Interrupted):
        train(cache, StopsAfter(tmp_path / "out", "t", 2))
    stack = make_stack(cache, HEADS)
    other = Checkpoint(tmp_path / "out", "other")
    assert other.restore(stack.state, torch.optim.SGD(stack.state.values(), lr=1), torch.zeros(2, 2)) == 0


def test_a_torn_file_starts_anew(cache, tmp_path):
    with pytest.raises(Interrupted):
        train(cache, StopsAfter(tmp_path / "out", "t", 2))
    save = Checkpoint(tmp_path / "out", "t")
    save.path.write_bytes(save.path.read_bytes()[:50])
    stack = make_stack(cache, HEADS)
    assert save.restore(stack.state, torch.optim.SGD(stack.state.values(), lr=1), torch.zeros(2, 2)) == 0


def test_a_short_run_saves_nothing_and_clear_forgets(cache, tmp_path):
    save = Checkpoint(tmp_path / "out", "t")
    train(cache, save)
    assert not save.folder.exists()
    with pytest.raises(Interrupted):
        train(cache, StopsAfter(tmp_path / "out", "t", 1))
    assert save.path.is_file()
    save.clear()
    assert not save.folder.exists()


def test_a_run_saves_while_another_one_of_the_same_ends(tmp_path):
    """Whoever ends forgets the saved steps of both; the other goes on."""
    state = {"weight": torch.zeros(3)}
    optimiser, losses = torch.optim.SGD(state.values(), lr=1), torch.zeros(2, 2)
    ended = threading.Event()

    def ends() -> None:
        while not ended.is_set():
            Checkpoint(tmp_path / "out", "t").clear()

    other = threading.Thread(target=ends)
    other.start()
    try:
        save = Checkpoint(tmp_path / "out", "t", seconds=0)
        for step in range(300):
            save.offer(step, state, optimiser, losses)
    finally:
        ended.set()
        other.join()
    save.offer(7, state, optimiser, losses)
    assert save.restore(state, optimiser, losses) == 7
