from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import peft
import pytest

from scdlkit.foundation.strategies import AnyPeft, AnyPeftConfig, LoRAConfig, TrainingConfig, build_strategies
from scdlkit.foundation.training import Trainer

from .test_encoder_strategies import data_of

CONFIGS = {
    "dora": peft.LoraConfig(r=4, use_dora=True, target_modules=["q", "k"]),
    "vera": peft.VeraConfig(r=8, target_modules=["q", "v"]),
    "oft": peft.OFTConfig(oft_block_size=8, target_modules=["q", "fc2"]),
    "loha": peft.LoHaConfig(r=2, target_modules=["v", "fc1"]),
    "defaults": peft.LoraConfig(r=2),
}
TRAINING = TrainingConfig(learning_rate=3e-3, batch_size=16, max_epochs=2)


@pytest.fixture(scope="module")
def data(checkpoint):
    return data_of(checkpoint, 12)


@pytest.mark.parametrize("case", CONFIGS)
def test_any_method_of_peft(case, data):
    (strategy,) = build_strategies([f"my_{case}"], {f"my_{case}": CONFIGS[case]})
    assert isinstance(strategy, AnyPeft) and strategy.name == f"my_{case}"
    strategy.config = replace(strategy.config, training=TRAINING)
    strategy.source = data.source
    strategy.fit(data.train, data.val, n_classes=3, seed=0, device="cpu", trainer=Trainer(progress=False))
    assert 0 < strategy.n_trainable < 12_000
    assert np.abs(strategy.latent(data.val) - data.val.embedding).max() > 1e-5

    config = AnyPeftConfig.from_dict(json.loads(json.dumps(strategy.config.to_dict())))
    again = AnyPeft(config, name="again")
    again.source = data.source
    again.load_state(strategy.state_dict(), strategy.metadata())
    np.testing.assert_allclose(again.predict_proba(data.val), strategy.predict_proba(data.val), atol=1e-5)


def test_what_peft_cannot_do_is_a_clear_error(data):
    for config, message in (
        (peft.LoraConfig(target_modules=["attention"]), "peft cannot apply LoraConfig to the encoder.*q, k, v"),
        (peft.PromptTuningConfig(num_virtual_tokens=4), "peft"),
    ):
        (strategy,) = build_strategies(["mine"], {"mine": config})
        strategy.source = data.source
        with pytest.raises(ValueError, match=f"(?s){message}"):
            strategy.fit(data.train, data.val, n_classes=3, seed=0, device="cpu", trainer=Trainer(progress=False))
    with pytest.raises(ValueError, match="peft knows no method 'MAGIC'"):
        AnyPeftConfig(peft_type="MAGIC").peft_config()
    with pytest.raises(ValueError, match="does not take these settings"):
        AnyPeftConfig(peft_type="VERA", settings={"colour": 3}).peft_config()
    with pytest.raises(ValueError, match="needs a config: pass strategy_configs"):
        build_strategies(["any_peft"])


def test_own_names_for_own_configs():
    small, large = build_strategies(["small", "large"], {"small": LoRAConfig(rank=2), "large": LoRAConfig(rank=16)})
    assert (small.name, small.config.rank, large.name, large.config.rank) == ("small", 2, "large", 16)
    with pytest.raises(ValueError, match="Unknown strategy 'mine'"):
        build_strategies(["mine"])
    with pytest.raises(ValueError, match="which belongs to strategy 'lora'"):
        build_strategies(["ia3"], {"ia3": LoRAConfig()})
