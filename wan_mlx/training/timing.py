"""Seconds of a training step on this machine: one of a model of a single block is timed, on random weights."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from time import perf_counter

import mlx.core as mx

from ..models.execution import Execution
from ..models.transformer import Transformer
from ..planning.sizes import Networks
from ..planning.speed import random_inputs, random_transformer, reading_rate, typical, worth_timing
from ..weights.parameters import Parameters
from .backward import Sample, loss_and_gradients, threads
from .estimate import TrainingPlan, rows_of_text, step_flop
from .factors import layer_shapes, new_factors
from .optimizer import gradient_norm, make_optimizer, update
from .recipe import Recipe


def with_seconds(
    plan: TrainingPlan, nets: Networks, recipe: Recipe, parameters: Parameters | None = None
) -> TrainingPlan:
    """The plan with seconds of a step; takes some seconds.

    ``parameters``: the transformer's, if its weights are here: then reading streamed blocks is timed, too.
    """
    tokens = max(plan.lengths)
    clips = threads(recipe.clips, plan.stream)  # that are trained at once
    step = partial(_step, {}, nets, recipe, plan.keeps, tokens, clips)
    count, one, _ = worth_timing(partial(step, 1), 16, tokens)
    none = typical(partial(step, 0, count))
    whole = none + nets.transformer.num_layers * max(one - none, 0.0)
    # Where all tokens would have taken long, some were timed: with as many fewer tokens of text.
    share = min(1.0, count / tokens)
    flop = step_flop(nets.transformer, count, max(1, round(rows_of_text(nets) * share)))
    seconds = whole * plan.flop / flop * math.ceil(recipe.clips / clips) / recipe.clips
    if plan.stream and parameters and (rate := reading_rate(parameters, stream=True)):
        seconds = max(seconds, plan.reads / rate)
    return replace(plan, seconds=seconds)


def _step(
    models: dict[int, Transformer],
    nets: Networks,
    recipe: Recipe,
    keeps: bool,
    tokens: int,
    clips: int,
    layers: int,
    count: int,
) -> float:
    """Seconds of a step of so many clips over ``count`` of the tokens, with so many blocks.

    ``models``: number of blocks → the model, kept for the next such step: making one can take longer than the step.
    """
    whole = nets.transformer
    text_len = max(1, round(rows_of_text(nets) * count / tokens))
    config = replace(whole, num_layers=layers, vace_layers=(), ref_dim=None, text_len=text_len)
    if layers not in models:
        models[layers] = random_transformer(config, nets)
    model = models[layers]
    model.config = config
    latents, context, more = random_inputs(config, count, nets.dtype)
    factors = new_factors(layer_shapes(config, recipe.targets), recipe.rank, recipe.seed) if layers else {}
    optimizer = make_optimizer(recipe)
    optimizer.init(factors)
    mx.eval(factors, optimizer.state)
    sample = Sample(latents, 500.0, context, latents, more)
    started = perf_counter()
    _, gradients = loss_and_gradients(Execution(model), factors, [sample] * clips, recipe.scale, keeps)
    if gradients:
        update(optimizer, gradients, factors, gradient_norm(gradients), recipe.clip)
    return perf_counter() - started
