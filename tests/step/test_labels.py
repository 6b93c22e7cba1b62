"""Labels: those that do not count, against numpy in float64, and those that are no class."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of, wide
from runs import digits
from steps import LIFTS, RANDOM, run

import trainer
from trainer.config.settings import check
from trainer.data.digits import load
from trainer.data.stream import ArraySource
from trainer.errors import NonFiniteLoss, UserError
from trainer.losses import softmax_cross_entropy
from trainer.metrics import accuracy, bits
from trainer.run.smoke import smoke
from trainer.step.init import init_state
from trainer.step.job import build_job
from trainer.step.labels import LabelCheck
from trainer.step.per_example import blend, per_example, sum_and_count
from trainer.step.task import Recipe, Task

EXAMPLES, LENGTH, CLASSES = 16, 5, 4
X = RANDOM.normal(size=(EXAMPLES, LENGTH, 3)).astype(np.float32)
Y = RANDOM.integers(CLASSES, size=(EXAMPLES, LENGTH)).astype(np.int32)
Y[RANDOM.random(size=Y.shape) < 0.4] = -100
Y[:4] = -100  # all of the first of four devices
MASK = (np.arange(EXAMPLES) % 5 != 1).astype(np.float32)

IGNORED = {"ignore_index": -100}
TOKENS = Task(
    nn.Dense(CLASSES),
    functools.partial(softmax_cross_entropy, **IGNORED),
    optax.sgd(1.0),
    metrics={
        "accuracy": functools.partial(accuracy, **IGNORED),
        "bits": functools.partial(bits, **IGNORED),
    },
)


def expected_of(params, mask):
    """Loss, accuracy and the kernel's gradient over the positions that count, in float64."""
    x, kernel = X.astype(np.float64), np.asarray(params["kernel"], np.float64)
    logits = x @ kernel + np.asarray(params["bias"], np.float64)
    counted = (Y >= 0) & (mask[:, None] > 0)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    hot = np.eye(CLASSES)[np.where(Y >= 0, Y, 0)]
    loss = -np.log((shares * hot).sum(-1))[counted].mean()
    hits = (logits.argmax(-1) == Y)[counted].mean()
    slopes = np.where(counted[..., None], shares - hot, 0) / counted.sum()
    return loss, hits, np.einsum("eti,etc->ic", x, slopes)


@pytest.mark.parametrize("lift", [wide(LIFTS[0]), *LIFTS[2:]], ids=str)
@pytest.mark.parametrize("parts", [1, wide(4)])
@pytest.mark.parametrize("masked", [wide(False), True])
def test_the_mean_is_over_the_positions_that_count_wherever_they_are(lift, parts, masked):
    mask = MASK if masked else np.ones(EXAMPLES, np.float32)
    batch = {"x": X, "y": Y} | ({"mask": mask} if masked else {})
    before = init_state(TOKENS, 0, X[0]).params
    loss, hits, slopes = expected_of(before, mask)
    state, metrics = run(TOKENS, Recipe(accum_steps=parts), batch=batch, lift=lift, steps=1)
    found = [metrics[name] for name in ("loss", "accuracy", "bits")]
    np.testing.assert_allclose(found, [loss, hits, loss / np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(before["kernel"] - state.params["kernel"], slopes, atol=1e-6)


def test_a_batch_in_which_nothing_counts_changes_nothing_and_says_so():
    batch = {"x": X, "y": np.full_like(Y, -100)}
    state, metrics = run(TOKENS, batch=batch, steps=1)
    before = init_state(TOKENS, 0, X[0]).params
    np.testing.assert_array_equal(state.params["kernel"], before["kernel"])
    assert np.isnan(metrics["loss"])
    assert metrics["grad_norm"] == 0
    assert "no example of that step counts" in str(NonFiniteLoss(1, metrics))


def test_weights_of_blended_labels_are_blended():
    logits = jnp.asarray(RANDOM.normal(size=(8, CLASSES)))
    labels = np.array([0, -100, 2, -100, 1, 3, -100, 0])
    others = np.roll(labels, 1)
    values = [
        per_example(TOKENS.loss, logits, {"x": logits, "y": jnp.asarray(y)}, "config.loss")
        for y in (labels, others)
    ]
    total, count = sum_and_count(blend(*values, jnp.float32(0.3)))
    shares = np.log(jax.nn.softmax(logits))
    expected = sum(
        weight * -shares[row, label]
        for weight, y in ((0.3, labels), (0.7, others))
        for row, label in enumerate(y)
        if label >= 0
    )
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(count, 5, rtol=1e-6)


def test_a_label_that_is_no_class_has_no_loss():
    labels = jnp.array([-1, -100, 4, 255, 3])
    loss = softmax_cross_entropy(jnp.zeros((5, 4)), {"y": labels})
    assert np.isnan(loss).tolist() == [True, True, True, True, False]
    assert np.isnan(softmax_cross_entropy(jnp.zeros((1, 4)), {"y": jnp.array([1.5])})).all()


@pytest.mark.parametrize("value", [-1, -100, 4, 255, 2**32 + 1, 1.5, np.nan])
def test_the_check_names_the_example_and_its_label(value):
    dtype = np.int64 if isinstance(value, int) else np.float64
    y = np.where(Y >= 0, Y, 0).astype(dtype)
    y[7, 3] = value
    task = Task(TOKENS.model, softmax_cross_entropy, optax.sgd(0.1), traced={(5, 4)})
    checked, numbers = LabelCheck(task, "training", rank=1), np.arange(100, 100 + EXAMPLES)
    expected = rf"config.loss: the label {value} of training example 107 at position 3 .* rank 1"
    with pytest.raises(UserError, match=expected):
        checked.check({"x": X, "y": y}, numbers)
    scanned = {"x": X.reshape(2, 8, 5, 3), "y": y.reshape(2, 8, 5)}
    with pytest.raises(UserError, match=expected):
        checked.check(scanned, numbers.reshape(2, 8))
    checked.check({"x": X, "y": y, "mask": np.arange(EXAMPLES) != 7}, numbers)
    y[7, 3] = 0
    checked.check({"x": X, "y": y}, numbers)
    checked.check({"x": X, "y": RANDOM.normal(size=(EXAMPLES, 2))}, numbers)  # no labels of classes


def test_the_check_knows_the_shapes_of_training_and_of_evaluation():
    """Texts of another length in the evaluation, traced last, do not turn off the check."""
    task = Task(TOKENS.model, softmax_cross_entropy, optax.sgd(0.1))
    state = init_state(task, 0, X[0])
    for train, x in ((True, X), (False, X[:, :2])):
        task.apply(state.params, {}, {"x": x}, train=train, rng=jax.random.key(0))
    for length in (LENGTH, 2):
        y = np.zeros((EXAMPLES, length), np.int32)
        LabelCheck(task, "training").check({"y": y}, np.arange(EXAMPLES))
        y[7, 1] = CLASSES
        with pytest.raises(UserError, match="the label 4 of training example 7 at position 1 "):
            LabelCheck(task, "training").check({"y": y}, np.arange(EXAMPLES))


def relabelled(**labels):
    """The digits, with the labels of some examples replaced: `train_70=-1`."""

    def build(seed):
        data = load()
        for place, label in labels.items():
            split, _, row = place.partition("_")
            y = data[split]["y"].astype(np.int64)
            y[int(row) if row else slice(None)] = label
            data[split] = {**data[split], "y": y}
        return data

    return build


first_bad = relabelled(train=10)
one_bad = relabelled(train_5=-1)
held_out_bad = relabelled(eval_350=255)
held_out_ignored = relabelled(eval=-100)
ignored = relabelled(train_5=-100, eval_350=-100)


def own_loss(outputs, batch):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["y"])


def config_of(data, steps=22, **loss):
    config = digits(steps, global_batch_size=64)
    config.data.target = f"test_labels:{data}"
    config.data.shuffle = False
    config.loss.update(loss)
    return config


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("first_bad", r"config.loss: the label 10 of training example 0 is none .* 10 classes"),
        ("held_out_bad", r"config.loss: the label 255 of held-out example 350 "),
    ],
)
def test_a_run_ends_with_the_label_that_is_no_class(tmp_path, data, expected):
    with pytest.raises(UserError, match=expected):
        trainer.train(config_of(data), tmp_path / "run", mesh_of(2))
    if data == "first_bad":
        with pytest.raises(UserError, match=expected):
            smoke(config_of(data), tmp_path / "smoke", mesh_of(2))


