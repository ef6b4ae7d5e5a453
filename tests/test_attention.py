"""Attention has no mask; keys that are appended to fill a GPU's last tile weigh next to nothing, whatever the queries
are."""

from __future__ import annotations

import ast
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from arrays import relative_error

import wan_mlx
from wan_mlx.cuda import forward as cuda_attention
from wan_mlx.models import attention_execution
from wan_mlx.models.attention import SelfAttention, attention
from wan_mlx.models.configs import TransformerConfig
from wan_mlx.models.pieces import Pacer
from wan_mlx.models.rope import rope_table

LENGTH, COUNT, HEADS, HEAD_DIM = 1016, 8, 2, 16


def weights(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Softmax of scaled products in float64: (B, heads, queries, keys)."""
    scores = np.einsum("bqhd,bkhd->bhqk", q.astype(np.float64), k.astype(np.float64)) * HEAD_DIM**-0.5
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_mlx_s_attention_never_gets_a_mask():
    files = Path(wan_mlx.__file__).parent.rglob("*.py")
    nodes = (node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    calls = [node for node in nodes if isinstance(node, ast.Call) and ".scaled_dot_product" in ast.unparse(node.func)]
    assert len(calls) == 5
    assert {(len(call.args), *(one.arg for one in call.keywords)) for call in calls} == {(3, "scale")}


@pytest.mark.parametrize("case", ["any", "all far from zero", "one key takes all", "two groups", "all the same"])
def test_appended_keys_move_the_result_by_no_more_than_their_share(case):
    rng = np.random.default_rng(0)
    k = rng.normal(size=(2, LENGTH, HEADS, HEAD_DIM))
    direction = np.ones(HEAD_DIM)
    if case == "all far from zero":  # so that keys of zeros would take nearly all from half of the queries
        k += 4 * direction
    elif case == "one key takes all":
        k[:, 5] += 30 * direction
    elif case == "two groups":
        k[:, ::2] += 8 * direction
        k[:, 1::2] -= 8 * direction
    elif case == "all the same":
        k[:] = k[:, :1]
    q = rng.normal(size=(2, 64, HEADS, HEAD_DIM)) * np.linspace(-3, 3, 64)[None, :, None, None] + direction
    k, v = k.astype(np.float32), rng.normal(size=k.shape).astype(np.float32) + 1
    more_k, more_v = (np.array(cuda_attention.append_mean(mx.array(x), COUNT)) for x in (k, v))
    assert more_k.shape == more_v.shape == (2, LENGTH + COUNT, HEADS, HEAD_DIM)
    assert np.array_equal(more_k[:, :LENGTH], k) and np.array_equal(more_v[:, :LENGTH], v)
    shares = weights(q, more_k)
    most = COUNT / (LENGTH + COUNT)
    assert shares[..., LENGTH:].sum(-1).max() <= most * (1 + 1e-4)
    exact = np.einsum("bhqk,bkhd->bqhd", weights(q, k), v)
    moved = np.abs(np.einsum("bhqk,bkhd->bqhd", shares, more_v) - exact)
    assert (moved <= most * np.abs(v.mean(1, keepdims=True) - exact) + 1e-5).all()


def test_the_mean_of_bfloat16_is_summed_in_more_digits():
    """A sum of 30,000 ones in bfloat16 stays at 256."""
    x = mx.ones((1, 30_000, 1, 4), mx.bfloat16)
    assert mx.abs(cuda_attention.append_mean(x, 1)[0, -1].astype(mx.float32) - 1).max() < 0.01


@pytest.mark.parametrize("room", [0, 3, 5])
def test_means_go_into_room_that_there_is(room):
    """Where others' tokens have been gathered: what stands there does not count."""
    x = mx.random.normal((2, 40, 3, 4), key=mx.random.key(0))
    with_room = mx.concatenate([x, mx.full((2, room, 3, 4), mx.nan)], axis=1)
    assert mx.array_equal(cuda_attention.append_mean(with_room, 3, 40), cuda_attention.append_mean(x, 3))
    assert mx.array_equal(cuda_attention.append_mean(with_room, 0, 40), x)


@pytest.mark.parametrize("length, expected", [(32760, 8), (75600, 48), (32768, 0), (1000, 0), (127 * 1024 - 127, 0)])
def test_keys_are_appended_on_cuda_where_they_are_few(monkeypatch, length, expected):
    assert cuda_attention.keys_to_append(length) == 0  # here
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    assert cuda_attention.keys_to_append(length) == expected
    x = mx.zeros((1, length, 1, 8), mx.bfloat16)
    assert cuda_attention.fill_last_tile(x).shape == (1, length + expected, 1, 8)


def test_self_attention_appends_to_keys_and_values_alone(monkeypatch):
    """And attends to nothing else: with and without, the outcome is the same within the share of the appended."""
    config = TransformerConfig("t2v", dim=48, ffn_dim=64, num_heads=2, num_layers=1, freq_dim=32, text_dim=32)
    layer, x = SelfAttention(config), mx.random.normal((1, 4095, 48), key=mx.random.key(1))
    for i, project in enumerate((layer.q, layer.k, layer.v)):
        project.weight = mx.random.normal((48, 48), key=mx.random.key(2 + i)) * 48**-0.5
    table, pace = rope_table((1, 63, 65), 24), Pacer()
    q, k, v = attention_execution.queries_keys_values(layer, x, table, pace)
    monkeypatch.setattr(cuda_attention, "keys_to_append", lambda length: -length % 128)
    same = attention_execution.queries_keys_values(layer, x, table, pace)
    assert same[1].shape[1] == 4095  # no kernel that it would speed up
    monkeypatch.setattr(attention_execution, "has_fused_kernel", lambda dtype, head_dim: True)
    more = attention_execution.queries_keys_values(layer, x, table, pace)
    assert [a.shape[1] for a in more] == [4095, 4096, 4096]
    assert mx.array_equal(more[0], q) and mx.array_equal(more[1][:, :-1], k) and mx.array_equal(more[2][:, :-1], v)
    error = relative_error(attention(*more), attention(q, k, v))
    assert 0 < error < 2 / 4096
