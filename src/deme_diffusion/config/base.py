"""What every group of settings shares: frozen, typed, unknown keys refused."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]


class Settings(BaseModel):
    """A frozen group of settings; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def changed(self) -> dict[str, Any]:
        """Settings that differ from their defaults: what a digest covers, so that new settings orphan nothing."""
        return self.model_dump(mode="json", exclude_defaults=True)