def test_a_label_in_a_batch_that_is_not_checked_is_found_by_its_loss(tmp_path):
    config = config_of("one_bad")
    config.data.shuffle = True
    order = build_job(check(config)).stream.indices_at(0, 22)
    step = int(np.nonzero(order == 5)[0][0]) + 1
    assert step > 1
    expected = (
        rf"the loss of step {step} is not finite: config.loss: the label -1 of training example 5 "
    )
    with pytest.raises(UserError, match=expected):
        trainer.train(config, tmp_path / "run", mesh_of(2))


class ReadOnce:
    """One of its labels is no class, and its batch can be read only once."""

    def __init__(self, arrays):
        self._source, self._is_read = ArraySource(arrays), False

    def __len__(self):
        return len(self._source)

    def __getitem__(self, indices):
        if indices.size > 1 and 70 in indices:
            if self._is_read:
                raise SystemExit("a fault of the user's code")
            self._is_read = True
        return self._source[indices]


def read_once(seed):
    data = relabelled(train_70=-1)(seed)
    return {**data, "train": ReadOnce(data["train"])}


def test_a_batch_that_cannot_be_read_again_does_not_hide_the_loss(tmp_path):
    with pytest.raises(NonFiniteLoss, match="loss is not finite at step 2 "):
        trainer.train(config_of("read_once"), tmp_path / "run", mesh_of(2))


def test_ignored_labels_are_no_mistake_and_metrics_ignore_them_too(tmp_path):
    config = config_of("ignored", steps=2, ignore_index=-100)
    job = build_job(check(config))
    assert job.task.metrics["accuracy"].keywords == {"ignore_index": -100}
    result = trainer.train(config, tmp_path / "run", mesh_of(2))
    assert np.isfinite(result.metrics["eval/loss"])
    config = config_of("held_out_ignored", steps=2, ignore_index=-100)
    with pytest.raises(UserError, match="no held-out example counts"):
        trainer.train(config, tmp_path / "other", mesh_of(2))


def test_a_loss_of_the_users_is_warned_of_labels_that_are_no_class(tmp_path, capsys):
    config = config_of("one_bad", steps=1)
    config.loss = {"target": "test_labels:own_loss"}
    config.metrics = {}
    config.checkpoint = {"best_metric": "eval/loss", "best_mode": "min"}
    trainer.train(config, tmp_path / "run", mesh_of(2))
    found = capsys.readouterr().err
    assert found.count("the label -1 of training example 5 is none of the model's 10 classes") == 1
