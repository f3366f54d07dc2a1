"""What fits together of the options of a training of depth gates, whichever command they are given to."""

from dataclasses import fields

from modcompile.config import BudgetConfig, RouterConfig
from modcompile.errors import ConfigError
from modcompile.loss_config import LossConfig
from modcompile.start_config import StartConfig
from modcompile.training_arguments import RouterTrainingArguments


def check_training(
    router: RouterConfig, loss: LossConfig, start: StartConfig, training: RouterTrainingArguments
) -> None:
    """Refuse, before any work, a training that could not do what is asked for.

    Raises:
        ConfigError: routers can't start or learn as they are to; or the best step can't be gone back to, as gates had
            another temperature then.
    """
    start.check_fits(router)
    loss.check_fits(router, is_static=bool(start.static_selection_samples))
    if training.load_best_model_at_end and loss.gate_temperature != 1:
        raise ConfigError(
            "--load_best_model_at_end goes back to gates of another temperature than that of the end; leave it or "
            "--gate_temperature out"
        )


def check_untrained(
    budget: BudgetConfig, loss: LossConfig, start: StartConfig, training: RouterTrainingArguments
) -> None:
    """Refuse options of a training where there will be none.

    Raises:
        ConfigError: there is one.
    """
    given = [
        field.name
        for config in (budget, loss, start)
        for field in fields(config)
        if getattr(config, field.name) != field.default
    ]
    given += ["max_train_steps"] * (training.max_train_steps is not None)
    if given:
        raise ConfigError(f"--{given[0]} asks for a training, but there is no data; add, say, --dataset_name builtin")
