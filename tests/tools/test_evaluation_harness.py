"""EleutherAI's lm-evaluation-harness (package lm_eval), called as docs/quality.md says, finds the log-likelihoods of a text that are found here."""

import json
import math

import pytest

from tests.tools.doors import load_door
from tests.tools.exported_model import export

TEXT = "Größe und 日本語, naïve words; plain words too.\n" * 7

# The first one is exported as a Llama, the others bring their code.
BLOCKS = [("model.block=transformer",), (), ("model.local_window_size=[8,64]", "model.chain=both", "model.global_path=delta")]


@pytest.mark.parametrize("settings", BLOCKS, ids=["llama", "phase8", "phase8-options"])
def test_the_harness_finds_the_log_likelihood_that_evaluate_finds(tmp_path, capsys, settings):
    api, models = (pytest.importorskip(name) for name in ("lm_eval.api.instance", "lm_eval.models.huggingface"))
    directory = export(tmp_path, settings, texts=[TEXT], noise=0.1).directory
    (tmp_path / "text.txt").write_text(TEXT)
    capsys.readouterr()
    arguments = ["--checkpoint", str(directory), "--text", str(tmp_path / "text.txt"), "--json", "--device", "cpu"]
    assert load_door("evaluate").main(arguments) == 0
    found = json.loads(capsys.readouterr().out)["total"]

    model_args = f"pretrained={directory},trust_remote_code=True,dtype=float32,prefix_token_id=0"  # the length is the model's
    harness = models.HFLM.create_from_arg_string(model_args, {"batch_size": 2, "device": "cpu"})
    request = api.Instance(request_type="loglikelihood_rolling", doc={}, arguments=(TEXT,), idx=0)
    (log_likelihood,) = harness.loglikelihood_rolling([request], disable_tqdm=True)
    assert found["num_tokens"] > 2 * 64 and found["num_tokens"] % 64
    assert found["loss"] * found["num_tokens"] == pytest.approx(-log_likelihood, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(-log_likelihood / math.log(2) / len(TEXT.encode()), rel=1e-5)
