"""The Phase 8 block written again from its definition, in float64: loops over tokens and heads, dense masks, torch.linalg.

It shares no code with phase8.model or phase8.kernels; it reads the parameters of a model by name.
"""

import math

import torch
import torch.nn.functional as F

ARCCOSH_EPS = 1e-3


def hidden_states(model, tokens):
    """Final hidden states [B, T, D] of a LanguageModel."""
    section, p = model.section, {name: value.detach().double() for name, value in model.named_parameters()}
    out = []
    for row in tokens:
        x = embedded = p["embedding.weight"][row]
        for layer in range(section.num_layers):
            own = {name.removeprefix(f"blocks.{layer}."): value for name, value in p.items() if name.startswith(f"blocks.{layer}.")}
            if section.embedding_scalars:
                x = x + own["embedding_scalar.weight"] * embedded
            x = x + mixer(section, layer, own, rms(x, section.norm_eps) * own["mixer_norm.weight"])
            y = rms(x, section.norm_eps) * own["feed_forward_norm.weight"]
            x = x + feed_forward(section, own, y)
        out.append(rms(x, section.norm_eps) * p["norm.weight"])
    return torch.stack(out)


def feed_forward(section, p, y):
    """[T, D] -> [T, D], dense or by the experts of each token."""
    if "feed_forward.router.scores.weight" in p:
        return torch.stack([experts_of_a_token(section, p, token) for token in y])
    gate, up = (linear(p, f"feed_forward.{name}", y) for name in ("gate", "up"))
    return linear(p, "feed_forward.down", swiglu(gate, up))


def experts_of_a_token(section, p, token, bias=0.0):
    logits = p["feed_forward.router.scores.weight"] @ token
    scores = torch.exp(logits) / torch.exp(logits).sum() if section.router_score == "softmax" else 1 / (1 + torch.exp(-logits))
    chosen = torch.argsort(scores + bias, descending=True)[: section.top_k].tolist()
    total = sum(scores[expert] for expert in chosen) / section.routed_scaling_factor if len(chosen) > 1 else 1.0
    result = torch.zeros_like(token)
    for expert in chosen:
        gate, up, down = (p[f"feed_forward.experts.{name}"][expert] for name in ("gate", "up", "down"))
        result += scores[expert] / total * (down @ swiglu(gate @ token, up @ token))
    if section.shared_experts:
        gate, up, down = (p[f"feed_forward.shared.{name}.weight"] for name in ("gate", "up", "down"))
        result += down @ swiglu(gate @ token, up @ token)
    return result


def swiglu(gate, up):
    return gate * torch.sigmoid(gate) * up


