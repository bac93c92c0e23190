"""The one table of tolerances: relative to the norm of the whole gradient or of the value. Loosen one with a reason."""

import torch

GRADIENT = 1e-10
"""Gradients in float64 against the closed form."""

STOCK = 1e-6
"""The same on stock Flux and SD3: Flux's RoPE and SD3's RMSNorm cast to float32 inside (measured: 1.2e-7)."""

EXACT = 1e-13
"""The same arithmetic in another order, in float64."""

VALUE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Values that are computed, not copied, by dtype. Copied values are compared with torch.equal."""

QUADRATURE = 1e-9
"""Lagrange weights against an independent quadrature; supports may be close."""
