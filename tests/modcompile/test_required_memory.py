import psutil
import pytest
import torch

from modcompile.errors import ConfigError
from modcompile.required_memory import require_memory

CPU = torch.device("cpu")


def test_what_fits_passes() -> None:
    require_memory(psutil.virtual_memory().available // 8, CPU, "--samples", "fewer")


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^--samples needs [\d,]+\.\d GB .* [\d.]+ GB are free on cpu; give fewer$"):
        require_memory(psutil.virtual_memory().total, CPU, "--samples", "fewer")
