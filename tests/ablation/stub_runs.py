"""Processes that stand for those of an ablation: they leave what training and evaluation leave, at once."""

# What launch/pretrain.py does, without training: it reads how it is to behave from <directory>/<name of the run>.
STUB = """
import json, os, pathlib, signal, sys, time
settings = dict(word.split("=", 1) for word in sys.argv[2:])
directory = pathlib.Path(settings["run.output_dir"]) / settings["run.name"]
plan = pathlib.Path(sys.argv[1])
behaviour = (plan / settings["run.name"]).read_text()
directory.mkdir(parents=True, exist_ok=True)
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
(directory / "pid").write_text(str(os.getpid()))
(plan / (settings["run.name"] + ".gpu")).write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "as it was"))
assert os.getsid(0) == os.getpid()  # the terminal's Ctrl-C must not reach it

def reach(step):
    lines = [dict(step=n, loss=9 - n / 10, learning_rate=1, grad_norm=1, tokens=96 * n, tokens_per_second=100 * n, step_seconds=1,
                  data_wait_seconds=0, mfu=None, peak_memory_bytes=1, skipped=n == 3) for n in range(1, step + 1)]
    away = abs(float(settings.get("optim.learning_rate", 0.01)) - 0.01)
    lines += [dict(step=n, validation_loss=8 - n / 10 + away, validation_tokens=48) for n in (10, 20) if n <= step]
    text = "".join(json.dumps(line) + chr(10) for line in sorted(lines, key=lambda line: line["step"]))
    (directory / "metrics.jsonl").write_text(text)

def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)

if behaviour == "crash":
    reach(7)
    print("error: the disk is full", flush=True)
    sys.exit(5)
if behaviour == "diverge":
    reach(12)
    sys.exit(6)
if behaviour == "kill":
    reach(12)
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "stop when asked":
    reach(7)
    wait_for(lambda: asked)
    sys.exit(0)
if behaviour == "finish when asked":
    (directory / "metrics.jsonl").write_text("")
    wait_for(lambda: asked)
if behaviour == "deaf":
    time.sleep(20)
if behaviour.startswith("together with"):
    other = plan / behaviour.split()[-1]
    (plan / (settings["run.name"] + ".here")).touch()
    wait_for(other.exists)
reach(int(settings.get("train.num_steps", 20)))
"""
# What tools/evaluate.py does, without evaluating.
MEASURE = """
import json, os, pathlib, signal, sys
plan, name, result = sys.argv[1:]
(pathlib.Path(plan) / (name + ".measured")).write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "as it was"))
if (pathlib.Path(plan) / name).read_text() == "immeasurable":
    print("error: it does not fit", flush=True)
    sys.exit(9)
positions = [dict(first=0, end=8, loss=7.0, num_tokens=16), dict(first=8, end=24, loss=None, num_tokens=32)]
pathlib.Path(result).write_text(json.dumps({"total": {"positions": positions}}))
"""
