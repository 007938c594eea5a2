"""Routers that send nearly all tokens to the same few experts are named once, balanced ones never."""

import io

import pytest
import torch
from rich.console import Console

from phase8.config.model_section import ModelSection
from phase8.train.build import build_run
from phase8.train.engine.protocol import LayerRouting
from phase8.train.faults import collapse
from phase8.train.faults.collapse import CollapsedRouters
from phase8.train.loop import train
from tests.train.faults.step_metrics import step_metrics
from tests.train.tiny_run import records, tiny_config

BALANCED = LayerRouting((0.125,) * 8, 0.0, 2.0, 1.0)
# As a run of phase8_moe_8x measured it after a warm-up of two steps: two experts of eight have all but 2 % of the choices.
COLLAPSED = LayerRouting((0.0, 0.02, 0.0, 0.0, 0.5, 0.0, 0.48, 0.0), 0.67, 1.95, 3.2)


def said_of(*steps, **model):
    routers = CollapsedRouters(ModelSection(**({"ffn": "moe"} | model)))
    return [routers.after_step(step_metrics(number, routing=dict(enumerate(layers)))) for number, layers in enumerate(steps, start=1)]


def test_routers_that_stay_collapsed_are_named_once():
    layers, unmeasured = [BALANCED, COLLAPSED, COLLAPSED], []
    *before, sentence, after = said_of(layers, layers, unmeasured, layers, layers)
    assert before == [None] * 3 and after is None
    assert sentence.startswith("step 4: 2 of 3 routers send 90% of all choices or more to 2 of 8 experts, and 67% of them are dropped")
    assert "optim.warmup_steps" in sentence and "model.balance_loss_weight" in sentence


def test_routers_that_recover_are_not_named():
    assert said_of([COLLAPSED], [COLLAPSED], [BALANCED], [COLLAPSED], [COLLAPSED]) == [None] * 5


@pytest.mark.parametrize(
    ("layers", "model"),
    [
        ([BALANCED] * 3, {}),
        ([], {}),  # a step that is not printed measures nothing
        ([LayerRouting((0.5, 0.5, 0.0), 0.0, 1.0, 1.4)], {"num_experts": 3}),  # of three experts any two are most
        ([COLLAPSED], {"ffn": "swiglu"}),
    ],
)
def test_nothing_is_said_of_others(layers, model):
    assert said_of(*[layers] * 5, **model) == [None] * 5


def test_a_run_records_and_shows_it(tiny, monkeypatch):
    monkeypatch.setattr(collapse, "NEARLY_ALL", 0.0)
    shown = io.StringIO()
    settings = ("model.ffn=moe", "model.num_experts=4", "model.expert_ffn_size=16", "train.num_steps=8", "observe.log_every_n_steps=2")
    run = build_run(tiny_config(tiny, *settings), device=torch.device("cpu"), resume="none", console=Console(file=shown, width=400))
    train(run, resume_command="")
    (event,) = [record for record in records(run) if record.get("event") == "collapsed_routers"]
    assert event["step"] == 6 and event["message"] in shown.getvalue()
