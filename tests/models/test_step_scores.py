"""A decode step's rows score their common keys together: the figures are those of each row alone."""

from typing import Any

import pytest
import torch

from sparse_attention_hub import dense_attention
from sparse_attention_hub.kernels.reference import group_scores
from sparse_attention_hub.models.cache import SharedPrefixLayer
from sparse_attention_hub.models.rules import Rule
from sparse_attention_hub.models.step_scores import StepScores

ROWS, HEADS, KV_HEADS, DIM = 3, 6, 2, 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [{}, {"softcap": 2.0}, {"sinks": torch.linspace(-1, 1, HEADS)}])
def test_rows_together_are_rows_alone(how: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)

    def keys_of(rows: int, tokens: int) -> list[torch.Tensor]:
        return [torch.randn(rows, KV_HEADS, tokens, DIM, dtype=dtype) for _ in range(2)]

    layer = SharedPrefixLayer(30)
    layer.append(*keys_of(1, 20))
    layer.fork(ROWS, 8)
    layer.append(*keys_of(ROWS, 4))
    layer.append(*keys_of(ROWS, 1))
    queries = torch.randn(ROWS, HEADS, 1, DIM, dtype=dtype)
    together = StepScores(queries, layer, 0.3, Rule(**how))
    for row in range(ROWS):
        makers, (keys, values) = together.made_of(row), layer.view(row)
        alone = group_scores(queries[row : row + 1], keys, 0.3, how.get("softcap"))
        assert torch.allclose(makers["scores"](), alone, atol=1e-5)
        dense = dense_attention(queries[row : row + 1], keys, values, scaling=0.3, **how)
        assert torch.allclose(makers["dense_output"](), dense, atol=1e-5)
