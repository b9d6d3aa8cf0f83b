# SPDX-License-Identifier: Apache-2.0
"""Run ``cupy-router`` as ``python -m cupy_router``."""

from cupy_router.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
