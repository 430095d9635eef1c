"Settings of the serving process; where the models are is `shopai.core.config`'s matter."

from typing import Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from shopai.core.config import UsageError


class ServeSettings(BaseSettings):
    "Each field is read from the variable `SHOPAI_SERVE_<FIELD>`."

    model_config = SettingsConfigDict(env_prefix="SHOPAI_SERVE_", extra="ignore", frozen=True)

    model: str = Field("recommend", min_length=1, description="name of the model whose champion is served")
    poll_seconds: float = Field(5.0, gt=0, le=3600, description="how often the store is asked for a new champion")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")


def get_serve_settings() -> ServeSettings:
    "The settings in force. Raises `UsageError` that names the variable."
    try:
        return ServeSettings()
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"SHOPAI_SERVE_{str(first['loc'][0]).upper()}: {first['msg']}, got {first['input']!r}") from None
