"""Models as transformers loads them, with the code that lies beside them: the same numbers as here, whatever is masked, cached or cut into pieces."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from phase8.checkpoint.huggingface import phase8_model
from phase8.checkpoint.huggingface.phase8_model import CODE, exported_config, exported_name
from phase8.config.model_keys import keys_in_effect
from phase8.config.model_section import ModelSection
from phase8.data.microbatch import IGNORED_TARGET
from phase8.generate.restore import restore_model
from phase8.generate.sampling import SamplingOptions
from phase8.model.model import build_model
from phase8.model.parameters import initialise
from tests.checkpoint.huggingface.exported import exported, loaded, run
from tests.generate.drawn import drawn_tokens
from tests.model.small import LENGTH, VARIANTS, random_tokens, scaled_down

# Together they have every option; the others are run with -m full.
COVERING = {
    "delta-chain-both", "gate-channel-linear-chain-decay", "decay-floor-delta-chain-both", "score-lorentz-chain-both", "windows", "hybrid-delta",
    "recurrence-alone", "positions-in-turns", "transformer-grouped", "transformer-one-head-of-keys", "experts-sigmoid-1-phase8",
    "experts-in-turns", "low-rank", "silu-and-skip-beside-a-window", "embedding-scalars", "embedding-scalars-transformer",
    "values-low-rank-delta",
}  # fmt: skip
GENERATING = {"delta-chain-both", "score-lorentz-chain-both", "windows", "hybrid-delta", "transformer-grouped", "experts-sigmoid-1-phase8"}
LENGTHS = (LENGTH, 11)  # of the two rows
GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}


def masked(tokens: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Rows of different lengths among arbitrary tokens, with their mask and the places of each row's own tokens."""
    generator = torch.Generator().manual_seed(5)
    total = LENGTH + 2
    ids, mask, places = torch.randint(0, 61, (2, total), generator=generator), torch.zeros(2, total, dtype=torch.long), []
    for row, length in enumerate(LENGTHS):
        own = {"left": range(total - length, total), "right": range(length), "scattered": torch.randperm(total, generator=generator)[:length]}[kind]
        own = torch.as_tensor(own).sort().values
        ids[row, own], mask[row, own] = tokens[row, :length], 1
        places.append(own)
    return ids, mask, places