def mixer(section, layer, p, x):
    """[T, D] -> [T, D]."""
    patterns = (value if isinstance(value, tuple) else [value] for value in (section.local_window_size, section.rotary))
    (pattern, window), (_, rotary) = ((pattern, pattern[layer % len(pattern)]) for pattern in patterns)
    heads, size, length = section.num_heads, section.head_width, len(x)
    shared = heads // (section.num_kv_heads or heads)  # heads of queries on each head of keys
    qkv = torch.cat([linear(p, f"mixer.{name}", x) for name in "qkv"], dim=-1)
    if "mixer.convolution.weight" in p:
        weight = p["mixer.convolution.weight"]  # [shared + 2, channels of k, taps]: queries in turn, keys, values
        of_queries = [weight[h % shared, h // shared * size : (h // shared + 1) * size] for h in range(heads)]
        taps = torch.cat([*of_queries, *weight[-2:]])
        shifted = [torch.cat((torch.zeros_like(qkv[:j]), qkv[: length - j])) for j in range(taps.shape[1])]
        qkv = sum(shifted[j][:length] * taps[:, -1 - j] for j in range(taps.shape[1]))
    q, k, v = (part.reshape(length, -1, size) for part in qkv.split([heads * size, heads // shared * size, heads // shared * size], dim=-1))
    v = F.silu(v) if section.value_activation == "silu" else v
    k, v = (torch.stack([part[:, h // shared] for h in range(heads)], dim=1) for part in (k, v))
    if section.block == "transformer":
        return linear(p, "mixer.out", torch.cat([softmax_attention(section, q, k, v, h, None, rotary, p) for h in range(heads)], dim=-1))
    if section.global_path == "none" or (window > 0 and 0 in pattern):
        return linear(p, "mixer.out", torch.cat([softmax_attention(section, q, k, v, h, window, rotary, p) for h in range(heads)], dim=-1))
    scalars = (x @ p["mixer.global_path.scalars.weight"].T).reshape(length, heads, -1)
    outputs = []
    for h in range(heads):
        decay_term, gate_term = chain_terms(p, scalars, h)
        step = scalars[:, h, 0] + p["mixer.global_path.decay_bias"][h]
        if section.decay_floor is None:
            alpha = torch.exp(-F.softplus(step) * torch.exp(decay_term))
        else:
            alpha = torch.exp(section.decay_floor / (1 + torch.exp(-step - decay_term)))
        logits = gate_logits(section, p, x, scalars, h) + (p["mixer.global_path.gate_bias"][h] + gate_term).reshape(-1, 1)
        gate = torch.sigmoid(logits) * (logits if section.global_gate_activation == "silu" else 1)
        silu = {"none": (), "silu": (q, k), "silu_with_values": (q, k, v), None: (q, k)}[section.global_activation]
        global_q, global_k, global_v = (
            x[:, h] / (1 + torch.exp(-x[:, h])) if any(x is each for each in silu) else x[:, h] for x in (q, k, v)
        )  # fmt: skip
        if section.global_path == "delta":
            read = delta_rule(section, global_q, global_k, global_v, alpha, torch.sigmoid(scalars[:, h, -1]))
        else:
            read = linear_attention(section, global_q, global_k, global_v, alpha)
        read = read + p["mixer.global_path.skip"][h] * global_v if section.global_skip else read
        y_global = rms(read, section.norm_eps) * p["mixer.global_path.norm.weight"][h]
        local = softmax_attention(section, q, k, v, h, window, rotary, p) if window > 0 else 0
        outputs.append(local + gate * y_global)
    return linear(p, "mixer.out", torch.cat(outputs, dim=-1))


def gate_logits(section, p, x, scalars, h):
    """One head: a number per token [T, 1], or one per channel [T, K]."""
    if not section.has_channel_gate:
        return scalars[:, h, 1:2]
    return linear(p, "mixer.global_path.gate", x)[:, h * section.head_width : (h + 1) * section.head_width]


def linear_attention(section, q, k, v, alpha):
    """One head: every token adds its pair to a decaying state."""
    size = q.shape[-1]
    state, read = torch.zeros(size, size, dtype=q.dtype), []
    for i in range(len(q)):
        key, query = rms(k[i], section.norm_eps), rms(q[i], section.norm_eps)
        state = alpha[i] * state + (1 - alpha[i]) * torch.outer(key, v[i]) / math.sqrt(size)
        read.append(state.T @ query)
    return torch.stack(read)


def delta_rule(section, q, k, v, alpha, share):
    """One head: of what a decaying state holds under a key of length one, a share is replaced by the value."""
    size = q.shape[-1]
    state, read = torch.zeros(size, size, dtype=q.dtype), []
    for i in range(len(q)):
        key, query = (rms(x[i], section.norm_eps) / math.sqrt(size) for x in (k, q))
        state = alpha[i] * (torch.eye(size, dtype=q.dtype) - share[i] * torch.outer(key, key)) @ state + share[i] * torch.outer(key, v[i])
        read.append(state.T @ query)
    return torch.stack(read)


def chain_terms(p, scalars, h):
    """Log factor of the decay rate and addition to the gate, from the Green function by matrix inversion."""
    if "mixer.global_path.chain.energy" not in p:
        return torch.zeros(()), torch.zeros(())
    # With a gate per channel, the scalars lack the gate.
    potential = 2 * torch.tanh(scalars[:, h, 1 if "mixer.global_path.gate.up.weight" in p else 2] / 2)
    z = torch.complex(p["mixer.global_path.chain.energy"][h], 0.1 + F.softplus(p["mixer.global_path.chain.eta_raw"][h]))
    hopping = F.softplus(p["mixer.global_path.chain.hopping_raw"][h]).sqrt()
    g = []
    for n in range(1, len(potential) + 1):
        operator = torch.diag(potential[:n]) + hopping * (torch.ones(n - 1).diag(1) + torch.ones(n - 1).diag(-1)).double()
        g.append(torch.linalg.inv(z * torch.eye(n) - operator)[-1, -1])
    g = torch.view_as_real(torch.stack(g))
    terms = (p.get(f"mixer.global_path.chain.{name}") for name in ("decay_mix", "gate_mix"))
    return tuple(torch.zeros(()) if mix is None else g @ mix[h] for mix in terms)


def softmax_attention(section, q, k, v, h, window, rotary, p):
    """One head; a window of W tokens and the first G, or everything before."""
    length, size = len(q), q.shape[-1]
    q, k = (rotate(x[:, h], section) if rotary else x[:, h] for x in (q, k))
    if section.has_qk_norm:
        of_head = h * len(p["mixer.qk_norm.weight"]) // section.num_heads
        q, k = (p["mixer.qk_norm.weight"][of_head] * rms(x, section.norm_eps) for x in (q, k))
    if window is None or section.score == "dot":
        scores = q @ k.T / math.sqrt(size)
    else:
        radius, beta = (F.softplus(p[f"mixer.score.{name}"][h]) for name in ("radius_raw", "beta_raw"))
        q, k = (radius * rms(x, section.norm_eps) / math.sqrt(size) for x in (q, k))
        cosh = torch.sqrt(1 + (q * q).sum(-1))[:, None] * torch.sqrt(1 + (k * k).sum(-1)) - q @ k.T
        scores = -beta * torch.acosh(cosh / math.sqrt(1 - ARCCOSH_EPS))
    i, j = torch.arange(length)[:, None], torch.arange(length)
    visible = j <= i if window is None else (j <= i) & ((i - j < window) | (j < section.global_tokens))
    return scores.masked_fill(~visible, -math.inf).softmax(-1) @ v[:, h]


def rotate(x, section):
    """Pairs (c, c + K/2) as complex numbers, turned."""
    half = x.shape[-1] // 2
    frequency = torch.tensor([scaled_frequency(section.rope_base ** (-c / half), section.rope_scaling) for c in range(half)], dtype=torch.float64)
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.exp(1j * torch.arange(len(x))[:, None] * frequency)
    return torch.cat((turned.real, turned.imag), dim=-1)


def scaled_frequency(frequency, scaling):
    """As Meta's code for Llama 3.1 has it, in wavelengths."""
    if scaling.type == "none":
        return frequency
    wavelength = 2 * math.pi / frequency
    original, low, high = scaling.original_sequence_length, scaling.low_frequency_factor, scaling.high_frequency_factor
    if scaling.type == "linear" or wavelength > original / low:
        return frequency / scaling.factor
    if wavelength < original / high:
        return frequency
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def rms(x, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def linear(p, name, x):
    if f"{name}.weight" in p:
        return x @ p[f"{name}.weight"].T
    return x @ p[f"{name}.down.weight"].T @ p[f"{name}.up.weight"].T
