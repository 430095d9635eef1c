"Settings of the serving process; where the models are is `shopai.core.config`'s matter."

import re
from typing import Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from shopai.core.config import UsageError

ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:\d+)?|https?://\[[0-9a-f:]+\](:\d+)?")  # as a browser writes it: lower case, no path, no default port


class ServeSettings(BaseSettings):
    "Each field is read from the variable `SHOPAI_SERVE_<FIELD>`."

    model_config = SettingsConfigDict(env_prefix="SHOPAI_SERVE_", extra="ignore", frozen=True)

    model: str = Field("recommend", min_length=1, description="name of the model whose champion is served")
    poll_seconds: float = Field(5.0, gt=0, le=3600, description="how often the store is asked for a new champion")
    feature_timeout_ms: float = Field(20.0, gt=0, le=1000, description="how long the online feature store may take before an answer goes on without it")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")
    origins: str = Field("", description="other sites whose pages may send events, such as https://shop.example,https://m.shop.example; default the API's own")
    trusted_proxies: int = Field(0, ge=0, le=16, description="how many proxies of the shop's own stand before this process and append to X-Forwarded-For")

    @field_validator("origins")
    @classmethod
    def _are_origins(cls, origins: str) -> str:
        for origin in filter(None, map(str.strip, origins.split(","))):
            if not ORIGIN.fullmatch(origin):
                raise ValueError(f"must be origins such as https://shop.example, separated by commas, without a path; {origin} isn't one")
        return origins

    @property
    def allowed_origins(self) -> frozenset[str]: return frozenset(filter(None, map(str.strip, self.origins.split(","))))


def get_serve_settings() -> ServeSettings:
    "The settings in force. Raises `UsageError` that names the variable."
    try:
        return ServeSettings()
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"SHOPAI_SERVE_{str(first['loc'][0]).upper()}: {first['msg']}, got {first['input']!r}") from None