def read_in_pieces(model, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of a prompt read in pieces, some of them a single token, with what the model keeps."""
    logits, cache = [], None
    for begin, end in ((0, 4), (4, 5), (5, 6), (6, 17), (17, ids.shape[1])):
        found = model(ids[:, begin:end], attention_mask=None if mask is None else mask[:, :end], cache=cache, use_cache=True)
        cache = found.cache
        logits.append(found.logits)
    return torch.cat(logits, dim=1)


def cases(names: set[str]) -> list:
    return [pytest.param(section, id=name, marks=() if name in names else pytest.mark.full) for name, section in VARIANTS]


@pytest.mark.parametrize("section", cases(COVERING))
@torch.no_grad()
def test_logits_are_ours(tmp_path, section):
    model, directory = exported(tmp_path, section)
    other, tokens = loaded(directory), random_tokens()
    expected = model.logits(model(tokens)[0])

    def check(found: torch.Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    check(other(tokens).logits)
    check(other(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits)
    check(read_in_pieces(other, tokens))
    is_llama = other.config.model_type == "llama"  # transformers' own leaves gaps in the positions where tokens are masked
    for kind in ("left", "right", *(() if is_llama else ("scattered",))):
        ids, mask, places = masked(tokens, kind)
        for found in (other(ids, attention_mask=mask).logits, read_in_pieces(other, ids, mask)):
            for row, (own, length) in enumerate(zip(places, LENGTHS, strict=True)):
                torch.testing.assert_close(found[row, own], expected[row, :length], rtol=0, atol=1e-5)


@pytest.mark.parametrize("section", cases(GENERATING))
def test_generated_tokens_are_ours_alone_in_a_padded_batch_and_without_cache(tmp_path, section):
    model, directory = exported(tmp_path, section)
    other, tokens = loaded(directory), random_tokens()
    ids, mask, _ = masked(tokens, "left")
    found = other.generate(ids, attention_mask=mask, **GREEDY)[:, ids.shape[1] :]
    for row, length in enumerate(LENGTHS):
        prompt = tokens[row, :length].tolist()
        ours = drawn_tokens(model, prompt, max_tokens=6, options=SamplingOptions(temperature=0), num_ids=61)
        assert found[row].tolist() == ours
    assert torch.equal(found, other.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)[:, ids.shape[1] :])
    beams = [other.generate(ids, attention_mask=mask, num_beams=3, use_cache=use, **GREEDY) for use in (True, False)]
    assert torch.equal(*beams)


GRADIENTS = ("delta-chain-both", "score-lorentz-chain-both", "experts-scaled", "transformer-grouped")


@pytest.mark.parametrize("name", GRADIENTS)
def test_loss_and_gradients_are_ours_with_and_without_checkpointing(tmp_path, name):
    section = dict(VARIANTS)[name].model_copy(update={"balance_loss_weight": 0.0, "router_z_loss_weight": 0.0})
    model, directory = exported(tmp_path, section)
    other, tokens = loaded(directory), random_tokens()
    targets = torch.cat((tokens[:, 1:], torch.full((2, 1), IGNORED_TARGET)), dim=1)
    ours = model.loss_sum(tokens, targets) / (targets != IGNORED_TARGET).sum()
    ours.backward()
    for is_checkpointed in (False, True):
        other.zero_grad()
        other.train()
        if is_checkpointed:
            other.gradient_checkpointing_enable()
        loss = other(tokens, labels=tokens).loss
        loss.backward()
        torch.testing.assert_close(loss, ours)
        parameters = dict(other.named_parameters())
        for own_name, parameter in model.named_parameters():
            torch.testing.assert_close(parameters[exported_name(own_name)].grad, parameter.grad, rtol=1e-3, atol=2e-5, msg=own_name)


def test_trainer_teaches_it_saves_it_and_what_it_saved_comes_back_here(tmp_path):
    pytest.importorskip("accelerate")
    section = scaled_down(ModelSection(global_path="delta", tie_embeddings=True, global_tokens=2))
    _, directory = exported(tmp_path, section)
    other, tokens = loaded(directory), random_tokens(batch=8)
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    options = transformers.TrainingArguments(
        tmp_path / "trainer", max_steps=12, per_device_train_batch_size=4, learning_rate=3e-3, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(other, options, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    other.save_pretrained(tmp_path / "taught")
    with torch.no_grad():
        expected = other.eval()(tokens).logits
        torch.testing.assert_close(loaded(tmp_path / "taught")(tokens).logits, expected)
    assert run(tmp_path / "taught", tmp_path / "back") == 0
    back, _, _ = restore_model(tmp_path / "back", device=torch.device("cpu"))
    assert back.section == restore_model(tmp_path / "taught", device=torch.device("cpu"))[0].section
    assert keys_in_effect(back.section) == keys_in_effect(section)
    with torch.no_grad():
        torch.testing.assert_close(back.logits(back(tokens)[0]), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_in_bf16_it_computes_as_a_bf16_model_here(tmp_path):
    section = scaled_down(ModelSection(global_path="delta", chain="both", ffn="moe"))
    model, directory = exported(tmp_path, section, "--dtype", "bf16")
    other, tokens = loaded(directory), random_tokens()
    dtypes = {name: parameter.dtype for name, parameter in other.named_parameters()}
    assert other.dtype == torch.bfloat16 == dtypes["model.layers.0.mixer.q.weight"] == dtypes["lm_head.weight"]
    wide = {name.split(".", 3)[3] for name, dtype in dtypes.items() if dtype == torch.float32 and ".layers.0." in name}
    assert wide == {
        "mixer_norm.weight", "feed_forward_norm.weight", "mixer.qk_norm.weight", "feed_forward.router.scores.weight",
        *(f"mixer.global_path.{name}" for name in ("scalars.weight", "norm.weight", "decay_bias", "gate_bias")),
        *(f"mixer.global_path.chain.{name}" for name in ("energy", "eta_raw", "hopping_raw", "decay_mix", "gate_mix")),
    }  # fmt: skip
    rounded = build_model(section, dtype=torch.bfloat16, device=torch.device("cpu"))
    rounded.load_state_dict(model.state_dict())
    exact, ours, found = model.logits(model(tokens)[0]), rounded.logits(rounded(tokens)[0]), other(tokens).logits.float()
    assert (found - exact).abs().mean() < 1.2 * (ours - exact).abs().mean()


def test_first_weights_are_distributed_as_here():
    config_class, model_class = _classes()
    for section in (
        ModelSection(global_path="delta", chain="both", decay_floor=-5.0, d_model=128, num_layers=2, num_heads=4, vocab_size=300),
        ModelSection(score="lorentz", low_rank_rank=16, ffn="low_rank_swiglu", d_model=128, num_layers=2, num_heads=4, vocab_size=300),
        ModelSection(local_window_size=(0, 8), ffn="moe", shared_experts=1, d_model=128, num_layers=2, num_heads=4, vocab_size=300),
        ModelSection(block="transformer", convolution_size=4, d_model=128, num_layers=2, num_heads=4, vocab_size=300),
    ):
        ours = build_model(section, dtype=torch.float32, device=torch.device("cpu"))
        initialise(ours, seed=0)
        found = model_class(config_class(**exported_config(section, dtype="float32"))).state_dict()
        for name, value in ours.state_dict().items():
            other = found[exported_name(name)]
            if value.dim() > 1 and "norm" not in name and "convolution" not in name and "_mix" not in name:  # drawn at random
                assert torch.allclose(other.std(), value.std(), rtol=0.1, atol=1e-7), name
            else:
                torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-6, msg=name)


def test_both_sides_name_the_same_weights_that_stay_in_fp32():
    from phase8.checkpoint.huggingface.remote_code.modeling_phase8 import IN_FP32

    assert set(IN_FP32) == phase8_model._IN_FP32


def _classes():
    from phase8.checkpoint.huggingface.remote_code.configuration_phase8 import Phase8Config
    from phase8.checkpoint.huggingface.remote_code.modeling_phase8 import Phase8ForCausalLM

    return Phase8Config, Phase8ForCausalLM


def test_every_key_of_a_model_is_one_of_the_exported_config():
    """A key that the exported code does not know would change the model here and not there."""
    config_class, _ = _classes()
    known = config_class().to_dict()
    for section in (ModelSection(ffn="moe"), ModelSection(block="transformer")):
        assert [key for key in exported_config(section, dtype="float32") if key not in known and key not in ("auto_map", "torch_dtype")] == []
    # The defaults of both are the same model.
    ours = exported_config(ModelSection(ffn="moe"), dtype="float32")
    assert {key: known[key] for key in keys_in_effect(ModelSection(ffn="moe")) if key in known and key != "ffn"} == {
        key: value for key, value in ours.items() if key in keys_in_effect(ModelSection(ffn="moe")) and key != "ffn"
    }


@torch.no_grad()
def test_long_prompts_take_memory_in_proportion_and_the_state_does_not_grow():
    config_class, model_class = _classes()
    section = scaled_down(ModelSection(global_path="delta", chain="both"), local_window_size=(6, 14), global_tokens=3)
    model = model_class(config_class(**exported_config(section, dtype="float32"))).eval()
    sizes, peaks = set(), []
    for length in (2000, 4000):
        largest = _LargestTensor()
        with largest:
            cache = model(random_tokens(batch=1, length=length), logits_to_keep=1).cache
        peaks.append(largest.num_elements)
        for _ in range(3):
            model(random_tokens(batch=1, length=1), cache=cache)
            sizes.add(sum(value.numel() for layer in cache.layers for value in vars(layer).values() if value is not None))
    assert len(sizes) == 1 and peaks[1] < 2.2 * peaks[0] and peaks[1] < 4000 * 400


class _LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements of the largest tensor that an operation returns."""

    num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for each in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(each, torch.Tensor):
                self.num_elements = max(self.num_elements, each.untyped_storage().nbytes() // each.element_size())
        return found


def test_what_it_cannot_do_it_says(tmp_path):
    _, directory = exported(tmp_path, scaled_down(ModelSection()))
    other, tokens = loaded(directory), random_tokens()
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 3\)"):
        other(tokens, attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="attention_mask has shape"):
        other(tokens, attention_mask=torch.ones(2, 1, LENGTH, LENGTH))
    with pytest.raises(ValueError, match="documents in one row cannot be kept apart"):
        other(tokens, position_ids=torch.arange(LENGTH).remainder(9)[None])
    with pytest.raises(ValueError, match="the cache is a DynamicCache"):
        other(tokens, cache=transformers.DynamicCache())
    with pytest.raises(ValueError, match="cache_implementation is 'static'"):
        other.generate(tokens, cache_implementation="static", **GREEDY)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        other.generate(tokens[:1], prompt_lookup_num_tokens=2, **GREEDY)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        other()
    for call in (other, other.generate):
        with pytest.raises(ValueError, match="the input has no token"):
            call(tokens[:, :0])
    cache = other(tokens).cache
    other.train()
    other.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="would advance the cache again"):
        other(tokens, cache=cache)


