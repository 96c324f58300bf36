"""Losses of a student: against NumPy, and with a student that was cut out of its teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def slow_loss(student, teacher, labels, temperature, alpha):
    """Hinton's loss one row at a time; the soft part less the teacher's entropy."""
    total = 0.0
    for z, v, y in zip(student, teacher, labels, strict=True):
        p, q = softmax(v / temperature), softmax(z / temperature)
        soft = sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True))
        hard = -sum(a * np.log(b) for a, b in zip(y, softmax(z), strict=True))
        total += alpha * temperature**2 * soft + (1 - alpha) * hard
    return total / len(student)


@pytest.fixture
def logits(key):
    student, teacher = jax.random.normal(key, (2, 6, 5)) * 3
    return student, teacher, jnp.array([0, 4, 2, 1, 1, 3])


@pytest.mark.parametrize("temperature, alpha", [(1.0, 0.5), (4.0, 0.9), (20, 0), (0.5, 1)])
@pytest.mark.parametrize("kind", ["integers", "one-hot", "soft"])
def test_the_loss_is_the_papers(logits, temperature, alpha, kind):
    student, teacher, labels = logits
    rows = jax.nn.one_hot(labels, 5)
    rows = 0.9 * rows + 0.02 if kind == "soft" else rows
    given = labels if kind == "integers" else rows
    got = jp.distillation_loss(student, teacher, given, temperature=temperature, alpha=alpha)
    arrays = [np.asarray(x, np.float64) for x in (student, teacher, rows)]
    assert float(got) == pytest.approx(slow_loss(*arrays, temperature, alpha), rel=1e-5)


def test_jitted_and_over_more_axes_the_loss_is_the_same(logits):
    student, teacher, labels = logits
    want = jp.distillation_loss(student, teacher, labels, temperature=3.0, alpha=0.3)
    loss = jax.jit(lambda t, a, *x: jp.distillation_loss(*x, temperature=t, alpha=a))
    split = [x.reshape(2, 3, *x.shape[1:]) for x in (student, teacher, labels)]
    np.testing.assert_allclose(loss(3.0, 0.3, *split), want, rtol=1e-6)


def test_the_teacher_gets_no_gradient_and_the_student_one_that_scales(logits):
    student, teacher, labels = logits
    soft = lambda t: lambda s, v: jp.distillation_loss(s, v, labels, temperature=t, alpha=1.0)
    to_student, to_teacher = jax.grad(soft(2.0), (0, 1))(student, teacher)
    assert not to_teacher.any() and to_student.any()
    sizes = [jnp.linalg.norm(jax.grad(soft(t))(student, teacher)) for t in (10.0, 100.0)]
    assert sizes[0] / sizes[1] == pytest.approx(1, rel=0.3)  # without T^2 it would be 100


def test_equal_logits_leave_the_hard_part_alone(logits):
    student, _, labels = logits
    got = jp.distillation_loss(student, student, labels, alpha=0.25)
    hard = optax.losses.softmax_cross_entropy_with_integer_labels(student, labels).mean()
    np.testing.assert_allclose(got, 0.75 * hard, rtol=1e-6)


def test_half_precision_logits_are_compared_in_float32(logits):
    student, teacher, labels = (x.astype(jnp.bfloat16) for x in logits)
    got = jp.distillation_loss(student, teacher, labels.astype(jnp.int32))
    want = jp.distillation_loss(
        student.astype(jnp.float32), teacher.astype(jnp.float32), labels.astype(jnp.int32)
    )
    assert got.dtype == jnp.float32 and got == want


@pytest.mark.parametrize(
    "change, words",
    [
        ({"teacher_logits": jnp.ones((6, 4))}, r"teacher logits of shape \(6, 4\).*same classes"),
        ({"labels": jnp.ones(6)}, r"float32 labels of shape \(6,\).*integer classes of shape \(6,"),
        ({"labels": jnp.ones((6, 5), int)}, r"int32 labels of shape \(6, 5\)"),
        ({"labels": jnp.ones(3, int)}, r"labels of shape \(3,\) for logits of shape \(6, 5\)"),
        ({"temperature": 0.0}, r"temperature=0.0. It has to be above 0"),
        ({"temperature": -2}, r"temperature=-2. It has to be above 0"),
        ({"temperature": float("nan")}, r"temperature=nan. It has to be above 0"),
        ({"alpha": 1.5}, r"alpha=1.5. It has to be in \[0, 1\]"),
    ],
)
def test_what_does_not_fit_is_named(logits, change, words):
    student, teacher, labels = logits
    given = {"student_logits": student, "teacher_logits": teacher, "labels": labels, **change}
    with pytest.raises(ValueError, match=words):
        jp.distillation_loss(**given)


# Features


@pytest.mark.parametrize("keep", [[0, 2], np.array([0, 2]), jnp.array([True, False, True])])
def test_kept_features_are_matched_with_what_they_were(keep):
    teacher = jnp.array([[1.0, 50.0, 3.0], [2.0, 60.0, 4.0]])
    student = jnp.array([[1.0, 5.0], [0.0, 4.0]])  # differs by 0, 2, 2, 0
    assert float(jp.feature_loss(student, teacher, keep)) == 2.0
    assert float(jp.feature_loss(student.T, teacher.T, keep, axis=0)) == 2.0
    to_teacher = jax.grad(lambda t: jp.feature_loss(student, t, keep))(teacher)
    assert not to_teacher.any()


def test_features_that_do_not_fit_are_named():
    teacher = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"shape \(2, 2\), but those of the teacher have shape"):
        jp.feature_loss(jnp.ones((2, 2)), teacher)
    with pytest.raises(ValueError, match=r"of the teacher that are kept have shape \(2, 1\)"):
        jp.feature_loss(jnp.ones((2, 2)), teacher, [0])
    with pytest.raises(ValueError, match=r"keep=\[0, 3\], but the teacher has 3 features"):
        jp.feature_loss(jnp.ones((2, 2)), teacher, [0, 3])
    with pytest.raises(ValueError, match=r"bool mask of shape \(3,\)"):
        jp.feature_loss(jnp.ones((2, 2)), teacher, np.array([True, False]))


# A student that was cut out of its teacher


def teach(params, x):
    """Logits and hidden features."""
    hidden = jax.nn.relu(x @ params["w"] + params["b"][None])
    return hidden @ params["v"], hidden


def logits_of(params, x):
    return teach(params, x)[0]


@pytest.fixture
def student(key):
    w, v = jax.random.split(key)
    params = {
        "w": jax.random.normal(w, (4, 8)),
        "b": jnp.zeros(8),
        "v": jax.random.normal(v, (8, 3)),
    }
    x = jax.random.normal(key, (32, 4))
    groups = jp.find_groups(logits_of, params, x)
    masks = jp.find_masks(params, 0.5, pattern=jp.patterns.Coupled(groups))
    return params, masks, x


def test_a_shrunk_function_may_return_the_features_that_are_left(student):
    params, masks, x = student
    small_fn, small = jp.shrink(teach, params, masks, cut_outputs=True)
    logits, hidden = small_fn(small, x)
    keep = jp.cut_list(params, masks)["w"][1]
    want_logits, want_hidden = teach(jp.apply_masks(params, masks), x)
    np.testing.assert_allclose(logits, want_logits, rtol=1e-5)
    np.testing.assert_allclose(hidden, want_hidden[:, np.array(keep)], rtol=1e-6)
    assert float(jp.feature_loss(hidden, teach(params, x)[1], keep)) == pytest.approx(0, abs=1e-10)
    with pytest.raises(ValueError, match="it is axis 1 of an output"):
        jp.shrink(teach, params, masks)[0](small, x)


def test_a_student_learns_from_the_teacher_that_it_was_cut_from(student):
    params, masks, x = student
    small_fn, small = jp.shrink(teach, params, masks, cut_outputs=True)
    keep = jp.cut_list(params, masks)["w"][1]
    teacher_logits, teacher_hidden = teach(params, x)
    labels = jnp.argmax(teacher_logits, -1)
    tx = optax.adam(0.03)

    def loss_fn(small):
        logits, hidden = small_fn(small, x)
        loss = jp.distillation_loss(logits, teacher_logits, labels, temperature=2.0, alpha=0.9)
        return loss + 0.1 * jp.feature_loss(hidden, teacher_hidden, keep)

    @jax.jit
    def step(small, state):
        loss, grads = jax.value_and_grad(loss_fn)(small)
        updates, state = tx.update(grads, state, small)
        return optax.apply_updates(small, updates), state, loss

    state, losses = tx.init(small), []
    for _ in range(100):
        small, state, loss = step(small, state)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
