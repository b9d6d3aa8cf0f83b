# SPDX-License-Identifier: Apache-2.0
"""Random layouts and rows: the NumPy reference against loops."""

from __future__ import annotations

from typing import Any

import hypothesis
import numpy as np
import pytest

from tests import oracle_layout
from tests.fuzz.case import Case, wanted
from tests.fuzz.layout_case import names_of
from tests.fuzz.layout_strategies import LayoutSetting, layout_cases, layout_settings
from tests.layout_calls import same_bytes

SETTINGS = [setting for setting in layout_settings(11, 60) if setting.op in ("expert_layout", "permute")]


def by_loops(case: Case) -> list[np.ndarray]:
    arrays, options = case.arrays, dict(case.options)
    if case.op == "permute":
        return [oracle_layout.permute(arrays["x"], arrays["order"], case.shape[1], arrays.get("weights"))]
    question: dict[str, Any] = {name: options.get(name) for name in ("experts", "num_local")}
    question |= {"expert_map": arrays.get("expert_map"), "num_valid": case.num_valid}
    more = {name: options[name] for name in ("alignment", "capacity", "want", "pad") if name in options}
    found = oracle_layout.expert_layout(arrays["indices"], options["num_experts"], **question, **more)
    made = [found[name] for name in names_of(options)]
    if "load" in arrays:
        demand = oracle_layout.demand(arrays["indices"], options["num_experts"], **question)
        made.append(arrays["load"] + demand.astype(arrays["load"].dtype))
    return made


@pytest.mark.slow("seconds", every=6)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_reference_is_right(setting: LayoutSetting) -> None:
    @hypothesis.settings(max_examples=25, database=None, deadline=None, derandomize=True)
    @hypothesis.given(layout_cases(setting))
    def proves(case: Case) -> None:
        for got, right in zip(wanted(case), by_loops(case), strict=True):
            if got.dtype.kind in "fV":  # NaN of any payload
                np.testing.assert_array_equal(got.astype(np.float32), right.astype(np.float32))
            else:
                same_bytes(got, right)

    proves()
