"""Routers that send nearly all tokens to the same few experts: the loss falls all the same, while most weights learn nothing."""

from __future__ import annotations

from phase8.config.model_section import ModelSection
from phase8.observe.metrics import StepMetrics
from phase8.observe.routing import Routing

# Share of a layer's choices; where experts are balanced, it is top_k / num_experts.
NEARLY_ALL = 0.9
# Measured steps in a row: in a few steps of few tokens a router may look like that and recover.
IN_A_ROW = 3


class CollapsedRouters:
    """Looks for such routers in the steps that measured them, and has something to say about the first.

    Args:
        model: Model; one that has not twice as many experts as a token takes has no few of them.
    """

    def __init__(self, model: ModelSection):
        self._model, self._is_told = model, model.ffn != "moe" or model.num_experts < 2 * model.top_k
        self._num_in_a_row = 0

    def after_step(self, metrics: StepMetrics) -> str | None:
        """A sentence, the first time that a layer's tokens go on going to as few experts as a single token takes; None: there is nothing to say."""
        if self._is_told or not metrics.routing:
            return None
        collapsed = [layer for layer in metrics.routing.values() if self._is_collapsed(layer)]
        self._num_in_a_row = self._num_in_a_row + 1 if collapsed else 0
        if self._num_in_a_row < IN_A_ROW:
            return None
        self._is_told = True
        dropped = sum(layer.dropped for layer in collapsed) / len(collapsed)
        return (
            f"step {metrics.step}: {len(collapsed)} of {len(metrics.routing)} routers send {NEARLY_ALL:.0%} of all choices or more to "
            f"{self._model.top_k} of {self._model.num_experts} experts, and {dropped:.0%} of them are dropped, so most weights learn nothing; lower "
            "optim.learning_rate, lengthen optim.warmup_steps, raise model.balance_loss_weight, or set model.router_bias_rate."
        )

    def _is_collapsed(self, layer: Routing) -> bool:
        return sum(sorted(layer.load)[-self._model.top_k :]) >= NEARLY_ALL