@torch.no_grad()
def test_other_ways_to_call_it(tmp_path):
    model, directory = exported(tmp_path, scaled_down(ModelSection(), tie_embeddings=True))
    other, tokens = loaded(directory), random_tokens()
    expected = model.logits(model(tokens)[0])
    assert other.lm_head.weight is other.model.embed_tokens.weight
    vectors = other.get_input_embeddings()(tokens)
    torch.testing.assert_close(other(inputs_embeds=vectors, position_ids=torch.arange(LENGTH)[None] + 3).logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(other(tokens, return_dict=False)[0], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(other(tokens, logits_to_keep=2).logits, expected[:, -2:], rtol=0, atol=1e-5)
    streams = other(tokens, output_hidden_states=True).hidden_states
    assert len(streams) == 3 and torch.equal(streams[0], vectors)
    whole = other.generate(tokens, **GREEDY)
    assert torch.equal(other.generate(inputs_embeds=vectors, attention_mask=torch.ones_like(tokens), **GREEDY), whole[:, LENGTH:])
    # A conversation: the second call reads only what its cache has not read.
    first = other.generate(tokens[:, :20], return_dict_in_generate=True, use_cache=True, **GREEDY)
    longer = torch.cat((first.sequences, tokens[:, 20:]), dim=1)
    assert torch.equal(other.generate(longer, cache=first.cache, **GREEDY), other.generate(longer, **GREEDY))
    # Rows of a padded batch may change their places, or be repeated.
    ids, mask, _ = masked(tokens, "left")
    whole = other(ids, attention_mask=mask).logits
    cache = other(ids[:, :20], attention_mask=mask[:, :20]).cache
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([2, 1]))
    found = other(ids[:, 20:24].flip(0), attention_mask=mask[:, :24].flip(0), cache=cache).logits
    torch.testing.assert_close(found.flip(0), whole[:, 20:24], rtol=0, atol=1e-5)
    cache.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(other(ids[:, 24:], attention_mask=mask, cache=cache).logits, whole[:, 24:], rtol=0, atol=1e-5)
    cache.reset()
    torch.testing.assert_close(other(tokens, cache=cache).logits, expected, rtol=0, atol=1e-5)
    other.resize_token_embeddings(70)
    assert other(tokens).logits.shape[-1] == other.config.vocab_size == 70
    body = transformers.AutoModel.from_pretrained(directory, trust_remote_code=True)
    torch.testing.assert_close(body(tokens).last_hidden_state, model(tokens)[0], rtol=0, atol=1e-5)


INDEPENDENT = """
import sys
class NoPhase8:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "phase8":
            raise ImportError("there is no phase8 here")
sys.meta_path.insert(0, NoPhase8())
import json, torch, transformers.dynamic_module_utils
transformers.dynamic_module_utils.HF_MODULES_CACHE = sys.argv[2]
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(json.dumps(model.generate(torch.tensor([[3, 1, 4, 1, 5]]), do_sample=False, max_new_tokens=6).tolist()[0][5:]))
"""


def test_it_runs_where_phase8_is_not_installed(tmp_path):
    model, directory = exported(tmp_path, scaled_down(ModelSection()))
    command = [sys.executable, "-c", INDEPENDENT, str(directory), str(tmp_path / "modules")]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert found.returncode == 0, found.stderr
    ours = drawn_tokens(model, [3, 1, 4, 1, 5], max_tokens=6, options=SamplingOptions(temperature=0), num_ids=61)
    assert json.loads(found.stdout) == ours


@pytest.mark.parametrize("path", sorted(CODE.glob("*_phase8.py")), ids=lambda path: path.name)
def test_exported_code_imports_neither_phase8_nor_what_is_not_exported(path: Path):
    import ast

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= {"math", "torch", "shutil", "sentencepiece"}
        elif isinstance(node, ast.ImportFrom):
            known = {"__future__", "collections", "dataclasses", "pathlib", "typing", "torch", "transformers"}
            assert (CODE / f"{node.module}.py").exists() if node.level else node.module.partition(".")[0] in known


def test_a_piece_follows_the_layers_to_other_devices():
    from accelerate.utils import send_to_device

    from phase8.checkpoint.huggingface.remote_code.operations_phase8 import Piece

    piece = send_to_device((Piece(torch.zeros(1), torch.ones(2), torch.zeros(1, 3, 2)),), "meta")[0]
    assert {piece.seen.device.type, piece.lengths.device.type, piece.angles.device.type} == {"meta"}
