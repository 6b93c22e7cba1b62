"""A small transformer that predicts the next character of Python's own documentation.

    python -m launcher --config=configs/char_lm.py

The text is `pydoc_data.topics`, about 465,000 characters, which every Python contains. The model
has dropout and no batch normalisation.

Takes 80 seconds on two cores and reaches 2.48 bits per character (`eval/bits_per_char`; 1.72
nats, the loss) on the held-out tenth.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    length, vocab_size = 64, 96
    return ConfigDict(
        {
            "num_epochs": 3,
            "global_batch_size": 64,
            "model": {
                "target": "trainer.models.transformer:Transformer",
                "vocab_size": vocab_size,
                "max_length": length,
                "width": 96,
                "num_layers": 2,
                "num_heads": 4,
                "dropout": 0.1,
            },
            "loss": {"target": "trainer.losses:softmax_cross_entropy"},
            "metrics": {
                "accuracy": {"target": "trainer.metrics:accuracy"},
                "bits_per_char": {"target": "trainer.metrics:bits"},
            },
            "data": {
                "target": "trainer.data.text:characters",
                "length": length,
                "vocab_size": vocab_size,
                "stride": 32,
            },
            "optimizer": {
                "target": "optax:adamw",
                "learning_rate": {"target": "trainer.schedules:warmup_cosine", "peak_value": 3e-3},
            },
        }
    )
