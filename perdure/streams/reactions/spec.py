"""The settings of a table of reactions, as they stand in a recipe or behind a command."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, field_validator, model_validator


class ReactionsSpec(BaseModel):
    """A table of reactions with yields, and the stream of tasks that is made of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str = Field(min_length=1, description=".csv or .tsv (also .gz) or .xlsx")
    sheet: str | None = Field(None, min_length=1, description="sheet of a spreadsheet; default: its first")
    smiles_column: str | None = Field(None, min_length=1, description="reaction SMILES; default: found by its name")
    yield_column: str | None = Field(None, min_length=1, description="yield; default: found by its name")
    yield_scale: Literal["auto", "percent", "fraction"] = Field(
        "auto", description="auto: percent where the largest is above 1.5, else fraction"
    )
    key_column: str | None = Field(
        None, min_length=1, description="column that names a row; default: found, or a hash"
    )
    task_columns: tuple[str, ...] | None = Field(
        None, description="rows that agree in these are one task; (): all rows are; default: the reactant pair"
    )
    condition_columns: tuple[str, ...] | None = Field(
        None, description="columns kept as conditions; default: all that are neither SMILES, yield nor key"
    )
    order: Literal["file", "random", "sorted", "similarity"] = Field("file", description="order of the tasks")
    similarity: Literal["auto", "morgan", "grams"] = Field(
        "auto", description="fingerprints (needs RDKit) or 4-grams of SMILES; auto: fingerprints where RDKit is"
    )
    holdout: float = Field(0.3, ge=0, lt=1, allow_inf_nan=False, description="share of each task's rows held out")
    augment: int = Field(0, ge=0, description="randomised copies of each training row (needs RDKit)")
    canonical: StrictBool = Field(False, description="write every SMILES in its canonical form (needs RDKit)")

    @field_validator("task_columns", "condition_columns")
    @classmethod
    def _differ(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and (len(set(value)) < len(value) or not all(value)):
            raise ValueError(f"columns must differ and have a name, got {list(value)}")
        return value

    @model_validator(mode="after")
    def _agree(self) -> ReactionsSpec:
        if self.smiles_column is not None and self.smiles_column == self.yield_column:
            raise ValueError(f"smiles_column and yield_column are both {self.smiles_column!r}; they must differ")
        for column in self.condition_columns or ():
            if column in (self.smiles_column, self.yield_column):
                raise ValueError(
                    f"condition_columns holds {column!r}, which is the SMILES or the yield; leave it out"
                )
        return self
