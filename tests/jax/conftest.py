"""Fixtures of the JAX tests: one small Mistral of transformers and its port, rows, and a regressor on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

MISSING = [name for name in ("jax", "equinox", "optax", "jaxtyping") if find_spec(name) is None]


class NotInstalled(pytest.Module):
    """A test file that is not even imported."""

    def collect(self) -> Any:
        pytest.skip(f"the extra jax is not installed: {', '.join(MISSING)}", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> pytest.Module | None:
    return NotInstalled.from_parent(parent, path=module_path) if MISSING else None


if not MISSING:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # What is compiled here runs for microseconds: to optimise it would take most of the tests' time.
    quick = ("backend_optimization_level=0", "llvm_disable_expensive_passes=true", "cpu_use_fusion_emitters=false")
    os.environ.setdefault("XLA_FLAGS", " ".join(f"--xla_{flag}" for flag in quick))
    if find_spec("beartype") is not None and "perdure.jax.mistral" not in sys.modules:
        from jaxtyping import install_import_hook

        # Shapes in signatures are checked in tests, and cost nothing elsewhere.
        shaped = [f"perdure.jax.{name}" for name in ("mistral", "heads", "lora", "regressor")]
        install_import_hook(shaped, "beartype.beartype")

SHAPE: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "sliding_window": 5, "max_position_embeddings": 64,
    "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
}  # fmt: skip


@pytest.fixture(scope="session")
def make_mistral() -> Callable[..., Any]:
    """A random Mistral of transformers, weights and norms far from their first values: `make_mistral(**config)`."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    def make(dtype: Any = torch.float32, **changes: Any) -> Any:
        torch.manual_seed(0)
        model = MistralForCausalLM(MistralConfig(**{**SHAPE, **changes})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
                else:
                    parameter.uniform_(0.5, 1.5)
        return model.to(dtype)

    return make


@pytest.fixture(scope="session")
def mistral(make_mistral: Callable[..., Any]) -> Any:
    """A Mistral of transformers whose window is shorter than the rows of the tests."""
    return make_mistral()


@pytest.fixture(scope="session")
def huggingface(mistral: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder."""
    folder = tmp_path_factory.mktemp("mistral") / "huggingface"
    mistral.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ported(huggingface: Path) -> Path:
    """Its port."""
    from perdure.jax.port import port

    return port(huggingface, huggingface.with_name("ported"))


@pytest.fixture(scope="session")
def backbone(ported: Path) -> Any:
    """The port, loaded."""
    from perdure.jax import load

    return load(ported)


@pytest.fixture(scope="session")
def ids() -> Any:
    """Token ids [2, 17], longer than three windows."""
    import numpy as np

    return np.random.default_rng(0).integers(0, 48, (2, 17)).astype(np.int32)


@pytest.fixture(scope="session")
def make_regressor(backbone: Any) -> Callable[..., Any]:
    """A regressor on the port: `make_regressor(lora=False, dropout=0.2)`; the same weights each time."""
    import jax

    from perdure.jax import MHAR, Regressor, add_lora

    def make(lora: bool = False, dropout: float = 0.2) -> Any:
        base = add_lora(backbone, jax.random.key(1), r=4, alpha=8) if lora else backbone
        return Regressor(base, MHAR(32, jax.random.key(2), heads=4, hidden=24, dropout=dropout))

    return make


@pytest.fixture(scope="session")
def make_tasks() -> Callable[..., Any]:
    """Tasks of ragged rows: `make_tasks(count, rows, seed)`."""
    import numpy as np

    from perdure.jax import Row, RowTask

    def make(count: int = 2, rows: int = 7, seed: int = 0) -> Any:
        rng = np.random.default_rng(seed)

        def row(task: str, number: int) -> Any:
            ids = tuple(int(i) for i in rng.integers(0, 48, int(rng.integers(3, 9))))
            return Row(f"r{number}", ids, float(rng.uniform()), task)

        return [RowTask(f"t{t}", tuple(row(f"t{t}", i) for i in range(rows))) for t in range(count)]

    return make


@pytest.fixture(scope="session")
def make_learner(make_regressor: Callable[..., Any]) -> Callable[..., Any]:
    """A learner as new: `make_learner(dropout=0.2, **settings)`; what it compiled for the same settings stays."""
    import jax
    import jax.numpy as jnp

    from perdure.jax import FitSettings, Learner

    made: dict[Any, Any] = {}
    usual = {"batch_size": 4, "length": 8, "lr": 1e-2, "epochs": 2, "memory": 5, "ratio": 0.75, "seed": 3}

    def make(dropout: float = 0.2, **changes: Any) -> Any:
        settings = FitSettings(**{**usual, **changes})
        if (settings, dropout) not in made:
            learner = Learner(make_regressor(settings.tuning == "lora", dropout), settings)
            # The state itself is used up by the first step.
            made[settings, dropout] = learner, jax.tree.map(jnp.copy, learner.state)
        learner, state = made[settings, dropout]
        learner.state, learner.steps = jax.tree.map(jnp.copy, state), 0
        return learner

    return make
