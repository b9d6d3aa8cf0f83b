# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-experts layers in each framework, trained on real hidden states. `examples.plot` trains all."""
