import pytest

from modcompile.config import RouterConfig
from modcompile.errors import ConfigError
from modcompile.start_config import StartConfig


@pytest.mark.parametrize("size", [0, 2, 32])
def test_fits_routers_that_can_be_linear(size: int) -> None:
    StartConfig(router_start_samples=1).check_fits(RouterConfig(router_hidden_size=size))


def test_a_hidden_layer_of_one_is_not_fitted() -> None:
    narrow = RouterConfig(router_hidden_size=1)
    StartConfig().check_fits(narrow)
    with pytest.raises(ConfigError, match="but --router_hidden_size is 1; make it 0, or 2 and more"):
        StartConfig(router_start_samples=1).check_fits(narrow)


def test_a_static_selection_trains_adapters() -> None:
    config = StartConfig(static_selection_samples=1)
    config.check_fits(RouterConfig(skip_adapter="scale"))
    with pytest.raises(ConfigError, match="--static_selection_samples trains adapters, and there are none"):
        config.check_fits(RouterConfig())


def test_a_static_selection_has_no_routers_to_fit() -> None:
    with pytest.raises(ConfigError, match="--router_start_samples is for routers, and a static selection has none"):
        StartConfig(static_selection_samples=1, router_start_samples=1)
