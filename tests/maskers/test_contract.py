"""The contract for the maskers of this library that need nothing but numbers."""

from __future__ import annotations

from sparse_attention_hub import (
    AdaptiveSamplingMaskerConfig,
    CausalMaskerConfig,
    LocalMaskerConfig,
    OracleTopKConfig,
    OracleTopPMaskerConfig,
    RandomSamplingMaskerConfig,
    SinkMaskerConfig,
)
from sparse_attention_hub.maskers.base import MaskerConfig
from sparse_attention_hub.testing import MaskerContract


class TestSink(MaskerContract):
    def make_config(self) -> MaskerConfig:
        return SinkMaskerConfig(sink_size=0.1)


class TestLocal(MaskerContract):
    def make_config(self) -> MaskerConfig:
        return LocalMaskerConfig(window_size=0.1)


class TestCausal(MaskerContract):
    def make_config(self) -> MaskerConfig:
        return CausalMaskerConfig()

    def full_config(self) -> MaskerConfig:
        return CausalMaskerConfig()


class TestOracleTopK(MaskerContract):
    def make_config(self) -> MaskerConfig:
        return OracleTopKConfig(heavy_size=0.1)


class TestOracleTopP(MaskerContract):
    def make_config(self) -> MaskerConfig:
        return OracleTopPMaskerConfig(top_p=0.5)


class TestRandomSampling(MaskerContract):
    def make_config(self) -> MaskerConfig:
        return RandomSamplingMaskerConfig(sampling_rate=0.1)


class TestAdaptiveSampling(MaskerContract):
    def make_config(self) -> MaskerConfig:
        return AdaptiveSamplingMaskerConfig(0.05, 0.2, 0.2, 0, 0)

    def full_config(self) -> MaskerConfig:
        return AdaptiveSamplingMaskerConfig(0.05, 0.2, 0.2, 1.0, 0)


class TestAdaptiveSamplingExact(MaskerContract):
    def make_config(self) -> MaskerConfig:
        return AdaptiveSamplingMaskerConfig(4, 0.2, 0.2, 2, 2, use_exact_estimation=True)

    def full_config(self) -> MaskerConfig:
        return AdaptiveSamplingMaskerConfig(0.05, 0.2, 0.2, 1.0, 0, use_exact_estimation=True)
