# SPDX-License-Identifier: Apache-2.0
"""Triton kernels and their launchers. Installed as ``wavedp.kernels``; imports torch and triton only."""
