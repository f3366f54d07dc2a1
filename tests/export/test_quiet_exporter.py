import logging
import warnings

import pytest

from modcompile.export.quiet_exporter import quiet_exporter

MUTED = ["onnx_ir.passes.common.initializer_deduplication", "torch.onnx._internal.exporter._registration"]


@pytest.mark.parametrize("name", MUTED)
def test_mutes_warnings_but_no_errors(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with quiet_exporter():
        logging.getLogger(name).warning("a remark")
        logging.getLogger(name).error("a failure")
        warnings.warn("deprecated", FutureWarning, stacklevel=1)
    assert caplog.messages == ["a failure"]


def test_leaves_other_loggers_alone(caplog: pytest.LogCaptureFixture) -> None:
    with quiet_exporter():
        logging.getLogger("onnx_ir.passes.common.inliner").warning("another remark")
    assert caplog.messages == ["another remark"]


@pytest.mark.parametrize("name", MUTED)
def test_is_over_at_the_end_even_after_an_error(name: str) -> None:
    logger = logging.getLogger(name)
    before, filters = logger.level, list(warnings.filters)
    with pytest.raises(ValueError, match="stop"), quiet_exporter():
        raise ValueError("stop")
    assert logger.level == before
    assert list(warnings.filters) == filters
