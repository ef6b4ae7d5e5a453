"""What LoRA files do to a parameter: the kinds as a table, and their arithmetic, merged or beside the weights.

A kind adds a matrix, each in its smallest form: ``up @ down`` (LoRA), two such products multiplied by element (LoHa), a
Kronecker product (LoKr), or all values (differences). DoRA then gives each row of the sum, or each column, another
norm; whole weights replace what was there. In any order these leave ``rows * W * columns + terms``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import mlx.core as mx

from ..errors import WeightsError
from ..files.base import WeightsFile
from .component import only_zeros

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
W1, W2 = ("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b")
# Kind → the sets of roles (see `Change.keys`) that its matrix is stored as.
KINDS: dict[str, tuple[set[str], ...]] = {
    "LoRA": ({"down", "up"},),
    "LoHa": ({*LOHA},),
    "LoKr": ({"lokr_w1", "lokr_w2"}, {"lokr_w1", *W2}, {*W1, "lokr_w2"}, {*W1, *W2}),
}
# Roles that may stand beside a kind's; magnitudes are PEFT's and Diffusers' of DoRA, dora_scale is LyCORIS'.
MAGNITUDES = ("magnitude", "dora_scale")
OTHER_ROLES = {"alpha", "diff", "up_bias", "whole", *MAGNITUDES}
RANKS = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")  # roles whose first axis is the rank
NEVER_ZERO = ("down", "hada_w1_b", "lokr_w2_a")  # which no tool initialises with zeros
SMALLEST_NORM = 1e-12


def kind_of(roles: Iterable[str]) -> str | None:
    """The kind whose matrix is stored as these roles, "" if there is no matrix, None if one is not complete."""
    stored = {*roles} - OTHER_ROLES
    return next((kind for kind, forms in KINDS.items() if stored in forms), None) if stored else ""


@dataclass(frozen=True)
class Product:
    """``factor * (up @ down)``: (outputs, rank) and (rank, inputs)."""

    up: mx.array
    down: mx.array
    factor: float = 1.0

    def matrix(self) -> mx.array:
        return self.factor * (self.up @ self.down)

    def scaled(self, by: mx.array) -> Product:
        """``by`` is one number, or of shape (outputs, 1) or (1, inputs)."""
        over_rows = by.ndim == 0 or by.shape[1] == 1
        up, down = (by * self.up, self.down) if over_rows else (self.up, self.down * by)
        return Product(up, down, self.factor)

    def norm(self) -> mx.array:
        """Of the matrix, which is not made: |BA|² = trace((BᵀB)(AAᵀ))."""
        squared = ((self.up.T @ self.up) * (self.down @ self.down.T)).sum()
        return abs(self.factor) * mx.sqrt(mx.maximum(squared, 0))


@dataclass(frozen=True)
class Hadamard:
    """``first * second``, by element."""

    first: Product
    second: Product

    def matrix(self) -> mx.array:
        return self.first.matrix() * self.second.matrix()

    def scaled(self, by: mx.array) -> Hadamard:
        return Hadamard(self.first.scaled(by), self.second)

    def norm(self) -> mx.array:
        return mx.linalg.norm(self.matrix())

    def product(self) -> Product | None:
        """The same as one product, whose rank is that of both multiplied; None if that has more values than all."""
        (up, down), (up2, down2) = ((pair.factor * pair.up, pair.down) for pair in (self.first, self.second))
        rank, outputs, inputs = up.shape[1] * up2.shape[1], up.shape[0], down.shape[1]
        if rank * (outputs + inputs) >= outputs * inputs:
            return None
        ups = (up[:, :, None] * up2[:, None, :]).reshape(outputs, rank)
        return Product(ups, (down[:, None, :] * down2[None, :, :]).reshape(rank, inputs))


@dataclass(frozen=True)
class Kronecker:
    """``kron(left, right)``."""

    left: mx.array
    right: mx.array

    def matrix(self) -> mx.array:
        return mx.kron(self.left, self.right)

    def scaled(self, by: mx.array) -> Kronecker | Dense:
        return Kronecker(by * self.left, self.right) if by.ndim == 0 else Dense(by * self.matrix())

    def norm(self) -> mx.array:
        return mx.linalg.norm(self.left) * mx.linalg.norm(self.right)


@dataclass(frozen=True)
class Dense:
    """All values of a parameter of any shape."""

    values: mx.array

    def matrix(self) -> mx.array:
        return self.values

    def scaled(self, by: mx.array) -> Dense:
        return Dense(by * self.values)

    def norm(self) -> mx.array:
        return mx.sqrt((self.values * self.values).sum())


Term = Product | Hadamard | Kronecker | Dense


@dataclass
class Changed:
    """A parameter ``W`` after changes: ``rows * W * columns + terms``, float32, in the file's order.

    ``rows`` is one number or (outputs, 1), ``columns`` one number or (1, inputs).
    """

    rows: mx.array = field(default_factory=lambda: mx.array(1.0))
    columns: mx.array = field(default_factory=lambda: mx.array(1.0))
    terms: list[Term] = field(default_factory=list)

    def scale(self, by: mx.array) -> None:
        """Multiply all by one number, or by (outputs, 1) or (1, inputs)."""
        if by.ndim and by.shape[1] > 1:
            self.columns = self.columns * by
        else:
            self.rows = self.rows * by
        self.terms = [term.scaled(by) for term in self.terms]

    def of(self, array: mx.array) -> mx.array:
        """The changed values of a float32 ``array``."""
        for factor in (self.rows, self.columns):
            array = array * factor if factor.ndim or factor.item() != 1 else array
        for term in self.terms:
            array = array + term.matrix()
        return array

    def beside(self, dtype: mx.Dtype, shape: tuple[int, ...], order: mx.array | None) -> dict[str, Any]:
        """The arrays that a linear layer of ``shape``, with rows in ``order``, keeps beside its own: see `with_side`.

        The products are stacked along the rank. A Kronecker product stays in two parts, whose result is reordered.
        """
        compact: list[Term] = [(term.product() or term) if isinstance(term, Hadamard) else term for term in self.terms]
        products = [term for term in compact if isinstance(term, Product)]
        krons = [term for term in compact if isinstance(term, Kronecker)]
        dense = [term.matrix() for term in compact if not isinstance(term, Product | Kronecker)]
        arrays: dict[str, Any] = {}
        if products:
            arrays["lora_a"] = mx.concatenate([term.down for term in products])
            arrays["lora_b"] = mx.concatenate([term.factor * term.up for term in products], axis=1)
        if dense:
            arrays["lora_dense"] = sum(dense[1:], dense[0])
        for part in ("left", "right") if krons else ():
            arrays[f"lora_{part}"] = [getattr(term, part).astype(dtype) for term in krons]
        if self.rows.ndim or self.rows.item() != 1:
            arrays["lora_rows"] = mx.broadcast_to(self.rows, (shape[0], 1)).flatten()
        if self.columns.ndim:
            arrays["lora_columns"] = self.columns.flatten()
        if order is not None:
            for key in arrays.keys() & {"lora_b", "lora_dense", "lora_rows"}:
                arrays[key] = arrays[key][order]
            arrays |= {"lora_order": order} if krons else {}
        for key in arrays.keys() & {"lora_a", "lora_b", "lora_dense", "lora_columns"}:
            arrays[key] = arrays[key].astype(dtype)
        return arrays


@dataclass
class Change:
    """One file's change of one parameter.

    Attributes:
        shape: the parameter's, in this package's layout.
        patch: for a patch embedding, values of one channel in a patch; else 0.
        keys: role → key in the file.
        scale: of the matrix, beside the strength: alpha / rank.
        norms: DoRA's, once they were computed; a Change is of one loaded transformer.
    """

    file: WeightsFile
    strength: float
    shape: tuple[int, ...]
    patch: int
    keys: dict[str, str] = field(default_factory=dict)
    scale: float = 1.0
    norms: mx.array | None = None

    @property
    def rank(self) -> int | None:
        """None for differences, and for LoKr of two whole matrices."""
        return next((self.file.tensors[self.keys[role]].shape[0] for role in RANKS if role in self.keys), None)

    def apply(self, state: Changed, base: Callable[[], mx.array]) -> None:
        """Change ``state``, a parameter as earlier files leave it; ``base``: returns its values before all of them.

        DoRA: PEFT's strength is the matrix's, as in Diffusers; LyCORIS' is a way from no change (0) to its own (1).
        """
        if "whole" in self.keys:
            state.scale(mx.array(1 - self.strength))
            state.terms.append(Dense(self.strength * self._values("whole")))
        terms, magnitude = self.terms(), self._magnitude()
        if magnitude is None:
            state.terms += terms
            return
        if self.norms is None:
            total = Changed(state.rows, state.columns, state.terms + terms).of(base())
            axis = 1 if magnitude.shape[1] == 1 else 0
            self.norms = mx.maximum(mx.linalg.norm(total, axis=axis, keepdims=True), SMALLEST_NORM)
            mx.eval(self.norms)
        ratio, strength = magnitude / self.norms, self.strength if "dora_scale" in self.keys else 1.0
        state.scale((1 - strength) + strength * ratio)
        state.terms += [term.scaled(strength * ratio) for term in terms]

    def values_beside(self) -> int:
        """How many values a linear layer keeps of it beside its own: see `Changed.beside`; reads nothing."""
        shapes = {role: self.file.tensors[key].shape for role, key in self.keys.items()}
        outputs, inputs = self.shape[0], prod(self.shape[1:])
        kind, found = kind_of(self.keys), 0
        if kind == "LoRA":
            found = shapes["down"][0] * (outputs + inputs)
        elif kind == "LoHa":
            found = min(shapes[LOHA[1]][0] * shapes[LOHA[3]][0] * (outputs + inputs), outputs * inputs)
        elif kind == "LoKr" and not {*MAGNITUDES} & shapes.keys():  # which would scale its rows, one by one
            left = prod(shapes["lokr_w1"]) if "lokr_w1" in shapes else shapes[W1[0]][0] * shapes[W1[1]][1]
            found = left + outputs * inputs // left
        found += outputs * inputs * (kind == "LoKr" and not found or bool({"diff", "whole"} & shapes.keys()))
        return found + sum(prod(shapes[role]) for role in MAGNITUDES if role in shapes)

    def terms(self) -> list[Term]:
        """What is added, with its strength; that of LyCORIS' DoRA counts later (`apply`)."""
        strength = 1.0 if "dora_scale" in self.keys else self.strength
        kind, scale = kind_of(self.keys), strength * self.scale
        found: list[Term] = []
        if kind == "LoRA":
            found.append(self._pair("up", "down", scale))
        elif kind == "LoHa":
            found.append(Hadamard(self._pair(*LOHA[:2], scale), self._pair(*LOHA[2:])))
        elif kind == "LoKr":
            left, right = (
                self._rows(role) if role in self.keys else self._pair(f"{role}_a", f"{role}_b").matrix()
                for role in ("lokr_w1", "lokr_w2")
            )
            product = Kronecker(scale * left, right)
            found.append(Dense(self._in_patches(product.matrix())) if self.patch else product)
        for role, factor in (("diff", strength), ("up_bias", scale)):
            if role in self.keys:
                found.append(Dense(factor * self._values(role)))
        return found

    def _values(self, role: str) -> mx.array:
        """A tensor with as many values as the parameter, in its shape."""
        return self._in_patches(self._rows(role)) if self.patch else self._read(role).reshape(self.shape)

    def _magnitude(self) -> mx.array | None:
        """DoRA's norms of the rows, (outputs, 1), or of the columns, (1, inputs)."""
        role = next((role for role in MAGNITUDES if role in self.keys), None)
        if role is None:
            return None
        of_columns = role == "dora_scale" and self.file.tensors[self.keys[role]].shape[:1] == (1,)
        return self._read(role).reshape((1, -1) if of_columns else (-1, 1))

    def _pair(self, up: str, down: str, scale: float = 1.0) -> Product:
        over_inputs = down in ("down", "hada_w1_b", "hada_w2_b") and self.patch
        rows = self._rows(down)
        return Product(self._rows(up), self._in_patches(rows) if over_inputs else rows, scale)

    def _rows(self, role: str) -> mx.array:
        """A tensor as a matrix, with the axes of a convolution's kernel flattened into its inputs."""
        array = self._read(role)
        return array.reshape(array.shape[0], -1)

    def _in_patches(self, array: mx.array) -> mx.array:
        """A matrix over a patch embedding's inputs (channels, patch) → channels last, as in the model."""
        return array.reshape(array.shape[0], -1, self.patch).swapaxes(1, 2).reshape(array.shape)

    def _read(self, role: str) -> mx.array:
        """A tensor, float32."""
        with mx.stream(mx.cpu):  # read immediately: GPU work must not wait on a file
            array = self.file.read(self.keys[role]).astype(mx.float32)
            mx.eval(array)
            if role in NEVER_ZERO and not array.any().item():
                raise only_zeros(self.file.path, self.keys[role])
            if not mx.isfinite(array).all().item():
                raise WeightsError(
                    f"{self.file.path}: {self.keys[role]} holds NaN or infinite values, as where training failed; take "
                    "an earlier save of it"
                )
        return array


def changed(changes: Iterable[Change], base: Callable[[], mx.array]) -> Changed:
    """A parameter after ``changes``, one after the other; ``base``: returns its values before, float32."""
    state = Changed()
    for change in changes:
        change.apply(state, base)
    return state


def merged(changes: Iterable[Change], array: mx.array) -> mx.array:
    """A float32 parameter with its changes."""
    return changed(changes, lambda: array).of(array)
