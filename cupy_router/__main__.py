# SPDX-License-Identifier: Apache-2.0
"""``python -m cupy_router`` is ``cupy-router``."""

from cupy_router.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
