# SPDX-License-Identifier: Apache-2.0
"""A mixture-of-experts layer in each framework, trained on real hidden states; `python -m examples.plot` trains all."""
