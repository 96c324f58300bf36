"""Losses that let a small network learn from a large one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxprune._tree import wide


def distillation_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    temperature: ArrayLike = 4.0,
    alpha: ArrayLike = 0.5,
) -> jax.Array:
    r"""Compare a student with its teacher's softened predictions and with the labels.

    With softmax :math:`\sigma`, temperature :math:`T`, student :math:`z` and teacher :math:`v`

    .. math:: \alpha T^2 \, KL(\sigma(v/T) \,\|\, \sigma(z/T)) + (1 - \alpha) \, CE(y, \sigma(z)),

    the mean over all leading axes. The factor :math:`T^2` keeps the gradients of the soft part as
    large as those of the hard part, whatever the temperature. No gradient reaches the teacher.

    Args:
      student_logits: `[..., classes]`.
      teacher_logits: of the same shape.
      labels: integer classes `[...]`, or probabilities `[..., classes]`.
      temperature: positive; larger ones tell more of the classes that the teacher thinks unlikely.
        May be traced.
      alpha: weight of the teacher in [0, 1]; 0 is the plain cross entropy. May be traced.

    Returns:
      A scalar, in float32 at least.

    Raises:
      ValueError: logits of different shapes, labels that are neither, ``temperature`` not
        positive, ``alpha`` outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> teacher, labels = jnp.array([[2.0, 0.0]]), jnp.array([0])
      >>> float(distillation_loss(teacher, teacher, labels, alpha=1.0))
      0.0
      >>> round(float(distillation_loss(jnp.zeros((1, 2)), teacher, labels, alpha=0.0)), 4)
      0.6931

    References:
      Hinton et al., `Distilling the Knowledge in a Neural Network
      <https://arxiv.org/abs/1503.02531>`_, 2015. There the soft part is a cross entropy; ours is
      less by the teacher's entropy, a constant, so that it is zero where both agree.
    """
    _check_logits(student_logits, teacher_logits, labels)
    _check_range("temperature", temperature, lambda t: t > 0, "above 0; the paper tries 1 to 20")
    _check_range("alpha", alpha, lambda a: 0 <= a <= 1, "in [0, 1]; it is the teacher's weight")
    student, teacher = wide(student_logits), jax.lax.stop_gradient(wide(teacher_logits))
    soft = optax.losses.kl_divergence_with_log_targets(
        jax.nn.log_softmax(student / temperature), jax.nn.log_softmax(teacher / temperature)
    )
    if jnp.ndim(labels) == student.ndim:
        hard = optax.losses.softmax_cross_entropy(student, labels)
    else:
        hard = optax.losses.softmax_cross_entropy_with_integer_labels(student, labels)
    return jnp.mean(alpha * temperature**2 * soft + (1 - alpha) * hard)


def feature_loss(
    student_features: jax.Array, teacher_features: jax.Array, keep: Any = None, *, axis: int = -1
) -> jax.Array:
    """Compare hidden features of a student with those of its teacher: the mean squared error.

    A student that was cut out of its teacher has some of the teacher's features, in the same order;
    ``keep`` says which, and each is matched with the one that it was. Features that were cut have
    no counterpart and do not count. No gradient reaches the teacher.

    Args:
      student_features: an array with an axis of features.
      teacher_features: of the same shape but for that axis.
      keep: the teacher's features that the student still has: increasing indices, as
        ``jp.cut_list`` gives them for an axis of a weight, or a bool mask of all features. None
        where nothing was cut.
      axis: the axis of features.

    Returns:
      A scalar, in float32 at least: the mean over all entries that are compared.

    Raises:
      ValueError: shapes that differ once ``keep`` has been applied, or indices out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> params = {"w": jnp.array([[1.0, 3.0, 2.0]])}
      >>> cut = jp.cut_list(params, {"w": jnp.array([[True, False, True]])})
      >>> hidden = jnp.array([[5.0, 6.0, 7.0]])
      >>> float(feature_loss(jnp.array([[5.0, 9.0]]), hidden, cut["w"][1]))
      2.0

    References:
      Romero et al., `FitNets: Hints for Thin Deep Nets <https://arxiv.org/abs/1412.6550>`_, 2015.
      There a learned layer brings both to one width; features that were never mixed need none.
    """
    if keep is not None:
        size = teacher_features.shape[axis]
        teacher_features = jnp.take(teacher_features, _indices(keep, size), axis=axis)
    if jnp.shape(student_features) != jnp.shape(teacher_features):
        raise ValueError(
            f"`feature_loss` got student features of shape {jnp.shape(student_features)}, but "
            f"those of the teacher {'that are kept ' if keep is not None else ''}have shape "
            f"{jnp.shape(teacher_features)}. Pass the indices that `jp.cut_list` has for the axis "
            "as `keep`."
        )
    teacher = jax.lax.stop_gradient(wide(teacher_features))
    return jnp.mean(optax.losses.squared_error(wide(student_features), teacher))


def _indices(keep: Any, size: int) -> np.ndarray:
    found = np.asarray(keep)
    if found.dtype == bool:
        found = np.nonzero(found)[0] if found.shape == (size,) else np.array([size])
    if found.ndim != 1 or (found.size and not 0 <= found.min() <= found.max() < size):
        raise ValueError(
            f"`feature_loss` got keep={keep}, but the teacher has {size} features. Pass indices "
            f"below {size}, or a bool mask of shape ({size},)."
        )
    return found.astype(np.int64)


def _check_logits(student: Any, teacher: Any, labels: Any) -> None:
    shape = jnp.shape(student)
    if shape != jnp.shape(teacher):
        raise ValueError(
            f"`distillation_loss` got student logits of shape {shape} and teacher logits of shape "
            f"{jnp.shape(teacher)}. Both need the same batch and the same classes; pick the "
            "classes that the student has from the teacher's last axis."
        )
    integers = jnp.issubdtype(jnp.asarray(labels).dtype, jnp.integer)
    if jnp.shape(labels) != (shape[:-1] if integers else shape):
        raise ValueError(
            f"`distillation_loss` got {jnp.asarray(labels).dtype} labels of shape "
            f"{jnp.shape(labels)} for logits of shape {shape}. Pass integer classes of shape "
            f"{shape[:-1]}, or probabilities of shape {shape} as floats."
        )


def _check_range(name: str, value: Any, fits: Any, wanted: str) -> None:
    if not isinstance(value, jax.core.Tracer) and not fits(value):
        raise ValueError(f"`distillation_loss` got {name}={value}. It has to be {wanted}.")
