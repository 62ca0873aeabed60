"""Plans of transport and sums over them: kernels against the references that ship."""

from __future__ import annotations

import pytest
from fusee._op import Op
from fusee.transport.transport_plan import transport_plan, transport_plan_gradient

from tests.transport.calls import check_kernel, check_reference


@pytest.mark.parametrize("op", [transport_plan, transport_plan_gradient], ids=lambda op: op.name)
def test_kernel_and_reference(op: Op) -> None:
    check_kernel(op)
    check_reference(op)
