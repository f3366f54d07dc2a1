import pytest

from modcompile.config import RouterConfig
from modcompile.errors import ConfigError
from modcompile.start_config import StartConfig


def test_routers_with_a_hidden_layer_are_not_fitted() -> None:
    with pytest.raises(ConfigError, match="but --router_hidden_size is 32; make them with --router_hidden_size 0"):
        StartConfig(router_start_samples=1).check_fits(RouterConfig())


def test_others_are() -> None:
    StartConfig(router_start_samples=1).check_fits(RouterConfig(router_hidden_size=0))
    StartConfig().check_fits(RouterConfig())


def test_a_static_selection_trains_adapters() -> None:
    config = StartConfig(static_selection_samples=1)
    config.check_fits(RouterConfig(skip_adapter="scale"))
    with pytest.raises(ConfigError, match="--static_selection_samples trains adapters, and there are none"):
        config.check_fits(RouterConfig())


def test_a_static_selection_has_no_routers_to_fit() -> None:
    with pytest.raises(ConfigError, match="--router_start_samples is for routers, and a static selection has none"):
        StartConfig(static_selection_samples=1, router_start_samples=1)
