from pathlib import Path

import pytest

from phase8.errors import ConfigError
from phase8.paths import expand_path


def test_home_and_variables_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("SCRATCH", "/scratch/7")
    assert expand_path("~/runs") == "/home/somebody/runs"
    assert expand_path("~") == "/home/somebody"
    assert expand_path("$SCRATCH/runs") == "/scratch/7/runs"
    assert expand_path("${SCRATCH}s/runs") == "/scratch/7s/runs"
    assert expand_path("~root").startswith("/")


@pytest.mark.parametrize("path", ["runs", "/a/b.c", "./~runs", "a~b/c", "glob*.bin", str(Path("a", "b"))])
def test_other_paths_stay_as_they_are(path):
    assert expand_path(path) == path


NOT_SET, NO_NAME = "NOT_SET_HERE, which is not set", "holds a $ that begins neither $NAME nor ${NAME}; write the path out"
STANDS_FOR_NOTHING = {
    "$NOT_SET_HERE/x": NOT_SET, "${NOT_SET_HERE}": NOT_SET, "${}/x": "${}", "~nobody-of-this-name/x": "~nobody",
    "price$": NO_NAME, "100$/x": NO_NAME, "$(pwd)/x": NO_NAME, "$/x": NO_NAME, "$$HOME": NO_NAME, "$1/x": NO_NAME, "${HOME/x": NO_NAME,
}  # fmt: skip


@pytest.mark.parametrize(("path", "named"), STANDS_FOR_NOTHING.items())
def test_what_stands_for_nothing_is_refused(path, named, monkeypatch):
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    with pytest.raises(ConfigError) as refusal:
        expand_path(path)
    assert named in str(refusal.value) and "\n" not in str(refusal.value)


def test_an_empty_variable_is_refused(monkeypatch):
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(ConfigError, match="EMPTY, which is empty;"):
        expand_path("$EMPTY/runs")
