from __future__ import annotations

import matplotlib
import numpy as np

from phase8.observe.charts import loss_png
from phase8.observe.history import History


def history_of(make_step, num_steps=30):
    steps = [make_step(step) for step in range(1, num_steps + 1)]
    return History.from_records([{**vars(step), "auxiliary_losses": {}, "routing": {}} for step in steps])


def test_drawing_leaves_matplotlibs_global_settings_alone(make_step):
    before = dict(matplotlib.rcParams)
    loss_png(history_of(make_step), title="x", reference_losses={})
    assert dict(matplotlib.rcParams) == before


def test_names_are_no_formulas(make_step):
    """matplotlib takes what stands between dollar signs for TeX, and fails where it is none."""
    assert loss_png(history_of(make_step), title=r"a $\frac{$ b", reference_losses={r"$\x$": 6.0}).startswith(b"\x89PNG")


def test_a_loss_above_the_axis_is_marked(make_step):
    history = history_of(make_step, 2000)
    history.loss[:] = 3.0
    plain = loss_png(history, title="x", reference_losses={})
    history.loss[0] = 12.0
    assert np.isfinite(history.loss).all() and loss_png(history, title="x", reference_losses={}) != plain
