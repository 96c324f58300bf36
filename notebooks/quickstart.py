# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart
#
# From a plain optax loop to a pruned one, on the digits of scikit-learn, in ten cells and less than
# a minute. There are 1,797 images of 8x8 pixels, 540 of them to test on.

# %%
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

# The experiments are no installed package: find them from the repository or a folder in it.
sys.path.extend(str(p) for p in (Path.cwd(), *Path.cwd().parents) if (p / "experiments").is_dir())

import jaxprune as jp
from experiments.common.show import draw_masks

split = train_test_split(*load_digits(return_X_y=True), test_size=540, random_state=0)
images, test_images = (jnp.asarray(x / 16, jnp.float32) for x in split[:2])
labels, test_labels = map(jnp.asarray, split[2:])

# %% [markdown]
# A small network, and how often it is right.


# %%
class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(128)(x))
        x = nn.relu(nn.Dense(64)(x))
        return nn.Dense(10)(x)


model = MLP()
params_init = model.init(jax.random.key(0), images)["params"]


def loss(params, x, y):
    logits = model.apply({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def accuracy(params):
    guesses = model.apply({"params": params}, test_images).argmax(-1)
    return (guesses == test_labels).mean()


# %% [markdown]
# A plain optax loop, written as a scan: 600 steps on random batches.


# %%
def train(tx, params, steps=600):
    def step(carry, key):
        params, state = carry
        batch = jax.random.choice(key, len(images), (64,))
        grads = jax.grad(loss)(params, images[batch], labels[batch])
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), steps)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, keys)[0])
    return run((params, tx.init(params)))


dense, _ = train(optax.adam(3e-3), params_init)
print(f"accuracy {accuracy(dense):.3f}")

# %% [markdown]
# **One shot.** Remove the 90 % of the weights of each layer that are smallest; biases stay.

# %%
masks = jp.find_masks(dense, 0.9)
pruned = jp.apply_masks(dense, masks)
print(f"accuracy {accuracy(pruned):.3f}")
jp.summary(pruned, masks)

# %% [markdown]
# Masks are a tree like the params, so that the picture of a mask is the picture of an array. What
# is blue stays.

# %%
draw_masks(masks, dense, corner=128)

# %% [markdown]
# **Fine-tune.** `hold` wraps the optimizer so that the removed weights stay exactly zero.

# %%
tuned, _ = train(jp.hold(optax.adam(3e-3), masks=masks), pruned)
print(f"accuracy {accuracy(tuned):.3f}")

# %% [markdown]
# **Gradual.** `prune` removes while the network trains, in the same loop: dense until step 100,
# 90 % from step 400 on, here of all weights together (`across`) instead of layer by layer.

# %%
schedule = jp.schedules.cubic(0.9, begin=100, end=400, every=20)
tx = jp.prune(optax.adam(3e-3), schedule=schedule, scope=jp.scopes.across)
gradual, state = train(tx, params_init)
print(f"accuracy {accuracy(gradual):.3f}")
draw_masks(jp.get_masks(state), gradual, corner=128)

# %% [markdown]
# **N:M.** In 2:4 sparsity two of every four neighbours along the input axis stay; the last layer is
# left out by its path. The picture is a corner of 16 by 16 weights.

# %%
tx = jp.prune(
    optax.adam(3e-3),
    schedule=jp.schedules.linear(0.5, begin=100, end=300, every=100),
    scope=jp.scopes.windows(4),
    where=jp.by_path("Dense_[01]/kernel"),
)
two_four, state = train(tx, params_init)
print(f"accuracy {accuracy(two_four):.3f}")
draw_masks(jp.get_masks(state), two_four, corner=16)

# %% [markdown]
# **Channels.** Half of the hidden units lose all of their inputs: a mask of shape `[1, units]`
# speaks for whole columns of the kernel.

# %%
tx = jp.prune(
    optax.adam(3e-3),
    schedule=jp.schedules.cubic(0.5, begin=100, end=400, every=20),
    pattern=jp.patterns.Channels(-1),
    where=jp.by_path("Dense_[01]/kernel"),
)
channels, state = train(tx, params_init)
print(f"accuracy {accuracy(channels):.3f}", jax.tree.map(jnp.shape, jp.get_masks(state)))
draw_masks(jp.get_masks(state), channels, corner=128)

# %% [markdown]
# **How far down?** Sparsity may be traced, so that all sparsities train side by side under `vmap`.


# %%
def one_shot(sparsity):
    return accuracy(jp.apply_masks(dense, jp.find_masks(dense, sparsity)))


def gradually(sparsity):
    schedule = jp.schedules.cubic(sparsity, begin=100, end=400, every=20)
    return accuracy(train(jp.prune(optax.adam(3e-3), schedule=schedule), params_init)[0])


sparsities = jnp.array([0.0, 0.5, 0.8, 0.9, 0.95, 0.98])
for method in (one_shot, gradually):
    plt.plot(100 * sparsities, 100 * jax.vmap(method)(sparsities), "o-", label=method.__name__)
plt.xlabel("sparsity [%]")
plt.ylabel("test accuracy [%]")
plt.legend(frameon=False)
plt.show()
