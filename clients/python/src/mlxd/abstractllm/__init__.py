"""The provider `mlxd` for AbstractLLM. Importing this module registers it.

import mlxd.abstractllm
from abstractllm import create_llm

llm = create_llm("mlxd", model="SmolLM2-135M-Instruct")
"""

from abstractllm.providers.registry import register_provider

from mlxd.abstractllm.provider import MlxdProvider

__all__ = ["MlxdProvider"]

register_provider("mlxd", __name__, "MlxdProvider")
