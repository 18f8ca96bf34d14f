"""Eviction methods, one file each."""

from cab_attention.methods.adakv import AdaKV
from cab_attention.methods.base import CachedKeys, Method
from cab_attention.methods.cab import CAB
from cab_attention.methods.expected_attention import ExpectedAttention
from cab_attention.methods.full import Full
from cab_attention.methods.h2o import H2O
from cab_attention.methods.key_diff import KeyDiff
from cab_attention.methods.key_norm import KeyNorm
from cab_attention.methods.pyramidkv import PyramidKV
from cab_attention.methods.random import Random
from cab_attention.methods.snapkv import SnapKV
from cab_attention.methods.streaming_llm import StreamingLLM
from cab_attention.methods.tova import TOVA

__all__ = [
    "CAB",
    "H2O",
    "TOVA",
    "AdaKV",
    "CachedKeys",
    "ExpectedAttention",
    "Full",
    "KeyDiff",
    "KeyNorm",
    "Method",
    "PyramidKV",
    "Random",
    "SnapKV",
    "StreamingLLM",
]
