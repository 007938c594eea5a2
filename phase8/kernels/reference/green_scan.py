"""The causal Green function of a tridiagonal operator: g_i = 1 / (E + i eta - a_i - b2 g_{i-1}).

A continued fraction, that is, a composition of Möbius maps; each map is a 2 x 2 complex matrix acting on (g, 1), so the whole
chain is an associative scan of matrix products. For eta > 0 it holds exactly that Im g_i < 0 and |g_i| <= 1/eta, and
-Im g_i = |g_i|^2 (eta + b2 * -Im g_{i-1}) (the optical theorem).

Shapes: B batch, T tokens, H heads. Complex numbers cross the interface as a last dim of 2 (real, imaginary).
"""

from __future__ import annotations

import torch
from torch import Tensor

from phase8.kernels.reference.associative_scan import Elements, associative_scan, linear_scan


def green_scan(potential: Tensor, energy: Tensor, eta: Tensor, hopping: Tensor, starts: Tensor | None, initial_state: Tensor | None) -> Tensor:
    """The Green function of every token.

    Args:
        potential: a [B, T, H].
        energy: E [H].
        eta: Imaginary part of the energy, positive [H].
        hopping: Squared coupling b2 to the previous token, not negative [H].
        starts: True where a token begins a document and the chain starts anew [B, T]; None: nowhere.
        initial_state: g before the first token [B, H, 2]; None: 0.

    Returns:
        g [B, T, H, 2]; its last token is the state to carry on.
    """
    couplings = coupling(hopping, starts, potential)
    denominator = torch.complex(energy - potential, eta.expand_as(potential))
    zero = torch.zeros_like(denominator)
    maps = (zero, torch.ones_like(denominator), -couplings.to(denominator.dtype), denominator)
    a, b, c, d = associative_scan(compose, maps)
    if initial_state is None:
        return torch.view_as_real(b / d)
    g0 = torch.view_as_complex(initial_state.contiguous())[:, None]
    return torch.view_as_real((a * g0 + b) / (c * g0 + d))


def green_scan_backward(
    grad: Tensor, g: Tensor, hopping: Tensor, starts: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The adjoint: p_i = conj(g_i^2) (dg_i + b2_{i+1} p_{i+1}), itself a linear scan from the last token to the first.

    Args:
        grad: Gradient of g [B, T, H, 2].
        g: What the forward returned [B, T, H, 2].
        hopping: As in the forward [H].
        starts: As in the forward [B, T].
        initial_state: As in the forward [B, H, 2].

    Returns:
        Gradients of potential [B, T, H], energy [H], eta [H], hopping [H] and initial_state [B, H, 2].
    """
    dg, g = torch.view_as_complex(grad.contiguous()), torch.view_as_complex(g.contiguous())
    couplings = coupling(hopping, starts, g.real)
    g0 = torch.zeros_like(g[:, 0]) if initial_state is None else torch.view_as_complex(initial_state.contiguous())
    # conj_physical: compiled graphs may call this below the dispatch key that resolves a lazy conj(), which would then be lost.
    square = torch.conj_physical(g * g)
    next_coupling = torch.cat((couplings[:, 1:], torch.zeros_like(couplings[:, :1])), dim=1)
    p = linear_scan((square * next_coupling).flip(1), (square * dg).flip(1)).flip(1)
    previous = torch.cat((g0[:, None], g[:, :-1]), dim=1)
    connected = 1.0 if starts is None else (~starts)[..., None]
    dhopping = ((torch.conj_physical(previous) * p).real * connected).sum((0, 1))
    dinitial = torch.view_as_real(couplings[:, 0] * p[:, 0])
    return p.real, -p.real.sum((0, 1)), -p.imag.sum((0, 1)), dhopping, dinitial


def coupling(hopping: Tensor, starts: Tensor | None, like: Tensor) -> Tensor:
    """b2 of every token [B, T, H], 0 where a document starts."""
    couplings = hopping.expand_as(like)
    return couplings if starts is None else couplings.masked_fill(starts[..., None], 0.0)


def compose(early: Elements, late: Elements) -> Elements:
    """The matrix product late @ early, scaled so that its largest entry has modulus about 1 (a Möbius map has no scale)."""
    a1, b1, c1, d1 = early
    a2, b2, c2, d2 = late
    product = (a2 * a1 + b2 * c1, a2 * b1 + b2 * d1, c2 * a1 + d2 * c1, c2 * b1 + d2 * d1)
    parts = torch.stack([torch.view_as_real(entry) for entry in product])
    scale = parts.abs().amax((0, -1)).reciprocal()
    return tuple(entry * scale for entry in product)
