import gc
import weakref

import pytest

from phase8.train import garbage
from phase8.train.garbage import STEPS_BETWEEN_COLLECTIONS, STEPS_BETWEEN_WHOLE_COLLECTIONS, GarbageBetweenSteps
from tests.train.tiny_run import train_tiny


class Cycle:
    """Garbage that only a collection frees."""

    def __init__(self):
        self.itself = self


@pytest.fixture(autouse=True, scope="module")
def _runs_collect():
    """As outside of tests; for the tests of other files, what there is is frozen again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(garbage, "gc", gc)
        yield
    gc.collect()
    gc.freeze()


@pytest.fixture
def collections():
    """The generations that are collected, in order."""
    generations = []

    def note(phase, details):
        if phase == "start":
            generations.append(details["generation"])

    gc.callbacks.append(note)
    yield generations
    gc.callbacks.remove(note)


def test_a_run_collects_after_the_same_steps_whatever_it_makes(tiny, collections, monkeypatch):
    steps = []
    after_step = GarbageBetweenSteps.after_step

    def noted(self):
        before = len(collections)
        assert steps == [] or before == steps[-1]  # nothing was collected during the step
        after_step(self)
        steps.append(len(collections))

    monkeypatch.setattr(GarbageBetweenSteps, "after_step", noted)
    monkeypatch.setattr(garbage, "STEPS_BETWEEN_COLLECTIONS", 5)
    train_tiny(tiny, "train.num_steps=20", "train.evaluate_every_n_steps=0", "checkpoint.every_n_steps=0")
    taken = [step for step, (before, after) in enumerate(zip([steps[0], *steps], steps, strict=False), 1) if after > before]
    assert len(steps) == 20 and taken[-3:] == [10, 15, 20]
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_garbage_of_steps_is_freed(collections):
    with GarbageBetweenSteps(num_slow_steps=2) as between:
        between.after_step()
        between.after_step()
        old = weakref.ref(Cycle())
        for _ in range(STEPS_BETWEEN_COLLECTIONS - 3):
            between.after_step()
        assert old() is not None
        between.after_step()
        assert old() is None and collections == [2, 1]
        for _ in range(STEPS_BETWEEN_COLLECTIONS, STEPS_BETWEEN_WHOLE_COLLECTIONS):
            between.after_step()
        assert collections == [2, *[1] * 9, 2]


def test_what_compilation_made_is_not_looked_through_again():
    with GarbageBetweenSteps(num_slow_steps=1) as between:
        made = Cycle()
        between.after_step()
        frozen = weakref.ref(made)
        del made
        gc.collect()
        assert frozen() is not None
    gc.collect()
    assert frozen() is None


def test_a_failed_step_leaves_python_as_it_was():
    with pytest.raises(OSError), GarbageBetweenSteps(num_slow_steps=1):
        assert not gc.isenabled()
        raise OSError
    assert gc.isenabled()
    gc.disable()
    try:
        with GarbageBetweenSteps(num_slow_steps=1):
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
