"""kill -9 at random moments: there is always a good newest checkpoint, and the run ends as if nothing had happened, bit for bit."""

import json
import secrets

import pytest

from tests.chaos.chaos_reshard import KIND
from tests.chaos.chaos_training import SAVES, VICTIMS, Kind
from tests.chaos.inject_faults import KINDS, inject, summarise

# A rank killed between saves is what tests/launch/test_restart.py has in every run.
SHORT = [Kind(VICTIMS[-1], list(SAVES)[-1]), KIND]


@pytest.fixture
def injected(tmp_path):
    """Injects faults, prints seed and summary, and returns the records of faults and of finished runs."""

    def injected(**settings):
        seed = secrets.randbelow(2**32)
        print(f"seed {seed}")
        records = []
        with (tmp_path / "chaos.jsonl").open("w") as file:
            for record in inject(tmp_path, seed=seed, **settings):
                records.append(record)
                print(json.dumps(record), file=file, flush=True)
        print(summarise(records))
        return ([record for record in records if record["record"] == what] for what in ("fault", "run"))

    return injected


@pytest.mark.slow
def test_training_and_the_reshard_tool_survive_a_kill_of_each_kind(injected):
    """The kills end all ranks during asynchronous saves, and the tool; what follows a kill that followed another is in the fifty below."""
    faults, runs = injected(num_faults=len(SHORT), kinds=SHORT, topologies=("data-2-zero-3",))
    assert len(faults) == sum(run["faults"] for run in runs) == len(SHORT)


@pytest.mark.full
def test_training_and_the_reshard_tool_survive_fifty_kills(injected):
    faults, runs = injected(num_faults=50)
    assert len(faults) == sum(run["faults"] for run in runs) == 50
    assert {run["kind"] for run in runs} == set(map(str, KINDS))
