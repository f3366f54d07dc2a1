"""Keep the libraries of the export from remarks that no user can act on."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = (
    "torch.onnx._internal.exporter._registration",  # optional packages that are not there
    "onnx_ir.passes.common.initializer_deduplication",  # an optional input keeps an initializer of its own, as it must
)


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Without Python's warnings (the exporter calls deprecated functions), and without what these loggers warn of."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
