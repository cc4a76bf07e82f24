# SPDX-License-Identifier: Apache-2.0
"""Every op in plain PyTorch: the definition that kernels are held to, and the fallback without them."""
